"""What a step tells besides its loss: norms and update ratios by layer group and by layer, logits, clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import EOS, small_model
from test_optimizer import batch_of, experiment, start, step_of
from test_pipeline import small

from k2jax.data.order import StagePlan
from k2jax.model.attention import attend_causally
from k2jax.model.attention_logits import attention_logits
from k2jax.model.decoder import Block, Decoder, document_ids, parameter_table, rope_table
from k2jax.parallel import sharding
from k2jax.training.optimizer import init_state
from k2jax.training.placement import batch_sharding, make_state, place_state
from k2jax.training.probe import Probe
from k2jax.training.step import Batch, norms, squares

GROUPS = {"embed", "head", "q", "k", "v", "o", "gate", "up", "down", "norms"}


def random_params(seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {name: draw.normal(size=p.shape).astype(np.float32) for name, p in parameter_table(small_model()).items()}


def norm(*arrays: np.ndarray) -> float:
    return float(np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in arrays)))


def test_norms_are_those_of_the_arrays_by_group_and_by_layer():
    c, trees = experiment(), [random_params(seed) for seed in range(3)]
    grads, params, update = trees
    found = jax.jit(lambda *trees: norms(*(squares(c, tree) for tree in trees)))(*trees)
    layers = found.pop("layers")
    assert found["grad_norm"] == pytest.approx(norm(*grads.values()), rel=1e-6)
    assert found["update_ratio"] == pytest.approx(norm(*update.values()) / norm(*params.values()), rel=1e-6)
    assert found["grad_norm/q"] == pytest.approx(norm(grads["layers.wq_LDNH"]), rel=1e-6)
    all_norms = [x for name, x in grads.items() if "norm" in name]
    assert len(all_norms) == 3 and found["grad_norm/norms"] == pytest.approx(norm(*all_norms), rel=1e-6)
    assert {key.partition("/")[2] for key in found} == {"", *GROUPS}
    assert {key.partition("/")[2] for key in layers} == GROUPS - {"embed", "head"}
    for number in range(small_model().num_layers):
        down = [tree["layers.w_down_LFD"][number] for tree in trees]
        assert layers["grad_norm/down"][number] == pytest.approx(norm(down[0]), rel=1e-6)
        assert layers["update_ratio/down"][number] == pytest.approx(norm(down[2]) / norm(down[1]), rel=1e-6)
        two = [grads[name][number] for name in ("layers.attention_norm_LD", "layers.mlp_norm_LD")]
        assert layers["grad_norm/norms"][number] == pytest.approx(norm(*two), rel=1e-6)


def test_a_ratio_to_parameters_that_are_nought_is_a_number():
    c, nought = experiment(), jax.tree.map(np.zeros_like, random_params(0))
    found = jax.jit(lambda x: norms(*[squares(c, x)] * 3))(nought)
    assert all(np.isfinite(value).all() for value in jax.tree.leaves(found)) and found["update_ratio/q"] == 0


def test_a_step_tells_its_update_and_whether_it_was_clipped():
    """At the start gradients are small; a head a hundred times as large makes them large."""
    step, state = step_of(), start()
    new, metrics = step(state, batch_of())
    moved = norm(new.params["embed_VD"] - state.params["embed_VD"])
    assert metrics["update_ratio/embed"] == pytest.approx(moved / norm(new.params["embed_VD"]), rel=1e-3)
    assert metrics["clipped"] == (metrics["grad_norm"] > 1.0)
    large = state._replace(params=state.params | {"head_DV": state.params["head_DV"] * 100})
    limits = jnp.array([jnp.inf, 1e-3])
    seen = [step(large, batch)[1] for batch in (batch_of(), batch_of()._replace(limits=limits))]
    assert [bool(m["clipped"]) for m in seen] == [True, False], "what makes no update is not clipped"
    assert [bool(m["applied"]) for m in seen] == [True, False] and seen[1]["update_ratio"] == 0


def test_logits_and_log_z_are_those_of_the_targets_that_count():
    """Documents are masked: the largest logit lies where no target is, and does not count."""
    batch, c = batch_of(18), experiment(masked=True)
    tokens = batch.tokens[0]
    metrics = step_of(masked=True)(start(), batch)[1]
    decoder = Decoder(c.model, start().params)
    ids = document_ids(tokens[:, :-1], EOS)
    logits = np.asarray(decoder.logits(decoder(tokens[:, :-1], c.stages[0].rope_base, ids)), np.float64)
    counts = np.asarray(tokens[:, :-1] != EOS)
    log_z = np.log(np.exp(logits).sum(axis=-1))
    assert metrics["log_z"] == pytest.approx(log_z[counts].mean(), rel=1e-5)
    assert metrics["logit"] == pytest.approx(np.abs(logits)[counts].max(), rel=1e-5)
    assert np.abs(logits).max() > np.abs(logits)[counts].max()


# ---- attention's logits ----------------------------------------------------------------------------------------------


def reference(c, params, tokens_BT) -> list[float]:
    """Layer by layer, all logits of a row at once."""
    found, m, T = [], c.model, tokens_BT.shape[1]
    rope, ids = rope_table(m, c.stages[0].rope_base, T), document_ids(tokens_BT, EOS)
    sees_BTS = np.tril(np.ones((T, T), bool)) & np.asarray((ids[:, :, None] == ids[:, None]) | (not m.mask_documents))

    def attend(q_BTNH, k_BTKH, v_BTKH):
        k_BTNH = np.repeat(np.asarray(k_BTKH, np.float64), m.num_heads // m.num_kv_heads, axis=2)
        logits = np.einsum("btnh,bsnh->bnts", np.asarray(q_BTNH, np.float64), k_BTNH) / np.sqrt(m.head_dim)
        found.append(np.where(sees_BTS[:, None], logits, -np.inf).max())
        return attend_causally(q_BTNH, k_BTKH, v_BTKH, ids if m.mask_documents else None)

    x_BTD = params["embed_VD"][tokens_BT]
    for number in range(m.num_layers):
        arrays = {key.removeprefix("layers."): value[number] for key, value in params.items() if "layers." in key}
        x_BTD = Block(m, arrays)(x_BTD, rope, attend)
    return found


@pytest.mark.parametrize("masked", [True, False])
def test_attentions_logits_are_those_of_all_queries_and_keys(masked: bool, monkeypatch: pytest.MonkeyPatch):
    """By blocks of 4 of 12 positions, with two query heads to a key head; the first row of the first microbatch."""
    monkeypatch.setattr("k2jax.model.attention_logits.BLOCK", 4)
    c, params, batch = experiment(masked), start().params, batch_of(microbatches=2)
    found = attention_logits(
        c, params, batch.tokens, rope_base=c.stages[0].rope_base, eos_id=EOS, compute_dtype=jnp.dtype("float32")
    )
    np.testing.assert_allclose(found.max(axis=1), reference(c, params, batch.tokens[0][:1, :-1]), rtol=1e-5)


ON_MESHES = [
    {"fsdp": 8},
    {"replica": 2, "context": 2, "tensor": 2},
    {"stage": 4, "tensor": 2},
    {"replica": 2, "stage": 2, "fsdp": 2},
    {"stage": 2, "context": 2, "tensor": 2},
]


@pytest.mark.parametrize("sizes", ON_MESHES, ids=str)
def test_attentions_logits_are_the_same_on_every_mesh(sizes: dict):
    """Of the first row of each part of the batch that a device has alone."""
    c = small(layers=4)
    mesh = sharding.make_mesh({"fsdp": 1, **sizes})
    tokens = np.random.default_rng(0).integers(0, 64, (1, 16, 17), np.int32)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: init_state(c.model, c.seed))
        state = make_state(c, place_state(c, shapes, mesh))
        placed = jax.device_put(tokens, batch_sharding(mesh))
        with c.unlocked():
            c.stability.attention_every = 5
        probe, told = Probe(c, mesh, EOS), {"layers": {"a": 1}}
        assert probe.added(told, 4, StagePlan("stage1", 0, *[1] * 9), state.params, Batch(placed, None, None)) is told
        added = probe.added(told, 5, StagePlan("stage1", 0, *[1] * 9), state.params, Batch(placed, None, None))
    parts = int(np.prod([size for axis, size in sizes.items() if axis in ("replica", "fsdp", "stage")]))
    rows = tokens[0].reshape(parts, -1, 17)[:, 0, :-1]
    expected = reference(c, jax.device_get(state.params), rows)
    np.testing.assert_allclose(added["layers"]["attention_logit"], expected, rtol=1e-4)
    assert added["attention_logit"] == pytest.approx(max(expected), rel=1e-4) and added["layers"]["a"] == 1
