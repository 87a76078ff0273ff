"""How answers are drawn: as the options say, else as the imported generation_config.json does, else as usual here."""

import json
import math
from typing import Any, NamedTuple

from k2jax.errors import ConfigError
from k2jax.model.sampling import Sampling, check_sampling
from k2jax.run.saved import SavedStep

FILE = "generation_config.json"
KEYS = ("temperature", "top_k", "top_p")
# What else changes the tokens there, with the values that do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,), "encoder_repetition_penalty": (1.0,), "min_p": (0.0,), "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,), "num_beams": (1,), "no_repeat_ngram_size": (0,),
    "length_penalty": (1.0,), "penalty_alpha": (0.0,), "guidance_scale": (1.0,), "bad_words_ids": ([],),
    "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "sequence_bias": ({},), "top_h": (),
}  # fmt: skip


class Chosen(NamedTuple):
    """How answers are drawn, and what a person should know of it, a line each."""

    sampling: Sampling
    told: str
    warnings: list[str]


def chosen(saved: SavedStep, options: dict[str, float | None], usual: dict[str, float]) -> Chosen:
    """`options` by KEYS, None where not given; `usual` are this command's own. Raises ConfigError for no numbers.

    Of the file, a do_sample of false is greedy, as it is for transformers; what the file does not name is not set.
    """
    values = json.loads((saved.imported or {}).get("side_files", {}).get(FILE, "{}"))
    given = {key: value for key, value in options.items() if value is not None}
    wanted = [key for key in KEYS if values.get(key) is not None and key not in given]
    named = {key: _number(key, values[key]) for key in wanted}
    if values.get("do_sample") is False:
        named = {"temperature": 0.0}
    elif named or values.get("do_sample"):
        named = {"temperature": 1.0, **named}
    found = {**(dict.fromkeys(usual, 0) | {"top_p": 1.0} if named else usual), **named, **given}
    sampling = Sampling(float(found["temperature"]), int(found["top_k"]), float(found["top_p"]))
    check_sampling(sampling)
    source = {key: "the option" if key in given else FILE if key in named else "usual" for key in KEYS}
    told = ", ".join(f"{key} {found[key]:g} ({source[key]})" for key in KEYS)
    if not sampling.temperature:
        told = f"greedy: temperature 0 ({source['temperature']})"
    others = {key: values[key] for key in NEUTRAL if values.get(key) is not None and values[key] not in NEUTRAL[key]}
    names = ", ".join(f"{key} {value}" for key, value in others.items())
    return Chosen(sampling, told, [f"{FILE} says {names[:200]}, which k2jax does not do"] if others else [])


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        option = f"--{key.replace('_', '-')}"
        raise ConfigError(f"{FILE} of the import: {key} is {str(value)[:40]!r}, expected a number: give {option}")
    return value
