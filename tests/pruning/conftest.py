"""Small independent references: statistics and an MoE layer, in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest

from uncurl_jax.pruning.statistics import LayerStatistics, RouterStatistics, make_manifest


def softmax(h):
    e = np.exp(h - h.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def numpy_statistics(h, top_k=1, kept=None, outputs=None):
    """Sums over the rows of h [token, expert], one token at a time.

    With `outputs` [token, expert, embed], what every expert makes of every token, the optional
    sums too.
    """
    h = np.asarray(h, np.float64)
    num_tokens, Z = h.shape
    squares = ("gram", "coactivation", "routed_prob")
    sums: dict[str, Any] = {
        name: np.zeros((Z, Z)) if name in squares else np.zeros(Z)
        for name in LayerStatistics._fields[:9]
    }
    if outputs is not None:
        outputs = np.asarray(outputs, np.float64)
        sums["output_norm"], sums["gated_output_norm"] = np.zeros(Z), np.zeros(Z)
        sums["output_sum"] = np.zeros(outputs.shape[1:])
        sums["all_output_sum"] = outputs.sum(axis=0)
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
            if outputs is not None:
                norm = np.sqrt(np.square(outputs[t, i]).sum())
                sums["output_norm"][i] += norm
                sums["gated_output_norm"][i] += p[i] * norm
                sums["output_sum"][i] += outputs[t, i]
    return LayerStatistics(**sums)


def fixed_statistics(selected, gram=None, **fields):
    """Statistics with these counts of selection (and sums); the other sums are of random logits."""
    h = np.random.default_rng(0).normal(size=(40, len(selected)))
    if gram is not None:
        fields["gram"] = np.asarray(gram, float)
    arrays = {name: np.asarray(value, float) for name, value in fields.items()}
    return numpy_statistics(h)._replace(selected=np.asarray(selected, float), **arrays)


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


def expert_output(expert, x, activation=lambda hidden: np.maximum(hidden, 0.0)):
    """[token, embed] -> [token, embed], ReLU network by default, gated if it has wg, in float64."""
    e = {name: np.asarray(array).astype(np.float64) for name, array in expert.items()}
    hidden = x @ e["wi"] + e.get("wi_bias", 0.0)
    if "wg" in e:
        hidden = activation(x @ e["wg"] + e.get("wg_bias", 0.0)) * hidden
    else:
        hidden = activation(hidden)
    return hidden @ e["wo"] + e.get("wo_bias", 0.0)


def moe_output(router, experts, x, top_k=1, normalize=False, **options):
    """Dropless top-k mixture: sum over chosen experts of softmax probability times output."""
    h = x @ np.asarray(router, np.float64)
    p = softmax(h)
    y = np.zeros_like(x)
    for t in range(len(x)):
        top = np.argsort(-h[t], kind="stable")[:top_k]
        total = p[t, top].sum() if normalize else 1.0
        for z in top:
            one = {name: array[z] for name, array in experts.items()}
            y[t] += p[t, z] / total * expert_output(one, x[t : t + 1], **options)[0]
    return y


class Weights(NamedTuple):
    """A checkpoint's weights, by layer; what `make_plan` takes."""

    routers: dict[int, np.ndarray]
    all_experts: Mapping[int, dict[str, np.ndarray]] = MappingProxyType({})
    base_routers: Mapping[int, np.ndarray] = MappingProxyType({})

    def router(self, layer):
        return self.routers[layer]

    def base_router(self, layer):
        return self.base_routers.get(layer)

    def experts(self, layer):
        return self.all_experts[layer]


class Reference:
    """The functions above, for tests that take the fixture."""

    softmax = staticmethod(softmax)
    statistics = staticmethod(numpy_statistics)
    fixed_statistics = staticmethod(fixed_statistics)
    router_statistics = staticmethod(router_statistics)
    experts = staticmethod(random_experts)
    expert_output = staticmethod(expert_output)
    moe_output = staticmethod(moe_output)
    weights = Weights

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
