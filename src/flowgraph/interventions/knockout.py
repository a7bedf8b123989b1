"""Knock tokens, edges or whole routes out of the attention of a model, and measure the answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from typing import TYPE_CHECKING, Any, get_args

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor, nn

from flowgraph.analysis.routes import Route
from flowgraph.attention.layers_and_heads import LayerRule
from flowgraph.attention.masking import Cut, cutting, resolve_cut_heads, resolve_cut_layers
from flowgraph.attention.modules import attention_modules, base_model
from flowgraph.errors import InvalidInputError
from flowgraph.graph.edge_rules import RowRule
from flowgraph.interventions.answer_logprobs import answer_logprobs, check_fits
from flowgraph.memory import require_memory
from flowgraph.tracing.flow_trace import FlowTrace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Intervention:
    """What is knocked out of the attention in one run; every part counts, and none means nothing.

    Attributes:
        tokens: no *later* position may read these; a token's own position still does.
        edges: pairs (source, target) of the graph: the attention row that belongs to target may not read source
            (see :func:`attention_cell`).
        routes: each edge of each route.
        layers: ``"all"`` attention layers, ``"middle"``, ``"10-19"`` or indices.
        heads: ``"all"`` or indices of query heads.
    """

    tokens: Sequence[int] = ()
    edges: Sequence[tuple[int, int]] = ()
    routes: Sequence[Route | Sequence[int]] = ()
    layers: LayerRule = "all"
    heads: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        """Keep what an iterator yields: it is read more than once."""
        for name in ("tokens", "edges", "routes", "layers", "heads"):
            if isinstance(getattr(self, name), Iterator):
                object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True, eq=False)
class KnockoutResult:
    """The answer before and after an intervention, under teacher forcing: the trace's own tokens are read throughout.

    Attributes:
        intervention: what was knocked out.
        answer: ``[A]`` positions of the answer's tokens.
        before, after: ``[A]`` log-probability of each of them, in nats.
        greedy_before, greedy_after: ``[A]`` ids of the most probable token at each of them.
        kl: ``[A]`` divergence of the next-token distribution after from the one before, KL(before || after), in nats.
    """

    intervention: Intervention
    answer: Int64[Tensor, " answer"]
    before: Float64[Tensor, " answer"]
    after: Float64[Tensor, " answer"]
    greedy_before: Int64[Tensor, " answer"]
    greedy_after: Int64[Tensor, " answer"]
    kl: Float64[Tensor, " answer"]

    @property
    def change(self) -> float:
        """Change of the answer's summed log-probability; negative when the answer became less likely."""
        return float((self.after - self.before).sum())

    @property
    def flips(self) -> bool:
        """Whether the most probable token differs, before and after, at one answer position or more.

        Each position is judged behind the trace's own tokens, nothing is generated anew; and "before" is what this
        model would say there, be it the trace's answer or not.
        """
        return not torch.equal(self.greedy_before, self.greedy_after)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        tensors = ("answer", "before", "after", "greedy_before", "greedy_after", "kl")
        what = self.intervention
        routes = [route.tokens if isinstance(route, Route) else route for route in what.routes]
        named = {
            "tokens": [int(token) for token in what.tokens],
            "edges": [[int(end) for end in edge] for edge in what.edges],
            "routes": [[int(token) for token in route] for route in routes],
            "layers": _indices(what.layers),
            "heads": _indices(what.heads),
        }
        return {
            "intervention": named,
            **{name: getattr(self, name).tolist() for name in tensors},
            "logprob_before": float(self.before.sum()),
            "logprob_after": float(self.after.sum()),
            "change": self.change,
            "flips": self.flips,
        }

    def __repr__(self) -> str:
        return (
            f"KnockoutResult(log-probability of the answer {float(self.before.sum()):.4f} -> "
            f"{float(self.after.sum()):.4f}, change {self.change:+.4f}, "
            f"{'flips' if self.flips else 'does not flip'})"
        )


def knockout(
    model: nn.Module,
    trace: FlowTrace,
    *,
    tokens: Sequence[int] = (),
    edges: Sequence[tuple[int, int]] = (),
    routes: Sequence[Route | Sequence[int]] = (),
    layers: LayerRule = "all",
    heads: str | int | Sequence[int] = "all",
) -> KnockoutResult:
    r"""Run the model with and without some of its attention, and compare what it says of the answer.

    With the cells C cut, a row of attention becomes
    :math:`A'[t, s] \propto A[t, s] \cdot [(t, s) \notin C]`: the scores are masked before the softmax, so what is left
    of the row sums to 1 again.

    Args:
        model: the causal LM of the trace.
        trace: the text, its answer, and the rows that its edges stand for.
        tokens: tokens that no later position may read; none of the answer.
        edges: (source, target) pairs of the graph.
        routes: routes of :meth:`FlowTrace.routes`, or tuples of tokens.
        layers: where it is cut; default all attention layers.
        heads: query heads, by index; default all.

    Raises:
        InvalidInputError: tokens outside the trace, twice or in the answer; edges backwards; a position left with
            nothing to read; a model that does not fit the trace.
        CaptureError: attention that cannot be masked in this model.

    Cost: two forward passes.
    """
    return knockouts(model, trace, [Intervention(tokens, edges, routes, layers, heads)])[0]


def knockouts(
    model: nn.Module,
    trace: FlowTrace,
    interventions: Sequence[Intervention],
    *,
    batch_size: int = 8,
    progress: Callable[[str], None] | None = None,
) -> list[KnockoutResult]:
    """Many interventions on one trace, several in each forward pass; else as :func:`knockout`.

    Raises:
        InvalidInputError, CaptureError: see :func:`knockout`.
        NumericalRangeError: logits that give the answer no log-probability.
        MemoryLimitError: no room for the distributions at the answer's positions.

    Cost: 1 + interventions / batch_size forward passes; memory of a mask ``[batch, heads, T, T]`` and of the
    distributions ``[batch, answer, vocabulary]``.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InvalidInputError(f"batch_size: must be a positive number, got {batch_size!r}; 8 is the default")
    if not isinstance(trace, FlowTrace):
        raise InvalidInputError(f"trace: must be a FlowTrace, got {type(trace).__name__}; load_trace reads a file")
    if not isinstance(interventions, Sequence) or not all(isinstance(one, Intervention) for one in interventions):
        raise InvalidInputError(
            f"interventions: must be a list of Intervention, got {interventions!r:.80}; e.g. [Intervention(tokens=[5])]"
        )
    inner = base_model(model)
    check_fits(inner, trace)
    for intervention in interventions:  # all of them before the first pass, without keeping their masks
        _cuts(inner, trace, [intervention])
    answer = trace.answer.cpu().nonzero().flatten()
    said = trace.token_ids.cpu()[answer]
    vocabulary = inner.config.get_text_config(decoder=True).vocab_size
    rows = min(batch_size, max(len(interventions), 1)) * answer.numel()
    require_memory(4 * 8 * rows * vocabulary, "batch_size", "use a smaller batch_size, or trace a shorter answer")
    plain = answer_logprobs(inner, trace, answer, 1)
    results = []
    for start in range(0, len(interventions), batch_size):
        some = interventions[start : start + batch_size]
        if progress is not None:
            progress(f"interventions {start + 1} to {start + len(some)} of {len(interventions)}")
        with attention_cut(inner, trace, some):
            cut = answer_logprobs(inner, trace, answer, len(some))
        divergence = (plain.exp() * (plain - cut).masked_fill(plain == -torch.inf, 0)).sum(-1)
        for row, intervention in enumerate(some):
            result = KnockoutResult(
                intervention=intervention,
                answer=answer,
                before=plain[0].gather(1, said[:, None])[:, 0],
                after=cut[row].gather(1, said[:, None])[:, 0],
                greedy_before=plain[0].argmax(-1),
                greedy_after=cut[row].argmax(-1),
                kl=divergence[row].clamp_min(0),
            )
            results.append(result)
    return results


def attention_cell(trace: FlowTrace, source: int, target: int) -> tuple[int, int]:
    """The cell (row, column) of the attention that the edge source -> target of the trace's graph was read from.

    Under ``"emission"`` rows a generated token has the row of the position before it, which emitted it; then the edge
    k - 1 -> k is that position's reading of itself. Under ``"literal"`` rows a token has its own row.

    Raises:
        InvalidInputError: no edge between two tokens of the trace, or a graph that was not made from attention.
    """
    source, target = _tokens((source, target), "edges", trace.num_tokens)
    if source >= target:
        raise InvalidInputError(
            f"edges: must run from an earlier to a later token, got {source} -> {target}; write (source, target)"
        )
    rows = trace.provenance.get("rows")
    written = re.search(r"rows=(\w+)", trace.graph.rules)
    rows = rows if rows is not None or written is None else written[1]
    if rows not in get_args(RowRule) or (written is not None and written[1] != rows):
        raise InvalidInputError(
            f"trace: must say which attention rows its edges are, got provenance {rows!r} and rules "
            f"{trace.graph.rules!r}; make it with flowgraph.trace, or knock out tokens"
        )
    earlier = rows == "emission_all" or (rows == "emission" and bool(trace.generated[target]))
    return target - earlier, source


@contextmanager
def attention_cut(model: nn.Module, trace: FlowTrace, interventions: Sequence[Intervention]) -> Iterator[None]:
    """Inside, each forward pass of this thread over the trace's text has row i of its batch cut as
    ``interventions[i]`` says; :func:`flowgraph.capture` then sees the attention that is left.

    Raises:
        InvalidInputError, CaptureError: see :func:`knockout`; also a pass over another text, or none.
    """
    inner = base_model(model)
    with cutting(inner, _cuts(inner, trace, interventions)):
        yield


def _cuts(model: PreTrainedModel, trace: FlowTrace, interventions: Sequence[Intervention]) -> list[Cut]:
    modules = attention_modules(model)
    cuts = []
    for what in interventions:
        layers = resolve_cut_layers(what.layers, model, modules)
        heads, num_heads = resolve_cut_heads(what.heads, model, modules)
        cuts.append(Cut(_cells(what, trace), layers, heads, num_heads))
    return cuts


def _cells(what: Intervention, trace: FlowTrace) -> Bool[Tensor, "tokens tokens"]:
    tokens = _tokens(what.tokens, "tokens", trace.num_tokens)
    if len(set(tokens)) < len(tokens):
        doubled = next(token for token in tokens if tokens.count(token) > 1)
        raise InvalidInputError(f"tokens: each may be named once, got {doubled} twice; remove one")
    answered = [token for token in tokens if bool(trace.answer[token])]
    if answered:
        raise InvalidInputError(
            f"tokens: must not belong to the answer, which is what is measured, got {answered[0]}; leave it out"
        )
    pairs = [_pair(edge, trace.num_tokens) for edge in _several(what.edges, "edges", "[(3, 9)]")]
    if len(set(pairs)) < len(pairs):
        source, target = next(pair for pair in pairs if pairs.count(pair) > 1)
        raise InvalidInputError(f"edges: each may be named once, got {source} -> {target} twice; remove one")
    for route in _several(what.routes, "routes", "trace.routes(1)"):
        stops = _tokens(route.tokens if isinstance(route, Route) else route, "routes", trace.num_tokens)
        if len(stops) < 2:
            raise InvalidInputError(f"routes: must have at least two tokens, got {list(stops)}; or knock out tokens")
        pairs += pairwise(stops)
    cells = torch.zeros(trace.num_tokens, trace.num_tokens, dtype=torch.bool)
    cells[:, list(tokens)] = True
    cells.tril_(-1)  # later positions only
    for pair in pairs:
        cells[attention_cell(trace, *pair)] = True
    return cells


def _indices(choice: Any) -> str | list[int]:
    """A choice of layers or heads as JSON has it."""
    if isinstance(choice, str):
        return choice
    return [int(one) for one in (choice if isinstance(choice, Iterable) else [choice])]


def _several(values: Any, name: str, example: str) -> Iterable[Any]:
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise InvalidInputError(f"{name}: must be a list, got {values!r:.80}; e.g. {name}={example}")
    return values


def _pair(edge: Any, num_tokens: int) -> tuple[int, int]:
    try:
        source, target = edge
    except (TypeError, ValueError):
        raise InvalidInputError(f"edges: must be pairs (source, target), got {edge!r}; e.g. edges=[(3, 9)]") from None
    source, target = _tokens((source, target), "edges", num_tokens)
    return source, target


def _tokens(values: Any, name: str, num_tokens: int) -> tuple[int, ...]:
    try:
        kinds = [value.dtype == torch.bool if isinstance(value, Tensor) else type(value) is bool for value in values]
        found = tuple(index(value) for value in values)
    except TypeError:
        kinds, found = [True], ()
    if any(kinds):
        raise InvalidInputError(
            f"{name}: must be token indices, got {values!r}; of a mask they are mask.nonzero().flatten().tolist()"
        )
    outside = [token for token in found if not 0 <= token < num_tokens]
    if outside:
        raise InvalidInputError(
            f"{name}: must lie in 0..{num_tokens - 1}, the tokens of the trace, got {outside[0]}; count from the start"
        )
    return found
