from __future__ import annotations

import pytest

from uncurl_jax.config import ModelConfig
from uncurl_jax.models.architecture import count_parameters
from uncurl_jax.training import throughput


def test_flops_per_token_worked_by_hand():
    config = ModelConfig(
        num_experts=(4, 0), vocab_size=10, embed_dim=8, num_heads=2, mlp_dim=16, max_length=32
    )
    norms = 5 * 2 * 8
    attention = 2 * (4 * 8 * 8 + 4 * 8)
    feed_forward = 2 * (2 * 8 * 16 + 16 + 8)  # one expert, one dense layer
    router = 8 * 4
    multiplied = 10 * 8 + norms + attention + feed_forward + router
    active = count_parameters(config).active
    assert active == multiplied + 32 * 8
    # 6 FLOPs per weight, and causal attention: 6 * 2 layers * 20 tokens * 8.
    expected = 6 * multiplied + 6 * 2 * 20 * 8
    assert throughput.training_flops_per_token(config, active, 20) == expected


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
    ],
)
def test_the_longest_matching_name_gives_the_peak(kind: str, peak: float | None):
    assert throughput.peak_flops_per_second(kind) == peak
