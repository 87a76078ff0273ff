"""A changed recipe in the folder of another one: what comes out is what a fresh folder gets, and only what follows from
the change is done again."""

import gzip
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("datatrove")

from ml_collections import ConfigDict  # noqa: E402
from test_build import command, different_files, ranks_done, words  # noqa: E402

from k2jax import files, locks  # noqa: E402
from k2jax.data.tokenizer import train_bpe  # noqa: E402
from k2jax.errors import ConfigError, StorageError  # noqa: E402
from k2jax.prepare import build, dry_run, finished, reads, recipe, work  # noqa: E402

PAGES = [f"Page {i}: {words(200 + i, 60)}" for i in range(16)]
BOOKS = [f"Book {i}.\n{words(i, 40 + 5 * i)}" for i in range(12)] + [page.replace("Page", "Leaf") for page in PAGES[:2]]
CODE = [f"def f{i}():\n    return {words(100 + i, 30)!r}\n" for i in range(10)]
TOKENS = {"tokens", "shards", "stores"}
KEPT = {"kept", "tokenizer", *TOKENS}
CLEAN = {"clean", "deduplicate", "shared", "card", *KEPT}
LIMITS = {"files", *CLEAN}  # there are tasks of dealing out only where limits are to be found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Three subsets, evaluation sets, two tokenizers."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "books").mkdir()
    for i, text in enumerate(BOOKS):
        (root / f"books/{i:02}.txt").write_text(text, encoding="utf-8")
    with gzip.open(root / "code.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in CODE)
    (root / "web").mkdir()
    for part in range(4):
        own = [(i, text) for i, text in enumerate(PAGES) if i % 4 == part]
        rows = [{"text": text, "url": f"https://{'ab'[i // 4 % 2]}.example/{i}"} for i, text in own]
        (root / f"web/{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "extra.txt").write_text(f"Extra: {words(500, 90)}")
    (root / "blocked").write_text("a.example\n")
    (root / "evaluation.jsonl").write_text(json.dumps({"question": " ".join(PAGES[3].split()[:20])}) + "\n")
    for name, texts in (("books", BOOKS), ("code", CODE)):
        train_bpe(texts, 330).save(root / f"{name}.json")
    return root


RECIPE = """from pathlib import Path

import sys
sys.path.insert(0, {tests!r})
from test_resume import recipe_of


def get_config():
    c = recipe_of(Path({corpus!r})).unlock()
    c.subsets.books.nfc, c.subsets.web.max_bytes, c.validation_fraction = True, 4000, 0.3
    c.subsets.code.upsample = ((2, 3),)
    return c.lock()
"""


def recipe_of(corpus: Path) -> ConfigDict:
    c = recipe.base()
    c.vocab_size, c.tokenizer_bytes, c.validation_fraction, c.bucket_bytes, c.dedup.bands = 330, 9_000, 0.2, 3000, 2
    c.subsets.books = recipe.subset(f"text:{corpus}/books/*.txt", tasks=2, drop_shared="lines")
    c.subsets.code = recipe.subset(f"jsonl:{corpus}/code.jsonl.gz", fim_rate=0.5)
    c.subsets.web = recipe.subset(
        f"jsonl:{corpus}/web/*.jsonl", tasks=2, priority=1, max_bytes=5000, url_blocklist=f"{corpus}/blocked"
    )
    return c


def keys_given(stage: work.Stage) -> set[str]:
    """The keys of the recipe that a stage's tasks are given."""
    values = [*stage.function.args, *stage.function.keywords.values()]
    given = [one for one in values if isinstance(one, (dict, ConfigDict)) and "subsets" in one]
    return {key for one in given for key in reads.flat(ConfigDict(one).to_dict())}


@pytest.fixture(scope="module")
def run() -> list[tuple[str, work.Stage]]:
    """The stages that made `begun`, with the names of their units."""
    return []


@pytest.fixture(scope="module")
def begun(corpus, run, tmp_path_factory) -> Path:
    """A finished folder with its stages."""
    out = tmp_path_factory.mktemp("begun") / "out"
    really = work.Work.run

    def noting(self, stage, name=""):
        run.append((self.name_of(stage, name), stage))
        really(self, stage, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work.Work, "run", noting)
        build.build(recipe_of(corpus).lock(), out, workers=1, keep_stages=True)
    return out


def test_a_task_is_given_no_key_that_its_stage_is_not_compared_by(begun, run):
    """But those that change nothing of what comes out. Seen red with the whole recipe given to `tokens`."""
    rows, seen = json.loads((begun / "stages/made.json").read_bytes()), set()
    for name, stage in run:
        compared = {key for unit, row in rows.items() if unit.partition("/")[0] == name for key in row["reads"]}
        if name == "files":  # of the subsets that have no limit, too
            compared |= {key.replace("web", other) for key in compared for other in ("books", "code")}
        given = {key for key in keys_given(stage) if stage.tasks and key.rpartition(".")[2] != "max_unreadable"}
        assert given <= compared, f"{stage.name}: {sorted(given - compared)}"
        seen |= {name} if given else set()
    assert seen == {"files", "clean", "tokenizer", "tokens", "stores"}


def marks(out: Path) -> dict[str, dict[str, int]]:
    """When each rank of each stage was done; those of steps by their stage's name."""
    rows = json.loads((out / "stages/made.json").read_bytes())
    stage_of = {step: unit.partition("/")[0] for unit, row in rows.items() for step in row["stages"]}
    found: dict[str, dict[str, int]] = {}
    for path in out.glob("stages/done/*/completions/*"):
        step, rank = path.parts[-3], path.name
        stage = stage_of[step]
        found.setdefault(stage, {})[rank if step == stage else f"{step} {rank}"] = path.stat().st_mtime_ns
    return found


def done_again(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> dict[str, list[str]]:
    """{stage: ranks} that ran between the two."""
    found = {
        stage: sorted(rank for rank, when in ranks.items() if before.get(stage, {}).get(rank) != when)
        for stage, ranks in after.items()
    }
    return {stage: ranks for stage, ranks in found.items() if ranks}


class Change(NamedTuple):
    """Of the recipe, or of files; `again` are the stages that it redoes."""

    name: str
    make: Callable[[ConfigDict, Path], None]
    again: set[str]


def change(name: str, again: set[str]):
    return lambda make: CHANGES.append(Change(name, make, again))


CHANGES: list[Change] = []


@change("repeats", set())
def _(c, corpus):
    c.subsets.code.repeats = 3.0


@change("slurm", set())
def _(c, corpus):
    c.slurm.partition, c.subsets.web.max_unreadable = "cpu", 4


@change("validation", {"stores"})
def _(c, corpus):
    c.validation_fraction = 0.4


@change("upsample", TOKENS)
def _(c, corpus):
    c.subsets.books.upsample = ((2, 3),)


@change("fim", TOKENS)
def _(c, corpus):
    c.subsets.code.fim_stores, c.subsets.code.fim_rate = True, 0.9


@change("vocabulary", {"tokenizer", *TOKENS})
def _(c, corpus):
    c.vocab_size = 340


@change("tokenizer", TOKENS)
def _(c, corpus):
    c.tokenizer = f"{corpus}/code.json"


@change("lines that fewer share", {"shared", *KEPT})
def _(c, corpus):
    c.shared.most = 1


@change("lines of one subset more", {"shared", *KEPT})
def _(c, corpus):
    c.subsets.code.drop_shared = "paragraphs"


@change("lines of none", KEPT)
def _(c, corpus):
    c.subsets.books.drop_shared = ""


@change("buckets", KEPT)
def _(c, corpus):
    c.bucket_bytes = 6000


@change("near", CLEAN - {"clean"})
def _(c, corpus):
    c.dedup.near = False


@change("priority", CLEAN - {"clean"})
def _(c, corpus):
    c.subsets.books.priority = 2


@change("a rule of one subset", CLEAN)
def _(c, corpus):
    c.subsets.code.min_document_bytes = 230


@change("a rule of one that is cut", CLEAN)
def _(c, corpus):
    c.subsets.web.nfc = True


@change("a limit", LIMITS)
def _(c, corpus):
    c.subsets.web.max_bytes = 3500


@change("another limit", LIMITS)
def _(c, corpus):
    c.subsets.code.max_bytes = 800


@change("no limit", CLEAN)
def _(c, corpus):
    c.subsets.web.max_bytes = 0


@change("evaluation sets", {"contamination", *CLEAN})
def _(c, corpus):
    c.contamination.sources, c.contamination.remove = (f"jsonl:{corpus}/evaluation.jsonl",), True


@change("seed", LIMITS)
def _(c, corpus):
    c.seed = 5


@change("one subset less", CLEAN - {"shared"})
def _(c, corpus):
    del c.subsets.books


@change("one subset more", CLEAN)
def _(c, corpus):
    c.subsets.xtra = recipe.subset(f"text:{corpus}/extra.txt")


@change("one subset more before others", CLEAN)
def _(c, corpus):
    c.subsets.a = recipe.subset(f"text:{corpus}/extra.txt")


@change("fewer tasks", CLEAN)
def _(c, corpus):
    c.subsets.books.tasks = 1


@change("a file less", CLEAN)
def _(c, corpus):
    (corpus / "books/03.txt").unlink()


@change("a file more of one that is cut", LIMITS)
def _(c, corpus):
    row = {"text": f"New: {words(7, 50)}", "url": "https://b.example/n"}
    (corpus / "web/9.jsonl").write_text(json.dumps(row) + "\n")


@change("a file written again, as large as it was", CLEAN)
def _(c, corpus):
    path = corpus / "books/03.txt"
    path.write_text(path.read_text().replace("Book 3", "Look 3"))
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 1))  # of a disk that keeps whole seconds


@change("other blocked domains", CLEAN)
def _(c, corpus):
    (corpus / "blocked").write_text("b.example\n")


OF_FILES = ("a file less", "a file more of one that is cut", "other blocked domains")
OF_FILES += ("a file written again, as large as it was",)


@pytest.mark.processes
@pytest.mark.parametrize("one", CHANGES, ids=lambda one: one.name)
def test_a_changed_recipe_in_an_old_folder_gives_what_a_fresh_one_gets(one, corpus, begun, tmp_path):
    """And does again the stages that it is said to, no other."""
    old, new = tmp_path / "old", tmp_path / "new"
    if one.name in OF_FILES:
        shutil.copytree(corpus, tmp_path / "corpus")
        corpus = tmp_path / "corpus"
        build.build(recipe_of(corpus).lock(), old, workers=1, keep_stages=True)
    else:
        shutil.copytree(begun, old)
    before, config = marks(old), recipe_of(corpus)
    one.make(config, corpus)
    recipe.validate(config)
    build.build(config.lock(), old, workers=1, keep_stages=True)
    assert set(done_again(before, marks(old))) == one.again
    build.build(config, new, workers=1)
    shutil.rmtree(old / "stages")
    assert different_files(old, new) == []


@pytest.fixture
def old(begun, tmp_path) -> Path:
    """A finished folder with its stages, to be changed."""
    shutil.copytree(begun, tmp_path / "old")
    return tmp_path / "old"


def without_stages(out: Path) -> Path:
    copy = out.with_name("without")
    shutil.copytree(out, copy, ignore=shutil.ignore_patterns("stages"))
    return copy


def test_a_stage_is_done_again_where_a_person_asks_for_it(old, corpus, begun, capsys):
    """As after a damage, which names the stage; what follows it is, too, and gives the same."""
    config, before = recipe_of(corpus).lock(), marks(old)
    with pytest.raises(ConfigError, match="--redo=tokenise: no stage of this recipe; expected one of files, clean"):
        build.build(config, old, workers=1, keep_stages=True, redo=["tokenise"])
    assert not done_again(before, marks(old))
    told = "\n".join(dry_run.look(config, old, redo=["tokens/code"]))
    assert "stage tokens: again for code (--redo=tokens/code)" in told and "stage shards: again" in told
    damaged = next(old.glob("stages/kept/*.runs"))
    damaged.write_bytes(damaged.read_bytes()[:-5])
    with pytest.raises(StorageError, match=r"runs cannot be read .*: prepare again with --redo=kept$"):
        build.build(config, old, workers=1, keep_stages=True, redo=["tokens"])
    build.build(config, old, workers=1, keep_stages=True, redo=["kept"])
    assert set(done_again(before, marks(old))) == KEPT
    assert "stage kept: again (--redo=kept)" in capsys.readouterr().err
    assert not [path for path in different_files(old, begun) if not path.startswith("stages/")]
    finished = without_stages(old)
    with pytest.raises(ConfigError, match="--redo=keep: no stage of this recipe; expected one of files"):
        build.build(config, finished, workers=1, redo=["keep"])
    with pytest.raises(ConfigError, match=r"--redo=kept: .* is finished, and what its stages read is gone"):
        build.build(config, finished, workers=1, redo=["kept"])


@pytest.mark.processes
@pytest.mark.parametrize(
    ("stage", "again"),
    [
        ("files/web", LIMITS), ("files", LIMITS), ("clean/books", CLEAN), ("deduplicate", CLEAN - {"clean"}),
        ("shared", {"shared", *KEPT}), ("tokenizer", {"tokenizer", *TOKENS}), ("shards", {"shards", "stores"}),
        ("stores", {"stores"}), ("card", {"card"}),
    ],
)  # fmt: skip
def test_whatever_is_done_again_gives_the_same(stage, again, old, corpus, begun):
    before = marks(old)
    build.build(recipe_of(corpus).lock(), old, workers=1, keep_stages=True, redo=[stage])
    assert set(done_again(before, marks(old))) == again
    assert not [path for path in different_files(old, begun) if not path.startswith("stages/")]


def test_of_a_changed_subset_alone_the_ranks_are_done_again_and_all_is_said_first(old, corpus, tmp_path, capsys):
    c = recipe_of(corpus)
    c.subsets.books.max_document_bytes = 450
    before = marks(old)
    build.build(c.lock(), old, workers=1, keep_stages=True)
    again = done_again(before, marks(old))
    assert again["clean"] == ["00000", "00001"] and len(before["clean"]) == 5 and set(again) == CLEAN
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == [
        "stage clean: again for books (subsets.books.max_document_bytes was 0, is 450)",
        "stage deduplicate: again (follows clean)",
        "stage shared: again (follows deduplicate)",
    ]
    build.build(c, tmp_path / "new", workers=1, keep_stages=True)
    assert different_files(old / "books", tmp_path / "new/books") == []
    for folder in ("clean", "duplicates", "tokens"):
        assert different_files(old / "stages" / folder, tmp_path / "new/stages" / folder) == []


def test_what_no_stage_reads_is_changed_in_a_finished_folder_without_its_stages(old, corpus, capsys):
    """As where the stages are there, to the byte."""
    c, bare = recipe_of(corpus), without_stages(old)
    c.subsets.code.repeats, c.slurm.partition = 3.0, "cpu"
    data, was_there = build.build(c.lock(), bare, workers=1)
    assert data["mix"] == {"books": 1, "code": 3, "web": 1} and not was_there
    assert "card are written anew (slurm.partition was \"\", is cpu; subsets.code.repeats was 1.0, is 3.0)" in (
        capsys.readouterr().err
    )
    assert build.build(c, bare, workers=1) == (data, True) and not (bare / "stages").exists()
    before = marks(old)
    build.build(c, old, workers=1, keep_stages=True)
    assert marks(old) == before
    shutil.rmtree(old / "stages")
    assert different_files(old, bare) == []
    card = json.loads((bare / "card/data.json").read_bytes())
    card["config"]["subsets"]["code"]["repeats"], card["stores"] = 2.0, {}
    (bare / "card/data.json").write_text(json.dumps(card))
    build.build(c, bare)  # as after a kill between data.json and the card
    assert different_files(old, bare) == []


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("vocab_size", 400, "vocab_size was 330, is 400.: that begins again at stage tokenizer"),
        ("tokenizer", "x.json", "recipe .tokenizer was \"\", is x.json.: that begins again at stage tokenizer"),
        ("bucket_bytes", 1, "at stage kept"),
    ],
)
def test_what_stages_that_are_gone_would_be_needed_for_is_refused_and_nothing_is_touched(
    begun, corpus, tmp_path, key, value, expected
):
    bare, c = tmp_path / "bare", recipe_of(corpus)
    shutil.copytree(begun, bare, ignore=shutil.ignore_patterns("stages"))
    c[key] = value
    with pytest.raises(ConfigError, match=expected):
        build.build(c.lock(), bare, workers=1)
    with pytest.raises(ConfigError, match=expected):
        dry_run.look(c, bare)
    assert different_files(begun, bare) == [f"stages/{path}" for path in everything(begun / "stages")]


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_finished_folder_with_its_stages_is_left_as_it_is(old, corpus):
    before = {path: path.stat().st_mtime_ns for path in old.rglob("*") if path.name != "lock" and path.is_file()}
    assert build.build(recipe_of(corpus).lock(), old, workers=1, keep_stages=True)[1]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(old, corpus, tmp_path):
    c = recipe_of(corpus)
    assert dry_run.look(c, tmp_path / "none/out") == [
        *(f"stage {stage}: to do" for stage in (
            "files", "clean", "deduplicate", "shared", "kept", "tokenizer", "tokens", "shards", "stores",
            "card",
        )),
        "data.json and card: to be written",
    ]  # fmt: skip
    assert not (tmp_path / "none").exists()
    whole = {str(path): path.stat().st_mtime_ns for path in old.rglob("*")}
    assert {line.partition(": ")[2] for line in dry_run.look(c, old)} == {"done"}
    c.subsets.web.nfc, c.validation_fraction = True, 0.5
    found = dry_run.look(c, old)
    assert found[1] == "stage clean: again for web (subsets.web.nfc was false, is true); 3 tasks stay done"
    assert found[-3:] == [
        "stage stores: again (validation_fraction was 0.2, is 0.5; follows shards)",
        "stage card: again (follows deduplicate)",
        "data.json and card: to be written (subsets.web.nfc was false, is true; validation_fraction was 0.2, is 0.5)",
    ]
    assert whole == {str(path): path.stat().st_mtime_ns for path in old.rglob("*")}
    (old / "stages/done/tokens/completions/00001").unlink()
    (old / "data.json").unlink()
    found = dry_run.look(recipe_of(corpus), old)
    assert found[6].startswith("stage tokens: partly done (") and found[5] == "stage tokenizer: done"


@pytest.mark.processes
def test_kills_at_any_moment_of_a_changed_recipe_change_no_byte(old, corpus, tmp_path):
    """Removed half, begun half: the same command goes on."""
    text = RECIPE.format(corpus=str(corpus), tests=str(Path(__file__).parent))
    (tmp_path / "recipe.py").write_text(text)
    config, draw, kills = recipe.load_config(tmp_path / "recipe.py"), random.Random(3), 0
    while True:
        program = command(tmp_path, old, "--workers=1", "--keep_stages")
        seen, wanted = ranks_done(old), draw.randint(0, 4)
        while program.poll() is None and kills < 12 and not (ranks_changed(old, seen) >= wanted and began(old)):
            time.sleep(0.005)
        time.sleep(draw.random() * 0.05)
        if program.poll() is not None or kills == 12:
            break
        os.killpg(program.pid, signal.SIGKILL)
        program.communicate()
        kills += 1
    output, errors = program.communicate()
    assert program.returncode == 0 and "finished" in output, errors
    assert kills >= 5
    build.build(config, tmp_path / "new", workers=1)
    shutil.rmtree(old / "stages")
    assert different_files(old, tmp_path / "new") == []


def ranks_changed(out: Path, seen: set[Path]) -> int:
    return len(ranks_done(out) ^ seen)


def began(out: Path) -> bool:
    """Whether the command has begun to change the folder."""
    return not (out / "data.json").exists()


def rebuilt(config: ConfigDict, out: Path, tmp_path: Path) -> set[str]:
    """The stages that a changed recipe does again in `out`, whose outcome is a fresh folder's."""
    before = marks(out)
    build.build(config, out, workers=1, keep_stages=True)
    build.build(config, tmp_path / "new", workers=1)
    again = set(done_again(before, marks(out)))
    assert [path for path in different_files(out, tmp_path / "new") if not path.startswith("stages/")] == []
    shutil.rmtree(tmp_path / "new")
    return again


@pytest.mark.processes
def test_chunks_of_tokens_leave_no_store_that_another_recipe_has_not(corpus, tmp_path):
    rows = [{"token_ids": [3 + i % 300] * 8, "subset_name": "ab"[i % 2]} for i in range(20)]
    for name, own in (("chunk_0", rows), ("chunk_1", rows[::2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    c, out = recipe.base(), tmp_path / "old"
    c.tokenizer, c.validation_fraction = f"{corpus}/books.json", 0.0
    c.subsets.k2 = recipe.subset(f"llm360:{tmp_path}/chunk_0.jsonl")
    c.subsets.plain = recipe.subset(f"text:{corpus}/books/*.txt", fim_rate=0.5)
    build.build(c, out, workers=1, keep_stages=True)
    assert (out / "k2-b").exists()
    c.subsets.k2.unlock().source = f"llm360:{tmp_path}/chunk_1.jsonl"
    assert rebuilt(c, out, tmp_path) == {"token-sources", "shards", "stores"} and not (out / "k2-b").exists()
    c.subsets.plain.fim_stores = True
    assert rebuilt(c, out, tmp_path) == TOKENS
    c.tokenizer = f"{corpus}/code.json"
    assert rebuilt(c, out, tmp_path) == {"token-sources", *TOKENS}
    del c.subsets.k2
    assert rebuilt(c, out, tmp_path) == {"shards", "stores"} and not list(out.glob("k2*"))


@pytest.mark.processes
def test_conversations_are_rendered_again_where_their_template_changes_and_not_for_what_comes_later(tmp_path):
    pytest.importorskip("transformers")
    from chat_templates import DIALOGUE, FAMILIES
    from test_chat import folder_of

    folder, _ = folder_of(tmp_path / "tokenizer", FAMILIES["llama-3"])
    more = [[{"role": "user", "content": f"Q {i}?"}, {"role": "assistant", "content": f"A {i}."}] for i in range(9)]
    rows = "".join(json.dumps({"messages": turns}) + "\n" for turns in [DIALOGUE, *more])
    (tmp_path / "chat.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "text.txt").write_text("A document of text.\n" * 5)
    c, out = recipe.base(), tmp_path / "old"
    c.tokenizer, c.eos, c.validation_fraction = str(folder / "tokenizer.json"), "<|end_of_text|>", 0.1
    c.subsets.chat = recipe.conversations(f"jsonl:{tmp_path}/chat.jsonl")
    c.subsets.text = recipe.subset(f"text:{tmp_path}/text.txt")
    build.build(c, out, workers=1, keep_stages=True)
    c.subsets.chat.conversations.max_tokens, c.subsets.chat.conversations.too_long = 30, "drop"
    assert rebuilt(c, out, tmp_path) == TOKENS
    template = folder / "other.jinja"
    template.write_text(FAMILIES["llama-3"].template.replace("<|eot_id|>", " <|eot_id|>"), encoding="utf-8")
    c.chat.template = str(template)
    before = marks(out)["clean"]
    assert rebuilt(c, out, tmp_path) == CLEAN - {"tokenizer", "shared"}
    assert done_again({"clean": before}, marks(out))["clean"] == ["00000"], "text has no template"


class Killed(BaseException):
    """As a SIGKILL there."""


def test_a_finished_folder_whose_stages_were_being_removed_is_whole(old, corpus, monkeypatch, capsys):
    """They are gone at once for whoever comes; some of them without the notes of them once lost a store in silence."""
    config = recipe_of(corpus).lock()

    def killed(folder: Path) -> None:
        shutil.rmtree(folder / "tokens")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(build, "remove_tree", killed)
        with pytest.raises(Killed):
            build.build(config, old, workers=1)
    assert not (old / "stages").exists() and [path.name for path in old.glob("stages-*")]
    before = {name: (old / name).read_bytes() for name in ("data.json", "tokenizer.json")}
    other = recipe_of(corpus)
    other.subsets.code.fim_rate = 0.9
    with pytest.raises(ConfigError, match="begins again at stage tokens/code, and what it reads is gone"):
        build.build(other.lock(), old, workers=1)
    monkeypatch.setattr(files, "is_running", lambda pid: False)  # it is this process that was killed
    assert build.build(config, old, workers=1)[1]
    assert {name: (old / name).read_bytes() for name in before} == before
    assert not list(old.glob("stages*"))


def test_two_commands_of_which_one_ends_lose_nothing(old, corpus, monkeypatch):
    """The second begins while the first, finished, removes its stages."""
    other, removed = recipe_of(corpus), []
    other.subsets.web.repeats = 3.0
    other = other.lock()
    remove = files.remove_tree

    def meanwhile(folder: Path) -> None:
        removed.append(folder.name)
        if len(removed) == 1:
            data, was_there = build.build(other, old, workers=1)
            assert data["mix"]["web"] == 3.0 and not was_there
        remove(folder)

    for module in (build, finished):
        monkeypatch.setattr(module, "remove_tree", meanwhile)
    build.build(recipe_of(corpus).lock(), old, workers=1)
    assert len(removed) == 2 and build.build(other, old, workers=1)[1]
    assert not list(old.glob("stages*"))


def test_stages_that_another_version_of_the_code_kept_are_left_or_gone_on_with(old, corpus):
    config, begun = recipe_of(corpus).lock(), old / "stages/recipe.json"
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"code": ["0" * 64]}))
    assert build.build(config, old, workers=1)[1] and begun.exists()
    with pytest.raises(ConfigError, match="begun by another version of k2jax"):
        build.build(config, old, workers=1, redo=["tokens"])
    before = marks(old)
    assert not build.build(config, old, workers=1, redo=["tokens"], other_code=True, keep_stages=True)[1]
    assert set(done_again(before, marks(old))) == TOKENS


def test_what_is_wanted_again_is_removed_once_however_often_the_command_is_killed(old, corpus, monkeypatch):
    """A supervisor that runs the same command again would else never come to an end."""
    config, really = recipe_of(corpus).lock(), work.Work.run

    def killed(self, stage, name=""):
        if not stage.name.startswith(run):
            raise Killed
        really(self, stage, name)

    monkeypatch.setattr(work.Work, "run", killed)
    before, run = marks(old), ("cuts", "limits", "clean")
    for _ in range(2):
        with pytest.raises(Killed):
            build.build(config, old, workers=1, keep_stages=True, redo=["clean"])
    first, run = marks(old)["clean"], ("",)
    build.build(config, old, workers=1, keep_stages=True, redo=["clean"])
    assert marks(old)["clean"] == first != before["clean"]
    build.build(config, old, workers=1, keep_stages=True, redo=["clean"])
    assert marks(old)["clean"] != first, "it had ended, so this is wanted anew"


def test_a_lock_that_is_kept_alive_is_let_go_before_stages_are_removed(old, corpus, monkeypatch):
    """Where flock does not work: it lies among them, and who cannot keep it alive ends; at size they take minutes."""
    lost: list[str] = []
    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    monkeypatch.setattr(locks, "_mount_options", lambda path: {"nolock"})
    monkeypatch.setattr(locks, "_lost", lost.append)
    remove = files.remove_tree
    for module in (build, finished):
        monkeypatch.setattr(module, "remove_tree", lambda folder: (time.sleep(0.5), remove(folder)))
    build.build(recipe_of(corpus).lock(), old, workers=1)
    assert not lost and not list(old.glob("stages*"))
