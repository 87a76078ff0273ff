"""Megatron's and LLM360's token files become stores as they are; what is wrong with them is named."""

import gzip
import hashlib
import json
import multiprocessing
import struct

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
import zstandard
from dealt import deal
from hypothesis import given, settings
from hypothesis import strategies as st

from k2jax.data.loader import row_length
from k2jax.data.manifest import build_manifest, num_windows
from k2jax.data.store import Store
from k2jax.data.store_writer import StoreWriter
from k2jax.data.tokenizer import train_bpe
from k2jax.errors import ConfigError
from k2jax.prepare import build, recipe
from k2jax.prepare.sources.files import list_files
from k2jax.prepare.sources.listing import in_order
from k2jax.prepare.tally import Tally
from k2jax.prepare.tokens import token_sources

EOS = 2
CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
TEXTS = ["the first of several documents, which says little", "another one, which says less"] * 50


def write_megatron(path, documents, code=8, version=1, magic=b"MMIDIDX\0\0"):
    """Documents, each a list of sequences, as in Megatron-LM's MMapIndexedDatasetBuilder."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    ends = np.cumsum([0, *(len(document) for document in documents)]).astype("<i8")
    dtype = np.dtype(CODES.get(code, "<f8"))
    offsets = (np.cumsum([0, *lengths])[: len(lengths)] * dtype.itemsize).astype("<i8")
    path.with_suffix(".bin").write_bytes(b"".join(np.array(s, dtype).tobytes() for s in sequences))
    header = magic + struct.pack("<QBQQ", version, code, len(sequences), len(ends))
    path.with_suffix(".idx").write_bytes(header + lengths.tobytes() + offsets.tobytes() + ends.tobytes())


def row(ids, **more):
    return {"token_ids": ids, "source": "redpajama", "subset_name": "RedPajama.Wikipedia", **more}


def lines(*rows):
    return b"".join(orjson.dumps(one) + b"\n" for one in rows)


def read(source, *, shard=0, num_shards=1, tally=None, eos=EOS, **options):
    chosen = recipe.subset(source, **options)
    tally = Tally() if tally is None else tally
    files = in_order(list_files(source), 1)[shard::num_shards]
    return list(token_sources.read(chosen, files, shard=shard, num_shards=num_shards, seed=1, tally=tally, eos=eos))


def ids_of(documents):
    return [one.ids.tolist() for one in documents]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_bpe(TEXTS, 320).to_str())
    return path


def convert(tmp_path, tokenizer, **subsets):
    """Runs the stage; the summaries of its tasks."""
    config = recipe.base()
    config.tokenizer = str(tokenizer)
    for name, chosen in subsets.items():
        config.subsets[name] = chosen
    recipe.validate(config)
    config = deal(config, tmp_path)
    stage = token_sources.stage(config, tmp_path, tokenizer)
    for rank in range(stage.tasks):
        stage.function(rank)
    return [json.loads(path.read_text()) for path in sorted((tmp_path / "stages/token-sources").iterdir())]


def pieces(tmp_path, store):
    """The tokens and rows of a store's pieces, joined by name."""
    found = sorted((tmp_path / "stages/tokens" / store).glob("*.parquet"))
    tokens = np.concatenate([np.fromfile(path.with_suffix(".tokens"), "<u2") for path in found])
    return tokens.tolist(), [one for path in found for one in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("code", CODES)
def test_megatrons_documents_come_as_they_are(tmp_path, code):
    documents = [[[5, 6, 7, EOS]], [[8], [9, 10, EOS]], [], [[11, EOS, 12]], [[EOS]], [[]]]
    write_megatron(tmp_path / "a_text_document", documents, code)
    found = read(f"megatron:{tmp_path}/*.bin")
    assert ids_of(found) == [[5, 6, 7], [8, 9, 10], [], [11, EOS, 12], [], []]
    assert [one.source for one in found] == [f"a_text_document.bin#{i}" for i in range(6)]
    assert all(one.eos for one in found)
    assert found[1].id == hashlib.sha256(struct.pack("<3I", 8, 9, 10)).hexdigest()


@settings(max_examples=30)
@given(st.lists(st.lists(st.lists(st.integers(0, 65535), max_size=5), max_size=3), max_size=8))
def test_any_megatron_file(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("megatron")
    write_megatron(folder / "a", documents)
    assert ids_of(read(f"megatron:{folder}", eos=-1)) == [sum(document, []) for document in documents]


def test_tasks_share_the_files(tmp_path):
    for name in "abcde":
        write_megatron(tmp_path / name, [[[ord(name), i]] for i in range(3, 6)])
    parts = [ids_of(read(f"megatron:{tmp_path}/*.bin", shard=shard, num_shards=3)) for shard in range(3)]
    assert sorted(sum(parts, [])) == [[ord(name), i] for name in "abcde" for i in range(3, 6)]
    assert all(parts)


def edit(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda at: at.with_suffix(".idx").unlink(), "a.bin has no a.idx beside it"),
        (lambda at: edit(at.with_suffix(".bin"), lambda raw: raw[:-1]), "a.bin has 15 bytes, its index needs 16"),
        (lambda at: edit(at.with_suffix(".idx"), lambda raw: b"X" + raw), "a.idx begins with b'XMMIDIDX"),
        (lambda at: edit(at.with_suffix(".idx"), lambda raw: b""), "a.idx begins with b''"),
        (lambda at: edit(at.with_suffix(".idx"), lambda raw: raw[:-1]), "a.idx ends within its 2 sequences"),
        (lambda at: write_megatron(at, [[[5]]], version=2), "a.idx has version 2, dtype 8"),
        (lambda at: write_megatron(at, [[[5]]], code=6), "a.idx has version 1, dtype 6"),
        (lambda at: edit(at.with_suffix(".idx"), lambda raw: raw[:-8] + b"\1" + bytes(7)), "do not cover"),
        (lambda at: edit(at.with_suffix(".idx"), lambda raw: raw[:34] + b"\xff" * 4 + raw[38:]), "is truncated"),
    ],
)
def test_a_damaged_megatron_file_is_one_clear_line(tmp_path, damage, problem):
    write_megatron(tmp_path / "a", [[[5, 6, 7]], [[8, 9, 10, 11, 12]]])
    damage(tmp_path / "a")
    with pytest.raises(ConfigError) as error:
        read(f"megatron:{tmp_path}/a.bin")
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_another_file_than_bin_is_refused(tmp_path):
    write_megatron(tmp_path / "a", [[[5]]])
    with pytest.raises(ConfigError, match="a.idx is no .bin"):
        read(f"megatron:{tmp_path}/a.idx")


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)])
def test_llm360_rows_come_as_they_are(tmp_path, suffix, pack):
    data = lines(row([5, EOS, 6], src_filename="/private/a.jsonl", line_idx_in_src=17, mask=[1, 0]), row([7, 8, EOS]))
    (tmp_path / f"chunk_0.jsonl{suffix}").write_bytes(pack(data))
    first, second = read(f"llm360:{tmp_path}")
    assert first.ids.tolist() == [5, EOS, 6] and second.ids.tolist() == [7, 8, EOS]
    assert not first.eos and first.part == "redpajama-wikipedia"
    assert (first.source, second.source) == (f"chunk_0.jsonl{suffix}:1", f"chunk_0.jsonl{suffix}:2")
    assert first.metadata == {
        "subset_name": "RedPajama.Wikipedia",
        "source": "redpajama",
        "src_filename": "/private/a.jsonl",
        "line_idx_in_src": 17,
    }


def test_rows_of_the_second_stage_have_a_source_alone(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"token_ids": [1, 2], "source": "open-web-math"}))
    assert [one.part for one in read(f"llm360:{tmp_path}/a.jsonl")] == ["open-web-math"]


@pytest.mark.parametrize(
    "line, problem",
    [
        (b'{"token_ids": [1, 2', "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[1, 2]", "no token_ids"),
        (b'{"tokens": [1, 2], "source": "a"}', "no token_ids"),
        (b'{"token_ids": [1, 2]}', "no subset_name"),
        (b'{"token_ids": [1, 2], "subset_name": "../.."}', "no subset_name"),
        (b'{"token_ids": [1, 2], "subset_name": 5}', "no subset_name"),
        *(
            (b'{"token_ids": %s, "source": "a"}' % ids, "token_ids is no list of ids")
            for ids in (b"[]", b"5", b"null", b'"12"', b"[1.5]", b"[1, -2]", b"[1, null]", b"[[1], [2]]", b"[[1], 2]")
        ),
        (b'{"token_ids": [4294967296], "source": "a"}', "token_ids is no list of ids"),
        (b'{"token_ids": [true], "source": "a"}', "token_ids is no list of ids"),
        (b'{"token_ids": [%s 1], "source": "a"}' % (b"1, " * 500), "longer than max_line_bytes"),
    ],
)
def test_a_bad_row_is_counted_by_file_and_line(tmp_path, line, problem):
    (tmp_path / "a.jsonl").write_bytes(lines(row([1, 2])) + line + b"\n" + lines(row([3, 4])))
    tally = Tally()
    assert ids_of(read(f"llm360:{tmp_path}/a.jsonl", tally=tally, max_line_bytes=1000)) == [[1, 2], [3, 4]]
    assert tally.bad == {problem: 1} and tally.problems == [f"a.jsonl:2: {problem}"]
    assert tally.steps["read"]["documents"] == 2 and tally.steps["read"]["bytes"] == 16


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_truncated_chunk_is_counted_and_read_up_to_there(tmp_path, suffix, pack):
    random = np.random.default_rng(0)
    rows = [row(random.integers(0, 300, 200).tolist()) for _ in range(400)]
    data = pack(lines(*rows))
    (tmp_path / f"a.jsonl{suffix}").write_bytes(data[: len(data) // 2])
    tally = Tally()
    found = read(f"llm360:{tmp_path}/a.jsonl*", tally=tally)
    assert ids_of(found) == [one["token_ids"] for one in rows[: len(found)]]
    assert (len(found) > 100 or suffix == ".zst") and tally.bad["damaged"] == 1
    assert tally.problems[0].startswith(f"a.jsonl{suffix}:{len(found) + 1}: damaged")


def test_a_missing_source_is_one_clear_line(tmp_path):
    for kind in ("megatron", "llm360"):
        with pytest.raises(ConfigError, match=f"source '{kind}:.*no file matches"):
            read(f"{kind}:{tmp_path}/nothing*")


def test_the_stage_writes_pieces_by_store(tmp_path, tokenizer):
    write_megatron(tmp_path / "a", [[[5, 6, EOS]], [[7]]])
    for i in range(3):
        rows = [row([10 * i + j, EOS, 1], subset_name="ab"[j % 2]) for j in range(4)]
        (tmp_path / f"chunk_{i}.jsonl").write_bytes(lines(*rows))
    k2 = recipe.subset(f"llm360:{tmp_path}/*.jsonl", tasks=2)
    summaries = convert(tmp_path, tokenizer, k2=k2, code=recipe.subset(f"megatron:{tmp_path}/a.bin"))
    tokens, rows = pieces(tmp_path, "code")
    assert tokens == [5, 6, EOS, 7, EOS] and [one["num_tokens"] for one in rows] == [3, 2]
    tokens, rows = pieces(tmp_path, "k2-b")
    assert sorted(tokens[::3]) == [1, 3, 11, 13, 21, 23] and tokens[1::3] == [EOS] * 6
    assert [one["num_tokens"] for one in rows] == [3] * 6
    assert [one["subset"] for one in summaries] == ["code", "k2", "k2"]
    assert summaries[0]["stores"] == {"code": {"documents": 2, "tokens": 5}}
    assert sum(one["stores"]["k2-a"]["tokens"] for one in summaries[1:]) == 18
    assert summaries[1]["row_length"] == 3


def test_a_task_run_again_writes_the_same_bytes(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines(*(row([i, 2, 3]) for i in range(50))))
    subset = recipe.subset(f"llm360:{tmp_path}/a.jsonl")
    contents = []
    for _ in range(2):
        convert(tmp_path, tokenizer, k2=subset)
        contents.append({path: path.read_bytes() for path in (tmp_path / "stages").rglob("*") if path.is_file()})
    assert contents[0] == contents[1] and len(contents[0]) == 3 + 3  # and what was dealt


def test_the_stage_goes_to_another_process(tmp_path, tokenizer):
    write_megatron(tmp_path / "a", [[[5]]])
    config = recipe.base()
    config.subsets.a = recipe.subset(f"megatron:{tmp_path}/a.bin", licence="ODC-By")
    config = deal(config, tmp_path)
    stage = token_sources.stage(config, tmp_path, tokenizer)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.map(stage.function, range(stage.tasks))
    tokens, rows = pieces(tmp_path, "a")
    assert tokens == [5, EOS] and rows[0]["metadata"] == '{"licence":"ODC-By"}'


def test_a_file_that_comes_between_two_tasks_is_nobodys(tmp_path, tokenizer):
    """It was not there when the files were dealt: read by one task alone, it would move the others' files."""
    for name in ("a", "b"):
        write_megatron(tmp_path / name, [[[5]]])
    config = recipe.base()
    config.subsets.a = recipe.subset(f"megatron:{tmp_path}/*.bin", tasks=2)
    config = deal(config, tmp_path)
    stage = token_sources.stage(config, tmp_path, tokenizer)
    stage.function(0)
    for name in ("0", "1", "c"):
        write_megatron(tmp_path / name, [[[6]]])
    stage.function(1)
    assert pieces(tmp_path, "a")[0] == [5, EOS, 5, EOS]


def test_what_is_done_to_text_alone_is_refused(tmp_path, tokenizer):
    config = recipe.base()
    config.subsets.text = recipe.subset("text:x", pii=True)
    config.subsets.k2 = recipe.subset("llm360:x", pii=("email",), fim_rate=0.5, tasks=3, licence="ODC-By")
    with pytest.raises(ConfigError, match="^subsets.k2: fim_rate=0.5, pii=.*: a source of tokens knows only source,"):
        token_sources.stage(config, tmp_path, tokenizer)


def test_two_subsets_cannot_share_a_store(tmp_path, tokenizer):
    config = recipe.base()
    config.subsets["k2"] = recipe.subset("llm360:x")
    config.subsets["k2_a"] = recipe.subset("llm360:y")
    token_sources.check(config)
    config.subsets["k2-a"] = recipe.subset("text:x")
    with pytest.raises(ConfigError, match="^subsets.k2-a: could be the name of a store of k2"):
        token_sources.check(config)


def test_wrong_rows_stop_the_stage(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines(row([1, 2]), row([1, 320])))
    with pytest.raises(ConfigError, match=r"a.jsonl:2\) has token id 320, outside the vocabulary of 320"):
        convert(tmp_path, tokenizer, k2=recipe.subset(f"llm360:{tmp_path}/a.jsonl"))
    (tmp_path / "a.jsonl").write_bytes(lines(row([1, 2]), row([1, 2, 3])))
    with pytest.raises(ConfigError, match="a.jsonl:2 has 3 token ids, the rows before it 2"):
        convert(tmp_path, tokenizer, k2=recipe.subset(f"llm360:{tmp_path}/a.jsonl"))
    (tmp_path / "a.jsonl").write_bytes(lines(*(row([1], subset_name=f"s{i}") for i in range(257))))
    with pytest.raises(ConfigError, match="a.jsonl:257 has the 257th subset_name, 's256'"):
        convert(tmp_path, tokenizer, k2=recipe.subset(f"llm360:{tmp_path}/a.jsonl"))
    write_megatron(tmp_path / "b", [[[5]], [[-3]]], code=3)
    with pytest.raises(ConfigError, match=r"b.bin#1\) has token id -3"):
        convert(tmp_path, tokenizer, b=recipe.subset(f"megatron:{tmp_path}/b.bin"))
    assert not list(tmp_path.glob("stages/**/*.parquet")) and not list(tmp_path.glob("stages/token-sources/*"))


def test_windows_of_an_llm360_store_are_its_rows(tmp_path, tokenizer):
    """With label_shift "inside" what training reads of the published data is its rows."""
    random = np.random.default_rng(0)
    rows = random.integers(0, 320, (40, 64)).tolist()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(*map(row, rows))))
    convert(tmp_path, tokenizer, k2=recipe.subset(f"llm360:{tmp_path}/a.jsonl.gz"))
    tokens, records = pieces(tmp_path, "k2-redpajama-wikipedia")
    with StoreWriter(tmp_path / "store", tokenizer_sha256="ab" * 32, vocab_size=320, eos_id=EOS) as writer:
        for i, record in enumerate(records):
            writer.add(tokens[64 * i : 64 * i + 64], id=record["id"], source=record["source"], eos=False)
        writer.finish(validation_fraction=0.25)
    store = Store.open(tmp_path / "store")
    stage = {"name": "a", "sequence_length": 64, "rows_per_step": 5, "steps_per_chunk": 3, "chunks": 2}
    manifest = build_manifest(
        stages=[{**stage, "mix": {"k2": 1}}], stores={"k2": store.summary()}, seed=1, label_shift="inside"
    )
    assert manifest["stages"][0]["subsets"][0]["windows"] == 30 == num_windows(store.num_train_tokens, 64, "inside")
    assert store.read(np.arange(40) * 64, row_length(64, "inside")).tolist() == rows
    assert store.document(3)["source"] == "a.jsonl.gz:4"


def test_a_subset_that_gives_no_document_is_named_with_the_reasons(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines(row([5])))
    (tmp_path / "b.jsonl").write_bytes(lines(*[{"tokens": [5], "subset_name": "x"}] * 3, row(["5"])))
    config = recipe.base()
    config.subsets.a, config.subsets.b = (recipe.subset(f"llm360:{tmp_path}/{name}.jsonl", tasks=1) for name in "ab")
    convert(tmp_path, tokenizer, **config.subsets)
    with pytest.raises(ConfigError) as error:
        token_sources.summary(config, tmp_path / "stages")
    why = "3 no token_ids, 1 token_ids is no list of ids; the first: b.jsonl:1: no token_ids"
    assert str(error.value) == f"subset b: llm360:{tmp_path}/b.jsonl gave no document ({why})"
    del config.subsets["a"], config.subsets["b"]
    config.tokenizer, config.subsets.b = str(tokenizer), recipe.subset(f"llm360:{tmp_path}/b.jsonl")
    with pytest.raises(ConfigError, match="^subset b: .* gave no document .3 no token_ids"):
        build.build(config.lock(), tmp_path / "out", workers=1)  # of which no store is there at all


def test_files_of_other_row_lengths_are_found_when_they_meet_in_a_store(tmp_path, tokenizer):
    for name, length in (("a", 4), ("b", 8)):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(row([5] * length)))
    chosen = recipe.subset(f"llm360:{tmp_path}/*.jsonl", tasks=2)
    convert(tmp_path, tokenizer, k2=chosen)
    config = recipe.base()
    config.subsets.k2 = chosen
    with pytest.raises(ConfigError, match="^subset k2: some of its files have rows of [48] tokens, others of [48]"):
        token_sources.summary(config, tmp_path / "stages")
