"""The HTTP interface of the service, without a web server: a request in, a reply out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowgraph import FlowgraphError
from rl.errors import ConfigError, ServiceError
from rl.serving.access import Access
from rl.serving.credit_request import read_json
from rl.serving.credit_service import CreditService, RemoteError

_METHODS = {"/v1/credit": "POST", "/v1/adapter": "POST", "/health": "GET", "/metrics": "GET"}
_JSON = "application/json"
_METRICS = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Reply:
    """An answer of HTTP.

    Attributes:
        status: number of the status.
        body: bytes of the answer.
        headers: by name in small letters.
    """

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class Endpoints:
    """Answer HTTP requests.

    Args:
        service: computes credit.
        access: checks tokens.
        adapter_root: folder below which clients may name adapters; None: they may not load any.

    Attributes:
        service: computes credit.
    """

    def __init__(self, service: CreditService, access: Access, adapter_root: Path | None = None) -> None:
        self.service = service
        self._access = access
        self._adapter_root = adapter_root

    async def respond(self, method: str, path: str, headers: Mapping[str, str], chunks: AsyncIterator[bytes]) -> Reply:
        """Answer one request; every error becomes a JSON object with its class and its message.

        Args:
            method: such as ``"POST"``.
            path: without the query.
            headers: by name in small letters.
            chunks: the body in parts, of which no more are read than the limit allows.
        """
        begun = time.perf_counter()
        try:
            reply = await self._reply(method, path, headers, chunks)
        except ServiceError as error:
            reply = _error_reply("ServiceError", str(error), error.status, error.retry_after)
        except RemoteError as error:
            reply = _error_reply(error.kind, str(error), 400, None)
        except FlowgraphError as error:
            reply = _error_reply(type(error).__name__, str(error), 400, None)
        # A label for every path that somebody tries would fill the memory.
        known_path = path if path in _METHODS else "other"
        self.service.counters.add("requests_total", label=f'path="{known_path}",status="{reply.status}"')
        if path == "/v1/credit":
            self.service.counters.add("request_seconds_total", time.perf_counter() - begun)
        return reply

    async def _reply(self, method: str, path: str, headers: Mapping[str, str], chunks: AsyncIterator[bytes]) -> Reply:
        """Answer one request, or raise its error."""
        if path not in _METHODS:
            raise ServiceError(
                f"path: must be one of {', '.join(_METHODS)}, got {path!r:.80}; see docs/service.md", status=404
            )
        if method != _METHODS[path]:
            raise ServiceError(
                f"method: must be {_METHODS[path]} for {path}, got {method!r:.20}; see docs/service.md", status=405
            )
        if path == "/health" and not _has_credentials(headers):
            # A load balancer has no token, and learns nothing but whether requests are accepted.
            status = 503 if self.service.is_draining else 200
            return _json_reply({"status": self.service.health()["status"]}, status)

        self._access.check(headers)
        if path == "/health":
            return _json_reply(self.service.health(), 503 if self.service.is_draining else 200)
        if path == "/metrics":
            return Reply(200, self.service.counters.text().encode(), {"content-type": _METRICS})
        body = read_json(await self._read_body(headers, chunks))
        if path == "/v1/adapter":
            return _json_reply(await self._load_adapter(body))
        return _json_reply(await self.service.credit(body))

    async def _read_body(self, headers: Mapping[str, str], chunks: AsyncIterator[bytes]) -> bytes:
        """Read a body of JSON, as far as the limit allows."""
        # A page in a browser cannot send this type to another address without being asked first.
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != _JSON:
            raise ServiceError(f"Content-Type: must be {_JSON}, got {kind!r:.80}; set the header", status=415)
        # The declared size is refused before anything is read; the parts are counted, because it may be wrong.
        limit = self.service.limits.max_body_bytes
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and len(declared) < 20 and int(declared) > limit:
            raise _too_large(limit, declared)
        body = bytearray()
        async for chunk in chunks:
            body += chunk
            if len(body) > limit:
                raise _too_large(limit, f"more than {limit}")
        return bytes(body)

    async def _load_adapter(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Load the adapter that a client names."""
        for name in body:
            if name not in ("path", "version"):
                raise ConfigError(f"body: must hold known fields, got {name!r:.80}; there are path, version")
        path = body.get("path")
        if not isinstance(path, str) or not path:
            raise ConfigError(f"path: must be the folder of an adapter, got {path!r:.80}; send path and version")
        if "version" not in body:
            raise ConfigError("version: must be given, got none; send the number of the training step")
        return await self.service.load_adapter(body["version"], self._allowed(path))

    def _allowed(self, path: str) -> Path:
        """Return the folder of an adapter, if clients may name it."""
        if self._adapter_root is None:
            raise ServiceError(
                "path: must lie below the folder of --adapter-root, got a service without one; start it with "
                "--adapter-root",
                status=403,
            )
        try:
            # Links are followed first, so that none leads out of the folder.
            root = self._adapter_root.resolve()
            folder = (root / path).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"path: must be the folder of an adapter, got {path!r:.80} ({type(error).__name__}); send an existing "
                "folder"
            ) from error
        if not folder.is_relative_to(root):
            raise ServiceError(
                f"path: must lie below {root}, got {path!r:.200}; write adapters there, or start the service with "
                "another --adapter-root",
                status=403,
            )
        return folder


def _has_credentials(headers: Mapping[str, str]) -> bool:
    """Tell whether a request comes with a token."""
    return "authorization" in headers


def _too_large(limit: int, got: str) -> ServiceError:
    """Return the error of a body beyond the limit."""
    return ServiceError(
        f"body: must have at most {limit} bytes, got {got}; send fewer sequences, or start the service with "
        "--max-body-bytes",
        status=413,
    )


def _json_reply(value: Mapping[str, Any], status: int = 200) -> Reply:
    """Write a reply of JSON."""
    return Reply(status, json.dumps(value, allow_nan=False).encode(), {"content-type": _JSON})


def _error_reply(kind: str, message: str, status: int, retry_after: float | None) -> Reply:
    """Write the reply of an error."""
    reply = _json_reply({"error": {"type": kind, "message": message}}, status)
    headers = dict(reply.headers)
    if retry_after is not None:
        headers["retry-after"] = str(math.ceil(retry_after))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return Reply(status, reply.body, headers)
