"""Versions of the policy: which adapter a version names, and the model with the adapter of a version active."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.errors import CheckpointError, ConfigError, ServiceError
from rl.policy.loading import ADAPTER_FAILURES, first_line

BASE = "base"
"""Version of the model without an adapter."""

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_LONGEST_VERSION = 128
_READ_BYTES = 2**20


@dataclass(frozen=True)
class AdapterVersion:
    """An adapter under the version that clients name.

    Attributes:
        version: text that names it.
        folder: PEFT folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        digest: SHA-256 of both files, in hexadecimal digits.
    """

    version: str
    folder: str
    digest: str


def read_adapter(version: Any, folder: Path) -> AdapterVersion:
    """Identify the adapter in a folder by the digest of its files.

    Args:
        version: text or integer that names it.
        folder: PEFT folder.

    Returns:
        The adapter; nothing is loaded.

    Raises:
        ConfigError: an invalid version.
        CheckpointError: the folder is no PEFT folder, or its adapter is none that changes weights, such as LoRA.

    Cost: both files are read once.
    """
    name = check_version(version)
    if name == BASE:
        raise ConfigError(
            f"version: must differ from {BASE!r}, which names the model without an adapter, got {name!r}; use the "
            "number of the training step"
        )
    digest = hashlib.sha256()
    for file in (_CONFIG, _WEIGHTS):
        _add_file(digest, folder, file)
    _check_kind(folder)
    return AdapterVersion(version=name, folder=str(folder), digest=digest.hexdigest())


def check_version(version: Any) -> str:
    """Return a version as text.

    Raises:
        ConfigError: it is neither text of 1 to 128 printable characters nor an integer.
    """
    if type(version) is int:
        return str(version)
    if not isinstance(version, str) or not 0 < len(version) <= _LONGEST_VERSION or not version.isprintable():
        raise ConfigError(
            f"adapter_version: must be an integer or 1 to {_LONGEST_VERSION} printable characters, got "
            f"{version!r:.80}; use the number of the training step"
        )
    return version


def _add_file(digest: Any, folder: Path, name: str) -> None:
    """Add the name, the size and the bytes of a file to a digest."""
    path = folder / name
    try:
        digest.update(f"{name} {path.stat().st_size} ".encode())
        with path.open("rb") as stream:
            while block := stream.read(_READ_BYTES):
                digest.update(block)
    except (OSError, ValueError) as error:
        # A NUL character in a path is a ValueError.
        raise CheckpointError(
            f"adapter: must be a PEFT folder with {_CONFIG} and {_WEIGHTS}, got {str(folder)!r:.200} "
            f"({first_line(error)}); save the policy with save_pretrained, or give the folder 'policy' of a checkpoint"
        ) from error


def _check_kind(folder: Path) -> None:
    """Check that an adapter changes weights: tokens that are put before a prompt would shift all positions."""
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"adapter: {_CONFIG} must be JSON with a peft_type, got {first_line(error)!r} in {folder}; save the policy "
            "with save_pretrained"
        ) from error
    if kind != "LORA":
        raise CheckpointError(
            f"adapter: must be a LoRA adapter, got peft_type {kind!r:.40} in {folder}; merge the adapter into the model"
        )


class AdapterRegistry:
    """The versions that requests may name.

    Args:
        kept: adapters that stay loaded; loading another one drops the oldest.

    Attributes:
        current: the adapter of requests that name no version; None: the model without an adapter.
    """

    def __init__(self, kept: int) -> None:
        self.current: AdapterVersion | None = None
        self._kept = kept
        self._loaded: OrderedDict[str, AdapterVersion] = OrderedDict()
        # A version names one adapter for the life of the service, also after it was dropped.
        self._digests: dict[str, str] = {}

    def versions(self) -> list[str]:
        """List the versions that are loaded, the oldest first."""
        return [BASE, *self._loaded]

    def resolve(self, version: str | None) -> AdapterVersion | None:
        """Return the adapter of a version; None for the model without one.

        Args:
            version: as the request names it; None: the current one.

        Raises:
            ServiceError: this version is not loaded.
        """
        if version is None:
            return self.current
        if version == BASE:
            return None
        if version not in self._loaded:
            raise ServiceError(
                f"adapter_version: must be a version that is loaded, got {version!r}; loaded are "
                f"{', '.join(map(repr, self.versions()))}, and POST /v1/adapter loads another one",
                status=409,
            )
        return self._loaded[version]

    def check(self, adapter: AdapterVersion) -> None:
        """Check that no other adapter has this version.

        Raises:
            ServiceError: another one has it.
        """
        known = self._digests.get(adapter.version, adapter.digest)
        if known != adapter.digest:
            raise ServiceError(
                f"version: must name one adapter, got {adapter.version!r} for {adapter.folder!r}, whose files differ "
                "from those loaded under it; give every adapter its own version",
                status=409,
            )

    def add(self, adapter: AdapterVersion) -> None:
        """Make an adapter the current one; the oldest beyond the number kept is dropped."""
        self.check(adapter)
        self._digests[adapter.version] = adapter.digest
        self._loaded[adapter.version] = adapter
        self._loaded.move_to_end(adapter.version)
        while len(self._loaded) > self._kept:
            self._loaded.popitem(last=False)
        self.current = adapter


class PolicyVersions:
    """One model with the adapters of several versions, of which one or none is active.

    Args:
        model: the base.
        kept: adapters that stay in memory.
    """

    def __init__(self, model: Any, kept: int) -> None:
        self.base = model
        self._kept = kept
        self._peft: Any = None
        # Names inside PEFT by digest, the most recently used last; versions may hold characters that PEFT refuses.
        self._names: OrderedDict[str, str] = OrderedDict()
        self._num_loaded = 0

    @contextmanager
    def active(self, adapter: AdapterVersion | None) -> Iterator[Any]:
        """Yield the model with an adapter active, loaded where it is not yet; None: without any.

        Raises:
            CheckpointError: the adapter cannot be loaded, does not fit, or its files have changed.
        """
        if adapter is not None:
            name = self._load(adapter)
            self._peft.set_adapter(name)
            yield self.base
        elif self._peft is None:
            yield self.base
        else:
            with self._peft.disable_adapter():
                yield self.base

    def _load(self, adapter: AdapterVersion) -> str:
        """Load an adapter unless it is loaded, drop the one that was not used for longest, and return its name."""
        # Equal files are one adapter, also under two versions.
        if adapter.digest in self._names:
            self._names.move_to_end(adapter.digest)
            return self._names[adapter.digest]
        # Another replica or a retry may read the folder later than the request that named it.
        found = read_adapter(adapter.version, Path(adapter.folder))
        if found.digest != adapter.digest:
            raise CheckpointError(
                f"adapter: files of a version must not change, got others in {adapter.folder} than were loaded as "
                f"{adapter.version!r}; write every version to a folder of its own"
            )
        name = f"version{self._num_loaded}"
        self._attach(adapter, name)
        self._num_loaded += 1
        self._names[adapter.digest] = name
        while len(self._names) > self._kept:
            _, oldest = self._names.popitem(last=False)
            self._peft.delete_adapter(oldest)
        return name

    def _attach(self, adapter: AdapterVersion, name: str) -> None:
        """Load an adapter under a name and make it active; a failure leaves the model as it was."""
        try:
            with warnings.catch_warnings():
                # Weights that an adapter lacks, or has too many, are only warned of: they are checked below.
                warnings.simplefilter("ignore")
                problem = self._attach_weights(adapter, name)
        except ADAPTER_FAILURES as error:
            problem = first_line(error)
        if problem:
            self._detach(name)
            raise CheckpointError(
                f"adapter: must be a PEFT folder that fits the model, got {adapter.folder} ({problem}); start the "
                "service with the base that it was trained on"
            )
        self._peft.eval().requires_grad_(False)

    def _attach_weights(self, adapter: AdapterVersion, name: str) -> str:
        """Add the layers of an adapter, load its weights, and describe weights that do not fit; "" where all fit."""
        from peft import PeftConfig, get_peft_model

        config = PeftConfig.from_pretrained(adapter.folder)
        config.inference_mode = True
        # PEFT is known before the weights are read, so that a failure there can be undone.
        if self._peft is None:
            self._peft = get_peft_model(self.base, config, adapter_name=name)
        else:
            self._peft.add_adapter(name, config)
        loaded = self._peft.load_adapter(adapter.folder, adapter_name=name)
        self._peft.set_adapter(name)
        lacking = [key for key in loaded.missing_keys if f".{name}" in key]
        if lacking:
            return f"{len(lacking)} weights of the adapter are missing, such as {lacking[0]}"
        if loaded.unexpected_keys:
            return f"{len(loaded.unexpected_keys)} weights belong to no layer, such as {loaded.unexpected_keys[0]}"
        return ""

    def _detach(self, name: str) -> None:
        """Remove what a failed load left in the model."""
        if self._peft is None:
            return
        if not self._names:
            # The first adapter failed: the layers around those of the base are removed too.
            self._peft.unload()
            self._peft = None
        elif name in self._peft.peft_config:
            # The active adapter cannot be removed without a warning.
            self._peft.set_adapter(next(reversed(self._names.values())))
            self._peft.delete_adapter(name)
