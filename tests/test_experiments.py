"""Every experiment file trains a step when shrunk, and what it resolves to is under test as text.

A change of an experiment, or of a default that it has, shows as a difference of tests/golden/: look at it, and write
the new text with `UPDATE_GOLDEN=1 make test`.
"""

import ast
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversation_stores import write_pairs, write_store
from ml_collections import ConfigDict

from k2jax import config as configuration
from k2jax.data import chunks
from k2jax.data.tokenizer import EOS, load_tokenizer, tokenizer_sha256
from k2jax.model.decoder import num_params, parameter_table
from k2jax.parallel import sharding
from k2jax.run.ledger import Ledger, StepLog, bits_float
from k2jax.train import train
from k2jax.training.optimizer import learning_rate

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))
GOLDEN = Path(__file__).parent / "golden"


def check_golden(path: Path, text: str) -> None:
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, f"{path.name} has changed: if that is meant, UPDATE_GOLDEN=1 make test"


@pytest.fixture(autouse=True)
def a_prepared_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where experiments/mine.py and mine_1b.py look for theirs: what its data.json says of the recipe's one store."""
    folder = tmp_path_factory.mktemp("prepared")
    says = {"stores": {"documents": {"subset": "documents"}}, "config": {"subsets": {"documents": {}}}}
    (folder / "data" / "mine").mkdir(parents=True)
    (folder / "data" / "mine" / "data.json").write_text(json.dumps({"mix": {"documents": 1.0}, **says}))
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_resolves_to_the_golden_text(path: Path):
    values = configuration.flatten(configuration.to_dict(configuration.load(str(path))))
    check_golden(GOLDEN / f"{path.stem}.txt", "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items()))


def test_k2_65b_parameters_are_the_golden_ones():
    c = configuration.load(str(ROOT / "experiments" / "k2_65b.py"))
    assert num_params(c.model) == 65_286_184_960
    table = parameter_table(c.model)
    lines = [f"{name} {p.shape} {sharding.spec(p.axes)} std {p.std} {p.group}\n" for name, p in table.items()]
    check_golden(GOLDEN / "k2_65b_parameters.txt", "".join(lines))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_is_a_lab_note(path: Path):
    text = path.read_text()
    note = ast.get_docstring(ast.parse(text))
    for part in ("Purpose:", "Data:", "Command:", "Hardware:", "Tokens", "Expect"):
        assert part in note, f"{path.name}: the docstring says nothing of {part}"
    assert len(text.splitlines()) <= 80


def shrink(c: ConfigDict, data: Path, root: Path) -> ConfigDict:
    """The same experiment on a tiny model, with a store of tiny data under each name that its mix has."""
    same = {"tokenizer_sha256": tokenizer_sha256(data / "tokenizer.json"), "held_out": 0.1}
    same["eos_id"] = load_tokenizer(data / "tokenizer.json").token_to_id(EOS)
    for name, kind in {(name, stage.kind) for stage in c.stages for name in stage.mix}:
        if kind == "sft":
            write_store(root / name, [2 + i % 3 for i in range(60)], **same)
        elif kind == "dpo":
            write_pairs(root / name, [(4, 4)] * 60, **same)
        else:
            shutil.copytree(data / "code", root / name)
    with c.unlocked():
        c.model.update(
            vocab_size=512, dim=32, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=4, ffn_dim=48
        )
        c.data.root, c.data.tokenizer = str(root), str(data / "tokenizer.json")
        c.mesh.replica, c.mesh.fsdp, c.mesh.tensor = 1, -1, 1
        c.mesh.context = min(c.mesh.context, 2)
        c.model.rings = {0: (), 2: (4, 2), 3: (2, 2, 2)}[len(c.model.rings)]
        c.eval.windows, c.eval.new_tokens = 2, 4
        if c.mesh.context > 1:
            c.eval.prompts = ("abc",)  # which goes on where no row is shared
        for stage in c.stages:
            stage.sequence_length = min(stage.sequence_length // 32, 128)  # two blocks of attention
            stage.microbatches = min(stage.microbatches, 2)
            stage.rows_per_step = 8 * stage.microbatches
            stage.steps_per_chunk, stage.chunks, stage.warmup_steps = 2, 1, min(stage.warmup_steps, 1)
    configuration.validate(c)
    return c.lock()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_trains_when_shrunk(path: Path, tiny_data: Path, tmp_path: Path):
    c = shrink(configuration.load(str(path)), tiny_data, tmp_path / "data")
    train(c, tmp_path / "run")
    rows = list(StepLog(tmp_path / "run" / "metrics", None).rows())
    assert [row["step"] for row in rows] == list(range(1, 2 * len(c.stages) + 1))
    assert [row["stage"] for row in rows] == [stage.name for stage in c.stages for _ in range(2)]
    rates = [learning_rate(stage, jnp.arange(1, 3), stage.chunks * stage.steps_per_chunk) for stage in c.stages]
    np.testing.assert_allclose([row["lr"] for row in rows], np.concatenate(rates), rtol=1e-5)
    ledger = Ledger(tmp_path / "run" / "ledger", None)
    ledger.verify()
    assert [record["last_step"] for record in ledger.records()] == list(range(2, 2 * len(c.stages) + 1, 2))
    assert [bits_float(row["loss"]) for row in ledger.steps.rows()] == [row["loss"] for row in rows]
    validation = json.loads((tmp_path / "run" / "validation.json").read_text())
    assert sorted(validation["subsets"]) == sorted(c.stages[-1].mix)


def test_one_checkpoint_is_one_chunk_is_one_range_of_steps(tiny_config):
    """K2-65B has 360 + 20 checkpoints, every 941 and 882 steps."""
    from k2jax.data.order import Order, StagePlan

    c = configuration.load(str(ROOT / "experiments" / "k2_65b.py"))
    order, step = object.__new__(Order), 1
    order.stages, order.past, order.after_step = [], None, 0
    for i, s in enumerate(c.stages):
        last = step - 1 + s.chunks * s.steps_per_chunk
        fields = (
            s.name,
            i,
            s.sequence_length,
            s.rows_per_step,
            s.steps_per_chunk,
            s.chunks,
            0,
            0,
            step,
            last,
            0,
        )
        order.stages.append(StagePlan(*fields))
        step = last + 1
    order.num_steps = step - 1
    saved = chunks.checkpoint_steps(order)
    assert len(saved) == 380 and saved[:2] == [941, 1882] and saved[359:361] == [338_760, 338_760 + 882]
    assert [chunks.chunk_of_step(order, s) for s in (1, 941, 942, 338_760, 338_761)] == [1, 1, 2, 360, 361]
    assert chunks.tokens_before(order, 338_761) == 1_415_312_179_200


def test_devices_of_this_process_are_eight():
    """What the tests above assume of conftest.py."""
    assert jax.device_count() == 8
