"""Whose a preparation's folder is: one process at a time, and one version of this code, or more by name.

    stages/recipe.json  {"config", "version", "code": [digest of the code that began it, and of each that went on]}
    stages/lock         of the process that works there
"""

import contextlib
import functools
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

import k2jax
from k2jax import locks
from k2jax.errors import ConfigError
from k2jax.files import remove_leftovers, remove_tree, set_aside, write_json
from k2jax.text import redacted

TEMPLATE = "chat_template.jinja"  # of conversations: it goes with the tokenizer
PACKAGE = Path(k2jax.__file__).parent


def numbered(config: ConfigDict) -> ConfigDict:
    """The recipe, its subsets' priorities all different: of equal ones the recipe's order, which its dict has not."""
    names, config = list(config.subsets), config.copy_and_resolve_references().unlock()
    for number, name in enumerate(sorted(names, key=lambda name: (config.subsets[name].priority, names.index(name)))):
        config.subsets[name].priority = number
    return config.lock()


@contextlib.contextmanager
def claimed(config: ConfigDict, out: Path, other_code: bool = False) -> Iterator[None]:
    """This process alone works in `out`, which is empty or a preparation's, perhaps of another recipe (made.py).

    Raises ConfigError else, and where another version of the code began it, unless `other_code`: it is noted then.
    """
    check_folder(out, other_code)
    begun = out / "stages" / "recipe.json"
    begun.parent.mkdir(exist_ok=True, mode=0o700)  # tasks are told what to read with the credentials of its URLs
    with locked(out):
        code = check_folder(out, other_code)  # again: now no other process changes it
        found = json.loads(begun.read_bytes()) if begun.exists() else {}
        wanted = {"config": redacted(config.to_dict()), "version": k2jax.__version__, "code": code}
        if found != json.loads(json.dumps(wanted)):
            write_json(begun, wanted)
        remove_leftovers(out, alone=True)
        yield


def check_folder(out: Path, other_code: bool) -> list[str]:
    """The versions of the code that worked in `out`, and ours; reads only. Raises ConfigError as `claimed`."""
    begun = out / "stages" / "recipe.json"
    if not begun.exists():
        if (out / "data.json").exists() and not has_stages(out):
            raise ConfigError(f"--out={out}: another process finished it just now: run the same command again")
        if out.exists() and any(not path.name.startswith("stages") for path in out.iterdir()):
            raise ConfigError(f"--out={out}: holds files that are no preparation of ours; choose an empty folder")
        return [code_digest()]
    found = json.loads(begun.read_bytes())
    code = with_ours(found["code"] if "code" in found else ["unknown"], out, other_code)
    if (begun.parent / "done").exists() and not has_stages(out):
        raise ConfigError(
            f"--out={out} was begun by a k2jax that did not note what its stages are made of: go on with that version, "
            "or remove the folder"
        )
    return code


def locked(out: Path) -> locks.Lock:
    """To be used in a `with`: no other process works in `out`, whose folder of stages is there."""
    path = out / "stages" / "lock"
    try:
        return locks.hold(path, f"host {socket.gethostname()}, pid {os.getpid()}")
    except locks.Held as holder:
        raise ConfigError(f"--out={out}: another process ({holder}) is preparing data there; wait for it") from None
    except FileNotFoundError:  # between the making of its folder and this
        raise ConfigError(f"--out={out}: another process finished it just now: run the same command again") from None


def drop_stages(out: Path) -> Path:
    """Takes away what lies between documents and stores, at once, for who has the lock; returns where it is.

    To be removed without the lock, which goes with it and could not be kept alive.
    """
    return set_aside(out / "stages")


def sweep(out: Path) -> None:
    """Removes what is left of stages without notes, where no other process works."""
    remove_leftovers(out, "stages-*")
    if (out / "stages").exists() and not has_stages(out):
        gone = None
        with contextlib.suppress(ConfigError), locked(out):
            gone = drop_stages(out)
        if gone:
            remove_tree(gone)


def with_ours(theirs: list[str], out: Path, other_code: bool) -> list[str]:
    """The versions of the code that worked in `out`, and ours. Raises ConfigError if the last was another."""
    ours = code_digest()
    if theirs[-1] == ours:
        return theirs
    if not other_code:
        raise ConfigError(
            f"--out={out} was begun by another version of k2jax (code {theirs[-1][:12]}, this is {ours[:12]}); its "
            "stages may differ: go on with that version, remove the folder, or say --other_code, which is recorded"
        )
    return [*theirs, ours]


def codes(out: Path) -> list[str]:
    """The versions of the code that worked in `out`, by digest."""
    return json.loads((out / "stages" / "recipe.json").read_bytes())["code"]


def has_stages(out: Path) -> bool:
    """Whether what lies between documents and stores is there, with notes of what it was made of."""
    return (out / "stages" / "made.json").exists()


@functools.cache
def code_digest() -> str:
    """SHA-256 over the names and contents of what makes stores of documents: three rooms."""
    digest = hashlib.sha256()
    for path in sorted(path for room in ("chat", "data", "prepare") for path in (PACKAGE / room).rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
