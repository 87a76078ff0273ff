"""Numbers that are not finite: the step is skipped, nothing is lost, and nothing broken is ever saved."""

import time

import jax.numpy as jnp
import pytest

from faults import runs
from k2jax.data.journal import read_journal
from k2jax.run import storage
from k2jax.training import losses, program, step

ROW = 3  # of eight, on eight devices: one device meets the fault
FAULTS = {
    "nan": lambda loss, on: loss * jnp.where(on, jnp.nan, 1.0),
    "inf": lambda loss, on: loss * jnp.where(on, jnp.inf, 1.0),
    # sqrt at 0: the loss stays what it is, its gradient is 0 * inf
    "gradient": lambda loss, on: (
        loss + jnp.sqrt(loss * 0 + jnp.where(on, 0.0, 1.0)) - jnp.where(on, 0.0, 1.0)
    ),
}


@pytest.fixture
def poison(monkeypatch):
    """`poison({7: "nan"})`: from here on, the loss of one row of step 7 is poisoned."""

    def poison(faults, monkeypatch=monkeypatch):
        real_step, real_loss, tracing = step.train_step, losses.head_loss, []

        def train_step(state, batch, **kwargs):
            tracing.append(state.step + 1)
            try:
                return real_step(state, batch, **kwargs)
            finally:
                tracing.clear()

        def head_loss(*arguments):
            loss, told = real_loss(*arguments)
            if tracing:  # not in the validation
                for number, kind in faults.items():
                    loss = FAULTS[kind](loss, tracing[0] == number)
                    nats_B = FAULTS[kind](told.nats[ROW], tracing[0] == number)
                    told = told._replace(nats=told.nats.at[ROW].set(nats_B))
            return loss, told

        monkeypatch.setattr(program, "train_step", train_step)
        monkeypatch.setattr(losses, "head_loss", head_loss)

    return poison


@pytest.mark.fault("D1", "D3")
def test_a_fault_on_one_device_costs_one_step(tiny_data, command, poison, tmp_path):
    """NaN, Inf, and a bad gradient under a good loss; in the warm-up and after, alone and two in a row.

    Parameters and moments keep their bits, which the digests of a checkpoint a step show; all others move.
    """
    poison({3: "nan", 7: "inf", 8: "gradient"})
    short = {"stages.0.chunks": 1, "stages.0.steps_per_chunk": 10, "stages.1.steps_per_chunk": 1}
    every = {"checkpoint.every_steps": 1, "checkpoint.keep_between": 20, "log.every_steps": 5}
    ended = command.train(tiny_data, tmp_path / "run", short | every)
    assert ended.code == 0, ended
    skipped = {3, 7, 8}
    rows = runs.metric_rows(tmp_path / "run")
    assert {row["step"] for row in rows if not row["applied"]} == skipped
    assert {row["step"] for row in runs.ledger_rows(tmp_path / "run") if not row["applied"]} == skipped
    told = [line for line in ended.lines if "no update was made" in line]
    assert [int(line.split()[1].rstrip(":")) for line in told] == sorted(skipped)
    noted = [(entry["kind"], entry["at_step"]) for entry in read_journal(tmp_path / "run" / "journal.jsonl")]
    assert noted == [("no_update", number) for number in sorted(skipped)]
    digests = {number: runs.meta(tmp_path / "run", number)["digests"] for number in range(1, 12)}
    for number in range(2, 12):
        same = {name for name, value in digests[number].items() if value == digests[number - 1][name]}
        arrays = {name for name in digests[number] if "/" in name}
        assert same & arrays == (arrays if number in skipped else set()), number
        assert ("updates" in same) == (number in skipped)
    assert [row["update_norm"] for row in rows if row["step"] in skipped] == [0.0] * 3


STOPPED = {8: "nan", 9: "inf", 11: "nan", 12: "inf", 13: "nan"}  # two in a row do not stop a run


@pytest.mark.fault("D2")
def test_three_in_a_row_stop_the_run_behind_the_save_under_way(tiny_data, command, poison, monkeypatch, tmp_path):
    """65, naming the steps. On a slow disk the save of step 10 is under way then: it is kept, and the run goes on."""
    workdir, real = tmp_path / "run", storage._LateJson._save_fn

    async def save_slowly(self, item, directory):
        time.sleep(1)
        await real(self, item, directory)

    with monkeypatch.context() as patch:
        patch.setattr(storage._LateJson, "_save_fn", save_slowly)
        poison(STOPPED, patch)
        error = command.refuse(65, *runs.arguments(tiny_data, workdir, {"stability.rollback.most": 0}))
    assert "not finite in 3 steps in a row" in error and "seen at step 13" in error
    assert runs.checkpoint_steps(workdir) == [10]
    assert [row["step"] for row in runs.ledger_rows(workdir) if not row["applied"]] == list(STOPPED)
    ended = command.train(tiny_data, workdir)
    assert ended.code == 0 and "resuming after step 10 of 25" in ended.lines, ended
    assert [row["step"] for row in runs.ledger_rows(workdir) if not row["applied"]] == [8, 9]
    runs.ledger(workdir).verify()


@pytest.mark.fault("D3")
def test_broken_parameters_are_never_saved(tiny_data, command, monkeypatch, tmp_path):
    """An update that ruins the parameters at the very step of a checkpoint: 65 and nothing saved.

    Seen red without the look at the parameters before a save.
    """
    real = step.direction

    def ruined(config, state, grads):
        direction, mu, nu = real(config, state, grads)
        bad = jnp.where(state.step + 1 == 10, jnp.inf, 1.0)
        return {**direction, "head_DV": direction["head_DV"] * bad}, mu, nu

    monkeypatch.setattr(step, "direction", ruined)
    error = command.refuse(65, *runs.arguments(tiny_data, tmp_path / "run", {}))
    assert "step 10: parameters are not finite" in error
    assert runs.checkpoint_steps(tmp_path / "run") == []
