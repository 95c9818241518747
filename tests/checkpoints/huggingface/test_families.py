from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from uncurl_jax.checkpoints.huggingface.families import FAMILIES
from uncurl_jax.checkpoints.model import load_model
from uncurl_jax.models.decoder import Decoder

TOLERANCE = 1e-4


def logits_of(model, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(Decoder(model.config).apply({"params": model.params}, tokens))


def continued(model, tokens: np.ndarray, count: int) -> np.ndarray:
    """Greedy continuation with the key-value cache."""
    decoder = Decoder(model.config)
    step = jax.jit(
        lambda cache, token, positions: decoder.apply(
            {"params": model.params, **cache},
            token,
            None,
            positions,
            decode=True,
            mutable=["cache"],
        )
    )
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits, cache = step({}, tokens, positions)
    found = []
    for place in range(tokens.shape[1], tokens.shape[1] + count):
        found.append(np.asarray(logits[:, -1].argmax(axis=-1)).astype(np.int32))
        logits, cache = step(cache, found[-1][:, None], np.full((len(tokens), 1), place))
    return np.stack(found, axis=1)


def test_every_family_but_those_without_a_reference_is_recorded(reference):
    from_files = {reference(name).config["model_type"] for name in ("mixtral", "gpt2")}
    assert from_files <= set(FAMILIES)


def test_logits_and_greedy_tokens_equal_those_of_transformers(name, reference, make_directory):
    expected = reference(name)
    model = load_model(f"hf:{make_directory(name)}")
    assert model.config.dtype == "float32"
    np.testing.assert_allclose(
        logits_of(model, expected.tokens), expected.logits, rtol=0, atol=TOLERANCE
    )
    np.testing.assert_array_equal(
        continued(model, expected.tokens, expected.greedy.shape[1]), expected.greedy
    )
