"""The capacities of the package: importing this module registers them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowgraph.attention.attention_rows import AttentionRows, Layer
from flowgraph.attention.interception import AttentionDispatch
from flowgraph.attention.layers_and_heads import resolve_layers
from flowgraph.attention.modules import attention_modules, is_sharded, num_layers
from flowgraph.attention.recorder import AttentionRecorder
from flowgraph.attention.sharpened_layer import SharpenedLayer, checked_place, checked_power
from flowgraph.capacities.forward import CentredLayer, ProjectionTape, VtraceLayer
from flowgraph.capacities.gradient import Form, GradientRows, capture_gradient
from flowgraph.capacities.registry import CapacityInput, capacity
from flowgraph.capacities.relevance import RelevanceRows, capture_relevance
from flowgraph.capacities.tape import Tape
from flowgraph.errors import CaptureError, InvalidInputError

_POWERS = {"power": 2.0, "place": "pre", "layers": "upper"}


@capacity(
    "attention", defaults={"layers": "middle", "heads": "mean", "edge_weight": "attention"}, normalization="attention"
)
def attention(batch: CapacityInput) -> AttentionRows:
    """Mean attention of the middle third of the layers (arXiv 2606.10646); heads and layers can be chosen."""
    recorder = AttentionRecorder(
        batch.wrapped,
        layers=batch.options["layers"],
        heads=batch.options["heads"],
        edge_weight=batch.options["edge_weight"],
    )
    with torch.no_grad(), recorder:
        _forward(batch)
    return recorder.rows(batch.attention_mask, batch.input_ids)


@capacity("value_norm", defaults={"layers": "middle", "heads": "mean"}, normalization="attention")
def value_norm(batch: CapacityInput) -> AttentionRows:
    """Attention times the norm of the value vector that is read, rows rescaled to their attention sum."""
    recorder = AttentionRecorder(
        batch.wrapped, layers=batch.options["layers"], heads=batch.options["heads"], edge_weight="value_norm"
    )
    with torch.no_grad(), recorder:
        _forward(batch)
    return recorder.rows(batch.attention_mask, batch.input_ids)


@capacity("sharpened", defaults=_POWERS, normalization="leak", score="potential")
def sharpened(batch: CapacityInput) -> AttentionRows:
    """Attention to a power, so that lookups by one or a few heads are not averaged away."""
    power = checked_power(batch.options["power"])
    place = checked_place(batch.options["place"])
    tape, indices = _recorded(batch)
    layers: list[Layer] = [SharpenedLayer(tape.layers[index].record, power, place) for index in indices]
    reduction = "max" if place == "max" else "mean"
    return AttentionRows.of_layers(layers, indices, batch.attention_mask, batch.input_ids, reduction=reduction)


@capacity("sharp", defaults={"layers": "upper"}, normalization="leak", score="potential")
def sharp(batch: CapacityInput) -> AttentionRows:
    """Mean over heads of squared attention, layers from one third up, rows that leak: the cheapest sharp graph."""
    return sharpened(_with(batch, power=2.0, place="pre"))


@capacity("sharp_max", defaults={"layers": "1-"})
def sharp_max(batch: CapacityInput) -> AttentionRows:
    """Fourth power of the maximum over heads and layers above the first, rows renormalised (used for token credit)."""
    return sharpened(_with(batch, power=4.0, place="max"))


@capacity("centred", defaults={"layers": "middle"}, normalization="leak", score="potential")
def centred(batch: CapacityInput) -> AttentionRows:
    """Mean attention minus what each token receives on average: removes attention sinks without naming them."""
    tape, indices = _recorded(batch)
    layers: list[Layer] = [CentredLayer.of(tape.layers[index].record, batch.readable) for index in indices]
    # The mean over readers depends on the complete text, so equal prefixes have different rows.
    return AttentionRows.of_layers(layers, indices, batch.attention_mask, None)


@capacity("vtrace", defaults={"layers": "all"}, normalization="leak", score="potential")
def vtrace(batch: CapacityInput) -> AttentionRows:
    """Agreement of each moved value with what its attention block writes (Yuan et al. 2026)."""
    return _vtrace(batch, None)


@capacity("vtrace_share", defaults={"layers": "all", "power": 2.0}, normalization="leak", score="potential")
def vtrace_share(batch: CapacityInput) -> AttentionRows:
    """VTRACE as shares of each row and layer, to a power: sharp, and rows that read nothing sharply pass on little."""
    return _vtrace(batch, checked_power(batch.options["power"]))


@capacity(
    "gradient",
    defaults={"answer": None, "target": "margin", "layers": "all"},
    signed=True,
    gradient=True,
    normalization="none",
)
def gradient(batch: CapacityInput) -> GradientRows:
    """Derivative of the answer's score by the strength of each edge, signed: what changes if it is cut a little."""
    return _gradient(batch, "net")


@capacity(
    "gradient_positive",
    defaults={"answer": None, "target": "margin", "layers": "all"},
    gradient=True,
    normalization="leak",
    score="potential",
)
def gradient_positive(batch: CapacityInput) -> GradientRows:
    """Sum over layers of the positive part of the gradient, heads summed; its row sums say which positions matter."""
    return _gradient(batch, "positive")


@capacity(
    "relevance",
    defaults={"answer": None, "generated": None, "target": "margin", "hops": 0, "keep_tape": False, "streamed": False},
    signed=True,
    gradient=True,
    normalization="none",
)
def relevance(batch: CapacityInput) -> RelevanceRows:
    """Conserved relevance: a signed flow that one linearised backward pass of the model makes itself."""
    options = batch.options
    shape = tuple(batch.input_ids.shape)
    answer = _checked_answer(batch, "relevance")
    hops = options["hops"]
    if isinstance(hops, bool) or not isinstance(hops, int) or hops < 0:
        raise InvalidInputError(f"hops: must be at least 0, got {hops!r}; 0 makes no emission hop, 6 is enough")
    generated = options["generated"]
    if generated is None and hops:
        raise InvalidInputError(
            "generated: must be given with hops, got none; pass a mask of the tokens that the model produced"
        )
    if generated is not None:
        generated = _checked_tokens("generated", generated, shape, batch.input_ids.device)
    target = _checked_target(batch, options["target"])
    inputs = _inputs(batch)
    keep_tape = options["keep_tape"]
    if not isinstance(keep_tape, bool):
        raise InvalidInputError(f"keep_tape: must be True or False, got {keep_tape!r}; True keeps what by_head reads")
    streamed = options["streamed"]
    if not isinstance(streamed, bool):
        raise InvalidInputError(f"streamed: must be True or False, got {streamed!r}; True makes no T x T matrix")
    return capture_relevance(
        batch.model,
        inputs,
        answer=answer,
        generated=generated,
        target=target,
        hops=hops,
        keep_tape=keep_tape,
        streamed=streamed,
    )


def _gradient(batch: CapacityInput, form: Form) -> GradientRows:
    name = "gradient" if form == "net" else "gradient_positive"
    answer = _checked_answer(batch, name)
    target = _checked_target(batch, batch.options["target"])
    modules, _ = _chosen_modules(batch)
    return capture_gradient(batch.model, modules, _inputs(batch), answer=answer, target=target, form=form)


def _inputs(batch: CapacityInput) -> dict[str, Any]:
    """Return the arguments of a pass whose logits are read."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return inputs | {name: value for name, value in batch.arguments.items() if name != "logits_to_keep"}


def _checked_answer(batch: CapacityInput, name: str) -> Tensor:
    """Check the mask of the tokens to explain: at least one in every sequence."""
    answer = batch.options["answer"]
    if answer is None:
        raise InvalidInputError(
            f"answer: must be given with capacity={name!r}, got none; pass a mask of the tokens to explain"
        )
    answer = _checked_tokens("answer", answer, tuple(batch.input_ids.shape), batch.input_ids.device)
    if not bool(answer.any(-1).all()):
        raise InvalidInputError(
            "answer: must mark at least one token of every sequence, got none; pass a mask of the tokens to explain"
        )
    return answer


def _vtrace(batch: CapacityInput, share_power: float | None) -> AttentionRows:
    modules, indices = _chosen_modules(batch)
    tape = ProjectionTape(modules, batch.readable)
    with tape:
        _listen(batch, tape)
    layers: list[Layer] = []
    for index in indices:
        layer = tape.layers[index]
        if layer.reader is None:
            raise CaptureError(
                f"model: its attention must end in one linear projection, got none in layer {index} of "
                f"{type(batch.model).__name__}; use capacity='sharp'"
            )
        layers.append(VtraceLayer(layer, share_power))
    # Values are centred over the complete text, so equal prefixes have different rows.
    return AttentionRows.of_layers(layers, indices, batch.attention_mask, None)


def _recorded(batch: CapacityInput) -> tuple[Tape, list[int]]:
    """Record the chosen attention layers of one pass."""
    modules, indices = _chosen_modules(batch)
    tape = Tape(modules)
    _listen(batch, tape)
    return tape, indices


def _chosen_modules(batch: CapacityInput) -> tuple[dict[nn.Module, int], list[int]]:
    modules = attention_modules(batch.model)
    chosen = resolve_layers(batch.options["layers"], num_layers(batch.model, modules))
    indices = [index for index in chosen if index in modules]
    if not indices:
        raise CaptureError(
            f"layers: must have softmax attention, got {chosen} without any; {type(batch.model).__name__} has it in "
            f"{sorted(modules)}, so choose among those"
        )
    return {modules[index]: index for index in indices}, indices


def _listen(batch: CapacityInput, tape: Tape) -> None:
    with torch.no_grad(), AttentionDispatch.heard_by(tape):
        tape.listening = True
        _forward(batch)
        tape.listening = False
    missing = sorted(set(tape.modules.values()) - set(tape.layers))
    if missing:
        raise CaptureError(
            f"model: its attention must go through transformers' AttentionInterface, got layers {missing} of "
            f"{type(batch.model).__name__} that bypass it; use capacity='attention'"
        )


def _forward(batch: CapacityInput) -> None:
    # Weights that processes share are gathered by the outermost module; complete ones are read without wrappers.
    model = batch.wrapped if is_sharded(batch.model) else batch.model
    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.arguments, use_cache=False)


def _with(batch: CapacityInput, **options: Any) -> CapacityInput:
    from dataclasses import replace

    return replace(batch, options={**batch.options, **options})


def _checked_tokens(name: str, mask: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    mask = torch.as_tensor(mask)
    if mask.ndim == 1:
        mask = mask[None]
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise InvalidInputError(
            f"{name}: must have the shape of input_ids {shape}, got {tuple(mask.shape)} of {mask.dtype}; pass a "
            "boolean mask of tokens"
        )
    return mask.to(device)


def _checked_target(batch: CapacityInput, target: Any) -> Any:
    if isinstance(target, str):
        if target not in ("margin", "logprob"):
            raise InvalidInputError(
                f"target: must be 'margin', 'logprob' or token ids, got {target!r}; 'margin' is the default"
            )
        return target
    ids = torch.as_tensor(target)
    if ids.ndim == 1:
        ids = ids[None]
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.shape != batch.input_ids.shape:
        raise InvalidInputError(
            f"target: must be integers of the shape of input_ids {tuple(batch.input_ids.shape)}, got {ids.dtype} of "
            f"shape {tuple(ids.shape)}; those at the answer's positions are contrasted with"
        )
    vocabulary = batch.model.get_input_embeddings().num_embeddings  # type: ignore[union-attr]
    if int(ids.min()) < 0 or int(ids.max()) >= int(vocabulary):  # type: ignore[arg-type]
        raise InvalidInputError(
            f"target: must lie in 0..{int(vocabulary) - 1}, got {int(ids.min())}..{int(ids.max())}; use the tokenizer "  # type: ignore[arg-type]
            "that belongs to this model"
        )
    return ids.to(batch.input_ids.device)
