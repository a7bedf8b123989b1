"""MaxFlow, and the proof of it: re-check feasibility, conservation and duality of a solver's answer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor

from flowgraph.errors import NumericalRangeError
from flowgraph.files import loadable
from flowgraph.maxflow.capacity_arrays import CapacityArrays

TOLERANCE = 1e-12
"""Error that the re-check accepts on a small graph, as a share of the min cut."""

_ROUNDING_PER_EDGE = 2.0**-50
"""Error that the re-check accepts for each edge, as a share of the min cut: a few roundings."""

_LEVEL_CUTS = 1 + 2.0**-50
"""A cut counts as minimal up to this factor, the rounding of its sum."""


def relative_tolerance(num_edges: int) -> float:
    """Return the error of V that a solver may leave, as a share of the min cut.

    The sum of all capacities is no measure: a capacity of 2**63 beside a cut of 4 would allow any answer.
    """
    return max(TOLERANCE, _ROUNDING_PER_EDGE * num_edges)


@loadable
@dataclass(frozen=True, eq=False)
class MaxFlow:
    """A max flow and a min cut of one graph, each re-checked and each proving the other.

    Attributes:
        value: V, the net flow out of the source tokens, in units of capacity.
        error: the exact V lies in ``[cut_capacity - error, cut_capacity]``; proved, not estimated.
        edge_flow: ``[E]`` flow per edge in the order of ``graph.edge_index``, ``0 <= edge_flow <= capacity``. One
            max flow of many: other solvers may route it differently.
        source_side: ``[N]`` bool; every source token is in it, no sink token is: the min cut nearest to the sources,
            the tokens to which they could still send flow over edges that are not full.
        sink_side: the same from the other end: the min cut nearest to the sinks is the one around this set.
        cut_edges: indices of the edges out of ``source_side`` (into ``graph.edge_index``).
        cut_capacity: sum of their capacities, equal to ``value`` up to ``error``.
    """

    value: float
    error: float
    edge_flow: Float64[Tensor, " edges"]
    source_side: Bool[Tensor, " tokens"]
    sink_side: Bool[Tensor, " tokens"]
    cut_edges: Int64[Tensor, " cut"]
    cut_capacity: float

    @property
    def unique_cut(self) -> bool:
        """Whether there is only one min cut: the nearest to the sources is the nearest to the sinks."""
        return bool((self.source_side != self.sink_side).all())

    def __repr__(self) -> str:
        return f"MaxFlow(value={self.value:.6g}, error={self.error:.1g}, cut_edges={self.cut_edges.numel()})"


def verified_max_flow(
    arrays: CapacityArrays,
    sources: NDArray[np.bool_],
    sinks: NDArray[np.bool_],
    flow: NDArray[np.float64],
    side: NDArray[np.bool_],
    device: torch.device,
) -> MaxFlow:
    r"""Re-check a solver's answer and bound its error; the result holds for any answer that passes.

    .. math:: \text{value} - \sum_v |\text{excess}(v)| \;\le\; V \;\le\; \text{capacity of the cut}

    Args:
        arrays: edges and capacities.
        sources: ``[T]`` bool.
        sinks: ``[T]`` bool, disjoint from ``sources``.
        flow: ``[E]``, the solver's flow on each edge.
        side: ``[T]`` bool, the source side of the solver's min cut.
        device: of the tensors of the result.

    Raises:
        NumericalRangeError: the flow exceeds a capacity, the cut does not separate, or the two differ by more than
            :func:`relative_tolerance` of the cut.

    Cost: some reads of the edges, one exact sum per token, and two searches of the residual graph.
    """
    # The flow, made feasible: 0 <= x <= N.
    clipped = np.clip(flow, 0.0, arrays.capacity)

    # value = sum over the sources of x_out - x_in; excess(v) = x_in - x_out must be 0 between the terminals.
    out_of_sources = clipped[sources[arrays.tail]]
    into_sources = clipped[sources[arrays.head]]
    net_outflow = [*out_of_sources, *-into_sources]
    value = math.fsum(net_outflow)
    excess = arrays.excess(clipped)
    unbalanced = math.fsum(np.abs(excess[~sources & ~sinks]))

    # The min cuts nearest to either end. Where rounding blurs which edges are full, such a cut may be larger than the
    # solver's, which then replaces it.
    source_side = arrays.residual_reach(clipped, sources)
    sink_side = arrays.residual_reach(clipped, sinks, backwards=True)
    candidates = (side, source_side, ~sink_side)
    smallest = min(arrays.cut_capacity(candidate) for candidate in candidates)
    largest_allowed = smallest * _LEVEL_CUTS
    if not _separates(source_side, sources, sinks) or arrays.cut_capacity(source_side) > largest_allowed:
        source_side = side
    if not _separates(~sink_side, sources, sinks) or arrays.cut_capacity(~sink_side) > largest_allowed:
        sink_side = ~side
    cut_capacity = arrays.cut_capacity(source_side)

    # Weak duality: value - unbalanced <= V <= cut capacity. Every step is rounded up, so that the bound is proved.
    rounded_up = unbalanced * (1 + 2**-50)
    width = math.fsum([cut_capacity, rounded_up, *(-term for term in net_outflow)])
    error = math.nextafter(width, math.inf) if width > 0 else 0.0

    # The solver's own flow and cut must be right up to rounding, measured by the cut.
    allowed = relative_tolerance(arrays.capacity.size) * cut_capacity
    out_of_bounds = float(np.abs(clipped - flow).max(initial=0.0))
    cut_excess = arrays.cut_capacity(side) - cut_capacity
    broken = []
    if not out_of_bounds <= allowed:
        broken.append("flow within the capacities")
    if not _separates(side, sources, sinks):
        broken.append("a cut between sources and sinks")
    if not max(error, cut_excess) <= allowed:
        broken.append("conservation and value = cut capacity")
    if broken:
        raise NumericalRangeError(
            f"max flow: the solver's answer must pass its re-check, got a failure of {', '.join(broken)} (V in "
            f"[{cut_capacity - error:.17g}, {cut_capacity:.17g}], scaled by a power of two); rescale the capacities or "
            "try backend='networkx'"
        )

    return MaxFlow(
        value=value,
        error=error,
        edge_flow=torch.from_numpy(clipped).to(device),
        source_side=torch.from_numpy(source_side).to(device),
        sink_side=torch.from_numpy(sink_side).to(device),
        cut_edges=torch.from_numpy(arrays.cut_edges(source_side)).to(device),
        cut_capacity=cut_capacity,
    )


def _separates(side: NDArray[np.bool_], sources: NDArray[np.bool_], sinks: NDArray[np.bool_]) -> bool:
    """Test whether a set of tokens holds every source and no sink."""
    return bool(side[sources].all() and not side[sinks].any())
