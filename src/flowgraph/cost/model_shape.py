"""``ModelShape``: the sizes of a dense causal language model, from a name, a configuration file or numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from flowgraph.cost.json_records import positive_integer, read_object, shown
from flowgraph.errors import InvalidInputError

_GATED_FAMILIES = {"gemma", "granite", "llama", "mistral", "olmo", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
"""Model types whose MLP has three matrices: gate, up and down."""

_PLAIN_FAMILIES = {"gpt2", "gpt_neox", "opt", "phi", "starcoder2"}
"""Model types whose MLP has two matrices."""

_OTHER_NAMES = {
    "hidden_size": ("n_embd",),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "max_position_embeddings": ("n_positions",),
    "intermediate_size": ("n_inner", "ffn_dim"),
}
"""Names that some families use in place of the usual ones."""

_MIXTURE_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")
_LATENT_FIELDS = ("kv_lora_rank", "q_lora_rank")
_REMEDY = "pass a flowgraph.ModelShape with the sizes"


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide what a dense causal language model costs.

    Attributes:
        name: for tables.
        layers: L, layers with softmax attention over all earlier tokens.
        width: d, size of the residual stream.
        heads: H, query heads of a layer.
        key_heads: K, key and value heads of a layer; H is a multiple of K.
        head_width: e, entries of a query, key or value.
        mlp_width: I, entries between the matrices of an MLP.
        vocabulary: V, tokens.
        context: most tokens of a text.
        mlp_matrices: 3 with a gate, 2 without.

    Raises:
        InvalidInputError: a size is no positive integer, or the sizes do not fit each other.

    Example:
        >>> import flowgraph as fg
        >>> shape = fg.ModelShape("tiny", 4, 256, 4, 4, 64, 704, 4096, 8192)
        >>> shape.layer_weights
        802816
    """

    name: str
    layers: int
    width: int
    heads: int
    key_heads: int
    head_width: int
    mlp_width: int
    vocabulary: int
    context: int
    mlp_matrices: int = 3

    def __post_init__(self) -> None:
        """Refuse sizes that no model has."""
        for field in fields(self):
            if field.name != "name":
                positive_integer(field.name, getattr(self, field.name), "sizes of a model count something")
        if self.heads % self.key_heads:
            raise InvalidInputError(
                f"heads: must be a multiple of key_heads, got {self.heads} and {self.key_heads}; each key head serves "
                "the same number of query heads"
            )
        if self.mlp_matrices not in (2, 3):
            raise InvalidInputError(f"mlp_matrices: must be 2 or 3, got {self.mlp_matrices}; 3 with a gate, 2 without")

    @property
    def query_weights(self) -> int:
        """Return the weights of the query and key projections of a layer, (H + K) d e."""
        return (self.heads + self.key_heads) * self.width * self.head_width

    @property
    def layer_weights(self) -> int:
        """Return the weights of the matrices of a layer, 2 (H + K) d e + m d I."""
        attention = 2 * (self.heads + self.key_heads) * self.width * self.head_width
        return attention + self.mlp_matrices * self.width * self.mlp_width

    @property
    def adapter_rows(self) -> int:
        """Return the sum of inputs and outputs of the matrices of a layer: weights of a LoRA adapter of rank 1."""
        query_and_output = 2 * (self.width + self.heads * self.head_width)
        key_and_value = 2 * (self.width + self.key_heads * self.head_width)
        mlp = self.mlp_matrices * (self.width + self.mlp_width)
        return query_and_output + key_and_value + mlp

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


MODEL_SHAPES = {
    "4b": ModelShape("Qwen3-4B", 36, 2560, 32, 8, 128, 9728, 151936, 40960),
    "8b": ModelShape("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 128256, 131072),
    "70b": ModelShape("Llama-3.1-70B", 80, 8192, 64, 8, 128, 28672, 128256, 131072),
}
"""Sizes by name, from the models' own configuration files; the papers that describe them are in :data:`SOURCES`."""

SOURCES = {
    "4b": "Qwen3 Technical Report, arXiv 2505.09388, Table 1, and config.json of Qwen/Qwen3-4B",
    "8b": "The Llama 3 Herd of Models, arXiv 2407.21783, Table 3, and config.json of meta-llama/Llama-3.1-8B",
    "70b": "The Llama 3 Herd of Models, arXiv 2407.21783, Table 3, and config.json of meta-llama/Llama-3.1-70B",
}
"""Where the sizes come from."""


def find_shape(model: str | Path | ModelShape) -> ModelShape:
    """Return the sizes of a model.

    Args:
        model: ``"4b"``, ``"8b"`` or ``"70b"``, a folder with a ``config.json`` of transformers, such a file, or a
            :class:`ModelShape`.

    Raises:
        InvalidInputError: an unknown name, a file without the fields, or an architecture that the counts do not
            describe (a mixture of experts, sliding windows, latent or linear attention).
    """
    if isinstance(model, ModelShape):
        return model
    if not isinstance(model, (str, Path)):
        raise InvalidInputError(
            f"config: must be a name, a path or a ModelShape, got {type(model).__name__}; names are "
            f"{', '.join(MODEL_SHAPES)}"
        )
    # Names come first: a folder of such a name can be given as ./8b.
    if str(model).lower() in MODEL_SHAPES:
        return MODEL_SHAPES[str(model).lower()]

    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise InvalidInputError(
            f"config: must be {', '.join(MODEL_SHAPES)}, a folder with a config.json or such a file, got "
            f"{str(model)!r}, which is none; check the name or the path"
        )
    entries = read_object("config", path, "pass the config.json of a transformers model")
    # A folder is named for its model; a file of another name names itself.
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return shape_of_config(entries, name)


def shape_of_config(entries: dict[str, Any], name: str) -> ModelShape:
    """Read the sizes from the entries of a transformers ``config.json``.

    Raises:
        InvalidInputError: fields are missing or no positive integers, or the counts do not describe the architecture.
    """
    # The decoder of a model of text and images has a configuration of its own.
    nested = entries.get("text_config")
    if isinstance(nested, dict):
        entries = nested
    _refuse_other_architectures(entries)
    # Sizes that stand for others where a field is missing.
    width = _required(entries, "hidden_size")
    heads = _required(entries, "num_attention_heads")
    return ModelShape(
        name=name,
        layers=_required(entries, "num_hidden_layers"),
        width=width,
        heads=heads,
        key_heads=_optional(entries, "num_key_value_heads", heads),
        head_width=_head_width(entries, width, heads),
        mlp_width=_mlp_width(entries, width),
        vocabulary=_required(entries, "vocab_size"),
        context=_required(entries, "max_position_embeddings"),
        mlp_matrices=_mlp_matrices(entries),
    )


def _refuse_other_architectures(entries: dict[str, Any]) -> None:
    """Refuse what would be counted wrongly: part of the weights, of the tokens, or no softmax rows."""
    for field in _MIXTURE_FIELDS:
        if isinstance(entries.get(field), int) and entries[field] > 1:
            raise InvalidInputError(
                f"config: must describe a dense model, got {field}={entries[field]}, a mixture of experts whose "
                f"weights do not all run; {_REMEDY} that run for one token"
            )
    for field in _LATENT_FIELDS:
        if entries.get(field) is not None:
            raise InvalidInputError(
                f"config: must have full keys and values, got {field}={shown(entries[field])}, latent attention; "
                f"{_REMEDY} of an equal dense layer"
            )
    kinds = entries.get("layer_types")
    if isinstance(kinds, list):
        others = sorted({str(kind) for kind in kinds} - {"full_attention"})
        if others:
            raise InvalidInputError(
                f"config: every layer must attend to all earlier tokens, got layer_types with {', '.join(others)}; "
                f"{_REMEDY}, which counts full attention"
            )
        return
    # Without layer_types, a window counts unless it is switched off (Qwen2).
    window = entries.get("sliding_window")
    if window is not None and entries.get("use_sliding_window", True):
        raise InvalidInputError(
            f"config: every layer must attend to all earlier tokens, got sliding_window={shown(window)}; "
            f"{_REMEDY}, which counts full attention"
        )


def _find(entries: dict[str, Any], field: str) -> Any:
    """Return a field under its usual or another name, or None."""
    for known in (field, *_OTHER_NAMES.get(field, ())):
        if entries.get(known) is not None:
            return entries[known]
    return None


def _required(entries: dict[str, Any], field: str) -> int:
    """Return a field that a configuration must have."""
    value = _find(entries, field)
    if value is None:
        raise InvalidInputError(
            f"config: must have the field {field}, got none among {len(entries)} fields; pass the config.json of a "
            "causal language model of transformers, or a flowgraph.ModelShape"
        )
    return positive_integer(f"config: {field}", value, "correct the file")


def _optional(entries: dict[str, Any], field: str, default: int) -> int:
    """Return a field, or its default where it is missing or null."""
    value = _find(entries, field)
    if value is None:
        return default
    return positive_integer(f"config: {field}", value, "correct the file")


def _head_width(entries: dict[str, Any], width: int, heads: int) -> int:
    """Return the width of a head; without the field, the heads share the model's width."""
    if _find(entries, "head_dim") is None and width % heads:
        raise InvalidInputError(
            f"config: hidden_size must be a multiple of num_attention_heads without head_dim, got {width} and {heads}; "
            "correct the file"
        )
    return _optional(entries, "head_dim", max(1, width // heads))


def _mlp_width(entries: dict[str, Any], width: int) -> int:
    """Return the width of an MLP; GPT-2 leaves it out, or sets it to null, for four times the model's width."""
    if entries.get("model_type") == "gpt2":
        return _optional(entries, "intermediate_size", 4 * width)
    return _required(entries, "intermediate_size")


def _mlp_matrices(entries: dict[str, Any]) -> int:
    """Return how many matrices an MLP has, which no field of a configuration says."""
    family = entries.get("model_type")
    if family in _GATED_FAMILIES:
        return 3
    if family in _PLAIN_FAMILIES:
        return 2
    known = ", ".join(sorted(_GATED_FAMILIES | _PLAIN_FAMILIES))
    raise InvalidInputError(f"config: model_type must be one of {known}, got {shown(family)}; {_REMEDY}")
