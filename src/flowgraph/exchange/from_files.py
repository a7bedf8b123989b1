"""Import graphs from GraphML, GEXF, table and JSON files.

XML with a document type is refused, so that no entity is expanded.
"""

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
from flowgraph.exchange.from_objects import (
    Found,
    Given,
    build_graph,
    from_networkx,
    non_negative_integer,
    regions_of,
)
from flowgraph.files import PathLike
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.masks import MaskLike
from flowgraph.tracing.payload import SCHEMA as TRACE_SCHEMA

_PARSER_ERRORS = (
    nx.NetworkXException,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ElementTree.ParseError,
    RecursionError,
    csv.Error,
)
"""What networkx and the parsers raise on a file that holds no graph."""
_MAX_DIGITS = 18
"""Integers of so many digits fit int64."""


def read_graphml(
    path: PathLike,
    *,
    capacity: str = "capacity",
    question: MaskLike | None = None,
    reasoning: MaskLike | None = None,
    answer: MaskLike | None = None,
) -> FlowGraph:
    """Read a GraphML file, from :func:`flowgraph.write_graphml` or another tool.

    Args:
        path: the file.
        capacity: see :func:`flowgraph.from_networkx`.
        question: see :func:`flowgraph.from_networkx`.
        reasoning: see :func:`flowgraph.from_networkx`.
        answer: see :func:`flowgraph.from_networkx`.

    Raises:
        TraceFileError: missing, truncated, not GraphML, with a document type, or no flow graph; the message names the
            reason.
        RegionError: no regions given or found, empty or overlapping ones.
    """
    with _reading(path):
        graph = nx.read_graphml(io.BytesIO(_checked_xml(path)))
        return from_networkx(graph, capacity=capacity, question=question, reasoning=reasoning, answer=answer)


def read_gexf(
    path: PathLike,
    *,
    capacity: str = "capacity",
    question: MaskLike | None = None,
    reasoning: MaskLike | None = None,
    answer: MaskLike | None = None,
) -> FlowGraph:
    """Read a GEXF file of version 1.1, 1.2 or 1.3; else as :func:`read_graphml`.

    Args:
        path: the file.
        capacity: see :func:`flowgraph.from_networkx`.
        question: see :func:`flowgraph.from_networkx`.
        reasoning: see :func:`flowgraph.from_networkx`.
        answer: see :func:`flowgraph.from_networkx`.

    Raises:
        TraceFileError: see :func:`read_graphml`.
        RegionError: see :func:`read_graphml`.
    """
    with _reading(path):
        content = _checked_xml(path)
        graph = nx.read_gexf(io.BytesIO(content))
        graph.graph.update(_facts_in_description(content))
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

    CSV holds neither what pruning lost nor a type: capacities are float64, ``kept_flow`` is 1.

    Raises:
        TraceFileError: missing, truncated, a missing column, or no flow graph; the message names the reason.
        RegionError: no regions given or found, empty or overlapping ones.
        InvalidInputError: neither or both of ``tokens`` and ``num_nodes``.
        MissingExtraError: Parquet without pyarrow.
    """
    if (tokens is None) == (num_nodes is None):
        raise InvalidInputError(
            f"tokens, num_nodes: exactly one must be given, got {tokens!r} and {num_nodes!r}; "
            "edges alone do not tell how many tokens there are"
        )
    # The token table states the regions, in any order of its rows.
    found: Found = {}
    if tokens is not None:
        with _reading(tokens):
            columns, _ = _read_table(tokens, ("position", "region"))
            positions = [non_negative_integer(value, "position") for value in columns["position"]]
            row_of_token = _inverse_permutation(positions)
            found = regions_of({"region": [columns["region"][row] for row in row_of_token]})
            num_nodes = len(positions)

    # The regions that the caller gives replace those of the table.
    given: Given = {"question": question, "reasoning": reasoning, "answer": answer}
    with _reading(path):
        columns, facts = _read_table(path, ("source", "target", "capacity"))
        edges = list(zip(columns["source"], columns["target"], columns["capacity"], strict=True))
        return build_graph(int(num_nodes or 0), edges, found, given, facts, "capacity")


def read_json(path: PathLike) -> FlowGraph:
    """Read the graph of a JSON trace (:meth:`FlowTrace.to_json`): its regions and every edge that carries flow.

    Solved with the options of the trace, the graph has the same throughput and edge flow. Edges without flow are not in
    the file: h equals the file's only where flow arrives, and ``kept_attention`` is NaN (unknown) where any are
    missing.

    Args:
        path: the file.

    Raises:
        TraceFileError: missing, truncated, another schema or version; or edges with flow were left out, or there was no
            flow: only :meth:`FlowTrace.save` keeps such a trace.
        RegionError: empty or overlapping regions.
    """
    with _reading(path):
        trace = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_constant)
        schema = trace.get("schema") if isinstance(trace, dict) else None
        if schema != TRACE_SCHEMA:
            raise InvalidInputError(f"schema: must be {TRACE_SCHEMA!r}, got {schema!r}; trace.to_json writes it")
        summary = trace["summary"]
        edges = trace["edges"]
        tokens = trace["tokens"]

        # Without edges that carry flow, or without any flow, the file does not determine the solution.
        num_left_out = non_negative_integer(trace["edges_left_out"], "edges_left_out")
        is_complete = len(edges) == non_negative_integer(summary["num_edges"], "num_edges")
        is_feasible = trace["feasible"] is True
        if num_left_out > 0 or not (is_complete or is_feasible):
            raise InvalidInputError(
                f"edges: must all be there, got {len(edges)} of {summary['num_edges']}, {num_left_out} with flow left "
                "out; write it with max_edges=trace.graph.num_edges, or keep the trace with trace.save"
            )
        if [token["index"] for token in tokens] != list(range(len(tokens))):
            raise InvalidInputError("tokens: must be in order, got other indices; write it again")

        found = regions_of({"region": [token["region"] or NO_REGION for token in tokens]})
        facts = {"schema": GRAPH_SCHEMA, "rules": ""}
        for name in LOSSES:
            # The kept share of attention is of all edges, and is unknown where some are missing.
            is_known = is_complete or name != "kept_attention"
            if is_known and summary[name] is not None:
                facts[name] = summary[name]
        graph_edges = [(source, target, capacity) for source, target, capacity, _ in edges]
        return build_graph(len(tokens), graph_edges, found, {}, facts, "capacity")


@contextmanager
def _reading(path: PathLike) -> Iterator[None]:
    """Convert every failure of a reader, or of a library that it uses, to an error that names the file."""
    try:
        with warnings.catch_warnings():
            # networkx warns about keys without a type; such values are checked later.
            warnings.simplefilter("ignore")
            yield
    except (TraceFileError, RegionError):
        # Already about this file, or about regions that the caller must give.
        raise
    except OSError as error:
        raise TraceFileError(
            f"path: must be a readable file, got {path} ({error.strerror or error}); check the name"
        ) from error
    except expat.ExpatError as error:
        raise TraceFileError(f"path: must be complete XML, got {path} ({error}); it is truncated, or no XML") from error
    except _PARSER_ERRORS as error:
        # A KeyError, for example, has a bare key as its text, so the name of its class is needed.
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise TraceFileError(f"path: must hold a flow graph, got {path} ({reason}); write it again") from error


def _checked_xml(path: PathLike) -> bytes:
    """Read XML that is well-formed, with one graph, and without a document type, which could declare entities."""
    num_graphs = 0

    def refuse_document_type(*_: object) -> NoReturn:
        raise TraceFileError(
            f"path: must be XML without a document type, got a DOCTYPE in {path}; delete it (entities are not expanded)"
        )

    # Of several graphs networkx would read one, without a warning.
    def refuse_second_graph(tag: str, _: object) -> None:
        nonlocal num_graphs
        local_name = tag.rpartition(":")[2]
        if local_name == "graph":
            num_graphs += 1
        if num_graphs > 1:
            raise InvalidInputError("graph: must be one, got several <graph> elements; write each to its own file")

    content = Path(path).read_bytes()
    parser = expat.ParserCreate()
    parser.StartElementHandler = refuse_second_graph
    parser.StartDoctypeDeclHandler = refuse_document_type
    parser.Parse(content, True)
    return content


def _facts_in_description(content: bytes) -> dict[str, Any]:
    """Return the facts that :func:`flowgraph.write_gexf` puts into a description; none for a file of another tool."""
    for _, element in ElementTree.iterparse(io.BytesIO(content)):
        local_name = element.tag.rpartition("}")[2]
        text = element.text or ""
        if local_name == "description" and text.startswith('{"schema"'):
            return dict(json.loads(text, parse_constant=_no_constant))
        # The description is inside meta, which comes before the graph.
        if local_name in ("meta", "graph"):
            break
    return {}


def _no_constant(name: str) -> NoReturn:
    """Refuse NaN and infinity, which Python reads but JSON does not have."""
    raise InvalidInputError(f"numbers: must be finite, got {name}; write it again")


def _read_table(path: PathLike, names: tuple[str, ...]) -> tuple[dict[str, list], dict[str, Any]]:
    """Read the named columns of a CSV or Parquet file, and the facts about the graph that Parquet holds."""
    if Path(path).suffix.lower() == ".parquet":
        return _read_parquet(path, names)

    # Excel writes a byte order mark, which utf-8-sig removes.
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        header = next(rows, [])
        _require_columns(header, names)
        positions = {name: header.index(name) for name in names}
        columns: dict[str, list] = {name: [] for name in names}
        for row in rows:
            if len(row) != len(header):
                raise InvalidInputError(
                    f"line {rows.line_num}: must have {len(header)} cells, got {len(row)}; it is truncated, or no CSV"
                )
            for name, position in positions.items():
                columns[name].append(_cell_value(row[position]))
    return columns, {}


def _read_parquet(path: PathLike, names: tuple[str, ...]) -> tuple[dict[str, list], dict[str, Any]]:
    """Read the named columns of a Parquet file, and the facts in its metadata."""
    arrow, parquet = arrow_modules()
    try:
        with parquet.ParquetFile(path) as file:
            _require_columns(file.schema_arrow.names, names)
            table = file.read(columns=list(names))
    except arrow.ArrowException as error:
        raise InvalidInputError(f"path: must be complete Parquet, got {error}; write it again") from error
    metadata = table.schema.metadata or {}
    facts = json.loads(metadata.get(b"flowgraph", b"{}"), parse_constant=_no_constant)
    return table.to_pydict(), dict(facts)


def _require_columns(header: Sequence[str], names: tuple[str, ...]) -> None:
    """Refuse a table in which a column is missing or has a double."""
    if any(header.count(name) != 1 for name in names):
        raise InvalidInputError(
            f"columns: must hold {', '.join(names)} once each, got {', '.join(header) or 'none'}; "
            "name them so, separated by commas"
        )


def _cell_value(cell: str) -> Any:
    """Convert a cell to an integer or a float where it is one; else it stays text."""
    if cell.isascii() and cell.isdigit() and len(cell) <= _MAX_DIGITS:
        return int(cell)
    # Python reads 1_000 as a number; tables do not write numbers so.
    if "_" in cell:
        return cell
    try:
        return float(cell)
    except ValueError:
        return cell


def _inverse_permutation(positions: list[int]) -> list[int]:
    """Return the row of each token, from the token of each row."""
    num_tokens = len(positions)
    if sorted(positions) != list(range(num_tokens)):
        raise InvalidInputError(
            f"position: must be 0..{num_tokens - 1}, once each, got others; write the token table again"
        )
    return sorted(range(num_tokens), key=positions.__getitem__)
