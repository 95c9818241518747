"""Small independent references: statistics and an MoE layer, in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from uncurl_jax.pruning.statistics import LayerStatistics, RouterStatistics, make_manifest


def softmax(h):
    e = np.exp(h - h.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def numpy_statistics(h, top_k=1, kept=None):
    """Sums over the rows of h [token, expert], one token at a time."""
    h = np.asarray(h, np.float64)
    num_tokens, Z = h.shape
    sums: dict[str, Any] = {
        name: np.zeros((Z, Z)) if name in ("gram", "coactivation", "routed_prob") else np.zeros(Z)
        for name in LayerStatistics._fields
    }
    sums["tokens"] = np.float64(num_tokens)
    for t in range(num_tokens):
        p = softmax(h[t])
        top = np.argsort(-h[t], kind="stable")[:top_k]
        sums["gram"] += np.outer(h[t], h[t])
        sums["logit_sum"] += h[t]
        sums["prob_mass"] += p
        for choice, i in enumerate(top):
            sums["selected"][i] += 1
            sums["kept"][i] += 1 if kept is None else kept[t, choice]
            sums["gate_mass"][i] += p[i]
            sums["routed_prob"][i] += p
            for j in top:
                sums["coactivation"][i, j] += 1
    return LayerStatistics(**sums)


def router_statistics(layers, num_experts, top_k=1, **manifest):
    defaults = {
        "checkpoint_hash": "c" * 8,
        "num_experts": num_experts,
        "num_selected_experts": top_k,
        "task": "superglue_rte",
        "split": "train",
        "vocabulary_hash": "v" * 8,
        "seed": 0,
    }
    return RouterStatistics(layers, make_manifest(**{**defaults, **manifest}))


def random_experts(generator, num_experts, embed=6, mlp=10, gated=False, dtype=np.float32):
    shapes = {"wi": (embed, mlp), "wi_bias": (mlp,), "wo": (mlp, embed), "wo_bias": (embed,)}
    if gated:
        shapes |= {"wg": (embed, mlp), "wg_bias": (mlp,)}
    return {
        name: generator.normal(size=(num_experts, *shape)).astype(dtype)
        for name, shape in shapes.items()
    }


def expert_output(expert, x):
    """[token, embed] -> [token, embed], ReLU network, gated if it has wg, in float64."""
    e = {name: np.asarray(array).astype(np.float64) for name, array in expert.items()}
    hidden = np.maximum(x @ e["wi"] + e["wi_bias"], 0.0)
    if "wg" in e:
        hidden = hidden * (x @ e["wg"] + e["wg_bias"])
    return hidden @ e["wo"] + e["wo_bias"]


def moe_output(router, experts, x, top_k=1):
    """Dropless top-k mixture: sum over chosen experts of softmax probability times output."""
    h = x @ np.asarray(router, np.float64)
    p = softmax(h)
    y = np.zeros_like(x)
    for t in range(len(x)):
        for z in np.argsort(-h[t], kind="stable")[:top_k]:
            one = {name: array[z] for name, array in experts.items()}
            y[t] += p[t, z] * expert_output(one, x[t : t + 1])[0]
    return y


class Reference:
    """The functions above, for tests that take the fixture."""

    softmax = staticmethod(softmax)
    statistics = staticmethod(numpy_statistics)
    router_statistics = staticmethod(router_statistics)
    experts = staticmethod(random_experts)
    expert_output = staticmethod(expert_output)
    moe_output = staticmethod(moe_output)

    @staticmethod
    def planted_logits(seed, labels, num_tokens=400, noise=0.3):
        """Logits whose columns share one signal per label, with noise of their own."""
        generator = np.random.default_rng(seed)
        labels = np.asarray(labels)
        signal = generator.normal(size=(num_tokens, labels.max() + 1))
        return signal[:, labels] + noise * generator.normal(size=(num_tokens, len(labels)))

    @staticmethod
    def same_partition(a, b):
        a, b = np.asarray(a), np.asarray(b)
        return bool(((a[:, None] == a) == (b[:, None] == b)).all())


@pytest.fixture(scope="session")
def reference():
    return Reference
