"""Distillation from an unpruned model: what its logits and its routers say beside the targets.

A pruned expert stands for a cluster of the teacher's. The router term asks a student's router to
give each of its experts the probability that the teacher's router gives the whole cluster.

Axes: b batch, l length (or places of targets), z the teacher's experts, m cluster (the student's
experts), vocab.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uncurl_jax.checkpoints import layout
from uncurl_jax.checkpoints.provenance import provenance_chain
from uncurl_jax.config import DistillationConfig, ModelConfig
from uncurl_jax.data.token_cache import TokenCache
from uncurl_jax.errors import InputError
from uncurl_jax.models.architecture import ModelInputs
from uncurl_jax.pruning.plan import PruningPlan
from uncurl_jax.training.losses import BatchTotals

# The least probability a cluster's logarithm is taken of; softmaxes of float32 may round to 0.
_TINY = float(np.finfo(np.float32).tiny)


class Clusters(NamedTuple):
    """What became of the teacher's experts in one MoE layer of the student.

    Attributes:
      layer: index of the layer.
      labels: for each of the teacher's experts the student's expert that it is part of, -1 if it
        was dropped.
    """

    layer: int
    labels: tuple[int, ...]


class Teacher(NamedTuple):
    """What a training step must know of the teacher, beside its parameters; hashable.

    Attributes:
      model: its architecture.
      clusters: of every MoE layer; () without a router term.
      weights: of the terms.
    """

    model: ModelConfig
    clusters: tuple[Clusters, ...]
    weights: DistillationConfig


class Observed(NamedTuple):
    """What a forward pass leaves for the terms.

    Attributes:
      logits: [b, l, vocab] float32, at the places of the targets.
      router_logits: MoE layer -> [b, l, experts] float32, at all places; {} if not observed.
    """

    logits: jax.Array
    router_logits: dict[int, jax.Array]


def observed(logits: jax.Array, sown: Any, model: ModelConfig) -> Observed:
    """Takes router logits from what a decoder sowed, if "router_observations" was mutable."""
    found = sown.get("router_observations", {})
    routers = {
        layer: found[f"layers_{layer}"]["moe"]["observation"][0]["logits"]
        for layer in (model.moe_layers if found else ())
    }
    return Observed(logits, routers)


def logit_divergence(
    student: jax.Array, teacher: jax.Array, weights: jax.Array, temperature: float
) -> jax.Array:
    """Sum over the weighted targets of temperature^2 * KL(teacher || student).

    The square keeps the gradient's size when the temperature rises (arXiv 1503.02531, section 2).

    Args:
      student: [b, l, vocab] float32 logits.
      teacher: [b, l, vocab] float32 logits; no gradient goes there.
      weights: [b, l] float32 weights of the targets.
      temperature: both logits are divided by it.

    Returns:
      A float32 scalar, in nats.
    """
    student = jax.nn.log_softmax(student / temperature, axis=-1)
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / temperature, axis=-1)
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return temperature**2 * jnp.sum(divergence * weights)


def cluster_log_probabilities(logits: jax.Array, labels: tuple[int, ...]) -> jax.Array:
    """Adds router probabilities inside clusters; what was dropped is renormalised away.

    Args:
      logits: [b, l, z] float32.
      labels: [z] cluster of each expert, -1 if dropped.

    Returns:
      [b, l, m] float32 log-probabilities of the clusters.
    """
    count = max(labels) + 1
    membership = np.asarray(labels)[:, None] == np.arange(count)  # [z, m]
    # Over the kept experts alone: their softmax is the renormalised one.
    kept = jnp.where(jnp.asarray(membership.any(axis=1)), logits, -jnp.inf)
    mass = jnp.einsum(
        "blz,zm->blm",
        jax.nn.softmax(kept, axis=-1),
        jnp.asarray(membership, jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.log(jnp.maximum(mass, _TINY))


def router_divergence(
    student: jax.Array,
    teacher: jax.Array,
    mask: jax.Array,
    labels: tuple[int, ...],
    columns: tuple[int, ...] | None = None,
) -> jax.Array:
    """Sum over the real tokens of KL(clusters of the teacher's router || student's router).

    Args:
      student: [b, l, m] float32 router logits.
      teacher: [b, l, z] float32 router logits; no gradient goes there.
      mask: [b, l] bool, the real tokens.
      labels: [z] the student's expert of each expert of the teacher, -1 if dropped.
      columns: the expert of each of the student's router columns (`ModelConfig.expert_map`); None
        if they are its experts.

    Returns:
      A float32 scalar, in nats.
    """
    target = cluster_log_probabilities(jax.lax.stop_gradient(teacher), labels)
    if columns is None:
        found = jax.nn.log_softmax(student, axis=-1)
    else:
        found = cluster_log_probabilities(student, columns)
    divergence = jnp.sum(jnp.exp(target) * (target - found), axis=-1)
    return jnp.sum(jnp.where(mask, divergence, 0.0))


class Terms(NamedTuple):
    """What a part of a batch adds to the loss and to the metrics; parts add up."""

    loss: jax.Array
    metrics: dict[str, jax.Array]


def terms(
    student: Observed,
    teacher: Observed,
    read: ModelInputs,
    totals: BatchTotals,
    *,
    spec: Teacher,
    model: ModelConfig,
) -> Terms:
    """Computes the terms that have a weight for one part of a batch.

    Args:
      student: its forward pass.
      teacher: the teacher's, on the same tokens.
      read: the part, as both read it.
      totals: of the whole batch.
      spec: the teacher.
      model: the student's architecture.

    Returns:
      The weighted sum and, as metrics, the terms: "distillation_logit_kl", a mean over the loss's
      tokens, and "distillation_router_kl", a mean over the real tokens of each MoE layer and over
      these layers.
    """
    metrics = {}
    loss = jnp.zeros(())
    if spec.weights.logit_weight:
        divergence = logit_divergence(
            student.logits, teacher.logits, read.weights, spec.weights.temperature
        )
        metrics["distillation_logit_kl"] = divergence / totals.weight
        loss += spec.weights.logit_weight * metrics["distillation_logit_kl"]
    if spec.weights.router_weight:
        means = [
            router_divergence(
                student.router_logits[layer],
                teacher.router_logits[layer],
                read.masks[layer],
                labels,
                model.expert_map[layer] if model.expert_map is not None else None,
            )
            / totals.tokens[layer]
            for layer, labels in spec.clusters
        ]
        metrics["distillation_router_kl"] = sum(means, jnp.zeros(())) / len(means)
        loss += spec.weights.router_weight * metrics["distillation_router_kl"]
    return Terms(loss, metrics)


def check_teacher(
    teacher: layout.CheckpointPath,
    fingerprint: str,
    weights: DistillationConfig,
    *,
    model: ModelConfig,
    initial: layout.CheckpointPath | None,
    cache: TokenCache,
    length: int,
) -> Teacher:
    """Checks that a teacher fits a student, and finds what became of its experts.

    Args:
      teacher: its checkpoint.
      fingerprint: that checkpoint's.
      weights: of the terms.
      model: the student's architecture.
      initial: the checkpoint that the student begins with, None if it starts fresh.
      cache: the tokens.
      length: tokens per row.

    Raises:
      InputError: If the vocabularies or the lengths do not fit; or a router term is asked for and
        the student does not descend from the teacher through prunes.
    """
    found = teacher.model_config()
    cache.check_vocabulary(teacher.vocabulary()["hash"], "the teacher's vocabulary")
    if found.vocab_size != model.vocab_size:
        raise InputError(
            "Teacher and student must have the same rows of embeddings, got vocab_size "
            f"{found.vocab_size} of {teacher} and {model.vocab_size}: choose a teacher that the "
            "student was pruned from, or one of the same vocab_size."
        )
    if found.num_encoder_layers != model.num_encoder_layers:
        raise InputError(
            "Teacher and student must have the same encoder layers, got num_encoder_layers "
            f"{found.num_encoder_layers} of {teacher} and {model.num_encoder_layers}: choose a "
            "teacher that the student was pruned from."
        )
    if found.max_length < length:
        raise InputError(
            f"A teacher must read rows as long as the student's, got max_length {found.max_length} "
            f"of {teacher} for length {length}: choose another teacher or a smaller length."
        )
    clusters = ()
    if weights.router_weight:
        clusters = _clusters(teacher, fingerprint, found, model, initial)
    return Teacher(found, clusters, weights)


def _clusters(
    teacher: layout.CheckpointPath,
    fingerprint: str,
    teacher_model: ModelConfig,
    model: ModelConfig,
    initial: layout.CheckpointPath | None,
) -> tuple[Clusters, ...]:
    """Follows the student's provenance back to the teacher through the plans on the way."""
    labels = _labels_since(fingerprint, model, initial) if initial is not None else None
    if labels is None or not labels:
        place = "a fresh student" if initial is None else str(initial)
        raise InputError(
            "Distillation of routers needs a student that was pruned from its teacher, got "
            f"{place}, whose provenance has no plan of {teacher} ({fingerprint[:12]}): give the "
            "checkpoint that was pruned, or set DistillationConfig.router_weight to 0."
        )
    counts = {layer: count for layer, count in enumerate(teacher_model.num_experts) if count}
    assert counts == {layer: len(row) for layer, row in labels.items()}, "fingerprints agree"
    return tuple(Clusters(layer, row) for layer, row in sorted(labels.items()))


def _labels_since(
    fingerprint: str, model: ModelConfig, initial: layout.CheckpointPath
) -> Mapping[int, tuple[int, ...]] | None:
    """Returns {MoE layer: the student's expert of each expert of the ancestor}, None if no such."""
    labels = {layer: tuple(range(model.num_experts[layer])) for layer in model.moe_layers}
    for link in provenance_chain(initial):
        found = layout.fingerprint(initial) if link.fingerprint is None else link.fingerprint
        if found == fingerprint:
            return labels
        if link.provenance is None or "plan" not in link.provenance:
            continue
        plan = PruningPlan.from_dict(dict(link.provenance["plan"]))
        labels = {
            layer.layer: tuple(
                -1 if label < 0 else labels[layer.layer][label] for label in layer.labels
            )
            for layer in plan.layers
        }
        if plan.source.checkpoint_hash == fingerprint:
            return labels
    return None
