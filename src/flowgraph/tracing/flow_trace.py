"""``FlowTrace``: tokens, regions, graph and flow of one traced answer, and what they were made from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor, nn

from flowgraph.analysis.backbone import Backbone, backbone
from flowgraph.analysis.routes import Route, TokenRole, checkpoints, hubs, widest_routes
from flowgraph.capacities.capture import capture
from flowgraph.capacities.relevance import RelevanceRows
from flowgraph.certificate.certify import Certificate, certify
from flowgraph.errors import TraceFileError
from flowgraph.files import PathLike, loadable, write_json
from flowgraph.flow.flow import Flow
from flowgraph.graph.flow_graph import REGIONS, FlowGraph
from flowgraph.pages.notebook import repr_html
from flowgraph.pages.trace_page import write_html
from flowgraph.steps.step_flow import By, StepFlow, split_steps, step_flow
from flowgraph.steps.step_relevance import StepRelevance, step_relevance
from flowgraph.tracing.payload import trace_payload
from flowgraph.tracing.storage import read_record, require_tensors, write_record

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
        """The score that ranks tokens best for this capacity: h where rows leak, else the throughput."""
        return self.potential if self.provenance.get("score") == "potential" else self.throughput

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

    @property
    def feasible(self) -> bool:
        """Whether any question token reaches the answer."""
        return bool(self.flow.feasible)

    def backbone(self, keep: float = 0.9) -> Backbone:
        """Find the fewest edges whose routes carry the share ``keep``; see :func:`flowgraph.backbone`."""
        return backbone(self.flow, keep)

    def routes(self, k: int = 10) -> list[Route]:
        """Find the ``k`` widest routes from question to answer; see :func:`flowgraph.widest_routes`."""
        return widest_routes(self.flow, k)

    def hubs(self, k: int = 10, region: str = "reasoning") -> list[TokenRole]:
        """Find the ``k`` tokens of a region with the highest throughput; see :func:`flowgraph.hubs`."""
        return hubs(self.flow, k, region)  # type: ignore[arg-type]

    def checkpoints(self, k: int = 10, region: str = "reasoning") -> list[TokenRole]:
        """Find the ``k`` tokens of a region that gather flow from many places; see :func:`flowgraph.checkpoints`."""
        return checkpoints(self.flow, k, region)  # type: ignore[arg-type]

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
        *,
        by: By = "auto",
        target: str | Tensor = "margin",
        hops: int = 6,
        split_question: bool = True,
    ) -> StepRelevance:
        """Compute the conserved relevance of the answer, joined to steps: one forward and some backward passes.

        Args:
            model: the model of the trace.
            by: how the text is split, as for :meth:`steps`.
            target: ``"margin"``, ``"logprob"``, or token ids to contrast with; see :func:`flowgraph.capture`.
            hops: largest number of emission hops through generated tokens.
            split_question: also split the question into steps.

        Raises:
            CaptureError: the model has a part without a linear rule.
            InvalidInputError: options outside their range.

        Cost: about 2.7 forward passes, and one backward pass per hop.
        """
        rows = capture(
            model,
            self.token_ids,
            capacity="relevance",
            answer=self.answer,
            generated=self.generated,
            target=target,
            hops=hops,
        )
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
        assert isinstance(rows, RelevanceRows)
        return step_relevance(rows, steps)

    def certify(self, **options: Any) -> Certificate:
        """Check every provable property of this flow; see :func:`flowgraph.certify`."""
        return certify(self.flow, **options)

    def save(self, path: PathLike) -> None:
        """Write everything to one safetensors file, atomically; :func:`flowgraph.load_trace` reads it back.

        Raises:
            OutputError: the path cannot be written.
            InvalidInputError: the provenance holds something that JSON cannot.
        """
        graph = self.graph
        flow = self.flow
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

    def to_dict(self, *, keep: float = 0.9, max_edges: int = 20_000) -> dict[str, Any]:
        """Describe the trace as plain JSON values, in the schema of :mod:`flowgraph.tracing.payload`.

        Args:
            keep: share of the flow whose routes make the backbone.
            max_edges: most edges listed, those with most flow first.

        Cost: one backbone search and twenty routes.
        """
        return trace_payload(
            self.flow,
            tokens=self.tokens,
            text=self.text,
            spans=self.spans,
            generated=self.generated,
            provenance=self.provenance,
            keep=keep,
            max_edges=max_edges,
        )

    def to_json(self, path: PathLike, *, keep: float = 0.9, max_edges: int = 20_000) -> None:
        """Write :meth:`to_dict` as a JSON file, atomically."""
        write_json(path, self.to_dict(keep=keep, max_edges=max_edges))

    def to_html(self, path: PathLike, *, keep: float = 0.9) -> None:
        """Write one self-contained page that needs no network: tokens by throughput, backbone, numbers on hover."""
        write_html(path, self.to_dict(keep=keep))

    def _repr_html_(self) -> str:
        """Render the trace for a notebook."""
        return repr_html(self)

    def __repr__(self) -> str:
        """Summarise the trace: sizes, the mean route, the strongest hubs, and what pruning lost."""
        sizes = ", ".join(f"{name} {int(self.graph[f'{name}_mask'].sum())}" for name in REGIONS)
        model = self.provenance.get("model", "a model")
        lines = [f"FlowTrace of {model}: {self.num_tokens} tokens ({sizes}), {self.graph.num_edges} edges"]
        if self.feasible:
            lines += self._flow_summary()
        else:
            lines.append("  no flow: no question token reaches the answer through this graph")
        # Conservation holds on any pruned graph, so only this line shows what pruning lost.
        if self.graph.kept_flow.item() < 1:
            lines.append(
                f"  pruned: {self.graph.kept_flow.item():.1%} of the flow and "
                f"{self.graph.kept_attention.item():.1%} of the attention kept, "
                f"no throughput changed by more than {self.graph.throughput_error.item():.1g}"
            )
        return "\n".join(lines)

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
    require_tensors(path, tensors, {**_TENSORS, "capacity": (_capacity_dtype(tensors), 1)})

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
    if not lengths_agree:
        raise TraceFileError(
            f"path: every token vector must have {num_tokens} entries, got others in {path}; write it again"
        )


def _restored_flow(path: PathLike, graph: FlowGraph, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Flow:
    """Put the stored flow together with its graph, without solving it again."""
    vectors = {name: tensors[name] for name in _FLOW_TENSORS}
    for name, vector in vectors.items():
        if not bool(torch.isfinite(vector.double()).all()):
            raise TraceFileError(f"path: {name} must be finite, got NaN or infinity in {path}; write it again")
    # f = g * h: the scale exponents of g and h cancel.
    return Flow(graph=graph, throughput=vectors["g"] * vectors["h"], **vectors, **facts)
