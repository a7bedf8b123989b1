"""Matrices of edges: row t holds what token t takes from each earlier token s.

A generated token t is made by the position t - 1, so its row is that of the position t - 1. This is the frame of the
graph of a trace under emission rows, and of :func:`flowgraph.attention_cell`: an edge that an intervention cuts and the
score of the same edge stand in the same place.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from flowgraph.graph.flow_graph import FlowGraph


def edges_of_positions(
    rows: Float[Tensor, "tokens tokens"], generated: Bool[Tensor, " tokens"]
) -> Float64[Tensor, "tokens tokens"]:
    """Move the rows of positions to the tokens that they produce, and drop what is no edge.

    Args:
        rows: ``rows[p, s]``: what position p takes from token s.
        generated: the tokens that the model produced; all others keep their own row.

    Returns:
        ``[t, s]`` for s < t, 0 elsewhere. Of a generated token, [t, t - 1] is what position t - 1 takes from itself.
    """
    token = torch.arange(rows.shape[0])
    takes_previous = generated.cpu() & (token > 0)
    row_of_token = token - takes_previous.long()
    return rows.detach().double().cpu()[row_of_token].tril(-1)


def edges_of_graph(graph: FlowGraph, values: Float[Tensor, " edges"]) -> Float64[Tensor, "tokens tokens"]:
    """Write one value per edge of a graph into a matrix: row: target, column: source."""
    num_tokens = int(graph.num_nodes or 0)
    matrix = torch.zeros(num_tokens, num_tokens, dtype=torch.float64)
    source, target = graph.edge_index.cpu()
    matrix[target, source] = values.detach().double().cpu()
    return matrix


def edges_to_sources(scores: Float[Tensor, " tokens"]) -> Float64[Tensor, "tokens tokens"]:
    """Give each edge the score of the token that it comes from."""
    num_tokens = scores.numel()
    return scores.double().expand(num_tokens, num_tokens).tril(-1)
