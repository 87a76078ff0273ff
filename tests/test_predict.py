"""Prediction: a law that is known is found again, what is no ladder is refused, and nothing is predicted afterwards."""

import json
import runpy
import shutil
import sys

import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from k2jax import config as configuration
from k2jax import train
from k2jax.data.epochs import new_epoch, write_epoch
from k2jax.data.journal import read_journal
from k2jax.errors import ConfigError
from k2jax.plan import scaling
from k2jax.plan.predict import predict
from k2jax.run.ledger import Ledger
from k2jax.run.prediction import NAME, outcome, read_prediction, write_prediction
from k2jax.training.setup import open_same_data

STEPS = 60


@settings(max_examples=30)
@given(
    floor=st.floats(1.0, 3.0),
    scale=st.floats(0.3, 3.0),
    exponent=st.floats(0.05, 0.4),
    first=st.floats(1e12, 1e20),
)
def test_a_law_that_is_known_is_found_again(floor, scale, exponent, first):
    """Without noise: a hundred times above the ladder within 1%."""
    C = first * 4.0 ** np.arange(7)
    L = floor + scale * (C / C[3]) ** -exponent
    found = scaling.fit(C, L)
    far = C[-1] * 100
    assert found.loss(far) == pytest.approx(floor + scale * (far / C[3]) ** -exponent, rel=1e-2)


def test_published_laws_give_their_papers_numbers():
    """Chinchilla itself: 70B parameters, 1.4T tokens; the two fits of one data set agree there to a few percent."""
    a, b = (scaling.PUBLISHED[name].loss(70e9, 1.4e12) for name in ("hoffmann2022", "besiroglu2024"))
    assert a == pytest.approx(1.69 + 406.4 / 70e9**0.34 + 410.7 / 1.4e12**0.28) and a == pytest.approx(1.937, abs=2e-3)
    assert abs(a - b) < 0.06


def test_a_law_out_of_its_range_is_no_worse_than_a_guess(tiny_config):
    """59,552 parameters and 7,680 tokens: the law says more than a model that knows nothing has."""
    found = predict(tiny_config(), law="besiroglu2024", say=lambda line: None)["loss"]
    assert found["final"] == np.log(512) and "capped at ln(512)" in found["method"]
    k2 = configuration.load(REPOSITORY / "experiments" / "k2_65b.py")
    large = predict(k2, law="besiroglu2024", say=lambda line: None)["loss"]
    assert 1.8 < large["final"] < 2.2 and "capped" not in large["method"]


# ---- a ladder --------------------------------------------------------------------------------------------------------


@pytest.fixture
def experiment(tiny_config):
    """The tiny experiment of one width, with as many tokens a parameter at each."""

    def make(dim: int, **more):
        first = {"chunks": 1, "steps_per_chunk": STEPS - 20, "rows_per_step": dim // 4}
        second = {"steps_per_chunk": 20, "rows_per_step": dim // 8}
        stages = {f"stages.0.{key}": value for key, value in first.items()}
        stages |= {f"stages.1.{key}": value for key, value in second.items()}
        return tiny_config(**{"model.dim": dim, **stages, **more})

    return make


@pytest.fixture
def rung(experiment, tmp_path):
    """A finished run as its trainer would leave it, whose losses follow a law: 2 + (C / 1e12)^-0.1, and more before."""
    def make(dim: int, steps: int = STEPS, **more):
        config, workdir = experiment(dim, **more), tmp_path / f"rung{dim}"
        values = configuration.to_dict(config)
        workdir.mkdir()
        _, manifest = open_same_data(config)
        write_epoch(workdir, new_epoch([], run="r", after_step=0, config=values, manifest=manifest))
        final = 2 + (scaling.size_of(config).flops / 1e12) ** -0.1
        ledger = Ledger(workdir / "ledger", lambda step: 1)
        for step in range(1, steps + 1):
            ledger.append_step(step, "0" * 64, final * (2 - min(step / 30, 1.0)), 1.0, True, False)
        ledger.steps.close()
        return workdir

    return make


def test_a_ladder_predicts_the_next_rung(experiment, rung):
    config = experiment(256)
    found = predict(config, ladder=[rung(dim) for dim in (32, 48, 64, 96)], say=lambda line: None)["loss"]
    truth = 2 + (scaling.size_of(config).flops / 1e12) ** -0.1
    assert found["final"] == pytest.approx(truth, rel=0.01)
    assert found["band"][0] <= found["final"] <= found["band"][1]
    steps, curve = zip(*found["curve"], strict=True)
    assert steps[-1] == STEPS and list(steps) == sorted(steps)
    assert curve[0] == pytest.approx(found["final"] * (2 - 1 / 30), rel=0.01), "the shape of the rungs"


@pytest.mark.parametrize(
    ("target", "rungs", "said"),
    [
        ({}, [{}] * 3, "3 run"),
        ({}, [{}, {}, {}, {"steps": 30}], "30 of 60 steps"),
        ({"stages.0.rows_per_step": 512}, [{}] * 4, "tokens a parameter"),
        ({"stages.1.steps_per_chunk": 40}, [{}] * 4, "shares of its stages"),
        ({"data.tokenizer": "other"}, [{}] * 4, "tokenizer"),
    ],
)
def test_what_is_no_ladder_is_refused(experiment, rung, tmp_path, tiny_data, target, rungs, said):
    """Each would give a plausible number of another experiment."""
    if "data.tokenizer" in target:
        (tmp_path / "t.json").write_text((tiny_data / "tokenizer.json").read_text() + " ")
        target = {"data.tokenizer": str(tmp_path / "t.json")}
    ladder = [rung(dim, **more) for dim, more in zip((32, 48, 64, 96), rungs, strict=False)]
    with pytest.raises(ConfigError, match=said):
        predict(experiment(256, **target), ladder=ladder, say=lambda line: None)


def test_a_run_is_no_rung_of_itself(experiment, rung):
    with pytest.raises(ConfigError, match="no less compute"):
        predict(experiment(64), ladder=[rung(dim) for dim in (32, 48, 64, 96)], say=lambda line: None)


# ---- time ------------------------------------------------------------------------------------------------------------

PLAN = {
    "experiment": "tiny", "topology": "h100:8", "device_kind": "NVIDIA H100", "devices": 8, "fits": True, "days": 2.0,
    "chip_hours": 384.0, "mfu_causal": 0.4, "mfu_noncausal": 0.5, "stages": {"stage1": {"step_seconds": 1.5}},
}  # fmt: skip


def test_time_energy_and_money_follow_from_the_plan(tiny_config):
    found = predict(tiny_config(), law="besiroglu2024", plan=PLAN, price=2.0, say=lambda line: None)
    assert (found["wall_s"], found["cost_usd"], found["energy_kwh"]) == (172800.0, 768.0, 384 * 700 / 1e3)
    assert found["step_time_s"] == {"stage1": 1.5} and found["assumed"]["watts_a_chip"] == 700
    bare = predict(tiny_config(), law="besiroglu2024", say=lambda line: None)
    assert bare["wall_s"] is None and bare["energy_kwh"] is None
    for wrong, said in (({"experiment": "other"}, "is of other"), ({"fits": False}, "does not fit")):
        with pytest.raises(ConfigError, match=said):
            predict(tiny_config(), law="besiroglu2024", plan=PLAN | wrong, say=lambda line: None)
    with pytest.raises(ConfigError, match="hoffmann2022"):
        predict(tiny_config(), law="kaplan", say=lambda line: None)


# ---- the record ------------------------------------------------------------------------------------------------------


def test_a_run_with_a_prediction(tiny_data, tiny_config, tmp_path, monkeypatch, capsys):
    """Made by the command, its digest in the journal; the run begins as without one; then neither can be changed."""
    workdir = tmp_path / "run"
    line = [f"--config={tiny_data / 'tiny.py'}", f"--workdir={workdir}"]
    monkeypatch.setattr(sys, "argv", ["predict", *line, "--law=besiroglu2024", "--json"])
    runpy.run_path(str(REPOSITORY / "tools" / "predict.py"), run_name="__main__")
    printed = json.loads(capsys.readouterr().out)
    assert printed == read_prediction(workdir) and printed["before_step"] == 0
    train.train(tiny_config(), workdir)
    assert [entry["kind"] for entry in read_journal(workdir / "journal.jsonl")] == ["predict"]
    found = outcome(workdir)
    assert found["differs"] == [] and found["steps"] == 25 and found["loss"]["actual"] < 7
    assert found["loss"]["predicted"] == pytest.approx(printed["loss"]["final"])
    with pytest.raises(ConfigError, match="has begun"):
        write_prediction(tmp_path / "run", {})
    other = tmp_path / "other"
    write_prediction(other, predict(tiny_config(seed=3), law="besiroglu2024", say=lambda line: None))
    shutil.copytree(workdir / "epochs", other / "epochs")
    assert outcome(other)["differs"] == ["seed"], "of another experiment"
    (workdir / NAME).write_text((workdir / NAME).read_text().replace('"tokens"', '"token"'))
    with pytest.raises(ConfigError, match="not in the journal"):
        outcome(workdir)


def test_one_prediction_a_run(tmp_path):
    write_prediction(tmp_path / "run", {"loss": None})
    with pytest.raises(ConfigError, match="holds a prediction"):
        write_prediction(tmp_path / "run", {"loss": None})
    assert outcome(tmp_path) is None
