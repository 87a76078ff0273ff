"""What would end a preparation after hours ends it before its first stage, in one line, with nothing written."""

import json
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from k2jax.data.tokenizer import K2_SPECIAL_TOKENS, Tokenizer, train_bpe  # noqa: E402
from k2jax.errors import ConfigError, RunError, StorageError  # noqa: E402
from k2jax.prepare import before, build, dry_run, recipe  # noqa: E402
from k2jax.prepare.engine import engine  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Documents, and tokenizers of many kinds."""
    root = tmp_path_factory.mktemp("before")
    (root / "a.txt").write_text("A document of some words. " * 30)
    whole = train_bpe([(root / "a.txt").read_text() * 9], 310)
    whole.save(root / "whole.json")
    without = json.loads(whole.to_str())
    fim = [token["content"] for token in without["added_tokens"] if "fim" in token["content"]]
    for name, gone in (("no_fim", fim), ("no_eos", ["</s>"]), ("llama", K2_SPECIAL_TOKENS)):
        changed = json.loads(whole.to_str())
        kept = [token for token in changed["added_tokens"] if token["content"] not in gone]
        vocab = {token: id for token, id in changed["model"]["vocab"].items() if token not in gone}
        numbers = {id: number for number, id in enumerate(sorted([*vocab.values(), *_extra(kept, vocab)]))}
        changed["model"]["vocab"] = {token: numbers[id] for token, id in vocab.items()}
        changed["added_tokens"] = [{**token, "id": numbers[token["id"]]} for token in kept]
        (root / f"{name}.json").write_text(json.dumps(changed))
    (root / "broken.json").write_text(whole.to_str()[:500])
    (root / "latin.json").write_bytes(b'{"name": "\xe9"}')
    return root


def _extra(added: list[dict], vocab: dict[str, int]) -> set[int]:
    return {token["id"] for token in added} - set(vocab.values())


def config_of(folder: Path, tokenizer: str, **keys):
    c = recipe.base()
    c.tokenizer = tokenizer and str(folder / tokenizer)
    c.subsets.text = recipe.subset(f"text:{folder}/a.txt")
    for key, value in keys.items():
        section, _, last = key.rpartition("__")
        (c.subsets.text if section else c)[last] = value
    return c.lock()


@pytest.mark.parametrize(
    ("tokenizer", "keys", "expected"),
    [
        ("none.json", {}, "none.json: no such file"),
        ("broken.json", {}, "broken.json: cannot be read as a tokenizer.json"),
        ("latin.json", {}, "latin.json: cannot be read"),
        (".", {}, "cannot be read"),
        ("no_eos.json", {}, "none of its control tokens can end a document, .*: name it by the key eos"),
        ("whole.json", {"eos": "<|end|>"}, "eos='<|end|>' is none of its control tokens"),
        ("no_fim.json", {"subset__fim_rate": 0.5}, "no control token <fim_prefix>, which fim_rate needs"),
        ("none.model", {}, "none.model"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_ends_it_before_anything_is_written(
    folder, tmp_path, monkeypatch, tokenizer, keys, expected
):
    monkeypatch.setattr(engine.Engine, "run", None)
    c = config_of(folder, tokenizer, **keys)
    for look in (lambda: build.build(c, tmp_path / "out", workers=1), lambda: dry_run.look(c, tmp_path / "out")):
        with pytest.raises(ConfigError, match=expected) as error:
            look()
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_vocabulary_that_grows_is_said(folder, capsys):
    c = config_of(folder, "llama.json", add_k2_tokens=True)
    found = before.given(c).tokenizer
    bare = Tokenizer((folder / "llama.json").read_text())
    more = found.vocab_size - bare.vocab_size
    said = capsys.readouterr().err
    assert more > 0 and f"has {bare.vocab_size:,} ids and gets {more} more" in said and said.count("\n") == 1
    assert f"vocab_size={found.vocab_size}" in said
    before.given(config_of(folder, "whole.json", add_k2_tokens=True))
    assert capsys.readouterr().err == "", "it has them all"


def test_an_output_that_cannot_be_written_is_found_first_and_nothing_is_left(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(build.plan, "facts", None)  # sources are not even listed
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/out: .* cannot be written"):
        build.build(config_of(folder, ""), tmp_path / "file/out")
    with pytest.raises(StorageError, match="cannot be written"):
        before.check_writable(Path("/proc/k2jax/out"))
    before.check_writable(tmp_path / "new/out")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("source", "out", "name"),
    [
        ("text:{}", "out", "data.json"),
        ("text:{}/", "a/b", "data.json"),
        ("warc:{}", "out", "data.json"),  # whose next listing would end at them
        ("text:file://{}", "out", "data.json"),
        ("text:{}/**", "out", "data.json"),
        ("text:{}/**/*.json", "out", "data.json"),
        ("text:{}/*/*.json", "out", "data.json"),
        ("jsonl:{}/**.jsonl", "out", None),  # no pattern: the listing says so
        ("jsonl:{}/**/*.jsonl", "out", "stages/files/text.jsonl"),
        ("jsonl:{}/**/*.zst", "out", "stages/clean/documents/00000.jsonl.zst"),
        ("parquet:{}/**/*.parquet", "out", "text/documents.parquet"),
        ("text:{}/l", "out", "data.json"),  # a link to the folder
        ("text:{}/.h/**", ".h/out", "data.json"),
        ("text:{}/r[1]", "r[1]/out", "data.json"),  # a folder's name, and no pattern
        ("text:{}", ".h/out", None),
        ("text:{}/**/*.txt", "out", None),
        ("text:{}/*", "out", None),
        ("text:{}/a", "out", None),
        ("text:{}/a", "ab", None),
        ("text:{}/x.txt", "out", None),
        ("python:code", "out", None),
        ("text:gs://{}", "out", None),
    ],
)
def test_a_folder_in_its_own_source_is_refused(folder, tmp_path, source, out, name):
    root = tmp_path / "root"
    for made in ("a", ".h", "r[1]"):
        (root / made).mkdir(parents=True)
    (root / "x.txt").write_text("x")
    (root / "l").symlink_to(root)
    c = config_of(folder, "", subset__source=source.format(root))
    if name is None:
        return before.check_apart(c, root / out)
    said = f"^subsets.text.source=.*: --out=.*/{re.escape(out)} lies in it, and {name} there"
    with pytest.raises(ConfigError, match=said):
        before.check_apart(c, root / out)
    c = config_of(folder, "").unlock()
    c.contamination.sources = (source.format(root),)
    with pytest.raises(ConfigError, match="^contamination.sources="):
        before.check_apart(c, root / out)


def test_a_preparation_writes_nothing_of_which_that_does_not_know(folder, tmp_path):
    """A name's end in a folder of it."""
    c = config_of(folder, "").unlock()
    c.vocab_size, c.subsets.text.max_bytes = 300, 5000
    build.build(c.lock(), tmp_path / "out", workers=1, keep_stages=True)
    ends = {Path(one).suffix for one in before.WRITTEN}
    found = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(found) > 30 and {path.suffix for path in found} <= ends
    known = {Path(one.format(store="text")) for one in before.WRITTEN} - {Path(before.TEMPLATE)}
    missing = {path for path in known - {*found} if path.parts[1] not in ("unreadable",)}
    assert not missing, "what is not written any more"


@pytest.mark.parametrize("source", ["jsonl:/nowhere/x.jsonl", "arrow:/nowhere"])
def test_a_dry_run_refuses_what_the_command_does(folder, tmp_path, source):
    c = config_of(folder, "", subset__source=source)
    with pytest.raises(RunError) as first:
        build.build(c, tmp_path / "out", workers=1)
    with pytest.raises(RunError) as second:
        dry_run.look(c, tmp_path / "out")
    assert str(first.value) == str(second.value)
