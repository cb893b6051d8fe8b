"""Data of a tuning run: objectives, files of answers, what is held out, what may not overlap."""

from __future__ import annotations

import json

import pytest
import torch

from tempering.attention.tuning import (
    Constraint,
    Objective,
    from_batches,
    from_functions,
    from_pairs,
    from_text,
    read_pairs,
    refuse_overlap,
)
from tempering.attention.tuning.batches import Batch, text_batches
from tempering.attention.tuning.problem import make_problem
from tempering.attention.tuning.split import split
from tempering.errors import DataError, InputError


class Letters:
    """A tokenizer of letters; an 'x' swallows the letter after it."""

    def __call__(self, text, add_special_tokens=False, verbose=False, return_tensors=None):
        ids, place = [], 0
        while place < len(text):
            width = 2 if text[place] == "x" and place + 1 < len(text) else 1
            ids.append(sum(ord(c) * 997**i for i, c in enumerate(text[place : place + width])))
            place += width
        tensor = torch.tensor([ids]) if return_tensors else ids
        return type("Encoding", (), {"input_ids": tensor})()


def _text(chunks: int, length: int = 8, seed: int = 0, name: str = "text"):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50_000, (chunks, length), generator=generator)
    return from_batches(name, text_batches(ids, name))


def test_text_predicts_every_token_but_the_first_of_a_chunk():
    found = from_text(Letters(), "abcdefghij", chunk=4)
    assert [piece.count for piece in found.pieces] == [3, 3]
    assert found.pieces[1].origin == "text, chunk 1" and found.count == 6


def test_answers_count_and_prompts_do_not():
    found = from_pairs(Letters(), [("ab", "cd"), ("abc", "d")])
    assert [piece.count for piece in found.pieces] == [2, 1]
    assert found.pieces[0].source.targets.tolist() == [[False, False, True, True]]
    assert found.kind == "answers"


def test_a_token_merged_over_the_seam_belongs_to_the_answer():
    found = from_pairs(Letters(), [("abx", "yz")])
    assert found.pieces[0].source.targets.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("answer", ["", "  ", "\n"])
def test_an_answer_of_no_tokens_is_refused(answer):
    with pytest.raises(DataError, match=r"qa, pair 1: the answer .* has no tokens of its own"):
        from_pairs(Letters(), [("a", "b"), ("ab", answer)], name="qa")


def test_data_shorter_than_one_chunk_are_refused():
    with pytest.raises(DataError, match="notes: the text has 3 tokens, less than one chunk of 8"):
        from_text(Letters(), "abc", chunk=8, name="notes")


def test_an_empty_objective_and_a_row_without_targets_are_refused():
    with pytest.raises(DataError, match="'qa' is empty"):
        from_pairs(Letters(), [], name="qa")
    nothing = Batch(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.bool), "r")
    with pytest.raises(DataError, match="r: no token is a target"):
        from_batches("r", [nothing])


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_weights_are_positive(weight):
    with pytest.raises(InputError, match="weight of 'text' is a positive number"):
        Objective("text", "text", _text(2).pieces, weight)


def test_functions_need_a_count_each():
    with pytest.raises(InputError, match="2 functions and counts"):
        from_functions("f", [lambda m: m, lambda m: m], counts=[1])
    assert from_functions("f", [lambda m: m], counts=[7]).count == 7


def test_constraints_are_positive_and_of_a_known_kind():
    with pytest.raises(InputError, match=r"positive number of nats per token, not -0\.1"):
        Constraint(_text(2), -0.1)
    with pytest.raises(InputError, match="'cost' or 'divergence', not 'distance'"):
        Constraint(_text(2), 0.1, "distance")
    with pytest.raises(InputError, match="not on a Python function"):
        Constraint(from_functions("f", [lambda m: m]), 0.1)


def test_pairs_are_read_line_by_line(tmp_path):
    path = tmp_path / "qa.jsonl"
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": " d", "more": 1}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert read_pairs(path) == [("a", "b"), ("c", " d")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 is not JSON"),
        ("[1]", r'line 2: expected \{"prompt"'),
        ('{"prompt": "a"}', r'line 2: expected \{"prompt"'),
        ('{"prompt": 1, "answer": "b"}', r'line 2: expected \{"prompt"'),
        ('{"prompt": "a", "answer": " "}', "line 2: the answer ' ' has no tokens"),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path, line, message):
    path = tmp_path / "qa.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' + line)
    with pytest.raises(DataError, match=message):
        read_pairs(path)


def test_the_split_is_a_partition_drawn_by_the_seed():
    whole = _text(10)
    kept, held = split(whole, 0.3, seed=1)
    origins = sorted(p.origin for p in (*kept.pieces, *held.pieces))
    assert origins == sorted(p.origin for p in whole.pieces)
    assert (len(kept.pieces), len(held.pieces)) == (7, 3)
    again = split(whole, 0.3, seed=1)[1]
    assert [p.origin for p in again.pieces] == [p.origin for p in held.pieces]
    draws = {tuple(p.origin for p in split(whole, 0.3, seed=s)[1].pieces) for s in range(8)}
    assert len(draws) > 1


def test_pieces_of_one_content_stay_on_one_side():
    ids = torch.arange(8).repeat(6, 1)
    ids[:2] += 100
    whole = from_batches("text", text_batches(ids))
    for seed in range(5):
        kept, held = split(whole, 0.5, seed)
        assert not {p.digest for p in kept.pieces} & {p.digest for p in held.pieces}


def test_what_cannot_be_parted_is_refused():
    same = from_batches("text", text_batches(torch.arange(8).repeat(6, 1)))
    with pytest.raises(DataError, match=r"'text' has 1 chunk of its own.*held_out=0"):
        split(same, 0.2, 0)
    with pytest.raises(InputError, match=r"from above 0 to 0\.5 can be held out, not 0\.7"):
        split(_text(4), 0.7, 0)


def test_overlap_is_found_at_any_place():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 50_000, (4, 512), generator=generator)
    first = from_batches("learned", text_batches(ids, "learned"))
    other = torch.randint(0, 50_000, (2, 512), generator=generator)
    clean = from_batches("test", text_batches(other, "test"))
    refuse_overlap([first], [clean], "calibration and test")
    other[1, 201:328] = ids[2, 77:204]  # 127 tokens hold a whole block wherever they lie
    dirty = from_batches("test", text_batches(other, "test"))
    with pytest.raises(
        DataError, match="calibration and test overlap: test, chunk 1 and learned, chunk 2"
    ):
        refuse_overlap([first], [dirty], "calibration and test")


def test_overlap_of_short_chunks_is_found_however_they_are_cut():
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 50_000, (400,), generator=generator)
    first = from_batches("learned", text_batches(ids[:320].view(-1, 32), "learned"))
    second = from_batches("test", text_batches(ids[301:397].view(-1, 32), "test"))
    refuse_overlap([first], [second], "calibration and test")  # 19 tokens, less than a chunk
    second = from_batches("test", text_batches(ids[245:373].view(-1, 32), "test"))
    with pytest.raises(
        DataError, match=r"overlap: test, chunk 0 and learned, chunk 8 have 32 tokens in common"
    ):
        refuse_overlap([first], [second], "calibration and test")


def test_answers_overlap_as_wholes_and_functions_by_identity():
    pairs = from_pairs(Letters(), [("a" * 200, "b"), ("c", "d")], name="one")
    near = from_pairs(Letters(), [("a" * 200, "x1")], name="two")
    refuse_overlap([pairs], [near], "calibration and test")
    same = from_pairs(Letters(), [("c", "d")], name="two")
    with pytest.raises(DataError, match="two, pair 0 and one, pair 1 have the same data"):
        refuse_overlap([pairs], [same], "calibration and test")

    def loss(model):
        return model

    refuse_overlap(
        [from_functions("f", [loss])], [from_functions("f", [lambda m: m])], "calibration and test"
    )
    with pytest.raises(DataError, match="overlap"):
        refuse_overlap([from_functions("f", [loss])], [from_functions("g", [loss])], "a and b")


def test_a_problem_parts_objectives_and_constraint():
    problem = make_problem(
        [_text(10), _text(5, seed=1, name="b")], Constraint(_text(10, seed=2), 0.01), 0.2, 0
    )
    assert [len(goal.pieces) for goal in problem.goals] == [8, 4]
    assert [len(goal.pieces) for goal in problem.watched_goals] == [2, 1]
    assert len(problem.limit.pieces) == 8 and len(problem.watched_limit.pieces) == 2
    assert problem.watched == "held out" and problem.targets == 12 * 7


def test_nothing_held_out_watches_the_calibration_data():
    problem = make_problem(_text(3), None, 0, 0)
    assert problem.watched == "calibration" and problem.watched_goals == problem.goals


def test_held_out_data_of_ones_own_must_fit_and_not_overlap():
    with pytest.raises(InputError, match="1 objectives and 2 to hold out"):
        make_problem(_text(3), None, [_text(2, seed=1), _text(2, seed=2)], 0)
    with pytest.raises(DataError, match="calibration and held-out data overlap"):
        make_problem(_text(3), None, [_text(3)], 0)
    with pytest.raises(InputError, match="give an Objective"):
        make_problem([], None, 0.2, 0)
