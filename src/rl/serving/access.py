"""Who may use the service: the bearer token, and the addresses that it may listen on without one."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from rl.errors import ConfigError, ServiceError

TOKEN_VARIABLE = "FLOWGRAPH_RL_TOKEN"
"""Environment variable with the token, where no file is given."""

_SHORTEST_TOKEN = 16
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def read_token(path: Path | None) -> str | None:
    """Read the bearer token from a file or from the environment.

    Args:
        path: the file; None: the variable ``FLOWGRAPH_RL_TOKEN``.

    Returns:
        The token without surrounding white space; None where neither is given.

    Raises:
        ConfigError: the file cannot be read, or the token is short or holds white space.
    """
    if path is None:
        text = os.environ.get(TOKEN_VARIABLE)
        origin = TOKEN_VARIABLE
    else:
        origin = f"--token-file {path}"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"token-file: must be a text file that can be read, got {path} ({type(error).__name__}); write the "
                "token into it"
            ) from error
    if text is None:
        return None
    token = text.strip()
    # The message must not hold the token.
    if len(token) < _SHORTEST_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(
            f"token: must be at least {_SHORTEST_TOKEN} printable ASCII characters without spaces, got "
            f"{len(token)} in {origin}; python -c 'import secrets; print(secrets.token_urlsafe())' makes one"
        )
    return token


def check_address(host: str, port: int, token: str | None) -> None:
    """Check that the service may and can listen on an address.

    Args:
        host: name or address; without a token only a loopback one.
        port: 1 to 65535.
        token: as :func:`read_token` returned it.

    Raises:
        ConfigError: another host without a token, or an address that is in use or unknown here.
    """
    if not 0 < port < 2**16:
        raise ConfigError(f"port: must be from 1 to 65535, got {port}; 8000 is the default")
    if token is None and not is_loopback(host):
        raise ConfigError(
            f"host: must be a loopback address without a token, got {host!r}; give --token-file or {TOKEN_VARIABLE}, "
            "or use 127.0.0.1"
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # A connection of an earlier service that is being closed does not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"port: must be free on the host, got {host}:{port} ({error.strerror or error}); choose another --port or "
            "--host, or stop the other service"
        ) from error


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach a host.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Access:
    """Check the token of requests; the token itself is not kept.

    Args:
        digest: SHA-256 of the token; None: every request from this machine may pass.
    """

    def __init__(self, digest: bytes | None) -> None:
        self._digest = digest

    @staticmethod
    def digest_of(token: str | None) -> bytes | None:
        """Return the digest of a token; None without one."""
        return None if token is None else hashlib.sha256(token.encode()).digest()

    def check(self, headers: Mapping[str, str]) -> None:
        """Check the headers of a request, by names in small letters.

        Raises:
            ServiceError: a missing or wrong token, or without a token a name that is not this machine's.
        """
        if self._digest is None:
            self._check_host(headers.get("host", ""))
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        found = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        # Both are digests of equal length; the comparison takes the same time wherever they differ.
        if not hmac.compare_digest(found, self._digest) or scheme.lower() != "bearer":
            got = "another one" if given else "none"
            raise ServiceError(
                f"token: must be that of the service, got {got}; send the header Authorization: Bearer TOKEN",
                status=401,
            )

    def _check_host(self, host: str) -> None:
        """Refuse names of other machines: a page in a browser may have resolved its own name to this one."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if host and name.strip("[]").lower() not in _LOOPBACK_NAMES:
            raise ServiceError(
                f"Host: must be {' or '.join(_LOOPBACK_NAMES)} without a token, got {host!r:.80}; start the service "
                "with --token-file",
                status=403,
            )
