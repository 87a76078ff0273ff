"""Which commit a run records, with real repositories, and gits that fail in every way."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from k2jax.run import commit

git_commit = commit.git_commit.__wrapped__  # less its cache


def git(folder: Path, *command: str) -> str:
    who = ("-c", "user.name=x", "-c", "user.email=x@x")
    given = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(
        ["git", *who, "-C", str(folder), *command], check=True, capture_output=True, text=True, env=given
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with this package in it; the code believes that it runs from there."""
    package = tmp_path / "checkout" / "k2jax"
    (package / "run").mkdir(parents=True)
    for name in ("__init__.py", "run/commit.py"):
        (package / name).write_text("")
    git(package.parent, "init", "-q")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-qm", "x")
    monkeypatch.setattr(commit, "__file__", str(package / "run" / "commit.py"))
    return package.parent


def test_the_commit_and_whether_files_changed(checkout: Path):
    head = git(checkout, "rev-parse", "HEAD")
    assert git_commit() == head
    (checkout / "k2jax" / "new.py").write_text("")
    assert git_commit() == head, "a stray file is nobody's business"
    (checkout / "k2jax" / "__init__.py").write_text("x")
    assert git_commit() == f"{head}+"


def test_a_package_in_the_repository_of_another_project(checkout: Path, monkeypatch):
    """In its virtual environment, or put beside its code and not committed there."""
    for place in (".venv/lib/python3.11/site-packages", "."):
        installed = checkout.parent / "project" / place / "k2jax"
        shutil.rmtree(checkout.parent / "project", ignore_errors=True)
        shutil.copytree(checkout / "k2jax", installed)
        project = checkout.parent / "project"
        git(project, "init", "-q")
        git(project, "commit", "-qm", "x", "--allow-empty")
        monkeypatch.setattr(commit, "__file__", str(installed / "run" / "commit.py"))
        assert git_commit() is None


def test_no_repository(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(commit, "__file__", str(tmp_path / "k2jax" / "run" / "commit.py"))
    assert git_commit() is None


def test_no_git(checkout: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout))
    assert git_commit() is None


def test_a_variable_that_names_another_repository(checkout: Path, monkeypatch):
    """As a hook of git sets it."""
    other = checkout.parent / "other"
    other.mkdir()
    git(other, "init", "-q")
    head = git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert git_commit() == head


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files to another user")
def test_a_checkout_of_another_user(checkout: Path):
    """As root in a container with the host's checkout: git calls its ownership dubious."""
    head = git(checkout, "rev-parse", "HEAD")
    for path in (checkout, checkout / ".git"):
        os.chown(path, 12345, 12345)
    with pytest.raises(subprocess.CalledProcessError):
        git(checkout, "status")
    assert git_commit() == head


def test_what_the_repository_would_run_is_not_run(checkout: Path):
    git(checkout, "config", "core.fsmonitor", f"touch {checkout.parent / 'ran'}; false")
    git_commit()
    assert not (checkout.parent / "ran").exists()


HANGS = """#!/bin/sh
case "$*" in *" {word}"*) sleep 60 & sleep 60;; esac
exec {git} "$@"
"""


@pytest.mark.parametrize(("word", "left"), [("rev-parse --show", None), ("status", "?")])
def test_a_git_that_hangs(checkout: Path, tmp_path: Path, monkeypatch, word: str, left: str | None):
    """As on a network file system that does; also one whose child keeps the pipe open."""
    head, real = git(checkout, "rev-parse", "HEAD"), shutil.which("git")
    monkeypatch.setattr(commit, "LIMIT_S", 1.0)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text(HANGS.format(word=word, git=real))
    (tmp_path / "bin" / "git").chmod(0o755)
    assert git_commit() == (left and head + left)
