"""Chat formats as models publish them: added tokens, the turns of a template, its delimiters."""

from __future__ import annotations

from typing import Any, NamedTuple

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.unit.test_tokens_phases import byte_level


class Format(NamedTuple):
    """A chat format.

    tags: added tokens, apart by spaces. template: Jinja.
    think, call: opener and closer (None: to the turn's end).
    opened: what is open when the reply begins. after_tool: the same after a tool's result.
    """

    tags: str
    template: str
    think: tuple[str, str] | None
    call: tuple[str, str | None] | None
    opened: str = "answer"
    after_tool: str = "answer"

    def tokenizer(self) -> PreTrainedTokenizerFast:
        made = byte_level(self.template)
        made.add_tokens([AddedToken(tag, special=True) for tag in self.tags.split()])
        return made


def _loop(**turns: str) -> str:
    """A template from what it writes for each role; `reply` is the generation prompt."""
    branches = "".join(
        f"{{% {'if' if not i else 'elif'} m.role == '{role}' %}}{text}"
        for i, (role, text) in enumerate((r, t) for r, t in turns.items() if r != "reply")
    )
    body = "{% for m in messages %}" + branches + "{% endif %}{% endfor %}"
    return body + "{% if add_generation_prompt %}" + turns["reply"] + "{% endif %}"


_ARGS = "{{ m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments | tojson }}"


def _calls(opener: str, closer: str) -> str:
    return "{% if m.tool_calls %}" + opener + _ARGS + closer + "{% endif %}"


_IM = "<|im_start|>{{ m.role }}\n{{ m.content }}"
_TC = _calls("<tool_call>\n", "\n</tool_call>")
_V, _U = "\uff5c", "\u2581"

FORMATS: dict[str, Format] = {
    # Qwen/Qwen3-8B: ChatML, a tool's result in a user's turn
    "qwen3": Format(
        "<think> </think> <tool_call> </tool_call>",
        _loop(
            user=_IM + "<|im_end|>\n",
            assistant=_IM + _TC + "<|im_end|>\n",
            tool="<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n",
            reply="<|im_start|>assistant\n",
        ),
        ("<think>", "</think>"),
        ("<tool_call>", "</tool_call>"),
    ),
    # Qwen/Qwen3-4B-Thinking-2507: the same, thinking opened by the template
    "qwen3 thinking": Format(
        "<think> </think> <tool_call> </tool_call>",
        _loop(
            user=_IM + "<|im_end|>\n",
            assistant=_IM + _TC + "<|im_end|>\n",
            tool="<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n",
            reply="<|im_start|>assistant\n<think>\n",
        ),
        ("<think>", "</think>"),
        ("<tool_call>", "</tool_call>"),
        "thinking",
        "thinking",
    ),
    # mistralai/Mistral-Small-3.1-24B-Instruct-2503, with Magistral's thinking: no reply header
    "mistral": Format(
        "[INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] [THINK] [/THINK] </s>",
        _loop(
            user="[INST]{{ m.content }}[/INST]",
            assistant="{{ m.content }}" + _calls("[TOOL_CALLS]", "") + "</s>",
            tool='[TOOL_RESULTS] {"content": {{ m.content }}, '
            '"call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]',
            reply="",
        ),
        ("[THINK]", "[/THINK]"),
        ("[TOOL_CALLS]", None),
    ),
    # deepseek-ai/DeepSeek-V3.1: no reply header after a tool's result; calls' arguments are text
    "deepseek v3.1": Format(
        f"<think> </think> <{_V}User{_V}> <{_V}Assistant{_V}> "
        f"<{_V}tool{_U}calls{_U}begin{_V}> <{_V}tool{_U}calls{_U}end{_V}> "
        f"<{_V}tool{_U}output{_U}begin{_V}> <{_V}tool{_U}output{_U}end{_V}> "
        f"<{_V}end{_U}of{_U}sentence{_V}> <{_V}tool{_U}sep{_V}>",
        _loop(
            user=f"<{_V}User{_V}>" + "{{ m.content }}",
            assistant=f"<{_V}Assistant{_V}></think>"
            + "{{ m.content }}{% if m.tool_calls %}"
            + f"<{_V}tool{_U}calls{_U}begin{_V}>"
            + "{{ m.tool_calls[0].function.name }}"
            + f"<{_V}tool{_U}sep{_V}>"
            + "{{ '' + m.tool_calls[0].function.arguments }}"
            + f"<{_V}tool{_U}calls{_U}end{_V}>"
            + "{% endif %}"
            + f"<{_V}end{_U}of{_U}sentence{_V}>",
            tool=f"<{_V}tool{_U}output{_U}begin{_V}>"
            + "{{ m.content }}"
            + f"<{_V}tool{_U}output{_U}end{_V}>",
            reply="{% if messages[-1].role == 'user' %}"
            + f"<{_V}Assistant{_V}><think>"
            + "{% endif %}",
        ),
        ("<think>", "</think>"),
        (f"<{_V}tool{_U}calls{_U}begin{_V}>", f"<{_V}tool{_U}calls{_U}end{_V}>"),
        "thinking",
    ),
    # deepseek-ai/DeepSeek-V3.2: a tool's result in tags that are text, then thinking at once
    "deepseek v3.2": Format(
        f"<think> </think> <{_V}User{_V}> <{_V}Assistant{_V}> {_V}DSML{_V} "
        f"<{_V}end{_U}of{_U}sentence{_V}>",
        _loop(
            user=f"<{_V}User{_V}>" + "{{ m.content }}",
            assistant=f"<{_V}Assistant{_V}>"
            + "{{ m.content }}"
            + _calls(f"\n\n<{_V}DSML{_V}function_calls>\n", f"\n</{_V}DSML{_V}function_calls>")
            + f"<{_V}end{_U}of{_U}sentence{_V}>",
            tool="\n\n<function_results>\n<result>{{ m.content }}</result>\n</function_results>",
            reply="{% if messages[-1].role == 'user' %}"
            + f"<{_V}Assistant{_V}>"
            + "{% else %}\n\n{% endif %}<think>",
        ),
        ("<think>", "</think>"),
        (f"<{_V}DSML{_V}function_calls>", f"</{_V}DSML{_V}function_calls>"),
        "thinking",
        "thinking",
    ),
    # zai-org/GLM-4.5: nothing ends a user's turn
    "glm": Format(
        "<think> </think> <tool_call> </tool_call> <|user|> <|assistant|> "
        "<|observation|> <tool_response> </tool_response>",
        _loop(
            user="<|user|>\n{{ m.content }}",
            assistant="<|assistant|>\n<think></think>\n{{ m.content }}"
            + _calls("\n<tool_call>", "</tool_call>"),
            tool="<|observation|>\n<tool_response>\n{{ m.content }}\n</tool_response>",
            reply="<|assistant|>",
        ),
        ("<think>", "</think>"),
        ("<tool_call>", "</tool_call>"),
    ),
    # google/gemma-4-31B-it
    "gemma 4": Format(
        "<|turn> <turn|> <|channel> <channel|> <|tool_call> <tool_call|> <|think|> "
        "<|tool_response> <tool_response|>",
        _loop(
            user="<|turn>user\n{{ m.content }}<turn|>\n",
            assistant="<|turn>model\n{{ m.content }}"
            + _calls("<|tool_call>call:", "<tool_call|>")
            + "<turn|>\n",
            tool="<|turn>tool\n<|tool_response>{{ m.content }}<tool_response|><turn|>\n",
            reply="<|turn>model\n{# <|think|> #}",
        ),
        ("<|channel>", "<channel|>"),
        ("<|tool_call>", "<tool_call|>"),
    ),
    # meta-llama/Llama-3.1-8B-Instruct
    "llama 3": Format(
        "<|start_header_id|> <|end_header_id|> <|eot_id|> <|python_tag|>",
        _loop(
            user="<|start_header_id|>user<|end_header_id|>\n\n{{ m.content }}<|eot_id|>",
            assistant="<|start_header_id|>assistant<|end_header_id|>\n\n{{ m.content }}"
            + _calls("<|python_tag|>", "")
            + "<|eot_id|>",
            tool="<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content }}<|eot_id|>",
            reply="<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        None,
        ("<|python_tag|>", None),
    ),
    # moonshotai/Kimi-K2-Thinking
    "kimi k2": Format(
        "<|im_user|> <|im_assistant|> <|im_system|> <|im_middle|> <think> </think> "
        "<|tool_calls_section_begin|> <|tool_calls_section_end|> <|tool_call_begin|> "
        "<|tool_call_argument_begin|> <|tool_call_end|>",
        _loop(
            user="<|im_user|>user<|im_middle|>{{ m.content }}<|im_end|>",
            assistant="<|im_assistant|>assistant<|im_middle|><think></think>{{ m.content }}"
            + _calls(
                "<|tool_calls_section_begin|><|tool_call_begin|>",
                "<|tool_call_end|><|tool_calls_section_end|>",
            )
            + "<|im_end|>",
            tool="<|im_system|>tool<|im_middle|>## Return of x\n{{ m.content }}<|im_end|>",
            reply="<|im_assistant|>assistant<|im_middle|>",
        ),
        ("<think>", "</think>"),
        ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ),
    # upstage/Solar-Open-100B
    "solar": Format(
        "<|begin|> <|end|> <|think|> <|content|> <|tool_calls|> <|calls|> <|tool_response|>",
        _loop(
            user="<|begin|>user<|content|>{{ m.content }}<|end|>\n",
            assistant="<|begin|>assistant<|content|>{{ m.content }}"
            + _calls("<|tool_calls|>", "<|calls|>")
            + "<|end|>\n",
            tool="<|begin|>tool<|tool_response|>{{ m.content }}<|end|>\n",
            reply="<|begin|>assistant",
        ),
        ("<|think|>", "<|end|>"),
        ("<|tool_calls|>", "<|calls|>"),
    ),
    # LGAI-EXAONE/EXAONE-Deep-7.8B
    "exaone deep": Format(
        "[|user|] [|assistant|] [|endofturn|]",
        _loop(
            user="[|user|]{{ m.content }}\n",
            assistant="[|assistant|]{{ m.content }}"
            + _calls("<tool_call>", "</tool_call>")
            + "[|endofturn|]\n",
            tool="[|tool|]{{ m.content }}[|endofturn|]\n",
            reply="[|assistant|]<thought>\n",
        ),
        ("<thought>", "</thought>"),
        ("<tool_call>", "</tool_call>"),
        "thinking",
        "thinking",
    ),
    # meta-llama/Llama-2-7b-chat-hf, whose words are no tokens
    "llama2": Format(
        "</s>",
        _loop(
            user="[INST] {{ m.content }} [/INST]",
            assistant=" {{ m.content }}" + _calls("<tool_call>", "</tool_call>") + "</s>",
            tool="[RESULT] {{ m.content }} [/RESULT]",
            reply="{# <think> #}",
        ),
        ("<think>", "</think>"),
        ("<tool_call>", "</tool_call>"),
    ),
    # ibm-granite/granite-3.0-8b-instruct
    "granite": Format(
        "<|start_of_role|> <|end_of_role|> <|end_of_text|> <|tool_call|>",
        _loop(
            user="<|start_of_role|>user<|end_of_role|>{{ m.content }}<|end_of_text|>\n",
            assistant="<|start_of_role|>assistant<|end_of_role|>{{ m.content }}"
            + _calls("<|tool_call|>", "")
            + "<|end_of_text|>\n",
            tool="<|start_of_role|>tool_response<|end_of_role|>{{ m.content }}<|end_of_text|>\n",
            reply="<|start_of_role|>assistant<|end_of_role|>{# <think> #}",
        ),
        ("<think>", "</think>"),
        ("<|tool_call|>", None),
    ),
    # ByteDance-Seed/Seed-OSS-36B-Instruct
    "seed": Format(
        "<seed:bos> <seed:eos> <seed:think> </seed:think> <seed:tool_call> </seed:tool_call>",
        _loop(
            user="<seed:bos>user\n{{ m.content }}<seed:eos>",
            assistant="<seed:bos>assistant\n{{ m.content }}"
            + _calls("<seed:tool_call>\n", "\n</seed:tool_call>")
            + "<seed:eos>",
            tool="<seed:bos>tool\n{{ m.content }}<seed:eos>",
            reply="<seed:bos>assistant\n",
        ),
        ("<seed:think>", "</seed:think>"),
        ("<seed:tool_call>", "</seed:tool_call>"),
    ),
    # CohereLabs/command-a-reasoning-08-2025
    "cohere": Format(
        "<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> "
        "<|SYSTEM_TOKEN|> <|START_THINKING|> <|END_THINKING|> <|START_ACTION|> "
        "<|END_ACTION|> <|START_RESPONSE|> <|END_RESPONSE|> <|START_TOOL_RESULT|> "
        "<|END_TOOL_RESULT|>",
        _loop(
            user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{{ m.content }}<|END_OF_TURN_TOKEN|>",
            assistant="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
            "<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>"
            + _calls("<|START_ACTION|>", "<|END_ACTION|>")
            + "<|END_OF_TURN_TOKEN|>",
            tool="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|START_TOOL_RESULT|>{{ m.content }}"
            "<|END_TOOL_RESULT|><|END_OF_TURN_TOKEN|>",
            reply="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        ),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|START_ACTION|>", "<|END_ACTION|>"),
    ),
    # tencent/Hunyuan-A13B-Instruct: no header before a reply
    "hunyuan": Format(
        "<|startoftext|> <|extra_0|> <|extra_4|> <|eos|>",
        _loop(
            user="<|startoftext|>{{ m.content }}<|extra_0|>",
            assistant="{{ m.content }}" + _calls("<tool_calls>", "</tool_calls>") + "<|eos|>",
            tool="<tool_response>{{ m.content }}</tool_response><|extra_0|>",
            reply="{% if enable_thinking is false %}<think>\n\n</think>\n{% endif %}{# <think> #}",
        ),
        ("<think>", "</think>"),
        ("<tool_calls>", "</tool_calls>"),
    ),
    # microsoft/Phi-4-mini-instruct
    "phi4 mini": Format(
        "<|system|> <|user|> <|assistant|> <|end|> <|tool_call|> <|/tool_call|> <|tool_response|>",
        _loop(
            user="<|user|>{{ m.content }}<|end|>",
            assistant="<|assistant|>{{ m.content }}"
            + _calls("<|tool_call|>", "<|/tool_call|>")
            + "<|end|>",
            tool="<|tool_response|>{{ m.content }}<|end|>",
            reply="<|assistant|>",
        ),
        None,
        ("<|tool_call|>", "<|/tool_call|>"),
    ),
    # MiniMaxAI/MiniMax-M2
    "minimax": Format(
        "]~b] [e~[ ]~!b[ <think> </think> <minimax:tool_call> </minimax:tool_call>",
        _loop(
            user="]~b]user\n{{ m.content }}[e~[\n",
            assistant="]~b]ai\n{{ m.content }}"
            + _calls("<minimax:tool_call>\n", "\n</minimax:tool_call>")
            + "[e~[\n",
            tool="]~b]tool\n<response>{{ m.content }}</response>[e~[\n",
            reply="]~b]ai\n<think>\n",
        ),
        ("<think>", "</think>"),
        ("<minimax:tool_call>", "</minimax:tool_call>"),
        "thinking",
        "thinking",
    ),
    # Alpaca's and Vicuna's words, for a vocabulary that has none of them as tokens
    "alpaca": Format(
        "",
        _loop(
            user="### Instruction:\n{{ m.content }}\n\n",
            assistant="### Response:\n{{ m.content }}" + _TC + "\n\n",
            tool="### Input:\n{{ m.content }}\n\n",
            reply="### Response:\n{# <think> #}",
        ),
        ("<think>", "</think>"),
        ("<tool_call>", "</tool_call>"),
    ),
    "vicuna": Format(
        "",
        _loop(
            user="USER: {{ m.content }} ",
            assistant="ASSISTANT: {{ m.content }}" + _TC + " ",
            tool="TOOL: {{ m.content }} ",
            reply="ASSISTANT:{# <think> #}",
        ),
        ("<think>", "</think>"),
        ("<tool_call>", "</tool_call>"),
    ),
}


def conversation(*contents: tuple[str, str]) -> list[dict[str, Any]]:
    """Messages from (role, content); `call` is an assistant's call of a tool."""
    call = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages: list[dict[str, Any]] = []
    for role, content in contents:
        if role == "call":
            messages.append({"role": "assistant", "content": content, "tool_calls": [call]})
        elif role == "tool":
            messages.append({"role": "tool", "tool_call_id": "123456789", "content": content})
        else:
            messages.append({"role": role, "content": content})
    return messages
