"""A trace in a notebook: one HTML fragment without script, readable on white and on black.

All style is inline, because notebook viewers remove style sheets; where they remove that too, the text, the numbers
and the routes remain. Token text is data: it is escaped, and control characters are shown as symbols.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from flowgraph.analysis.routes import widest_routes
from flowgraph.display.fragment import FULL_OPACITY, REGION_STYLES, escaped, fragment, heat, percent
from flowgraph.display.signs import visible_name
from flowgraph.flow.flow import Flow
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.text.spans import printed_pieces

_MAX_TOKENS = 300
"""Most tokens shown; a longer trace is shortened."""
_AROUND = 6
"""Tokens shown on each side of an interesting one."""
_SHARES = {"answer": 0.25, "question": 0.5, "reasoning": 1.0, "context": 1.0}
"""Regions in the order in which their tokens are chosen, and the part of the tokens shown that may be taken after each.
Question tokens carry the source, and would take everything if throughput alone decided."""
_NUM_ROUTES = 3
_ROUTE_ENDS = 5
"""Tokens shown at each end of a long route."""


@runtime_checkable
class TraceLike(Protocol):
    """The part of a :class:`flowgraph.FlowTrace` that the fragment reads.

    Attributes:
        tokens: T texts.
        text: the text.
        spans: ``[T, 2]``, range of characters of each token in the text.
        graph: with the masks of the regions and the share of the flow that pruning kept.
        flow: solved on the graph.
        provenance: how the trace was made; the name of the model is shown.
    """

    @property
    def tokens(self) -> Sequence[str]: ...
    @property
    def text(self) -> str: ...
    @property
    def spans(self) -> Int64[Tensor, "tokens 2"]: ...
    @property
    def graph(self) -> FlowGraph: ...
    @property
    def flow(self) -> Flow: ...
    @property
    def provenance(self) -> Mapping[str, Any]: ...
    def text_of(self, mask: Bool[Tensor, " tokens"]) -> str:
        """Quote the characters of some tokens."""
        ...


def repr_html(trace: TraceLike) -> str:
    """Render the trace as an HTML fragment: numbers, text coloured by throughput, and widest routes.

    A trace of more than 300 tokens shows the answer and the tokens with most throughput, each with its surroundings;
    every gap gives the number of tokens left out and the throughput of the strongest of them.

    Args:
        trace: a trace, with or without a flow.

    Returns:
        The fragment, a few hundred tokens at most.

    Cost: three widest routes, and the tokens shown.
    """
    parts = [_summary(trace), _text(trace)]
    if bool(trace.flow.feasible):
        parts.append(_routes(trace))
    parts.append(_legend())
    return fragment(*parts)


def _summary(trace: TraceLike) -> str:
    """Write model, size, answer, mean number of hops, alpha and the effect of pruning."""
    sizes = []
    for name in ("question", "reasoning", "answer"):
        num_tokens = int(trace.graph[f"{name}_mask"].sum())
        sizes.append(f"{num_tokens:,} {name}")
    counts = ", ".join(sizes)
    model = escaped(str(trace.provenance.get("model") or "a model"))
    lines = [f"<b>FlowTrace</b> of {model}: {len(trace.tokens):,} tokens ({counts}), {trace.graph.num_edges:,} edges"]
    answer = trace.text_of(trace.graph.answer_mask).strip()
    lines.append(f"answer: <bdi><b>{escaped(answer)}</b></bdi>")

    if bool(trace.flow.feasible):
        # A route of k tokens has k - 1 hops, and the throughput sums to the mean number of tokens of a route.
        hops = float(trace.flow.throughput.sum()) - 1
        alpha = float(trace.flow.alpha)
        lines.append(
            f"mean route {hops:.2f} hops; alpha {alpha:.3g}: so many times this flow fits through the attention"
        )
    else:
        lines.append("<b>No flow:</b> no question token reaches the answer through this graph.")
    kept = float(trace.graph.kept_flow)
    if kept < 1:
        lines.append(f"pruned: {percent(kept)} of the flow kept")
    return f"<div>{'<br>'.join(lines)}</div>"


def _text(trace: TraceLike) -> str:
    """Write the tokens shown, coloured by throughput, and a note for each gap."""
    throughput = trace.flow.throughput.tolist()
    regions = _regions(trace)

    # Full colour is the strongest token outside the answer, which carries all flow and would make the others pale.
    outside_answer = [value for value, region in zip(throughput, regions, strict=True) if region != "answer"]
    full = max([*outside_answer, 1e-12])

    spans = trace.spans.tolist()
    pieces = []
    last = 0
    for start, stop in _windows(throughput, regions):
        pieces.append(_gap(throughput[last:start]))
        # Tokens that share a character print it once, and stand together in its tooltip.
        printed = printed_pieces(trace.tokens[start:stop], spans[start:stop], trace.text)
        token = start
        while token < stop:
            following = token + 1
            while following < stop and not printed[following - start]:
                following += 1
            pieces.append(_token(token, following, printed[token - start], throughput, regions[token], full))
            token = following
        last = stop
    pieces.append(_gap(throughput[last:]))
    style = "white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;margin:.6em 0"
    return f'<div dir="auto" style="{style}">{"".join(pieces)}</div>'


def _token(start: int, stop: int, text: str, throughputs: Sequence[float], region: str, full: float) -> str:
    """Write the tokens of one text with the largest throughput as background, all in the tooltip, region as line."""
    # The strength is the square root of the share, so that weak tokens differ in colour too.
    throughput = max(throughputs[start:stop])
    styles = []
    strength = FULL_OPACITY * min(throughput / full, 1.0) ** 0.5
    if strength >= 0.005:
        styles.append(f"background-color:{heat(strength)}")
    if REGION_STYLES[region]:
        styles.append(REGION_STYLES[region])
    style = ""
    if styles:
        style = f' style="{";".join(styles)}"'

    # The tooltip gives the throughput of each token that shares the text.
    if stop - start == 1:
        title = f"token {start}, {region}: {percent(throughput)}"
    else:
        shares = ", ".join(percent(share) for share in throughputs[start:stop])
        title = f"tokens {start} to {stop - 1}, {region}: {shares}"
    line_breaks = "<br>" * min(text.count("\n"), 2)
    return f'<span title="{title}"{style}>{escaped(text)}</span>{line_breaks}'


def _gap(throughput: Sequence[float]) -> str:
    """Write how many tokens are left out, and the throughput of the strongest; empty if there are none."""
    if not throughput:
        return ""
    strongest = "none with flow"
    if max(throughput) > 0:
        strongest = f"none above {percent(max(throughput))}"
    noun = "token" if len(throughput) == 1 else "tokens"
    return f'<div><i style="opacity:.75">[… {len(throughput):,} {noun} left out, {strongest} …]</i></div>'


def _windows(throughput: Sequence[float], regions: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield runs of tokens to show, as [start, stop): all, or the strongest of each region with their surroundings."""
    num_tokens = len(throughput)
    if num_tokens <= _MAX_TOKENS:
        yield 0, num_tokens
        return

    # Region by region, strongest token first, until the share of the region is used up.
    strongest_first = sorted(range(num_tokens), key=lambda token: -throughput[token])
    shown: set[int] = set()
    for region, share in _SHARES.items():
        for token in strongest_first:
            if regions[token] != region:
                continue
            if region in ("reasoning", "context") and not throughput[token]:
                break
            window = range(max(0, token - _AROUND), min(num_tokens, token + _AROUND + 1))
            extended = shown.union(window)
            if len(extended) > share * _MAX_TOKENS:
                break
            shown = extended

    # A gap of a few tokens is filled, because the note on it would be longer.
    for before, after in pairwise(sorted(shown)):
        if after - before <= _AROUND:
            shown.update(range(before, after))

    tokens = sorted(shown)
    starts = [token for token in tokens if token - 1 not in shown]
    stops = [token + 1 for token in tokens if token + 1 not in shown]
    yield from zip(starts, stops, strict=True)


def _routes(trace: TraceLike) -> str:
    """Write the widest routes; a long one is shortened in its middle."""
    rows = []
    for route in widest_routes(trace.flow, _NUM_ROUTES):
        names = []
        for token in route.tokens:
            # <bdi> keeps a right-to-left name from reversing the order of the route.
            name = escaped(visible_name(trace.tokens[token]), 24)
            names.append(f"<bdi>{name}</bdi><sub>{token}</sub>")
        if len(names) > 2 * _ROUTE_ENDS + 1:
            middle = f"… {len(names) - 2 * _ROUTE_ENDS} more …"
            names = [*names[:_ROUTE_ENDS], middle, *names[-_ROUTE_ENDS:]]
        rows.append(f"<li>{percent(route.flow)}: {' → '.join(names)}</li>")
    return f'<div>Widest routes, with their share of the flow:<ol dir="ltr" style="margin:0">{"".join(rows)}</ol></div>'


def _legend() -> str:
    """Explain colours and lines."""
    samples = [f'<span style="{REGION_STYLES[name]}">{name}</span>' for name in ("question", "answer", "context")]
    strongest = f'<span style="background-color:{heat(FULL_OPACITY)}">most throughput outside the answer</span>'
    notes = "reasoning unmarked; context: chat template, system text and what follows the answer"
    return f'<div style="font-size:85%">{strongest} · {" · ".join(samples)} · {notes}</div>'


def _regions(trace: TraceLike) -> list[str]:
    """Name the region of each token, "context" outside the three."""
    names = ["context"] * len(trace.tokens)
    for name in ("question", "reasoning", "answer"):
        for token in torch.nonzero(trace.graph[f"{name}_mask"]).flatten().tolist():
            names[token] = name
    return names
