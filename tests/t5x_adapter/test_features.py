from __future__ import annotations

import pytest
import seqio
import tensorflow as tf

from uncurl_jax.t5x_adapter.features import RowConverter

FEATURES = ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")


def rows(*pairs: tuple[list[int], list[int]]) -> tf.data.Dataset:
    def examples():
        for inputs, targets in pairs:
            yield {"inputs": inputs, "targets": targets}

    spec = tf.TensorSpec([None], tf.int32)
    return tf.data.Dataset.from_generator(
        examples, output_signature={"inputs": spec, "targets": spec}
    )


def converted(converter, dataset, **lengths: int) -> list[dict[str, list[int]]]:
    found = converter(dataset, lengths).as_numpy_iterator()
    return [{name: row[name].tolist() for name in FEATURES} for row in found]


def test_a_row_is_inputs_and_targets_with_loss_on_the_targets():
    (row,) = converted(RowConverter(6), rows(([9, 4, 6], [3, 1])), inputs=6, targets=4)
    assert row == {
        "decoder_input_tokens": [0, 9, 4, 6, 3, 1],
        "decoder_target_tokens": [9, 4, 6, 3, 1, 0],
        "decoder_loss_weights": [0, 0, 0, 1, 1, 0],
    }


def test_without_a_limit_rows_are_those_of_seqio():
    def dataset():
        return rows(([9, 4, 6], [3, 1]), ([7], [5, 5, 1]))

    ours = converted(RowConverter(), dataset(), inputs=5, targets=4)
    theirs = converted(seqio.DecoderFeatureConverter(pack=False), dataset(), inputs=5, targets=4)
    assert ours == theirs
    assert len(ours[0]["decoder_input_tokens"]) == 9


def test_a_limit_above_the_rows_of_seqio_changes_nothing():
    (row,) = converted(RowConverter(99), rows(([9], [1])), inputs=2, targets=2)
    assert len(row["decoder_target_tokens"]) == 4


def test_a_row_that_would_lose_targets_is_refused():
    with pytest.raises(tf.errors.InvalidArgumentError, match="must fit max_length of the model"):
        converted(RowConverter(4), rows(([9, 4, 6], [3, 1])), inputs=4, targets=4)


def test_targets_alone_are_rows_of_text():
    dataset = rows(([], [5, 6, 7])).map(lambda row: {"targets": row["targets"]})
    (row,) = converted(RowConverter(4), dataset, targets=4)
    assert row["decoder_input_tokens"] == [0, 5, 6, 7]
    assert row["decoder_target_tokens"] == [5, 6, 7, 0]
    assert row["decoder_loss_weights"] == [1, 1, 1, 0]


def test_packing_is_refused():
    with pytest.raises(ValueError, match=r"must not be packed, got DatasetConfig\.pack = True"):
        RowConverter(4, pack=True)
