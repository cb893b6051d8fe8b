"""Phases on real tokenizers of three kinds: split, opened, left, reopened, never closed."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tempering.errors import InputError
from tempering.tokens import TokenState, parse_policy, temper_logits
from tempering.tokens.token_bytes import TokenBytes

# Tokenizers here write tags as text, and few of their templates name one.
pytestmark = pytest.mark.filterwarnings("ignore:neither the vocabulary nor the chat template")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENED = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def byte_level(template=CHATML, merged=("think", "</", "```")):
    """Byte-level BPE, as GPT-2's: one byte a token, a few merges, ChatML's special tokens."""
    vocabulary = {c: i for i, c in enumerate(sorted(ALPHABET))}
    merges = []
    for word in merged:
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if "".join(pair) not in vocabulary:
                vocabulary["".join(pair)] = len(vocabulary)
                merges.append(pair)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = template
    return fast


def metaspace():
    """SentencePiece-like: spaces as U+2581, unknown bytes as <0xNN>, as Llama 2's."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += list("abcdefghiknostwx<>/`\n\u2581")
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def word_piece():
    """WordPiece, as BERT's: the tokenizers library decodes it, and it drops case."""
    pieces = ["[UNK]", "[SEP]", *"abcdefghiknost<>/", *(f"##{c}" for c in "abcdefghiknost")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]")


TOKENIZER = byte_level()


def walk(text, prompt, generated, tokenizer=TOKENIZER):
    """The phase that each generated token is sampled in, and the one after the last."""
    policy = parse_policy(text, tokenizer)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    state = policy.start(ids)
    phases = [state.phase]
    new = tokenizer.encode(generated, add_special_tokens=False)
    for count, token in enumerate(new, 1):
        state = policy.advance(state, token)
        assert state == policy.state(ids, new[:count])  # incremental = rebuilt
        phases.append(state.phase)
    return phases


THINK = "phases(thinking=1, answer=0.2)"
ALL = "phases(thinking=1, answer=0.2, tool=0.1, code=0.3)"


def test_phases_open_and_close_over_split_tokens():
    phases = walk(THINK, "hi ", "<think>ab</think>cd")
    tokens = TOKENIZER.encode("<think>ab</think>cd")
    assert len(tokens) == 3 + 2 + 3 + 2  # "<" "think" ">" a b "</" "think" ">" c d
    # A delimiter counts from its last token on; its own tokens belong to the phase it ends.
    assert phases == ["answer"] * 3 + ["thinking"] * 5 + ["answer"] * 3


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_every_vocabulary_spells_its_text(make):
    tokenizer = make()
    token_bytes = TokenBytes(tokenizer)
    for text in ("a <think> b</think>\n", "``` tea \u00e9\u25b7 ```"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert token_bytes.join(ids).decode().removeprefix(" ") == text.removeprefix(" ")
    assert walk(THINK, "a", "b<think>c", tokenizer)[-1] == "thinking"


def test_other_vocabularies_are_read_through_their_decoder():
    tokenizer = word_piece()
    token_bytes = TokenBytes(tokenizer)
    assert token_bytes.join(tokenizer.encode("a tea", add_special_tokens=False)) == b" a tea"
    with pytest.raises(InputError, match=r"can't produce the delimiter '<think>'"):
        parse_policy(THINK, tokenizer)
    text = 'phases(plan=between(1, "then", "so"), answer=0.2)'
    assert walk(text, "a", "b then a", tokenizer)[-1] == "plan"
    assert walk(text, "a", "b then a so", tokenizer)[-1] == "answer"


@pytest.mark.parametrize(
    ("template", "prompt", "generated", "after"),
    [
        (CHATML, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "", "answer"),
        # opened in the prompt, or by the template; opened and closed by the template
        (CHATML, "<|im_start|>assistant\n<think>\nso", "x", "thinking"),
        (
            OPENED,
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n",
            "",
            "thinking",
        ),
        (OPENED, "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "x", "answer"),
        # a prompt without any turn is one text
        (CHATML, "<think>a", "b", "thinking"),
        # left open in the history: by the user, by an earlier reply
        (CHATML, "<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n", "x", "answer"),
        (OPENED, "<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n", "x", "answer"),
        (PLAIN, "user: <think> what?\nASSISTANT: ", "x", "answer"),
        (PLAIN, "user: a\nASSISTANT: <think> b\nuser: c\nASSISTANT: <think>", "x", "thinking"),
        (None, "<think>a<|im_end|>b", "x", "answer"),
        # reopened; never closed; closed without being open; opened twice
        (CHATML, "", "<think>a</think>b<think>c", "thinking"),
        (CHATML, "", "<think>" + "a" * 50, "thinking"),
        (CHATML, "", "a</think>b", "answer"),
        (CHATML, "", "<think>a<think>b</think>c", "answer"),
        # split between prompt and generation
        (CHATML, "a<thi", "nk>b", "thinking"),
        (CHATML, "<think>a</thi", "nk>b", "answer"),
    ],
)
def test_wherever_a_phase_is_opened(template, prompt, generated, after):
    assert walk(THINK, prompt, generated, byte_level(template))[-1] == after


def test_phases_nest_and_the_innermost_counts():
    text = "<think>A```B```C```D</think>E<tool_call>F```G</tool_call>H"
    tokens = TOKENIZER.convert_ids_to_tokens(TOKENIZER.encode(text))
    phases = walk(ALL, "", text)
    assert {token: phase for token, phase in zip(tokens, phases[1:]) if token.isupper()} == {
        "A": "thinking",
        "B": "code",
        "C": "thinking",
        "D": "code",
        "E": "answer",  # </think> closes the fence inside it too
        "F": "tool",
        "G": "code",
        "H": "answer",
    }


def test_fences_do_not_run_into_each_other():
    # Four backticks are a fence and one more; six are two fences.
    assert walk(ALL, "", "````a")[-1] == "code"
    assert walk(ALL, "", "``````a")[-1] == "answer"
    assert walk(ALL, "", "``\n`")[-1] == "answer"


def test_delimiters_of_the_tokenizer_come_first():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(t, special=True) for t in ("[THINK]", "[/THINK]")])
    assert walk(THINK, "", "[THINK]a", tokenizer)[-1] == "thinking"
    assert walk(THINK, "", "<think>a", tokenizer)[-1] == "answer"
    harmony = byte_level(
        "{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
        "{# <|channel|>analysis<|message|> #}"
    )
    prompt = "<|start|>user<|message|><|channel|>analysis<|message|><|end|><|start|>assistant"
    reply = "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>y"
    phases = walk(THINK, prompt, reply, harmony)
    assert phases[0] == "answer" and phases[-1] == "answer" and "thinking" in phases


def test_delimiters_may_be_given_as_text_or_ids():
    text = 'phases(plan=between(1, "PLAN:\\n", "DONE"), answer=0.2)'
    assert walk(text, "", "PLAN:\nabc")[-1] == "plan"
    assert walk(text, "", "PLAN:\nabcDONE")[-1] == "answer"
    assert str(parse_policy(text, TOKENIZER)) == text
    start = ",".join(map(str, TOKENIZER.encode("ab")))
    text = f'phases(plan=between(1, ids({start}), "c"), answer=0.2)'
    assert walk(text, "", "abab")[-1] == "plan"
    assert walk(text, "a", "bc")[-1] == "answer"


def test_each_phase_has_a_clock_of_its_own():
    policy = parse_policy(
        "phases(thinking=schedule(linear(2,1), length=5), answer=0.2)|clip(0,1.6)", TOKENIZER
    )
    ids = TOKENIZER.encode("<think>a")
    generated = TOKENIZER.encode("bc</think>d<think>ef")
    temperatures = []
    for count in range(len(generated) + 1):
        state = policy.state(ids, generated[:count])
        temperatures.append(temper_logits(policy, torch.zeros(1, 4), [state])[1].item())
    # b c "</" "think" ">" | d "<" "think" ">" | e f, held at its end
    assert temperatures == pytest.approx([1.6, 1.6, 1.5, 1.25, 1] + [0.2] * 4 + [1, 1, 1], rel=1e-6)


def test_rows_of_a_batch_are_in_phases_of_their_own():
    policy = parse_policy(
        "phases(thinking=support(2), answer=0.5, code=ladder(1,2,n=2))", TOKENIZER
    )
    texts = ["<think>", "a", "```", "```"]
    states = [policy.state(TOKENIZER.encode(t), sample=i % 2) for i, t in enumerate(texts)]
    logits = torch.randn(4, 9)
    _, together = temper_logits(policy, logits, states)
    alone = [temper_logits(policy, logits[i : i + 1], [states[i]])[1].item() for i in range(4)]
    assert together.tolist() == pytest.approx(alone)
    assert together[1:].tolist() == pytest.approx([0.5, 1, 2])
    assert policy.samples == 2


PARTS = [
    "<think>",
    "</think>",
    "```",
    "`",
    "<",
    "a",
    "think>",
    "<tool_call>",
    "</tool_call>",
    "\u25b7",
]


def spelled(text):
    """The open phases after a text, read without tokens: the oracle."""
    marks = {"<think>": "thinking", "<tool_call>": "tool", "```": "code"}
    closers = {"</think>": "thinking", "</tool_call>": "tool", "```": "code"}
    opened, place = [], 0
    while place < len(text):
        found = [m for m in {**marks, **closers} if text.startswith(m, place)]
        if not found:
            place += 1
            continue
        mark = found[0]
        if closers.get(mark) in opened:
            opened = opened[: opened.index(closers[mark])]
        elif mark in marks and marks[mark] not in opened:
            opened.append(marks[mark])
        place += len(mark)
    return tuple(opened)


@given(st.lists(st.sampled_from(PARTS), max_size=12), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=300)
def test_phases_depend_on_the_text_and_not_on_how_it_is_split(parts, random):
    text = "".join(parts)
    policy = _all()
    whole = TOKENIZER.encode(text, add_special_tokens=False)
    bytewise = [TOKENIZER.convert_tokens_to_ids(c) for c in _byte_tokens(text)]
    for ids in (whole, bytewise):
        cut = random.randint(0, len(ids))
        assert policy.state(ids[:cut], ids[cut:]).opened == spelled(text)


@cache
def _all():
    return parse_policy(ALL, TOKENIZER)


def _byte_tokens(text):
    from tempering.tokens.token_bytes import _byte_level

    back = {byte: c for c, byte in _byte_level().items()}
    return [back[byte] for byte in text.encode()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "phases(a=between(1, ids(99999)), answer=1)",
            r"can't produce.*has ids 0\.\.\d+, not 99999",
        ),
        (
            'phases(a=between(1, "<think>x"), thinking=1, answer=1)',
            "'<think>' lies inside '<think>x'",
        ),
        ('phases(a=between(1, "<think>"), thinking=1, answer=1)', "opens both a and thinking"),
    ],
)
def test_bad_delimiters_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_policy(text, TOKENIZER)


def test_a_delimiter_that_the_tokenizer_cannot_produce_is_refused():
    tokenizer = word_piece()
    with pytest.raises(InputError, match=r"can't produce the delimiter 'Then': .*gives ' then'"):
        parse_policy('phases(a=between(1, "Then"), answer=1)', tokenizer)


def test_states_of_another_policy_are_refused():
    policy = parse_policy(THINK, TOKENIZER)
    with pytest.raises(InputError, match=r"phase '', which phases\(thinking=1, answer=0.2\)"):
        temper_logits(policy, torch.zeros(1, 4), [TokenState()])


def test_ids_outside_the_vocabulary_spell_nothing():
    # Placeholders of images in a prompt, and rows that only pad the vocabulary.
    policy = parse_policy(THINK, TOKENIZER)
    assert policy.state([-200, 10**6, *TOKENIZER.encode("<think>")]).phase == "thinking"


def test_a_template_that_can_not_be_rendered_leaves_the_special_tokens():
    tokenizer = byte_level("{{ raise_exception('no') }}")
    assert walk(THINK, "<think>a<|im_end|>", "x", tokenizer)[-1] == "answer"
