"""What every test sees: eight virtual CPU devices, one compilation cache, and a tiny run's data.

The settings go through the environment, before JAX is imported, so that the programs that tests start have them too.
"""

import ctypes
import fcntl
import gc
import hashlib
import importlib
import importlib.util
import os
import platform
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of what tests do is compiling: XLA takes half the time without LLVM's optimizations, and a third of that by its
# older emitters of fusions (versions without them ignore the option). Trainers that tests start as programs
# have settings of their own (faults/runs.py).
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
        "--xla_cpu_parallel_codegen_split_count=1",  # in parts, a tenth more: each core has a worker
        # Where the machine is busy, a virtual device may be late; XLA's 40 s end the process by SIGABRT.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
)
os.environ["NPROC"] = "64"  # XLA's threads: see cluster.initialize
# Compiled programs are shared by tests, workers, subprocesses and later sessions; `make clean` removes them.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(REPOSITORY / ".jax_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import pytest  # noqa: E402
from absl import flags  # noqa: E402
from hypothesis import settings  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402
from thorough import STAY  # noqa: E402

from k2jax import config as configuration  # noqa: E402
from k2jax.data.epochs import new_epoch, write_epoch  # noqa: E402
from k2jax.data.store_writer import StoreWriter  # noqa: E402
from k2jax.data.tokenizer import EOS, load_tokenizer, tokenizer_sha256, train_bpe  # noqa: E402

COLLECTED = pytest.StashKey[float]()  # when tests began to run
NOT_THERE = pytest.StashKey[dict[str, set[str]]]()  # cases that thorough.py names, of the files collected
settings.register_profile("k2jax", deadline=None)  # the machine may be busy
settings.load_profile("k2jax")
flags.FLAGS.mark_as_parsed()  # Grain's worker processes and chex read absl's flags


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """The garbage collector would look at what modules and tests hold again and again: not meanwhile, nor later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()
        session.stash[COLLECTED] = time.monotonic()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Marks the cases that `thorough.STAY` leaves to `make test-thorough`; TEST_FROM=3/8 begins with what is in the
    third eighth of what is chosen then."""
    found: dict[str, set[str]] = {}
    for item in items:
        test, _, case = item.nodeid.partition("[")
        if test in STAY:
            found.setdefault(test, set()).add(case[:-1])
            if case[:-1] not in STAY[test]:
                item.add_marker("thorough")
    config.stash[NOT_THERE] = {test: {*STAY[test]} - cases for test, cases in found.items() if {*STAY[test]} - cases}
    yield  # -m chooses
    part, parts = map(int, os.environ.get("TEST_FROM", "1/1").split("/"))
    begin = len(items) * (part - 1) // parts
    items[:] = items[begin:] + items[:begin]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """TEST_MINUTES=20 begins no test after twenty minutes: CI has a limit, and some of its machines are slow."""
    minutes = float(os.environ.get("TEST_MINUTES", "inf"))
    if time.monotonic() - item.session.stash[COLLECTED] > 60 * minutes:
        pytest.skip(f"{minutes:g} minutes are over")


class Later:
    """A package that one file's tests need, imported by the first that does: every worker collects every file."""

    def __init__(self, name: str):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}", allow_module_level=True)
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):
            raise AttributeError(attribute)  # pytest, which asks every object for them
        return getattr(importlib.import_module(self._name), attribute)


VOCAB_SIZE = 512
SUBSETS = ("books", "code", "web")
EXPERIMENT = '''"""Tiny: two stages, 25 steps, for tests."""

from k2jax import config


def get_config():
    c = config.base()
    c.name = "tiny"
    c.model.vocab_size = {vocab_size}
    c.model.dim = 32
    c.model.num_layers = 2
    c.model.num_heads = c.model.num_kv_heads = 8
    c.model.head_dim = 4
    c.model.ffn_dim = 96
    c.data.root = {root!r}
    c.data.tokenizer = {root!r} + "/tokenizer.json"
    c.eval.windows = 8
    c.eval.at_checkpoints = 0
    c.log.every_steps = 1
    c.log.tensorboard = False
    c.stages = (
        config.stage(name="stage1", sequence_length=32, rows_per_step=8, steps_per_chunk=10, chunks=2,
                     lr_peak=1e-2, lr_final=2e-3, warmup_steps=5, mix={{"books": 2, "code": 1, "web": 1}}),
        config.stage(name="stage2", sequence_length=64, rows_per_step=8, steps_per_chunk=5, chunks=1,
                     rope_base=500_000.0, lr_peak=2e-3, lr_final=2e-4, warmup_steps=0,
                     mix={{"code": 3, "web": 1}}),
    )
    return c
'''


def make_data(root: Path, seed: int = 0) -> Path:
    """A folder with a store for each of SUBSETS, their tokenizer.json, and tiny.py, an experiment on them."""
    root.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(200)]
    texts = {
        name: [" ".join(draw.choices(words, range(200, 0, -1), k=draw.randint(20, 120))) for _ in range(60)]
        for name in SUBSETS
    }
    tokenizer = train_bpe([text for name in SUBSETS for text in texts[name]], VOCAB_SIZE)
    tokenizer.save(str(root / "tokenizer.json"))
    identity = tokenizer_sha256(root / "tokenizer.json")
    encoder = load_tokenizer(root / "tokenizer.json")
    for name in SUBSETS:
        options = {
            "tokenizer_sha256": identity,
            "vocab_size": VOCAB_SIZE,
            "shard_tokens": 4096,
            "chunk_tokens": 512,
        }
        with StoreWriter(root / name, **options, eos_id=encoder.token_to_id(EOS)) as writer:
            for i, text in enumerate(texts[name]):
                ids = encoder.encode(text)
                writer.add(ids, id=hashlib.sha256(text.encode()).hexdigest(), source=f"{name}/{i}.txt")
            writer.finish(validation_fraction=0.1)
    (root / "tiny.py").write_text(EXPERIMENT.format(vocab_size=VOCAB_SIZE, root=str(root)))
    return root


def serve(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A server of buckets on loopback, as buckets.py has them."""
    import buckets

    from k2jax import bucket

    with buckets.serving(request.param) as server:
        bucket.forget()
        yield server
    bucket.forget()


server = pytest.fixture(scope="module", params=["s3", "gs"], name="server")(serve)


def begin_run(workdir: Path, manifest: dict[str, Any] | None) -> None:
    """What a run directory says of its data, without a run."""
    write_epoch(workdir, new_epoch([], run="0" * 32, after_step=0, config={}, manifest=manifest))


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_of_one_file() -> Iterator[None]:
    """They are gigabytes by the end of the suite, and no other file uses them."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()
        if platform.libc_ver()[0] == "glibc":  # which else keeps what was freed
            ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`made_once(name, make)`: a folder that `make(folder)` fills, once for all workers. Read it, or copy it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        made = root / f"shared-{name}"
        with (root / f"shared-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / f"shared-{name}.done").exists():
                shutil.rmtree(made, ignore_errors=True)  # of a worker that failed at it
                make(made)
                (root / f"shared-{name}.done").touch()
        return made

    return folder


@pytest.fixture(scope="session")
def tiny_data(made_once: Callable) -> Path:
    """The folder of `make_data`. Tests read it; one that changes it makes its own."""
    return made_once("tiny", make_data)


@pytest.fixture(scope="session")
def tiny_config(tiny_data: Path) -> Callable[..., ConfigDict]:
    """`tiny_config(**{"mesh.fsdp": 4, "stages.0.microbatches": 2})`: the tiny experiment, overridden, locked."""

    def load(**overrides: object) -> ConfigDict:
        return configuration.load(
            str(tiny_data / "tiny.py"), [f"{key}={value}" for key, value in overrides.items()]
        )

    return load


@pytest.fixture(scope="session")
def chat_data(made_once: Callable, tiny_data: Path) -> Path:
    """The folder of conversation_stores.make_chat: text, conversations, and tiny.py, an experiment on both."""
    from conversation_stores import make_chat

    return made_once("chat", lambda root: make_chat(root, tiny_data))


@pytest.fixture(scope="session")
def tiny_run(made_once: Callable, tiny_config: Callable[..., ConfigDict]) -> Path:
    """The workdir of a whole run on all devices, which ends with a sampled text. Tests read it, or copy it."""

    def make(workdir: Path) -> None:
        from k2jax.train import train

        more = {"log.tensorboard": True, "eval.at_checkpoints": 2, "stability.attention_every": 15}
        train(tiny_config(**more, **{"eval.prompts": "('abc',)", "eval.new_tokens": 4}), workdir)

    return made_once("run", make)
