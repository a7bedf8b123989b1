"""Rows of Parquet files and of datasets of the library ``datasets``, as JSON values."""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flowgraph import MissingExtraError
from rl.errors import TaskError, describe_cause

DATASET_PREFIX = "datasets:"
"""Start of the name of a dataset that the library ``datasets`` loads."""

_SAVED_DATASET = "state.json"
_SAVED_SPLITS = "dataset_dict.json"
"""Files of a folder that ``save_to_disk`` wrote: of one dataset, and of several splits."""


def is_table(source: Any) -> bool:
    """Tell whether a source of problems is a Parquet file, a dataset, or the name or folder of one."""
    if not isinstance(source, str | Path):
        return True
    if str(source).startswith(DATASET_PREFIX):
        return True
    path = Path(source).expanduser()
    return path.suffix == ".parquet" or (path / _SAVED_DATASET).exists() or (path / _SAVED_SPLITS).exists()


def is_dataset(source: Any) -> bool:
    """Tell whether an object is a dataset, or several splits, of the library ``datasets``, which is not imported."""
    return hasattr(source, "column_names") and hasattr(source, "with_format")


def source_name(source: Any) -> str:
    """Name a source of problems for logs and messages."""
    if isinstance(source, str | Path):
        return str(source)
    return f"a {type(source).__name__}"


def read_table(source: Any) -> list[dict[str, Any]]:
    """Read all rows of a table.

    Args:
        source: a ``.parquet`` file; a folder that ``Dataset.save_to_disk`` wrote; a ``datasets.Dataset``; or
            ``"datasets:NAME"``, ``"datasets:NAME@CONFIG:SPLIT"`` for ``datasets.load_dataset``; the split is ``train``
            where none is given.

    Returns:
        One mapping of column names to values for each row, with the values as the library gives them.

    Raises:
        TaskError: a file or dataset that cannot be read, several splits, or another kind of object.
        MissingExtraError: pyarrow or datasets is needed and not installed.
    """
    if not isinstance(source, str | Path):
        return _rows_of(source)
    text = str(source)
    if text.startswith(DATASET_PREFIX):
        return _rows_of(_named_dataset(text))
    path = Path(source).expanduser()
    if path.suffix == ".parquet" and not path.is_dir():
        return _parquet_rows(path)
    return _rows_of(_saved_dataset(path))


def json_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a row as JSON has them: dates as ISO 8601 text, decimals as text.

    Raises:
        ValueError: a value that JSON does not have; the message names the column.
    """
    values = {}
    for name, value in row.items():
        try:
            values[name] = _json_value(value)
        except TypeError as error:
            raise ValueError(f"column {name!r} holds {error}, which JSON does not have") from error
    return values


def _json_value(value: Any) -> Any:
    """Convert one value, at any depth; a TypeError names what JSON does not have."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(str(value))
        return value
    if isinstance(value, Mapping):
        return {str(name): _json_value(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(inner) for inner in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(f"a {type(value).__name__}")


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a Parquet file."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError(
            f"path: a .parquet file needs the package pyarrow, got {str(path)!r} in an environment without it; "
            "pip install 'flowgraph-llm[parquet]', or write the rows as .jsonl"
        ) from error
    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise TaskError(
            f"path: must name a Parquet file that can be read, got {str(path)!r} ({type(error).__name__}: {error}); "
            "check the path, or write the file again"
        ) from error


def _named_dataset(text: str) -> Any:
    """Load ``datasets:NAME@CONFIG:SPLIT``."""
    name = text.removeprefix(DATASET_PREFIX)
    name, _, split = name.partition(":")
    name, _, config = name.partition("@")
    if not name:
        raise TaskError(
            f"path: must name a dataset behind {DATASET_PREFIX!r}, got {text!r}; "
            "write datasets:NAME, or datasets:NAME@CONFIG:SPLIT"
        )
    load_dataset = _datasets_library(text).load_dataset
    try:
        return load_dataset(name, config or None, split=split or "train")
    except Exception as error:
        # Each kind of dataset raises errors of its own: of the network, of files, of its configuration.
        raise TaskError(
            f"path: must name a dataset that can be loaded, got {text!r} ({describe_cause(error)}); write "
            "datasets:NAME@CONFIG:SPLIT, and load it once while the hub can be reached"
        ) from error


def _saved_dataset(path: Path) -> Any:
    """Load a dataset from a folder of its own format."""
    load_from_disk = _datasets_library(str(path)).load_from_disk
    try:
        return load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise TaskError(
            f"path: must be a folder of Dataset.save_to_disk, got {str(path)!r} ({type(error).__name__}: {error}); "
            "check the path, or save the dataset again"
        ) from error


def _datasets_library(source: str) -> Any:
    """Import the library ``datasets``."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"path: a dataset needs the package datasets, got {source!r} in an environment without it; "
            "pip install datasets, or write the rows as .jsonl"
        ) from error
    return datasets


def _rows_of(dataset: Any) -> list[dict[str, Any]]:
    """Read the rows of a dataset object, in plain Python values whatever its format is."""
    if isinstance(dataset, Mapping):
        splits = ", ".join(map(str, dataset)) or "none"
        raise TaskError(
            f"path: must be one split, got a {type(dataset).__name__} of several ({splits}); "
            "pass dataset['train'], and another as eval_path"
        )
    if not is_dataset(dataset):
        raise TaskError(
            f"path: must be a file, a folder or a datasets.Dataset, got a {type(dataset).__name__}; "
            "datasets.Dataset.from_list makes one of rows"
        )
    if not hasattr(dataset, "__len__"):
        raise TaskError(
            f"path: must be a dataset of known length, got a {type(dataset).__name__}; load it without streaming, or "
            "make one of its first rows by datasets.Dataset.from_list"
        )
    rows: Iterable[Any] = dataset.with_format(None)
    return [dict(row) for row in rows]
