"""Where documents come from: the files of the Python installation at work, or plain text files.

    python:code        source files of the standard library and of the installed packages, half of them
    python:docstrings  the docstrings of the other half, one document a file
    python:documents   the packages' descriptions and text files, and the standard library's help topics
    text:GLOB          files that match the pattern (`**` is any depth), one document a file

Nothing is imported or run: files are read as text, Python through `ast`.
"""

import ast
import functools
import glob
import hashlib
import itertools
import os
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from email import message_from_string
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

CHOICES = "python:code, python:docstrings, python:documents or text:GLOB"

SHORT_DOCSTRING = 60  # characters; what is shorter ("Returns the name.") is no prose
TEXT_SUFFIXES = (".md", ".rst", ".txt")
# Lists, and licences: a few texts hundreds of times, with small differences that hide it from deduplication.
NO_PROSE_FILES = ("license", "licence", "copying", "notice", "author", "requirements", "top_level")
# Test data: tables of numbers.
NO_PROSE_FOLDERS = {"licenses", "test", "tests", "data", "testdata"}
TOPICS = "pydoc_data/topics.py"
Reader = Callable[[str, str], str | None]


class Candidate(NamedTuple):
    """A document that can be read: its name, the file that holds it, how to get it out of the file's text.

    The name is relative to a library or to the pattern's folder: it holds no path of this machine. `reader`
    takes the file's text and the name; None says that the file is not what it should be.
    """

    source: str
    path: str
    reader: Reader


class Document(NamedTuple):
    """A text, the SHA-256 (hex) of its UTF-8 bytes, their number, and where it came from."""

    text: str
    id: str
    num_bytes: int
    source: str


def known(source: str) -> bool:
    """Whether `source` is one of the forms above."""
    return source in _PYTHON or (source.startswith("text:") and source != "text:")


def candidates(source: str) -> list[Candidate]:
    """The documents of a source, sorted by name, unread."""
    found = _PYTHON[source]() if source in _PYTHON else _text_files(source.removeprefix("text:"))
    return sorted(found, key=lambda candidate: candidate.source)


def read(candidate: Candidate) -> str | None:
    """The document, exactly as it is; None for a file that is no UTF-8, or no Python where it should be."""
    try:
        text = candidate.reader(Path(candidate.path).read_bytes().decode("utf-8"), candidate.source)
        if text is not None:
            text.encode("utf-8")  # a docstring may spell half a surrogate pair, "\\ud800", which is no text
        return text
    except (OSError, UnicodeError):
        return None


def reader_of(source: str, name: str) -> Reader:
    """What gets the document of that name out of its file's text, of a python: source."""
    if source == "python:docstrings":
        return docstrings_of
    if source == "python:code":
        return _whole
    if f"{TOPICS}#" in name:
        return _topic_of
    return _description_of if name.endswith("/METADATA") else _whole


def documents(chosen: ConfigDict, *, seed: int, seen: set[bytes], left_out: Counter) -> Iterator[Document]:
    """The documents that a subset (`prepare.subset()`) takes, each text once, in an order drawn by `seed`.

    The order is by a keyed hash of the source, so that any part of the subset, such as its held-out end, is a
    fair sample of it. `seen` holds the digests of the texts given so far, by any subset; `left_out` counts
    the documents that were not taken, by reason.
    """
    key = hashlib.sha256(str(seed).encode()).digest()
    found = candidates(chosen.source)
    found.sort(key=lambda candidate: hashlib.blake2b(candidate.source.encode(), key=key).digest())
    total = 0
    for i, candidate in enumerate(found):
        text = read(candidate)
        if text is None:
            left_out["unreadable"] += 1
            continue
        raw = text.encode()
        digest = hashlib.sha256(raw)
        if len(raw) < chosen.min_document_bytes:
            left_out["too short"] += 1
        elif chosen.max_document_bytes and len(raw) > chosen.max_document_bytes:
            left_out["too long"] += 1
        elif digest.digest() in seen:
            left_out["duplicate"] += 1
        elif chosen.max_bytes and total + len(raw) > chosen.max_bytes:
            left_out["over max_bytes"] = len(found) - i
            return
        else:
            seen.add(digest.digest())
            total += len(raw)
            yield Document(text, digest.hexdigest(), len(raw), candidate.source)


def docstrings_of(text: str, source: str) -> str | None:
    """The docstrings of a Python file in their order, each below the dotted name of what it describes."""
    if '"""' not in text and "'''" not in text:  # parsing takes long
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes, in files that are not ours
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    module = source.partition("/")[2].removesuffix(".py").removesuffix("/__init__").replace("/", ".")
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
    for source, path in _library_files(lambda name: name.endswith(".py")):
        if _half(source) == 0:
            yield Candidate(source, path, _whole)


def _docstrings() -> Iterator[Candidate]:
    for source, path in _library_files(lambda name: name.endswith(".py")):
        if _half(source) == 1:
            yield Candidate(source, path, docstrings_of)


def _half(source: str) -> int:
    """0 or 1: a file gives code or docstrings, never both, else one would train on what the other holds out."""
    return hashlib.sha256(source.encode()).digest()[0] & 1


def _documents() -> Iterator[Candidate]:
    for source, path in _library_files(_is_prose):
        names = [source]
        if source.endswith(TOPICS):
            names = [f"{source}#{topic}" for topic in _topics_of(Path(path).read_text(encoding="utf-8"))]
        for name in names:
            yield Candidate(name, path, reader_of("python:documents", name))


def _is_prose(name: str) -> bool:
    *folders, file = name.split("/")
    if folders and folders[-1].endswith(".dist-info"):
        return file == "METADATA"
    if name == TOPICS:
        return True
    if not NO_PROSE_FOLDERS.isdisjoint(folders):
        return False
    return file.lower().endswith(TEXT_SUFFIXES) and not file.lower().startswith(NO_PROSE_FILES)


def _whole(text: str, _: str) -> str:
    return text


def _description_of(metadata: str, _: str) -> str:
    """The long description in a package's METADATA: its body, in old ones a header."""
    message = message_from_string(metadata)
    return message.get_payload() or message.get("Description", "")


def _topic_of(text: str, source: str) -> str:
    return _topics_of(text)[source.partition("#")[2]]


@functools.lru_cache(maxsize=1)
def _topics_of(text: str) -> dict[str, str]:
    """The dictionary that pydoc_data/topics.py consists of: help on the language, by topic."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return {}


def _text_files(pattern: str) -> Iterator[Candidate]:
    """Names are relative to the folder before the pattern's first wildcard."""
    parts = Path(pattern).parts
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), parts))
    root = Path(*fixed) if len(fixed) < len(parts) else Path(pattern).parent
    for file in glob.iglob(pattern, recursive=True):
        if os.path.isfile(file):
            name = Path(file).relative_to(root).as_posix()
            name = os.fsencode(name).decode("utf-8", "replace")  # not every file's name is UTF-8
            yield Candidate(name, file, _whole)


_PYTHON: dict[str, Callable[[], Iterator[Candidate]]] = {
    "python:code": _code,
    "python:docstrings": _docstrings,
    "python:documents": _documents,
}
