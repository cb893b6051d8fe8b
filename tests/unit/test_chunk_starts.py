"""Chunks begin as the model's tokenizer begins a text: with <bos> where it has one."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tempering.attention.tuning.batches import answer_batches
from tempering.chunks import start_ids, text_ids, token_chunks
from tempering.errors import DataError, InputError


def word_tokenizer(single: str | None) -> PreTrainedTokenizerFast:
    """Words w0 to w99 (ids 3 to 102), with a template such as "<s> $A" for a text."""
    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(100)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if single is not None:
        made.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TEXT = " ".join(f"w{i}" for i in range(40))


@pytest.mark.parametrize(
    ("template", "start"),
    [(None, []), ("$A", []), ("$A </s>", []), ("<s> $A", [0]), ("<s> $A </s>", [0]),
     ("</s> <s> $A", [1, 0])],
)  # fmt: skip
def test_start_is_what_the_tokenizer_puts_before_a_text(template, start):
    tokenizer = word_tokenizer(template)
    assert start_ids(tokenizer) == start
    assert text_ids(tokenizer, "w1 w2") == [*start, 4, 5]


@pytest.mark.parametrize("limit", [None, 2])
def test_every_chunk_has_the_start_and_loses_no_word(limit):
    chunks = token_chunks(word_tokenizer("<s> $A"), TEXT, 9, limit)
    words = torch.arange(3, 43).reshape(5, 8)
    wanted = words if limit is None else words[[0, 4]]
    assert torch.equal(chunks[:, 1:], wanted)
    assert chunks[:, 0].tolist() == [0] * len(wanted)
    assert chunks.shape[1] == 9


def test_chunks_without_a_start_are_the_text_itself():
    chunks = token_chunks(word_tokenizer(None), TEXT, 8)
    assert torch.equal(chunks, torch.arange(3, 43).reshape(5, 8))


def test_text_that_begins_with_its_start_gets_no_second():
    tokenizer = word_tokenizer("<s> $A")
    assert text_ids(tokenizer, "<s> w1 w2") == [0, 4, 5]


def test_answers_follow_the_start():
    (batch,) = answer_batches(word_tokenizer("<s> $A"), [("w1 w2", " w3")])
    assert batch.ids.tolist() == [[0, 4, 5, 6]]
    assert batch.targets.tolist() == [[False, False, False, True]]


def test_chunk_that_the_start_fills_is_refused():
    tokenizer = word_tokenizer("</s> <s> $A")
    with pytest.raises(InputError, match="at least 4"):
        token_chunks(tokenizer, TEXT, 3)
    assert token_chunks(tokenizer, TEXT, 4).shape == (20, 4)
    with pytest.raises(DataError, match="at most 42 tokens"):
        token_chunks(tokenizer, TEXT, 43)


def test_tokenizer_that_reads_a_text_otherwise_with_its_specials_is_refused():
    class Odd:
        def __call__(self, text, *, add_special_tokens=True, verbose=False):
            return type("Read", (), {"input_ids": [0, 7] if add_special_tokens else [5]})

    with pytest.raises(InputError, match="can't be told"):
        start_ids(Odd())
