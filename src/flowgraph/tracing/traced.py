"""The Traced protocol: what the functions behind the methods of a trace read from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from flowgraph.flow.flow import Flow
from flowgraph.flow.signed_flow import SignedFlow
from flowgraph.graph.flow_graph import FlowGraph


@runtime_checkable
class Traced(Protocol):
    """A trace, as :class:`flowgraph.FlowTrace` documents its attributes."""

    @property
    def tokens(self) -> tuple[str, ...]: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def token_ids(self) -> Int64[Tensor, " tokens"]: ...

    @property
    def generated(self) -> Bool[Tensor, " tokens"]: ...

    @property
    def question(self) -> Bool[Tensor, " tokens"]: ...

    @property
    def reasoning(self) -> Bool[Tensor, " tokens"]: ...

    @property
    def answer(self) -> Bool[Tensor, " tokens"]: ...

    @property
    def graph(self) -> FlowGraph: ...

    @property
    def flow(self) -> Flow: ...

    @property
    def provenance(self) -> Mapping[str, Any]: ...

    @property
    def scores(self) -> Float64[Tensor, " tokens"]: ...

    @property
    def score_name(self) -> str: ...


@runtime_checkable
class TracedRelevance(Protocol):
    """A relevance trace, as :class:`flowgraph.RelevanceTrace` documents its attributes."""

    @property
    def tokens(self) -> tuple[str, ...]: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def token_ids(self) -> Int64[Tensor, " tokens"]: ...

    @property
    def flow(self) -> SignedFlow: ...

    @property
    def provenance(self) -> Mapping[str, Any]: ...
