"""The logits processor through vLLM's own interfaces: rows that move, slots that are reused."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tempering.tokens import check_engine, parse_policy
from tempering.tokens.engine_check import VOCABULARY, Request, made_logits


class Config(SimpleNamespace):
    """Weakly referable, as vLLM's own configuration."""


CONFIG: Any = Config(
    speculative_config=None,
    additional_config={},
    model_config=SimpleNamespace(is_diffusion=False, skip_tokenizer_init=True),
)


def params(policy: Any, request: Request) -> Any:
    """The parameters of a request as they reach the worker, admitted."""
    from vllm import SamplingParams

    from tempering.engines.vllm.arguments import with_taken

    extra: dict[str, Any] = {} if policy is None else {"tempering": str(policy)}
    if policy is not None and parse_policy(str(policy)).samples is not None:
        extra["tempering_sample"] = request.sample
    own = vars(request.given)
    return with_taken(SamplingParams(max_tokens=99, extra_args=extra or None, **own), None)


def own(requests: Any) -> torch.Tensor:
    """The requests' own temperatures, a column."""
    return torch.tensor([[request.given.temperature] for request in requests])


class Rows:
    """The older runner's side: a batch whose requests are added, removed and moved."""

    def __init__(self, config: Any = CONFIG) -> None:
        from tempering.engines.vllm.by_row import ByRow
        from tempering.engines.vllm.processor import TemperingPolicies

        self.processor = TemperingPolicies(config, torch.device("cpu"), False)
        assert isinstance(self.processor, ByRow)
        self.lists: dict[int, list[int]] = {}  # the runner's own lists of generated tokens
        self._added: list[Any] = []

    def add(self, added: Any) -> None:
        for place, policy, request in added:
            self.lists[place] = list(request.generated)
            own = params(policy, request)
            self._added.append((place, own, list(request.prompt), self.lists[place]))

    def update(self, removed: Any = (), moved: Any = ()) -> None:
        from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

        kinds = (MoveDirectionality.UNIDIRECTIONAL, MoveDirectionality.SWAP)
        steps = [(a, b, kinds[swap]) for a, b, swap in moved]
        update = BatchUpdate(99, sorted(removed, reverse=True), self._added, steps)
        self._added = []
        self.processor.update_state(update)


def test_the_older_interface_keeps_the_contract():
    def run(policy, requests, logits):
        rows = Rows()
        rows.add([(place, policy, request) for place, request in enumerate(requests)])
        rows.update()
        return rows.processor.apply(logits / own(requests))  # vLLM has divided before

    assert check_engine(run) > 100


class Slots:
    """The newer runner's side: vLLM's own view of a request's slot, over plain tensors."""

    def __init__(self, size: int = 16, config: Any = CONFIG) -> None:
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcRequestState

        from tempering.engines.vllm.by_slot import BySlot
        from tempering.engines.vllm.processor import TemperingPolicies

        self.ids = torch.zeros(size, 64, dtype=torch.int32)
        self.prompt = np.zeros(size, dtype=np.int32)
        state = LogitsProcRequestState(
            device=torch.device("cpu"),
            max_num_reqs=size,
            vocab_size=VOCABULARY,
            all_token_ids=SimpleNamespace(gpu=self.ids),
            prompt_len=SimpleNamespace(np=self.prompt),
            prefill_len=None,
            total_len=None,
        )
        self.processor = TemperingPolicies(config, state)
        assert isinstance(self.processor, BySlot)

    def add(self, slot: int, policy: Any, request: Request) -> bool:
        self.prompt[slot] = len(request.prompt)
        self.grow(slot, request)
        return bool(self.processor.add_request(slot, params(policy, request)))

    def grow(self, slot: int, request: Request) -> None:
        whole = torch.tensor([*request.prompt, *request.generated], dtype=torch.int32)
        self.ids[slot, : len(whole)] = whole

    def apply(self, logits: torch.Tensor, slots: list[int], lengths: list[int]) -> torch.Tensor:
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

        mapping = torch.tensor(slots)
        context = LogitsContext(
            expanded_idx_mapping=mapping,
            idx_mapping=mapping,
            idx_mapping_np=np.array(slots),
            expanded_local_pos=torch.zeros(len(slots), dtype=torch.int32),
            input_ids=torch.zeros(len(slots), dtype=torch.int32),
            pos=torch.tensor(lengths) - 1,
            seq_lens_upper_bound_np=np.array(lengths),
        )
        return self.processor.apply(logits, context)


def test_the_newer_interface_keeps_the_contract():
    def run(policy, requests, logits):
        slots = Slots()
        places = [(3 * index + 1) % 16 for index in range(len(requests))]
        for slot, request in zip(places, requests):
            slots.add(slot, policy, request)
        lengths = [len(request.prompt) + len(request.generated) for request in requests]
        return slots.apply(logits.clone(), places, lengths) / own(requests)  # vLLM divides after

    assert check_engine(run) > 100


def test_vllm_loads_it_for_both_runners():
    from vllm.v1.sample.logits_processor import build_logitsprocs
    from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs

    from tempering.engines.vllm.by_row import ByRow
    from tempering.engines.vllm.processor import TemperingPolicies

    assert TemperingPolicies in _load_v2_logitsprocs(None)
    config = Config(
        **vars(CONFIG), scheduler_config=SimpleNamespace(max_num_seqs=4), reasoning_config=None
    )
    built = build_logitsprocs(config, torch.device("cpu"), False, False)
    assert any(isinstance(item, ByRow) for item in built.argmax_invariant)


def fresh(draw: random.Random) -> tuple[Any, Request]:
    """A request with temperatures that no other request has, or with no policy."""
    hot, cold = round(draw.uniform(1.1, 3), 5), round(draw.uniform(0.2, 0.9), 5)
    policy = draw.choice(
        (
            None,
            f"constant({hot})",
            f"schedule(linear({hot},{cold}), length=6)",
            f"phases(thinking=between({hot}, ids(3), ids(4)), answer={cold})",
            f"ladder({cold},{hot}, n=3)",
        )
    )
    prompt = tuple(draw.choice((1, 2, 3, 4)) for _ in range(draw.randrange(1, 5)))
    return policy, Request(prompt, (), draw.randrange(3))


def temperature(policy: Any, request: Request) -> float:
    """T of such a request, by hand."""
    if policy is None:
        return 1.0
    values = [float(text) for text in re.findall(r"\d\.\d+", policy)]
    if policy.startswith("constant"):
        return values[0]
    if policy.startswith("schedule"):
        share = min(len(request.generated), 5) / 5
        return (1 - share) * values[0] + share * values[1]
    if policy.startswith("ladder"):
        return values[0] * (values[1] / values[0]) ** (request.sample / 2)
    marks = [token for token in (*request.prompt, *request.generated) if token in (3, 4)]
    return values[0] if marks and marks[-1] == 3 else values[1]


def grown(policy: Any, request: Request, token: int) -> tuple[Any, Request]:
    return policy, Request(request.prompt, (*request.generated, token), request.sample)


def check(
    got: torch.Tensor, logits: torch.Tensor, requests: list[tuple[Any, Request] | None]
) -> None:
    """Every row divided by its own temperature: softmax(l/T) for T worked out by hand."""
    T = torch.tensor([1.0 if item is None else temperature(*item) for item in requests])
    torch.testing.assert_close(
        got.softmax(-1), (logits / T[:, None]).softmax(-1), rtol=1e-4, atol=1e-6
    )


def random_logits(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def test_ten_thousand_requests_keep_their_own_temperature():
    """Random arrivals, departures, moves and swaps, as vLLM's batch condenses and reorders."""
    draw = random.Random(0)
    rows = Rows()
    living: dict[int, tuple[Any, Request]] = {}
    served = step = 0
    while served < 10_000:
        step += 1
        removed = [place for place in living if draw.random() < 0.3]
        for place in removed:
            del living[place]
        added = []
        free = [place for place in range(24) if place not in living]
        for place in draw.sample(free, draw.randrange(len(free) + 1)):
            living[place] = fresh(draw)
            added.append((place, *living[place]))
            served += 1
        moved = []
        rows.add(added)
        for a in draw.sample(sorted(living), min(len(living), draw.randrange(4))):
            b = draw.randrange(24)
            if a == b or a not in living:
                continue
            moved.append((a, b, b in living))
            for own in (living, rows.lists):
                one, other = own.pop(a), own.pop(b, None)
                own[b] = one
                if other is not None and b in living:
                    own[a] = other
            if not moved[-1][2]:
                rows.lists.pop(a, None)
        # A place that is filled again is not told to be removed.
        rows.update([p for p in removed if p not in {place for place, *_ in added}], moved)
        if not living:
            continue
        size = max(living) + 1
        logits = random_logits(size, step)
        got = rows.processor.apply(logits.clone())
        check(got, logits, [living.get(place) for place in range(size)])
        for place in list(living):
            token = draw.choice((1, 2, 3, 4))
            rows.lists[place].append(token)
            living[place] = grown(*living[place], token)


def test_slots_that_are_reused_forget_their_last_request():
    draw = random.Random(0)
    slots = Slots()
    living: dict[int, tuple[Any, Request]] = {}
    for step in range(300):
        for slot in range(16):
            chance = draw.random()
            if slot in living and (chance < 0.2 or len(living[slot][1].generated) > 40):
                del living[slot]  # vLLM tells nobody when a slot falls free
            if slot not in living and chance < 0.5:
                living[slot] = fresh(draw)
                assert slots.add(slot, *living[slot]) == (living[slot][0] is not None)
        if not living:
            continue
        order = draw.sample(sorted(living), len(living))
        logits = random_logits(len(order), step)
        requests = [living[slot][1] for slot in order]
        lengths = [len(r.prompt) + len(r.generated) for r in requests]
        check(slots.apply(logits.clone(), order, lengths), logits, [living[s] for s in order])
        for slot in order:
            living[slot] = grown(*living[slot], draw.choice((1, 2, 3, 4)))
            slots.grow(slot, living[slot][1])


def test_parts_of_a_prompt_are_left_alone():
    slots = Slots()
    request = Request((1, 2, 3), ())
    slots.add(5, "constant(0)", request)
    logits = made_logits([request])
    assert torch.equal(slots.apply(logits.clone(), [5], [2]), logits)
    assert not torch.equal(slots.apply(logits.clone(), [5], [3]), logits)
