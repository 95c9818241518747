"""Frozen dataclasses that say what a model and a run are. No JAX, no gin, no files."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from uncurl_jax.errors import InputError
from uncurl_jax.model_checks import check_model


def alternating_experts(num_layers: int, num_experts: int, first: int = 0) -> tuple[int, ...]:
    """Returns expert counts with an MoE layer in every other place.

    Args:
      num_layers: depth.
      num_experts: of the MoE layers; 0 gives a dense model.
      first: 0 begins with the first layer (section 3 of arXiv 2409.01483), 1 with the second
        (Switch Transformers, both stacks of which have an even number of layers).
    """
    return tuple(num_experts if layer % 2 == first else 0 for layer in range(num_layers))


def scaled_steps(steps: int, scale: float = 1.0) -> int:
    """Returns `steps * scale`, rounded, at least 1: lets one gin macro shorten a whole run."""
    return max(1, round(steps * scale))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder, or an encoder and a decoder, whose feed-forward layers may be mixtures of experts.

    The defaults are a GPT-2-style decoder, the paper's; other values give the decoders of Mixtral,
    OLMoE, Qwen2-MoE and Qwen3-MoE, and the encoder-decoders of Switch Transformers (T5).

    Attributes:
      num_experts: experts per layer, 0 for a dense feed-forward layer; its length is the depth.
        With an encoder its layers stand first, then those of the decoder: layers have one
        numbering over both stacks.
      vocab_size: rows of the token embedding.
      embed_dim: width of the residual stream.
      num_heads: attention heads; divides embed_dim unless attention_head_dim is given.
      mlp_dim: hidden width of each expert, and of the dense feed-forward networks by default.
      max_length: the longest sequence in tokens; with learned positions, their number. With an
        encoder, the longest that either stack reads.
      num_selected_experts: top-k; 1 is Switch routing (the gate is the softmax probability).
      normalize_gates: divide the selected gates by their sum; meant for top-k > 1, since a single
        gate becomes 1 and its router then learns from the load-balancing loss alone.
      capacity_factor: slots per expert in training, as a multiple of tokens * k / experts;
        None is dropless.
      eval_capacity_factor: the same outside training.
      min_capacity: the fewest slots an expert has, when a capacity factor is set.
      router_jitter: router inputs are multiplied by uniform noise in [1-jitter, 1+jitter] in
        training; 0 turns it off.
      auxiliary_loss_weight: weight of the load-balancing loss (Switch Transformer, eq. 4).
      router_z_loss_weight: weight of the router z-loss (ST-MoE, eq. 5).
      is_gated: feed-forward networks and experts compute wo(activation(wg x) * wi x) in place of
        wo(activation(wi x)).
      activation: "gelu" (the tanh approximation, as GPT-2), "silu" or "relu".
      has_mlp_bias: whether feed-forward networks and experts have biases.
      shared_mlp_dim: hidden width of a feed-forward network that every token of an MoE layer goes
        through beside its experts (a shared expert); 0 for none. Pruning leaves it as it is.
      has_shared_gate: scale the shared expert's output by a sigmoid of one more projection
        (Qwen2-MoE).
      dense_mlp_dim: hidden width of the feed-forward networks of layers without experts; None is
        mlp_dim.
      position_embedding: "learned" (added to the token embedding), "rotary" (queries and keys
        are rotated, arXiv 2104.09864; a head's first half is paired with its second) or
        "relative" (a learned term of the attention scores for each bucket of distances, arXiv
        1910.10683, section 2.1), which models with an encoder have, and they alone.
      rotary_base: longest wavelength of rotary positions over 2 pi, in tokens.
      norm: "layer_norm", or "rms_norm" (arXiv 1910.07467), which has no mean and no bias.
      num_kv_heads: heads of keys and values, a divisor of num_heads; None is num_heads. Fewer are
        grouped-query attention (arXiv 2305.13245).
      attention_head_dim: width of one head; None is embed_dim / num_heads.
      attention_bias: which projections of attention have biases: "all", "qkv" or "none".
      qk_norm: RMSNorm of queries and keys before their rotation: "none", "head" (each head by
        itself, Qwen3) or "all" (over all heads, OLMoE).
      has_tied_embeddings: whether the token embedding is also the output projection; else the
        model has one more array [vocab, embed].
      num_encoder_layers: how many of the layers, counted from the first, are an encoder's; the
        others are its decoder's, and attend to what the encoder made of the prompt. 0 is a decoder
        alone.
      relative_buckets: of relative positions, a multiple of 4 (an encoder has half of them for
        each direction, half of those for single distances).
      relative_max_distance: tokens from which on all distances share a bucket.
      attention_scale: factor of the attention scores; None is 1/sqrt(head width), T5 has 1.
      has_scaled_logits: multiply what the output projection reads by embed_dim^-0.5, as T5 does
        with tied embeddings.
      encoder_end_id: id that ends what an encoder reads, which prompts of token caches lack; T5
        has 1. None adds nothing.
      expert_map: None, or per layer None or the expert of each router column: a router wider than
        its experts, as pruning with router "remap" leaves it. Gates of one expert add up.
      init_stddev: standard deviation of every kernel's initial values (GPT-2: 0.02); those that
        write to the residual stream are scaled by 1/sqrt(2 * depth).
      norm_epsilon: epsilon of every norm.
      dtype: compute type of matrix products, "bfloat16" or "float32". Parameters, router,
        softmaxes, norms and losses are float32 always.
    """

    num_experts: tuple[int, ...]
    vocab_size: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    max_length: int
    num_selected_experts: int = 1
    normalize_gates: bool = False
    capacity_factor: float | None = 1.2
    eval_capacity_factor: float | None = 1.0
    min_capacity: int = 4
    router_jitter: float = 0.0
    auxiliary_loss_weight: float = 0.01
    router_z_loss_weight: float = 0.0
    is_gated: bool = False
    activation: str = "gelu"
    has_mlp_bias: bool = True
    shared_mlp_dim: int = 0
    has_shared_gate: bool = False
    dense_mlp_dim: int | None = None
    position_embedding: str = "learned"
    rotary_base: float = 10000.0
    norm: str = "layer_norm"
    num_kv_heads: int | None = None
    attention_head_dim: int | None = None
    attention_bias: str = "all"
    qk_norm: str = "none"
    has_tied_embeddings: bool = True
    num_encoder_layers: int = 0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    attention_scale: float | None = None
    has_scaled_logits: bool = False
    encoder_end_id: int | None = None
    expert_map: tuple[tuple[int, ...] | None, ...] | None = None
    init_stddev: float = 0.02
    norm_epsilon: float = 1e-5
    dtype: str = "bfloat16"

    def __post_init__(self):
        object.__setattr__(self, "num_experts", tuple(int(count) for count in self.num_experts))
        if self.expert_map is not None:
            rows = (None if row is None else tuple(map(int, row)) for row in self.expert_map)
            object.__setattr__(self, "expert_map", tuple(rows))
        check_model(self)

    def router_width(self, layer: int) -> int:
        """Columns of a layer's router: its experts, or more if `expert_map` says so."""
        row = self.expert_map[layer] if self.expert_map is not None else None
        return self.num_experts[layer] if row is None else len(row)

    @property
    def num_layers(self) -> int:
        """Depth."""
        return len(self.num_experts)

    @property
    def has_encoder(self) -> bool:
        """Whether the model is an encoder and a decoder."""
        return self.num_encoder_layers > 0

    def is_encoder_layer(self, layer: int) -> bool:
        """Whether a layer is one of the encoder's."""
        return layer < self.num_encoder_layers

    def check_decoder(self, what: str) -> None:
        """Refuses a model with an encoder for something that takes decoders alone.

        Args:
          what: takes them, for the message.

        Raises:
          InputError: If there is an encoder.
        """
        if self.has_encoder:
            raise InputError(
                f"{what} takes decoders alone, got an encoder-decoder, whose first "
                f"{self.num_encoder_layers} of {self.num_layers} layers are an encoder's: use "
                "uncurl calibrate, plan, prune, train and evaluate, which take both."
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.attention_head_dim or self.embed_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def dense_width(self) -> int:
        """Hidden width of the feed-forward networks of layers without experts."""
        return self.dense_mlp_dim or self.mlp_dim

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        return tuple(layer for layer, count in enumerate(self.num_experts) if count)

    def expert_capacity(self, layer: int, num_tokens: int, *, is_training: bool) -> int | None:
        """Slots per expert for a group of `num_tokens` tokens in `layer`; None if dropless."""
        factor = self.capacity_factor if is_training else self.eval_capacity_factor
        if factor is None:
            return None
        slots = math.ceil(num_tokens * self.num_selected_experts * factor / self.num_experts[layer])
        return min(max(slots, self.min_capacity), num_tokens)

    def with_experts(self, count: int) -> ModelConfig:
        """Returns the same model with `count` experts in every MoE layer."""
        return dataclasses.replace(
            self,
            num_experts=tuple(count if experts else 0 for experts in self.num_experts),
            expert_map=None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-compatible dict; `from_dict` reads it back."""
        values = {**dataclasses.asdict(self), "num_experts": list(self.num_experts)}
        if self.expert_map is not None:
            values["expert_map"] = [None if row is None else list(row) for row in self.expert_map]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Builds a config from `to_dict`'s output.

        Raises:
          InputError: If a field is unknown or missing.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
        unknown, missing = sorted(set(values) - set(known)), sorted(required - set(values))
        if unknown or missing:
            raise InputError(
                f"A model configuration must have the fields of this version, got unknown "
                f"{unknown} and missing {missing}: it was written for another architecture."
            )
        return cls(**{**values, "num_experts": tuple(values["num_experts"])})


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, decay and clipping.

    Attributes:
      peak_learning_rate: after the warm-up.
      warmup_steps: optimizer steps of linear warm-up from 0.
      schedule: after it, "linear" or "cosine" decay to 0 at the last step, or "constant".
      b1, b2, epsilon: AdamW's.
      weight_decay: decoupled; applied to kernels, experts and embeddings, not to biases or norms.
      clip_norm: largest global gradient norm; None turns clipping off.
    """

    peak_learning_rate: float
    warmup_steps: int = 0
    schedule: str = "linear"
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0

    def __post_init__(self):
        if self.schedule not in ("linear", "cosine", "constant"):
            raise InputError(
                f'schedule must be "linear", "cosine" or "constant", got {self.schedule!r}.'
            )
        if self.peak_learning_rate <= 0 or self.warmup_steps < 0 or self.weight_decay < 0:
            raise InputError(
                "peak_learning_rate must be positive and warmup_steps and weight_decay at least 0, "
                f"got {self.peak_learning_rate}, {self.warmup_steps} and {self.weight_decay}."
            )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise InputError(f"clip_norm must be positive, or None for none, got {self.clip_norm}.")


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """What a student learns from a teacher beside the targets; the terms are added to the loss.

    Attributes:
      logit_weight: of temperature^2 * KL(teacher || student) of the predictions, a mean over the
        tokens that the loss counts.
      router_weight: of KL(teacher || student) of the routers, the teacher's probabilities summed
        inside the clusters that pruning made, a mean over real tokens and MoE layers.
      temperature: divides both models' logits in the first term.
    """

    logit_weight: float = 1.0
    router_weight: float = 0.0
    temperature: float = 1.0

    def __post_init__(self):
        weights = (self.logit_weight, self.router_weight)
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise InputError(
                "logit_weight and router_weight must be at least 0, and one of them above, got "
                f"{self.logit_weight} and {self.router_weight}."
            )
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature must be positive, got {self.temperature}.")


@dataclasses.dataclass(frozen=True)
class EarlyStoppingConfig:
    """When a stage stops before its last step, and which of its checkpoints is its result.

    The validation rows are scored every so often; what is kept is the checkpoint with the best
    score (rank classification) or the smallest loss (plain text).

    Attributes:
      every_steps: how often the validation rows are scored; the last step is scored too.
      patience: scores in a row without a new best after which the stage stops.
    """

    every_steps: int
    patience: int = 3

    def __post_init__(self):
        if self.every_steps < 1 or self.patience < 1:
            raise InputError(
                "every_steps and patience must be at least 1, got "
                f"{self.every_steps} and {self.patience}."
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training stage: what is trained, on which token cache, for how long.

    Attributes:
      optimizer: how.
      num_steps: the last optimizer step.
      begin_step: step to begin at, for a stage that goes on with the data and the learning rate of
        another (pruning during pretraining); the optimizer's moments begin fresh.
      schedule_steps: step at which the learning rate has decayed to its end; None is num_steps.
      batch_size: rows per optimizer step, over all devices and processes.
      model: the architecture to start fresh; None goes on from a checkpoint given to the stage.
      trainable: "all", or "router" for the warm-up after a prune (everything else is frozen).
      length: tokens per row; None takes the longest row of the cache, rounded up to 32.
      accumulation_steps: parts that a batch is computed in, one after the other; the gradient of
        the cross-entropy is that of the whole batch, capacity and router losses are each part's.
      seed: of parameters, batch order and jitter.
      log_every_steps: how often metrics are written.
      save_every_steps: how often a checkpoint is saved besides the last; None saves the last.
      max_to_keep: checkpoints that stay; None keeps all.
      keep_optimizer_state: whether the last checkpoint holds the optimizer's state, which no later
        stage here reads (it is two thirds of the bytes); those before hold it, to resume from.
      expert_partitions, model_partitions: of the device mesh; the other devices split the batch.
      expert_axes: mesh axes that divide each layer's experts, one tuple per layer, as `uncurl
        placement` chooses them: ("expert",), ("data", "expert"), or () for experts that every
        device holds whole. None is ("expert",) everywhere.
      distillation: what is learned from a teacher, whose checkpoint is given to the stage; None
        for nothing.
      early_stopping: on a validation split given to the stage; None trains to the last step.
    """

    optimizer: OptimizerConfig
    num_steps: int
    batch_size: int
    model: ModelConfig | None = None
    trainable: str = "all"
    length: int | None = None
    accumulation_steps: int = 1
    seed: int = 0
    log_every_steps: int = 10
    save_every_steps: int | None = None
    max_to_keep: int | None = 1
    keep_optimizer_state: bool = True
    expert_partitions: int = 1
    model_partitions: int = 1
    expert_axes: tuple[tuple[str, ...], ...] | None = None
    distillation: DistillationConfig | None = None
    begin_step: int = 0
    schedule_steps: int | None = None
    early_stopping: EarlyStoppingConfig | None = None

    def __post_init__(self):
        if self.trainable not in ("all", "router"):
            raise InputError(f'trainable must be "all" or "router", got {self.trainable!r}.')
        for name in ("num_steps", "batch_size", "accumulation_steps", "log_every_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("length", "save_every_steps", "max_to_keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, or None, got {value}.")
        if not 0 <= self.begin_step < self.num_steps:
            raise InputError(
                "begin_step must be at least 0 and below num_steps, got "
                f"{self.begin_step} and {self.num_steps}."
            )
        if self.schedule_steps is not None and self.schedule_steps < self.num_steps:
            raise InputError(
                "schedule_steps must be at least num_steps, or None, got "
                f"{self.schedule_steps} and {self.num_steps}."
            )
        if self.batch_size % self.accumulation_steps:
            raise InputError(
                "accumulation_steps must divide batch_size, got "
                f"{self.accumulation_steps} and {self.batch_size}."
            )
