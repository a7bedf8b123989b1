r"""Check the law of a signed flow: it is conserved at every token, across every cut, and in total.

The numbers are sums over the edges of the graph in float64. What rounding can explain is set by the passes that made
them: the bound of the capture, relative to the largest term of the sequence.
"""

from __future__ import annotations

from torch import Tensor

from flowgraph.certificate.checks import Check, check
from flowgraph.errors import FlowgraphError
from flowgraph.flow.signed_flow import SignedFlow


def law(flow: SignedFlow) -> list[Check]:
    r"""Check the provable statements about a signed flow.

    With b the demand, a the absorbed, beta the bias share, and p the pruned shares at each token:

    1. graph: edges run forward, weights are finite, regions are disjoint.
    2. demand: :math:`\sum_v b[v] = 1`.
    3. balance: :math:`b[v] + \sum_t F(v \to t) + p_{out}[v] = \sum_s F(s \to v) + p_{in}[v] + a[v] + \beta[v]`.
    4. ends: :math:`\sum_v a[v] + \beta[v] = 1`, the question, the rest of the prompt, forced tokens, the remainder and
       biases together.
    5. prefix cuts: what the tokens after any position take from those up to it is what enters after it minus what ends
       after it.

    Args:
        flow: of one sequence.

    Returns:
        One check per statement; a graph that is not valid is the only check of its list.

    Cost: a few reads of the edges.
    """
    fault = ""
    try:
        flow.graph.validate()
    except FlowgraphError as error:
        fault = str(error)
    graph_check = check("graph", bool(fault), 0, fault)
    if fault:
        return [graph_check]

    arriving = flow.throughput
    leaving = flow.leaving
    ending = flow.absorbed + flow.bias
    largest_term = max(1.0, float(arriving.abs().max()))
    scale = f"largest term {largest_term:.3g} of the demand"

    # Across the cut after position v: edges, kept or pruned, from a token <= v to a token > v.
    net_pruned_in = flow.pruned_in - flow.pruned_out
    crossing = _crossing(flow) + _sum_after(net_pruned_in)
    wanted = _sum_after(flow.demand - ending)

    ends = ", ".join(f"{name} {share:.1%}" for name, share in flow.shares().items())
    return [
        graph_check,
        check("demand", abs(float(flow.demand.sum()) - 1), 1e-6),
        check("balance", float((arriving - leaving).abs().max()) / largest_term, flow.bound, scale),
        check("ends", abs(float(ending.sum()) - 1) / largest_term, flow.bound, ends),
        check("prefix cuts", float((crossing - wanted).abs().max()) / largest_term, flow.bound, scale),
    ]


def _sum_after(per_token: Tensor) -> Tensor:
    """Return, for each position, the sum over the tokens after it."""
    up_to = per_token.cumsum(0)
    return up_to[-1] - up_to


def _crossing(flow: SignedFlow) -> Tensor:
    """Return, for each position v, the sum of the edges from a token <= v to a token > v."""
    source, target = flow.graph.edge_index
    # An edge crosses the cuts source .. target - 1.
    change = flow.demand.new_zeros(flow.demand.numel())
    change.index_add_(0, source, flow.edge_flow)
    change.index_add_(0, target, -flow.edge_flow)
    return change.cumsum(0)
