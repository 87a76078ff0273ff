"""Deduplication: signatures are datatrove's to the byte; clusters, survivors and counts are those of a brute-force
reference; what is missing or damaged is one error; nothing depends on workers, partitions or the order of files.

Many tasks, many rounds and what is interrupted are test_dedup_parts.py's.
"""

import itertools
import json
import math
import os
import pickle
import random
import re
import string
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("datatrove")
from datatrove.data import Document  # noqa: E402
from datatrove.pipeline.dedup.minhash import (  # noqa: E402
    HashConfig,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.utils.text import simplify_text  # noqa: E402
from datatrove.utils.word_tokenizers import WordTokenizer  # noqa: E402

from k2jax.errors import StorageError  # noqa: E402
from k2jax.prepare import recipe, shuffle  # noqa: E402
from k2jax.prepare.dedup import components, duplicates, near  # noqa: E402
from k2jax.prepare.dedup import minhash as ours  # noqa: E402
from k2jax.prepare.dedup.index import clean_documents  # noqa: E402
from k2jax.prepare.documents import document, write_documents  # noqa: E402
from k2jax.prepare.shuffle import Shuffle  # noqa: E402

ROOT = Path(__file__).parent.parent
FINEWEB = ours.MinHash("words", 5, 14, 8, 1)
TXT360 = ours.MinHash("characters", 13, 9, 13, 1)
TEXTS = [
    "",
    "one two three four",
    "one two three four five",
    "twelve chars",
    "Numbers 12.5 and 1,000,000.25, ٣٫٥ and １２ — “quotes”…  tabs\tand\x0bthe\x1crest\x85of\xa0it\u2003\u3000.",
    "Diacritics: e\u0301 é ñ Ǖ a \u0301 b İstanbul ΟΔΟΣ ΣΑΣ ǅ ﬁ ½ \u037e \u1fef",
    "中文没有空格的文本需要按字符来切分，所以这里写得长一点。",
    "emoji 👩‍👩‍👧 and 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 beyond the basic plane, twice: 👩‍👩‍👧",
    "NUL \0 and \x7f and \x80 bytes, all of them in one line of a text",
    "again and again " * 20_000,
    "x" * 70_000,
]


# --- Signatures -------------------------------------------------------------------------------------------------------


class Split(WordTokenizer):
    """Words as FineWeb's without spaCy."""

    def word_tokenize(self, text):
        return text.split()

    sent_tokenize = span_tokenize = word_tokenize


class Characters(MinhashDedupSignature):
    """datatrove's signatures of characters: SlimPajama's get_features, as it is."""

    def get_shingles(self, text):
        text = text.lower().translate(str.maketrans("", "", string.punctuation))
        text = re.sub(r"\s+", " ", text.strip())
        n = self.config.n_grams
        grams = [text[at : at + n] for at in range(len(text) - n + 1)]
        return np.array([xxhash.xxh64_intdigest(gram) for gram in grams], np.uint64).reshape(-1, 1)


def plain(config: ours.MinHash, folder="."):
    """datatrove's own first stage."""
    theirs = MinhashConfig(
        n_grams=config.n_grams,
        num_buckets=config.bands,
        hashes_per_bucket=config.hashes_per_band,
        seed=config.seed,
        hash_config=HashConfig(precision=64, hash_fc="xxhash"),
    )
    stage = MinhashDedupSignature if config.unit == "words" else Characters
    return stage(str(folder), theirs, language=Split())


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_signatures(texts: Iterable[str], folder: Path, rank: int, config: ours.MinHash) -> None:
    """Our signatures as datatrove's files: of each band hashes (u8) and the document's index (u4), sorted."""
    signer = ours.Signer(config)
    rows = [(index, signature) for index, text in enumerate(texts) if (signature := signer.sign(text)) is not None]
    assert 0 < len(rows) < len(texts)
    for band, at in enumerate(range(0, config.bands * config.hashes_per_band, config.hashes_per_band)):
        records = sorted((*signature[at : at + config.hashes_per_band].tolist(), index) for index, signature in rows)
        data = b"".join(struct.pack(f"<{config.hashes_per_band}QI", *record) for record in records)
        path = folder / f"bucket_{band:03d}" / f"{rank:05d}.minhash.sig"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@pytest.mark.parametrize("config", [FINEWEB, TXT360, ours.MinHash("words", 2, 3, 4, 7)], ids=str)
def test_signature_files_are_datatroves_to_the_byte(config, tmp_path):
    real = sorted((ROOT / "k2jax").rglob("*.py"))[:40]
    texts = TEXTS + [path.read_text() for path in real] + [real[0].read_text() + "changed"]
    plain(config, tmp_path / "theirs").run([Document(text=text, id="") for text in texts], rank=3)
    write_signatures(texts, tmp_path / "ours", 3, config)
    made = files_of(tmp_path / "ours")
    assert len(made) == config.bands and made == files_of(tmp_path / "theirs")


@pytest.mark.parametrize("config", [ours.MinHash("words", 2, 2, 3, 5), ours.MinHash("characters", 4, 2, 3, 5)], ids=str)
def test_any_text_is_signed_as_by_datatrove(config):
    theirs, signer = plain(config), ours.Signer(config)
    words = st.text(st.sampled_from("aÁ\u0301 9.,٣５_—é\u1fef中\n\t\x1c\xa0İςΣß"))

    @settings(max_examples=300)
    @given(st.text() | words)
    @example("a \u0301 b c")
    def check(text):
        shingles = theirs.get_shingles(text)
        signature = signer.sign(text)
        if not len(shingles):
            assert signature is None
        else:
            assert signature.tolist() == list(itertools.chain(*theirs.get_signature(shingles)))

    check()


def test_white_space_is_that_of_str():
    every = "".join(f"a{chr(code)}b" for code in range(0xD800) if chr(code).isspace())
    assert ours.normalise_characters(every) == " ".join(every.split()) == "a" + "ba".join(" " * every.count("a")) + "b"
    assert ours.normalise_words(every).decode() == ours.normalise_characters(every)


@given(st.text())
def test_words_are_those_of_simplify_text(text):
    assert ours.normalise_words(text).decode().split(" ") == (simplify_text(text).split() or [""])


@settings(max_examples=50)
@given(st.binary(min_size=110, max_size=300), st.integers(1, 110))
def test_xxh64_of_windows(data, length):
    array = np.frombuffer(data, np.uint8)
    expected = [xxhash.xxh64_intdigest(data[at : at + length]) for at in range(len(data) - length + 1)]
    assert ours.xxh64_windows(array, None, length).tolist() == expected
    starts = np.array([0, len(expected) - 1, 0])
    assert ours.xxh64_windows(array, starts, length).tolist() == [expected[at] for at in starts]


@pytest.mark.parametrize("letters", [string.ascii_lowercase, "абвгдежзийклмнопрстуфхцчшщ", "中文没有空格的文本"])
@pytest.mark.parametrize("config", [FINEWEB, TXT360], ids=str)
def test_a_long_document_takes_little_memory(config, letters):
    """Trap 8: datatrove holds a document's shingles times its hashes, 4 GB for a book of 10 MB."""
    draw = random.Random(1)
    vocabulary = ["".join(draw.choices(letters, k=6)) for _ in range(5000)]
    text = ("" if letters[0] == "中" else " ").join(draw.choices(vocabulary, k=100_000))
    signer = ours.Signer(config)
    tracemalloc.start()
    signer.sign(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 14 * len(text.encode()) + 2e6, f"{peak:,} bytes"


def test_agreement_of_signatures_is_the_jaccard_similarity():
    config = ours.MinHash("words", 3, 32, 32, 3)
    words = [f"word{string.ascii_lowercase[i % 26] * (i // 26 + 1)}" for i in range(300)]
    signer, draw = ours.Signer(config), random.Random(5)
    for edits in (1, 5, 20, 60):
        other = list(words)
        for at in draw.sample(range(300), edits):
            other[at] = f"other{string.ascii_lowercase[at % 26] * (at // 26 + 1)}"
        one, two = ({tuple(w[i : i + 3]) for i in range(298)} for w in (words, other))
        jaccard = len(one & two) / len(one | two)
        agree = np.mean(signer.sign(" ".join(words)) == signer.sign(" ".join(other)))
        assert abs(agree - jaccard) < 4.5 * math.sqrt(jaccard * (1 - jaccard) / 1024)


# --- The stages, beside a reference -----------------------------------------------------------------------------------


def recipe_of(subsets: dict[str, dict], **dedup):
    """A recipe; subsets: {name: {"priority": ..., "tasks": ...}}."""
    config = recipe.base()
    config.dedup.update({"unit": "words", "n_grams": 2, "bands": 8, "hashes_per_band": 2, **dedup})
    for name, options in subsets.items():
        config.subsets[name] = recipe.subset("text:*", **{"tasks": 1, **options})
    return config.lock()


def write_clean(config, folder: Path, tasks: list[list[tuple]]) -> None:
    """The clean documents, by task: (text, dump or None, source)."""
    assert len(tasks) == len(recipe.tasks(config))
    for rank, (task, rows) in enumerate(zip(recipe.tasks(config), tasks, strict=True)):
        made = [document(text, subset=task.subset, source=source, dump=dump) for text, dump, source in rows]
        write_documents(folder / "documents" / f"{rank:05d}.jsonl.zst", made)
        columns = {
            "id": pa.array([bytes.fromhex(d.id) for d in made], pa.binary(32)),
            "subset": pa.array([task.subset] * len(made), pa.string()),
            "source": pa.array([d.metadata["source"] for d in made], pa.string()),
            "dump": pa.array([d.metadata["dump"] for d in made], pa.string()),
            "num_bytes": pa.array([len(d.text.encode()) for d in made], pa.int64()),
        }
        (folder / "index").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), folder / "index" / f"{rank:05d}.parquet")


def run_stages(stages, order=sorted) -> dict[str, Callable]:
    """Runs each once that before is complete; returns them by name, to be run again."""
    found = {}
    for stage in stages:
        function = pickle.loads(pickle.dumps(stage.function))  # as an executor sends it
        for rank in order(range(stage.tasks)):
            function(rank)
        found[stage.name] = stage
    return found


def rows_of(folder: Path, num_tasks: int) -> dict[tuple[int, int], dict]:
    """{(rank, index): row}, checked to be in order."""
    rows = {}
    for rank in range(num_tasks):
        table = pq.read_table(folder / f"{rank:05d}.parquet", partitioning=None)
        assert table.schema.equals(duplicates.ROWS)
        indices = table["index"].to_pylist()
        assert indices == sorted(indices)
        rows |= {(rank, row["index"]): row for row in table.to_pylist()}
    return rows


def reference(config, tasks: list[list[tuple]]) -> dict[tuple[int, int], dict]:
    """What the stages must find, the plain way: all pairs, with datatrove's signatures."""
    names = [task.subset for task in recipe.tasks(config)]
    nodes = [(rank, index) for rank, rows in enumerate(tasks) for index in range(len(rows))]
    texts = {node: tasks[node[0]][node[1]][0] for node in nodes}
    dumps = {node: tasks[node[0]][node[1]][1] or "" for node in nodes}
    newest = sorted(set(dumps.values()), reverse=True)

    def place(node):
        return config.subsets[names[node[0]]].priority, newest.index(dumps[node]), node

    first: dict[str, tuple] = {}
    for node in sorted(nodes, key=place):
        first.setdefault(texts[node], node)
    copies = [node for node in nodes if config.dedup.exact and first[texts[node]] != node]
    cluster = {node: {node} for node in nodes}
    theirs = plain(duplicates.minhash_of(config))
    shingles = {node: theirs.get_shingles(texts[node]) for node in nodes if node not in copies}
    bands = {node: theirs.get_signature(each) for node, each in shingles.items() if len(each)}
    pairs = [(node, first[texts[node]]) for node in copies]
    if config.dedup.near:
        pairs += [
            (one, two)
            for one, two in itertools.combinations(bands, 2)
            if any(a == b for a, b in zip(bands[one], bands[two], strict=True))
        ]
    for one, two in pairs:
        joined = cluster[one] | cluster[two]
        cluster |= dict.fromkeys(joined, joined)
    rows = {}
    for node in nodes:
        if len(members := cluster[node]) == 1:
            continue
        survivor = min(members, key=place)
        row = {"index": node[1], "reason": None, "copies": 1, "by": [], "sources": []}
        row |= {"survivor_rank": survivor[0], "survivor_index": survivor[1]}
        if node == survivor:
            by = Counter(names[r] + (f"/{dumps[r, i]}" if dumps[r, i] else "") for r, i in members)
            row["by"] = [{"name": name, "count": count} for name, count in sorted(by.items())]
            row["copies"] = len(members)
            row["sources"] = sorted(tasks[r][i][2] for r, i in members - {node})[: config.dedup.sources_kept]
        else:
            row["reason"] = "exact" if node in copies else "near"
        rows[node] = row
    return rows


SUBSETS = {"books": {"priority": 0}, "web": {"priority": 5, "tasks": 2}, "wiki": {"priority": 0, "tasks": 1}}
WORDS = [f"w{string.ascii_lowercase[i % 26]}{string.ascii_lowercase[i // 26]}" for i in range(400)]


def corpus(seed: int, num_tasks: int = 4, families: int = 12) -> list[list[tuple]]:
    """Families of texts at many distances from each other, exact copies and white space among them, over the tasks."""
    draw = random.Random(seed)
    tasks: list[list[tuple]] = [[] for _ in range(num_tasks)]
    for family in range(families):
        words = draw.choices(WORDS, k=draw.choice([1, 3, 20, 60]))
        for member in range(draw.choice([1, 2, 2, 5])):
            text = " ".join(words)
            for _ in range(draw.choice([0, 0, 1, 1, 3, 20])):
                text = text.replace(draw.choice(words), draw.choice([*WORDS, "", "\n"]), 1)
            dump = draw.choice([None, "CC-MAIN-2019-04", "CC-MAIN-2024-30"])
            draw.choice(tasks).append((text or "empty", dump, f"{family}:{member}"))
    for rows in tasks:
        draw.shuffle(rows)
    return tasks


OPTIONS = [{}, {"exact": False}, {"near": False}, {"exact": False, "near": False}, {"unit": "characters", "n_grams": 5}]


@pytest.mark.parametrize("dedup", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_stages_find_what_the_reference_finds(dedup, seed, tmp_path):
    config, tasks = recipe_of(SUBSETS, sources_kept=2, **dedup), corpus(seed)
    write_clean(config, tmp_path / "clean", tasks)
    run_stages(duplicates.stages(config, tmp_path / "clean", tmp_path / "out"))
    expected = reference(config, tasks)
    if config.dedup.exact and config.dedup.near:
        reasons = Counter(row["reason"] for row in expected.values())
        assert min(reasons[None], reasons["exact"], reasons["near"]) > 1, "the corpus must have all of them"
    rows = rows_of(tmp_path / "out", 4)
    assert rows == expected
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    removed, pairs, names = Counter(), Counter(), ["books", "web", "web", "wiki"]
    for (rank, _), row in rows.items():
        if row["reason"]:
            removed[names[rank], row["reason"]] += 1
            pairs[f"{names[rank]} -> {names[row['survivor_rank']]}"] += 1
    assert summary == {
        "removed": {s: {r: removed[s, r] for r in ("exact", "near")} for s in sorted(SUBSETS)},
        "pairs": pairs,
        "cluster_sizes": Counter(str(row["copies"]) for row in rows.values() if not row["reason"]),
    }


def test_the_order_of_files_changes_no_survivor(tmp_path):
    """Documents of different dumps, so that the rule decides before the place in a file does."""
    config = recipe_of({"web": {"tasks": 3}})
    flat = [row for rows in corpus(3, families=30) for row in rows]
    flat = [(text, f"CC-MAIN-{number:04d}", source) for number, (text, _, source) in enumerate(flat)]
    survivors = []
    for seed in range(3):
        random.Random(seed).shuffle(flat)
        tasks = [flat[start::3] for start in range(3)]
        write_clean(config, tmp_path / f"clean{seed}", tasks)
        run_stages(duplicates.stages(config, tmp_path / f"clean{seed}", tmp_path / f"out{seed}"))
        rows = rows_of(tmp_path / f"out{seed}", 3)
        gone = {tasks[rank][index][2] for (rank, index), row in rows.items() if row["reason"]}
        survivors.append({(source, text) for text, _, source in flat if source not in gone})
    assert survivors[0] == survivors[1] == survivors[2] and 10 < len(survivors[0]) < len(flat) - 10


def test_curated_sources_stay_then_newer_dumps_then_the_first(tmp_path):
    text, near_text = " ".join(WORDS[:300]), " ".join([*WORDS[:299], "changed"])
    tasks = [
        [("something else", None, "b0")],  # books, priority 0
        [(text, "CC-MAIN-2024-30", "w0"), (near_text, "CC-MAIN-2024-30", "w1")],  # web, priority 5
        [(text, None, "w2"), ("alone here", None, "w3"), (near_text, "CC-MAIN-2019-04", "w4")],
        [(near_text, "CC-MAIN-2013-20", "k0"), (near_text, "CC-MAIN-2013-20", "k1")],  # wiki, priority 0
    ]
    config = recipe_of(SUBSETS)
    write_clean(config, tmp_path / "clean", tasks)
    run_stages(duplicates.stages(config, tmp_path / "clean", tmp_path / "out"))
    rows = rows_of(tmp_path / "out", 4)
    assert {node: (row["reason"], row["survivor_rank"], row["survivor_index"]) for node, row in rows.items()} == {
        (1, 0): ("near", 3, 0),
        (1, 1): ("exact", 3, 0),
        (2, 0): ("exact", 3, 0),  # a copy of (1, 0), which then is near (3, 0)
        (2, 2): ("exact", 3, 0),
        (3, 0): (None, 3, 0),
        (3, 1): ("exact", 3, 0),
    }
    by = {"web": 1, "web/CC-MAIN-2019-04": 1, "web/CC-MAIN-2024-30": 2, "wiki/CC-MAIN-2013-20": 2}
    assert rows[3, 0]["by"] == [{"name": name, "count": count} for name, count in by.items()]
    assert rows[3, 0]["copies"] == 6 and rows[3, 0]["sources"] == ["k1", "w0", "w1", "w2", "w4"]


def test_of_many_copies_the_first_names_are_kept(tmp_path):
    """Names come in no order, and most are let go on the way; that of the one that stays, "000", is none of them."""
    config = recipe_of({"web": {}}, sources_kept=3)
    names = [f"{number:03d}" for number in range(200)]
    others = random.Random(0).sample(names[1:], 199)
    write_clean(config, tmp_path / "clean", [[("one two three", None, name) for name in [names[0], *others]]])
    run_stages(duplicates.stages(config, tmp_path / "clean", tmp_path / "out"))
    row = rows_of(tmp_path / "out", 1)[0, 0]
    assert row["copies"] == 200 and row["sources"] == ["001", "002", "003"]


def test_odd_texts_names_and_dumps_are_as_any_others(tmp_path):
    text = "one two \ud7ff \u2603"
    rows = [(text, "\u0434\u0430\u043c\u043f/\u201cx\u201d\n", '"\\'), (text, None, "")]
    tasks = [rows, [*rows[::-1], ("x y", "\0", "s\0")], [], [("x y", "", "s")]]
    config = recipe_of(SUBSETS)
    write_clean(config, tmp_path / "clean", tasks)
    run_stages(duplicates.stages(config, tmp_path / "clean", tmp_path / "out"))
    assert rows_of(tmp_path / "out", 4) == reference(config, tasks)


def test_without_texts_there_is_nothing_to_do(tmp_path):
    """Of sources of tokens alone."""
    config = recipe.base()
    config.subsets.tokens = recipe.subset("megatron:x")
    run_stages(duplicates.stages(config, tmp_path / "clean", tmp_path / "out"))
    assert json.loads((tmp_path / "out/summary.json").read_text()) == {"removed": {}, "pairs": {}, "cluster_sizes": {}}


def test_conversations_have_no_near_duplicates(tmp_path):
    config = recipe_of(SUBSETS)
    write_clean(config, tmp_path / "clean", [[("one two three", None, "a")]] * 4)
    clean, minhash = clean_documents(config, tmp_path / "clean"), duplicates.minhash_of(config)
    bands = Shuffle(tmp_path / "bands", 4, 1)
    for rank in range(4):
        near.sign(rank, clean=clean, removed=None, bands=bands, config=minhash, exempt=frozenset({"web"}))
    tasks = bands.read_records(0, near.BAND)["node"] >> 32
    assert sorted(tasks.tolist()) == [0] * minhash.bands + [3] * minhash.bands


def test_documents_without_a_shingle_have_no_near_duplicates(tmp_path):
    config = recipe_of({"web": {}}, n_grams=5, exact=False)
    write_clean(config, tmp_path / "clean", [[("two words", None, "a"), ("two words", None, "b"), ("", None, "c")]])
    run_stages(duplicates.stages(config, tmp_path / "clean", tmp_path / "out"))
    assert rows_of(tmp_path / "out", 1) == {}


def test_clusters_are_datatroves(tmp_path):
    """Theirs of our signatures, in their files; ours of the stages."""
    config, tasks = recipe_of(SUBSETS, exact=False), corpus(11, families=40)
    write_clean(config, tmp_path / "clean", tasks)
    run_stages(duplicates.stages(config, tmp_path / "clean", tmp_path / "out"))
    found: dict[tuple, set] = {}
    for node, row in rows_of(tmp_path / "out", 4).items():
        found.setdefault((row["survivor_rank"], row["survivor_index"]), set()).add(node)
    minhash = duplicates.minhash_of(config)
    for rank, rows in enumerate(tasks):
        write_signatures([text for text, _, _ in rows], tmp_path / "signatures", rank, minhash)
    folders = [str(tmp_path / name) for name in ("signatures", "near", "removed")]
    theirs = plain(minhash).config
    buckets = MinhashDedupBuckets(*folders[:2], config=theirs)
    for rank in range(minhash.bands):
        buckets.run(rank=rank, world_size=minhash.bands)
    MinhashDedupCluster(*folders[1:], theirs, save_cluster_id=True).run()
    expected: dict[int, set] = {}
    for path in (tmp_path / "removed").glob("*.clusters"):
        for index, cluster in np.fromfile(path, "<u4").reshape(-1, 2).tolist():
            expected.setdefault(cluster, set()).add((int(path.stem), index))
    assert len(expected) > 20
    assert sorted(map(sorted, found.values())) == sorted(map(sorted, expected.values()))


def test_bands_are_told_apart(tmp_path):
    """Equal hashes in different bands are no reason to compare two documents, other hashes in the same band neither."""
    config = ours.MinHash("words", 1, 3, 2, 1)
    signature = np.array([1, 2, 1, 2, 2, 1], np.uint64)
    assert len(set(near.band_digests(signature, config))) == 3
    other = near.band_digests(np.array([1, 2, 3, 4, 2, 1], np.uint64), config)
    assert [a == b for a, b in zip(other, near.band_digests(signature, config), strict=True)] == [True, False, True]


# --- What is missing or damaged ---------------------------------------------------------------------------------------


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_swap(path):
    data = path.read_bytes()
    path.write_bytes(data[20:] + data[:20])


def damage_empty(path):
    path.write_bytes(b"")


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


BANDS = "out/bands-words-2-8-2-1-1/00002.runs"


@pytest.mark.parametrize(
    ("name", "damage", "stage", "says"),
    [
        ("clean/index/00001.parquet", os.remove, "dumps", r"index/00001.parquet cannot be read"),
        ("out/dumps/00000.json", damage_empty, "dumps-join", r"dumps/00000.json cannot be read"),
        ("clean/index/00001.parquet", os.remove, "ids", r"index/00001.parquet cannot be read"),
        ("clean/index/00001.parquet", damage_cut, "ids", r"index/00001.parquet cannot be read"),
        ("out/order.json", os.remove, "ids", r"order.json cannot be read"),
        ("out/ids-1/00000.runs", os.remove, "exact", r"00000.runs cannot be read"),
        ("out/ids-1/00000.runs", damage_flip, "exact", r"00000.runs cannot be read"),
        ("clean/index/00001.parquet", os.remove, "signatures", r"index/00001.parquet cannot be read"),
        ("clean/documents/00001.jsonl.zst", damage_cut, "signatures", r"00001.jsonl.zst (is damaged|has)"),
        ("clean/documents/00001.jsonl.zst", damage_empty, "signatures", r"is empty"),
        ("out/removed-4/00000.runs", os.remove, "signatures", r"removed-4/00000.runs cannot be read"),
        ("out/removed-4/00000.runs", damage_cut, "members", r"removed-4/00000.runs cannot be read"),
        (BANDS, os.remove, "near", r"00002.runs cannot be read"),
        (BANDS, damage_cut, "near", r"00002.runs cannot be read"),
        (BANDS, damage_empty, "near", r"00002.runs cannot be read"),
        (BANDS, damage_flip, "near", r"00002.runs cannot be read"),
        (BANDS, damage_swap, "near", r"00002.runs cannot be read"),
        ("out/edges-1/00001.runs", os.remove, "clusters", r"edges-1/00001.runs cannot be read"),
        ("out/edges-1/00000.runs", damage_flip, "clusters", r"edges-1/00000.runs cannot be read"),
        ("out/labels-4/00000.runs", os.remove, "members", r"labels-4/00000.runs cannot be read"),
        ("clean/index/00002.parquet", os.remove, "members", r"index/00002.parquet cannot be read"),
        ("out/members-1/00000.runs", damage_flip, "survivors", r"members-1/00000.runs cannot be read"),
        ("out/summaries/00000.json", os.remove, "summaries", r"summaries/00000.json cannot be read"),
        ("out/summaries-joined/00000.json", damage_empty, "summary", r"summaries-joined/00000.json cannot be read"),
        ("out/rows-4/00000.runs", damage_cut, "duplicates", r"rows-4/00000.runs cannot be read"),
    ],
)  # fmt: skip
def test_what_is_missing_or_damaged_is_an_error(name, damage, stage, says, tmp_path):
    """Traps 7 and 9: datatrove passes all documents on where a file is missing."""
    config = recipe_of(SUBSETS)
    write_clean(config, tmp_path / "clean", corpus(2, families=40))
    for found in duplicates.stages(config, tmp_path / "clean", tmp_path / "out"):
        if found.name == stage:
            damage(tmp_path / name)
            break
        run_stages([found])
    with pytest.raises(StorageError, match=says) as caught:
        run_stages([found])
    assert "\n" not in str(caught.value)


def test_what_no_stage_reads_any_more_is_removed(tmp_path, monkeypatch):
    """At TxT360's size two copies of the bands are 50 TB."""
    for name in ("FAN", "SLOTS", "OPENS"):
        monkeypatch.setattr(shuffle, name, 2)
    monkeypatch.setattr(shuffle, "PARTITION_BYTES", 1000)
    config, out = recipe_of(SUBSETS), tmp_path / "out"
    write_clean(config, tmp_path / "clean", corpus(2, families=40))
    ran, most = {}, 0
    for stage in duplicates.stages(config, tmp_path / "clean", out):
        ran |= run_stages([stage])
        most = max(most, len({path.parent for path in out.rglob("*.runs")}))
    assert {"signatures-group", "signatures-split", "rows"} - ran.keys() == {"rows"}
    assert not list(out.rglob("*.runs")) and list(out.glob("*.parquet"))
    assert most <= 6
    again = [stage.name for stage in duplicates.stages(config, tmp_path / "clean", out)]
    assert set(again) <= ran.keys(), "a command that goes on asks for no stage that did not run"


def until(name: str, stages: Iterator) -> Iterator:
    """The stages up to that of a name."""
    for stage in stages:
        yield stage
        if stage.name == name:
            return


def test_bands_of_other_parameters_are_not_compared(tmp_path):
    write_clean(recipe_of({"web": {}}), tmp_path / "clean", [[("one two three", None, "a")]])
    one, two = (
        duplicates.stages(recipe_of({"web": {}}, seed=seed), tmp_path / "clean", tmp_path / "out") for seed in (1, 2)
    )
    run_stages(until("signatures", one))
    with pytest.raises(StorageError, match="words-2-8-2-2-1/00000.runs cannot be read"):
        run_stages(stage for stage in until("near", two) if stage.name != "signatures")


def test_a_dump_that_was_not_there_is_an_error(tmp_path):
    """Of an index that changed between two stages."""
    config = recipe_of({"web": {}})
    write_clean(config, tmp_path / "clean", [[("one two three", "CC-MAIN-2013-20", "a")]])
    stages = run_stages(until("dumps-join", duplicates.stages(config, tmp_path / "clean", tmp_path / "out")))
    assert list(stages) == ["dumps", "dumps-join"]
    write_clean(config, tmp_path / "clean", [[("one two three", "CC-MAIN-2024-30", "a")]])
    with pytest.raises(StorageError, match="00000.parquet is not what it was"):
        run_stages(
            stage
            for stage in duplicates.stages(config, tmp_path / "clean", tmp_path / "out")
            if stage.name not in stages
        )


@pytest.mark.parametrize(("task", "index"), [(0, 10_000), (77, 0)])
def test_an_edge_to_a_document_that_is_not_there_is_an_error(task, index, tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "_remove", lambda folder: None)
    config = recipe_of({"web": {}}, near=False)
    write_clean(config, tmp_path / "clean", [[("one two three", None, "a")]])
    stages = run_stages(duplicates.stages(config, tmp_path / "clean", tmp_path / "out"))
    edges = stages["clusters"].function.keywords["edges"]
    with edges.writer(0) as out:
        ends = [np.array([node], np.uint64) for node in (0, task << 32 | index)]
        components.add_edges(out, edges, *ends)
    with pytest.raises(StorageError, match=rf"{'document 10000' if index else 'task 77'}.* of "):
        run_stages([stages[name] for name in ("clusters", "labels", "members")])


def test_an_exact_copy_without_a_cluster_is_an_error(tmp_path, monkeypatch):
    """It would be missing from the clean documents' signatures, and stay in the stores."""
    monkeypatch.setattr(shuffle, "_remove", lambda folder: None)
    config = recipe_of({"web": {}}, near=False)
    write_clean(config, tmp_path / "clean", [[("one two three", None, "a"), ("one two three", None, "b")]])
    stages = run_stages(duplicates.stages(config, tmp_path / "clean", tmp_path / "out"))
    with stages["labels"].function.keywords["labels"].writer(0):
        pass
    with pytest.raises(StorageError, match="an exact copy of task 0 is in no cluster"):
        run_stages([stages["members"]])


@pytest.mark.processes
def test_the_benchmark_finds_what_datatrove_finds():
    command = [sys.executable, "tools/bench/dedup.py", "--smoke"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert {line["benchmark"] for line in lines} == {"planted", "corpus", "clusters"}
    corpora = [line for line in lines if line["benchmark"] == "corpus"]
    alone = [line for line in corpora if line["engine"] == "k2jax"]
    assert [(line["same_clusters"], line["one_kept_of_each"]) for line in alone] == [(True, True)] * 2
    assert {line["precision"] for line in lines if "precision" in line} == {1.0}
