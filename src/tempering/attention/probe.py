"""Run a model on a few tokens and watch its softmaxes: what is there, and what T would do.

The reference in here knows nothing of the routes in `routes.py`: below the model's code, where
PyTorch dispatches operators, it divides the logits of one row of the batch by random
temperatures, computing in float64 from the formula of the definitions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tempering.attention import interface, routes
from tempering.attention.layout import AttentionLayer
from tempering.attention.modes import evaluation_mode
from tempering.errors import ArchitectureError

TOKENS, TARGET_TOKENS, PADDING = 9, 6, 2


@dataclass
class Observation:
    """What one forward pass showed."""

    layers: list[AttentionLayer] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None


def sample_inputs(model: Any, rows: int = 2) -> dict[str, Any]:
    """A padded batch whose rows are alike, so that one can be compared with another."""
    config: Any = model.config
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ArchitectureError(
            f"{type(model).__name__} takes '{model.main_input_name}', not token ids; "
            "give a sample of its inputs: layout(model, sample={...})"
        )
    text = config.get_text_config()
    vocabulary = int(getattr(text, "vocab_size", 0) or model.get_input_embeddings().weight.shape[0])
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> Tensor:
        low = min(5, vocabulary - 1)
        row = torch.randint(low, min(vocabulary, 1000), (1, count), generator=generator)
        return row.expand(rows, -1).contiguous().to(device)

    mask = torch.ones(rows, TOKENS, dtype=torch.long, device=device)
    if config.is_encoder_decoder:
        mask[:, -PADDING:] = 0
        return {
            "input_ids": tokens(TOKENS),
            "attention_mask": mask,
            "decoder_input_ids": tokens(TARGET_TOKENS),
        }
    # Eager attention of a float64 model gives NaN for a query that sees nothing but padding.
    first = 1 if model.get_input_embeddings().weight.dtype == torch.float64 else 0
    mask[:, first : first + PADDING] = 0
    return {"input_ids": tokens(TOKENS), "attention_mask": mask}


@contextlib.contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout, and every module's training flag as it was afterwards.

    Inference mode is left as well: in it, composite operators reach the dispatcher whole, and
    the reference would not see the softmax inside them.
    """
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with (
        evaluation_mode(model),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.random.fork_rng(devices=devices),
    ):
        torch.manual_seed(0)
        yield


def run(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """One forward pass without a cache."""
    with _still(model):
        try:
            return model(**inputs, use_cache=False)
        except TypeError as error:
            if "use_cache" not in str(error):
                raise
            return model(**inputs)


def observe(
    model: nn.Module,
    sample: dict[str, Any] | None = None,
    temperature: Any = None,
    row: int = 1,
) -> Observation:
    """Watch one forward pass; with `temperature(name, heads) -> [heads]`, temper one row.

    The reference temperatures act on row `row` of the batch alone, at the level of operators.
    """
    watcher = _Watcher(model, temperature, row)
    return watcher.watch(sample if sample is not None else sample_inputs(model))


class _Watcher:
    def __init__(self, model: nn.Module, temperature: Any, row: int) -> None:
        self.model = model
        self.temperature = temperature
        self.row = row
        self.names = {id(module): name for name, module in model.named_modules()}
        self.stack: list[nn.Module] = []
        self.inside_interface: nn.Module | None = None
        self.found: dict[str, AttentionLayer] = {}
        self.outputs: dict[str, Tensor] = {}
        self.key_lengths: dict[str, int] = {}

    def watch(self, inputs: dict[str, Any]) -> Observation:
        if "input_ids" in inputs:
            self.tokens = inputs["input_ids"].shape[1]
            self.batch = inputs["input_ids"].shape[0]
        else:
            first = next(item for item in inputs.values() if isinstance(item, Tensor))
            self.tokens, self.batch = -1, first.shape[0]
        handles = []
        for module in self.model.modules():
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        reference = _Reference(self) if self.temperature is not None else contextlib.nullcontext()
        try:
            with interface.watched(self._watched), reference, _Softmaxes(self):
                result = run(self.model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        logits = getattr(result, "logits", None)
        if logits is None:
            logits = getattr(result, "last_hidden_state", None)
        return Observation(list(self.found.values()), self.outputs, logits)

    # -- hooks

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        self.stack.append(module)

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if self.stack and self.stack[-1] is module:
            self.stack.pop()
        name = self.names.get(id(module))
        layer = self.found.get(name or "")
        if layer is not None and layer.route == "softmax":
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                self.outputs[layer.name] = first.detach()

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self._record(module, args, kwargs)
            self.inside_interface, before = module, self.inside_interface
            try:
                output = function(module, *args, **kwargs)
            finally:
                self.inside_interface = before
            name = self.names.get(id(module))
            if name is not None:
                self.outputs[name] = output[0].detach()
            return output

        return attention

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self.names.get(id(module))
        if name is None:
            raise ArchitectureError(
                f"{type(module).__name__} calls attention but is no module of "
                f"{type(self.model).__name__}"
            )
        query = args[0] if args else kwargs["query"]
        key = args[1] if len(args) > 1 else kwargs["key"]
        if query.ndim != 4 or key.ndim != 4:
            raise ArchitectureError(
                f"{name}: queries of shape {tuple(query.shape)} are not "
                "[batch, heads, tokens, head_dim]; its heads can't be told apart"
            )
        features = [item for item in routes.LOGIT_ARGUMENTS if kwargs.get(item) is not None]
        if any("sink" in item for item in (*module._parameters, *module._buffers)):
            features.append("sinks")
        for argument in kwargs:
            if argument not in routes.NEUTRAL_ARGUMENTS and argument not in routes.LOGIT_ARGUMENTS:
                raise ArchitectureError(
                    f"{name} passes '{argument}' to its attention, which is not known to leave "
                    "the logits alone; this architecture is refused"
                )
        features = sorted({"sinks" if item == "s_aux" else item for item in features})
        self.found.setdefault(
            name,
            AttentionLayer(
                name=name,
                stack=self._stack_of(module, name, query.shape[2], key.shape[2], kwargs),
                index=0,
                heads=query.shape[1],
                kv_heads=key.shape[1],
                features=tuple(features),
            ),
        )

    def _stack_of(
        self, module: nn.Module, name: str, queries: int, keys: int, kwargs: dict[str, Any]
    ) -> str:
        config: Any = self.model.config
        if not config.is_encoder_decoder:
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            return "decoder" if causal else "encoder"
        if queries == TARGET_TOKENS and keys == TOKENS:
            return "cross"
        return "encoder" if queries == TOKENS else "decoder"

    # -- softmaxes that models call themselves

    def own_softmax(self, logits: Tensor) -> AttentionLayer | None:
        """The layer that a softmax outside the interface belongs to, if it is attention."""
        if self.inside_interface is not None or not self.stack:
            return None
        owner = next(
            (m for m in reversed(self.stack) if not isinstance(m, nn.Softmax)), self.stack[-1]
        )
        name = self.names.get(id(owner), "")
        if logits.ndim not in (3, 4) or logits.shape[-2] not in (TOKENS, TARGET_TOKENS):
            return None
        if logits.shape[-1] < logits.shape[-2] and logits.shape[-1] not in (TOKENS, TARGET_TOKENS):
            return None
        folded = logits.ndim == 3
        if folded and (logits.shape[0] % self.batch or logits.shape[0] == self.batch):
            return None
        if not folded and logits.shape[0] != self.batch:
            return None
        heads = logits.shape[0] // self.batch if folded else logits.shape[1]
        layer = AttentionLayer(
            name=name,
            stack=self._stack_of(owner, name, logits.shape[-2], logits.shape[-1], {}),
            index=0,
            heads=heads,
            kv_heads=heads,
            route="softmax",
            folded=folded,
            mask_floor=_mask_floor(logits),
        )
        return self.found.setdefault(name, layer)


def _mask_floor(logits: Tensor) -> float:
    """Half the model's own masking constant (some use -1e4 or -1e9 rather than the minimum)."""
    lowest = logits[torch.isfinite(logits)].min().item()
    natural = torch.finfo(logits.dtype).min / 2
    return lowest / 2 if natural < lowest < -5e3 else natural


class _Softmaxes(TorchFunctionMode):
    """Registers softmaxes and scaled products of attention code outside the interface."""

    def __init__(self, watcher: _Watcher) -> None:
        super().__init__()
        self.watcher = watcher

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        import torch.nn.functional as F

        if func in routes.SOFTMAXES and args:
            self.watcher.own_softmax(args[0])
        elif func is F.scaled_dot_product_attention and len(args) > 1 and args[0].ndim == 4:
            query, key = args[0], args[1]
            self.watcher.own_softmax(query.new_zeros(*query.shape[:3], key.shape[2]))
        return func(*args, **(kwargs or {}))


class _Reference(TorchDispatchMode):
    """Divides one row's attention logits by T where PyTorch dispatches operators."""

    def __init__(self, watcher: _Watcher) -> None:
        super().__init__()
        self.watcher = watcher

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        layer = self._layer()
        name = str(func)
        if layer is not None and name.startswith(("aten._softmax.", "aten._safe_softmax.")):
            logits = args[0]
            if self._belongs(layer, logits):
                return func(self._tempered(layer, logits), *args[1:], **kwargs)
        if layer is not None and name.startswith("aten._scaled_dot_product_"):
            output = func(*args, **kwargs)
            row = slice(self.watcher.row, self.watcher.row + 1)
            exact = self._product(layer, row, name, args, kwargs)
            output[0][row] = exact.to(output[0].dtype)
            return output
        return func(*args, **kwargs)

    def _layer(self) -> AttentionLayer | None:
        watcher = self.watcher
        module = watcher.inside_interface
        if module is None:
            module = next(
                (m for m in reversed(watcher.stack) if not isinstance(m, nn.Softmax)), None
            )
        return watcher.found.get(watcher.names.get(id(module), "")) if module is not None else None

    def _belongs(self, layer: AttentionLayer, logits: Tensor) -> bool:
        if layer.folded:
            return logits.ndim == 3 and logits.shape[0] == self.watcher.batch * layer.heads
        return logits.ndim == 4 and tuple(logits.shape[:2]) == (self.watcher.batch, layer.heads)

    def _temperature(self, layer: AttentionLayer, device: torch.device) -> Tensor:
        return self.watcher.temperature(layer.name, layer.heads).double().to(device)

    def _tempered(self, layer: AttentionLayer, logits: Tensor) -> Tensor:
        t = self._temperature(layer, logits.device)[:, None, None]
        out = logits.clone()
        view = out.view(self.watcher.batch, layer.heads, *out.shape[-2:]) if layer.folded else out
        part = view[self.watcher.row].double()
        masked = part <= max(layer.mask_floor, torch.finfo(logits.dtype).min / 2)
        view[self.watcher.row] = torch.where(masked, part, part / t).to(out.dtype)
        return out

    def _product(
        self, layer: AttentionLayer, row: slice, name: str, args: tuple[Any, ...], kwargs: Any
    ) -> Tensor:
        query, key, value = (item[row].double() for item in args[:3])
        groups = query.shape[1] // key.shape[1]
        key, value = (item.repeat_interleave(groups, dim=1) for item in (key, value))
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        logits = query @ key.transpose(-1, -2) * scale
        mask = kwargs.get("attn_mask")
        if mask is None and "efficient" in name and len(args) > 3:
            mask = args[3]
        causal = (args[4] if len(args) > 4 else kwargs.get("is_causal", False)) is True
        if "efficient" in name:
            causal = (args[6] if len(args) > 6 else kwargs.get("is_causal", False)) is True
        if mask is not None:
            part = mask[row] if mask.shape[0] > 1 else mask
            floor = torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else 0.0
            hidden = part <= floor if mask.is_floating_point() else ~part
            bias = torch.where(hidden, 0.0, part.double()) if mask.is_floating_point() else 0.0
            logits = (logits + bias).masked_fill(hidden, float("-inf"))
        elif causal:
            ones = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device)
            logits = logits.masked_fill(~ones.tril(), float("-inf"))
        t = self._temperature(layer, logits.device)[:, None, None]
        logits = logits / t
        peak = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).min)
        weights = (logits - peak).exp()
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ value
