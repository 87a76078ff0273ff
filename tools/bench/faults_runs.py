"""What faults.py does it with: a tiny experiment and its data, the trainer as a program, and what must be the same."""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax

from k2jax import config as configuration
from k2jax import files
from k2jax.data.chunks import chunk_of_step
from k2jax.data.epochs import order_of, read_epochs
from k2jax.data.journal import read_journal
from k2jax.data.store_writer import StoreWriter
from k2jax.data.tokenizer import EOS, load_tokenizer, tokenizer_sha256, train_bpe
from k2jax.parallel import sharding
from k2jax.run.checkpoint import Checkpoints
from k2jax.run.ledger import Ledger
from k2jax.run.saved import saved_steps
from k2jax.run.state import flat
from k2jax.training.optimizer import init_state
from k2jax.training.placement import place_state

REPOSITORY = Path(__file__).resolve().parents[2]
SUBSETS, VOCAB_SIZE, LAST = ("books", "code"), 512, 24
WAIT_S = 600  # for an end or a line of a trainer; the machine may be busy
EXPERIMENT = '''"""Tiny: two stages, 24 steps, for tools/bench/faults.py."""

from k2jax import config


def get_config():
    c = config.base()
    c.name = "tiny"
    c.model.update(vocab_size={vocab}, dim=32, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, ffn_dim=96)
    c.data.root, c.data.tokenizer = {root!r}, {root!r} + "/tokenizer.json"
    c.eval.windows, c.log.every_steps, c.log.tensorboard = 4, 1, False
    mixes = {{"books": 1, "code": 1}}, {{"code": 1}}
    c.stages = (
        config.stage(name="one", sequence_length=32, rows_per_step=8, steps_per_chunk=8, chunks=2, lr_peak=1e-2,
                     lr_final=2e-3, warmup_steps=4, mix=mixes[0]),
        config.stage(name="two", sequence_length=64, rows_per_step=8, steps_per_chunk=8, chunks=1, lr_peak=2e-3,
                     lr_final=2e-4, warmup_steps=0, mix=mixes[1]),
    )
    return c
'''
# Two virtual devices, quickly compiled; JAX's own cache is written in place, so that a kill may leave half of an entry.
FLAGS = "--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=1"
# What gives up writing soon, as the trainer does after minutes.
IMPATIENT = """
from k2jax.run import reading
reading.WRITE_WAITS_S = (0.1, 0.1)
from k2jax import train
from k2jax.errors import run_main
run_main(train.main)
"""


def make_data(root: Path) -> Path:
    """Stores of random words, their tokenizer, and the experiment on them."""
    root.mkdir(parents=True)
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(200)]
    texts = {name: [" ".join(draw.choices(words, k=draw.randint(20, 120))) for _ in range(120)] for name in SUBSETS}
    train_bpe([text for name in SUBSETS for text in texts[name]], VOCAB_SIZE).save(str(root / "tokenizer.json"))
    encoder, identity = load_tokenizer(root / "tokenizer.json"), tokenizer_sha256(root / "tokenizer.json")
    options = {"tokenizer_sha256": identity, "vocab_size": VOCAB_SIZE, "eos_id": encoder.token_to_id(EOS)}
    for name in SUBSETS:
        with StoreWriter(root / name, **options, shard_tokens=4096, chunk_tokens=512) as writer:
            for i, text in enumerate(texts[name]):
                writer.add(encoder.encode(text), id=hashlib.sha256(text.encode()).hexdigest(), source=f"{name}/{i}.txt")
            writer.finish(validation_fraction=0.1)
    files.write_text(root / "tiny.py", EXPERIMENT.format(vocab=VOCAB_SIZE, root=str(root)))
    return root


class Trainer:
    """`python -m k2jax.train` in a process group of its own, its output in files. `Trainer.end_all()` at the end."""

    _started: list["Trainer"] = []

    def __init__(
        self, data: Path, workdir: Path, keys: dict[str, Any], *, devices: int = 2, code: str = "", **environment: str
    ):
        number = len(list(workdir.parent.glob(f"{workdir.name}.out*")))
        self.log = workdir.parent / f"{workdir.name}.out{number}"
        overrides = [f"--config.{key}={value}" for key, value in keys.items()]
        program = ["-c", code] if code else ["-m", "k2jax.train"]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, *program, f"--config={data / 'tiny.py'}", f"--workdir={workdir}", *overrides],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "XLA_FLAGS": FLAGS.format(devices=devices), "PYTHONPATH": str(REPOSITORY),
                     **environment},
            )  # fmt: skip
        self._started.append(self)

    def told(self) -> str:
        """What it has said."""
        return self.log.read_text(errors="replace")

    def wait_for(self, start: str) -> bool:
        """Until it has said a line that begins so; False where it ended before."""
        deadline = time.monotonic() + WAIT_S
        while not any(line.startswith(start) for line in self.told().splitlines()):
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"said no {start!r} in {WAIT_S} s: {self.told()[-2000:]}")
            time.sleep(0.002)
        return True

    def end(self) -> int:
        """Its exit code; killed where it does not end."""
        try:
            return self.process.wait(WAIT_S)
        finally:
            self._kill()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    @classmethod
    def end_all(cls) -> None:
        """Kills what is left of all that were started."""
        for trainer in cls._started:
            if trainer.process.poll() is None:
                trainer._kill()
                trainer.process.wait()

    def error(self) -> str:
        """Its last line of error."""
        return next((line for line in reversed(self.told().splitlines()) if line.startswith("error: ")), "")


def pair(data: Path, workdir: Path, keys: dict[str, Any]) -> list[Trainer]:
    """Two processes of one run over loopback, a device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [Trainer(data, workdir, keys, devices=1, JAX_PROCESS_ID=str(i), **told) for i in (0, 1)]


def copy_run(source: Path, to: Path, last_step: int) -> Path:
    """A copy of a run as if it had been stopped at a checkpoint; nothing where there is none of that step."""
    if last_step:
        shutil.copytree(source, to)
        for step in saved_steps(to):
            if step > last_step:
                shutil.rmtree(to / "checkpoints" / str(step))
    return to


# ---- what must be the same -------------------------------------------------------------------------------------------


@cache
def _state_of(experiment: Path) -> tuple:
    config = configuration.load(experiment)
    mesh = sharding.make_mesh(config.mesh)
    shapes = jax.eval_shape(lambda: init_state(config.model, config.seed))
    return mesh, shapes, place_state(config, shapes, mesh)


def restored(data: Path, workdir: Path, step: int) -> str:
    """A digest of all bytes of a checkpoint, read and verified as the trainer does."""
    mesh, shapes, shardings = _state_of(data / "tiny.py")
    with jax.set_mesh(mesh):
        state = Checkpoints(workdir, log=lambda line: None).restore(step, shardings, shapes)
    parts = [f"{name} {hashlib.sha256(jax.device_get(x).tobytes()).hexdigest()}" for name, x in flat(state).items()]
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()


def verified(data: Path, workdir: Path) -> int:
    """How many checkpoints are listed, each of them restored and verified."""
    steps = saved_steps(workdir) if (workdir / "checkpoints").is_dir() else []
    for step in steps:
        restored(data, workdir, step)
    return len(steps)


def ledger_of(workdir: Path) -> Ledger:
    """The ledger of a run."""
    order = order_of(read_epochs(workdir), read_journal(workdir / "journal.jsonl"))
    return Ledger(workdir / "ledger", partial(chunk_of_step, order))


def differs(data: Path, workdir: Path, straight: Path) -> str:
    """What of a run is not as in the undisturbed one, bit for bit; "" where nothing is."""
    found, expected = ledger_of(workdir), ledger_of(straight)
    found.verify()
    if list(found.steps.rows()) != list(expected.steps.rows()):
        return "ledger"
    if restored(data, workdir, LAST) != restored(data, straight, LAST):
        return f"checkpoint {LAST}"
    left = [path.name for path in workdir.rglob("*") if "tmp" in path.name or "new-" in path.name]
    return f"left behind: {left}" if left else ""


def answers(questions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Of each what it gives, or its error."""
    found = []
    for question in questions:
        try:
            found.append(json.dumps(question(), sort_keys=True, default=str))
        except Exception as error:
            found.append(error)
    return found
