"""Costs: every number follows from the run's own records, and says how."""

import json
import sys
import types

import pytest
from faults import runs

from k2jax import costs as command
from k2jax.data.epochs import order_of, read_epochs
from k2jax.data.order import Order
from k2jax.errors import ConfigError
from k2jax.model.flops import flops_per_token
from k2jax.run import energy
from k2jax.run.costs import costs, tokens_by_length


def by_name(rows):
    return {row.name: row for row in rows}


def test_a_run_adds_up(tiny_run, tiny_config):
    """Tokens and FLOPs against the experiment's own numbers; the hours' parts against the whole."""
    found, model = by_name(costs(tiny_run, watts=250, price=2)), tiny_config().model
    tokens = {32: 20 * 8 * 32, 64: 5 * 8 * 64}
    assert found["tokens"].value == sum(tokens.values()) and found["steps"].value == 25
    causal = sum(count * flops_per_token(model, length).causal for length, count in tokens.items())
    assert found["model FLOPs, causal attention"].value == pytest.approx(causal, rel=1e-12)
    held = found["device-hours"].value
    records = [json.loads(line) for line in (tiny_run / "goodput.jsonl").read_text().splitlines()]
    assert held == pytest.approx(sum(record["seconds"] * 8 / 3600 for record in records)), "eight devices"
    assert not found["device-hours"].estimate, "each record has its number of devices"
    parts = [row.value for name, row in found.items() if name == "useful" or name.startswith("lost: ")]
    assert sum(parts) == pytest.approx(held, rel=1e-3) and min(parts) >= 0
    assert found["energy"].value == pytest.approx(held * 0.25) and found["energy"].estimate
    assert found["money"].value == pytest.approx(held * 2)


def test_what_nobody_knows_is_no_number(tiny_run):
    found = by_name(costs(tiny_run))
    assert found["energy"].value is None and "--watts" in found["energy"].formula
    assert found["money"].value is None and found["utilization over all"].value is None


def changed(tiny_run, tmp_path, **values):
    """The run with these values in every record of its time."""
    copy = runs.copy_run(tiny_run, tmp_path / "run")
    lines = [json.loads(line) | values for line in (copy / "goodput.jsonl").read_text().splitlines()]
    (copy / "goodput.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return copy


def test_counted_energy_is_no_estimate(tiny_run, tmp_path):
    found = by_name(costs(changed(tiny_run, tmp_path, joules=7.2e6, processes=2)))
    assert found["energy"].value == pytest.approx(4.0) and not found["energy"].estimate


def test_records_of_older_versions_take_the_launch_as_it_was(tiny_run, tmp_path):
    new = by_name(costs(tiny_run))["device-hours"]
    old = by_name(costs(changed(tiny_run, tmp_path, devices=None)))["device-hours"]
    assert old.value == pytest.approx(new.value) and old.estimate


def test_tokens_of_earlier_epochs_count_once(tiny_run):
    """The order goes on from step 10 under the same manifest: what is before it is the past's."""
    manifest = read_epochs(tiny_run)[0].manifest
    whole = order_of(read_epochs(tiny_run), [])
    longer = Order(manifest, past=whole, after_step=10)
    for last in (0, 5, 10, 11, 20, 25):
        assert tokens_by_length(longer, last) == tokens_by_length(whole, last), last


def test_no_run_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="goodput.jsonl"):
        costs(tmp_path)


def test_the_command(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["costs", f"--workdir={tiny_run}", "--price=3", "--json"])
    command.main()
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} >= {
        "tokens",
        "6ND",
        "energy",
        "money",
    }
    monkeypatch.setattr(sys, "argv", ["costs", f"--workdir={tiny_run}"])
    command.main()
    assert "unknown" in capsys.readouterr().out


def test_joules_of_the_gpus(monkeypatch):
    """With a stand-in of nvidia-ml-py, as its documentation has it: no GPU is here."""
    assert energy.joules() is None
    nvml = types.ModuleType("pynvml")
    nvml.__spec__ = types.SimpleNamespace(name="pynvml")
    nvml.NVMLError = type("NVMLError", (Exception,), {})
    nvml.nvmlInit, nvml.nvmlDeviceGetCount = lambda: None, lambda: 2
    nvml.nvmlDeviceGetHandleByIndex = lambda index: index
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 1_500_000 * (handle + 1)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert energy.joules() == 4500.0
    nvml.nvmlInit = lambda: (_ for _ in ()).throw(nvml.NVMLError())
    assert energy.joules() is None
