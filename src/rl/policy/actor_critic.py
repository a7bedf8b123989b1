"""ActorCritic: one frozen base model with LoRA adapters for policy and critic; the reference is the base itself."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from rl.algorithm.losses import token_logprobs
from rl.config import LoraConfig
from rl.errors import PolicyError
from rl.policy.recomputation import recomputable_layers, recomputing, require_recomputable
from rl.policy.sampling import evaluating
from rl.records import Responses

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Names of the adapters. A PEFT model that is trained further keeps the name of its own adapter for the policy.
POLICY = "policy"
VALUE = "value"
REFERENCE = "reference"


class ModelInput(NamedTuple):
    """The tensors of a forward pass over prompt and response, as a tuple that distributed wrappers can move.

    Attributes:
        input_ids: ``[B, P + R]`` int64, token ids.
        attention_mask: ``[B, P + R]`` int64, 0 on padding.
        position_ids: ``[B, P + R]`` int64, position of each token without padding.
    """

    input_ids: Int64[Tensor, "batch tokens"]
    attention_mask: Int64[Tensor, "batch tokens"]
    position_ids: Int64[Tensor, "batch tokens"]

    @classmethod
    def of(cls, responses: Responses, device: torch.device) -> ModelInput:
        """Build the input of a rollout's sequences on a device."""
        attention_mask = responses.attention_mask.to(device).long()
        # Without explicit positions a left-padded GPT-2 counts its padding and is wrong by half a logit.
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return cls(responses.input_ids.to(device), attention_mask, position_ids)


class TokenOutput(NamedTuple):
    """The result of a forward pass for each response token.

    Attributes:
        logprobs: ``[B, R]``, log-probability under the policy, in nats.
        entropy: ``[B, R]``, entropy in nats of the distribution that the token was drawn from.
        values: ``[B, R]`` float32, the critic's value before the token; None without a critic.
    """

    logprobs: Float[Tensor, "batch response"]
    entropy: Float[Tensor, "batch response"]
    values: Float[Tensor, "batch response"] | None


class ActorCritic(nn.Module):
    """A frozen causal LM with a LoRA adapter for the policy and, with a critic, another for the value function.

    The reference is the base with its adapters off. If the given model has a trained adapter of its own, the reference
    is a frozen copy of that adapter. What PEFT trains with that adapter is trained here too: ``modules_to_save`` and
    ``trainable_token_indices`` belong to the policy and to the copy; the critic reads the base's own modules.

    Dropout is off in every pass, for any mode of the modules, and the mode is restored: the probabilities of a
    rollout and of its update must come from the same function. For the same reason every pass computes in the
    precision of ``autocast``, not only those that go through a distributed wrapper.

    Attributes:
        autocast: context of every forward pass; replaced by the trainer for mixed precision.
        peft: the PEFT model.
        policy_name: name of the policy's adapter.
        reference_name: name of the reference's adapter; None: adapters off.
        value_head: float32 linear layer from hidden state to value; None without a critic.

    Args:
        model: a Hugging Face causal LM, or a PEFT model whose active LoRA adapter is trained further.
        lora: shape of the new adapters.
        critic: whether there is a value function.
        seed: of the adapters' first weights.
        gradient_checkpointing: keep only the inputs of each layer for the backward pass, and recompute the rest there.
            ``model.gradient_checkpointing_enable()`` has the same effect, before or afterwards.

    Raises:
        PolicyError: LoRA targets that do not exist, a PEFT model of another kind, or one with trainable weights that no
            adapter holds; layers that cannot be recomputed.
    """

    def __init__(
        self,
        model: nn.Module,
        lora: LoraConfig,
        *,
        critic: bool,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        _keep_differentiable(model)

        # The adapters' weights are a function of the seed; the caller's generator keeps its state.
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also reseed the caller's CUDA generators.
            torch.default_generator.manual_seed(seed)
            self.peft, self.policy_name, self.reference_name = _with_adapters(model, lora)
            if critic:
                _refuse_parameter_targets(self.peft, self.policy_name, self.reference_name)
                _refuse_layers_called_value(self.peft, self.policy_name)
                self.peft.add_adapter(VALUE, _peft_config(lora, self.causal_lm))
            self.value_head = _value_head(self.causal_lm) if critic else None
        self._active: str | None = self.policy_name

        if gradient_checkpointing:
            require_recomputable(self.causal_lm)
        self._gradient_checkpointing = gradient_checkpointing

        # Architectures differ in the arguments of their forward pass.
        accepted = inspect.signature(self.causal_lm.forward).parameters
        self._takes_position_ids = "position_ids" in accepted
        self._takes_logits_to_keep = "logits_to_keep" in accepted

        # What is trained: everything that PEFT trains with the policy's adapter, and with the critic's.
        self._policy_names = {f"peft.{name}" for name in _trained_names(self.peft, self.policy_name)}
        self._value_names: set[str] = set()
        if critic:
            self._value_names = {f"peft.{name}" for name in _trained_names(self.peft, VALUE)}
            self._value_names |= {"value_head.weight", "value_head.bias"}
        names = self._policy_names | self._value_names
        self._trained = [parameter for name, parameter in self.named_parameters() if name in names]
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self._activate(self.policy_name)
        self.eval()

    def train(self, mode: bool = True) -> ActorCritic:
        """Stay in evaluation mode: with dropout the old and the new probabilities would differ by chance."""
        return super().train(False)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """Return the Hugging Face model; its linear layers are wrapped by the adapters."""
        return self.peft.get_base_model()  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.parameters()).device

    def policy_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained weights of the policy, by name."""
        return {name: p for name, p in self.named_parameters() if name in self._policy_names}

    def value_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained weights of the critic, by name; empty without one."""
        return {name: p for name, p in self.named_parameters() if name in self._value_names}

    # Forward passes ---------------------------------------------------------------------------------

    def forward(self, inputs: ModelInput, tokens: Int64[Tensor, "batch response"], temperature: float) -> TokenOutput:
        """Compute log-probabilities and entropies under the policy, and values under the critic.

        One call serves both, so that a distributed wrapper uses every trained weight in every pass.

        Args:
            inputs: sequences of prompt and response.
            tokens: ``[B, R]``, the response tokens.
            temperature: tau, that of the sampling.

        Cost: one forward pass of the model, two with a critic.
        """
        logprobs, entropy = self.policy_pass(inputs, tokens, temperature)
        values = self.value_pass(inputs, tokens.shape[1])
        if values is not None:
            values = values[:, :-1]
        return TokenOutput(logprobs, entropy, values)

    def policy_pass(
        self, inputs: ModelInput, tokens: Int64[Tensor, "batch response"], temperature: float
    ) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
        """Compute log-probability and entropy of each response token under the active adapter, by default the policy's.

        Args:
            inputs: sequences of prompt and response.
            tokens: ``[B, R]``, the response tokens.
            temperature: tau, that of the sampling.

        Returns:
            Log-probabilities ``[B, R]`` and entropies ``[B, R]``, in nats.
        """
        logits = self._response_logits(inputs, tokens.shape[1])
        return token_logprobs(logits, tokens, temperature)

    def value_pass(self, inputs: ModelInput, response_length: int) -> Float[Tensor, "batch {response_length}+1"] | None:
        """Compute the critic's value before each response token and after the last.

        Args:
            inputs: sequences of prompt and response.
            response_length: R.

        Returns:
            ``[B, R + 1]`` float32, in units of reward; None without a critic.
        """
        if self.value_head is None:
            return None
        with self.adapter(VALUE), self._pass():
            decoder = self.causal_lm.get_decoder()
            hidden = decoder(**self._arguments(inputs), use_cache=False).last_hidden_state
        # The value before a token is read from the hidden state one column earlier.
        first_column = -response_length - 1
        states = hidden[:, first_column:]
        # Values are regression outputs: float32 in every precision of the base.
        with torch.autocast(states.device.type, enabled=False):
            states = states.to(self.value_head.weight.dtype)
            values = self.value_head(states)
        return values.squeeze(-1)

    def reference_pass(
        self, inputs: ModelInput, tokens: Int64[Tensor, "batch response"], temperature: float
    ) -> Float[Tensor, "batch response"]:
        """Compute the log-probability of each response token under the reference, ``[B, R]`` in nats, detached."""
        with torch.no_grad(), self.adapter(self.reference_name):
            logprobs, _ = self.policy_pass(inputs, tokens, temperature)
        return logprobs

    def embeddings(self, inputs: ModelInput) -> Float[Tensor, "batch tokens hidden"]:
        """Return the input embeddings, detached."""
        return self.causal_lm.get_input_embeddings()(inputs.input_ids).detach()

    def logprobs_of_embeddings(
        self,
        embeddings: Float[Tensor, "batch tokens hidden"],
        inputs: ModelInput,
        tokens: Int64[Tensor, "batch response"],
        temperature: float,
    ) -> Float[Tensor, "batch response"]:
        """Compute log-probabilities as a function of the input embeddings, for rules that read gradients.

        Args:
            embeddings: ``[B, P + R, hidden]``, replace ``inputs.input_ids``.
            inputs: mask and positions of the sequences.
            tokens: ``[B, R]``, the response tokens.
            temperature: tau, that of the sampling.
        """
        logits = self._response_logits(inputs, tokens.shape[1], embeddings=embeddings)
        logprobs, _ = token_logprobs(logits, tokens, temperature)
        return logprobs

    def logits_of_embeddings(
        self, embeddings: Float[Tensor, "batch tokens hidden"], inputs: ModelInput, response_length: int
    ) -> Float[Tensor, "batch response vocabulary"]:
        """Compute the logits of each response token as a function of the input embeddings, at temperature 1.

        Args:
            embeddings: ``[B, P + R, hidden]``, replace ``inputs.input_ids``.
            inputs: mask and positions of the sequences.
            response_length: R.
        """
        return self._response_logits(inputs, response_length, embeddings=embeddings)

    def hidden_states(self, inputs: ModelInput, response_length: int) -> Float[Tensor, "batch response hidden"]:
        """Compute the last hidden state from which each response token was drawn, that of the column before it.

        Args:
            inputs: sequences of prompt and response.
            response_length: R.
        """
        with self._pass():
            decoder = self.causal_lm.get_decoder()
            hidden = decoder(**self._arguments(inputs), use_cache=False).last_hidden_state
        first_column = -response_length - 1
        return hidden[:, first_column:-1]

    def logprob_derivative(
        self,
        inputs: ModelInput,
        tokens: Int64[Tensor, "batch response"],
        temperature: float,
        direction: Mapping[str, Tensor],
    ) -> Float[Tensor, "batch response"]:
        r"""Compute the derivative of each response token's log-probability along a direction of the policy's weights.

        :math:`\partial \log p_t(\theta + \epsilon d) / \partial \epsilon = \langle \nabla_\theta \log p_t, d \rangle`,
        exactly, by forward-mode differentiation: one pass serves all tokens.

        Args:
            inputs: sequences of prompt and response.
            tokens: ``[B, R]``, the response tokens.
            temperature: tau, that of the sampling.
            direction: d, by the names of :meth:`policy_parameters`; a missing weight does not move.

        Returns:
            ``[B, R]`` float32, detached.

        Raises:
            PolicyError: a layer without a forward-mode derivative, such as one of a quantised base.

        Cost: about two forward passes, with attention by plain matrix products.
        """
        from torch.autograd import forward_ad
        from torch.nn.attention import SDPBackend, sdpa_kernel

        parameters = self.policy_parameters()
        first_column = -tokens.shape[1] - 1
        # Fused attention kernels have no forward-mode derivative.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), self._pass():
            # theta + epsilon d: every weight with its part of the direction as tangent.
            moved = {}
            for name, tangent in direction.items():
                parameter = parameters[name].detach()
                dual = forward_ad.make_dual(parameter, tangent.to(parameter.dtype))
                moved[name.removeprefix("peft.")] = dual
            arguments = {**self._arguments(inputs), "use_cache": False}
            try:
                output = torch.func.functional_call(self.peft, moved, kwargs=arguments)
            except NotImplementedError as error:
                raise PolicyError(
                    f"model: all layers must have a forward-mode derivative, got {type(self.causal_lm).__name__} with "
                    f"one that has none ({error}); use another credit rule, or a base that is not quantised"
                ) from error

            # log p_t, whose tangent is the derivative. Where no weight moves, it has no tangent.
            logits = output.logits[:, first_column:-1].float() / temperature
            log_p = logits.log_softmax(-1)
            chosen = log_p.gather(-1, tokens[..., None]).squeeze(-1)
            derivative = forward_ad.unpack_dual(chosen).tangent
            if derivative is None:
                return torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
            return derivative.clone()

    def _response_logits(
        self,
        inputs: ModelInput,
        response_length: int,
        embeddings: Float[Tensor, "batch tokens hidden"] | None = None,
    ) -> Float[Tensor, "batch response vocabulary"]:
        """Compute the logits of each response token, read one column before it."""
        arguments = self._arguments(inputs, embeddings)
        if self._takes_logits_to_keep:
            # Logits of the prompt are not used, and with a large vocabulary they take most of the memory.
            arguments["logits_to_keep"] = response_length + 1
        with self._pass():
            logits = self.causal_lm(**arguments, use_cache=False).logits
        first_column = -response_length - 1
        return logits[:, first_column:-1]

    def _arguments(
        self, inputs: ModelInput, embeddings: Float[Tensor, "batch tokens hidden"] | None = None
    ) -> dict[str, Any]:
        """Return the keyword arguments of the model's forward pass."""
        arguments: dict[str, Any] = {"attention_mask": inputs.attention_mask}
        if embeddings is None:
            arguments["input_ids"] = inputs.input_ids
        else:
            arguments["inputs_embeds"] = embeddings
        if self._takes_position_ids:
            arguments["position_ids"] = inputs.position_ids
        return arguments

    @contextmanager
    def _pass(self) -> Iterator[None]:
        """Set evaluation mode, precision and gradient checkpointing for a forward pass of the model."""
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.peft))
            stack.enter_context(self.autocast())
            if torch.is_grad_enabled():
                stack.enter_context(self._recomputing())
            yield

    def _recomputing(self) -> AbstractContextManager[None]:
        """Recompute layers in the backward pass, all of them or those that the user has set so in transformers."""
        layers = []
        for layer in recomputable_layers(self.causal_lm):
            if self._gradient_checkpointing or getattr(layer, "gradient_checkpointing", False):
                layers.append(layer)
        if not layers:
            return nullcontext()

        # In the backward pass the policy's adapter is active again, also for layers of the critic's pass.
        name = self._active

        @contextmanager
        def restored(layer: nn.Module) -> Iterator[None]:
            with evaluating(layer), self.adapter(name):
                yield

        return recomputing(layers, restored)

    # Adapters ---------------------------------------------------------------------------------------

    @contextmanager
    def adapter(self, name: str | None) -> Iterator[None]:
        """Activate another adapter inside the context, or none; the trained weights stay trained.

        Args:
            name: of the adapter; None: adapters off.
        """
        before = self._active
        if name == before:
            yield
            return
        # PEFT's own context turns adapters off; another adapter is activated by its name.
        try:
            if name is None:
                self._active = None
                with self.peft.disable_adapter():
                    yield
            else:
                self._activate(name)
                yield
        finally:
            self._activate(self.policy_name if before is None else before)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Add the policy's adapter to the base weights inside the context, for faster generation.

        The original tensors are restored, so the base is bit-identical afterwards; a copy of all adapted weights exists
        meanwhile. Where a merge would change the policy, the model generates unmerged: DoRA, fully trained modules,
        bases of less than 32 bits (rounding would lose the update), and weights that two layers share.

        Raises:
            PolicyError: the copy does not fit into the GPU's memory.
        """
        layers = _mergeable(self.peft, self.policy_name)
        if not layers:
            yield
            return

        # The sum is a new tensor, so the original one is kept as it is and put back afterwards.
        originals: list[tuple[nn.Parameter, Tensor]] = []
        try:
            with torch.no_grad():
                for layer in layers:
                    weight = layer.get_base_layer().weight
                    originals.append((weight, weight.data))
                    update = layer.get_delta_weight(self.policy_name)
                    weight.data = weight.data + update.to(weight.dtype)
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

    def _activate(self, name: str) -> None:
        """Switch the active adapter."""
        self._active = name
        self.peft.set_adapter(name)
        # PEFT turns the gradient off for every adapter but the active one; a backward pass needs both.
        for parameter in self._trained:
            parameter.requires_grad_(True)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide the warning about PEFT's use of a deprecated name of transformers, which users cannot change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def model_name(model: nn.Module) -> str:
    """Return the name or folder that a model was loaded from, or its class."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "")
    return str(name or type(model).__name__)


# Construction -------------------------------------------------------------------------------------------


def _keep_differentiable(model: nn.Module) -> None:
    """Keep the 4-bit layers of bitsandbytes in the form that has a gradient.

    On some CPUs a layer repacks its weights in the first pass without gradients, such as generation, for a kernel that
    has none; adapters of earlier layers would then receive a gradient of 0 without an error.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise PolicyError(
                f"model: its 4-bit weights must be as they were loaded, got {name} packed for inference on the CPU, "
                "which has no gradient; load the model again and train it before it generates"
            )
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _with_adapters(model: Any, lora: LoraConfig) -> tuple[PeftModel, str, str | None]:
    """Return the PEFT model, the name of the policy's adapter, and that of the reference's (None: adapters off)."""
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        name = _trained_adapter(model)
        _refuse_other_trained_weights(model)
        _copy_adapter(model, name, REFERENCE)
        return model, name, REFERENCE
    with quiet_peft():
        wrapped: Any = get_peft_model(model, _peft_config(lora, model), adapter_name=POLICY)
    return wrapped, POLICY, None


def _trained_adapter(model: PeftModel) -> str:
    """Return the name of the active adapter of a PEFT model; an adapter that cannot be trained here is an error."""
    # PEFT returns a list of names where several adapters are active.
    name: Any = model.active_adapter
    config: Any = model.peft_config.get(name) if isinstance(name, str) else None
    if config is None or getattr(config, "peft_type", None) != "LORA":
        raise PolicyError(
            f"model: a PEFT model must have one active LoRA adapter, got {name!r}; load it with "
            "PeftModel.from_pretrained(base, folder, is_trainable=True), or pass the base model"
        )

    # The names of the critic's and the reference's adapter must be free. Trained biases lie in the base, which all
    # adapters share.
    taken = sorted({VALUE, REFERENCE} & model.peft_config.keys())
    if taken or config.bias != "none":
        got = f"an adapter called {taken[0]!r}" if taken else f"bias={config.bias!r}"
        raise PolicyError(
            f"model: its adapters must be called otherwise than {VALUE!r} and {REFERENCE!r} and train no biases, got "
            f"{got}; load it with another adapter_name, or merge it into the base"
        )
    return name


def _trained_names(model: PeftModel, adapter: str) -> set[str]:
    """List the parameters that PEFT trains with an adapter; the adapter stays active, the other weights frozen."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.set_adapter(adapter)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _refuse_other_trained_weights(model: PeftModel) -> None:
    """Reject a trainable weight that belongs to no adapter: it would be frozen, and no checkpoint would hold it."""
    # What is trainable now must be read first: listing the weights of an adapter freezes all others.
    before = str(model.active_adapter)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    of_adapters: set[str] = set()
    for adapter in model.peft_config:
        of_adapters |= _trained_names(model, adapter)
    model.set_adapter(before)

    others = [name for name in trainable if name not in of_adapters]
    if others:
        raise PolicyError(
            f"model: a PEFT model must train nothing but its adapter, got {others[0]} with requires_grad=True "
            f"({len(others)} such weights); name their modules in modules_to_save of its LoraConfig, or freeze them "
            "with requires_grad_(False)"
        )


def _refuse_parameter_targets(model: PeftModel, name: str, reference_name: str | None) -> None:
    """Reject a critic beside a given adapter of single parameters, such as those of experts.

    PEFT requires that all adapters of a model have the same parameters as targets.
    """
    parameters = getattr(model.peft_config[name], "target_parameters", None)
    if reference_name is not None and parameters:
        raise PolicyError(
            "model: an adapter beside a critic must have modules as its targets, got target_parameters="
            f"{parameters!r}; use advantage='group' or 'rloo', which need no critic"
        )


def _refuse_layers_called_value(model: PeftModel, policy_name: str) -> None:
    """Reject a critic where the policy has an adapter on a layer with the name of the critic's adapter.

    PEFT tells adapters apart by this part of a weight's name, and would leave such a layer out of every checkpoint.
    """
    trained_names = _trained_names(model, policy_name)
    clashing = sorted(name for name in trained_names if VALUE in name.split("."))
    if clashing:
        raise PolicyError(
            f"lora.targets: must be layers called otherwise than {VALUE!r} beside a critic, got {clashing[0]}; leave "
            "them out of the targets, or use advantage='group' or 'rloo', which need no critic"
        )


def _copy_adapter(model: PeftModel, name: str, copy_name: str) -> None:
    """Add a copy of an adapter under another name."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config: Any = copy.copy(model.peft_config[name])
    # Some initialisations (PiSSA, OLoRA) change the base; the weights are copied anyway.
    config.init_lora_weights = True
    model.add_adapter(copy_name, config)
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    set_peft_model_state_dict(model, state, adapter_name=copy_name)


def _mergeable(model: PeftModel, name: str) -> list[Any]:
    """Return the layers of an adapter, or no layer where adding it to the weights would change the policy."""
    from peft.tuners.lora import LoraLayer

    # DoRA is not a sum of weight and update; the other two train more than such sums.
    config: Any = model.peft_config[name]
    if config.use_dora or config.modules_to_save or config.trainable_token_indices:
        return []

    # A tied weight is a parameter of several layers.
    num_uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    layers = []
    for module in model.modules():
        if not isinstance(module, LoraLayer) or name not in module.r:
            continue
        weight = getattr(module.get_base_layer(), "weight", None)
        # Narrower weights would round the update away; a tied weight would change the other layer too.
        if weight is None or weight.dtype != torch.float32 or num_uses[id(weight)] != 1:
            return []
        layers.append(module)
    return layers


def _peft_config(lora: LoraConfig, model: nn.Module) -> Any:
    """Translate the settings of an adapter for PEFT, and check its targets."""
    import peft
    from transformers.pytorch_utils import Conv1D

    # GPT-2 stores the weights of its linear layers transposed, as Conv1D; a model may have layers of both kinds.
    targets = _target_modules(lora.targets, model)
    is_transposed = any(isinstance(module, Conv1D) for module in model.modules())
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=targets,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        fan_in_fan_out=is_transposed,
    )


def _target_modules(targets: str | list[str], model: nn.Module) -> str | list[str]:
    """Read the targets of an adapter and return them as PEFT takes them.

    A text is ``"all-linear"``, the name of a layer, several names with commas between them, or a regular expression
    for the complete names of linear layers. PEFT takes every text but the first for a regular expression.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = _linear_layers(model)
    has_copies = any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
    if targets == "all-linear":
        # Without the output layer, and without copies that another adapter trains as a whole.
        if not has_copies:
            return "all-linear"
        get_output: Any = model.get_output_embeddings
        output_layer = get_output()
        output_names = {name for name, module in model.named_modules() if module is output_layer}
        return [name for name in layers if name not in output_names]

    # A text whose parts are not all names of layers is a regular expression.
    names = targets
    if isinstance(names, str):
        parts = [part.strip() for part in names.split(",")]
        if not all(_named(part, layers) for part in parts):
            return _matching(names, layers, model)
        names = parts
    chosen: set[str] = set()
    for name in names:
        of_this_name = _named(name, layers)
        if not of_this_name:
            raise _unknown_target(name, layers, model)
        chosen.update(of_this_name)

    # PEFT would find the names inside the copies too, so the layers are listed one by one.
    if not has_copies:
        return names
    return [layer for layer in layers if layer in chosen]


def _linear_layers(model: nn.Module) -> list[str]:
    """List the names of the linear layers that an adapter can be added to."""
    from peft.utils.other import AuxiliaryTrainingWrapper
    from transformers.pytorch_utils import Conv1D

    names: list[str] = []
    wrappers: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrappers.append(f"{name}.")
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        # Inside a wrapper lie the copies of a module that other adapters train.
        is_copy = name.startswith(tuple(wrappers))
        is_of_adapter = ".lora_" in name
        if not is_copy and not is_of_adapter:
            # A layer that has an adapter already is wrapped, and its own name ends in ".base_layer".
            names.append(name.removesuffix(".base_layer"))
    return names


def _named(target: str, layers: list[str]) -> list[str]:
    """List the layers with this name, or with this end of it."""
    return [layer for layer in layers if layer == target or layer.endswith(f".{target}")]


def _matching(pattern: str, layers: list[str], model: nn.Module) -> list[str]:
    """List the layers whose complete names match a regular expression."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise PolicyError(
            f"lora.targets: must be 'all-linear', names of layers or a regular expression, got {pattern!r} ({error}); "
            r"write it like '.*\.(q_proj|v_proj)'"
        ) from error
    found = [layer for layer in layers if compiled.fullmatch(layer)]
    if not found:
        raise _unknown_target(pattern, layers, model)
    return found


def _unknown_target(target: str, layers: list[str], model: nn.Module) -> PolicyError:
    """Build the error of a target that no linear layer has, with the names that there are."""
    last_parts = sorted({name.split(".")[-1] for name in layers})
    return PolicyError(
        f"lora.targets: must name linear layers of the model, got {target!r}; {type(model).__name__} has "
        f"{', '.join(last_parts)}, and 'all-linear' takes all but the output layer"
    )


def _value_head(model: Any) -> nn.Linear:
    """Make the value head: zero at first, so that an untrained critic adds no noise, and float32 for regression."""
    hidden_size = model.config.get_text_config(decoder=True).hidden_size
    head = nn.Linear(hidden_size, 1, dtype=torch.float32, device=model.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
