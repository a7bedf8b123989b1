"""Capture where a weight exists only while its module runs, as under FSDP2 and DeepSpeed ZeRO-3; a stand-in of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import flowgraph as fg
from flowgraph.attention.modules import is_sharded
from tests.fixtures.policies import tiny_policy

IDS = torch.arange(24).reshape(2, 12) % 20 + 3
MASK = torch.ones_like(IDS)
MASK[1, 9:] = 0


def release_after_use(model: nn.Module) -> None:
    """Empty every weight outside the pass of the module that owns it, with hooks like those of DeepSpeed."""
    # Some modules share a weight, so all are kept before the first is released.
    kept = {weight: weight.data for weight in model.parameters()}
    for number, module in enumerate(model.modules()):
        weights = [weight for weight in module._parameters.values() if weight is not None]
        complete = [kept[weight] for weight in weights]

        def gather(
            module: nn.Module, inputs: Any, weights: list = weights, complete: list[torch.Tensor] = complete
        ) -> None:
            for weight, data in zip(weights, complete, strict=True):
                weight.data = data

        def release(module: nn.Module, inputs: Any = None, output: Any = None, weights: list = weights) -> None:
            for weight in weights:
                weight.data = torch.empty(0)

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        for weight in weights:
            weight.ds_id = number  # type: ignore[attr-defined]
        release(module)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("capacity", ["attention", "value_norm", "sharp", "centred", "vtrace"])
def test_rows_are_those_of_the_complete_model(family: str, capacity: str):
    expected = fg.capture(tiny_policy(family), IDS, MASK, capacity=capacity).dense()
    model = tiny_policy(family)
    release_after_use(model)
    assert is_sharded(model)
    assert all(weight.numel() == 0 for weight in model.parameters())
    found = fg.capture(model, IDS, MASK, capacity=capacity).dense()
    assert torch.equal(found, expected)
    assert all(weight.numel() == 0 for weight in model.parameters())


def test_rows_with_an_adapter_are_those_of_the_complete_model():
    def adapted() -> nn.Module:
        torch.manual_seed(3)
        return get_peft_model(tiny_policy(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))

    expected = fg.capture(adapted(), IDS, MASK, capacity="sharp").dense()
    model = adapted()
    release_after_use(model)
    assert torch.equal(fg.capture(model, IDS, MASK, capacity="sharp").dense(), expected)
    with pytest.raises(fg.CaptureError, match=r"capacity: must read output projections of one.*got Linear; merge"):
        fg.capture(model, IDS, MASK, capacity="vtrace")


def test_the_stand_in_refuses_a_read_outside_the_pass():
    """Otherwise the equalities above would say nothing."""
    model = tiny_policy()
    release_after_use(model)
    with pytest.raises(RuntimeError):
        _ = model.lm_head.weight @ torch.ones(32)


@pytest.mark.parametrize("capacity", ["gradient", "gradient_positive", "relevance"])
def test_capacities_with_a_backward_pass_are_refused(capacity: str):
    assert not is_sharded(tiny_policy())
    model = tiny_policy()
    release_after_use(model)
    with pytest.raises(fg.CaptureError, match=r"capacity: must need no backward pass where processes share.*; capture"):
        fg.capture(model, IDS, MASK, capacity=capacity)
