"""Graphs from networkx, igraph and PyG, made by :mod:`flowgraph.exchange.export` or by others.

Nothing from outside is taken on trust: every reader ends in :func:`assembled`, which checks numbers, positions and
regions before ``FlowGraph.from_edges`` checks the edges.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
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
_NODE_ID = re.compile(r"n?(\d{1,12})", re.ASCII)  # igraph writes n0, n1, ...

Given = Mapping[str, MaskLike | None]
"""Regions that the caller names; they come before those found."""
Found = Mapping[str, Any]
"""Regions that the source marks."""


def from_networkx(
    graph: nx.DiGraph,
    *,
    capacity: str = "capacity",
    question: MaskLike | None = None,
    reasoning: MaskLike | None = None,
    answer: MaskLike | None = None,
) -> FlowGraph:
    """A :class:`FlowGraph` from a directed networkx graph, one of :func:`flowgraph.to_networkx` or of your own.

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
        InvalidInputError: written by another version.
    """
    if not isinstance(graph, nx.Graph) or not graph.is_directed():
        raise GraphError(
            f"graph: must be a directed networkx graph, got {type(graph).__name__}; make a nx.DiGraph whose edges run "
            "from the earlier to the later token"
        )
    place = _places(graph)
    ordered = sorted(place, key=place.__getitem__)
    names = ("region", *_MASKS.values())
    found = regions_of({name: [graph.nodes[node].get(name) for node in ordered] for name in names})
    edges = [(place[s], place[t], marks.get(capacity)) for s, t, marks in graph.edges(data=True)]
    given: Given = {"question": question, "reasoning": reasoning, "answer": answer}
    return assembled(len(ordered), edges, found, given, graph.graph, capacity)


def from_igraph(
    graph: igraph.Graph,
    *,
    capacity: str = "capacity",
    question: MaskLike | None = None,
    reasoning: MaskLike | None = None,
    answer: MaskLike | None = None,
) -> FlowGraph:
    """As :func:`from_networkx`, from a directed ``igraph.Graph``; vertex ids are the token indices."""
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
    """As :func:`from_networkx`, from a ``torch_geometric.data.Data`` with ``edge_index`` and a capacity per edge."""
    if not isinstance(data, Data) or isinstance(data, Batch):
        raise GraphError(
            f"data: must be one torch_geometric.data.Data, got {type(data).__name__}; "
            "read the graphs of a batch one by one (batch.to_data_list())"
        )
    held = data.to_dict()
    for name in ("edge_index", capacity):
        if not isinstance(held.get(name), Tensor):
            raise GraphError(f"data: must hold the tensor {name}, got {sorted(held)}; set it, or name the capacity")
    for name in _MASKS.values():
        if name in held and not (isinstance(held[name], Tensor) and held[name].dtype == torch.bool):
            raise RegionError(f"{name}: must be a bool tensor over the tokens, got {held[name]!r}; call .bool() on it")
    num_nodes = held.get("num_nodes") or next((len(held[n]) for n in ("x", *_MASKS.values()) if n in held), None)
    if num_nodes is None:
        raise GraphError("data: must tell how many tokens there are, got no num_nodes; set data.num_nodes")
    found: Found = {name: held.get(mask) for name, mask in _MASKS.items()}
    given: Given = {"question": question, "reasoning": reasoning, "answer": answer}
    facts = _checked_facts(held)
    graph = FlowGraph.from_edges(
        held["edge_index"],
        held[capacity],
        num_nodes=int(num_nodes),
        rules=facts["rules"],
        **_chosen(found, given),
    )
    return _with_losses(graph, facts)


def _places(graph: nx.Graph) -> dict[Any, int]:
    """Token index of every node."""
    positions = nx.get_node_attributes(graph, "position")
    if positions and len(positions) != len(graph):
        raise GraphError(
            f"position: must be on every node or none, got {len(positions)} of {len(graph)}; add what is missing"
        )
    if positions:
        places = {node: whole(value, f"position of node {node!r}") for node, value in positions.items()}
    else:
        named = {node: _NODE_ID.fullmatch(str(node)) for node in graph}
        places = {node: int(match[1]) if match else -1 for node, match in named.items()}
    if sorted(places.values()) != list(range(len(places))):
        ordered = sorted(places.items(), key=lambda item: item[1])
        wrong = next(node for k, (node, place) in enumerate(ordered) if place != k)
        raise GraphError(
            f"graph: nodes must be the tokens 0..{len(places) - 1}, got {wrong!r}; rename them "
            "(networkx.convert_node_labels_to_integers), or set their position"
        )
    return places


def regions_of(columns: Mapping[str, list]) -> dict[str, list[bool]]:
    """Masks from mask columns where there are any, else from region names; a region nobody marks is None."""
    found: dict[str, list[bool]] = {}
    for name, mask in _MASKS.items():
        marks = columns.get(mask, [])
        if any(mark is not None for mark in marks):
            wrong = next((k for k, mark in enumerate(marks) if not isinstance(mark, Real) or mark not in (0, 1)), None)
            if wrong is not None:
                raise RegionError(
                    f"{mask}: must be true or false on every node, got {marks[wrong]!r} on node {wrong}; set it"
                )
            found[name] = [bool(mark) for mark in marks]
    names = columns.get("region", [])
    if found or all(name is None for name in names):
        return found
    for k, name in enumerate(names):
        if name not in (*REGIONS, NO_REGION, None, ""):
            raise RegionError(
                f"region: must be one of {', '.join(REGIONS)}, {NO_REGION}, got {name!r} on node {k}; rename it"
            )
    return {region: [name == region for name in names] for region in REGIONS}


def _chosen(found: Found, given: Given) -> dict[str, Any]:
    """The regions given, else those found."""
    chosen = {name: found.get(name) if given.get(name) is None else given[name] for name in REGIONS}
    for name in ("question", "answer"):
        if chosen[name] is None:
            raise RegionError(
                f"{name}: must be given or marked on the nodes, got neither; pass {name}= as mask, indices or slice"
            )
    return chosen


def assembled(
    num_nodes: int,
    edges: Sequence[tuple[Any, Any, Any]],
    found: Found,
    given: Given,
    about: Mapping[str, Any],
    name: str,
) -> FlowGraph:
    """The graph, from values that nobody has looked at yet.

    Args:
        num_nodes: number of tokens.
        edges: source, target, capacity.
        found: regions that the source marks, as of :func:`regions_of`.
        given: regions that the caller names.
        about: what the source says about the whole graph.
        name: what the source calls a capacity.

    Raises:
        GraphError: a value that is no number, or an edge that breaks a rule of :class:`FlowGraph`.
        RegionError: no regions, empty or overlapping ones.
        InvalidInputError: another schema.
    """
    facts, chosen = _checked_facts(about), _chosen(found, given)
    source, target, capacity = [], [], []
    for s, t, c in edges:
        source.append(whole(s, "source"))
        target.append(whole(t, "target"))
        if max(source[-1], target[-1]) >= num_nodes:
            raise GraphError(f"edges: must join tokens 0..{num_nodes - 1}, got {s} -> {t}; add the missing token")
        capacity.append(_real(c, f"{name} of the edge {s} -> {t}"))
    wide = torch.tensor(capacity, dtype=torch.float64)
    narrow = wide.to(facts["dtype"])
    graph = FlowGraph.from_edges(
        torch.tensor([source, target], dtype=torch.int64),
        narrow if torch.equal(narrow.double(), wide) else wide,  # never round what does not fit
        num_nodes=num_nodes,
        rules=facts["rules"],
        **chosen,
    )
    return _with_losses(graph, facts)


def _checked_facts(about: Mapping[str, Any]) -> dict[str, Any]:
    """What is said about the whole graph, checked; a graph that says nothing is taken as it is."""
    schema = about.get("schema")
    if schema is None:
        return {"dtype": torch.float64, "rules": "", "kept_attention": 1.0, "kept_flow": 1.0, "throughput_error": 0.0}
    if schema != GRAPH_SCHEMA:
        raise InvalidInputError(
            f"schema: must be {GRAPH_SCHEMA!r}, got {schema!r}; update flowgraph if a newer version wrote it, "
            "or delete the attribute"
        )
    dtype, rules = about.get("capacity_dtype", "float64"), about.get("rules", "")
    if str(dtype) not in _DTYPES or not isinstance(rules, str):
        raise InvalidInputError(f"capacity_dtype, rules: must be a float type and a line, got {dtype!r} and {rules!r}")
    losses = {}
    for name in LOSSES:
        value = about.get(name, math.nan)
        loss = _real(value.item() if isinstance(value, Tensor) and value.numel() == 1 else value, name)
        if loss < 0 or loss > (1 + 1e-9 if name != "throughput_error" else torch.finfo(torch.float64).max):
            raise InvalidInputError(f"{name}: must be a share, got {loss!r}; write the graph again")
        losses[name] = loss
    return {"dtype": _DTYPES[str(dtype)], "rules": rules, **losses}


def _with_losses(graph: FlowGraph, facts: Mapping[str, Any]) -> FlowGraph:
    for name in LOSSES:
        graph[name] = torch.full_like(graph[name], facts[name])
    return graph


def _real(value: Any, what: str) -> float:
    """A number that is one, and not a text that looks like one."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise GraphError(f"{what}: must be a number, got {value!r}; convert or add it first")
    try:
        return float(value)
    except OverflowError:
        return math.inf  # refused with the other infinite capacities


def whole(value: Any, what: str) -> int:
    """A whole number from 0.

    Raises:
        GraphError: anything else.
    """
    number = _real(value, what)
    if not (0 <= number < 2**53 and number == int(number)):
        raise GraphError(f"{what}: must be a whole number from 0, got {value!r}; count tokens from 0")
    return int(number)
