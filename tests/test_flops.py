"""k2jax.model.flops: K2's published arithmetic, a count of the products that a step really does, and the peaks."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from test_model import equations, logits_of, small_model

from k2jax import config
from k2jax.model.decoder import init_params
from k2jax.model.flops import flops_per_token, peak_flops


@pytest.mark.parametrize(
    ("length", "causal", "noncausal"), [(2048, 398.2, 406.2), (4096, 406.2, 422.3), (8192, 422.3, 454.6)]
)
def test_k2s_flops_per_token_are_the_peers_tables(length, causal, noncausal):
    found = flops_per_token(config.base().model, length)
    assert (round(found.causal / 1e9, 1), round(found.noncausal / 1e9, 1)) == (causal, noncausal)


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 1, "head_dim": 6}, {"tie_embeddings": True}])
def test_the_noncausal_figure_is_what_the_products_of_a_step_add_up_to(changes):
    """Counted in the program itself: 2 FLOPs for each multiply-add of each dot_general, loops counted in full."""
    m, length = small_model(**changes), 17
    params = jax.eval_shape(partial(init_params, m, seed=1))
    tokens = jax.ShapeDtypeStruct((3, length), jnp.int32)
    step = jax.make_jaxpr(jax.grad(lambda params, tokens: logits_of(m, params, tokens).sum()))(params, tokens)
    total = 0
    for eqn, times in equations(step.jaxpr):
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            terms = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2 * times * terms * math.prod(eqn.outvars[0].aval.shape)
    per_token = total / (3 * length)
    found = flops_per_token(m, length)
    attention = found.noncausal - found.causal
    scores_again = 2 * 3 * m.num_heads * m.head_dim * length  # in attention's backward pass: no FLOPs of the model's
    assert per_token == found.noncausal + scores_again
    assert attention == pytest.approx(3 * 4 * 3 * m.num_heads * m.head_dim * length / 2), "causal: half of it"


@pytest.mark.parametrize(
    ("device_kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("cpu", None),
        ("TPU v99", None),
        ("Tesla T4", None),
    ],
)
def test_peak_of_a_device_is_its_longest_matching_name(device_kind, peak):
    assert peak_flops(device_kind) == peak
