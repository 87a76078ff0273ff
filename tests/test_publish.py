"""Publishing, to a stand-in of a hub on loopback: never to the network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub
import pytest
from conftest import REPOSITORY, Later

from k2jax.errors import ConfigError, StorageError
from k2jax.release.build import Options, release
from k2jax.release.publish import check_endpoint, check_repo, open_package, publish

Later("huggingface_hub")
TOKEN = "hf_notoneofanyones"
BRANCH = "step25-tokens7680"


@pytest.fixture(scope="module")
def made(tiny_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("publish") / "release"
    release(tiny_run, out, Options("last", False, "last", "tokens"))
    return out


@pytest.fixture
def served(monkeypatch):
    """A hub on loopback. Other tests have set that there is no network, which huggingface_hub reads when imported."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub.serving(TOKEN) as found:
        yield found


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def on(hub: hub.Hub, branch: str) -> dict[str, bytes]:
    held = dict(hub.repos["me/run"][branch])
    assert held.pop(".gitattributes")
    return held


def put(made: Path, url: str, **options: bool) -> str:
    return publish(open_package(made), "me/run", url, private=False, say=lambda line: None)


def test_everything_arrives_and_nothing_else(made, served):
    found, url = served
    assert put(made, url) == f"{url}/me/run"
    assert on(found, "main") == contents(made)
    assert on(found, BRANCH) == contents(made / "exports" / BRANCH)
    assert set(found.repos["me/run"]) == {"main", BRANCH}
    branches = [branch for branch, _, _ in found.commits]
    assert branches.index("main") > branches.index(BRANCH)
    assert [paths for _, _, paths in found.commits][-1] == ["files.json"], "what is half there does not look whole"
    assert not any(".cache" in p.name for p in made.iterdir()), "the release is only read"


def test_a_second_call_sends_nothing(made, served):
    found, url = served
    put(made, url)
    before = len(found.commits)
    put(made, url)
    assert len(found.commits) == before


def test_an_interrupted_upload_goes_on(made, served, monkeypatch):
    """Seen red without the order of commits: files.json was there first."""
    found, url = served
    monkeypatch.setattr("huggingface_hub._upload_pipeline.INITIAL_COMMIT_SIZE_INDEX", 0)
    found.fail_at = 3
    with pytest.raises(ConfigError, match="403"):
        put(made, url)
    half = on(found, "main")
    assert half and "files.json" not in half
    sent = sum(len(paths) for _, _, paths in found.commits)
    found.fail_at = None
    put(made, url)
    assert on(found, "main") == contents(made)
    assert sum(len(paths) for _, _, paths in found.commits[3:]) == len(contents(made)) + len(on(found, BRANCH)) - sent


def test_what_arrives_otherwise_is_seen(made, served):
    found, url = served
    found.spoil = "checkpoints.csv"
    with pytest.raises(StorageError, match=r"main has not 'checkpoints\.csv' as the release has it"):
        put(made, url)
    found.spoil = None
    put(made, url)


def test_a_repository_with_other_files_is_left_alone(made, served):
    found, url = served
    found.repos["me/run"] = {"main": {"pytorch_model.bin": b"x", ".gitattributes": b""}}
    with pytest.raises(ConfigError, match=r"main holds 1 file\(s\) that are not of this release, .*pytorch_model"):
        put(made, url)
    assert not found.commits


def test_the_token_is_in_no_message(made, served, monkeypatch):
    _, url = served
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConfigError) as error:
        put(made, url)
    assert "401" in str(error.value) and "hf_wrong" not in str(error.value) and "\n" not in str(error.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="HF_TOKEN is not set"):
        put(made, url)


def test_a_hub_that_is_not_there(made, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(StorageError, match="run the same command again") as error:
        put(made, "http://127.0.0.1:9")
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://huggingface.co", "without https"),
        ("https://me:secret@hub.example", "holds credentials"),
        ("ftp://hub.example", "expected the address"),
        ("hub.example", "expected the address"),
    ],
)
def test_addresses_that_a_token_does_not_go_to(url, says):
    with pytest.raises(ConfigError, match=says) as error:
        check_endpoint(url)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("repo", ["run", "me/", "/run", "me/run/x", "../run", "me/..", "me/run\n", "me/ru n", "-m/x"])
def test_names_that_are_none(repo):
    with pytest.raises(ConfigError, match="expected OWNER/NAME"):
        check_repo(repo)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda r: (r / "README.md").write_text("x"), r"'README\.md' is not as files\.json says"),
        (lambda r: (r / "more").write_text("x"), r"'more' is not as files\.json says"),
        (lambda r: (r / "DATA.md").unlink(), r"'DATA\.md' is not as files\.json says"),
        (lambda r: (r / "files.json").unlink(), r"no release, there is no files\.json"),
        (lambda r: (r / "files.json").write_text("{"), r"files\.json is damaged"),
        (lambda r: (r / "passwd").symlink_to("/etc/passwd"), r"is a link or a device"),
    ],
)
def test_what_is_no_whole_release_is_not_sent(made, tmp_path, spoil, says):
    spoilt = shutil.copytree(made, tmp_path / "release")
    spoil(spoilt)
    with pytest.raises(ConfigError, match=says):
        open_package(spoilt)


def test_the_command(made, served):
    found, url = served
    command = [sys.executable, "tools/publish.py", "--release", str(made), "--repo=me/run", f"--endpoint={url}"]
    command += ["--json"]
    options = {"cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": 120}
    no_token = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    done = subprocess.run([*command, "--dry-run"], env=no_token, **options)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["branches"] == [BRANCH] and said["files"] == len(contents(made)) and not found.requests
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    assert on(found, "main") == contents(made) and TOKEN not in done.stdout + done.stderr
