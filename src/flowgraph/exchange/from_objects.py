"""Import graphs from networkx, igraph and PyG objects, made by :mod:`flowgraph.exchange.export` or by others.

Every value from outside is checked: readers end in :func:`build_graph` (PyG tensors in ``FlowGraph.from_edges``
directly), which checks numbers, positions and regions before ``FlowGraph.from_edges`` checks the edges.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import networkx as nx
import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from flowgraph.errors import GraphError, InvalidInputError, RegionError
from flowgraph.exchange.export import GRAPH_SCHEMA, LOSSES, NO_REGION
from flowgraph.graph.flow_graph import REGIONS, FlowGraph
from flowgraph.masks import MaskLike

if TYPE_CHECKING:
    import igraph

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_MASKS = {name: f"{name}_mask" for name in REGIONS}
_NODE_ID = re.compile(r"n?(\d{1,12})", re.ASCII)
"""Names of nodes that are token indices; igraph writes n0, n1, ..."""
_MAX_EXACT_INTEGER = 2**53
"""float64 holds every integer below it."""
_ROUNDING = 1e-9

Given = Mapping[str, MaskLike | None]
"""Regions that the caller gives, by name; they replace those that the source marks."""
Found = Mapping[str, Any]
"""Regions that the source marks, by name."""


@dataclass(frozen=True)
class _Facts:
    """The checked facts that a source states about its graph.

    Attributes:
        dtype: type of the capacities.
        rules: see :class:`FlowGraph`.
        losses: what pruning lost, by the names of ``LOSSES``; NaN where it is unknown.
    """

    dtype: torch.dtype
    rules: str
    losses: Mapping[str, float]


def from_networkx(
    graph: nx.DiGraph,
    *,
    capacity: str = "capacity",
    question: MaskLike | None = None,
    reasoning: MaskLike | None = None,
    answer: MaskLike | None = None,
) -> FlowGraph:
    """Convert a directed networkx graph, from :func:`flowgraph.to_networkx` or another source, to a :class:`FlowGraph`.

    Args:
        graph: edges run from the earlier to the later token. Nodes are the tokens: named 0..N-1 (or ``"0"``, ``"n0"``),
            or with a ``position`` attribute of those values.
        capacity: edge attribute to read.
        question: region as in :meth:`FlowGraph.from_edges`; default: the nodes' ``question_mask``, or those whose
            ``region`` is ``question``.
        reasoning: the same; where nothing is marked either, the tokens between question and answer.
        answer: the same.

    Raises:
        GraphError: undirected, an edge twice, backwards or without a number, nodes that are not 0..N-1.
        RegionError: no regions given or found, empty or overlapping ones.
        InvalidInputError: facts about the graph of another schema, or invalid ones.

    Cost: linear in tokens and edges, in Python.

    Example:
        >>> chain = nx.DiGraph()
        >>> chain.add_edge(0, 1, capacity=1.0)
        >>> chain.add_edge(1, 2, capacity=0.5)
        >>> from_networkx(chain, question=[0], answer=[2]).capacity.tolist()
        [1.0, 0.5]
    """
    if not isinstance(graph, nx.Graph) or not graph.is_directed():
        raise GraphError(
            f"graph: must be a directed networkx graph, got {type(graph).__name__}; make a nx.DiGraph whose edges run "
            "from the earlier to the later token"
        )

    # Nodes in token order, with the marks that some tool may have left on them.
    token_of = _token_of_node(graph)
    nodes = sorted(token_of, key=token_of.__getitem__)
    columns = {}
    for name in ("region", *_MASKS.values()):
        columns[name] = [graph.nodes[node].get(name) for node in nodes]
    edges = []
    for source, target, attributes in graph.edges(data=True):
        edges.append((token_of[source], token_of[target], attributes.get(capacity)))
    given: Given = {"question": question, "reasoning": reasoning, "answer": answer}
    return build_graph(len(nodes), edges, regions_of(columns), given, graph.graph, capacity)


def from_igraph(
    graph: igraph.Graph,
    *,
    capacity: str = "capacity",
    question: MaskLike | None = None,
    reasoning: MaskLike | None = None,
    answer: MaskLike | None = None,
) -> FlowGraph:
    """Convert a directed ``igraph.Graph``, whose vertex ids are the token indices; else as :func:`from_networkx`.

    Args:
        graph: the graph.
        capacity: see :func:`from_networkx`.
        question: see :func:`from_networkx`.
        reasoning: see :func:`from_networkx`.
        answer: see :func:`from_networkx`.

    Raises:
        GraphError: not an ``igraph.Graph``; see also :func:`from_networkx`.
    """
    if not hasattr(graph, "to_networkx"):
        raise GraphError(f"graph: must be an igraph.Graph, got {type(graph).__name__}; networkx has from_networkx")
    converted: Any = graph.to_networkx(vertex_attr_hashable="_igraph_index")
    return from_networkx(converted, capacity=capacity, question=question, reasoning=reasoning, answer=answer)


def from_pyg(
    data: Data,
    *,
    capacity: str = "capacity",
    question: MaskLike | None = None,
    reasoning: MaskLike | None = None,
    answer: MaskLike | None = None,
) -> FlowGraph:
    """Convert a ``torch_geometric.data.Data`` with ``edge_index`` and a capacity per edge; else as from networkx.

    Args:
        data: one graph, with the number of tokens in ``num_nodes``, or a tensor per token (``x`` or a region mask).
        capacity: name of the tensor to read.
        question: region as in :meth:`FlowGraph.from_edges`; default: the tensor ``question_mask``.
        reasoning: the same; where it is missing too, the tokens between question and answer.
        answer: the same.

    Raises:
        GraphError: a batch, missing tensors, or edges that break a rule of :class:`FlowGraph`.
        RegionError: regions that are missing, empty, overlapping or no bool tensors.
        InvalidInputError: facts about the graph of another schema, or invalid ones.
    """
    if not isinstance(data, Data) or isinstance(data, Batch):
        raise GraphError(
            f"data: must be one torch_geometric.data.Data, got {type(data).__name__}; "
            "read the graphs of a batch one by one (batch.to_data_list())"
        )
    values = data.to_dict()
    for name in ("edge_index", capacity):
        if not isinstance(values.get(name), Tensor):
            raise GraphError(f"data: must hold the tensor {name}, got {sorted(values)}; set it, or name the capacity")
    for name in _MASKS.values():
        if name not in values:
            continue
        mask = values[name]
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise RegionError(f"{name}: must be a bool tensor over the tokens, got {mask!r}; call .bool() on it")

    # The tensors are taken as they are: only the graph's own checks remain.
    facts = _checked_facts(values)
    found: Found = {name: values.get(mask) for name, mask in _MASKS.items()}
    given: Given = {"question": question, "reasoning": reasoning, "answer": answer}
    graph = FlowGraph.from_edges(
        values["edge_index"],
        values[capacity],
        num_nodes=_num_nodes(values),
        rules=facts.rules,
        **_chosen_regions(found, given),
    )
    return _with_losses(graph, facts)


def _num_nodes(values: Mapping[str, Any]) -> int:
    """Return the number of tokens that PyG data states, or the length of a tensor over the tokens."""
    num_nodes = values.get("num_nodes")
    if num_nodes:
        return int(num_nodes)
    for name in ("x", *_MASKS.values()):
        if name in values:
            return len(values[name])
    raise GraphError("data: must tell how many tokens there are, got no num_nodes; set data.num_nodes")


def _token_of_node(graph: nx.Graph) -> dict[Any, int]:
    """Return the token index of every node: its position, or else its name."""
    positions = nx.get_node_attributes(graph, "position")
    if positions and len(positions) != len(graph):
        raise GraphError(
            f"position: must be on every node or none, got {len(positions)} of {len(graph)}; add what is missing"
        )
    token_of: dict[Any, int] = {}
    if positions:
        for node, value in positions.items():
            token_of[node] = non_negative_integer(value, f"position of node {node!r}")
    else:
        for node in graph:
            match = _NODE_ID.fullmatch(str(node))
            token_of[node] = int(match[1]) if match else -1

    # In order, node k must be token k.
    in_order = sorted(token_of.items(), key=_token_index)
    for k, (node, token) in enumerate(in_order):
        if token != k:
            raise GraphError(
                f"graph: nodes must be the tokens 0..{len(token_of) - 1}, got {node!r}; rename them "
                "(networkx.convert_node_labels_to_integers), or set their position"
            )
    return token_of


def _token_index(node_and_token: tuple[Any, int]) -> int:
    """Sort key: nodes may be of types that do not compare."""
    return node_and_token[1]


def regions_of(columns: Mapping[str, list]) -> dict[str, list[bool]]:
    """Read the regions that a source marks: from mask columns if any has a mark, else from region names.

    Args:
        columns: one value per token: ``question_mask``, ``reasoning_mask``, ``answer_mask`` and ``region``; each of
            them may be missing, or None for every token.

    Returns:
        Masks by region; a region without marks is missing.

    Raises:
        RegionError: a mark that is neither true nor false, or an unknown region.
    """
    # Masks come first: they are what this package writes into objects.
    found: dict[str, list[bool]] = {}
    for region, mask in _MASKS.items():
        marks = columns.get(mask, [])
        if all(mark is None for mark in marks):
            continue
        for k, mark in enumerate(marks):
            if not isinstance(mark, Real) or mark not in (0, 1):
                raise RegionError(f"{mask}: must be true or false on every node, got {mark!r} on node {k}; set it")
        found[region] = [bool(mark) for mark in marks]
    if found:
        return found

    # Files have one region per token.
    names = columns.get("region", [])
    if all(name is None for name in names):
        return {}
    for k, name in enumerate(names):
        if name not in (*REGIONS, NO_REGION, None, ""):
            raise RegionError(
                f"region: must be one of {', '.join(REGIONS)}, {NO_REGION}, got {name!r} on node {k}; rename it"
            )
    return {region: [name == region for name in names] for region in REGIONS}


def _chosen_regions(found: Found, given: Given) -> dict[str, Any]:
    """Return each region as the caller gives it, else as the source marks it."""
    chosen = {}
    for name in REGIONS:
        region = given.get(name)
        chosen[name] = found.get(name) if region is None else region
    for name in ("question", "answer"):
        if chosen[name] is None:
            raise RegionError(
                f"{name}: must be given or marked on the nodes, got neither; pass {name}= as mask, indices or slice"
            )
    return chosen


def build_graph(
    num_nodes: int,
    edges: Sequence[tuple[Any, Any, Any]],
    found: Found,
    given: Given,
    facts: Mapping[str, Any],
    capacity_name: str,
) -> FlowGraph:
    """Build a graph from values that are not yet checked.

    Args:
        num_nodes: number of tokens.
        edges: source, target, capacity.
        found: regions that the source marks, from :func:`regions_of`.
        given: regions that the caller gives.
        facts: what the source states about its graph.
        capacity_name: the name of a capacity in the source, for messages.

    Returns:
        A valid graph. Its capacities have the stated type if it holds each of them exactly, else float64.

    Raises:
        GraphError: a value that is not a number, or an edge that breaks a rule of :class:`FlowGraph`.
        RegionError: no regions, empty or overlapping ones.
        InvalidInputError: facts of another schema, or invalid ones.
    """
    checked_facts = _checked_facts(facts)
    regions = _chosen_regions(found, given)

    # Positions and numbers, edge by edge, so that a message can name the edge.
    sources = []
    targets = []
    capacities = []
    for given_source, given_target, given_capacity in edges:
        source = non_negative_integer(given_source, "source")
        target = non_negative_integer(given_target, "target")
        edge = f"{given_source} -> {given_target}"
        if max(source, target) >= num_nodes:
            raise GraphError(f"edges: must join tokens 0..{num_nodes - 1}, got {edge}; add the missing token")
        sources.append(source)
        targets.append(target)
        capacities.append(_real_number(given_capacity, f"{capacity_name} of the edge {edge}"))

    # Capacities are rounded nowhere: those that the stated type cannot hold stay float64.
    capacity = torch.tensor(capacities, dtype=torch.float64)
    narrow = capacity.to(checked_facts.dtype)
    if torch.equal(narrow.double(), capacity):
        capacity = narrow
    graph = FlowGraph.from_edges(
        torch.tensor([sources, targets], dtype=torch.int64),
        capacity,
        num_nodes=num_nodes,
        rules=checked_facts.rules,
        **regions,
    )
    return _with_losses(graph, checked_facts)


def _checked_facts(facts: Mapping[str, Any]) -> _Facts:
    """Check what a source states about its graph; without a schema nothing is stated, and nothing was lost."""
    schema = facts.get("schema")
    if schema is None:
        unpruned = {"kept_attention": 1.0, "kept_flow": 1.0, "throughput_error": 0.0}
        return _Facts(dtype=torch.float64, rules="", losses=unpruned)
    if schema != GRAPH_SCHEMA:
        raise InvalidInputError(
            f"schema: must be {GRAPH_SCHEMA!r}, got {schema!r}; update flowgraph if a newer version wrote it, "
            "or delete the attribute"
        )
    dtype = facts.get("capacity_dtype", "float64")
    rules = facts.get("rules", "")
    if str(dtype) not in _DTYPES or not isinstance(rules, str):
        raise InvalidInputError(f"capacity_dtype, rules: must be a float type and a line, got {dtype!r} and {rules!r}")
    losses = {name: _checked_loss(facts.get(name, math.nan), name) for name in LOSSES}
    return _Facts(dtype=_DTYPES[str(dtype)], rules=rules, losses=losses)


def _checked_loss(value: Any, name: str) -> float:
    """Check one of the losses; NaN (unknown) is valid."""
    # PyG data holds them as tensors of one element.
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    loss = _real_number(value, name)
    if name == "throughput_error":
        # Errors add up over successive prunings, so they have no bound, but they are finite.
        most = torch.finfo(torch.float64).max
    else:
        most = 1 + _ROUNDING
    if loss < 0 or loss > most:
        raise InvalidInputError(f"{name}: must be a share, got {loss!r}; write the graph again")
    return loss


def _with_losses(graph: FlowGraph, facts: _Facts) -> FlowGraph:
    """Record on a graph what pruning lost before it was exported."""
    for name, loss in facts.losses.items():
        graph[name] = torch.full_like(graph[name], loss)
    return graph


def _real_number(value: Any, what: str) -> float:
    """Convert a number to float; refuse texts and truth values."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise GraphError(f"{what}: must be a number, got {value!r}; convert or add it first")
    try:
        return float(value)
    except OverflowError:
        # Refused later, with the other infinite capacities.
        return math.inf


def non_negative_integer(value: Any, what: str) -> int:
    """Convert a number without fractional part to an integer.

    Args:
        value: the number.
        what: its name, for the message.

    Raises:
        GraphError: not a number, negative, with a fractional part, or too large for float64 to hold exactly.
    """
    number = _real_number(value, what)
    is_integer = 0 <= number < _MAX_EXACT_INTEGER and number == int(number)
    if not is_integer:
        raise GraphError(f"{what}: must be a non-negative integer, got {value!r}; count tokens from 0")
    return int(number)
