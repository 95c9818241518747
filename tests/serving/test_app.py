"""Answers over HTTP against generation and rank classification of the checkpoints."""

from __future__ import annotations

import concurrent.futures
import functools
import io
import itertools
import json
import threading

import jax
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.model import load_model
from uncurl_jax.cli import main
from uncurl_jax.data.vocabulary import ByteVocabulary
from uncurl_jax.evaluation.evaluator import evaluate_model
from uncurl_jax.evaluation.generation import generate
from uncurl_jax.models.decoder import Decoder
from uncurl_jax.pruning.statistics import RouterStatistics
from uncurl_jax.serving import execution

VOCABULARY = ByteVocabulary()
PROMPTS = ["the sailor", "a", "music of the drummer:", "law"]


@pytest.fixture(scope="module")
def base(made):
    return load_model(made.base)


@pytest.fixture(scope="module")
def greedy(base):
    """What the base checkpoint makes of PROMPTS, as text."""
    rows = generate(
        base,
        [VOCABULARY.encode(prompt) for prompt in PROMPTS],
        max_new_tokens=6,
        eos_id=VOCABULARY.eos_id,
    )
    return [VOCABULARY.decode(row) for row in rows]


def completion(serving, prompt, **more):
    body = {"model": "base", "prompt": prompt, "max_tokens": 6, "temperature": 0, **more}
    response = serving.post("/v1/completions", **body)
    assert response.status_code == 200, response.text
    return response.json()


def test_completions_are_those_of_the_checkpoint_in_openais_form(serving, greedy):
    answer = completion(serving, PROMPTS)
    assert [choice["text"] for choice in answer["choices"]] == greedy
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["object"] == "text_completion" and answer["model"] == "base"
    prompt = sum(len(text) for text in PROMPTS)
    made = answer["usage"]["completion_tokens"]
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
    }
    assert {choice["finish_reason"] for choice in answer["choices"]} <= {"length", "stop"}


def test_requests_that_share_a_batch_get_what_they_would_get_alone(serve, greedy):
    """Different lengths, prompts and seeds; a batch is shown to have been shared."""
    cases = [
        {"prompt": prompt, "temperature": temperature, "seed": seed, "max_tokens": 3 + seed}
        for seed, (prompt, temperature) in enumerate(zip(PROMPTS, [0, 1, 1, 0.5], strict=True))
    ]
    with serve(max_wait_ms=5000.0) as serving:
        # Alone, each waits for nobody because four rows fill a batch.
        alone = [
            completion(serving, [case["prompt"]] + ["x"] * 3, **_without(case, "prompt"))
            for case in cases
        ]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda case: completion(serving, **case), cases))
        text = serving.client.get("/metrics").text
    assert [answer["choices"][0]["text"] for answer in together] == [
        answer["choices"][0]["text"] for answer in alone
    ]
    rows = _metric(text, "uncurl_batch_rows_bucket", kind="completion", le="2.0")
    assert rows == 0 and _metric(text, "uncurl_batch_rows_count", kind="completion") == 5


def _without(values, name):
    return {key: value for key, value in values.items() if key != name}


def _metric(text, name, **labels):
    values = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert values, f"no {name} with {labels}"
    return sum(values)


def test_a_stream_says_the_same_text_in_pieces(serving):
    whole = completion(serving, PROMPTS[0], max_tokens=12)["choices"][0]
    body = {"model": "base", "prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0}
    response = serving.post("/v1/completions", stream=True, **body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    pieces = [json.loads(event) for event in events[:-1]]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole["text"]
    reasons = [piece["choices"][0]["finish_reason"] for piece in pieces]
    assert reasons == [None] * (len(pieces) - 1) + [whole["finish_reason"]]
    assert pieces[-1]["usage"]["prompt_tokens"] == len(PROMPTS[0])


def test_a_stop_text_ends_the_completion_before_it(serving, greedy):
    text = max(greedy, key=len)
    prompt = PROMPTS[greedy.index(text)]
    assert len(text) >= 3
    choice = completion(serving, prompt, stop=[text[2], "never"])["choices"][0]
    assert choice == {
        "index": 0,
        "text": text[: text.index(text[2])],
        "logprobs": None,
        "finish_reason": "stop",
    }


def test_a_seed_repeats_its_samples_and_a_task_names_its_model(serving):
    def sample(seed):
        return completion(serving, "music", seed=seed, temperature=1.0)["choices"][0]["text"]

    assert sample(1) == sample(1) != sample(2)
    assert completion(serving, "music", model="synthetic_topic")["model"] == "topic"


def test_classification_is_that_of_uncurl_evaluate(serving, made):
    evaluation = evaluate_model(load_model(made.pruned), made.validation, quiet=True)
    examples = made.validation.examples()
    for example, expected in zip(examples, evaluation.predictions, strict=True):
        response = serving.post("/classify", task="synthetic_topic", prompt=example.prompt)
        answer = response.json()
        assert response.status_code == 200 and answer["model"] == "topic"
        assert answer["choice"] == expected["prediction"]
        assert answer["text"] == example.options[answer["choice"]]
        found = [option["log_likelihood"] for option in answer["options"]]
        np.testing.assert_allclose(found, expected["log_likelihoods"], rtol=1e-5, atol=1e-5)
        probabilities = np.exp(np.asarray(found) - max(found))
        np.testing.assert_allclose(
            [option["probability"] for option in answer["options"]],
            probabilities / probabilities.sum(),
            rtol=1e-9,
        )


def test_length_normalisation_divides_by_the_tokens_of_the_option(serving):
    body = {"model": "base", "prompt": "the cow", "options": ["hay", "long"]}
    plain = serving.post("/classify", **body).json()["options"]
    answer = serving.post("/classify", length_normalized=True, **body).json()
    # A space before it, and the end of text.
    assert [option["num_tokens"] for option in plain] == [5, 6]
    scores = [option["log_likelihood"] / option["num_tokens"] for option in plain]
    assert answer["choice"] == int(np.argmax(scores))
    ratio = answer["options"][0]["probability"] / answer["options"][1]["probability"]
    assert ratio == pytest.approx(np.exp(scores[0] - scores[1]))


def test_fields_of_a_task_make_its_prompt(serving, made):
    example = made.validation.examples()[0]
    file = made.base.parent / "data" / "SyntheticTopic" / "val.jsonl"
    row = json.loads(file.read_text().splitlines()[0])
    row.pop("label")
    by_fields = serving.post("/classify", task="synthetic_topic", fields=row).json()
    assert (
        by_fields == serving.post("/classify", task="synthetic_topic", prompt=example.prompt).json()
    )


def test_experts_are_what_the_routers_of_the_checkpoint_chose(serving, base):
    answer = serving.post("/experts", prompt="music", models=["base", "topic"], max_tokens=3)
    first, second = answer.json()["models"]
    assert (first["model"], second["model"]) == ("base", "topic")
    assert first["tokens"][:6] == ["", *"music"] and first["num_prompt_tokens"] == 6
    ids = [0, *VOCABULARY.encode("music"), *VOCABULARY.encode(first["text"])][
        : len(first["tokens"])
    ]
    observe = jax.jit(
        functools.partial(Decoder(base.config).apply, mutable=["router_observations"])
    )
    _, sown = observe({"params": base.params}, np.asarray([ids], np.int32))
    for traced in first["layers"]:
        layer = sown["router_observations"][f"layers_{traced['layer']}"]["moe"]["observation"][0]
        chosen, gates = jax.device_get((layer["expert_index"], layer["gate"]))
        np.testing.assert_array_equal(traced["experts"], chosen[0])
        np.testing.assert_allclose(traced["gates"], gates[0], atol=1e-4)
    assert {expert for traced in second["layers"] for [expert] in traced["experts"]} <= {0, 1}
    # Each expert of the unpruned model went into one of the two.
    for traced in second["layers"]:
        assert (
            sorted(itertools.chain(*traced["members"])) == [0, 1, 2, 3]
            and len(traced["members"]) == 2
        )
    assert first["layers"][0]["members"] is None


def test_models_are_listed_with_what_sharing_saves(serving, artifact):
    answer = serving.client.get("/v1/models").json()
    assert [model["id"] for model in answer["data"]] == ["base", "topic"]
    topic = answer["data"][1]
    assert topic["task"] == "synthetic_topic" and topic["num_experts"] == [2, 2]
    assert topic["example"]["prompt"] and topic["options"][0] == "sea"
    models = [model.programs for model in artifact.models.values()]
    kept = {id(array): array.nbytes for model in models for array in model.weights.values()}
    assert answer["memory"]["bytes"] == sum(kept.values()) < answer["memory"]["bytes_if_apart"]
    # What is equal in both is one array on the device.
    both = [model.weights["token_embedder/embedding"] for model in models]
    assert both[0] is both[1]


def test_health_and_metrics_can_be_read_by_prometheus(serving):
    assert serving.client.get("/health").json()["status"] == "ready"
    completion(serving, "counted")
    response = serving.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = response.text
    assert _metric(text, "uncurl_ready") == 1
    assert _metric(text, "uncurl_requests_total", endpoint="/v1/completions", status="200") >= 1
    assert _metric(text, "uncurl_tokens_total", model="base", kind="prompt") >= 7
    assert _metric(text, "uncurl_stream_tokens", stream="base") > 0
    assert _metric(text, "uncurl_drift_bits", stream="base", layer="1", of="selections") >= 0


def test_overload_is_refused_and_what_was_accepted_is_answered(serve, monkeypatch):
    go, running = threading.Event(), threading.Event()
    continue_rows = execution.continue_rows

    def slowly(*arguments, **options):
        running.set()
        go.wait()
        continue_rows(*arguments, **options)

    with serve(max_queue=2) as serving, concurrent.futures.ThreadPoolExecutor(3) as pool:
        monkeypatch.setattr(execution, "continue_rows", slowly)
        first = pool.submit(completion, serving, "one")
        running.wait()
        waiting = [pool.submit(completion, serving, text, model="topic") for text in ("two", "3")]
        while serving.service.batcher.num_waiting < 2:
            pass
        refused = serving.post("/v1/completions", model="base", prompt="x")
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json() == {
            "error": {
                "message": "At most 2 requests may wait, got one more: try again later.",
                "type": "overloaded_error",
            }
        }
        go.set()
        assert all(each.result()["choices"] for each in (first, *waiting))


def test_a_request_that_takes_too_long_is_given_up(serve, monkeypatch):
    go, done = threading.Event(), threading.Event()
    continue_rows = execution.continue_rows
    made = []

    def slowly(model, rows, *arguments, **options):
        go.wait()
        continue_rows(model, rows, *arguments, **options)
        made.extend(len(row.generated) for row in rows)
        done.set()

    with serve(request_timeout_seconds=0.2) as serving:
        monkeypatch.setattr(execution, "continue_rows", slowly)
        late = serving.post("/v1/completions", model="base", prompt="x", max_tokens=50)
        assert late.status_code == 504
        assert late.json()["error"]["type"] == "timeout_error"
        go.set()
        done.wait()
    # Nobody waited for the tokens any more.
    assert made == [0]


def test_a_failure_of_the_device_is_500_and_the_server_goes_on(serve, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("Log-likelihoods must be finite, got NaN.")

    with serve() as serving:
        with monkeypatch.context() as patch:
            patch.setattr(execution, "score_rows", fail)
            answer = serving.post("/classify", model="topic", prompt="x")
        assert answer.status_code == 500
        assert "Log-likelihoods must be finite" in answer.json()["error"]["message"]
        assert serving.post("/classify", model="topic", prompt="x").status_code == 200


def test_while_it_compiles_and_while_it_drains_the_server_takes_no_requests(artifact, serve):
    with serve() as serving:
        for status, said in (("starting", "still compiling"), ("draining", "shutting down")):
            serving.service.status = status
            assert serving.client.get("/health").status_code == 503
            refused = serving.post("/v1/completions", model="base", prompt="x")
            assert refused.status_code == 503 and said in refused.json()["error"]["message"]
        serving.service.status = "ready"


def test_statistics_of_live_traffic_make_a_plan_that_prunes(serve, made, tmp_path):
    with serve(shadow="base", shadow_fraction=1.0) as serving:
        for example in made.validation.examples():
            serving.post("/classify", model="topic", prompt=example.prompt)
        serving.wait_until_idle()
        response = serving.post("/statistics", stream="base@topic", reset=True)
        assert response.status_code == 200, response.text
        again = serving.post("/statistics", stream="base@topic")
        assert again.status_code == 422 and "Statistics need traffic" in again.text
    live = tmp_path / "live.npz"
    live.write_bytes(response.content)
    assert RouterStatistics.load(live).manifest["task"] == "synthetic_topic"
    plan, out = str(tmp_path / "plan.json"), str(tmp_path / "pruned")
    assert main(["plan", "--statistics", str(live), "--num_experts", "2", "--out", plan]) == 0
    pruning = ["--checkpoint", str(made.base), "--plan", plan, "--workers", "0", "--out", out]
    assert main(["prune", *pruning]) == 0
    assert layout.resolve(out).model_config().num_experts == (2, 2)


def test_statistics_are_a_file_that_numpy_reads(serving):
    completion(serving, "something")
    serving.wait_until_idle()
    response = serving.post("/statistics", stream="base")
    assert response.headers["content-disposition"].endswith('filename="router_statistics.npz"')
    with np.load(io.BytesIO(response.content)) as archive:
        assert archive["layers_0/gram"].shape == (4, 4)
