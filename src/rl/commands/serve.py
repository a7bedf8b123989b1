"""``flowgraph-rl serve``: token credit as a service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rl.commands.options import Adapter, Device

if TYPE_CHECKING:
    from rl.config import CreditConfig

_RECOMMENDED = "reach_sharp:soft:floor=0.5,ceiling=2,fallback=0.5"


def serve(
    model: Annotated[str, typer.Option("--model", "-m", help="A model name, a folder, or a shipped model.")],
    adapter: Adapter = None,
    adapter_version: Annotated[
        str | None, typer.Option("--adapter-version", help="Version of --adapter, such as the training step.")
    ] = None,
    adapter_root: Annotated[
        Path | None, typer.Option("--adapter-root", help="Folder below which clients may name adapters. Default: none.")
    ] = None,
    rules: Annotated[
        str,
        typer.Option(
            "--rules",
            help="Rules that requests may name, RULE[:SHAPE][:NAME=VALUE,...],...; the first is the default.",
        ),
    ] = _RECOMMENDED,
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="Find answers as this task does. Default: stated answers.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; another than loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    replicas: Annotated[int, typer.Option(help="Processes that score, each with a copy of the model.")] = 1,
    max_batch_tokens: Annotated[int, typer.Option(help="Most tokens of a forward pass, padding included.")] = 16_384,
    max_wait_ms: Annotated[float, typer.Option(help="Longest wait for requests of similar length, in ms.")] = 5.0,
    max_queue: Annotated[int, typer.Option(help="Most waiting requests; others are refused with 429.")] = 1_024,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a sequence.")] = 4_096,
    max_sequences: Annotated[int, typer.Option(help="Most sequences of a request.")] = 64,
    max_body_bytes: Annotated[int, typer.Option(help="Longest body of a request.")] = 8 * 2**20,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="File with the bearer token. Default: FLOWGRAPH_RL_TOKEN.")
    ] = None,
    device: Device = None,
    dtype: Annotated[
        str, typer.Option(help="'float32', 'bfloat16', 'float16' or 'auto'; weights are stable in float32.")
    ] = "float32",
) -> None:
    """Serve token credit over HTTP, for engines whose workers cannot be changed."""
    from rl.config import broken_rule
    from rl.serving.access import Access, check_address, read_token
    from rl.serving.limits import ServiceLimits
    from rl.serving.ray_deployment import ServiceSettings, require_ray, run_service

    # Everything that can be checked is checked before Ray is started, which takes seconds.
    require_ray()
    limits = ServiceLimits(
        max_batch_tokens=max_batch_tokens,
        max_wait_ms=max_wait_ms,
        max_queue=max_queue,
        max_tokens=max_tokens,
        max_sequences=max_sequences,
        max_body_bytes=max_body_bytes,
    )
    if replicas < 1:
        raise broken_rule("replicas", "be at least 1", replicas, "1 is the default")
    settings_of_rules = _named_rules(rules)
    folder = _adapter_folder(adapter, adapter_version)
    if adapter_root is not None and not adapter_root.is_dir():
        raise broken_rule("adapter-root", "be a folder", str(adapter_root), "create it, or leave it out")
    token = read_token(token_file)
    check_address(host, port, token)

    typer.echo(f"serving {model}: {', '.join(settings_of_rules)}", err=True)
    run_service(
        ServiceSettings(
            model=_absolute(model),
            dtype=dtype,
            device=device,
            task=task,
            rules=settings_of_rules,
            adapter=folder,
            adapter_version=adapter_version,
            adapter_root=None if adapter_root is None else adapter_root.resolve(),
            limits=limits,
            token_digest=Access.digest_of(token),
            replicas=replicas,
            host=host,
            port=port,
        ),
        lambda line: typer.echo(line, err=True),
    )


def _named_rules(text: str) -> dict[str, CreditConfig]:
    """Read the offered rules by name.

    Raises:
        ConfigError, CreditError: an unknown or unsuitable rule, none, or one twice.
    """
    from rl.alignment.arms import named_arms, split_arms
    from rl.config import broken_rule
    from rl.integrations.tensors import usable_rule

    found: dict[str, CreditConfig] = {}
    for credit in named_arms(split_arms(text)).values():
        usable_rule(credit)
        if credit.rule in found:
            raise broken_rule("rules", "name every rule once", credit.rule, "send the settings with the requests")
        found[credit.rule] = credit
    if not found:
        raise broken_rule("rules", "name at least one rule", text, f"{_RECOMMENDED} is the default")
    return found


def _adapter_folder(adapter: Path | None, version: str | None) -> Path | None:
    """Return the PEFT folder of the first policy.

    Raises:
        ConfigError: an adapter without a version, or a version without an adapter.
        CheckpointError: the path holds no policy.
    """
    from rl.commands.run_file import optional_policy_folder
    from rl.errors import ConfigError
    from rl.serving.adapters import read_adapter

    if (adapter is None) != (version is None):
        got = "a version alone" if adapter is None else "an adapter alone"
        raise ConfigError(f"adapter-version: must come with --adapter, got {got}; give both, or neither")
    folder = optional_policy_folder(adapter)
    if folder is None:
        return None
    folder = folder.resolve()
    read_adapter(version, folder)
    return folder


def _absolute(model: str) -> str:
    """Return a folder as an absolute path, because replicas run in another folder; a name stays."""
    from rl.policy.shipped_models import SHIPPED_MODELS

    path = Path(model)
    if model in SHIPPED_MODELS or not path.is_dir():
        return model
    return str(path.resolve())
