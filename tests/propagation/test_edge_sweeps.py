"""One suite for every way of running the two sweeps: over edges, over dense rows, over streamed rows."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.fixtures.networks import (
    ENGINES,
    GRAPH_ENGINES,
    KINDS,
    ROW_ENGINES,
    Network,
    Solved,
    near,
    network,
    solve_by,
)
from tests.reference import flow as reference
from tests.strategies import FlowGraph as Case
from tests.strategies import flow_graphs

FAST = tuple(engine for engine in ENGINES if engine != "reference")
DTYPES = st.sampled_from([torch.float32, torch.float64])
every_engine = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# The right numbers ------------------------------------------------------------------------------------------


@every_engine
@given(case=flow_graphs(max_nodes=9), dtype=DTYPES, data=st.data())
@settings(max_examples=60)
def test_small_graphs_against_exact_fractions(engine: str, case: Case, dtype: torch.dtype, data: st.DataObject):
    """All options at once. Capacities are exact in float32, so there is nothing to forgive."""
    assume(case.num_nodes > 1 or engine in GRAPH_ENGINES)  # solve_rows refuses a token in both regions
    vectors = st.lists(st.integers(0, 4), min_size=case.num_nodes, max_size=case.num_nodes)
    absorption = data.draw(st.sampled_from(["absorb", "pass_through"]))
    damping = data.draw(st.sampled_from([1.0, 0.5, 0.3]))
    source = data.draw(st.sampled_from(["uniform", "potential"]) | vectors)
    demand = data.draw(st.none() | vectors)
    edges = reference.effective_edges(case.edges, case.answer, absorption, damping)
    exact = reference.solve(
        case.num_nodes, edges, case.question, case.answer if demand is None else demand, source=source
    )
    [got] = solve_by(
        engine,
        [Network.of(case, dtype)],
        source=source if isinstance(source, str) else [torch.tensor(source).double()],
        demand=None if demand is None else [torch.tensor(demand).double()],
        absorption=absorption,
        damping=damping,
    )
    got = got.plain()
    assert near(got.h, [float(x) for x in exact.h])
    assert near(got.g, [float(x) for x in exact.g])
    assert near(got.source, [float(x) for x in exact.source])
    assert near(got.throughput, [float(x) for x in exact.throughput])


def options_for(net: Network, seed: int) -> dict:
    """One of the combinations of options, vectors included."""
    random = torch.Generator().manual_seed(seed)
    vector = torch.rand(net.num_tokens, generator=random, dtype=torch.float64)
    return {
        "source": ["uniform", "potential", vector * (vector > 0.5)][seed % 3],
        "demand": [None, vector.flip(0) * (vector.flip(0) > 0.7)][seed // 3 % 2],
        "absorption": ["absorb", "pass_through"][seed // 6 % 2],
        "damping": [1.0, 0.9][seed // 12 % 2],
    }


def assert_as_expected(engine: str, net: Network, options: dict) -> None:
    wanted = net.expected(**options)
    listed = {k: [v] if isinstance(v, Tensor) else v for k, v in options.items()}
    got = solve_by(engine, [net], **listed)[0].plain()
    for name in ("h", "source", "g", "throughput"):
        assert near(getattr(got, name), getattr(wanted, name)), name


@pytest.mark.parametrize("kind", KINDS)
@every_engine
@given(
    tokens=st.sampled_from([1, 2, 3, 63, 64, 65, 127, 128, 129, 255, 257]),
    dtype=DTYPES,
    seed=st.integers(0, 23),
    most=st.sampled_from([1.0, 3.0]),
)
@settings(max_examples=12)
def test_graphs_around_the_block_sizes(engine: str, kind: str, tokens: int, dtype: torch.dtype, seed: int, most: float):
    net = network(kind, tokens, seed, dtype, most)
    assert_as_expected(engine, net, options_for(net, seed))


@pytest.mark.parametrize(
    ("kind", "tokens", "seed"),
    [
        ("dense", 1000, 0),
        ("band", 1000, 13),
        ("chain", 4096, 1),
        ("band", 4096, 6),
        ("sink", 4096, 20),
        ("diamond", 4096, 3),
        ("disconnected", 4096, 4),
    ],
)
@pytest.mark.parametrize("engine", FAST)
def test_large_graphs(engine: str, kind: str, tokens: int, seed: int):
    net = network(kind, tokens, seed, torch.float32)
    assert_as_expected(engine, net, options_for(net, seed))


# A batch is its graphs --------------------------------------------------------------------------------------

MIXED = [
    network("dense", 150, 1),
    network("chain", 1),
    network("disconnected", 129, 2),
    network("edgeless", 7),
    network("sink", 257, 3),
    network("star", 2),
    network("band", 64, 4),
    network("sparse", 65, 5),
]
"""Feasible beside infeasible, short beside long, with edges and without."""


def close_to(one: Solved, other: Solved) -> bool:
    return all(near(getattr(one, name), getattr(other, name), 1e-13) for name in ("h", "g", "source", "throughput"))


@every_engine
@pytest.mark.parametrize("source", ["uniform", "potential"])
def test_a_batch_is_its_graphs_one_by_one_in_any_order(engine: str, source: str):
    together = solve_by(engine, MIXED, source=source)
    assert [bool(solved.source.any()) for solved in together] == [n in (0, 4, 5, 6, 7) for n in range(8)]
    for net, mine in zip(MIXED, together, strict=True):
        assert close_to(mine, solve_by(engine, [net], source=source)[0])
    order = torch.randperm(len(MIXED), generator=torch.Generator().manual_seed(7)).tolist()
    for at, moved in zip(order, solve_by(engine, [MIXED[n] for n in order], source=source), strict=True):
        assert close_to(moved, together[at])


@every_engine
def test_vectors_of_a_batch_belong_to_their_graphs(engine: str):
    demand = [torch.linspace(0, 1 + n, net.num_tokens).double() for n, net in enumerate(MIXED)]
    entry = [demand[n].flip(0) for n in range(len(MIXED))]
    options = {"absorption": "pass_through", "damping": 0.5}
    together = solve_by(engine, MIXED, source=entry, demand=demand, **options)
    for net, q, b, mine in zip(MIXED, entry, demand, together, strict=True):
        assert close_to(mine, solve_by(engine, [net], source=[q], demand=[b], **options)[0])


# Exact scaling ----------------------------------------------------------------------------------------------
# Scaling *every* capacity by 2**m multiplies a route of n edges by 2**(m * n): routes of different lengths change
# their shares, and nothing is provable. These three scalings multiply every term of every sum by one power of two, so
# each rounded result is the old one times that power, bit for bit, in whatever order the terms are added.


@every_engine
@given(kind=st.sampled_from(["dense", "band", "sink", "sparse"]), seed=st.integers(0, 99), power=st.integers(-40, 40))
@settings(max_examples=12)
def test_scaling_what_the_answer_reads_scales_h_and_keeps_throughput_to_the_bit(
    engine: str, kind: str, seed: int, power: int
):
    """Under absorption every route ends with exactly one edge into the answer."""
    net = network(kind, 140, seed)
    into_answer = net.answer[net.pairs[1]]
    scaled = net.with_capacity(net.capacity * torch.where(into_answer, 2.0**power, 1.0))
    [before], [after] = solve_by(engine, [net]), solve_by(engine, [scaled])
    assert torch.equal(after.throughput, before.throughput)
    assert torch.equal(after.h, torch.where(net.answer, before.h, before.h * 2.0**power))
    assert torch.equal(after.g, torch.where(net.answer, before.g, before.g * 2.0**-power))


@every_engine
@given(kind=st.sampled_from(["dense", "band", "sink", "sparse"]), seed=st.integers(0, 99), power=st.integers(-40, 40))
@settings(max_examples=12)
def test_units_of_the_tokens_and_of_the_demand_are_free(engine: str, kind: str, seed: int, power: int):
    """``C[t, s] * 2**(k[t] - k[s])`` and ``b[t] * 2**(m - k[t])`` give ``h * 2**(m - k)`` and the same flow."""
    net = network(kind, 140, seed)
    k = torch.randint(-30, 30, (140,), generator=torch.Generator().manual_seed(seed))
    source, target = net.pairs
    moved = net.with_capacity(net.capacity * torch.exp2((k[target] - k[source]).double()))
    demand = torch.exp2((power - k).double()) * net.answer
    [before], [after] = solve_by(engine, [net]), solve_by(engine, [moved], demand=[demand])
    assert torch.equal(after.throughput, before.throughput)
    assert torch.equal(after.h, before.h * torch.exp2((power - k).double()))
    assert torch.equal(after.g, before.g * torch.exp2((k - power).double()))


@every_engine
@pytest.mark.parametrize("kind", ["chain", "diamond"])
def test_scaling_every_capacity_is_exact_where_all_routes_from_a_token_are_equally_long(engine: str, kind: str):
    net = network(kind, 70)
    only_last = torch.arange(70) == 69
    net = Network(net.pairs, net.capacity, torch.arange(70) == 0, only_last)
    hops = 69 - torch.arange(70) if kind == "chain" else torch.tensor([2] + [1] * 68 + [0])
    before, after = (solve_by(engine, [net.with_capacity(net.capacity * scale)])[0].plain() for scale in (1, 8))
    assert torch.equal(after.throughput, before.throughput)
    assert torch.equal(after.h, before.h * torch.exp2(3.0 * hops.double()))


# Bits -------------------------------------------------------------------------------------------------------


@every_engine
def test_solving_twice_gives_the_same_bits(engine: str):
    for nets in ([network("dense", 300)], [network("sparse", 1000)], MIXED):
        first, second = solve_by(engine, nets), solve_by(engine, nets)
        assert all(one.same_bits(other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("engine", ["numba", "rows numba"])
def test_threads_leave_every_bit_as_it_is(engine: str):
    """Graphs large enough to be shared out: more than 100,000 edges for each thread."""
    nets = [network("dense", tokens, tokens, torch.float32) for tokens in (520, 3, 470, 500)]
    nets.insert(2, network("edgeless", 40, dtype=torch.float32))
    solved = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        solved[threads] = solve_by(engine, nets)
    for threads in (2, 3):
        assert all(one.same_bits(other) for one, other in zip(solved[1], solved[threads], strict=True))


# Weights in any form ----------------------------------------------------------------------------------------


@every_engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_taken_at_their_exact_value(engine: str, dtype: torch.dtype):
    net = network("dense", 131, dtype=dtype)
    [narrow], [wide] = solve_by(engine, [net]), solve_by(engine, [net.with_capacity(net.capacity.double())])
    assert close_to(narrow, wide)


@pytest.mark.parametrize("engine", ROW_ENGINES)
def test_matrices_that_are_views(engine: str):
    from flowgraph import solve_rows

    nets = [network("dense", 70, seed) for seed in range(3)]
    question, answer = torch.stack([n.question for n in nets]), torch.stack([n.answer for n in nets])
    matrix, backend = torch.stack([n.matrix(70) for n in nets]), engine.removeprefix("rows ")

    def throughput(rows: Tensor) -> Tensor:
        return solve_rows(rows, question=question, answer=answer, preset=None, backend=backend).throughput  # type: ignore[arg-type]

    wanted = throughput(matrix)
    roomy = torch.zeros(3, 90, 90, dtype=torch.float64)
    roomy[:, 10:80, 5:75] = matrix
    for view in (matrix.mT.contiguous().mT, matrix.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        assert near(throughput(view), wanted, 1e-13)
    assert near(throughput(roomy[:, 10:80, 5:75]), wanted, 1e-13)
    alike = throughput(matrix[:1].expand(3, -1, -1))
    assert near(alike[0], wanted[0], 1e-13)
