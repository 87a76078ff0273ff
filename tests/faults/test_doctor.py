"""The doctor on real runs with faults planted in them: the cause is named, with what shows it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from faults import runs
from k2jax import config as configuration
from k2jax import doctor
from k2jax.data.provenance import open_run, which_steps
from k2jax.data.store import Store
from k2jax.data.store_writer import StoreWriter
from k2jax.errors import ConfigError, NumericsError, run_main
from k2jax.parallel import cluster
from k2jax.replay import replay
from k2jax.run.checkpoint import Checkpoints
from k2jax.stability import telling
from k2jax.train import train
from k2jax.training import program, step
from k2jax.training.optimizer import init_state
from k2jax.training.placement import mesh_of, place_state

SIZES = {
    "stages.0.sequence_length": 64, "stages.0.chunks": 3, "stages.0.steps_per_chunk": 10, "stages.0.warmup_steps": 3,
    "stages.0.lr_peak": 3e-3, "stages.0.lr_final": 1e-3, "checkpoint.every_steps": 5,
    "checkpoint.keep_between": 20, "log.every_steps": 100, "eval.windows": 1,
}  # fmt: skip
BEFORE = 20  # the checkpoint from which runs go on with a fault


def settings(data, **more):
    overrides = [f"{key}={value}" for key, value in (SIZES | more).items()]
    return configuration.load(str(data / "tiny.py"), overrides)


def planted(tiny_data, root, planted_tokens):
    """The tiny stores under one stage's experiment, "code" with one document more in its midst."""
    shutil.copytree(tiny_data, root)
    text = (root / "tiny.py").read_text().replace(str(tiny_data), str(root))
    (root / "tiny.py").write_text(text.replace("    return c\n", "    c.stages = c.stages[:1]\n    return c\n"))
    old = Store.open(tiny_data / "code")
    info = json.loads((tiny_data / "code" / "store.json").read_text())
    options = {"tokenizer_sha256": info["tokenizer_sha256"], "vocab_size": info["vocab_size"], "eos_id": info["eos_id"]}
    with StoreWriter(root / "code", **options, shard_tokens=4096, chunk_tokens=512, overwrite=True) as writer:
        for index in range(old.num_documents):
            found = old.document(index)
            [tokens] = old.read([found["start"]], found["num_tokens"] - 1)
            writer.add(tokens, id=found["id"], source=found["source"])
            if index == 30:
                writer.add(planted_tokens, id="f" * 64, source="planted\x1b[2J<b>.txt")
        writer.finish(validation_fraction=0.1)
    return root


def read_whole(workdir):
    """The first step after BEFORE that reads a row of nothing but the planted document."""
    [document] = which_steps(open_run(workdir), "f" * 64)
    return next(read.step for read in document.reads if read.step > BEFORE and read.in_row == (0, 65))


@pytest.fixture(scope="module")
def data(tiny_data, tmp_path_factory):
    """An n-gram of two tokens, 150 times."""
    return planted(tiny_data, tmp_path_factory.mktemp("data") / "planted", np.tile([7, 9], 150))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("doctor") / "run"
    train(settings(data), workdir)
    return workdir


def diagnose(workdir, step, **options):
    found = doctor.diagnose(workdir, step, say=lambda line: None, **options)
    print("\n".join(telling.text(found)))
    return found


def altered(config, workdir, change):
    """The checkpoint of BEFORE made anew with `change`d state: all its digests hold."""
    with jax.set_mesh(mesh_of(config)):
        shapes = jax.eval_shape(lambda: init_state(config.model, config.seed))
        state = Checkpoints(workdir).restore(BEFORE, place_state(config, shapes, mesh_of(config)), shapes)
        was = runs.meta(workdir, BEFORE)
        again = Checkpoints(workdir / "again", [BEFORE])
        again.last_meta = was["parent"]
        computed = {"format", "layout", "step", "parent", "data", "arrays", "digests", "digest", "meta_sha256"}
        meta = {key: value for key, value in was.items() if key not in computed}
        again.save(change(state), BEFORE, data=was["data"], meta=meta)
        again.wait()
    shutil.rmtree(workdir / "checkpoints" / str(BEFORE))
    (workdir / "again" / "checkpoints" / str(BEFORE)).rename(workdir / "checkpoints" / str(BEFORE))
    path = workdir / "ledger" / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["last_step"] < BEFORE))


def flipped(array, bit):
    """One bit of one of its numbers."""
    values = np.array(array)
    values.view(np.uint32).reshape(-1)[17] ^= np.uint32(1 << bit)
    return jax.device_put(values, array.sharding)


def in_parameter(state):
    return state._replace(params={**state.params, "head_DV": flipped(state.params["head_DV"], 30)})


def in_moment(state):
    return state._replace(mu={**state.mu, "head_DV": flipped(state.mu["head_DV"], 30)})


def poison(monkeypatch, bad_step, factor):
    """From here on the gradients of a step are multiplied."""
    real_step, real_gradients, tracing = step.train_step, step.mean_gradients, []

    def train_step(state, batch, **kwargs):
        tracing[:] = [state.step + 1]
        return real_step(state, batch, **kwargs)

    def mean_gradients(*arguments, **kwargs):
        grads, sums = real_gradients(*arguments, **kwargs)
        times = jnp.where(tracing[0] == bad_step, factor, 1.0)
        return jax.tree.map(lambda g: g * times, grads), sums

    monkeypatch.setattr(program, "train_step", train_step)
    monkeypatch.setattr(step, "mean_gradients", mean_gradients)


def explode(monkeypatch, bad_step, factor):
    real = step.direction

    def direction(config, state, grads):
        toward, mu, nu = real(config, state, grads)
        times = jnp.where(state.step + 1 == bad_step, factor, 1.0)
        return jax.tree.map(lambda d: d * times, toward), mu, nu

    monkeypatch.setattr(step, "direction", direction)


def went_on(run, data, workdir, change=None, **more):
    """A copy of the run that went on from BEFORE, with a fault; it stops by itself at a spike."""
    runs.copy_run(run, workdir, BEFORE)
    if change:
        altered(settings(data), workdir, change)
    try:
        train(settings(data, **{"stability.rollback.most": 0, **more}), workdir)
    except NumericsError:
        pass
    return workdir


def causes(found):
    return [(one["cause"], one["confidence"]) for one in found["verdicts"]]


def test_a_repeated_ngram_is_the_data(run):
    """Named with its document; nothing of the run is touched."""
    at = read_whole(run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    found = diagnose(run, at)
    assert causes(found)[0][0] == "data" and found["verdict"]["confidence"] != "possible"
    row = found["data"]["rows"][0]
    assert row["subset"] == "code" and row["repeat"] == {"row": row["row"], "period": 2, "times": 32, "first": 0}
    assert row["documents"][0]["id"] == "f" * 64 and row["loss"] > row["limit"]
    assert found["data"]["swapped"]["rows"] == [row["row"]] and found["data"]["swapped"]["ordinary"]
    assert found["replay"]["again"] and found["replay"]["first_difference"] is None
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    lines, section = telling.text(found), telling.html(found)
    assert any("planted\\u001b[2J<b>.txt" in line for line in lines) and not any("\x1b" in line for line in lines)
    assert "\x1b" not in section and "<b>" not in section and "planted" in section
    assert json.loads(telling.as_json(found))["verdict"] == found["verdict"]


def test_what_is_not_there_is_said_and_the_rest_is_given(run, data, tmp_path):
    workdir = runs.copy_run(run, tmp_path / "run")
    (workdir / "checkpoints" / "20" / "params" / "manifest.ocdbt").unlink()
    found = diagnose(workdir, 22)
    assert "checkpoint 20" in found["replay"]["not_possible"] and found["verdict"]["cause"] == "nothing unusual"
    found = diagnose(workdir, 22, stores=str(tmp_path))
    assert str(tmp_path) in found["data"]["not_possible"] and found["ranges"]["loss"]["values"] == 21
    with pytest.raises(ConfigError, match=r"--step=99: the ledger of .* has no such step"):
        diagnose(workdir, 99)


def test_command(run, tmp_path, monkeypatch, capsys):
    def ended(*argv):
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["doctor", f"--workdir={run}", *argv])
        monkeypatch.setattr(cluster, "initialize", lambda: None)
        with pytest.raises(SystemExit) as end:
            run_main(doctor.main)
            raise SystemExit(0)
        return end.value.code, *capsys.readouterr()

    code, out, _ = ended()
    assert code == 0 and out.startswith("no spike: ")
    for name, begins in (("x.json", '{"format": 1'), ("x.html", "<section"), ("x.txt", "step 30: nothing unusual")):
        code, out, _ = ended("--step=30", "--recorded", f"--out={tmp_path / name}")
        assert code == 0 and out.startswith("step 30: nothing unusual (likely)\n"), out
        assert (tmp_path / name).read_text().startswith(begins)
    code, out, _ = ended("--step=30", "--recorded", "--json")
    assert code == 0 and json.loads(out)["row"]["applied"] is True
    for argv, line in ((("--step=0",), "--step=0"), (("--branch=1",), "no such branch")):
        code, _, error = ended(*argv)
        assert code == 78 and line in error and error.count("\n") == 1, error


# ---- faults that a run is given from BEFORE on -----------------------------------------------------------------------

slow = pytest.mark.slow


@slow
def test_shuffled_tokens_are_the_data(tiny_data, tmp_path):
    """No n-gram is repeated: the row's loss says it, and the batch without it."""
    tokens = np.random.default_rng(3).integers(3, 512, 300)
    data = planted(tiny_data, tmp_path / "planted", tokens)
    train(settings(data), tmp_path / "run")
    found = diagnose(tmp_path / "run", read_whole(tmp_path / "run"))
    row = found["data"]["rows"][0]
    assert found["verdict"]["cause"] == "data" and row["repeat"] is None and row["documents"][0]["id"] == "f" * 64


@slow
def test_a_bit_flipped_in_memory(run, data, tmp_path, monkeypatch):
    """Once, in a run that nothing else is wrong with: the step after differs from two replays that agree."""
    with monkeypatch.context() as patch:
        real = program.train_step

        def train_step(state, batch, **kwargs):
            new, metrics = real(state, batch, **kwargs)
            head = new.params["head_DV"].at[3, 40].add(jnp.where(new.step == 23, 8.0, 0.0))
            return new._replace(params={**new.params, "head_DV": head}), metrics

        patch.setattr(program, "train_step", train_step)
        workdir = went_on(run, data, tmp_path / "run")
    found = diagnose(workdir, 25)
    assert causes(found)[0] == ("hardware or nondeterminism", "likely")
    assert found["replay"]["first_difference"]["step"] == 24 and found["replay"]["again"]


@slow
def test_a_wrong_learning_rate(run, data, tmp_path):
    more = {"stages.0.lr_peak": 1.0, "allow_drift": "('stages',)"}
    found = diagnose(went_on(run, data, tmp_path / "run", **more), 25)
    assert causes(found)[0] == ("optimizer or learning rate", "likely")
    assert ("configuration change", "likely") in causes(found)
    assert found["at"] == 22 and found["crossings"][0]["series"].startswith("update_ratio")
    [rate] = [one for one in found["changes"] if one["kind"] == "learning rate"]
    assert rate["step"] == 21 and rate["ratio"] > 100


@slow
def test_another_configuration(run, data, tmp_path):
    more = {"model.norm_eps": 1.0, "allow_drift": "('model',)"}
    found = diagnose(went_on(run, data, tmp_path / "run", **more), 22)
    assert causes(found)[0] == ("configuration change", "likely") and found["at"] == 21
    assert "model.norm_eps: 1e-05 -> 1.0" in found["verdict"]["reasons"][0]


@slow
@pytest.mark.parametrize(("change", "step", "reason"), [
    (in_parameter, 21, "the parameters of checkpoint 20 are not those that step 20 left: norm of head"),
    (in_moment, 22, "the optimizer's first moment of head has norm"),
])  # fmt: skip
def test_a_bit_flipped_in_a_checkpoint_whose_digests_hold(run, data, tmp_path, change, step, reason):
    found = diagnose(went_on(run, data, tmp_path / "run", change), step)
    assert found["verdict"]["cause"] == "state" and any(reason in one for one in found["verdict"]["reasons"])
    assert found["checkpoint"]["through"]["first_difference"] == step
    assert found["replay"]["first_difference"] is None, "from the altered checkpoint it is what the run did"


@slow
def test_not_finite_again_and_not_again(run, data, tmp_path, monkeypatch):
    """Where the step is NaN again it is numerics; where it is not, the run's own step went wrong."""
    with monkeypatch.context() as patch:
        poison(patch, 24, float("nan"))
        workdir = went_on(run, data, tmp_path / "run")
        assert causes(diagnose(workdir, 24))[0] == ("numerics (not finite)", "certain")
    found = diagnose(workdir, 24)
    assert causes(found)[:1] == [("hardware or nondeterminism", "likely")]
    assert ("numerics (not finite)", "possible") in causes(found)
    assert doctor.newest_spike(workdir) == (workdir, 24)
    assert causes(diagnose(workdir, 24, again=False)) == [("numerics (not finite)", "likely")]


@slow
def test_a_skipped_outlier_is_skipped_again(run, data, tmp_path, monkeypatch):
    """A replay makes an update or none as the run did, whatever limits it had."""
    poison(monkeypatch, 24, 50.0)
    more = {"stability.window": 8, "allow_drift": "('stability',)"}
    workdir = went_on(run, data, tmp_path / "run", **more)
    assert [row["step"] for row in runs.ledger_rows(workdir) if row["outlier"] and not row["applied"]] == [24]
    assert [step.bits for step in replay(workdir, 24, 3, say=lambda line: None)] == [True] * 3


@slow
def test_a_branch_is_looked_at_as_it_was(run, data, tmp_path, monkeypatch):
    """Three batches that are not finite roll the run back: the newest spike is in the branch, whose rows they are."""
    bad = [np.frombuffer(bytes.fromhex(row["batch"]), "<u4") for row in runs.ledger_rows(run)[23:26]]
    real_step, real_gradients, tracing = step.train_step, step.mean_gradients, []

    def train_step(state, batch, **kwargs):
        tracing[:] = [batch.digest.reshape(-1, 8).sum(axis=0, dtype=jnp.uint32)]
        return real_step(state, batch, **kwargs)

    def mean_gradients(*arguments, **kwargs):
        grads, sums = real_gradients(*arguments, **kwargs)
        times = jnp.where((tracing[0] == jnp.array(bad)).all(axis=1).any(), jnp.nan, 1.0)
        return jax.tree.map(lambda g: g * times, grads), sums

    monkeypatch.setattr(program, "train_step", train_step)
    monkeypatch.setattr(step, "mean_gradients", mean_gradients)
    ladder = {"most": 1, "how": "skip", "before": 0, "after": 2, "watch": 1}
    more = {f"stability.rollback.{key}": value for key, value in ladder.items()}
    workdir = went_on(run, data, tmp_path / "run", **more)
    assert [row["step"] for row in runs.ledger_rows(workdir)] == list(range(1, 28)), "less three"
    folder, crossing = doctor.newest_spike(workdir)
    assert (folder, crossing) == (workdir / "branches" / "01", 24) == doctor.newest_spike(workdir, 1)
    with jax.set_mesh(mesh_of(settings(data))):  # as in a trainer that has let go of its state
        found = diagnose(folder, crossing)
    assert causes(found)[0] == ("numerics (not finite)", "certain") and found["replay"]["from"] == 20
    assert "other batches are finite from this state" in found["verdict"]["reasons"]
    found = diagnose(workdir, 24)
    assert found["verdict"]["cause"] == "nothing unusual" and found["replay"]["first_difference"] is None
    assert ("journal", 21) in [(one["kind"], one["step"]) for one in found["changes"]]


@slow
def test_an_exploding_update(run, data, tmp_path, monkeypatch):
    """The update leaves its range a step before the loss does; no learning rate has changed."""
    explode(monkeypatch, 24, 300.0)
    found = diagnose(went_on(run, data, tmp_path / "run"), 25)
    assert causes(found)[0] == ("optimizer or learning rate", "likely")
    assert found["at"] == 25 and found["crossings"][0]["lead"] == 1


@slow
def test_a_step_that_has_other_bits_each_time(run, monkeypatch):
    real, calls = doctor.Trials._compare, []

    def compare(self, number, values):
        calls.append(number)
        return real(self, number, {**values, "loss": values["loss"] + 1e-6 * len(calls)})

    monkeypatch.setattr(doctor.Trials, "_compare", compare)
    assert causes(diagnose(run, 23))[0] == ("hardware or nondeterminism", "certain")
