from __future__ import annotations

import pytest

from uncurl_jax.checkpoints.store import CheckpointStore
from uncurl_jax.data.vocabulary import ByteVocabulary
from uncurl_jax.errors import InputError
from uncurl_jax.t5x_adapter import restoring

STATE = {"target": {"w": 1}, "state": {"step": 7, "param_states": {"mu": 2}}}


@pytest.fixture
def checkpoint(tmp_path, config, make_params):
    with CheckpointStore(
        tmp_path / "run",
        model_config=config,
        provenance={},
        vocabulary=ByteVocabulary().describe(),
    ) as store:
        for step in (3, 7):
            store.save(step, make_params(config))
    return tmp_path / "run"


def test_gin_files_take_architecture_and_step_from_the_checkpoint(checkpoint, config):
    assert restoring.model_config(str(checkpoint)) == config
    assert restoring.step_directory(str(checkpoint)) == str(checkpoint / "checkpoint_7")
    earlier = str(checkpoint / "checkpoint_3")
    assert restoring.step_directory(earlier) == earlier
    assert restoring.first_step(earlier) == 3
    assert restoring.last_step(earlier, num_steps=20) == 23


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="must be an existing directory"):
        restoring.model_config(str(tmp_path / "nowhere"))


def test_the_optimizer_begins_afresh_but_goes_on_when_a_run_resumes():
    dropped = restoring.drop_optimizer_state(STATE, {}, is_resuming=False)
    assert dropped == {"target": {"w": 1}, "state": {"step": 7}}
    assert restoring.drop_optimizer_state(STATE, {}, is_resuming=True) == STATE
