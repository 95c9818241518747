"""`uncurl compare` of checkpoints and of what `uncurl evaluate` wrote."""

from __future__ import annotations

from uncurl_jax import artifacts


def test_checkpoints_and_their_metrics_give_the_same_comparison(world, uncurl, tmp_path):
    task = ("--task", world["caches/topic"])
    models = [world["pretrained"], world["finetuned"]]
    done = uncurl("compare", *models, *task, "--out", str(tmp_path / "models.json"))
    assert done.status == 0, done.err
    files = [str(tmp_path / f"metrics{i}.json") for i in range(2)]
    for model, file in zip(models, files, strict=True):
        assert uncurl("evaluate", "--checkpoint", model, *task, "--out", file).status == 0
    done = uncurl("compare", *files, *task, "--out", str(tmp_path / "files.json"))
    assert done.status == 0, done.err
    left, right = (artifacts.read_json(tmp_path / f"{n}.json") for n in ("models", "files"))
    for which in ("a", "b"):
        assert left[which].pop("name") != right[which].pop("name")
    assert left == right
    assert left["num_examples"] == 10 and left["difference"]["interval"] is not None
    flips = {k: v for k, v in left["flips"].items() if k != "mcnemar_p_value"}
    assert sum(flips.values()) == 10
    assert left["a"]["score"] == artifacts.read_json(files[0])["score"]
    assert "turned wrong" in done.err and left["slices"]


def test_what_cannot_be_compared_is_refused(world, refuse, tmp_path):
    out = ("--out", tmp_path / "new.json")
    refuse(
        "A comparison needs a task with options, got synthetic_corpus",
        *("compare", world["pretrained"], world["pruned"], "--task", world["caches/text"], *out),
    )
    refuse(
        "got another task",
        *("compare", world["metrics.json"], world["loss.json"], *out),
    )
