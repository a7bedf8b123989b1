"""Estimates: counts worked out by hand, how they grow, and numbers that are refused."""

from __future__ import annotations

import pytest

import flowgraph as fg
from flowgraph.attention.layer_record import SCRATCH_BYTES
from flowgraph.capacities import builtin, registry
from flowgraph.cost import estimate as module
from flowgraph.cost.capacity_costs import CAPACITY_COSTS
from flowgraph.cost.work import Batch, RowSteps, Work, forward
from flowgraph.flow import solve_rows

TOY = fg.ModelShape("toy", 2, 8, 2, 1, 4, 16, 10, 100_000)
EVEN = fg.Machine("even", {"bfloat16": 1.0, "float16": 1.0, "float32": 1.0, "float64": 1.0}, 1.0, 1.0, 1.0, 1.0)


def test_a_forward_pass_of_a_toy_is_counted_by_hand():
    # Weights of a layer: queries 8 x 8, keys and values 8 x 4 each, output 8 x 8, MLP 3 x 8 x 16.
    assert TOY.layer_weights == 64 + 2 * 32 + 64 + 384
    linear, attention, logits = forward(TOY, Batch(3, 5, 0, 2, "float32", 4))
    assert linear.flops == 2 * 2 * 576 * 3 * 5
    # Two products of 2 heads x 4 entries over half of 5 x 5 cells: 2 x 2 x 8 x 12.5 FLOPs.
    assert attention.flops == 2 * 2 * 8 * 12.5 * 3 * 2
    assert logits.flops == 2 * 8 * 10 * 3 * 2


def test_the_time_is_that_of_the_slowest_resource():
    assert Work(10.0, 1.0, 1, "float32").seconds(EVEN, 0.5, 1.0) == 20
    assert Work(1.0, 10.0, 1, "float32").seconds(EVEN, 1.0, 0.5) == 20
    assert Work(1.0, 1.0, 7, "float32").seconds(EVEN, 1.0, 1.0) == 7


def test_rows_are_cut_as_capture_cuts_them():
    # One sequence of 300 tokens fits whole blocks: 128, 128 and 44 rows over 128, 256 and 300 keys.
    steps = RowSteps.of(2, 1, 300, 0, SCRATCH_BYTES)
    assert (steps.steps, steps.keys) == (3, 128 + 256 + 300)
    assert steps.cells == 128 * 128 + 128 * 256 + 44 * 300
    # Memory for the weights of one row at a time leaves exactly the triangle.
    assert RowSteps.of(1, 1, 10, 0, 40) == RowSteps(cells=55, keys=55, steps=10)
    # The rows of a shared prompt are those of one sequence.
    assert RowSteps.of(2, 4, 256, 128, SCRATCH_BYTES).cells == 128 * 128 + 4 * 128 * 256


def test_every_capacity_of_the_package_has_figures():
    registered = {
        name for name in fg.capacity_names() if registry.find_capacity(name).function.__module__ == builtin.__name__
    }
    assert registered == set(CAPACITY_COSTS)
    for name, cost in CAPACITY_COSTS.items():
        assert (cost.backward is not None) == registry.find_capacity(name).gradient
        assert cost.sweeps == (not registry.find_capacity(name).signed)


def test_the_size_of_a_matrix_is_that_of_solve_rows():
    assert module.DENSE_BYTES == solve_rows._DENSE_BYTES


def test_stages_follow_from_the_capacity():
    def names(**choices):
        return [stage.name for stage in fg.estimate_cost("4b", tokens=1024, **choices).stages if stage.part == "credit"]

    assert names() == ["recording", "rows", "sweeps"]
    assert names(capacity="vtrace") == ["recording", "projection", "rows", "sweeps"]
    assert names(capacity="relevance") == ["pass with gradients", "backward", "recording", "rows"]
    assert names(max_edges="auto") == ["recording", "rows", "edges", "sweeps over edges"]
    assert names(max_edges=100) == ["recording", "rows", "sweeps", "edges", "sweeps over edges"]


def test_figures_add_up_and_grow_with_what_they_depend_on():
    small = fg.estimate_cost("8b", tokens=1024, responses=4)
    assert small.step_seconds == pytest.approx(sum(s.seconds for s in small.stages if s.part == "step"))
    assert sum(stage.share for stage in small.stages) == pytest.approx(1 + small.credit_share)
    assert len(small.layers) == 12
    for choices in ({"tokens": 2048}, {"responses": 8}, {"layers": "all"}, {"capacity": "vtrace"}):
        other = fg.estimate_cost("8b", **({"tokens": 1024, "responses": 4} | choices))
        assert other.credit_seconds > small.credit_seconds, choices
    # A shared prompt, more scratch memory or a faster memory make it cheaper.
    for choices in ({"prompt": 512}, {"scratch_bytes": 2**30}, {"machine": "h200"}):
        other = fg.estimate_cost("8b", tokens=1024, responses=4, **choices)
        assert other.credit_seconds < small.credit_seconds, choices


def test_each_hop_is_one_more_backward_pass_without_logits():
    def flops(hops):
        return fg.estimate_cost("8b", tokens=1024, capacity="relevance", hops=hops).stage("backward").flops

    logits = 2 * 4096 * 128256 * 1024
    assert flops(1) - flops(0) == pytest.approx(flops(2) - flops(1) + logits)
    assert flops(2) - flops(1) == pytest.approx(flops(0) - logits)


def test_efficiencies_scale_the_time():
    half = fg.estimate_cost("8b", tokens=1024, responses=4, compute_efficiency=0.25)
    full = fg.estimate_cost("8b", tokens=1024, responses=4, compute_efficiency=0.5)
    assert half.stage("scoring pass").seconds == pytest.approx(2 * full.stage("scoring pass").seconds, rel=0.05)
    assert half.machine.compute_efficiency == 0.25


def test_checkpointing_runs_the_layers_once_more():
    plain = fg.estimate_cost("8b", tokens=1024)
    again = fg.estimate_cost("8b", tokens=1024, checkpointing=True)
    assert again.step_seconds > plain.step_seconds
    assert again.credit_seconds == plain.credit_seconds


def test_values_are_marked_as_computed():
    estimate = fg.estimate_cost("8b", tokens=1024)
    assert estimate.to_dict()["basis"] == "computed"
    assert "computed" in repr(estimate)
    assert estimate.table() == estimate.to_dict()["stages"]


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"tokens": 0}, r"tokens: must be a positive integer, got 0; count"),
        ({"tokens": -5}, r"tokens: must be a positive integer, got -5; count"),
        ({"tokens": 1.5}, r"tokens: must be a positive integer, got 1.5; count"),
        ({"tokens": 50_000}, r"tokens: must not exceed the context of Qwen3-4B, 40960, got 50000; shorten"),
        ({"responses": 0}, r"responses: must be a positive integer, got 0; 1 is"),
        ({"prompt": 100}, r"prompt: must lie in 0..99, fewer than tokens, got 100; 0 shares"),
        ({"logits": 101}, r"logits: must not exceed tokens, 100, got 101; leave"),
        ({"dtype": "int8"}, r"dtype: must be one of bfloat16, float16, float32, got 'int8'; bfloat16"),
        ({"lora_rank": 0}, r"lora_rank: must be a positive integer, got 0; 16"),
        ({"scratch_bytes": 0}, r"scratch_bytes: must be a positive integer, got 0; 33554432"),
        ({"capacity": "magic"}, r"capacity: must be one of attention, .*got 'magic'; for one of your own"),
        ({"machine": "a100"}, r"machine: must be h100, h200, cpu or a JSON file, got 'a100'"),
        ({"config": "9b"}, r"config: must be 4b, 8b, 70b, .*got '9b'"),
        ({"config": 4}, r"config: must be a name, a path or a ModelShape, got int; names"),
        ({"layers": "40-50"}, r"layers: must lie in 0..35, got"),
        (
            {"layers": "all", "capacity": "relevance"},
            r"layers: cannot be chosen with capacity='relevance'.*got 'all'; l",
        ),
        ({"hops": 2}, r"hops: must be 0 with capacity='attention', got 2; emission"),
        ({"hops": -1, "capacity": "relevance"}, r"hops: must be at least 0, got -1; 0 makes"),
        ({"max_edges": 0}, r"max_edges: must be 'auto', 'all' or a positive number, got 0"),
        ({"compute_efficiency": 0.0}, r"compute_efficiency: must be a positive finite number, got 0.0; give"),
        ({"bandwidth_efficiency": 2.0}, r"bandwidth_efficiency: must lie in \(0, 1\], got 2; no machine"),
        ({"checkpointing": 1}, r"checkpointing: must be True or False, got 1; True"),
    ],
)
def test_bad_input_is_refused(choices: dict, message: str):
    arguments = {"config": "4b", "tokens": 100} | choices
    config = arguments.pop("config")
    with pytest.raises(fg.InvalidInputError, match=message):
        fg.estimate_cost(config, **arguments)
