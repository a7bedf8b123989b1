"""One self-contained HTML page of a trace: the text by throughput, the backbone's arcs, numbers on hover.

The page makes no request of any kind and opens from disk. Token text is data in it: it travels as JSON
with every markup character escaped, and the page's script writes it by ``textContent`` only. A
Content-Security-Policy that names this one script and this one style sheet by their hashes stands behind that.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from flowgraph.files import PathLike, write_text

_MAX_ARCS = 4_000
"""Arcs the page can draw: beyond this a picture is one black mass, and a browser slows down."""
_MAX_EDGES = 20_000
"""Edges the page knows by their numbers, the strongest of the trace."""


def render_html(payload: Mapping[str, Any]) -> str:
    """A trace as one HTML page.

    Args:
        payload: a trace in the schema ``flowgraph-trace/1``; see :mod:`flowgraph.payload`.

    Returns:
        The page. It is at most a few hundred bytes per token and a few dozen per edge, 20,000 edges at most.

    Cost: one pass over the tokens and the edges shown.
    """
    style, script = (_asset(name) for name in ("trace.css", "trace.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("trace.html.jinja")).render(
        # Marked as safe: our own two files, and JSON without a markup character.
        style=Markup(style),
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        page_data=Markup(_embeddable(_page_data(payload))),
        **_header(payload),
    )


def write_html(path: PathLike, payload: Mapping[str, Any]) -> Path:
    """Write :func:`render_html` to a file, atomically.

    Raises:
        OutputError: the path cannot be written.
    """
    return write_text(path, render_html(payload))


def _asset(name: str) -> str:
    text = (files("flowgraph.views") / "templates" / name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")  # browsers hash what they parsed, and parsing turns CRLF into LF


def _csp_hash(content: str) -> str:
    """The source expression that lets a browser run exactly this inline content."""
    digest = hashlib.sha256(content.encode()).digest()
    return Markup(f"'sha256-{base64.b64encode(digest).decode()}'")


def _embeddable(values: Any) -> str:
    """JSON that can neither end nor alter the script element around it; lone surrogates stay escaped."""
    text = json.dumps(values, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _page_data(payload: Mapping[str, Any]) -> dict[str, Any]:
    """What the script draws, with the numbers as short as they are shown."""
    backbone = payload["backbone"] or {"edges": []}
    edges = payload["edges"][:_MAX_EDGES]
    return {
        "tokens": list(_tokens(payload["tokens"])),
        "edges": [[source, target, _short(flow)] for source, target, _, flow in edges],
        "edges_left_out": payload["edges_left_out"] + len(payload["edges"]) - len(edges),
        "arcs": [[source, target, _short(flow)] for source, target, flow in backbone["edges"][:_MAX_ARCS]],
        "num_arcs": len(backbone["edges"]),
        "routes": [[route["tokens"], _short(route["flow"])] for route in payload["routes"]],
        "hubs": _roles(payload["hubs"]),
        "checkpoints": _roles(payload["checkpoints"]),
    }


def _tokens(tokens: Iterable[Mapping[str, Any]]) -> Iterator[list[Any]]:
    """[text, region, generated, h, g, throughput, shares its characters with the token before]."""
    before = None
    for token in tokens:
        span = (token["start"], token["end"])
        numbers = [_short(token[name]) for name in ("h", "g", "throughput")]
        yield [
            token["text"],
            token["region"],
            int(token["generated"]),
            *numbers,
            int(span == before and span[0] < span[1]),
        ]
        before = span


def _roles(roles: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    return [[role["token"], *(_short(role[name]) for name in ("throughput", "inflows", "outflows"))] for role in roles]


def _short(value: float | None) -> float | None:
    """Six significant digits, twice what is shown; None where there is no number to show."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def _header(payload: Mapping[str, Any]) -> dict[str, Any]:
    """What the template itself writes: everything that holds no token text."""
    summary, backbone = payload["summary"], payload["backbone"]
    regions = [token["region"] for token in payload["tokens"]]
    kept_flow, kept_attention = summary["kept_flow"], summary["kept_attention"]
    lost = (_percent(kept_flow), _percent(kept_attention), f"{summary['throughput_error']:.1g}")
    return {
        "model": _printable(payload["model"] or "a model"),
        "feasible": payload["feasible"],
        "num_tokens": summary["num_tokens"],
        "num_edges": summary["num_edges"],
        "counts": [(name, regions.count(name)) for name in ("question", "reasoning", "answer")],
        "mean_hops": summary["mean_hops"],
        "alpha": summary["alpha"],
        "backbone_share": backbone and _percent(backbone["share"]),
        "backbone_edges": backbone and len(backbone["edges"]),
        "pruned": lost if min(kept_flow, kept_attention) < 1 else None,
        "provenance": list(_flattened(payload["provenance"])),
        "schema": payload["schema"],
    }


def _percent(share: float) -> str:
    """A share as a percentage that says 100 only when it is all."""
    text = f"{100 * share:.1f}"
    return f"{'99.9' if text == '100.0' and share < 1 else text.removesuffix('.0')} %"


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield _printable(prefix + str(name)), _printable(", ".join(map(str, value)))
        else:
            yield _printable(prefix + str(name)), _printable("none" if value is None else str(value))


def _printable(text: str) -> str:
    """Text whose invisible and direction-changing characters show as replacement characters."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
