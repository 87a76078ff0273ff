"""Every kind of source gives its documents; what gives none is counted with its file and line, and loses no other."""

import bz2
import errno
import gzip
import io
import itertools
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="the extra `data`")

import fsspec  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import zstandard  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from k2jax.errors import ConfigError, StorageError  # noqa: E402
from k2jax.prepare.recipe import subset  # noqa: E402
from k2jax.prepare.sources import files, read, stored  # noqa: E402
from k2jax.prepare.sources.files import File, bounded_lines, list_files  # noqa: E402
from k2jax.prepare.sources.listing import in_order  # noqa: E402
from k2jax.prepare.tally import Tally, shown_name  # noqa: E402

LINES = [{"text": f"Document {i}.", "id": f"d{i}"} for i in range(6)]


def jsonl(lines: list) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def read_all(source: str, *, shard=0, num_shards=1, seed=1, last_bytes=None, **options):
    tally = Tally()
    chosen = subset(source, **options)
    files = in_order(list_files(source), seed)[shard::num_shards]
    found = read.documents(chosen, files, name="web", tally=tally, last_bytes=last_bytes)
    return list(found), tally


def texts(source: str, **options) -> list[str]:
    return [one.text for one in read_all(source, **options)[0]]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_json_lines_plain_and_compressed_in_several_members(tmp_path, suffix):
    first, second = jsonl(LINES[:3]), jsonl(LINES[3:])
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(suffix.rpartition(".")[2], bytes)
    (tmp_path / f"a.{suffix}").write_bytes(pack(first) + pack(second))
    found, tally = read_all(f"jsonl:{tmp_path}/*.{suffix}")
    assert [one.text for one in found] == [line["text"] for line in LINES]
    assert found[4].metadata == {"subset": "web", "source": f"a.{suffix}:5", "source_id": "d4"}
    assert not tally.bad and tally.steps["read"]["documents"] == 6


def test_what_a_record_says_of_itself_is_kept_and_the_subset_fills_in(tmp_path):
    record = {"text": "x", "id": 7, "url": "https://a.org/\n", "license": ["MIT", "BSD"], "date": "2024", "more": "no"}
    (tmp_path / "a.jsonl").write_bytes(jsonl([record, {"text": "y", "dump": "CC-MAIN-2024-10"}]))
    one, two = read_all(f"jsonl:{tmp_path}/a.jsonl", licence="CC0", dump="CC-MAIN-2023-06")[0]
    assert one.metadata == {
        "subset": "web", "source": "a.jsonl:1", "url": "https://a.org/\\n", "source_id": "7",
        "licence": "MIT, BSD", "date": "2024", "dump": "CC-MAIN-2023-06",
    }  # fmt: skip
    assert two.metadata["licence"] == "CC0" and two.metadata["dump"] == "CC-MAIN-2024-10"


@pytest.mark.fault("S16")
def test_bad_lines_are_counted_by_file_and_line_and_lose_no_other(tmp_path):
    bad = [
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "half', "bad JSON"),
        (b"[" * 100_000, "bad JSON"),
        (b'["text"]', "JSON that is no object"),
        (b'{"id": "a"}', "no text"),
        (b'{"text": null}', "text is no string"),
        (b'{"text": "a\\u0000b"}', "NUL in the text"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b"\0" * 10, "bad JSON"),
    ]
    good = b'{"text": "good", "score": NaN}'
    lines = list(itertools.chain(*((line, good) for line, _ in bad)))
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\n" + b"\n".join(lines))
    found, tally = read_all(f"jsonl:{tmp_path}/a.jsonl")
    assert [one.text for one in found] == ["good"] * (len(bad) + 1)
    assert len(tally.problems) == len(bad) and sum(tally.bad.values()) == len(bad)
    for i, (_, reason) in enumerate(bad):
        assert tally.problems[i].startswith(f"a.jsonl:{3 + 2 * i}: {reason}")


@given(st.lists(st.binary(max_size=12), max_size=8), st.integers(1, 8))
def test_lines_are_bounded(lines, most):
    data = b"\n".join(line.replace(b"\n", b"") for line in lines)
    expected = data.split(b"\n")
    if not expected[-1]:
        expected.pop()
    found = list(bounded_lines(io.BufferedReader(io.BytesIO(data), 4), most))
    assert [number for number, _ in found] == list(range(1, len(expected) + 1))
    assert [line and line.removesuffix(b"\n") for _, line in found] == [
        line if len(line) <= most else None for line in expected
    ]


@pytest.mark.fault("S16")
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_line_far_longer_than_allowed_is_never_in_memory(tmp_path, suffix):
    """In a process of its own, whose peak of memory is measured."""
    opener = {"": open, ".gz": gzip.open, ".zst": zstandard.open}[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    with opener(path, "wb") as file:
        file.write(jsonl(LINES[:1]) + b'{"text": "')
        for _ in range(200):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + jsonl(LINES[1:2]))
    script = f"""
import resource
from k2jax.prepare.sources import read
from k2jax.prepare.sources.files import list_files
from k2jax.prepare.recipe import subset
from k2jax.prepare.tally import Tally
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tally = Tally()
chosen = subset("jsonl:{path}", max_line_bytes=1 << 20)
files = list_files(chosen.source)
found = list(read.documents(chosen, files, name="web", tally=tally))
assert [one.text for one in found] == ["Document 0.", "Document 1."], found
assert tally.bad == {{"longer than max_line_bytes": 1}} and "a.jsonl{suffix}:2:" in tally.problems[0], tally.problems
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 100_000  # KiB


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("cut", [-5, 0.5])
def test_what_stands_before_a_truncation_is_kept(tmp_path, suffix, cut):
    data = jsonl([{"text": os.urandom(500).hex()} for _ in range(200)])
    packed = (gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress)(data)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed[: cut if cut < 0 else int(cut * len(packed))])
    found, tally = read_all(f"jsonl:{tmp_path}/*")
    assert len(found) >= (120 if cut < 0 else 0)  # a block of zstd is 128 KiB
    assert tally.bad == {"truncated file": 1} and tally.problems[0].startswith(f"a.jsonl{suffix}:{len(found) + 1}: ")
    assert [json.loads(line)["text"] for line in data.splitlines()[: len(found)]] == [one.text for one in found]


def test_damaged_and_empty_files_are_counted_and_the_others_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "c.jsonl.gz").write_bytes(b"no gzip\0at all")
    (tmp_path / "d.jsonl.zst").write_bytes(b"no zstd\xff at all")
    (tmp_path / "e.jsonl").write_bytes(jsonl(LINES[:1]))
    assert len(read_all(f"jsonl:{tmp_path}/*")[0]) == 1
    assert read_all(f"jsonl:{tmp_path}/*")[1].bad == {"empty file": 2, "damaged file": 2}


def _stream(parameters, data: bytes) -> bytes:
    """As `zstd --long=31` makes it, whose window a decoder refuses unless it is told: Pushshift's files are such."""
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz", "a.jsonl.bz2"])
@pytest.mark.parametrize("how", ["none", "gzip", "zstd", "long zstd", "xz", "bzip2"])
def test_files_are_unpacked_by_what_they_hold_whatever_their_name(tmp_path, name, how):
    pack = {
        "none": bytes, "gzip": gzip.compress, "zstd": zstandard.compress, "xz": lzma.compress, "bzip2": bz2.compress,
        "long zstd": lambda data: _stream(zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True), data),
    }[how]  # fmt: skip
    data = pack(jsonl(LINES[:3])) + (pack(jsonl(LINES[3:])) if how != "long zstd" else b"")  # members, frames, streams
    (tmp_path / name).write_bytes(data)
    found, tally = read_all(f"jsonl:{tmp_path}/{name}")
    assert [one.text for one in found] == [f"Document {i}." for i in range(6 if how != "long zstd" else 3)]
    assert not tally.bad
    if how in ("xz", "bzip2"):
        (tmp_path / name).write_bytes(data[: len(data) - 20])
        found, tally = read_all(f"jsonl:{tmp_path}/{name}")
        assert len(found) >= 3 and tally.bad == {"truncated file": 1}
        (tmp_path / name).write_bytes(data[:30] + b"x" * 20 + data[50:])
        assert sum(read_all(f"jsonl:{tmp_path}/{name}")[1].bad.values()) == 1


def test_a_text_that_begins_like_bzip2_is_one(tmp_path):
    (tmp_path / "a.txt").write_text("BZh, they said.")
    assert texts(f"text:{tmp_path}/a.txt") == ["BZh, they said."]


def test_what_stands_beside_data_is_known_and_what_is_not_is_named(tmp_path):
    for name in ("a.jsonl", "b.jsonl.xz", "deep/c.NDJSON"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((lzma.compress if name.endswith("xz") else bytes)(jsonl(LINES[:1])))
    for name in ("README.md", "LICENSE", "_SUCCESS", "dataset_info.json", ".gitattributes"):
        (tmp_path / name).write_text("no data")
    assert [file.name for file in list_files(f"jsonl:{tmp_path}")] == ["a.jsonl", "b.jsonl.xz", "deep/c.NDJSON"]
    for name in ("a.jsonl.bak", "a.jsonl.sha256", "d.json", "e.csv"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ConfigError, match=f"{name} is by name no jsonl data: take that out, or give a pattern"):
            list_files(f"jsonl:{tmp_path}")
        (tmp_path / name).unlink()
    (tmp_path / "a.jsonl.bak").write_text("{}")
    with pytest.raises(ConfigError, match="a.jsonl.bak is by name no jsonl data"):
        list_files(f"jsonl:{tmp_path}/*.jsonl*")
    (tmp_path / "d.json").write_text("{}")  # what a pattern names is what was meant
    assert [file.name for file in list_files(f"jsonl:{tmp_path}/d.j*")] == ["d.json"]
    assert [file.name for file in list_files(f"jsonl:{tmp_path}/a.jsonl.bak")] == ["a.jsonl.bak"]


def test_a_link_out_of_the_folder_is_refused_by_name(tmp_path):
    (tmp_path / "secret.jsonl").write_bytes(jsonl(LINES[:1]))
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jsonl").write_bytes(jsonl(LINES[:1]))
    (source / "b.jsonl").symlink_to("a.jsonl")
    assert len(list_files(f"jsonl:{source}", follow_links=False)) == 2
    (source / "c.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(ConfigError, match="c.jsonl is a link out of its folder.*follow_links=True"):
        list_files(f"jsonl:{source}", follow_links=False)
    assert len(list_files(f"jsonl:{source}", follow_links=True)) == 3


def test_an_id_that_comes_twice_in_a_file_is_reported_and_both_documents_stay(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": "one", "id": "same"}, {"text": "two", "id": "same"}]))
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"text": "three", "id": "same"}]))
    found, tally = read_all(f"jsonl:{tmp_path}/*")
    assert len(found) == 3 and tally.bad == {"id seen before": 1} and tally.problems[0].startswith("a.jsonl:2: ")


def test_files_are_dealt_to_tasks_whole_and_in_an_order_of_the_seed(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    source = f"text:{tmp_path}/*.txt"
    alone = texts(source)
    assert sorted(alone) == sorted(f"text {i}" for i in range(20)) and alone != sorted(alone)
    parts = [texts(source, shard=shard, num_shards=3) for shard in range(3)]
    assert [part[:7] for part in (alone[0::3], alone[1::3], alone[2::3])] == parts
    assert texts(source, seed=2) != alone == texts(source)


def test_the_last_file_is_read_up_to_the_document_that_exceeds_its_bytes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": "12345"}] * 10))
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"text": "12345"}] * 10))
    found, tally = read_all(f"jsonl:{tmp_path}/*", last_bytes=21)
    assert len(found) == 10 + 4 and tally.bad == {"over max_bytes": 1}
    assert tally.steps["read"]["documents"] == 14
    assert len(read_all(f"jsonl:{tmp_path}/*", last_bytes=1)[0]) == 10


def test_what_is_left_out_anyway_is_no_text_that_a_limit_ends_before(tmp_path):
    """As measuring has it (dealing.py); seen red with the limit first, which ended at the second row."""
    sizes = [300, 5000, 400, 2, 250, 200, 300]
    lines = [*({"text": "x" * size} for size in sizes[:2]), {"no": "text"}, *({"text": "x" * n} for n in sizes[2:])]
    (tmp_path / "a.jsonl").write_bytes(jsonl(lines))
    limits = {"min_document_bytes": 3, "max_document_bytes": 1000}
    found, tally = read_all(f"jsonl:{tmp_path}/*", last_bytes=1200, **limits)
    assert [len(one.text) for one in found] == [300, 400, 250, 200] and tally.bad["over max_bytes"] == 1
    assert tally.steps["read"]["documents"] == 6, "the one that exceeds it was not read"
    found, tally = read_all(f"jsonl:{tmp_path}/*", last_bytes=1450, **limits)
    assert [len(one.text) for one in found] == [300, 400, 250, 200, 300] and "over max_bytes" not in tally.bad


def test_sizes_out_of_bounds_are_removed_with_their_reason(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": "x" * n} for n in (0, 3, 5, 9)]))
    removed = []
    tally = Tally()
    chosen = subset(f"jsonl:{tmp_path}/*", min_document_bytes=4, max_document_bytes=8)
    at = {"name": "web", "tally": tally}
    files = list_files(chosen.source)
    found = read.documents(chosen, files, **at, keep_removed=lambda *r: removed.append(r))
    assert [one.text for one in found] == ["xxxxx"]
    assert [reason for _, _, reason in removed] == ["too short", "too short", "too long"]
    assert tally.to_json()["steps"]["read"]["removed"]["too short"] == {"documents": 2, "bytes": 3}
    chosen = subset(f"jsonl:{tmp_path}/*", max_document_bytes=8, extract=True)  # a limit of texts, not of pages
    assert len(list(read.documents(chosen, files, **at))) == 3


def test_source_trees_are_read_whole_and_what_is_no_text_is_counted(tmp_path):
    tree = {"a/x.py": b"x = 1\n", "b/y.c": b"\xff\xfa", "b/z.bin": b"a\0b", "c.txt": b"", ".git/config": b"hidden"}
    for name, data in tree.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "link.py").symlink_to("a/x.py")
    (tmp_path / "loop").symlink_to(".")
    for source in (f"text:{tmp_path}", f"text:{tmp_path}/**"):
        found, tally = read_all(source)
        assert {one.metadata["source"] for one in found} == {"a/x.py", "link.py"}
        assert tally.bad == {"not UTF-8": 1, "NUL in the text": 1, "empty file": 1}
    assert texts(f"text:{tmp_path}/.git/*") == texts(f"text:{tmp_path}/.g*/*") == ["hidden"]
    (tmp_path / ".git" / ".more").write_text("more hidden")
    assert texts(f"text:{tmp_path}/.git") == ["hidden"] and texts(f"text:{tmp_path}/.git/.more") == ["more hidden"]
    assert read_all(f"text:{tmp_path}/a/*", max_line_bytes=5)[1].bad == {"longer than max_line_bytes": 1}


@pytest.mark.fault("S17")
def test_names_from_outside_stay_on_one_line_and_under_their_root(tmp_path):
    """Seen red without the escapes."""
    folder = os.fsencode(tmp_path)
    for name in (b"a\nb.txt", b"\xff.txt", b"\x1b[2J.txt", "\u202etxt.exe.txt".encode()):
        Path(os.fsdecode(os.path.join(folder, name))).write_bytes(b"text")
    Path(os.fsdecode(os.path.join(folder, b"bad\n.txt"))).write_bytes(b"\xff")
    found, tally = read_all(f"text:{tmp_path}/*.txt")
    assert sorted(one.metadata["source"] for one in found) == [
        "\\u202etxt.exe.txt", "\\udcff.txt", "\\x1b[2J.txt", "a\\nb.txt",
    ]  # fmt: skip
    assert tally.problems == ["bad\\n.txt: not UTF-8 (byte 0)"]


def test_long_names_keep_their_line_in_messages():
    long = files.place(File("x" * 500, "", 0), 7)
    assert long.endswith("xxx:7") and len(long) < 200
    assert len(shown_name("y" * 1000)) == 1000


def test_no_match_and_missing_packages_are_one_line(tmp_path, monkeypatch):
    for source in (f"jsonl:{tmp_path}/*.jsonl", f"jsonl:{tmp_path}/none/**/*.jsonl", "python:nothing"):
        with pytest.raises(ConfigError, match="source"):
            list_files(source)
    with pytest.raises(ConfigError, match="no such|Protocol not known"):
        list_files("jsonl:nowhere://a/*.jsonl")
    with pytest.raises(ConfigError, match="pip install k2jax-test-package"):
        fsspec.register_implementation("needs", "k2jax_test_package.FileSystem", clobber=True)
        monkeypatch.setitem(files.PACKAGES, "needs", "k2jax-test-package")
        list_files("jsonl:needs://bucket/*.jsonl")


def test_a_file_that_vanishes_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to("nowhere")
    with pytest.raises(StorageError, match=r"b\.txt cannot be read \(No such file"):
        read_all(f"text:{tmp_path}/*.txt")
    with pytest.raises(StorageError, match="cannot be read"):
        list(read.records("parquet:x", File("x", str(tmp_path / "gone.parquet"), 9), chosen=subset("parquet:x")))


class Failing(io.BytesIO):
    """A file of a remote storage whose connection breaks."""

    def read(self, size: int = -1) -> bytes:
        if self.tell() > 100_000:
            raise TimeoutError("connection lost")
        return super().read(min(size, 1 << 16) if size > 0 else size)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_storage_that_fails_while_reading_is_an_error_not_bad_input(tmp_path, monkeypatch, kind):
    lines = [{"text": os.urandom(100).hex()} for _ in range(2000)]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_bytes(jsonl(lines))
    else:
        pq.write_table(pa.Table.from_pylist(lines), path)
    data = path.read_bytes()
    monkeypatch.setattr(stored, "open", lambda *_, **__: Failing(data), raising=False)
    monkeypatch.setattr(stored, "WAITS", (0, 0))
    with pytest.raises(StorageError, match="connection lost"):
        read_all(f"{kind}:{path}")


def test_remote_files_are_named_below_the_pattern():
    fs = fsspec.filesystem("memory")
    for name, lines in (("crawl/2024/a.jsonl.gz", LINES[:2]), ("crawl/2023/b.jsonl.gz", LINES[2:])):
        fs.pipe(f"/bucket/{name}", gzip.compress(jsonl(lines)))
    found, _ = read_all("jsonl:memory://bucket/crawl/20*/*.jsonl.gz")
    assert {one.metadata["source"] for one in found} >= {"2023/b.jsonl.gz:4", "2024/a.jsonl.gz:1"} and len(found) == 6
    assert [file.name for file in list_files("jsonl:memory://bucket/crawl")] == ["2023/b.jsonl.gz", "2024/a.jsonl.gz"]
    with fs.open("/bucket/t.parquet", "wb") as file:
        pq.write_table(pa.table({"text": ["remote"]}), file)
    assert texts("parquet:memory://bucket/*.parquet") == ["remote"]
    with pytest.raises(ConfigError, match="no file matches"):
        list_files("jsonl:memory://bucket/none/*.jsonl")


@pytest.mark.parametrize("times", [2, 3])
def test_a_storage_that_fails_while_listing_is_asked_again(times, monkeypatch):
    """A folder without what a failure kept back would be a loss without a word."""
    fs, failures = fsspec.filesystem("memory"), []
    for name in ("a.jsonl", "deep/b.jsonl", "deep/c.jsonl"):
        fs.pipe(f"/listed/{name}", jsonl(LINES[:1]))
    really = type(fs).ls

    def ls(self, path, **options):
        if path.endswith("deep") and len(failures) < times:
            failures.append(path)
            raise ConnectionResetError(errno.ECONNRESET, "reset by peer")
        return really(self, path, **options)

    monkeypatch.setattr(type(fs), "ls", ls)
    monkeypatch.setattr(stored, "WAITS", (0, 0))
    if times > 2:
        with pytest.raises(StorageError, match="cannot be listed .*reset by peer"):
            list_files("jsonl:memory://listed")
        return
    assert [file.name for file in list_files("jsonl:memory://listed")] == ["a.jsonl", "deep/b.jsonl", "deep/c.jsonl"]


def test_the_dump_is_the_records_or_the_recipes_or_read_off_the_path(tmp_path):
    path = tmp_path / "crawl/CC-MAIN-2023-14/a.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(jsonl([{"text": "x", "dump": "CC-MAIN-2013-20"}, {"text": "y"}]))
    for options, expected in (({}, "CC-MAIN-2023-14"), ({"dump": "mine"}, "mine")):
        found, _ = read_all(f"jsonl:{tmp_path}/crawl/**/*.jsonl", **options)
        assert [one.metadata["dump"] for one in found] == ["CC-MAIN-2013-20", expected]
