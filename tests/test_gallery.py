"""The gallery: the same prompts at every checkpoint, each text made once and kept under its checkpoint's digest."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from k2jax import gallery
from k2jax.errors import StorageError
from k2jax.generate import Prompt
from k2jax.run.saved import open_step

SETTINGS = {"max_new_tokens": 5, "temperature": 0.0, "seed": 0, "top_k": 0, "top_p": 1.0}


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_run, tmp_path / "run")
    return tmp_path / "run"


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["gallery", *map(str, arguments)])
    gallery.main()


def entries(run: Path, step: int) -> list[dict]:
    found = json.loads((run / "gallery" / f"{step}.json").read_text())
    assert found["format"] == 1 and found["step"] == step
    return found["checkpoints"][open_step(run, step).digest]


def test_every_checkpoint_gets_the_same_prompts_and_a_second_call_makes_nothing(run, monkeypatch, capsys):
    command(monkeypatch, "--workdir", run, "--max-new-tokens", 5)
    prompts = ["abc", *gallery.PROMPTS]
    for step in (10, 20, 25):
        assert [entry["prompt"] for entry in entries(run, step)] == prompts
        assert all(len(entry["ids"]) <= 5 and entry["settings"]["temperature"] == 0 for entry in entries(run, step))
    before = {path: path.read_bytes() for path in (run / "gallery").glob("*.json")}
    monkeypatch.setattr(gallery, "open_generator", None)  # no model is made
    command(monkeypatch, "--workdir", run, "--max-new-tokens", 5, "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["new"] == 0
    assert before == {path: path.read_bytes() for path in (run / "gallery").glob("*.json")}


def test_what_is_missing_is_added_and_what_is_there_stays(run):
    saved = open_step(run, 20)
    assert gallery.add(saved, [Prompt("ab")], SETTINGS, print) == 1
    first = entries(run, 20)
    assert gallery.add(saved, [Prompt("ab"), Prompt("cd")], SETTINGS, print) == 1
    assert entries(run, 20)[:1] == first and [e["prompt"] for e in entries(run, 20)] == ["ab", "cd"]
    assert gallery.add(saved, [Prompt("ab")], {**SETTINGS, "max_new_tokens": 3}, print) == 1
    assert gallery.add(saved, [Prompt("ab")], {**SETTINGS, "max_new_tokens": 3}, print) == 0


def test_a_text_is_kept_under_the_digest_of_its_checkpoint(run):
    """After a roll-back a step has another checkpoint: what the first one wrote stays, and is not the new one's."""
    path = run / "gallery" / "20.json"
    old = {"prompt": "ab", "suffix": None, "settings": {**SETTINGS, "row": None}, "text": "x", "ids": [1]}
    path.parent.mkdir()
    path.write_text(json.dumps({"format": 1, "step": 20, "checkpoints": {"0" * 64: [old]}}))
    assert gallery.add(open_step(run, 20), [Prompt("ab")], SETTINGS, print) == 1
    found = json.loads(path.read_text())["checkpoints"]
    assert found["0" * 64] == [old] and len(found) == 2


def test_draws_depend_on_the_prompts_place_and_not_on_what_was_missing(run):
    drawn = {**SETTINGS, "temperature": 1.0, "max_new_tokens": 12}
    saved, other = open_step(run, 20), run.parent / "other"
    shutil.copytree(run, other)
    gallery.add(saved, [Prompt("ab")], drawn, print)
    gallery.add(saved, [Prompt("ab"), Prompt("cd")], drawn, print)
    gallery.add(open_step(other, 20), [Prompt("ab"), Prompt("cd")], drawn, print)
    texts = [e["text"] for e in entries(run, 20)]
    assert texts == [e["text"] for e in entries(other, 20)]
    gallery.add(open_step(run, 10), [Prompt("ab"), Prompt("cd")], drawn, print)
    assert texts != [e["text"] for e in entries(run, 10)]  # the same draws, of other weights


def test_a_damaged_file_is_named_and_not_written_over(run):
    path = run / "gallery" / "20.json"
    path.parent.mkdir()
    others = [json.dumps({"format": a, "step": b, "checkpoints": {}}) for a, b in ((2, 20), (1, 10))]
    for text in ("{", "[]", *others):
        path.write_text(text)
        with pytest.raises(StorageError, match=r"20\.json is damaged"):
            gallery.add(open_step(run, 20), [Prompt("ab")], SETTINGS, print)
        assert path.read_text() == text


def test_a_kill_leaves_the_old_file_whole(run, monkeypatch):
    saved = open_step(run, 20)
    gallery.add(saved, [Prompt("ab")], SETTINGS, print)
    before = (run / "gallery" / "20.json").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        gallery.add(saved, [Prompt("cd")], SETTINGS, print)
    monkeypatch.undo()
    assert (run / "gallery" / "20.json").read_bytes() == before
    assert sorted(p.name for p in (run / "gallery").iterdir()) == ["20.json", "lock"]


def test_prompts_of_a_file_and_steps_are_named(run, monkeypatch):
    file = run / "prompts.jsonl"
    file.write_text('{"prompt": "a\\u2028b </script>"}\n')
    command(monkeypatch, "--workdir", run, "--steps", "10,25", "--prompts", file, "--max-new-tokens", 2)
    assert sorted(p.name for p in (run / "gallery").glob("*.json")) == ["10.json", "25.json"]
    assert [e["prompt"] for e in entries(run, 10)] == ["a\u2028b </script>"]


def test_errors_are_one_line_and_help_is_quick(run, tmp_path):
    def call(*arguments: object) -> subprocess.CompletedProcess:
        program = [sys.executable, "-m", "k2jax.gallery", *map(str, arguments)]
        return subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True)

    done = call("--workdir", run, "--steps", "11")
    assert done.returncode == 78 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "11" in done.stderr and not (run / "gallery").exists()
    code = "import sys; sys.argv = ['g', '--help']; from k2jax import gallery"
    code += "\ntry: gallery.main()\nexcept SystemExit: pass\nassert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True)
