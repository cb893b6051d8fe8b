"""Attacks on the console: other sites, other names, other files, too much."""

from __future__ import annotations

import json

import pytest

from tempering.console import fields
from tempering.console.safety import is_loopback
from tempering.reports import Record
from tests.integration.console_client import HOST, ONES, TOKEN, asked, tiny_subject


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return tiny_subject(tmp_path_factory.mktemp("model"))


@pytest.fixture
def page(subject, tmp_path):
    with asked(subject, tmp_path / "runs") as page:
        yield page


def test_the_page_opens_with_its_token_and_states_its_policy(page):
    answer = page.client.get(f"/?token={TOKEN}")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy
    assert "unsafe" not in policy and "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-store"
    assert TOKEN not in answer.text


@pytest.mark.parametrize("path", ["/", "/api/state", "/api/records", "/reports/x"])
@pytest.mark.parametrize("token", [None, "", "secre", "secret2", "SECRET", "sécret"])
def test_nothing_but_files_of_the_package_without_the_token(page, path, token):
    answer = page.client.get(path, params=None if token is None else {"token": token})
    assert answer.status_code == 401
    assert "terminal" in answer.text and TOKEN not in answer.text


def test_what_acts_wants_the_token_in_a_header(page):
    """A link or a form of another page can put it into an address at most."""
    assert page.client.get("/api/state", params={"token": TOKEN}).status_code == 401
    answer = page.client.post("/api/pattern", params={"token": TOKEN}, json={"text": "constant(1)"})
    assert answer.status_code == 401
    assert page.get("/api/state").status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:7861", "127.0.0.1", "127.0.0.1:80", "127.0.0.1:78610",
        "127.0.0.1.evil.example:7861", "localhost.evil.example:7861", "127.0.0.1@evil:7861",
        "192.168.0.7:7861", "", "[::1]", "0.0.0.0:7861", "127.0.0.1:7861:7861", "127.0.0.1:+7861",
    ],
)  # fmt: skip
def test_another_name_is_refused(page, host):
    answer = page.client.get("/", params={"token": TOKEN}, headers={"host": host})
    assert answer.status_code == 403
    # Also for the files, which a page of that name could otherwise load.
    assert page.client.get("/static/app.js", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "[::1]", "LOCALHOST"])
def test_its_own_names_are_answered(page, name):
    headers = {"host": f"{name}:7861"}
    answer = page.client.get("/", params={"token": TOKEN}, headers=headers)
    assert answer.status_code == 200


def test_beyond_loopback_addresses_in_digits_are_answered_and_names_are_not(subject, tmp_path):
    with asked(subject, tmp_path, host="0.0.0.0") as page:
        for host, status in [
            ("192.168.0.7:7861", 200),
            ("[fe80::1]:7861", 200),
            ("evil.example:7861", 403),
            ("192.168.0.7:80", 403),
        ]:
            answer = page.client.get("/", params={"token": TOKEN}, headers={"host": host})
            assert answer.status_code == status, host
        assert page.client.get("/", headers={"host": "192.168.0.7:7861"}).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": f"https://{HOST}"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": f"http://{HOST}.evil.example"},
        {"origin": "http://localhost:7861"},  # ours, but not the one that was asked
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_a_request_from_another_page_is_refused(page, headers):
    answer = page.post("pattern", {"text": "constant(1)"}, **headers)
    assert answer.status_code == 403
    good = page.post("pattern", {"text": "constant(1)"}, origin=f"http://{HOST}")
    assert good.status_code == 200


@pytest.mark.parametrize(
    "name",
    ["../routes.py", "..%2froutes.py", "%2e%2e/routes.py", "routes.py", "/etc/passwd",
     "index.html/", "app.js%00.css", ".", "..", "__init__.py"],
)  # fmt: skip
def test_no_path_leaves_the_package_s_files(page, name):
    answer = page.client.get(f"/static/{name}", headers=page.headers)
    assert answer.status_code in (401, 404) or "tempering console" in answer.text
    assert "Route(" not in answer.text and "root:" not in answer.text


def test_no_report_leaves_the_folder(page, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    record = Record.new("generate", settings={}, results={})
    record.save(tmp_path / "outside.json")
    record.save(runs / "inside.json")
    (runs / "link.json").symlink_to(tmp_path / "outside.json")
    (runs / "broken.json").write_text("{")
    (runs / ".hidden.json").write_text(record.to_json())
    assert page.get("/reports/inside").status_code == 200
    for name in (
        "../outside",
        "..%2Foutside",
        "link",
        "broken",
        ".hidden",
        "nothing",
        "%2e%2e%2foutside",
    ):
        answer = page.get(f"/reports/{name}")
        assert answer.status_code == 404, name
    listed = page.get("/api/records").json()["records"]
    assert [row["name"] for row in listed] == ["inside"]


def test_a_report_is_shown_in_a_sandbox(page, tmp_path):
    hostile = "</script><script>window.hit=1</script>"
    (tmp_path / "runs").mkdir()
    Record.new("generate", settings={hostile: hostile}, results={}).save(tmp_path / "runs/x.json")
    answer = page.get("/reports/x")
    assert answer.headers["content-security-policy"].startswith("sandbox allow-downloads;")
    assert "script-src" not in answer.headers["content-security-policy"]
    assert hostile not in answer.text


def test_too_much_is_refused_as_it_comes(page, monkeypatch):
    monkeypatch.setattr("tempering.console.safety.MOST_BYTES", 1000)
    told = page.refused("pattern", {"text": "x" * 2000}, 413)
    assert "at most" in told["message"]

    def unbounded():  # no content-length
        for _ in range(50):
            yield b"x" * 100

    answer = page.client.post("/api/pattern", content=unbounded(), headers=page.headers)
    assert answer.status_code == 413
    assert page.post("pattern", {"text": "constant(1)"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no JSON"), (b"{", "no JSON"), (b"[1]", "no object"), (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "JSON"), (b'{"text": 3}', "text is a text"), (b"{}", "text is a text"),
        (b'{"text": "constant(1)", "amplitude": "hot"}', "number"),
        (b'{"text": "constant(1)", "amplitude": NaN}', "finite"),
        (b'{"text": "constant(1)", "amplitude": 1e999}', "finite"),
        (b'{"text": "constant(1)", "amplitude": true}', "number"),
    ],
)  # fmt: skip
def test_a_body_that_the_page_never_sends_is_a_refusal(page, body, said):
    answer = page.client.post("/api/pattern", content=body, headers=page.headers)
    assert answer.json()["type"] == "error"
    assert said in answer.json()["message"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (ONES[:-1], "7 layers"),
        ([*ONES, ONES[0]], "9 layers"),
        ([[1.0] * 5, *ONES[1:]], "4 heads"),
        ([[0.0] * 4, *ONES[1:]], "limits 0 and inf"),
        ([["1"] * 4, *ONES[1:]], "numbers"),
        ([[True] * 4, *ONES[1:]], "numbers"),
        ([None, *ONES[1:]], "4 heads"),
        ([[1e6] * 4, *ONES[1:]], "between"),
        ([[10**400] * 4, *ONES[1:]], "bounds"),
        ("rows", "list of rows"),
        ([[float("nan")] * 4, *ONES[1:]], "nan"),
    ],
)
def test_a_profile_that_does_not_fit_is_a_refusal(page, rows, said):
    body = json.dumps({"profile": {"rows": rows}})
    told = page.client.post("/api/profile/save", content=body, headers=page.headers).json()
    assert told["type"] == "error" and said in told["message"]


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (5, "for each of 8 layers"),
        (0, "for each of 8 layers"),
        ("support(6)", "for each of 8 layers"),
        ({"a": 1}, "for each of 8 layers"),
        (["support(6)"] * 7, "for each of 8 layers"),
        ([None, 1, *[None] * 6], "layers.1.self_attn: a rule is a text or null, not 1"),
        ([False] * 8, "layers.0.self_attn: a rule is a text or null, not False"),
        ([["support(6)"]] * 8, "layers.0.self_attn: a rule is a text or null"),
        ([""] * 8, "column 1"),
    ],
)
def test_rules_that_are_none_are_a_refusal(page, rules, said):
    for path in ("profile/save", "cost", "measure"):
        told = page.refused(path, {"profile": {"rows": ONES, "rules": rules}})
        assert said in told["message"]


HALF = json.dumps("hot \ud83d").encode()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("cost", b'{"profile": {"rows": []}, "text": %b}' % HALF),
        ("throb", b'{"task": %b, "pattern": "throb(3,2,1,3)"}' % HALF),
        ("profile/save", b'{"profile": {"rows": [], "pattern": %b}}' % HALF),
        ("record", b'{"samples": [{"trace": [{"token": %b}]}]}' % HALF),
        ("record", b'{"answered": {%b: 1}}' % HALF),
        ("bake", b'{"name": %b}' % HALF),
        ("pattern", b'{"text": "hot \xed\xa0\xbd"}'),
    ],
)
def test_half_a_character_is_a_refusal_wherever_it_stands(page, path, body):
    answer = page.client.post(f"/api/{path}", content=body, headers=page.headers)
    assert answer.status_code == 200
    assert "half a character (U+D83D)" in answer.json()["message"]
    assert "at place 5" in answer.json()["message"]


@pytest.mark.parametrize("path", ["pattern", "profile/read", "record", "write", "throb", "bake"])
@pytest.mark.parametrize("depth", [60, 900, 10_000])
def test_nesting_without_end_is_a_refusal(page, path, depth):
    for opened, closed in ((b"[", b"]"), (b'{"a":', b"}")):
        body = b'{"answers": %b1%b}' % (opened * depth, closed * depth)
        told = page.client.post(f"/api/{path}", content=body, headers=page.headers).json()
        assert told["type"] == "error"
        assert "nested" in told["message"] or "recursion" in told["message"]


def test_whole_characters_of_every_plane_pass(page):
    body = b'{"text": "constant(1) \\ud83d\\udd25"}'
    told = page.client.post("/api/pattern", content=body, headers=page.headers).json()
    assert told["column"] == 13


def test_a_crash_is_told_and_the_next_request_is_answered(page, monkeypatch, capsys):
    def crash(*_):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("tempering.console.saving.save_record", crash)
    told = page.refused("record", {}, 500)
    assert told["message"] == "ZeroDivisionError: by nothing"
    assert "Traceback" in capsys.readouterr().err
    assert page.post("pattern", {"text": "constant(1)"}).status_code == 200


def test_a_folder_that_is_a_file_by_now_is_said(page, tmp_path):
    (tmp_path / "runs").write_text("kept")
    told = page.events("bake", {"profile": {"rows": ONES}, "name": "warm"})[-1]
    assert told["type"] == "error" and "can't write" in told["message"]
    assert told["kind"] == "OutputError"
    assert (tmp_path / "runs").read_text() == "kept"


def test_a_folder_s_name_may_hold_bytes_that_are_no_text(subject, tmp_path):
    with asked(subject, tmp_path / "runs\udce9") as page:
        assert page.get("/api/state").json()["out"].endswith("runs\udce9")
        assert page.get("/api/records").json()["records"] == []


def test_names_of_results_are_names(page, tmp_path):
    for name in ("../warm", "/tmp/warm", ".warm", "", "a/b", "a\\b", "x" * 200, "-rf", "nul\0"):
        told = page.refused("bake", {"profile": {"rows": ONES}, "name": name})
        assert "is no name for a result" in told["message"]
    told = page.refused("throb", {"resume": "../outside"})
    assert "is no name for a result" in told["message"]
    told = page.refused("profile/load", {"name": "../../etc/passwd"})
    assert "the gallery has no profile" in told["message"]


def test_methods_and_paths_that_there_are_not(page):
    assert page.get("/api/write").status_code == 405
    assert page.client.post("/", headers=page.headers).status_code == 405
    assert page.get("/api/nothing").status_code == 404
    assert page.client.options("/api/state", headers=page.headers).status_code == 405


def test_which_hosts_are_loopback():
    yes = ("127.0.0.1", "localhost", "::1", "[::1]", "127.8.8.8")
    no = ("0.0.0.0", "192.168.0.7", "evil.example", "::", "")
    assert [is_loopback(host) for host in (*yes, *no)] == [True] * 5 + [False] * 5


def test_fields_say_what_they_expected():
    given = fields.Fields({"n": 3.5, "t": [1, -1], "m": [], "f": 1})
    for ask, said in [
        (lambda: given.whole("n", 0, 9), "whole number from 0 to 9"),
        (lambda: given.whole("none", 0, 9), "number"),
        (lambda: given.tokens("t", 10), "token ids from 0 to 9"),
        (lambda: given.tokens("m", 10), "no token"),
        (lambda: given.flag("f"), "true or false"),
        (lambda: given.items("n"), "a list"),
    ]:
        with pytest.raises(fields.InputError, match=said):
            ask()
    assert given.whole("x", 0, 9, 3) == 3
