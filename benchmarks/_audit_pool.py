"""A pool of prompts whose log probabilities are computed once, for audits of many draws from it.

An audit runs the reference some 20 times over its prompts. Here each state of the reference (as it
is, rounded, with a mistake, at some temperatures) runs once over the pool, and audits of draws read
from that. Temperatures between those that ran are interpolated by a polynomial for each token: log
probabilities are smooth in log T. What is stored lies in files, so that a run that was stopped goes
on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tempering.audit import Audit, MistakeCase, Scored, audit, scored
from tempering.audit.reference import Reference
from tempering.data import sample_text

TEXTS = ("fiction", "play", "code", "reference", "demo")
# log T at which the reference runs over the pool.
NODES = (-0.06, -0.03, 0.0, 0.03, 0.06)


class Pool:
    """Prompts of one length, from all of the sample texts alike, and the folder of what is kept."""

    def __init__(self, tokenizer: Any, count: int, length: int, folder: Path) -> None:
        self.length, self.folder = length, folder
        each = -(-count // len(TEXTS))
        self.prompts: list[list[int]] = []
        for name in TEXTS:
            ids = tokenizer(sample_text(name), add_special_tokens=False).input_ids
            step = len(ids) // each
            self.prompts += [ids[i * step : i * step + length] for i in range(each)]
        self.prompts = self.prompts[:count]
        self._held: dict[str, Tensor] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def kept(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """[prompts, length - 1] in nats, from its file, or computed and written there."""
        key = f"{name} {len(self.prompts)} {self.length}"
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
        if key not in self._held and path.is_file():
            self._held[key] = torch.load(path, weights_only=True)
        if key not in self._held:
            self._held[key] = compute().double()
            partial = path.with_suffix(".partial")
            torch.save(self._held[key], partial)
            partial.replace(path)
        return self._held[key]

    def said(self, name: str, rows: Callable[[], Sequence[Sequence[Any]]]) -> list[Scored]:
        """What an engine says of the pool; rows: its answers, None for the first token."""
        table = self.kept(name, lambda: torch.tensor([list(row)[1:] for row in rows()]))
        return [
            scored(ids, [None, *row], f"prompt {place}")
            for place, (ids, row) in enumerate(zip(self.prompts, table.tolist(), strict=True))
        ]

    def draws(self, said: Sequence[Scored], count: int, size: int) -> Iterator[list[Scored]]:
        """So many prompts without repetition, drawn anew each time."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(count):
            chosen = torch.randperm(len(said), generator=generator)[:size]
            yield [said[i] for i in chosen.tolist()]


class StoredReference(Reference):
    """The reference of an audit, which reads from a pool. name: of its weights."""

    def __init__(self, model: Any, pool: Pool, name: str) -> None:
        super().__init__(model)
        self.pool, self.name, self.state = pool, name, "own"
        self.places = {tuple(ids): place for place, ids in enumerate(pool.prompts)}
        blank = [None] + [0.0] * (pool.length - 1)
        self.whole = [scored(ids, blank, "pool") for ids in pool.prompts]

    def scores(self, prompts: Sequence[Scored]) -> Tensor:
        table = self._table(self.state, super().scores)
        return self._chosen(table, prompts)

    @contextlib.contextmanager
    def live(self, basis: Any, prompts: Sequence[Scored]) -> Iterator[Callable[[Tensor], Tensor]]:
        whole = bool((basis.matrix == 1).all())
        tables = [self._at(basis, node) for node in NODES] if whole else []
        with super().live(basis, prompts) as exact:

            def run(theta: Tensor) -> Tensor:
                if not whole or float(theta.abs().max()) > NODES[-1]:
                    return exact(theta)
                stack = torch.stack([self._chosen(table, prompts) for table in tables])
                return _weights(theta[:, 0]) @ stack

            yield run

    def _at(self, basis: Any, node: float) -> Tensor:
        if node == 0:
            return self._table("own", super().scores)

        def compute(prompts: Sequence[Scored]) -> Tensor:
            with Reference.live(self, basis, prompts) as run:
                return run(torch.tensor([[node]], dtype=torch.float64))[0]

        return self._table(f"log T {node}", compute)

    def _table(self, state: str, compute: Callable[[Sequence[Scored]], Tensor]) -> Tensor:
        def rows() -> Tensor:
            found = compute(self.whole).view(len(self.whole), -1)
            return torch.nn.functional.pad(found, (1, 0))  # the second token, which never counts

        return self.pool.kept(f"{self.name}: {state}", rows)

    def _chosen(self, table: Tensor, prompts: Sequence[Scored]) -> Tensor:
        parts = []
        for item in prompts:
            row = table[self.places[item.tokens]]
            parts.append(row[torch.tensor(item.places) - 1])
        return torch.cat(parts)


def _weights(theta: Tensor) -> Tensor:
    """Lagrange's weights of the nodes, [rows, nodes]."""
    found = torch.ones(len(theta), len(NODES), dtype=torch.float64)
    for i, own in enumerate(NODES):
        for j, other in enumerate(NODES):
            if i != j:
                found[:, i] *= (theta.double() - other) / (own - other)
    return found


def stored_audit(reference: StoredReference, prompts: Sequence[Scored], **options: Any) -> Audit:
    """`audit`, on a reference that reads from its pool."""
    module = importlib.import_module("tempering.audit.audit")
    own_cases, own_rounded = module.cases, module.rounded

    @contextlib.contextmanager
    def state(name: str, change: Callable[[], Any]) -> Iterator[None]:
        before, reference.state = reference.state, name
        try:
            with change():
                yield
        finally:
            reference.state = before

    def cases(model: Any, mistakes: Any = None) -> list[MistakeCase]:
        return [
            MistakeCase(case.name, lambda case=case: state(case.name, case.change), case.least)
            for case in own_cases(model, mistakes)
        ]

    def rounded(model: Any, precision: str, seed: int) -> Any:
        # One rounding of the pool for all draws.
        return state(f"rounded to {precision}", lambda: own_rounded(model, precision, 0))

    with (
        mock.patch.object(module, "Reference", lambda *_: reference),
        mock.patch.object(module, "cases", cases),
        mock.patch.object(module, "rounded", rounded),
    ):
        return audit(reference.model, prompts, layers=False, **options)
