"""Mask cells of a model's attention during a pass: a position may not read another, in chosen layers and heads."""

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

from flowgraph.attention.layer_record import readable_cells
from flowgraph.attention.layers_and_heads import LayerRule, resolve_heads, resolve_layers
from flowgraph.attention.modules import (
    attention_implementation,
    attention_modules,
    num_layers,
    num_query_heads,
    text_config,
    uses_attention_interface,
)
from flowgraph.errors import CaptureError, InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Cut:
    """The attention cells that one sequence of a batch may not read.

    Attributes:
        cells: ``[T, T]``, true where the position of the row may not read the token of the column.
        layers: indices of the layers that are cut.
        heads: query heads that are cut; None for all.
        num_heads: query heads of a layer; 1 where all are cut alike.
    """

    cells: Bool[Tensor, "tokens tokens"]
    layers: tuple[int, ...]
    heads: Int64[Tensor, " heads"] | None = None
    num_heads: int = 1


def resolve_cut_layers(
    layers: LayerRule,
    model: PreTrainedModel,
    modules: Mapping[int, nn.Module],
) -> tuple[int, ...]:
    """Convert a choice of layers to the indices of those with softmax attention.

    ``"all"``, ``"middle"`` and ranges pass over layers without it.

    Args:
        layers: as for :func:`~flowgraph.attention.layers_and_heads.resolve_layers`.
        model: the model.
        modules: its attention modules, by layer.

    Raises:
        InvalidInputError: a layer that does not exist, or a listed layer without softmax attention.
        CaptureError: attention that cannot be masked.
    """
    # A named range may include layers of another kind, which are left out; listed layers must all be usable.
    named = resolve_layers(layers, num_layers(model, modules))
    chosen = tuple(layer for layer in named if layer in modules)
    missing = [layer for layer in named if layer not in modules]
    is_listed = not isinstance(layers, str)
    if not chosen or (missing and is_listed):
        raise InvalidInputError(
            f"layers: must have softmax attention, got {missing} of {type(model).__name__}, "
            f"which have none; choose among {sorted(modules)}"
        )
    for layer in chosen:
        _refuse_unmaskable(model, modules[layer])
    return chosen


def resolve_cut_heads(
    heads: str | int | Sequence[int],
    model: PreTrainedModel,
    modules: Mapping[int, nn.Module],
) -> tuple[Int64[Tensor, " heads"] | None, int]:
    """Convert a choice of heads to ``heads`` and ``num_heads`` of a :class:`Cut`.

    Args:
        heads: ``"all"``, one index or indices.
        model: the model.
        modules: its attention modules, by layer.

    Raises:
        InvalidInputError: neither "all" nor heads of this model, or layers that differ in their number of heads.
    """
    if isinstance(heads, str):
        if heads != "all":
            raise InvalidInputError(f"heads: must be 'all' or indices, got {heads!r}; e.g. heads=[0, 3]")
        return None, 1
    num_heads = num_query_heads(model)
    # Some modules have a number of their own, whatever the configuration says.
    num_heads_of_modules = {getattr(module, "num_heads", num_heads) for module in modules.values()}
    if num_heads is None or num_heads_of_modules != {num_heads}:
        raise InvalidInputError(
            f"heads: must be 'all' where the layers of a model differ in their number, got {heads!r} for "
            f"{text_config(model).model_type}; leave it out"
        )
    return torch.tensor(resolve_heads(heads, num_heads)), num_heads


@contextmanager
def cutting(model: PreTrainedModel, cuts: Sequence[Cut]) -> Iterator[None]:
    """Cut sequence i of each batch that this thread passes through the model inside the block by ``cuts[i]``.

    Each attention module gets a changed mask; its function, its weights and everything else stay the same. So a
    capture inside the block captures the cut attention, nested cuts add up, and a layer without any cut computes
    exactly the same as before.

    Args:
        model: the model.
        cuts: one cut for each sequence of the batch.

    Raises:
        InvalidInputError: a pass over another number of tokens or sequences, or a position left with nothing to read.
        CaptureError: a mask that cannot be read, or layers that did not run.
    """
    modules = attention_modules(model)
    cut_layers: set[int] = set()
    for cut in cuts:
        if bool(cut.cells.any()):
            cut_layers.update(cut.layers)
    hooks = [_MaskHook(modules[layer], layer, cuts) for layer in sorted(cut_layers)]
    with ExitStack() as stack:
        for hook in hooks:
            handle = hook.module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield
    # A compiled or replaced module would skip its hook, and the pass would look as if the cut had no effect.
    unseen = [hook.layer for hook in hooks if hook.calls == 0]
    if unseen:
        raise CaptureError(
            f"model: the attention of {type(model).__name__} in layers {unseen} did not run, so nothing was cut; "
            "make a forward pass inside, and turn compilation of its modules off"
        )


@dataclass
class _MaskHook:
    """The hook that masks the cut cells of one layer before its attention module runs.

    Attributes:
        module: the attention module.
        layer: its layer.
        cuts: one cut for each sequence of the batch.
        calls: how often the module ran.
        thread: the thread whose passes are cut.
    """

    module: nn.Module
    layer: int
    cuts: Sequence[Cut]
    calls: int = 0
    thread: int = field(default_factory=threading.get_ident)

    def __call__(self, module: nn.Module, args: tuple, options: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Replace the ``attention_mask`` of the call."""
        if threading.get_ident() != self.thread:
            return None
        self.calls += 1
        num_tokens = self.cuts[0].cells.shape[0]

        # The hidden states, [batch, tokens, width], give the shape of the batch.
        values = (*args, *options.values())
        hidden = next(value for value in values if isinstance(value, Tensor) and value.ndim == 3)
        if hidden.shape[:2] != (len(self.cuts), num_tokens):
            raise InvalidInputError(
                f"input_ids: must be the trace's {num_tokens} tokens, once for each of {len(self.cuts)} "
                f"interventions, got shape {tuple(hidden.shape[:2])}; expand trace.token_ids, and use_cache=False"
            )
        # The mask may be given by position or by name, so the call is bound to the module's signature.
        call = inspect.signature(module.forward).bind(*args, **options)
        call.arguments["attention_mask"] = self._cut_mask(call.arguments.get("attention_mask"), hidden)
        return call.args, call.kwargs

    def _cut_mask(self, mask: Any, hidden: Tensor) -> Tensor:
        """Remove the cut cells from the mask of the pass."""
        # Fused attention reads a missing mask as causal.
        if mask is None and attention_implementation(self.module) != "eager":
            num_tokens = hidden.shape[1]
            cells = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=hidden.device)
            mask = cells.tril()[None, None]
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise CaptureError(
                f"model: the mask of its attention ({type(mask).__name__}) cannot be read in layer {self.layer}; "
                "call model.set_attn_implementation('sdpa') first"
            )

        # Boolean masks are True where a cell is read; additive ones hold the least number where it is not.
        is_cut = self._cut_cells(mask.device)
        if mask.dtype == torch.bool:
            mask = mask & ~is_cut
        else:
            mask = torch.where(is_cut, torch.finfo(mask.dtype).min, mask)

        # A softmax over no cell would be uniform over all of them, the cut ones included.
        reads_nothing = ~readable_cells(mask).any(-1)
        if bool(reads_nothing.any()):
            row, _, position = reads_nothing.nonzero()[0].tolist()
            raise InvalidInputError(
                f"edges: every position must keep something to read, got none left for position {position} in layer "
                f"{self.layer} (intervention {row}); cut fewer edges, or leave its reading of itself"
            )
        return mask

    def _cut_cells(self, device: torch.device) -> Bool[Tensor, "batch heads tokens tokens"]:
        """Mark the cells that are cut in this layer, for each sequence; one head is enough where all are cut alike."""
        num_heads = max(cut.num_heads for cut in self.cuts)
        num_tokens = self.cuts[0].cells.shape[0]
        shape = (len(self.cuts), num_heads, num_tokens, num_tokens)
        is_cut = torch.zeros(shape, dtype=torch.bool)
        # Sequences whose cut leaves this layer out keep all cells.
        for of_sequence, cut in zip(is_cut, self.cuts, strict=True):
            if self.layer not in cut.layers:
                continue
            if cut.heads is None:
                of_sequence[:] = cut.cells
            else:
                of_sequence[cut.heads] = cut.cells
        return is_cut.to(device)


def _refuse_unmaskable(model: PreTrainedModel, module: nn.Module) -> None:
    """Refuse a module that does not get its mask through the attention interface, as a readable tensor."""
    name = f"{type(module).__name__} of {type(model).__name__}"
    takes_mask = "attention_mask" in inspect.signature(module.forward).parameters
    if not uses_attention_interface(type(module)) or not takes_mask:
        raise CaptureError(
            f"model: its attention must go through transformers' attention interface to be cut, got {name}, which "
            "bypasses it; use a model that does (docs: models)"
        )
    implementation = attention_implementation(module)
    if implementation not in ("eager", "sdpa"):
        raise CaptureError(
            f"model: its attention implementation must be 'sdpa' or 'eager' to be cut, got "
            f"{implementation or 'unknown'!r} in {name}; call model.set_attn_implementation('sdpa') first"
        )
