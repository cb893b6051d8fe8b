"""Questions about a long context, answered by the model as it is and under a profile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# The keys and this part of the text were never tuned on.
WORDING, FACTS, WORDS, QUESTIONS = "secret code", 16, 450, 5


def answers(
    network: Any,
    tokenizer: Any,
    profile: Any,
    label: str,
    *,
    seed: int = 0,
    questions: int = QUESTIONS,
    words: int = WORDS,
    progress: Callable[[int, int], None] | None = None,
    check: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """The likeliest answers to questions about one context, side by side, and how many are right.

    An answer is right when what follows the question begins with it. check: called before every
    token; what it raises ends the asking.
    """
    import torch

    from tempering.attention.examining.layout_of import layout
    from tempering.attention.profiles.profile import UNTEMPERED, Profile
    from tempering.chunks import text_ids
    from tempering.engines.generating.side_by_side import stream
    from tempering.evaluation.recall import recall
    from tempering.evaluation.recall_pools import WORDINGS
    from tempering.tokens.policy import ConstantPolicy

    place = [wording[0] for wording in WORDINGS].index(WORDING)
    asked = recall(
        seed, wording=place, value="digits", facts=FACTS, questions=questions, words=words
    )
    plan = layout(network)
    rows = [Profile.neutral(plan), profile]
    table = []
    for done, (prompt, answer) in enumerate(asked.pairs(), 1):
        ids = torch.tensor(text_ids(tokenizer, prompt))
        length = len(tokenizer(answer, add_special_tokens=False).input_ids)
        texts = ["", ""]
        greedy = ConstantPolicy(0)
        with torch.no_grad():
            for step in stream(
                network, tokenizer, ids, rows, tokens=length, policy=greedy, revised=check
            ):
                texts[step.row] += step.text
        told = [text.strip() for text in texts]
        table.append(
            {
                "question": prompt.rsplit("\n\n", 1)[1] + " ...",
                "stated": answer.strip(),
                UNTEMPERED: told[0],
                label: told[1],
            }
        )
        if progress is not None:
            progress(done, questions)
    right = {
        name: sum(row[name].startswith(row["stated"]) for row in table)
        for name in (UNTEMPERED, label)
    }
    tokens = len(tokenizer(asked.context, add_special_tokens=False).input_ids)
    return {
        "answers": table,
        "answered": {
            label: f"the same weights, {sum(plan.heads)} temperatures",
            "tokens of context": tokens,
            "questions": len(table),
        }
        | {f"right, {name}": count for name, count in right.items()},
    }
