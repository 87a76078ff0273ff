"""A corpus with no download: what the Python installation at work holds.

    python:code        source files of the standard library and of the installed packages, half of them
    python:docstrings  the docstrings of the other half, one document a file
    python:documents   the packages' descriptions and text files, and the standard library's help topics

Nothing is imported or run: files are read as text, Python through `ast`.
"""

import ast
import functools
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from email import message_from_string
from pathlib import Path
from typing import NamedTuple

SHORT_DOCSTRING = 60  # characters; what is shorter ("Returns the name.") is no prose
TEXT_SUFFIXES = (".md", ".rst", ".txt")
# Lists, and licences: a few texts hundreds of times, with small differences that hide it from deduplication.
NO_PROSE_FILES = ("license", "licence", "copying", "notice", "author", "requirements", "top_level")
# Test data: tables of numbers.
NO_PROSE_FOLDERS = {"licenses", "test", "tests", "data", "testdata"}
TOPICS = "pydoc_data/topics.py"


class Candidate(NamedTuple):
    """A document that can be read: its name, relative to a library, so that it holds no path of this machine, and the
    file that holds it.
    """

    name: str
    path: str


def known(source: str) -> bool:
    """Whether `source` is one of the forms above."""
    return source in _KINDS


def candidates(source: str) -> list[Candidate]:
    """The documents of a source, sorted by name, unread."""
    return sorted(_KINDS[source]())


def text_of(source: str, name: str, text: str) -> str | None:
    """The document of that name out of its file's text; None for a file that is no Python where it should be."""
    if source == "python:docstrings":
        return docstrings_of(text, name)
    if source == "python:documents" and f"{TOPICS}#" in name:
        return _topics_of(text)[name.partition("#")[2]]
    if source == "python:documents" and name.endswith("/METADATA"):
        return _description_of(text)
    return text


def docstrings_of(text: str, name: str) -> str | None:
    """The docstrings of a Python file in their order, each below the dotted name of what it describes."""
    if '"""' not in text and "'''" not in text:  # parsing takes long
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes, in files that are not ours
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    module = name.partition("/")[2].removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    found = ((name, ast.get_docstring(node)) for name, node in _definitions(tree, module))
    return "\n\n".join(f"{name}\n\n{text}" for name, text in found if text and len(text) >= SHORT_DOCSTRING)


def _definitions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    """The module, classes and functions from `node` down, those inside if and try too, by dotted name."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        name = f"{name}.{node.name}"
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield name, node
    for field in ("body", "orelse", "handlers", "finalbody"):
        below = getattr(node, field, None)
        for child in below if isinstance(below, list) else ():  # a lambda's body is no list, and holds none
            yield from _definitions(child, name)


def _library_files(wanted: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """(name, path) of the standard library's and the packages' files whose name in there is `wanted`."""
    paths = sysconfig.get_paths()
    libraries = {paths["stdlib"]: "stdlib"} | {paths[key]: "site-packages" for key in ("platlib", "purelib")}
    for root, library in libraries.items():
        for folder, subfolders, files in os.walk(root):
            # Packages may lie inside the standard library; what else is skipped holds paths of this machine.
            subfolders[:] = [
                name
                for name in subfolders
                if not name.startswith("config-")
                and name not in ("__pycache__", "site-packages", "dist-packages")
            ]
            prefix = folder[len(root) :].replace(os.sep, "/").lstrip("/")
            for file in files:
                name = f"{prefix}/{file}" if prefix else file
                if wanted(name) and not file.startswith(("__editable__", "_sysconfigdata")):
                    yield f"{library}/{name}", os.path.join(folder, file)


def _code() -> Iterator[Candidate]:
    for name, path in _library_files(lambda name: name.endswith(".py")):
        if _half(name) == 0:
            yield Candidate(name, path)


def _docstrings() -> Iterator[Candidate]:
    for name, path in _library_files(lambda name: name.endswith(".py")):
        if _half(name) == 1:
            yield Candidate(name, path)


def _half(name: str) -> int:
    """0 or 1: a file gives code or docstrings, never both, else one would train on what the other holds out."""
    return hashlib.sha256(name.encode()).digest()[0] & 1


def _documents() -> Iterator[Candidate]:
    for name, path in _library_files(_is_prose):
        if name.endswith(TOPICS):
            topics = _topics_of(Path(path).read_text(encoding="utf-8"))
            yield from (Candidate(f"{name}#{topic}", path) for topic in topics)
        else:
            yield Candidate(name, path)


def _is_prose(name: str) -> bool:
    *folders, file = name.split("/")
    if folders and folders[-1].endswith(".dist-info"):
        return file == "METADATA"
    if name == TOPICS:
        return True
    if not NO_PROSE_FOLDERS.isdisjoint(folders):
        return False
    return file.lower().endswith(TEXT_SUFFIXES) and not file.lower().startswith(NO_PROSE_FILES)


def _description_of(metadata: str) -> str:
    """The long description in a package's METADATA: its body, in old ones a header."""
    message = message_from_string(metadata)
    return message.get_payload() or message.get("Description", "")


@functools.lru_cache(maxsize=1)
def _topics_of(text: str) -> dict[str, str]:
    """The dictionary that pydoc_data/topics.py consists of: help on the language, by topic."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return {}


_KINDS: dict[str, Callable[[], Iterator[Candidate]]] = {
    "python:code": _code,
    "python:docstrings": _docstrings,
    "python:documents": _documents,
}
