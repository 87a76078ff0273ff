"""Texts by nested keys and by templates of them, the same from JSON lines, Parquet and Arrow."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("datatrove", reason="the extra `data`")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from test_read import jsonl, read_all, texts  # noqa: E402

from k2jax.errors import ConfigError  # noqa: E402
from k2jax.prepare import clean, recipe  # noqa: E402
from k2jax.prepare.sources.fields import seen, text_by  # noqa: E402

KINDS = ("jsonl", "parquet", "arrow")
ROWS = [
    {"meta": {"title": "One", "year": 1871, "size": 0.5}, "parts": [{"text": "a"}, {"text": "b"}], "id": "1"},
    {"meta": {"title": None, "year": None, "size": 1.5}, "parts": [], "id": "2"},
    {"meta": None, "parts": [{"text": "c"}], "id": "3"},
    {"meta": {"title": "Four", "year": 4, "size": 1.5}, "parts": [{"text": None}, {"text": "d"}], "id": "4"},
    {"meta": {"title": "Five", "year": 5, "size": 2.5}, "parts": None, "id": "5"},
]


def source_of(kind: str, folder, rows: list[dict] = ROWS) -> str:
    path = folder / f"a.{kind}"
    if kind == "jsonl":
        path.write_bytes(jsonl(rows))
        return f"jsonl:{path}"
    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as out:
            out.write_table(table)
    return f"{kind}:{path}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_leads_to_a_text_and_through_the_elements_of_lists(tmp_path, kind):
    source = source_of(kind, tmp_path)
    found, tally = read_all(source, text_key="meta.title")
    assert [(one.text, one.metadata["source_id"]) for one in found] == [("One", "1"), ("Four", "4"), ("Five", "5")]
    assert tally.bad == {"text is no string": 1, "no text": 1}
    assert tally.problems[1] == f"a.{kind}:3: no text (key 'meta.title' is missing)"
    found, tally = read_all(source, text_key="parts.text")
    assert [one.text for one in found] == ["a\n\nb", "c"]  # that of an empty list is empty, and too short
    assert tally.bad == {"text is no string": 1, "no text": 1}
    assert tally.steps["read"]["removed"]["too short"]["documents"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_joins_fields_and_names_the_one_that_is_missing(tmp_path, kind):
    source = source_of(kind, tmp_path)
    found, tally = read_all(source, text="# {meta.title} ({{{meta.year}}})\n\n{parts.text}")
    assert [one.text for one in found] == ["# One ({1871})\n\na\n\nb"]
    assert tally.bad == {"no 'meta.title'": 2, "no 'parts.text'": 2}
    assert tally.problems[0] == f"a.{kind}:2: no 'meta.title' (null)"
    found, tally = read_all(source, text="Title: {meta.title?}\n\n{parts.text?}\nby {meta.year?}.")
    assert [one.text for one in found] == [
        "Title: One\n\na\n\nb\nby 1871.", "c", "Title: Four\n\nd\nby 4.", "Title: Five\nby 5.",
    ]  # fmt: skip
    assert not tally.bad and tally.steps["read"]["removed"]["too short"]["documents"] == 1
    assert read_all(source, text="{meta.size}")[1].bad == {"text is no string": 4, "no 'meta.size'": 1}


def test_names_with_dots_and_what_other_templates_would_read_otherwise(tmp_path):
    inner = {"b": "nested", "c.d": {"e": "deep"}}
    rows = [{"dc:title": "colon", "a.b": "dotted", "a": inner, "x!r": "x", "__class__": 1}]
    for kind in KINDS:
        source = source_of(kind, tmp_path, rows)
        assert texts(source, text_key="a.b") == ["dotted"]  # the longest name that is there
        assert texts(source, text="{a.c.d.e} {dc:title} {x!r} {__class__}") == ["deep colon x 1"]


@pytest.mark.parametrize("text", ["{", "}", "a {b", "{}", "{a..b}", "{?}", "{a.}", "no key", "{{a}}", "{a{b}}"])
def test_a_wrong_template_is_told_before_anything_is_read(tmp_path, text):
    config = recipe.base()
    config.subsets.web = recipe.subset(f"jsonl:{tmp_path}/none", text=text)
    with pytest.raises(ConfigError, match="1 problem.*subsets.web.text="):
        recipe.validate(config)


def test_a_template_stands_alone_and_is_of_rows(tmp_path):
    config = recipe.base()
    config.subsets.a = recipe.subset("jsonl:x", text="{a}", text_key="b")
    config.subsets.b = recipe.subset("text:x", text="{a}")
    config.subsets.c = recipe.subset("jsonl:x", text_key="")
    expected = "3 problem.*a.text_key='b': stands beside.*b.text='{a}': is.*c.text_key=''"
    with pytest.raises(ConfigError, match=expected):
        recipe.validate(config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [{"text_key": "meta.body"}, {"text": "{meta.titel}"}, {"text": "{meta.x?}{y?}"}])
def test_keys_that_no_row_of_the_first_file_has_end_it_with_those_that_are_there(tmp_path, kind, how):
    """Without the check each of a million rows is counted as bad, and the preparation ends hours later."""
    config = recipe.base()
    config.subsets.web = recipe.subset(source_of(kind, tmp_path, ROWS[:2]), **how)
    recipe.validate(config)
    with pytest.raises(ConfigError, match=r"(column|none has) 'meta.\w+', (it|they) ha.*meta.title, .*parts.text"):
        clean.check(config)
    config.subsets.web = recipe.subset(source_of(kind, tmp_path), text="{meta.title}{x?}")  # null in some, and optional
    clean.check(config)
    rows = [{"meta": None, "x": 1}, {"meta": {"body": "late"}, "x": 2}]
    config.subsets.web = recipe.subset(source_of(kind, tmp_path, rows), text_key="meta.body")  # null in the first
    clean.check(config)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_of_a_row_may_stand_elsewhere_and_a_block_list_needs_it(tmp_path, kind):
    """A list that finds no URL blocks nothing, and nobody is told."""
    rows = [{"text": f"text {i}", "meta": {"url": f"https://{host}.example/", "tags": ["MIT", "BSD"]}, "date": "2024"}
            for i, host in enumerate(("bad", "good"))]  # fmt: skip
    (tmp_path / "domains").write_text("bad.example")
    config, source = recipe.base(), source_of(kind, tmp_path, rows)
    moved = (("url", "meta.url"), ("license", "meta.tags"))
    found, _ = read_all(source, field_keys=moved)
    assert found[1].metadata == {
        "subset": "web", "source": f"a.{kind}:2", "url": "https://good.example/", "licence": "MIT, BSD", "date": "2024",
    }  # fmt: skip
    blocking = {"url_blocklist": str(tmp_path / "domains")}
    for keys, missing in (((), "url"), ((("url", "meta.link"),), "meta.link")):
        config.subsets.web = recipe.subset(source, field_keys=keys, **blocking)
        recipe.validate(config)
        with pytest.raises(ConfigError, match=f"none has .{missing}., .*meta.tags.* as field_keys"):
            clean.check(config)
    config.subsets.web = recipe.subset(source, field_keys=moved, **blocking)
    clean.check(config)
    config.subsets.web = recipe.subset(source, field_keys=(("link", "meta.url"), ("url",), ("url", "a..b")))
    config.subsets.trees = recipe.subset("text:x", field_keys=(("url", "meta.url"),), **blocking)
    with pytest.raises(ConfigError, match=r"5 problem.*\('link', 'meta.url'\) must be.*text: documents have no URL"):
        recipe.validate(config)


def test_the_first_rows_are_looked_at_however_bad_they_are(tmp_path):
    config = recipe.base()
    (tmp_path / "a.jsonl").write_bytes(b"{bad\n[]\n" * 50 + jsonl([{"x": 1}, {"text": None}]))
    config.subsets.web = recipe.subset(f"jsonl:{tmp_path}/a.jsonl")
    clean.check(config)
    (tmp_path / "a.jsonl").write_bytes(b"{bad\n" + jsonl([{"body": [{"p": "x"}], "\x1b[2J": 1}]))
    with pytest.raises(ConfigError, match=r"of the 1 rows that a.jsonl begins with none has 'text', they "
                       r"have body.p, \\x1b\[2J: name"):  # fmt: skip
        clean.check(config)
    (tmp_path / "a.jsonl").write_bytes(b"{bad\n")  # nothing to say it by
    clean.check(config)


def test_of_a_nested_column_only_what_the_path_leads_to_is_read(tmp_path):
    """What stands beside it is damaged, and nobody sees it."""
    rows = [{"meta": {"big": os.urandom(2000).hex(), "text": f"text {i}"}} for i in range(300)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", use_dictionary=False, compression="none")
    data = (tmp_path / "a.parquet").read_bytes()
    at = data.index(rows[0]["meta"]["big"].encode())
    (tmp_path / "a.parquet").write_bytes(data[: at - 8] + b"\xff" * 100 + data[at + 92 :])
    found, tally = read_all(f"parquet:{tmp_path}", text_key="meta.text")
    assert [one.text for one in found] == [f"text {i}" for i in range(300)] and not tally.bad
    assert read_all(f"parquet:{tmp_path}", text_key="meta.big")[1].bad


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_nested_strings_that_are_no_utf8_are_counted_alone(tmp_path, kind):
    raw = pa.array([b"one", b"\xff", b"three"])
    broken = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    days = pa.array([0, 22_269 * 365, 1], pa.int32()).cast(pa.date32())
    inner = pa.StructArray.from_arrays([broken, days], ["text", "day"])
    table = pa.table({"meta": pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), inner)})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as out:
            out.write_table(table)
    found, tally = read_all(f"{kind}:{path}", text_key="meta.text")
    assert [one.text for one in found] == ["one", "three"] and sum(tally.bad.values()) == 1


def test_rows_of_nested_columns_that_are_many_megabytes_are_not_all_in_memory(tmp_path):
    rows = [{"meta": None}] * 2 + [{"meta": {"parts": ["x" * (4 << 20)] * 4}}] * 24
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", compression="zstd")
    script = f"""
from k2jax.prepare.sources import read
from k2jax.prepare.sources.files import list_files
from k2jax.prepare.recipe import subset
from k2jax.prepare.tally import Tally
chosen = subset("parquet:{tmp_path}/a.parquet", text_key="meta.parts")
files = list_files(chosen.source)
assert sum(1 for one in read.documents(chosen, files, name="web", tally=Tally())) == 24
print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 850_000  # KiB, of which Python and Arrow are 150,000


def test_lists_in_lists_without_end_are_bad_input(tmp_path):
    deep = b'{"text": ' + b"[" * 990 + b'"x"' + b"]" * 990 + b"}\n"
    (tmp_path / "a.jsonl").write_bytes(deep + jsonl([{"text": [["a"], ["b"]]}]))
    found, tally = read_all(f"jsonl:{tmp_path}/a.jsonl")
    assert [one.text for one in found] == ["a\n\nb"] and tally.bad == {"text is no string": 1}


NAMES = st.text(alphabet="ab.", min_size=1, max_size=4).filter(lambda name: all(name.split(".")))
VALUES = st.recursive(
    st.text(alphabet="xyz\n", max_size=3) | st.none() | st.integers(0, 9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(NAMES, VALUES, max_size=3), NAMES)
def test_a_key_and_a_template_of_it_alone_agree(row, path):
    by_key, by_template = text_by(path, "").of(row, 1 << 20), text_by("text", f"{{{path}}}").of(row, 1 << 20)
    if isinstance(by_key, str):
        assert by_template == by_key
    there = seen(row, [path])
    assert there <= {path} and (not isinstance(by_key, str) or by_key == "" or there)
