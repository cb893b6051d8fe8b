"""The fused kernel, in Triton's interpreter on the CPU, against loops over weights in float64.

In a process of its own: the interpreter is chosen when Triton is imported.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton (pip install triton)"
)


@pytest.mark.slow
def test_the_kernel_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.fused_cases"],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.split("\n")[:4] == [
        f"{part} agree" for part in ("masks", "kinds", "outputs", "hard")
    ]
