"""Cut cells out of a model's attention: a position may not read another, in chosen layers and heads."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from flowgraph.attention.layers_and_heads import LayerRule, resolve_heads, resolve_layers
from flowgraph.attention.modules import attention_modules, uses_attention_interface
from flowgraph.errors import CaptureError, InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MASKED = -1e4  # additive masks hold 0 or the dtype's minimum; position biases of readable tokens stay above this


@dataclass(frozen=True, eq=False)
class Cut:
    """What one row of a batch may not read.

    Attributes:
        cells: ``[T, T]``, true where the position of the row may not read the token of the column.
        layers: indices of the layers in which this holds.
        heads: query heads for which it holds; None: all.
        num_heads: query heads of a layer (1 when all are cut alike).
    """

    cells: Bool[Tensor, "tokens tokens"]
    layers: tuple[int, ...]
    heads: Int64[Tensor, " heads"] | None = None
    num_heads: int = 1


def resolve_cut_layers(layers: LayerRule, model: PreTrainedModel, modules: Mapping[int, nn.Module]) -> tuple[int, ...]:
    """The layers with attention that a choice names; ``"all"``, ``"middle"`` and ranges pass over the others.

    Raises:
        InvalidInputError: a layer that does not exist, or no softmax attention where it was asked for.
        CaptureError: attention that cannot be masked.
    """
    asked = resolve_layers(layers, model.config.get_text_config(decoder=True).num_hidden_layers)
    chosen = tuple(layer for layer in asked if layer in modules)
    if not chosen or (len(chosen) < len(asked) and not isinstance(layers, str)):
        raise InvalidInputError(
            f"layers: must have softmax attention, got {sorted(set(asked) - set(chosen))} of {type(model).__name__}, "
            f"which have none; choose among {sorted(modules)}"
        )
    for layer in chosen:
        _refuse_unmaskable(model, modules[layer])
    return chosen


def resolve_cut_heads(
    heads: str | int | Sequence[int], model: PreTrainedModel, modules: Mapping[int, nn.Module]
) -> tuple[Int64[Tensor, " heads"] | None, int]:
    """``heads`` and ``num_heads`` of a :class:`Cut`.

    Raises:
        InvalidInputError: neither "all" nor heads of this model, or layers that differ in their number.
    """
    if isinstance(heads, str):
        if heads != "all":
            raise InvalidInputError(f"heads: must be 'all' or indices, got {heads!r}; e.g. heads=[0, 3]")
        return None, 1
    config = model.config.get_text_config(decoder=True)
    try:
        number = getattr(config, "num_attention_heads", None)
    except RuntimeError:  # transformers refuses the attribute where layers differ
        number = None
    own = {getattr(module, "num_heads", number) for module in modules.values()}
    if not isinstance(number, int) or own != {number}:
        raise InvalidInputError(
            f"heads: must be 'all' where the layers of a model differ in their number, got {heads!r} for "
            f"{config.model_type}; leave it out"
        )
    return torch.tensor(resolve_heads(heads, number)), number


@contextmanager
def cutting(model: PreTrainedModel, cuts: Sequence[Cut]) -> Iterator[None]:
    """Inside, each forward pass of this thread has row i of its batch cut as ``cuts[i]`` says.

    Each attention module is handed a changed mask; its function, its weights and everything else stay as they are.
    So the attention that a capture sees is the cut one, cuts inside cuts add up, and a layer in which nothing is cut
    computes exactly what it did.

    Raises:
        InvalidInputError: a pass over another number of tokens or rows, or a position left with nothing to read.
        CaptureError: a mask that cannot be read, or layers that did not run.
    """
    modules = attention_modules(model)
    wanted = sorted({layer for cut in cuts if bool(cut.cells.any()) for layer in cut.layers})
    hooks = [_MaskHook(modules[layer], layer, cuts) for layer in wanted]
    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield
    unseen = [hook.layer for hook in hooks if hook.calls == 0]
    if unseen:
        raise CaptureError(
            f"model: the attention of {type(model).__name__} in layers {unseen} did not run, so nothing was cut; "
            "make a forward pass inside, and turn compilation of its modules off"
        )


@dataclass
class _MaskHook:
    """Before an attention module of one layer runs, take the cut cells out of its mask."""

    module: nn.Module
    layer: int
    cuts: Sequence[Cut]
    calls: int = 0
    thread: int = field(default_factory=threading.get_ident)

    def __call__(self, module: nn.Module, args: tuple, options: dict[str, Any]) -> tuple[tuple, dict] | None:
        if threading.get_ident() != self.thread:
            return None
        self.calls += 1
        num_tokens = self.cuts[0].cells.shape[0]
        hidden = next(value for value in (*args, *options.values()) if isinstance(value, Tensor) and value.ndim == 3)
        if hidden.shape[:2] != (len(self.cuts), num_tokens):
            raise InvalidInputError(
                f"input_ids: must be the trace's {num_tokens} tokens, once for each of {len(self.cuts)} "
                f"interventions, got shape {tuple(hidden.shape[:2])}; expand trace.token_ids, and use_cache=False"
            )
        call = inspect.signature(module.forward).bind(*args, **options)
        call.arguments["attention_mask"] = self._joined(call.arguments.get("attention_mask"), hidden)
        return call.args, call.kwargs

    def _joined(self, mask: Any, hidden: Tensor) -> Tensor:
        eager = _implementation(self.module) == "eager"
        if mask is None and not eager:  # fused attention reads a missing mask as causal
            ones = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool, device=hidden.device)
            mask = ones.tril()[None, None]
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise CaptureError(
                f"model: the mask of its attention ({type(mask).__name__}) cannot be read in layer {self.layer}; "
                "call model.set_attn_implementation('sdpa') first"
            )
        cut = self._cut(mask.device)
        if mask.dtype == torch.bool:
            mask = readable = mask & ~cut
        else:
            mask = torch.where(cut, torch.finfo(mask.dtype).min, mask)
            readable = mask > _MASKED
        blind = ~readable.any(-1)
        if bool(blind.any()):
            row, _, position = blind.nonzero()[0].tolist()
            raise InvalidInputError(
                f"edges: every position must keep something to read, got none left for position {position} in layer "
                f"{self.layer} (intervention {row}); cut fewer edges, or leave its reading of itself"
            )
        return mask

    def _cut(self, device: torch.device) -> Bool[Tensor, "batch heads tokens tokens"]:
        heads = max(cut.num_heads for cut in self.cuts)
        mask = torch.zeros(len(self.cuts), heads, *self.cuts[0].cells.shape, dtype=torch.bool)
        for row, cut in zip(mask, self.cuts, strict=True):
            if self.layer in cut.layers:
                row[slice(None) if cut.heads is None else cut.heads] = cut.cells
        return mask.to(device)


def _implementation(module: nn.Module) -> str:
    return str(getattr(getattr(module, "config", None), "_attn_implementation", None) or "unknown")


def _refuse_unmaskable(model: PreTrainedModel, module: nn.Module) -> None:
    name = f"{type(module).__name__} of {type(model).__name__}"
    if (
        not uses_attention_interface(type(module))
        or "attention_mask" not in inspect.signature(module.forward).parameters
    ):
        raise CaptureError(
            f"model: its attention must go through transformers' attention interface to be cut, got {name}, which "
            "bypasses it; use a model that does (docs: models)"
        )
    if _implementation(module) not in ("eager", "sdpa"):
        raise CaptureError(
            f"model: its attention implementation must be 'sdpa' or 'eager' to be cut, got "
            f"{_implementation(module)!r} in {name}; call model.set_attn_implementation('sdpa') first"
        )
