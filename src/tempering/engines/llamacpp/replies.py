"""What a request to the llama.cpp server gets: its texts piece by piece, tokens, and traces."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from tempering.engines.llamacpp.model import LlamaCpp
from tempering.engines.llamacpp.requests import ServedRequest
from tempering.engines.llamacpp.writing import write
from tempering.tokens.trace import trace_entry


class TextPiece:
    """What one sample got since the last piece, and why it ended, once it has.

    trace: what the tokens since the last piece were drawn from, where that is asked for.
    """

    def __init__(
        self, row: int, text: str, trace: list[dict[str, Any]], finish: str | None = None
    ) -> None:
        self.row, self.text, self.trace, self.finish = row, text, trace, finish


class WrittenReply:
    """A request being carried out: pieces of text, and the tokens with their log probabilities.

    traces: what each token was drawn from, where the request asks for that.
    """

    def __init__(
        self, model: LlamaCpp, request: ServedRequest, between: Callable[[], None] | None = None
    ) -> None:
        self.model, self.request, self.between = model, request, between
        count = len(request.samples)
        self.texts = [""] * count
        self.finish: list[str | None] = [None] * count
        self.tokens: list[list[tuple[int, float]]] = [[] for _ in range(count)]
        self.traces: list[list[dict[str, Any]]] = [[] for _ in range(count)]

    def pieces(self) -> Generator[TextPiece, None, None]:
        """Pieces as they come; a text that may begin a stop text is held back."""
        request = self.request
        shown = [0] * len(self.texts)
        told = [0] * len(self.texts)

        def untold(row: int) -> list[dict[str, Any]]:
            found = self.traces[row][told[row] :]
            told[row] += len(found)
            return found

        longest = max((len(text) for text in request.stop), default=1) - 1
        if request.tokens:
            for step in write(
                self.model,
                request.prompt,
                request.samples,
                tokens=request.tokens,
                traced=request.trace,
                between=self.between,
            ):
                row = step.row
                if self.finish[row] is not None:
                    continue
                self.tokens[row].append((step.token, step.raw))
                if request.trace:
                    entry = trace_entry(step.token, step.known, step.raw, step.tempered)
                    self.traces[row].append(entry)
                self.texts[row] += step.text
                at = [self.texts[row].find(text) for text in request.stop]
                found = [place for place in at if place >= 0]
                if found:
                    self.texts[row] = self.texts[row][: min(found)]
                    self.finish[row] = "stop"
                ready = len(self.texts[row]) - (0 if found else longest)
                if ready > shown[row] or found:
                    text = self.texts[row][shown[row] : max(ready, shown[row])]
                    yield TextPiece(row, text, untold(row))
                    shown[row] = max(ready, shown[row])
                if all(item is not None for item in self.finish):
                    break
        for row, text in enumerate(self.texts):
            if self.finish[row] is None:
                full = len(self.tokens[row]) >= request.tokens
                self.finish[row] = "length" if full else "stop"
            yield TextPiece(row, text[shown[row] :], untold(row), self.finish[row])
