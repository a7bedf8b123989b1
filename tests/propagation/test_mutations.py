"""Mutation tests: each mutant changes one line of a sweep, and both the certificate and the reference must fail.

A mutant is data: the function, the text of the line, the replacement, what that breaks, the ways to solve that run
through it, and the check of the certificate that must fail (among others). On every way, over a fixed set of graphs and
options, the comparison with the reference of ``tests/reference`` must fail too; flows over rows have no certificate.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch

from flowgraph import certify_each, solve
from tests.fixtures.networks import ENGINES, GRAPH_ENGINES, Network, Solved, network, solve_by
from tests.reference import arrays

# The ways that run through each part of the engine.
EDGES = ("dense", "scatter", "numba", "reference")
BLOCKS = ("dense", "scatter", "rows dense", "streamed rows")
TILES = ("dense", "rows dense", "streamed rows")
SPARSE = ("scatter",)
TENSOR = ("dense",)
COMPILED = ("numba",)
COMPILED_ROWS = ("rows numba",)
LOOPS = ("reference",)
MATRICES = ("rows dense", "rows numba")
STREAMED = ("streamed rows",)


class Mutant(NamedTuple):
    """A wrong line in one function."""

    where: str  # module:function, below flowgraph.propagation
    old: str
    new: str
    breaks: str
    ways: tuple[str, ...]
    check: str  # of the certificate; "" where no way has one


OUT_MASS = "out-mass"
INFLUENCE_CHECK = "influence"
REACHABILITY = "reachability"
SOURCE = "source"


def mutants(where: str, ways: tuple[str, ...], check: str, *changes: tuple[str, str, str]) -> list[Mutant]:
    """Mutants of one function, each given as (old text, new text, what that breaks)."""
    return [Mutant(where, old, new, breaks, ways, check) for old, new, breaks in changes]


POTENTIAL = [
    *mutants(
        "block_substitution:potential",
        BLOCKS,
        OUT_MASS,
        ("factor * accumulated", "-factor * accumulated", "sign"),
        ("rows.push(h[:, here]", "rows.push(-h[:, here]", "sign of what is pushed"),
        ("operator.num_tokens, ", "operator.num_tokens - operator.block, ", "last block"),
        ("operator.block))", "operator.block)[1:])", "first block forgotten"),
        (
            "reversed(token_blocks(operator.num_tokens, operator.block))",
            "token_blocks(operator.num_tokens, operator.block)",
            "blocks in the wrong order",
        ),
        ("rows.push(h[:, here], accumulated)", "pass", "blocks push nothing"),
        ("rows.push(h[:, here]", "rows.push(known", "what is pushed is not solved yet"),
        ("_solve_unit_triangular(inner, known, upper=True)", "known", "system within a block ignored"),
        ("factor[:, None, :]).mT", "factor[:, None, :])", "inner not transposed"),
        ("rows.inner * factor[:, None, :]", "rows.inner", "inner undamped, answers propagate"),
        ("factor * accumulated", "accumulated", "mask missing: answers propagate"),
        ("factor * accumulated", "factor**2 * accumulated", "damped twice"),
        ("factor[:, None, :]", "factor[:, :, None]", "mask of the reader, not of the read"),
        ("demand[:, here] +", "0 *", "demand forgotten"),
        ("accumulated = torch.zeros_like(demand)", "accumulated = demand.clone()", "demand counted twice"),
    ),
    *mutants(
        "block_substitution:_solve_unit_triangular",
        BLOCKS,
        OUT_MASS,
        ("solve_triangular(-inner", "solve_triangular(inner", "sign within blocks"),
        (
            "-inner, column, upper=upper, unitriangular=True)",
            "-inner.float(), column.float(), upper=upper, unitriangular=True).double()",
            "float32 within blocks",
        ),
    ),
    *mutants(
        "operators:DenseRows.push",
        TILES,
        OUT_MASS,
        ("y[:, None, :] @ self._before", "y.flip(-1)[:, None, :] @ self._before", "rows in reverse"),
        ("+= (y", "= (y", "overwritten, not added"),
        ("@ self._before", "@ self._before.float().double()", "float32"),
    ),
    *mutants(
        "operators:DenseRows.__init__",
        TILES,
        OUT_MASS,
        (
            "float64_weights[..., start:].tril(-1)",
            "float64_weights[..., start:].tril(-2)",
            "edges to the next token lost within a block",
        ),
    ),
    *mutants(
        "operators:_SparseRows.push",
        SPARSE,
        OUT_MASS,
        ("scatter_add_(0, self.source,", "scatter_(0, self.source,", "overwritten, not added"),
        ("index_select(0, self.row)", "index_select(0, self.row.roll(1))", "off by one"),
        ("self.weight *", "self.weight.roll(1) *", "weights of the edges beside"),
        ("accumulated = self.weight", "accumulated = self.weight.float()", "float32"),
    ),
    *mutants(
        "numba_backend:_sweep_edges",
        COMPILED,
        OUT_MASS,
        ("solution = x.detach().double().clone()", "solution = x.detach().float().double()", "float32"),
    ),
    *mutants(
        "numba_kernels:potential",
        COMPILED,
        OUT_MASS,
        # Skipping values below 1e-200 would change nothing: the range check sees it, and a balanced system has
        # no such values.
        (
            "h[t] += propagation_factor[t] * accumulated[t]",
            "h[t] -= propagation_factor[t] * accumulated[t]",
            "sign",
        ),
        ("range(last - 1, first - 1, -1)", "range(last - 2, first - 1, -1)", "last token forgotten"),
        ("range(last - 1, first - 1, -1)", "range(last - 1, first, -1)", "first token forgotten"),
        ("range(last - 1, first - 1, -1)", "range(first, last)", "tokens in the wrong order"),
        ("row_ptr[t + 1])", "row_ptr[t + 1] - 1)", "last edge of each row"),
        ("range(row_ptr[t], row_ptr", "range(row_ptr[t] + 1, row_ptr", "first edge of each row"),
        ("propagation_factor[t] * accumulated[t]", "accumulated[t]", "mask missing, undamped"),
        ("propagation_factor[t] * accumulated[t]", "propagation_factor[t] ** 2 * accumulated[t]", "damped twice"),
        ("accumulated[source[edge]] +=", "accumulated[source[edge]] =", "overwritten"),
        ("weight[edge] * value", "weight[edge - 1] * value", "weights off by one"),
        ("if value != 0.0", "if value > 0.5", "small values skipped"),
        ("weight[edge] * value", "np.float32(weight[edge] * value)", "float32"),
    ),
    *mutants(
        "numba_kernels:dense_potential",
        COMPILED_ROWS,
        "",
        ("range(t, t - 4, -1)", "range(t, t - 3, -1)", "last of four rows"),
        (
            "for s in range(t - 3, row):",
            "for s in range(t - 3, row - 1):",
            "edge to the next token within four rows",
        ),
        ("for s in range(t - 3):", "for s in range(t - 4):", "column before four rows"),
        ("matrix[t - 1, s] * h1", "matrix[t - 1, s] * h2", "values of another row"),
        ("+ matrix[t - 3, s] * h3", "- matrix[t - 3, s] * h3", "sign"),
        ("for row in range(t, -1, -1):", "for row in range(t, 0, -1):", "first token forgotten"),
        ("propagation_factor[row] * accumulated[row]", "accumulated[row]", "mask missing, undamped"),
        ("h1 = h[t - 1]", "h1 = h[t - 2]", "rows mixed up"),
        ("+= matrix[t, s] * h0", "= matrix[t, s] * h0", "overwritten"),
        ("for s in range(row):", "for s in range(row - 1):", "edge to the next token in the rest"),
        ("t -= 4", "t -= 4 + (t > 90)", "a row skipped"),
    ),
    *mutants(
        "reference:potential",
        LOOPS,
        OUT_MASS,
        ("h[s] += d[s] * w * h[t]", "h[s] -= d[s] * w * h[t]", "sign"),
        ("h[s] += d[s] * w * h[t]", "h[s] += w * h[t]", "mask missing, undamped"),
        ("h[s] += d[s] * w * h[t]", "h[s] += d[t] * w * h[t]", "mask of the reader"),
        ("h[s] += d[s] * w * h[t]", "h[t] += d[s] * w * h[s]", "transposed"),
        ("h[s] += d[s] * w * h[t]", "h[s] += d[s] ** 2 * w * h[t]", "damped twice"),
        ("reversed(_edges(edge_index, weight))", "_edges(edge_index, weight)", "order"),
        ("reversed(_edges(edge_index, weight))", "reversed(_edges(edge_index, weight)[1:])", "first edge"),
        ("reversed(_edges(edge_index, weight))", "reversed(_edges(edge_index, weight)[:-1])", "last edge"),
        ("_edges(edge_index, weight)", "_edges(edge_index, weight.roll(1))", "weights off by one"),
        ("_edges(edge_index, weight)", "_edges(edge_index, weight.bfloat16())", "half precision"),
        ("demand.double()", "(demand > 0).double()", "demand taken for a mask"),
    ),
]

INFLUENCE = [
    *mutants(
        "block_substitution:influence_steps",
        BLOCKS,
        INFLUENCE_CHECK,
        ("+ rows.pull", "- rows.pull", "sign"),
        ("g[:, here] + rows.pull(propagated)", "g[:, here]", "blocks receive nothing"),
        ("g[:, here] + rows.pull", "rows.pull", "what enters is lost"),
        ("operator.num_tokens, ", "operator.num_tokens - operator.block, ", "last block"),
        ("operator.block):", "operator.block)[1:]:", "first block forgotten"),
        (
            "token_blocks(operator.num_tokens, operator.block)",
            "reversed(token_blocks(operator.num_tokens, operator.block))",
            "blocks in the wrong order",
        ),
        ("_solve_unit_triangular(inner, known, upper=False)", "known", "system within a block ignored"),
        ("rows.inner * factor[:, None, :]", "rows.inner.mT", "inner transposed"),
        ("rows.inner * factor[:, None, :]", "rows.inner", "inner undamped, answers propagate"),
        ("factor[:, None, :]", "factor[:, :, None]", "mask of the reader"),
        ("factor * g[:, here]", "g[:, here]", "mask missing, undamped"),
        ("factor * g[:, here]", "factor**2 * g[:, here]", "damped twice"),
        ("factor * g[:, here]", "factor * known", "propagated before solved"),
        ("factor * g[:, here]", "(factor * g[:, here]).float()", "float32"),
    ),
    *mutants(
        "block_substitution:_solve_unit_triangular",
        BLOCKS,
        OUT_MASS,
        ("unitriangular=True", "unitriangular=False", "diagonal not implied"),
    ),
    *mutants(
        "block_substitution:_solve_unit_triangular",
        BLOCKS,
        INFLUENCE_CHECK,
        ("upper=upper", "upper=True", "no system within a block"),
    ),
    *mutants(
        "operators:DenseRows.pull",
        TILES,
        INFLUENCE_CHECK,
        ("self._before @ x", "self._before @ x.flip(0)", "another graph"),
        ("(self._before @", "(self._before.flip(-2) @", "rows in reverse"),
        ("self._before @", "self._before.float().double() @", "float32"),
    ),
    *mutants(
        "operators:DenseRows.__init__",
        TILES,
        OUT_MASS,
        (
            "float64_weights[..., :start]",
            "float64_weights[..., :start].tril(start - 2)",
            "column before the block lost",
        ),
    ),
    *mutants(
        "operators:_SparseRows.pull",
        SPARSE,
        INFLUENCE_CHECK,
        ("self.weight * x", "self.weight.roll(1) * x", "weights of the edges beside"),
        (
            "x.view(-1).index_select(0, self.source)",
            "x.view(-1).roll(1).index_select(0, self.source)",
            "off by one",
        ),
        ('reduce="sum"', 'reduce="max"', "largest edge only"),
        ("received = self.weight *", "received = self.weight.float() *", "float32"),
        ("self.row_ptr, reduce", "torch.cat([self.row_ptr[:1], self.row_ptr[:-1]]), reduce", "rows off by one"),
    ),
    *mutants(
        "numba_kernels:influence",
        COMPILED,
        INFLUENCE_CHECK,
        ("g[t] += received", "g[t] -= received", "sign"),
        ("g[t] += received", "g[t] = received", "what enters is lost"),
        ("range(first, last)", "range(first, last - 1)", "last token forgotten"),
        ("range(first, last)", "range(first + 1, last)", "first token forgotten"),
        ("range(first, last)", "range(last - 1, first - 1, -1)", "order"),
        ("row_ptr[t + 1])", "row_ptr[t + 1] - 1)", "last edge of each row"),
        ("range(row_ptr[t], row_ptr", "range(row_ptr[t] + 1, row_ptr", "first edge of each row"),
        ("propagation_factor[t] * g[t]", "g[t]", "mask missing, undamped"),
        ("propagation_factor[t] * g[t]", "propagation_factor[t] ** 2 * g[t]", "damped twice"),
        (
            "propagated[t] = propagation_factor[t] * g[t]",
            "propagated[t] = propagation_factor[t] * received",
            "what enters is not propagated",
        ),
        ("weight[edge] * propagated", "weight[edge - 1] * propagated", "weights off by one"),
        ("g[t] += received", "g[t] += np.float32(received)", "float32"),
    ),
    *mutants(
        "numba_kernels:dense_influence",
        COMPILED_ROWS,
        "",
        (
            "propagated[row] = propagation_factor[row] * g[row]",
            "propagated[row] = g[row]",
            "mask missing, undamped",
        ),
        (
            "propagated[row] = propagation_factor[row] * g[row]",
            "propagated[row] = propagation_factor[row] ** 2 * g[row]",
            "damped twice",
        ),
        ("g[t + 3] += sum3", "g[t + 3] = sum3", "what enters is lost"),
        ("g[t + 1] += sum1", "g[t + 1] += sum0", "sum of another row"),
        ("sum3 += matrix[t + 3, s] * x", "sum3 -= matrix[t + 3, s] * x", "sign"),
        ("for s in range(t):", "for s in range(t - 1):", "column before four rows"),
        ("for s in range(t, row):", "for s in range(t + 1, row):", "first column within four rows"),
        ("range(in_fours, g.size)", "range(in_fours + 1, g.size)", "first of the rest"),
        ("range(0, in_fours, 4)", "range(4, in_fours, 4)", "first four rows"),
        ("range(t, t + 4)", "range(t, t + 3)", "last of four rows"),
        ("sum2 += matrix[t + 2, s] * x", "sum2 += matrix[t + 2, s + 1] * x", "off by one"),
        ("sum0 += matrix[t, s] * x", "sum0 += np.float32(matrix[t, s] * x)", "float32"),
    ),
    *mutants(
        "reference:influence",
        LOOPS,
        INFLUENCE_CHECK,
        ("g[t] += w * d[s] * g[s]", "g[t] -= w * d[s] * g[s]", "sign"),
        ("g[t] += w * d[s] * g[s]", "g[t] += w * g[s]", "mask missing, undamped"),
        ("g[t] += w * d[s] * g[s]", "g[t] += w * d[t] * g[s]", "mask of the reader"),
        ("g[t] += w * d[s] * g[s]", "g[s] += w * d[s] * g[t]", "transposed"),
        ("g[t] += w * d[s] * g[s]", "g[t] = w * d[s] * g[s]", "overwritten"),
        ("g[t] += w * d[s] * g[s]", "g[t] += w * d[s] ** 2 * g[s]", "damped twice"),
        ("in _edges(edge_index, weight)", "in reversed(_edges(edge_index, weight))", "order"),
        ("in _edges(edge_index, weight)", "in _edges(edge_index, weight)[1:]", "first edge"),
        ("in _edges(edge_index, weight)", "in _edges(edge_index, weight)[:-1]", "last edge"),
        ("_edges(edge_index, weight)", "_edges(edge_index, weight.roll(1))", "weights off by one"),
        ("_edges(edge_index, weight)", "_edges(edge_index, weight.bfloat16())", "half precision"),
    ),
]

# The last edge of a block lies within the block, so the system of the block has it: no mutant drops it.
BOTH = [
    *mutants(
        "operators:SparseOperator.__init__",
        SPARSE,
        OUT_MASS,
        ("weight[self.blocks.order]", "weight", "not in block order"),
    ),
    *mutants(
        "operators:SparseOperator.rows",
        SPARSE,
        OUT_MASS,
        (
            "self.weight[edges].double()",
            "self.weight[edges].double().index_fill(0, torch.tensor([0]), 0.0)",
            "first edge of each block",
        ),
        (
            "inner_weight = self.weight[blocks.inner_edge[cells]]",
            "inner_weight = self.weight[blocks.inner_edge[cells]].flip(0)",
            "cells mixed up",
        ),
        ("blocks.inner_cell[cells]", "blocks.inner_cell[cells].roll(1)", "cells off by one"),
        ("self.weight[edges].double()", "self.weight.roll(1)[edges].double()", "boundaries off by one"),
    ),
    *mutants(
        "topology:EdgeBlocks.of",
        SPARSE,
        OUT_MASS,
        (
            "torch.argsort(block_of_edge, stable=True)",
            "torch.argsort(block_of_edge, descending=True, stable=True)",
            "wrong order",
        ),
        (
            "source >= block_of_edge * block",
            "source > block_of_edge * block",
            "first column of each block's system",
        ),
        (
            "row[inside] * block + source[inside] % block",
            "graph[inside] * block * block + source[inside] % block * block + target_in_block[inside]",
            "inner transposed",
        ),
        ("source=graph * num_tokens + source", "source=source", "sources of the first graph of the batch"),
        (
            "row = graph * block + target_in_block",
            "row = target_in_block",
            "targets of the first graph of the batch",
        ),
        (
            "source_node, target_node = topology.edge_index",
            "source_node, target_node = topology.edge_index; "
            "source_node = source_node - topology.position[source_node].sign()",
            "outdated edges",
        ),
        (
            "inner_ends=torch.searchsorted(block_of_edge[inside], block_limits)",
            "inner_ends=torch.searchsorted(block_of_edge[inside], block_limits + 1)",
            "blocks off by one",
        ),
    ),
    *mutants(
        "topology:EdgeBlocks.of",
        SPARSE,
        INFLUENCE_CHECK,
        ("torch.argsort(block_of_edge, stable=True)", "torch.argsort(block_of_edge)", "order not stable"),
    ),
    *mutants(
        "topology:Topology.row_ptr",
        COMPILED,
        OUT_MASS,
        (
            "self.edge_index[1].contiguous(), nodes",
            "self.edge_index[1].contiguous(), nodes, right=True",
            "rows off by one",
        ),
    ),
    *mutants(
        "topology:Topology.source_int32",
        COMPILED,
        OUT_MASS,
        (
            "self.edge_index[0].to",
            "self.position[self.edge_index[0]].to",
            "sources of the first graph of the batch",
        ),
        ("self.edge_index[0].to", "(self.edge_index[0] - 1).clamp_min(0).to", "outdated sources"),
    ),
    *mutants(
        "topology:Topology.unpad",
        ("dense", "scatter"),
        OUT_MASS,
        (
            "x[self.graph_of_node, self.position]",
            "x.roll(1, 0)[self.graph_of_node, self.position]",
            "another graph of the batch",
        ),
    ),
    *mutants(
        "topology:Topology.pad",
        ("dense", "scatter"),
        OUT_MASS,
        (
            "padded[self.graph_of_node, self.position]",
            "padded[0 * self.graph_of_node, self.position]",
            "all graphs of the batch in the first",
        ),
    ),
    *mutants(
        "topology:Topology.total",
        EDGES,
        SOURCE,
        (
            'scatter(x, self.graph_of_node, dim_size=self.num_graphs, reduce="sum")',
            "x.sum().expand(self.num_graphs)",
            "one unit for the whole batch",
        ),
    ),
    *mutants(
        "edge_sweeps:_matrices",
        TENSOR,
        OUT_MASS,
        (
            "topology.position[target], topology.position[source]]",
            "topology.position[source], topology.position[target]]",
            "transposed",
        ),
        ("matrix[graph,", "matrix[0 * graph,", "all graphs of the batch in the first"),
        ("] = weight", "] = weight.roll(1)", "weights off by one"),
    ),
    *mutants(
        "edge_sweeps:EdgeSweeps._solve_in_blocks",
        ("dense", "scatter"),
        OUT_MASS,
        (
            "topology.pad(self.propagation_factor, operator.num_tokens)",
            "topology.pad(self.propagation_factor, operator.num_tokens) ** 0",
            "mask missing, undamped",
        ),
    ),
    *mutants(
        "edge_sweeps:EdgeSweeps._sparse_operator",
        SPARSE,
        OUT_MASS,
        ("self._operator_weight is not weight", "False", "weights from before the balancing"),
    ),
    *mutants(
        "numba_backend:_sweep_edges",
        COMPILED,
        OUT_MASS,
        ("propagation_factor.numpy()", "np.ones(solution.numel())", "mask missing, undamped"),
        ("_node_ranges(topology)", "_node_ranges(topology)[:-1]", "last share of the batch"),
    ),
    *mutants(
        "numba_backend:_node_ranges",
        COMPILED,
        INFLUENCE_CHECK,
        (
            "return [(0, topology.num_nodes)]",
            "return [(topology.num_nodes // 3, topology.num_nodes), (0, topology.num_nodes // 3)]",
            "shares that end inside a graph",
        ),
    ),
    *mutants(
        "numba_backend:_sweep_matrices",
        COMPILED_ROWS,
        "",
        (
            "matrices[b]",
            "matrices[b - 1]",
            "another graph of the batch",
        ),
        ("propagation_factor[b].numpy()", "np.ones(solution.shape[1])", "mask missing, undamped"),
    ),
    *mutants(
        "operators:DenseOperator.rows",
        ("dense", "rows dense"),
        OUT_MASS,
        ("self.matrix[:, start:stop, :stop]", "self.matrix.mT[:, start:stop, :stop]", "transposed"),
        (
            "self.matrix[:, start:stop, :stop]",
            "self.matrix.flip(0)[:, start:stop, :stop]",
            "another graph of the batch",
        ),
    ),
    *mutants(
        "operators:StreamedOperator.rows",
        STREAMED,
        "",
        (
            "self.source.block(start, stop)",
            "self.source.block(0, stop)[:, : stop - start]",
            "rows of another block",
        ),
    ),
]

ENTRY = [
    *mutants(
        "conservation:_source_distribution",
        ENGINES,
        SOURCE,
        (
            "(question & reaches).to(potential.dtype)",
            "question.to(potential.dtype)",
            "question tokens that reach nothing counted",
        ),
        ("masked_ratio(share > 0, share, total)", "share", "not normalised"),
        (
            "(scale_exponent - sweeps.broadcast(largest)).clamp_max(0)",
            "0 * scale_exponent",
            "scale exponents ignored",
        ),
        ("scaled(potential, relative)", "(potential > 0).double()", "rule"),
        ("torch.where(enters, scaled", "torch.where(reaches, scaled", "tokens outside the question"),
        ("sweeps.broadcast(sweeps.total(share))", "sweeps.total(share).sum()", "one unit for the whole batch"),
        (
            "torch.where(enters, scale_exponent, _NO_EXPONENT)",
            "scale_exponent",
            "exponents of tokens outside the question",
        ),
    ),
    *mutants(
        "conservation:_source_distribution",
        ENGINES,
        "reference source",
        ("share = rule * reaches", "share = (rule > 0) * reaches.double()", "a vector taken for a mask"),
    ),
    *mutants(
        "conservation:inflow",
        ENGINES,
        INFLUENCE_CHECK,
        ("masked_ratio(source > 0, source, potential)", "source", "per token"),
        ("masked_ratio(source > 0, source, potential)", "source * potential", "times the potential"),
        ("source > 0, source,", "source > 0, source.float(),", "float32"),
    ),
    *mutants(
        "conservation:_is_in_range",
        ENGINES,
        REACHABILITY,
        ("return not sweeps.has_edge", "return True or not sweeps.has_edge", "unseen underflow"),
    ),
    *mutants(
        "conservation:conserve",
        ENGINES,
        OUT_MASS,
        (
            "balanced_weight = sweeps.balanced(weight, scale_exponent)",
            "balanced_weight = weight",
            "weights not balanced",
        ),
        ("balanced_demand = scaled(demand, -scale_exponent)", "balanced_demand = demand", "demand not balanced"),
        (
            "sweeps.balanced(weight, scale_exponent)",
            "sweeps.balanced(weight, -scale_exponent)",
            "sign of the exponent",
        ),
    ),
    *mutants(
        "scaling:_log_potentials",
        ENGINES,
        "reference h",
        (
            "log_h[t] = np.logaddexp2(log_demand[t],",
            "log_h[t] = 0 * np.logaddexp2(log_demand[t],",
            "every potential taken for 1",
        ),
    ),
    *mutants(
        "scaling:scale_exponents",
        ENGINES,
        "reference h",
        (
            "k = np.where(reaches_nothing, 0.0, np.rint(log_h))",
            "k = np.where(reaches_nothing, 0.0, -np.rint(log_h))",
            "sign of the exponent",
        ),
    ),
    *mutants(
        "conservation:_is_in_range",
        ENGINES,
        OUT_MASS,
        ("not largest <= _MAX_POTENTIAL or", "", "unseen overflow"),
    ),
    *mutants(
        "edge_sweeps:EdgeSweeps.has_edge",
        EDGES,
        REACHABILITY,
        ("return bool(edges.any())", "return False", "unseen underflow"),
    ),
    *mutants(
        "row_sweeps:DenseSweeps.has_edge",
        MATRICES,
        "",
        ("return True", "return False", "unseen underflow"),
    ),
    *mutants(
        "row_sweeps:StreamSweeps.has_edge",
        STREAMED,
        "",
        ("return True", "return False", "unseen underflow"),
    ),
    *mutants(
        "topology:Topology.maximum",
        EDGES,
        SOURCE,
        ('reduce="max"', 'reduce="min"', "the smallest instead"),
    ),
    *mutants(
        "scaling:scaled",
        ENGINES,
        OUT_MASS,
        ("torch.exp2(step.double())", "torch.exp2(-step.double())", "sign of the exponent"),
        ("range(_NUM_STEPS)", "range(0)", "not scaled"),
    ),
    *mutants(
        "edge_sweeps:EdgeSweeps.balanced",
        EDGES,
        OUT_MASS,
        (
            "scale_exponent[target] - scale_exponent[source]",
            "scale_exponent[source] - scale_exponent[target]",
            "sign of the exponent",
        ),
        ("weight * is_active_edge", "weight * self.propagation_factor[source]", "damped twice"),
    ),
    *mutants(
        "edge_sweeps:EdgeSweeps.incoming_edges",
        EDGES,
        "reference h",
        ("slice(row_ptr[node], row_ptr[node + 1])", "slice(row_ptr[node], row_ptr[node])", "no edges"),
    ),
    *mutants(
        "row_sweeps:DenseSweeps.balanced",
        MATRICES,
        "",
        (
            "scale_exponent[:, :, None] - scale_exponent[:, None, :]",
            "scale_exponent[:, None, :] - scale_exponent[:, :, None]",
            "sign of the exponent",
        ),
        ("(self.propagation_factor > 0)[:, None, :]", "self.propagation_factor[:, None, :]", "damped twice"),
    ),
    *mutants(
        "row_sources:BalancedRows.block",
        STREAMED,
        "",
        (
            "self.scale_exponent[:, None, :stop]",
            "self.scale_exponent[:, None, start:stop].sum(-1)[:, None]",
            "exponents of other tokens",
        ),
        (
            "self.source.block(start, stop) *",
            "self.source.block(start, stop).flip(0) *",
            "another graph of the batch",
        ),
        ("* self.propagates[:, None, :stop]", "* self.propagates[:, start:stop, None]", "mask of the reader"),
    ),
]
MUTANTS = [*POTENTIAL, *INFLUENCE, *BOTH, *ENTRY]


# Rewriting -------------------------------------------------------------------------------------------------


def break_code(patch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    """Compile the function anew with one line changed, and put it wherever the library holds the old one."""
    module_name, path = mutant.where.split(":")
    module = importlib.import_module(f"flowgraph.propagation.{module_name}")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, module)
    original = inspect.getattr_static(owner, name)
    plain = getattr(original, "py_func", getattr(original, "func", getattr(original, "__func__", original)))
    code = textwrap.dedent(inspect.getsource(plain))
    assert mutant.old in code, f"{mutant.where} does not contain {mutant.old!r}"
    code = code[code.index("def ") :].replace(mutant.old, mutant.new, 1)
    scope: dict[str, Any] = {}
    exec(compile("from __future__ import annotations\n" + code, f"<{mutant.breaks}>", "exec"), vars(module), scope)
    broken = scope[name]
    if isinstance(original, functools.cached_property):
        broken = functools.cached_property(broken)
        broken.__set_name__(owner, name)
    elif isinstance(original, classmethod):
        broken = classmethod(broken)
    patch.setattr(owner, name, broken)
    if isinstance(owner, types.ModuleType):  # other modules import functions by name
        for other in [m for key, m in sys.modules.items() if key.startswith(("flowgraph.", "tests."))]:
            if vars(other).get(name) is original:
                patch.setattr(other, name, broken)


# The graphs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Problem:
    """Networks that are solved in one call, and how."""

    networks: Sequence[Network]
    options: dict[str, Any]

    @functools.cached_property
    def expected(self) -> list[arrays.Solution]:
        return [n.expected(**self.of(k)) for k, n in enumerate(self.networks)]

    def of(self, k: int) -> dict[str, Any]:
        """The options of one network; vectors are one per network."""
        return {name: value[k] if isinstance(value, list) else value for name, value in self.options.items()}

    def for_batch(self) -> dict[str, Any]:
        return {name: torch.cat(value) if isinstance(value, list) else value for name, value in self.options.items()}


def unread(network: Network) -> Network:
    """A network whose first question token has no readers."""
    keep = network.pairs[0] != int(network.question.nonzero()[0])
    return Network(network.pairs[:, keep], network.capacity[keep], network.question, network.answer)


def problems() -> list[Problem]:
    """Single graphs and batches; one block and several; sinks, absorbing answers, and potentials out of range."""
    random = np.random.default_rng(0)

    def answering(kind: str, tokens: int, seed: int = 0, **options: Any) -> Network:
        """With the last ten tokens as the answer: there are edges between them, and between blocks."""
        given = network(kind, tokens, seed, **options)
        answer = torch.arange(tokens) >= tokens - min(10, tokens // 2)
        return Network(given.pairs, given.capacity, given.question & ~answer, answer)

    def vectors(networks: Sequence[Network]) -> list[torch.Tensor]:
        return [torch.from_numpy(random.random(n.num_tokens) * (random.random(n.num_tokens) < 0.5)) for n in networks]

    batch = [answering("sparse", 150), answering("dense", 37, 1), answering("sink", 97, 2), answering("chain", 5, 3)]
    single = [answering("chain", 203, 8, most=1e-3)]
    weak = [answering("chain", 161, 4, most=1e-3), answering("sparse", 70, 5), answering("dense", 20, 6)]
    steps = torch.stack([torch.arange(3), torch.arange(1, 4)])  # h falls from 1e-30 to 0 in one product
    weights, token = torch.tensor([1e-300, 1e-30, 0.5], dtype=torch.float64), torch.arange(4)
    jump = Network(steps, weights, token == 0, token == 3)
    return [
        Problem([jump], {}),
        Problem([unread(answering("sparse", 300))], {}),
        Problem([unread(answering("dense", 45, 7))], {"damping": 0.7, "absorption": "pass_through"}),
        Problem(batch, {"damping": 0.7, "source": "potential"}),
        Problem(
            batch[::-1], {"source": vectors(batch[::-1]), "demand": vectors(batch[::-1]), "absorption": "pass_through"}
        ),
        Problem(weak, {"damping": 0.9}),
        Problem([answering("chain", 95, 9, most=1e-3)], {}),  # potentials down to 1e-260, still in range
        Problem([answering("chain", 161, 10, most=1e3)], {}),  # up to 1e450
        Problem(single, {"source": "potential", "absorption": "absorb", "demand": [1e-5 * single[0].answer.double()]}),
    ]


PROBLEMS = problems()


def differences(solved: Sequence[Solved], expected: Sequence[arrays.Solution]) -> Iterator[str]:
    """Numbers that are not those of the reference: 1e-12, relative, entry by entry; influence where flow passes."""
    for one, exact in zip(solved, expected, strict=True):
        unit, flows = one.exponent.numpy(), np.asarray(exact.throughput > 0)
        got = {
            "h": np.ldexp(one.h.numpy().astype(np.longdouble), unit),
            "g": np.where(flows, np.ldexp(one.g.numpy().astype(np.longdouble), -unit), 0),
            "source": one.source.numpy(),
            "throughput": one.throughput.numpy(),
        }
        for name, values in got.items():
            wanted = np.where(flows, exact.g, 0) if name == "g" else getattr(exact, name)
            if not bool((np.abs(values - wanted) <= 1e-12 * np.abs(wanted)).all()):
                yield f"reference {name}"


def seen(way: str) -> set[str]:
    """The checks and comparisons that fail on any of the problems."""
    failed: set[str] = set()
    for problem in PROBLEMS:
        try:
            solved = solve_by(way, problem.networks, **problem.options)
        except AssertionError:  # something where there are no tokens
            failed.add("reference padding")
        else:
            failed |= set(differences(solved, problem.expected))
        if way in GRAPH_ENGINES:
            graphs = [n.graph() for n in problem.networks]
            flow = solve(Batch.from_data_list([*graphs]), backend=way, **problem.for_batch())
            for certificate in certify_each(flow, level="fast"):
                failed |= {check.name for check in certificate.failed}
    return failed


@pytest.mark.parametrize("way", ENGINES)
def test_what_is_not_broken_passes(way: str):
    assert seen(way) == set()


APPLIED = [(mutant, way) for mutant in MUTANTS for way in mutant.ways]


@pytest.mark.parametrize(
    ("mutant", "way"), APPLIED, ids=[f"{way}-{mutant.where}-{mutant.breaks}" for mutant, way in APPLIED]
)
def test_a_broken_sweep_is_seen(mutant: Mutant, way: str, monkeypatch: pytest.MonkeyPatch):
    break_code(monkeypatch, mutant)
    with np.errstate(all="ignore"):
        failed = seen(way)
    compared = {name for name in failed if name.startswith("reference ")}
    assert compared, f"the reference missed it; failed checks of the certificate: {sorted(failed)}"
    if way in GRAPH_ENGINES or mutant.check in compared:
        assert mutant.check in failed, sorted(failed)


@pytest.mark.parametrize(("mutants", "direction"), [(POTENTIAL, "potential"), (INFLUENCE, "influence")])
@pytest.mark.parametrize("way", ENGINES)
def test_at_least_ten_mutants_per_direction_and_way(mutants: list[Mutant], direction: str, way: str):
    assert sum(way in mutant.ways for mutant in mutants) >= 10, direction


def test_the_list_names_no_mutant_twice():
    assert len({(mutant.where, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)
