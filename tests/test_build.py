"""Documents become stores: the same bytes on any executor, with any workers, after any kill, and never half of it."""

import contextlib
import fcntl
import filecmp
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from k2jax.data.store import Store
from k2jax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_sha256
from k2jax.errors import ConfigError, StorageError
from k2jax.prepare import before, build, recipe
from k2jax.prepare.engine import engine

REPO = Path(__file__).parent.parent
WORDS = [a + b + c for a in ("ba", "ke", "lo", "tri") for b in ("na", "mo", "su") for c in ("", "r", "ting", "ly")]
NEAR = 6  # documents of the web that are a book's with one word changed
EXACT = 5  # documents of the web that are code's


def words(i: int, count: int) -> str:
    return " ".join(random.Random(i).choices(WORDS, k=count))


BOOKS = [f"Book {i} says </s> and \u2581.\n{words(i, 40 + 5 * i)}" for i in range(40)]
CODE = [f"def f{i}():\n    return {words(100 + i, 30)!r}\n" for i in range(30)]
WEB = [f"Page {i}: {words(200 + i, 60)}" for i in range(30)]
WEB += [book.replace("Book", "Buch") for book in BOOKS[20 : 20 + NEAR]] + CODE[:EXACT]

RECIPE = """from k2jax.prepare.recipe import base, subset


def get_config():
    c = base()
    c.vocab_size, c.tokenizer_bytes, c.validation_fraction, c.bucket_bytes = 330, 20_000, 0.2, 4000
    c.subsets.books = subset("text:{corpus}/books/**/*.txt", tasks=2)
    c.subsets.code = subset("jsonl:{corpus}/code.jsonl.gz", fim_rate=0.5, repeats=0.5)
    c.subsets.web = subset("jsonl:{corpus}/web/*.jsonl", tasks=3, priority=1, upsample=((2, 3),), licence="CC0-1.0")
    return c
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for i, text in enumerate(BOOKS):
        path = root / f"books/shelf{i % 3}/{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    with gzip.open(root / "code.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in CODE)
    (root / "web").mkdir()
    for part in range(4):
        rows = [{"text": text, "url": f"https://example.com/{i}"} for i, text in enumerate(WEB) if i % 4 == part]
        lines = [json.dumps(row) + "\n" for row in rows]
        (root / f"web/{part}.jsonl").write_text("".join(lines) + ("{not json\n" if part == 2 else ""))
    (root / "recipe.py").write_text(RECIPE.format(corpus=root))
    return root


@pytest.fixture(scope="module")
def config(corpus):
    return recipe.load_config(str(corpus / "recipe.py"))


@pytest.fixture(scope="module")
def made(config, tmp_path_factory):
    """A finished folder, by one worker, and what build() returned."""
    out = tmp_path_factory.mktemp("made") / "out"
    return out, build.build(config, out, workers=1)


def texts_of(out: Path, name: str) -> list[str]:
    """The documents of a store, in its order, back from their tokens."""
    store, tokenizer, texts = Store.open(out / name, verify="sha256"), load_tokenizer(out / "tokenizer.json"), []
    for i in range(store.num_documents):
        row = store.document(i)
        ids = store.read([row["start"]], row["num_tokens"])[0].tolist()
        assert ids[-1] == 2 and 2 not in ids[:-1]
        texts.append(tokenizer.decode(ids[:-1]))
        if row["metadata"].get("fim", {"mode": "plain"})["mode"] == "plain":
            assert row["id"] == hashlib.sha256(texts[-1].encode()).hexdigest()
    return texts


def different_files(a: Path, b: Path) -> list[str]:
    """Files of either folder that the other has not, or with other bytes."""
    one, other = ({str(path.relative_to(x)) for path in x.rglob("*") if path.is_file()} for x in (a, b))
    return sorted([*(one ^ other), *filecmp.cmpfiles(a, b, one & other, shallow=False)[1]])


def test_every_document_is_in_its_store_once_and_summed_up(made):
    out, (data, was_there) = made
    assert not was_there and data == json.loads((out / "data.json").read_text())
    assert sorted(texts_of(out, "books")) == sorted(BOOKS)
    web = texts_of(out, "web")
    assert sorted(web) == sorted(WEB[:30])
    assert len(texts_of(out, "code")) == len(CODE)
    assert sorted(data["stores"]) == ["books", "code", "web"], "no survivor of the web has copies: no web-x3"
    for name, row in data["stores"].items():
        store = Store.open(out / name)
        assert (row["tokens"], row["train_tokens"]) == (store.num_tokens, store.num_train_tokens)
        assert (row["root_digest"], row["documents"]) == (store.root_digest, store.num_documents)
        assert store.info["tokenizer_sha256"] == data["tokenizer_sha256"] == tokenizer_sha256(out / "tokenizer.json")
        assert 0 < row["train_tokens"] < row["tokens"]
    assert data["stores"]["books"]["bytes"] == sum(len(text.encode()) for text in BOOKS)
    assert data["mix"] == {"books": 1, "code": 0.5, "web": 1}
    counts = data["subsets"]["web"]
    assert counts["duplicates"]["steps"]["duplicates"]["removed"] == {
        "exact": {"documents": EXACT, "bytes": sum(len(text.encode()) for text in CODE[:EXACT])},
        "near": {"documents": NEAR, "bytes": sum(len(text.encode()) for text in WEB[30 : 30 + NEAR])},
    }
    assert sum(counts["clean"]["bad"].values()) == 1 and "web/2.jsonl" in f"web/{counts['clean']['problems'][0]}"
    assert f"{data['stores']['books']['tokens']:,}" in build.describe(data) and "5 exact" in build.describe(data)
    assert (out / "card/index.html").exists() and not (out / "stages").exists()


def test_documents_carry_where_they_are_from_and_what_was_removed_for_them(made):
    out, _ = made
    rows = {}
    for name in ("books", "code", "web"):
        store = Store.open(out / name)
        rows[name] = [store.document(i) for i in range(store.num_documents)]
    assert {row["source"] for row in rows["books"]} == {f"shelf{i % 3}/{i:02}.txt" for i in range(40)}
    assert {row["metadata"]["licence"] for row in rows["web"]} == {"CC0-1.0"}
    assert {row["metadata"]["url"] for row in rows["web"]} == {f"https://example.com/{i}" for i in range(30)}
    copied = [row["metadata"]["duplicates"] for row in rows["books"] if "duplicates" in row["metadata"]]
    assert len(copied) == NEAR and all(one["by"] == {"books": 1, "web": 1} for one in copied)
    copied = [row["metadata"]["duplicates"] for row in rows["code"] if "duplicates" in row["metadata"]]
    assert len(copied) == EXACT and all(one["copies"] == 2 and len(one["sources"]) == 1 for one in copied)


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_change_no_byte(made, config, tmp_path, workers):
    build.build(config, tmp_path / "out", workers=workers)
    assert different_files(made[0], tmp_path / "out") == []


def command(corpus: Path, out: Path, *options: str) -> subprocess.Popen:
    tool = [sys.executable, str(REPO / "tools/prepare_data.py"), f"--config={corpus}/recipe.py", f"--out={out}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*tool, *options], text=True, cwd=corpus, start_new_session=True, **pipes)


def ranks_done(out: Path) -> set[Path]:
    with contextlib.suppress(FileNotFoundError):  # the stages go when all is done
        return set(out.glob("stages/done/*/completions/*"))
    return set()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.processes
def test_kills_at_any_moment_change_no_byte(made, corpus, tmp_path, workers):
    out, kills, draw = tmp_path / "out", 0, random.Random(workers)
    while True:
        program = command(corpus, out, f"--workers={workers}")
        seen = ranks_done(out)
        wanted = draw.randint(1, 6)  # ranks to see done before the kill, then a moment in the next
        while program.poll() is None and len(ranks_done(out) - seen) < wanted:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.1)
        if program.poll() is not None:
            break
        os.killpg(program.pid, signal.SIGKILL)
        program.communicate()
        kills += 1
    output, errors = program.communicate()
    assert (program.returncode, errors) == (0, ""), "and no progress bar where nobody looks"
    assert kills >= 4 and "finished" in output  # "finished earlier" if the last kill came behind data.json
    assert different_files(made[0], out) == []


def test_a_finished_folder_is_left_as_it_is(made, config, corpus, monkeypatch):
    out, (data, _) = made
    monkeypatch.setattr(build.clean, "check", None)  # the documents may be gone by now: nobody looks for them
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert build.build(config, out) == (data, True)
    program = command(corpus, out)
    assert "left as it is" in program.communicate()[0] and program.returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_another_recipe_or_a_changed_file_is_refused_by_name(made, config):
    out, _ = made
    other = config.copy_and_resolve_references()
    other.seed = 5
    with pytest.raises(ConfigError, match="seed was 22238, is 5.: that begins again at stage files/books, "):
        build.build(other, out)
    tokenizer = (out / "tokenizer.json").read_text()
    (out / "tokenizer.json").write_text(tokenizer + " ")
    with pytest.raises(ConfigError, match="tokenizer.json has digest"):
        build.build(config, out)
    (out / "tokenizer.json").write_text(tokenizer)
    whole = (out / "data.json").read_text()
    (out / "data.json").write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        build.build(config, out)
    (out / "data.json").write_text(whole)


def test_what_was_begun_goes_on_by_one_process_and_with_the_same_code(made, config, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def stop(self, stage):
        if stage.name == "kept":
            raise StorageError("stopped here")
        engine_run(self, stage)

    engine_run = engine.Engine.run
    monkeypatch.setattr(engine.Engine, "run", stop)
    with pytest.raises(StorageError, match="stopped here"):
        build.build(config, out, workers=1)
    with open(out / "stages/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            build.build(config, out, workers=1)
    begun = out / "stages/recipe.json"
    ours = begun.read_text()
    begun.write_text(json.dumps(json.loads(ours) | {"code": ["0" * 64]}))
    with pytest.raises(ConfigError, match="begun by another version of k2jax .code 000000000000, .*--other_code"):
        build.build(config, out, workers=1)
    with pytest.raises(StorageError, match="stopped here"):
        build.build(config, out, workers=1, other_code=True)
    assert json.loads(begun.read_text())["code"] == ["0" * 64, *json.loads(ours)["code"]], "it is recorded"
    begun.write_text(ours)
    monkeypatch.undo()
    for half_written in ("tokenizer.json.new-host-1", "card/index.html.new-host-1"):
        (out / half_written).parent.mkdir(exist_ok=True)
        (out / half_written).write_text("half")
    build.build(config, out, workers=1)
    assert different_files(made[0], out) == []


def test_of_equal_priorities_the_recipes_order_counts(tmp_path):
    """By name "web" is behind "archive": the curated copy was lost to whatever was called so."""
    for name in ("web", "archive"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "The same text in both of them. " * 20}) + "\n")
    config = recipe.base()
    config.vocab_size, config.validation_fraction = 320, 0.0
    for name in ("web", "archive"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.txt").write_text(f"Only {name} has this text, and nobody else has it. " * 20)
    for name in ("web", "archive"):
        (tmp_path / f"{name}.jsonl").rename(tmp_path / name / "both.txt")
        config.subsets[name] = recipe.subset(f"text:{tmp_path}/{name}/*.txt")
    recipe.validate(config)
    data, _ = build.build(config, tmp_path / "out", workers=1)
    assert {name: store["documents"] for name, store in data["stores"].items()} == {"web": 2, "archive": 1}
    assert {name: chosen["priority"] for name, chosen in data["config"]["subsets"].items()} == {"web": 0, "archive": 1}
    assert build.build(config, tmp_path / "out", workers=1)[1], "the same recipe again"


def test_a_folder_with_other_files_is_refused_and_kept(config, tmp_path):
    (tmp_path / "out/all").mkdir(parents=True)
    (tmp_path / "out/all/thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no preparation of ours"):
        build.build(config, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["all", "thesis.txt"]


def test_an_output_that_cannot_be_written_is_one_line(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/out"):
        build.build(config, tmp_path / "file/out")


def test_a_subset_of_which_nothing_stays_is_named_before_the_long_stages(config, tmp_path):
    c = config.copy_and_resolve_references()
    c.unlock()
    c.subsets.web.min_document_bytes = 10_000
    with pytest.raises(ConfigError, match=r"subset web: .* gave no document \(.*41 too short"):
        build.build(c.lock(), tmp_path / "out", workers=1)
    assert not (tmp_path / "out/tokenizer.json").exists()


def test_a_tokenizer_of_another_place_is_used_as_it_is(made, config, tmp_path):
    c = config.copy_and_resolve_references()
    c.tokenizer = str(tmp_path / "other.json")
    (tmp_path / "other.json").write_text(json.dumps(json.loads((made[0] / "tokenizer.json").read_text()), indent=3))
    data, _ = build.build(c, tmp_path / "out", workers=1)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "other.json").read_bytes()
    tokens = {name: row["tokens"] for name, row in data["stores"].items()}
    assert tokens == {name: row["tokens"] for name, row in made[1][0]["stores"].items()}


def test_a_sentencepiece_model_encodes_the_documents_and_readers_agree(config, corpus, tmp_path, monkeypatch):
    """Code cut for FIM in K2's way, with K2's tokens behind a model such as LLaMA's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("transformers")
    options = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity"}
    options |= {"remove_extra_whitespaces": False, "minloglevel": 3, "user_defined_symbols": ["<mask>"]}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(BOOKS), model_prefix=str(tmp_path / "llama"), **options
    )
    c = config.copy_and_resolve_references()
    c.unlock()
    c.tokenizer, c.add_k2_tokens, c.eos = str(tmp_path / "llama.model"), True, "</s>"
    data, _ = build.build(c.lock(), tmp_path / "out", workers=1)
    assert data["vocab_size"] == 418 and data["eos_id"] == 2
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "llama.model"))
    store, expected = Store.open(tmp_path / "out/books"), sorted([*library.encode(text), 2] for text in BOOKS)
    rows = [store.document(i) for i in range(store.num_documents)]
    assert sorted(store.read([row["start"]], row["num_tokens"])[0].tolist() for row in rows) == expected
    modes = {row["metadata"]["fim"]["mode"] for row in map(Store.open(tmp_path / "out/code").document, range(30))}
    assert modes == {"plain", "psm", "spm"}

    # A tokenizer.json that gives other ids than its model: as the converter might make.
    changed = json.loads((tmp_path / "out/tokenizer.json").read_text())
    changed["model"]["merges"] = changed["model"]["merges"][::-1]
    monkeypatch.setattr(before, "open_tokenizer", lambda _: Tokenizer(json.dumps(changed)))
    with pytest.raises(ConfigError, match=r"document .*\.(txt|gz|jsonl).*: token .* by SentencePiece and"):
        build.build(c, tmp_path / "other", workers=1)
    assert not (tmp_path / "other/data.json").exists()


def test_documents_end_with_the_token_that_the_recipe_names(made, config, tmp_path):
    both = Tokenizer((made[0] / "tokenizer.json").read_text()).with_control_tokens(["<|endoftext|>", "<|im_end|>"])
    both.save(tmp_path / "both.json")
    c = config.copy_and_resolve_references()
    c.tokenizer = str(tmp_path / "both.json")
    with pytest.raises(ConfigError, match=r"</s> and <\|endoftext\|> of its control tokens .* name it by the key eos"):
        build.build(c, tmp_path / "none", workers=1)
    assert not (tmp_path / "none/stages/clean").exists(), "told before the long stages"
    c.eos = "<|im_end|>"
    data, _ = build.build(c, tmp_path / "out", workers=1)
    assert data["eos_id"] == both.token_to_id("<|im_end|>") == 331
    assert Store.open(tmp_path / "out/books").info["eos_id"] == 331


def test_a_folder_from_before_there_was_eos_is_finished(made, config, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made[0], out)
    data = json.loads((out / "data.json").read_text())
    del data["config"]["eos"]
    (out / "data.json").write_text(json.dumps(data))
    assert build.build(config, out)[1]


def test_released_chunks_become_stores_beside_text(made, tmp_path):
    """LLM360's rows keep their place: window w of a store is its row w."""
    draw = random.Random(5)
    rows = [[draw.randrange(3, 330) for _ in range(32)] for _ in range(24)]
    lines = [{"token_ids": row, "subset_name": "ab"[i % 2], "source": "k2"} for i, row in enumerate(rows)]
    (tmp_path / "chunk_0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{bad\n")
    (tmp_path / "text.txt").write_text(BOOKS[0])
    c = recipe.base()
    c.tokenizer, c.validation_fraction = str(made[0] / "tokenizer.json"), 0.0
    c.subsets.k2 = recipe.subset(f"llm360:{tmp_path}/chunk_*.jsonl", repeats=3)
    c.subsets.plain = recipe.subset(f"text:{tmp_path}/text.txt")
    recipe.validate(c)
    data, _ = build.build(c, tmp_path / "out", workers=1)
    assert data["mix"] == {"k2-a": 3, "k2-b": 3, "plain": 1}
    for name, offset in (("k2-a", 0), ("k2-b", 1)):
        store = Store.open(tmp_path / "out" / name)
        found = store.read(range(0, store.num_tokens, 32), 32).tolist()
        assert sorted(found) == sorted(rows[offset::2])
    assert sum(data["subsets"]["k2"]["tokens"]["bad"].values()) == 1
    assert "left out of k2: 1" in build.describe(data) and "k2-a" in (tmp_path / "out/card/data.md").read_text()


def test_wrong_commands_end_in_one_line(corpus, tmp_path):
    program = command(tmp_path, tmp_path / "out")
    output, errors = program.communicate()
    assert program.returncode == 78 and errors.startswith("error: ") and errors.count("\n") == 1
    program = command(corpus, tmp_path / "out", "--executor=slurm")
    output, errors = program.communicate()
    assert program.returncode == 78 and "no sbatch" in errors and not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_is_an_error_and_leaves_nothing_finished(config, corpus, tmp_path):
    """`ulimit -f`: no file may be larger, as on a disk that is full."""
    tool = f"{sys.executable} {REPO}/tools/prepare_data.py --config={corpus}/recipe.py --out={tmp_path}/out"
    shell = ["bash", "-c", f"trap '' XFSZ; ulimit -f 8; exec {tool} --workers=1"]
    limited = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert limited.returncode == 74, limited.stderr
    assert limited.stderr.startswith("error: ") and limited.stderr.count("\n") == 1
    assert not (tmp_path / "out/data.json").exists()
