"""Listen to a forward pass: record what each chosen attention layer was given, and change nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from flowgraph.attention.heads import HeadAggregator
from flowgraph.attention.interception import AttentionCall, AttentionDispatch, KernelWatch
from flowgraph.attention.modules import attention_modules, base_model, text_decoder, uses_attention_interface
from flowgraph.attention.records import LayerRecord, frozen
from flowgraph.attention.rows import AttentionRows, WeightedLayer
from flowgraph.attention.selection import HeadSelector, LayerRule, resolve_heads, resolve_layers
from flowgraph.errors import CaptureError, InvalidInputError

_WEIGHT_SUM = 0.02
"""How far weights that a layer hands out may be from summing to 1: bfloat16 rounds each by up to 2**-8."""


class AttentionRecorder:
    """Record the attention of chosen layers during any forward pass made inside a ``with`` block.

    The model keeps its own attention kernels, masks, logits, gradients and training mode; recording costs one
    reference to the query and key of each chosen layer. Compiled models run uncompiled inside the block.

    Args:
        model: a Hugging Face causal LM, PEFT-wrapped or not.
        layers: ``"middle"`` (the middle third), ``"all"``, ``"10-19"`` or indices.
        heads: ``"mean"``, ``"max"``, ``"global"``, ``"local"``, ``"receiver"``, indices, or a
            :class:`~flowgraph.HeadSelector`.
        edge_weight: ``"attention"``, or ``"value_norm"``: each weight times the norm of the value vector it
            reads, rows rescaled to their attention sum.

    Attributes:
        layers: indices of the layers recorded.
        seconds: time spent recording during the last pass (on a GPU: until its work was queued).

    Raises:
        CaptureError: the architecture cannot be captured.
        InvalidInputError: a layer or head choice outside the model.

    Example:
        with AttentionRecorder(model) as recorder:
            logits = model(input_ids, attention_mask=mask, use_cache=False).logits
        rows = recorder.rows(mask)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerRule = "middle",
        heads: str | Sequence[int] | HeadSelector = "mean",
        edge_weight: str = "attention",
    ) -> None:
        if edge_weight not in ("attention", "value_norm"):
            raise InvalidInputError(
                f"edge_weight: must be 'attention' or 'value_norm', got {edge_weight!r}; 'attention' is the default"
            )
        self.model = base_model(model)
        self._decoder, modules = text_decoder(self.model), attention_modules(self.model)
        config = self.model.config.get_text_config(decoder=True)
        num_layers = max(int(getattr(config, "num_hidden_layers", 0)), max(modules) + 1)
        chosen = resolve_layers(layers, num_layers)
        missing = [index for index in chosen if index not in modules]
        if missing and (not isinstance(layers, str) or len(missing) == len(chosen)):
            raise CaptureError(
                f"layers: must have softmax attention, got {missing} without any; {type(self.model).__name__} has it "
                f"in {sorted(modules)}, so choose among those"
            )
        self.layers = [index for index in chosen if index in modules]
        self.heads, self.edge_weight = resolve_heads(heads, _num_heads(config)), edge_weight
        self._modules = {modules[index]: index for index in self.layers}
        self._records: dict[int, LayerRecord | WeightedLayer] = {}
        self._mask: Bool[Tensor, "batch tokens"] | None = None
        self._running, self.seconds = False, 0.0
        self._watch: KernelWatch | None = None
        self._stack = ExitStack()

    def __enter__(self) -> AttentionRecorder:
        _refuse_block_masks(self.model)
        self._records.clear()
        with ExitStack() as stack:
            stack.enter_context(AttentionDispatch.heard_by(self))
            hooks = [
                self._decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
                self._decoder.register_forward_hook(self._end, always_call=True),
            ]
            for module in self._modules:
                if not uses_attention_interface(type(module)):
                    hooks.append(module.register_forward_pre_hook(self._begin_watching))
                    hooks.append(module.register_forward_hook(self._end_watching, always_call=True))
            for hook in hooks:
                stack.callback(hook.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def rows(
        self,
        attention_mask: Shaped[Tensor, "batch tokens"] | None = None,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
    ) -> AttentionRows:
        """The aggregated attention of the last forward pass.

        Args:
            attention_mask: 1 on tokens, 0 on padding; by default the mask that the pass was given.
            input_ids: the ids of the pass, positions counted from the mask: rows of prompts that several sequences
                share are then computed once.

        Raises:
            CaptureError: no pass was made, or a chosen layer did not run as attention.
        """
        missing = [index for index in self.layers if index not in self._records]
        if missing:
            raise CaptureError(
                f"model: the attention of {type(self.model).__name__} in layers {missing} was not seen; "
                "make one forward pass inside the with block, and please report the architecture if you did"
            )
        mask = self._mask if attention_mask is None else attention_mask
        records = [self._records[index] for index in self.layers]
        return AttentionRows(records, self.layers, HeadAggregator(self.heads), mask, input_ids)

    def wants(self, module: nn.Module) -> bool:
        """Whether this module's attention is to be recorded now (not when a checkpoint is recomputed)."""
        return self._running and module in self._modules

    def record(self, module: nn.Module, call: AttentionCall) -> None:
        """Keep what the rows of one layer need, after checking it against the layer's own output.

        Raises:
            CaptureError: cached keys, dropout, or an output that the eager function does not reproduce.
        """
        began = time.perf_counter()
        self._refuse_second_call(module)
        _refuse_unreadable(module, call)
        query, key, value = call.query.detach(), call.key.detach(), call.value.detach()
        with torch.no_grad():
            norm = value.float().norm(dim=-1) if self.edge_weight == "value_norm" else None
            record = LayerRecord(frozen(module), call.eager, query, key, norm, call.mask, call.options)
            record.verify(value, call.output.detach())
        self._records[self._modules[module]] = record
        self.seconds += time.perf_counter() - began

    def _refuse_second_call(self, module: nn.Module) -> None:
        if self._modules[module] in self._records:
            raise CaptureError(
                f"model: each attention module must run once in a pass, got a second run of "
                f"{type(module).__name__} in layer {self._modules[module]} of {type(self.model).__name__}; "
                "architectures that loop over layers, share them or combine several attentions cannot be captured"
            )

    def _begin(self, decoder: nn.Module, inputs: tuple, options: dict[str, Any]) -> None:
        if self._running:
            raise CaptureError(
                f"model: must make one forward pass at a time while recorded, got two at once in "
                f"{type(self.model).__name__}; use one recorder and one model per thread"
            )
        self._records.clear()
        self.seconds = 0.0
        mask = options.get("attention_mask")
        self._mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._running = True

    def _end(self, decoder: nn.Module, inputs: tuple, output: Any) -> None:
        self._running = False

    def _begin_watching(self, module: nn.Module, inputs: tuple) -> None:
        if self._running:
            self._watch = KernelWatch()
            self._watch.__enter__()

    def _end_watching(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        watch, self._watch = self._watch, None
        if watch is None:
            return
        watch.__exit__(None, None, None)
        if output is None:  # the module raised, and its own exception is on its way
            return
        for call in watch.calls:
            self.record(module, call)
        if not watch.calls:
            self._record_weights(module, output)

    def _record_weights(self, module: nn.Module, output: Any) -> None:
        """Aggregate the weights that a module returns beside its output, and let them go."""
        self._refuse_second_call(module)
        parts = output if isinstance(output, (tuple, list)) else (output,)
        weights = next((p for p in parts if isinstance(p, Tensor) and p.ndim == 4 and p.shape[-1] == p.shape[-2]), None)
        problem = None
        if weights is None:
            problem = "returns no attention weights; load the model with attn_implementation='eager' if it has one"
        elif self.edge_weight != "attention":
            problem = "gives no access to its value vectors; use edge_weight='attention'"
        else:
            readable = torch.ones(weights.shape[0], weights.shape[-1], dtype=torch.bool, device=weights.device)
            if self._mask is not None:
                readable = self._mask.to(weights.device)
            problem = _problem_of(weights.detach(), readable)
            if problem is None:
                layer = WeightedLayer.of(HeadAggregator(self.heads), weights.detach(), readable)
                self._records[self._modules[module]] = layer
        if problem is not None:
            raise CaptureError(
                f"model: {type(module).__name__} of {type(self.model).__name__} bypasses the attention interface and "
                f"{problem}"
            )


def _problem_of(
    weights: Float[Tensor, "batch heads tokens tokens"], readable: Bool[Tensor, "batch tokens"]
) -> str | None:
    """Why a tensor that looks like attention weights is none; rows of padding may hold anything."""
    for head in weights.unbind(1):  # one at a time: all heads are the largest tensor of the pass already
        rows = head.float() * readable[..., None]
        if bool(rows.triu(1).any()):
            return "reads future tokens; load a causal language model"
        off = (rows.sum(-1) - readable.float()).abs()
        if bool((rows < 0).any()) or not bool((off < _WEIGHT_SUM).all()):
            return "returns weights that do not sum to 1; call model.eval() to turn attention dropout off"
    return None


def _refuse_unreadable(module: nn.Module, call: AttentionCall) -> None:
    name = type(module).__name__
    if getattr(module, "is_causal", True) is False or call.options.get("is_causal") is False:
        raise CaptureError(
            f"model: its attention must be causal, got {name}, which is not; only causal attention forms a DAG over "
            "tokens, so load a causal language model"
        )
    if call.query.ndim != 4 or call.query.shape[2] != call.key.shape[2]:
        raise CaptureError(
            f"cache (past_key_values): must be empty, got queries of shape {tuple(call.query.shape)} and keys of shape "
            f"{tuple(call.key.shape)} in {name}; trace with one full pass and use_cache=False "
            "(architectures that compress their keys cannot be captured)"
        )
    if call.options.get("dropout"):
        raise CaptureError(
            f"model: attention dropout must be off, got {call.options['dropout']:g} in {name}; "
            "call model.eval() for the traced pass"
        )
    if call.mask is not None and not (isinstance(call.mask, Tensor) and call.mask.ndim in (2, 4)):
        raise CaptureError(
            f"model: the mask of its attention implementation ({type(call.mask).__name__}) cannot be read; "
            "call model.set_attn_implementation('sdpa') first"
        )


def _refuse_block_masks(model: nn.Module) -> None:
    """Flex attention keeps its mask as a compiled function: there is no row to read off it."""
    for module in model.modules():
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None) or ""
        if implementation.startswith(("flex", "paged")):
            raise CaptureError(
                f"model: its attention implementation must have readable masks, got {implementation!r}; "
                "call model.set_attn_implementation('sdpa') first"
            )


def _num_heads(config: Any) -> int | None:
    """None where the number differs between layers; transformers then refuses the attribute."""
    try:
        number = getattr(config, "num_attention_heads", None)
    except RuntimeError:
        return None
    return number if isinstance(number, int) and number > 0 else None
