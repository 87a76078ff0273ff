"""The files of a source are those that it names, and one that was written again is noticed."""

import gzip
import http.server
import io
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("datatrove", reason="the extra `data`")

from dealt import deal  # noqa: E402
from test_token_sources import write_megatron  # noqa: E402

from k2jax.errors import ConfigError, UnreadableError  # noqa: E402
from k2jax.prepare import build, dealing, recipe  # noqa: E402
from k2jax.prepare.engine.engine import Engine  # noqa: E402
from k2jax.prepare.recipe import Task  # noqa: E402
from k2jax.prepare.sources import files  # noqa: E402
from k2jax.prepare.sources.files import File, iter_files, list_files, size_of  # noqa: E402
from k2jax.prepare.sources.listing import Listing  # noqa: E402
from k2jax.prepare.sources.read import documents  # noqa: E402
from k2jax.prepare.sources.records import arrow_records, parquet_records  # noqa: E402
from k2jax.prepare.sources.stored import version_of  # noqa: E402
from k2jax.prepare.tally import Tally  # noqa: E402
from k2jax.prepare.tokens.megatron import read_documents  # noqa: E402

THEN, LATER = 1_000_000_000, 1_500_000_000  # dates of files


def put(path: Path | str, text: str = "text") -> None:
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return
    with fsspec.open(path, "w") as file:
        file.write(text)


def names(source: str, **options: bool) -> list[str]:
    return [file.name for file in list_files(source, **options)]


@pytest.mark.parametrize("scheme", ["", "file://", "memory:/"])
@pytest.mark.parametrize(("folder", "other"), [("run[1]", "run1"), ("what?", "whatX"), ("all*", "all-of-it")])
def test_a_folder_whose_name_holds_a_wildcards_character_is_that_folder(tmp_path, scheme, folder, other):
    """Seen red with a pattern made of it."""
    root = f"{scheme}{tmp_path}"
    for name in (f"{folder}/a.txt", f"{folder}/b/c.txt", f"{folder}/.hidden/d.txt", f"{other}/e.txt"):
        put(tmp_path / name if scheme != "memory:/" else f"{root}/{name}")
    assert names(f"text:{root}/{folder}") == names(f"text:{root}/{folder}/") == ["a.txt", "b/c.txt"]


@contextmanager
def serving(get: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The address of a server that answers so."""
    quiet = {"log_message": lambda *_: None, "protocol_version": "HTTP/1.1", "do_GET": get, "do_HEAD": get}
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Handler", (http.server.BaseHTTPRequestHandler,), quiet)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def answer(handler: http.server.BaseHTTPRequestHandler, data: bytes, kind: str, *, length: bool = True) -> None:
    begin, is_part = 0, length and "Range" in handler.headers
    if is_part:
        begin, end = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
        whole, data = len(data), data[begin : end + 1]
    handler.send_response(206 if is_part else 200)
    handler.send_header("Content-Type", kind)
    if is_part:
        handler.send_header("Content-Range", f"bytes {begin}-{begin + len(data) - 1}/{whole}")
    if length:
        handler.send_header("Accept-Ranges", "bytes")
        handler.send_header("Content-Length", str(len(data)))
    else:
        handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(data if length else b"%x\r\n" % len(data) + data + b"\r\n0\r\n\r\n")


def table_of(rows: int, kind: str) -> bytes:
    table, out = pa.table({"text": [f"row {i}" for i in range(rows)]}), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, out)
    else:
        with pa.ipc.new_file(out, table.schema) as writer:
            writer.write_table(table)
    return out.getvalue()


@pytest.mark.parametrize(("kind", "read"), [("parquet", parquet_records), ("arrow", arrow_records)])
def test_a_file_whose_size_is_not_told_is_no_empty_one(tmp_path, kind, read):
    """A web server's folder tells no sizes, some servers none at all. Seen red with a size of 0 taken for it."""
    data = table_of(20, kind)

    def get(handler: http.server.BaseHTTPRequestHandler) -> None:
        if handler.path.endswith("/"):
            answer(handler, f'<a href="a.{kind}">a</a>'.encode(), "text/html")
        elif "*" in handler.path:
            handler.send_error(404)
        else:
            answer(handler, data, "application/octet-stream", length=handler.path.startswith("/told"))

    with serving(get) as at:
        [file] = list_files(f"{kind}:{at}/told/*.{kind}")
        assert (file.name, file.size, size_of(file)) == (f"a.{kind}", 0, len(data))
        assert [row["text"] for _, row in read(file, None, None)] == [f"row {i}" for i in range(20)]
        [file] = list_files(f"{kind}:{at}/untold/a.{kind}")
        with pytest.raises(UnreadableError, match=f"a.{kind} cannot be read .*Cannot seek"):
            list(read(file, None, None))
    put(tmp_path / f"empty.{kind}", "")
    [file] = list_files(f"{kind}:{tmp_path}")
    assert [bad.reason for _, bad in read(file, None, None)] == ["empty file"]
    (tmp_path / f"empty.{kind}").unlink()
    os.symlink("nowhere", tmp_path / f"empty.{kind}")
    [file] = list_files(f"{kind}:{tmp_path}")
    with pytest.raises(UnreadableError, match="No such file"):
        list(read(file._replace(size=0), None, None))


@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
def test_a_local_folder_is_the_same_by_any_of_its_names(tmp_path, scheme):
    """Seen red where file:// was as of another machine: links went without a word, and follow_links meant nothing."""
    put(tmp_path / "in/real.txt")
    put(tmp_path / "out.txt")
    os.symlink(tmp_path / "in/real.txt", tmp_path / "in/link.txt")
    source = f"text:{scheme}{tmp_path}/in"
    assert names(source, follow_links=False) == ["link.txt", "real.txt"]
    os.symlink(tmp_path / "out.txt", tmp_path / "in/to-out.txt")
    os.symlink(tmp_path / "nowhere", tmp_path / "in/to-nowhere.txt")
    assert names(source) == ["link.txt", "real.txt", "to-nowhere.txt", "to-out.txt"]
    assert list_files(source)[1].path == f"{tmp_path}/in/real.txt"
    found = documents(recipe.subset(source), list_files(source)[:1], name="a", tally=Tally())
    assert [one.text for one in found] == ["text"]
    with pytest.raises(ConfigError, match="2 files .to-nowhere.txt, to-out.txt. are each a link out of its folder"):
        list_files(source, follow_links=False)


def test_a_pattern_below_the_root_has_no_links_out_of_it(tmp_path):
    """Seen red with the working folder in its place."""
    first, _, rest = str(tmp_path).lstrip("/").partition("/")
    put(tmp_path / "a.txt")
    assert names(f"text:/[{first[0]}]{first[1:]}/{rest}/*.txt", follow_links=False) == [f"{first}/{rest}/a.txt"]


@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_folders_that_no_match_lies_in_are_not_looked_at(tmp_path, monkeypatch, scheme):
    """Below / are those that may not be read, and processes that come and go. Seen red where depth alone counted."""
    root, looked_at, listed = f"{scheme}{tmp_path}", [], files._listed
    for name in ("a1/x/1.txt", "a1/y/2.txt", "a1/x/deep/3.txt", "b1/x/4.txt"):
        put(f"{root}/{name}" if scheme else tmp_path / name)
    monkeypatch.setattr(files, "_listed", lambda fs, at, **local: looked_at.append(at) or listed(fs, at, **local))
    for pattern, expected, folders in (
        ("a*/x/*.txt", ["a1/x/1.txt"], ["", "/a1", "/a1/x"]),
        ("a*/**/*.txt", ["a1/x/1.txt", "a1/x/deep/3.txt", "a1/y/2.txt"], ["", "/a1", "/a1/x", "/a1/x/deep", "/a1/y"]),
        ("*.txt/../*", None, [""]),
    ):
        looked_at.clear()
        if expected:
            assert names(f"text:{root}/{pattern}") == expected
        else:
            with pytest.raises(ConfigError, match="no file matches"):
                names(f"text:{root}/{pattern}")
        assert sorted(looked_at) == [f"{tmp_path}{folder}" for folder in folders]


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("name", ["a::b.txt", "a#b&c%41.txt", "a?b.txt", "[a].txt"])
def test_a_local_file_may_have_any_name(tmp_path, scheme, name):
    """Seen red with a chain of fsspec's made of ::."""
    put(tmp_path / "x::y" / name)
    for source in (f"x::y/{name}", "x::y", "x::y/*.txt", "*::y/*.txt"):
        assert [file.path for file in list_files(f"text:{scheme}{tmp_path}/{source}")] == [f"{tmp_path}/x::y/{name}"]


# ---- written again ---------------------------------------------------------------------------------------------------


def dated(path: Path, date: int, text: str | None = None) -> None:
    if text is not None:
        path.write_text(text)
    os.utime(path, (date, date))


@pytest.mark.parametrize("source", ["", "/link.txt"])
def test_a_link_has_the_date_of_what_it_leads_to(tmp_path, source):
    """Seen red with the link's own."""
    target = tmp_path / "target.txt"
    dated(target, THEN, "old")
    put(tmp_path / "in/real.txt")
    os.symlink(target, tmp_path / "in/link.txt")
    before = list_files(f"text:{tmp_path}/in{source}")[0]
    dated(target, LATER, "new")
    assert (before.version, list_files(f"text:{tmp_path}/in{source}")[0].version) == (str(THEN), str(LATER))


def versions(source: str, **options: bool) -> str:
    return Listing(iter_files(source, **options), recipe.subset(source), seed=1, part_bytes=9).versions


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("which", ["", "/a.bin", "/*.bin"])
def test_megatrons_index_is_an_input(tmp_path, remote, which):
    """Seen red without it in the version. A missing one is an error where it is read."""
    folder = f"memory:/{tmp_path}" if remote else str(tmp_path)
    source = f"megatron:{folder}{which}"

    def write(*documents: list) -> None:
        write_megatron(tmp_path / "a", documents)
        if remote:
            for name in ("a.bin", "a.idx"):
                with fsspec.open(f"{folder}/{name}", "wb") as file:
                    file.write((tmp_path / name).read_bytes())

    write([[5, 6, 7]])
    dated(tmp_path / "a.bin", THEN)
    before, [file] = versions(source), list_files(source)
    write([[5, 6]], [[7]])
    dated(tmp_path / "a.bin", THEN)
    assert versions(source) != before and [len(ids) for ids in read_documents(list_files(source)[0])] == [2, 1]
    if not remote:
        now = versions(source)
        dated(tmp_path / "a.idx", LATER)
        assert versions(source) != now, "as many bytes, at another date"
        assert [len(ids) for ids in read_documents(file)] == [2, 1], "the index has no part in the date of the .bin"
    fsspec.filesystem("memory" if remote else "file").rm(f"{tmp_path}/a.idx")
    with pytest.raises(ConfigError, match="a.bin has no a.idx beside it"):
        next(read_documents(list_files(source)[0]))


def test_a_folders_listing_tells_of_the_index_without_another_request(tmp_path, monkeypatch):
    """A bucket's storage remembers the listing while its files are gone through."""
    for i in range(3):
        write_megatron(tmp_path / f"{i}", [[[5, 6, 7]]])
        for end in ("bin", "idx"):
            put(f"memory:/{tmp_path}/{i}.{end}")
    bucket, asked = fsspec.filesystem("memory"), []
    ls, info = type(bucket).ls, type(bucket).info

    def listed(self, path, **options):
        self.dircache[path] = found = ls(self, path, **options)
        return found

    def told(self, path, **options):
        if (found := [one for one in self.dircache.get(path.rpartition("/")[0], []) if one["name"] == path]):
            return found[0]
        asked.append(path)
        return info(self, path, **options)

    monkeypatch.setattr(type(bucket), "ls", listed)
    monkeypatch.setattr(type(bucket), "info", told)
    monkeypatch.setattr(type(bucket), "isdir", lambda self, path: path == str(tmp_path))
    monkeypatch.setattr(type(bucket), "isfile", lambda self, path: False)
    monkeypatch.setattr(type(bucket), "invalidate_cache", lambda self, path=None: self.dircache.pop(path))
    assert [len(file.version.split()) for file in list_files(f"megatron:memory:/{tmp_path}")] == [2, 2, 2]
    assert not asked and not bucket.dircache


WORDS = ["".join(random.Random(i).choices("abcdefghiklmnoprstu", k=5)) for i in range(200)]
ROWS = [json.dumps({"text": " ".join(random.Random(i).choices(WORDS, k=20))}) + "\n" for i in range(400)]


def jsonl(folder: Path, **options) -> recipe.ConfigDict:
    config = recipe.base()
    config.part_bytes = 1 << 14
    config.subsets.a = recipe.subset(f"jsonl:{folder}", **options)
    return config


@pytest.mark.parametrize("max_bytes", [0, 30_000])
def test_as_many_bytes_of_another_date_are_an_error_in_a_part_that_was_dealt_out(tmp_path, max_bytes):
    """Lines would be cut where others ended. Seen red without the date in the rows of the listing."""
    path = tmp_path / "in/a.jsonl"
    path.parent.mkdir()
    dated(path, THEN, "".join(ROWS))
    config = deal(jsonl(path.parent, tasks=2, max_bytes=max_bytes), tmp_path / "out")
    shares = [dealing.share(tmp_path / "out", Task("a", i, 2)).files for i in range(2)]
    dealt = [file for share in shares for file in share]
    assert len(dealt) > 1 and all(file.end and file.version == str(THEN) for file in dealt)
    chosen = config.subsets.a
    found = list(documents(chosen, dealt, name="a", tally=Tally()))
    assert found and (max_bytes or len(found) == 400)
    dated(path, LATER, "".join(ROWS[::-1]))
    for file in dealt:
        with pytest.raises(UnreadableError, match=r"written since it was listed, its date is off by \+500,000,000 s"):
            list(documents(chosen, [file], name="a", tally=Tally()))
    assert dealing.parts.measure(dealt[0], chosen, 1 << 14, 0, dealt[0].end) == [], "the task that reads it says so"


def test_dates_decide_nothing_of_what_is_dealt(tmp_path):
    """A listing on another machine may have others: names and sizes are what subsets are compared by."""
    path = tmp_path / "in/a.jsonl"
    path.parent.mkdir()
    dated(path, THEN, "".join(ROWS))
    before = dealing.listed(jsonl(path.parent))
    dated(path, LATER)
    after = dealing.listed(jsonl(path.parent))
    assert dealing.summary(before) == dealing.summary(after) and before["a"].versions != after["a"].versions


def test_a_source_that_was_copied_between_two_attempts_is_listed_anew_and_it_is_said(tmp_path, monkeypatch, capfd):
    """As many bytes, other dates: what was dealt out names the old ones."""
    path, out = tmp_path / "in/a.jsonl", tmp_path / "out"
    path.parent.mkdir()
    dated(path, THEN, "".join(ROWS))
    config = jsonl(path.parent, tasks=2)
    config.vocab_size, config.tokenizer_bytes, config.dedup.near = 330, 20_000, False
    config.lock()
    run = Engine.run

    def ends(self, stage):
        if stage.name == "clean":
            raise KeyboardInterrupt
        return run(self, stage)

    monkeypatch.setattr(Engine, "run", ends)
    with pytest.raises(KeyboardInterrupt):
        build.build(config, out, workers=1)
    assert (out / "stages/files/shares/a/00001.json").exists()
    monkeypatch.setattr(Engine, "run", run)
    dated(path, LATER)
    found, _ = build.build(config, out, workers=1)
    assert found["stores"]["a"]["documents"] == 400
    told = "".join(capfd.readouterr())
    assert "stage files: again for a (the dates of the files of a was" in told


def test_a_file_without_a_known_date_is_read(tmp_path):
    """Rows of an earlier version of the code have none. One of 1970 is a date."""
    dated(tmp_path / "a.jsonl", 0, "".join(ROWS))
    [file] = list_files(f"jsonl:{tmp_path}")
    assert file.version == "0" and version_of({"created": 5.0}) == "5"
    for known in (file, File(*file[:3])):
        found = documents(recipe.subset(f"jsonl:{tmp_path}"), [known], name="a", tally=Tally())
        assert len(list(found)) == 400


def test_a_linked_library_has_the_date_of_its_files(tmp_path, monkeypatch):
    """As uv can install it. Seen red with the link's own."""
    dated(tmp_path / "a.py", THEN, "x = 1\n")
    for name, target in (("b.py", "a.py"), ("c.py", "nowhere")):
        os.symlink(tmp_path / target, tmp_path / name)
    found = [files.python_corpus.Candidate(name, str(tmp_path / name)) for name in ("b.py", "c.py")]
    monkeypatch.setattr(files.python_corpus, "candidates", lambda source: found)
    linked, gone = list_files("python:code")
    assert (linked.size, linked.version) == (6, str(THEN)) and gone.version


# ---- whole, and training data alone ----------------------------------------------------------------------------------


def test_a_link_to_a_folder_is_refused_where_the_walk_would_go_into_it(tmp_path):
    """Seen red where it was passed over without a word."""
    for name in ("in/a.txt", "in/sub/b.txt", "far/c.txt"):
        put(tmp_path / name)
    root = tmp_path / "in"
    os.symlink(tmp_path / "far", root / ".hidden")
    assert names(f"text:{root}") == ["a.txt", "sub/b.txt"]
    os.symlink(tmp_path / "far", root / "far")
    os.symlink(root, root / "sub/back")
    for follow_links in (True, False):
        for pattern, linked in (("", "far is"), ("/*/*.txt", "far is"), ("/**/*.txt", "far is"), ("/*/**/*.txt", "2 ")):
            with pytest.raises(ConfigError, match=f"{linked}.* a link to a folder.* give its target as a source of"):
                names(f"text:{root}{pattern}", follow_links=follow_links)
    for pattern, found in (("*.txt", ["a.txt"]), ("*", ["a.txt"]), ("s*/*.txt", ["sub/b.txt"])):
        assert names(f"text:{root}/{pattern}") == found
    assert names(f"text:{root}/far") == ["c.txt"]


@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_a_missing_shard_is_an_error(tmp_path, scheme):
    """Seen red where three of four were read as if whole."""
    root = f"{scheme}{tmp_path}/in"

    def shards(name: str, numbers: range | list[int]) -> None:
        for i in numbers:
            path = name.format(i=i)
            put(f"{root}/{path}" if scheme else tmp_path / "in" / path)

    shards("one/train-{i:05}-of-00001.parquet", [0])
    shards("old/train-{i:05}-of-00012-{i:016x}.parquet", range(12))
    shards("from-one/part-{i:05}-of-00009.parquet", range(1, 10))
    shards("en/c4.{i:05}-of-00010.parquet", range(10))
    for i in range(20):  # dealt over folders
        shards(f"dealt/{i % 3}/x-{i:05}-of-00020.parquet", [0])
    assert len(names(f"parquet:{root}")) == len(names(f"parquet:{root}/**/*.parquet")) == 52
    shards("fr/c4.{i:05}-of-00010.parquet", [0, 1, 9])
    for pattern in ("", "/**", "/**/*.parquet", "/fr/*", "/*/c4.*"):
        lost = ", ".join(f"{'' if pattern == '/fr/*' else 'fr/'}c4.0000{i}-of-00010.parquet" for i in range(2, 7))
        with pytest.raises(ConfigError, match=rf"7 files of it missing.*: {lost}, \.\.\.: fetch"):
            names(f"parquet:{root}{pattern}")
    shards("from-one-too/part-{i:05}-of-00003.parquet", [1, 3])
    with pytest.raises(ConfigError, match="1 file of it missing.*: part-00002-of-00003.parquet: fetch"):
        names(f"parquet:{root}/from-one-too")
    for pattern in ("c4.0000[01]-of-*.parquet", "*[01]-of-0001*"):
        assert len(names(f"parquet:{root}/fr/{pattern}")) == 2


@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_an_arrow_folder_has_what_its_state_names(tmp_path, scheme):
    """Seen red where nobody read state.json."""
    at = f"{scheme}{tmp_path}" if scheme else tmp_path
    put(f"{at}/train/a.arrow" if scheme else at / "train/a.arrow")
    state = f"{at}/train/state.json" if scheme else at / "train/state.json"
    for told in ({"_data_files": [{"filename": "a.arrow"}]}, {"_data_files": None}, ["no such thing"]):
        put(state, json.dumps(told))
        assert names(f"arrow:{at}") == ["train/a.arrow"]
    put(state, json.dumps({"_data_files": [{"filename": "a.arrow"}, {"filename": "b.arrow"}]}))
    with pytest.raises(ConfigError, match="1 file of it missing.*: train/b.arrow: fetch"):
        names(f"arrow:{at}")
    assert names(f"arrow:{at}/train/a*") == ["a.arrow"]


def test_a_folder_of_several_splits_is_refused(tmp_path):
    """Seen red where its test split was training data."""
    for split in ("train", "test"):
        put(tmp_path / f"arrow/{split}/data-00000-of-00001.arrow")
        put(tmp_path / f"hub/data/{split}-00000-of-00001.parquet")
        put(tmp_path / f"two/{split}/{split}-00000-of-00001.jsonl.gz")
    put(tmp_path / "two/other/train-00000-of-00001.jsonl.gz")
    put(tmp_path / "arrow/dataset_dict.json", '{"splits": ["train"]}')
    assert len(names(f"arrow:{tmp_path}/arrow")) == 2
    put(tmp_path / "arrow/dataset_dict.json", '{"splits": ["test", "train"]}')
    for source, remedy, found in (
        ("arrow:{}/arrow", "arrow:{}/arrow/train", 1),
        ("arrow:{}/arrow", "arrow:{}/arrow/*/*.arrow", 2),
        ("parquet:{}/hub", "parquet:{}/hub/data/train-*.parquet", 1),
        ("parquet:{}/hub", "parquet:{}/hub/**/*.parquet", 2),
        ("jsonl:{}/two", "jsonl:{}/two/**/train-*.jsonl.gz", 2),
    ):
        with pytest.raises(ConfigError, match="it has the splits test, train: give the one to train on") as error:
            names(source.format(tmp_path))
        assert remedy.format(tmp_path) in str(error.value) and len(names(remedy.format(tmp_path))) == found


@pytest.mark.parametrize("kind", ["text", "jsonl"])
@pytest.mark.parametrize(("pack", "name"), [(gzip.compress, "a.jsonl.gz"), (bytes, "a.jsonl.gz"), (bytes, "a.jsonl")])
def test_an_archive_is_no_data(tmp_path, kind, pack, name):
    """Seen red: the first line was glued to the tar's header, the others read as if nothing were wrong."""
    line = b'{"text": "one"}\n'
    tar = b"a.jsonl".ljust(100, b"\0") + b"0000644\0".ljust(157, b"\0") + b"ustar\x0000"
    word = b'{"text": "'.ljust(257, b"x") + b'ustar"}\n'

    def read() -> list[str]:
        source = f"{kind}:{tmp_path}"
        return [one.text for one in documents(recipe.subset(source), list_files(source), name="a", tally=Tally())]

    for head, what in ((tar.ljust(512, b"\0"), "tar"), (b"PK\3\4".ljust(40, b"\0"), "zip")):
        (tmp_path / name).write_bytes(pack(head + line * 3))
        with pytest.raises(ConfigError, match=f"{name} is a {what} archive, whatever its name says: unpack it first"):
            read()
    (tmp_path / name).write_bytes(pack(word + line))
    assert "".join(read()).count("one") == 1 and "ustar" in read()[0], "nothing is lost by a look at the beginning"


def test_where_nothing_matches_the_place_that_was_searched_is_told(tmp_path, monkeypatch):
    """Seen red without it: from another working folder nobody saw why."""
    monkeypatch.chdir(tmp_path)
    for source in ("jsonl:mine/*.jsonl", "jsonl:file://mine/*.jsonl"):
        with pytest.raises(ConfigError, match=f"no file matches; .*; searched: {tmp_path}/mine/\\*.jsonl$"):
            names(source)
    with pytest.raises(ConfigError, match="no file matches; check the path and its wildcards$"):
        names("jsonl:memory://mine/*.jsonl")
