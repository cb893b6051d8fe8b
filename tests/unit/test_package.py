"""The package as its users meet it: names, import time rules, the command reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tempering

ROOT = Path(__file__).parents[2]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_every_public_name_exists_and_nothing_else_is_public():
    for name in tempering.__all__:
        assert getattr(tempering, name) is not None
    assert dir(tempering) == tempering.__all__
    with pytest.raises(AttributeError, match="nonsense"):
        tempering.nonsense  # noqa: B018


def test_import_is_light():
    heavy = "torch transformers sklearn matplotlib vllm scipy pandas numpy".split()
    code = f"import sys, tempering; print([m for m in {heavy} if m in sys.modules])"
    assert python(code) == "[]"


def test_help_needs_nothing_heavy():
    code = (
        "import sys, contextlib, io\n"
        "from tempering.cli import _run\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    _run(['--help'], False); _run(['generate', '--help'], False)\n"
        "print([m for m in ('torch', 'transformers', 'rich', 'numpy') if m in sys.modules])"
    )
    assert python(code) == "[]"


def test_scales_and_loader_do_not_need_transformers():
    code = (
        "import sys\n"
        "from tempering import responsibilities, schedule, Learned\n"
        "import tempering.temperature, tempering.training, tempering.tokens\n"
        "import torch, tempering.engines.loading.hub\n"
        "from tempering.attention.profiles.fingerprint import fingerprint\n"
        "fingerprint(torch.nn.Linear(2, 2))\n"
        "print([m for m in ('transformers', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    assert python(code) == "[]"


def test_the_command_reference_is_up_to_date():
    made = python(
        "from tempering.cli.shared.reference import reference; print(reference(), end='')"
    )
    written = (ROOT / "docs/cli.md").read_text(encoding="utf-8").strip()
    assert written == made, "docs/cli.md is stale; make it anew with: make docs"
