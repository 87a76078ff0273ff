"""Muon, Lion and Adafactor: each against optax's own, on meshes, over a resume, with remedies, and what it keeps."""

import json
import shutil
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from test_optimizer import batch_of, numpy_rate
from test_remedies import MESHES, changed, run_to, stepping, tensors, three_steps

from k2jax import config, generate, keys, trials
from k2jax.errors import ConfigError
from k2jax.evals.session import Session, Wanted
from k2jax.hf.export import export
from k2jax.hf.verify import read_certificate, verify
from k2jax.model.decoder import parameter_table
from k2jax.parallel import sharding
from k2jax.run.checkpoint import Checkpoints
from k2jax.run.saved import open_array, open_step, restore_params
from k2jax.run.state import flat, unflat
from k2jax.train import train
from k2jax.training.optimizer import OPTIMIZERS, first_state, ins_and_outs, orthogonal
from k2jax.training.placement import make_state, mesh_for, mesh_of, place_state, state_bytes

OTHERS = ("muon", "lion", "adafactor")
MUON_ALWAYS = ["muon", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lion", "adafactor"))]


def named(name, **more):
    """test_optimizer's experiment with another optimizer."""
    return changed(**{"optimizer.name": name, **more})


def begin(c):
    return jax.jit(partial(first_state, c))()


@cache
def compiled(name):
    """The step of `named(name)`, as `stepping` has it, and a state to begin with."""
    return stepping(named(name)), begin(named(name))


def test_the_names_of_optimizers_are_those_of_the_table():
    assert keys.OPTIMIZERS == tuple(OPTIMIZERS)
    with pytest.raises(ConfigError, match="optimizer.name='sgd': must be one of adamw, muon, lion, adafactor"):
        config.validate(named("sgd"))
    for name in OTHERS:
        config.validate(named(name))
        with pytest.raises(ConfigError, match="optimizer.update_clip=1.0: must be 0"):
            config.validate(named(name, **{"optimizer.update_clip": 1.0}))


# ---- against optax ---------------------------------------------------------------------------------------------------


def theirs(c):
    """optax's transformation of {(name, layer or None): tensor}, which ends before the learning rate, without decay."""
    table, o = parameter_table(c.model), c.optimizer
    if o.name == "lion":
        return lambda key: optax.scale_by_lion(o.b1, o.b2)
    if o.name == "adafactor":
        factored = partial(optax.scale_by_factored_rms, min_dim_size_to_factor=1)
        return lambda key: optax.chain(factored(table[key[0]].is_matrix), optax.clip_by_block_rms(1.0))

    def muon(key):
        if key[1] is None or not table[key[0]].is_matrix:
            return optax.scale_by_adam(o.b1, o.b2, o.eps)
        # The learning rate is multiplied in, with the sign of a descent.
        return optax.contrib.muon(-1.0, beta=o.momentum, consistent_rms=0.2)

    return muon


def as_matrix(c, key, x):
    """A layer's tensor with its inputs as rows and its outputs as columns; vectors as they are."""
    given, _ = ins_and_outs(parameter_table(c.model)[key[0]])
    return x.reshape(int(np.prod(x.shape[: len(given)])), -1) if given else x


@pytest.mark.parametrize("name", OTHERS)
def test_eight_steps_are_those_of_optax(name):
    """Each layer's matrix by itself: (D, N H) of wq, (N H, D) of wo."""
    c = named(name)
    (step, state), make = compiled(name), theirs(c)
    params = {key: as_matrix(c, key, p).astype(np.float32) for key, p in tensors(state.params).items()}
    rows = {key: make(key) for key in params}
    states = {key: rows[key].init(p) for key, p in params.items()}
    for t in range(8):
        state, metrics, gradients = step(state, batch_of(t))
        whole = min(1.0, 1.0 / float(metrics["grad_norm"]))
        lr = float(numpy_rate(t + 1, 20, 4, 1e-2, 1e-3))
        for key, g in tensors(gradients).items():
            g = as_matrix(c, key, whole * g).astype(np.float32)
            d, states[key] = rows[key].update(g, states[key], params[key])
            decay = 0.0 if "norm" in key[0] else 0.1
            expected = params[key] - lr * (d + decay * params[key])
            found = as_matrix(c, key, tensors(state.params)[key])
            wrong = np.abs(found - expected) > 2e-5
            assert wrong.mean() <= (0.002 if name == "lion" else 0), (t, key, np.abs(found - expected).max())
            params[key] = found.astype(np.float32)  # so that what is rounded otherwise does not add up


def test_newton_schulz_makes_matrices_orthogonal_and_moves_by_the_larger_side():
    x_LIO = jnp.asarray(np.random.default_rng(0).normal(size=(3, 24, 8)), jnp.float32)
    for x in (x_LIO, jnp.swapaxes(x_LIO, 1, 2), 1e-3 * x_LIO):
        values = np.linalg.svd(np.asarray(orthogonal(x)), compute_uv=False)
        assert values.shape == (3, 8) and (values > 0.65).all() and (values < 1.25).all()
    assert not np.any(orthogonal(jnp.zeros((1, 4, 4)))), "a matrix without a gradient stays"
    added, metrics = first_step(*compiled("muon"))
    for name, p in parameter_table(named("muon").model).items():
        if p.is_matrix and name.startswith("layers."):
            rms = np.sqrt(np.mean(np.square(added[name])))
            assert 0.1 < rms / float(metrics["lr"]) < 0.25, name


def first_step(step, state):
    """(what it added to each parameter, its metrics)."""
    new, metrics, _ = step(state, batch_of())
    return {name: np.asarray(p) - np.asarray(state.params[name]) for name, p in new.params.items()}, metrics


def test_inputs_and_outputs_of_every_matrix():
    table = parameter_table(named("adamw", **{"model.qkv_bias": True}).model)
    found = {name: ins_and_outs(p) for name, p in table.items()}
    assert found["layers.wq_LDNH"] == ((1,), (2, 3)) and found["layers.wo_LNHD"] == ((1, 2), (3,))
    assert found["layers.w_up_LDF"] == found["layers.w_down_LFD"] == ((1,), (2,))
    assert found["embed_VD"] == found["head_DV"] == ((0,), (1,))
    assert {name for name, (given, _) in found.items() if not given} == {
        name for name in table if "norm" in name or ".b" in name
    }


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_groups_have_their_own_rate_and_decay():
    """0 leaves a group as it is; a decay that is written down is there for norms, too."""
    base, _ = first_step(*compiled("adamw"))
    more = ("embed.lr=0.5", "head.lr=0", "up.decay=0", "norms.decay=2")
    c = named("adamw", **{"optimizer.groups": more})
    config.validate(c)
    found, metrics = first_step(stepping(c), begin(c))
    params = {name: np.asarray(p) for name, p in begin(c).params.items()}
    lr = float(metrics["lr"])
    for name, p in parameter_table(c.model).items():
        expected = {
            "embed": 0.5 * base[name],
            "head": 0.0 * base[name],
            "up": base[name] + lr * 0.1 * params[name],
            "norms": base[name] - lr * 0.2 * params[name],
        }
        np.testing.assert_allclose(found[name], expected.get(p.group, base[name]), atol=2e-7, err_msg=name)
    assert not np.any(found["head_DV"]) and float(metrics["update_norm/head"]) == 0


@pytest.mark.parametrize(
    "text", ["embd.lr=1", "embed=1", "embed.lr=-1", "embed.lr=nan", "embed.rate=1", "biases.lr=1", "up.lr=1 ", "up.lr="]
)
def test_a_group_that_is_not_there_or_not_written_so_is_refused(text):
    with pytest.raises(ConfigError, match=r"optimizer.groups='.*': must be written GROUP.lr=FACTOR"):
        config.validate(named("adamw", **{"optimizer.groups": (text,)}))
    with pytest.raises(ConfigError, match="each may be there once"):
        config.validate(named("adamw", **{"optimizer.groups": ("up.lr=1", "up.lr=2")}))


def test_the_names_of_groups_are_those_of_the_table(tiny_config):
    m = named("adamw", **{"model.qkv_bias": True}).model
    assert set(keys.GROUPS) == {p.group for p in parameter_table(m).values()}
    c = tiny_config(**{"optimizer.groups": "('q.lr=.5','v.decay=1e-3')"})
    assert config.group_factors(c.optimizer.groups) == {("q", "lr"): 0.5, ("v", "decay"): 1e-3}
    assert config.from_dict(config.to_dict(c)).optimizer.groups == c.optimizer.groups


# ---- on meshes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MUON_ALWAYS)
def test_the_same_on_one_device_and_on_meshes_of_every_axis(tiny_config, name):
    more = {"optimizer.name": name, "model.pipeline.microbatches": 2, "stages.0.microbatches": 2}
    one, first = three_steps(tiny_config(**more, **{"mesh.fsdp": 1}), jax.devices()[:1])
    for mesh in MESHES:
        c = tiny_config(**more, **{f"mesh.{axis}": size for axis, size in mesh.items()})
        other, found = three_steps(c)
        for a, b in zip(first, found, strict=True):
            assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=1e-4)
        for array, value in flat(one).items():
            apart = np.abs(flat(other)[array] - value)
            scale = 1e-2 if array.startswith("params/") else np.abs(value).max() + 1e-30
            allowed = 0.005 if name == "lion" else 0.001  # where a gradient is nearly 0
            assert (apart > 2e-3 * scale).mean() <= allowed, (array, apart.max(), scale)


@pytest.mark.parametrize("name", keys.OPTIMIZERS)
def test_state_is_what_the_optimizer_keeps_and_is_sharded_over_every_axis(tiny_config, name):
    c = tiny_config(**{"optimizer.name": name, "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.replica": 2})
    mesh, table = mesh_of(c), parameter_table(c.model)
    shapes = jax.eval_shape(lambda: first_state(c))
    places = flat(place_state(c, shapes, mesh))
    assert places.keys() == flat(shapes).keys()
    muons = {n for n, p in table.items() if p.is_matrix and n.startswith("layers.")}
    factored = {f"{n}{end}" for n, p in table.items() if p.is_matrix for end in (".in", ".out")}
    vectors = {n for n, p in table.items() if not p.is_matrix}
    first = set() if name == "adafactor" else set(table)
    second = {"adamw": set(table), "muon": set(table) - muons, "lion": set(), "adafactor": factored | vectors}[name]
    assert (set(shapes.mu), set(shapes.nu)) == (first, second)
    for array, x in flat(shapes).items():
        if array.startswith(("mu/", "nu/")) and x.ndim > 1 and "norm" not in array:
            parts = x.size / np.prod(places[array].shard_shape(x.shape))
            assert parts == 8 or name == "adafactor" and parts >= 4, array
    kept = sum(x.size for x in jax.tree.leaves((shapes.mu, shapes.nu)))
    number = sum(x.size for x in shapes.params.values())
    at_most = {"adamw": 2, "muon": 1.7, "lion": 1, "adafactor": 0.1}[name]
    assert kept <= at_most * number
    assert state_bytes(c, mesh) < (1 + at_most) * 4 * number / 3
    assert jax.tree.structure(unflat(flat(shapes))) == jax.tree.structure(shapes)


# ---- in runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MUON_ALWAYS)
def test_over_a_resume(tiny_config, tmp_path, name):
    """Ten steps and, from their checkpoint, the rest are the bits of all of them. With an average: below."""
    more = {"optimizer.name": name, "stages.0.chunks": 1, "eval.windows": 1}
    more |= {"stages.0.lr_peak": 2e-3} if name == "lion" else {}
    whole = run_to(tiny_config(**more), tmp_path / "whole")
    assert whole[-1][0] < whole[0][0] - 0.1, "it trains"
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "15")
    assert run_to(tiny_config(**more), tmp_path / "again") == whole
    last = [open_step(tmp_path / run, 15) for run in ("whole", "again")]
    assert last[0].meta["digests"] == last[1].meta["digests"]


def test_a_checkpoint_of_another_optimizer_is_refused(tiny_run, tiny_config, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "25")
    for name in OTHERS:
        c = partial(tiny_config, **{"log.tensorboard": True, "optimizer.name": name})
        with pytest.raises(ConfigError, match=f"optimizer.name: 'adamw' -> '{name}'"):
            train(c(), tmp_path / "run")
        with pytest.raises(ConfigError, match="its moments are of optimizer.name='adamw': train on with that one"):
            train(c(allow_drift="optimizer"), tmp_path / "run")


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_weights_alone_begin_with_zeros_and_an_average_of_themselves(tiny_config, tmp_path, name):
    """As an import leaves them."""
    c = tiny_config(**{"optimizer.name": name, "optimizer.ema_decay": 0.9})
    mesh, shapes = mesh_of(c), jax.eval_shape(lambda: first_state(c))
    with jax.set_mesh(mesh):
        shardings = place_state(c, shapes, mesh)
        state = make_state(c, shardings)
        with Checkpoints(tmp_path, [1], log=lambda _: None) as checkpoints:
            checkpoints.save(state._replace(mu={}, nu={}, ema={}), 1, data={}, meta={})
            checkpoints.wait()
        restored = checkpoints.restore(1, shardings, shapes)
        same = jax.tree.map(lambda a, b: np.array_equal(a, b) and a.sharding == b.sharding, restored, state)
        assert all(jax.tree.leaves(same)) and jax.tree.structure(restored) == jax.tree.structure(state)
        jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(restored)


@pytest.mark.parametrize("name", keys.OPTIMIZERS)
def test_the_doctor_reads_the_moments_that_there_are(name):
    c = named(name)
    step, state = compiled(name)
    state, *_ = step(state, batch_of())
    mesh = sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])
    found = trials._moment_norms(SimpleNamespace(config=c, mesh=mesh), state)
    kinds = {key.partition(" of ")[0] for key in found}
    assert kinds == {"lion": {"first moment"}, "adafactor": {"second moment"}}.get(
        name, {"first moment", "second moment"}
    )
    assert all(value > 0 for value in found.values())
    assert ("second moment of q" in found) == (name in ("adamw", "adafactor"))


@pytest.mark.fault("D1")
@pytest.mark.parametrize("name", OTHERS)
def test_a_step_that_is_not_finite_leaves_every_bit_of_the_state(name):
    step, state = compiled(name)
    state, *_ = step(state, batch_of())
    broken = state._replace(params=state.params | {"final_norm_D": jnp.full(24, 1e38)})
    after, metrics, _ = step(broken, batch_of(1))
    assert not metrics["finite"] and (int(after.step), int(after.updates)) == (2, 1)
    for array, value in flat(broken).items():
        if array not in ("step", "skips_in_a_row"):
            assert np.asarray(flat(after)[array]).tobytes() == np.asarray(value).tobytes(), array


# ---- the average -----------------------------------------------------------------------------------------------------


def test_the_average_is_its_closed_form_and_stays_where_a_step_is_skipped():
    c = named("adamw", **{"optimizer.ema_decay": 0.5})
    step, state = stepping(c), begin(c)
    expected = {name: np.asarray(p, np.float64) for name, p in state.params.items()}
    for t in range(1, 9):
        state, *_ = step(state, batch_of(t))
        decay = min(0.5, (1 + t) / (10 + t))
        expected = {name: decay * x + (1 - decay) * np.asarray(state.params[name]) for name, x in expected.items()}
        for name, x in expected.items():
            np.testing.assert_allclose(state.ema[name], x, atol=1e-6, err_msg=name)
    assert decay == 0.5 and not np.array_equal(state.ema["head_DV"], state.params["head_DV"])
    broken = state._replace(params=state.params | {"final_norm_D": jnp.full(24, 1e38)})
    after, metrics, _ = step(broken, batch_of(1))
    assert not metrics["finite"]
    assert all(np.array_equal(after.ema[name], x) for name, x in broken.ema.items())


@pytest.fixture(scope="module")
def with_average(tiny_config, tmp_path_factory):
    """(a run of 15 steps, overrides of its experiment)."""
    more = {"optimizer.ema_decay": 0.9, "stages.0.chunks": 1, "eval.windows": 1, "optimizer.name": "lion"}
    folder = tmp_path_factory.mktemp("ema") / "run"
    train(tiny_config(**more, **{"mesh.fsdp": 4, "mesh.tensor": 2}), folder)
    return folder, more


def test_the_average_over_a_resume_and_on_another_mesh(with_average, tiny_config, tmp_path):
    folder, more = with_average
    saved = open_step(folder, 15)
    shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "15")
    train(tiny_config(**more, **{"mesh.fsdp": 4, "mesh.tensor": 2}), tmp_path / "again")
    again = open_step(tmp_path / "again", 15)
    assert again.meta["digests"] == saved.meta["digests"]
    assert {name for name in saved.meta["digests"] if name.startswith("ema/")} == {
        f"ema/{name}" for name in parameter_table(saved.config.model)
    }
    assert saved.meta["digests"]["ema/head_DV"] != saved.meta["digests"]["params/head_DV"]


def test_the_average_is_evaluated_and_exported_when_asked(with_average, tmp_path):
    folder, _ = with_average
    average = open_step(folder, None, "ema")
    mesh = mesh_for(average.config)
    with jax.set_mesh(mesh):
        found = restore_params(average, mesh)
    array = open_array(average, "ema/layers.wq_LDNH").read().result()
    np.testing.assert_array_equal(found["layers.wq_LDNH"], array)
    losses = {}
    for weights in ("params", "ema", "params"):
        said = evaluated(folder, weights)
        losses.setdefault(weights, []).append(said["results"][0]["metrics"]["total"]["loss"])
        assert said["new"] == (len(losses[weights]) == 1)
    assert losses["params"][0] == losses["params"][1] != losses["ema"][0]
    for weights in ("params", "ema"):
        export(open_step(folder, None, weights), tmp_path / weights, "float32", 10**9, lambda _: None)
        found = load_file(tmp_path / weights / "model.safetensors")["lm_head.weight"]
        array = open_array(average, f"{weights}/head_DV").read().result()
        np.testing.assert_array_equal(found, array.T)
        named_in_it = read_certificate(tmp_path / weights)["checkpoint"].get("weights", "params")
        verify(open_step(folder, None, named_in_it), tmp_path / weights, lambda _: None)
    with pytest.raises(ConfigError, match="tensor .* is not the one that step 15"):
        verify(open_step(folder), tmp_path / "ema", lambda _: None)


def test_text_is_generated_from_either(with_average, monkeypatch, capsys):
    folder, _ = with_average
    found = {}
    for weights in ("params", "ema"):
        options = f"--workdir={folder}", f"--weights={weights}", "--prompt=the", "--temperature=1", "--json"
        monkeypatch.setattr("sys.argv", ["generate", *options, "--max-new-tokens=400"])
        generate.main()
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert said["weights"] == weights and len(said["ids"]) > 4
        found[weights] = said["ids"]
    assert found["params"] != found["ema"]


def evaluated(folder, weights):
    wanted = Wanted(folder, "newest", ("validation",), None, None, None, 4, None, 1, False, 4096, 0, weights=weights)
    session = Session(wanted, lambda _: None)
    session.run()
    return json.loads(session.as_json())


def test_an_average_begins_where_it_is_turned_on_and_is_dropped_where_off(tiny_run, tiny_config, tmp_path):
    with pytest.raises(ConfigError, match="--weights=ema: checkpoint 25 of .* has no average of the weights"):
        open_step(tiny_run, None, "ema")
    shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "25")
    tiny_config = partial(tiny_config, **{"log.tensorboard": True})
    on = {"optimizer.ema_decay": 0.999, "allow_drift": "optimizer"}
    train(tiny_config(**on), tmp_path / "run")
    saved = open_step(tmp_path / "run", 25, "ema")
    before = open_array(open_step(tmp_path / "run", 20), "params/head_DV").read().result()
    after = open_array(saved, "params/head_DV").read().result()
    average = open_array(saved, "ema/head_DV").read().result()
    assert 0 < np.abs(average - after).max() < np.abs(before - after).max()
    train(tiny_config(allow_drift="optimizer"), tmp_path / "run")  # done, and its checkpoint is read without
