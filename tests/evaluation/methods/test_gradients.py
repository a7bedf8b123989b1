"""Gradient methods against autograd written by hand, and their errors on models without gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import flowgraph as fg
from tests.fixtures.models import FAMILIES
from tests.fixtures.subjects import explained, subject
from tests.fixtures.tiny import tiny
from tests.reference.input_gradients import gradients

# On a random model, 32 points are often too few.
pytestmark = pytest.mark.filterwarnings("ignore:integrated_gradients")

NEED_GRADIENTS = (
    "gradient",
    "gradient_norm",
    "gradient_positive",
    "gradient_x_input",
    "gradient_x_input:margin",
    "integrated_gradients",
)


@pytest.fixture(scope="module")
def shared() -> fg.Subject:
    return subject(response="Step 1: 3 + 4 = 7. So the answer is 7 apples.", answer="7 apples")


@pytest.mark.parametrize("target", ["logprob", "margin"])
def test_product_and_norm_are_those_of_autograd(shared: fg.Subject, target: str):
    embedded, gradient = gradients(tiny()[0], shared.token_ids, shared.positions(shared.answer), target)
    assert len(shared.positions(shared.answer)) > 1
    suffix = "" if target == "logprob" else ":margin"
    product = explained(f"gradient_x_input{suffix}", shared).tokens
    norm = explained(f"gradient_norm{suffix}", shared).tokens
    torch.testing.assert_close(product, (embedded * gradient).sum(-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norm, gradient.norm(dim=-1), rtol=1e-4, atol=1e-6)
    last = shared.positions(shared.answer)[-1]
    assert not bool(product[last:].any())


def test_frozen_parameters_and_training_mode_change_nothing(shared: fg.Subject):
    model = copy.deepcopy(tiny()[0]).train()
    model.requires_grad_(False)
    other = subject(response="Step 1: 3 + 4 = 7. So the answer is 7 apples.", model=model, answer="7 apples")
    for name in ("gradient_x_input", "integrated_gradients", "occlusion"):
        wanted = explained(name, shared).tokens
        torch.testing.assert_close(explained(name, other).tokens, wanted)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", NEED_GRADIENTS)
def test_the_gradient_is_found_inside_inference_mode(name: str):
    wanted = explained(name, subject()).tokens
    with torch.inference_mode():
        found = explained(name, subject()).tokens
    torch.testing.assert_close(found, wanted)


def under_no_grad(module: nn.Module) -> None:
    forward = module.forward

    def without_gradient(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return forward(*args, **kwargs)

    module.forward = without_gradient


class Round(torch.autograd.Function):
    """A kernel without a backward pass, as quantised layers have."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no backward pass for this kernel")


def without_backward(module: nn.Module) -> None:
    module.register_forward_hook(lambda _, args, output: Round.apply(output))


@pytest.mark.parametrize("name", NEED_GRADIENTS)
@pytest.mark.parametrize("breaking", [under_no_grad, without_backward])
def test_a_model_without_gradients_is_named_and_refused(name: str, breaking: Callable[[nn.Module], None]):
    model = copy.deepcopy(tiny()[0])
    breaking(model.model.layers[1].mlp)
    case = subject(model=model)
    with pytest.raises(fg.CaptureError, match=r"model: every (module|kernel) must .*model\.layers\.1\.mlp"):
        explained(name, case)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3_moe"])
def test_other_families_have_a_gradient_at_the_first_block(family: str):
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    config = FAMILIES[family]()
    config.vocab_size = 360
    model = AutoModelForCausalLM.from_config(config).eval()
    case = subject(model=model)
    product = explained("gradient_x_input", case).tokens
    embedded, gradient = gradients(model, case.token_ids, case.positions(case.answer), "logprob")
    if family == "gpt2":
        # The learned position is a part of the input of the first block, and takes no part in the gradient.
        embedded = embedded + model.transformer.wpe.weight[: case.num_tokens].detach().double()
    torch.testing.assert_close(product, (embedded * gradient).sum(-1), rtol=1e-3, atol=1e-5)
