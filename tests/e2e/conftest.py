"""A browser, and a console over a tiny model, for the tests of one file."""

from __future__ import annotations

import pytest

from tests.e2e.browser import Browser
from tests.e2e.console_page import Page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    try:
        browser.attach()
        yield browser
    finally:
        browser.close()


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    from tempering.console.subject import Subject
    from tempering.engines.loading.hub import load_model
    from tests.tiny import save_tiny_llama

    folder = tmp_path_factory.mktemp("model")
    return Subject.of("tiny", *load_model(save_tiny_llama(folder / "tiny")))


@pytest.fixture(scope="module")
def server(subject, tmp_path_factory):
    from tests.e2e.console_server import served

    with served(subject, tmp_path_factory.mktemp("runs")) as server:
        yield server


@pytest.fixture
def page(browser, server):
    """The page at T = 1, with neither text nor meter until a test asks for them."""
    found = Page(browser, server)
    found.open()
    found.quiet()
    yield found
    assert browser.complaints() == []
    browser.visit("about:blank", width=800)
    assert server.idle()
