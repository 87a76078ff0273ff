"""Documents are read as they are, without running anything, and are named without a path of this machine."""

from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="the extra `data`")

from k2jax.prepare.recipe import subset  # noqa: E402
from k2jax.prepare.sources import files, python_corpus, read  # noqa: E402
from k2jax.prepare.tally import Tally  # noqa: E402


def test_docstrings_are_read_without_running_anything():
    text = (
        'raise SystemExit("imported")\n"""no docstring"""\nclass A:\n    """'
        + "First words of the class. " * 4
        + '"""\n    if True:\n        def f(self):\n            """'
        + "What the method inside does. " * 4
        + '"""\n    g = lambda: 0\n    def short(self):\n        """Returns it."""\n'
    )
    found = python_corpus.docstrings_of(text, "site-packages/pkg/mod.py")
    assert found.split("\n\n")[::2] == ["pkg.mod.A", "pkg.mod.A.f"]
    assert "What the method inside does." in found and "Returns it" not in found
    assert python_corpus.docstrings_of(
        '"""' + "A package says what it is for. " * 4 + '"""', "stdlib/json/__init__.py"
    ).startswith("json\n\nA package")
    assert python_corpus.docstrings_of('"""x', "stdlib/a.py") is None
    assert python_corpus.docstrings_of("x = 1", "stdlib/a.py") == ""


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
        python_corpus.sysconfig,
        "get_paths",
        lambda: {
            "stdlib": str(tmp_path / "std"),
            "platlib": str(tmp_path / "site"),
            "purelib": str(tmp_path / "site"),
        },
    )


def texts(source):
    """{name: text} of a source."""
    found = python_corpus.candidates(source)
    return {one.name: python_corpus.text_of(source, one.name, Path(one.path).read_text()) for one in found}


def test_the_libraries_files_are_named_below_their_library(library):
    assert texts("python:documents") == {
        "site-packages/pkg-1.dist-info/METADATA": "# The long description\n",
        "site-packages/pkg/NOTES.md": "# Notes",
        "stdlib/pydoc_data/topics.py#for": "The for statement",
        "stdlib/pydoc_data/topics.py#with": "The with statement",
    }
    code, docstrings = texts("python:code").keys(), texts("python:docstrings").keys()
    assert code | docstrings == {"stdlib/a.py", "stdlib/pydoc_data/topics.py", "site-packages/pkg/d.py"}
    assert not code & docstrings, "a file's docstrings are not trained on where its code is held out"


def test_half_a_surrogate_pair_is_no_text(library, tmp_path):
    tally, file = Tally(), files.File("site-packages/pkg/d.py", str(tmp_path / "site/pkg/d.py"), 1)
    at = {"name": "docs", "tally": tally}
    assert list(read.documents(subset("python:docstrings"), [file], **at)) == []
    assert tally.bad == {"half a surrogate pair": 1}


def test_no_document_of_this_machine_is_named_by_its_path():
    for source in ("python:code", "python:docstrings", "python:documents"):
        names = [one.name for one in python_corpus.candidates(source)]
        assert len(names) == len(set(names)) > 50 and names == sorted(names)
        assert all(name.startswith(("stdlib/", "site-packages/")) for name in names)
