"""Listen to a forward pass: record what each chosen attention layer was given, and change nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from flowgraph.attention.modules import attention_modules, base_model, eager_function, uses_attention_interface
from flowgraph.attention.records import LayerRecord
from flowgraph.attention.rows import AttentionRows, EagerLayer, HeadAggregator
from flowgraph.attention.selection import HeadSelector, LayerRule, resolve_heads, resolve_layers
from flowgraph.errors import CaptureError, InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AttentionRecorder:
    """Record the attention of chosen layers during any forward pass made inside a ``with`` block.

    The model keeps its own attention kernels, masks, logits, gradients and training mode; recording costs one
    reference to the query and key of each chosen layer. An architecture that does not dispatch through
    transformers' attention interface is run with its eager attention instead, one layer's weights at a time.

    Args:
        model: a Hugging Face causal LM, PEFT-wrapped or not.
        layers: ``"middle"`` (the middle third), ``"all"``, ``"10-19"`` or indices.
        heads: ``"mean"``, ``"max"``, ``"global"``, ``"local"``, ``"receiver"``, indices, or a
            :class:`~flowgraph.HeadSelector`.
        edge_weight: ``"attention"``, or ``"value_norm"``: each weight times the norm of the value vector it
            reads, rows rescaled to their attention sum.

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
            raise InvalidInputError(f"edge_weight: must be 'attention' or 'value_norm', got {edge_weight!r}; 'attention' is the default")
        self.model = base_model(model)
        modules = attention_modules(self.model)
        config = self.model.config.get_text_config(decoder=True)
        num_layers = max(int(getattr(config, "num_hidden_layers", 0)), max(modules) + 1)
        chosen = resolve_layers(layers, num_layers)
        missing = [index for index in chosen if index not in modules]
        if missing and (not isinstance(layers, str) or len(missing) == len(chosen)):
            raise CaptureError(
                f"layers: must have softmax attention, got {missing} without any; {type(self.model).__name__} has it in {sorted(modules)}"
            )
        self.layers = [index for index in chosen if index in modules]
        self._modules = {modules[index]: index for index in self.layers}
        num_heads = int(getattr(config, "num_attention_heads", 0)) or 1
        self.heads, self.edge_weight = resolve_heads(heads, num_heads), edge_weight
        self._interface = all(uses_attention_interface(type(module)) for module in self._modules)
        self._records: dict[int, LayerRecord | EagerLayer] = {}
        self._stack = ExitStack()

    def __enter__(self) -> AttentionRecorder:
        self._records.clear()
        if self._interface:
            self._stack.enter_context(_Interception.listen(self))
        else:
            self._stack.enter_context(_eager_attention(self.model))
            for module in self._modules:
                self._stack.callback(module.register_forward_hook(self._record_weights).remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def rows(self, attention_mask: Int[Tensor, "batch tokens"] | None = None) -> AttentionRows:
        """The aggregated attention of the last forward pass.

        Args:
            attention_mask: the padding mask that the forward pass was given, if any.

        Raises:
            CaptureError: no pass was made, or a chosen layer did not run as attention.
        """
        missing = [index for index in self.layers if index not in self._records]
        if missing:
            raise CaptureError(
                f"model: the attention of {type(self.model).__name__} in layers {missing} was not seen; "
                "make one forward pass inside the with block, and please report the architecture if you did"
            )
        return AttentionRows(
            [self._records[index] for index in self.layers], self.layers, self._aggregator(), attention_mask
        )

    def _aggregator(self) -> HeadAggregator:
        return HeadAggregator(self.heads, self.edge_weight)

    def wants(self, module: nn.Module) -> bool:
        """Whether this module's attention is to be recorded."""
        return module in self._modules

    def record(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any], output: Tensor
    ) -> None:
        """Keep what the rows of one layer need, after checking it against the layer's own output.

        Raises:
            CaptureError: cached keys, dropout, or an output that the eager function does not reproduce.
        """
        if getattr(module, "is_causal", True) is False or options.get("is_causal") is False:
            raise CaptureError(
                f"model: {type(module).__name__} is not causal; only causal attention forms a DAG over tokens, so load a causal language model"
            )
        if query.shape[2] != key.shape[2]:
            raise CaptureError(
                f"past_key_values: must be empty, got {key.shape[2] - query.shape[2]} cached tokens; trace with one full pass, use_cache=False"
            )
        if options.get("dropout"):
            raise CaptureError(f"model: attention dropout must be off, got {options['dropout']:g}; call model.eval() for the traced pass")
        if mask is not None and not isinstance(mask, Tensor):
            raise CaptureError(
                f"model: the mask of its attention implementation ({type(mask).__name__}) cannot be read; "
                "call model.set_attn_implementation('sdpa') first"
            )
        with torch.no_grad():
            record = LayerRecord(
                module, eager_function(module), query.detach(), key.detach(), value.detach().float().norm(dim=-1), mask, options
            )
            record.verify(value.detach(), output.detach())
        self._records[self._modules[module]] = record

    def _record_weights(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        """Forward hook for eager-only architectures: aggregate this layer's weights and let them go."""
        parts = output if isinstance(output, (tuple, list)) else (output,)
        weights = next((p for p in parts if isinstance(p, Tensor) and p.ndim == 4 and p.shape[-1] == p.shape[-2]), None)
        if weights is None or self.edge_weight != "attention":
            what = "returns no attention weights" if weights is None else "gives no access to its value vectors"
            raise CaptureError(
                f"model: {type(module).__name__} of {type(self.model).__name__} bypasses the attention interface and {what}; "
                "this architecture cannot be captured" + ("" if weights is None else " with edge_weight='value_norm'")
            )
        self._records[self._modules[module]] = EagerLayer(self._aggregator(), weights.detach())


class _Interception:
    """A transparent layer over transformers' table of attention functions, present while anyone listens.

    Each entry is replaced by one that calls the original and then tells the listeners. Models nobody listens
    to are unaffected, so nesting and threads are safe.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _listeners: ClassVar[list[AttentionRecorder]] = []
    _replaced: ClassVar[dict[str, Callable | None]] = {}

    @classmethod
    @contextmanager
    def listen(cls, recorder: AttentionRecorder) -> Iterator[None]:
        with cls._lock:
            cls._listeners.append(recorder)
            if len(cls._listeners) == 1:
                cls._install()
        try:
            yield
        finally:
            with cls._lock:
                cls._listeners.remove(recorder)
                if not cls._listeners:
                    cls._remove()

    @classmethod
    def _install(cls) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as table

        # "eager" has no entry: models pass their own function as the default, which an entry would hide.
        for name in ["eager", *table]:
            original = table.get(name)
            cls._replaced[name] = original
            table[name] = cls._listening(original)

    @classmethod
    def _remove(cls) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as table

        for name, original in cls._replaced.items():
            del table[name]
            if original is not None and table.get(name) is not original:
                table[name] = original  # it was a local entry before, so put it back as one
        cls._replaced.clear()

    @classmethod
    def _listening(cls, original: Callable | None) -> Callable:
        def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any):
            function = original or eager_function(module)
            result = function(module, query, key, value, attention_mask, **options)
            for recorder in list(cls._listeners):
                if recorder.wants(module):
                    recorder.record(module, query, key, value, attention_mask, options, result[0])
            return result

        return attention


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run an architecture with its eager attention, and put back what was there."""
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config") and hasattr(part.config, "_attn_implementation")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    for config, _ in before:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
