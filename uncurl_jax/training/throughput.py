"""Model FLOPs, and the peak of known devices, for MFU (model FLOPs utilisation)."""

from __future__ import annotations

from uncurl_jax.config import ModelConfig

# Dense bf16 peak in FLOP/s per device, from the vendors' data sheets. Keys are prefixes of
# `jax.Device.device_kind`, the longest match wins.
PEAK_BF16_FLOPS_PER_SECOND = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def training_flops_per_token(config: ModelConfig, active_parameters: int, length: int) -> float:
    """FLOPs of forward and backward per token: 6 * N_active + 6 * layers * length * heads * width.

    N_active leaves out what is looked up, not multiplied: learned positions, and the token
    embedding where the output projection is another array. The second term is causal attention
    (half of the 12 * layers * length * heads * width of PaLM, arXiv 2204.02311, appendix B).
    """
    looked_up = config.max_length if config.position_embedding == "learned" else 0
    looked_up += 0 if config.has_tied_embeddings else config.vocab_size
    multiplied = active_parameters - looked_up * config.embed_dim
    attention = config.num_layers * length * config.num_heads * config.head_dim
    return 6.0 * multiplied + 6.0 * attention


def peak_flops_per_second(device_kind: str) -> float | None:
    """Returns a device's dense bf16 peak, None if it is not known (a CPU, say)."""
    matches = [prefix for prefix in PEAK_BF16_FLOPS_PER_SECOND if device_kind.startswith(prefix)]
    return PEAK_BF16_FLOPS_PER_SECOND[max(matches, key=len)] if matches else None
