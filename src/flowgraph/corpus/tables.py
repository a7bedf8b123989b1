"""The tables of a corpus run: one row per token, one row per line, and the time of each line.

The first two hold nothing that depends on the clock, so the same run gives the same bytes.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from flowgraph.corpus.requests import Line
from flowgraph.corpus.run_folder import CorpusFolder
from flowgraph.errors import InvalidInputError, MissingExtraError
from flowgraph.files import atomic_write, write_text
from flowgraph.pages.corpus_page import write_index
from flowgraph.text.quoting import quote
from flowgraph.tracing.flow_trace import FlowTrace
from flowgraph.tracing.payload import finite_or_none, token_regions
from flowgraph.tracing.relevance_trace import RelevanceTrace

TableFormat = Literal["parquet", "csv"]
Row = Mapping[str, Any]
RowGroups = Iterable[Sequence[Row]]

_TEXT = "string"
_INTEGER = "int64"
_NUMBER = "float64"
_FLAG = "bool"

TRACE_COLUMNS = {
    "id": _TEXT,
    "line": _INTEGER,
    "file": _TEXT,
    "tokens": _INTEGER,
    "prompt_tokens": _INTEGER,
    "question": _INTEGER,
    "reasoning": _INTEGER,
    "answer": _INTEGER,
    "answer_text": _TEXT,
    "answer_by": _TEXT,
    "truncated": _FLAG,
    "feasible": _FLAG,
    "mean_hops": _NUMBER,
    "alpha": _NUMBER,
    "edges": _INTEGER,
    "kept_flow": _NUMBER,
    "backbone_edges": _INTEGER,
    "backbone_share": _NUMBER,
    "score_name": _TEXT,
    "error": _TEXT,
}
RELEVANCE_TRACE_COLUMNS = {
    "id": _TEXT,
    "line": _INTEGER,
    "file": _TEXT,
    "tokens": _INTEGER,
    "prompt_tokens": _INTEGER,
    "question": _INTEGER,
    "reasoning": _INTEGER,
    "answer": _INTEGER,
    "answer_text": _TEXT,
    "answer_by": _TEXT,
    "truncated": _FLAG,
    "target": _TEXT,
    "demand": _NUMBER,
    "hops": _INTEGER,
    "residual": _NUMBER,
    "question_share": _NUMBER,
    "context_share": _NUMBER,
    "forced_share": _NUMBER,
    "remainder_share": _NUMBER,
    "bias_share": _NUMBER,
    "edges": _INTEGER,
    "score_name": _TEXT,
    "error": _TEXT,
}
"""The table of traces of a relevance; shares are of the demand and sum to 1."""
RELEVANCE_TOKEN_COLUMNS = {
    "id": _TEXT,
    "line": _INTEGER,
    "index": _INTEGER,
    "token_id": _INTEGER,
    "text": _TEXT,
    "region": _TEXT,
    "generated": _FLAG,
    "forced": _FLAG,
    "score": _NUMBER,
    "absorbed": _NUMBER,
    "bias": _NUMBER,
}
"""The table of tokens of a relevance; numbers are shares of the demand, and negative ones argue against the answer."""
TOKEN_COLUMNS = {
    "id": _TEXT,
    "line": _INTEGER,
    "index": _INTEGER,
    "token_id": _INTEGER,
    "text": _TEXT,
    "region": _TEXT,
    "generated": _FLAG,
    "throughput": _NUMBER,
    "h": _NUMBER,
    "g": _NUMBER,
    "score": _NUMBER,
}
TIMING_COLUMNS = {
    "id": _TEXT,
    "line": _INTEGER,
    "tokens": _INTEGER,
    "batch": _INTEGER,
    "seconds": _NUMBER,
}


def write_results(
    folder: CorpusFolder,
    windows: Sequence[Sequence[Line]],
    failed: Mapping[int, str],
    kind: TableFormat,
    facts: Mapping[str, Any],
    *,
    signed: bool = False,
) -> None:
    """Write the tables, the list of errors and the index page from the records of all finished lines.

    Args:
        folder: the folder of the run.
        windows: all lines, in the groups in which they are written.
        failed: message of every line without a record, by its number.
        kind: format of the tables.
        facts: name and value of each fact that the page states about the run.
        signed: whether the traces are relevance traces.

    Raises:
        OutputError: a path cannot be written.

    Cost: two reads of the records; one window of tokens in memory.
    """
    # One row per line fits into memory.
    rows: list[dict[str, Any]] = []
    timing: list[dict[str, Any]] = []
    for window in windows:
        for line in window:
            row = {"id": line.id, "line": line.number}
            record = folder.record(line)
            if record is None:
                rows.append({**row, "error": failed.get(line.number)})
                continue
            rows.append({**row, "file": f"traces/{folder.trace_path(line).name}", **record["trace"]})
            timing.append(
                {
                    **row,
                    "tokens": record["trace"]["tokens"],
                    "batch": record["batch"],
                    "seconds": record["seconds"],
                }
            )

    # The rows of all tokens may not fit into memory: they are read and written one window at a time.
    token_groups = (list(_token_rows(folder, window)) for window in windows)
    token_columns = RELEVANCE_TOKEN_COLUMNS if signed else TOKEN_COLUMNS
    trace_columns = RELEVANCE_TRACE_COLUMNS if signed else TRACE_COLUMNS
    write_table(folder.out, "tokens", kind, token_columns, token_groups)
    write_table(folder.out, "traces", kind, trace_columns, [rows])
    write_table(folder.out, "timing", kind, TIMING_COLUMNS, [timing])
    _write_errors(folder.out, rows)
    write_index(folder.out / "index.html", rows, _existing_pages(folder, windows), facts, signed=signed)


def _token_rows(folder: CorpusFolder, lines: Iterable[Line]) -> Iterator[dict[str, Any]]:
    """Read the rows of the table of tokens of some lines."""
    for line in lines:
        record = folder.record(line)
        if record is None:
            continue
        columns = record["tokens"]
        for index, values in enumerate(zip(*columns.values(), strict=True)):
            named = dict(zip(columns, values, strict=True))
            yield {"id": line.id, "line": line.number, "index": index, **named}


def _write_errors(out: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object per line that could not be traced."""
    text = ""
    for row in rows:
        if row.get("error"):
            text += json.dumps({"line": row["line"], "id": row["id"], "error": row["error"]}) + "\n"
    write_text(out / "errors.jsonl", text)


def _existing_pages(folder: CorpusFolder, windows: Sequence[Sequence[Line]]) -> dict[int, str]:
    """Map the number of each line that has a page to the page's address on the index."""
    pages = {}
    for window in windows:
        for line in window:
            page = folder.page_path(line)
            if page.is_file():
                pages[line.number] = f"traces/{page.name}"
    return pages


def figures(trace: FlowTrace, keep: float) -> dict[str, Any]:
    """Compute the figures of one trace for both tables, as plain JSON values.

    Args:
        trace: a trace of generated text.
        keep: share of the flow whose routes make the backbone.

    Returns:
        ``trace``: its row; ``tokens``: the columns of its tokens.

    Cost: one backbone search.
    """
    flow = trace.flow
    graph = trace.graph
    # Figures that exist only with a flow.
    mean_hops = None
    backbone_edges = None
    backbone_share = None
    if trace.feasible:
        backbone = trace.backbone(keep)
        backbone_edges = backbone.num_edges
        backbone_share = backbone.share
        mean_hops = float(flow.throughput.sum()) - 1
    row = {
        **_sizes(trace),
        "feasible": trace.feasible,
        "mean_hops": mean_hops,
        "alpha": finite_or_none(float(flow.alpha)),
        "edges": graph.num_edges,
        "kept_flow": float(graph.kept_flow),
        "backbone_edges": backbone_edges,
        "backbone_share": backbone_share,
        "score_name": trace.score_name,
    }
    potential, influence = flow.potentials
    tokens = {
        **_token_texts(trace),
        "throughput": flow.throughput.tolist(),
        "h": [finite_or_none(value) for value in potential.tolist()],
        "g": [finite_or_none(value) for value in influence.tolist()],
        "score": [finite_or_none(value) for value in trace.scores.tolist()],
    }
    return {"trace": row, "tokens": tokens}


def relevance_figures(trace: RelevanceTrace) -> dict[str, Any]:
    """Compute the figures of one relevance trace for both tables, as plain JSON values.

    Args:
        trace: a relevance trace of generated text.

    Returns:
        ``trace``: its row; ``tokens``: the columns of its tokens.
    """
    flow = trace.flow
    row = {
        **_sizes(trace),
        "target": flow.target,
        "demand": flow.total,
        "hops": flow.hops,
        "residual": flow.residual,
        **{f"{name}_share": share for name, share in flow.shares().items()},
        "edges": trace.graph.num_edges,
        "score_name": trace.score_name,
    }
    tokens = {
        **_token_texts(trace),
        "forced": flow.forced.tolist(),
        "score": trace.scores.tolist(),
        "absorbed": flow.absorbed.tolist(),
        "bias": flow.bias.tolist(),
    }
    return {"trace": row, "tokens": tokens}


def _sizes(trace: FlowTrace | RelevanceTrace) -> dict[str, Any]:
    """Return the sizes of a trace and its answer, which every table of traces holds."""
    answer = trace.answer.nonzero().flatten().tolist()
    return {
        "tokens": trace.num_tokens,
        "prompt_tokens": int((~trace.generated).sum()),
        "question": int(trace.question.sum()),
        "reasoning": int(trace.reasoning.sum()),
        "answer": int(trace.answer.sum()),
        "answer_text": _storable(quote(answer, trace.tokens, trace.spans.tolist(), trace.text).strip()),
        "answer_by": trace.provenance.get("answer_by"),
        # Whether a generated response was cut off before it ended; None where that is unknown.
        "truncated": trace.provenance.get("truncated"),
    }


def _token_texts(trace: FlowTrace | RelevanceTrace) -> dict[str, list[Any]]:
    """Return what every table of tokens holds, as columns, so that the record holds each name once."""
    return {
        "token_id": trace.token_ids.tolist(),
        "text": [_storable(token) for token in trace.tokens],
        "region": token_regions(trace.graph),
        "generated": trace.generated.tolist(),
    }


def _storable(text: str) -> str:
    """Replace lone surrogates, which no table can hold."""
    return text.encode("utf-8", "replace").decode()


def table_format(kind: str) -> TableFormat:
    """Resolve and check the format of the tables, before anything runs.

    Args:
        kind: ``"parquet"``, ``"csv"``, or ``"auto"``: Parquet where pyarrow is installed.

    Raises:
        InvalidInputError: an unknown format.
        MissingExtraError: Parquet without pyarrow.
    """
    # pyarrow is optional and slow to import, so it is only looked for.
    has_pyarrow = importlib.util.find_spec("pyarrow") is not None
    if kind == "csv" or (kind == "auto" and not has_pyarrow):
        return "csv"
    if kind not in ("auto", "parquet"):
        raise InvalidInputError(f"format: must be 'auto', 'parquet' or 'csv', got {kind!r}; 'auto' is the default")
    if not has_pyarrow:
        raise MissingExtraError(
            "format: 'parquet' needs pyarrow, got an environment without it; "
            "run pip install 'flowgraph-llm[parquet]', or choose the format 'csv'"
        )
    return "parquet"


def write_table(out: Path, name: str, kind: TableFormat, columns: Mapping[str, str], groups: RowGroups) -> Path:
    """Write rows, a group at a time, atomically; the same rows in the same groups give the same bytes.

    Args:
        out: folder of the table.
        name: file name without its suffix.
        kind: format.
        columns: type of each column.
        groups: the rows; a missing value is None or absent.

    Returns:
        The path of the table.

    Raises:
        OutputError: the path cannot be written.
    """
    path = out / f"{name}.{kind}"
    with atomic_write(path) as temporary:
        if kind == "parquet":
            _write_parquet(temporary, columns, groups)
        else:
            _write_csv(temporary, columns, groups)
    # A table that an earlier run wrote in the other format is out of date now.
    other = "csv" if kind == "parquet" else "parquet"
    (out / f"{name}.{other}").unlink(missing_ok=True)
    return path


def _write_parquet(path: Path, columns: Mapping[str, str], groups: RowGroups) -> None:
    """Write rows as Parquet, one row group per group."""
    import pyarrow
    from pyarrow import parquet

    # Fixed types: a column without values must not change the schema.
    types = {
        _TEXT: pyarrow.string(),
        _INTEGER: pyarrow.int64(),
        _NUMBER: pyarrow.float64(),
        _FLAG: pyarrow.bool_(),
    }
    schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
    with parquet.ParquetWriter(path, schema) as writer:
        for rows in groups:
            if rows:
                values = {name: [row.get(name) for row in rows] for name in columns}
                writer.write_table(pyarrow.table(values, schema=schema))


def _write_csv(path: Path, columns: Mapping[str, str], groups: RowGroups) -> None:
    """Write rows as CSV with a header."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for rows in groups:
            for row in rows:
                writer.writerow([_cell(row.get(name)) for name in columns])


def _cell(value: Any) -> Any:
    """Write booleans in lower case, as other programs read them."""
    if isinstance(value, bool):
        return str(value).lower()
    return value
