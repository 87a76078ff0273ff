"""Whether a run's bits repeat; gpu_suite.py's section `bits`: the ledgers of a small experiment compared.

Three runs begin at once, each `python -m k2jax.train` with nothing compiled or tuned before: one that goes through, a
second launch of the same, and one that is killed (SIGKILL) after its first checkpoint and then resumed.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gpu_suite_cases import Row, tried

from k2jax import files
from k2jax.data.store_writer import StoreWriter
from k2jax.data.tokenizer import tokenizer_sha256
from k2jax.run.ledger import Ledger

REPO = Path(__file__).resolve().parents[2]
WAIT_S = 0.01  # between two looks at a run
EXPERIMENT = '''"""Bits: what gpu_suite.py runs several times."""

from k2jax import config


def get_config():
    c = config.base()
    c.name = "bits"
    c.model.update({model})
    c.data.root, c.data.tokenizer = {root!r}, {root!r} + "/tokenizer.json"
    c.checkpoint.every_steps = {every}
    c.eval.windows, c.eval.at_checkpoints, c.log.tensorboard = 2, 0, False
    c.stages = (config.stage(mix={{"random": 1}}, steps_per_chunk={steps}, chunks=1, warmup_steps=10, {stage}),)
    return c
'''
# The colab experiment's 29M model, 16,384 tokens a step; on a CPU something tiny.
MODEL = dict(vocab_size=4096, dim=512, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64, ffn_dim=1376)
TINY = dict(vocab_size=4096, dim=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, ffn_dim=64)
STAGE = dict(sequence_length=512, rows_per_step=32, microbatches=2, lr_peak=1e-3, lr_final=1e-4)
STEPS, EVERY = 400, 100  # and between checkpoints: the second is not begun before the first is whole


def write_experiment(folder: Path, smoke: bool) -> Path:
    """A store of random tokens that are not all as frequent, its tokenizer, and the experiment's file."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    sha256, draw = tokenizer_sha256(folder / "tokenizer.json"), np.random.default_rng(0)
    model, stage, steps, every = MODEL, STAGE, STEPS, EVERY
    if smoke:
        model, stage, steps, every = TINY, STAGE | {"sequence_length": 32, "rows_per_step": 16}, 30, 5
    vocab_size = model["vocab_size"]
    with StoreWriter(folder / "random", tokenizer_sha256=sha256, vocab_size=vocab_size, eos_id=2) as writer:
        for i in range(2000 if not smoke else 100):
            tokens = 3 + draw.zipf(1.2, 1000) % (vocab_size - 3)
            writer.add(tokens, id=f"{i:064x}", source="random")
        writer.finish(validation_fraction=0.05)
    keys = {name: ", ".join(f"{k}={v}" for k, v in of.items()) for name, of in {"model": model, "stage": stage}.items()}
    files.write_text(folder / "bits.py", EXPERIMENT.format(root=str(folder), steps=steps, every=every, **keys))
    return folder / "bits.py"


class Launch:
    """`python -m k2jax.train` on a run directory."""

    def __init__(self, experiment: Path, workdir: Path, smoke: bool):
        # Three at once on one device; nothing out of a cache, which would make the second launch the first's program.
        own = {"JAX_COMPILATION_CACHE_DIR": "off", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.25"}
        own["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        if smoke:
            own = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"}
        command = [sys.executable, "-m", "k2jax.train", f"--config={experiment}", f"--workdir={workdir}"]
        path = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
        self.workdir, self.log = workdir, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, cwd=REPO, env=os.environ | own | {"PYTHONPATH": path}
        )

    def wait(self) -> None:
        """RuntimeError with its last lines where it fails."""
        if self.process.wait():
            self.log.seek(0)
            raise RuntimeError(" | ".join(self.log.read().strip().splitlines()[-3:])[-300:])

    def kill_after_a_checkpoint(self) -> int:
        """The last step in its ledger then."""
        while self.process.poll() is None:
            saved = [int(path.name) for path in self.workdir.glob("checkpoints/*") if path.name.isdigit()]
            if saved and last_step(self.workdir) > max(saved):
                self.end()
                return last_step(self.workdir)
            time.sleep(WAIT_S)
        self.wait()
        raise RuntimeError("it ended before it could be killed: more steps")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def last_step(workdir: Path) -> int:
    paths = sorted((workdir / "ledger").glob("chunk-*.jsonl"))
    return paths[-1].read_bytes().count(b"\n") if paths else 0  # of a run with one chunk


def ledgers_differ(first: Path, second: Path) -> Row:
    """How many steps are the same and the first that is not; of the checkpoints' records likewise."""
    row: Row = {"equal": True}
    for kind, key in (("step", "step"), ("checkpoint", "last_step")):
        ours, theirs = ({r[key]: r for r in _rows(path)[kind]} for path in (first, second))
        row[f"{kind}s"] = len(ours)
        for at in sorted(ours | theirs):
            one, other = ours.get(at, {}), theirs.get(at, {})
            if one != other:
                what = ", ".join(name for name in one if one[name] != other.get(name))
                return row | {"equal": False, f"first_{kind}": at, "what": what if one and other else "missing"}
    return row


def _rows(workdir: Path) -> dict[str, Any]:
    ledger = Ledger(workdir / "ledger", None)  # only read
    return {"step": ledger.steps.rows(), "checkpoint": ledger.records()}


def bits(smoke: bool) -> Iterator[Row]:
    launches: dict[str, Launch] = {}

    def launch(name: str) -> Launch:
        launches[name] = Launch(experiment, folder / name.split()[0], smoke)
        return launches[name]

    def kill_and_resume() -> Row:
        killed_after = launches["third"].kill_after_a_checkpoint()
        launch("third again")
        return {"killed_after_step": killed_after}

    def compared(name: str) -> Row:
        for each in ("first", name):
            launches[each].wait()
        row = ledgers_differ(launches["first"].workdir, launches[name].workdir)
        return row | {"ok": row["equal"]}

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        experiment = write_experiment(folder, smoke)
        try:
            for name in ("first", "second", "third"):
                launch(name)
            killed = tried({"launch": "killed and resumed"}, kill_and_resume)
            yield tried({"launch": "second"}, lambda: compared("second"))
            yield tried(killed, lambda: compared("third again")) if "error" not in killed else killed
        finally:
            for started in launches.values():
                started.end()
