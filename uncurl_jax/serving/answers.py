"""What the server answers, as JSON-compatible values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from uncurl_jax.serving.continuation import Continuation
from uncurl_jax.serving.drift import Divergence
from uncurl_jax.serving.execution import TokenChoices
from uncurl_jax.serving.models import ServedArtifact, ServedModel
from uncurl_jax.serving.requests import ClassifyRequest
from uncurl_jax.serving.routing_sums import layer_number
from uncurl_jax.serving.traffic import Stream, StreamDrift
from uncurl_jax.serving.worker import Ranking


def models_json(artifact: ServedArtifact) -> dict[str, Any]:
    """Lists the models, with what they share in memory."""
    data = [
        {
            "id": model.name,
            "object": "model",
            "owned_by": "uncurl_jax",
            "task": model.task,
            "num_experts": list(model.config.num_experts),
            "top_k": model.config.num_selected_experts,
            "max_length": artifact.max_length,
            "options": None if model.options is None else list(model.options),
            "example": model.example,
            "checkpoint": model.checkpoint,
        }
        for model in artifact.models.values()
    ]
    memory = {"bytes": artifact.bytes_in_memory, "bytes_if_apart": artifact.bytes_apart}
    return {"object": "list", "data": data, "memory": memory}


def choice_json(number: int, text: str, finish_reason: str | None) -> dict[str, str | int | None]:
    """One choice of a completion, in OpenAI's form."""
    return {"index": number, "text": text, "logprobs": None, "finish_reason": finish_reason}


def usage_json(artifact: ServedArtifact, rows: Sequence[Continuation]) -> dict[str, int]:
    """Tokens of prompts and of what was made; what every row begins with is neither."""
    prompt = sum(len(row.prompt) - len(artifact.prefix) for row in rows)
    made = sum(len(row.generated) for row in rows)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
    }


def ranking_json(wanted: ClassifyRequest, ranking: Ranking) -> dict[str, Any]:
    """The scores of the options of a question, and the choice."""
    columns = (
        wanted.options,
        ranking.log_likelihood.tolist(),
        ranking.num_tokens.tolist(),
        ranking.probability.tolist(),
    )
    names = ("text", "log_likelihood", "num_tokens", "probability")
    return {
        "model": wanted.model.name,
        "task": wanted.model.task,
        "choice": ranking.choice,
        "text": wanted.options[ranking.choice],
        "options": [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)],
    }


def trace_json(
    artifact: ServedArtifact,
    model: ServedModel,
    row: Continuation,
    trace: Mapping[str, TokenChoices],
) -> dict[str, Any]:
    """The experts of every token that a model has read, and what it has made."""
    prefix, decode = len(artifact.prefix), artifact.vocabulary.decode
    return {
        "model": model.name,
        "task": model.task,
        "num_experts": list(model.config.num_experts),
        # What every row begins with stands for no text.
        "tokens": [*([""] * prefix), *(decode([token]) for token in row.read_ids[prefix:])],
        "num_prompt_tokens": len(row.prompt),
        "layers": [
            {
                "layer": layer_number(name),
                "experts": choices.expert_index.tolist(),
                "gates": [[round(float(gate), 4) for gate in token] for token in choices.gate],
                "members": model.members.get(layer_number(name)),
            }
            for name, choices in trace.items()
        ],
        "text": row.text,
        "finish_reason": row.finish_reason,
    }


def stream_json(stream: Stream, drift: StreamDrift) -> dict[str, Any]:
    """A stream's traffic and its drift, layer by layer."""
    return {
        "model": stream.model.name,
        "tokens": stream.tokens,
        "requests": round(drift.requests, 1),
        "verdict": drift.verdict,
        "layers": [
            {
                "layer": layer.layer,
                "is_drifting": layer.is_drifting,
                "selections": _divergence_json(layer.selections),
                "probabilities": _divergence_json(layer.probabilities),
                "live": [round(float(share), 6) for share in layer.live],
                "reference": [round(float(share), 6) for share in layer.reference],
            }
            for layer in drift.layers
        ],
    }


def _divergence_json(found: Divergence) -> dict[str, float | None]:
    """The distance and its threshold, both without bias; None for a threshold not yet known."""
    threshold = found.threshold_bits - found.bias_bits
    return {
        "distance_bits": found.distance_bits,
        "threshold_bits": threshold if math.isfinite(threshold) else None,
        "bias_bits": found.bias_bits,
    }
