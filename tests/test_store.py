"""k2jax.data.store: what is written is what is read, and whatever is not is an error that names the thing."""

import json
import pickle
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from k2jax.data import storage, store, store_writer
from k2jax.data.manifest import build_manifest, sha256_json
from k2jax.data.store import Store, open_stores
from k2jax.data.store_writer import StoreWriter
from k2jax.errors import ConfigError, StorageError

EOS = 2
OPTIONS = {"tokenizer_sha256": "ab" * 32, "eos_id": EOS, "shard_tokens": 64, "chunk_tokens": 16}


def write(path, documents, vocab_size=1000, validation_fraction=0.0, **options):
    """A store of documents (lists of token ids) with ids "0", "1", ...; small shards, so that there are many."""
    with StoreWriter(path, vocab_size=vocab_size, **{**OPTIONS, **options}) as writer:
        for i, tokens in enumerate(documents):
            writer.add(tokens, id=str(i), source=f"file {i}", metadata={"number": i, "language": "ü"})
        return writer.finish(validation_fraction)


@pytest.fixture(scope="module")
def documents():
    draw = np.random.default_rng(0)
    return [draw.integers(0, 1000, draw.integers(0, 60)).tolist() for _ in range(40)]


@pytest.fixture
def path(tmp_path, documents):
    write(tmp_path / "a store", documents)
    return tmp_path / "a store"


def one_line(error):
    """The error's text, which must be a single line that holds no dump of a TensorStore spec."""
    text = str(error.value)
    assert "\n" not in text and "tensorstore_spec" not in text and len(text) < 600, text
    return text


@settings(max_examples=25, deadline=None)
@given(data=st.data(), vocab_size=st.sampled_from([300, 1 << 16, (1 << 16) + 1, 200_000]))
def test_round_trip(tmp_path_factory, data, vocab_size):
    """Documents, EOS, windows and metadata come back, for uint16 and uint32 stores."""
    tokens = st.lists(st.integers(0, vocab_size - 1), max_size=50)
    documents = data.draw(st.lists(tokens, min_size=1, max_size=12))
    path = tmp_path_factory.mktemp("round_trip") / "s"
    write(path, documents, vocab_size)
    opened = Store.open(path, verify="sha256")
    flat = np.concatenate([[*document, EOS] for document in documents])
    assert opened.info["dtype"] == ("uint16" if vocab_size <= 1 << 16 else "uint32")
    assert (opened.num_tokens, opened.num_documents) == (len(flat), len(documents))
    assert opened.info["max_token_id"] == flat.max()

    length = data.draw(st.integers(1, len(flat)))
    starts = np.arange(len(flat) - length + 1)
    rows = opened.read(starts, length)
    assert rows.dtype == np.uint32
    np.testing.assert_array_equal(rows, flat[starts[:, None] + np.arange(length)])

    position = 0
    for i, document in enumerate(documents):
        assert opened.document(i) == {
            "id": str(i),
            "source": f"file {i}",
            "num_tokens": len(document) + 1,
            "metadata": {"number": i, "language": "ü"},
            "start": position,
        }
        position += len(document) + 1


def test_zeros_are_stored(tmp_path):
    """Chunks of nothing but token 0, the fill value, are read; they are not mistaken for missing ones."""
    write(tmp_path / "s", [[0] * 200])
    assert not Store.open(tmp_path / "s").read([0], 200).any()


def test_same_documents_same_root_digest(tmp_path, documents):
    """The root digest is the content's: not the path's, not the clock's; one changed token changes it."""
    first = write(tmp_path / "a", documents)
    second = write(tmp_path / "b", documents)
    other = write(tmp_path / "c", [*documents[:-1], [*documents[-1], 7]])
    assert first == second and first["root_digest"] != other["root_digest"]
    rest = {key: value for key, value in first.items() if key != "root_digest"}
    assert first["root_digest"] == sha256_json(rest)
    files = {str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert files == {*first["files"], "store.json"}


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.9, 0.999])
def test_validation_split_at_a_document(tmp_path, documents, fraction):
    """Held-out tokens start with the first document at or after the share that is trained on."""
    info = write(tmp_path / "s", documents, validation_fraction=fraction)
    bounds = np.cumsum([0, *(len(d) + 1 for d in documents)])
    assert info["num_train_tokens"] == min(b for b in bounds if b >= (1 - fraction) * bounds[-1])


def test_validation_fraction_is_exact(tmp_path):
    """Documents start at 0, 3, 6 of 10 tokens: 0.7 starts at 3; 0.65, which is 3.5 tokens, and 0.69 after it."""
    for fraction, expected in ((0.7, 3), (0.65, 6), (0.69, 6), (0.4, 6), (0.39, 10)):
        info = write(
            tmp_path / "s", [[5, 6], [7, 8], [9, 10, 11]], validation_fraction=fraction, overwrite=True
        )
        assert info["num_train_tokens"] == expected


def test_given_documents_are_held_out(tmp_path, documents):
    """A split of a data set stays the split: what is behind num_train_tokens, to the token."""
    for number in (0, 1, 17, 40):
        with StoreWriter(tmp_path / "s", vocab_size=1000, overwrite=True, **OPTIONS) as writer:
            for i, tokens in enumerate(documents):
                writer.add(tokens, id=str(i), source="")
            train = sum(len(tokens) + 1 for tokens in documents[:number])
            assert writer.finish(num_train_tokens=train)["num_train_tokens"] == train
    with StoreWriter(tmp_path / "t", vocab_size=1000, **OPTIONS) as writer:
        writer.add([5, 6, 7], id="", source="")
        with pytest.raises(AssertionError):
            writer.finish(num_train_tokens=2)  # within the document
        writer._finished = True


def test_rows_without_eos(tmp_path):
    with StoreWriter(tmp_path / "s", vocab_size=1000, **OPTIONS) as writer:
        for row in range(20):
            writer.add([row, EOS, row + 1, row], id=str(row), source="", eos=False)
        writer.finish(0.25)
    opened = Store.open(tmp_path / "s")
    assert (opened.num_tokens, opened.num_train_tokens) == (80, 60)
    assert opened.read([4 * 7], 4).tolist() == [[7, EOS, 8, 7]]
    assert opened.document(7)["num_tokens"] == 4 and opened.document(7)["start"] == 28


def test_summary_makes_a_manifest(path):
    """The store's summary is all that a manifest needs; open_stores finds the stores of a manifest again."""
    summary = Store.open(path).summary()
    stage = {"name": "one", "sequence_length": 8, "rows_per_step": 2, "steps_per_chunk": 2, "chunks": 2}
    manifest = build_manifest(
        stages=[{**stage, "mix": {"a store": 1}}], stores={"a store": summary}, seed=0, label_shift="next"
    )
    assert open_stores(manifest)["a store"].root_digest == summary.root_digest
    manifest["stores"]["a store"]["path"] = "/moved"
    assert open_stores(manifest, folder=path.parent)["a store"].path == str(path)
    manifest["stores"]["a store"]["root_digest"] = "cd" * 32
    with pytest.raises(ConfigError, match="has changed") as error:
        open_stores(manifest, folder=path.parent)
    assert "'a store'" in one_line(error) and "cdcdcd" in one_line(error)


def test_documents_in(tmp_path, documents, monkeypatch):
    """Every range of tokens names its documents, also when document_start is bisected, not read whole."""
    monkeypatch.setattr(storage, "LAST_SLICE", 2)
    documents = [*documents[:10], [], [], *documents[10:12]]
    write(tmp_path / "s", documents)
    opened = Store.open(tmp_path / "s")
    owner = np.repeat(np.arange(len(documents)), [len(d) + 1 for d in documents])
    for start in range(len(owner)):
        for stop in {start + 1, min(start + 30, len(owner)), len(owner)}:
            spans = opened.documents_in(start, stop)
            assert all(span.start < span.stop for span in spans)
            assert (spans[0].start, spans[-1].stop) == (start, stop)
            found = np.concatenate([np.full(span.stop - span.start, span.index) for span in spans])
            np.testing.assert_array_equal(found, owner[start:stop])


def test_find_documents_over_row_groups(tmp_path, documents, monkeypatch):
    """Documents are found by id and by number in any row group; a text that comes twice is found twice."""
    for module in (store, store_writer):
        monkeypatch.setattr(module, "ROW_GROUP", 8)
    with StoreWriter(tmp_path / "s", vocab_size=1000, **OPTIONS) as writer:
        for i, tokens in enumerate(documents):
            writer.add(tokens, id=str(i % 30), source=f"file {i}")
        writer.finish()
    opened = Store.open(tmp_path / "s")
    assert opened.find_documents("9") == [9, 39]
    assert (opened.find_document("9"), opened.find_document("nobody")) == (9, None)
    assert [opened.document(i)["source"] for i in range(40)] == [f"file {i}" for i in range(40)]


def test_pickle(path):
    """A store that has been read from reads the same in another process."""
    opened = Store.open(path)
    expected = opened.read([3, 70], 20)
    assert opened.document(0)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(opened)).read([3, 70], 20), expected)


def test_file_url(tmp_path, documents):
    """A URL goes the whole way through both libraries: written by one, read by it and as a local path."""
    url = (tmp_path / "a store").as_uri()
    write(url, documents)
    by_url, by_path = Store.open(url, verify="sha256"), Store.open(tmp_path / "a store")
    assert by_url.root_digest == by_path.root_digest and by_url.path == url
    np.testing.assert_array_equal(by_url.read([5], 100), by_path.read([5], 100))
    assert by_url.document(3) == by_path.document(3)


@pytest.mark.parametrize(("url", "driver"), [("gs://bucket/a/b", "gcs"), ("s3://bucket/a/b", "s3")])
def test_bucket_urls_reach_their_driver(url, driver, monkeypatch):
    """gs:// and s3:// become TensorStore's and pyarrow's own drivers; with servers: test_bucket_store.py."""
    monkeypatch.setenv("AWS_REGION", "us-east-1")  # else pyarrow asks for it
    spec = storage.array_spec(f"{url}/tokens", "uint16", 100, 64, 16)
    assert ts.Spec(spec).to_json()["kvstore"] == {"driver": driver, "bucket": "bucket", "path": "a/b/tokens/"}
    fs, root = storage.file_system(url)
    assert (fs.type_name, root) == (driver, "bucket/a/b")


def test_unknown_url_is_refused():
    with pytest.raises(ConfigError, match="expected a local path") as error:
        Store.open("ftp://host/store")
    assert "ftp://host/store" in one_line(error)


def test_unfinished_writer_leaves_no_store(tmp_path, documents):
    """A writer that is interrupted leaves a store that is refused, and that the next writer replaces."""
    path = tmp_path / "s"
    with pytest.raises(KeyboardInterrupt), StoreWriter(path, vocab_size=1000, **OPTIONS) as writer:
        for _ in range(3):
            writer.add(range(100), id="0", source="x")
        raise KeyboardInterrupt
    assert (path / "tokens").exists()
    with pytest.raises(ConfigError, match="no store.json: it is unfinished") as error:
        Store.open(path)
    assert str(path) in one_line(error)
    write(path, documents)
    assert Store.open(path, verify="sha256").num_documents == len(documents)


def test_finished_store_is_not_overwritten_by_accident(path):
    with pytest.raises(ConfigError, match="holds a finished store"):
        write(path, [[5]])
    write(path, [[5]], overwrite=True)
    assert Store.open(path, verify="sha256").num_tokens == 2


def test_writer_touches_no_other_directory(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and no store"):
        write(tmp_path, [[5]], overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_empty_store_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no document was added"):
        write(tmp_path / "s", [])


@pytest.mark.fault("F5")
@pytest.mark.parametrize("token", [-1, 1000, 1 << 40])
def test_token_outside_the_vocabulary_at_write(tmp_path, token):
    """Seen red without the look at ids."""
    with pytest.raises(ConfigError, match="outside the vocabulary of 1000") as error:
        write(tmp_path / "s", [[1, 2], [3, token]])
    assert "document 1 (file 1)" in one_line(error) and str(token) in one_line(error)


@pytest.mark.fault("F5")
def test_token_outside_the_vocabulary_at_read(path):
    """The store says a smaller vocabulary than its tokens need: found where it is read, by place and id.

    Seen red without the look at ids.
    """
    opened = Store.open(path)
    opened.info["vocab_size"] = int(opened.read([0], 300).max())
    with pytest.raises(ConfigError, match=f"outside the vocabulary of {opened.info['vocab_size']}") as error:
        opened.read(np.arange(300), 1)
    place = int(one_line(error).split("token ")[1].split()[0])
    opened.info["vocab_size"] += 1
    assert opened.read([place], 1) == opened.info["vocab_size"] - 1


def shard(path, number):
    return path / "tokens" / "c" / str(number)


@pytest.mark.fault("F6")
def test_truncated_shard(path):
    """Named when the store is opened, and when it happens later, when it is read."""
    opened = Store.open(path)
    content = shard(path, 1).read_bytes()
    shard(path, 1).write_bytes(content[:50])
    with pytest.raises(ConfigError, match=f"tokens/c/1: 50 bytes, expected {len(content)}") as error:
        Store.open(path)
    assert str(path) in one_line(error)
    with pytest.raises(StorageError, match="cannot read the window at token 70") as error:
        opened.read([0, 70], 10)
    assert str(shard(path, 1)) in one_line(error)


@pytest.mark.fault("F6")
def test_missing_shard(path):
    """Named when the store is opened; later, it does not read as zeros."""
    opened = Store.open(path)
    shard(path, 2).unlink()
    with pytest.raises(ConfigError, match="tokens/c/2: no file") as error:
        Store.open(path)
    assert str(path) in one_line(error)
    with pytest.raises(StorageError, match="cannot read the window at token 130") as error:
        opened.read([130], 10)
    assert str(shard(path, 2)) in one_line(error)


@pytest.mark.fault("C8")
def test_flipped_bit(path):
    """Any flipped bit of a token shard is found by SHA-256 when asked for, and by crc32c when it is read."""
    opened = Store.open(path)
    content = shard(path, 0).read_bytes()

    @settings(max_examples=100, deadline=None)
    @given(place=st.integers(0, len(content) - 1), bit=st.integers(0, 7))
    def check(place, bit):
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        shard(path, 0).write_bytes(changed)
        with pytest.raises(ConfigError, match="tokens/c/0: SHA-256") as error:
            Store.open(path, verify="sha256")
        assert str(path) in one_line(error)
        with pytest.raises(StorageError, match=r"cannot read the window at token \d+: DATA_LOSS") as error:
            opened.read(np.arange(0, 64, 8), 8)
        assert str(shard(path, 0)) in one_line(error)

    check()


@pytest.mark.fault("C8")
def test_every_file_is_covered(path):
    """A bit flipped in any file but store.json is found by SHA-256; a missing file by its name."""
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name != "store.json"):
        content = file.read_bytes()
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(ConfigError, match=f"{file.relative_to(path)}: SHA-256"):
            Store.open(path, verify="sha256")
        file.unlink()
        with pytest.raises(ConfigError, match=f"{file.relative_to(path)}: no file"):
            Store.open(path)
        file.write_bytes(content)
    Store.open(path, verify="sha256")


@pytest.mark.fault("C8")
def test_changed_store_json(path):
    """Whatever is changed in store.json, its root digest tells."""
    info = json.loads((path / "store.json").read_text())
    for changed in ({**info, "num_train_tokens": 1}, {**info, "root_digest": "0" * 64}, {"format": 1}):
        (path / "store.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match="has root digest") as error:
            Store.open(path)
        assert str(path) in one_line(error)
    for text, found in (
        ("{", "is no JSON"),
        ("[]", "is not of format 1"),
        ('{"format": 2}', "is not of format 1"),
    ):
        (path / "store.json").write_text(text)
        with pytest.raises(ConfigError, match=f"store.json {found}"):
            Store.open(path)


def test_wrong_zarr_json(path):
    """Metadata that disagrees with store.json is an error at opening, before any token is misread."""
    file = path / "tokens" / "zarr.json"
    file.write_text(file.read_text().replace('"data_type":"uint16"', '"data_type":"uint32"'))
    with pytest.raises(StorageError, match="cannot read the store") as error:
        Store.open(path)
    assert str(path) in one_line(error)


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write the store") as error:
        write(tmp_path / "file" / "s", [[1]])
    assert str(tmp_path / "file" / "s") in one_line(error)


def test_disk_full(tmp_path):
    """The write that fails is an error, and what is left is no store. (A limit on file size stands in.)"""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot write the store") as error:
            write(tmp_path / "s", [range(1000)] * 40, shard_tokens=1 << 14, chunk_tokens=1 << 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path / "s") in one_line(error)
    assert not Path(tmp_path / "s" / "store.json").exists()


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_loss_mask_is_read_as_tokens_are(tmp_path_factory, data):
    """Of windows and of documents, whatever the shards; documents end as they were given, and where offsets say."""
    flags = st.lists(st.booleans(), min_size=1, max_size=50)
    masks = data.draw(st.lists(flags, min_size=1, max_size=8))
    path = tmp_path_factory.mktemp("masked") / "s"
    with StoreWriter(path, vocab_size=1000, masked=True, **OPTIONS) as writer:
        for i, mask in enumerate(masks):
            tokens = np.full(len(mask), EOS)  # EOS anywhere tells nothing here
            writer.add(tokens, id=str(i), source=f"chat {i}", eos=bool(i % 2), mask=np.array(mask))
        info = writer.finish()
    opened = pickle.loads(pickle.dumps(Store.open(path, verify="sha256")))
    flat = np.concatenate([mask + [False] * (i % 2) for i, mask in enumerate(masks)])
    assert opened.masked and info["supervised_tokens"] == flat.sum()
    length = data.draw(st.integers(1, len(flat)))
    starts = np.arange(len(flat) - length + 1)
    found = opened.read_mask(starts, length)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, flat[starts[:, None] + np.arange(length)])
    for i, mask in enumerate(masks):
        record = opened.document(i)
        assert record["num_tokens"] == len(mask) + i % 2
        assert opened.read_mask([record["start"]], record["num_tokens"])[0, : len(mask)].tolist() == mask


def test_the_mask_is_in_the_digest_and_a_store_without_is_as_before(tmp_path, path):
    """Seen red with the mask's files left out of store.json."""

    def masked(name, mask):
        with StoreWriter(tmp_path / name, vocab_size=1000, masked=True, **OPTIONS) as writer:
            writer.add([5, 6, 7], id="a", source="s", eos=False, mask=mask)
            return writer.finish()

    one, other = masked("one", [0, 1, 1]), masked("other", [1, 0, 1])
    assert one["root_digest"] != other["root_digest"]
    assert one["supervised_tokens"] == other["supervised_tokens"] == 2
    file = tmp_path / "one" / "loss_mask" / "c" / "0"
    damaged = bytearray(file.read_bytes())
    damaged[1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ConfigError, match="loss_mask/c/0: SHA-256"):
        Store.open(tmp_path / "one", verify="sha256")
    with pytest.raises(StorageError, match="cannot read the window at token 0"):
        Store.open(tmp_path / "one").read_mask([0], 3)
    file.unlink()
    with pytest.raises(ConfigError, match="loss_mask/c/0: no file"):
        Store.open(tmp_path / "one")

    plain = Store.open(path)
    assert not plain.masked and not any(name.startswith("loss_mask") for name in plain.info["files"])
    assert set(plain.info) == {
        "format", "tokenizer_sha256", "vocab_size", "eos_id", "dtype", "shard_tokens", "chunk_tokens", "max_token_id",
        "num_tokens", "num_documents", "num_train_tokens", "files", "root_digest",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="has no loss mask"):
        plain.read_mask([0], 1)
    (tmp_path / "one" / "store.json").unlink()
    masked("one", [0, 1, 1])
    assert Store.open(tmp_path / "one", verify="sha256").root_digest == one["root_digest"]
    write_again = StoreWriter(tmp_path / "one", vocab_size=1000, overwrite=True, **OPTIONS)
    write_again.add([5], id="a", source="s")
    write_again.finish()
    assert not (tmp_path / "one" / "loss_mask").exists(), "a mask that was there belongs to no store without"


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_pairs_have_halves_in_their_mask(tmp_path_factory, data):
    """Written one by one or many at once, and read by windows and spans. Seen red with `mask.sum()` for the count."""
    half = st.lists(st.integers(0, 1), min_size=1, max_size=20).map(np.array)
    masks = [np.append(a, b + 2) for a, b in data.draw(st.lists(st.tuples(half, half), min_size=1, max_size=8))]
    path, flat = tmp_path_factory.mktemp("pairs") / "s", np.concatenate(masks)
    with StoreWriter(path, vocab_size=1000, masked=True, pairs=True, **OPTIONS) as writer:
        writer.add(np.arange(len(masks[0])), id="0", source="chat 0", eos=False, mask=masks[0])
        if masks[1:]:
            rows = [(str(i), f"chat {i}", len(mask), "{}") for i, mask in enumerate(masks[1:], 1)]
            columns = [pa.array(column) for column in zip(*rows, strict=True)]
            batch = pa.RecordBatch.from_arrays(columns, schema=store.DOCUMENTS)
            writer.extend(np.full(len(flat) - len(masks[0]), EOS), batch, np.concatenate(masks[1:]))
        info = writer.finish()
    opened = pickle.loads(pickle.dumps(Store.open(path, verify="sha256")))
    assert opened.pairs and opened.masked and info["pairs"] is True
    assert info["supervised_tokens"] == (flat % 2).sum()
    np.testing.assert_array_equal(opened.read_mask([0], len(flat))[0], flat)
    starts, lengths = opened.document_starts()[:-1], [len(mask) for mask in masks]
    np.testing.assert_array_equal(opened.start_reading_spans(starts, lengths, masks=True)(), flat)


@pytest.mark.parametrize(
    ("mask", "pairs"),
    [
        ([0, 1, 1], True), ([2, 3, 3], True), ([1, 3, 1], True), ([3, 1], True), ([0, 1, 4], True), ([], True),
        ([0, 1, 3], False), ([0, 1, 2], False),
    ],
)  # fmt: skip
def test_no_store_of_what_is_no_pair(tmp_path, mask, pairs):
    """One half alone, halves in the other order, a pair in a store of conversations; beside a good one, too."""
    good, size, options = ([1, 3] if pairs else [0, 1]), len(mask), {"vocab_size": 9, "masked": True, **OPTIONS}
    with pytest.raises(AssertionError, match="value|half"), StoreWriter(tmp_path / "s", pairs=pairs, **options) as w:
        w.add([4] * size, id="a", source="s", eos=False, mask=mask)
    with pytest.raises(AssertionError, match="value|half"), StoreWriter(tmp_path / "s", pairs=pairs, **options) as w:
        columns = [pa.array(x) for x in (["a", "b", "c"], ["s"] * 3, [2, size, 2], ["{}"] * 3)]
        batch = pa.RecordBatch.from_arrays(columns, schema=store.DOCUMENTS)
        w.extend(np.full(size + 4, 4), batch, np.array([*good, *mask, *good]))
    with pytest.raises(AssertionError, match="is masked"):
        StoreWriter(tmp_path / "t", vocab_size=9, pairs=True, **OPTIONS)


def test_a_mask_of_pairs_in_a_store_of_conversations_is_said_when_read(tmp_path):
    """As of one whose store.json was edited; and store.json of conversations is as it was before there were pairs."""
    for name, pairs in (("chat", False), ("pairs", True)):
        with StoreWriter(tmp_path / name, vocab_size=9, masked=True, pairs=pairs, **OPTIONS) as writer:
            writer.add([5, 6, 7], id="a", source="s", eos=False, mask=[0, 1, 3] if pairs else [0, 1, 1])
            writer.finish()
    assert "pairs" not in Store.open(tmp_path / "chat").info and not Store.open(tmp_path / "chat").pairs
    file = tmp_path / "pairs" / "store.json"
    info = json.loads(file.read_text())
    del info["pairs"], info["root_digest"]
    file.write_text(json.dumps({**info, "root_digest": sha256_json(info)}))
    opened = Store.open(tmp_path / "pairs")
    for read in (lambda: opened.read_mask([0], 3), opened.start_reading_spans([0], [3], masks=True)):
        with pytest.raises(ConfigError, match="its loss mask.* holds 3"):
            read()
