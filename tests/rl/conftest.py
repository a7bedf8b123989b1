"""A saved model and a finished run, shared by the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.policies import alphabet, tiny_policy
from tests.fixtures.rl_commands import SHORT, SMALL, invoke


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_policy(context=512).save_pretrained(folder)
    alphabet().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trained_run(saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps; tests read it and leave it as it is."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = ["--credit", "flow", "--steps", 2, "--output", folder, "--device", "cpu", *SMALL]
    invoke("train", "--model", saved_model, *SHORT, *settings)
    return folder
