"""Derivatives of the flow: against finite differences, against plain autograd, in any units, never NaN."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch_geometric.data import Batch

from flowgraph import solve, solve_rows
from tests.fixtures.networks import GRAPH_ENGINES, Network, network
from tests.reference import flow as reference
from tests.strategies import FlowGraph as Case
from tests.strategies import flow_graphs

every_backend = pytest.mark.parametrize("backend", GRAPH_ENGINES)
row_backends = pytest.mark.parametrize("backend", ["dense", "numba"])


def small(seed: int = 0, tokens: int = 6) -> Network:
    """Everybody reads everybody earlier."""
    random = torch.Generator().manual_seed(seed)
    target, source = torch.tril_indices(tokens, tokens, -1)
    position = torch.arange(tokens)
    capacity = 0.2 + torch.rand(source.numel(), generator=random, dtype=torch.float64)
    return Network(torch.stack([source, target]), capacity, position < 2, position >= tokens - 2)


def fork() -> Network:
    """Sparse, with a token that reaches nothing and a question token without readers."""
    pairs = torch.tensor([[0, 0, 1, 2, 1, 3], [2, 3, 3, 4, 5, 5]])
    capacity = torch.tensor([0.5, 0.3, 0.9, 0.8, 0.4, 0.7], dtype=torch.float64)
    position = torch.arange(7)
    return Network(pairs, capacity, (position < 2) | (position == 6), position == 5)


def gradient_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def positive(size: int, seed: int) -> Tensor:
    """No entry at the border of what is allowed, where a finite difference would step over it."""
    return 0.3 + torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def holder(nets: list[Network]) -> Any:
    return nets[0].graph() if len(nets) == 1 else Batch.from_data_list([net.graph() for net in nets])


def edge_outputs(nets: list[Network], backend: str, **options: Any) -> Callable[..., tuple[Tensor, ...]]:
    """Every differentiable output as a function of the capacities, and of demand and source where given."""

    def outputs(capacity: Tensor, demand: Tensor | None = None, source: Tensor | None = None) -> tuple[Tensor, ...]:
        graph = holder(nets)
        graph.capacity = capacity
        entry = options if source is None else options | {"source": source}
        flow = solve(graph, backend=backend, demand=demand, **entry)
        return flow.throughput, flow.h, flow.g, flow.edge_flow, flow.alpha, flow.absorbed

    return outputs


NETS = {"all pairs": [small()], "fork": [fork()], "batch": [small(1, 4), fork(), small(2, 3)]}


@every_backend
@pytest.mark.parametrize("name", NETS)
def test_finite_differences_of_everything_by_everything(backend: str, name: str):
    nets = NETS[name]
    tokens = sum(net.num_tokens for net in nets)
    capacity = torch.cat([net.capacity for net in nets]).requires_grad_()
    demand, source = positive(tokens, 1).requires_grad_(), positive(tokens, 2).requires_grad_()
    for absorption, damping in (("pass_through", 1.0), ("absorb", 0.5)):
        outputs = edge_outputs(nets, backend, absorption=absorption, damping=damping)
        assert gradcheck(outputs, (capacity, demand, source))


@every_backend
@pytest.mark.parametrize("source", ["uniform", "potential"])
def test_second_derivatives(backend: str, source: str):
    """Of the answer's own flow by the capacities under each rule, and by all three arguments."""
    nets = [small(3, 4), fork()]
    capacity = torch.cat([net.capacity for net in nets]).requires_grad_()
    assert gradcheck(edge_outputs(nets, backend, source=source), (capacity,))
    by_rule = edge_outputs(nets, backend, source=source)
    assert gradgradcheck(lambda c: by_rule(c)[:4], (capacity,))
    demand, entry = positive(11, 3).requires_grad_(), positive(11, 4).requires_grad_()
    by_vectors = edge_outputs(nets, backend)
    assert gradgradcheck(lambda c, b, q: by_vectors(c, b, q)[0], (capacity, demand, entry))


@row_backends
def test_finite_differences_over_dense_rows(backend: str):
    nets = [small(4, 5), fork()]
    question = torch.stack([torch.nn.functional.pad(net.question, (0, 7 - net.num_tokens)) for net in nets])
    answer = torch.stack([torch.nn.functional.pad(net.answer, (0, 7 - net.num_tokens)) for net in nets])
    below = torch.stack([net.matrix(7) for net in nets])

    def outputs(entries: Tensor, demand: Tensor | None = None, source: Any = "uniform") -> tuple[Tensor, ...]:
        rows = torch.zeros_like(below).masked_scatter(below > 0, entries)
        flow = solve_rows(
            rows, question=question, answer=answer, preset=None, backend=backend, demand=demand, source=source
        )  # type: ignore[call-overload]
        return flow.throughput, flow.h, flow.g

    entries = below[below > 0].requires_grad_()
    demand, source = positive(14, 5).view(2, 7).requires_grad_(), positive(14, 6).view(2, 7).requires_grad_()
    assert gradcheck(outputs, (entries, demand, source))
    assert gradcheck(lambda c: outputs(c, source="potential"), (entries,))
    assert gradgradcheck(lambda c, b, q: outputs(c, b, q)[0], (entries, demand, source))


# Against plain autograd -------------------------------------------------------------------------------------


def plain(case: Case, matrix: Tensor, demand: Tensor, absorption: str, rule: str) -> tuple[Tensor, ...]:
    """h, g, f by inverting I - N under autograd; who reaches the demand is known from the fractions."""
    answer = torch.tensor(case.answer)
    kept = reference.effective_edges(case.edges, case.answer, absorption)
    reaches = torch.tensor(reference.reachable(case.num_nodes, kept, demand.tolist()))
    N = matrix * ~(answer & (absorption == "absorb"))
    identity = torch.eye(case.num_nodes, dtype=torch.float64)
    h = torch.linalg.solve(identity - N.T, demand)
    safe = torch.where(reaches, h, 1.0)
    share = (torch.tensor(case.question) & reaches).double() * (safe if rule == "potential" else 1.0)
    share = share / share.sum() if bool(share.sum() > 0) else share
    g = torch.linalg.solve(identity - N, torch.where(reaches, share / safe, 0.0))
    return h, g, g * h, g[None, :] * N * h[:, None]


@every_backend
@given(
    case=flow_graphs(max_nodes=8, min_nodes=2),
    absorption=st.sampled_from(["absorb", "pass_through"]),
    rule=st.sampled_from(["uniform", "potential"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_the_adjoint_sweeps_equal_plain_autograd(backend: str, case: Case, absorption: str, rule: str, seed: int):
    """A random cotangent on every output, so that no mistake cancels."""
    net = Network.of(case)
    random = torch.Generator().manual_seed(seed)
    up = [torch.randn(case.num_nodes, generator=random, dtype=torch.float64) for _ in range(3)]
    up_edges = torch.randn(case.num_nodes, case.num_nodes, generator=random, dtype=torch.float64)
    s, t = net.pairs
    ours, theirs = net.capacity.clone().requires_grad_(), net.matrix(case.num_nodes).requires_grad_()
    b1, b2 = (net.answer.double().requires_grad_() for _ in range(2))
    graph = net.graph()
    graph.capacity = ours
    flow = solve(graph, backend=backend, demand=b1, absorption=absorption, source=rule)
    got = [flow.h, flow.g, flow.throughput, flow.edge_flow]
    wanted = plain(case, theirs, b2, absorption, rule)
    torch.autograd.backward(sum(((x * u).sum() for x, u in zip(got, [*up, up_edges[t, s]], strict=True)), b1.sum() * 0))
    torch.autograd.backward(sum(((x * u).sum() for x, u in zip(wanted, [*up, up_edges], strict=True)), b2.sum() * 0))
    on_edges = gradient_of(theirs)[t, s]
    scale = float(on_edges.abs().max()) if on_edges.numel() else 0.0
    assert torch.allclose(gradient_of(ours), on_edges, rtol=1e-9, atol=1e-11 * (1 + scale))
    # The source ends where the demand does: that border has no derivative for a token without a route of its own.
    scale = max(scale, float(gradient_of(b2).abs().max()))
    assert torch.allclose(gradient_of(b1), gradient_of(b2), rtol=1e-9, atol=1e-11 * (1 + scale))


@every_backend
def test_across_blocks(backend: str):
    """300 tokens: more than two blocks of every size, against rows in a matrix under plain autograd."""
    net = network("sparse", 300, 3)
    up = torch.randn(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    graph = net.graph()
    graph.capacity = net.capacity.clone().requires_grad_()
    (solve(graph, backend=backend).throughput * up).sum().backward()
    matrix = net.matrix(300).requires_grad_()
    identity, answer = torch.eye(300, dtype=torch.float64), net.answer.double()
    N = matrix * ~net.answer
    h = torch.linalg.solve(identity - N.T, answer)
    asked = net.question & (h.detach() > 1e-300)
    share = asked.double() / asked.sum()
    g = torch.linalg.solve(identity - N, torch.where(asked, share / torch.where(asked, h, 1.0), 0.0))
    (g * h * up).sum().backward()
    wanted = gradient_of(matrix)[net.pairs[1], net.pairs[0]]
    assert torch.allclose(gradient_of(graph.capacity), wanted, rtol=1e-9, atol=1e-12 * float(wanted.abs().max()))


# Balanced units ---------------------------------------------------------------------------------------------


def lanes(units: Tensor) -> Network:
    """Two lanes that exchange flow, 41 tokens, each in units of ``2**units``; nothing else distinguishes them."""
    tokens = units.numel()
    pairs = [(t - gap, t) for t in range(1, tokens) for gap in (2, 1) if t >= gap]
    source, target = torch.tensor(pairs).T
    weight = 0.2 + torch.rand(source.numel(), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weight = weight * torch.exp2((units[target] - units[source]).double())
    position = torch.arange(tokens)
    return Network(torch.stack([source, target]), weight, position < 2, position == tokens - 1)


def elasticities(net: Network, backend: str, of: Callable[[Any], Tensor]) -> Tensor:
    """``c * d(of) / dc`` for every edge: it does not depend on the scaling."""
    graph = net.graph()
    graph.capacity = net.capacity.clone().requires_grad_()
    flow = solve(graph, backend=backend)
    of(flow).backward()
    return net.capacity * gradient_of(graph.capacity)


@every_backend
@pytest.mark.parametrize("step", [40, -40])
@pytest.mark.parametrize("rule", ["throughput", "log potential", "edge flow"])
def test_derivatives_of_logarithms_know_no_units(backend: str, step: int, rule: str):
    of = {
        "throughput": lambda flow: flow.throughput[20].log() + 2 * flow.throughput[7].log(),
        "log potential": lambda flow: flow.log2_potential[:5].sum(),
        "edge flow": lambda flow: flow.edge_flow[[10, 33]].log().sum(),
    }[rule]
    position = torch.arange(41)
    ordinary, extreme = lanes(position * 0), lanes((position - 40) * step)
    assert bool(solve(extreme.graph()).exponent.any())
    assert torch.allclose(
        elasticities(extreme, backend, of), elasticities(ordinary, backend, of), rtol=1e-11, atol=1e-14
    )


# Kinds and places -------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_has_the_dtype_of_its_capacity(backend: str, dtype: torch.dtype):
    net = fork()
    gradients = []
    for capacity in (net.capacity.to(dtype), net.capacity.to(dtype).double()):
        graph = net.graph()
        graph.capacity = capacity.clone().requires_grad_()
        flow = solve(graph, backend=backend)
        assert flow.throughput.dtype == torch.float64
        flow.throughput[3].backward()
        assert gradient_of(graph.capacity).dtype == capacity.dtype
        gradients.append(gradient_of(graph.capacity).double())
    assert torch.allclose(*gradients, rtol=2 * torch.finfo(dtype).eps, atol=0)


def infeasible() -> Network:
    """Edges on both sides of a gap: h > 0 behind it, g = 0 everywhere."""
    pairs = torch.tensor([[0, 0, 1, 3, 3, 4], [1, 2, 2, 4, 5, 5]])
    position = torch.arange(6)
    return Network(pairs, torch.full((6,), 0.5, dtype=torch.float64), position < 2, position == 5)


@every_backend
@pytest.mark.parametrize("source", ["uniform", "potential"])
def test_an_infeasible_graph_has_zero_gradients(backend: str, source: str):
    for nets in ([infeasible()], [infeasible(), fork(), infeasible()]):
        graph = holder(nets)
        graph.capacity = torch.cat([net.capacity for net in nets]).requires_grad_()
        demand = graph.answer_mask.double().requires_grad_()
        flow = solve(graph, backend=backend, source=source, demand=demand, absorption="absorb")
        (flow.throughput.sum() + (flow.edge_flow**2).sum() + flow.absorbed.sum()).backward()
        assert not gradient_of(graph.capacity)[:6].any()
        assert not gradient_of(demand)[:6].any()
        assert bool(torch.isfinite(gradient_of(graph.capacity)).all() & torch.isfinite(gradient_of(demand)).all())


@every_backend
def test_alpha_beside_an_infeasible_graph(backend: str):
    graph = holder([fork(), infeasible()])
    graph.capacity = graph.capacity.clone().requires_grad_()
    solve(graph, backend=backend).alpha[0].backward()
    assert bool(torch.isfinite(gradient_of(graph.capacity)).all())
    assert gradient_of(graph.capacity)[:6].any()


@every_backend
def test_log_potential_beside_a_token_that_reaches_nothing(backend: str):
    net = infeasible()
    graph = net.graph()
    graph.capacity = net.capacity.clone().requires_grad_()
    solve(graph, backend=backend).log2_potential[3].backward()
    assert bool(torch.isfinite(gradient_of(graph.capacity)).all())
    assert gradient_of(graph.capacity)[3:].all()


@every_backend
def test_two_solves_of_one_capacity(backend: str):
    """Gradients add up, also when the second solve depends on the first."""
    net = small(7)

    def gradient(loss: Callable[[Any], Tensor]) -> Tensor:
        graph = net.graph()
        graph.capacity = net.capacity.clone().requires_grad_()
        loss(graph).backward()
        return gradient_of(graph.capacity)

    def first(graph: Any) -> Tensor:
        return solve(graph, backend=backend).throughput[2]

    def second(graph: Any) -> Tensor:
        return solve(graph, backend=backend, source="potential", damping=0.5).throughput[3]

    both = gradient(lambda graph: first(graph) + 3 * second(graph))
    assert torch.allclose(both, gradient(first) + 3 * gradient(second), rtol=1e-13, atol=1e-15)

    def nested(capacity: Tensor) -> Tensor:
        graph = net.graph()
        graph.capacity = capacity
        share = solve(graph, backend=backend).throughput
        return solve(graph, backend=backend, demand=share, source=share.flip(0)).throughput

    assert gradcheck(nested, (net.capacity.clone().requires_grad_(),))


@every_backend
def test_only_what_requires_a_gradient_keeps_a_graph(backend: str):
    net = fork()
    flow = solve(net.graph(), backend=backend)
    assert not any(x.requires_grad for x in (flow.h, flow.g, flow.throughput, flow.edge_flow, flow.alpha))
    graph = net.graph()
    graph.capacity = net.capacity.clone().requires_grad_()
    with torch.no_grad():
        assert not solve(graph, backend=backend).throughput.requires_grad
    assert solve(graph, backend=backend).throughput.requires_grad
    demand = net.answer.double().requires_grad_()
    with_demand = solve(net.graph(), backend=backend, demand=demand)
    with_demand.throughput[3].backward()
    assert demand.grad is not None
    source = net.question.double().requires_grad_()
    flow = solve(net.graph(), backend=backend, source=source)
    assert not flow.h.requires_grad
    flow.throughput[3].backward()
    assert source.grad is not None


def test_demand_over_streamed_rows(monkeypatch: pytest.MonkeyPatch):
    """As over the same rows in one matrix, or refused by name."""
    logits = torch.randn(1, 20, 20, generator=torch.Generator().manual_seed(0)).masked_fill(
        torch.ones(20, 20).triu(1).bool(), -torch.inf
    )
    position, gradients = torch.arange(20)[None], []
    for limit in (2**28, 0):
        monkeypatch.setattr("flowgraph.flow.solve_rows._DENSE_BYTES", limit)
        demand = (position > 15).double().requires_grad_()
        flow = solve_rows(logits.softmax(-1), question=position < 3, answer=position > 18, demand=demand)
        flow.throughput[0, 8].backward()
        gradients.append(gradient_of(demand))
    assert torch.allclose(*gradients, rtol=1e-6, atol=1e-9)


@row_backends
def test_gradients_of_rows_equal_those_of_edges(backend: str):
    """With a diagonal that counts for nothing and padding, in ordinary units and far out of range."""
    for units in (torch.zeros(41).long(), (torch.arange(41) - 40) * 40):
        net = lanes(units)
        graph = net.graph()
        graph.capacity = net.capacity.clone().requires_grad_()
        solve(graph, backend="reference").throughput[20].backward()
        matrix = net.matrix(44)
        matrix.diagonal(dim1=-2, dim2=-1).fill_(0.5)
        matrix.requires_grad_()
        pad = [torch.nn.functional.pad(mask, (0, 3)) for mask in (net.question, net.answer)]
        flow = solve_rows(matrix, question=pad[0], answer=pad[1], preset=None, backend=backend)  # type: ignore[arg-type]
        flow.throughput[0, 20].backward()
        rows, edges = (
            net.capacity * gradient_of(matrix)[net.pairs[1], net.pairs[0]],
            net.capacity * gradient_of(graph.capacity),
        )
        assert torch.allclose(rows, edges, rtol=1e-11, atol=1e-14)
        assert not gradient_of(matrix).triu().any()
        assert not bool(torch.isnan(gradient_of(matrix)).any())


@row_backends
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_attention_that_requires_a_gradient(backend: str, preset: str):
    """Through the rules, renormalised rows included: the gradient is that of the logits below."""
    logits = torch.randn(2, 7, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    future, position = torch.ones(7, 7).triu(1).bool(), torch.arange(7).expand(2, -1)

    def throughput(logits: Tensor) -> Tensor:
        rows = logits.masked_fill(future, -torch.inf).softmax(-1)
        question, answer = (position > 0) & (position < 3), position > 4
        return solve_rows(rows, question=question, answer=answer, preset=preset, backend=backend).throughput  # type: ignore[arg-type]

    assert gradcheck(throughput, (logits.requires_grad_(),))
