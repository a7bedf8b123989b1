"""Graphs from files: GraphML, GEXF, tables and JSON. XML with a document type is refused, so no entity is expanded."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree
from xml.parsers import expat

import networkx as nx

from flowgraph.errors import InvalidInputError, RegionError, TraceFileError
from flowgraph.exchange.export import GRAPH_SCHEMA, LOSSES, NO_REGION, arrow_modules
from flowgraph.exchange.from_objects import Found, Given, assembled, from_networkx, regions_of, whole
from flowgraph.files import PathLike
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.masks import MaskLike
from flowgraph.tracing.payload import SCHEMA as TRACE_SCHEMA

_FOREIGN = (nx.NetworkXException, ValueError, TypeError, LookupError, AttributeError, ElementTree.ParseError)
"""What networkx raises on a file that is no graph."""


def read_graphml(
    path: PathLike,
    *,
    capacity: str = "capacity",
    question: MaskLike | None = None,
    reasoning: MaskLike | None = None,
    answer: MaskLike | None = None,
) -> FlowGraph:
    """Read GraphML: of :func:`flowgraph.write_graphml`, or of another tool. Arguments as :func:`from_networkx`.

    Raises:
        TraceFileError: missing, truncated, no GraphML, with a document type, or no flow graph (the reason is named).
        RegionError: no regions given or found, empty or overlapping ones.
    """
    with _reading(path):
        graph = nx.read_graphml(io.BytesIO(_plain_xml(path)))
        return from_networkx(graph, capacity=capacity, question=question, reasoning=reasoning, answer=answer)


def read_gexf(
    path: PathLike,
    *,
    capacity: str = "capacity",
    question: MaskLike | None = None,
    reasoning: MaskLike | None = None,
    answer: MaskLike | None = None,
) -> FlowGraph:
    """Read GEXF 1.1, 1.2 or 1.3: as :func:`read_graphml`."""
    with _reading(path):
        content = _plain_xml(path)
        graph = nx.read_gexf(io.BytesIO(content))
        graph.graph.update(_described(content))
        return from_networkx(graph, capacity=capacity, question=question, reasoning=reasoning, answer=answer)


def read_edges(
    path: PathLike,
    tokens: PathLike | None = None,
    *,
    num_nodes: int | None = None,
    question: MaskLike | None = None,
    reasoning: MaskLike | None = None,
    answer: MaskLike | None = None,
) -> FlowGraph:
    """Read a table of edges, CSV or (``.parquet``) Parquet, with columns ``source``, ``target`` and ``capacity``.

    Args:
        path: the edges, in any order; other columns are ignored.
        tokens: the table of :func:`flowgraph.write_tokens`, which tells the number of tokens and their regions; or
        num_nodes: the number of tokens, with
        question: region as in :meth:`FlowGraph.from_edges`,
        reasoning: the same, and
        answer: the same.

    CSV keeps no record of pruning and no type: capacities are float64, ``kept_flow`` is 1.

    Raises:
        TraceFileError: missing, truncated, a missing column, or no flow graph (the reason is named).
        RegionError: no regions given or found, empty or overlapping ones.
        InvalidInputError: neither or both of ``tokens`` and ``num_nodes``.
        MissingExtraError: Parquet without pyarrow.
    """
    if (tokens is None) == (num_nodes is None):
        raise InvalidInputError(
            f"tokens, num_nodes: exactly one must be given, got {tokens!r} and {num_nodes!r}; "
            "edges alone do not tell how many tokens there are"
        )
    found: Found = {}
    given: Given = {"question": question, "reasoning": reasoning, "answer": answer}
    if tokens is not None:
        with _reading(tokens):
            columns, _ = _table(tokens, ("position", "region"))
            place = _permutation([whole(value, "position") for value in columns["position"]])
            found = regions_of({"region": [columns["region"][k] for k in place]})
            num_nodes = len(place)
    with _reading(path):
        columns, facts = _table(path, ("source", "target", "capacity"))
        edges = list(zip(columns["source"], columns["target"], columns["capacity"], strict=True))
        return assembled(int(num_nodes or 0), edges, found, given, facts, "capacity")


def read_json(path: PathLike) -> FlowGraph:
    """Read the graph of a JSON trace (:meth:`FlowTrace.to_json`): its regions and every edge that carries flow.

    Solved with the options of the trace it gives the same throughput and edge flow. Edges without flow are not in the
    file: h is the file's only where flow arrives, and ``kept_attention`` is NaN, not known, where any are missing.

    Raises:
        TraceFileError: missing, truncated, another schema or version; or edges with flow were left out, or there was no
            flow: only :meth:`FlowTrace.save` keeps such a trace.
    """
    with _reading(path):
        trace = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_constant)
        schema = trace.get("schema") if isinstance(trace, dict) else None
        if schema != TRACE_SCHEMA:
            raise InvalidInputError(f"schema: must be {TRACE_SCHEMA!r}, got {schema!r}; trace.to_json writes it")
        summary, edges, tokens = trace["summary"], trace["edges"], trace["tokens"]
        left_out = whole(trace["edges_left_out"], "edges_left_out")
        complete = len(edges) == whole(summary["num_edges"], "num_edges")
        if left_out or not (complete or trace["feasible"] is True):
            raise InvalidInputError(
                f"edges: must all be there, got {len(edges)} of {summary['num_edges']}, {left_out} with flow left out; "
                "write it with max_edges=trace.graph.num_edges, or keep the trace with trace.save"
            )
        if [token["index"] for token in tokens] != list(range(len(tokens))):
            raise InvalidInputError("tokens: must be in order, got other indices; write it again")
        found = regions_of({"region": [token["region"] or NO_REGION for token in tokens]})
        losses = {
            name: summary[name]
            for name in LOSSES
            if summary[name] is not None and (complete or name != "kept_attention")
        }
        facts = {"schema": GRAPH_SCHEMA, "rules": "", **losses}
        return assembled(len(tokens), [(s, t, c) for s, t, c, _ in edges], found, {}, facts, "capacity")


@contextmanager
def _reading(path: PathLike) -> Iterator[None]:
    """Every failure of a reader, ours or of a library below, as one that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of networkx about keys without a type: such values are checked below
            yield
    except (TraceFileError, RegionError):
        raise
    except OSError as error:
        raise TraceFileError(
            f"path: must be a readable file, got {path} ({error.strerror or error}); check the name"
        ) from error
    except expat.ExpatError as error:
        raise TraceFileError(f"path: must be complete XML, got {path} ({error}); it is truncated, or no XML") from error
    except (*_FOREIGN, RecursionError, csv.Error) as error:
        reason = str(error) if isinstance(error, InvalidInputError | ValueError) else f"{type(error).__name__}: {error}"
        raise TraceFileError(f"path: must hold a flow graph, got {path} ({reason}); write it again") from error


def _plain_xml(path: PathLike) -> bytes:
    """The file, known to be well-formed, with one graph, without a document type: only there are entities declared."""
    num_graphs = 0

    def refuse(*_: object) -> NoReturn:
        raise TraceFileError(
            f"path: must be XML without a document type, got a DOCTYPE in {path}; delete it (entities are not expanded)"
        )

    def count(tag: str, _: object) -> None:  # of several graphs the library reads one and says nothing
        nonlocal num_graphs
        num_graphs += tag.rpartition(":")[2] == "graph"
        if num_graphs > 1:
            raise InvalidInputError("graph: must be one, got several <graph> elements; write each to its own file")

    content = Path(path).read_bytes()
    parser = expat.ParserCreate()
    parser.StartElementHandler = count
    parser.StartDoctypeDeclHandler = refuse
    parser.Parse(content, True)
    return content


def _described(content: bytes) -> dict[str, Any]:
    """The facts in the description of a GEXF file of ours; nothing in one of another tool."""
    for _, element in ElementTree.iterparse(io.BytesIO(content)):
        tag = element.tag.rpartition("}")[2]
        if tag == "description" and (element.text or "").startswith('{"schema"'):
            return dict(json.loads(element.text or "", parse_constant=_no_constant))
        if tag in ("meta", "graph"):
            break
    return {}


def _no_constant(name: str) -> NoReturn:
    raise InvalidInputError(f"numbers: must be finite, got {name}; write it again")


def _table(path: PathLike, names: tuple[str, ...]) -> tuple[dict[str, list], dict[str, Any]]:
    """The named columns, and what is said about the whole graph."""
    if Path(path).suffix.lower() == ".parquet":
        return _parquet(path, names)
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        header = next(rows, [])
        _require_columns(header, names)
        places = [header.index(name) for name in names]
        picked = []
        for row in rows:
            if len(row) != len(header):
                raise InvalidInputError(
                    f"line {rows.line_num}: must have {len(header)} cells, got {len(row)}; it is truncated, or no CSV"
                )
            picked.append([_number(row[place]) for place in places])
    return {name: [row[k] for row in picked] for k, name in enumerate(names)}, {}


def _parquet(path: PathLike, names: tuple[str, ...]) -> tuple[dict[str, list], dict[str, Any]]:
    arrow, parquet = arrow_modules()
    try:
        with parquet.ParquetFile(path) as file:
            _require_columns(file.schema_arrow.names, names)
            table = file.read(columns=list(names))
    except arrow.ArrowException as error:
        raise InvalidInputError(f"path: must be complete Parquet, got {error}; write it again") from error
    facts = json.loads((table.schema.metadata or {}).get(b"flowgraph", b"{}"), parse_constant=_no_constant)
    return table.to_pydict(), dict(facts)


def _require_columns(header: Sequence[str], names: tuple[str, ...]) -> None:
    if any(header.count(name) != 1 for name in names):
        raise InvalidInputError(
            f"columns: must hold {', '.join(names)} once each, got {', '.join(header) or 'none'}; "
            "name them so, separated by commas"
        )


def _number(cell: str) -> Any:
    """A cell as whole or real number where it is one, else as text; Python's own ``1_000`` is text."""
    if cell.isascii() and cell.isdigit() and len(cell) <= 18:
        return int(cell)
    try:
        return float(cell) if "_" not in cell else cell
    except ValueError:
        return cell


def _permutation(positions: list[int]) -> list[int]:
    """Row of each token, from the token of each row."""
    if sorted(positions) != list(range(len(positions))):
        raise InvalidInputError(
            f"position: must be 0..{len(positions) - 1}, once each, got others; write the token table again"
        )
    return sorted(range(len(positions)), key=positions.__getitem__)
