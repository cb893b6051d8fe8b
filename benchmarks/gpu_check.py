"""What a GPU shows of tempering, in 12 minutes and without a network: one table and one JSON.

    python benchmarks/gpu_check.py [--minutes 12] [--only NAME ...]     # or: make gpu-check

Each row is a process of its own with a limit of its own, so that one that fails, hangs or runs out
of memory takes no other with it; its reason is its row. What needs a GPU, or a package that is not
there, is skipped by name. dev/gpu.md says what the image must have. Writes
benchmarks/results/gpu_check.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]
# The models of the speed rows: random weights of these shapes.
LAYERS, HEADS, WIDTH, BATCH = 32, 32, 128, 8


def model_of(layers: int, kv_heads: int = 8, attention: str = "sdpa") -> Any:
    """A llama of 32 heads of 128, random weights in bfloat16, on the GPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=HEADS * WIDTH,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        max_position_embeddings=65536,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
    model.set_attn_implementation(attention)
    return model.eval()


def hot(model: Any) -> Any:
    """A profile with a temperature for each head."""
    import torch

    from tempering import Profile

    generator = torch.Generator().manual_seed(0)
    shape = (model.config.num_hidden_layers, model.config.num_attention_heads)
    return Profile.from_matrix(torch.rand(shape, generator=generator) * 0.6 + 0.7, model)


def seconds(function: Callable[[], object], repeats: int) -> float:
    """The median time of a function on the GPU."""
    import torch

    function()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def suite() -> Row:
    """The tests that are marked gpu."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rf", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "tests"], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode not in (0, 5):
        raise RuntimeError("; ".join(lines[-4:]))
    return {"told": lines[-1] if lines else ""}


def exact(attention: str) -> Row:
    """A profile against the same temperatures in eager float32, on a small model."""
    import torch

    from tempering import tempered

    model = model_of(2, attention=attention)
    profile = hot(model)
    ids = torch.randint(0, 32000, (2, 300), device="cuda")
    with torch.no_grad():
        with tempered(model, profile):
            found = model(input_ids=ids, use_cache=False).logits.float()
        model.set_attn_implementation("eager")
        wide = model.float()
        with tempered(wide, profile):
            expected = wide(input_ids=ids, use_cache=False).logits
    off = float((found - expected).abs().max() / expected.abs().max())
    if not off < 0.05:  # bfloat16 holds 8 bits, over two layers
        raise RuntimeError(f"off by {off:.3g} of the largest logit")
    return {"relative error": off}


def compiled(mode: str) -> Row:
    """torch.compile with a static cache, tempered, against the same model as it is."""
    import torch

    from tempering import tempered

    model = model_of(2)
    ids = torch.randint(0, 32000, (1, 64), device="cuda")
    options = {"max_new_tokens": 16, "do_sample": False, "cache_implementation": "static"}
    with tempered(model, hot(model)):
        expected = model.generate(ids, **options)
        model.forward = torch.compile(model.forward, mode=mode, fullgraph=True)
        found = model.generate(ids, **options)
    same = float((found == expected).float().mean())
    if same < 0.95:
        raise RuntimeError(f"{same:.1%} of the tokens are the same")
    return {"same tokens": same}


def kernel() -> Row:
    """The fused kernel against the streaming path in float64, and against sdpa's output."""
    import torch

    from tempering.attention.logits import AttentionCall
    from tempering.attention.measuring import fused, streaming

    worst = 0.0
    for width in (64, 80, 128, 256):
        for more in ({}, {"window": 100}, {"cap": 20.0}):
            query = torch.randn(2, 8, 515, width, device="cuda").bfloat16()
            key, value = (torch.randn(2, 2, 515, width, device="cuda").bfloat16() for _ in "kv")
            call = AttentionCall(query, key, width**-0.5, causal=True, **more)
            found = fused.run(call, 1, value)
            wide = AttentionCall(query.double(), key.double(), width**-0.5, causal=True, **more)
            expected = streaming.moments(wide, 1)
            for name, a, b in zip(expected._fields, found.moments, expected):
                ok = b.isfinite()
                off = float(((a - b).abs() / b.abs().clamp(min=1))[ok].max())
                if not off < 1e-3:
                    raise RuntimeError(f"{name} is off by {off:.3g} at {width} {more}")
                worst = max(worst, off)
            if not more:
                plain = torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=True
                )
                off = float((plain.float() - found.output.float()).abs().max())
                if not off < 0.05:
                    raise RuntimeError(f"the output is off by {off:.3g} at {width}")
    return {"relative error": worst}


def kernel_speed(length: int) -> Row:
    """The fused kernel, moments alone and with the output, beside flash attention."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from tempering.attention.logits import AttentionCall
    from tempering.attention.measuring import fused, streaming

    batch = BATCH if length <= 4096 else 1
    query = torch.randn(batch, HEADS, length, WIDTH, device="cuda").bfloat16()
    key, value = (torch.randn(batch, 8, length, WIDTH, device="cuda").bfloat16() for _ in "kv")
    call = AttentionCall(query, key, WIDTH**-0.5, causal=True)

    def flash() -> object:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )

    base = seconds(flash, 10)
    return {
        "flash, ms": base * 1e3,
        "moments and output / flash": seconds(lambda: fused.run(call, 1, value), 10) / base,
        "moments / flash": seconds(lambda: fused.run(call, 1), 10) / base,
        "streaming moments / flash": seconds(lambda: streaming.moments(call, 1), 2) / base,
    }


def overhead(length: int) -> Row:
    """A profile per head, rules, and profiles by row: prefill of `length` tokens, and decoding."""
    import torch

    from tempering import adaptive_profile, tempered

    model = model_of(LAYERS)
    batch = BATCH if length <= 4096 else 1
    ids = torch.randint(0, 32000, (batch, length), device="cuda")
    profile = hot(model)

    def prefill() -> object:
        with torch.no_grad():
            return model.base_model(input_ids=ids, use_cache=False)

    def decode() -> object:
        with torch.no_grad():
            return model.generate(ids[:, :512], max_new_tokens=32, min_new_tokens=32)

    repeats = 3 if length > 4096 else 5
    row: Row = {"prefill, s": (base := seconds(prefill, repeats))}
    decoding = length <= 4096
    if decoding:
        row["decoding 32 tokens, s"] = (slow := seconds(decode, 3))
    variants = {"per head": profile, "rows": [profile.scaled(0.1 * i) for i in range(batch)]}
    if length <= 4096:
        variants["rule"] = adaptive_profile("log_length(8)", model)
    for name, given in variants.items():
        with tempered(model, given):
            row[f"{name}, prefill / plain"] = seconds(prefill, repeats) / base
            if decoding and name != "rule":
                row[f"{name}, decoding / plain"] = seconds(decode, 3) / slow
    return row


def measuring(length: int) -> Row:
    """`measure` of one text beside the model's forward."""
    import torch

    from tempering.attention.measuring.measure import measure_tokens

    model = model_of(4)
    ids = torch.randint(0, 32000, (1, length), device="cuda")
    with torch.no_grad():
        base = seconds(lambda: model.base_model(input_ids=ids, use_cache=False), 3)
    return {"measure / forward": seconds(lambda: measure_tokens(model, ids), 2) / base}


# name -> (what it runs, arguments, seconds at most, packages it needs)
CHECKS: dict[str, tuple[Callable[..., Row], tuple[Any, ...], int, tuple[str, ...]]] = {
    "fused kernel": (kernel, (), 90, ("triton",)),
    "fused kernel, 4k": (kernel_speed, (4096,), 60, ("triton",)),
    "fused kernel, 32k": (kernel_speed, (32768,), 90, ("triton",)),
    "exact, sdpa": (exact, ("sdpa",), 60, ("transformers",)),
    "exact, flash": (exact, ("flash_attention_2",), 60, ("transformers", "flash_attn")),
    "exact, flex": (exact, ("flex_attention",), 90, ("transformers",)),
    "compiled": (compiled, ("default",), 120, ("transformers", "triton")),
    "compiled, CUDA graphs": (compiled, ("reduce-overhead",), 120, ("transformers", "triton")),
    "overhead, 4k": (overhead, (4096,), 120, ("transformers",)),
    "overhead, 32k": (overhead, (32768,), 120, ("transformers",)),
    "measuring, 4k": (measuring, (4096,), 60, ("transformers",)),
    "measuring, 32k": (measuring, (32768,), 90, ("transformers",)),
    "tests marked gpu": (suite, (), 240, ("pytest", "hypothesis")),
}


def child(name: str) -> None:
    """Run one check in this process; its row is the last line of stdout."""
    function, arguments, _, _ = CHECKS[name]
    try:
        row: Row = {"status": "ok", **function(*arguments)}
    except Exception as error:
        traceback.print_exc()
        reason = str(error).strip().splitlines()
        row = {"status": "failed", "why": f"{type(error).__name__}: {(reason or [''])[0][:300]}"}
    print(json.dumps(row))


def checked(name: str, left: float) -> Row:
    """The row of one check, in a process of its own."""
    import torch

    _, _, limit, packages = CHECKS[name]
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if not torch.cuda.is_available():
        return {"status": "skipped", "why": "torch finds no CUDA device"}
    if absent:
        return {"status": "skipped", "why": f"without {', '.join(absent)}"}
    if left < 20:
        return {"status": "skipped", "why": "no time is left"}
    start = time.monotonic()
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, "--child", name]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=min(limit, left),
        )
        lines = done.stdout.strip().splitlines()
        row = json.loads(lines[-1])
    except subprocess.TimeoutExpired:
        row = {"status": "failed", "why": f"not done in {min(limit, left):.0f} s"}
    except (ValueError, IndexError):
        told = done.stderr.strip().splitlines() or ["no word"]
        row = {"status": "failed", "why": f"ended with {done.returncode}: {told[-1][:300]}"}
    return {**row, "seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    """Run all checks; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--only", nargs="*", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--child", choices=list(CHECKS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "src"))
    if arguments.child:
        child(arguments.child)
        return 0
    from _bench import write

    end = time.monotonic() + 60 * arguments.minutes
    rows: dict[str, Row] = {}
    try:
        for name in arguments.only:
            rows[name] = row = checked(name, end - time.monotonic())
            numbers = (
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row.items()
                if key not in ("status", "seconds")
            )
            print(f"{name:24s} {row['status']:8s} {'; '.join(numbers)}", flush=True)
    finally:
        print(f"JSON: {write('gpu_check', {'checks': rows})}")
    return int(any(row["status"] == "failed" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
