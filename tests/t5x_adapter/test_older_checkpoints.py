"""Steps that T5X's own older checkpointer wrote are adopted value by value."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.adopt import adopt_checkpoint
from uncurl_jax.data.vocabulary import ByteVocabulary

pytestmark = [pytest.mark.t5x, pytest.mark.usefixtures("t5x")]

# In a process of its own: T5X leaves event loops open, of which Python warns.
_WRITE = """
import json, sys
from uncurl_jax.t5x_adapter import availability
availability.make_importable()
import jax, numpy as np
from t5x import checkpoints, utils
from uncurl_jax.config import ModelConfig, OptimizerConfig
from uncurl_jax.data.seqio_vocabulary import seqio_vocabulary
from uncurl_jax.data.vocabulary import ByteVocabulary
from uncurl_jax.t5x_adapter import optimizer
from uncurl_jax.t5x_adapter.model import SmoeDecoderModel
from uncurl_jax.t5x_adapter.partitioning import SmoePartitioner

place, dtype, config = sys.argv[1], sys.argv[2], ModelConfig.from_dict(json.loads(sys.argv[3]))
partitioner = SmoePartitioner()
adamw = optimizer.adamw(OptimizerConfig(peak_learning_rate=1.0), 1)
model = SmoeDecoderModel(config, seqio_vocabulary(ByteVocabulary()), adamw, partitioner)
state = utils.TrainStateInitializer(
    adamw, model.get_initial_variables, {}, partitioner
).from_scratch(jax.random.PRNGKey(0)).replace_step(jax.numpy.int32(12))
checkpoints.Checkpointer(state, partitioner, place + "/old", save_dtype=dtype).save(state)
leaves = jax.tree_util.tree_leaves_with_path(state.params.unfreeze())
names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
np.savez(place + "/params.npz", **{n: np.asarray(a) for n, (_, a) in zip(names, leaves)})
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_t5x_wrote_is_read(dtype, tmp_path, config):
    subprocess.run(
        [sys.executable, "-c", _WRITE, str(tmp_path), dtype, json.dumps(config.to_dict())],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        check=True,
    )
    assert (tmp_path / "old" / "checkpoint_12" / "checkpoint").is_file()
    adopted = adopt_checkpoint(
        tmp_path / "old", config, ByteVocabulary().describe(), out=tmp_path / "new"
    )
    assert adopted.steps == [12]
    reader = layout.StateReader(tmp_path / "new")
    stored = np.dtype(np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    with np.load(tmp_path / "params.npz") as expected:
        assert set(expected) == set(reader.parameters())
        for name, array in expected.items():
            found = reader.read(f"target/{name}")
            assert found.dtype == stored
            np.testing.assert_array_equal(found, array.astype(stored))
