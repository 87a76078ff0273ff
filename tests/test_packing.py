"""Packing of conversations into rows: nothing split, each once an epoch, a function of the position on any host."""

import bisect
import pickle

import numpy as np
import pytest
from conversation_stores import T, load, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from k2jax.data.conversations import ConversationRows, is_target, num_held_out_rows, read_held_out
from k2jax.data.loader import BatchSource, batch_digest, make_loader
from k2jax.data.manifest import build_manifest, check_manifest, describe
from k2jax.data.order import Order
from k2jax.data.packing import VERSION, Packing, check_targets, packing_of
from k2jax.errors import ConfigError
from k2jax.training.setup import open_data


def packing(lengths, capacity):
    lengths = np.array(lengths, np.int64)
    return Packing(np.arange(len(lengths)), np.cumsum(lengths) - lengths, lengths, capacity)


def best_fit_decreasing(lengths, capacity):
    """The room left in each row, ascending, by the textbook: one document after the other."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        at = bisect.bisect_left(rooms, length)
        room = rooms.pop(at) if at < len(rooms) else capacity
        bisect.insort(rooms, room - length)
    return rooms


lengths_and_capacity = st.integers(1, 40).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), min_size=1, max_size=120), st.just(capacity))
)


@given(lengths_and_capacity, st.integers(0, 2**64 - 1))
def test_every_document_is_in_one_row_of_an_epoch_and_whole(case, key):
    lengths, capacity = case
    packed = packing(lengths, capacity)
    found = packed.rows(np.arange(packed.num_rows), np.full(packed.num_rows, key, np.uint64))
    assert sorted(found.document) == list(range(len(lengths)))
    assert np.array_equal(np.array(lengths)[found.document], found.length)
    assert np.array_equal(found.begin, (np.cumsum(lengths) - lengths)[found.document])
    used = np.bincount(found.row, found.length, packed.num_rows)
    assert sorted(capacity - used) == best_fit_decreasing(lengths, capacity)
    for row in range(packed.num_rows):  # side by side from the row's beginning
        here = found.row == row
        assert found.start[here].tolist() == (np.cumsum(found.length[here]) - found.length[here]).tolist()


@given(lengths_and_capacity, st.integers(0, 2**64 - 1), st.data())
def test_a_row_alone_is_the_row_among_others_and_documents_know_theirs(case, key, data):
    packed = packing(*case)
    keys = np.full(packed.num_rows, key, np.uint64)
    found = packed.rows(np.arange(packed.num_rows), keys)
    row = data.draw(st.integers(0, packed.num_rows - 1))
    alone = packed.rows(np.array([row]), keys[:1])
    assert np.array_equal(alone.document, found.document[found.row == row])
    document = data.draw(st.integers(0, len(case[0]) - 1))
    assert packed.window_of(document, key) == found.row[found.document == document][0]


def test_epochs_are_dealt_anew():
    packed = packing(np.random.default_rng(0).integers(1, 30, 400).tolist(), 64)
    rows = np.arange(packed.num_rows)
    epochs = [packed.rows(rows, np.full(len(rows), key, np.uint64)) for key in (1, 2)]
    together = [{frozenset(e.document[e.row == row].tolist()) for row in rows} for e in epochs]
    assert len(together[0] & together[1]) < len(rows) / 10
    assert packed.padding < 0.02


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root = tmp_path_factory.mktemp("chats")
    draw = np.random.default_rng(3)
    return {
        "a": write_store(root / "a", draw.integers(2, 65, 70).tolist(), seed=1),
        "b": write_store(root / "b", draw.integers(2, 20, 300).tolist(), seed=2),
    }


def manifest_of(stores, *, seed=7, shift="next", length=64, rows=4, chunks=12, too_long="refuse", mix=None, kind="sft"):
    mix = mix or {"a": 1, "b": 2}
    stage = {"name": "chat", "kind": kind, "sequence_length": length, "rows_per_step": rows, "too_long": too_long}
    stage |= {"steps_per_chunk": 5, "chunks": chunks, "mix": mix, "packing": VERSION}
    from k2jax.data.conversations import packed

    stage["packed"] = packed(stage, stores, check=True)
    manifest = build_manifest(
        stages=[stage], stores={n: s.summary() for n, s in stores.items()}, seed=seed, label_shift=shift
    )
    check_manifest(manifest, "here")
    return manifest


def source(manifest, stores, **options):
    order = Order(manifest)
    options = {"first_step": 1, "last_step": order.num_steps, "label_shift": manifest["label_shift"]} | options
    return BatchSource(order, stores, **options)


@pytest.mark.parametrize("shift", ["next", "inside"])
def test_rows_hold_whole_conversations_with_their_masks(stores, shift):
    manifest = manifest_of(stores, shift=shift)
    width = 64 + (shift == "next")
    whole = {}
    for name, store in stores.items():
        starts = store.document_starts()
        for a, b in zip(starts, starts[1:], strict=False):
            tokens, mask = store.read([a], b - a)[0], store.read_mask([a], b - a)[0]
            whole[tokens.tobytes()] = (name, mask)
    seen = {name: [] for name in stores}
    batches = source(manifest, stores)
    for batch in map(batches.__getitem__, range(len(batches))):
        assert batch["tokens"].shape == batch["marks"].shape == (4, width)
        assert batch["tokens"].dtype == batch["marks"].dtype == np.int32
        for tokens, marks, subset in zip(batch["tokens"], batch["marks"], batch["subset"], strict=True):
            documents = marks >> 1
            assert not tokens[documents == 0].any() and not marks[64:].any()
            assert is_target(marks[None]).any(), "a row teaches something"
            for number in range(1, documents.max() + 1):
                at = np.flatnonzero(documents == number)
                assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
                name, mask = whole[tokens[at].astype(np.uint32).tobytes()]
                assert name == sorted(stores)[subset] and np.array_equal(marks[at] & 1, mask)
                seen[name].append(tokens[at].tobytes())
    order, sizes = Order(manifest), {s["name"]: s for s in manifest["stages"][0]["subsets"]}
    assert order.num_steps == 60
    for name, of in seen.items():  # the epochs that were whole have each conversation once
        epochs = sizes[name]["rows"] // sizes[name]["windows"]
        assert epochs >= 1 and min(of.count(one) for one in set(of)) >= epochs
        assert max(of.count(one) for one in set(of)) <= epochs + 1


@settings(max_examples=20)
@given(st.integers(1, 30), st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]))
def test_hosts_read_their_part_and_any_step_alone(stores, step, seed, hosts):
    manifest = manifest_of(stores, seed=seed)
    whole = source(manifest, stores)[step - 1]
    parts = [
        source(manifest, stores, first_step=step, last_step=step, local_rows=np.arange(host, 4, hosts))[0]
        for host in range(hosts)
    ]
    for key in whole:
        joined = np.empty_like(whole[key])
        for host, part in enumerate(parts):
            joined[host::hosts] = part[key]
        assert np.array_equal(joined, whole[key]), key
    assert batch_digest(np.concatenate([part["digest"] for part in parts])) == batch_digest(whole["digest"])


def test_the_digest_has_tokens_marks_and_places(stores):
    manifest = manifest_of(stores)
    one = source(manifest, stores)[0]
    from k2jax.data.loader import row_digests

    both = np.concatenate([one["tokens"], one["marks"]], axis=1)
    assert np.array_equal(one["digest"], row_digests(np.arange(4), both))
    both[0, -60] ^= 1
    assert not np.array_equal(one["digest"][0], row_digests(np.arange(4), both)[0])


@pytest.mark.processes
def test_worker_processes_read_the_same(stores):
    manifest = manifest_of(stores)
    order = Order(manifest)
    expected = source(manifest, stores)
    with_workers = make_loader(order, stores, label_shift="next", first_step=3, last_step=12, workers=2)
    for step, batch in with_workers:
        assert all(np.array_equal(batch[key], expected[step - 1][key]) for key in batch), step


def test_rows_are_picklable(stores):
    manifest = manifest_of(stores)
    rows = Order(manifest).rows(np.arange(8))
    made = ConversationRows(manifest, 0, stores)
    for a, b in zip(made.read(rows, 65), pickle.loads(pickle.dumps(made)).read(rows, 65), strict=True):
        assert np.array_equal(a, b)


# ---- too long, too little, not what it was ---------------------------------------------------------------------------


def test_too_long_is_refused_dropped_or_cut(tmp_path):
    store = write_store(tmp_path / "long", [10, 100, 64, 65, 30], seed=5)
    with pytest.raises(ConfigError, match=r"2 conversation.* a row of 64 .*document 1 \(long.jsonl:2\) of 100"):
        packing_of(store, 64, "refuse")
    dropped = packing_of(store, 64, "drop")
    assert (dropped.num_documents, dropped.left_out, dropped.cut, dropped.num_tokens) == (3, 2, 0, 104)
    cut = packing_of(store, 64, "cut")
    assert (cut.num_documents, cut.left_out, cut.cut, cut.num_tokens) == (5, 0, 2, 10 + 64 + 64 + 64 + 30)
    assert "2 cut at the row's end" in describe(manifest_of({"a": store}, too_long="cut", mix={"a": 1}, chunks=1))
    assert "2 left out" in describe(manifest_of({"a": store}, too_long="drop", mix={"a": 1}, chunks=1))
    with pytest.raises(ConfigError, match="no conversation of 5 fits rows of 5"):
        packing_of(store, 5, "drop")


def test_held_out_conversations_are_packed_cut_or_none(tmp_path):
    store = write_store(tmp_path / "s", [20] * 30 + [100] * 2, seed=5, held_out=0.25)
    assert store.num_documents - store.num_train_documents == 2
    assert (num_held_out_rows(store, 64, "refuse"), num_held_out_rows(store, 64, "drop")) == (2, 0)
    tokens, marks = read_held_out(store, 64, "refuse", np.array([1]), 65)
    assert (marks[0, :64] >> 1).tolist() == [1] * 64 and tokens[0, 64] == marks[0, 64] == 0
    assert num_held_out_rows(write_store(tmp_path / "none", [20] * 3), 64, "cut") == 0


def masked_store(path, documents):
    from k2jax.data.store import Store
    from k2jax.data.store_writer import StoreWriter

    with StoreWriter(path, tokenizer_sha256="0" * 64, vocab_size=512, eos_id=0, masked=True) as writer:
        for i, mask in enumerate(documents):
            writer.add([7] * len(mask), id=f"{i:064x}", source=f"x.jsonl:{i}", eos=False, mask=mask)
        writer.finish()
    return Store.open(path)


def test_what_is_cut_before_its_answer_is_left_out(tmp_path):
    store = masked_store(tmp_path / "s", [[0] * 8 + [1] * 4, [0] * 3 + [1] * 9, [0, 1, 1]])
    packed = packing_of(store, 6, "cut")
    assert (packed.left_out, packed.cut, packed.num_tokens) == (1, 1, 6 + 3)


def test_an_empty_document_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="document 1 has 0 tokens"):
        packing_of(masked_store(tmp_path / "s", [[0, 1], [], [0, 1]]), 8, "cut")


def test_a_conversation_without_a_target_is_refused(tmp_path):
    check_targets(masked_store(tmp_path / "fine", [[0, 1], [1, 1, 0], [0, 0, 1]]))
    store = masked_store(tmp_path / "s", [[0, 1], [1, 0, 0], [0, 1, 1]])
    with pytest.raises(ConfigError, match=r"document 1 \(x.jsonl:1\) has nothing to learn behind its first token"):
        check_targets(store)


def test_another_packing_than_the_manifests_is_refused(stores):
    manifest = manifest_of(stores)
    manifest["stages"][0]["packing"] = 99
    with pytest.raises(ConfigError, match="is packed here, by version 1"):
        source(manifest, stores)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"stages.0.kind": "sft"}, "store 'books' holds text without a loss mask.*kind to 'pretrain'"),
        (
            {"stages.1.kind": "pretrain", "stages.1.reset_positions": False},
            "store 'sums' holds conversations, each by itself.*kind to 'sft'",
        ),
        ({"stages.1.sequence_length": 16}, "longer than a row of 16"),
    ],
)
def test_wrong_stores_are_refused_by_name(chat_data, change, what):
    with pytest.raises(ConfigError, match=what):
        open_data(load(chat_data, **change))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"stages.1.kind": "chat"}, "stages.1.kind='chat': must be one of pretrain, sft"),
        ({"stages.1.too_long": "truncate"}, "must be one of refuse, drop, cut"),
        ({"stages.0.too_long": "cut"}, "stages.0.too_long='cut': is for stages of kind 'sft'"),
        ({"stages.0.reset_positions": True}, "stages.0.reset_positions=True: is for stages of kind 'sft'"),
        ({"model.attention.implementation": "cudnn"}, "masks no documents"),
    ],
)
def test_keys_that_do_not_combine_are_refused(chat_data, change, what):
    with pytest.raises(ConfigError, match=what):
        load(chat_data, **change)


def test_rows_of_text_before_conversations_are_what_they_were(chat_data, tiny_data):
    """The order of a run's other stages has nothing of the sft stage, and a manifest without one none of its keys."""
    stores, manifest = open_data(load(chat_data))
    assert "kind" not in manifest["stages"][0] and manifest["stages"][1]["kind"] == "sft"
    alone = {**manifest, "stages": manifest["stages"][:1]}
    for step in range(1, 6):
        ours = BatchSource(Order(manifest), stores, label_shift="next", first_step=step, last_step=step)[0]
        other = BatchSource(Order(alone), stores, label_shift="next", first_step=step, last_step=step)[0]
        assert all(np.array_equal(ours[key], other[key]) for key in other) and "marks" not in ours
    assert T == manifest["stages"][1]["sequence_length"]


def test_each_epoch_of_a_subset_is_dealt_by_a_key_of_its_own(stores):
    manifest = manifest_of(stores)
    rows, order = ConversationRows(manifest, 0, stores), Order(manifest)
    found = order.rows(np.arange(order.num_positions))
    together = {}
    for name, here, placed in rows.placed(found):
        for row, epoch in enumerate(found.epoch[here].tolist()):
            together.setdefault((name, epoch), set()).add(frozenset(placed.document[placed.row == row].tolist()))
    assert {("b", 0), ("b", 1), ("b", 2)} <= together.keys()
    assert len(together["b", 0] & together["b", 1]) < len(together["b", 0]) / 5
    assert rows.key("a", 0) != rows.key("b", 0) != rows.key("b", 1)
