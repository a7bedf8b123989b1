r"""Gradient capacities: what changes in the answer's score if an edge is cut a little.

One plain forward and backward pass, without any rule. With z[l, h, t] = sum over s of A[l, h, t, s] v[l, h, s] the
output of a head before the output projection, and L the target summed over the answer's tokens,

.. math::
    R[l, h, t, s] = A[l, h, t, s] \, \langle v[l, h, s], dL/dz[l, h, t] \rangle
    = \left. \frac{dL}{d\lambda} \right|_{\lambda = 1}, \quad A[l, h, t, s] \to \lambda A[l, h, t, s]

is the derivative of L by the relative strength of one attention weight. The signed net form sums it over layers and
heads, N[t, s] for s < t. The positive form is

.. math:: C[t, s] = \sum_l \max\left(0, \sum_h R[l, h, t, s]\right)

Unlike conserved relevance, neither form is conserved: gradients flow through norms, gates and attention weights. Sums
of a row of C say how much the position t matters to the answer (:attr:`GradientRows.demand`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor, nn

from flowgraph.attention.attention_rows import AttentionRows, Layer
from flowgraph.attention.capture import check_fits, checked_ids, evaluating, forward_arguments, input_device
from flowgraph.attention.interception import AttentionDispatch
from flowgraph.attention.layer_record import in_steps
from flowgraph.attention.modules import base_model, first_block, text_decoder
from flowgraph.capacities.predictions import Target, forward_logits, objective_of, predicting_rows
from flowgraph.capacities.tape import Tape, TapeLayer
from flowgraph.errors import CaptureError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Form = Literal["net", "positive"]

_PROBE_SIZE = 0.1
"""Change of a module's input that shows whether its output depends on it, relative to the input's mean size."""


@dataclass(frozen=True)
class GradientLayer:
    """The derivatives R of one layer, heads summed.

    Attributes:
        tape: attention, values, and dL/dz as reader vectors.
        form: ``"net"``: the sum over heads, 0 on the diagonal; ``"positive"``: its positive part.
    """

    tape: TapeLayer
    form: Form

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences and tokens."""
        return self.tape.record.shape

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self.tape.record.device

    def select(self, items: slice | Tensor) -> GradientLayer:
        """Return the layer of some sequences of the batch."""
        assert self.tape.reader is not None
        part = TapeLayer(self.tape.record.select(items), self.tape.value[items], self.tape.reader[items])
        return GradientLayer(part, self.form)

    def block(self, start: int, stop: int) -> Float[Tensor, "batch block stop"]:
        """Recompute the rows of the readers ``[start, stop)`` over the tokens ``[0, stop)``."""
        rows = in_steps(self.tape.record, lambda first, last: self.tape.products(first, last).sum(1), start, stop)
        if self.form == "positive":
            # The diagonal stays: under emission rows it is the edge from the position that wrote the token.
            return rows.clamp_min_(0)
        return rows.tril_(start - 1)

    def head_block(self, start: int, stop: int) -> Float[Tensor, "batch heads block stop"]:
        """Recompute the same rows for each head; their sum over heads is :meth:`block`."""
        products = self.tape.products(start, stop)
        if self.form == "positive":
            return products * (products.sum(1, keepdim=True) > 0)
        return products.tril(start - 1)


class GradientRows(AttentionRows):
    """The gradient capacities of a batch: sums over layers, computed a block at a time.

    Attributes:
        form: ``"net"`` (signed) or ``"positive"``.
        target: what was differentiated.
        value: ``[batch]`` the target of each sequence, summed over its answer tokens.
    """

    normalization = "none"
    form: Form
    target: str
    value: Float[Tensor, " batch"]

    @property
    def demand(self) -> Float[Tensor, "batch tokens"]:
        """Sum of each row: how much the position t matters to the answer. Cost: one read of the rows."""
        sums = torch.zeros(self.batch_size, self.num_tokens, device=self.device)
        for start, rows in self.blocks():
            sums[:, start : start + rows.shape[1]] = rows.sum(-1)
        return sums

    def __repr__(self) -> str:
        return f"GradientRows({self.batch_size} x {self.num_tokens} tokens, {self.form}, target={self.target})"


def capture_gradient(
    model: PreTrainedModel,
    modules: Mapping[nn.Module, int],
    inputs: dict[str, Any],
    *,
    answer: Bool[Tensor, "batch tokens"],
    target: Target | Int64[Tensor, "batch tokens"],
    form: Form,
) -> GradientRows:
    """Run one forward and one backward pass; return R summed over layers and heads.

    Args:
        model: the transformers model, in evaluation mode.
        modules: attention module -> layer index, of the layers that are summed.
        inputs: arguments of its forward pass, with ``input_ids`` and ``attention_mask``.
        answer: tokens whose prediction is explained.
        target: as for relevance.
        form: ``"net"`` or ``"positive"``.

    Raises:
        CaptureError: a module that breaks the gradient (it runs without gradients, or its kernel has no backward
            pass), by its name.
        InvalidInputError: an answer on padding or on the first token.

    Cost: one forward and one backward pass; memory of the activations of one pass, and of queries, keys, values and
    dL/dz of every layer.
    """
    # Tensors made under inference_mode cannot take part in a backward pass; their copies can.
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
            copied_target = target.clone() if isinstance(target, Tensor) else target
            return capture_gradient(model, modules, copies, answer=answer.clone(), target=copied_target, form=form)
    _refuse_inference_tensors(model)

    # Row k - 1 predicts token k, so only these rows need logits.
    ids = inputs["input_ids"]
    mask = inputs["attention_mask"].bool()
    rows = predicting_rows(answer, mask)

    # The tape keeps A and v of each layer in the forward pass, and dL/dz in the backward pass.
    tape = Tape(dict(modules), gradients=True)
    watch = GradientWatch(model, tape)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(AttentionDispatch.heard_by(tape))
        stack.enter_context(watch)
        tape.listening = True
        logits, rows = forward_logits(model, inputs, rows)
        tape.listening = False
        watch.require_unbroken(logits)
        # One objective per sequence: sequences are independent, so the gradient of the sum holds that of each.
        objectives = []
        for item, item_target in enumerate(_per_sequence(target, len(ids))):
            one = slice(item, item + 1)
            objectives.append(objective_of(logits[one], rows, ids[one], answer[one], item_target))
        per_sequence = torch.stack(objectives)
        watch.backward(per_sequence.sum())

    # A layer that the tape did not hear would be missing from the sum over layers without notice.
    missing = sorted(index for index in tape.modules.values() if index not in tape.layers)
    if missing:
        raise CaptureError(
            f"model: its attention must go through transformers' AttentionInterface, got layers {missing} of "
            f"{type(model).__name__} that bypass it; use capacity='attention'"
        )
    # R[t, s] stays in factors per layer; rows are made from them block by block on demand.
    layers = _layers_of(model, tape, form)
    found = GradientRows.of_layers(layers, sorted(tape.layers), inputs["attention_mask"], None, reduction="sum")
    assert isinstance(found, GradientRows)
    found.form = form
    found.target = target if isinstance(target, str) else "contrast"
    found.value = per_sequence.detach()
    return found


@dataclass(frozen=True, eq=False)
class InputGradient:
    """The gradient of the answer's score at the input of the first block, of one text.

    Attributes:
        x0: ``[tokens, width]``, the input of the first block: embeddings, scaled and with learned positions where the
            model has them.
        gradient: ``[tokens, width]``, dL/dx0; 0 at tokens that the target does not depend on.
        value: L, the target summed over the answer's tokens.
    """

    x0: Float[Tensor, "tokens width"]
    gradient: Float[Tensor, "tokens width"]
    value: float

    @property
    def product(self) -> Float64[Tensor, " tokens"]:
        r"""Gradient x input of each token, signed: :math:`\langle x_0[t], dL/dx_0[t] \rangle`, in units of L."""
        return (self.x0.double() * self.gradient.double()).sum(-1).cpu()

    @property
    def norm(self) -> Float64[Tensor, " tokens"]:
        r"""Euclidean norm of each token's gradient: :math:`\lVert dL/dx_0[t] \rVert`."""
        return self.gradient.double().norm(dim=-1).cpu()


def capture_input_gradient(
    model: nn.Module,
    token_ids: Int[Tensor, " tokens"],
    answer: Bool[Tensor, " tokens"],
    target: Target = "logprob",
) -> InputGradient:
    """Run one forward and one backward pass; return the input of the first block and the gradient there.

    It is the plain derivative, without the linear rules of conserved relevance.

    Args:
        model: a Hugging Face causal LM; it runs in evaluation mode.
        token_ids: prompt and response.
        answer: mask of the tokens that are explained.
        target: ``"logprob"``, the log-probability of the answer's tokens, or ``"margin"`` over the best other token.

    Raises:
        CaptureError: a module that breaks the gradient, by its name; NaN or infinity in the gradient.
        InvalidInputError: ids that do not fit the model, or an answer that no earlier token predicts.

    Cost: one forward and one backward pass, and their activations.
    """
    if torch.is_inference_mode_enabled():
        # Tensors made under inference_mode cannot take part in a backward pass; their copies can.
        with torch.inference_mode(False):
            return capture_input_gradient(model, token_ids.clone(), answer.clone(), target)
    # What cannot work is refused before the pass.
    inner = base_model(model)
    _refuse_inference_tensors(inner)
    ids = checked_ids(token_ids)
    ids = ids.to(input_device(inner, ids.device))
    mask = torch.ones_like(ids)
    check_fits(inner, ids, mask)
    explained = answer[None].to(ids.device)
    # The logits of the answer's rows are read, so their number is chosen by the pass itself.
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **forward_arguments(inner, mask)}
    inputs.pop("logits_to_keep", None)

    # The watch starts the gradient at the first block and names a module that loses it.
    watch = GradientWatch(inner, Tape({}))
    with evaluating(inner), torch.enable_grad(), watch:
        logits, rows = forward_logits(inner, inputs, predicting_rows(explained, mask.bool()))
        watch.require_unbroken(logits)
        objective = objective_of(logits, rows, ids, explained, target)
        gradient = watch.backward(objective)
    # A score of NaN would sort anywhere in a ranking.
    if not bool(torch.isfinite(gradient).all()):
        raise CaptureError(
            f"model: its gradient must be finite, got NaN or infinity at the input of the first block of "
            f"{type(inner).__name__}; load the model in float32 or bfloat16, or use capacity='vtrace'"
        )
    assert watch.x0 is not None
    return InputGradient(watch.x0.detach()[0], gradient.detach()[0], float(objective.detach()))


def _per_sequence(target: Any, count: int) -> list[Any]:
    """Give each sequence its target: the same name, or its own row of ids."""
    if isinstance(target, Tensor):
        return [target[item : item + 1] for item in range(count)]
    return [target] * count


def _layers_of(model: nn.Module, tape: Tape, form: Form) -> list[Layer]:
    """Make the layers' rows, after checking that each has a finite gradient."""
    names = {module: name for name, module in model.named_modules()}
    of_index = {index: module for module, index in tape.modules.items()}
    layers: list[Layer] = []
    for index in sorted(tape.layers):
        # dL/dz is missing where the backward pass did not reach the layer.
        reader = tape.layers[index].reader
        module = of_index[index]
        if reader is None:
            raise CaptureError(
                f"model: every attention layer must pass a gradient on, got none at {_named(names[module], module)}; "
                "run it with gradients and a kernel that has a backward pass, or use capacity='vtrace'"
            )
        # NaN or infinity in dL/dz would spread over every row that reads the layer.
        if not bool(torch.isfinite(reader).all()):
            raise CaptureError(
                f"model: its gradient must be finite, got NaN or infinity at {_named(names[module], module)}; load the "
                "model in float32 or bfloat16, or use capacity='vtrace'"
            )
        layers.append(GradientLayer(tape.layers[index], form))
    return layers


def _named(name: str, module: nn.Module) -> str:
    return f"{name or 'the model itself'} ({type(module).__name__})"


def _refuse_inference_tensors(model: nn.Module) -> None:
    """Refuse a model made under inference_mode, whose weights cannot take part in a backward pass."""
    for name, module in model.named_modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.is_inference() for tensor in tensors):
            raise CaptureError(
                f"model: its weights must be ordinary tensors, got some made under torch.inference_mode in "
                f"{_named(name, module)}; load the model outside of it, or use capacity='vtrace'"
            )


class GradientWatch:
    """Hooks that start the gradient at the first block and find the module in which it is lost.

    A module loses the gradient if an input requires one, an output does not, and the output depends on the input: it
    ran under ``no_grad`` or ``inference_mode``, detached its result, or used a kernel without a backward pass. The
    residual stream would carry the rest of the gradient around it, and the numbers would be wrong without notice.

    Args:
        model: the transformers model.
        tape: its recording is paused while a module is probed.

    Attributes:
        x0: input of the first block, a leaf of the backward pass.
        broken: names of the modules that lose the gradient, in the order in which they finished.
    """

    def __init__(self, model: PreTrainedModel, tape: Tape) -> None:
        self._model = model
        self._tape = tape
        self._stack = ExitStack()
        self._reached = ""
        self.x0: Tensor | None = None
        self.broken: list[str] = []

    def __enter__(self) -> GradientWatch:
        with ExitStack() as stack:
            first = first_block(text_decoder(self._model))
            stack.callback(first.register_forward_pre_hook(self._start_at, with_kwargs=True).remove)
            for name, module in self._model.named_modules():
                hook = self._check_module(name)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def require_unbroken(self, logits: Tensor) -> None:
        """Raise if any module lost the gradient.

        Raises:
            CaptureError: the outermost module that lost it first.
        """
        name = None
        if self.broken:
            # The first to finish is the innermost; the module around it that also lost the gradient is the cause.
            around = [other for other in self.broken if _is_within(self.broken[0], other)]
            name = min(around, key=len)
        elif self.x0 is None or not logits.requires_grad:
            name = ""
        if name is None:
            return
        module = self._model.get_submodule(name)
        raise CaptureError(
            f"model: every module must pass a gradient on, got none from {_named(name, module)}: it runs under no_grad "
            "or inference_mode, detaches its output, or its kernel has no backward pass; run it with gradients (load "
            "the model unquantised), or use capacity='vtrace'"
        )

    def backward(self, objective: Tensor) -> Tensor:
        """Run the backward pass down to the first block; return the gradient at its input.

        Raises:
            CaptureError: a kernel without a backward pass, in the module that is named.
        """
        assert self.x0 is not None
        try:
            (gradient,) = torch.autograd.grad(objective, self.x0)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # The error names no module: it is the one whose output was reached last.
            module = self._model.get_submodule(self._reached)
            raise CaptureError(
                f"model: every kernel must have a backward pass, got an error in {_named(self._reached, module)} "
                f"({first_line(error)}); load the model unquantised or with another attn_implementation, or "
                "use capacity='vtrace'"
            ) from error
        return gradient

    def _start_at(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.x0 = hidden.detach().requires_grad_()
        if args:
            return (self.x0, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.x0}

    def _check_module(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            outputs = _float_tensors(output)
            for tensor in outputs:
                if tensor.requires_grad:
                    # Hooks run in the order of the backward pass: the last name is where it stopped.
                    tensor.register_hook(lambda gradient: self._reach(name))

            # The gradient is lost if it enters the module, and an output that depends on the input has none.
            lost = [tensor for tensor in outputs if not tensor.requires_grad]
            receives = any(tensor.requires_grad for tensor in _float_tensors((args, kwargs)))
            if lost and receives and self._depends(module, args, kwargs, output):
                self.broken.append(name)

        return hook

    def _reach(self, name: str) -> None:
        self._reached = name

    def _depends(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
        """Tell whether an output without a gradient changes with the inputs that have one.

        Rotary embeddings take the hidden states for their dtype alone, and their output stays the same.
        """
        # Run the module once more on moved inputs. The tape must not record this second run.
        listening = self._tape.listening
        self._tape.listening = False
        try:
            with torch.no_grad():
                again = module.forward(*_moved(args), **_moved(kwargs))
        finally:
            self._tape.listening = listening
        # A constant output stays equal; one that depends on the moved inputs differs.
        for before, after in zip(_float_tensors(output), _float_tensors(again), strict=False):
            if not before.requires_grad and not torch.equal(before, after):
                return True
        return False


def _is_within(name: str, ancestor: str) -> bool:
    return ancestor in ("", name) or name.startswith(ancestor + ".")


def _float_tensors(value: Any) -> list[Tensor]:
    """List the floating point tensors of nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, (tuple, list)):
        return []
    tensors = []
    for part in value:
        tensors += _float_tensors(part)
    return tensors


def _moved(value: Any) -> Any:
    """Change every tensor that requires a gradient a little, without a direction that a norm would remove."""
    if isinstance(value, Tensor):
        if not value.requires_grad:
            return value
        # The noise is fixed by its seed, and scaled to the mean magnitude of the tensor.
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(value.shape, generator=generator).to(device=value.device, dtype=value.dtype)
        step = _PROBE_SIZE * value.detach().abs().mean()
        return value.detach() + step * noise
    # Containers are rebuilt around their moved tensors; other values are passed unchanged.
    if isinstance(value, Mapping):
        return {name: _moved(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(part) for part in value)
    if isinstance(value, list):
        return [_moved(part) for part in value]
    return value
