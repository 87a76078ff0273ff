"""Parquet, Arrow and web archives, whole and damaged; the Python installation as a source."""

import gzip
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="the extra `data`")
pytest.importorskip("warcio", reason="the extra `data`")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from test_read import read_all, texts  # noqa: E402
from warcio.statusandheaders import StatusAndHeaders  # noqa: E402
from warcio.warcwriter import WARCWriter  # noqa: E402

from k2jax.errors import ConfigError  # noqa: E402
from k2jax.prepare.sources import python_corpus  # noqa: E402
from k2jax.prepare.sources.files import list_files  # noqa: E402


def test_parquet_is_read_in_batches_with_what_it_says_of_a_row(tmp_path):
    table = pa.table(
        {"content": [f"text {i}" for i in range(600)] + [None], "id": range(601), "big": ["x" * 100] * 601}
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    found, tally = read_all(f"parquet:{tmp_path}", text_key="content")
    assert [one.text for one in found] == [f"text {i}" for i in range(600)]
    assert found[-1].metadata == {"subset": "web", "source": "a.parquet:600", "source_id": "599"}
    assert tally.problems == ["a.parquet:601: text is no string (NoneType)"]
    with pytest.raises(ConfigError, match="a.parquet has no column 'text', it has content, id, big: name the"):
        read_all(f"parquet:{tmp_path}")


def test_a_date_behind_all_calendars_costs_a_field_and_no_document(tmp_path):
    """Year 22269, as a crawl has it: Python has no such date, and the preparation ended with its traceback."""
    days = pa.array([0, 22_269 * 365, 19_000], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"text": ["one", "two", "three"], "date": days}), tmp_path / "a.parquet")
    found, tally = read_all(f"parquet:{tmp_path}")
    assert [one.metadata.get("date") for one in found] == ["1970-01-01", None, "2022-01-08"]
    assert tally.bad == {"field out of range": 1} and tally.problems[0].startswith("a.parquet:2: field out of range (")


@pytest.mark.parametrize("dictionary", [True, False])
def test_rows_of_many_megabytes_are_not_all_in_memory(tmp_path, dictionary):
    """24 rows of 16 MB in a file of some kB: 0.4 GB at once was some GB with what is made of it."""
    table = pa.table({"text": ["x" * (16 << 20)] * 24})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=dictionary, compression="zstd")
    script = f"""
import resource
from k2jax.prepare.sources import read
from k2jax.prepare.sources.files import list_files
from k2jax.prepare.recipe import subset
from k2jax.prepare.tally import Tally
chosen = subset("parquet:{tmp_path}/a.parquet")
files = list_files(chosen.source)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert sum(1 for one in read.documents(chosen, files, name="web", tally=Tally())) == 24
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < (400_000 if dictionary else 1_200_000)  # KiB; a page that is 0.4 GB is read as it is


def test_rows_of_parquet_that_are_no_utf8_are_counted_alone(tmp_path):
    raw = pa.array([b"one", b"\xff", b"three"])
    for kind in (pa.string(), pa.large_string()):
        binary = raw.cast(pa.binary() if kind == pa.string() else pa.large_binary())
        broken = pa.Array.from_buffers(kind, 3, binary.buffers())
        pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
        found, tally = read_all(f"parquet:{tmp_path}")
        assert [one.text for one in found] == ["one", "three"] and tally.problems == ["a.parquet:2: not UTF-8 (byte 0)"]
    pq.write_table(pa.table({"text": raw}), tmp_path / "a.parquet")  # bytes for strings, as some tools write
    assert texts(f"parquet:{tmp_path}") == ["one", "three"]


def test_damaged_tables_are_counted(tmp_path):
    table = pa.table({"text": [os.urandom(50).hex() for _ in range(2000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    (tmp_path / "b.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / "c.parquet").write_bytes(b"")
    data[len(data) * 5 // 8 : len(data) * 6 // 8] = bytes(len(data) * 6 // 8 - len(data) * 5 // 8)
    (tmp_path / "d.parquet").write_bytes(data)
    found, tally = read_all(f"parquet:{tmp_path}")
    assert tally.bad["empty file"] == 1 and tally.bad["damaged file"] == 2
    names = [one.metadata["source"].partition(":")[0] for one in found]
    assert names.count("a.parquet") == 2000 and 500 <= names.count("d.parquet") < 2000


def test_a_dataset_that_hugging_face_saved_is_read_without_its_caches(tmp_path):
    schema = pa.schema({"text": pa.string(), "url": pa.string()})
    for name, first in (("train/data-00000-of-00001.arrow", 0), ("train/cache-1f.arrow", 0), ("file.arrow", 5)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make = pa.ipc.new_file if name == "file.arrow" else pa.ipc.new_stream
        with make(str(tmp_path / name), schema) as out:
            for i in range(first, first + 5):
                out.write_batch(pa.record_batch([[f"text {i}"], [f"https://a.org/{i}"]], schema))
    found, _ = read_all(f"arrow:{tmp_path}")
    assert sorted(one.text for one in found) == [f"text {i}" for i in range(10)]
    assert found[0].metadata["url"].startswith("https://a.org/")
    data = (tmp_path / "train/data-00000-of-00001.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(data[: len(data) // 2 + 30])
    found, tally = read_all(f"arrow:{tmp_path}/cut.arrow")
    assert 0 < len(found) < 5 and tally.bad == {"damaged file": 1}
    with pytest.raises(ConfigError, match="no column 'body'"):
        read_all(f"arrow:{tmp_path}", text_key="body")


def test_offsets_of_a_damaged_arrow_file_are_not_followed(tmp_path):
    """Arrow trusts them: the process would die of a read outside its memory."""
    table = pa.table({"text": [f"text {i:04}" for i in range(50)]})
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as out:
        out.write_table(table)
    data = (tmp_path / "a.arrow").read_bytes()
    offset = (9 * 25).to_bytes(4, "little") + (9 * 26).to_bytes(4, "little")
    assert data.count(offset) == 1
    (tmp_path / "a.arrow").write_bytes(data.replace(offset, (1 << 30).to_bytes(4, "little") * 2))
    found, tally = read_all(f"arrow:{tmp_path}")
    assert found == [] and tally.bad == {"damaged file": 1}


PAGES = [  # status, type, body, what becomes of it: a text, or the reason it gives none
    ("200 OK", "text/html; charset=utf-8", "<p>caf\u00e9</p>".encode(), None),
    ("200 OK", "text/html; charset=ISO-8859-1", "<p>caf\u00e9</p>".encode("latin-1"), None),
    ("200 OK", "text/html", b'<meta charset="windows-1252"><p>caf\xe9 \x93</p>', None),
    ("200 OK", "text/plain", b"plain text", None),
    ("404 Not Found", "text/html", b"<p>gone</p>", "not status 200"),
    ("200 OK", "image/png", b"\x89PNG", "no page"),
    ("200 OK", "text/html", b"<p>\xff\xfe</p>", "not in its encoding"),
    ("200 OK", "text/html; charset=unicode_escape", b"<p>\xff\xfe</p>", "not in its encoding"),
    ("200 OK", "text/html", b"<p>" + b"x" * 5000, "longer than max_line_bytes"),
    ("200 OK", "text/html", b"<p>a\0b", "NUL in the text"),
]


def archive(pages=PAGES, *, packed: bool = True, extra: tuple = ()) -> tuple[bytes, list[int]]:
    """A web archive, and where each record ends."""
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=packed)
    ends = []
    for i, (status, kind, body, _) in enumerate(pages):
        headers = StatusAndHeaders(status, [("Content-Type", kind), *extra], protocol="HTTP/1.1")
        for record_type in ("request", "response"):
            response = record_type == "response"
            record = writer.create_warc_record(
                f"https://example.org/{i}", record_type, io.BytesIO(body if response else b""),
                http_headers=headers if response else StatusAndHeaders("GET / HTTP/1.1", [], is_http_request=True),
                warc_headers_dict={"WARC-Date": "2024-07-01T00:00:00Z"},
            )  # fmt: skip
            writer.write_record(record)
            ends.append(out.tell())
    return out.getvalue(), ends


@pytest.mark.parametrize("packed", [True, False])
def test_pages_of_a_web_archive(tmp_path, packed):
    name = "a.warc.gz" if packed else "a.warc"
    (tmp_path / name).write_bytes(archive(packed=packed)[0])
    found, tally = read_all(f"warc:{tmp_path}", max_line_bytes=4000, dump="CC-MAIN-2024-30")
    assert len(found) == 4 and all("caf\u00e9" in one.text for one in found[:3])
    assert found[1].metadata["url"] == "https://example.org/1" and found[1].metadata["source"] == f"{name}:4"
    assert found[1].metadata["date"] == "2024-07-01T00:00:00Z" and found[1].metadata["dump"] == "CC-MAIN-2024-30"
    assert found[1].metadata["source_id"].startswith("<urn:uuid:")
    reasons = [reason for *_, reason in PAGES if reason]
    assert tally.bad == {reason: reasons.count(reason) for reason in reasons}
    assert not any("not status 200" in line for line in tally.problems) and len(tally.problems) == 4
    assert len(read_all(f"warc:{tmp_path}", extract=True, max_line_bytes=4000)[0]) == 3  # pages alone


@pytest.mark.parametrize("packed", [True, False])
def test_a_truncated_web_archive_keeps_whole_pages_and_is_counted(tmp_path, packed):
    pages = [("200 OK", "text/html", b"<p>" + os.urandom(40).hex().encode(), None) for _ in range(2)]
    data, ends = archive(pages, packed=packed)
    path = tmp_path / ("a.warc.gz" if packed else "a.warc")
    for cut in range(0 if packed else ends[1] + 1, ends[3], 7 if packed else 1):
        path.write_bytes(data[:cut])
        found, tally = read_all(f"warc:{tmp_path}")
        whole = [end for end in ends[1::2] if end <= cut]
        assert len(whole) <= len(found) <= len(whole) + 1, cut  # one may lack but the empty lines behind it
        assert [one.text.encode() for one in found] == [page[2] for page in pages[: len(found)]]
        if cut and not any(end - 4 <= cut <= end for end in ends):
            assert tally.bad["truncated file"] + tally.bad["damaged record"] == 1, cut


def test_a_record_whose_digest_is_wrong_is_bad_alone(tmp_path):
    pages = [("200 OK", "text/html", b"<p>page %d</p>" % i, None) for i in range(3)]
    data, _ = archive(pages, packed=False)
    (tmp_path / "a.warc").write_bytes(data.replace(b"page 1", b"page 7"))
    found, tally = read_all(f"warc:{tmp_path}")
    assert [one.text for one in found] == ["<p>page 0</p>", "<p>page 2</p>"]
    assert tally.problems == ["a.warc:4: damaged record (its digest is another)"]


def test_a_record_without_a_length_does_not_swallow_those_behind_it_in_silence(tmp_path):
    pages = [("200 OK", "text/html", b"<p>page %d</p>" % i, None) for i in range(3)]
    data, ends = archive(pages, packed=False)
    request = data[ends[1] : ends[2]]
    (tmp_path / "a.warc").write_bytes(data.replace(request, request.replace(b"Content-Length", b"Content-Lenght")))
    found, tally = read_all(f"warc:{tmp_path}")
    assert [one.text for one in found] == ["<p>page 0</p>"]
    assert tally.problems == ["a.warc:3: damaged record (Content-Length: none; what follows is lost)"]


@pytest.mark.parametrize("packed", [True, False])
def test_a_record_that_is_longer_than_it_says_is_no_page(tmp_path, packed):
    """It would lose its end, of which warcio tells the terminal alone."""
    pages = [("200 OK", "text/html", b"<p>page %d</p>" % i, None) for i in range(2)]
    whole, _ = archive(pages, packed=False)
    data = re.sub(rb"WARC-(Payload|Block)-Digest: [^\r]+\r\n", b"", whole)
    [length] = {int(one) for one in re.findall(rb"Content-Length: (\d+)\r\n", data) if int(one) > 40}
    data = data.replace(b"Content-Length: %d" % length, b"Content-Length: %d" % (length - 4), 1)
    (tmp_path / "a.warc").write_bytes(gzip.compress(data) if packed else data)
    found, tally = read_all(f"warc:{tmp_path}")
    assert [one.text for one in found] == ["<p>page 1</p>"]
    assert tally.problems == ["a.warc:2: damaged record (it is longer than its Content-Length)"]


def test_packed_content_is_unpacked_within_bounds_and_cut_content_is_bad(tmp_path):
    body = gzip.compress(b"<p>" + b"x" * 3000)
    pages = [
        ("200 OK", "text/html", body, None),
        ("200 OK", "text/html", body[:-9], None),
        ("200 OK", "text/html", gzip.compress(b"x" * 10_000_000), None),
    ]
    (tmp_path / "a.warc.gz").write_bytes(archive(pages, extra=(("Content-Encoding", "gzip"),))[0])
    found, tally = read_all(f"warc:{tmp_path}", max_line_bytes=20_000)
    assert [len(one.text) for one in found] == [3003]
    assert tally.bad == {"damaged gzip body": 1, "longer than max_line_bytes": 1}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=6), st.booleans())
def test_no_damage_to_a_web_archive_is_more_than_bad_input(tmp_path, at, damage, packed):
    data = bytearray(archive(packed=packed)[0])
    at %= len(data)
    data[at : at + len(damage)] = damage
    path = tmp_path / ("a.warc.gz" if packed else "a.warc")
    path.write_bytes(data)
    read_all(f"warc:{path}")


def test_the_python_installation_gives_its_documents():
    for source in ("python:documents", "python:docstrings", "python:code"):
        listed = {file.name: file for file in list_files(source)}
        for shard in (0, 7):
            found, tally = read_all(source, shard=shard, num_shards=len(listed) // 12)
            assert len(found) >= 3
            for one in found:
                name = one.metadata["source"]
                text = Path(listed[name].path).read_bytes().decode()
                assert one.text == python_corpus.text_of(source, name, text)
            assert sum(tally.bad.values()) <= 3
    assert sum("topics.py#" in file.name for file in list_files("python:documents")) > 50
