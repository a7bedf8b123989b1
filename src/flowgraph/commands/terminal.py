"""A trace in the terminal: the text as a heat map, a token table, the routes."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from flowgraph.certificate.certify import Certificate
from flowgraph.pages import signs
from flowgraph.pages.palette import FIRST_STEP_WITH_BLACK_INK, FLOW_RAMP_ON_DARK
from flowgraph.tracing.flow_trace import FlowTrace

_REGION_LETTER = {"question": "Q", "reasoning": "R", "answer": "A"}
_BAR = 16


def visible(token: str) -> str:
    """Token text with signs for invisible characters and for blank tokens, so that no text can control a terminal."""
    return signs.visible(token) if token.strip(" ") else "␣" * len(token)


def render_trace(trace: FlowTrace, *, keep: float = 0.9, rows: int | None = 24, num_routes: int = 6) -> RenderableType:
    """Everything a reader wants first: text, strongest tokens in text order, backbone and routes."""
    parts: list[RenderableType] = [
        Text(repr(trace).split("\n")[0]),
        _selection(trace),
        Text(),
        heat_text(trace),
        Text(),
        token_table(trace, rows),
    ]
    if trace.feasible:
        parts += [Text(), _backbone(trace, keep), _routes(trace, num_routes)]
    else:
        parts += [
            Text(),
            Text("No flow: no question token reaches the answer through this graph.", style="bold yellow"),
        ]
    return Group(*parts)


def heat_text(trace: FlowTrace) -> Text:
    """The text, each token on a background that grows brighter with the square root of its throughput."""
    text = Text(no_wrap=False)
    masks = ((trace.question, "underline"), (trace.answer, "bold reverse"))
    for index, token in enumerate(trace.tokens):
        strength = float(trace.throughput[index]) ** 0.5
        step = min(int(strength * len(FLOW_RAMP_ON_DARK)), len(FLOW_RAMP_ON_DARK) - 1)
        ink = "black" if step >= FIRST_STEP_WITH_BLACK_INK else "white"
        style = f"{ink} on {FLOW_RAMP_ON_DARK[step]}"
        if strength < 0.05:
            style = "dim"
        extra = " ".join(name for mask, name in masks if bool(mask[index]))
        text.append(
            (token if token.isspace() and "\n" not in token else visible(token)).replace("⏎", "⏎\n"),
            style=f"{extra} {style}".strip(),
        )
    return text


def token_table(trace: FlowTrace, rows: int | None = 24) -> Table:
    """The strongest tokens in text order, a third of the rows for the question (all tokens with ``rows=None``)."""
    chosen = list(range(trace.num_tokens)) if rows is None else sorted(_strongest(trace, rows))
    title = "all tokens" if rows is None else f"{len(chosen)} of {trace.num_tokens} tokens, those with most throughput"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, caption_justify="left")
    table.add_column("#", justify="right", style="dim")
    table.add_column("")
    table.add_column("token")
    table.add_column("throughput", justify="right")
    table.add_column("")
    table.add_column("h", justify="right", style="dim")
    passing = trace.throughput[~trace.answer]
    scale = max(float(passing.max()) if passing.numel() else 0.0, 1e-12)  # the answer would dwarf everything else
    for index in chosen:
        value = float(trace.throughput[index])
        bar = "" if bool(trace.answer[index]) else "█" * round(_BAR * value / scale) or "▏" * (value > 0)
        table.add_row(
            str(index),
            _letter(trace, index),
            Text(visible(trace.tokens[index])),
            f"{value:.3f}",
            bar,
            f"{float(trace.potential[index]):.3g}",
        )
    table.caption = (
        "Q question, R reasoning, A answer; throughput: share of the flow that passes through the token; "
        "h: its total influence on the answer; answer tokens have no bar"
    )
    return table


def _strongest(trace: FlowTrace, rows: int) -> list[int]:
    """Every question token carries its own share of the source, so on merit alone they would fill the table."""
    order: list[int] = trace.throughput.argsort(descending=True, stable=True).tolist()
    asked = [token for token in order if bool(trace.question[token])][: rows // 3]
    return asked + [token for token in order if not bool(trace.question[token])][: rows - len(asked)]


def certificate_table(certificate: Certificate) -> RenderableType:
    """The certificate with one row a check: verdict, residual against its bound, the statement in words."""
    head, numbers, *_ = str(certificate).split("\n")
    table = Table(box=None, pad_edge=False, show_header=True)
    for name, justify in (("", "left"), ("check", "left"), ("residual", "right"), ("bound", "right"), ("says", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for check in certificate.checks:
        mark = Text("✓", style="green") if check.ok else Text("✗", style="bold red")
        said = Text(check.statement).append(f" ({check.detail})" if check.detail else "", style="dim")
        table.add_row(mark, check.name, f"{check.residual:.1g}", f"{check.bound:.1g}", said)
    return Group(Text(head, style="bold"), Text(numbers), table, *(Text(f"note: {note}") for note in certificate.notes))


_FOUND_AS = {
    "auto: Boxed()": "in the last box",
    "auto: NUMBER_SIGN": "after ####",
    "auto: TAG": "in the answer tag",
    "auto: PHRASE": "as a stated answer",
    "auto: LastLine()": "as the last line",
}
"""The rules that look for an answer when nobody says where it is, in words."""


def _letter(trace: FlowTrace, index: int) -> str:
    return next((letter for name, letter in _REGION_LETTER.items() if bool(trace.graph[f"{name}_mask"][index])), "")


def _selection(trace: FlowTrace) -> Text:
    """What was taken for the answer, and by which rule: the first thing to check when a trace looks odd."""
    found = "".join(trace.tokens[t] for t in trace.answer.nonzero().flatten().tolist())
    rule = trace.provenance.get("answer_selector", "")
    how = _FOUND_AS.get(rule, f"by {rule}" if rule else "")
    line = Text(f"answer: {found.strip()!r}").append(f" {how}" if how else "", style="dim")
    if "LastLine" in rule and rule.startswith("auto"):
        line.append(
            "\nno stated answer was found, so the last line was taken; name it with --answer or answer=", "yellow"
        )
    return line


def _backbone(trace: FlowTrace, keep: float) -> Text:
    bone = trace.backbone(keep)
    return Text(
        f"backbone: {bone.num_edges} of {trace.graph.num_edges} edges carry {bone.share:.1%} of the flow end to end"
    )


def _routes(trace: FlowTrace, k: int) -> Table:
    table = Table(title="widest routes", title_justify="left", box=None, pad_edge=False)
    table.add_column("flow", justify="right")
    table.add_column("route", overflow="fold")
    for route in trace.routes(k):
        line = Text(" → ", style="dim").join(
            Text(f"{visible(trace.tokens[t]).strip() or visible(trace.tokens[t])!r}[{t}]") for t in route.tokens
        )
        table.add_row(f"{route.flow:.1%}", line)
    return table


def print_trace(trace: FlowTrace, console: Console | None = None, **options: object) -> None:
    """Print :func:`render_trace`."""
    (console or Console()).print(render_trace(trace, **options))  # type: ignore[arg-type]
