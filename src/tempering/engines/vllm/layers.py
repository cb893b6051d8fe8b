"""Temperature in vLLM's attention layers: beta = 1/T of each head, multiplied into the queries.

    softmax(scale (beta q) . k) = softmax(scale q . k / T)

which is exact wherever the softmax is taken of scaled products and nothing else. The betas are a
buffer of each layer. The compiled graph or CUDA graph reads the buffer, so other values written
into it take effect at once, without compiling again.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.attention.profiles.profile import Profile
from tempering.engines.vllm.layer_betas import RankLayer, layer_betas
from tempering.engines.vllm.length_table import Laws, LengthTable
from tempering.engines.vllm.settings import (
    EngineSettings,
    PerEngine,
    configured,
    named_profiles,
    settings_of,
)
from tempering.errors import ArchitectureError, RefusedError

_BUFFER, _ROWS, _ROOMS = "tempering_beta", "tempering_rows", "tempering_rooms"
_BY_TOKEN = "tempering_by_token"  # whether a layer's buffer holds beta of every token of a step
# Constructor arguments of vLLM's Attention that bring more than scaled products into the softmax:
# multiplying the queries would temper the products and leave the rest as it was.
_UNTEMPERED_PARTS = {
    "alibi_slopes": "adds ALiBi's position bias to its logits",
    "logits_soft_cap": "caps its logits before the softmax",
    "sinks": "adds a sink logit to its softmax",
}
_WITHOUT_DRAFT_MODEL = ("ngram", "ngram_gpu", "suffix")


def temper_layers(config: Any, settings: EngineSettings) -> None:
    """Make every attention layer that this process builds for this configuration temperable.

    Raises
    ------
    RefusedError: parts of the configuration under which a layer's temperature is not exact.
    """
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention import Attention, MLAAttention

    check_configuration(config, settings)
    if getattr(Attention, "_tempering", False):
        return
    init_of_vllm, forward_of_vllm, mla_init = (
        Attention.__init__,
        Attention.forward,
        MLAAttention.__init__,
    )
    signature = inspect.signature(init_of_vllm)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        init_of_vllm(self, *args, **kwargs)
        config = get_current_vllm_config()
        if configured(config):
            given = signature.bind(self, *args, **kwargs).arguments
            _check_layer(self, {**given, **given.get("extra_impl_args", {})})
            _add_buffers(self, config)

    def forward(self: Any, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        beta = getattr(self, _BUFFER, None)
        if beta is not None:
            rows = getattr(self, _ROWS, None)
            heads = query.view(-1, self.num_heads, self.head_size)
            if getattr(self, _BY_TOKEN, False):
                beta = beta[: heads.shape[0]]
            elif rows is not None:
                room = getattr(self, _ROOMS)[: heads.shape[0], None]
                beta = beta[rows[: heads.shape[0]]]
                # Where no room is asked for, not one bit of beta is left to a power's rounding.
                beta = torch.where(room == 1, beta, beta**room)
            query = (heads * beta.unsqueeze(-1)).to(query.dtype).view(query.shape)
        return forward_of_vllm(self, query, *args, **kwargs)

    def refused(self: Any, *args: Any, **kwargs: Any) -> None:
        mla_init(self, *args, **kwargs)
        if configured(get_current_vllm_config()):
            raise ArchitectureError(
                f"{getattr(self, 'layer_name', 'a layer')} is multi-head latent attention, whose "
                "kernels scale the logits themselves; serve this model without a profile"
            )

    Attention.__init__, Attention.forward, MLAAttention.__init__ = init, forward, refused
    Attention._tempering = True


def check_configuration(config: Any, settings: EngineSettings) -> None:
    """RefusedError where vLLM runs other layers than the model's, or splits a batch's tokens."""
    drafts = getattr(config, "speculative_config", None)
    if drafts is not None and drafts.method not in _WITHOUT_DRAFT_MODEL:
        raise RefusedError(
            f"speculative decoding by '{drafts.method}' brings attention layers of its own, which "
            "no profile names; leave it out, or speculate by ngram"
        )
    if not settings.profiles and not settings.knows_length:
        return
    model = getattr(config, "model_config", None)
    if settings.knows_length and getattr(model, "is_mm_prefix_lm", False):
        raise RefusedError(
            "the tokens of an image attend to each other in this model, also to later ones, so a "
            "rule of length would count too few keys; serve text alone "
            "(--language-model-only), or profiles of numbers"
        )
    if settings.knows_length and getattr(model, "rswa_window", None) is not None:
        raise RefusedError(
            "a query of this model sees the prompt and a window of its answer, which a rule of "
            "length would count wrongly; serve profiles of numbers"
        )
    parallel, cache = config.parallel_config, config.cache_config
    for enabled, what in (
        (getattr(parallel, "enable_dbo", False), "dual batch overlap"),
        (getattr(parallel, "prefill_context_parallel_size", 1) > 1, "prefill context parallelism"),
        (getattr(cache, "kv_sharing_fast_prefill", False), "fast prefill with shared KV"),
    ):
        if enabled:
            raise RefusedError(
                f"{what} splits a batch's tokens, so profiles of requests and rules of length "
                "can't follow them; leave it out, or give one profile of numbers for all"
            )


def _check_layer(layer: Any, given: Mapping[str, Any]) -> None:
    name = layer.layer_name
    kind = getattr(layer.attn_type, "value", layer.attn_type)
    if str(kind) != "decoder":
        raise ArchitectureError(
            f"{name} is {kind} attention; the plugin tempers decoder-only models, so bake the "
            "profile into a checkpoint instead: tempering bake"
        )
    for argument, does in _UNTEMPERED_PARTS.items():
        value = given.get(argument)
        if value is not None and not (argument == "logits_soft_cap" and value == 0):
            raise ArchitectureError(
                f"{name} {does}, which multiplying its queries leaves at T = 1; "
                "use the transformers engine for this model"
            )
    if type(layer).__name__ == "StaticSinkAttention":
        raise ArchitectureError(
            f"{name} adds sink keys whose logits its queries don't reach; use the transformers "
            "engine for this model"
        )
    if getattr(layer, "query_quant", None) is not None:
        raise RefusedError(
            f"{name} quantizes its queries by a scale that was calibrated without temperatures; "
            "leave --kv-cache-dtype auto"
        )


def _add_buffers(layer: Any, config: Any) -> None:
    settings = settings_of(config)
    if settings is not None and settings.knows_length:
        setattr(layer, _BY_TOKEN, True)
        betas = torch.ones(_most_tokens(config), layer.num_heads, dtype=torch.float32)
        layer.register_buffer(_BUFFER, betas, persistent=False)
        return
    named = len(named_profiles(config))
    shape = (named + 1, layer.num_heads) if named else (layer.num_heads,)
    # Not persistent, because no checkpoint has it. Float32, so that beta q is rounded once, to the
    # queries' dtype.
    layer.register_buffer(_BUFFER, torch.ones(shape, dtype=torch.float32), persistent=False)
    if named:
        rows, rooms = _token_places(config)
        layer.register_buffer(_ROWS, rows, persistent=False)
        layer.register_buffer(_ROOMS, rooms, persistent=False)


def _most_tokens(config: Any) -> int:
    """Tokens of a step at most."""
    graphs = getattr(config.compilation_config, "max_cudagraph_capture_size", None) or 0
    return int(max(config.scheduler_config.max_num_batched_tokens, graphs))


_TABLES: PerEngine[LengthTable] = PerEngine()


def length_table(config: Any) -> LengthTable | None:
    """The table of an engine whose temperatures know their length; None for any other."""
    return _TABLES.get(config)


def make_length_table(config: Any, layers: Sequence[Any]) -> LengthTable:
    """Give layers that were built for it their parts of one table."""
    return _TABLES.set(config, LengthTable(layers, _BUFFER, _most_tokens(config)))


_TOKEN_PLACES: PerEngine[tuple[Tensor, Tensor]] = PerEngine()


def _token_places(config: Any) -> tuple[Tensor, Tensor]:
    """Token -> row of the betas, and token -> room: the same two for all layers, never moved."""
    shared = _TOKEN_PLACES.get(config)
    if shared is not None:
        return shared
    most = _most_tokens(config)
    places = torch.zeros(most, dtype=torch.long), torch.ones(most, dtype=torch.float32)
    return _TOKEN_PLACES.set(config, places)


def token_places(config: Any) -> tuple[Tensor, Tensor] | None:
    """Token -> row of the betas, and token -> room; None where all requests have one profile."""
    return _TOKEN_PLACES.get(config)


def layers_of(config: Any) -> list[Any]:
    """The temperable layers of the model in this worker, in the order that vLLM names them.

    Raises
    ------
    ArchitectureError: a layer of a kind that the plugin doesn't know, or one built before it.
    """
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.mamba.abstract import MambaBase

    temperable = []
    for name, layer in config.compilation_config.static_forward_context.items():
        if isinstance(layer, Attention):
            if getattr(layer, _BUFFER, None) is None:
                raise ArchitectureError(
                    f"{name} was built before the plugin 'tempering' was loaded; "
                    "let VLLM_PLUGINS name it, or unset VLLM_PLUGINS"
                )
            temperable.append(layer)
        elif hasattr(layer, "get_attn_backend") and not isinstance(layer, MambaBase):
            raise ArchitectureError(
                f"{name} is a {type(layer).__name__}, which the plugin doesn't know how to "
                "temper exactly; serve this model without a profile"
            )
    return temperable


def rank_layers(layers: Sequence[Any]) -> list[RankLayer]:
    """Name, heads and rank of each layer in this worker."""
    from vllm.distributed import get_tensor_model_parallel_rank as rank
    from vllm.distributed import get_tensor_model_parallel_world_size as ranks

    return [RankLayer(layer.layer_name, layer.num_heads, rank(), ranks()) for layer in layers]


Prepared = list[Float[Tensor, " heads"]] | Laws


def prepared_betas(config: Any, layers: Sequence[Any], profile: Profile | None) -> Prepared:
    """The betas of each layer in this worker, checked against its shape; nothing is written yet.

    Raises RefusedError for rules where the engine was built for numbers.
    """
    in_stages = config.parallel_config.pipeline_parallel_size > 1
    depth = int(config.model_config.get_total_num_hidden_layers()) if in_stages else None
    table = length_table(config)
    if table is not None:
        longest = int(config.model_config.max_model_len)
        return table.prepared(profile, rank_layers(layers), longest, depth)
    if profile is None:
        return [torch.ones(layer.num_heads) for layer in layers]
    profile.refuse_rules(
        "this engine was started with profiles of numbers alone, and its layers were built for "
        "them; start it with this profile"
    )
    return layer_betas(profile, rank_layers(layers), depth=depth)


def write_betas(config: Any, layers: Sequence[Any], values: Prepared, row: int = 0) -> None:
    """Put prepared betas in force, in place."""
    if isinstance(values, Laws):
        table = length_table(config)
        assert table is not None
        table.set(row, values)
        return
    for layer, beta in zip(layers, values, strict=True):
        buffer = getattr(layer, _BUFFER)
        (buffer[row] if buffer.ndim == 2 else buffer).copy_(beta)
