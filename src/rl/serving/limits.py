"""The limits of the credit service, checked at construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from rl.config import at_least, check_fields

_SEE_PAGE = "see docs/service.md for the default"


@dataclass(frozen=True, kw_only=True)
class ServiceLimits:
    """What the service accepts, and how it forms batches."""

    max_batch_tokens: Annotated[int, at_least(1, _SEE_PAGE)] = 16_384
    """Most tokens of a forward pass, padding included; a longer sequence is a pass of its own."""

    max_wait_ms: Annotated[float, at_least(0, "0 sends every request at once")] = 5.0
    """Longest time that a request waits for others of similar length, in milliseconds."""

    max_queue: Annotated[int, at_least(1, _SEE_PAGE)] = 1_024
    """Most requests that wait for a batch; another one is refused with status 429."""

    max_tokens: Annotated[int, at_least(2, _SEE_PAGE)] = 4_096
    """Most tokens of a sequence, prompt and response together."""

    max_sequences: Annotated[int, at_least(1, _SEE_PAGE)] = 64
    """Most sequences of a request."""

    max_body_bytes: Annotated[int, at_least(1, _SEE_PAGE)] = 8 * 2**20
    """Longest body of a request, in bytes."""

    kept_adapters: Annotated[int, at_least(1, "2 serve requests while the next version is loaded")] = 2
    """Adapters that stay loaded, the newest ones."""

    def __post_init__(self) -> None:
        check_fields(self)
