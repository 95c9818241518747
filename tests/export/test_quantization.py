"""int8 of kernels."""

from __future__ import annotations

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np

from uncurl_jax.export.quantization import quantize


def test_a_kernel_worked_by_hand():
    kernel = np.asarray([[1.27, 0.0, -254.0], [-0.5, 0.0, 127.0], [0.014, 0.0, 1.0]])
    values, scale = quantize(kernel)
    # Largest entries 1.27, 0 and 254 of the three output channels, over 127.
    np.testing.assert_allclose(scale, [0.01, 1.0, 2.0], rtol=1e-6)
    assert values.dtype == np.int8
    # 1.0 / 2 is rounded to the even 0.
    assert values.tolist() == [[127, 0, -127], [-50, 0, 64], [1, 0, 0]]


@hypothesis.given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=2, max_dims=3, max_side=5),
        elements=st.floats(-1e4, 1e4, width=32),
    )
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_no_entry_is_off_by_more_than_half_a_step(kernel):
    values, scale = quantize(kernel)
    assert scale.shape == (*kernel.shape[:-2], kernel.shape[-1])
    assert (scale > 0).all() and np.abs(values.astype(int)).max() <= 127
    error = np.abs(values * scale[..., None, :].astype(np.float64) - kernel)
    assert (error <= scale[..., None, :] * (0.5 + 1e-4)).all()


def test_experts_are_rounded_each_by_itself():
    generator = np.random.default_rng(0)
    kernels = generator.normal(size=(3, 6, 4)).astype(np.float32)
    together = quantize(kernels)
    for expert, kernel in enumerate(kernels):
        alone = quantize(kernel)
        np.testing.assert_array_equal(together.values[expert], alone.values)
        np.testing.assert_array_equal(together.scale[expert], alone.scale)
