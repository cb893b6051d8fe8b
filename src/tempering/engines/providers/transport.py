"""One request over HTTP: bytes out, bytes back, and errors that a user can act on.

The providers' SDKs are not used. They decode a reply before it can be kept (half a character, a
body without usage), lose the reasons that other vendors' servers give, add headers of the
environment to requests for any server, and choose the version of the interface: since release 2,
Anthropic's SDK asks for version 2026-10-21, which refuses every temperature.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

from tempering.errors import InputError, MissingExtraError

MOST = 64 * 2**20  # bytes of a reply; the longest of today's models write about one


@dataclass(frozen=True)
class HTTPResponse:
    """A server's response. headers: with names in lower case. url: of the request."""

    status_code: int
    headers: Mapping[str, str]
    content: bytes
    url: str


class HTTPStatusError(Exception):
    """The response has another status than 200, or is a web page or an error all the same."""

    def __init__(self, response: HTTPResponse) -> None:
        super().__init__(f"HTTP {response.status_code}")
        self.response = response


class NoAnswerError(Exception):
    """No complete response came. again: whether to try again. begun: bytes of the part that came,
    None where none did."""

    def __init__(self, reason: str, again: bool, begun: int | None = None) -> None:
        super().__init__(reason)
        self.again = again
        self.begun = begun


class Wire:
    """Connections to one server."""

    def __init__(self, http: Any) -> None:
        self.http = http

    async def post(
        self, url: str, headers: Mapping[str, str], body: dict[str, Any]
    ) -> HTTPResponse:
        """The response, with status 200; HTTPStatusError or NoAnswerError otherwise."""
        sent = {"content-type": "application/json", **headers}
        return await self._ask("POST", url, sent, json.dumps(body).encode())

    async def get(self, url: str, headers: Mapping[str, str]) -> HTTPResponse:
        """As `post`, of what needs no body."""
        return await self._ask("GET", url, dict(headers), None)

    async def _ask(
        self, method: str, url: str, headers: dict[str, str], content: bytes | None
    ) -> HTTPResponse:
        import httpx2

        data, begun = bytearray(), None
        for _ in range(4):  # the request, and up to three redirections
            try:
                async with self.http.stream(method, url, headers=headers, content=content) as reply:
                    begun = 0 if reply.status_code == 200 else None
                    async for part in reply.aiter_bytes():
                        data += part
                        if len(data) > MOST:
                            raise NoAnswerError(f"a reply of over {MOST >> 20} MiB", False, MOST)
                    names = {name.lower(): value for name, value in reply.headers.items()}
                    response = HTTPResponse(reply.status_code, names, bytes(data), url)
            except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL) as error:
                cut = None if begun is None else len(data)
                raise _explained(error, url, cut) from error
            place = _moved(url, response)
            if place is None:
                break
            url = place
            data.clear()
        if response.status_code != 200:
            raise HTTPStatusError(response)
        return response


@asynccontextmanager
async def connected(url: str, concurrency: int) -> AsyncIterator[Wire]:
    """Connections to a server for `concurrency` requests at once.

    Proxies and certificates are those of the environment. There is no timeout: the caller has one.
    """
    try:
        import httpx2
    except ImportError:
        raise MissingExtraError("httpx2", "agents") from None
    limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    options: dict[str, Any] = {"limits": limits}
    try:
        if proxy_bypass(urlsplit(url).netloc):  # then no proxy is set up, which could fail
            options = {"transport": httpx2.AsyncHTTPTransport(limits=limits)}
        http = httpx2.AsyncClient(timeout=None, **options)
    except ImportError:
        raise InputError(
            "the proxy of the environment (ALL_PROXY, HTTP_PROXY or HTTPS_PROXY) is a SOCKS proxy, "
            "which needs another package: pip install 'httpx2[socks]'; or unset the variable, or "
            "name this server in NO_PROXY"
        ) from None
    except (ValueError, httpx2.InvalidURL):
        raise InputError(
            "the environment names a proxy (ALL_PROXY, HTTP_PROXY, HTTPS_PROXY or NO_PROXY) that "
            "is no address such as http://host:3128; set it anew or unset it"
        ) from None
    except (OSError, ssl.SSLError) as error:
        raise InputError(
            f"can't read the certificates that SSL_CERT_FILE or SSL_CERT_DIR names: {error}"
        ) from None
    async with http:
        yield Wire(http)


def _moved(url: str, response: HTTPResponse) -> str | None:
    """The target of a redirection on the same server; None otherwise, so that no key leaves it."""
    import httpx2

    place = response.headers.get("location")
    if response.status_code not in (307, 308) or place is None:
        return None
    try:
        here = httpx2.URL(url)
        there = here.join(place)
    except httpx2.InvalidURL:
        return None
    same = (here.scheme, here.host, here.port) == (there.scheme, there.host, there.port)
    return str(there) if same else None


def _explained(error: Exception, url: str, cut: int | None) -> NoAnswerError:
    """The error for an exception of the HTTP library, with the address and what may mend it."""
    import httpx2

    place = httpx2.URL(url)
    server = f"{place.scheme}://{place.netloc.decode('ascii', 'replace')}"
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if not isinstance(error, httpx2.ConnectError | httpx2.ProxyError):
        again = isinstance(error, httpx2.TransportError | httpx2.DecodingError)
        again = again and not isinstance(error, httpx2.UnsupportedProtocol)
        told = str(error) or type(error).__name__
        return NoAnswerError(f"the connection to {server} broke: {told}", again, cut)
    if caused_by(ssl.SSLError):
        mend = "the environment variable SSL_CERT_FILE can name more certificates to trust"
        if caused_by(ssl.SSLCertVerificationError):
            return NoAnswerError(f"{server} shows no certificate to trust: {error}; {mend}", False)
        return NoAnswerError(
            f"{server} doesn't speak HTTPS: {error}; is its address http://{place.host}...?", False
        )
    if caused_by(socket.gaierror):
        reason = f"can't find the server {place.host}: {error}; is its name right?"
    elif caused_by(ConnectionRefusedError):
        reason = f"can't connect to {server}: connection refused; is the server running there?"
    else:
        reason = f"can't connect to {server}: {error}"
    proxies = [name for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY")
               if os.environ.get(name) or os.environ.get(name.lower())]  # fmt: skip
    if proxies:
        reason += f" (the environment's {' and '.join(proxies)} may be in the way)"
    return NoAnswerError(reason, True)
