"""A GGUF file in llama.cpp: its tokens, log probabilities of prompts, logits step by step."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tempering.attention.limits import check_values
from tempering.errors import InputError, MissingExtraError, ModelError, RefusedError

_BATCH = 512  # tokens that llama.cpp reads at once
_MOST_ROWS = 256  # LLAMA_MAX_SEQ
_MOST_THREADS = 512  # GGML_MAX_N_THREADS; llama.cpp ends the process beyond it
# Architectures that were compared with the tempered model (tests/integration/test_llamacpp.py):
# no soft cap, no sinks, no bias of positions, heads rotated whole.
_ROTATED = ("llama", "qwen2")


class LlamaCpp:
    """A model that llama.cpp runs on the CPU; as a context manager it is freed at the end.

    Parameters
    ----------
    path: the GGUF file.
    length: tokens of the longest text, prompt and reply. None: as the model was trained, up to
        8192.
    rows: texts side by side, at most.
    threads: of this engine; as many as this process may use by default.
    temperature: of attention, relative to the model's own, in all of its heads alike. It needs no
        second file: cosines and sines of the rotation are multiplied by T^-1/2, and so the scaled
        products by 1/T. RefusedError where that isn't all that the softmax sees.

    Raises MissingExtraError without cyllama, ModelError for a file that llama.cpp can't run,
    InputError for a length, rows or threads that it can't have.
    """

    name = "llama.cpp"

    def __init__(
        self,
        path: str | Path,
        *,
        length: int | None = None,
        rows: int = 1,
        threads: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        check_values(torch.tensor([temperature], dtype=torch.float64), "the whole model")
        llama = _llama()
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise ModelError(f"no GGUF file {self.path}; name a file that llama.cpp runs")
        with self.path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{self.path} is no GGUF file")
        try:
            self._model = _sized(llama)(str(self.path), llama.LlamaModelParams())
        except (ValueError, RuntimeError, OSError) as error:
            raise ModelError(f"llama.cpp can't read {self.path}: {error}") from error
        self._llama = llama
        self.vocab = self._model.get_vocab()
        self.words = int(self.vocab.n_vocab)
        self.trained = int(self._model.n_ctx_train)
        self.length = min(self.trained, 8192) if length is None else length
        self.rows = rows
        cores = len(os.sched_getaffinity(0)) if threads is None else threads
        _within(self.length, self.trained, "length", "what the model was trained for")
        _within(rows, _MOST_ROWS, "rows", "what llama.cpp tells apart")
        _within(cores, _MOST_THREADS, "threads", "what llama.cpp can start")
        if self._model.has_encoder() or self._model.is_recurrent():
            raise RefusedError(
                f"{self.path} is no decoder with attention alone; its rows can't be told apart"
            )
        settings = llama.LlamaContextParams()
        settings.n_ctx = self.length * rows
        settings.n_seq_max = rows
        settings.kv_unified = True
        settings.n_batch = settings.n_ubatch = min(_BATCH, settings.n_ctx)
        if temperature != 1:
            self._check_rotated()
            settings.yarn_attn_factor = temperature**-0.5
        settings.n_threads = settings.n_threads_batch = cores
        try:
            self._context = llama.LlamaContext(self._model, settings)
        except (ValueError, RuntimeError) as error:
            raise ModelError(
                f"llama.cpp has no memory for {rows} texts of {self.length} tokens of {self.path}: "
                f"{error}"
            ) from error
        self._batch = llama.LlamaBatch(n_tokens=int(settings.n_batch), embd=0, n_seq_max=1)
        self._at_once = int(settings.n_batch)
        self._tokenizer: Any = None
        self._ends: frozenset[int] | None = None
        self._floats = struct.Struct(f"{self.words}f")

    def _told(self, key: str) -> str | None:
        """What the file says under a key, or None."""
        try:
            return str(self._model.meta_val_str(key))
        except ValueError:
            return None

    def _check_rotated(self) -> None:
        """RefusedError unless the rotation reaches all that enters the softmax."""
        kind = self._told("general.architecture")
        even = str(self._model.n_embd // self._model.n_head)
        size = self._told(f"{kind}.attention.key_length") or even
        rotated = self._told(f"{kind}.rope.dimension_count") or size
        scaling = self._told(f"{kind}.rope.scaling.type") or "none"
        why = None
        if kind not in _ROTATED:
            why = f"of the architecture {kind} this isn't known (known: {', '.join(_ROTATED)})"
        elif rotated != size:
            why = f"only {rotated} of {size} numbers of a head are rotated"
        elif scaling not in ("none", "linear"):
            why = f"{scaling} scales the rotation itself"
        if why is not None:
            raise RefusedError(
                f"{self.path}: llama.cpp can't be given an attention temperature without a second "
                f"file, since {why}; fold it in: tempering bake FILE.gguf --profile P "
                "--in-place-scales"
            )

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model's memory."""
        self._batch.close()
        self._context.close()
        self._model.close()

    @property
    def tokenizer(self) -> Any:
        """The file's tokenizer with transformers' interface: for policies, templates and text."""
        if self._tokenizer is None:
            from tempering.engines.loading.gguf_model import gguf_tokenizer

            self._tokenizer = gguf_tokenizer(self.path)
        return self._tokenizer

    @property
    def description(self) -> str:
        """llama.cpp's own words, e.g. "llama 256M Q4_1"."""
        return str(self._model.desc)

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return int(self._model.n_layer)

    @property
    def heads(self) -> int:
        """Query heads of a layer."""
        return int(self._model.n_head)

    @property
    def precision(self) -> str:
        """What activations are rounded to; see `tempering.audit.rounding`."""
        types = str(self._model.desc)
        return "float16" if any(kind in types for kind in ("F32", "F16", "BF16")) else "q8"

    def ids(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text, as llama.cpp cuts it; special: put a BOS first where the file says
        so. Texts of special tokens become those tokens."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text holds half of a character at place {error.start}, the surrogate "
                f"{text[error.start]!r}; give text of whole characters"
            ) from error
        found = self.vocab.tokenize(text, special, True)
        return [int(token) for token in found]

    def ends(self) -> frozenset[int]:
        """The tokens that end a text."""
        if self._ends is None:
            self._ends = frozenset(t for t in range(self.words) if self.vocab.is_eog(t))
        return self._ends

    def logprobs(
        self, prompts: Sequence[Sequence[int]], between: Callable[[], None] | None = None
    ) -> list[list[float | None]]:
        """log q of every token of every prompt, nats; None for the first. between: as in `read`."""
        found: list[list[float | None]] = []
        for ids in prompts:
            self._fits(len(ids), "a prompt")
            self.forget(0)
            values: list[float | None] = [None]
            for start in range(0, len(ids), self._at_once):
                if between is not None:
                    between()
                part = list(ids[start : start + self._at_once])
                logits = self._decode([(0, token, start + i) for i, token in enumerate(part)])
                goals = torch.tensor(list(ids[start + 1 : start + 1 + len(part)]))
                rows = logits[: len(goals)].log_softmax(-1)
                values += rows.gather(1, goals[:, None])[:, 0].tolist()
            found.append(values)
        self.forget(0)
        return found

    def read(
        self, row: int, ids: Sequence[int], between: Callable[[], None] | None = None
    ) -> Float[Tensor, "1 vocab"]:
        """Read a prompt into a row, from its start; the logits of the next token.

        between: called before each part that llama.cpp reads at once; what it raises ends the
        reading.
        """
        self._fits(len(ids), "the prompt")
        self.forget(row)
        logits = torch.empty(0)
        for start in range(0, len(ids), self._at_once):
            if between is not None:
                between()
            part = ids[start : start + self._at_once]
            places = [(row, token, start + i) for i, token in enumerate(part)]
            logits = self._decode(places, only_last=True)
        return logits

    def copy(self, source: int, target: int) -> None:
        """Give a row what another has read."""
        self._context.memory_seq_rm(target, -1, -1)
        self._context.memory_seq_cp(source, target, -1, -1)

    def forget(self, row: int) -> None:
        """Empty a row."""
        self._context.memory_seq_rm(row, -1, -1)

    def step(self, tokens: Sequence[tuple[int, int, int]]) -> Float[Tensor, "rows vocab"]:
        """Logits after one more token of each row; tokens: (row, token, its place)."""
        return self._decode(tokens)

    def _decode(
        self, tokens: Sequence[tuple[int, int, int]], only_last: bool = False
    ) -> Float[Tensor, "rows vocab"]:
        self._batch.clear()
        for i, (row, token, place) in enumerate(tokens):
            if not 0 <= token < self.words:
                raise InputError(f"token {token}: this model has ids 0 to {self.words - 1}")
            self._batch.add(token, place, [row], not only_last or i == len(tokens) - 1)
        try:
            self._context.decode(self._batch)
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"llama.cpp failed on {len(tokens)} tokens: {error}") from error
        wanted = [len(tokens) - 1] if only_last else range(len(tokens))
        rows = np.empty((len(wanted), self.words), dtype=np.float32)
        for i, place in enumerate(wanted):
            # cyllama hands out a list of Python floats; this is the quickest way to copy one
            # (benchmarks/llamacpp_policies.py).
            values = self._floats.pack(*self._context.get_logits_ith(place))
            rows[i] = np.frombuffer(values, np.float32)
        return torch.from_numpy(rows)

    def _fits(self, tokens: int, what: str) -> None:
        if tokens < 1:
            raise InputError(f"{what} has no tokens; give some text")
        if tokens > self.length:
            raise InputError(
                f"{what} has {tokens} tokens, and this engine was started for {self.length}"
            )


def _within(value: int, most: int, name: str, why: str) -> None:
    if not 1 <= value <= most:
        raise InputError(f"{name} = {value} is not from 1 to {most}, {why}")


def _llama() -> Any:
    # Where llama.cpp gives up it would start a debugger on this process, which may never end.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    try:
        from cyllama.llama import llama_cpp
    except ImportError as error:
        raise MissingExtraError("cyllama", "llamacpp") from error
    llama_cpp.disable_logging()
    return llama_cpp


def _sized(llama: Any) -> Any:
    class Model(llama.LlamaModel):
        """cyllama 0.2's contexts ask their model for `n_vocab`, which it lacks."""

        @property
        def n_vocab(self) -> int:
            return self.get_vocab().n_vocab

    return Model
