"""Which tokens are prompt, history, tool result and reply, in the chat formats of models."""

import random
from functools import cache

import pytest

from tempering.tokens import Policy, parse_policy
from tempering.tokens.turns import with_template
from tests.unit.test_tokens_phases import CHATML, byte_level
from tests.unit.tokens_formats import FORMATS, Format, conversation

# Llama 3 names no thinking, and Alpaca no tool.
pytestmark = pytest.mark.filterwarnings("ignore:neither the vocabulary nor the chat template")

ALL = "phases(thinking=1, answer=0.2, tool=0.1, code=0.3)"
TAGS = ("<think>", "</think>", "<tool_call>", "```", "[TOOL_CALLS]", "<|python_tag|>", "<|channel>")
TALK = "what of " + " ".join(TAGS)


@cache
def policy_of(name: str) -> Policy:
    return parse_policy(ALL, FORMATS[name].tokenizer())


def written(name: str, *contents: tuple[str, str], generate: bool = True) -> list[int]:
    tokenizer = policy_of(name).tokenizer
    text = tokenizer.apply_chat_template(
        conversation(*contents), tokenize=False, add_generation_prompt=generate
    )
    return tokenizer.encode(text, add_special_tokens=False)


def phase(name: str, prompt: list[int], reply: str = "") -> str:
    policy = policy_of(name)
    new = policy.tokenizer.encode(reply, add_special_tokens=False)
    state = policy.state(prompt, new)
    return state.phase


HISTORIES = {
    "a user's tags": [("user", TALK)],
    "thinking cut off before": [("user", "a"), ("assistant", TALK), ("user", "b")],
    "a fence left open before": [("user", "a"), ("assistant", "```py\nx = 1"), ("user", "```")],
}
TOOLS = {
    "a tool's result": [("user", "a"), ("call", ""), ("tool", "20")],
    "tags in it": [("user", "a"), ("call", ""), ("tool", TALK)],
    "several of them": [("user", "a"), ("call", ""), ("tool", TALK), ("tool", "``` " + TALK)],
    "text, call, result, text, call, result": [
        *[("user", TALK), ("call", "so"), ("tool", TALK), ("assistant", "it is"), ("user", "?")],
        *[("call", ""), ("tool", "20")],
    ],
}


@pytest.mark.parametrize("name", FORMATS)
def test_history_is_over_when_the_reply_begins(name):
    for what, contents in HISTORIES.items():
        assert phase(name, written(name, *contents)) == FORMATS[name].opened, what


@pytest.mark.parametrize("name", FORMATS)
def test_a_tools_result_is_history_too(name):
    for what, contents in TOOLS.items():
        assert phase(name, written(name, *contents)) == FORMATS[name].after_tool, what


@pytest.mark.parametrize("name", FORMATS)
def test_a_message_without_the_generation_prompt_opens_nothing(name):
    # Nothing ends a user's turn in GLM's, DeepSeek's and Vicuna's format.
    for contents in ([("user", TALK)], [("user", "a"), ("call", ""), ("tool", TALK)]):
        assert phase(name, written(name, *contents, generate=False)) == "answer", contents


@pytest.mark.parametrize("name", FORMATS)
def test_the_reply_is_followed_through_its_phases(name):
    form: Format = FORMATS[name]
    prompt = written(name, ("user", TALK), ("assistant", "x"), ("user", "b"))
    if form.think is not None:
        opener, closer = form.think
        start = "" if form.opened == "thinking" else opener
        assert phase(name, prompt, start + "so") == "thinking"
        assert phase(name, prompt, start + "so" + closer) == "answer"
        assert phase(name, prompt, start + closer + "x" + opener) == "thinking"  # reopened
        assert phase(name, prompt + encoded(name, start + "so")) == "thinking"  # continued
        assert phase(name, prompt + encoded(name, start + closer + "\n\n")) == "answer"  # empty
    if form.call is not None:
        opener, closer = form.call
        done = form.think[1] if form.opened == "thinking" else ""
        assert phase(name, prompt, done + opener + "f") == "tool"
        assert phase(name, prompt + encoded(name, done + opener + "f")) == "tool"
        assert phase(name, prompt, done + opener + "f" + (closer or "")) == (
            "answer" if closer else "tool"
        )
    if form.think is not None and form.call is not None:
        # A call ends thinking without its closer, and thinking isn't there again after it.
        start = "" if form.opened == "thinking" else form.think[0]
        assert phase(name, prompt, start + "so" + form.call[0]) == "tool"
        assert phase(name, prompt, start + "so" + form.call[0] + (form.call[1] or "")) != "thinking"


def encoded(name: str, text: str) -> list[int]:
    return policy_of(name).tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", FORMATS)
def test_padding_and_truncation_on_the_left_change_nothing(name):
    form = FORMATS[name]
    padding = policy_of(name).tokenizer.eos_token_id
    prompt = written(name, ("user", TALK), ("assistant", "```"), ("user", "b <think>"))
    assert phase(name, [padding] * 9 + prompt) == form.opened
    header = len(prompt) - len(written(name, ("user", ""))) + 2
    for cut in range(0, header, 3):
        assert phase(name, prompt[cut:]) == form.opened, cut


def test_any_conversation_leaves_the_reply_alone():
    # Random turns with the tags of all formats in them: only the template's own opener counts.
    draw = random.Random(0)
    words = [*TAGS, "a", "\n", " ", "`", "###", "so"]
    for name, form in FORMATS.items():
        for _ in range(12):
            said = ["".join(draw.choices(words, k=draw.randrange(9))) for _ in range(4)]
            contents = [("user", said[0] + "?"), ("assistant", said[1]), ("user", said[2] + "?")]
            wanted = form.opened
            if draw.random() < 0.5:
                contents += [("call", ""), ("tool", said[3] + ".")] * draw.randrange(1, 3)
                wanted = form.after_tool if contents[-1][0] == "tool" else wanted
            assert phase(name, written(name, *contents)) == wanted, (name, contents)


def test_another_template_is_followed_when_it_is_known():
    # As a server's --chat-template: the tokenizer's own is ChatML.
    own = byte_level(CHATML)
    text = (
        "{% for m in messages %}### {{ m['role'] | capitalize }}:\n{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}### Assistant:\n{% endif %}{# <thought> #}"
    )
    given = with_template(own, text)
    assert with_template(own, text) is given
    assert with_template(own, None) is own and with_template(own, CHATML) is own
    policy = parse_policy("phases(thinking=1, answer=0.2)", given)
    talk = [("user", "<thought>"), ("assistant", "<thought>a"), ("user", "<thought>")]
    prompt = own.apply_chat_template(
        conversation(*talk), chat_template=text, tokenize=False, add_generation_prompt=True
    )
    ids = own.encode(prompt, add_special_tokens=False)
    assert policy.state(ids).phase == "answer"
    assert policy.state(ids, own.encode("<thought>a")).phase == "thinking"
    # What begins a turn in a prompt is plain text in a reply.
    assert policy.state(ids, own.encode("<thought>\n### Assistant: a")).phase == "thinking"


def test_templates_may_want_contents_in_parts():
    parts = "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
    tokenizer = byte_level(
        "{% for m in messages %}### {{ m['role'] }}: " + parts + "\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant: {% endif %}{# <think> #}"
    )
    policy = parse_policy("phases(thinking=1, answer=0.2)", tokenizer)
    history = tokenizer.encode("### user: <think>\n### assistant: ")
    assert policy.state(history).phase == "answer"
    assert policy.state(history, tokenizer.encode("<think>")).phase == "thinking"


def test_a_delimiter_may_be_a_part_of_a_turns_token():
    tokenizer = byte_level(CHATML)
    policy = parse_policy('phases(rhyme=between(1, "im_", "end"), answer=0.2)', tokenizer)
    prompt = tokenizer.encode("<|im_start|>user\nim_ <|im_end|>\n<|im_start|>assistant\n")
    assert policy.state(prompt).phase == "answer"
    assert policy.state(prompt, tokenizer.encode("im_ so")).phase == "rhyme"


def test_tokens_of_published_formats_are_turns_under_a_template_that_lacks_them():
    tokenizer = byte_level("{{ raise_exception('no') }}")
    tokenizer.add_tokens(["<|im_user|>", "[/TOOL_RESULTS]", "<think>"], special_tokens=True)
    policy = parse_policy("phases(thinking=1, answer=0.2)", tokenizer)
    for text in ("<think>a<|im_user|>", "<think>a[/TOOL_RESULTS]", "<think><|im_end|>"):
        assert policy.state(tokenizer.encode(text)).phase == "answer"
    assert policy.state(tokenizer.encode("[/TOOL_RESULTS]<think>")).phase == "thinking"


def test_a_delimiter_that_is_one_token_is_not_its_spelling():
    tokenizer = byte_level(CHATML)
    spelled = tokenizer.encode("<think>", add_special_tokens=False)
    tokenizer.add_tokens(["<think>", "</think>"])
    policy = parse_policy("phases(thinking=1, answer=0.2)", tokenizer)
    (opener,) = tokenizer.encode("<think>", add_special_tokens=False)
    closing = [tokenizer.convert_tokens_to_ids(c) for c in "</think>"]
    assert len(spelled) > 1 and spelled != [opener]
    assert policy.state([], spelled).phase == "answer"
    assert policy.state([], [opener]).phase == "thinking"
    assert policy.state([], [opener, *closing]).phase == "thinking"
    assert policy.state(spelled).phase == "answer"
    assert policy.state([opener]).phase == "thinking"


def test_bytes_that_no_text_has_imitate_no_token():
    tokenizer = byte_level(CHATML)
    tokenizer.add_tokens(["<|channel|>", "<|message|>", "<|end|>"], special_tokens=True)
    policy = parse_policy("phases(thinking=1, answer=0.2)", tokenizer)
    byte = tokenizer.convert_tokens_to_ids("\u00ff")  # byte 255 of byte-level BPE
    text = [tokenizer.convert_tokens_to_ids(c) for c in "<|channel|>"]
    analysis = tokenizer.encode("analysis<|message|>")
    assert policy.state([], tokenizer.encode("<|channel|>") + analysis).phase == "thinking"
    assert policy.state([], [byte, *text, byte, *analysis]).phase == "answer"


def test_a_reply_may_write_of_turns_that_are_no_special_tokens():
    tokenizer = byte_level(FORMATS["glm"].template)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", "<|observation|>"], special_tokens=True)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_response>", "</tool_response>"])
    policy = parse_policy("phases(thinking=1, answer=0.2)", tokenizer)
    prompt = tokenizer.encode("<|observation|>\n<tool_response>\n<think>\n</tool_response>")
    assert policy.state(prompt).phase == "answer"
    reply = tokenizer.encode("<think>it is in <tool_response> and </tool_response>, so")
    assert policy.state(prompt, reply).phase == "thinking"
    assert policy.state(prompt, reply + tokenizer.encode("<|user|>")).phase == "answer"


HARMONY = byte_level(
    "{% for m in messages %}<|start|>{{ 'functions.f to=assistant<|channel|>commentary' if m.role "
    "== 'tool' else m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
HARMONY.add_tokens(
    [f"<|{t}|>" for t in ("start", "end", "channel", "message", "call", "return", "constrain")],
    special_tokens=True,
)
THINKING = "<|channel|>analysis<|message|>so"
FINAL = "<|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("reply", "after"),
    [
        (THINKING, "thinking"),
        (THINKING + "<|end|>", "answer"),
        (THINKING + "<|end|>" + FINAL + "x", "answer"),
        (THINKING + "<|channel|>final<|message|>x", "answer"),
        ("<|channel|>commentary<|message|>I look it up", "answer"),
        # the recipient after the channel, or before it; constrained or not
        ("<|channel|>commentary to=functions.f <|constrain|>json<|message|>{", "tool"),
        ("<|channel|>commentary to=functions.f<|message|>{", "tool"),
        (" to=functions.f<|channel|>commentary json<|message|>{", "tool"),
        (" to=functions.f<|channel|>commentary <|constrain|>json<|message|>{", "tool"),
        ("<|channel|>analysis to=python code<|message|>1+1", "tool"),
        ("<|channel|>commentary to=functions.f<|message|>{}<|call|>", "answer"),
        (THINKING + "<|end|><|start|>assistant to=f<|channel|>analysis<|message|>{", "tool"),
        (THINKING + " to=me", "thinking"),
        # a header that isn't whole yet
        ("<|channel|>analysis", "answer"),
    ],
)
def test_gpt_oss_tells_by_its_headers(reply, after):
    policy = parse_policy("phases(thinking=1, answer=0.2, tool=0.1)", HARMONY)
    for contents in (
        [("user", TALK + THINKING)],
        [("user", "a"), ("tool", "<|channel|>commentary to=x<|message|>" + TALK)],
    ):
        prompt = HARMONY.apply_chat_template(
            conversation(*contents), tokenize=False, add_generation_prompt=True
        )
        ids = HARMONY.encode(prompt, add_special_tokens=False)
        new = HARMONY.encode(reply, add_special_tokens=False)
        assert policy.state(ids).phase == "answer"
        assert policy.state(ids, new).phase == after
        assert policy.state(ids + new).phase == after  # prefilled
