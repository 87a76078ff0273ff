"""What tasks read: all of the sources, listed once, whatever the number of tasks, and large files in parts."""

import gzip
import json
import random
import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dealt import deal
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("datatrove", reason="the extra `data`")

from k2jax.errors import ConfigError, StorageError
from k2jax.prepare import build, dealing, recipe
from k2jax.prepare.recipe import Task
from k2jax.prepare.sources import parts, read
from k2jax.prepare.sources.files import File, list_files
from k2jax.prepare.sources.listing import OPENING, Listing, in_order
from k2jax.prepare.tally import Tally

PART = 1 << 13  # bytes


def rows_of(draw: random.Random, number: int) -> list[dict]:
    """Some the same, some nearly; sizes differ."""
    words = [f"w{i}" for i in range(90)]
    texts = [" ".join(draw.choices(words, k=draw.randint(20, 60))) for _ in range(number)]
    texts += [f"{text} again" for text in draw.sample(texts, number // 4)] + draw.sample(texts, number // 4)
    draw.shuffle(texts)
    return [{"text": text, "id": f"{i}"} for i, text in enumerate(texts)]


def write_sources(folder: Path) -> None:
    """Of each kind that is cut, a file of many parts and small ones; a packed one that is named as if it were none."""
    draw = random.Random(5)
    for name in ("lines", "tables"):
        (folder / name).mkdir(parents=True)
    for i, number in enumerate((90, 3, 40)):
        lines = [json.dumps(row) for row in rows_of(draw, number)]
        lines[1] = "{bad"
        lines.insert(2, json.dumps({"text": "long " * PART}))  # longer than a part
        (folder / "lines" / f"{i}.jsonl").write_text("\n".join(lines) + "\n" * (i != 2), encoding="utf-8")
        table = pa.Table.from_pylist(rows_of(draw, number))
        pq.write_table(table, folder / "tables" / f"{i}.parquet", row_group_size=7)
    packed = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows_of(draw, 200)))
    (folder / "lines" / "packed.jsonl").write_bytes(packed)


def config_of(folder: Path, tokenizer: Path, tasks: int, part_bytes: int = PART, **options):
    c = recipe.base()
    c.tokenizer, c.part_bytes, c.bucket_bytes, c.validation_fraction = str(tokenizer), part_bytes, 1 << 15, 0.1
    c.subsets.lines = recipe.subset(f"jsonl:{folder}/lines", tasks=tasks, **options)
    c.subsets.tables = recipe.subset(f"parquet:{folder}/tables", tasks=tasks, **options)
    recipe.validate(c)
    return c.lock()


@pytest.fixture(scope="module")
def sources(made_once):
    return made_once("dealing-sources", write_sources)


# ---- the same stores for any number of tasks -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(sources, tiny_data, tmp_path_factory):
    """`reference(max_bytes)`: the stores' digests with one task a subset, no file cut."""
    made = {}

    def digests(**options):
        key = json.dumps(options)
        if key not in made:
            out = tmp_path_factory.mktemp("whole")
            config = config_of(sources, tiny_data / "tokenizer.json", 1, 1 << 30, **options)
            made[key] = digests_of(build.build(config, out, workers=1)[0])
        return made[key]

    return digests


def digests_of(data: dict) -> dict:
    return {name: (row["root_digest"], row["documents"]) for name, row in data["stores"].items()}


@pytest.mark.parametrize(
    ("tasks", "options"),
    [
        (0, {}),
        (7, {"max_bytes": 9000}),
        pytest.param(7, {}, marks=pytest.mark.processes),
        pytest.param(0, {"max_bytes": 9000}, marks=pytest.mark.processes),
    ],
)
def test_stores_do_not_depend_on_the_number_of_tasks_nor_on_parts(
    sources, tiny_data, tmp_path, reference, tasks, options
):
    """Names, duplicates that stay, and bytes. Seen red with files dealt in turns, and with lines counted by part."""
    data, _ = build.build(config_of(sources, tiny_data / "tokenizer.json", tasks, **options), tmp_path, workers=1)
    assert digests_of(data) == reference(**options)
    found = data["config"]["subsets"]["lines"]["tasks"]
    assert found == tasks or (tasks == 0 and (found > 3 or options))
    again, was_there = build.build(config_of(sources, tiny_data / "tokenizer.json", 0, **options), tmp_path, workers=1)
    assert was_there and again == data, "a number that was left open is what it was settled to"
    rows = pq.read_table(tmp_path / "tables" / "documents.parquet").column("source").to_pylist()
    assert rows and all(re.fullmatch(r"\d\.parquet:\d+", source) for source in rows)


# ---- parts -----------------------------------------------------------------------------------------------------------


def read_parts(files: list[File], chosen) -> list[tuple]:
    """Documents and what was wrong, with their places."""
    tally = Tally()
    found = [(one.text, one.metadata["source"]) for one in read.documents(chosen, files, name="x", tally=tally)]
    return [*found, *sorted(map(str, tally.to_json()["problems"]))]


def parts_of(file: File, chosen, part_bytes: int) -> list[File]:
    pieces = parts.pieces(file, chosen, part_bytes)
    return parts.of_pieces(file, [parts.measure(file, chosen, part_bytes, *piece) for piece in pieces])


@given(st.lists(st.sampled_from([b"", b"{}", b'{"text": "a"}', b'{"text": "' + b"b" * 40 + b'"}', b"x" * 90])),
       st.booleans(), st.integers(1, 60))  # fmt: skip
def test_parts_of_json_lines_are_the_file(tmp_path_factory, lines, ends, part_bytes):
    """Wherever the borders fall: within a line, at its end, in lines longer than a part, in empty ones."""
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * ends)
    chosen = recipe.subset(f"jsonl:{path}", max_line_bytes=80)
    [file] = list_files(chosen.source)
    found = parts_of(file, chosen, part_bytes)
    assert read_parts(found, chosen) == read_parts([file], chosen)
    assert sum(one.size for one in found) == file.size
    if file.size > 400 and part_bytes < 60 and b"x" * 90 not in lines:
        assert len(found) > 1


def test_what_is_packed_or_in_another_encoding_or_cannot_be_read_stays_whole(sources, tmp_path):
    chosen = recipe.subset("jsonl:x")
    found = {file.name: file for file in list_files(f"jsonl:{sources}/lines")}
    assert len(parts_of(found["0.jsonl"], chosen, PART)) > 3
    assert parts_of(found["packed.jsonl"], chosen, 64) == [found["packed.jsonl"]]
    (tmp_path / "wide.jsonl").write_bytes(("\n".join(['{"text": "a"}'] * 99)).encode("utf-16"))
    [wide] = list_files(f"jsonl:{tmp_path}")
    assert parts_of(wide, chosen, 64) == [wide]
    gone = File("gone.jsonl", str(tmp_path / "gone.jsonl"), 1 << 20)
    assert parts_of(gone, chosen, 1 << 10) == [gone]
    (tmp_path / "cut.parquet").write_bytes((sources / "tables" / "0.parquet").read_bytes()[:-9])
    [cut] = list_files(f"parquet:{tmp_path}/cut.parquet")
    assert parts_of(cut, recipe.subset("parquet:x"), 64) == [cut]


# ---- who reads what --------------------------------------------------------------------------------------------------


def shares(config, out: Path, name: str) -> list[list[File]]:
    config = deal(config, out)
    return [dealing.share(out, Task(name, i, 0)).files for i in range(config.subsets[name].tasks)]


@pytest.mark.parametrize("tasks", [1, 2, 5, 40])
def test_each_file_is_read_once_and_tasks_have_neighbours_of_one_order(tmp_path, tasks):
    (tmp_path / "in").mkdir()
    for i in range(12):
        (tmp_path / "in" / f"{i}.txt").write_bytes(b"a" * 1000 * (1 + i % 3))
    config = recipe.base()
    config.subsets.a = recipe.subset(f"text:{tmp_path}/in", tasks=tasks)
    found = shares(config, tmp_path / "out", "a")
    assert len(found) == tasks
    expected = in_order(list_files(f"text:{tmp_path}/in"), config.seed)
    assert [file[:3] for one in found for file in one] == [file[:3] for file in expected]
    assert tasks > 12 or max(map(len, found)) - min(map(len, found)) <= 1


def test_tasks_are_as_many_as_the_sizes_want(sources, tiny_data):
    def number(part_bytes, **options):
        c = config_of(sources, tiny_data / "tokenizer.json", 0, part_bytes, **options)
        settled = dealing.settled(c, dealing.listed(c))
        return settled.subsets.lines.tasks, settled.subsets.tables.tasks

    size = sum(file.size + OPENING for file in list_files(f"jsonl:{sources}/lines"))
    assert number(1 << 30) == (1, 1)
    assert number(size // 3 + 1)[0] == 3
    assert number(1 << 12, max_bytes=1 << 13) == (2, 2)
    c = recipe.base()
    c.part_bytes = 1000
    c.subsets.a = recipe.subset(f"text:{sources}/lines/*.jsonl")
    assert dealing.settled(c, dealing.listed(c)).subsets.a.tasks == 4, "no more than files that stay whole"
    with pytest.raises(AssertionError, match="settled"):
        recipe.tasks(c)


def test_changed_files_are_noticed_and_nothing_is_listed_anew_that_has_not(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    config = recipe.base()
    config.subsets.a = recipe.subset(f"text:{tmp_path}/in")
    config = dealing.settled(config, dealing.listed(config))

    class Never:
        def run(self, stage):
            assert not stage.tasks

    stale = tmp_path / "stages/files/pieces/00000.json"  # of an attempt that was killed, when there were other files
    stale.parent.mkdir(parents=True)
    stale.write_text("[]")
    dealing.deal(config, tmp_path, Never(), dealing.listed(config))
    share = tmp_path / "stages/files/shares/a/00000.json"
    before = share.stat().st_mtime_ns
    dealing.deal(config, tmp_path, Never(), dealing.listed(config))
    assert share.stat().st_mtime_ns == before
    (tmp_path / "in" / "b.txt").write_text("b")
    with pytest.raises(ConfigError, match="files of subset a have changed since they were dealt"):
        dealing.deal(config, tmp_path, Never(), dealing.listed(config))


# ---- listing ---------------------------------------------------------------------------------------------------------


def test_a_listing_is_in_the_order_of_all_and_takes_little_memory():
    """5,000 files: as tuples they were 1.7 MB."""
    files = [File(f"folder/{i}.jsonl", f"/data/folder/{i}.jsonl", i) for i in range(5_000)]
    chosen = recipe.subset("jsonl:x")
    tracemalloc.start()
    listing = Listing(iter(files), chosen, seed=3, part_bytes=1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150 * len(files)
    assert list(listing) == in_order(files, 3) == list(listing) and listing.first() == in_order(files, 3)[0]
    assert listing.summary()["files"] == 5_000 and listing.summary()["bytes"] == sum(range(5_000))
    others = [files[0]._replace(size=5), *files[1:]]
    assert Listing(others, chosen, seed=3, part_bytes=1000).summary()["digest"] != listing.summary()["digest"]
    assert Listing(files[::-1], chosen, seed=3, part_bytes=1000).summary() == listing.summary()


@pytest.mark.parametrize("odd", ["é", "a\nb", "\udcff", '"'])
def test_odd_names_are_kept(odd):
    file = File(f"{odd}.jsonl", f"/x/{odd}.jsonl", 1)
    assert list(Listing([file], recipe.subset("jsonl:x"), seed=1, part_bytes=9)) == [file]


def test_a_folder_that_cannot_be_listed_is_no_loss_without_a_word(tmp_path, monkeypatch):
    """fsspec leaves out what is deeper than the first level. Seen red with its glob."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x.txt").touch()
    real = dealing.iter_files.__globals__["os"].scandir

    def scandir(folder):
        if str(folder).endswith("/a/b"):
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(StorageError, match=r"cannot be listed \(PermissionError.*/a/b"):
        list_files(f"text:{tmp_path}")
