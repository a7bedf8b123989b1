"""``FlowTrace``: the product a user holds. Tokens, regions, graph, flow and where they came from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from flowgraph.analysis.backbone import Backbone, backbone
from flowgraph.analysis.routes import Route, TokenRole, checkpoints, hubs, widest_routes
from flowgraph.certificate.certify import Certificate, certify
from flowgraph.errors import TraceFileError
from flowgraph.files import PathLike, write_json
from flowgraph.flow.flow import Flow
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.pages.notebook import repr_html
from flowgraph.pages.trace_page import write_html
from flowgraph.steps.step_flow import By, StepFlow, step_flow
from flowgraph.tracing.payload import trace_payload
from flowgraph.tracing.storage import read_record, require_tensors, write_record

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
_WEIGHTS = (torch.float32, torch.float64)
_FLOW_FACTS = ("damping", "source_rule", "absorption", "backend")


@dataclass(frozen=True, eq=False, repr=False)
class FlowTrace:
    """How one answer drew on its question.

    Attributes:
        tokens: readable text of each token.
        token_ids: ``[T]`` int64.
        text: prompt and response as one string ("" when traced from ids alone).
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
        """The fewest edges whose routes carry the share ``keep``; see :func:`flowgraph.backbone`."""
        return backbone(self.flow, keep)

    def routes(self, k: int = 10) -> list[Route]:
        """The ``k`` widest routes from question to answer; see :func:`flowgraph.widest_routes`."""
        return widest_routes(self.flow, k)

    def hubs(self, k: int = 10, region: str = "reasoning") -> list[TokenRole]:
        """Tokens with the highest throughput; see :func:`flowgraph.hubs`."""
        return hubs(self.flow, k, region)  # type: ignore[arg-type]

    def checkpoints(self, k: int = 10, region: str = "reasoning") -> list[TokenRole]:
        """Tokens that gather flow from many places; see :func:`flowgraph.checkpoints`."""
        return checkpoints(self.flow, k, region)  # type: ignore[arg-type]

    def steps(self, by: By = "auto", *, split_question: bool = False) -> StepFlow:
        """The same flow between lines, sentences or numbered steps; see :func:`flowgraph.steps.split_steps`."""
        return step_flow(
            self.flow, tokens=self.tokens, spans=self.spans, text=self.text, by=by, split_question=split_question
        )

    def certify(self, **options: Any) -> Certificate:
        """What is proved about this flow; see :func:`flowgraph.certify`."""
        return certify(self.flow, **options)

    def save(self, path: PathLike) -> None:
        """Write everything to one safetensors file, atomically; :func:`flowgraph.load_trace` reads it back.

        Raises:
            OutputError: the path cannot be written.
        """
        graph, flow = self.graph, self.flow
        tensors = {
            "token_ids": self.token_ids,
            "spans": self.spans,
            "generated": self.generated,
            "edge_index": graph.edge_index.int(),
            "capacity": graph.capacity if graph.capacity.dtype in _WEIGHTS else graph.capacity.float(),
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
        record = {
            "tokens": list(self.tokens),
            "text": self.text,
            "provenance": dict(self.provenance),
            "flow": {name: getattr(flow, name) for name in _FLOW_FACTS},
            "graph": {
                "rules": graph.rules,
                "kept_attention": float(graph.kept_attention),
                "kept_flow": float(graph.kept_flow),
                "throughput_error": float(graph.throughput_error),
            },
        }
        write_record(path, tensors, record)

    def to_dict(self, *, keep: float = 0.9, max_edges: int = 20_000) -> dict[str, Any]:
        """The trace as plain JSON values; the schema is described in :mod:`flowgraph.tracing.payload`."""
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
        """Write one self-contained page (no network): tokens by throughput, the backbone's arcs, numbers on hover."""
        write_html(path, self.to_dict(keep=keep))

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return repr_html(self)

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{name} {int(self.graph[f'{name}_mask'].sum())}" for name in ("question", "reasoning", "answer")
        )
        lines = [
            f"FlowTrace of {self.provenance.get('model', 'a model')}: {self.num_tokens} tokens ({counts}), "
            f"{self.graph.num_edges} edges"
        ]
        if self.feasible:
            hops = float(self.throughput.sum()) - 1
            lines.append(f"  unit flow, mean route {hops:.2f} hops, alpha {float(self.flow.alpha):.3g}")
            named = [f"{self.tokens[role.token]!r} {role.throughput:.3f}" for role in self.hubs(5)]
            lines.append(
                "  hubs in the reasoning: " + (", ".join(named) or "none: nothing stands between question and answer")
            )
        else:
            lines.append("  no flow: no question token reaches the answer through this graph")
        if self.graph.kept_flow.item() < 1:
            lines.append(
                f"  pruned: {self.graph.kept_flow.item():.1%} of the flow and "
                f"{self.graph.kept_attention.item():.1%} of the attention kept, "
                f"no throughput changed by more than {self.graph.throughput_error.item():.1g}"
            )
        return "\n".join(lines)


def load_trace(path: PathLike) -> FlowTrace:
    """Read a trace written by :meth:`FlowTrace.save`; the file is checked, never executed.

    Raises:
        TraceFileError: missing, truncated, foreign, inconsistent or from a newer version.
    """
    tensors, record = read_record(path)
    wide = tensors.get("capacity", torch.empty(0)).dtype == torch.float64
    require_tensors(path, tensors, {**_TENSORS, "capacity": (_WEIGHTS[wide], 1)})
    try:
        tokens = tuple(str(token) for token in record["tokens"])
        graph = FlowGraph.from_edges(
            tensors["edge_index"].long(),
            tensors["capacity"],
            num_nodes=len(tokens),
            question=tensors["question"],
            reasoning=tensors["reasoning"],
            answer=tensors["answer"],
            rules=str(record["graph"]["rules"]),
        )
        for name in ("kept_attention", "kept_flow", "throughput_error"):
            graph[name] = torch.tensor([float(record["graph"][name])], dtype=torch.float64)
        facts = {name: record["flow"][name] for name in _FLOW_FACTS}
        text, provenance = str(record["text"]), dict(record["provenance"])
    except (KeyError, TypeError, ValueError) as error:
        raise TraceFileError(f"path: must hold a consistent trace, got {path} ({error}); write it again") from error
    nodes = [name for name in _TENSORS if name not in ("edge_index", "spans")]
    if tensors["spans"].shape != (len(tokens), 2) or any(tensors[name].numel() != len(tokens) for name in nodes):
        raise TraceFileError(
            f"path: every token vector must have {len(tokens)} entries, got others in {path}; write it again"
        )
    return FlowTrace(
        tokens=tokens,
        token_ids=tensors["token_ids"],
        text=text,
        spans=tensors["spans"],
        generated=tensors["generated"],
        graph=graph,
        flow=_restored_flow(path, graph, tensors, facts),
        provenance=provenance,
    )


def _restored_flow(path: PathLike, graph: FlowGraph, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Flow:
    vectors = {name: tensors[name] for name in ("h", "g", "exponent", "source", "demand", "absorbing")}
    for name, vector in vectors.items():
        if not bool(torch.isfinite(vector.double()).all()):
            raise TraceFileError(f"path: {name} must be finite, got NaN or infinity in {path}; write it again")
    return Flow(graph=graph, throughput=vectors["g"] * vectors["h"], **vectors, **facts)
