"""Whose a preparation's folder is: one process at a time, one recipe, and one version of this code, or more by name.

    stages/recipe.json  {"config", "version", "code": [digest of the code that began it, and of each that went on]}
    stages/lock         of the process that works there
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import k2jax
from k2jax import locks
from k2jax.data.store import Store
from k2jax.data.tokenizer import tokenizer_sha256
from k2jax.errors import ConfigError
from k2jax.files import remove_leftovers, write_json
from k2jax.prepare import pii, recipe
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
    """This process alone works in `out`, which is empty or was begun with this recipe.

    Raises ConfigError else, and where another version of the code began it, unless `other_code`: it is noted then.
    """
    begun = out / "stages" / "recipe.json"
    if not begun.exists() and any(path.name != "stages" for path in out.iterdir()):
        raise ConfigError(f"--out={out}: holds files that are no preparation of ours; choose an empty folder")
    begun.parent.mkdir(exist_ok=True, mode=0o700)  # tasks are told what to read with the credentials of its URLs
    with _locked(begun.parent / "lock", out):
        wanted = {"config": redacted(config.to_dict()), "version": k2jax.__version__, "code": [code_digest(config)]}
        if not begun.exists():
            write_json(begun, wanted)
        found = json.loads(begun.read_bytes())
        _check_recipe(found["config"], config, out, "was begun with")
        _check_code(found, code_digest(config), out, other_code)
        shutil.rmtree(out / "card", ignore_errors=True)
        remove_leftovers(out, alone=True)
        yield


def _locked(path: Path, out: Path) -> locks.Lock:
    try:
        return locks.hold(path, f"host {socket.gethostname()}, pid {os.getpid()}")
    except locks.Held as holder:
        raise ConfigError(f"--out={out}: another process ({holder}) is preparing data there; wait for it") from None


def _check_code(found: dict[str, Any], ours: str, out: Path, other_code: bool) -> None:
    theirs = found.get("code", ["unknown"])
    if theirs[-1] == ours:
        return
    if not other_code:
        raise ConfigError(
            f"--out={out} was begun by another version of k2jax (code {theirs[-1][:12]}, this is {ours[:12]}), or of "
            "phonenumberslite where phones are replaced; its stages may differ: go on with that version, remove the "
            "folder, or say --other_code, which is recorded"
        )
    write_json(out / "stages" / "recipe.json", found | {"code": [*theirs, ours]})


def codes(out: Path) -> list[str]:
    """The versions of the code that worked in `out`, by digest."""
    return json.loads((out / "stages" / "recipe.json").read_bytes())["code"]


def code_digest(config: ConfigDict) -> str:
    """SHA-256 over the names and contents of what makes stores of documents: three rooms, and what phones are rules of.

    The plans of the world's phone numbers change from one release of their library to the next, every other week.
    """
    digest = hashlib.sha256()
    for path in sorted(path for room in ("chat", "data", "prepare") for path in (PACKAGE / room).rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    if any("phone" in chosen.pii for chosen in config.subsets.values()):
        digest.update(f"libphonenumber {pii.phones_version()}".encode())
    return digest.hexdigest()


def _check_recipe(made: dict[str, Any], config: ConfigDict, out: Path, how: str) -> None:
    """Raises ConfigError if another recipe made what lies in `out`."""
    wanted = redacted(config.to_dict())
    usual = recipe.base()
    made = {"eos": "", "chat": usual.chat.to_dict(), "part_bytes": usual.part_bytes, **made}  # before there were these
    later = {"conversations": {}, "dumps": [], "follow_links": False, "max_unreadable": 0, "priority": 0}
    later["pii_regions"] = ["US"]
    later |= {"text": "", "field_keys": [], "encoding": "", "language_thresholds": [], "drop_repeated": []}
    later |= {"quality_model": "", "quality_label": "", "quality_threshold": None}
    later |= {"scorer": "", "scorer_threshold": None}
    made["contamination"] = {"unit": "words", **made.get("contamination", {})}
    made["subsets"] = {name: {**later, **chosen} for name, chosen in made.get("subsets", {}).items()}
    for name, chosen in made["subsets"].items():
        is_open = name in config.subsets and not config.subsets[name].tasks
        chosen["tasks"] = 0 if is_open else chosen.get("tasks")  # what it was settled to
        chosen["pii"] = [] if chosen.get("pii") is False else chosen.get("pii")  # True: by other rules
        chosen["conversations"] = chosen["conversations"] and {"pairs": False, **chosen["conversations"]}
    made = numbered(ConfigDict(made)).to_dict()  # the names' order was that of equal priorities
    if made != wanted:
        changes = "; ".join(
            f"{key} was {made.get(key)}, asked for is {wanted.get(key)}"
            for key in sorted(made | wanted)
            if made.get(key) != wanted.get(key)
        )
        raise ConfigError(f"--out={out} {how} another recipe ({changes}): remove it or choose another folder")


def finished(config: ConfigDict, out: Path) -> dict[str, Any]:
    """What data.json holds, once shown to be what `config` asks for and what lies in the folder."""
    again = f"remove {out} to prepare it again"
    try:
        data = json.loads((out / "data.json").read_text(encoding="utf-8"))
        made, expected = data["config"], {name: row["root_digest"] for name, row in data["stores"].items()}
        expected["tokenizer.json"] = data["tokenizer_sha256"]
        expected |= {TEMPLATE: data["chat"]["template_sha256"]} if "chat" in data else {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{out}/data.json is damaged: {again}") from error
    _check_recipe(made, config, out, "was made by")
    for name, digest in expected.items():
        path = out / name
        is_file = name in ("tokenizer.json", TEMPLATE)
        found = tokenizer_sha256(path) if is_file else Store.open(str(path)).root_digest
        if found != digest:
            raise ConfigError(f"{out}/{name} has digest {found}, data.json says {digest}: {again}")
    return data
