"""Costs measured by a vLLM engine, from the log probabilities that it gives of a prompt's tokens.

The engine gives log q of the text's own tokens, which is enough for the cost. It gives neither the
distribution over the vocabulary at every position, which KL needs, nor the attention weights, which
support needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from jaxtyping import Int
from torch import Tensor

from tempering.attention.layout import AttentionLayer, Layout
from tempering.engines.loading.catalogue import MODELS, check_writes_text
from tempering.engines.loading.embedded import embedded_directory
from tempering.engines.vllm.layer_betas import layer_number
from tempering.engines.vllm.serve import EXTENSION
from tempering.engines.vllm.swap import all_layers, asked_of, swap_profile
from tempering.errors import InputError, MissingExtraError, ModelError
from tempering.evaluation.cost import Cost, Variant, check_labels, mean_loss, summarised


def layout_of_workers(rows: Sequence[Sequence[Any]], depth: int) -> Layout:
    """The layout from (name, heads, key-value heads) of vLLM's attention layers."""
    layers = [
        AttentionLayer(name.removesuffix(".attn"), "decoder", layer_number(name), heads, kv_heads)
        for name, heads, kv_heads in rows
    ]
    layers.sort(key=lambda layer: layer.index)
    return Layout(tuple(layers), (), {"decoder": depth})


class VllmScorer:
    """A vLLM engine that this process starts; as a context manager it is shut down at the end.

    Parameters
    ----------
    model: a name of `tempering models`, a directory, or a hub id.
    length: tokens of the longest text that will be scored.
    dtype: of the weights, e.g. "float32".
    settings: more of `vllm.LLM`'s arguments, e.g. tensor_parallel_size=2.

    Raises MissingExtraError without vllm, ModelError when the engine doesn't start.
    """

    def __init__(self, model: str, length: int, *, dtype: str = "float32", **settings: Any) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            raise MissingExtraError("vllm", "vllm") from error
        check_writes_text(model)
        directory = str(embedded_directory(MODELS[model])) if model in MODELS else model
        try:
            self.llm = LLM(
                directory,
                dtype=dtype,
                max_model_len=length + 1,  # vLLM always generates a token
                additional_config={"tempering": {"profile": None}},
                worker_extension_cls=EXTENSION,
                **settings,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelError(f"vLLM doesn't start with {model}: {error}") from error
        self.tokenizer = self.llm.get_tokenizer()

    def __enter__(self) -> VllmScorer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def layout(self) -> Layout:
        """The attention layers, as the workers hold them."""
        rows = all_layers(asked_of(self.llm, "tempering_layers"))
        depth = int(self.llm.llm_engine.model_config.get_total_num_hidden_layers())
        return layout_of_workers(rows, depth)

    def logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float | None]]:
        """log q of every token of every prompt, nats; None for the first."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs = self.llm.generate(asked, params, use_tqdm=False)
        found: list[list[float | None]] = []
        for output, ids in zip(outputs, prompts, strict=True):
            rows = output.prompt_logprobs
            if rows is None or len(rows) != len(ids):
                raise ModelError("vLLM gave no log probabilities of its prompt")
            scores = [row[token].logprob for row, token in zip(rows[1:], ids[1:], strict=True)]
            found.append([None, *scores])
        return found

    def losses(self, chunks: Int[Tensor, "chunks length"]) -> list[float]:
        """Mean -log q of the tokens after the first of each chunk, nats per token."""
        return [mean_loss(row) for row in self.logprobs(chunks.tolist())]

    def costs(
        self,
        chunks: Int[Tensor, "chunks length"],
        variants: Sequence[Variant],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Cost]:
        """The cost of each variant against the untempered model, paired over chunks; no KL.

        Raises InputError for a variant with a sampling temperature, which vLLM doesn't apply to
        prompts.
        """
        check_labels(variants)
        for variant in variants:
            if variant.temperature != 1:
                raise InputError(
                    f"{variant.label}: vLLM gives log probabilities of prompts at the sampling "
                    "temperature 1 alone; leave it out, or use the engine in process"
                )
        rows: list[dict[str, list[float]]] = [{} for _ in range(len(chunks))]
        runs = [("", None), *((variant.label, variant.profile) for variant in variants)]
        for done, (label, profile) in enumerate(runs):
            swap_profile(self.llm, profile)
            for row, loss in zip(rows, self.losses(chunks), strict=True):
                row[label] = [loss, math.nan]
            if progress is not None:
                progress(done + 1, len(runs))
        return summarised(rows, variants, [chunks.shape[1] - 1] * len(rows))
