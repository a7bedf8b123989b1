"""A trace in a notebook: one HTML fragment without script, readable on white and on black.

All style is inline, because notebook viewers strip style sheets; where they strip that too, the text, the numbers and
the routes are left. Token text is data: it is escaped, and control characters are shown as symbols.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch

from flowgraph.analysis.routes import widest_routes
from flowgraph.flow.flow import Flow
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.pages.palette import PALETTE, rgba
from flowgraph.pages.signs import visible, visible_name

_MAX_TOKENS = 300
"""Tokens shown of a longer trace."""
_AROUND = 6
"""Tokens shown on each side of an interesting one."""
_MAX_CHARACTERS = 80
"""Characters of one token that are shown."""
_NUM_ROUTES = 3
_ROUTE_ENDS = 5
"""Tokens shown at each end of a long route."""
_STRONGEST = 0.75
"""Opacity of the strongest token's colour: at most this much of it is light enough for black text on white, and dark
enough for white text on black."""
_MARKS = {
    "question": f"border-bottom:2px solid {PALETTE['question'].light}",
    "reasoning": "",
    "answer": f"outline:2px solid {PALETTE['answer'].light};outline-offset:-1px",
    "context": "opacity:.65",
}


@runtime_checkable
class TraceLike(Protocol):
    """What the fragment needs of a :class:`flowgraph.FlowTrace`."""

    @property
    def tokens(self) -> Sequence[str]: ...
    @property
    def graph(self) -> FlowGraph: ...
    @property
    def flow(self) -> Flow: ...
    @property
    def provenance(self) -> Mapping[str, Any]: ...


def repr_html(trace: TraceLike) -> str:
    """The trace as an HTML fragment of at most a few hundred tokens: numbers, text by throughput, widest routes.

    A longer trace shows the answer and the tokens with most throughput, each with its surroundings; every gap says how
    many tokens are left out and how strong the strongest of them is.

    Cost: three widest routes, and the tokens shown.
    """
    parts = [_summary(trace), _text(trace), _legend()]
    if bool(trace.flow.feasible):
        parts.insert(2, _routes(trace))
    # The classes keep a notebook's MathJax from reading dollar signs in tokens as formulas.
    return (
        '<div class="tex2jax_ignore mathjax_ignore" style="max-width:60em;line-height:1.6;text-align:left">'
        + "".join(parts)
        + "</div>"
    )


def _summary(trace: TraceLike) -> str:
    counts = ", ".join(
        f"{int(trace.graph[f'{name}_mask'].sum()):,} {name}" for name in ("question", "reasoning", "answer")
    )
    model = _visible(str(trace.provenance.get("model") or "a model"))
    lines = [f"<b>FlowTrace</b> of {model}: {len(trace.tokens):,} tokens ({counts}), {trace.graph.num_edges:,} edges"]
    if bool(trace.flow.feasible):
        hops = float(trace.flow.throughput.sum()) - 1
        lines.append(f"mean route {hops:.2f} hops, alpha {float(trace.flow.alpha):.3g}")
    else:
        lines.append("<b>No flow:</b> no question token reaches the answer through this graph.")
    kept = float(trace.graph.kept_flow)
    if kept < 1:
        lines.append(f"pruned: {_percent(kept)} of the flow kept")
    return f"<div>{'<br>'.join(lines)}</div>"


def _text(trace: TraceLike) -> str:
    throughput = trace.flow.throughput.tolist()
    regions = _regions(trace)
    passing = [value for value, region in zip(throughput, regions, strict=True) if region != "answer"]
    scale = max([*passing, 1e-12])  # the answer would dwarf everything else
    pieces, last = [], 0
    for start, stop in _windows(throughput, regions):
        pieces.append(_gap(throughput[last:start]))
        pieces.extend(_token(i, trace.tokens[i], throughput[i], regions[i], scale) for i in range(start, stop))
        last = stop
    pieces.append(_gap(throughput[last:]))
    style = "white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;margin:.6em 0"
    return f'<div dir="auto" style="{style}">{"".join(pieces)}</div>'


def _token(index: int, token: str, value: float, region: str, scale: float) -> str:
    strength = _STRONGEST * min(value / scale, 1.0) ** 0.5
    styles = [f"background-color:{_heat(strength)}" if strength >= 0.005 else "", _MARKS[region]]
    style = ";".join(filter(None, styles))
    line = "<br>" * min(token.count("\n"), 2)
    inside = f'<span title="token {index}, {region}: {_percent(value)}"' + (f' style="{style}"' if style else "")
    return f"{inside}>{_visible(token)}</span>{line}"


def _heat(opacity: float) -> str:
    return rgba(PALETTE["flow"].light, round(opacity, 2))


def _gap(values: Sequence[float]) -> str:
    if not values:
        return ""
    strongest = f", none above {_percent(max(values))}" if max(values) > 0 else ", none with flow"
    noun = "token" if len(values) == 1 else "tokens"
    return f'<div><i style="opacity:.75">[… {len(values):,} {noun} left out{strongest} …]</i></div>'


def _windows(throughput: Sequence[float], regions: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Runs of tokens to show: all, or the strongest of answer, question and the rest with what stands around them."""
    total = len(throughput)
    if total <= _MAX_TOKENS:
        yield 0, total
        return
    order = sorted(range(total), key=lambda token: -throughput[token])
    # Each part gets its share: question tokens carry the source, and would hide the reasoning on merit alone.
    shown: set[int] = set()
    for part, share in (("answer", 0.25), ("question", 0.5), ("reasoning", 1.0), ("context", 1.0)):
        for token in (token for token in order if regions[token] == part):
            if part in ("reasoning", "context") and not throughput[token]:
                break
            window = set(range(max(0, token - _AROUND), min(total, token + _AROUND + 1)))
            if len(shown | window) > share * _MAX_TOKENS:
                break
            shown |= window
    tokens = sorted(shown)
    for before, after in pairwise(tokens):
        if after - before <= _AROUND:  # the note on a gap takes more room than a few tokens
            shown.update(range(before, after))
    tokens = sorted(shown)
    starts = [t for t in tokens if t - 1 not in shown]
    stops = [t + 1 for t in tokens if t + 1 not in shown]
    yield from zip(starts, stops, strict=True)


def _routes(trace: TraceLike) -> str:
    rows = []
    for route in widest_routes(trace.flow, _NUM_ROUTES):
        names = [f"<bdi>{_visible(visible_name(trace.tokens[t]), 24)}</bdi><sub>{t}</sub>" for t in route.tokens]
        if len(names) > 2 * _ROUTE_ENDS + 1:
            middle = f"… {len(names) - 2 * _ROUTE_ENDS} more …"
            names = [*names[:_ROUTE_ENDS], middle, *names[-_ROUTE_ENDS:]]
        rows.append(f"<li>{_percent(route.flow)}: {' → '.join(names)}</li>")
    return f'<div>Widest routes, with their share of the flow:<ol dir="ltr" style="margin:0">{"".join(rows)}</ol></div>'


def _legend() -> str:
    samples = [f'<span style="{_MARKS[name]}">{name}</span>' for name in ("question", "answer", "context")]
    heat = f'<span style="background-color:{_heat(_STRONGEST)}">most throughput outside the answer</span>'
    return f'<div style="font-size:85%">{heat} · {" · ".join(samples)} · reasoning unmarked</div>'


def _regions(trace: TraceLike) -> list[str]:
    names = ["context"] * len(trace.tokens)
    for name in ("question", "reasoning", "answer"):
        for token in torch.nonzero(trace.graph[f"{name}_mask"]).flatten().tolist():
            names[token] = name
    return names


def _visible(text: str, length: int = _MAX_CHARACTERS) -> str:
    """Escaped text without invisible characters, cut after so many characters."""
    if len(text) > length:
        text = text[:length] + "…"
    return escape(visible(text))


def _percent(share: float) -> str:
    """Three digits, and 100 only when it is all."""
    text = f"{100 * share:.3g}"
    return f"{'99.9' if text == '100' and share < 1 - 1e-12 else text} %"
