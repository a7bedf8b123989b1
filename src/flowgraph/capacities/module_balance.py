"""Find the module that breaks the conservation of relevance, by comparing what enters and leaves each module.

Under the linear rules, a module with one tensor in and one out conserves relevance in total:
sum over positions of <out, dL/dout> = the same of <in, dL/din> + what stays in its biases. The deepest module for which
that fails holds the part without a rule.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn


class ModuleBalance:
    """Hooks that add up, for each module of a model, the relevance that leaves minus what enters.

    Enter it before the forward pass, under the linear rules, and read :meth:`culprit` after the backward pass.

    Args:
        model: the causal LM.
        left_out: modules that need not conserve on their own.
    """

    def __init__(self, model: nn.Module, left_out: set[nn.Module]) -> None:
        self._model = model
        self._stack = ExitStack()
        self._names = {module: name for name, module in model.named_modules() if name and module not in left_out}
        self._leaving: dict[str, float] = {}
        self._entering: dict[str, float] = {}
        self._biases: dict[str, float] = {}

    def __enter__(self) -> ModuleBalance:
        with ExitStack() as stack:
            for module in self._names:
                stack.callback(module.register_forward_pre_hook(self._watch_input, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._watch_output).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def culprit(self, smallest: float) -> tuple[str, str, float] | None:
        """Return name, class and imbalance of the deepest module that does not conserve; None if all do.

        Args:
            smallest: imbalance that counts, in the units of the target.
        """
        found: tuple[str, str, float] | None = None
        for module, name in self._names.items():
            if name not in self._leaving or name not in self._entering:
                continue

            # <out, dL/dout> - <in, dL/din> - (biases of the module and of the modules inside it) = 0 if it conserves.
            inside = sum(share for holder, share in self._biases.items() if f"{holder}.".startswith(f"{name}."))
            imbalance = abs(self._leaving[name] - self._entering[name] - inside)
            if not imbalance > smallest:
                continue

            # The deepest module is nearest to the cause; at the same depth, the largest imbalance.
            if found is None:
                found = (name, type(module).__name__, imbalance)
                continue
            depth = name.count(".")
            depth_found = found[0].count(".")
            is_worse = depth == depth_found and imbalance > found[2]
            if depth > depth_found or is_worse:
                found = (name, type(module).__name__, imbalance)
        return found

    def _watch_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = [*args, *kwargs.values()]
        tensors = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
        # The law of one module holds for one tensor in and one tensor out.
        if len(tensors) != 1:
            return None
        x = tensors[0]
        # A view of its own, so that its gradient is that of this module alone.
        private = x.view_as(x)
        value = x.detach().float()
        name = self._names[module]
        private.register_hook(lambda gradient: self._add(self._entering, name, gradient, value))
        # The module must read the private view wherever it read x, by position or by name.
        new_args = tuple(private if each is x else each for each in args)
        new_kwargs = {key: private if each is x else each for key, each in kwargs.items()}
        return new_args, new_kwargs

    def _watch_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, Tensor) or not first.requires_grad:
            return

        # <out, dL/dout>, added up once dL/dout is there.
        name = self._names[module]
        value = first.detach().float()
        first.register_hook(lambda gradient: self._add(self._leaving, name, gradient, value))

        # A bias b takes part in every output position and holds <b, dL/dout>.
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor) and bias.ndim == 1 and bias.shape[0] == first.shape[-1]:
            held = bias.detach().float()
            first.register_hook(lambda gradient: self._add(self._biases, name, gradient, held))

    def _add(self, sums: dict[str, float], name: str, gradient: Tensor, value: Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + float((gradient.float() * value).sum())
