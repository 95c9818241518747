"""How a SeqIO task's `inputs` and `targets` become rows of our decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf


class _CappedPrefixConverter(seqio.PrefixLMFeatureConverter):
    """Inputs and targets end to end, in rows of at most `row_length` tokens.

    SeqIO's own rows have room for the longest inputs and the longest targets together, though no
    row may hold both: more positions than the model has.
    """

    def __init__(self, row_length: int | None, **kwargs: Any):
        super().__init__(**kwargs)
        self._row_length = row_length

    def _cap(self, lengths: Mapping[str, int]) -> dict[str, int]:
        limit = self._row_length
        return {name: n if limit is None else min(n, limit) for name, n in lengths.items()}

    def _concat_task_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Any:
        return self._cap(super()._concat_task_feature_lengths(task_feature_lengths))

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Any:
        """Returns the length of each of the model's features."""
        return self._cap(super().get_model_feature_lengths(task_feature_lengths))

    def _concat_and_add_masks(self, features: Mapping[str, Any]) -> Any:
        row = super()._concat_and_add_masks(features)
        if self._row_length is None:
            return row
        # SeqIO would cut what is too long from the right, where the targets are.
        check = tf.debugging.assert_less_equal(
            tf.size(row["targets"]),
            self._row_length,
            "A row, inputs and targets together, must fit max_length of the model: lower "
            "TASK_FEATURE_LENGTHS of its inputs.",
        )
        with tf.control_dependencies([check]):
            return {**row, "targets": tf.identity(row["targets"])}


class RowConverter(seqio.DecoderFeatureConverter):
    """SeqIO's converter for decoders, with rows that are never longer than the model reads.

    Tasks with `inputs` and `targets` give rows of both, loss on the targets alone; tasks with
    `targets` alone give rows of these. The model's features are those of
    `seqio.DecoderFeatureConverter`; our `token_cache.Batch` has the same values: inputs are
    decoder_input_tokens, targets decoder_target_tokens, weights decoder_loss_weights, and the mask
    is where a target is not padding.
    """

    def __init__(self, row_length: int | None = None, pack: bool = False, **kwargs: Any):
        """Takes the arguments of `seqio.DecoderFeatureConverter`, and the limit.

        Raises:
          ValueError: If rows are to be packed: our attention would look from one into the other.
        """
        if pack:
            raise ValueError(
                "Rows must not be packed, got DatasetConfig.pack = True: set it to False, and pack "
                "plain text by the length of the task's rows."
            )
        super().__init__(pack=False, **kwargs)
        self.prefixlm_feature_converter = _CappedPrefixConverter(row_length, pack=False, **kwargs)
