"""Layers apart and matrices cast once: the same step as the scan's. Sums by place: the same as a scatter's."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2jax import config as configuration
from k2jax.model.decoder import apply_rope, init_params, remat_policy
from k2jax.model.weights import Weight, wide
from k2jax.parallel import row_sums, sharding
from k2jax.training.step import summed_gradients

LAYERS, ROWS, LENGTH = 3, 4, 16


def small(**model):
    c = configuration.base().unlock()
    c.model.update(vocab_size=64, dim=32, num_layers=LAYERS, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=44)
    c.stages = (configuration.stage(mix={"x": 1}, sequence_length=LENGTH, rows_per_step=ROWS),)
    c.model.update(model)
    return c


def gradients(c, compute: str, microbatches: int):
    tokens = np.random.default_rng(0).integers(0, 64, (microbatches, ROWS // microbatches, LENGTH + 1), np.int32)
    subset = np.zeros(tokens.shape[:2], np.int32)
    options = {"stage": c.stages[0], "eos_id": 0, "num_subsets": 1, "compute_dtype": jnp.dtype(compute)}
    function = jax.jit(partial(summed_gradients, config=c, **options))
    return function, (init_params(c.model, 0), tokens, subset)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "overrides",
    [{}, {"qk_norm": True, "tie_embeddings": True}, {"qkv_bias": True, "reordered_norm": True}],
)
def test_gradients_are_the_scans(compute: str, microbatches: int, overrides: dict[str, bool]):
    found = []
    for unroll in (1, LAYERS):
        c = small(unroll=unroll, remat="q+k+up", **overrides)
        function, arguments = gradients(c, compute, microbatches)
        found.append(jax.device_get(function(*arguments)))
    (scanned, sums), (apart, other_sums) = found
    tolerance = 1e-6 if compute == "float32" else 2e-2  # XLA rounds to bfloat16 between other operations
    assert scanned.keys() == apart.keys() and other_sums.loss == pytest.approx(sums.loss, rel=tolerance / 100)
    for name, x in scanned.items():
        assert apart[name].dtype == np.float32 and apart[name].shape == x.shape, name
        assert np.abs(apart[name] - x).max() <= tolerance * np.abs(x).max(), name


def test_a_matrix_is_cast_once_for_all_microbatches():
    """Outside of the loop over them; within, nothing of a weight's size is float32 but the sum of its gradient."""
    function, arguments = gradients(small(unroll=LAYERS, remat="dots"), "bfloat16", 2)
    text = function.lower(*arguments).as_text()
    loop = text[text.index("stablehlo.while") :]
    body = loop[: loop.index("return %")]
    narrowed = r"stablehlo.convert %\S+ : \(tensor<32x44xf32>\) -> tensor<32x44xbf16>"
    assert len(re.findall(narrowed, text[: text.index("stablehlo.while")])) == 2 * LAYERS, "gate and up"
    assert "32x44xf32" in body, "its gradient"


def test_a_gradient_goes_to_the_master_in_float32():
    x = jnp.full((2, 3), 1 / 3, jnp.bfloat16)
    gradient = jax.grad(lambda master: (wide(Weight(x, master)) * 0.1).sum())(jnp.zeros((2, 3)))
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, np.float32(0.1))


def test_rematerialisation_holds_where_layers_are_apart():
    """What is not named is computed again: the backward pass keeps no array of a layer's ffn."""
    kept = {}
    for remat in ("none", "full"):
        function, arguments = gradients(small(unroll=LAYERS, remat=remat), "float32", 1)
        kept[remat] = function.lower(*arguments).as_text().count("optimization_barrier")
    assert kept["none"] == 0 and kept["full"] >= LAYERS, "without barriers the compiler keeps what it finds twice"


@pytest.mark.parametrize(
    ("remat", "is_kept"), [("dots", True), ("attention", True), ("q+k+v", False), ("full", False)]
)
def test_cudnns_attention_is_kept_by_its_primitive(remat: str, is_kept: bool):
    class Primitive:
        name = "dot_product_attention_fwd_wrapper"

    assert remat_policy(remat)(Primitive) is is_kept


def test_rope_on_gpus_turns_the_same_pairs(monkeypatch: pytest.MonkeyPatch):
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    angle = jax.random.normal(jax.random.key(1), (5, 4))
    expected = apply_rope(x, jnp.cos(angle), jnp.sin(angle))
    monkeypatch.setattr("k2jax.model.decoder.platform", lambda: "gpu")
    np.testing.assert_allclose(apply_rope(x, jnp.cos(angle), jnp.sin(angle)), expected, rtol=1e-6)
    by_row = apply_rope(x, *(jnp.stack([f(angle)] * 2) for f in (jnp.cos, jnp.sin)))
    np.testing.assert_allclose(by_row, expected, rtol=1e-6)


# ---- sums by place -----------------------------------------------------------------------------------------------


SUMMED = jax.jit(row_sums.summed_by_place, static_argnums=(2, 3))


@given(
    st.sampled_from([1, 7, 8, 9, 65, 600]),  # each pair is compiled
    st.sampled_from([1, 5, 40]),
    st.sampled_from(["even", "one", "few"]),
    st.integers(0, 2**32 - 1),
)
def test_sums_by_place_are_the_scatters(rows: int, size: int, spread: str, seed: int):
    """With blocks of 8: up to three levels, places that fill many blocks, and places with no row."""
    draw = np.random.default_rng(seed)
    place_N = {
        "even": draw.integers(0, size, rows),
        "one": np.full(rows, draw.integers(0, size)),
        "few": np.minimum(draw.geometric(0.5, rows) - 1, size - 1),
    }[spread]
    x_ND = draw.standard_normal((rows, 3)).astype(np.float32)
    expected = np.zeros((size, 3))
    np.add.at(expected, place_N, x_ND.astype(np.float64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_sums, "platform", lambda: "gpu")
        patch.setattr(row_sums, "BLOCK", 8)
        found = SUMMED(x_ND, place_N, size, jnp.float32)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_bfloat16_rows_are_added_in_float32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_sums, "platform", lambda: "gpu")
    ones = jnp.ones((1000, 2), jnp.bfloat16)  # 1000 of them in bfloat16 would stop at 256
    found = row_sums.summed_by_place(ones, jnp.zeros(1000, jnp.int32), 1, jnp.float32)
    np.testing.assert_array_equal(found, [[1000, 1000]])


def test_the_platform_is_jaxs_backend_and_not_the_devices_name(monkeypatch: pytest.MonkeyPatch):
    class Device:
        device_kind, platform = "Tesla T4", "gpu"

    monkeypatch.setattr("jax.devices", lambda: [Device])
    assert (sharding.platform(), sharding.kernel_platform()) == ("gpu", "Tesla T4")
