"""The numbers do not depend on torch's default dtype (pytorch/ao PR 2286: default bfloat16)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from flowgraph import (
    FlowGraph,
    attention_rollout,
    capacity_names,
    capture,
    compare,
    gap_report,
    hub_test,
    knockout,
    max_flow,
    solve,
    solve_rows,
    trace,
)
from tests.fixtures.tiny import RESPONSE, chat, tiny

OTHERS = (torch.bfloat16, torch.float16, torch.float64)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tokens() -> Tensor:
    return torch.randint(0, 255, (1, 30), generator=torch.Generator().manual_seed(0))


def attention() -> Tensor:
    rows = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float32).tril()
    return rows / rows.sum(-1, keepdim=True)


def captured_rows(capacity: str) -> list[Tensor]:
    model = tiny()[0]
    options = {}
    if capacity in ("relevance", "gradient", "gradient_positive"):
        options = {"answer": (torch.arange(30) == 29)[None]}
    rows = capture(model, tokens(), capacity=capacity, **options)
    return [rows.block(0, 30), rows.dense()]


def traced() -> list[Tensor]:
    made = trace(*tiny(), chat(), RESPONSE)
    steps = made.steps()
    with pytest.warns(UserWarning, match="should be what the model prefers"):
        relevance = made.relevance(tiny()[0])
    return [
        made.graph.capacity,
        made.throughput,
        made.potential,
        made.flow.edge_flow,
        steps.edge_flow,
        relevance.scores,
        made.flow.alpha,
    ]


def compared() -> list[Tensor]:
    one = trace(*tiny(), chat(), RESPONSE)
    other = trace(*tiny(), chat(), RESPONSE.replace("Step 1: ", ""))
    return [torch.tensor(compare(one, other).total_variation, dtype=torch.float64)]


def intervened() -> list[Tensor]:
    model, tokenizer = tiny()
    made = trace(model, tokenizer, chat(), RESPONSE)
    knocked = knockout(model, made, tokens=[30, 31])
    tested = hub_test(model, made, fractions=[0.2], seeds=range(2))
    return [knocked.before, knocked.kl, torch.tensor([run.change for run in tested.runs], dtype=torch.float64)]


def solved() -> list[Tensor]:
    rows = attention()
    graph = FlowGraph.from_rows(rows[0, 0], question=[0, 1], answer=[8])
    flow = solve(graph, source=torch.arange(9) + 1, demand=torch.full((9,), 0.1, dtype=torch.float64))
    of_rows = solve_rows(
        rows[0], question=(torch.arange(9) < 2).expand(3, 9), answer=(torch.arange(9) > 7).expand(3, 9)
    )
    return [
        graph.capacity,
        flow.h,
        flow.g,
        of_rows.throughput,
        attention_rollout(rows[:, 0]),
        max_flow(graph).edge_flow,
        torch.tensor(gap_report(solve(graph)).ratio, dtype=torch.float64),
    ]


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
@pytest.mark.parametrize("run", [traced, compared, intervened, solved])
def test_results_are_the_same_under_any_default(run: Callable[[], list[Tensor]], dtype: torch.dtype):
    right = run()
    with default_dtype(dtype):
        got = run()
    for wanted, number in zip(right, got, strict=True):
        assert number.dtype == wanted.dtype
        assert torch.equal(number, wanted)


@pytest.mark.parametrize("capacity", capacity_names())
def test_captured_rows_are_float32_under_any_default(capacity: str):
    right = captured_rows(capacity)
    with default_dtype(torch.bfloat16):
        got = captured_rows(capacity)
    for wanted, rows in zip(right, got, strict=True):
        assert rows.dtype == torch.float32
        assert torch.equal(rows, wanted)
