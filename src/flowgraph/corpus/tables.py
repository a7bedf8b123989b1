"""The tables of a corpus run: one row a token, one row a line, and how long each took.

Nothing in the first two depends on the clock, so the same run gives the same bytes.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from flowgraph.corpus.requests import Line
from flowgraph.corpus.run_folder import CorpusFolder
from flowgraph.errors import InvalidInputError, MissingExtraError
from flowgraph.files import atomic_write, write_text
from flowgraph.pages.corpus_page import write_index
from flowgraph.tracing.flow_trace import FlowTrace

TableFormat = Literal["parquet", "csv"]
Rows = Iterable[Sequence[Mapping[str, Any]]]

_TEXT, _WHOLE, _NUMBER, _FLAG = "string", "int64", "float64", "bool"
TRACE_COLUMNS = {
    "id": _TEXT,
    "line": _WHOLE,
    "file": _TEXT,
    "tokens": _WHOLE,
    "prompt_tokens": _WHOLE,
    "question": _WHOLE,
    "reasoning": _WHOLE,
    "answer": _WHOLE,
    "answer_text": _TEXT,
    "feasible": _FLAG,
    "mean_hops": _NUMBER,
    "alpha": _NUMBER,
    "edges": _WHOLE,
    "kept_flow": _NUMBER,
    "backbone_edges": _WHOLE,
    "backbone_share": _NUMBER,
    "error": _TEXT,
}
TOKEN_COLUMNS = {
    "id": _TEXT,
    "line": _WHOLE,
    "index": _WHOLE,
    "token_id": _WHOLE,
    "text": _TEXT,
    "region": _TEXT,
    "generated": _FLAG,
    "throughput": _NUMBER,
    "h": _NUMBER,
    "g": _NUMBER,
}
TIMING_COLUMNS = {"id": _TEXT, "line": _WHOLE, "tokens": _WHOLE, "batch": _WHOLE, "seconds": _NUMBER}


def write_results(
    folder: CorpusFolder,
    windows: Sequence[Sequence[Line]],
    failed: Mapping[int, str],
    kind: TableFormat,
    facts: Mapping[str, Any],
) -> None:
    """Write the tables, ``errors.jsonl`` and the index page from the records of the finished lines.

    Args:
        folder: where they lie.
        windows: all lines, in the groups in which they are written.
        failed: message of every line without a record.
        kind: format of the tables.
        facts: name and value of what the page says about the run.

    Raises:
        OutputError: a path cannot be written.

    Cost: two reads of the records; one window of tokens in memory.
    """
    rows: list[dict[str, Any]] = []
    timing: list[dict[str, Any]] = []
    for line in (line for window in windows for line in window):
        named = {"id": line.id, "line": line.number}
        record = folder.record(line)
        if record is None:
            rows.append({**named, "error": failed.get(line.number)})
        else:
            rows.append({**named, "file": f"traces/{folder.trace_path(line).name}", **record["trace"]})
            seconds = {name: record[name] for name in ("batch", "seconds")}
            timing.append({**named, "tokens": record["trace"]["tokens"], **seconds})
    write_table(folder.out, "tokens", kind, TOKEN_COLUMNS, (list(_tokens(folder, window)) for window in windows))
    write_table(folder.out, "traces", kind, TRACE_COLUMNS, [rows])
    write_table(folder.out, "timing", kind, TIMING_COLUMNS, [timing])
    errors = [{"line": row["line"], "id": row["id"], "error": row["error"]} for row in rows if row.get("error")]
    write_text(folder.out / "errors.jsonl", "".join(json.dumps(error) + "\n" for error in errors))
    pages = {line.number: f"traces/{folder.page_path(line).name}" for window in windows for line in window}
    pages = {number: page for number, page in pages.items() if (folder.out / page).is_file()}
    write_index(folder.out / "index.html", rows, pages, facts)


def _tokens(folder: CorpusFolder, lines: Iterable[Line]) -> Iterator[dict[str, Any]]:
    for line in lines:
        record = folder.record(line)
        if record is not None:
            columns = record["tokens"]
            for index, values in enumerate(zip(*columns.values(), strict=True)):
                yield {"id": line.id, "line": line.number, "index": index, **dict(zip(columns, values, strict=True))}


def figures(trace: FlowTrace, keep: float) -> dict[str, Any]:
    """The figures of one trace, for both tables, as plain JSON values.

    Args:
        trace: a trace of generated text.
        keep: share of the flow whose routes make the backbone.

    Cost: one backbone search.
    """
    flow, graph = trace.flow, trace.graph
    bone = trace.backbone(keep) if trace.feasible else None
    h, g = flow.potentials
    regions = {name: getattr(trace, name) for name in ("question", "reasoning", "answer")}
    row = {
        "tokens": trace.num_tokens,
        "prompt_tokens": int((~trace.generated).sum()),
        **{name: int(mask.sum()) for name, mask in regions.items()},
        "answer_text": _storable(_text_of(trace, trace.answer)),
        "feasible": trace.feasible,
        "mean_hops": float(flow.throughput.sum()) - 1 if trace.feasible else None,
        "alpha": _finite(flow.alpha.view(1))[0],
        "edges": graph.num_edges,
        "kept_flow": float(graph.kept_flow),
        "backbone_edges": bone.num_edges if bone else None,
        "backbone_share": bone.share if bone else None,
    }
    names = [next((name for name, mask in regions.items() if mask[token]), None) for token in range(trace.num_tokens)]
    tokens = {
        "token_id": trace.token_ids.tolist(),
        "text": [_storable(token) for token in trace.tokens],
        "region": names,
        "generated": trace.generated.tolist(),
        "throughput": flow.throughput.tolist(),
        "h": _finite(h),
        "g": _finite(g),
    }
    return {"trace": row, "tokens": tokens}


def _text_of(trace: FlowTrace, mask: Tensor) -> str:
    """The characters of some tokens, which may share them, with the blanks between; a gap shows as an ellipsis."""
    pieces, reached = [], None
    for start, end in sorted(trace.spans[mask].tolist()):
        between = trace.text[reached:start] if reached is not None and start > reached else ""
        pieces += [between if not between.strip() else " … ", trace.text[max(start, reached or 0) : end]]
        reached = max(end, reached or 0)
    return "".join(pieces).strip()


def _storable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _finite(vector: Tensor) -> list[float | None]:
    return [value if abs(value) < float("inf") else None for value in vector.double().tolist()]


def table_format(kind: str) -> TableFormat:
    """The format that is meant, refused before anything runs where it cannot be written.

    Raises:
        InvalidInputError: no such format.
        MissingExtraError: Parquet without pyarrow.
    """
    has_pyarrow = importlib.util.find_spec("pyarrow") is not None
    if kind == "auto":
        return "parquet" if has_pyarrow else "csv"
    if kind not in ("parquet", "csv"):
        raise InvalidInputError(f"format: must be 'auto', 'parquet' or 'csv', got {kind!r}; 'auto' is the default")
    if kind == "parquet" and not has_pyarrow:
        raise MissingExtraError(
            "format: 'parquet' needs pyarrow, got an environment without it; "
            "run pip install 'flowgraph-llm[parquet]', or choose the format 'csv'"
        )
    return kind  # type: ignore[return-value]


def write_table(out: Path, name: str, kind: TableFormat, columns: Mapping[str, str], groups: Rows) -> Path:
    """Write rows, a group at a time, atomically; the same rows in the same groups give the same bytes.

    Raises:
        OutputError: the path cannot be written.
    """
    writer: Callable[[Path, Mapping[str, str], Rows], None] = _write_parquet if kind == "parquet" else _write_csv
    with atomic_write(out / f"{name}.{kind}") as temporary:
        writer(temporary, columns, groups)
    other = "csv" if kind == "parquet" else "parquet"
    (out / f"{name}.{other}").unlink(missing_ok=True)  # of an earlier run, and by now out of date
    return out / f"{name}.{kind}"


def _write_parquet(path: Path, columns: Mapping[str, str], groups: Rows) -> None:
    import pyarrow
    from pyarrow import parquet

    types = {_TEXT: pyarrow.string(), _WHOLE: pyarrow.int64(), _NUMBER: pyarrow.float64(), _FLAG: pyarrow.bool_()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
    with parquet.ParquetWriter(path, schema) as writer:
        for rows in groups:
            if rows:
                values = {name: [row.get(name) for row in rows] for name in columns}
                writer.write_table(pyarrow.table(values, schema=schema))


def _write_csv(path: Path, columns: Mapping[str, str], groups: Rows) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for rows in groups:
            writer.writerows([_cell(row.get(name)) for name in columns] for row in rows)


def _cell(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value
