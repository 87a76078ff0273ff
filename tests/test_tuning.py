"""What a GPU's compiler tuned is kept with the run. XLA's part, which needs a GPU, is a stand-in that writes files."""

import json
import shutil
from pathlib import Path

import pytest

from k2jax import config as configuration
from k2jax.errors import ConfigError
from k2jax.run import tuning
from k2jax.run.tuning import CACHE, MODE, Tuning
from k2jax.training.program import compile_lowered

SMOKE = "experiments/smoke.py"


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As far as this is asked: of a machine whose temporary files are this test's."""
    monkeypatch.setattr("k2jax.parallel.sharding.device_kind", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("k2jax.parallel.sharding.platform", lambda: "gpu")
    (tmp_path / "machine").mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "machine"))


def config(*overrides: str):
    return configuration.load(SMOKE, list(overrides))


def compiles(tuned: Tuning, **found: str) -> None:
    for name, text in found.items():
        (Path(tuned.options[CACHE]) / f"{name}.textproto").write_text(text)
    tuned.keep()


def seen_by(tuned: Tuning) -> dict[str, str]:
    return {path.stem: path.read_text() for path in Path(tuned.options[CACHE]).iterdir()}


def test_what_one_launch_tuned_the_next_one_has_and_adds_to(tmp_path: Path):
    first = Tuning.of_run(config(), tmp_path / "run")
    assert first.options[MODE].endswith("UPDATE") and seen_by(first) == {}
    compiles(first, stage1="tile 128")
    second = Tuning.of_run(config(), tmp_path / "run")
    assert second.options == first.options, "the same key of a cached program"
    compiles(second, stage2="tile 64")
    third = Tuning.of_run(config(), tmp_path / "run")
    assert seen_by(third) == {"stage1": "tile 128", "stage2": "tile 64"}


def test_the_compilers_own_folders_and_any_bytes_do_no_harm(tmp_path: Path):
    """XLA writes under tmp/ beside what it keeps, and renames; a format of files is its own."""
    first = Tuning.of_run(config(), tmp_path / "run")
    place, data = Path(first.options[CACHE]), bytes(range(256)) + b"\r\n"
    (place / "tmp").mkdir()
    (place / "tmp" / "half").write_text("not whole")
    (place / "found.pb").write_bytes(data)
    first.keep()
    shutil.rmtree(place)
    again = Tuning.of_run(config(), tmp_path / "run")
    assert again.options == first.options
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {"found.pb": data}


def test_another_machine_gets_them_from_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compiles(Tuning.of_run(config(), tmp_path / "run"), stage1="tile 128")
    (tmp_path / "other").mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "other"))
    said: list[str] = []
    for tuned in (Tuning.of_reader(config(), tmp_path / "run", said.append), Tuning.of_run(config(), tmp_path / "run")):
        assert seen_by(tuned) == {"stage1": "tile 128"} and tuned.options[CACHE].startswith(str(tmp_path / "other"))
    assert said == []


def test_a_reader_keeps_nothing_and_says_where_there_is_nothing(tmp_path: Path):
    said: list[str] = []
    compiles(Tuning.of_reader(config(), tmp_path / "run", said.append), stage1="tile 128")
    assert not (tmp_path / "run").exists() and "other bits may come of it" in said[0]


def test_the_compiler_gets_values_of_their_types_and_no_unordered_sums():
    """XLA refuses the text "true" for a bool; compiler.deterministic alone decides on order."""

    class Lowered:
        def compile(self, compiler_options):
            return compiler_options

    flags = "('xla_gpu_a=true', 'xla_gpu_b=3', 'xla_gpu_c=x', 'xla_gpu_exclude_nondeterministic_ops=false')"
    given = {"xla_gpu_a": True, "xla_gpu_b": 3, "xla_gpu_c": "x"}
    ordered = "xla_gpu_exclude_nondeterministic_ops"
    found = compile_lowered(Lowered(), config(f"compiler.gpu={flags}"))
    assert found == given | {ordered: True} and found["xla_gpu_a"] is True
    found = compile_lowered(Lowered(), config(f"compiler.gpu={flags}", "compiler.deterministic=False"))
    assert found == given | {ordered: False}


def test_two_runs_share_nothing(tmp_path: Path):
    one, other = (Tuning.of_run(config(), tmp_path / name) for name in ("one", "other"))
    compiles(one, stage1="tile 128")
    assert one.options[CACHE] != other.options[CACHE] and seen_by(other) == {}


def test_other_devices_and_versions_have_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compiles(Tuning.of_run(config(), tmp_path / "run"), stage1="tile 128")
    monkeypatch.setattr("k2jax.parallel.sharding.device_kind", lambda: "NVIDIA H200")
    assert seen_by(Tuning.of_run(config(), tmp_path / "run")) == {}
    monkeypatch.undo()
    names = {path.name.rsplit("_", 1)[0] for path in (tmp_path / "run" / "compiled").iterdir()}
    assert names == {"NVIDIA-H100-80GB-HBM3"}


@pytest.mark.parametrize("harm", ["flipped", "gone"])
def test_a_file_that_is_not_the_kept_one_is_refused(tmp_path: Path, harm: str):
    compiles(Tuning.of_run(config(), tmp_path / "run"), stage1="tile 128")
    [kept] = (tmp_path / "run").rglob("stage1.textproto")
    kept.unlink() if harm == "gone" else kept.write_text("tile 129")
    with pytest.raises(ConfigError, match=f"stage1.textproto is {'gone' if harm == 'gone' else 'not the file'}"):
        Tuning.of_run(config(), tmp_path / "run")


@pytest.mark.parametrize(
    "listed",
    [
        {"name": "../../elsewhere", "files": {}},
        {"name": "k2jax-tuned-0-0123456789abcdef", "files": {"../../../escaped": "0" * 64}},
        {"name": "k2jax-tuned-0-0123456789abcdef", "files": ["a"]},
        {"files": {}},
        [],
    ],
)
def test_a_list_that_another_made_leads_nowhere(tmp_path: Path, listed):
    """A release's reader writes files by the names in it."""
    compiles(Tuning.of_run(config(), tmp_path / "run"), stage1="tile 128")
    [path] = (tmp_path / "run").rglob("tuned.json")
    path.write_text(json.dumps(listed))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="tuned.json is damaged"):
        Tuning.of_reader(config(), tmp_path / "run", print)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_another_user_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tuned = Tuning.of_run(config(), tmp_path / "run")
    monkeypatch.setattr("os.getuid", lambda: 12345)
    with pytest.raises(ConfigError, match="another user's"):
        tuning.write_for_compiler(tuning.Kept(Path(tuned.options[CACHE]).name, {}))


def test_nothing_is_kept_where_nothing_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert Tuning.of_run(config("compiler.deterministic=False"), tmp_path / "run").options == {}
    monkeypatch.setattr("k2jax.parallel.sharding.platform", lambda: "tpu")
    Tuning.of_run(config(), tmp_path / "run").keep()
    assert not (tmp_path / "run").exists()


def test_the_list_is_of_all_files_and_their_digests(tmp_path: Path):
    compiles(Tuning.of_run(config(), tmp_path / "run"), stage1="tile 128")
    [path] = (tmp_path / "run").rglob("tuned.json")
    listed = json.loads(path.read_text())
    assert set(listed["files"]) == {"stage1.textproto"} and len(listed["files"]["stage1.textproto"]) == 64
