"""Stop a run between two steps when a signal asks for it, so that the running step ends with a checkpoint."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
"""Ctrl-C, the request of a scheduler to end, and a closed terminal."""
_SAME_REQUEST_SECONDS = 2.0
"""Launchers pass a signal on that the processes received too; within this time both are one request."""


class StopRequest:
    """A context that notes signals instead of ending the process.

    The first signal is noted, and :meth:`agreed` tells the loop. A second one of the same kind, more than 2 seconds
    later, has its usual effect at once. Signals that were ignored before stay ignored. Outside the main thread, where
    Python handles no signals, nothing changes.

    Args:
        enabled: whether signals are noted; False leaves them as they are.
        notify: called with the name of the first signal, inside the signal handler.

    Attributes:
        received: number of the noted signal; 0: none.
    """

    def __init__(self, *, enabled: bool, notify: Callable[[str], None]) -> None:
        self.received = 0
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._notify = notify
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if not self._enabled:
            return self
        for name in _SIGNALS:
            # Windows has no SIGHUP.
            number = getattr(signal, name, None)
            if number is None:
                continue
            # A handler that was not set by Python, None, could not be restored.
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def agreed(self, accelerator: Any) -> bool:
        """Tell whether any process received a signal; every process must ask at the same place.

        Args:
            accelerator: of the run.
        """
        if accelerator.num_processes > 1:
            own = torch.tensor([self.received], device=accelerator.device)
            self.received = int(accelerator.gather(own).max())
        return self.received != 0

    def deliver(self) -> None:
        """Send the noted signal again, with its usual effect: KeyboardInterrupt, or the end of the process."""
        self._restore()
        if self.received:
            signal.raise_signal(self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: note the first, and let a later one of the same kind have its usual effect."""
        now = time.monotonic()
        if self.received == 0:
            self.received = number
            self._received_at = now
            self._notify(signal.Signals(number).name)
            return
        is_new_request = now - self._received_at > _SAME_REQUEST_SECONDS
        if number == self.received and is_new_request:
            self.deliver()

    def _restore(self) -> None:
        """Give every signal its former handler."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
