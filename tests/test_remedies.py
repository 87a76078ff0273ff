"""Remedies against spikes: each against its definition written anew, in steps, on meshes and over a resume."""

import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import initial_params, logits_of, small_model
from test_optimizer import (
    EOS,
    batch_of,
    experiment,
    loss_arguments,
    numpy_rate,
    start,
    step_and_gradients,
    step_of,
)

import k2jax.training.step
from k2jax.data.order import StagePlan
from k2jax.errors import ConfigError
from k2jax.model.attention_logits import attention_logits
from k2jax.model.decoder import apply_rope, document_ids, init_params, parameter_table, rms_norm, rope_table
from k2jax.model.flops import flops_per_token
from k2jax.model.generation import Generator
from k2jax.parallel import sharding
from k2jax.run.ledger import Ledger, StepLog
from k2jax.run.saved import open_array, open_step
from k2jax.train import train
from k2jax.training import remedies
from k2jax.training.optimizer import direction, first_state
from k2jax.training.placement import (
    batch_sharding,
    make_state,
    mesh_of,
    move_params,
    place_batches,
    place_state,
)
from k2jax.training.program import step_function
from k2jax.training.step import train_step


def changed(**keys):
    """test_optimizer's experiment with "optimizer.update_clip" and others set."""
    c = experiment()
    for key, value in keys.items():
        *parents, last = key.split(".")
        section = c
        for name in parents:
            section = section[name]
        section.unlock()[last] = value
    return c


def begin(c):
    return start()._replace(clips=remedies.first_clips(c))


def stepping(c):
    """The jitted step of an experiment, and the gradients that it took: (state, metrics, gradients)."""
    return jax.jit(partial(step_and_gradients, c=c))


def tensors(tree):
    """Every tensor by itself, as numpy: {(name, layer or None): array}."""
    arrays = {name: np.asarray(x, np.float64) for name, x in tree.items()}
    stacked = {(n, i): x[i] for n, x in arrays.items() if n.startswith("layers.") for i in range(len(x))}
    return stacked | {(n, None): x for n, x in arrays.items() if not n.startswith("layers.")}


class NumpyAdamW:
    """Of one tensor, float64."""

    def __init__(self, p, decay, update_clip=0.0):
        self.p, self.decay, self.update_clip, self.m, self.v, self.t = p.copy(), decay, update_clip, 0.0, 0.0, 0

    def step(self, g, lr):
        self.t += 1
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.95 * self.v + 0.05 * g * g
        m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.95**self.t)
        rms = np.sqrt(np.mean(g * g / np.maximum(v, 1e-16)))
        lr = lr / max(1.0, rms / self.update_clip) if self.update_clip else lr
        self.p = self.p - lr * (m / (np.sqrt(v) + 1e-8) + self.decay * self.p)
        return rms


# ---- off -----------------------------------------------------------------------------------------------------------


def test_a_step_without_remedies_runs_nothing_of_them(monkeypatch):
    """So it is the step that it was: no function of theirs is reached, and no array of theirs is in the state."""

    def reached(*_):
        raise AssertionError("a remedy that is off")

    for name in ("rows_without_repeats", "adagc", "update_scales", "attention_logits", "qk_clip"):
        monkeypatch.setattr(k2jax.training.step, name, reached)
    c = experiment()
    state = jax.eval_shape(partial(first_state, c))
    run = partial(train_step, first_step=1, num_steps=20, **loss_arguments(c))
    new, metrics = jax.eval_shape(run, state, batch_of())
    assert state.clips == new.clips == {} and not set(metrics) & set(remedies.COUNTS)
    assert not [name for name in parameter_table(c.model) if "q_norm" in name or "k_norm" in name]


# ---- the embedding without decay -----------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [True, False])
def test_decay_of_the_embedding(decay):
    c, state = changed(**{"optimizer.decay_embeddings": decay}), start()
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    found, *_ = direction(c, state, zeros)
    expected = {name for name, p in parameter_table(c.model).items() if p.std is not None}
    expected -= set() if decay else {"embed_VD"}
    assert {name for name, d in found.items() if np.any(d)} == expected
    np.testing.assert_allclose(found["head_DV"], 0.1 * state.params["head_DV"])


# ---- AdaGC ---------------------------------------------------------------------------------------------------------

ADAGC = {"optimizer.adagc.ratio": 1.05, "optimizer.adagc.beta": 0.9, "optimizer.adagc.warmup_updates": 4}


def test_ten_steps_are_those_of_adagc():
    """Algorithm 1 of arXiv:2502.11034, a tensor at a time."""
    c = changed(**ADAGC)
    step, state = stepping(c), begin(c)
    theirs = {key: NumpyAdamW(p, 0.0 if "norm" in key[0] else 0.1) for key, p in tensors(state.params).items()}
    average, clipped = {}, 0
    for t in range(10):
        state, metrics, gradients = step(state, batch_of(t))
        own, count = tensors(gradients), 0
        whole = min(1.0, 1.0 / np.sqrt(sum(np.sum(g * g) for g in own.values())))
        for key, g in own.items():
            norm = np.linalg.norm(g)
            scale = whole if t < 4 else min(1.0, 1.05 * average[key] / norm)
            count += scale < 1.0
            norm *= scale
            if t < 4:
                average[key] = min(average.get(key, np.inf), norm)
            else:
                average[key] = 0.9 * average[key] + 0.1 * norm
            theirs[key].step(scale * g, float(numpy_rate(t + 1, 20, 4, 1e-2, 1e-3)))
        for key, p in tensors(state.params).items():
            assert np.abs(p - theirs[key].p).max() < 2e-6, (t, key)
        for (name, layer), value in average.items():
            found = state.clips[name] if layer is None else state.clips[name][layer]
            assert float(found) == pytest.approx(value, rel=1e-4), (t, name, layer)
        assert int(metrics["clipped_tensors"]) == count and int(state.clips["updates"]) == t + 1
        clipped += count
    assert clipped > 20, "clipping was hardly at work"


def test_a_gradient_that_is_zero_does_not_freeze_its_tensor():
    c = changed(**ADAGC)
    table, clips = parameter_table(c.model), remedies.first_clips(c)
    for norm in (0.0, 2.0, 0.0, 2.0, 0.0, 2.0):
        grads = {name: jnp.full(p.shape, norm / np.sqrt(np.prod(p.shape))) for name, p in table.items()}
        clipped, clips, _ = remedies.adagc(c, clips, grads, jnp.float32(1e-3))
    assert np.any(clipped["head_DV"]) and float(clips["head_DV"]) == pytest.approx(2.0, rel=1e-5)


def test_a_step_that_is_not_applied_leaves_adagcs_averages():
    c = changed(**ADAGC)
    state, batch = begin(c), batch_of()
    new, _, _ = stepping(c)(state, batch._replace(limits=jnp.zeros(2)))
    assert int(new.updates) == int(new.clips["updates"]) == 0 and not np.any(new.clips["head_DV"])


def run_to(config, workdir):
    train(config, workdir)
    return [(row["loss"], row["grad_norm"]) for row in StepLog(workdir / "metrics", None).rows()]


def test_adagc_over_a_resume(tiny_config, tmp_path):
    """Ten steps and, from their checkpoint, the rest are the bits of all of them."""
    keys = {"optimizer.adagc.ratio": 1.05, "optimizer.adagc.warmup_updates": 3, "stages.0.chunks": 1}
    whole = run_to(tiny_config(**keys), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "15")
    assert run_to(tiny_config(**keys), tmp_path / "again") == whole
    last = [open_step(tmp_path / name, 15) for name in ("whole", "again")]
    assert last[0].meta["digests"] == last[1].meta["digests"]
    norms = open_array(last[0], "clips/layers.wq_LDNH").read().result()
    assert norms.shape == (2,) and (norms > 0).all()
    Ledger(tmp_path / "again" / "ledger", None).verify()
    rows = list(StepLog(tmp_path / "whole" / "metrics", None).rows())
    assert sum(row["clipped_tensors"] for row in rows) > 20
    assert all(row["clipped"] == (row["clipped_tensors"] > 0) for row in rows)


def test_adagc_is_turned_on_and_off_in_a_run(tiny_run, tiny_config, tmp_path):
    """Refused until it is allowed; then its averages begin at the state's step, or are dropped."""
    on = {"optimizer.adagc.ratio": 1.05, "optimizer.adagc.warmup_updates": 3}
    shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "25")
    tiny_config = partial(tiny_config, **{"log.tensorboard": True})
    with pytest.raises(ConfigError, match="optimizer.adagc.ratio"):
        train(tiny_config(**on), tmp_path / "run")
    train(tiny_config(**on, allow_drift="optimizer"), tmp_path / "run")
    saved = open_step(tmp_path / "run", 25)
    assert int(open_array(saved, "clips/updates").read().result()) == 5
    with pytest.raises(ConfigError, match="optimizer.adagc.ratio"):
        train(tiny_config(), tmp_path / "run")
    train(tiny_config(allow_drift="optimizer"), tmp_path / "run")


# ---- update clipping -----------------------------------------------------------------------------------------------


def test_ten_steps_are_those_of_update_clipping():
    """StableAdamW's (arXiv:2304.13013, algorithm 2) at a limit that bites."""
    c = changed(**{"optimizer.update_clip": 0.8})
    step, state = stepping(c), begin(c)
    theirs = {key: NumpyAdamW(p, 0.0 if "norm" in key[0] else 0.1, 0.8) for key, p in tensors(state.params).items()}
    counts = []
    for t in range(10):
        state, metrics, gradients = step(state, batch_of(t))
        own = tensors(gradients)
        whole = min(1.0, 1.0 / np.sqrt(sum(np.sum(g * g) for g in own.values())))
        rms = [theirs[key].step(whole * g, float(numpy_rate(t + 1, 20, 4, 1e-2, 1e-3))) for key, g in own.items()]
        for key, p in tensors(state.params).items():
            assert np.abs(p - theirs[key].p).max() < 2e-6, (t, key)
        assert int(metrics["clipped_updates"]) == sum(value > 0.8 for value in rms)
        counts.append(int(metrics["clipped_updates"]))
    assert counts[0] == len(theirs) and min(counts) < len(theirs)


# ---- QK-clip --------------------------------------------------------------------------------------------------------


def plain_logits(m, params, tokens, documents):
    """(L, N): the largest of q . k / sqrt(H), layer by layer, with all logits there."""
    x, rope, found = params["embed_VD"][tokens], rope_table(m, 1e4, tokens.shape[1]), []
    allowed = np.tri(tokens.shape[1], dtype=bool)[None, None]
    if documents is not None:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    for i in range(m.num_layers):
        w = {name.removeprefix("layers."): x[i] for name, x in params.items() if name.startswith("layers.")}
        y = rms_norm(x, w["attention_norm_LD"], m.norm_eps)
        q, k, v = (jnp.einsum("BTD,DNH->BTNH", y, w[n]) for n in ("wq_LDNH", "wk_LDKH", "wv_LDKH"))
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        k, v = (jnp.repeat(z, m.num_heads // m.num_kv_heads, axis=2) for z in (k, v))
        logits = jnp.where(allowed, jnp.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(m.head_dim), -1e30)
        found.append(logits.max(axis=(0, 2, 3)))
        out = jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(logits, axis=-1), v)
        x = x + jnp.einsum("BTNH,NHD->BTD", out, w["wo_LNHD"])
        y = rms_norm(x, w["mlp_norm_LD"], m.norm_eps)
        x = x + (jax.nn.silu(y @ w["w_gate_LDF"]) * (y @ w["w_up_LDF"])) @ w["w_down_LFD"]
    return jnp.stack(found)


def test_a_step_with_qk_clip_is_the_step_and_the_clip():
    """Of shared keys: wq has all of it."""
    c, state, batch = changed(**{"optimizer.qk_clip": 0.3}), start(), batch_of()
    step = stepping(c)
    for _ in range(2):
        logits = jax.jit(partial(plain_logits, c.model, documents=None))(state.params, batch.tokens[0, :1, :-1])
        expected, _ = step_of()(state, batch)
        state, metrics, _ = step(state, batch)
        scale = np.minimum(1.0, 0.3 / np.maximum(np.asarray(logits), 1e-9))
        assert int(metrics["clipped_heads"]) == (scale < 1).sum() > 0
        for name, p in expected.params.items():
            factor = scale[:, None, :, None] if name == "layers.wq_LDNH" else 1.0
            np.testing.assert_allclose(state.params[name], p * factor, rtol=2e-5, atol=1e-7, err_msg=name)


def test_qk_clip_brings_the_largest_logit_of_each_head_to_the_limit():
    """Of keys that heads have for themselves, and within documents."""
    c = changed(**{"optimizer.qk_clip": 2.0})
    c.model = small_model(num_kv_heads=4, mask_documents=True)
    params, tokens = initial_params(num_kv_heads=4), batch_of().tokens
    before, after = (
        np.asarray(attention_logits(c, p, tokens, rope_base=1e4, eos_id=EOS, compute_dtype=jnp.float32))
        for p in (params, remedies.qk_clip(c, params, jnp.full((3, 4), 20.0))[0])
    )
    documents = document_ids(tokens[0, :, :-1], EOS)[:1]
    np.testing.assert_allclose(before, plain_logits(c.model, params, tokens[0, :1, :-1], documents), rtol=1e-5)
    np.testing.assert_allclose(after[0], before[0] / 10, rtol=1e-5)  # the layers above have other inputs
    new, count = remedies.qk_clip(c, params, jnp.asarray(before))
    assert int(count) == (before > 2.0).sum() and 0 < count < 12
    scale = np.sqrt(np.minimum(1, 2.0 / np.maximum(before, 1e-9)))[:, None, :, None]
    for name in ("layers.wq_LDNH", "layers.wk_LDKH"):
        np.testing.assert_allclose(new[name], params[name] * scale, rtol=1e-6)


@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 2, "tensor": 2, "replica": 2}, {"stage": 2, "tensor": 4}, {"fsdp": 2, "context": 2, "tensor": 2}],
    ids=str,
)
def test_on_a_mesh_each_group_of_devices_looks_at_a_row_of_its_own(tiny_config, sizes):
    c = tiny_config(**{f"mesh.{axis}": size for axis, size in sizes.items()}, **{"model.num_kv_heads": 4})
    params = first_state(c).params
    rows = np.random.default_rng(0).integers(3, 500, (1, 8, 33)).astype(np.int32)
    parts = sizes.get("fsdp", 1) * sizes.get("replica", 1) * sizes.get("stage", 1)
    alone = jax.jit(partial(plain_logits, c.model, documents=None))(params, rows[0, :: 8 // parts, :-1])
    mesh = mesh_of(c)
    with jax.set_mesh(mesh):
        placed = move_params(c, params, mesh)
        batch = jax.device_put(rows, batch_sharding(mesh))
        run = partial(attention_logits, c, rope_base=1e4, eos_id=EOS, compute_dtype=jnp.float32)
        found = jax.jit(lambda params, batch: run(params, batch))(placed, batch)
    assert found.shape == (2, 8)
    np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-7)


def test_qk_clip_is_refused_where_it_does_nothing(tiny_config):
    with pytest.raises(ConfigError, match="optimizer.qk_clip=100.0: must be 0 .off. where model.qk_norm is on"):
        tiny_config(**{"optimizer.qk_clip": 100.0, "model.qk_norm": True})


# ---- rows with repeated n-grams ------------------------------------------------------------------------------------


def most_repeats(row):
    """By counting: how often 1 to 13 tokens come one after the other, at most."""
    most = 1
    for period in remedies.PERIODS:
        for first in range(len(row) - period):
            times = 1
            while list(row[first + times * period :][:period]) == list(row[first : first + period]):
                times += 1
            most = max(most, times)
    return most


@pytest.mark.fault("F9")
def test_rows_with_repeats_are_those_that_counting_finds():
    draw = np.random.default_rng(0)
    rows = draw.integers(3, 500, (48, 440))
    for row in rows[:-4]:
        period, times = draw.integers(1, 15), draw.choice([2, 30, 31, 32, 33, 40])
        piece = np.tile(draw.integers(3, 500, period), times)[: draw.integers(0, 2) * period + (times - 1) * period]
        start = draw.integers(0, max(len(row) - len(piece), 1))
        row[start : start + len(piece)] = piece[: len(row) - start]
    most = np.array([most_repeats(row) for row in rows])
    for times in (3, 31, 32, 33):
        kept = np.asarray(jax.jit(partial(remedies.rows_without_repeats, times=times))(jnp.asarray(rows)))
        np.testing.assert_array_equal(kept == 0, most >= times)
    assert 5 < (most >= 32).sum() < 75 and {31, 32, 33} <= set(most)
    assert np.asarray(remedies.rows_without_repeats(jnp.zeros((2, 31), int), 32)).all(), "shorter than 32 tokens"
    assert not np.asarray(remedies.rows_without_repeats(jnp.zeros((2, 32), int), 32)).any()


def repeating_batch(microbatches=1):
    batch = batch_of(3, 1)
    tokens = np.array(batch.tokens[0])
    tokens[2, 3:9], tokens[5] = 7, np.tile([8, 9], 7)[:13]
    cut = partial(np.reshape, order="C")
    parts = (cut(np.asarray(x), (microbatches, -1, *x.shape[2:])) for x in (tokens[None], batch.subset, batch.digest))
    return batch._replace(**dict(zip(("tokens", "subset", "digest"), map(jnp.asarray, parts), strict=True)))


@pytest.mark.fault("F9")
@pytest.mark.parametrize("microbatches", [1, 4])
def test_masked_rows_are_as_if_they_were_not_there(microbatches):
    c = changed(**{"data.mask_repeats": 6})
    state = begin(c)
    batch = repeating_batch(microbatches)
    new, metrics, gradients = stepping(c)(state, batch)
    others = [0, 1, 3, 4, 6, 7]
    alone = repeating_batch()
    alone = alone._replace(**{k: getattr(alone, k)[:, np.array(others)] for k in ("tokens", "subset", "digest")})
    _, expected, wanted = stepping(experiment())(state, alone)
    assert int(metrics["masked_rows"]) == 2 and int(metrics["targets"]) == int(expected["targets"]) == 6 * 12
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-6)
    for name, g in wanted.items():
        np.testing.assert_allclose(gradients[name], g, atol=1e-6, err_msg=name)


@pytest.mark.fault("F9")
def test_a_batch_of_nothing_but_repeats_makes_no_update():
    c = changed(**{"data.mask_repeats": 3})
    state = begin(c)
    batch = batch_of()
    new, metrics, _ = stepping(c)(state, batch._replace(tokens=jnp.full_like(batch.tokens, 5)))
    assert not metrics["applied"] and int(metrics["masked_rows"]) == 8 and np.isnan(metrics["loss"])
    assert all(np.array_equal(new.params[name], p) for name, p in state.params.items())


# ---- on meshes -----------------------------------------------------------------------------------------------------

MESHES = {"fsdp": 2, "tensor": 2, "replica": 2}, {"stage": 2, "fsdp": 2, "context": 2}


@pytest.mark.parametrize("also", [{"model.qk_norm": True}, {"optimizer.qk_clip": 0.01}], ids=str)
def test_remedies_are_the_same_on_two_meshes(tiny_config, also):
    """Devices have one row of a microbatch each on both, so that QK-clip looks at the same rows."""
    keys = also | {"optimizer.adagc.ratio": 1.05, "optimizer.adagc.warmup_updates": 1, "optimizer.update_clip": 0.8}
    keys |= {"data.mask_repeats": 6, "optimizer.decay_embeddings": False}
    keys |= {"model.pipeline.microbatches": 2, "stages.0.microbatches": 2}
    configs = [tiny_config(**keys, **{f"mesh.{axis}": size for axis, size in mesh.items()}) for mesh in MESHES]
    (one, first), (other, second) = map(three_steps, configs)
    assert int(first[0]["masked_rows"]) == 2
    for a, b in zip(first, second, strict=True):
        counts = [{key: int(metrics[key]) for key in remedies.COUNTS if key in metrics} for metrics in (a, b)]
        assert counts[0] == counts[1] and len(counts[0]) == (4 if "optimizer.qk_clip" in also else 3)
        assert counts[0].get("clipped_heads", 1) > 0
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
    for name, value in one.clips.items():
        np.testing.assert_allclose(other.clips[name], value, rtol=1e-4, err_msg=name)


def three_steps(c, devices=None):
    """(state, metrics of each) of three steps on the tiny experiment's shapes, two rows of the first with repeats."""
    mesh, stage = mesh_of(c, devices), c.stages[0]
    plan = StagePlan("stage1", 0, stage.sequence_length, stage.rows_per_step, 10, 2, 0, 0, 1, 20, 0)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: first_state(c))
        shardings = place_state(c, shapes, mesh)
        state = make_state(c, shardings)
        run = step_function(c, plan, shardings, mesh, EOS, 3)
        metrics = []
        for number in range(3):
            draw = np.random.default_rng(number)
            rows = draw.integers(3, 500, (8, 33)).astype(np.int32)
            if number == 0:
                rows[1, 10:20], rows[6, :24] = 5, np.tile([9, 8, 7], 8)
            placement = place_batches(stage, mesh)
            columns = {"tokens": rows, "subset": np.arange(8, dtype=np.int32) % 3}
            columns["digest"] = draw.integers(0, 2**32, (8, 8), np.uint32)
            batch = placement.globalize({key: value[placement.local_rows] for key, value in columns.items()})
            state, found = run(state, batch)
            metrics.append(jax.device_get(found))
        return jax.device_get(state), metrics


# ---- QK-norm -------------------------------------------------------------------------------------------------------


def qk_normed():
    m = small_model(qk_norm=True, vocab_size=64)
    params = jax.jit(partial(init_params, m, seed=2))()
    draw = np.random.default_rng(0)
    return m, {n: p * jnp.asarray(draw.uniform(0.5, 2, p.shape), p.dtype) for n, p in params.items()}


@pytest.mark.parametrize("sizes", [{"fsdp": 1}, {"fsdp": 2, "tensor": 2}], ids=["one device", "tensor"])
def test_generation_with_qk_norm_is_the_model_again_and_again(sizes):
    m, params = qk_normed()
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = sharding.make_mesh({"replica": 1, "tensor": 1, **sizes}, devices)
    prompts = [[5, 9, 11, 30], [7, 8]]
    new = Generator(m, 1e4, params, mesh, jnp.float32, eos_id=EOS).generate(prompts, 6, stop_at_eos=False)
    scores_of = jax.jit(partial(logits_of, m))
    for prompt, tokens in zip(prompts, new, strict=True):
        row = np.array([[*prompt, *tokens, *[0] * (6 - len(prompt))]])
        best = np.asarray(scores_of(params, row))[0].argmax(axis=-1)
        assert tokens == best[len(prompt) - 1 :][:6].tolist()


def test_qk_norm_counts_no_products():
    m, plain = small_model(qk_norm=True), small_model()
    assert flops_per_token(m, 64) == flops_per_token(plain, 64)
    shapes = [parameter_table(m)[f"layers.{name}_norm_LH"].shape for name in "qk"]
    assert shapes == [(3, 8)] * 2
