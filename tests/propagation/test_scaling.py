"""Ranges that float64 cannot hold, against exact fractions: only the scale of h differs."""

import math
from fractions import Fraction
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.data import Batch

from flowgraph import FlowGraph, certify, certify_each, solve, solve_rows
from tests.fixtures.networks import ENGINES, GRAPH_ENGINES, Network, Solved, near, network, solve_by
from tests.reference import flow as reference

every_engine = pytest.mark.parametrize("engine", ENGINES)
Edges = list[tuple[int, int, float]]


def net_of(edges: Edges, tokens: int, question: list[int], answer: list[int]) -> Network:
    edges = sorted(edges, key=lambda edge: (edge[1], edge[0]))
    pairs = torch.tensor([[s, t] for s, t, _ in edges]).T.contiguous()
    capacity = torch.tensor([c for *_, c in edges], dtype=torch.float64)
    position = torch.arange(tokens)
    return Network(
        pairs, capacity, torch.isin(position, torch.tensor(question)), torch.isin(position, torch.tensor(answer))
    )


def chain(weights: list[float]) -> Network:
    edges = [(s, s + 1, w) for s, w in enumerate(weights)]
    return net_of(edges, len(edges) + 1, [0], [len(edges)])


@lru_cache(maxsize=32)  # a network is itself only: fractions of thousands of digits take their time
def exact(net: Network, source: str = "uniform") -> tuple[reference.Solution, list[bool], Fraction | None]:
    """The solution, who reaches the answer, and alpha."""
    edges = [(s, t, Fraction(c)) for (s, t), c in zip(net.pairs.T.tolist(), net.capacity.tolist(), strict=True)]
    answer = net.answer.tolist()
    kept = reference.effective_edges(edges, answer)
    solution = reference.solve(net.num_tokens, kept, net.question.tolist(), answer, source)
    reaches = reference.reachable(net.num_tokens, kept, answer)
    return solution, reaches, reference.alpha(kept, solution.g, solution.h)


def log2(value: Fraction) -> float:
    return math.log2(value.numerator) - math.log2(value.denominator) if value else -math.inf


def assert_exact(got: Solved, net: Network, source: str = "uniform") -> None:
    wanted, reaches, _ = exact(net, source)
    assert (got.h > 0).tolist() == reaches
    log_h, wanted_log = (got.h.log2() + got.exponent), torch.tensor([log2(h) for h in wanted.h], dtype=torch.float64)
    # Fractions have integers of thousands of digits: their logarithm is good to some 1e-16 of its own size.
    assert torch.allclose(log_h, wanted_log, rtol=1e-12, atol=1e-11)
    throughput = torch.tensor([float(f) for f in wanted.throughput], dtype=torch.float64)
    assert torch.allclose(got.throughput, throughput, rtol=1e-12, atol=0)
    assert torch.allclose(
        got.source, torch.tensor([float(x) for x in wanted.source], dtype=torch.float64), rtol=1e-12, atol=0
    )


def weak_band() -> Network:
    """A band of three with a few units of 2**-50 a hop: the potential of the first is about 2**-2300."""
    edges = [(t - gap, t, 2.0**-50 * (1 + (t * gap) % 7)) for t in range(150) for gap in (1, 2, 3) if t >= gap]
    return net_of(edges, 150, [0, 1, 5, 60], [149])


def sink(rest: float = 1e-7, tokens: int = 80) -> Network:
    """Everyone reads the first token with all but ``rest`` of its mass."""
    edges = [(0, t, 1 - rest) for t in range(2, tokens)] + [(t - 1, t, rest) for t in range(1, tokens)]
    return net_of(edges, tokens, [1, 2, 30], [tokens - 1])


def crossroads() -> Network:
    """Routes of 1e-500 and of 1e+500 that matter equally, dead ends beyond both, an unread question token."""
    weights = {"down": [1e-250, 1e-250, 1.0], "up": [1e250, 1e250, 1e-300]}
    edges = [(0, 1, weights["down"][0]), (1, 2, weights["down"][1]), (2, 9, 1e300)]
    edges += [(0, 3, weights["up"][0]), (3, 4, weights["up"][1]), (4, 5, 1e-300), (5, 6, 1e-300), (6, 7, 1e-100)]
    edges += [(7, 9, 1e300), (1, 8, 1e300), (4, 8, 1e300), (9, 10, 0.5), (8, 11, 1e300), (10, 11, 1e-300)]
    return net_of(edges, 13, [0, 12], [10])


WIDE = {
    "weak chain": chain([1e-7] * 59),
    "strong chain": chain([1e200] * 9),
    "down and up": chain([1e-200] * 4 + [1e200] * 40),
    "up and down": chain([1e-300, 1e-20, 1e290] * 12),
    "sink": sink(),
    "steep sink": sink(1e-12, 60),
    "weak band": weak_band(),
    "crossroads": crossroads(),
}
wide = pytest.mark.parametrize("name", WIDE)


@wide
@every_engine
def test_every_range_against_exact_fractions(engine: str, name: str):
    for source in ("uniform", "potential"):
        [got] = solve_by(engine, [WIDE[name]], source=source)
        assert got.exponent.any()
        assert bool(torch.isfinite(got.h).all() & torch.isfinite(got.g).all())
        assert_exact(got, WIDE[name], source)


@wide
@pytest.mark.parametrize("engine", GRAPH_ENGINES)
def test_the_certificate_holds_in_balanced_units(engine: str, name: str):
    flow = solve(WIDE[name].graph(), backend=engine)
    certificate = certify(flow)
    assert certificate.ok, str(certificate)
    alpha = exact(WIDE[name])[2]
    assert alpha is not None
    assert near(flow.alpha, [float(alpha)])
    assert flow.absorbed.sum().item() == pytest.approx(1, rel=1e-12)


@st.composite
def jumbled(draw: st.DrawFn) -> Network:
    """Some edges of ten tokens, weights of any size, the last token the answer."""
    sizes = [1e-300, 1e-160, 1e-20, 0.3, 1.0, 1e20, 1e160, 1e300]
    pairs = draw(st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda p: p[0] < p[1]), min_size=9))
    edges = [(s, t, draw(st.sampled_from(sizes))) for s, t in sorted(pairs)]
    return net_of(edges, 10, draw(st.sampled_from([[0], [0, 1, 2], [3, 5]])), [9])


@every_engine
@given(net=jumbled(), source=st.sampled_from(["uniform", "potential"]))
@settings(max_examples=60)
def test_weights_of_any_size(engine: str, net: Network, source: str):
    """A share of 1e-15 may be rounded where h itself still fits; see the test of small shares below."""
    [got] = solve_by(engine, [net], source=source)
    wanted, reaches, _ = exact(net, source)
    assert (got.h > 0).tolist() == reaches
    assert got.source.tolist() == pytest.approx([float(x) for x in wanted.source], rel=1e-12, abs=1e-300)
    throughput = torch.tensor([float(f) for f in wanted.throughput], dtype=torch.float64)
    assert torch.allclose(got.throughput, throughput, rtol=1e-12, atol=1e-14)
    log_h = got.h.log2() + got.exponent
    assert torch.allclose(log_h, torch.tensor([log2(h) for h in wanted.h], dtype=torch.float64), rtol=1e-12, atol=1e-11)


@every_engine
def test_one_wide_graph_among_ordinary_ones_changes_no_bit_of_theirs(engine: str):
    """Scaling by powers of two rounds nothing."""
    ordinary = [network("dense", 90, 1), network("disconnected", 20), network("sink", 130, 2), network("edgeless", 3)]
    nets = [ordinary[0], WIDE["sink"], *ordinary[1:], WIDE["crossroads"]]
    for source in ("uniform", "potential"):
        together = solve_by(engine, nets, source=source)
        for net, mine in zip(nets, together, strict=True):
            [alone] = solve_by(engine, [net], source=source)
            assert torch.allclose(mine.throughput, alone.throughput, rtol=1e-13, atol=0)
            assert torch.equal(mine.source > 0, alone.source > 0)
            logs = [solved.h.log2() + solved.exponent for solved in (mine, alone)]
            assert torch.allclose(*logs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
def test_each_graph_of_a_mixed_batch_is_certified(engine: str):
    nets = [network("sparse", 70), WIDE["weak band"], network("disconnected", 12), WIDE["up and down"]]
    flow = solve(Batch.from_data_list([net.graph() for net in nets]), backend=engine)
    assert flow.feasible.tolist() == [True, True, False, True]
    for certificate in certify_each(flow, num_through=2):
        assert certificate.ok, str(certificate)


def test_attention_rows_are_balanced_dense_and_streamed(monkeypatch: pytest.MonkeyPatch):
    """Through the public door, in float32, a text of which only one token reads another: the sink takes the rest."""
    net = sink(1e-6, 70)
    rows = net.matrix(70).float()[None]
    rows[0, 0, 0] = 1
    rows[0, 1, 1] = 1 - rows[0, 1, 0]
    narrow = Network(net.pairs, rows[0][net.pairs[1], net.pairs[0]], net.question, net.answer)
    masks = {"question": net.question[None], "answer": net.answer[None]}
    dense = solve_rows(rows, **masks, preset="paper")
    monkeypatch.setattr("flowgraph.flow.solve_rows._DENSE_BYTES", 0)
    streamed = solve_rows(rows, **masks, preset="paper")
    assert (dense.backend, streamed.backend) == ("numba", "streamed")
    for flow in (dense, streamed):
        fields = (flow.h, flow.g, flow.exponent, flow.source, flow.throughput)
        assert_exact(Solved(*(x[0] for x in fields)), narrow)
        assert bool(flow.exponent.any())


# Where the solver falls short -------------------------------------------------------------------------------


def absorbing_before_strong_readers() -> Network:
    """Token 1 absorbs; its reader's potential is 1e400, so the edge that nothing takes has a weight of 1e700."""
    return net_of([(0, 1, 1.0), (1, 2, 1e300), (2, 3, 1e200), (3, 4, 1e200)], 5, [0], [1, 4])


@every_engine
def test_an_absorbing_token_with_strong_readers(engine: str):
    net = absorbing_before_strong_readers()
    [got] = solve_by(engine, [net])
    assert_exact(got, net)


@every_engine
def test_an_absorbing_token_without_demand_behind_a_weak_route(engine: str):
    """Token 1 absorbs and demands nothing: its influence is 1 / h of the question, which is 1e-500."""
    edges = [(0, 1, 0.5), (0, 2, 1e-7), (1, 79, 0.5)] + [(t - 1, t, 1e-7) for t in range(3, 80)]
    net = net_of(edges, 80, [0], [1])
    [got] = solve_by(engine, [net], demand=[(torch.arange(80) == 79).double()])
    assert torch.allclose(got.throughput[2:], torch.ones(78, dtype=torch.float64), rtol=1e-12)


@every_engine
def test_small_shares_of_a_strong_flow_keep_their_digits(engine: str):
    """h is 1e305 and fits, g of token 2 is 1e-317 and has few digits left: its share is wrong in the seventh."""
    net = net_of([(0, 1, 1.0), (0, 2, 1e-12), (1, 3, 1e305), (2, 3, 1e305)], 4, [0], [3])
    [got] = solve_by(engine, [net])
    assert_exact(got, net)


def single(weight: float) -> FlowGraph:
    return chain([weight]).graph()


@pytest.mark.parametrize("weight", [1e-310, 5e-324])
def test_alpha_of_subnormal_capacities(weight: float):
    flow = solve(single(weight))
    assert near(flow.alpha, [weight], 1e-9)
    assert certify(flow).ok


def test_a_subnormal_potential_is_exact_or_balanced():
    """Subnormal numbers have few digits: a potential that would be one is computed in balanced form."""
    net = chain([1e-160, 0.3, 1e-155, 0.7])
    for engine in ENGINES:
        [got] = solve_by(engine, [net])
        assert_exact(got, net)


def _finite(flow: Tensor) -> bool:
    return bool(torch.isfinite(flow).all())


@every_engine
def test_an_infeasible_graph_stays_zero_whatever_its_weights(engine: str):
    net = net_of([(0, 1, 1e300), (1, 2, 1e300), (2, 3, 1e300), (5, 6, 1e-300), (6, 7, 1e-300)], 8, [0], [7])
    [got] = solve_by(engine, [net])
    assert not got.throughput.any()
    assert not got.source.any()
    assert _finite(got.g)
    assert (got.h > 0).tolist() == [False] * 5 + [True] * 3
