"""The delimiters that published models are trained on, each with its source.

vLLM's files are those of vllm 0.32, under `vllm/`; templates are those that the named repository
keeps. A pair without a source is not here. A tokenizer that names none of these gets a warning;
`between(x, opener, closer)` states others.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Header:
    """A delimiter of several texts in this order, with a few words between each two.

    The model fills in the words between, such as the name of a tool; they contain no "<".
    """

    parts: tuple[str, ...]

    def __str__(self) -> str:
        return " \u2026 ".join(self.parts)


# A delimiter: text, token ids, or a header.
Delimiter = str | tuple[int, ...] | Header


@dataclass(frozen=True)
class KnownDelimiters:
    """One way to delimit a phase, and the models that are trained on it.

    Parameters
    ----------
    opens: the openers; each of them opens the phase.
    closes: the closers; none where the phase lasts to the end of the turn.
    models: the models that write it. source: where this is stated.
    signs: groups of texts; a tokenizer names this entry when its vocabulary or chat template has
        all texts of one group. By default the first opener alone is the only group.
    """

    opens: tuple[str | Header, ...]
    closes: tuple[str, ...]
    models: str
    source: str
    signs: tuple[tuple[str, ...], ...] = ()

    @property
    def named_by(self) -> tuple[tuple[str, ...], ...]:
        return self.signs or ((str(self.opens[0]),),)


def _pair(opener: str, closer: str | None, models: str, source: str) -> KnownDelimiters:
    return KnownDelimiters((opener,), () if closer is None else (closer,), models, source)


_WEBUI = "Open WebUI, backend/open_webui/utils/middleware.py, DEFAULT_REASONING_TAGS"
_SOLAR = (
    "upstage/Solar-Open-100B, chat_template.jinja, as SolarOpenReasoningParser, written for vLLM, "
    "describes it"
)
_HARMONY = (("<|channel|>", "<|message|>"),)
_DSML = "\uff5cDSML\uff5c"

# For a tokenizer that names none, the first entry of a phase is assumed, as text.
KNOWN_DELIMITERS: dict[str, tuple[KnownDelimiters, ...]] = {
    "thinking": (
        # Some templates name the closer alone: they cut the history's thinking off at it.
        KnownDelimiters(
            ("<think>",),
            ("</think>",),
            "DeepSeek, Qwen3, GLM-4.5, Kimi K2, MiniMax M2, OLMo 3, Hunyuan, Nemotron, SmolLM3",
            "vLLM, reasoning/basic_parsers.py and the parsers of these models",
            (("<think>",), ("</think>",)),
        ),
        _pair("<thinking>", "</thinking>", "instructed models", _WEBUI),
        _pair("<thought>", "</thought>", "EXAONE Deep; instructed models", _WEBUI),
        _pair("<reasoning>", "</reasoning>", "instructed models", _WEBUI),
        _pair("<reason>", "</reason>", "instructed models", _WEBUI),
        _pair("<|begin_of_thought|>", "<|end_of_thought|>", "Sky-T1, OpenThinker", _WEBUI),
        _pair("\u25c1think\u25b7", "\u25c1/think\u25b7", "Kimi-VL-Thinking", _WEBUI),
        _pair(
            "[THINK]",
            "[/THINK]",
            "Magistral, Ministral 3",
            "mistral-common, tokens/tokenizers/base.py, SpecialTokens",
        ),
        _pair("<seed:think>", "</seed:think>", "Seed-OSS", "vLLM, parser/seed_oss.py"),
        _pair(
            "<mm:think>",
            "</mm:think>",
            "MiniMax M3",
            "vLLM, reasoning/minimax_m3_reasoning_parser.py",
        ),
        _pair(
            "<|START_THINKING|>",
            "<|END_THINKING|>",
            "Command A Reasoning",
            "vLLM, reasoning/cohere_command_reasoning_parser.py",
        ),
        _pair("<|channel>", "<channel|>", "Gemma 4", "vLLM, parser/gemma4.py"),
        _pair(
            "<|inner_prefix|>",
            "<|inner_suffix|>",
            "Apertus",
            "vLLM, examples/tool_chat_template_apertus.jinja",
        ),
        # Gemma 4 has <|think|> too, as a switch in the system prompt, but no <|end|>.
        KnownDelimiters(
            ("<|think|>",),
            ("<|end|>", "<|content|>"),
            "Solar Open",
            _SOLAR,
            (("<|think|>", "<|end|>"),),
        ),
        KnownDelimiters(
            ("<|channel|>analysis<|message|>",),
            ("<|end|>", "<|channel|>final<|message|>", "<|channel|>commentary<|message|>"),
            "gpt-oss (harmony)",
            "vLLM, parser/harmony.py",
            _HARMONY,
        ),
        _pair("<|content_thinking|>", "<|end_message|>", "Inkling", "vLLM, parser/inkling.py"),
        _pair(
            "<|plamo:begin_think:plamo|>",
            "<|plamo:end_think:plamo|>",
            "PLaMo 3",
            "vLLM, parser/plamo3.py",
        ),
        _pair(
            "<|open|>think<|sep|>",
            "<|close|>think<|sep|>",
            "Kimi K3",
            "vLLM, reasoning/kimi_k3_reasoning_parser.py",
        ),
        KnownDelimiters(
            ("<ifm|think>", "<ifm|think_fast>", "<ifm|think_faster>"),
            ("</ifm|think>", "</ifm|think_fast>", "</ifm|think_faster>"),
            "K2 Horizon",
            "vLLM, reasoning/k2_horizon_reasoning_parser.py",
        ),
        KnownDelimiters(
            ("Here is my thought process:", "Here's my thought process:"),
            ("Here is my response:", "Here's my response:"),
            "Granite 3.2",
            "vLLM, reasoning/granite_reasoning_parser.py",
        ),
    ),
    "tool": (
        _pair(
            "<tool_call>",
            "</tool_call>",
            "Qwen, Hermes, GLM-4.5, Granite 4, ERNIE 4.5, SmolLM3",
            "vLLM, tool_parsers/hermes_tool_parser.py and parser/glm47_moe.py",
        ),
        _pair(
            "[TOOL_CALLS]",
            None,
            "Mistral",
            "mistral-common, tokens/tokenizers/base.py, SpecialTokens",
        ),
        _pair("<|python_tag|>", None, "Llama 3", "vLLM, tool_parsers/llama_tool_parser.py"),
        _pair(
            "<|python_start|>",
            "<|python_end|>",
            "Llama 4",
            "vLLM, tool_parsers/llama4_pythonic_tool_parser.py",
        ),
        _pair(
            "<|tool_call_start|>",
            "<|tool_call_end|>",
            "LFM2",
            "vLLM, tool_parsers/lfm2_tool_parser.py",
        ),
        _pair("<|START_ACTION|>", "<|END_ACTION|>", "Command A", "vLLM, parser/cohere_command.py"),
        _pair(
            "<\uff5ctool\u2581calls\u2581begin\uff5c>",
            "<\uff5ctool\u2581calls\u2581end\uff5c>",
            "DeepSeek R1, V3, V3.1",
            "vLLM, tool_parsers/deepseekv31_tool_parser.py",
        ),
        # In its vocabulary the word between the brackets is one token.
        KnownDelimiters(
            (f"<{_DSML}function_calls>", f"<{_DSML}tool_calls>"),
            (f"</{_DSML}function_calls>", f"</{_DSML}tool_calls>"),
            "DeepSeek V3.2, V4",
            "vLLM, tokenizers/deepseek_v32_encoding.py and parser/deepseek_v4.py",
            ((f"<{_DSML}function_calls>",), (f"<{_DSML}tool_calls>",), (_DSML,)),
        ),
        _pair(
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
            "Kimi K2",
            "vLLM, parser/kimi_k2.py",
        ),
        _pair(
            "<|open|>tools<|sep|>",
            "<|close|>tools<|sep|>",
            "Kimi K3",
            "vLLM, tool_parsers/kimi_k3_tool_parser.py",
        ),
        _pair(
            "<minimax:tool_call>",
            "</minimax:tool_call>",
            "MiniMax M2",
            "vLLM, parser/minimax_m2.py",
        ),
        _pair("<seed:tool_call>", "</seed:tool_call>", "Seed-OSS", "vLLM, parser/seed_oss.py"),
        _pair("<|tool_call>", "<tool_call|>", "Gemma 4", "vLLM, parser/gemma4.py"),
        _pair(
            "<start_function_call>",
            "<end_function_call>",
            "FunctionGemma",
            "vLLM, tool_parsers/functiongemma_tool_parser.py",
        ),
        # Granite 3.0 has the opener alone; the end of the turn closes the phase.
        _pair(
            "<|tool_call|>",
            "<|/tool_call|>",
            "Phi-4-mini, Granite 3.0",
            "llama.cpp, models/templates/llama-cpp-microsoft-Phi-4-mini-instruct.jinja; "
            "vLLM, parser/granite.py",
        ),
        _pair(
            "functools[",
            None,
            "Phi-4-mini under vLLM's template",
            "vLLM, tool_parsers/phi4mini_tool_parser.py",
        ),
        _pair(
            "<tool_calls>",
            "</tool_calls>",
            "Hunyuan A13B, Jamba",
            "vLLM, tool_parsers/hunyuan_a13b_tool_parser.py",
        ),
        _pair(
            "<function_calls>",
            "</function_calls>",
            "OLMo 3",
            "vLLM, tool_parsers/olmo3_tool_parser.py",
        ),
        _pair(
            "<|tools_prefix|>",
            "<|tools_suffix|>",
            "Apertus",
            "vLLM, tool_parsers/apertus_tool_parser.py",
        ),
        KnownDelimiters(
            ("<|tool_calls|>",),
            ("<|calls|>",),
            "Solar Open",
            _SOLAR,
        ),
        KnownDelimiters(
            (
                Header(("<|channel|>", " to=", "<|message|>")),
                Header(("<|channel|>", " to=", "<|constrain|>", "<|message|>")),
                Header((" to=", "<|channel|>", "<|message|>")),
                Header((" to=", "<|channel|>", "<|constrain|>", "<|message|>")),
            ),
            ("<|call|>", "<|end|>"),
            "gpt-oss (harmony)",
            "vLLM, parser/harmony.py",
            _HARMONY,
        ),
        _pair(
            "<|action_start|>",
            "<|action_end|>",
            "InternLM2",
            "vLLM, tool_parsers/internlm2_tool_parser.py",
        ),
        _pair(
            "<\uff5ctool_calls_begin\uff5c>",
            "<\uff5ctool_calls_end\uff5c>",
            "Step 3",
            "vLLM, tool_parsers/step3_tool_parser.py",
        ),
        _pair(
            "<longcat_tool_call>",
            "</longcat_tool_call>",
            "LongCat",
            "vLLM, tool_parsers/longcat_tool_parser.py",
        ),
        _pair(
            "<dots_function_call>",
            "</dots_function_call>",
            "dots.llm",
            "vLLM, tool_parsers/dots_tool_parser.py",
        ),
        _pair(
            "<TOOLCALL>",
            "</TOOLCALL>",
            "Nemotron Nano v2",
            "vLLM, examples/tool_chat_template_nemotron_nano_v2.jinja",
        ),
        KnownDelimiters(
            ("<|content_invoke_tool_json|>", "<|content_invoke_tool_text|>"),
            ("<|end_message|>",),
            "Inkling",
            "vLLM, parser/inkling.py",
        ),
        _pair(
            "<|plamo:begin_tool_requests:plamo|>",
            "<|plamo:end_tool_requests:plamo|>",
            "PLaMo 3",
            "vLLM, parser/plamo3.py",
        ),
        _pair(
            "<ifm|tool_calls>",
            "</ifm|tool_calls>",
            "K2 Horizon",
            "vLLM, tool_parsers/k2_horizon_tool_parser.py",
        ),
        _pair(
            "<|function_call|>", None, "GigaChat 3", "vLLM, tool_parsers/gigachat3_tool_parser.py"
        ),
        _pair(
            "<function_call>",
            None,
            "Granite 20B function calling",
            "vLLM, tool_parsers/granite_20b_fc_tool_parser.py",
        ),
    ),
    "code": (_pair("```", "```", "all", "CommonMark 0.31, section 4.5, fenced code blocks"),),
}

# Tokens at which a turn or a tool's result begins or ends, for prompts that another chat template
# than the tokenizer's own has written. A token that the vocabulary lacks does nothing.
TURNS: tuple[str, ...] = (
    # ChatML; Kimi K2's variant of it (moonshotai/Kimi-K2-Thinking, chat_template.jinja)
    *("<|im_start|>", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>"),
    # Llama 3 and 4 (vLLM, examples/tool_chat_template_llama3.1_json.jinja, ..._llama4_json.jinja)
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>"),
    # Gemma 2 and 3; Gemma 4 (vLLM, examples/tool_chat_template_gemma4.jinja)
    *("<start_of_turn>", "<end_of_turn>"),
    *("<|turn>", "<turn|>", "<|tool_response>", "<tool_response|>"),
    # Mistral (mistral-common, tokens/tokenizers/base.py, SpecialTokens)
    *("[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    # DeepSeek (vLLM, examples/tool_chat_template_deepseekr1.jinja, ..._deepseekv31.jinja)
    *("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    *(
        f"<\uff5ctool\u2581{name}\u2581{side}\uff5c>"
        for name in ("output", "outputs")
        for side in ("begin", "end")
    ),
    # GLM (vLLM, parser/glm47_moe.py); Phi-4-mini (its template, above)
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|tool_response|>"),
    # Command (vLLM, examples/tool_template_cohere.jinja)
    *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    # gpt-oss (vLLM, parser/harmony.py); Solar Open (upstage/Solar-Open-100B, chat_template.jinja)
    *("<|start|>", "<|begin|>"),
    # Apertus (vLLM, examples/tool_chat_template_apertus.jinja)
    *("<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"),
)
