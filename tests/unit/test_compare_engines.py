"""Options of `compare` that an engine which only scores prompts refuses, instead of ignoring."""

from __future__ import annotations

import pytest

from tempering.cli import _run


@pytest.mark.parametrize("engine", ["vllm", "llamacpp"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--samples", "4"), "--samples samples with an engine in process"),
        (("--device", "cuda"), "--device is the engine's to choose"),
        (("--read-as", "support"), "--read-as needs attention weights"),
    ],
)
def test_what_only_scores_prompts_refuses_the_rest(engine, more, message, capsys):
    arguments = ["compare", "--engine", engine, "--pattern", "linear(1.4,0.7)", *more]
    assert _run(arguments, debug=False) == 2
    assert message in capsys.readouterr().err


def test_a_files_dtype_is_its_own(capsys):
    arguments = ["compare", "--engine", "llamacpp", "--pattern", "linear(1.4,0.7)"]
    assert _run([*arguments, "--dtype", "bfloat16"], debug=False) == 2
    assert "--dtype is the file's; leave it out" in capsys.readouterr().err
