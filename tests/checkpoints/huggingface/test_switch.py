"""Switch Transformers in Hugging Face's format: read, pruned and written, and loaded there.

What the encoder-decoder computes is compared in tests/models/test_encoder_decoder.py, on the same
parameters.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from uncurl_jax.checkpoints.convert import export_checkpoint, import_checkpoint
from uncurl_jax.checkpoints.huggingface import switch
from uncurl_jax.checkpoints.layout import fingerprint, open_reader, resolve
from uncurl_jax.checkpoints.model import load_model
from uncurl_jax.checkpoints.transform import prune_checkpoint
from uncurl_jax.cli import main
from uncurl_jax.config import ModelConfig
from uncurl_jax.data import synthetic
from uncurl_jax.errors import InputError
from uncurl_jax.evaluation.generation import generate
from uncurl_jax.models import architecture


def load_module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HERE = Path(__file__).parent
tiny = load_module(HERE / "conftest.py")
reference = load_module(HERE.parents[1] / "models" / "switch_reference.py")

RELU: ModelConfig = reference.RELU
PARAMS: dict[str, np.ndarray] = reference.random_params(RELU)
TENSORS: dict[str, np.ndarray] = reference.hugging_face_tensors(RELU, PARAMS)
# As transformers saves it, and as the checkpoints on the hub have it.
CONFIG = {
    "architectures": ["SwitchTransformersForConditionalGeneration"],
    "d_ff": 14,
    "d_kv": 6,
    "d_model": 20,
    "decoder_start_token_id": 0,
    "dense_act_fn": "relu",
    "dtype": "float32",
    "eos_token_id": 1,
    "expert_capacity": 64,
    "feed_forward_proj": "relu",
    "is_encoder_decoder": True,
    "is_gated_act": False,
    "layer_norm_epsilon": 1e-3,
    "model_type": "switch_transformers",
    "n_positions": 24,
    "num_decoder_layers": 4,
    "num_experts": 4,
    "num_heads": 4,
    "num_layers": 4,
    "num_selected_experts": 1,
    "num_sparse_decoder_layers": 2,
    "num_sparse_encoder_layers": 2,
    "pad_token_id": 0,
    "relative_attention_max_distance": 14,
    "relative_attention_num_buckets": 8,
    "router_bias": False,
    "router_dtype": "float32",
    "tie_word_embeddings": True,
    "vocab_size": 53,
}


@pytest.fixture
def make_switch(tmp_path) -> Callable[..., Path]:
    """Returns make_switch(tensors={}, num_shards=1, **changes of config.json): a directory."""

    def make(tensors: Any = None, num_shards: int = 1, **changes: Any) -> Path:
        path = tmp_path / "hf"
        config = {k: v for k, v in (CONFIG | changes).items() if v is not None}
        all_tensors = TENSORS | (tensors or {})
        tiny.write_directory(path, config, all_tensors, num_shards=num_shards)
        tiny.write_tokenizer(path, num_words=40)
        return path

    return make


def arrays_of(path: Any) -> dict[str, np.ndarray]:
    reader = open_reader(path)
    return {name: reader.read(f"target/{name}") for name in reader.parameters()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_tensor_becomes_its_parameter(num_shards: int, make_switch, tmp_path):
    source = make_switch(num_shards=num_shards)
    assert_same(arrays_of(f"hf:{source}"), PARAMS)
    import_checkpoint(source, tmp_path / "C")
    assert_same(arrays_of(tmp_path / "C"), PARAMS)
    trained = {"router_jitter", "auxiliary_loss_weight", "router_z_loss_weight"}
    found = resolve(tmp_path / "C").model_config()
    for field in dataclasses.fields(ModelConfig):
        if field.name not in trained:
            assert getattr(found, field.name) == getattr(RELU, field.name), field.name


def test_import_and_export_give_the_same_tensors(make_switch, tmp_path):
    source = make_switch()
    import_checkpoint(source, tmp_path / "C")
    export_checkpoint(tmp_path / "C", tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), TENSORS)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG
    # One that began as ours, without a config.json.
    summary = export_checkpoint(f"hf:{source}", tmp_path / "many", max_shard_bytes=6000)
    assert summary["model_type"] == "switch_transformers"
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert_same(arrays_of(f"hf:{tmp_path / 'many'}"), PARAMS)


def test_our_own_encoder_decoder_is_written_as_a_switch_transformer(save_checkpoint, tmp_path):
    save_checkpoint(tmp_path / "C", RELU, params=reference.nested(PARAMS))
    export_checkpoint(tmp_path / "C", tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), TENSORS)
    found = resolve(f"hf:{tmp_path / 'out'}").model_config()
    assert dataclasses.replace(found, dtype=RELU.dtype) == RELU


def test_copies_of_the_embedding_are_left_out_if_they_are_copies(make_switch):
    names = ("lm_head.weight", *switch.ALIASES)
    copies = {name: TENSORS["shared.weight"] for name in names}
    assert_same(arrays_of(f"hf:{make_switch(copies)}"), PARAMS)
    for name in names:
        other = copies | {name: TENSORS["shared.weight"] + 1}
        with pytest.raises(InputError, match=f"{name} .*the token embedding"):
            open_reader(f"hf:{make_switch(other)}")


def test_an_output_projection_of_its_own_is_read_and_not_written(make_switch, tmp_path):
    head = {"lm_head.weight": TENSORS["shared.weight"] * 2}
    source = make_switch(head, tie_word_embeddings=False)
    config = resolve(f"hf:{source}").model_config()
    assert not (config.has_tied_embeddings or config.has_scaled_logits)
    np.testing.assert_array_equal(
        arrays_of(f"hf:{source}")["output_embedder/embedding"], head["lm_head.weight"]
    )
    with pytest.raises(InputError, match="got a model with an output projection of its own: keep"):
        export_checkpoint(f"hf:{source}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("num_layers", "num_sparse", "expected"),
    [
        (12, 6, [1, 3, 5, 7, 9, 11]),
        (12, 3, [1, 5, 9]),
        (4, 4, [0, 1, 2, 3]),
        (5, 2, [1, 3]),
        (1, 1, [0]),
        # Zero sparse layers leave one (transformers' own comment says so for one layer).
        (6, 0, [1]),
    ],
)
def test_layers_with_experts_stand_where_transformers_has_them(num_layers, num_sparse, expected):
    found = switch._is_sparse(num_layers, num_sparse)
    assert [layer for layer, flag in enumerate(found) if flag] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_bias": True}, "router_bias must be False or None, got True"),
        ({"router_dtype": "bfloat16"}, "router_dtype must be 'float32' or None"),
        ({"num_selected_experts": 2}, "num_selected_experts must be 1 or None, got 2"),
        ({"decoder_start_token_id": 2}, "decoder_start_token_id must be 0 or None, got 2"),
        ({"dense_act_fn": "gelu"}, "dense_act_fn must be relu or gelu_new or silu, got 'gelu'"),
        ({"is_gated_act": True}, "is_gated_act must be False or None, got True"),
        ({"num_sparse_encoder_layers": 5}, "num_sparse_encoder_layers must be from 0 to 4"),
        ({"num_sparse_decoder_layers": 4}, "config.json and the weights must agree"),
        ({"relative_attention_num_buckets": 6}, "relative_buckets must be a positive multiple"),
        ({"eos_token_id": 0}, "encoder_end_id must be an id of the vocabulary other than 0"),
    ],
)
def test_what_cannot_be_read_is_refused(changes, message, make_switch, tmp_path):
    source = make_switch(**changes)
    with pytest.raises(InputError, match=message):
        import_checkpoint(source, tmp_path / "C")
    assert not (tmp_path / "C").exists()


def test_the_longest_sequence_may_be_chosen(make_switch, tmp_path):
    import_checkpoint(make_switch(), tmp_path / "C", max_length=1000)
    assert resolve(tmp_path / "C").model_config().max_length == 1000
    assert resolve(f"hf:{make_switch(n_positions=None)}").model_config().max_length == 512


def merging_plan(plan_for, source: str, encoder: int, decoder: int) -> Any:
    layers = {
        layer: [z % (encoder if layer < 4 else decoder) for z in range(4)] for layer in (1, 3, 5, 7)
    }
    return plan_for(source, layers)


def test_a_pruned_model_is_written_with_one_count(make_switch, plan_for, tmp_path):
    source = f"hf:{make_switch()}"
    plan = merging_plan(plan_for, source, 3, 3)
    prune_checkpoint(source, plan, tmp_path / "small", file_format="hf")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config == CONFIG | {"num_experts": 3}
    import_checkpoint(tmp_path / "hf", tmp_path / "C")
    prune_checkpoint(tmp_path / "C", plan, tmp_path / "P")
    pruned = arrays_of(tmp_path / "P")
    assert_same(arrays_of(f"hf:{tmp_path / 'small'}"), pruned)
    assert pruned["layers_5/moe/experts/wi"].shape == (3, 20, 14)
    # Expert 0 is merged of two, expert 1 is left as it was.
    np.testing.assert_array_equal(
        pruned["layers_5/moe/experts/wo"][1], PARAMS["layers_5/moe/experts/wo"][1]
    )


def test_unequal_counts_stay_in_our_format(make_switch, plan_for, tmp_path):
    source = f"hf:{make_switch()}"
    plan = merging_plan(plan_for, source, 3, 2)
    message = r"num_experts of config\.json is one number .* got num_experts \[0, 3, 0, 3, 0, 2"
    with pytest.raises(InputError, match=message):
        prune_checkpoint(source, plan, tmp_path / "small", file_format="hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    prune_checkpoint(source, plan, tmp_path / "P")
    with pytest.raises(InputError, match=message):
        export_checkpoint(tmp_path / "P", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["P", "hf"]


JOB = (
    "cache --task synthetic_choice --data_dir data --vocabulary hf --max_length 24 --out cache",
    "calibrate --checkpoint hf:hf --task cache --out s.npz",
    "plan --statistics s.npz --num_experts 2 --out plan.json",
    "prune --checkpoint hf:hf --plan plan.json --format hf --out small",
    "verify hf:small",
    "evaluate --checkpoint hf:small --task cache --out metrics.json",
)


def test_the_job_from_directory_to_directory(make_switch, tmp_path, monkeypatch, capsys):
    make_switch(eos_token_id=2)
    synthetic.write_tasks(tmp_path / "data", num_train=9, num_validation=3, num_documents=2)
    monkeypatch.chdir(tmp_path)
    for command in JOB:
        assert main(command.split()) == 0, (command, capsys.readouterr().err)
    assert resolve("hf:small").model_config().num_experts == (0, 2) * 4
    scored = json.loads((tmp_path / "metrics.json").read_text())
    assert scored["checkpoint"]["fingerprint"] == fingerprint("hf:small")


# Live.

_IS_INSTALLED = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
live = pytest.mark.skipif(not _IS_INSTALLED, reason="needs torch and transformers: make test-hf")


def theirs(directory: Path) -> Any:
    """The model as transformers loads it, with nothing left over."""
    with warnings.catch_warnings():
        # Of their own imports.
        warnings.simplefilter("ignore")
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import (  # pyright: ignore[reportMissingImports]
            SwitchTransformersForConditionalGeneration,
        )

    model, found = SwitchTransformersForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not found[problem], found
    return model.eval()


def assert_same_model(directory: Path) -> None:
    """Logits and greedy answers of a directory are those that transformers makes of it."""
    import torch  # pyright: ignore[reportMissingImports]

    model, expected = load_model(f"hf:{directory}"), theirs(directory)
    given = reference.make_inputs(RELU)
    prompts = [[*prompt, 1] for prompt in reference.prompts(given)[1:]]
    with torch.no_grad():
        logits = expected(
            input_ids=torch.tensor(given["prompt"], dtype=torch.long),
            attention_mask=torch.tensor(given["prompt_mask"], dtype=torch.long),
            decoder_input_ids=torch.tensor(given["inputs"], dtype=torch.long),
        ).logits.numpy()
        answers = [
            expected.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=8, eos_token_id=1
            )[0, 1:].tolist()
            for prompt in prompts
        ]
    found = architecture.build(model.config).apply(
        {"params": model.params},
        given["inputs"],
        encoder_inputs=given["prompt"],
        encoder_mask=given["prompt_mask"],
    )
    mask = given["mask"]
    np.testing.assert_allclose(np.asarray(found)[mask], logits[mask], rtol=0, atol=1e-4)
    made = generate(model, [prompt[:-1] for prompt in prompts], max_new_tokens=8, eos_id=1)
    assert made == [answer[: answer.index(1)] if 1 in answer else answer for answer in answers]


@live
@pytest.mark.hf
def test_what_transformers_saves_is_read_and_what_we_prune_it_loads(
    make_switch, plan_for, tmp_path
):
    source = make_switch()
    model = theirs(source)
    for size in ("5GB", "8KB"):
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        assert_same(arrays_of(f"hf:{tmp_path / size}"), PARAMS)
    assert len(list((tmp_path / "8KB").glob("*.safetensors"))) > 2
    assert_same_model(source)
    plan = merging_plan(plan_for, f"hf:{source}", 2, 2)
    prune_checkpoint(f"hf:{source}", plan, tmp_path / "small", file_format="hf")
    assert_same_model(tmp_path / "small")
