"""Who may talk to the console: this machine's own pages, which know the token.

- Host: a page of another site that has its name resolve to 127.0.0.1 (DNS rebinding) sends its
  own name as Host, and is refused. A server beyond loopback answers to its own name and to
  addresses in digits, which no rebinding can forge.
- Origin and Sec-Fetch-Site: a request that another site's page makes is refused.
- Token: in the page's address, as Jupyter does it, and in the header of everything that the page
  asks for. Without it there is nothing but the page's own scripts and styles, which hold no secret.
- Content-Security-Policy: nothing runs or loads that is not a file of this package, and nothing
  is interpreted that a model or a file says.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

from tempering.console.fields import MOST_BYTES
from tempering.errors import InputError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# A report has styles of its own and one link to its data; it may run nothing.
REPORT_POLICY = (
    "sandbox allow-downloads; default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
NO_TOKEN = (
    "This page needs its token. Open the address that `tempering console` printed in the terminal; "
    "it ends in ?token=..."
)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that binds to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware that refuses what is not meant for this console.

    host: what the server was told to bind to. port: None lets any port pass, for tests.
    token: what `?token=` or the header `Authorization: token ...` must say.
    """

    def __init__(self, app: App, *, host: str, port: int | None, token: str) -> None:
        self.app, self.host, self.port, self.token = app, host, port, token

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, _with_headers(send))
            return
        await self.app(scope, _limited(receive), _with_headers(send))

    def _refusal(self, scope: Message) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            named = ", ".join(hosts) or "(none)"
            return _refused(f"This console does not answer to the name {named[:80]}.", 403)
        origins = headers.getlist("origin")
        if origins and origins != [f"http://{hosts[0]}"]:
            return _refused("This console answers to its own page alone (Origin).", 403)
        site = headers.get("sec-fetch-site", "same-origin")
        # "none" is an address that a person typed or clicked outside of any page.
        if site not in ("same-origin", "none"):
            return _refused("This console answers to its own page alone (Sec-Fetch-Site).", 403)
        if scope["path"].startswith("/static/"):
            return None
        if not self._knows(scope, headers):
            return _refused(NO_TOKEN, 401)
        return None

    def _is_own(self, given: str) -> bool:
        name, port = _split(given)
        if self.port is not None and port != self.port:
            return False
        if name in LOOPBACK or name == self.host.lower():
            return True
        if is_loopback(self.host):
            return False
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True

    def _knows(self, scope: Message, headers: Headers) -> bool:
        given = headers.get("authorization", "")
        if given.startswith("token "):
            return self._same(given.removeprefix("token "))
        # In the address only where a person opens a page; what changes anything needs the header.
        if scope["method"] != "GET" or scope["path"].startswith("/api/"):
            return False
        query = parse_qs(scope["query_string"].decode("latin-1"))
        return self._same(query.get("token", [""])[0])

    def _same(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())


def _split(host: str) -> tuple[str, int]:
    name, colon, port = host.lower().rpartition(":")
    if colon and port.isascii() and port.isdigit() and len(port) < 6:
        return name, int(port)
    return host.lower(), 80


def _refused(text: str, status: int) -> PlainTextResponse:
    return PlainTextResponse(text + "\n", status)


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            known = {name.lower() for name, _ in message["headers"]}
            own = {"content-security-policy": PAGE_POLICY, **HEADERS}
            message["headers"] = [
                *message["headers"],
                *(
                    (name.encode(), value.encode())
                    for name, value in own.items()
                    if name.encode() not in known
                ),
            ]
        await send(message)

    return sent


class TooMuchError(InputError):
    """A request with more than `MOST_BYTES`."""


def _limited(receive: Receive) -> Receive:
    """A body of at most `MOST_BYTES`, counted as it comes: what the header says may be untrue."""
    count = 0

    async def received() -> Message:
        nonlocal count
        message = await receive()
        count += len(message.get("body", b""))
        if count > MOST_BYTES:
            raise TooMuchError(f"a request has at most {MOST_BYTES // 2**20} MB; send a part of it")
        return message

    return received
