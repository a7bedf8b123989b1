"""Ask a credit service (``flowgraph-rl serve``) for token weights; needs the standard library only."""

from __future__ import annotations

import http.client
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from flowgraph import FlowgraphError
from rl.errors import ConfigError, ServiceError, named_error

_BUSY = (429, 503)
"""Statuses after which the same request may succeed."""
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0


class CreditClient:
    """A client of the credit service.

    A request that is lost on the way, or refused because the service is busy, is sent again under the same name, so
    that the service computes it once and answers it once.

    Args:
        url: of the service, such as ``"http://127.0.0.1:8000"``.
        token: bearer token; None: none is sent.
        timeout: seconds to wait for an answer.
        attempts: times that a request is sent before it is given up.

    Raises:
        ConfigError: an invalid URL, timeout or number of attempts.

    Example:
        client = CreditClient("http://127.0.0.1:8000", token)
        weights = client.weights([{"ids": ids, "prompt_length": 40}], rule="reach_sharp")
    """

    def __init__(self, url: str, token: str | None = None, *, timeout: float = 120.0, attempts: int = 8) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"url: must be http://HOST:PORT or https://HOST:PORT, got {url!r:.99}; see docs/service.md"
            )
        if not timeout > 0:
            raise ConfigError(f"timeout: must be positive, got {timeout!r}; 120 seconds are the default")
        if attempts < 1:
            raise ConfigError(f"attempts: must be at least 1, got {attempts!r}; 8 are the default")
        self._url = url
        self._is_secure = parts.scheme == "https"
        self._host = parts.hostname
        self._port = parts.port
        self._prefix = parts.path.rstrip("/")
        self._token = token
        self._timeout = timeout
        self._attempts = attempts

    def weights(self, sequences: Sequence[Mapping[str, Any]], **settings: Any) -> list[list[float]]:
        """Return the weights of the tokens of each response.

        Args:
            sequences: one group of responses, each as ``ids`` and ``prompt_length`` (lists or tensors), or as
                ``prompt`` and ``response``; with ``answer`` where it is known. See the page of the service.
            **settings: ``rule``, ``options``, ``adapter_version``, ``temperature``, ``seed`` and ``request_id``.

        Raises:
            ServiceError: the service refuses the request or cannot be reached.
            FlowgraphError: the error that the service answered, with its class and message.
        """
        answer = self.credit(sequences, **settings)
        return [sequence["weights"] for sequence in answer["sequences"]]

    def credit(self, sequences: Sequence[Mapping[str, Any]], **settings: Any) -> dict[str, Any]:
        """Return the complete answer: weights, rule, versions, and how each answer was found.

        Arguments and errors as :meth:`weights`.
        """
        body: dict[str, Any] = {"request_id": uuid.uuid4().hex, **settings}
        return self._send("POST", "/v1/credit", {**body, "sequences": list(sequences)})

    def load_adapter(self, path: str, version: str | int) -> dict[str, Any]:
        """Make an adapter the policy that scores requests.

        Args:
            path: PEFT folder, as the service reads it.
            version: names it; two adapters never share one.

        Raises:
            ServiceError, FlowgraphError: as :meth:`weights`.
        """
        return self._send("POST", "/v1/adapter", {"path": str(path), "version": version})

    def health(self) -> dict[str, Any]:
        """Describe the service: model, rules, versions and the length of its queue."""
        return self._send("GET", "/health", None)

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """Send a request until it is answered."""
        data = None if body is None else _written(body)
        # Every attempt sends the same bytes, and so the same name.
        pause = _FIRST_PAUSE
        for attempt in range(self._attempts):
            try:
                status, headers, text = self._once(method, path, data)
            except (OSError, http.client.HTTPException) as error:
                # The answer was lost; whether the service got the request does not matter, because it has a name.
                failure = ServiceError(
                    f"service: must answer at {self._url}, got {type(error).__name__} ({error}) in {attempt + 1} "
                    "attempts; check that it is running, and its address"
                )
                wait = pause
            else:
                if status == 200:
                    return self._read(text)
                failure = self._error_of(status, text)
                if status not in _BUSY:
                    raise failure
                wait = _seconds(headers.get("retry-after"), pause)
            if attempt + 1 == self._attempts:
                raise failure
            time.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _once(self, method: str, path: str, data: bytes | None) -> tuple[int, Mapping[str, str], bytes]:
        """Send a request once, over a connection of its own; return status, headers and body."""
        # http.client follows no redirect and asks no proxy, so that the token reaches this host alone.
        kind = http.client.HTTPSConnection if self._is_secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        headers = {"Content-Type": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            connection.request(method, self._prefix + path, body=data, headers=headers)
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, text

    def _read(self, text: bytes) -> dict[str, Any]:
        """Read an answer."""
        try:
            return json.loads(text)
        except ValueError as error:
            raise ServiceError(
                f"service: must answer JSON, got {text[:80]!r} from {self._url}; check that a credit service runs there"
            ) from error

    def _error_of(self, status: int, text: bytes) -> FlowgraphError:
        """Return the error that the service answered; one of its proxy has no class."""
        try:
            error = json.loads(text)["error"]
            name = error["type"]
            message = error["message"]
        except (ValueError, LookupError, TypeError):
            message = (
                f"service: must answer with its own errors, got status {status} and {text[:80]!r}; check the address, "
                "and the log of the service"
            )
            return ServiceError(message, status=status)
        # The class of the server is that of the client, which has the same package.
        found = named_error(str(name), str(message))
        if found is None or isinstance(found, ServiceError):
            return ServiceError(str(message), status=status)
        return found


def _written(body: Mapping[str, Any]) -> bytes:
    """Write a body as JSON; tensors and arrays become lists."""
    try:
        return json.dumps(body, allow_nan=False, default=_as_list).encode()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"sequences: must be finite numbers, text, lists and tensors, got {error}; see docs/service.md"
        ) from error


def _as_list(value: Any) -> Any:
    """Return a tensor or an array as numbers of JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"an object of {type(value).__name__}")


def _seconds(text: str | None, default: float) -> float:
    """Read the header Retry-After; a date or nothing gives the default."""
    if text is None or not text.isdecimal():
        return default
    return min(float(text), _LONGEST_PAUSE)
