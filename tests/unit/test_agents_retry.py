"""Reasons of failures as servers give them, what is tried again, and for how long."""

from __future__ import annotations

import email.utils
import json
import random
import time
from typing import Any

import pytest

from tempering.engines.providers.retry import Backoff, classify, wait_asked
from tempering.engines.providers.transport import HTTPResponse, HTTPStatusError

URL = "http://host:1/v1/chat/completions"


def failure(status: int, body: Any, headers: dict[str, str] | None = None, url: str = URL) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return classify(HTTPStatusError(HTTPResponse(status, headers or {}, data, url)))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"error": {"message": "R"}}, "R"),
        ({"error": "R"}, "R"),
        ({"error": "R", "error_type": "validation"}, "R"),
        ({"error": {"message": "R", "code": "bad_seed", "type": "t"}}, "R (bad_seed)"),
        ({"error": {"message": {"detail": "R"}}}, "R"),
        ({"error": True, "message": "R"}, "R"),
        ({"error": None, "detail": "R"}, "R"),
        ({"detail": "R"}, "R"),
        ({"detail": [{"loc": ["body", "temperature"], "msg": "R", "type": "x"}]},
         "body.temperature: R (x)"),
        ({"detail": [{"loc": ["body", 0], "msg": "R"}, {"msg": "S"}]}, "body.0: R; S"),
        ({"object": "error", "message": "R", "code": 400}, "R"),
        ({"errors": [{"message": "R"}, "S"]}, "R; S"),
        ([{"error": {"message": "R", "status": "INVALID_ARGUMENT"}}], "R (INVALID_ARGUMENT)"),
        ("R", "R"),
        ({"error": {"message": "Provider returned error", "metadata": {"raw": "R"}}},
         "Provider returned error: R"),
        ({"title": "R", "status": 400}, "R"),
        ({"odd": 1}, '{"odd": 1}'),
        (b"R plain\n\x1b[31mred", "R plain [31mred"),
        (b"R \xff\xfe", "R \ufffd\ufffd"),
        (b'{"error": {"message": "R \\ud83d"}}', "R \ufffd"),
        (b'{"error": {"message": "R", "n": NaN, "m": ' + b"9" * 5000 + b"}}", "R"),
        (b"", "Bad Request"),
        (b"[" * 100_000, "["),
        (b'{"error": {"message": "R", "x": ' + b"[" * 400 + b"]" * 400 + b"}}", "R"),
    ],
)  # fmt: skip
def test_a_server_s_reason_is_told_whatever_its_shape(body, reason):
    found = failure(400, body).reason
    assert found.startswith(f"HTTP 400: {reason}"), found
    assert len(found) <= 400 and "\x1b" not in found


def test_a_web_page_is_told_by_its_title_and_text():
    page = b"<!doctype html><html><head><title>Open WebUI</title><style>x{}</style></head><body>"
    page += b"<h1>Sign&nbsp;in</h1><script>evil()</script></body></html>"
    found = failure(503, page)
    assert found.reason.startswith("HTTP 503: a web page: Open WebUI: Sign in")
    assert found.retry and "evil" not in found.reason and "x{}" not in found.reason


@pytest.mark.parametrize(
    ("status", "body", "url", "words"),
    [
        (404, b"404 page not found", "http://h:1/chat/completions", "may be http://h:1/v1"),
        (404, {"detail": "Not Found"}, "http://h:1/chat/completions", "may be http://h:1/v1"),
        (405, {"detail": "Method Not Allowed"}, "http://h:1/chat/completions", "http://h:1/v1"),
        (200, b"<html><title>UI</title>", "http://h:1/chat/completions", "http://h:1/v1"),
        (404, b"404 page not found", URL, "may not be the server's address"),
        (307, b"", URL, "it moved to https://other/v1: give that address"),
    ],
)
def test_an_address_that_is_off_is_told(status, body, url, words):
    found = failure(status, body, {"location": "https://other/v1"}, url)
    assert words in found.reason and not found.retry


def test_a_missing_model_is_no_matter_of_the_address():
    found = failure(404, {"error": {"message": "model 'm' not found"}})
    assert found.reason == "HTTP 404: model 'm' not found"


@pytest.mark.parametrize(
    ("status", "body", "headers", "retry"),
    [
        (429, {"error": {"message": "slow"}}, {}, True),
        (429, {"error": {"code": "insufficient_quota"}}, {}, False),
        (429, {"error": {"type": "insufficient_quota", "message": "x"}}, {}, False),
        (429, {"error": {"code": "billing_hard_limit_reached"}}, {}, False),
        (429, {"error": {"details": [{"violations": [
            {"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]}]}}, {}, False),
        (429, {"error": {"details": [{"violations": [
            {"quotaId": "GenerateRequestsPerMinutePerProjectPerModel"}]}]}}, {}, True),
        (402, {"error": "credits"}, {}, False),
        (429, {"error": {"type": "exceeded_current_quota_error", "message": "m"}}, {}, False),
        (429, {"error": {"code": "1113", "message": "Insufficient account balance"}}, {}, False),
        (429, {"error": "Your account is suspended"}, {}, False),
        (503, {"detail": "You are out of credits."}, {}, False),
        (429, {"error": "You exceeded your current quota, see your plan. Retry in 6s"}, {}, True),
        (529, {"error": {"type": "overloaded_error"}}, {}, True),
        (500, {}, {}, True), (501, {}, {}, False), (505, {}, {}, False), (400, {}, {}, False),
        (500, {}, {"x-should-retry": "false"}, False),
        (409, {}, {}, True),
        (200, {"error": {"message": "m", "code": 402}}, {}, False),
        (200, {"error": {"message": "m", "code": 503}}, {}, True),
        (200, {"error": {"message": "m", "code": "429"}}, {}, True),
        (200, {"error": {"type": "overloaded_error"}}, {}, True),
        (200, {"error": "no such model"}, {}, False),
    ],
)  # fmt: skip
def test_what_passes_is_tried_again_and_what_stays_is_not(status, body, headers, retry):
    assert failure(status, body, headers).retry is retry


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ({"retry-after": "3"}, b"", 3),
        ({"retry-after": "6s"}, b"", 6),
        ({"retry-after": "1m30.5s"}, b"", 90.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, b"", 1.5),
        ({"retry-after": "-5"}, b"", None),
        ({"retry-after": "inf"}, b"", None),
        ({"retry-after": "soon"}, b"", None),
        ({}, b'{"error": {"details": [{"retryDelay": "20s"}]}}', 20),
        ({}, b'[{"error": {"details": [{"a": 1}, {"retryDelay": "6.2s"}]}}]', 6.2),
        ({}, b'{"error": {"details": {"retryDelay": "6s"}}}', 6),
        (
            {},
            b'{"error": {"details": [{"retryDelay": {"seconds": 20, "nanos": 500000000}}]}}',
            20.5,
        ),
        ({}, b'{"message": "You are being rate limited.", "retry_after": 1.337}', 1.337),
        ({}, b'{"error": {"metadata": {"retry_after_seconds": "12"}}}', 12),
        ({}, b'{"error": {"retryAfterMs": 1500}}', 1.5),
        ({}, b'{"error": {"retry_after": null, "message": "wait 30 seconds"}}', 30),
        ({}, b'{"retry_after": true, "retry-after": -3}', None),
        ({}, b'{"error": {"message": "Please try again in 1d2h."}}', 93600),
        ({}, b'{"error": {"message": "Retry your request after 2 minutes"}}', 120),
        ({}, b'{"error": {"message": "Please retry in 6.2s."}}', 6.2),
        ({}, b'{"error": {"message": "Rate limit. Please try again in 1m2s. Visit"}}', 62),
        ({}, b'{"error": {"message": "try again in 20ms"}}', 0.02),
        ({}, b'{"error": {"message": "try again in a while"}}', None),
    ],
)
def test_the_wait_that_a_server_asks_for(headers, body, seconds):
    found = wait_asked(headers, body)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_a_date_to_wait_for():
    later = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert wait_asked({"retry-after": later}) == pytest.approx(30, abs=2)
    past = email.utils.formatdate(time.time() - 30, usegmt=True)
    assert wait_asked({"retry-after": past}) is None


def test_a_wait_is_kept_or_given_up_never_shortened():
    asked = failure(429, {"error": {"message": "m", "details": [{"retryDelay": "20s"}]}})
    backoff, rng = Backoff(), random.Random(0)
    assert [backoff.wait(attempt, asked, rng) for attempt in (1, 2, 5)] == [20, 20, 20]
    assert backoff.wait(6, asked, rng) is None
    day = failure(429, {"error": "m"}, {"retry-after": "600"})
    assert backoff.wait(1, day, rng) is None and backoff.too_long(day)


def test_errors_of_the_sdks_are_understood():
    # Their exceptions carry the answer as `response`.
    httpx = pytest.importorskip("httpx")

    class StatusError(Exception):
        response = httpx.Response(429, json={"error": "R"}, headers={"Retry-After": "7"})

    assert classify(StatusError()) == ("HTTP 429: R", True, 7.0)
