"""Forks: a run that goes on from a checkpoint of another one, in a folder of its own.

    python -m k2jax.train --config=... --workdir=NEW --fork=RUN@STEP

The folder gets all that the other run was up to the step: epochs, journal, ledger, metrics, tokenizer, the checkpoint.
So its past can be read and verified like that of any run. Its own first epoch names where it comes from.
"""

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from k2jax import files, paths
from k2jax.data.epochs import has_epochs, read_epochs
from k2jax.errors import ConfigError
from k2jax.run.saved import open_step
from k2jax.run.storage import is_thinned

COPIED = ("checkpoints", "ledger", "metrics", "held_out", "compiled", "reference", "journal.jsonl", "tokenizer.json")


def new_name() -> str:
    """Of a run: random, hex."""
    return uuid.uuid4().hex


def parse_fork(text: str) -> tuple[Path, int]:
    """"RUN@STEP" as a run directory and a step; ConfigError for anything else."""
    run, at, step = text.rpartition("@")
    if not (at and run and step.isdigit()):
        raise ConfigError(f"--fork={text}: expected a run directory and a step, as --fork=runs/k2@1000")
    return paths.parse(run, "--fork"), int(step)


def read_fork(workdir: Path) -> dict[str, Any] | None:
    """{"run": its own name, "origin": {...}} of a folder that was forked; None of one that was not."""
    path = workdir / "fork.json"
    if not path.exists():
        return None
    begun = files.read_json(path)
    origin = begun.get("origin") if isinstance(begun, dict) else None
    if not isinstance(origin, dict) or not isinstance(begun.get("run"), str) or not {"run", "step"} <= origin.keys():
        raise ConfigError(f"{path} is damaged: it does not say of what the run is a fork: restore it from a copy")
    return begun


def fork(source: Path, step: int, workdir: Path) -> None:
    """Makes `workdir`, which the caller has locked, a fork of another run at a step; nothing where it is that already.

    After a kill in the middle the same call begins again. Raises ConfigError when the folder holds anything else.
    """
    begun = read_fork(workdir)
    if has_epochs(workdir):
        _check_same(begun, source, step, workdir)
        return  # the parent, or that checkpoint of it, may be gone by now
    saved = open_step(source, step)
    if is_thinned(source / "checkpoints" / str(step)):
        raise ConfigError(
            f"--fork={source}@{step}: the moments of that checkpoint were taken away (checkpoint.moments_every), and "
            f"training cannot go on without: fork from a step that has them"
        )
    origin = {"kind": "fork", "run": saved.meta["epoch"]["run"], "step": step, "checkpoint": saved.digest}
    if begun:
        _check_same(begun, source, step, workdir)
    if not begun and any((workdir / name).exists() for name in COPIED):
        raise ConfigError(f"--workdir={workdir} holds something else already: fork into a new folder")
    files.write_json(workdir / "fork.json", {"run": new_name(), "origin": origin})
    for name in COPIED:
        _remove(workdir / name)
    with files.whole_folder(workdir / "checkpoints") as folder:
        shutil.copytree(source / "checkpoints" / str(step), folder / str(step), copy_function=_link_or_copy)
    shutil.copyfile(source / "tokenizer.json", workdir / "tokenizer.json")
    _copy_rows(source, workdir, saved.meta)
    with files.whole_folder(workdir / "epochs") as folder:  # the last: with it the fork is complete
        for epoch in saved.epochs:
            shutil.copyfile(source / "epochs" / f"{epoch.number:04d}.json", folder / f"{epoch.number:04d}.json")


def _check_same(begun: dict[str, Any] | None, source: Path, step: int, workdir: Path) -> None:
    """ConfigError unless the folder is a fork of that run at that step, as far as there still is that run."""
    if not begun:
        raise ConfigError(f"--workdir={workdir} holds a run of its own: fork into another workdir")
    was = begun["origin"]
    runs = {epoch.run for epoch in read_epochs(source)} if has_epochs(source) else {was["run"]}
    if was["step"] != step or was["run"] not in runs:
        raise ConfigError(
            f"--workdir={workdir} is a fork of run {was['run'][:12]} at step {was['step']}, not of {source} at {step}: "
            f"use another workdir, or leave out --fork to go on with it"
        )


def _copy_rows(source: Path, workdir: Path, meta: dict[str, Any]) -> None:
    """Ledger, metrics, held-out losses, which the resume cuts to the step; of the journal what the checkpoint knew."""
    for name in ("ledger", "metrics", "held_out", "compiled", "reference"):
        if (source / name).is_dir():
            with files.whole_folder(workdir / name) as folder:
                shutil.copytree(source / name, folder, dirs_exist_ok=True)
    path = source / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    known = meta["data"].get("journal", 0)
    files.write_bytes(workdir / "journal.jsonl", b"".join(lines[:known]))


def _link_or_copy(source: str, target: str) -> None:
    """The same bytes without copying them, on one file system: nobody ever writes into a checkpoint's files."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
