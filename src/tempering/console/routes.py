"""What the page may ask for."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tempering.console import costs, heads, saving, stages, writing
from tempering.console.fields import MOST_COLUMNS, Fields
from tempering.console.remote import Remote, RemoteOrder
from tempering.console.safety import REPORT_POLICY, Guard, TooMuchError
from tempering.console.subject import Subject
from tempering.console.turns import Event, Job, ModelTurns, Work, message
from tempering.errors import RefusedError, TemperingError
from tempering.reports import render_html
from tempering.tokens import parse_policy

_KINDS = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".html": "text/html",
    ".svg": "image/svg+xml",
}
Answer = Callable[[Request, Fields], Awaitable[Response]]


class Console:
    """The application: a subject, the turns on its model, and the folder of results.

    start: the profile that the page begins with. remote: the server that runs the model, if any.
    """

    def __init__(
        self,
        subject: Subject,
        out: Path,
        start: dict[str, Any] | None = None,
        remote: Remote | None = None,
    ) -> None:
        self.subject, self.out, self.start, self.remote = subject, out, start, remote
        self.turns = ModelTurns()
        self.orders: dict[str, writing.Order] = {}
        self._files = _static_files()

    def app(self, *, host: str, port: int | None, token: str) -> Guard:
        """The ASGI application behind its guard."""
        posts: dict[str, Callable[[Fields], Any]] = {
            "pattern": self._pattern,
            "policy": self._policy,
            "profile/read": lambda given: self.subject.read(given.data.get("profile"), "the file"),
            "profile/load": lambda given: self.subject.load(given.text("name")),
            "profile/save": lambda given: self._profile(given).to_json(),
            "write/change": self._change,
            "record": self._record,
        }
        streams: dict[str, Callable[[Fields], tuple[Work, bool]]] = {
            "write": self._write,
            "alternatives": self._alternatives,
            "divergence": self._divergence,
            "attention": self._attention,
            "cost": self._cost,
            "budget": self._budget,
            "measure": self._measure,
            "questions": self._questions,
            "throb": self._throb,
        }
        if self.remote is not None:
            streams = dict.fromkeys(streams, _elsewhere)
            streams |= {"write": self._write_remote, "put": self._put}
            del posts["record"]
        routes = [
            Route("/", self._page),
            Route("/static/{name}", self._static),
            Route("/reports/{name}", self._report),
            Route("/api/state", self._state),
            Route("/api/records", self._records),
            Route("/api/bake", self._bake, methods=["POST"]),
            *(
                Route(f"/api/{name}", _answering(_plain(make)), methods=["POST"])
                for name, make in posts.items()
            ),
            *(
                Route(f"/api/{name}", _answering(self._streaming(name, make)), methods=["POST"])
                for name, make in streams.items()
            ),
        ]

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            yield
            self.turns.close()

        return Guard(Starlette(routes=routes, lifespan=lifespan), host=host, port=port, token=token)

    # -- pages

    async def _page(self, request: Request) -> Response:
        return self._file("index.html")

    async def _static(self, request: Request) -> Response:
        return self._file(request.path_params["name"])

    def _file(self, name: str) -> Response:
        """One of the package's own files; names come from a list, so no path can leave it."""
        if name not in self._files:
            return Response("no such file\n", 404, media_type="text/plain")
        kind, data = self._files[name]
        return Response(data, media_type=kind)

    async def _report(self, request: Request) -> Response:
        try:
            text = render_html(saving.recorded(self.out, request.path_params["name"]))
        except TemperingError as error:
            return Response(f"{error}\n", 404, media_type="text/plain")
        return HTMLResponse(text, headers={"content-security-policy": REPORT_POLICY})

    async def _state(self, request: Request) -> Response:
        known = {**self.subject.for_page(), "out": str(self.out), "start": self.start}
        known["engine"] = None if self.remote is None else self.remote.for_page()
        return _Json(known)

    async def _records(self, request: Request) -> Response:
        return _Json({"out": str(self.out), "records": saving.listed(self.out)})

    # -- answers at once

    def _profile(self, given: Fields) -> Any:
        return self.subject.profile(given.data.get("profile"))

    def _pattern(self, given: Fields) -> Event:
        amplitude = given.data.get("amplitude")
        return self.subject.from_text(
            given.text("text"), None if amplitude is None else given.number("amplitude")
        )

    def _policy(self, given: Fields) -> Event:
        if self.remote is not None and self.subject.tokenizer is None:
            # Phases need a tokenizer, which the server has: it checks the policy of each request.
            return {"text": given.text("text")}
        return {"text": str(parse_policy(given.text("text"), self.subject.tokenizer))}

    def _change(self, given: Fields) -> Event:
        order = self.orders.get(given.text("run"))
        if order is None:
            return {"changed": False}
        profiles = [self.subject.profile(item) for item in given.items("profiles", MOST_COLUMNS)]
        order.change(profiles, given.whole("edit", 0, 2**53, 0))
        return {"changed": True}

    def _record(self, given: Fields) -> Event:
        return {"name": saving.save_record(self.subject, given, self.out)}

    # -- streams

    def _streaming(self, kind: str, make: Callable[[Fields], tuple[Work, bool]]) -> Answer:
        async def answer(request: Request, given: Fields) -> Response:
            work, patient = make(given)
            return _Stream(self.turns.add(Job(kind, work, patient=patient)))

        return answer

    def _write(self, given: Fields) -> tuple[Work, bool]:
        order, run = writing.Order.of(self.subject, given), given.text("run")

        def work(job: Job) -> Any:
            self.orders[run] = order
            try:
                yield from writing.write(self.subject, order, job)
            finally:
                del self.orders[run]

        return work, False

    def _tokens(self, given: Fields) -> tuple[list[int], int]:
        """The tokens of a text, and where its reply begins."""
        self.subject.require()
        tokens = given.tokens("tokens", self.subject.vocabulary)
        self.subject.check_length(len(tokens))
        return tokens, given.whole("start", 1, len(tokens))

    def _alternatives(self, given: Fields) -> tuple[Work, bool]:
        (tokens, start), profile = self._tokens(given), self._profile(given)
        policy = writing.policy_of(self.subject, given)
        return lambda job: writing.alternatives(self.subject, tokens, start, profile, policy), False

    def _divergence(self, given: Fields) -> tuple[Work, bool]:
        (tokens, start), profile = self._tokens(given), self._profile(given)
        return lambda job: writing.divergence(self.subject, tokens, start, profile), False

    def _attention(self, given: Fields) -> tuple[Work, bool]:
        (tokens, _), profile = self._tokens(given), self._profile(given)
        layers = self.subject.plan.layers
        layer = given.whole("layer", 0, len(layers) - 1)
        head = given.whole("head", 0, layers[layer].heads - 1)
        return lambda job: heads.attention_row(self.subject, tokens, profile, layer, head), False

    def _sampled(self, given: Fields) -> Any:
        text = given.data.get("text")
        return costs.sample(self.subject, None if text is None else given.text("text"))

    def _cost(self, given: Fields) -> tuple[Work, bool]:
        profile, chunks = self._profile(given), self._sampled(given)
        return lambda job: costs.meter(self.subject, profile, chunks), True

    def _budget(self, given: Fields) -> tuple[Work, bool]:
        profile, chunks = self._profile(given), self._sampled(given)
        pattern = given.data.get("pattern")
        text = None if pattern is None else given.text("pattern")
        nats = given.number("nats")
        return lambda job: costs.budget(self.subject, text, profile, nats, chunks, job), False

    def _measure(self, given: Fields) -> tuple[Work, bool]:
        profile, chunks = self._profile(given), self._sampled(given)
        return lambda job: costs.measured(self.subject, profile, chunks), True

    def _questions(self, given: Fields) -> tuple[Work, bool]:
        profile, seed = self._profile(given), given.whole("seed", 0, 2**63 - 1, 0)
        return lambda job: costs.questions(self.subject, profile, seed, job), False

    def _write_remote(self, given: Fields) -> tuple[Work, bool]:
        remote, order = self._server(), RemoteOrder.of(given)
        return lambda job: remote.write(order, job), False

    def _put(self, given: Fields) -> tuple[Work, bool]:
        """Swap the server's profile; without one only ask which is in force."""
        remote = self._server()
        if given.flag("ask"):
            return lambda job: iter([remote.in_force()]), False
        none = given.data.get("profile") is None
        profile = None if none else self._profile(given)
        return lambda job: remote.put(profile), False

    def _server(self) -> Remote:
        if self.remote is None:
            raise RefusedError("this console has its model in its own process, not on a server")
        return self.remote

    def _throb(self, given: Fields) -> tuple[Work, bool]:
        run = stages.StagesRun.of(self.subject, given, self.out)
        return run.work, False

    async def _bake(self, request: Request) -> Response:
        async def answer(request: Request, given: Fields) -> Response:
            if self.remote is not None:
                _elsewhere(given)
            profile, name = self._profile(given), saving.safe_name(given.text("name"))
            events = saving.bake(self.subject, profile, self.out, name)
            return StreamingResponse(_lines(events), media_type="application/x-ndjson")

        return await _answering(answer)(request)


class _Json(JSONResponse):
    """JSON in ASCII: a folder's name may hold bytes that no UTF-8 has."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode()


class _Stream(StreamingResponse):
    """The events of a job, which is stopped when the page has gone, however early."""

    def __init__(self, job: Job) -> None:
        super().__init__(_lines(job.events()), media_type="application/x-ndjson")
        self.job = job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.stop()


def _elsewhere(given: Fields) -> tuple[Work, bool]:
    raise RefusedError(
        "the model runs on a server, which keeps its weights and its attention; open the console "
        "with --model for this"
    )


def _static_files() -> dict[str, tuple[str, bytes]]:
    folder = resources.files("tempering.console").joinpath("static")
    return {
        item.name: (_KINDS[Path(item.name).suffix], item.read_bytes())
        for item in folder.iterdir()
        if Path(item.name).suffix in _KINDS
    }


def _plain(make: Callable[[Fields], Any]) -> Answer:
    async def answer(request: Request, given: Fields) -> Response:
        return _Json(make(given))

    return answer


def _answering(answer: Answer) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint whose refusals are JSON that the page shows where they belong.

    Their status is 200: half a schedule is no failure of the page, and a browser logs others.
    """

    async def endpoint(request: Request) -> Response:
        try:
            return await answer(request, Fields.of(await request.body()))
        except TooMuchError as error:
            return _Json(message(error), 413)
        except ClientDisconnect:
            raise
        except Exception as error:
            return _Json(message(error), 200 if isinstance(error, TemperingError) else 500)

    return endpoint


async def _lines(events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
    """Events as lines of JSON; an error on the way is the last of them."""
    try:
        async for event in events:
            yield json.dumps(event, allow_nan=False).encode() + b"\n"
    except Exception as error:
        yield json.dumps(message(error)).encode() + b"\n"
    finally:
        await events.aclose()  # type: ignore[attr-defined]
