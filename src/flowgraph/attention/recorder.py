"""Record the inputs of each chosen attention layer during a forward pass, without changing the pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from flowgraph.attention.attention_rows import AttentionRows, Layer, Reduction, WeightedLayer
from flowgraph.attention.head_aggregation import HeadAggregator
from flowgraph.attention.interception import AttentionCall, AttentionDispatch, KernelWatch
from flowgraph.attention.layer_record import LayerRecord, frozen
from flowgraph.attention.layers_and_heads import HeadSelector, LayerRule, resolve_heads, resolve_layers
from flowgraph.attention.modules import (
    attention_implementation,
    attention_modules,
    base_model,
    num_layers,
    num_query_heads,
    text_decoder,
    uses_attention_interface,
)
from flowgraph.attention.sharpened_layer import (
    PowerPlace,
    SharpenedLayer,
    checked_place,
    checked_power,
    sharpened,
)
from flowgraph.errors import CaptureError, InvalidInputError

_WEIGHT_SUM = 0.02
"""Largest deviation from 1 of the sum of weights that a layer returns: bfloat16 rounds each by up to 2**-8."""


class AttentionRecorder:
    """A recorder of the attention of chosen layers during any forward pass made inside a ``with`` block.

    The model keeps its own attention kernels, masks, logits, gradients and training mode. Recording keeps one
    reference to the query and key of each chosen layer. Compiled models run uncompiled inside the block.

    Args:
        model: a Hugging Face causal LM, PEFT-wrapped or not.
        layers: ``"middle"`` (the middle third), ``"upper"`` (from one third up), ``"all"``, ``"10-19"``, ``"10-"`` or
            indices.
        heads: ``"mean"``, ``"max"``, ``"global"``, ``"local"``, ``"receiver"``, indices, or a
            :class:`~flowgraph.HeadSelector`.
        edge_weight: ``"attention"``, or ``"value_norm"``: each weight times the norm of the value vector it
            reads, rows rescaled to their attention sum.
        power: p, to record the rows of ``capture(..., capacity="sharpened")`` instead; ``place`` then joins the heads.
        place: of the power: ``"pre"``, ``"post"``, or ``"max"`` (the maximum over heads and layers).

    Attributes:
        layers: indices of the layers recorded.
        seconds: time spent recording during the last pass; on a GPU, the model's own queued work is waited for
            before the clock starts.

    Raises:
        CaptureError: the architecture cannot be captured.
        InvalidInputError: a layer or head choice outside the model, a power outside its range, or a power together
            with ``heads`` or ``edge_weight``.

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
        power: float | None = None,
        place: PowerPlace = "pre",
    ) -> None:
        if edge_weight not in ("attention", "value_norm"):
            raise InvalidInputError(
                f"edge_weight: must be 'attention' or 'value_norm', got {edge_weight!r}; 'attention' is the default"
            )
        self.place: PowerPlace = checked_place(place)
        self.power = power
        if power is not None:
            self.power = checked_power(power)
            _refuse_with_power(heads, edge_weight)
        self.model = base_model(model)
        self._decoder = text_decoder(self.model)
        modules = attention_modules(self.model)

        # Names and ranges of layers pass over those without softmax attention; indices must have it.
        chosen = resolve_layers(layers, num_layers(self.model, modules))
        missing = [index for index in chosen if index not in modules]
        is_listed = not isinstance(layers, str)
        if missing and (is_listed or len(missing) == len(chosen)):
            raise CaptureError(
                f"layers: must have softmax attention, got {missing} without any; {type(self.model).__name__} has it "
                f"in {sorted(modules)}, so choose among those"
            )
        self.layers = [index for index in chosen if index in modules]
        self.heads = resolve_heads(heads, num_query_heads(self.model))
        self.edge_weight = edge_weight
        self.seconds = 0.0

        # The layer of each recorded module, and what the running or latest pass recorded of each layer.
        self._modules = {modules[index]: index for index in self.layers}
        self._records: dict[int, LayerRecord | WeightedLayer] = {}
        self._mask: Bool[Tensor, "batch tokens"] | None = None
        self._running = False
        self._watch: KernelWatch | None = None
        self._stack = ExitStack()

    def __enter__(self) -> AttentionRecorder:
        """Start to record: listen to the attention interface, and watch the modules that do not use it."""
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
                    # First of all hooks: FSDP2 and ZeRO-3 release the weights of a module in a hook of theirs.
                    hooks.append(module.register_forward_hook(self._end_watching, always_call=True, prepend=True))
            for hook in hooks:
                stack.callback(hook.remove)
            # Nothing failed, so the hooks stay until the block ends.
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove all hooks."""
        self._stack.close()

    def rows(
        self,
        attention_mask: Shaped[Tensor, "batch tokens"] | None = None,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
    ) -> AttentionRows:
        """Return the aggregated attention of the last forward pass.

        Args:
            attention_mask: 1 on tokens, 0 on padding; by default the mask that the pass was given.
            input_ids: the ids of the pass, with positions counted from the mask. With them, the rows of a prompt that
                several sequences share are computed once.

        Raises:
            CaptureError: no pass was made, or a chosen layer did not run as attention.

        Cost: small; rows are computed when they are read. A :class:`~flowgraph.HeadSelector` computes all rows once.
        """
        missing = [index for index in self.layers if index not in self._records]
        if missing:
            raise CaptureError(
                f"model: the attention of {type(self.model).__name__} in layers {missing} was not seen; "
                "make one forward pass inside the with block, and please report the architecture if you did"
            )
        mask = self._mask if attention_mask is None else attention_mask
        records = [self._records[index] for index in self.layers]
        if self.power is None:
            return AttentionRows(records, self.layers, HeadAggregator(self.heads), mask, input_ids)

        layers: list[Layer] = []
        for record in records:
            is_stored = isinstance(record, WeightedLayer)
            layers.append(record if is_stored else SharpenedLayer(record, self.power, self.place))
        reduction: Reduction = "max" if self.place == "max" else "mean"
        rows = AttentionRows.of_layers(layers, self.layers, mask, input_ids, reduction=reduction)
        # Rows of a power do not sum to 1; this is the normalization of the capacity "sharpened".
        rows.normalization = "leak"
        return rows

    def wants(self, module: nn.Module) -> bool:
        """Return whether this module's attention is to be recorded now (not when a checkpoint is recomputed)."""
        return self._running and module in self._modules

    def record(self, module: nn.Module, call: AttentionCall) -> None:
        """Keep the inputs from which one layer's rows are recomputed, after a check against the layer's output.

        Raises:
            CaptureError: cached keys, dropout, or an output that the eager function does not reproduce.
        """
        if call.query.is_cuda:  # the check below waits for the GPU, and the layers before are not its doing
            torch.cuda.synchronize(call.query.device)
        began = time.perf_counter()
        self._refuse_second_call(module)
        _refuse_unreadable(module, call)
        value = call.value.detach()
        with torch.no_grad():
            value_norm = None
            if self.edge_weight == "value_norm":
                value_norm = value.float().norm(dim=-1)
            record = LayerRecord(
                module=frozen(module),
                eager=call.eager,
                query=call.query.detach(),
                key=call.key.detach(),
                value_norm=value_norm,
                mask=call.mask,
                options=call.options,
            )
            record.verify(value, call.output.detach())
        self._records[self._modules[module]] = record
        self.seconds += time.perf_counter() - began

    def _refuse_second_call(self, module: nn.Module) -> None:
        """Refuse a module that runs twice in a pass, because its layer would have two sets of rows."""
        if self._modules[module] in self._records:
            raise CaptureError(
                f"model: each attention module must run once in a pass, got a second run of "
                f"{type(module).__name__} in layer {self._modules[module]} of {type(self.model).__name__}; "
                "architectures that loop over layers, share them or combine several attentions cannot be captured"
            )

    def _begin(self, decoder: nn.Module, inputs: tuple, options: dict[str, Any]) -> None:
        """Forget the previous pass; called before the stack of layers runs."""
        if self._running:
            raise CaptureError(
                f"model: must make one forward pass at a time while recorded, got two at once in "
                f"{type(self.model).__name__}; use one recorder and one model per thread"
            )
        self._records.clear()
        self.seconds = 0.0
        # A four-dimensional mask tells nothing about padding.
        mask = options.get("attention_mask")
        self._mask = None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self._mask = mask.bool()
        self._running = True

    def _end(self, decoder: nn.Module, inputs: tuple, output: Any) -> None:
        """Stop recording; called after the stack of layers ran or raised."""
        self._running = False

    def _begin_watching(self, module: nn.Module, inputs: tuple) -> None:
        """Watch the kernels of a module outside the attention interface; called before it runs."""
        if self._running:
            self._watch = KernelWatch()
            self._watch.__enter__()

    def _end_watching(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        """Record the kernels that the module called, or the weights that it returned; called after it ran."""
        watch = self._watch
        self._watch = None
        if watch is None:
            return
        watch.__exit__(None, None, None)
        # Without an output the module raised; its own exception is propagating.
        if output is None:
            return
        for call in watch.calls:
            self.record(module, call)
        if not watch.calls:
            self._record_weights(module, output)

    def _record_weights(self, module: nn.Module, output: Any) -> None:
        """Aggregate the weights that a module returns beside its output, and keep only the result."""
        self._refuse_second_call(module)
        weights = _returned_weights(output)
        if weights is None:
            raise self._bypass_error(
                module, "returns no attention weights; load the model with attn_implementation='eager' if it has one"
            )
        if self.edge_weight != "attention":
            raise self._bypass_error(module, "gives no access to its value vectors; use edge_weight='attention'")

        if self._mask is not None:
            readable = self._mask.to(weights.device)
        else:
            batch_size, _, num_tokens, _ = weights.shape
            readable = torch.ones(batch_size, num_tokens, dtype=torch.bool, device=weights.device)
        problem = _problem_of(weights, readable)
        if problem is not None:
            raise self._bypass_error(module, problem)
        if self.power is None:
            layer = WeightedLayer.of(HeadAggregator(self.heads), weights, readable)
        else:
            layer = WeightedLayer(sharpened(weights.float(), self.power, self.place))
        self._records[self._modules[module]] = layer

    def _bypass_error(self, module: nn.Module, problem: str) -> CaptureError:
        """Build the error for a module outside the attention interface whose weights cannot be used."""
        return CaptureError(
            f"model: {type(module).__name__} of {type(self.model).__name__} bypasses the attention interface and "
            f"{problem}"
        )


def _returned_weights(output: Any) -> Float[Tensor, "batch heads tokens tokens"] | None:
    """Find the attention weights in a module's output: the first square four-dimensional tensor."""
    parts = output if isinstance(output, (tuple, list)) else (output,)
    for part in parts:
        if isinstance(part, Tensor) and part.ndim == 4 and part.shape[-1] == part.shape[-2]:
            return part.detach()
    return None


def _problem_of(
    weights: Float[Tensor, "batch heads tokens tokens"], readable: Bool[Tensor, "batch tokens"]
) -> str | None:
    """Describe why a tensor is not attention weights, or return None; rows of padding may hold anything."""
    # One head at a time, because all heads together are the largest tensor of the pass.
    for head in weights.unbind(1):
        rows = head.float() * readable[..., None]
        if bool(rows.triu(1).any()):
            return "reads future tokens; load a causal language model"
        deviation = (rows.sum(-1) - readable.float()).abs()
        is_negative = bool((rows < 0).any())
        # Written so that a sum of NaN is refused too.
        sums_to_one = bool((deviation < _WEIGHT_SUM).all())
        if is_negative or not sums_to_one:
            return "returns weights that do not sum to 1; call model.eval() to turn attention dropout off"
    return None


def _refuse_unreadable(module: nn.Module, call: AttentionCall) -> None:
    """Refuse attention that is not causal, reads cached keys, has dropout on or an unreadable mask."""
    name = type(module).__name__
    is_bidirectional = getattr(module, "is_causal", True) is False or call.options.get("is_causal") is False
    if is_bidirectional:
        raise CaptureError(
            f"model: its attention must be causal, got {name}, which is not; only causal attention forms a DAG over "
            "tokens, so load a causal language model"
        )
    # With cached keys there are more keys than queries.
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
    # Padding masks have two dimensions, masks of cells four.
    is_tensor_mask = isinstance(call.mask, Tensor) and call.mask.ndim in (2, 4)
    if call.mask is not None and not is_tensor_mask:
        raise CaptureError(
            f"model: the mask of its attention implementation ({type(call.mask).__name__}) cannot be read; "
            "call model.set_attn_implementation('sdpa') first"
        )


def _refuse_with_power(heads: Any, edge_weight: str) -> None:
    """Refuse settings that a power leaves without effect: ``place`` says how the heads are joined."""
    if heads != "mean":
        raise InvalidInputError(
            f"heads: must be left out with a power, got {heads!r}; place='max' takes the maximum over heads, 'pre' and "
            "'post' their mean"
        )
    if edge_weight != "attention":
        raise InvalidInputError(
            f"edge_weight: must be 'attention' with a power, got {edge_weight!r}; leave the power out for value norms"
        )


def _refuse_block_masks(model: nn.Module) -> None:
    """Refuse flex and paged attention: their masks are compiled functions, from which no row can be read."""
    for module in model.modules():
        implementation = attention_implementation(module)
        if implementation.startswith(("flex", "paged")):
            raise CaptureError(
                f"model: its attention implementation must have readable masks, got {implementation!r}; "
                "call model.set_attn_implementation('sdpa') first"
            )
