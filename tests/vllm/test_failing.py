"""An exception at every step of a policy's life, under load: its request fails alone, by name."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm.faults.tempering_faults import STEPS
from tests.vllm.reference import TEXTS
from tests.vllm.serving import Running, healthy, serving

FAULTS = Path(__file__).parent / "faults"
IDS = {"return_tokens_as_token_ids": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory) -> Iterator[Running]:
    import os

    home = tmp_path_factory.mktemp("failing")
    metadata = home / "tempering_faults-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tempering-faults\nVersion: 1\n"
    )
    entry = "[vllm.general_plugins]\ntempering_faults = tempering_faults:register\n"
    (metadata / "entry_points.txt").write_text(entry)
    path = os.pathsep.join([str(home), str(FAULTS), os.environ.get("PYTHONPATH", "")])
    with serving(tiny[0], home, environment={"PYTHONPATH": path}) as running:
        yield running


def ask(server: Running, prompt: list[int], policy: str, **more: Any) -> Any:
    extra = {**IDS, "vllm_xargs": {"tempering": policy}}
    given = {"temperature": 1.0, "max_tokens": 6, "logprobs": 0, **more}
    return server.client.completions.create(model="tiny", prompt=prompt, extra_body=extra, **given)


class Load:
    """Requests with policies of their own that go on while others fail; all must be right."""

    def __init__(self, server: Running, prompt: list[int], raw: torch.Tensor) -> None:
        self.server, self.prompt, self.raw = server, prompt, raw
        self.stop = threading.Event()
        self.right = 0
        self.wrong: list[Any] = []

    def run(self, T: float) -> None:
        while not self.stop.is_set():
            try:
                choice = ask(self.server, self.prompt, f"constant({T})", max_tokens=9).choices[0]
            except Exception as error:
                self.wrong.append(error)
                return
            token = int(choice.logprobs.tokens[0].removeprefix("token_id:"))
            wanted = float((self.raw / T).log_softmax(-1)[token])
            if not math.isclose(choice.logprobs.token_logprobs[0], wanted, abs_tol=2e-4):
                self.wrong.append((T, token, wanted))
            self.right += 1


def test_a_policy_that_raises_fails_its_own_request_alone(server, tiny):
    from openai import APIStatusError

    _, model, tokenizer = tiny
    prompt = tokenizer(TEXTS[0]).input_ids[:20]
    with torch.no_grad():
        raw = model(torch.tensor([prompt])).logits[0, -1].float()
    load = Load(server, prompt, raw)
    heats = (0.5, 1.5, 3.0)
    with ThreadPoolExecutor(len(heats)) as pool:
        running = [pool.submit(load.run, T) for T in heats]
        try:
            for number, step in enumerate(STEPS[:-1]):
                status = 400 if step == "admission" else 500
                for more in ({}, {"n": 3}, {"after": 2}):
                    policy = f"fault({number},{more.pop('after', 0)})"
                    with pytest.raises(APIStatusError) as caught:
                        ask(server, prompt, policy, **more)
                    assert caught.value.status_code == status, (step, caught.value)
                    assert "failed on this request alone" in caught.value.message, step
                    assert _said(step) in caught.value.message, (step, caught.value)
                _check_stream(server, prompt, number, step)
            before = load.right
            while load.right < before + 6 and not load.wrong:
                load.stop.wait(0.2)
        finally:
            load.stop.set()
        for each in running:
            each.result()
    assert load.wrong == []
    assert load.right > 20
    assert healthy(server.url)


def _said(step: str) -> str:
    return {
        "nan": "the temperature is nan",
        "negative": "the temperature is -1.0",
        "shape": "rows; give one for each",
        "text": "(Fault)",
    }.get(step, f"injected at {step}")


def _check_stream(server: Running, prompt: list[int], number: int, step: str) -> None:
    """A stream that fails after some tokens ends with the reason, not as if it were complete."""
    from openai import APIError

    if step == "admission":
        return
    tokens, reasons = 0, []
    with pytest.raises(APIError) as caught:
        for part in ask(server, prompt, f"fault({number},3)", stream=True, max_tokens=20):
            tokens += bool(part.choices[0].text or part.choices[0].logprobs)
            reasons.append(part.choices[0].finish_reason)
    assert "failed on this request alone" in str(caught.value), step
    assert set(reasons) <= {None}
    late = step in ("advance", "temperature", "nan", "negative", "shape", "text")
    assert tokens == (({"advance": 4}.get(step, 3)) if late else 0), step


def test_rows_that_cannot_be_told_apart_fail_and_the_engine_goes_on(server, tiny):
    """The bookkeeping of a batch raises: its requests fail, later ones are right again."""
    from openai import InternalServerError

    prompt = tiny[2](TEXTS[0]).input_ids[:20]
    number = STEPS.index("removal")
    answers: list[Any] = []

    def long() -> None:
        try:
            answers.append(ask(server, prompt, "constant(0.5)", max_tokens=400))
        except InternalServerError as error:
            answers.append(error)

    thread = threading.Thread(target=long)
    thread.start()
    ask(server, prompt, f"fault({number},0)", max_tokens=3)
    thread.join(120)
    (answer,) = answers
    assert isinstance(answer, InternalServerError) and "injected at removal" in answer.message
    assert healthy(server.url)
    again = ask(server, prompt, "constant(0)", max_tokens=4)
    assert again.choices[0].logprobs.token_logprobs == [0.0] * 4
