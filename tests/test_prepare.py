"""Documents become stores, all of them exactly and in a fair order; nothing half-made or foreign is ever used."""

import fcntl
import filecmp
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from k2jax.data import prepare as pp
from k2jax.data.store import Store, StoreWriter
from k2jax.data.tokenizer import load_tokenizer, tokenizer_sha256
from k2jax.errors import ConfigError, StorageError

REPO = Path(__file__).parent.parent
WORDS = [
    a + b + c for a in ("ba", "ke", "lo", "tri") for b in ("na", "mo", "su") for c in ("", "r", "ting", "ly")
]
TEXTS = {
    f"part{i % 3}/{i:02}.txt": f"Document {i} says </s> and \u2581.\n"
    + " ".join(WORDS[(i * 7 + k * k) % 48] for k in range(5 * i))
    for i in range(40)
}


@pytest.fixture
def corpus(tmp_path):
    for name, text in TEXTS.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "corpus"


@pytest.fixture
def config(corpus):
    c = pp.base()
    c.vocab_size = 320
    c.validation_fraction = 0.2
    c.subsets.all = pp.subset(f"text:{corpus}/**/*.txt")
    return c.lock()


def decoded(out, name):
    """{source: text} of a store, in its order, read back through tokens."""
    store, tokenizer, texts = Store.open(out / name), load_tokenizer(out / "tokenizer.json"), {}
    for i in range(store.num_documents):
        document = store.document(i)
        ids = store.read([document["start"]], document["num_tokens"])[0].tolist()
        assert ids[-1] == 2 and 2 not in ids[:-1]
        texts[document["source"]] = tokenizer.decode(ids[:-1])
        assert document["id"] == hashlib.sha256(texts[document["source"]].encode()).hexdigest()
    return texts


def same_bytes(a, b):
    names = [str(path.relative_to(a)) for path in a.rglob("*") if path.is_file()]
    return sorted(names) == sorted(
        str(path.relative_to(b)) for path in b.rglob("*") if path.is_file()
    ) and not any(filecmp.cmpfiles(a, b, names, shallow=False)[1:])


def test_every_document_is_stored_exactly_and_summed_up(config, tmp_path):
    data, was_there = pp.prepare(config, tmp_path / "out")
    assert not was_there and data == json.loads((tmp_path / "out/data.json").read_text())
    texts = decoded(tmp_path / "out", "all")
    assert texts == TEXTS
    row, store = data["subsets"]["all"], Store.open(tmp_path / "out/all", verify="sha256")
    assert row["documents"] == 40 and row["bytes"] == sum(len(text.encode()) for text in TEXTS.values())
    assert (row["tokens"], row["train_tokens"], row["root_digest"]) == (
        store.num_tokens,
        store.num_train_tokens,
        store.root_digest,
    )
    assert data["tokenizer_sha256"] == tokenizer_sha256(tmp_path / "out/tokenizer.json")
    assert store.summary().tokenizer_sha256 == data["tokenizer_sha256"]
    assert not (tmp_path / "out" / pp.MARKER).exists()
    assert f"{row['tokens']:,}" in pp.describe(data)


def test_the_order_is_drawn_by_the_seed_so_that_the_end_is_a_fair_sample(config, tmp_path):
    pp.prepare(config, tmp_path / "a")
    other = config.copy_and_resolve_references()
    other.seed = 1
    pp.prepare(other, tmp_path / "b")
    first, second = (list(decoded(tmp_path / out, "all")) for out in "ab")
    assert sorted(first) == sorted(second) == sorted(TEXTS)
    assert first != second != sorted(TEXTS) != first
    assert len({name.split("/")[0] for name in first[-15:]}) == 3


def test_the_same_documents_give_the_same_bytes(config, tmp_path):
    pp.prepare(config, tmp_path / "a")
    pp.prepare(config, tmp_path / "b")
    assert same_bytes(tmp_path / "a", tmp_path / "b")


def test_small_batches_change_nothing(config, tmp_path, monkeypatch):
    pp.prepare(config, tmp_path / "a")
    monkeypatch.setattr(pp, "BATCH_BYTES", 300)
    pp.prepare(config, tmp_path / "b")
    assert same_bytes(tmp_path / "a", tmp_path / "b")


def test_two_subsets_never_share_a_text_and_max_bytes_is_kept(config, corpus, tmp_path):
    c = config.copy_and_resolve_references()
    c.unlock()
    c.tokenizer_bytes = 3000
    c.subsets.few = pp.subset(f"text:{corpus}/part0/*.txt", max_bytes=5000)
    data, _ = pp.prepare(c, tmp_path / "out")
    everything, few = decoded(tmp_path / "out", "all"), decoded(tmp_path / "out", "few")
    assert not set(everything.values()) & set(few.values())
    assert 0 < data["subsets"]["few"]["bytes"] <= 5000
    assert set(everything.values()) | set(few.values()) <= set(TEXTS.values())


def test_a_finished_folder_is_left_as_it_is(config, tmp_path):
    data, _ = pp.prepare(config, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert pp.prepare(config, tmp_path / "out") == (data, True)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


@pytest.mark.parametrize("failing", ["finish", "add"])
def test_an_unfinished_folder_is_started_again(config, tmp_path, monkeypatch, failing):
    pp.prepare(config, tmp_path / "whole")
    other = config.copy_and_resolve_references()
    other.unlock()
    other.subsets.old = other.subsets.all
    del other.subsets["all"]
    with monkeypatch.context() as patch:
        patch.setattr(
            StoreWriter, failing, lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left"))
        )
        for interrupted in (other, config):
            with pytest.raises(StorageError, match="No space left"):
                pp.prepare(interrupted, tmp_path / "out")
            assert not (tmp_path / "out/data.json").exists()
    pp.prepare(config, tmp_path / "out")
    assert same_bytes(tmp_path / "whole", tmp_path / "out")


def test_a_folder_with_other_files_is_refused_and_kept(config, tmp_path):
    (tmp_path / "out/all").mkdir(parents=True)
    (tmp_path / "out/all/thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no preparation of ours"):
        pp.prepare(config, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["all", "thesis.txt"]


def test_two_processes_do_not_share_a_folder(config, tmp_path):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / pp.MARKER, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            pp.prepare(config, tmp_path / "out")


def test_another_configuration_or_a_changed_file_is_refused_by_name(config, tmp_path):
    out = tmp_path / "out"
    pp.prepare(config, out)
    other = config.copy_and_resolve_references()
    other.seed = 5
    with pytest.raises(ConfigError, match="seed was 22238, asked for is 5"):
        pp.prepare(other, out)
    tokenizer = (out / "tokenizer.json").read_text()
    (out / "tokenizer.json").write_text(tokenizer + " ")
    with pytest.raises(ConfigError, match="tokenizer.json has digest"):
        pp.prepare(config, out)
    (out / "tokenizer.json").write_text(tokenizer)
    (out / "all/store.json").unlink()
    with pytest.raises(ConfigError, match="store.json"):
        pp.prepare(config, out)
    (out / "data.json").write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        pp.prepare(config, out)


def test_an_output_that_cannot_be_written_or_is_no_folder_is_one_line(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/out"):
        pp.prepare(config, tmp_path / "file/out")
    with pytest.raises(ConfigError, match="local folder"):
        pp.prepare(config, "gs://bucket/data")


def test_a_source_without_documents_names_the_subset(config, tmp_path):
    c = config.copy_and_resolve_references()
    c.unlock()
    c.subsets.none = pp.subset(f"text:{tmp_path}/nowhere/*.md")
    with pytest.raises(ConfigError, match="subset none: .*nowhere.* gave no document"):
        pp.prepare(c, tmp_path / "out")


def test_all_problems_of_a_configuration_are_named_at_once(config):
    c = config.copy_and_resolve_references()
    c.unlock()
    c.subsets["Bad/Name"] = pp.subset("python:rust", max_bytes=-1)
    c.vocab_size, c.validation_fraction = 5, 1.5
    with pytest.raises(ConfigError) as error:
        pp.validate(c)
    for part in (
        "5 problem",
        "vocab_size=5",
        "validation_fraction=1.5",
        "Bad/Name",
        "python:rust",
        "max_bytes=-1",
    ):
        assert part in str(error.value)
    by_hand = ConfigDict({"vocab_sise": 320, "seed": "one", "validation_fraction": 0, "subsets": {}})
    with pytest.raises(
        ConfigError, match="vocab_sise, did you mean 'vocab_size'.*seed='one'.*tokenizer_bytes is mi"
    ):
        pp.validate(by_hand)
    by_hand.subsets = ConfigDict({"a": {"source": "python:code"}})
    with pytest.raises(ConfigError, match="3 problem.*subsets.a.max_bytes is missing"):
        pp.validate(ConfigDict({**pp.base(), "subsets": by_hand.subsets}))


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1", "does not define get_config"),
        ("def get_config(:", "SyntaxError"),
        (
            "from k2jax.data.prepare import base\ndef get_config():\n    c = base(); c.vocab_sise = 3",
            "vocab_sise",
        ),
        (
            "from k2jax.data.prepare import base, subset\ndef get_config():\n    return subset('a', max_size=3)",
            "max_size",
        ),
        ("from k2jax.data.prepare import base as get_config", "subsets: empty"),
        ("def get_config():\n    pass", "returned NoneType"),
        (
            "from k2jax.data.prepare import base\ndef get_config():\n"
            "    c = base(); c.subsets.a = 'python:code'; return c",
            "subsets.a='python:code': must be made by subset",
        ),
    ],
)
def test_a_wrong_data_experiment_is_one_line(tmp_path, text, message):
    (tmp_path / "wrong.py").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        pp.load_config(str(tmp_path / "wrong.py"))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="no such data experiment"):
        pp.load_config(str(tmp_path / "missing.py"))


def test_the_command_says_what_it_did_and_its_exit_code_tells(config, corpus, tmp_path):
    experiment = tmp_path / "mine.py"
    experiment.write_text(
        "from k2jax.data.prepare import base, subset\ndef get_config():\n    c = base()\n    c.vocab_size = 320\n"
        f"    c.subsets.all = subset('text:{corpus}/**/*.txt')\n    return c\n"
    )

    def command(config_path):
        return subprocess.run(
            [
                sys.executable,
                str(REPO / "tools/prepare_data.py"),
                f"--config={config_path}",
                f"--out={tmp_path}/out",
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )

    first, second, wrong = command(experiment), command(experiment), command(tmp_path / "missing.py")
    assert (first.returncode, first.stderr) == (0, ""), "no progress bar where nobody looks"
    assert "finished;" in first.stdout and "all" in first.stdout
    assert second.returncode == 0 and "left as it is" in second.stdout
    assert wrong.returncode == 78 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1


def test_the_shipped_data_experiment_is_valid():
    config = pp.load_config(str(REPO / "experiments/data/smoke.py"))
    assert sorted(config.subsets) == ["code", "docstrings", "documentation"] and config.vocab_size == 4096
