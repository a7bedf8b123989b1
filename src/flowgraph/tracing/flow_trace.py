"""``FlowTrace``: tokens, regions, graph and flow of one traced answer, and what they were made from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor, nn

from flowgraph.analysis.backbone import Backbone, backbone
from flowgraph.analysis.routes import Route, TokenRole, checkpoints, hubs, widest_routes, with_text
from flowgraph.analysis.specificity import Specificity, specificity
from flowgraph.attention.layers_and_heads import LayerRule
from flowgraph.certificate.certify import Certificate, certify
from flowgraph.errors import InvalidInputError, TraceFileError
from flowgraph.files import PathLike, loadable, write_json
from flowgraph.flow.flow import Flow
from flowgraph.graph.flow_graph import REGIONS, FlowGraph
from flowgraph.pages.notebook import repr_html
from flowgraph.pages.trace_page import write_html
from flowgraph.steps.step_flow import By, StepFlow, step_flow
from flowgraph.text.quoting import quote, shortened
from flowgraph.tracing.baselines import NUM_TOP, Baselines, baselines_of, shown_baselines
from flowgraph.tracing.edge import NUM_EDGES, Edge, EdgeParts, edge_of, parts_payload, strongest_parts
from flowgraph.tracing.generation import Progress
from flowgraph.tracing.payload import finite_or_none, trace_payload
from flowgraph.tracing.provenance import describe_response
from flowgraph.tracing.relevance_trace import RelevanceTrace, relevance_trace
from flowgraph.tracing.sensitivity import Sensitivity, sensitivity_of
from flowgraph.tracing.storage import read_record, require_tensors, write_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The tensors of a trace file with their dtypes and numbers of dimensions; the capacity is described at run time.
_TENSORS = {
    "token_ids": (torch.int64, 1),
    "spans": (torch.int64, 2),
    "generated": (torch.bool, 1),
    "edge_index": (torch.int32, 2),
    "question": (torch.bool, 1),
    "reasoning": (torch.bool, 1),
    "answer": (torch.bool, 1),
    "absorbing": (torch.bool, 1),
    "h": (torch.float64, 1),
    "g": (torch.float64, 1),
    "exponent": (torch.int64, 1),
    "source": (torch.float64, 1),
    "demand": (torch.float64, 1),
}
_CAPACITY_DTYPES = (torch.float32, torch.float64)
_FLOW_TENSORS = ("h", "g", "exponent", "source", "demand", "absorbing")
_FLOW_FACTS = ("damping", "source_rule", "absorption", "backend")
_MAX_ANSWER = 80
"""Characters of the answer in the summary of a trace."""
_GRAPH_LOSSES = ("kept_attention", "kept_flow", "throughput_error")


@loadable
@dataclass(frozen=True, eq=False, repr=False)
class FlowTrace:
    """The flow from a question to one answer: how the answer drew on the question.

    Attributes:
        tokens: T readable strings, one a token.
        token_ids: ``[T]`` int64.
        text: prompt and response as one string; from ids alone, the decoded tokens joined.
        spans: ``[T, 2]`` int64, half-open character span of each token in ``text``.
        generated: ``[T]`` bool, the tokens that the model produced.
        graph: the attention-induced DAG.
        flow: the solved flow on it.
        provenance: model, layers, heads, rules, selectors and versions; plain JSON values.
        composed: the scores of the composition that was asked for; None where the capacity decides what ranks tokens.

    Make one with :func:`flowgraph.trace`, or read one with :func:`flowgraph.load_trace`.
    """

    tokens: tuple[str, ...]
    token_ids: Int64[Tensor, " tokens"]
    text: str
    spans: Int64[Tensor, "tokens 2"]
    generated: Bool[Tensor, " tokens"]
    graph: FlowGraph
    flow: Flow
    provenance: Mapping[str, Any] = field(default_factory=dict)
    composed: Float64[Tensor, " tokens"] | None = None

    @property
    def num_tokens(self) -> int:
        """T, prompt and response together."""
        return len(self.tokens)

    @property
    def throughput(self) -> Float64[Tensor, " tokens"]:
        """Share of the unit flow through each token, in [0, 1]."""
        return self.flow.throughput

    @property
    def potential(self) -> Float64[Tensor, " tokens"]:
        """Backward potential h: total influence of each token that reaches the answer; 0 where float64 underflows."""
        return self.flow.potentials[0]

    @property
    def h(self) -> Float64[Tensor, " tokens"]:
        """Return :attr:`potential` under its old name, with a warning; removed in the next release."""
        warnings.warn("h: is deprecated, got FlowTrace.h; use FlowTrace.potential", DeprecationWarning, stacklevel=2)
        return self.potential

    @property
    def scores(self) -> Float64[Tensor, " tokens"]:
        """The scores of the trace's composition; without one, h where rows leak, else the throughput."""
        if self.composed is not None:
            return self.composed
        return self.potential if self.provenance.get("score") == "potential" else self.throughput

    @property
    def score_name(self) -> str:
        """What :attr:`scores` are, with the capacity of the edges, such as ``"potential on vtrace_share"``."""
        # The edges: the capacity, times a weight of the values where one was chosen.
        capacity = self.provenance.get("capacity", "unknown edges")
        if self.provenance.get("edge_weight", "attention") != "attention":
            capacity = f"{capacity} x {self.provenance['edge_weight']}"
        # The score: a composition that was named, or what the capacity ranks best by.
        composition = self.provenance.get("composition")
        if self.composed is not None:
            name = composition.get("name") if isinstance(composition, Mapping) else "a composition"
            return f"{name} on {capacity}"
        kind = "potential" if self.provenance.get("score") == "potential" else "throughput"
        return f"{kind} on {capacity}"

    @property
    def question(self) -> Bool[Tensor, " tokens"]:
        """Mask of the tokens where flow enters."""
        return self.graph.question_mask

    @property
    def reasoning(self) -> Bool[Tensor, " tokens"]:
        """Mask of the generated tokens before the answer."""
        return self.graph.reasoning_mask

    @property
    def answer(self) -> Bool[Tensor, " tokens"]:
        """Mask of the tokens where flow leaves."""
        return self.graph.answer_mask

    def text_of(self, mask: Bool[Tensor, " tokens"]) -> str:
        """Quote the characters of some tokens, each character once; others between them become " … ".

        Args:
            mask: the tokens, such as :attr:`answer`.
        """
        return quote(mask.nonzero().flatten().tolist(), self.tokens, self.spans.tolist(), self.text)

    @property
    def feasible(self) -> bool:
        """Whether any question token reaches the answer."""
        return bool(self.flow.feasible)

    def backbone(self, keep: float = 0.9) -> Backbone:
        """Find the fewest edges whose routes carry the share ``keep``; see :func:`flowgraph.backbone`."""
        return backbone(self.flow, keep)

    def routes(self, k: int = 10) -> list[Route]:
        """Find the ``k`` widest routes from question to answer; see :func:`flowgraph.widest_routes`."""
        return [with_text(route, self.tokens) for route in widest_routes(self.flow, k)]

    def hubs(self, k: int = 10, region: str = "reasoning") -> list[TokenRole]:
        """Find the ``k`` tokens of a region with the highest throughput; see :func:`flowgraph.hubs`."""
        found = hubs(self.flow, k, region)  # type: ignore[arg-type]
        return [with_text(role, self.tokens) for role in found]

    def checkpoints(self, k: int = 10, region: str = "reasoning") -> list[TokenRole]:
        """Find the ``k`` tokens of a region that gather flow from many places; see :func:`flowgraph.checkpoints`."""
        found = checkpoints(self.flow, k, region)  # type: ignore[arg-type]
        return [with_text(role, self.tokens) for role in found]

    def edge(self, source: int, target: int) -> Edge:
        """Return one edge, whose :meth:`Edge.by_head` finds the layers and heads that its capacity comes from.

        Args:
            source: the earlier token.
            target: the later token.

        Raises:
            InvalidInputError: not two tokens in order, or no edge between them.
        """
        return edge_of(self, source, target)

    def edge_parts(self, model: nn.Module, count: int = NUM_EDGES) -> list[EdgeParts]:
        """Split the ``count`` edges with most flow by layers and heads, for :meth:`to_html`.

        Capacities that join heads before layers (``"vtrace_share"``) are split by layers alone.

        Args:
            model: the model of the trace.
            count: number of edges.

        Raises:
            InvalidInputError: a count below 1; layers joined by their maximum (``"sharp_max"``); another model; a trace
                without a record of its capture.
            CaptureError: the model cannot be captured.

        Cost: one capture, and one row of each layer and head per edge.
        """
        return strongest_parts(self, model, count)

    def sensitivity(
        self,
        model: nn.Module,
        *,
        region: str | None = None,
        layers: Sequence[LayerRule] | None = None,
        heads: Sequence[Any] | None = None,
        rows: Sequence[str] | None = None,
        powers: Sequence[float] | None = None,
        capacities: Sequence[str] | None = None,
        top: int = 10,
        progress: Progress | None = None,
    ) -> Sensitivity:
        """Measure how far the ranking by :attr:`scores` depends on layers, heads, rows, power and capacity.

        One choice is changed at a time, the tokens are scored again, and both rankings are compared by Spearman's
        correlation and by the common share of the ``top`` best tokens. A ranking that no choice changes is robust; it
        need not be right.

        Args:
            model: the model of the trace.
            region: the tokens that are ranked: ``"reasoning"``, ``"question"``, or ``"all"``, all before the answer.
                Default: the reasoning, or all where it has fewer than three tokens.
            layers: choices of layers; default: the first third, ``"middle"``, ``"upper"``, the last third, ``"all"``.
                An empty list leaves a kind of choice out, here and below.
            heads: choices of heads, for capacities with this option; default: all names.
            rows: rules of rows; default: all three.
            powers: powers of the capacity ``"sharpened"`` on the layers of the trace; default: 1, 2, 4 and 8.
            capacities: other capacities; default: the non-negative ones of one forward pass.
            top: number of tokens with the highest scores; at most half of the region is compared.
            progress: called with a line of text before each variation.

        Returns:
            A frozen record with ``table()``, ``to_dict()`` and ``to_json(path)``. A capacity that this model does not
            support has no figure; ``reason`` says why.

        Raises:
            InvalidInputError: a choice outside its range, or a trace whose provenance does not say how it was captured.

        Cost: one capture and one solve for each variation, about twenty by default.
        """
        return sensitivity_of(
            self,
            model,
            region=region,
            layers=layers,
            heads=heads,
            rows=rows,
            powers=powers,
            capacities=capacities,
            top=top,
            progress=progress,
        )

    def steps(self, by: By = "auto", *, split_question: bool = False) -> StepFlow:
        """Merge tokens into lines, sentences or numbered steps and keep the flow; see :func:`flowgraph.split_steps`."""
        return step_flow(
            self.flow,
            tokens=self.tokens,
            spans=self.spans,
            text=self.text,
            by=by,
            split_question=split_question,
        )

    def relevance(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        target: str | Int64[Tensor, " tokens"] = "margin",
        contrast: str | int | None = None,
        hops: int = 6,
        max_edges: int | str = "auto",
    ) -> RelevanceTrace:
        """Compute the conserved relevance of the answer of this trace: one forward and some backward passes.

        Args:
            model: the model of the trace.
            tokenizer: its tokenizer, needed with ``contrast``.
            target: ``"margin"``, ``"logprob"``, or token ids to contrast with; see :func:`flowgraph.capture`.
            contrast: another answer, as text: the relevance is that of this answer instead of the other one.
            hops: largest number of emission hops through generated tokens.
            max_edges: ``"auto"``, ``"all"`` or a number; see :func:`flowgraph.relevance_flow`.

        Returns:
            The relevance, signed and conserved; its ``steps()`` join tokens to lines, sentences or words.

        Raises:
            CaptureError: the model has a part without a linear rule.
            InvalidInputError: options outside their range.

        Cost: see :class:`flowgraph.RelevanceRows`.
        """
        return relevance_trace(
            model,
            tokenizer,
            tokens=self.tokens,
            token_ids=self.token_ids,
            text=self.text,
            spans=self.spans,
            question=self.question,
            reasoning=self.reasoning,
            answer=self.answer,
            generated=self.generated,
            provenance=self.provenance,
            target=target,
            contrast=contrast,
            hops=hops,
            max_edges=max_edges,
        )

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

    def specificity(self) -> Specificity:
        """Measure how much the flow depends on where it enters; see :func:`flowgraph.specificity`. Measured once."""
        return self._specificity

    @cached_property
    def _specificity(self) -> Specificity:
        return specificity(self.flow, generated=self.generated)

    def certify(self, **options: Any) -> Certificate:
        """Check every provable property of this flow; see :func:`flowgraph.certify`. The result names the score."""
        return replace(certify(self.flow, **options), score=self.score_name)

    def save(self, path: PathLike) -> None:
        """Write everything to one safetensors file, atomically; :func:`flowgraph.load_trace` reads it back.

        Raises:
            OutputError: the path cannot be written.
            InvalidInputError: the provenance holds something that JSON cannot.
        """
        # A changed graph or flow would be saved beside results that no longer belong to it.
        graph = self.graph
        flow = self.flow
        graph.validate()
        flow.require_unchanged()
        capacity = graph.capacity
        if capacity.dtype not in _CAPACITY_DTYPES:
            # float16 and bfloat16 are exact in float32.
            capacity = capacity.float()
        # Positions fit int32, which halves the size of the edges.
        tensors = {
            "token_ids": self.token_ids,
            "spans": self.spans,
            "generated": self.generated,
            "edge_index": graph.edge_index.int(),
            "capacity": capacity,
            "question": graph.question_mask,
            "reasoning": graph.reasoning_mask,
            "answer": graph.answer_mask,
            "absorbing": flow.absorbing,
            "h": flow.h,
            "g": flow.g,
            "exponent": flow.exponent,
            "source": flow.source,
            "demand": flow.demand,
        }
        if self.composed is not None:
            tensors["composed"] = self.composed
        # Facts that are not tensors. The flow is stored too, so that loading need not solve it again.
        record = {
            "tokens": list(self.tokens),
            "text": self.text,
            "provenance": dict(self.provenance),
            "flow": {
                "damping": flow.damping,
                "source_rule": flow.source_rule,
                "absorption": flow.absorption,
                "backend": flow.backend,
            },
            "graph": {
                "rules": graph.rules,
                "kept_attention": float(graph.kept_attention),
                "kept_flow": float(graph.kept_flow),
                "throughput_error": float(graph.throughput_error),
            },
        }
        write_record(path, tensors, record)

    def to_dict(
        self,
        *,
        keep: float = 0.9,
        max_edges: int = 20_000,
        relevance: RelevanceTrace | None = None,
        beside: Sequence[FlowTrace] = (),
        edge_parts: Sequence[EdgeParts] = (),
        baselines: Baselines | None = None,
    ) -> dict[str, Any]:
        """Describe the trace as plain JSON values, in the schema of :mod:`flowgraph.tracing.payload`.

        Args:
            keep: share of the flow whose routes make the backbone.
            max_edges: most edges listed, those with most flow first.
            relevance: the relevance of the same answer (:meth:`relevance`), described under ``"relevance"``.
            beside: traces of the same tokens with other capacities, whose scores are listed under ``"scores"``.
            edge_parts: layers and heads of edges, from :meth:`edge_parts` of this trace and of its relevance.
            baselines: from :meth:`baselines` with the model; None: those that need no model.

        Raises:
            InvalidInputError: a trace of other tokens, or parts of edges that this trace does not have.

        Cost: one backbone search and twenty routes.
        """
        payload = trace_payload(
            self.flow,
            tokens=self.tokens,
            text=self.text,
            spans=self.spans,
            generated=self.generated,
            provenance=self.provenance,
            keep=keep,
            max_edges=max_edges,
            scores=self.composed,
        )

        # What ranks the tokens, and what the ranking is compared with.
        payload["score"] = self.score_name
        if self.feasible:
            payload["specificity"] = self.specificity().to_dict()
            payload["baselines"] = shown_baselines(self, baselines)

        # Results of other calls, which the caller passes: each is checked to be of these tokens.
        if relevance is not None:
            self._require_same_tokens(relevance, "relevance")
            payload["relevance"] = relevance.to_dict(max_edges=max_edges)
        if beside:
            payload["scores"] = [self._scores_of(other) for other in beside]
        if edge_parts:
            kinds = {"capacity": self.graph.edge_index}
            if relevance is not None:
                kinds["relevance"] = relevance.graph.edge_index
            payload["edge_parts"] = parts_payload(edge_parts, kinds)
        return payload

    def _require_same_tokens(self, other: FlowTrace | RelevanceTrace, name: str) -> None:
        if not torch.equal(other.token_ids, self.token_ids):
            raise InvalidInputError(
                f"{name}: must be of the tokens of this trace, got a trace of {other.num_tokens} tokens beside "
                f"{self.num_tokens}, or of other ids; trace the same prompt and response"
            )

    def _scores_of(self, other: FlowTrace) -> dict[str, Any]:
        """Describe the scores of another trace of the same tokens."""
        self._require_same_tokens(other, "beside")
        kind = other.provenance.get("score", "throughput")
        return {
            "capacity": other.provenance.get("capacity", "attention"),
            "kind": kind,
            "symbol": "h" if kind == "potential" else "f",
            "values": [finite_or_none(score) for score in other.scores.tolist()],
        }

    def to_json(self, path: PathLike, **options: Any) -> None:
        """Write :meth:`to_dict` as a JSON file, atomically; the options are those of :meth:`to_dict`."""
        write_json(path, self.to_dict(**options))

    def to_html(
        self,
        path: PathLike,
        *,
        keep: float = 0.9,
        relevance: RelevanceTrace | None = None,
        beside: Sequence[FlowTrace] = (),
        edge_parts: Sequence[EdgeParts] = (),
        baselines: Baselines | None = None,
    ) -> None:
        """Write one self-contained page that needs no network: tokens by throughput, backbone, numbers on hover.

        Args:
            path: the file.
            keep: share of the flow whose routes make the backbone.
            relevance: the relevance of the same answer; the page starts with it, as a tree of steps.
            beside: traces of the same tokens with other capacities, which the colours of the text can show.
            edge_parts: layers and heads of edges, from :meth:`edge_parts` of this trace and of its relevance; a click
                on an edge shows them.
            baselines: from :meth:`baselines` with the model; None: those that need no model.

        Raises:
            OutputError: the path cannot be written.
            InvalidInputError: a trace of other tokens, or parts of edges that this trace does not have.
        """
        payload = self.to_dict(
            keep=keep, relevance=relevance, beside=beside, edge_parts=edge_parts, baselines=baselines
        )
        write_html(path, payload)

    def _repr_html_(self) -> str:
        """Render the trace for a notebook."""
        return repr_html(self)

    def __repr__(self) -> str:
        """Summarise the trace: sizes, response, answer, the mean route, the strongest hubs, and what pruning lost."""
        sizes = []
        for name in REGIONS:
            num_in_region = int(self.graph[f"{name}_mask"].sum())
            sizes.append(f"{name} {num_in_region}")
        model = self.provenance.get("model", "a model")
        lines = [
            f"FlowTrace of {model}: {self.num_tokens} tokens ({', '.join(sizes)}), {self.graph.num_edges} edges",
            f"  answer: {self._shown_answer()}",
        ]
        made = describe_response(self.provenance)
        if made is not None:
            lines.append(f"  response: {made}")
        if self.feasible:
            lines += self._flow_summary()
        else:
            lines.append("  no flow: no question token reaches the answer through this graph")
        composition = self.provenance.get("composition")
        if self.composed is not None and isinstance(composition, Mapping):
            lines.append(f"  scores composed by {composition.get('name')}")
        # Conservation holds on any pruned graph, so only this line shows what pruning lost.
        if self.graph.kept_flow.item() < 1:
            lines.append(
                f"  pruned: {self.graph.kept_flow.item():.1%} of the flow and "
                f"{self.graph.kept_attention.item():.1%} of the attention kept, "
                f"no throughput changed by more than {self.graph.throughput_error.item():.1g}"
            )
        return "\n".join(lines)

    def _shown_answer(self) -> str:
        """Quote the answer, a long one by its start, and say how it was found where that is known."""
        shown = repr(shortened(self.text_of(self.answer).strip(), _MAX_ANSWER))
        found_by = self.provenance.get("answer_by")
        return f"{shown} ({found_by})" if found_by else shown

    def _flow_summary(self) -> list[str]:
        """Describe the flow in two lines: mean route and hubs."""
        # Every visit of a token counts in its throughput, so the sum is the mean number of tokens of a route.
        mean_hops = float(self.throughput.sum()) - 1
        hubs = [f"{self.tokens[role.token]!r} {role.throughput:.3f}" for role in self.hubs(5)]
        listed = ", ".join(hubs) or "none: no token lies between question and answer"
        return [
            f"  unit flow, mean route {mean_hops:.2f} hops, alpha {float(self.flow.alpha):.3g}",
            f"  hubs in the reasoning: {listed}",
        ]


def load_trace(path: PathLike) -> FlowTrace:
    """Read a trace written by :meth:`FlowTrace.save`; the file is checked, and no code in it can run.

    Raises:
        TraceFileError: missing, truncated, foreign, inconsistent or from a newer version.
    """
    # The container: names, dtypes and numbers of dimensions.
    tensors, record = read_record(path)
    if "kind" in record:
        raise TraceFileError(
            f"path: must hold a flow trace, got one of kind {record['kind']!r} in {path}; use load_relevance"
        )
    optional = {"composed": (torch.float64, 1)} if "composed" in tensors else {}
    require_tensors(path, tensors, {**_TENSORS, **optional, "capacity": (_capacity_dtype(tensors), 1)})

    # The record and the graph, whose constructor checks edges and regions.
    try:
        tokens = tuple(str(token) for token in record["tokens"])
        text = str(record["text"])
        provenance = dict(record["provenance"])
        flow_facts = {name: record["flow"][name] for name in _FLOW_FACTS}
        graph = _restored_graph(tensors, record["graph"], len(tokens))
    except (KeyError, TypeError, ValueError) as error:
        raise TraceFileError(f"path: must hold a consistent trace, got {path} ({error}); write it again") from error

    _require_token_lengths(path, tensors, len(tokens))
    return FlowTrace(
        tokens=tokens,
        token_ids=tensors["token_ids"],
        text=text,
        spans=tensors["spans"],
        generated=tensors["generated"],
        graph=graph,
        flow=_restored_flow(path, graph, tensors, flow_facts),
        provenance=provenance,
        composed=_restored_scores(path, tensors),
    )


def _capacity_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """Choose the dtype that the capacity must have: its own where that is allowed, else float32."""
    capacity = tensors.get("capacity")
    if capacity is not None and capacity.dtype in _CAPACITY_DTYPES:
        return capacity.dtype
    return torch.float32


def _restored_graph(tensors: dict[str, Tensor], facts: dict[str, Any], num_tokens: int) -> FlowGraph:
    """Build the graph of a trace file again, with the losses of its pruning."""
    graph = FlowGraph.from_edges(
        tensors["edge_index"].long(),
        tensors["capacity"],
        num_nodes=num_tokens,
        question=tensors["question"],
        reasoning=tensors["reasoning"],
        answer=tensors["answer"],
        rules=str(facts["rules"]),
    )
    # from_edges cannot know what pruning lost.
    for name in _GRAPH_LOSSES:
        graph[name] = torch.tensor([float(facts[name])], dtype=torch.float64)
    return graph


def _require_token_lengths(path: PathLike, tensors: dict[str, Tensor], num_tokens: int) -> None:
    """Refuse a file in which a vector over tokens has another length than the list of tokens."""
    # All tensors but the edges have one entry per token, spans two.
    lengths_agree = tensors["spans"].shape == (num_tokens, 2)
    for name in _TENSORS:
        if name not in ("edge_index", "spans") and tensors[name].numel() != num_tokens:
            lengths_agree = False
    if "composed" in tensors and tensors["composed"].numel() != num_tokens:
        lengths_agree = False
    if not lengths_agree:
        raise TraceFileError(
            f"path: every token vector must have {num_tokens} entries, got others in {path}; write it again"
        )


def _restored_scores(path: PathLike, tensors: dict[str, Tensor]) -> Tensor | None:
    """Return the stored scores of a composition; None for a trace without one."""
    scores = tensors.get("composed")
    if scores is not None and not bool(torch.isfinite(scores).all()):
        raise TraceFileError(f"path: composed must be finite, got NaN or infinity in {path}; write it again")
    return scores


def _restored_flow(path: PathLike, graph: FlowGraph, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Flow:
    """Put the stored flow together with its graph, without solving it again."""
    vectors = {name: tensors[name] for name in _FLOW_TENSORS}
    for name, vector in vectors.items():
        if not bool(torch.isfinite(vector.double()).all()):
            raise TraceFileError(f"path: {name} must be finite, got NaN or infinity in {path}; write it again")
    # f = g * h: the scale exponents of g and h cancel.
    return Flow(graph=graph, throughput=vectors["g"] * vectors["h"], **vectors, **facts)
