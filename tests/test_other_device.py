"""Nothing mixes the CPU with the device of the model or graph: what a GPU would refuse is refused here."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Batch

import flowgraph as fg
import rl
from tests.fixtures.models import build, padded
from tests.fixtures.other_device import OTHER, OtherTensor, other_device
from tests.fixtures.tiny import RESPONSE, chat, tiny


@pytest.fixture(autouse=True, scope="module")
def device() -> Iterator[torch.device]:
    with other_device() as there:
        yield there


def graph(tokens: int, seed: int) -> fg.FlowGraph:
    weights = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(seed)).tril(-1)
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-9)
    return fg.FlowGraph.from_dense(weights, question=range(1, tokens // 3), answer=[tokens - 2, tokens - 1])


def same(found: Tensor, expected: Tensor) -> None:
    assert isinstance(found, OtherTensor)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-12, atol=0)


# The stand-in is strict -----------------------------------------------------------------------------------------


def test_the_stand_in_refuses_what_a_gpu_refuses(device: torch.device):
    here, there = torch.ones(3), torch.ones(3, device=device)
    assert there.device == OTHER
    assert there.sum().item() == 3
    with pytest.raises(RuntimeError, match="all tensors to be on one device"):
        _ = here + there
    with pytest.raises(RuntimeError, match="all tensors to be on one device"):
        _ = here[torch.zeros(2, dtype=torch.int64, device=device)]
    with pytest.raises(RuntimeError, match="all tensors to be on one device"):
        there[torch.tensor([0, 1])] = here[:2]
    with pytest.raises(RuntimeError, match="expected a generator"):
        torch.rand(3, generator=torch.Generator(), device=device)
    with pytest.raises(TypeError, match="copy it to the CPU first"):
        there.numpy()


def test_the_stand_in_allows_what_a_gpu_allows(device: torch.device):
    there = torch.arange(4.0, device=device)
    assert (there * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]
    assert there[torch.tensor([1, 3])].tolist() == [1, 3]
    there[1:].add_(1)
    assert there.cpu().tolist() == [0, 2, 3, 4]
    weight = there.clone().requires_grad_()
    weight.square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0, 4, 6, 8]


# Everything else ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["scatter", "dense", "reference", "auto"])
def test_batches_are_solved_where_they_are(backend: Any, device: torch.device):
    batch: Any = Batch.from_data_list([graph(12, 0), graph(70, 1)])
    there = batch.clone().to(str(device))
    for options in ({}, {"source": "potential"}, {"damping": 0.5}, {"absorption": "pass_through"}):
        expected, found = fg.solve(batch, **options), fg.solve(there, backend=backend, **options)
        same(found.throughput, expected.throughput)
        same(found.h, expected.h)
        same(found.alpha, expected.alpha)


def test_gradients_are_made_where_the_graph_is(device: torch.device):
    def gradient(where: str) -> Tensor:
        alone: Any = graph(30, 2).to(where)
        alone.capacity = alone.capacity.double().requires_grad_()
        return torch.autograd.grad(fg.solve(alone).throughput[7], alone.capacity)[0]

    same(gradient(str(device)), gradient("cpu"))


def test_a_potential_out_of_range_is_scaled_where_the_graph_is(device: torch.device):
    weights = torch.diag(torch.full((119,), 1e-4, dtype=torch.float64), -1)
    chain = fg.FlowGraph.from_dense(weights, question=[0, 1], answer=[119])
    expected, found = fg.solve(chain), fg.solve(chain.clone().to(str(device)))
    assert bool(expected.exponent.any())
    same(found.throughput, expected.throughput)
    assert torch.equal(found.exponent.cpu(), expected.exponent)


@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "gpt2"])
@pytest.mark.parametrize("choices", [{}, {"heads": "global"}, {"heads": [0, 2], "edge_weight": "value_norm"}])
def test_captured_rows_are_solved_where_the_model_is(family: str, choices: dict, device: torch.device):
    model = build(family).to(device)
    ids, mask = padded("left")
    ids[1, -12:] = ids[0, -12:]
    rows = fg.capture(model, ids, mask, **choices)
    assert rows.device == device
    position = torch.arange(ids.shape[1]).expand_as(ids)
    flow = fg.solve_rows(rows, question=(mask == 1) & (position < 14), answer=position >= 22)
    assert isinstance(flow.throughput, OtherTensor)
    assert bool(flow.feasible.all())


def test_a_text_is_traced_and_read_where_the_model_is(device: torch.device):
    model, tokenizer = tiny()
    model = copy.deepcopy(model).to(device)
    whole = fg.trace(model, tokenizer, chat(), RESPONSE)
    assert whole.certify().ok
    assert fg.trace(model, tokenizer, chat(), RESPONSE, max_edges=100).certify().ok
    with pytest.warns(UserWarning, match="cut off"):
        assert fg.trace(model, tokenizer, chat(), max_new_tokens=3).num_tokens > 3
    assert bool(fg.knockout(model, whole, tokens=[5], heads=[0]).after.isfinite().all())


def test_a_flow_is_examined_where_it_is(device: torch.device):
    flow = fg.solve(graph(40, 3).to(str(device)))
    assert isinstance(flow.throughput, OtherTensor)
    assert fg.certify(flow, level="rational").ok
    assert fg.backbone(flow).share >= 0.9
    assert 0 < float(fg.prune(flow, keep=0.9).kept_flow) <= 1
    assert fg.decompose(flow)
    assert fg.hubs(flow, 3)
    assert fg.gap_report(flow).alpha > 0
    assert fg.contract(flow, [0] * 20 + [1] * 20).num_steps == 2


@pytest.mark.parametrize("rule", ["flow", "shuffled_flow", "gradient"])
def test_a_policy_is_trained_where_accelerate_puts_it(rule: str):
    model, tokenizer = rl.load_chain_model()
    settings = rl.PPOConfig(steps=1, num_prompts=2, group_size=2, max_response_tokens=24, num_minibatches=2)
    trainer = rl.PPOTrainer(model, tokenizer, task="chain", credit=rule, config=settings, progress=False)
    history = trainer.train()
    assert trainer.policy.device == OTHER
    assert len(history) == 1
