"""The decoder as a T5X model: the same losses, steps, scores and text as our own runner's."""

# T5X is on no package index, so the type checker may not find it.
# pyright: reportMissingImports=false

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import PartitionSpec

from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.model import LoadedModel
from uncurl_jax.config import OptimizerConfig, TrainConfig
from uncurl_jax.data.seqio_vocabulary import seqio_vocabulary
from uncurl_jax.data.vocabulary import ByteVocabulary
from uncurl_jax.errors import InputError
from uncurl_jax.evaluation import generation, rank_classification
from uncurl_jax.models.decoder import MOE_METRICS, Decoder
from uncurl_jax.partitioning import place_batch, replicated
from uncurl_jax.training import train_step

pytestmark = [
    pytest.mark.t5x,
    pytest.mark.usefixtures("t5x"),
    # jax.experimental.pjit and friends, which T5X uses and jax is about to take away.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
TOLERANCE = 1e-5
NUM_STEPS = 10


@pytest.fixture
def make_model(config, optimizer_config):
    """Returns make_model(expert_partitions=None, **config fields)."""
    from uncurl_jax.t5x_adapter import optimizer
    from uncurl_jax.t5x_adapter.model import SmoeDecoderModel
    from uncurl_jax.t5x_adapter.partitioning import SmoePartitioner

    def make(expert_partitions: int | None = None, **fields):
        partitioner = None if expert_partitions is None else SmoePartitioner(expert_partitions)
        return SmoeDecoderModel(
            dataclasses.replace(config, **fields),
            seqio_vocabulary(ByteVocabulary()),
            optimizer.adamw(optimizer_config, NUM_STEPS),
            partitioner,
        )

    return make


def train_with_t5x(model, partitioner, params, batches):
    """Returns the last parameters and the metrics of each step, by T5X's plain Trainer."""
    from t5x import train_state as train_state_lib
    from t5x import trainer, utils

    initializer = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={name: array.shape for name, array in batches[0].items()},
        partitioner=partitioner,
    )
    axes = initializer.train_state_axes
    fresh = initializer.from_scratch(jax.random.PRNGKey(0))
    assert isinstance(fresh, train_state_lib.FlaxOptimTrainState)
    placed = jax.tree.map(
        lambda old, new: jax.device_put(new, old.sharding), fresh.params.unfreeze(), params
    )
    loop = trainer.Trainer(
        model,
        fresh.replace_params(type(fresh.params)(placed)),
        partitioner,
        eval_names=[],
        summary_dir=None,
        train_state_axes=axes,
        rng=jax.random.PRNGKey(1),
        learning_rate_fn=lambda step: 0.0,
        num_microbatches=None,
    )
    state, found = loop.train_state, []
    for batch in batches:
        state, metrics = loop._partitioned_train_step(state, batch)
        found.append(metrics)
    loop.close()
    return jax.tree.map(np.asarray, state.params.unfreeze()), found


def named(tree) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def is_spec(leaf) -> bool:
    return isinstance(leaf, PartitionSpec)


def per_step(metric) -> float:
    return float(metric.total / metric.steps)


@pytest.mark.parametrize("expert_partitions", [1, 4])
def test_steps_from_the_same_state_give_the_loss_and_parameters_of_our_runner(
    expert_partitions, make_model, make_params, make_batch, as_features, config, optimizer_config
):
    """On eight devices, five experts over one or over four of them."""
    from uncurl_jax.t5x_adapter.partitioning import SmoePartitioner

    partitioner = SmoePartitioner(expert_partitions)
    assert partitioner.mesh.size == 8
    params = make_params(config)
    batches = [make_batch(seed) for seed in range(2)]
    theirs, metrics = train_with_t5x(
        make_model(expert_partitions), partitioner, params, [as_features(b) for b in batches]
    )

    settings = TrainConfig(
        optimizer=optimizer_config, num_steps=NUM_STEPS, batch_size=8, model=config
    )
    mesh = partitioner.mesh
    step = train_step.make_train_step(config, settings, mesh)
    placed = jax.tree.map(lambda array: jax.device_put(array, replicated(mesh)), params)
    state = train_step.new_state(placed, settings)
    for batch, values in zip(batches, metrics, strict=True):
        state, ours = step(state, place_batch(batch, mesh), 0)
        assert per_step(values["loss"]) == pytest.approx(float(ours["loss"]), rel=TOLERANCE)
        assert per_step(values["cross_ent_loss"]) == pytest.approx(
            float(ours["cross_entropy"]), rel=TOLERANCE
        )
        for name in MOE_METRICS:
            reported = per_step(values[f"experts/{name}"])
            assert reported == pytest.approx(float(ours[name]), rel=TOLERANCE), name
        assert float(ours["router_z_loss"]) > 0 and float(ours["auxiliary_loss"]) > 0
    names, before, after = named(params), named(state.params), named(theirs)
    assert names.keys() == before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_allclose(array, after[name], rtol=0, atol=TOLERANCE, err_msg=name)
    moved = [name for name in names if np.abs(names[name] - after[name]).max() > 1e-4]
    assert moved == list(names)


def test_an_evaluation_step_uses_the_evaluation_capacity(
    make_model, make_params, make_batch, as_features, config
):
    model = make_model(capacity_factor=None, eval_capacity_factor=0.5)
    params, batch = make_params(config), as_features(make_batch())
    _, evaluated = jax.jit(model.eval_fn)(params, batch)
    _, trained = jax.jit(model.loss_fn)(params, batch, jax.random.PRNGKey(0))
    name = "experts/fraction_tokens_left_behind"
    assert per_step(evaluated[name]) > 0.1 and per_step(trained[name]) == 0.0


def test_scores_are_the_log_likelihoods_of_rank_classification(
    make_model, make_params, make_batch, as_features, config
):
    params, batch = make_params(config), make_batch()
    ours = rank_classification.compiled_scores(config, None, None)(params, batch)
    theirs = make_model().score_batch(params, as_features(batch))
    np.testing.assert_allclose(theirs, ours["log_likelihood"], rtol=TOLERANCE)


def test_prediction_with_the_cache_continues_prompts_as_our_generation_does(
    make_model, make_params, config
):
    params = make_params(config)
    prompts = [[5, 9, 77], [200, 31, 8, 8, 101], [3]]
    inputs = np.zeros((3, config.max_length), np.int32)
    causal = np.zeros_like(inputs)
    for row, prompt in enumerate(prompts):
        inputs[row, 1 : len(prompt) + 1] = prompt
        causal[row, : len(prompt) + 1] = 1
    # Targets of an evaluation follow the prompt; prediction must not look at them.
    following = np.where(causal == 1, inputs, 250)
    batch = {"decoder_input_tokens": following, "decoder_causal_attention": causal}
    predicted = np.asarray(jax.jit(make_model().predict_batch)(params, batch))

    where = layout.CheckpointPath(epath.Path("nowhere"), 0)
    loaded = LoadedModel(config, jax.tree.map(jnp.asarray, params), {}, where, None)
    ours = generation.generate(loaded, prompts, max_new_tokens=8, eos_id=1)
    assert [row[:8].tolist() for row in predicted] == ours
    assert len({tuple(row) for row in ours}) == 3


def test_logical_axes_become_the_collection_that_t5x_knows(make_model, config):
    from flax.linen import partitioning as flax_partitioning

    variables = make_model().get_initial_variables(jax.random.PRNGKey(0), {})
    assert set(variables) == {"params", "params_axes"}
    names = flax_partitioning.get_axis_names(variables["params_axes"]).unfreeze()
    boxed = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    expected = nn.get_partition_spec(boxed["params"])
    assert jax.tree.map(tuple, names, is_leaf=is_spec) == jax.tree.map(
        tuple, expected, is_leaf=is_spec
    )
    assert tuple(names["layers_0"]["moe"]["experts"]["wi"]) == ("expert", "embed", "expert_mlp")


def test_experts_that_do_not_divide_the_mesh_are_divided_elsewhere(config):
    from uncurl_jax.t5x_adapter import optimizer
    from uncurl_jax.t5x_adapter.model import SmoeDecoderModel
    from uncurl_jax.t5x_adapter.partitioning import SmoePartitioner

    partitioner = SmoePartitioner(expert_partitions=2, model_partitions=2)
    model = SmoeDecoderModel(
        dataclasses.replace(config, num_experts=(5, 4)),
        seqio_vocabulary(ByteVocabulary()),
        optimizer.adamw(OptimizerConfig(peak_learning_rate=1.0), 1),
        partitioner,
    )
    from t5x import utils

    initializer = utils.TrainStateInitializer(
        model.optimizer_def, model.get_initial_variables, {}, partitioner
    )
    layers = initializer.train_state_axes.params
    assert tuple(layers["layers_0"]["moe"]["experts"]["wi"]) == (None, "expert", "model")
    assert tuple(layers["layers_1"]["moe"]["experts"]["wi"]) == ("expert", None, "model")
    (moments,) = [
        state
        for state in jax.tree.leaves(
            initializer.train_state_axes.param_states, is_leaf=lambda x: hasattr(x, "mu")
        )
        if hasattr(state, "mu")
    ]
    assert (
        moments.mu["layers_0"]["moe"]["experts"]["wi"]
        == (layers["layers_0"]["moe"]["experts"]["wi"])
    )
    assert partitioner.get_data_layout(8).num_shards == 1
    assert tuple(partitioner.data_partition_spec) == (("data", "expert"),)


def test_a_partition_count_that_does_not_divide_the_devices_is_refused():
    from uncurl_jax.t5x_adapter.partitioning import SmoePartitioner

    with pytest.raises(InputError, match="must divide the number of devices, got 3"):
        SmoePartitioner(expert_partitions=3)


def test_packed_rows_and_small_vocabularies_are_refused(
    make_model, make_params, make_batch, as_features, config
):
    batch = as_features(make_batch())
    packed = {**batch, "decoder_segment_ids": batch["decoder_target_tokens"]}
    with pytest.raises(ValueError, match=r"must not be packed: set DatasetConfig\.pack = False"):
        make_model().loss_fn(make_params(config), packed, None)
    with pytest.raises(InputError, match="at least the vocabulary's size, got 200 for 259"):
        make_model(vocab_size=200)


def test_a_model_with_an_encoder_is_refused(make_model):
    with pytest.raises(InputError, match="T5X runs this package's decoders, got a model with an"):
        make_model(num_experts=(5, 0), num_encoder_layers=1, position_embedding="relative")
