"""Flipped bits in a store: whoever reads it gets what was written, or an error, and never other documents."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

from k2jax.data import document_table, store, store_writer, verified
from k2jax.data.document_table import DocumentTable
from k2jax.data.manifest import sha256_json
from k2jax.data.store import Store
from k2jax.data.store_writer import StoreWriter
from k2jax.errors import ConfigError, DamagedError, StorageError

PLACES = 60
NUM_DOCUMENTS = 700


@pytest.fixture(scope="module", autouse=True)
def small():
    """Blocks and row groups as they are in a store of millions of documents: many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verified, "BLOCK", 2048)
        for module in (store, store_writer, document_table):
            patch.setattr(module, "ROW_GROUP", 100)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, draw = tmp_path_factory.mktemp("verified") / "store", np.random.default_rng(0)
    options = {"tokenizer_sha256": "ab" * 32, "vocab_size": 1000, "eos_id": 2, "shard_tokens": 2048, "chunk_tokens": 64}
    with StoreWriter(path, **options) as writer:
        for number in range(NUM_DOCUMENTS):
            tokens = draw.integers(0, 1000, draw.integers(0, 9))
            more = {"n": draw.bytes(400).hex()}
            writer.add(tokens, id=draw.bytes(32).hex(), source=f"file {number % 7}", metadata=more)
        writer.finish(validation_fraction=0.1)
    return path


def as_before_blocks(path: Path) -> None:
    """The store as an earlier version wrote it."""
    (path / "documents.blocks").unlink()
    info = json.loads((path / "store.json").read_text())
    del info["root_digest"], info["files"]["documents.blocks"]
    (path / "store.json").write_text(json.dumps({**info, "root_digest": sha256_json(info)}))


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def all_of(path: Path, scratch: Path) -> list:
    """Everything that a reader can learn of a store, through every way of reading it."""
    opened = Store.open(path)
    documents = [opened.document(number) for number in range(opened.num_documents)]
    places = [opened.find_documents(document["id"]) for document in documents[::100]]
    spans = spans_of(opened, scratch)
    tokens = opened.read(range(0, opened.num_tokens - 50, 50), 50).tolist()
    return [documents, places, spans, tokens, opened.num_train_documents, opened.documents_in(3, 300)]


def spans_of(opened: Store, scratch: Path) -> list:
    return DocumentTable.build(opened, scratch).spans(np.arange(0, opened.num_tokens - 50, 50), 50).to_pylist()


@pytest.mark.fault("C8")
@pytest.mark.parametrize("age", ["new", "old"])
def test_a_flipped_bit_in_the_documents_is_refused(made: Path, tmp_path: Path, age: str):
    """At 60 places, both ends and each row group among them: by every way of reading, each time it matters to that."""
    path, draw = shutil.copytree(made, tmp_path / "store"), random.Random(5)
    if age == "old":
        as_before_blocks(path)
    good = all_of(path, tmp_path / "scratch")
    file = path / "documents.parquet"
    bits, refused = file.stat().st_size * 8, 0
    assert file.stat().st_size > 100 * verified.BLOCK
    for bit in [0, bits - 1, *(draw.randrange(bits) for _ in range(PLACES - 2))]:
        flip(file, bit)
        opened = Store.open(path)
        with pytest.raises(DamagedError, match="documents.parquet.*expected .* it is damaged"):
            [opened.document(number) for number in range(opened.num_documents)]
        try:  # it reads no metadata
            assert spans_of(Store.open(path), tmp_path / "scratch") == good[2]
        except DamagedError as error:
            assert "documents.parquet" in str(error)
            refused += 1
        flip(file, bit)
    assert 10 < refused and all_of(path, tmp_path / "scratch") == good


@pytest.mark.fault("C8", "S15")
def test_a_flipped_bit_anywhere_in_a_store_changes_nothing_unseen(made: Path, tmp_path: Path):
    """Refused, or proved harmless: everything that is read is what it was."""
    path, draw = shutil.copytree(made, tmp_path / "store"), random.Random(6)
    good, harmless = all_of(path, tmp_path / "scratch"), []
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    assert len(files) >= 7
    for file in files * 9:
        bit = draw.randrange(file.stat().st_size * 8)
        flip(file, bit)
        try:
            assert all_of(path, tmp_path / "scratch") == good, (file, bit)
            harmless.append(file.name)
        except (ConfigError, StorageError) as error:
            assert "\n" not in str(error) and str(path) in str(error), error
        flip(file, bit)
    assert "documents.parquet" not in harmless and "documents.blocks" not in harmless
    assert len(harmless) < 0.2 * 9 * len(files), harmless


def test_a_look_up_reads_its_part_alone(made: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a file that may be 100 GB in a bucket: the footer and the blocks of one row group."""
    read, opened = [], Store.open(made)
    whole = verified.VerifiedFile._read_block
    monkeypatch.setattr(
        verified.VerifiedFile, "_read_block", lambda file, number: read.append(number) or whole(file, number)
    )
    opened.document(310)
    blocks = (made / "documents.parquet").stat().st_size / verified.BLOCK
    assert 0 < len(set(read)) < 0.5 * blocks
    again = len(read)
    opened.document(311)
    assert len(read) == again


def test_a_file_is_read_as_any_other(made: Path):
    path = made / "documents.parquet"
    opened, plain = Store.open(made).open_documents(), path.open("rb")
    draw = random.Random(0)
    for _ in range(200):
        where, size = draw.randrange(path.stat().st_size + 100), draw.randrange(6000)
        assert opened.seek(where) == plain.seek(where) and opened.read(size) == plain.read(size)
        assert opened.tell() == plain.tell()
    assert opened.seek(-5, 2) == plain.seek(-5, 2) and opened.seek(2, 1) == plain.seek(2, 1)
    assert opened.read() == plain.read() and opened.read(1) == b""
    opened.close()


def test_the_command_ends_with_74_and_one_line(tiny_run: Path, tiny_data: Path, tmp_path: Path):
    stores = shutil.copytree(tiny_data, tmp_path / "stores")
    for name in ("books", "code", "web"):
        flip(stores / name / "documents.parquet", 5000)
    for tool, more in (
        ("which_docs", ["--step=1"]), ("which_steps", ["--doc=00"]), ("export_chunks", [f"--out={tmp_path / 'out'}"])
    ):  # fmt: skip
        found = subprocess.run(
            [sys.executable, REPOSITORY / f"tools/{tool}.py", f"--workdir={tiny_run}", f"--stores={stores}", *more],
            capture_output=True,
            text=True,
        )
        assert found.returncode == 74 and found.stderr.count("\n") == 1, (tool, found)
        assert "documents.parquet" in found.stderr and "it is damaged" in found.stderr
