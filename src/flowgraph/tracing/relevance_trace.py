"""``RelevanceTrace``: tokens, regions and the signed flow of one answer's relevance, and what they were made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor, nn

from flowgraph.capacities.capture import capture
from flowgraph.certificate.certify import Certificate, certify
from flowgraph.errors import InvalidInputError, TraceFileError
from flowgraph.files import PathLike, loadable, write_json
from flowgraph.flow.signed_flow import SignedFlow, relevance_flow, streams
from flowgraph.graph.flow_graph import REGIONS
from flowgraph.graph.signed_graph import SignedGraph
from flowgraph.pages.trace_page import write_html
from flowgraph.steps.splitting import TokenText, region_of_tokens
from flowgraph.steps.step_flow import By, split_steps
from flowgraph.steps.step_relevance import StepRelevance, step_relevance
from flowgraph.tracing.baselines import NUM_TOP, Baselines, baselines_of, shown_baselines
from flowgraph.tracing.edge import NUM_EDGES, EdgeParts, parts_payload
from flowgraph.tracing.recapture import RECORD
from flowgraph.tracing.relevance_edge import (
    RelevanceEdge,
    relevance_edge_of,
    relevance_record,
    strongest_relevance_parts,
)
from flowgraph.tracing.relevance_payload import page_payload, relevance_payload
from flowgraph.tracing.storage import read_record, require_tensors, write_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KIND = "relevance"

# The tensors of a file with their dtypes and numbers of dimensions.
_TENSORS = {
    "token_ids": (torch.int64, 1),
    "spans": (torch.int64, 2),
    "generated": (torch.bool, 1),
    "forced": (torch.bool, 1),
    "edge_index": (torch.int32, 2),
    "weight": (torch.float64, 1),
    "question": (torch.bool, 1),
    "reasoning": (torch.bool, 1),
    "answer": (torch.bool, 1),
    "demand": (torch.float64, 1),
    "absorbed": (torch.float64, 1),
    "bias": (torch.float64, 1),
    "pruned_in": (torch.float64, 1),
    "pruned_out": (torch.float64, 1),
}
_FLOW_FACTS = ("total", "target", "hops", "residual", "bound")


@loadable
@dataclass(frozen=True, eq=False, repr=False)
class RelevanceTrace:
    """The conserved relevance of one answer: where its demand comes from, token by token.

    Attributes:
        tokens: T readable strings, one a token.
        token_ids: ``[T]`` int64.
        text: prompt and response as one string; from ids alone, the decoded tokens joined.
        spans: ``[T, 2]`` int64, half-open character span of each token in ``text``.
        flow: the signed flow, in shares of the demand.
        provenance: model, selectors and versions; plain JSON values.

    Make one with ``flowgraph.trace(..., capacity="relevance")`` or ``trace.relevance(model)``; read one with
    :func:`flowgraph.load_relevance`.
    """

    tokens: tuple[str, ...]
    token_ids: Int64[Tensor, " tokens"]
    text: str
    spans: Int64[Tensor, "tokens 2"]
    flow: SignedFlow
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """T, prompt and response together."""
        return len(self.tokens)

    @property
    def graph(self) -> SignedGraph:
        """The signed DAG; its weights are shares of the demand."""
        return self.flow.graph

    @property
    def generated(self) -> Bool[Tensor, " tokens"]:
        """Mask of the tokens that the model produced."""
        return self.flow.generated

    @property
    def question(self) -> Bool[Tensor, " tokens"]:
        """Mask of the question's tokens."""
        return self.graph.question_mask

    @property
    def reasoning(self) -> Bool[Tensor, " tokens"]:
        """Mask of the generated tokens before the answer."""
        return self.graph.reasoning_mask

    @property
    def answer(self) -> Bool[Tensor, " tokens"]:
        """Mask of the tokens that were explained."""
        return self.graph.answer_mask

    @property
    def scores(self) -> Float64[Tensor, " tokens"]:
        """Signed share of the demand that reaches each token (its throughput); negative values argue against it."""
        return self.flow.throughput

    @property
    def score_name(self) -> str:
        """What :attr:`scores` are, with the target of the relevance, such as ``"share of the relevance (margin)"``."""
        return f"share of the relevance ({self.flow.target})"

    @property
    def residual(self) -> float:
        """Largest difference between the two sides of the conservation law, relative to its largest term."""
        return self.flow.residual

    def shares(self) -> dict[str, float]:
        """Return where the demand ends, as shares that sum to 1; see :meth:`flowgraph.SignedFlow.shares`."""
        return self.flow.shares()

    def edge(self, source: int, target: int) -> RelevanceEdge:
        """Return one edge, whose :meth:`RelevanceEdge.by_head` finds the layers and heads that its share comes from.

        Args:
            source: the earlier token.
            target: the later token.

        Raises:
            InvalidInputError: not two tokens in order, or no edge between them.
        """
        return relevance_edge_of(self, source, target)

    def edge_parts(self, model: nn.Module, count: int = NUM_EDGES) -> list[EdgeParts]:
        """Split the ``count`` edges of largest absolute share by layers and heads, for :meth:`to_html`.

        Args:
            model: the model of the trace.
            count: number of edges.

        Raises:
            InvalidInputError: a count below 1; another model; a trace without a record of its capture.
            CaptureError: the model cannot be captured.

        Cost: one capture with the hops of the trace, and one row of each layer and head per edge.
        """
        return strongest_relevance_parts(self, model, count)

    def steps(self, by: By = "auto", *, split_question: bool = True) -> StepRelevance:
        """Join tokens to lines, sentences, numbered steps or words; see :func:`flowgraph.split_steps`."""
        steps = split_steps(
            self.tokens,
            self.spans,
            self.text,
            question=self.question,
            reasoning=self.reasoning,
            answer=self.answer,
            by=by,
            split_question=split_question,
        )
        return step_relevance(self.flow, steps)

    def baselines(self, model: nn.Module | None = None, *, region: str | None = None, top: int = NUM_TOP) -> Baselines:
        """Compare the ranking by :attr:`scores` with gradient x input, one hop, recency, digits and a random order.

        Args:
            model: the model of the trace, for gradient x input; None: without it.
            region: the tokens that are ranked: ``"reasoning"``, ``"question"``, or ``"all"``, all before the answer.
                Default: the reasoning, or all where it has fewer than three tokens.
            top: number of tokens with the highest scores; at most half of the region is compared.

        Returns:
            Spearman's correlation and the common share of the top tokens for each, with ``table()``, ``to_dict()`` and
            ``to_json(path)``.

        Raises:
            InvalidInputError: a region or number outside its range, or a region of fewer than three tokens.

        Cost: one read of the edges; with a model one forward and one backward pass.
        """
        return baselines_of(self, model, region=region, top=top)

    def certify(self) -> Certificate:
        """Check the conservation law at every token, across every cut and in total; see :func:`flowgraph.certify`."""
        return replace(certify(self.flow), score=self.score_name)

    def to_dict(
        self,
        *,
        max_edges: int = 20_000,
        edge_parts: Sequence[EdgeParts] = (),
        baselines: Baselines | None = None,
    ) -> dict[str, Any]:
        """Describe the relevance as plain JSON values, in the schema of :mod:`flowgraph.tracing.relevance_payload`.

        Args:
            max_edges: most edges listed, those of largest absolute weight first.
            edge_parts: layers and heads of edges, from :meth:`edge_parts`.
            baselines: from :meth:`baselines` with the model; None: those that need no model.

        Raises:
            InvalidInputError: parts of edges that this trace does not have.
        """
        payload = relevance_payload(
            self.flow,
            self.steps(),
            tokens=self.tokens,
            text=self.text,
            spans=self.spans,
            provenance=self.provenance,
            max_edges=max_edges,
        )
        payload["score"] = self.score_name
        payload["baselines"] = shown_baselines(self, baselines)
        if edge_parts:
            payload["edge_parts"] = parts_payload(edge_parts, {"relevance": self.graph.edge_index})
        return payload

    def to_json(self, path: PathLike, **options: Any) -> None:
        """Write :meth:`to_dict` as a JSON file, atomically; the options are those of :meth:`to_dict`."""
        write_json(path, self.to_dict(**options))

    def to_html(
        self, path: PathLike, *, edge_parts: Sequence[EdgeParts] = (), baselines: Baselines | None = None
    ) -> None:
        """Write one self-contained page: the relevance as a tree of steps, and the text coloured by it.

        Args:
            path: where to write.
            edge_parts: layers and heads of edges, from :meth:`edge_parts`; a click on an edge shows them.
            baselines: from :meth:`baselines` with the model; None: those that need no model.

        Raises:
            OutputError: the path cannot be written.
            InvalidInputError: parts of edges that this trace does not have.
        """
        write_html(path, page_payload(self.to_dict(edge_parts=edge_parts, baselines=baselines)))

    def save(self, path: PathLike) -> None:
        """Write everything to one safetensors file, atomically; :func:`flowgraph.load_relevance` reads it back.

        Raises:
            OutputError: the path cannot be written.
            InvalidInputError: the provenance holds something that JSON cannot.
        """
        flow = self.flow
        tensors = {
            "token_ids": self.token_ids,
            "spans": self.spans,
            "generated": flow.generated,
            "forced": flow.forced,
            "edge_index": self.graph.edge_index.int(),
            "weight": self.graph.weight.double(),
            "question": self.question,
            "reasoning": self.reasoning,
            "answer": self.answer,
            "demand": flow.demand,
            "absorbed": flow.absorbed,
            "bias": flow.bias,
            "pruned_in": flow.pruned_in,
            "pruned_out": flow.pruned_out,
        }
        record = {
            "kind": _KIND,
            "tokens": list(self.tokens),
            "text": self.text,
            "provenance": dict(self.provenance),
            "flow": {name: getattr(flow, name) for name in _FLOW_FACTS},
        }
        write_record(path, tensors, record)

    def _repr_html_(self) -> str:
        """Render the tree of steps for a notebook."""
        return self.steps()._repr_html_()

    def __repr__(self) -> str:
        """Summarise the relevance: sizes, the chain of steps, where the demand ends, and the residual."""
        sizes = ", ".join(f"{name} {int(self.graph[f'{name}_mask'].sum())}" for name in REGIONS)
        model = self.provenance.get("model", "a model")
        ends = ", ".join(f"{name} {share:.0%}" for name, share in self.shares().items())
        chain = str(self.steps()).splitlines()[1:]
        return "\n".join(
            [
                f"RelevanceTrace of {model}: {self.num_tokens} tokens ({sizes}), demand {self.flow.total:.3g} by "
                f"{self.flow.target}, residual {self.residual:.1e}",
                *chain,
                f"  ends in: {ends}",
            ]
        )


def relevance_trace(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    tokens: tuple[str, ...],
    token_ids: Int64[Tensor, " tokens"],
    text: str,
    spans: Int64[Tensor, "tokens 2"],
    question: Bool[Tensor, " tokens"],
    reasoning: Bool[Tensor, " tokens"],
    answer: Bool[Tensor, " tokens"],
    generated: Bool[Tensor, " tokens"],
    provenance: Mapping[str, Any],
    target: str | Int64[Tensor, " tokens"] = "margin",
    contrast: str | int | None = None,
    hops: int = 6,
    max_edges: int | str = "auto",
) -> RelevanceTrace:
    """Compute the relevance of an answer from a text whose regions are known.

    Args:
        model: a Hugging Face causal LM.
        tokenizer: needed with ``contrast``.
        tokens: readable text of each token.
        token_ids: prompt and response.
        text: prompt and response.
        spans: character span of each token in ``text``.
        question: mask of the question's tokens.
        reasoning: mask of the generated tokens before the answer.
        answer: mask of the tokens to explain.
        generated: mask of the tokens that the model produced.
        provenance: what was run; the target, contrast and hops are added.
        target: ``"margin"`` over the best other token, ``"logprob"``, or token ids to contrast with.
        contrast: another answer, as text: the relevance is that of this answer instead of the other one. The two are
            compared at the first token where they differ, since later tokens have different texts before them.
        hops: largest number of emission hops through generated tokens.
        max_edges: see :func:`flowgraph.relevance_flow`.

    Raises:
        CaptureError: the model has a part without a linear rule.
        InvalidInputError: options outside their range; a contrast that does not differ from the answer.

    Cost: see :class:`flowgraph.RelevanceRows`.
    """
    # With a contrast only the first token that differs is explained, against the token of the other answer.
    explained = answer
    goal = target
    if contrast is not None:
        place, other = _contrasted_token(tokenizer, token_ids, text, spans, answer, str(contrast))
        explained = torch.zeros_like(answer)
        explained[place] = True
        goal = token_ids.clone()
        goal[place] = other
    rows = capture(
        model,
        token_ids,
        capacity="relevance",
        answer=explained,
        generated=generated,
        target=goal,
        hops=hops,
        streamed=streams(max_edges, token_ids.numel()),
    )
    # A blank token belongs to the text that it stands in: what it holds is a share of the question too.
    regions = region_of_tokens(TokenText.of(tokens, spans, text), question, reasoning, answer)
    flow = relevance_flow(
        rows,
        question=torch.from_numpy(regions == REGIONS.index("question")),
        answer=answer,
        reasoning=torch.from_numpy(regions == REGIONS.index("reasoning")),
        max_edges=max_edges,
    )
    # What the trace needs to be captured again, and what a reader needs to know of it.
    contrast_ids = goal if isinstance(goal, Tensor) else None
    record = relevance_record(rows, explained, contrast_ids)
    shown_contrast = None if contrast is None else str(contrast)
    choices = {"target": flow.target, "contrast": shown_contrast, "hops": flow.hops}
    return RelevanceTrace(
        tokens=tokens,
        token_ids=token_ids,
        text=text,
        spans=spans,
        flow=flow,
        provenance={**provenance, "capacity": "relevance", **choices, RECORD: record},
    )


def _contrasted_token(
    tokenizer: PreTrainedTokenizerBase | None,
    token_ids: Int64[Tensor, " tokens"],
    text: str,
    spans: Int64[Tensor, "tokens 2"],
    answer: Bool[Tensor, " tokens"],
    contrast: str,
) -> tuple[int, int]:
    """Find the first token at which the text with the other answer differs, and the id that it has there."""
    if tokenizer is None:
        raise InvalidInputError("contrast: must come with a tokenizer, got none; pass target= as token ids instead")

    # Exchange the answer's visible characters and read both texts by the same tokenizer.
    answer_tokens = answer.nonzero().flatten()
    start = int(spans[answer_tokens[0], 0])
    stop = int(spans[answer_tokens[-1], 1])
    given = text[start:stop]
    start += len(given) - len(given.lstrip())
    stop -= len(given) - len(given.rstrip())
    other_text = text[:start] + contrast.strip() + text[stop:]
    before = tokenizer(text[:stop], add_special_tokens=False)["input_ids"]
    after = tokenizer(other_text, add_special_tokens=False)["input_ids"]

    # The tokens that both texts begin with.
    shared = 0
    while shared < min(len(before), len(after)) and before[shared] == after[shared]:
        shared += 1

    # A tokenizer may add a first token of its own: count from the token that holds the place.
    tokens_of_text = tokenizer(text, add_special_tokens=False)["input_ids"]
    offset = token_ids.numel() - len(tokens_of_text)
    place = shared + offset
    differs = shared < min(len(before), len(after))
    if not differs or not 0 <= place < answer.numel() or not bool(answer[place]):
        raise InvalidInputError(
            f"contrast: must differ from the answer {given.strip()!r} in a token of its own, got {contrast!r}; pass "
            "target= as token ids to name the tokens"
        )
    return place, int(after[shared])


def load_relevance(path: PathLike) -> RelevanceTrace:
    """Read a file written by :meth:`RelevanceTrace.save`; the file is checked, and no code in it can run.

    Raises:
        TraceFileError: missing, truncated, foreign, inconsistent or from a newer version.
    """
    tensors, record = read_record(path)
    if record.get("kind") != _KIND:
        raise TraceFileError(f"path: must hold a relevance trace, got a flow trace in {path}; use load_trace")
    require_tensors(path, tensors, _TENSORS)

    # The record and the graph, whose constructor checks edges and regions.
    try:
        tokens = tuple(str(token) for token in record["tokens"])
        facts = {name: record["flow"][name] for name in _FLOW_FACTS}
        graph = SignedGraph.from_edges(
            tensors["edge_index"].long(),
            tensors["weight"],
            num_nodes=len(tokens),
            question=tensors["question"],
            reasoning=tensors["reasoning"],
            answer=tensors["answer"],
        )
        text = str(record["text"])
        provenance = dict(record["provenance"])
    except (KeyError, TypeError, ValueError) as error:
        raise TraceFileError(f"path: must hold a consistent trace, got {path} ({error}); write it again") from error

    # Vectors over tokens have one entry per token, and are finite.
    for name in _TENSORS:
        if name in ("edge_index", "weight"):
            continue
        if tensors[name].shape[0] != len(tokens) or not bool(torch.isfinite(tensors[name].double()).all()):
            raise TraceFileError(
                f"path: {name} must hold {len(tokens)} finite entries, got others in {path}; write it again"
            )
    vectors = ("demand", "absorbed", "bias", "pruned_in", "pruned_out", "generated", "forced")
    return RelevanceTrace(
        tokens=tokens,
        token_ids=tensors["token_ids"],
        text=text,
        spans=tensors["spans"],
        flow=SignedFlow(graph=graph, **{name: tensors[name] for name in vectors}, **facts),
        provenance=provenance,
    )
