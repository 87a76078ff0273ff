"""Texts out of rows: by a key, `meta.body.text`, or by a template of keys, "{title}\\n\\n{body}".

A key is a path: at each object its longest part that is a name there goes one step on, so that a name may hold dots.
Each element of a list that it meets is followed; what they give is joined by a blank line. In a template `{key}` must
be there, as a string or a whole number; `{key?}` may be missing or null, and then gives nothing. A line of the template
all of whose keys may be missing, and are, is left out with the line feeds before it. `{{` and `}}` are braces. There is
no more to it: what stands between braces is a name as it is.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from k2jax.data.records import Bad, text_of
from k2jax.errors import ConfigError
from k2jax.prepare.tally import clean_name

BETWEEN = "\n\n"  # texts of a list's elements
PART = re.compile(r"(\{\{|\}\}|\{[^{}]*\}|[{}])")
MISSING = object()
SHOWN = 40  # keys in a message
DEEPEST = 6  # of those


class Field(NamedTuple):
    """A key of a template."""

    path: str
    optional: bool


class Line(NamedTuple):
    """A line of a template: the line feeds before it, and what it is made of."""

    before: str
    parts: list[str | Field]


class Text(NamedTuple):
    """What makes the text of a row: a key (`lines` is None) or a template."""

    fields: list[Field]
    lines: list[Line] | None

    def of(self, row: dict[str, Any], most: int) -> str | Bad:
        """The text, of at most `most` bytes, or why there is none."""
        try:
            text = _of_key(row, self.fields[0].path) if self.lines is None else _written(row, self.lines)
        except RecursionError:
            return Bad("text is no string", "lists in lists without end")
        return text if isinstance(text, Bad) else text_of(text, most)

    def missing(self, has: Callable[[str], bool]) -> list[str]:
        """The keys without which there is no text, of those that `has` has not."""
        lacking = [one for one in self.fields if not has(one.path)]
        needed = [one.path for one in lacking if not one.optional]
        return needed or [one.path for one in lacking if len(lacking) == len(self.fields)]


def text_by(key: str, template: str) -> Text:
    """By the recipe's `text` where it is one, else by its `text_key`; ConfigError for a template that is none."""
    if not template:
        return Text([Field(key, False)], None)
    lines = [Line("", [])]
    for i, piece in enumerate(re.split(r"(\n+)", template)):
        if i % 2:
            lines.append(Line(piece, []))
        else:
            lines[-1].parts.extend(_part(part, template) for part in PART.split(piece) if part)
    fields = [part for line in lines for part in line.parts if isinstance(part, Field)]
    if not fields:
        raise ConfigError(f"text={template!r}: names no key; one is written {{title}}, or {{meta.title}}")
    return Text(fields, lines)


def _part(part: str, template: str) -> str | Field:
    if part in ("{{", "}}"):
        return part[0]
    if part in ("{", "}"):
        raise ConfigError(f"text={template!r}: a {part} without its other half; write {part * 2} for the character")
    if not part.startswith("{"):
        return part
    path, optional = part[1:-1].removesuffix("?"), part.endswith("?}")
    if not all(path.split(".")):
        raise ConfigError(f"text={template!r}: {part} names no key; one is written {{title}}, or {{meta.title}}")
    return Field(path, optional)


def _written(row: dict[str, Any], lines: list[Line]) -> str | Bad:
    kept: list[str] = []
    for before, parts in lines:
        found = [part if isinstance(part, str) else _of_field(row, part) for part in parts]
        if bad := [one for one in found if isinstance(one, Bad)]:
            return bad[0]
        fields = [one for one, part in zip(found, parts, strict=True) if isinstance(part, Field)]
        if fields and all(one is None for one in fields):
            continue
        kept += [before, *(one or "" for one in found)] if kept else [one or "" for one in found]
    return "".join(kept)


def _of_field(row: dict[str, Any], field: Field) -> str | Bad | None:
    """What a field of a template gives; None where it may be missing, and is."""
    found = list(values(row, field.path))
    if field.optional:
        found = [one for one in found if one is not MISSING and one is not None]
        if not found:
            return None
    elif any(one is MISSING or one is None for one in found):
        return Bad(f"no {field.path!r}", "missing" if MISSING in found else "null")
    return _together([str(one) if isinstance(one, int) and not isinstance(one, bool) else one for one in found])


def _of_key(row: dict[str, Any], path: str) -> Any:
    found = list(values(row, path))
    if any(one is MISSING for one in found):
        return Bad("no text", f"key {path!r} is missing")
    return found[0] if len(found) == 1 else _together(found)


def _together(found: list[Any]) -> str | Bad:
    """The texts, joined; or what is wrong with one, which is not yet told of all of them."""
    texts = []
    for one in found:
        text = one if isinstance(one, Bad) else text_of(one, 1 << 62)
        if isinstance(text, Bad):
            return text
        texts.append(text)
    return BETWEEN.join(texts)


def values(value: Any, path: str) -> Iterator[Any]:
    """What a path leads to, in order; MISSING for each way that ends early."""
    if isinstance(value, list):
        for one in value:
            yield from values(one, path)
    elif not path or isinstance(value, Bad):
        yield value
    elif isinstance(value, dict) and (step := _longest(value, path)) is not None:
        yield from values(value[step], path[len(step) + 1 :])
    else:
        yield MISSING


def seen(row: dict[str, Any], paths: Iterable[str]) -> set[str]:
    """The paths that lead to something in a row, be it null."""
    return {path for path in paths if any(one is not MISSING for one in values(row, path))}


def at(row: dict[str, Any], path: str) -> Any:
    """What a path leads to; several are a list, None is nothing."""
    found = [one for one in values(row, path) if one is not MISSING and one is not None]
    return found[0] if len(found) == 1 else found or None


def _longest(value: dict[str, Any], path: str) -> str | None:
    """The longest part of a path, from its beginning and up to a dot, that is a name there."""
    step = path
    while step not in value:
        step, dot, _ = step.rpartition(".")
        if not dot:
            return None
    return step


def is_at(path: str, wanted: str) -> bool:
    """Whether a path is the wanted one, or goes on from there."""
    return path == wanted or path.startswith(f"{wanted}.")


def leaves(names: Iterable[pa.Field], before: str = "") -> Iterator[str]:
    """The path of each column of a table as Parquet has it: of a struct its parts, of a list that of its elements."""
    for field in names:
        yield from _leaves(field.type, f"{before}{field.name}")


def _leaves(kind: pa.DataType, path: str) -> Iterator[str]:
    while isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_struct(kind):
        yield from leaves((kind.field(i) for i in range(kind.num_fields)), f"{path}.")
    elif pa.types.is_map(kind):
        yield from (path, path)  # of its keys, and of its values: no path leads into one
    elif hasattr(kind, "value_field"):
        yield from _leaves(kind.value_type, path)
    else:
        yield path


def paths_of(value: Any, before: str = "", depth: int = 0) -> Iterator[str]:
    """The paths of what a row of JSON holds."""
    if isinstance(value, dict) and value and depth < DEEPEST:
        for name, one in value.items():
            yield from paths_of(one, f"{before}.{name}" if before else name, depth + 1)
    elif isinstance(value, list) and value and depth < DEEPEST:
        for one in value[:SHOWN]:
            yield from paths_of(one, before, depth + 1)
    else:
        yield before


def shown(paths: Iterable[str]) -> str:
    """Keys for a message."""
    found = list(dict.fromkeys(map(clean_name, paths)))
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
