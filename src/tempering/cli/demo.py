"""tempering demo: generation, support and cost on the embedded model in one run."""

from __future__ import annotations

from tempering.cli.shared import common

PATTERN = "throb(12,3,1,12)"
AMPLITUDE = 1.3
PROMPT = "Suggest a name for a small bookshop by the sea, and say why."

EPILOG = """Examples:

  tempering demo
"""


def demo(
    model: common.Model = "smollm2",
    seed: common.Seed = 0,
    out: common.Out = common.RUNS,
    as_json: common.Json = False,
) -> None:
    """Show the main job on a small model, in a minute.

    A model runs hot and cold by layer beside itself untouched: answers, support, cost.

    A model with a profile for recall in the package answers questions about a long text too;
    the embedded one is rounded to 3 bits at the end, and repaired by its profile.
    """
    from tempering.attention.measuring.measure import measure_tokens
    from tempering.attention.profiles.profile import Profile
    from tempering.chunks import token_chunks
    from tempering.cli.generate import side_by_side
    from tempering.cli.shared.answers import answers
    from tempering.cli.shared.repaired_demo import PROFILE, repaired_rows
    from tempering.cli.shared.sections import (
        benefit_section,
        cost_section,
        pattern_section,
        support_section,
    )
    from tempering.data.gallery import gallery
    from tempering.evaluation.compare import compare
    from tempering.reports import Record
    from tempering.schedules import schedule
    from tempering.tokens.policy import ConstantPolicy

    common.check_out(out)
    network, tokenizer = common.open_model(model)
    text, name = common.text_of(None)
    plan = schedule(PATTERN).amplitude(AMPLITUDE)
    profile = Profile.from_schedule(plan, network)
    label = str(plan)
    results = side_by_side(
        network,
        tokenizer,
        PROMPT,
        profile,
        tokens=48,
        policy=ConstantPolicy(0.7),
        chat=True,
        seed=seed,
        show=not as_json,
    )
    chunks = token_chunks(tokenizer, text, 512, 3)
    with common.counted("support, untempered") as report:
        before = measure_tokens(network, chunks, progress=report)
    with common.counted("support, tempered") as report:
        after = measure_tokens(network, chunks, profile=profile, progress=report)
    with common.staged() as staged:
        comparison = compare(
            network,
            tokenizer,
            text,
            [plan],
            limit=8,
            samples=4,
            prompts=4,
            new_tokens=24,
            seed=seed,
            progress=staged,
        )
    results |= {
        "pattern": pattern_section({label: profile}),
        "support": support_section(before, {label: after}, ("sink_share",)),
        "cost": cost_section(comparison),
        "benefit": benefit_section(comparison),
    }
    tuned = f"{model}/recall"
    if tuned in gallery():
        with common.counted("questions", "questions") as report:
            results |= answers(
                network, tokenizer, Profile.load(tuned), tuned, seed=seed, progress=report
            )
    if model == "smollm2" and PROFILE in gallery():
        with common.staged() as staged:
            results["repair"] = repaired_rows(network, tokenizer, progress=staged)
    record = Record.new(
        "demo",
        settings={"pattern": label, "prompt": PROMPT, "text": name, "chunk": 512, "chunks": 8},
        results=results,
        model=common.model_section(network, model),
        seed=seed,
    )
    common.finish(record, out, as_json)
