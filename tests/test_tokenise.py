"""Documents come to their stores in one order, whole, and turned for filling in the middle by their ids alone."""

import json
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("datatrove")

from k2jax.data import store_parts, store_writer
from k2jax.data.store import DOCUMENTS, Store
from k2jax.data.tokenizer import EOS, Tokenizer, load_tokenizer, train_bpe
from k2jax.errors import ConfigError, StorageError
from k2jax.prepare import kept, recipe, shuffle
from k2jax.prepare.dedup.duplicates import ROWS
from k2jax.prepare.documents import document, read_documents, to_line, write_documents
from k2jax.prepare.tokens import fim, pieces, tokenise

TEXTS = [f"Text {i} says </s>, \u2581 and <fim_middle>.\n" + f"wörd{i % 7} line\n" * (i % 11) for i in range(120)]
CUT = {"seed": 3, "rate": 0.5, "spm_rate": 0.5}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(TEXTS, 330).save(str(path))
    return path


@pytest.fixture
def cleaned(tmp_path):
    """The folder of the stages, with the documents of two tasks of cleaning."""
    for rank in range(2):
        found = [document(text, subset="code", source=f"f{i}.txt") for i, text in enumerate(TEXTS) if i % 2 == rank]
        write_documents(tmp_path / f"clean/documents/{rank:05d}.jsonl.zst", found)
        (tmp_path / "duplicates").mkdir(exist_ok=True)
        pq.write_table(ROWS.empty_table(), tmp_path / f"duplicates/{rank:05d}.parquet")
    return tmp_path


def make_recipe(**options):
    c = recipe.base()
    c.subsets.code = recipe.subset("text:*.py", tasks=2, **options)
    return c


def join(folder, options, held_out, name="store", **kind):
    """The stages from the pieces below folder/tokens to the store folder/<name>."""
    found = pieces.Pieces(folder, folder, (name,), options)
    pieces.lay_out(0, pieces=found)
    parts = found.parts()
    for rank in reversed(range(len(parts))):
        pieces.write_part(rank, parts=parts, pieces=found)
    return pieces.finish(name, pieces=found, held_out=held_out, **kind)


def stores(out, config, tokenizer, num_buckets=3):
    """{store: [(document's row, its ids)]} of the stages from `kept` to stores."""
    shutil.rmtree(out / "tokens", ignore_errors=True)
    dealt = kept.Kept(out, 2, (kept.Dealt("code", 0, 0, num_buckets),))
    for rank in range(2):
        kept.keep(rank, kept=dealt, seed=config.seed)
    for stage in dealt.shuffle.stages("kept"):
        for rank in range(stage.tasks):
            stage.function(rank)
    encoder = load_tokenizer(tokenizer)
    eos = encoder.token_to_id(EOS)
    for bucket in range(num_buckets):
        tokenise.tokenize(bucket, config=config.to_dict(), kept=dealt, tokenizer=tokenizer, eos=eos)
    found = {}
    for name in recipe.factors_of(config, "code"):
        options = {"tokenizer_sha256": "0" * 64, "vocab_size": encoder.vocab_size, "eos_id": eos}
        if join(out, options, {}, name):
            store = Store.open(out / name)
            rows = [store.document(i) for i in range(store.num_documents)]
            found[name] = [(row, store.read([row["start"]], row["num_tokens"])[0].tolist()) for row in rows]
    return found


def text_of(ids, encoder):
    """A document's text back from its ids, FIM or not."""
    sentinel = {encoder.token_to_id(token): token for token in fim.SENTINELS}
    assert ids[-1] == encoder.token_to_id(EOS) and ids[-1] not in ids[:-1]
    parts, name = {"": []}, ""
    for id in ids[:-1]:
        if id in sentinel:
            name = sentinel[id]
            assert name not in parts
            parts[name] = []
        else:
            parts[name].append(id)
    text = {name: encoder.decode(part) for name, part in parts.items()}
    order = [""] if len(parts) == 1 else [fim.PREFIX, fim.MIDDLE, fim.SUFFIX]
    assert len(parts) in (1, 4)
    return "".join(text[name] for name in order)


def test_the_pieces_of_a_fim_document_give_back_the_document(cleaned, tokenizer):
    config = make_recipe(fim_rate=0.5)
    [rows] = stores(cleaned, config, tokenizer).values()
    encoder = load_tokenizer(tokenizer)
    assert sorted(text_of(ids, encoder) for _, ids in rows) == sorted(TEXTS)
    modes = Counter(row["metadata"]["fim"]["mode"] for row, _ in rows)
    assert set(modes) == {"plain", "psm", "spm"} and 40 <= modes["plain"] <= 80
    for row, ids in rows:
        assert (encoder.token_to_id(fim.MIDDLE) in ids) == (row["metadata"]["fim"]["mode"] != "plain")


def test_fim_documents_have_stores_of_their_own_where_asked_as_k2_had(cleaned, tokenizer):
    config = make_recipe(fim_rate=0.5, fim_stores=True, repeats=0.5)
    found = stores(cleaned, config, tokenizer)
    modes = {name: {row["metadata"]["fim"]["mode"] for row, _ in rows} for name, rows in found.items()}
    assert modes == {"code": {"plain"}, "code-fim": {"psm"}, "code-spm": {"spm"}}
    assert recipe.factors_of(config, "code") == {"code": 1, "code-fim": 1, "code-spm": 1}


def test_the_order_is_that_of_the_keys_whatever_the_buckets_and_batches(cleaned, tokenizer, monkeypatch):
    config = make_recipe()
    [rows] = stores(cleaned, config, tokenizer).values()
    keys = [kept.order_key(config.seed, row["id"]) for row, _ in rows]
    assert keys == sorted(keys) and len(keys) == len(TEXTS)
    monkeypatch.setattr(tokenise, "BATCH_BYTES", 100)
    monkeypatch.setattr(shuffle, "RUN_BYTES", 2000)  # several runs in a file
    assert list(stores(cleaned, config, tokenizer, num_buckets=1).values()) == [rows]
    config.seed = 5
    [other] = stores(cleaned, config, tokenizer).values()
    assert [row["id"] for row, _ in other] != [row["id"] for row, _ in rows]


def test_duplicates_go_and_survivors_know_of_them_and_are_upsampled(cleaned, tokenizer):
    first = [one.id for one in read_documents(cleaned / "clean/documents/00000.jsonl.zst")]
    second = [one.id for one in read_documents(cleaned / "clean/documents/00001.jsonl.zst")]
    row = {"reason": None, "survivor_rank": 0, "by": [], "sources": [], "copies": 1}
    rows = [
        {**row, "index": 3, "survivor_index": 3, "copies": 7, "by": [{"name": "code", "count": 7}], "sources": ["f9"]},
        {**row, "index": 5, "survivor_index": 3, "reason": "near"},
        {**row, "index": 6, "survivor_index": 6, "copies": 2},
    ]
    pq.write_table(pa.Table.from_pylist(rows, ROWS), cleaned / "duplicates/00000.parquet")
    config = make_recipe(upsample=((2, 3), (6, 5)))
    found = stores(cleaned, config, tokenizer)
    ids = {name: {row["id"] for row, _ in rows} for name, rows in found.items()}
    assert ids["code-x3"] == {first[6]} and ids["code-x5"] == {first[3]}
    assert ids["code"] == set(first + second) - {first[3], first[5], first[6]}
    [(kept_row, _)] = found["code-x5"]
    assert kept_row["metadata"]["duplicates"] == {"copies": 7, "by": {"code": 7}, "sources": ["f9"]}
    tally = json.loads((cleaned / "kept/00000.json").read_text())
    assert tally["steps"]["duplicates"]["removed"]["near"]["documents"] == 1
    assert tally["kept"]["documents"] == len(first) - 1
    assert recipe.factors_of(config, "code") == {"code": 1, "code-x3": 3, "code-x5": 5}


@given(st.text(max_size=40), st.text("0123456789abcdef", min_size=64, max_size=64))
def test_every_cut_lies_in_the_document_and_its_pieces_are_the_document(text, id):
    cut = fim.draw(id, len(text), **CUT)
    assert cut == fim.draw(id, len(text), **CUT)
    assert 0 <= cut.first <= cut.second <= len(text)
    pieces = fim.pieces(text, cut)
    assert "".join(pieces) == text and len(pieces) == (1 if cut.mode == "plain" else 3)


def test_documents_are_written_as_their_mode_says():
    sentinels = {fim.PREFIX: 90, fim.MIDDLE: 91, fim.SUFFIX: 92}
    pieces = [[1, 2], [3], [4, 5]]
    assert fim.written("psm", pieces, sentinels) == [90, 1, 2, 92, 4, 5, 91, 3]
    assert fim.written("spm", pieces, sentinels) == [90, 92, 4, 5, 91, 1, 2, 3]
    assert fim.written("plain", [[7, 8]], {}) == [7, 8]


@pytest.mark.parametrize("spm_rate", [0.0, 1.0])
def test_a_cut_in_an_indent_adds_no_space_to_it(tmp_path, spm_rate):
    """With LLaMA's space before a text each part got one, and four spaces of Python became five."""
    library = tokenizers.Tokenizer.from_str(train_bpe(TEXTS, 330).to_str())
    library.normalizer = tokenizers.normalizers.Prepend(" ")
    encoder = Tokenizer(library.to_str())
    documents = [document("if x:\n" + "    y\n" * i, subset="code", source=f"{i}") for i in range(1, 40)]
    chosen = recipe.subset("text:*.py", fim_rate=1.0, fim_spm_rate=spm_rate)
    sentinels = tokenise.sentinel_ids(encoder, tmp_path)
    for one, _, ids in tokenise.encoded(documents, chosen, encoder, sentinels, seed=3):
        text = text_of([*ids, encoder.eos_id], encoder)
        assert text == " " + one.text, "one space, before the document"


def test_shares_and_places_of_cuts_are_those_asked_for():
    cuts = [fim.draw(f"{i:064x}", 9, **CUT) for i in range(8000)]
    modes = Counter(cut.mode for cut in cuts)
    for mode, share in {"plain": 0.5, "psm": 0.25, "spm": 0.25}.items():
        assert abs(modes[mode] - 8000 * share) < 5 * (8000 * share * (1 - share)) ** 0.5
    places = Counter(place for cut in cuts if cut.mode != "plain" for place in (cut.first, cut.second))
    assert set(places) == set(range(10)) and max(places.values()) < 1.25 * min(places.values())
    assert {fim.draw(f"{i:064x}", 9, seed=3, rate=1.0, spm_rate=1.0).mode for i in range(200)} == {"spm"}
    assert {fim.draw(f"{i:064x}", 9, seed=3, rate=0.0, spm_rate=1.0).mode for i in range(200)} == {"plain"}
    assert [fim.draw(f"{i:064x}", 9, **{**CUT, "seed": 4}) for i in range(50)] != cuts[:50]


def test_the_cuts_never_change():
    """A store made years later must be the same."""
    assert fim.draw("ab" * 32, 1000, seed=22238, rate=1.0, spm_rate=0.5) == ("spm", 106, 645)
    assert kept.order_key(22238, "ab" * 32) == 4877093539816258020


def test_a_tokenizer_without_the_sentinels_is_refused(cleaned, tmp_path):
    tokenizer = train_bpe(TEXTS, 330)
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = [one for one in plain["added_tokens"] if one["id"] < tokenizer.token_to_id("<fim_suffix>")]
    path = tmp_path / "plain.json"
    path.write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match="no control token <fim_suffix>, which fim_rate needs"):
        stores(cleaned, make_recipe(fim_rate=0.5), path)


def test_without_what_deduplication_found_nothing_goes_on(cleaned, tokenizer):
    (cleaned / "duplicates/00001.parquet").unlink()
    with pytest.raises(StorageError, match=r"duplicates/00001.parquet cannot be read .*prepare again"):
        stores(cleaned, make_recipe(), tokenizer)


def test_a_damaged_file_between_stages_is_found(cleaned, tokenizer):
    path = cleaned / "clean/documents/00001.jsonl.zst"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    for damaged in (whole[:-20], whole[:-1], whole[:100], bytes(flipped), whole + b"x", b""):
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match=r"00001.jsonl.zst is (damaged|empty).*prepare again"):
            stores(cleaned, make_recipe(), tokenizer)


def test_pieces_join_to_what_was_added_in_the_order_of_their_names(tmp_path):
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 70_000, draw.integers(0, 9)) for _ in range(40)]
    for piece in (1, 0, 2):
        with pieces.PieceWriter(tmp_path / f"tokens/store/{piece:05d}", vocab_size=70_000, eos_id=7) as writer:
            for i in range(piece * 20, min(40, piece * 20 + 20)):
                writer.add(documents[i], id=f"{i}", source="s", metadata={"n": i}, eos=i % 3 > 0)
    options = {"tokenizer_sha256": "0" * 64, "vocab_size": 70_000, "eos_id": 7}
    info = join(tmp_path, options, {"validation_fraction": 0.25})
    store = Store.open(tmp_path / "store", verify="sha256")
    assert store.num_documents == 40 and store.root_digest == info["root_digest"]
    assert 0 < info["num_train_tokens"] <= 0.75 * info["num_tokens"] + 9
    for i, ids in enumerate(documents):
        row = store.document(i)
        expected = [*ids.tolist(), 7] if i % 3 else ids.tolist()
        assert (row["id"], row["metadata"], row["num_tokens"]) == (f"{i}", {"n": i}, len(expected))
        if expected:
            assert store.read([row["start"]], len(expected))[0].tolist() == expected


@pytest.mark.parametrize("kind", ["plain", "masked", "pairs"])
def test_a_store_of_parts_has_the_bytes_of_one_writers(tmp_path, monkeypatch, kind):
    """Shards of 64 tokens, parts of two; pieces of none, of one document, of several shards."""
    monkeypatch.setattr(store_parts, "SHARD_TOKENS", 64)
    monkeypatch.setattr(store_parts, "CHUNK_TOKENS", 16)
    monkeypatch.setattr(pieces, "PART_TOKENS", 128)
    monkeypatch.setattr(pieces, "BLOCK_TOKENS", 10)
    monkeypatch.setattr(store_writer, "ROW_GROUP", 8)
    draw, masked = np.random.default_rng(0), kind != "plain"
    options = {"tokenizer_sha256": "0" * 64, "vocab_size": 70_000 if masked else 500, "eos_id": 7}
    layout = {"shard_tokens": 64, "chunk_tokens": 16, "masked": masked, "pairs": kind == "pairs"}
    with store_writer.StoreWriter(tmp_path / "one", **options, **layout) as writer:
        for piece, number in enumerate((3, 0, 60, 1, 20, 0)):
            some = {"vocab_size": options["vocab_size"], "eos_id": 7, "masked": masked}
            with pieces.PieceWriter(tmp_path / f"tokens/store/{piece:07d}", **some) as out:
                for i in range(number):
                    ids = draw.integers(0, 500, 2 + i % 30)
                    mask = np.arange(len(ids)) % 2 if masked else None
                    if kind == "pairs":
                        mask[len(ids) // 2 :] |= 2
                    one = {"id": f"{piece}-{i}", "source": "https://x:pw@y/z", "metadata": {"n": i}}
                    for to in (writer, out):
                        to.add(ids, **one, eos=not masked, mask=mask)
        info = writer.finish(0.1)
    assert join(tmp_path, options, {"validation_fraction": 0.1}, pairs=kind == "pairs") == info
    assert Store.open(tmp_path / "store", verify="sha256").root_digest == info["root_digest"]
    assert info["num_tokens"] > 64 * 8


def test_an_id_that_got_into_a_piece_behind_its_writers_back_is_refused(tmp_path):
    """A flipped bit between stages: files of ids have no checksum."""
    options = {"tokenizer_sha256": "0" * 64, "vocab_size": 100, "eos_id": 7}
    with pieces.PieceWriter(tmp_path / "tokens/store/00000", vocab_size=100, eos_id=7) as writer:
        writer.add([3, 4], id="a", source="s")
    (tmp_path / "tokens/store/00000.tokens").write_bytes(b"\3\0\4\1\7\0")
    with pytest.raises(StorageError, match="token id 260 is outside the vocabulary of 100: a file between stages"):
        join(tmp_path, options, {})
    assert not (tmp_path / "store/store.json").exists()


def test_pieces_that_do_not_fit_are_refused(tmp_path):
    options = {"tokenizer_sha256": "0" * 64, "vocab_size": 100, "eos_id": 7}
    with pytest.raises(ConfigError, match="token id 100, outside the vocabulary of 100"):
        with pieces.PieceWriter(tmp_path / "tokens/store/00000", vocab_size=100, eos_id=7) as writer:
            writer.add([3, 100], id="a", source="s")
    assert not list((tmp_path / "tokens/store").glob("*.parquet"))
    with pieces.PieceWriter(tmp_path / "tokens/store/00000", vocab_size=100, eos_id=7) as writer:
        writer.add([3, 4], id="a", source="s")
    (tmp_path / "tokens/store/00000.tokens").write_bytes(b"\1\0\2\0")
    with pytest.raises(StorageError, match="has 2 tokens, its documents 3"):
        join(tmp_path, options, {})
    assert not (tmp_path / "store/store.json").exists()
    pq.write_table(DOCUMENTS.empty_table(), tmp_path / "tokens/store/00000.parquet")
    assert join(tmp_path, options, {}) is None


def test_documents_are_read_back_as_they_were(tmp_path):
    found = [document(text, subset="s", source=text) for text in ("", "\n", "\u2028\r\n\x00\x85", "ä" * 3_000_000)]
    write_documents(tmp_path / "d", found)
    assert list(read_documents(tmp_path / "d")) == found
    assert to_line(found[2]).count(b"\n") == 1
