"""Our decoder as a T5X model: losses, the five MoE metrics, prediction with the cache, scores."""

# T5X is on no package index, so the type checker may not find it.
# pyright: reportMissingImports=false

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import clu.metrics
import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import seqio
from flax import traverse_util
from flax.linen.partitioning import AxisMetadata
from t5x import decoding, losses, metrics, models, optimizers

from uncurl_jax.config import ModelConfig
from uncurl_jax.data.seqio_vocabulary import from_seqio_vocabulary
from uncurl_jax.errors import InputError
from uncurl_jax.models.decoder import Decoder, moe_metrics
from uncurl_jax.t5x_adapter.features import RowConverter
from uncurl_jax.t5x_adapter.partitioning import SmoePartitioner

Batch = Mapping[str, jax.Array]


def split_logical_axes(variables: Any) -> Any:
    """Turns annotated parameters into the two collections that T5X knows.

    Args:
      variables: what `Decoder.init` returns, arrays in boxes with the names of their axes.

    Returns:
      {"params": arrays, "params_axes": `AxisMetadata` under the array's name and "_axes"}.
    """
    boxed: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(
        flax.core.unfreeze(variables["params"])
    )
    axes = {
        (*path[:-1], f"{path[-1]}_axes"): AxisMetadata(names=tuple(box.names))
        for path, box in boxed.items()
    }
    arrays = {path: box.unbox(apply_constraint=False) for path, box in boxed.items()}
    return flax.core.freeze(
        {
            "params": traverse_util.unflatten_dict(arrays),
            "params_axes": traverse_util.unflatten_dict(axes),
        }
    )


class SmoeDecoderModel(models.DecoderOnlyModel):
    """A decoder of this package, dense or with experts, pruned or not, for T5X.

    The loss is that of `uncurl train`: the mean cross-entropy of the targets, plus the auxiliary
    and the router z-loss, each summed over the MoE layers with the weights of `ModelConfig`.
    Training (T5X passes an rng) uses the training capacity and router jitter, evaluation and
    scoring the evaluation capacity; prediction is dropless.

    Attributes:
      config: the architecture.
      row_length: tokens that rows of inputs and targets are padded to.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: seqio.Vocabulary,
        optimizer_def: optimizers.OptimizerDefType | None = None,
        partitioner: SmoePartitioner | None = None,
        row_length: int | None = None,
        decode_fn: models.DecodeFnCallable = decoding.temperature_sample,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        loss_normalizing_factor: float | str | None = "NUM_REAL_TARGET_TOKENS",
    ):
        """Builds the model; no parameter is made.

        Args:
          config: the architecture.
          vocabulary: of the tasks.
          optimizer_def: see `t5x_adapter.optimizer`; None is for evaluation and inference.
          partitioner: whose mesh MoE layers compute on; None on one device.
          row_length: tokens that rows of inputs and targets are padded to, at most the model's
            max_length; None is that.
          decode_fn: T5X's, for prediction.
          label_smoothing: T5X's; 0 as in `uncurl train`.
          z_loss: T5X's, of the vocabulary's logits; 0 as in `uncurl train`.
          loss_normalizing_factor: T5X's; by default the number of target tokens.

        Raises:
          InputError: If the model has an encoder, or the vocabulary is larger than the model's.
        """
        if config.has_encoder:
            raise InputError(
                "T5X runs this package's decoders, got a model with an encoder "
                f"(num_encoder_layers={config.num_encoder_layers}): use uncurl train and uncurl "
                "evaluate."
            )
        self.config = config
        self.row_length = min(row_length or config.max_length, config.max_length)
        if vocabulary.vocab_size > config.vocab_size:
            raise InputError(
                "model.vocab_size must be at least the vocabulary's size, got "
                f"{config.vocab_size} for {vocabulary.vocab_size}: set ModelConfig.vocab_size."
            )
        mesh = None if partitioner is None or partitioner.mesh.size == 1 else partitioner.mesh
        super().__init__(
            module=Decoder(config, mesh),
            vocabulary=vocabulary,
            optimizer_def=optimizer_def,
            decode_fn=decode_fn,
            feature_converter_cls=functools.partial(RowConverter, self.row_length),
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            loss_normalizing_factor=loss_normalizing_factor,
        )

    def describe(self) -> dict[str, Any]:
        """Returns what the model was built with, for people: dataclasses, numbers and text."""
        return {
            "config": self.config,
            "vocabulary": from_seqio_vocabulary(self.output_vocabulary).describe(),
            "row_length": self.row_length,
            "optimizer": None if self.optimizer_def is None else type(self.optimizer_def).__name__,
            "mesh": None if self.module.mesh is None else dict(self.module.mesh.shape),
            "label_smoothing": self._label_smoothing,
            "z_loss": self._z_loss,
            "loss_normalizing_factor": self._loss_normalizing_factor,
        }

    def get_initial_variables(
        self,
        rng: jax.Array,
        input_shapes: Mapping[str, Any],
        input_types: Mapping[str, Any] | None = None,
    ) -> Any:
        """Returns fresh parameters and the names of their axes; shapes of inputs do not matter."""
        del input_shapes, input_types
        tokens = jnp.zeros((1, min(2, self.config.max_length)), jnp.int32)
        with nn.logical_axis_rules(()):
            return split_logical_axes(Decoder(self.config).init(rng, tokens))

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Applies the decoder.

        T5X traces it with axis rules in force, by which Flax would constrain each parameter as it
        is used; the parameters are where `SmoePartitioner.get_mesh_axes` has put them.
        """
        with nn.logical_axis_rules(()):
            return self.module.apply(*args, **kwargs)

    def loss_fn(
        self, params: Any, batch: Batch, dropout_rng: jax.Array | None
    ) -> tuple[jax.Array, metrics.MetricsMap]:
        """Returns the loss and T5X's metrics, with those of the experts.

        Args:
          params: of the decoder.
          batch: T5X's features, [b, l] each.
          dropout_rng: for router jitter in training; None in evaluation.
        """
        logits, sown = self._compute_logits(params, batch, dropout_rng, mutable=["intermediates"])
        factor, weights = losses.get_loss_normalizing_factor_and_weights(
            self._loss_normalizing_factor, batch
        )
        targets = batch["decoder_target_tokens"]
        token_loss, z_loss, _ = losses.compute_weighted_cross_entropy(
            logits,
            targets=targets,
            weights=weights,
            label_smoothing=self._label_smoothing,
            z_loss=self._z_loss,
            loss_normalizing_factor=factor,
        )
        experts = moe_metrics(sown.get("intermediates", {}))
        loss = token_loss + experts["auxiliary_loss"] + experts["router_z_loss"]
        values = self._compute_metrics(
            logits=logits,
            targets=targets,
            mask=weights,
            loss=loss,
            z_loss=z_loss,
            segment_ids={"decoder_target_tokens": targets != 0},
        )
        average: Any = clu.metrics.Average
        # T5X's own would count the experts' losses as cross-entropy.
        values |= {
            "cross_ent_loss": metrics.AveragePerStep(total=token_loss - z_loss),
            "cross_ent_loss_per_all_target_tokens": average(
                total=token_loss - z_loss, count=jnp.array(targets.size)
            ),
        }
        values |= {
            f"experts/{name}": metrics.AveragePerStep.from_model_output(value)
            for name, value in experts.items()
        }
        return loss, values

    def _compute_logits(
        self,
        params: Any,
        batch: Batch,
        dropout_rng: jax.Array | None = None,
        mutable: Any = False,
        other_variables: Any = None,
    ) -> Any:
        """Returns [b, l, vocab] float32 logits, and the mutable collections if there are any."""
        if "decoder_segment_ids" in batch:
            raise ValueError("Rows must not be packed: set DatasetConfig.pack = False.")
        return self._apply(
            {"params": params, **(other_variables or {})},
            batch["decoder_input_tokens"],
            batch["decoder_target_tokens"] != 0,
            is_training=dropout_rng is not None,
            rngs=None if dropout_rng is None else {"jitter": dropout_rng},
            mutable=mutable,
        )

    def _compute_kv_cache(
        self, params: Any, inputs: jax.Array, causal_attention_mask: jax.Array
    ) -> tuple[Any, jax.Array]:
        """Reads prompts: inputs [b, l] int32 with 0 first, zeros after the prompt.

        Returns:
          The cache, and [b] int32 the place of each prompt's last token, which is read again by
          the first decoding step.
        """
        del causal_attention_mask
        last = jnp.sum(inputs[:, 1:] != 0, axis=-1)
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape)
        _, variables = self._apply(
            {"params": params},
            inputs,
            positions <= last[:, None],
            positions,
            decode=True,
            logit_positions=last[:, None],
            mutable=["cache"],
        )
        return variables["cache"], last

    def _compute_logits_from_slice(
        self, decoding_state: decoding.DecodingState, params: Any, max_decode_length: int
    ) -> tuple[jax.Array, Any]:
        """Reads one token of each row: returns [b, vocab] logits and the new cache."""
        token = decoding_state.cur_token
        # Rows that have reached the end are overwritten there until the others end.
        index = jnp.minimum(decoding_state.cur_index, max_decode_length - 1)
        positions = jnp.broadcast_to(jnp.asarray(index, jnp.int32).reshape(-1, 1), token.shape)
        logits, variables = self._apply(
            {"params": params, "cache": decoding_state.cache},
            token,
            None,
            positions,
            decode=True,
            mutable=["cache"],
        )
        return jnp.squeeze(logits, axis=1), variables["cache"]
