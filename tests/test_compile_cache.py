"""Compiled programs kept between launches: the same bits sooner, nothing stale or damaged, never the end of a run."""

import importlib
import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import runs
from jax._src import compilation_cache as jax_cache

from k2jax.parallel import compile_cache
from k2jax.parallel.compile_cache import Programs, make_room
from k2jax.training import launch as launches

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_enable_xla_caches",
    "jax_enable_compilation_cache",
)


@pytest.fixture
def own_cache(monkeypatch, tmp_path: Path) -> Iterator[Path]:
    """Where a user's cache would be, who has set nothing of JAX's; JAX is as it was afterwards."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.delenv(compile_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.clear_caches()
    yield tmp_path / "cache" / "k2jax" / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()
    jax.clear_caches()


def compile_one() -> compile_cache.Counts:
    """Of a program, as in a new process."""
    jax.clear_caches()
    before = compile_cache.counts()
    compiled = jax.jit(lambda x: jnp.tanh(x) * 3).lower(jax.ShapeDtypeStruct((), jnp.float32)).compile()
    assert float(compiled(np.float32(0))) == 0
    return compile_cache.counts().since(before)


def programs(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*/*{compile_cache.SUFFIX}"))


def first_step(workdir: Path) -> dict:
    return json.loads((workdir / "environment.json").read_text())["launches"][-1]["first_step"]


@pytest.mark.fault("S12")
@pytest.mark.processes
def test_a_run_out_of_the_cache_is_the_same_run(own_cache, tiny_data, tmp_path, capsys, monkeypatch):
    """Bit for bit, in every step and in the checkpoints; and each launch says what its first step waited for.

    Seen red without the folder's mode.
    """
    command, one_stage = runs.Command(capsys, monkeypatch), {"eval.windows": 1}
    told, rows, records = {}, {}, {}
    for name in ("cold", "warm"):
        jax.clear_caches()  # what this process still has compiled
        ended = command.train(tiny_data, tmp_path / name, one_stage)
        assert ended.code == 0, ended
        told[name] = [line for line in ended.lines if "after the launch" in line]
        rows[name] = runs.ledger_rows(tmp_path / name)
        records[name] = runs.ledger(tmp_path / name).records()
    assert len(rows["cold"]) == 25 and rows["cold"] == rows["warm"] and records["cold"] == records["warm"]

    cold, warm = first_step(tmp_path / "cold"), first_step(tmp_path / "warm")
    assert (cold["cache"], warm["cache"]) == ("cold", "warm")
    assert cold["programs"]["found"] < warm["programs"]["found"] == warm["programs"]["asked"]
    assert [*cold["parts"]] == sorted(
        ["start and imports", "coming together", "data", "new state", "compile", "first step"]
    )
    for name, record in (("cold", cold), ("warm", warm)):
        assert record["step"] == 1 and sum(record["parts"].values()) == pytest.approx(record["seconds"], abs=0.01)
        [line] = told[name]
        assert line.startswith("step 1 was done ") and f"compile ({name} cache) " in line
    assert own_cache.stat().st_mode & 0o777 == own_cache.parent.stat().st_mode & 0o777 == 0o700

    # A resumed launch has its own record, of its own first step.
    runs.copy_run(tmp_path / "warm", tmp_path / "resumed", last_step=10)
    assert command.train(tiny_data, tmp_path / "resumed", one_stage).code == 0
    resumed = first_step(tmp_path / "resumed")
    assert resumed["step"] == 11 and "restore" in resumed["parts"] and resumed["cache"] == "warm"
    assert runs.ledger_rows(tmp_path / "resumed") == rows["cold"]


@pytest.mark.fault("S12")
def test_a_damaged_program_is_compiled_again_and_replaced(own_cache, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    lines: list[str] = []
    mask = os.umask(0)
    compile_cache.use(lines.append)  # whose folders are the user's alone whatever the mask
    os.umask(mask)
    assert compile_one().found == 0
    assert compile_one() == (1, 1)
    [path] = programs(own_cache)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:10], b"", whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        path.write_bytes(damaged)
        assert compile_one() == (1, 0)
        assert compile_one() == (1, 1)
    other = Programs(path.parent, lines.append)
    path.with_name(f"other{compile_cache.SUFFIX}").write_bytes(whole)
    assert other.get("other") is None, "an entry under another's name"
    path.with_name(f"{path.name}.new-{os.uname().nodename}-999999999").write_bytes(whole[:50])  # of a killed writer
    other.put("one", b"more")
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, f"one{compile_cache.SUFFIX}"])
    assert lines == []


def test_a_disk_without_room_is_one_line(own_cache):
    lines: list[str] = []
    cache = Programs(own_cache / "v", lines.append)
    cache.put("a", b"kept")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        cache.put("b", bytes(1000))
        cache.put("c", bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(lines) == 1 and "File too large" in lines[0] and "\n" not in lines[0]
    assert cache.get("a") == b"kept" and cache.get("b") is None
    assert [path.name for path in (own_cache / "v").iterdir()] == [f"a{compile_cache.SUFFIX}"]


@pytest.mark.fault("S12")
@pytest.mark.parametrize("where", ["/dev/null", "/proc", "open to all", "another's"])
def test_a_folder_that_cannot_be_used_is_one_line(own_cache, monkeypatch, tmp_path, where):
    """A run goes on, and compiles."""
    if where.startswith("/"):
        monkeypatch.setenv("XDG_CACHE_HOME", where)
    else:
        own_cache.mkdir(parents=True)
        if where == "another's" and os.geteuid() != 0:
            pytest.skip("only root gives a folder away")
        own_cache.chmod(0o777) if where == "open to all" else os.chown(own_cache, 12345, -1)
    lines: list[str] = []
    compile_cache.use(lines.append)
    assert compile_one() == (0, 0)
    [line] = lines
    assert line.startswith("compiled programs are not kept: ") and compile_cache.VARIABLE in line
    assert not programs(own_cache)


@pytest.mark.parametrize("value", ["off", ""])
def test_the_user_turns_it_off(own_cache, monkeypatch, value):
    monkeypatch.setenv(compile_cache.VARIABLE, value)
    lines: list[str] = []
    compile_cache.use(lines.append)
    assert compile_one() == (0, 0) and not own_cache.exists() and len(lines) == 1


def test_jaxs_own_variable_wins(own_cache, monkeypatch, tmp_path):
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "mine"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    compile_cache.use(pytest.fail)
    compile_one()
    assert compile_one() == (1, 1)
    assert not own_cache.exists() and any(path.name.endswith("-cache") for path in (tmp_path / "mine").iterdir())


def test_what_was_not_used_for_longest_makes_room(own_cache):
    cache = Programs(own_cache / "new", pytest.fail)
    (own_cache / "old").mkdir(parents=True)
    for age, name in enumerate(("new/c", "old/b", "new/a")):
        cache._path = own_cache / name.split("/")[0]
        cache.put(name[-1], bytes(1000))
        path = own_cache / f"{name}{compile_cache.SUFFIX}"
        os.utime(path, (1e9 - age, 1e9 - age))
    cache._path = own_cache / "new"
    assert cache.get("a") is not None  # which makes it the newest
    make_room(own_cache, 2500)
    assert {path.name[0] for path in programs(own_cache)} == {"a", "c"}
    make_room(own_cache, 1032)
    assert {path.name[0] for path in programs(own_cache)} == {"a"}


def test_the_folder_is_of_all_that_decides_what_a_program_is(monkeypatch):
    """Versions for any device; on a CPU the CPU, too: another one may not run it."""
    here = compile_cache.versions("cpu")
    assert f"jaxlib-{jax.lib.__version__}" in here and here.startswith("k2jax-") and "cpu-" in here
    assert "cpu-" not in compile_cache.versions("tpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(77)))
    assert compile_cache.versions("cpu") != here


def test_the_age_of_a_process_is_from_before_its_imports(monkeypatch: pytest.MonkeyPatch):
    age = launches.process_age_s()
    assert 0 < age < launches.LONGEST_S
    assert launches.process_age_s() >= age
    launch = launches.Launch(age)
    launch.did("start and imports")
    assert launch.parts["start and imports"] >= age


def test_later_parts_do_not_count():
    """Another stage that is compiled, or steps after the first."""
    launch = launches.Launch()
    launch.did("data")
    launch.compiled(warm=False)
    record = launch.finish(1, launch._last)
    launch.compiled(warm=True)
    launch.did("data")
    assert not launch.warm and [*launch.parts] == ["data", "compile", "first step"]
    assert "compile (no cache)" in launches.describe(record) and "programs" not in launches.describe(record)


@pytest.mark.parametrize("command", [["generate", "--prompt=abc", "--max-new-tokens=2"], ["evaluate", "--windows=1"]])
def test_readers_of_a_run_use_it_too(own_cache, tiny_run, tmp_path, monkeypatch, capsys, command):
    workdir = runs.copy_run(tiny_run, tmp_path / "run")
    monkeypatch.setattr(sys, "argv", [*command, f"--workdir={workdir}"])
    importlib.import_module(f"k2jax.{command[0]}").main()
    assert programs(own_cache), capsys.readouterr()


@pytest.mark.processes
def test_processes_share_one_folder_or_use_none(own_cache, tiny_data, tmp_path, monkeypatch):
    """The first finds all that it wrote. JAX gives CPU processes keys of their own: the second compiles here, as ever.
    Where they do not see one folder, both compile, and it is told once.
    """
    # Both name /proc/self/cwd/cache: it is one folder where they stand in one, two where each stands in its own.
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self/cwd/cache")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    tell = "import atexit; from k2jax.parallel import compile_cache as c; atexit.register(lambda: print(*c.counts()))"
    stand = "import os; os.chdir(os.environ['STAND'])"
    apart = f"{stand}; os.makedirs(os.environ['JAX_PROCESS_ID']); os.chdir(os.environ['JAX_PROCESS_ID'])"
    monkeypatch.setenv("STAND", str(tmp_path))
    short, told = {"eval.windows": 1, "stages.0.chunks": 1}, {}
    with runs.trainers(tiny_data) as start:
        for name, where in (("cold", stand), ("warm", stand), ("apart", apart)):
            options = {"devices": 1, "patch": f"{tell}; {where}"}
            pair = runs.pair(start, tmp_path / name, short, **options)
            told[name] = [trainer.wait(0) for trainer in pair]
    counts = {name: [tuple(map(int, lines[-1].split())) for lines in pair] for name, pair in told.items()}
    assert counts["cold"][0][0] > counts["cold"][0][1] and counts["warm"][0][0] == counts["warm"][0][1] > 5
    assert counts["apart"] == [(0, 0), (0, 0)]
    [line] = [line for line in told["apart"][0] if line.startswith("compiled programs are not kept: ")]
    assert "not all processes see /proc/self/cwd/cache/" in line and compile_cache.VARIABLE in line
    assert not any("are not kept" in line for name in ("cold", "warm") for line in told[name][0])
    assert not [path for path in (tmp_path / "cache").rglob("seen-*")]
    assert runs.ledger_rows(tmp_path / "cold") == runs.ledger_rows(tmp_path / "warm")
    assert runs.ledger_rows(tmp_path / "cold") == runs.ledger_rows(tmp_path / "apart")
    assert first_step(tmp_path / "warm")["cache"] == "warm" and first_step(tmp_path / "apart")["cache"] == "off"
