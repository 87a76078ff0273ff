"""Documents are read as they are, without running anything, and are named without a path of this machine."""

import os
from collections import Counter

import pytest

from k2jax.data import sources
from k2jax.data.prepare import subset

TEXTS = {f"{'ab'[i % 2]}/{i}.txt": f"Document {i} of the corpus.\n" * (i + 1) for i in range(20)}


@pytest.fixture
def corpus(tmp_path):
    for name, text in TEXTS.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "corpus"


def test_docstrings_are_read_without_running_anything():
    text = (
        'raise SystemExit("imported")\n"""no docstring"""\nclass A:\n    """'
        + "First words of the class. " * 4
        + '"""\n    if True:\n        def f(self):\n            """'
        + "What the method inside does. " * 4
        + '"""\n    g = lambda: 0\n    def short(self):\n        """Returns it."""\n'
    )
    found = sources.docstrings_of(text, "site-packages/pkg/mod.py")
    assert found.split("\n\n")[::2] == ["pkg.mod.A", "pkg.mod.A.f"]
    assert "What the method inside does." in found and "Returns it" not in found
    assert sources.docstrings_of(
        '"""' + "A package says what it is for. " * 4 + '"""', "stdlib/json/__init__.py"
    ).startswith("json\n\nA package")
    assert sources.docstrings_of('"""x', "stdlib/a.py") is None
    assert sources.docstrings_of("x = 1", "stdlib/a.py") == ""


@pytest.fixture
def library(tmp_path, monkeypatch):
    files = {
        "std/a.py": "x = 1\n",
        "std/site-packages/old/b.py": "y = 2\n",
        "std/__pycache__/a.py": "",
        "std/LICENSE.txt": "",
        "std/_sysconfigdata_x.py": f"prefix = '{tmp_path}'",
        "std/config-3/c.py": "z = 3\n",
        "std/pydoc_data/topics.py": "topics = {'with': 'The with statement', 'for': 'The for statement'}\n",
        "site/pkg/d.py": '"""Half \\ud800 of a pair, ' + "long enough to be prose " * 4 + '"""',
        "site/pkg/NOTES.md": "# Notes",
        "site/pkg/tests/table.txt": "0.1 0.2",
        "site/__editable___k2jax_finder.py": f"MAPPING = '{tmp_path}'",
        "site/pkg-1.dist-info/METADATA": "Name: pkg\nVersion: 1\n\n# The long description\n",
        "site/pkg-1.dist-info/entry_points.txt": "[console_scripts]",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(
        sources.sysconfig,
        "get_paths",
        lambda: {
            "stdlib": str(tmp_path / "std"),
            "platlib": str(tmp_path / "site"),
            "purelib": str(tmp_path / "site"),
        },
    )


def test_the_libraries_files_are_named_below_their_library(library):
    documents = {c.source: sources.read(c) for c in sources.candidates("python:documents")}
    assert documents == {
        "site-packages/pkg-1.dist-info/METADATA": "# The long description\n",
        "site-packages/pkg/NOTES.md": "# Notes",
        "stdlib/pydoc_data/topics.py#for": "The for statement",
        "stdlib/pydoc_data/topics.py#with": "The with statement",
    }
    code = {c.source for c in sources.candidates("python:code")}
    docstrings = {c.source for c in sources.candidates("python:docstrings")}
    assert code | docstrings == {"stdlib/a.py", "stdlib/pydoc_data/topics.py", "site-packages/pkg/d.py"}
    assert not code & docstrings, "a file's docstrings are not trained on where its code is held out"


def test_half_a_surrogate_pair_is_no_text(library, tmp_path):
    candidate = sources.Candidate(
        "site-packages/pkg/d.py", str(tmp_path / "site/pkg/d.py"), sources.docstrings_of
    )
    assert sources.read(candidate) is None


def test_no_document_of_this_machine_is_named_by_its_path():
    for source in ("python:code", "python:docstrings", "python:documents"):
        names = [candidate.source for candidate in sources.candidates(source)]
        assert len(names) == len(set(names)) > 50 and names == sorted(names)
        assert all(name.startswith(("stdlib/", "site-packages/")) for name in names)


def test_text_files_are_named_below_the_patterns_folder(corpus):
    with open(os.fsencode(corpus) + b"/caf\xe9.md", "w") as file:
        file.write("A name that is no UTF-8.")
    assert [c.source for c in sources.candidates(f"text:{corpus}/*.md")] == ["caf\ufffd.md"]
    assert [c.source for c in sources.candidates(f"text:{corpus}/**/*.txt")] == sorted(TEXTS)
    assert [c.source for c in sources.candidates(f"text:{corpus}/b/1.txt")] == ["1.txt"]


def test_each_text_is_taken_once_and_what_is_left_out_is_counted(corpus):
    (corpus / "copy.txt").write_text(TEXTS["a/4.txt"], encoding="utf-8")
    (corpus / "latin.txt").write_bytes(b"caf\xe9")
    (corpus / "empty.txt").write_text("")
    seen, left_out, again, cut = set(), Counter(), Counter(), Counter()
    chosen = subset(f"text:{corpus}/**/*.txt", min_document_bytes=50, max_document_bytes=200)
    kept = list(sources.documents(chosen, seed=3, seen=seen, left_out=left_out))
    sizes = [len(text.encode()) for text in TEXTS.values()]
    too_long, too_short = sum(size > 200 for size in sizes), sum(size < 50 for size in sizes) + 1
    assert left_out == {"unreadable": 1, "too long": too_long, "too short": too_short, "duplicate": 1}
    assert len(kept) + sum(left_out.values()) == 23
    assert not list(sources.documents(chosen, seed=4, seen=seen, left_out=again))
    assert again["duplicate"] == len(kept) + 1
    few = list(sources.documents(subset(chosen.source, max_bytes=500), seed=3, seen=set(), left_out=cut))
    assert 0 < sum(document.num_bytes for document in few) <= 500 and cut["over max_bytes"] > 0
