"""Rules that ask a model about a document: its language, its quality by fastText, a score by a function of the user's.

What a model says is kept in the document's metadata, as `language`, `quality`, `score`, and counted before anything is
left out for it, so that the card shows where a threshold would cut. A model that gives what is no number ends it, and
so does a scorer whose number for a text depends on those beside it: which those are depends on the tasks.
"""

import functools
import importlib
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datatrove.data import Document
from ml_collections import ConfigDict

from k2jax.errors import ConfigError
from k2jax.prepare.tally import Tally

Apply = Callable[[Document], str | None]
Score = Callable[[list[str]], list[float]]
SAME = 0.02  # of a score: what a network in bfloat16 gives is not the same in another batch, but near
END = re.compile(r"(?<![^ \n\r\t\v\f\0])</s>(?![^ \n\r\t\v\f\0])")  # a word at which fastText stops reading
DIGITS = 6  # kept of a score, and compared: the last ones differ from machine to machine


def language(chosen: ConfigDict) -> Apply:
    """Labels documents; where `languages` are named, others are left out, and those of which the model is unsure."""
    model = fasttext_model(chosen.language_model, "language_model")
    thresholds, known = dict(chosen.language_thresholds), model.get_labels()
    if unknown := [code for code in chosen.languages if f"__label__{code}" not in known]:
        some = ", ".join(sorted(known)[:20])
        raise ConfigError(f"languages: {chosen.language_model} has no label for {unknown[0]!r}; it has {some}, ...")

    def label(one: Document) -> str | None:
        scores = _predicted(model, one.text, f"language_model={chosen.language_model}", most=1)
        found, probability = next(iter(scores.items()), ("unknown", 0.0))
        found = found.removeprefix("__label__")
        one.metadata["language"] = found
        if not chosen.languages:
            return None
        if found not in chosen.languages:
            return f"language {found}"
        least = thresholds[found] if found in thresholds else chosen.language_threshold
        return "language unsure" if probability < least else None

    return label


def quality(chosen: ConfigDict, tally: Tally) -> Apply:
    """Keeps the probability that fastText's model gives to `quality_label`."""
    path, label = chosen.quality_model, f"__label__{chosen.quality_label.removeprefix('__label__')}"
    model = fasttext_model(path, "quality_model")
    if label not in model.get_labels():
        known = ", ".join(sorted(model.get_labels())[:20])
        raise ConfigError(f"quality_label={chosen.quality_label}: {path} has no such label; it has {known}")

    def apply(one: Document) -> str | None:
        found = _predicted(model, one.text, f"quality_model={path}", most=-1)  # without words it has none
        probability = min(found[label], 1.0) if label in found else 0.0  # it adds some 1e-5
        return _judged(one, "quality", round(probability, DIGITS), chosen.quality_threshold, tally)

    return apply


def _predicted(model: Any, text: str, what: str, most: int) -> dict[str, float]:
    """The probability of each label, the largest first; of `most` labels, or of all (-1)."""
    try:
        labels, scores = model.predict(END.sub(" ", text.replace("\n", " ")), k=most)
        if not all(map(math.isfinite, scores)):
            raise RuntimeError("it gives what is no number")
    except RuntimeError as error:
        raise ConfigError(f"{what} fails on a document ({error}): it is damaged; take another") from error
    return dict(zip(labels, map(float, scores), strict=True))


def _judged(one: Document, name: str, score: float, least: float | None, tally: Tally) -> str | None:
    one.metadata[name] = score
    tally.scored(name, score)
    return f"{name} below {least:g}" if least is not None and score < least else None


def scorer(chosen: ConfigDict, tally: Tally) -> tuple[Callable[[list[Document]], None], Apply]:
    """What scores documents together, by the function that `scorer` names, and what judges each by its score."""
    function, is_checked = _imported(chosen.scorer), False

    def score(documents: list[Document]) -> None:
        nonlocal is_checked
        numbers = _numbers(function, [one.text for one in documents], chosen.scorer)
        if not is_checked and len(documents) > 1:
            is_checked = True
            _check_alone(function, documents[0].text, numbers[0], chosen.scorer)
        for one, number in zip(documents, numbers, strict=True):
            one.metadata["score"] = round(number, DIGITS)

    def judge(one: Document) -> str | None:
        return _judged(one, "score", one.metadata["score"], chosen.scorer_threshold, tally)

    return score, judge


def _imported(name: str) -> Score:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        raise ConfigError(f"scorer={name}: {error}: name a function of it") from error
    except (Exception, SystemExit) as error:  # of a module's own code
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(
            f"scorer={name}: {module} cannot be imported ({reason}): install it, or put its folder on PYTHONPATH"
        ) from error
    if not callable(function):
        raise ConfigError(f"scorer={name}: is no function but {type(function).__name__}")
    return function


def file_of(name: str) -> str:
    """The file of a scorer's module, "" of one that is built in; what it imports is not known."""
    _imported(name)
    return vars(sys.modules[name.partition(":")[0]]).get("__file__") or ""


def _check_alone(function: Score, text: str, beside: float, name: str) -> None:
    [alone] = _numbers(function, [text], name)
    if abs(alone - beside) > SAME * max(1.0, abs(alone)):
        raise ConfigError(
            f"scorer={name} gave {alone:g} for a text alone and {beside:g} for it beside others: it must judge each by "
            "itself"
        )


def _numbers(function: Score, texts: list[str], name: str) -> list[float]:
    try:
        found = [float(one) for one in function(texts)]
    except (Exception, SystemExit) as error:  # of a function of the user's
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(
            f"scorer={name} failed ({reason}): it must give a list of numbers for a list of texts"
        ) from error
    if len(found) != len(texts):
        raise ConfigError(f"scorer={name} gave {len(found)} numbers for {len(texts)} texts: it must give one each")
    if wrong := [one for one in found if not math.isfinite(one)]:
        raise ConfigError(f"scorer={name} gave {wrong[0]} for a text: it must give a number each")
    return found


@functools.cache
def _loaded(path: str, size: int, changed: int) -> Any:
    fasttext = import_of("fasttext", "fasttext-numpy2-wheel")
    return fasttext.load_model(path)


def fasttext_model(path: str, key: str) -> Any:
    """A model of fastText, loaded once in a process; ConfigError if it is none."""
    if not Path(path).is_file():
        raise ConfigError(f"{key}={path}: no such file; fastText's lid.176.bin is one, see fasttext.cc")
    stat = Path(path).stat()
    try:
        return _loaded(path, stat.st_size, stat.st_mtime_ns)
    except ValueError as error:
        raise ConfigError(f"{key}={path} is no model of fastText: {error}") from error


def import_of(module: str, packages: str) -> Any:
    """A module of a package that not every recipe needs."""
    try:
        return __import__(module)
    except ImportError as error:
        raise ConfigError(f"{module} cannot be imported ({error}): pip install {packages}") from error
