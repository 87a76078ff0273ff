"""A preparation that is complete: whether its folder is what data.json says, and what another recipe changes there.

Its stages are mostly gone. What no stage reads, such as `repeats`, is changed in data.json and on the card alone.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from k2jax.data.store import Store
from k2jax.data.tokenizer import tokenizer_sha256
from k2jax.errors import ConfigError
from k2jax.files import read_json, remove_tree, write_json
from k2jax.prepare import claim, made, plan, reads, recipe
from k2jax.prepare.card import card
from k2jax.prepare.claim import TEMPLATE
from k2jax.prepare.sources import unreadable
from k2jax.prepare.tokens import token_sources
from k2jax.text import redacted, shown


def read(out: Path) -> dict[str, Any]:
    """What data.json holds, once shown to be what lies in the folder."""
    again = f"remove {out} to prepare it again"
    try:
        data = json.loads((out / "data.json").read_text(encoding="utf-8"))
        _ = data["config"]["subsets"].items()
        expected = {name: row["root_digest"] for name, row in data["stores"].items()}
        expected["tokenizer.json"] = data["tokenizer_sha256"]
        expected |= {TEMPLATE: data["chat"]["template_sha256"]} if "chat" in data else {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{out}/data.json is damaged: {again}") from error
    for name, digest in expected.items():
        path = out / name
        is_file = name in ("tokenizer.json", TEMPLATE)
        found = tokenizer_sha256(path) if is_file else Store.open(str(path)).root_digest
        if found != digest:
            raise ConfigError(f"{out}/{name} has digest {found}, data.json says {digest}: {again}")
    return data


def is_left(config: ConfigDict, out: Path, data: dict[str, Any], go_on: bool) -> bool:
    """Whether it is the same recipe's, and nothing is there with which it could be made another: no stages, or those of
    another version of the code, unless that shall `go_on` with them."""
    if claim.has_stages(out) and (go_on or claim.codes(out)[-1] == claim.code_digest()):
        return False
    return not changes(data, config)


def check_redo(config: ConfigDict, out: Path, data: dict[str, Any] | None, redo: Sequence[str]) -> None:
    """Raises ConfigError where stages are to be done again of a folder that has none left, or are none."""
    if redo and data and not claim.has_stages(out):
        plan.check_names(plan.units(_settled(config, data), plan.named(config, data["inputs"])), redo)
        raise ConfigError(
            f"--redo={shown(redo[0])}: {out} is finished, and what its stages read is gone (--keep_stages keeps it): "
            "remove the folder or choose another"
        )


def changes(data: dict[str, Any], config: ConfigDict) -> dict[str, str]:
    """{key: "KEY was X, is Y"} of each that is asked for otherwise than data.json has it."""
    was, now = _as_now(data["config"]), json.loads(json.dumps(redacted(_settled(config, data).to_dict())))
    was, now = reads.flat(was), reads.flat(now)
    return made.changes(was, now)


def _settled(config: ConfigDict, data: dict[str, Any]) -> ConfigDict:
    """With the number of each `tasks` that the recipe leaves open as the folder's has it (dealing.settled)."""
    config, made = config.copy_and_resolve_references().unlock(), data["config"]["subsets"]
    for name, chosen in config.subsets.items():
        if not chosen.tasks:
            chosen.tasks = made[name]["tasks"] if name in made else 1
    return config.lock()


def _as_now(config: dict[str, Any]) -> dict[str, Any]:
    """A recipe as today's code would have written it down, with the keys that there were not."""
    usual = recipe.base()
    whole = {"eos": "", "chat": usual.chat.to_dict(), "part_bytes": usual.part_bytes}
    whole |= {"shared": usual.shared.to_dict(), **config}
    later = {"conversations": {}, "dumps": [], "follow_links": False, "max_unreadable": 0, "priority": 0}
    later |= {"pii_regions": ["US"], "text": "", "field_keys": [], "encoding": "", "language_thresholds": []}
    later |= {"drop_repeated": [], "quality_model": "", "quality_label": "", "quality_threshold": None}
    later |= {"scorer": "", "scorer_threshold": None, "drop_shared": ""}
    whole["contamination"] = {"unit": "words", **whole.get("contamination", {})}
    whole["subsets"] = {name: {**later, **chosen} for name, chosen in whole["subsets"].items()}
    for chosen in whole["subsets"].values():
        if isinstance(pii := chosen.get("pii"), bool):
            chosen["pii"] = ["rules before these"] if pii else []
        chosen["conversations"] = chosen["conversations"] and {"pairs": False, **chosen["conversations"]}
    return json.loads(json.dumps(claim.numbered(ConfigDict(whole)).to_dict()))  # by name: the order of equal priorities


def check_possible(config: ConfigDict, out: Path, data: dict[str, Any]) -> None:
    """Raises ConfigError where a stage reads what has changed: what lay between documents and stores is gone."""
    left_out = data["unreadable"] if "unreadable" in data else {}
    for name, why in unreadable.too_many(config, left_out).items():
        raise ConfigError(
            f"--out={out}: subsets.{name}: {why}, and what reads them again needs stages that are gone "
            "(--keep_stages keeps them): remove the folder or choose another"
        )
    now = redacted(_settled(config, data).to_dict())
    both = (ConfigDict(_as_now(one)) for one in (data["config"], now))
    was, now = (plan.units(one, plan.named(one, data["inputs"])) for one in both)
    for name in [*now, *was]:
        if was.get(name) != now.get(name):
            read = [one[name].reads if name in one else {} for one in (was, now)]
            keys = [what for key, what in changes(data, config).items() if key in read[0] | read[1]]
            what = keys or list(made.changes(*read).values())
            raise ConfigError(
                f"--out={out} was made by another recipe ({'; '.join(what[:3])}): that begins again at stage {name}, "
                "and what it reads is gone (--keep_stages keeps it): remove the folder or choose another"
            )


def rewritten(config: ConfigDict, out: Path, data: dict[str, Any], other_code: bool) -> dict[str, Any]:
    """Writes data.json and the card anew, as `config` has it, where no stage is needed; returns what data.json holds.

    Raises ConfigError else, or where another version of the code made the folder, unless `other_code`.
    """
    check_possible(config, out, data)
    code = claim.with_ours(data["code"] if "code" in data else ["unknown"], out, other_code)
    print(f"{out}: data.json and card are written anew ({'; '.join(changes(data, config).values())})", file=sys.stderr)
    (out / "stages").mkdir(exist_ok=True, mode=0o700)
    with claim.locked(out):
        opened = {name: Store.open(out / name) for name in data["stores"]}
        mix = mix_of(config, {name: row["subset"] for name, row in data["stores"].items()}, opened)
        for name, row in data["stores"].items():
            row["repeats"] = mix[name]
        data |= {"config": redacted(_settled(config, data).to_dict()), "code": code, "mix": mix}
        write_json(out / "data.json", data)
        card.rewrite_card(out, data)
        gone = claim.drop_stages(out)
    remove_tree(gone)
    return data


def mend_card(out: Path, data: dict[str, Any]) -> None:
    """Ends what was interrupted between data.json and its card."""
    path = out / "card" / "data.json"
    if path.exists() and read_json(path)["config"] != json.loads(json.dumps(data["config"])):
        card.rewrite_card(out, data)


def mix_of(config: ConfigDict, subset_of: dict[str, str], opened: dict[str, Store]) -> dict[str, float]:
    """The repeats of stores, of these subsets; seqio's rates become repeats that have their proportions."""
    mix = {
        name: float(config.subsets[subset].repeats * recipe.factors_of(config, subset).get(name, 1))
        for name, subset in subset_of.items()
    }
    kinds = {name: recipe.kind_of(config.subsets[subset].source)[0] for name, subset in subset_of.items()}
    if rates := {name: mix[name] for name, kind in kinds.items() if kind == "seqio"}:
        examples = {name: opened[name].num_train_documents for name in rates}
        mix |= token_sources.mix_of_rates(rates, examples, {name: opened[name].num_train_tokens for name in rates})
    return mix
