"""One frozen base model that plays three parts: policy, critic and reference, told apart by LoRA adapters."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from rl.config import LoraConfig
from rl.errors import PolicyError
from rl.losses import token_logprobs
from rl.records import Responses

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

POLICY, VALUE, REFERENCE = "policy", "value", "reference"


class ModelInput(NamedTuple):
    """The tensors of a forward pass over whole sequences; plain tensors, so that wrappers can move them."""

    input_ids: Int64[Tensor, "batch tokens"]
    attention_mask: Int64[Tensor, "batch tokens"]
    position_ids: Int64[Tensor, "batch tokens"]

    @classmethod
    def of(cls, responses: Responses, device: torch.device) -> ModelInput:
        mask = responses.attention_mask.to(device).long()
        # Without explicit positions a left-padded GPT-2 counts its padding and is wrong by half a logit.
        return cls(responses.input_ids.to(device), mask, (mask.cumsum(1) - 1).clamp(min=0))


class TokenOutput(NamedTuple):
    """What a pass says about each response token, ``[B, R]`` each; values only with a critic."""

    logprobs: Float[Tensor, "batch response"]
    entropy: Float[Tensor, "batch response"]
    values: Float[Tensor, "batch response"] | None


class ActorCritic(nn.Module):
    """A frozen causal LM with a LoRA adapter for the policy and, with a critic, another for the value function.

    The reference is the base with its adapters off, or, where the given model brought a trained adapter of its own, a
    frozen copy of that adapter. Dropout is off always: the probabilities of a rollout and of its update must be
    those of one function. For the same reason every pass computes in the precision that ``autocast`` says, not only
    those that a distributed wrapper sees.

    Args:
        model: a Hugging Face causal LM, or a PEFT model whose active LoRA adapter is trained on.
        lora: shape of the new adapters.
        critic: whether there is a value function.
        seed: of the adapters' first weights.

    Raises:
        PolicyError: LoRA targets that do not exist, or a PEFT model of another kind.
    """

    def __init__(self, model: nn.Module, lora: LoraConfig, *, critic: bool, seed: int = 0) -> None:
        super().__init__()
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        # PEFT draws the first weights on the CPU. torch.manual_seed would also reseed the caller's CUDA generators.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.peft, self.policy_name, self.reference_name = _adapted(model, lora)
            if critic:
                self.peft.add_adapter(VALUE, _peft_config(lora, self.causal_lm))
            self.value_head = _value_head(self.causal_lm) if critic else None
        self._position_ids = "position_ids" in inspect.signature(self.causal_lm.forward).parameters
        self._logits_to_keep = "logits_to_keep" in inspect.signature(self.causal_lm.forward).parameters
        self._trained = [parameter for name, parameter in self.named_parameters() if self._is_trained(name)]
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self._activate(self.policy_name)
        self.eval()

    def train(self, mode: bool = True) -> ActorCritic:
        """Stay in evaluation mode: dropout would make the old and the new probabilities differ by chance."""
        return super().train(False)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Hugging Face model inside, its linear layers wrapped by the adapters."""
        return self.peft.get_base_model()  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def policy_parameters(self) -> dict[str, nn.Parameter]:
        """Trained weights of the policy, by name."""
        return {name: p for name, p in self.named_parameters() if self._is_trained(name) and not _is_value(name)}

    def value_parameters(self) -> dict[str, nn.Parameter]:
        """Trained weights of the critic, by name; empty without one."""
        return {name: p for name, p in self.named_parameters() if self._is_trained(name) and _is_value(name)}

    def forward(self, inputs: ModelInput, tokens: Int64[Tensor, "batch response"], temperature: float) -> TokenOutput:
        """Log-probabilities and entropies under the policy, and values under the critic, of all response tokens.

        One call serves both, so that a distributed wrapper sees every trained weight in every pass.
        """
        logprobs, entropy = self.policy_pass(inputs, tokens, temperature)
        values = self.value_pass(inputs, tokens.shape[1])
        return TokenOutput(logprobs, entropy, None if values is None else values[:, :-1])

    def policy_pass(
        self, inputs: ModelInput, tokens: Int64[Tensor, "batch response"], temperature: float
    ) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
        """Log-probability and entropy of each response token under the active adapter (the policy's by default)."""
        return token_logprobs(self._response_logits(inputs, tokens.shape[1]), tokens, temperature)

    def value_pass(self, inputs: ModelInput, response_length: int) -> Float[Tensor, "batch response+1"] | None:
        """The critic's value before each response token, from the state one column earlier, and after the last."""
        if self.value_head is None:
            return None
        with self.adapter(VALUE), self.autocast():
            hidden = self.causal_lm.get_decoder()(**self._arguments(inputs), use_cache=False).last_hidden_state
        states = hidden[:, -response_length - 1 :]
        with torch.autocast(states.device.type, enabled=False):  # values are regressed on, in float32 whatever the base
            return self.value_head(states.to(self.value_head.weight.dtype)).squeeze(-1)

    def reference_pass(
        self, inputs: ModelInput, tokens: Int64[Tensor, "batch response"], temperature: float
    ) -> Float[Tensor, "batch response"]:
        """Log-probability of each response token under the reference."""
        with torch.no_grad(), self.adapter(self.reference_name):
            return self.policy_pass(inputs, tokens, temperature)[0]

    @contextmanager
    def adapter(self, name: str | None) -> Iterator[None]:
        """Switch to another adapter, or to none, and back; what is trained stays trained."""
        try:
            if name is None:
                with self.peft.disable_adapter():
                    yield
            else:
                self._activate(name)
                yield
        finally:
            self._activate(self.policy_name)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """The policy's adapter added into the base's weights, for generation: no extra matrices at each token.

        The original tensors are put back, not subtracted back, so the base stays what it was to the bit. A copy of all
        adapted weights lives meanwhile. What cannot be added generates as it is: DoRA, modules trained whole, bases of
        less than 32 bits (whose rounding would swallow the update), and weights that two layers share.

        Raises:
            PolicyError: that copy does not fit into the GPU's memory.
        """
        layers = _mergeable(self.peft, self.policy_name)
        if not layers:
            yield
            return
        originals: list[tuple[nn.Parameter, Tensor]] = []
        try:
            with torch.no_grad():
                for layer in layers:
                    weight = layer.get_base_layer().weight
                    originals.append((weight, weight.data))
                    weight.data = weight.data + layer.get_delta_weight(self.policy_name).to(weight.dtype)
            with self.adapter(None):
                yield
        except torch.OutOfMemoryError as error:
            raise PolicyError(
                f"merge_for_generation: must fit a copy of the adapted weights and the cache, got {error}; turn it "
                "off, or lower num_prompts x group_size"
            ) from error
        finally:
            for weight, data in originals:
                weight.data = data

    def embeddings(self, inputs: ModelInput) -> Float[Tensor, "batch tokens hidden"]:
        """Input embeddings, detached."""
        return self.causal_lm.get_input_embeddings()(inputs.input_ids).detach()

    def logprobs_of_embeddings(
        self,
        embeddings: Float[Tensor, "batch tokens hidden"],
        inputs: ModelInput,
        tokens: Int64[Tensor, "batch response"],
        temperature: float,
    ) -> Float[Tensor, "batch response"]:
        """Log-probabilities as a function of the input embeddings, for rules that look at gradients."""
        logits = self._response_logits(inputs, tokens.shape[1], inputs_embeds=embeddings)
        return token_logprobs(logits, tokens, temperature)[0]

    def _activate(self, name: str) -> None:
        self.peft.set_adapter(name)
        # PEFT takes the gradient from every adapter but the active one; a backward pass needs both.
        for parameter in self._trained:
            parameter.requires_grad_(True)

    def _is_trained(self, name: str) -> bool:
        return name.startswith("value_head.") or _adapter_of(name) in (self.policy_name, VALUE)

    def _arguments(self, inputs: ModelInput, **replaced: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = {"attention_mask": inputs.attention_mask, **replaced}
        if not replaced:
            arguments["input_ids"] = inputs.input_ids
        if self._position_ids:
            arguments["position_ids"] = inputs.position_ids
        return arguments

    def _response_logits(
        self, inputs: ModelInput, response_length: int, **replaced: Any
    ) -> Float[Tensor, "batch response vocabulary"]:
        arguments = self._arguments(inputs, **replaced)
        if self._logits_to_keep:  # the prompt's are never read, and with a large vocabulary take most of the memory
            arguments["logits_to_keep"] = response_length + 1
        with self.autocast():
            logits = self.causal_lm(**arguments, use_cache=False).logits
        return logits[:, -response_length - 1 : -1]


@contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT asks transformers by an old name while it wraps a model; there is nothing for users to do about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def model_name(model: nn.Module) -> str:
    """The name or folder that a model was loaded from, or its class."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)


def _adapted(model: Any, lora: LoraConfig) -> tuple[PeftModel, str, str | None]:
    """The PEFT model, the name of the policy's adapter, and that of the reference's (None: adapters off)."""
    from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    if not isinstance(model, PeftModel):
        with quiet_peft():
            wrapped: Any = get_peft_model(model, _peft_config(lora, model), adapter_name=POLICY)
        return wrapped, POLICY, None
    name: Any = model.active_adapter
    config: Any = model.peft_config.get(name) if isinstance(name, str) else None
    if config is None or getattr(config, "peft_type", None) != "LORA":
        raise PolicyError(
            f"model: a PEFT model must have one active LoRA adapter, got {name!r}; load it with "
            "PeftModel.from_pretrained(base, folder, is_trainable=True), or pass the base model"
        )
    taken = sorted({VALUE, REFERENCE} & model.peft_config.keys())
    if taken or config.bias != "none":
        got = f"an adapter called {taken[0]!r}" if taken else f"bias={config.bias!r}"
        raise PolicyError(
            f"model: its adapters must be called otherwise than {VALUE!r} and {REFERENCE!r} and train no biases, got "
            f"{got}; load it with another adapter_name, or merge it into the base"
        )
    copied = copy.copy(config)
    copied.init_lora_weights = True  # the weights are copied anyway, and some starts (PiSSA, OLoRA) change the base
    model.add_adapter(REFERENCE, copied)
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    set_peft_model_state_dict(model, state, adapter_name=REFERENCE)
    return model, name, REFERENCE


def _mergeable(model: PeftModel, name: str) -> list[Any]:
    """Layers that carry the adapter; none where adding it to a matrix would not be the same policy."""
    from peft.tuners.lora import LoraLayer

    config: Any = model.peft_config[name]
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    if config.use_dora or config.modules_to_save or config.trainable_token_indices:
        return []
    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and name in module.r]
    weights = [getattr(layer.get_base_layer(), "weight", None) for layer in layers]
    # Narrower weights would round the update away; a tied one would take it to the other end of the model too.
    plain = all(weight is not None and weight.dtype == torch.float32 and uses[id(weight)] == 1 for weight in weights)
    return layers if plain else []


def _peft_config(lora: LoraConfig, model: nn.Module) -> Any:
    import peft
    from transformers.pytorch_utils import Conv1D

    if lora.targets != "all-linear":
        _check_targets([lora.targets] if isinstance(lora.targets, str) else lora.targets, model)
    return peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=lora.targets, lora_dropout=0.0, task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 stores its weights so
    )  # fmt: skip


def _check_targets(targets: list[str], model: nn.Module) -> None:
    from transformers.pytorch_utils import Conv1D

    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    # A second adapter is added to a model whose layers are wrapped already.
    layers = [name.removesuffix(".base_layer") for name in layers if ".lora_" not in name]
    ends = sorted({name.split(".")[-1] for name in layers})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise PolicyError(
                f"lora.targets: must name linear layers of the model, got {target!r}; {type(model).__name__} has "
                f"{', '.join(ends)}, and 'all-linear' takes all but the output layer"
            )


def _value_head(model: Any) -> nn.Linear:
    """Zero at first, so that an untrained critic adds no noise; float32, because values are regressed on."""
    size = model.config.get_text_config(decoder=True).hidden_size
    head = nn.Linear(size, 1, dtype=torch.float32, device=model.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _is_value(name: str) -> bool:
    return name.startswith("value_head.") or _adapter_of(name) == VALUE


def _adapter_of(name: str) -> str | None:
    """The adapter of a LoRA weight, ``....lora_A.ADAPTER.weight``; None of other weights."""
    parts = name.split(".")
    return next((after for part, after in pairwise(parts) if part.startswith("lora_")), None)
