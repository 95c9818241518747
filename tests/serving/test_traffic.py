"""Statistics of live traffic against those of calibration, and drift of real routers."""

from __future__ import annotations

import numpy as np
import pytest

from uncurl_jax.data import synthetic
from uncurl_jax.data.vocabulary import ByteVocabulary
from uncurl_jax.errors import InputError
from uncurl_jax.pruning.statistics import RouterStatistics, merge_statistics
from uncurl_jax.serving.settings import ServeConfig
from uncurl_jax.serving.traffic import make_streams
from uncurl_jax.serving.worker import Reading

FIELDS = ("tokens", "gram", "logit_sum", "selected", "gate_mass", "prob_mass", "coactivation",
          "routed_prob")  # fmt: skip


def read(serving, rows, asked="base"):
    """Lets the base model read rows of ids, as the shadow of `asked`."""

    async def submit():
        # Not more at once than may wait.
        for start in range(0, len(rows), 50):
            part = rows[start : start + 50]
            jobs = [serving.service.submit("base", Reading([0, *row], asked)) for row in part]
            for job in jobs:
                await job.result

    serving.client.portal.call(submit)
    serving.wait_until_idle()


def test_live_statistics_are_those_of_calibration_on_the_same_rows(serve, made):
    train = made.train
    # Without the last id, an end of text, which is predicted and not read.
    rows = [
        train.tokens[train.offsets[row] : train.offsets[row + 1] - 1].tolist()
        for row in np.flatnonzero(train.is_target)
    ]
    with serve() as serving:
        read(serving, rows)
        live = serving.service.streams["base"].statistics()
    for layer, expected in made.statistics.layers.items():
        for name in FIELDS:
            np.testing.assert_allclose(
                getattr(live.layers[layer], name),
                getattr(expected, name),
                rtol=1e-4,
                atol=1e-3,
                err_msg=f"{name} of layer {layer}",
            )
    for name in ("checkpoint_hash", "num_experts", "vocabulary_hash", "num_selected_experts"):
        assert live.manifest[name] == made.statistics.manifest[name]


def test_completions_count_what_was_read_and_no_filling(serve):
    with serve() as serving:
        body = {"model": "base", "temperature": 0, "max_tokens": 5}
        made_tokens = [
            serving.post("/v1/completions", prompt=prompt, **body).json()["usage"]
            for prompt in ("abc", ["a", "bcde"])
        ]
        serving.wait_until_idle()
        stream = serving.service.streams["base"]
        # Of each row its beginning, the prompt, and what was made but for the last token.
        ended = [usage["completion_tokens"] for usage in made_tokens]
        assert ended == [5, 10], "a row ended early; choose other prompts"
        assert stream.tokens == (1 + 3 + 4) + (1 + 1 + 4) + (1 + 4 + 4)
        assert stream.drift().requests == pytest.approx(3, rel=0.01)


def test_a_classification_counts_the_answer_alone(serve):
    with serve() as serving:
        body = {"model": "base", "prompt": "abc", "options": ["d", "efgh", "i", "j", "k", "l"]}
        answer = serving.post("/classify", **body).json()
        serving.wait_until_idle()
        # Six options in batches of four: one row is counted, without the end of text.
        assert serving.service.streams["base"].tokens == 1 + 3 + 1 + len(answer["text"])


def test_looking_at_experts_is_not_traffic(serve):
    with serve() as serving:
        assert serving.post("/experts", prompt="abc").status_code == 200
        assert serving.post("/experts", prompt="abc", models=["topic"]).status_code == 200
        serving.wait_until_idle()
        assert [stream.tokens for stream in serving.service.streams.values()] == [0, 0]


def test_a_shadow_reads_a_part_of_the_requests_of_others(serve):
    with serve(shadow="base", shadow_fraction=0.5) as serving:
        assert list(serving.service.streams) == ["base", "topic", "base@topic"]
        for number in range(60):
            serving.post("/classify", model="topic", prompt=f"number {number:02}")
        serving.post("/classify", model="base", prompt="x", options=["y", "z"])
        serving.wait_until_idle()
        own, asked, shadow = serving.service.streams.values()
        assert own.drift().requests == pytest.approx(1)
        assert asked.drift().requests == pytest.approx(60, rel=0.01)
        # Five standard deviations of a binomial.
        assert 30 - 5 * 15**0.5 < shadow.drift().requests < 30 + 5 * 15**0.5
        text = serving.client.get("/metrics").text
        assert f'outcome="read"}} {round(shadow.drift().requests)}.0' in text


def test_a_shadow_without_idle_time_skips_and_says_so(serve):
    with serve(shadow="base", shadow_fraction=1.0, shadow_queue=1) as serving:
        body = {"model": "topic", "prompt": ["a", "b", "c"], "max_tokens": 1}
        serving.post("/v1/completions", **body)
        serving.wait_until_idle()
        text = serving.client.get("/metrics").text
        assert 'uncurl_shadowed_rows_total{outcome="skipped"} 2.0' in text
        assert serving.service.streams["base@topic"].drift().requests == 1


def test_traffic_of_the_task_is_no_drift_and_of_another_task_is(serve, made):
    generator = np.random.default_rng(0)
    with serve({"base": made.statistics}) as serving:
        stream = serving.service.streams["base"]
        assert stream.drift().verdict == "too few requests"
        read(serving, _rows(generator, 100))
        assert stream.drift().verdict == "no drift"
        answer = serving.client.get("/drift").json()["streams"]["base"]
        assert answer["verdict"] == "no drift" and len(answer["layers"]) == 2
        assert answer["layers"][0]["live"] == pytest.approx(
            answer["layers"][0]["reference"], abs=0.1
        )
        digits = [[3 + byte for byte in f"{n * n} + {n} = ".encode()] for n in range(100)]
        stream.reset()
        read(serving, digits)
        everything = serving.client.get("/drift").json()
        answer, floor = everything["streams"]["base"], everything["floor_bits"]
        assert answer["verdict"] == "drift"
        worst = max(answer["layers"], key=lambda layer: layer["selections"]["distance_bits"])
        found = worst["selections"]
        assert found["distance_bits"] > max(found["threshold_bits"], floor)
        metrics = serving.client.get("/metrics").text
        assert f'uncurl_drifting{{layer="{worst["layer"]}",stream="base"}} 1.0' in metrics


def _rows(generator, count):
    """New rows of the task that the reference was calibrated on, prompt and right answer."""
    vocabulary = ByteVocabulary()
    rows = []
    for _ in range(count):
        domain = synthetic.DOMAINS[int(generator.integers(len(synthetic.DOMAINS)))]

        def word(words):
            return words[int(generator.integers(len(words)))]

        sentences = [
            f"the {word(domain.adjectives)} {word(domain.nouns)} {word(domain.verbs)} the "
            f"{word(domain.objects)}."
            for _ in range(2)
        ]
        rows.append(vocabulary.encode(f"{' '.join(sentences)} Topic: {domain.name}"))
    return rows


def test_statistics_of_two_servers_can_be_merged(serve, tmp_path):
    files = []
    for text in ("one", "another"):
        with serve() as serving:
            read(serving, [[3 + byte for byte in text.encode()]])
            files.append(tmp_path / f"{text}.npz")
            serving.service.streams["base"].statistics().save(files[-1])
    assert merge_statistics(files).tokens == (1 + 3) + (1 + 7)


@pytest.mark.parametrize(
    ("references", "settings", "message"),
    [
        (("rte",), {}, "--statistics must name a stream with statistics, got 'rte': there are"),
        (("topic",), {}, "must be statistics of the checkpoint that topic was exported from"),
        ((), {"shadow": "large", "shadow_fraction": 0.5}, "--shadow must be a model of the"),
    ],
)
def test_references_and_shadows_must_fit_the_artifact(
    artifact, made, references, settings, message
):
    given: dict[str, RouterStatistics] = {name: made.statistics for name in references}
    with pytest.raises(InputError) as refused:
        make_streams(artifact, ServeConfig(**settings), given)
    assert message in str(refused.value)
