"""The decoder and its attention: K2's shapes and initialisation, causality, document masks, remat, precision."""

import math
from collections.abc import Iterator
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax import config
from k2jax.model.decoder import (
    Decoder,
    document_ids,
    init_params,
    num_params,
    parameter_table,
    rms_norm,
    rope_table,
)
from k2jax.parallel import sharding
from k2jax.training.optimizer import init_state
from k2jax.training.placement import make_state, place_state
from k2jax.training.step import loss_sums

EOS = 2


def small_model(**changes):
    m = config.base().model.unlock()
    small = {"vocab_size": 61, "dim": 24, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    m.update({**small, "ffn_dim": 40, "init_std": 0.2, **changes})
    return m.lock()


@cache
def initial_params(**changes):
    """Of `small_model(**changes)`, which these tests read and none donates."""
    return jax.jit(partial(init_params, small_model(**changes), seed=1))()


def logits_of(m, params, tokens, dtype=jnp.float32, rope_base=1e4, documents=None):
    decoder = Decoder(m, params, dtype)
    return decoder.logits(decoder(tokens, rope_base, documents))


# ---- parameters ----------------------------------------------------------------------------------------------------


def test_k2s_numbers_give_k2s_parameter_count():
    shapes = jax.eval_shape(partial(init_params, config.base().model, seed=0))
    assert (
        sum(math.prod(s.shape) for s in shapes.values()) == 65_286_184_960 == num_params(config.base().model)
    )
    assert {s.dtype for s in shapes.values()} == {jnp.dtype(jnp.float32)}
    a_layer = sum(math.prod(s.shape[1:]) for name, s in shapes.items() if name.startswith("layers."))
    assert a_layer == 809_517_056
    assert shapes["embed_VD"].shape == shapes["head_DV"].shape[::-1] == (32032, 8192)


@pytest.fixture(scope="module")
def drawn():
    """(model section, its parameters): large enough to measure standard deviations, std as K2's."""
    m = small_model(vocab_size=1000, dim=96, num_layers=8, ffn_dim=160, num_kv_heads=4, init_std=0.02)
    return m, jax.jit(partial(init_params, m, seed=5))()


def test_initialisation_has_the_tables_standard_deviations(drawn):
    m, params = drawn
    residual = 0.02 / math.sqrt(2 * 8)  # K2: outputs into the residual stream over sqrt(2 L)
    expected = {name: 0.02 for name in params} | {"layers.wo_LNHD": residual, "layers.w_down_LFD": residual}
    for name, p in parameter_table(m).items():
        value = np.asarray(params[name], np.float64)
        if "norm" in name:
            assert p.std is None and (value == 1).all(), name
            continue
        assert p.std == pytest.approx(expected[name]), name
        sigmas = 5 / math.sqrt(value.size)  # of a sample mean; of a sample std: / sqrt(2)
        assert abs(value.mean()) < sigmas * p.std, name
        assert value.std() == pytest.approx(p.std, rel=sigmas / math.sqrt(2)), name
        assert (np.abs(value) > 2.5 * p.std).any(), f"{name}: no tails: not a normal distribution"
    layers = np.asarray(params["layers.wq_LDNH"]).reshape(8, -1)
    assert np.abs(np.corrcoef(layers) - np.eye(8)).max() < 5 / math.sqrt(layers.shape[1]), "layers alike"


def test_each_tensor_is_drawn_apart_from_all_others(drawn):
    m, params = drawn
    tied = jax.jit(partial(init_params, small_model(**{**m, "tie_embeddings": True}), seed=5))()
    assert set(params) - set(tied) == {"head_DV"}
    assert all(np.array_equal(tied[name], params[name]) for name in tied)
    assert not np.array_equal(params["layers.w_gate_LDF"], params["layers.w_up_LDF"])
    assert not np.array_equal(params["layers.wk_LDKH"], params["layers.wv_LDKH"])
    other_seed = jax.jit(partial(init_params, m, seed=6))()
    assert not any(np.array_equal(other_seed[name], params[name]) for name in params if "norm" not in name)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_initialisation_is_the_same_on_every_mesh(sizes):
    c = config.base().unlock()
    c.model = small_model(vocab_size=64, num_kv_heads=4)
    shapes = jax.eval_shape(lambda: init_state(c.model, c.seed))
    states = []
    for mesh in (
        sharding.make_mesh({"replica": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]),
        sharding.make_mesh(dict(zip(("replica", "fsdp", "tensor"), sizes, strict=True))),
    ):
        states.append(make_state(c, place_state(c, shapes, mesh)))
    assert len(states[1].params["embed_VD"].sharding.device_set) == 8
    one, other = map(jax.device_get, states)
    # jax 0.12 rounds a number here and there otherwise, in parts of other sizes
    jax.tree.map(partial(np.testing.assert_allclose, rtol=3e-7, atol=0), one, other)


# ---- who sees whom -------------------------------------------------------------------------------------------------

T = 10
DISTINCT = jnp.arange(3, 3 + T)[
    None
]  # every position a token of its own: a row of the embedding is a position


def influence(documents=None, **changes) -> np.ndarray:
    """(T, T): largest |d logits[t] / d embedding[s]|, in a fixed random direction of the logits."""
    m, params = small_model(**changes), initial_params(**changes)
    direction_V = jax.random.normal(jax.random.key(2), (m.vocab_size,))

    def project(embed_VD):
        return logits_of(m, params | {"embed_VD": embed_VD}, DISTINCT, documents=documents)[0] @ direction_V

    jacobian_TVD = jax.jit(jax.jacrev(project))(params["embed_VD"])
    return np.abs(jacobian_TVD[:, DISTINCT[0]]).max(axis=-1)


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_no_position_sees_a_later_one_and_each_sees_all_before(kv_heads):
    found = influence(num_kv_heads=kv_heads)
    past = np.tril(np.ones((T, T), bool))
    assert (found[~past] == 0).all(), "a gradient flows back from a later position"
    assert (found[past] > 1e-6).all(), "a position before this one is not seen"


@pytest.mark.fault("F8")
def test_masked_documents_do_not_see_each_other():
    documents = jnp.array([[0, 0, 0, 1, 1, 1, 1, 2, 3, 3]])
    same = np.asarray(documents[0][:, None] == documents[0][None, :])
    past = np.tril(np.ones((T, T), bool))
    found = influence(documents)
    assert (found[~(past & same)] == 0).all() and (found[past & same] > 1e-6).all()


@pytest.mark.fault("F8")
def test_a_masked_document_is_bit_equal_whatever_is_before_it():
    """The same check without the mask must find a leak, or it proves nothing. Seen red without the mask."""
    m, params = small_model(), initial_params()
    first = jnp.array([[5, 6, 7, 8, EOS, 20, 21, 22, 23, 24, EOS, 30]])
    second = first.at[0, :4].set(jnp.array([40, 41, 42, 43]))
    run = jax.jit(lambda tokens, documents: logits_of(m, params, tokens, documents=documents))
    documents = document_ids(first, EOS)
    masked = [np.asarray(run(tokens, documents))[0] for tokens in (first, second)]
    assert np.array_equal(masked[0][5:], masked[1][5:]) and not np.array_equal(masked[0][:5], masked[1][:5])
    packed = [np.asarray(run(tokens, None))[0] for tokens in (first, second)]
    assert (np.abs(packed[0] - packed[1])[5:].max(axis=-1) > 1e-4).all(), "K2's own packing is unmasked"


def test_an_end_of_document_belongs_to_the_document_that_it_ends():
    tokens = jnp.array([[5, 6, EOS, 7, EOS, EOS, 8], [EOS, 5, 5, 5, 5, 5, EOS]])
    assert document_ids(tokens, EOS).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]


@pytest.mark.fault("D12")
def test_large_scores_give_a_softmax_and_not_nan():
    run = jax.jit(partial(logits_of, small_model(init_std=30.0)))
    out = run(initial_params(init_std=30.0), DISTINCT, documents=DISTINCT)  # each position alone
    assert np.isfinite(out).all()


# ---- layers, scan, remat -------------------------------------------------------------------------------------------


def test_norm_is_computed_in_float32_from_bfloat16():
    draw = np.random.default_rng(0)
    x, weight = draw.normal(0, 30, (2, 3, 256)), draw.normal(1, 0.1, 256)
    x16 = jnp.asarray(x, jnp.bfloat16)
    x64 = np.asarray(x16, np.float64)
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5) * weight
    found = rms_norm(x16, jnp.asarray(weight, jnp.float32), 1e-5)
    assert found.dtype == jnp.bfloat16
    one_rounding = 2.0**-8  # of bfloat16's 8 bits, at the end, is all that may be lost
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=1.001 * one_rounding)


def test_rope_angles_are_exact_to_the_last_position():
    cos, sin = rope_table(small_model(head_dim=128), 500_000.0, 8192)
    assert cos.dtype == sin.dtype == jnp.float32 and cos.shape == (8192, 64)
    angle = np.arange(8192)[:, None] * 500_000.0 ** (-np.arange(0, 128, 2) / 128)
    # An angle of 8191 radians in float32 is good to 2.4e-4 * 2; in bfloat16 it would be off by 16.
    assert np.abs(cos - np.cos(angle)).max() < 1e-3 and np.abs(sin - np.sin(angle)).max() < 1e-3


def equations(jaxpr, times=1) -> Iterator[tuple[jax.extend.core.JaxprEqn, int]]:
    """Every equation of a jaxpr and of those inside it, with how often it runs."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        inner = [
            x for value in eqn.params.values() for x in (value if isinstance(value, tuple) else (value,))
        ]
        for x in inner:
            x = getattr(x, "jaxpr", x)
            if hasattr(x, "eqns"):
                yield from equations(x, times * eqn.params.get("length", 1))


def mean_loss(m, dtype, params, tokens):
    c = config.base().unlock()
    c.model = m
    loss, sums = loss_sums(
        params,
        tokens,
        jnp.zeros(len(tokens), jnp.int32),
        config=c,
        stage=config.stage(),
        eos_id=EOS,
        num_subsets=1,
        compute_dtype=dtype,
    )
    return loss / sums.targets


TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 61, (2, 14)), jnp.int32)


@cache
def gradient_jaxpr(dtype, **changes):
    m = small_model(**changes)
    params = jax.eval_shape(partial(init_params, m, seed=1))
    return jax.make_jaxpr(jax.value_and_grad(partial(mean_loss, m, dtype)))(params, TOKENS).jaxpr


def test_layers_are_one_loop_however_many_they_are():
    def scans(layers):
        found = list(equations(gradient_jaxpr(jnp.float32, num_layers=layers)))
        lengths = [eqn.params["length"] for eqn, _ in found if eqn.primitive.name == "scan"]
        assert lengths == [layers, 1, layers]  # forward, the loss of one block, backward
        return len(found)

    assert scans(2) == scans(7), "the program grows with the layers"
    m = small_model(num_layers=7)
    lowered = jax.jit(partial(mean_loss, m, jnp.float32)).lower(jax.eval_shape(partial(init_params, m, seed=1)), TOKENS)
    assert lowered.compile().as_text().count(" while(") == 1


def saved_floats(remat, space=None) -> int:
    """How many numbers the forward loop keeps of each layer for the backward loop, in any memory or in `space`."""
    forward = next(
        e for e, _ in equations(gradient_jaxpr(jnp.float32, remat=remat)) if e.primitive.name == "scan"
    )
    stacked = [v.aval for v in forward.outvars if v.aval.shape[:1] == (forward.params["length"],)]  # and not a carry
    return sum(math.prod(a.shape) for a in stacked if space in (None, a.memory_space)) // 3


def test_remat_policies_save_what_they_say():
    tokens, D, NH, KH, F = TOKENS[:, 1:].size, 24, 4 * 8, 2 * 8, 40
    assert saved_floats("full") == tokens * D, "only a layer's input is to be kept"
    named = tokens * (D + 2 * NH + 4 + 2 * KH + F + F)  # middle; q, attention and its sums; k and v; gate and up
    assert saved_floats("dots") == saved_floats("full") + named
    assert saved_floats("q+up") == saved_floats("full") + tokens * (NH + F)
    assert saved_floats("none") > 1.5 * saved_floats("dots")


def test_names_with_host_are_saved_in_the_hosts_memory_and_no_others():
    tokens, NH, F = TOKENS[:, 1:].size, 4 * 8, 40
    assert saved_floats("q+up@host") == saved_floats("q+up")
    assert saved_floats("q+up@host", jax.memory.Space.Host) == tokens * F
    assert saved_floats("q@host+up@host", jax.memory.Space.Host) == tokens * (NH + F)
    assert saved_floats("attention@host", jax.memory.Space.Host) == tokens * NH, "without its sums"
    assert saved_floats("attention@host") == saved_floats("attention") == saved_floats("full") + tokens * (NH + 4)
    assert saved_floats("dots", jax.memory.Space.Host) == 0


@cache
def loss_and_gradients(remat):
    m = small_model(remat=remat)
    return jax.jit(jax.value_and_grad(partial(mean_loss, m, jnp.float32)))(initial_params(), TOKENS)


@pytest.mark.parametrize("remat", ["dots", "full", "q@host+middle+up@host"])
def test_remat_changes_neither_loss_nor_gradient(remat):
    (loss, grads), (expected_loss, expected) = loss_and_gradients(remat), loss_and_gradients("none")
    assert abs(loss - expected_loss) < 1e-6
    for name in expected:
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


# ---- bfloat16 ------------------------------------------------------------------------------------------------------


@pytest.mark.fault("D11")
def test_in_bfloat16_every_weight_gradient_is_float32_from_the_product_on():
    """Seen red without the head's float32 gradient."""
    found = [e for e, _ in equations(gradient_jaxpr(jnp.bfloat16)) if e.primitive.name == "dot_general"]
    half = [e for e in found if {v.aval.dtype for v in e.invars} == {jnp.dtype(jnp.bfloat16)}]
    # A weight gradient contracts the tokens, which are first on both sides: nothing else does.
    over_tokens = [
        e for e in half if e.params["dimension_numbers"][0] in (((0, 1), (0, 1)), ((0,), (0,)))
    ]
    assert len(over_tokens) == 7 + 1  # a layer's matrices, and the head
    assert {e.outvars[0].aval.dtype for e in over_tokens} == {jnp.dtype(jnp.float32)}
    assert len(half) >= 3 * 8, "the products are not in bfloat16"


@pytest.mark.fault("D11")
def test_in_bfloat16_gradients_are_float32_and_not_rounded_before():
    m = small_model()
    grads = jax.jit(jax.grad(partial(mean_loss, m, jnp.bfloat16)))(initial_params(), TOKENS)
    for name, g in grads.items():
        assert g.dtype == jnp.float32, name
        if name == "embed_VD":  # a row that is read once has the gradient of a bfloat16 activation
            continue
        rounded = np.asarray(g.astype(jnp.bfloat16).astype(jnp.float32))
        share = (rounded != np.asarray(g))[np.asarray(g) != 0].mean()
        assert share > 0.9, f"{name}: {1 - share:.0%} of the gradient's numbers are bfloat16 numbers"


@pytest.mark.fault("D11")
def test_in_bfloat16_softmax_norms_and_loss_are_float32():
    """Seen red without the norm's cast to float32."""
    found = [e for e, _ in equations(gradient_jaxpr(jnp.bfloat16))]
    for primitive, at_least in {"exp": 3, "rsqrt": 3, "log": 1, "reduce_max": 2, "reduce_sum": 4}.items():
        types = [e.invars[0].aval.dtype for e in found if e.primitive.name == primitive]
        assert len(types) >= at_least and set(types) == {jnp.dtype(jnp.float32)}, (primitive, types)
    scores = [
        e for e in found if e.primitive.name == "dot_general" and e.outvars[0].aval.shape[-2:] == (13, 13)
    ]
    assert jnp.dtype(jnp.float32) in {e.outvars[0].aval.dtype for e in scores}, (
        "scores are rounded to bfloat16"
    )
    (embedding,) = [e for e in found if e.primitive.name == "scatter-add"]
    assert embedding.outvars[0].aval.dtype == jnp.float32, "rows read often are added up in bfloat16"


def test_bfloat16_stays_near_float32():
    m, params = small_model(init_std=0.05), initial_params(init_std=0.05)
    exact, half = (jax.jit(partial(mean_loss, m, t))(params, TOKENS) for t in (jnp.float32, jnp.bfloat16))
    assert half.dtype == jnp.float32 and 0 < abs(half - exact) < 0.01 * exact


@pytest.mark.fault("D11")
def test_in_bfloat16_logits_are_not_rounded():
    m = small_model()
    logits = jax.jit(partial(logits_of, m, dtype=jnp.bfloat16))(initial_params(), TOKENS)
    assert logits.dtype == jnp.float32
    share = float(jnp.mean(logits != logits.astype(jnp.bfloat16).astype(jnp.float32)))
    assert share > 0.9, f"{1 - share:.0%} of the logits are bfloat16 numbers"
