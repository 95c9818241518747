"""What is wrong with a request is said in one sentence, with the right status."""

from __future__ import annotations

import json

import pytest

from uncurl_jax.errors import InputError
from uncurl_jax.serving.settings import ServeConfig, bucket

JSON = {"content-type": "application/json"}
COMPLETE, CLASSIFY, EXPERTS = "/v1/completions", "/classify", "/experts"
LISTED = "there are base, topic (task synthetic_topic)"
BASE = {"model": "base", "prompt": "x"}
# What a body adds to BASE, and what is said of it.
COMPLETIONS = [
    ({"prompt": None}, "prompt must be a string, or a list of 1 to 4 strings, got null."),
    ({"prompt": ["x"] * 5}, "prompt must be a string, or a list of 1 to 4 strings"),
    ({"prompt": [5, 6]}, "prompt must be a string, or a list of 1 to 4 strings"),
    ({"prompt": "\ud800"}, "prompt must be Unicode text"),
    ({"prompt": "x" * 93}, "must fit into 97 tokens, got 94 and 16: shorten"),
    ({"max_tokens": 0}, "max_tokens must be an integer between 1 and 256, got 0."),
    ({"max_tokens": 2.5}, "max_tokens must be an integer between 1 and 256, got 2.5."),
    ({"max_tokens": True}, "max_tokens must be an integer between 1 and 256, got true."),
    ({"temperature": -1}, "temperature must be a number between 0 and 2, got -1."),
    ({"temperature": float("nan")}, "temperature must be a number between 0 and 2, got NaN."),
    ({"temperature": "hot"}, 'temperature must be a number between 0 and 2, got "hot".'),
    ({"seed": -1}, "seed must be an integer between 0 and"),
    ({"stop": [""]}, "stop must be strings that are not empty"),
    ({"stop": list("abcde")}, "stop must be at most 4 strings, got 5."),
    ({"n": 2}, "n must be left out or 1, got 2: one completion is made"),
    ({"top_p": 0.9}, "top_p must be left out or 1, got 0.9: all tokens are sampled"),
    ({"echo": 1}, "echo must be left out or false, got 1"),
    ({"logprobs": 5}, "logprobs must be left out or null, got 5: /classify returns"),
    ({"stream": "yes"}, 'stream must be true or false, got "yes".'),
    ({"stream": True, "prompt": ["a", "b"]}, "stream must go with one prompt, got 2."),
    ({"best": 1}, "A field must be one of best_of, echo, frequency_penalty"),
    ({"model": None}, f"model must name a model or a task, got none: {LISTED}."),
    ({"model": 3}, "model must be a string, got 3."),
    ({"task": "synthetic_topic"}, "model and task must agree, got 'base' and 'synthetic_topic'"),
]
QUESTIONS = [
    ({"prompt": None, "options": ["a"]}, "A question must have either prompt or fields"),
    ({"fields": {}, "options": ["a"]}, "A question must have either prompt or fields"),
    ({}, "options must be given, as model base knows none that all its questions have."),
    ({"options": []}, "options must be a list of 1 to 256 strings"),
    ({"options": ["a", 1]}, "options must be a list of 1 to 256 strings"),
    ({"options": ["y" * 99]}, "must fit into 97 tokens, got 2 and 101: shorten"),
    ({"prompt": None, "fields": {"text": "x"}}, "fields must be of a task that this version"),
    ({"model": "topic", "prompt": None, "fields": [1]}, "fields must be an object, got [1]."),
    (
        {"model": "topic", "prompt": None, "fields": {"txt": "x"}},
        "fields must be a row of task synthetic_topic: a row must have the field 'text', got only",
    ),
]
OTHERS = [
    (EXPERTS, {}, "prompt must be given, got none."),
    (EXPERTS, {"prompt": "x", "models": ["base"] * 3}, "models must be a list of 1 to 2 strings"),
    (EXPERTS, {"prompt": "x", "max_tokens": 65}, "max_tokens must be an integer between 1 and 64"),
    ("/statistics", {}, "stream must be named: there are base, topic."),
]
UNKNOWN = [
    (COMPLETE, {**BASE, "model": "rte"}, f'No model or task is named "rte": {LISTED}.'),
    (EXPERTS, {"prompt": "x", "models": ["bas"]}, f'No model or task is named "bas": {LISTED}.'),
    ("/statistics", {"stream": "x"}, 'No stream is named "x": there are base, topic.'),
]
WRONG = [
    *((COMPLETE, {**BASE, **body}, 422, message) for body, message in COMPLETIONS),
    *((CLASSIFY, {**BASE, **body}, 422, message) for body, message in QUESTIONS),
    *((path, body, 422, message) for path, body, message in OTHERS),
    *((path, body, 404, message) for path, body, message in UNKNOWN),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), WRONG)
def test_a_wrong_body_is_refused_with_a_sentence(serving, path, body, status, message):
    # Not the client's own encoder, which refuses some of this itself.
    response = serving.client.post(path, content=json.dumps(body), headers=JSON)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert error["message"].endswith(".") and "\n" not in error["message"]
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


@pytest.mark.parametrize(
    ("content", "headers", "status", "message"),
    [
        (b"{", JSON, 400, "A body must be JSON, got something else"),
        (b"[" * 100_000, JSON, 400, "A body must be JSON, got something else"),
        (b"\xff\xfe", JSON, 400, "A body must be JSON, got something else"),
        (b"[1]", JSON, 400, "A body must be a JSON object, got list."),
        (b"{}", {}, 415, "Content-Type must be application/json, got none."),
        (b"{}", {"content-type": "text/plain"}, 415, "must be application/json, got text/plain."),
        (b" " * (1 << 20) + b"{}", JSON, 413, "A body must have at most 1048576 bytes, got more."),
    ],
)
def test_a_body_that_is_no_object_is_refused(serving, content, headers, status, message):
    response = serving.client.post(COMPLETE, content=content, headers=headers)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_a_body_of_unknown_length_is_read_no_further_than_the_limit(serve):
    def parts():
        for _ in range(1000):
            yield b" " * 1000

    with serve(max_body_bytes=2000) as serving:
        response = serving.client.post(COMPLETE, content=parts(), headers=JSON)
    assert response.status_code == 413 and response.headers["connection"] == "close"


def test_other_paths_methods_and_hosts_are_refused(serving):
    client = serving.client
    assert client.get("/nothing").status_code == 404
    assert client.get("/nothing").json()["error"]["message"] == "There is nothing at /nothing."
    wrong_method = client.get(COMPLETE)
    assert wrong_method.status_code == 405 and wrong_method.headers["allow"] == "POST"
    # A page of another site that has its name point to this machine is not answered.
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
        refused = client.get("/health", headers={"host": host})
        assert refused.status_code == 400 and "Host must be" in refused.json()["error"]["message"]
    for host in ("localhost", "localhost:9", "[::1]:8000", "127.0.0.1"):
        assert client.get("/health", headers={"host": host}).status_code == 200


def test_no_other_site_is_allowed_to_read_answers(serving):
    response = serving.client.get("/v1/models", headers={"origin": "https://evil.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert response.headers["cross-origin-resource-policy"] == "same-origin"
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_sizes": (4, 1)}, "batch_sizes must be positive and ascending, got (4, 1)"),
        ({"lengths": ()}, "lengths must be positive and ascending, got ()"),
        ({"max_queue": 0}, "max_queue must be at least 1, got 0"),
        ({"drain_seconds": -1.0}, "drain_seconds must be at least 0, got -1.0"),
        ({"request_timeout_seconds": 0.0}, "request_timeout_seconds must be positive, got 0.0"),
        ({"drift_half_life": 0.5}, "drift_half_life must be at least 1 request, or None, got 0.5"),
        ({"drift_alpha": 1.0}, "drift_alpha must lie in (0, 1), got 1.0"),
        ({"shadow_fraction": 2.0}, "shadow_fraction must lie in [0, 1], got 2.0"),
        ({"shadow": "base"}, "shadow and shadow_fraction go together, got base and 0.0"),
        ({"shadow_fraction": 0.5}, "shadow and shadow_fraction go together, got None and 0.5"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(InputError) as refused:
        ServeConfig(**settings)
    assert message in str(refused.value)


def test_lengths_double_up_to_the_longest_row():
    assert ServeConfig().length_buckets(96) == (32, 64, 96)
    assert ServeConfig().length_buckets(20) == (20,)
    assert ServeConfig().length_buckets(64) == (32, 64)
    assert ServeConfig(lengths=(16, 500)).length_buckets(96) == (16, 96)
    assert [bucket(size, (1, 4, 16)) for size in (1, 2, 4, 5)] == [1, 4, 4, 16]
