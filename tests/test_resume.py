"""A changed recipe in the folder of another one: what comes out is what a fresh folder gets, and only what follows from
the change is done again."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("datatrove")

from ml_collections import ConfigDict  # noqa: E402
from test_build import different_files, words  # noqa: E402

from k2jax.data.tokenizer import train_bpe  # noqa: E402
from k2jax.prepare import build, recipe  # noqa: E402

PAGES = [f"Page {i}: {words(200 + i, 60)}" for i in range(16)]
BOOKS = [f"Book {i}.\n{words(i, 40 + 5 * i)}" for i in range(12)] + [page.replace("Page", "Leaf") for page in PAGES[:2]]
CODE = [f"def f{i}():\n    return {words(100 + i, 30)!r}\n" for i in range(10)]
TOKENS = {"tokens", "layout", "shards", "stores"}
KEPT = {"kept", "tokenizer", *TOKENS}
DEDUP = {"ids", "exact", "signatures", "near", "clusters", "duplicates", *KEPT}
CLEAN = {"clean", *DEDUP}


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


def recipe_of(corpus: Path) -> ConfigDict:
    c = recipe.base()
    c.vocab_size, c.tokenizer_bytes, c.validation_fraction, c.bucket_bytes, c.dedup.bands = 330, 9_000, 0.2, 3000, 2
    c.subsets.books = recipe.subset(f"text:{corpus}/books/*.txt", tasks=2)
    c.subsets.code = recipe.subset(f"jsonl:{corpus}/code.jsonl.gz", fim_rate=0.5)
    c.subsets.web = recipe.subset(
        f"jsonl:{corpus}/web/*.jsonl", tasks=2, priority=1, max_bytes=5000, url_blocklist=f"{corpus}/blocked"
    )
    return c


@pytest.fixture(scope="module")
def begun(corpus, tmp_path_factory) -> Path:
    """A finished folder with its stages."""
    out = tmp_path_factory.mktemp("begun") / "out"
    build.build(recipe_of(corpus).lock(), out, workers=1, keep_stages=True)
    return out


def marks(out: Path) -> dict[str, dict[str, int]]:
    """When each rank of each stage was done."""
    found: dict[str, dict[str, int]] = {}
    for path in out.glob("stages/done/*/completions/*"):
        stage = "limits" if path.parts[-3].startswith("limits-") else path.parts[-3]
        found.setdefault(stage, {})[path.name] = path.stat().st_mtime_ns
    return found


def done_again(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> dict[str, list[int]]:
    """{stage: ranks} that ran between the two."""
    found = {
        stage: sorted(int(rank) for rank, when in ranks.items() if before.get(stage, {}).get(rank) != when)
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


@change("buckets", KEPT)
def _(c, corpus):
    c.bucket_bytes = 6000


@change("near", DEDUP - {"signatures", "near"})
def _(c, corpus):
    c.dedup.near = False


@change("priority", DEDUP)
def _(c, corpus):
    c.subsets.books.priority = 2


@change("a rule of one subset", CLEAN)
def _(c, corpus):
    c.subsets.code.min_document_bytes = 230


@change("a rule of one that is cut", CLEAN)
def _(c, corpus):
    c.subsets.web.nfc = True


@change("a limit", {"files", "limits", *CLEAN})
def _(c, corpus):
    c.subsets.web.max_bytes = 3500


@change("another limit", {"files", "limits", *CLEAN})
def _(c, corpus):
    c.subsets.code.max_bytes = 800


@change("no limit", {"files", *CLEAN})
def _(c, corpus):
    c.subsets.web.max_bytes = 0


@change("evaluation sets", {"contamination", *CLEAN})
def _(c, corpus):
    c.contamination.sources, c.contamination.remove = (f"jsonl:{corpus}/evaluation.jsonl",), True


@change("seed", {"files", "limits", *CLEAN})
def _(c, corpus):
    c.seed = 5


@change("one subset less", {"files", *CLEAN})
def _(c, corpus):
    del c.subsets.books


@change("one subset more", {"files", *CLEAN})
def _(c, corpus):
    c.subsets.xtra = recipe.subset(f"text:{corpus}/extra.txt")


@change("one subset more before others", {"files", *CLEAN})
def _(c, corpus):
    c.subsets.a = recipe.subset(f"text:{corpus}/extra.txt")


@change("fewer tasks", {"files", *CLEAN})
def _(c, corpus):
    c.subsets.books.tasks = 1


@change("a file less", {"files", *CLEAN})
def _(c, corpus):
    (corpus / "books/03.txt").unlink()


@change("a file more of one that is cut", {"files", "limits", *CLEAN})
def _(c, corpus):
    row = {"text": f"New: {words(7, 50)}", "url": "https://b.example/n"}
    (corpus / "web/9.jsonl").write_text(json.dumps(row) + "\n")


@change("other blocked domains", CLEAN)
def _(c, corpus):
    (corpus / "blocked").write_text("b.example\n")


@pytest.mark.processes
@pytest.mark.parametrize("one", CHANGES, ids=lambda one: one.name)
def test_a_changed_recipe_in_an_old_folder_gives_what_a_fresh_one_gets(one, corpus, begun, tmp_path):
    """And does again the stages that it is said to, no other."""
    ours = tmp_path / "corpus"  # both recipes name the same paths
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(corpus, ours)
    config = recipe_of(ours)
    build.build(config.lock(), old, workers=1, keep_stages=True)
    before = marks(old)
    config.unlock()
    one.make(config, ours)
    recipe.validate(config)
    build.build(config.lock(), old, workers=1, keep_stages=True)
    assert set(done_again(before, marks(old))) == one.again
    build.build(config, new, workers=1)
    shutil.rmtree(old / "stages")
    assert different_files(old, new) == []
