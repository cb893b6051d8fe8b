"""A short form of `benchmarks/vllm_fuzz.py`: requests drawn to break a server, under load."""

from __future__ import annotations

from tests.vllm.fuzzing import REASONING, Fuzz
from tests.vllm.serving import serving


def test_requests_drawn_to_break_a_server(tiny, tmp_path):
    directory, model, tokenizer = tiny
    with serving(directory, tmp_path, "--reasoning-config", REASONING) as server:
        report = Fuzz(server, model, tokenizer, seed=1).run(600, 300)
        log = server.log.read_text()
    assert report.wrong == []
    assert sum(report.kinds.values()) == 600
    assert min(report.kinds[kind] for kind in ("good", "bad", "any", "cancel", "text", "ids")) > 10
    assert report.slowest_health < 20
    assert "Traceback" not in log
