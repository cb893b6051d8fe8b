"""A language model's predictions as rows of logits: next tokens, and answers to choose from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tempering.chunks import chunks_digest
from tempering.errors import DataError
from tempering.estimators.calibration.source import Logits, floats, threads
from tempering.files import read_json, read_text
from tempering.ranks import here

# Windows of text that the model is run on for a warm start: enough to differ in style, few enough
# that the start costs little beside a pass over all windows.
_WARM_WINDOWS = 4

Progress = Callable[[int, int], None]


class TokenLogits(Logits):
    """The next-token logits of a causal model over windows of text, computed anew at each pass.

    Nothing is kept: one window's logits at a time are in memory, whatever the vocabulary. A row
    is a position of a window that has a next token; `labels` are those next tokens.

    model: as transformers gives it. windows: token ids. progress: called with (windows done,
    windows in all) during a pass.
    """

    def __init__(
        self, model: Any, windows: Int[Tensor, "windows length"], progress: Progress | None = None
    ) -> None:
        self.model, self.windows, self.progress = model, windows, progress
        self.name = "the text"
        self.threads = torch.get_num_threads()  # the model's; a pass over logits uses one
        self.device = model.device
        self.n_columns = int(model.get_output_embeddings().weight.shape[0])
        self.positions = windows.shape[1] - 1
        self.n_rows = len(windows) * self.positions
        _check_length(model, windows.shape[1], "a window of text")

    @property
    def labels(self) -> Int[np.ndarray, "rows"]:
        """The token that follows each position."""
        return self.windows[:, 1:].flatten().numpy()

    def pieces(self) -> Iterator[Shaped[Tensor, "rows columns"]]:
        for done in range(len(self.windows)):
            yield self._rows(done)
            if self.progress is not None:
                self.progress(done + 1, len(self.windows))

    def own_chunks(self) -> Iterator[tuple[int, Shaped[Tensor, "rows columns"]]]:
        """The rows of this rank's windows: on the others the model isn't run."""
        ranks = here()
        for window in ranks.mine(len(self.windows)):
            yield from self._cut(window * self.positions, self._rows(window))
            if self.progress is not None:
                done = min(len(self.windows), window - ranks.rank + ranks.size)
                self.progress(done, len(self.windows))

    def sample(self, size: int, seed: int) -> tuple[np.ndarray, Shaped[Tensor, "rows columns"]]:
        """Rows of a few windows only, which is all that the model is run on."""
        count = min(_WARM_WINDOWS, len(self.windows))
        chosen = np.linspace(0, len(self.windows) - 1, count).round().astype(np.int64)
        each = min(self.positions, -(-size // count))
        places = np.linspace(0, self.positions - 1, each).round().astype(np.int64)
        rows = np.concatenate([window * self.positions + places for window in chosen])
        keep = torch.as_tensor(places, device=self.device)
        return rows, torch.cat([floats(self._rows(int(window))[keep]) for window in chosen])

    def digest(self) -> str:
        return chunks_digest(self.windows)

    def resolution(self) -> float:
        return torch.finfo(self.model.dtype).eps

    @torch.no_grad()
    def _rows(self, window: int) -> Shaped[Tensor, "rows columns"]:
        ids = self.windows[window : window + 1].to(self.device)
        with threads(self.threads):
            return self.model(input_ids=ids, use_cache=False).logits[0, :-1]


def token_classes(tokenizer: Any, windows: Int[Tensor, "windows length"]) -> np.ndarray:
    """What kind of token each label of `TokenLogits` is, as text, [rows].

    "word start": has a letter, and opens with a space or follows something that is no letter or
    digit. "word continuation": has a letter, and goes on. "digit": digits, no letters.
    "whitespace": nothing else, line ends too. "punctuation": any other text. "special": a control
    token. "byte": a part of a character.
    """
    ids, place = np.unique(windows.numpy(), return_inverse=True)
    place = place.reshape(windows.shape)
    special = set(tokenizer.all_special_ids)
    texts = [_token_text(tokenizer, int(i)) for i in ids]
    ends_in_word = np.array([t[-1:].isalnum() for t in texts])
    kinds = np.array([_kind(t, int(i) in special) for t, i in zip(texts, ids)], dtype=object)
    opens = np.array([t[:1].isspace() for t in texts])
    kind = kinds[place[:, 1:]]
    goes_on = ends_in_word[place[:, :-1]] & ~opens[place[:, 1:]]
    word = kind == "word"
    kind[word & goes_on] = "word continuation"
    kind[word & ~goes_on] = "word start"
    return kind.flatten().astype(str)


def _token_text(tokenizer: Any, token: int) -> str:
    """A token's text with its leading space, which decoding a lone SentencePiece token loses."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if isinstance(piece, str) and "▁" in piece:
        return piece.replace("▁", " ")
    return tokenizer.decode([token], clean_up_tokenization_spaces=False)


def _kind(text: str, special: bool) -> str:
    if special:
        return "special"
    if "\ufffd" in text:
        return "byte"
    if any(c.isalpha() for c in text):
        return "word"
    if any(c.isdigit() for c in text):
        return "digit"
    return "punctuation" if text.strip() else "whitespace"


@dataclass(frozen=True)
class Question:
    """A prompt, the answers to choose from, and the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: str | Path) -> list[Question]:
    """Questions from a JSON-lines file of {"prompt": text, "choices": [texts], "answer": ...}.

    answer: the index of a choice, from 0, or its text. DataError names the line that is off.
    """
    questions = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            questions.append(_question(line, f"{path}, line {number}"))
    return questions


def _question(line: str, where: str) -> Question:
    entry = read_json(line, where)
    expected = '{"prompt": text, "choices": [two texts or more], "answer": index or text}'
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise DataError(f"{where}: expected {expected}")
    choices, answer = entry.get("choices"), entry.get("answer")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
        or not entry["prompt"]
    ):
        raise DataError(f"{where}: expected {expected}, none of the texts empty")
    if isinstance(answer, str) and choices.count(answer) == 1:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(
            f"{where}: answer is {entry.get('answer')!r}; expected the index of a choice, "
            f"0..{len(choices) - 1}, or the text of exactly one"
        )
    return Question(entry["prompt"], tuple(choices), answer)


@torch.no_grad()
def answer_logits(
    model: Any, tokenizer: Any, questions: Sequence[Question], progress: Progress | None = None
) -> Float[np.ndarray, "questions choices"]:
    """The log probability, in nats, of each choice after its prompt; -inf where there is none.

        z_k = sum_t log p(token t of choice k | prompt, tokens before t)

    so softmax(z) is the model's own distribution over the choices. Prompt and choice are
    tokenised separately, so that all choices of a question continue the same tokens. The ranks of
    a run (`tempering.ranks`) share the questions.
    """
    ranks = here()
    most = max(len(question.choices) for question in questions)
    table = torch.zeros(len(questions), most, dtype=torch.float64)
    with ranks.together():
        for row in ranks.mine(len(questions)):
            table[row] = -torch.inf
            for column, score in enumerate(_scores(model, tokenizer, questions[row], row)):
                table[row, column] = score
            if progress is not None:
                progress(min(len(questions), row - ranks.rank + ranks.size), len(questions))
    return ranks.sum(table)[0].numpy()


def _scores(model: Any, tokenizer: Any, question: Question, row: int) -> Iterator[float]:
    """The log probability of each choice of a question."""
    prompt = tokenizer(question.prompt, add_special_tokens=True).input_ids
    for choice in question.choices:
        tokens = tokenizer(choice, add_special_tokens=False).input_ids
        if not prompt or not tokens:
            raise DataError(f"question {row}: {question.prompt!r} or {choice!r} has no tokens")
        _check_length(model, len(prompt) + len(tokens), f"question {row}")
        ids = torch.tensor([prompt + tokens], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        own = torch.log_softmax(floats(logits), 1)
        yield float(own.gather(1, ids[0, len(prompt) :, None]).double().sum())


def _check_length(model: Any, tokens: int, what: str) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and tokens > most:
        raise DataError(f"{what} has {tokens} tokens, the model reads at most {most}; shorten it")
