"""What differs between save and resume: places change freely, contents are refused unless allowed by name."""

import json
import shlex
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from conftest import SUBSETS, VOCAB_SIZE

from faults import runs
from k2jax import config as configuration
from k2jax.data.epochs import decide, read_epochs
from k2jax.data.journal import append_entry, read_journal
from k2jax.data.loader import batch_digest, make_loader
from k2jax.data.manifest import sha256_json
from k2jax.data.store import Store
from k2jax.data.store_writer import StoreWriter
from k2jax.data.tokenizer import tokenizer_sha256
from k2jax.errors import StorageError
from k2jax.parallel import sharding
from k2jax.run.checkpoint import Checkpoints
from k2jax.run.ledger import bits_float
from k2jax.run.saved import open_step
from k2jax.training.optimizer import init_state
from k2jax.training.placement import place_state

SAVED_ON = {"mesh.fsdp": 4, "mesh.tensor": 2}
OTHER_MESHES = [
    ({"mesh.replica": 2, "mesh.fsdp": 2, "mesh.tensor": 2}, 8),
    ({"mesh.fsdp": 8, "mesh.tensor": 1}, 8),
    ({"mesh.fsdp": 1, "mesh.tensor": 1}, 1),
    # A pipeline, to the end of the run: with validation and a sampled text.
    (
        {
            "mesh.stage": 2, "mesh.fsdp": 4, "mesh.tensor": 1, "model.pipeline.microbatches": 2,
            "eval.prompts": "('abc',)", "eval.new_tokens": 4,
        },
        8,
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def late(straight, tmp_path_factory):
    """A run that ended with its first stage: what goes on compiles the second one only."""
    return runs.copy_run(straight, tmp_path_factory.mktemp("late") / "run", last_step=20)


# ---- other places ------------------------------------------------------------------------------------------


@pytest.mark.fault("C1")
def test_arrays_are_the_same_on_any_mesh(straight, tiny_config, tmp_path):
    """Restored on one mesh after the other, each time from what the last one saved: equal digests of every array."""
    expected = runs.meta(straight, 25)["digests"]
    assert len(expected) == 3 * 12 + 3
    workdir = straight
    copies = {"mesh.replica": 4, "mesh.fsdp": 2, "mesh.tensor": 1}
    for i, (sizes, num_devices) in enumerate([(SAVED_ON, 8), (copies, 8), *OTHER_MESHES]):
        config = tiny_config(**sizes)
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:num_devices])
        if sizes is copies:  # as of replicas that cannot all split the moments
            mesh = sharding.split_replicas(mesh, 2)
        shapes = jax.eval_shape(partial(init_state, config.model, config.seed))
        with jax.set_mesh(mesh):
            shardings = place_state(config, shapes, mesh)
            state = Checkpoints(workdir).restore(25, shardings, shapes)
            assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {num_devices}
            workdir = tmp_path / f"again{i}"
            again = Checkpoints(workdir, [25])
            again.save(state, 25, data={"next_step": 26, "order": "x"}, meta={})
            again.wait()
        assert runs.meta(workdir, 25)["digests"] == expected


@pytest.mark.fault("C1")
@pytest.mark.parametrize(
    ("sizes", "step"), [(sizes, 10 if i == 1 else 20) for i, (sizes, n) in enumerate(OTHER_MESHES) if n == 8]
)
def test_another_mesh_goes_on_within_rounding(tiny_data, straight, stopped, late, command, tmp_path, sizes, step):
    """A run on two devices goes on on eight, whatever the mesh: same batches, losses within 1e-4."""
    workdir = runs.copy_run({10: stopped, 20: late}[step], tmp_path / "run")
    ended = command.train(tiny_data, workdir, sizes)
    assert ended.code == 0 and f"resuming after step {step} of 25" in ended.lines, ended
    compare_within_rounding(workdir, straight, step)


@pytest.mark.fault("C1")
def test_one_device_goes_on_within_rounding(straight, late, start, tmp_path):
    workdir = runs.copy_run(late, tmp_path / "run")
    start(workdir, devices=1).wait(0)
    compare_within_rounding(workdir, straight, 20)


def compare_within_rounding(workdir, other, step):
    rows, expected = runs.ledger_rows(workdir), runs.ledger_rows(other)
    assert [row["batch"] for row in rows] == [row["batch"] for row in expected]
    assert rows[:step] == expected[:step]
    losses = np.array([[bits_float(row["loss"]) for row in run] for run in (rows, expected)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1e-4)


def test_free_keys_may_change(tiny_data, straight, late, command, tmp_path):
    """Where, how fast and how talkative: no word about them, the same batches."""
    workdir = runs.copy_run(late, tmp_path / "run")
    free = {
        "mesh.tensor": 4, "log.every_steps": 5, "log.tensorboard": True, "data.workers": 1, "data.threads": 1,
        "data.prefetch": 2, "data.verify": "sha256", "checkpoint.every_steps": 4, "checkpoint.keep_between": 1,
        "eval.windows": 4, "model.remat": "full", "stages.1.microbatches": 2, "model.rings": (2,),
        "compiler.tpu": ("xla_tpu_enable_async_collective_fusion=true",),
    }  # fmt: skip
    ended = command.train(tiny_data, workdir, free)
    assert ended.code == 0 and not any("other versions" in line for line in ended.lines), ended
    assert read_journal(workdir / "journal.jsonl") == []
    compare_within_rounding(workdir, straight, 20)


# ---- other contents ----------------------------------------------------------------------------------------


DRIFTS = {
    "model.norm_eps": ({"model.norm_eps": 1e-6}, ["model.norm_eps: 1e-05 -> 1e-06"]),
    "model.dim": ({"model.dim": 64}, ["model.dim: 32 -> 64"]),
    "optimizer": (
        {"optimizer.b2": 0.99, "optimizer.eps": 1e-6},
        ["optimizer.b2: 0.95 -> 0.99", "optimizer.eps"],
    ),
    "seed": ({"seed": 1}, ["seed: 22238 -> 1"]),
    "batch": ({"stages.0.rows_per_step": 16}, ["stages.0.rows_per_step: 8 -> 16"]),
    "schedule": ({"stages.1.lr_peak": 3e-3}, ["stages.1.lr_peak: 0.002 -> 0.003"]),
    "mix": ({"stages.1.mix.web": 2.0}, ["stages.1.mix.web: 1.0 -> 2.0"]),
    "labels": ({"data.label_shift": "inside"}, ["data.label_shift: 'next' -> 'inside'"]),
}


@pytest.mark.fault("C4", "C5")
@pytest.mark.parametrize("name", DRIFTS)
def test_drift_is_refused_key_by_key(tiny_data, stopped, command, tmp_path, name):
    """Seen red without the comparison of keys."""
    workdir, (overrides, differences) = runs.copy_run(stopped, tmp_path / "run"), DRIFTS[name]
    before = contents(workdir)
    error = command.refuse(78, *runs.arguments(tiny_data, workdir, overrides))
    assert all(difference in error for difference in differences), error
    pasted = shlex.split(error.partition("allow it: --config.")[2])
    allowed = configuration.load("experiments/smoke.py", pasted).allow_drift
    assert allowed == tuple(difference.partition(":")[0] for difference in differences), pasted
    assert contents(workdir) == before


def contents(workdir):
    return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.name != "lock"}


def other_data(source, to, *, swap_tokens=False, change=None):
    """A copy of a data folder: with two tokens of the tokenizer swapped, or one token of a store changed."""
    to.mkdir()
    text = (source / "tokenizer.json").read_text()
    if swap_tokens:
        vocab = json.loads(text)["model"]["vocab"]
        one, two = sorted(vocab, key=vocab.get)[-40:-38]
        content = json.loads(text)
        content["model"]["vocab"] |= {one: vocab[two], two: vocab[one]}
        text = json.dumps(content)
    (to / "tokenizer.json").write_text(text)
    for name in SUBSETS:
        old = Store.open(source / name)
        options = {"tokenizer_sha256": tokenizer_sha256(to / "tokenizer.json"), "vocab_size": VOCAB_SIZE,
                   "eos_id": old.info["eos_id"], "shard_tokens": 4096, "chunk_tokens": 512}  # fmt: skip
        with StoreWriter(to / name, **options) as writer:
            for i in range(old.num_documents):
                document = old.document(i)
                tokens = old.read([document["start"]], document["num_tokens"] - 1)[0]
                if (name, i) == (change, 7):
                    tokens[3] ^= 1
                writer.add(tokens, id=document["id"], source=document["source"])
            writer.finish(validation_fraction=0.1)
    (to / "tiny.py").write_text((source / "tiny.py").read_text().replace(str(source), str(to)))
    return to


@pytest.mark.fault("C7", "C8")
def test_another_tokenizer_or_store_is_refused(tiny_data, late, command, tmp_path):
    """Same sizes, same counts: two tokens have changed places, or one token of one document is another.

    Seen red without the tokenizer's SHA-256 in the identity; without the stores' digests in it.
    """
    swapped = other_data(tiny_data, tmp_path / "swapped", swap_tokens=True)
    changed = other_data(tiny_data, tmp_path / "changed", change="code")
    same = other_data(tiny_data, tmp_path / "same")
    workdir = runs.copy_run(late, tmp_path / "run")
    error = command.refuse(78, *runs.arguments(swapped, workdir, {}))
    assert "manifest.tokenizer_sha256" in error and "manifest.stores.books" in error
    error = command.refuse(78, *runs.arguments(changed, workdir, {}))
    assert "manifest.stores.code" in error and "manifest.stores.web" not in error
    # The run's own tokenizer file replaced, the stores as they were.
    other = {"data.tokenizer": swapped / "tokenizer.json"}
    error = command.refuse(78, *runs.arguments(tiny_data, workdir, other))
    assert "tokenizer" in error and "SHA-256" in error
    # A copy of the data at another place is the same data.
    assert command.train(same, workdir).code == 0


@pytest.mark.fault("C5")
def test_drift_allowed_by_name_is_an_epoch(tiny_data, straight, stopped, command, tmp_path):
    """Allowed: it runs, an epoch says what was allowed, the past stays what it was, a restart needs no more leave."""
    workdir = runs.copy_run(stopped, tmp_path / "run")
    before, [first] = runs.order_of(workdir), read_epochs(workdir)
    drift = {"stages.0.mix.web": 3.0, "stages.0.rows_per_step": 16, "optimizer.max_skips_in_a_row": 4}
    error = command.refuse(78, *runs.arguments(tiny_data, workdir, {**drift, "allow_drift": "('stages',)"}))
    assert "optimizer.max_skips" in error and "stages.0" not in error

    allowed = {**drift, "allow_drift": "('stages','optimizer')"}
    ended = command.train(tiny_data, workdir, allowed)
    assert ended.code == 0 and "resuming after step 10 of 25" in ended.lines, ended
    assert read_epochs(workdir)[0] == first and read_journal(workdir / "journal.jsonl") == []
    _, epoch = read_epochs(workdir)
    assert epoch.after_step == 10 and epoch.previous == first.digest and epoch.run == first.run
    changes = {"stages.0.mix.web": [1.0, 3.0], "stages.0.rows_per_step": [8, 16]}
    assert epoch.changes == {**changes, "optimizer.max_skips_in_a_row": [3, 4]}
    rows, expected = runs.ledger_rows(workdir), runs.ledger_rows(straight)
    assert rows[:10] == expected[:10]
    assert not {row["batch"] for row in rows[10:20]} & {row["batch"] for row in expected}
    runs.ledger(workdir).verify()
    # All that the ledger says was read is what the order says, before the change and after it, each window once.
    order, stores = runs.order_of(workdir), {name: Store.open(tiny_data / name) for name in SUBSETS}
    for steps in ((1, 10), (11, 20), (21, 25)):
        for step, batch in make_loader(order, stores, label_shift="next", first_step=steps[0], last_step=steps[1]):
            assert batch_digest(batch["digest"]) == rows[step - 1]["batch"], step
    read = [tuple(order.row(int(p))) for step in range(1, 21) for p in order.positions(step)]
    assert len(set(read)) == len(read) == 10 * 8 + 10 * 16
    assert [tuple(before.row(int(p))) for step in range(1, 11) for p in before.positions(step)] == read[:80]

    shutil.rmtree(workdir / "checkpoints" / "25")
    ended = command.train(tiny_data, workdir, drift)
    assert ended.code == 0 and "resuming after step 20 of 25" in ended.lines, ended
    assert len(read_epochs(workdir)) == 2
    assert runs.ledger_rows(workdir) == rows
    assert "stages.0.mix.web: 3.0 -> 1.0" in command.refuse(78, *runs.arguments(tiny_data, workdir, {}))


def test_a_change_under_which_nothing_was_saved_leaves_no_trace(tiny_data, late, command, tmp_path):
    """Allowed, and failed before its first checkpoint: the old command goes on as if it had not been."""
    workdir = runs.copy_run(late, tmp_path / "run")
    changed = {"seed": 5, "stages.1.lr_peak": 1e30, "stages.1.lr_final": 1e30, "stability.rollback.most": 0}
    ended = command(*runs.arguments(tiny_data, workdir, {**changed, "allow_drift": "('seed','stages')"}))
    assert ended.code == 65, ended
    assert [epoch.config["seed"] for epoch in read_epochs(workdir)] == [22238, 5]
    ended = command.train(tiny_data, workdir)
    assert ended.code == 0 and "resuming after step 20 of 25" in ended.lines, ended
    assert [epoch.config["seed"] for epoch in read_epochs(workdir)] == [22238]
    assert [path.name[:10] for path in (workdir / "abandoned").iterdir()] == ["epoch-0002"]


@pytest.mark.fault("A8")
def test_launches_without_a_checkpoint_come_to_an_end(tiny_data, late, command, tmp_path):
    """A restart script's loop ends with 78; a run that came to its end may be started again and again.

    Seen red without the count of launches.
    """
    workdir = runs.copy_run(late, tmp_path / "run")
    wrong = {"checkpoint.max_launches": 2, "stages.1.lr_peak": 1e30, "allow_drift": "('stages',)"}
    wrong |= {"stability.rollback.most": 0}
    assert [command(*runs.arguments(tiny_data, workdir, wrong)).code for _ in range(3)] == [65, 65, 78]
    error = command.refuse(78, *runs.arguments(tiny_data, workdir, {"checkpoint.max_launches": 2}))
    assert "2 launches since" in error and "no new checkpoint after step 20" in error
    assert [command.train(tiny_data, workdir, {"checkpoint.max_launches": 3}).code for _ in range(4)] == [0] * 4


@pytest.mark.fault("C4")
def test_drift_that_does_not_fit_changes_nothing(tiny_data, late, command, tmp_path):
    """Leave to change the model's width cannot help: 78, and the run can still go on as it was."""
    workdir = runs.copy_run(late, tmp_path / "run")
    wide = {"model.dim": 64, "allow_drift": "('model',)"}
    error = command.refuse(78, *runs.arguments(tiny_data, workdir, wide))
    assert "array" in error and "(512, 32)" in error and "(512, 64)" in error
    assert command.train(tiny_data, workdir).code == 0


CHANGED_METAS = {
    "dtype": lambda meta: meta["arrays"]["mu/head_DV"].__setitem__(1, "bfloat16"),
    "shape": lambda meta: meta["arrays"]["mu/head_DV"].__setitem__(0, [32, 513]),
    "name": lambda meta: meta["arrays"].update(extra=meta["arrays"].pop("mu/head_DV")),
    "layout": lambda meta: meta.update(layout=2),
    "format": lambda meta: meta.update(format=7),
}


@pytest.mark.fault("C6", "C9")
@pytest.mark.parametrize("name", CHANGED_METAS)
def test_another_layout_is_refused(tiny_data, stopped, command, tmp_path, name):
    """A checkpoint that is whole but of other arrays or another version: 78, no cast, no fall-back.

    Seen red without the comparison of shapes and types; without the format number.
    """
    workdir = runs.copy_run(stopped, tmp_path / "run")
    path = workdir / "checkpoints" / "10" / "meta" / "meta.json"
    meta = json.loads(path.read_text())
    del meta["meta_sha256"]
    CHANGED_METAS[name](meta)
    path.write_text(json.dumps({**meta, "meta_sha256": sha256_json(meta)}))
    error = command.refuse(78, *runs.arguments(tiny_data, workdir, {}))
    assert "checkpoint 10" in error and any(word in error for word in ("mu/head_DV", "extra", f"{name} "))
    assert runs.checkpoint_steps(workdir) == [10]


@pytest.mark.fault("C10")
def test_other_versions_are_said_once(tiny_data, late, command, tmp_path):
    """With both, and the run goes on; where they are the same nothing is said. Seen red without the line."""
    workdir = runs.copy_run(late, tmp_path / "run")
    path = workdir / "checkpoints" / "20" / "meta" / "meta.json"
    meta = json.loads(path.read_text())
    del meta["meta_sha256"]
    now = dict(meta["versions"])
    meta["versions"] |= {"jax": "0.4.1", "orbax-checkpoint": "0.1.2"}
    path.write_text(json.dumps({**meta, "meta_sha256": sha256_json(meta)}))
    ended = command.train(tiny_data, workdir)
    assert ended.code == 0, ended
    [line] = [line for line in ended.lines if "0.4.1" in line]
    both = f"jax 0.4.1, now {now['jax']}; orbax-checkpoint 0.1.2, now {now['orbax-checkpoint']}"
    assert line.startswith(f"checkpoint 20 was saved with other versions: {both}")


# ---- decisions of the journal ------------------------------------------------------------------------------


def test_skip_and_defer(tiny_data, straight, stopped, command, tmp_path):
    """Decided at a checkpoint: skipped rows are never read, deferred rows last in their stage, all else as it was."""
    workdir = runs.copy_run(stopped, tmp_path / "run")
    epochs, path = read_epochs(workdir), workdir / "journal.jsonl"
    old = runs.order_of(workdir)
    for kind, step in (("defer", 12), ("skip", 16)):
        first, *_, last = old.positions(step).tolist()
        decision = {
            "kind": kind,
            "ranges": [(first, last + 1)],
            "at_step": 10,
            "by": "test",
            "why": "a test",
        }
        append_entry(path, decide(epochs, read_journal(path), **decision))
    ended = command.train(tiny_data, workdir)
    assert ended.code == 0 and "resuming after step 10 of 24" in ended.lines, ended

    expected = [row["batch"] for row in runs.ledger_rows(straight)]
    found = [row["batch"] for row in runs.ledger_rows(workdir)]
    stage_one = [*range(1, 12), 13, 14, 15, 17, 18, 19, 20, 12]
    assert found == [expected[step - 1] for step in [*stage_one, *range(21, 26)]]
    assert runs.checkpoint_steps(workdir) == [10, 19, 24]
    runs.ledger(workdir).verify()
    rates = [row["lr"] for row in runs.metric_rows(workdir)]
    first, second = (stage["lr_final"] for stage in epochs[0].config["stages"])
    assert rates[18] == pytest.approx(first) and rates[23] == pytest.approx(second), "the stages end where they should"


def test_a_whole_stage_may_be_skipped(tiny_data, late, command, tmp_path):
    """Nothing is compiled for it; the run ends with the stage before, on which it is evaluated."""
    workdir = runs.copy_run(late, tmp_path / "run")
    epochs, path = read_epochs(workdir), workdir / "journal.jsonl"
    stage = runs.order_of(workdir).stages[1]
    positions = stage.first_position, stage.stop_position
    append_entry(path, decide(epochs, [], kind="skip", ranges=[positions], at_step=20, by="test", why="a test"))
    ended = command.train(tiny_data, workdir)
    assert ended.code == 0 and "resuming after step 20 of 20" in ended.lines, ended
    assert not any("compiling the step" in line for line in ended.lines)
    assert json.loads((workdir / "validation.json").read_text())["step"] == 20


def test_a_decision_on_rows_already_read_is_refused(tiny_data, straight, command, tmp_path):
    """It holds from step 10 on, the newest checkpoint is of step 20: that one must go first."""
    workdir = runs.copy_run(straight, tmp_path / "run", last_step=20)
    epochs, path = read_epochs(workdir), workdir / "journal.jsonl"
    entry = decide(epochs, [], kind="defer", ranges=[(96, 104)], at_step=10, by="test", why="a test")
    append_entry(path, entry)
    error = command.refuse(78, *runs.arguments(tiny_data, workdir, {}))
    assert "checkpoint 20" in error and "at step 10 changes rows that it has read" in error
    shutil.move(workdir / "checkpoints" / "20", tmp_path)
    ended = command.train(tiny_data, workdir)
    assert ended.code == 0 and "resuming after step 10 of 25" in ended.lines, ended


def test_a_checkpoint_of_another_step_or_run_is_refused(straight, start, tmp_path):
    """A folder renamed, and checkpoints of a run with another weight decay copied beside nothing else."""
    renamed = runs.copy_run(straight, tmp_path / "renamed")
    shutil.rmtree(renamed / "checkpoints" / "20")
    (renamed / "checkpoints" / "25").rename(renamed / "checkpoints" / "20")
    error = start(renamed).wait(0)
    assert any("it is that of step 25, in a folder of another name" in line for line in error)
    assert "resuming after step 10 of 25" in error
    read = runs.copy_run(straight, tmp_path / "read")
    (read / "checkpoints" / "25").rename(read / "checkpoints" / "26")
    with pytest.raises(StorageError, match="it is that of step 25"):
        open_step(read, 26)

    copied = tmp_path / "copied"
    shutil.copytree(straight / "checkpoints", copied / "checkpoints")
    error = start(copied, {"optimizer.weight_decay": 0.3}).wait_for_error(78)
    assert "checkpoint 25 in" in error and "is of another run" in error and "--fork" in error
