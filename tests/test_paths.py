"""Paths from users: each is a local path or a URL, whatever is wrong with it is one line, and odd names work."""

import os
import pwd
import re
import runpy
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import REPOSITORY

from k2jax import config as configuration
from k2jax.data.provenance import open_run, which_docs
from k2jax.data.store import Store
from k2jax.errors import ConfigError, run_main
from k2jax.hf.export import export
from k2jax.hf.verify import verify
from k2jax.parallel import sharding
from k2jax.paths import parse
from k2jax.prepare import recipe
from k2jax.run.saved import open_step, restore_params, saved_steps
from k2jax.train import train


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/x/y", "/x/y"),
        ("x/y/", "x/y"),
        (".", "."),
        ("a:b", "a:b"),
        ("C:\\data", "C:\\data"),
        ("c:/data", "c:/data"),
        ("2026:/x", "2026:/x"),
        ("x/gs:/y", "x/gs:/y"),
        ("./gs:/y", "gs:/y"),
        ("gs:", "gs:"),
        ("gs:x", "gs:x"),
        ("p%20b #1?*[", "p%20b #1?*["),
        (" ", " "),
        ("é\udcff\n", "é\udcff\n"),
        ("~", "/home/someone"),
        ("~/x", "/home/someone/x"),
        ("./~/x", "~/x"),
        ("x~", "x~"),
        ("file:///x", "/x"),
        ("FILE://localhost/x/a%20b%23", "/x/a b#"),
    ],
)
def test_local_paths(text, path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for urls in (False, True):
        found = parse(text, "--out", urls=urls)
        assert isinstance(found, Path) and found == Path(path)


def test_the_home_of_another_user(monkeypatch):
    user = pwd.getpwuid(os.getuid())
    assert parse(f"~{user.pw_name}/x", "--out") == Path(user.pw_dir, "x")


@pytest.mark.parametrize("text", ["gs://bucket", "gs://bucket/a#b%20", "s3://bucket/x?region=us-east-1"])
def test_urls_where_they_are_taken(text):
    assert parse(text, "--stores", urls=True) == text
    with pytest.raises(ConfigError, match=f"^--out={re.escape(text)}: a {text[:2]}:// URL, expected a path on this"):
        parse(text, "--out")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", r"^x=: expected a path, found nothing"),
        ("a\0b", r"^x='a\\x00b': holds a NUL byte"),
        ("gs:/bucket/y", r"^x=gs:/bucket/y: did you mean the URL gs://bucket/y\? .* is written \./gs:/bucket/y$"),
        ("S3:/bucket", r"did you mean the URL s3://bucket\?"),
        ("file:/x", r"did you mean the URL file:///x\?"),
        ("file://host/x", r"expected file:// and an absolute path"),
        ("file://x", r"expected file:// and an absolute path"),
        ("~nobody-of-this-name/x", r"there is no user nobody-of-this-name.* written \./~nobody-of-this-name$"),
        ("hdfs://x/y", r"^x=hdfs://x/y: "),
        ("gs://", r"^x=gs://: "),
        ("gs:///x", r"^x=gs:///x: "),
        ("http://x\n", r"^x='http://x\\n': "),
    ],
)
def test_what_is_no_path_is_one_line(text, complaint):
    for urls in (False, True):
        with pytest.raises(ConfigError, match=complaint) as error:
            parse(text, "x", urls=urls)
        assert "\n" not in str(error.value)


# ---- every command ---------------------------------------------------------------------------------------------------

# {program: its arguments}; each --OPTION=. in turn becomes a URL, and what does not take one must say so.
COMMANDS = {
    "k2jax.train": "--config=. --workdir=.",
    "k2jax.evaluate": "--workdir=. --task-dir=.",
    "k2jax.generate": "--workdir=. --prompts=.",
    "k2jax.replay": "--workdir=. --step=1",
    "k2jax.doctor": "--workdir=. --step=1 --out=.",
    "k2jax.goodput": "--workdir=.",
    "k2jax.gallery": "--workdir=. --prompts=.",
    "k2jax.costs": "--workdir=.",
    "k2jax.preflight": "--config=. --workdir=.",
    "tools/convert_from_hf.py": "--hf=. --out=.",
    "tools/convert_to_hf.py": "--workdir=. --out=.",
    "tools/export_chunks.py": "--workdir=. --out=.",
    "tools/journal.py": "--workdir=. --list",
    "tools/launch.py": "--config=. --out=. --plan=. --workdir=/x --topology=cpu:1x1 --on=ssh",
    "tools/predict.py": "--config=. --workdir=. --ladder=. --plan=.",
    "tools/plan.py": "--config=. --workdir=. --topology=v5e:2x2",
    "tools/prepare_data.py": "--config=. --out=.",
    "tools/publish.py": "--release=. --repo=me/run",
    "tools/release.py": "--workdir=. --out=. --sign-key=.",
    "tools/report.py": "--workdir=. --out=. --compare=.",
    "tools/which_docs.py": "--workdir=. --step=1",
    "tools/which_steps.py": "--workdir=. --doc=0",
    "tools/bench/checkpoint.py": "--folder=.",
    "tools/bench/convert.py": "--folder=.",
    "tools/bench/gpu_suite.py": "--out=.",
    "tools/bench/predict.py": "--out=. --data=. --run=.",
    "tools/bench/mup.py": "--svg=.",
    "tools/bench/products.py": "--data=.",
    "tools/bench/recipes.py": "--data=.",
    "tools/bench/series.py": "--config=. --topology=v5e:2x2",
}
CASES = [(program, option) for program, line in COMMANDS.items() for option in re.findall(r"(--\S+)=\.", line)]
IN_BUCKETS = {
    *[(name, "--workdir") for name in COMMANDS if "--workdir" in COMMANDS[name]],
    ("tools/convert_to_hf.py", "--out"),
    ("tools/export_chunks.py", "--out"),
    ("tools/report.py", "--out"),
    ("tools/report.py", "--compare"),
}
WITH_STORES = ["k2jax.evaluate", "tools/export_chunks.py", "tools/release.py", "tools/which_docs.py"]
WITH_STORES += ["tools/which_steps.py"]


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """`refused(program, *arguments)`: runs it in an empty folder; its one line, code 78, and the folder still empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setenv("JAX_CPU_ENABLE_ASYNC_DISPATCH", "true")  # a tool sets it: the old value comes back

    def run(program: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as end:
            if program.endswith(".py"):
                monkeypatch.syspath_prepend((REPOSITORY / program).parent)  # as the interpreter does
                runpy.run_path(str(REPOSITORY / program), run_name="__main__")
            else:
                run_main(sys.modules.get(program, __import__(program, fromlist=["main"])).main)
        out, error = capsys.readouterr()
        assert end.value.code == 78 and not out, (end.value.code, out, error)
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert list(tmp_path.iterdir()) == []
        return error

    return run


@pytest.mark.parametrize(("program", "option"), CASES)
def test_a_url_for_a_path_is_one_line_and_makes_nothing(refused, program, option):
    if (program, option) in IN_BUCKETS:
        line = COMMANDS[program].replace(f"{option}=.", f"{option}=hdfs://host/x")
        assert f"{option}=hdfs://host/x: expected a local path, or a URL" in refused(program, *line.split())
        line = COMMANDS[program].replace(f"{option}=.", f"{option}=gs://key:secret@bucket/x")
        assert f"{option}=gs://***@bucket/x: holds credentials" in refused(program, *line.split())
    else:
        line = COMMANDS[program].replace(f"{option}=.", f"{option}=gs://bucket/x")
        assert f"{option}=gs://bucket/x: a gs:// URL, expected a path" in refused(program, *line.split())
    line = COMMANDS[program].replace(f"{option}=.", f"{option}=gs:/bucket/x")
    assert f"{option}=gs:/bucket/x: did you mean" in refused(program, *line.split())


def test_folders_that_are_named_without_an_option(refused):
    assert "directories=gs://bucket/x: a gs:// URL" in refused("tools/bench/dedup.py", ".", "gs://bucket/x")


@pytest.mark.parametrize("program", WITH_STORES)
def test_stores_may_be_in_a_bucket_and_nowhere_else(refused, program):
    error = refused(program, *COMMANDS[program].split(), "--stores=hdfs://host/x")
    assert "--stores=hdfs://host/x: expected a local path, or a URL" in error


def test_the_home_folder_is_meant_by_its_sign(refused, monkeypatch, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    assert f"--workdir={home}/run: no run" in refused("k2jax.generate", "--workdir=~/run", "--prompt=a")
    assert f"--config={home}/x.py: no such" in refused("k2jax.train", "--config=~/x.py", "--workdir=~/run")


def test_every_option_for_a_path_is_among_those_tried():
    """A command that parses one by itself, or is not tried here, fails."""
    for path in [*REPOSITORY.glob("k2jax/*.py"), *REPOSITORY.glob("tools/**/*.py")]:
        name = path.relative_to(REPOSITORY).as_posix()
        program = name if name.startswith("tools") else f"k2jax.{path.stem}"
        text = path.read_text()
        options = set(re.findall(r'paths\.add\(\w+, "(--[a-z-]+)"(?!, urls)', text))
        options |= {"--workdir"} if "branches.add_options(" in text else set()
        if program != "k2jax.paths":
            assert options == {option for other, option in CASES if other == program}, name
        assert not re.findall(r'"--(?!folder)[^"]*", [^\n]*type=Path', text), f"{name}: not parsed by paths.py"


# ---- configurations --------------------------------------------------------------------------------------------------


def test_paths_in_an_experiment(tiny_data, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")

    def load(root: str, tokenizer: str):
        keys = [f"data.root={root}", f"data.tokenizer={tokenizer}"]
        return configuration.load(tiny_data / "tiny.py", keys).data

    data = load("~/d", "file:///x/tokenizer.json")
    assert (data.root, data.tokenizer) == ("/home/someone/d", "/x/tokenizer.json")
    data = load("gs://bucket/d", "data/x/tokenizer.json")
    assert (data.root, data.tokenizer) == ("gs://bucket/d", "data/x/tokenizer.json")
    with pytest.raises(ConfigError, match=r"2 problem\(s\).*data.root=gs:/b: did you mean.*data.tokenizer=s3://b/t: "):
        load("gs:/b", "s3://b/t")


def test_the_tokenizer_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")

    def load(tokenizer: str) -> str:
        lines = ["c = recipe.base()", f"c.tokenizer = {tokenizer!r}", "c.subsets.a = recipe.subset('text:x')"]
        text = "\n    ".join(["from k2jax.prepare import recipe\ndef get_config():", *lines, "return c"])
        (tmp_path / "recipe.py").write_text(text)
        return recipe.load_config(tmp_path / "recipe.py").tokenizer

    found = [load(text) for text in ("", "~/t.json", "x/t.model", "seqio:module@task")]
    assert found == ["", "/home/someone/t.json", "x/t.model", "seqio:module@task"]
    with pytest.raises(ConfigError, match="tokenizer=gs://bucket/t.json: a gs:// URL"):
        load("gs://bucket/t.json")


# ---- odd names -------------------------------------------------------------------------------------------------------


def test_a_run_in_a_folder_of_an_odd_name_is_read_like_any_other(tiny_data, tiny_config, tmp_path):
    """What a URL would take for an escape, a query or a fragment; the neighbour is where such a reading would lead."""
    data, workdir, neighbour = tmp_path / "d%20d #1?", tmp_path / "p%20b #1?x", tmp_path / "p b "
    shutil.copytree(tiny_data, data)
    neighbour.mkdir()
    short = {"stages.0.steps_per_chunk": 1, "stages.0.warmup_steps": 0, "eval.windows": 1}
    config = tiny_config(**short, **{"data.root": data, "data.tokenizer": data / "tokenizer.json"}).unlock()
    config.stages = config.stages[:1]
    train(config, workdir)
    shutil.rmtree(workdir / "checkpoints" / "2")
    (workdir / "environment.json.new-elsewhere-1").write_text("{")  # of a trainer that was killed on another machine
    train(config, workdir)  # resumes after step 1
    assert saved_steps(workdir) == [1, 2] and not list(workdir.rglob("*.new-*"))

    saved = open_step(workdir)
    params = restore_params(saved, sharding.make_mesh(saved.config.mesh, jax.devices()))
    assert all(np.isfinite(value).all() for value in params.values())
    export(saved, tmp_path / "o%20 #?", "float32", 10**9, lambda _: None)
    verify(saved, tmp_path / "o%20 #?", lambda _: None)
    rows = which_docs(open_run(workdir), 2, 0, text=True)
    assert rows[0].documents[0].text and Store.open((data / "web").as_uri(), verify="sha256").num_tokens
    assert sorted(tmp_path.iterdir()) == sorted([data, workdir, neighbour, tmp_path / "o%20 #?"])
    assert not list(neighbour.iterdir())
