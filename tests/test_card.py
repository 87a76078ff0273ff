"""The data card: its numbers add up, hostile documents stay text, and it is the same every time."""

import json
import random
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from k2jax.files import write_json
from k2jax.prepare import kept, recipe
from k2jax.prepare.card import documents as card_documents
from k2jax.prepare.card.card import make_card, mix_of, steps_of, write_card
from k2jax.prepare.card.html import page
from k2jax.prepare.card.markdown import markdown
from k2jax.prepare.card.tables import tables_of
from k2jax.prepare.card.text import for_html, for_markdown, lines_of, num_bytes, power_of_two, share, shown
from k2jax.prepare.dedup.index import clean_documents
from k2jax.prepare.documents import document, write_documents
from k2jax.prepare.tally import PROBLEMS, Tally, combine

DUPLICATES = pa.schema(
    [
        ("index", pa.uint32()),
        ("reason", pa.string()),
        ("survivor_rank", pa.uint32()),
        ("survivor_index", pa.uint32()),
        ("copies", pa.int64()),
        ("by", pa.list_(pa.struct([("name", pa.string()), ("count", pa.int64())]))),
        ("sources", pa.list_(pa.string())),
    ]
)
HOSTILE = [
    "<script>alert(1)</script> too short",
    "</pre></details></body><img src=http://evil.example/x.png onerror=alert(1)>",
    "``` \n~~~\n# heading\n| a | b |\n![x](http://evil.example/y.png)\n<b>bold</b>",
    "right \u202eto left\u202c, bell \x07, escape \x1b[31m, nul \x00, \u2028 line, \ufeff mark, half \\ud800",
    "&lt;not an entity&gt; &amp; \"quotes' and {braces} %s {0} {style}",
    "שלום عليكم " * 20,
]
NAME = 'ba|d\n"name"<i>`*_\u202e.txt'


def config_of() -> ConfigDict:
    config = recipe.base()
    config.subsets.books = recipe.subset("text:books/*", tasks=1, licence="CC0-1.0")
    config.subsets.code = recipe.subset("jsonl:code/*", tasks=2, priority=1, repeats=0.5)
    config.subsets.web = recipe.subset("warc:web/*", tasks=2, priority=2, upsample=((2, 3), (5, 8)), nfc=True)
    return config


def clean(rank: int, task: recipe.Task, stages: Path) -> list:
    """What a task of cleaning writes: read, language and pii, some of it removed, as contracted."""
    draw, tally, stay, gone = random.Random(rank), Tally(), [], []
    words = "a few words that are here over and over again".split()
    for i in range(60):
        text = " ".join(draw.choices(words, k=draw.choice([2, 30, 300])))
        text = (
            HOSTILE[i] if i < len(HOSTILE) else "the same text in every task " * 3 if i % 20 == 19 else text
        )
        text = f"what {task.subset} alone has twice and again and again" if i % 20 == 18 else text
        source = f"{task.subset}/{NAME}" if i % 2 else f"{task.subset}/{i}.txt"
        one = document(text, subset=task.subset, source=source, language="en" if i % 5 else "de")
        one.metadata["licence"] = "CC0-1.0" if i % 3 else "<b>none</b>"
        size = len(text.encode())
        tally.saw("read", size)
        if size < 40:
            tally.removed("read", "too short", size)
            gone.append(document(text, subset=task.subset, source=source, step="read", reason="too short"))
            continue
        if task.subset == "web":
            tally.saw("language", size)
            if one.metadata["language"] == "de":
                tally.removed("language", "<script>de", size)
                gone.append(document(text, source=source, step="language", reason="<script>de"))
                continue
        tally.saw("pii", size + 1)
        tally.kept(size + 1, one.metadata["language"], one.metadata["licence"])
        stay.append(one)
    tally.problem("not JSON", f"{task.subset}/{NAME}:17", "<b>line</b>")
    name = f"{rank:05d}"
    write_documents(stages / "clean/documents" / f"{name}.jsonl.zst", stay)
    write_documents(stages / "clean/removed" / f"{name}.jsonl.zst", gone)
    write_json(stages / "clean/tally" / f"{name}.json", tally.to_json())
    (stages / "clean/index").mkdir(exist_ok=True)
    pq.write_table(
        pa.table({"subset": [task.subset] * len(stay)}), stages / "clean/index" / f"{name}.parquet"
    )
    return stay


def find_duplicates(documents: list[list], subsets: list[str], stages: Path) -> None:
    """By equal texts; every third copy is called near."""
    first, clusters = {}, {}
    for rank, found in enumerate(documents):
        for index, one in enumerate(found):
            place = first.setdefault(one.id, (rank, index))
            clusters.setdefault(place, []).append((rank, index))
    rows, pairs, removed = [[] for _ in documents], {}, {name: {"exact": 0, "near": 0} for name in subsets}
    sizes = {}
    for survivor, members in clusters.items():
        if len(members) == 1:
            continue
        sizes[str(len(members))] = sizes.get(str(len(members)), 0) + 1
        by = {name: sum(subsets[rank] == name for rank, _ in members) for name in sorted(set(subsets))}
        for i, (rank, index) in enumerate(members):
            reason = None if i == 0 else "near" if i % 3 == 0 else "exact"
            row = {
                "index": index,
                "reason": reason,
                "survivor_rank": survivor[0],
                "survivor_index": survivor[1],
            }
            row |= {"copies": 1, "by": [], "sources": []}
            if i == 0:
                row |= {"copies": len(members), "sources": [NAME, "b"]}
                row["by"] = [{"name": name, "count": n} for name, n in by.items() if n]
            else:
                removed[subsets[rank]][reason] += 1
                pair = f"{subsets[rank]} -> {subsets[survivor[0]]}"
                pairs[pair] = pairs.get(pair, 0) + 1
            rows[rank].append(row)
    for rank, found in enumerate(rows):
        (stages / "duplicates").mkdir(exist_ok=True)
        table = pa.Table.from_pylist(sorted(found, key=lambda row: row["index"]), DUPLICATES)
        pq.write_table(table, stages / "duplicates" / f"{rank:05d}.parquet")
    summary = {"removed": removed, "pairs": pairs, "cluster_sizes": sizes}
    write_json(stages / "duplicates" / "summary.json", summary)


def tallies(config: ConfigDict, folder: Path) -> dict[str, dict]:
    parts = {}
    for rank, task in enumerate(recipe.tasks(config)):
        parts.setdefault(task.subset, []).append(json.loads((folder / f"{rank:05d}.json").read_text()))
    return {name: combine(found) for name, found in parts.items()}


def dealt(stages: Path) -> kept.Kept:
    """One bucket for each subset."""
    subsets = [task.subset for task in recipe.tasks(config_of())]
    names = sorted(set(subsets))
    found = (kept.Dealt(name, subsets.index(name), bucket, 1) for bucket, name in enumerate(names))
    return kept.Kept(stages, len(subsets), tuple(found))


def prepare(out: Path) -> dict:
    """A preparation up to its tallies, and what its data.json will hold."""
    config, stages = config_of(), out / "stages"
    tasks = recipe.tasks(config)
    subsets = [task.subset for task in tasks]
    find_duplicates([clean(rank, task, stages) for rank, task in enumerate(tasks)], subsets, stages)
    for rank in range(len(tasks)):
        kept.keep(rank, kept=dealt(stages), seed=1)
    documents = clean_documents(config, stages / "clean")
    for group in reversed(range(documents.groups(card_documents.TOGETHER))):
        card_documents.gather(group, stages=stages, clean=documents)
    first, last = tallies(config, stages / "clean/tally"), tallies(config, stages / "kept")
    names = {"books": "books", "code": "code", "web": "web", "web-x3": "web", "web-x8": "web"}
    stores = {
        store: {"subset": name, "documents": 10, "bytes": 5000, "tokens": 1200, "train_tokens": 1000 + 10 * i,
                "root_digest": f"{i:064x}", "repeats": 1.0 + i}
        for i, (store, name) in enumerate(names.items())
    }  # fmt: skip
    return {
        "format": 2,
        "version": "0.1",
        "config": config.to_dict(),
        "tokenizer_sha256": "ab" * 32,
        "vocab_size": 32018,
        "inputs": {name: {"files": 3, "bytes": 10**6, "digest": "0"} for name in ("books", "code", "web")},
        "stores": stores,
        "subsets": {name: {"clean": first[name], "duplicates": last[name]} for name in first},
    }


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    """Several, of two tasks each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card_documents, "TOGETHER", 2)
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="module")
def data(out) -> dict:
    return prepare(out)


@pytest.fixture(scope="module")
def card(out, data) -> dict:
    write_card(out, data)
    return json.loads((out / "card" / "data.json").read_text())


class Page(HTMLParser):
    """Elements that are opened and closed in their order, all attributes, all text."""

    EMPTY = ("meta", "br", "rect", "line")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in self.EMPTY:
            self.open.append(tag)
        elif tag == "rect":
            self.open.append(tag)  # it may hold a title

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def hostile(card) -> dict:
    """The card with every hostile text in every place where a document's text, name or reason is shown."""
    samples = {"kept": [], "removed": [], "duplicates": []}
    for text in HOSTILE:
        one = {"subset": "web", "id": "0", "source": text, "characters": len(text), "text": text}
        samples["kept"].append(one)
        samples["removed"].append({**one, "step": text, "reason": text})
        samples["duplicates"].append({"reason": "near", "removed": one, "stays": one})
    names = dict.fromkeys(HOSTILE, 1)
    web = {**card["subsets"]["web"], "bad": names, "problems": HOSTILE}
    web |= {key: {"clean": names, "duplicates": names} for key in ("languages", "licences")}
    duplicates = {**card["duplicates"], "copies_in": names}
    duplicates["largest"] = [{"subset": "web", "copies": 2, "sources": HOSTILE}]
    return {**card, "samples": samples, "subsets": {**card["subsets"], "web": web}, "duplicates": duplicates}


@pytest.fixture(scope="module")
def html(hostile) -> Page:
    return Page(page(hostile))


def test_in_less_removed_is_out_in_every_step(card):
    for name, subset in card["subsets"].items():
        for step in subset["steps"]:
            for key in ("documents", "bytes"):
                removed = sum(counts[key] for counts in step["removed"].values())
                assert step["in"][key] - removed == step["out"][key] >= 0
        for before, after in zip(subset["steps"], subset["steps"][1:], strict=False):
            assert before["out"]["documents"] == after["in"]["documents"]
        names = ["read", "language", "pii", "duplicates"] if name == "web" else ["read", "pii", "duplicates"]
        assert [step["step"] for step in subset["steps"]] == names
    assert card["inconsistencies"] == []
    first = [subset["steps"][0]["in"]["documents"] for subset in card["subsets"].values()]
    assert card["total"]["documents_in"] == sum(first) == 5 * 60


def test_steps_keep_their_order_through_files_and_sums(tmp_path):
    """Of a task the later steps may see no document; its tally then has the first of them alone."""
    names = ["read", "url", "c4", "nfc", "a step of tomorrow"]
    parts = []
    for rank, seen in enumerate((2, 5)):
        tally = Tally()
        for name in names[:seen]:
            tally.saw(name, 9)
        write_json(tmp_path / f"{rank}.json", tally.to_json())
        parts.append(json.loads((tmp_path / f"{rank}.json").read_text()))
    assert [step["step"] for step in steps_of("clean", combine(parts))] == names


def test_duplicates_are_those_of_the_stage(out, card):
    summary = json.loads((out / "stages/duplicates/summary.json").read_text())
    found = card["duplicates"]
    assert {key: found[key] for key in summary} == summary and sum(summary["pairs"].values()) > 20
    for name, subset in card["subsets"].items():
        removed = {reason: n["documents"] for reason, n in subset["steps"][-1]["removed"].items()}
        assert removed == {reason: n for reason, n in summary["removed"][name].items() if n}
        by_copies = found["documents_by_copies"][name]
        assert sum(by_copies.values()) == subset["kept"]["duplicates"]["documents"]
        more = sum(n for copies, n in by_copies.items() if copies != "1")
        rows = [pq.read_table(out / f"stages/duplicates/{rank:05d}.parquet") for rank in range(5)]
        ranks = [rank for rank, task in enumerate(recipe.tasks(config_of())) if task.subset == name]
        assert more == sum(rows[rank]["reason"].null_count for rank in ranks)
    assert sum(found["copies_in"].values()) == sum(
        int(size) * n for size, n in summary["cluster_sizes"].items()
    )
    assert [row["copies"] for row in found["largest"]][0] == max(map(int, summary["cluster_sizes"]))


def test_upsampling_says_how_many_documents_each_factor_gets(card):
    assert [(row["subset"], row["copies"], row["factor"]) for row in card["upsampling"]] == [
        ("web", [1, 1], 1),
        ("web", [2, 4], 3),
        ("web", [5, None], 8),
    ]
    documents = sum(row["documents"] for row in card["upsampling"])
    assert documents == card["subsets"]["web"]["kept"]["duplicates"]["documents"]


def test_the_mix_adds_up(data):
    mix = mix_of(data["stores"])
    assert sum(row["mix_share"] for row in mix.values()) == pytest.approx(1, abs=1e-5)
    assert mix["web-x3"]["mix_tokens"] == 1030 * 4
    assert mix_of({}) == {}


def test_contradictions_are_shown_and_not_hidden(out, data):
    changed = json.loads(json.dumps(data))
    changed["subsets"]["web"]["duplicates"]["steps"]["duplicates"]["documents"] += 1
    changed["subsets"]["code"]["clean"]["kept"]["documents"] -= 1
    card = make_card(out / "stages", changed)
    assert [found.split(":")[0] for found in card["inconsistencies"]] == ["code", "web", "web"]
    assert "contradict" in page(card) and "contradict" in markdown(card)
    changed = json.loads(json.dumps(data))
    changed["subsets"]["code"]["duplicates"]["steps"]["duplicates"]["removed"]["exact"]["documents"] += 1
    found = make_card(out / "stages", changed)["inconsistencies"]
    assert any(line.startswith("code:") and "exact duplicates found" in line for line in found)


def test_samples_have_reasons_and_are_cut(card):
    reasons = {(one["subset"], one["step"], one["reason"]) for one in card["samples"]["removed"]}
    assert reasons >= {("books", "read", "too short"), ("web", "language", "<script>de")}
    assert all(len(one["text"]) <= 400 for kind in ("removed", "kept") for one in card["samples"][kind])
    assert {one["subset"] for one in card["samples"]["kept"]} == {"books", "code", "web"}
    for pair in card["samples"]["duplicates"]:
        assert pair["removed"]["id"] == pair["stays"]["id"] and pair["reason"] in ("exact", "near")


def test_kept_samples_are_of_documents_that_stay(out, data, monkeypatch):
    monkeypatch.setattr(card_documents, "SAMPLES", 1000)
    samples = make_card(out / "stages", data)["samples"]["kept"]
    found = dealt(out / "stages")
    stay = {
        (one.subset, document.id) for one in found.subsets for document in kept.bucket_of(found, one.first_bucket, 1)
    }
    assert {(one["subset"], one["id"]) for one in samples} == stay


def test_the_page_is_balanced_and_loads_nothing(hostile, html):
    text = page(hostile)
    allowed = "html head meta title style body h1 h2 h3 p div section span b br code pre details summary table thead "
    allowed += "tbody tr th td figure figcaption svg text rect line title"
    assert set(html.tags) <= set(allowed.split())
    for tag, name, value in html.attributes:
        assert name not in ("src", "href", "srcset", "onerror", "action") and not name.startswith("on")
        assert "://" not in (value or ""), (tag, name, value)
    style = re.search("<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in style
    assert len(text.encode()) < 500_000


def test_hostile_documents_are_text(hostile, html):
    whole = "".join(html.text)
    assert "<script>alert(1)</script> too short" in whole and "<script>de" in whole
    assert "</pre></details></body><img src=http://evil.example/x.png onerror=alert(1)>" in whole
    assert (
        r"right \u202eto left\u202c, bell \x07, escape \x1b[31m, nul \x00, \u2028 line, \ufeff mark" in whole
    )
    assert r"ba|d\n" in whole and "&lt;not an entity&gt;" in whole and "{style}" in whole
    for content in (page(hostile), markdown(hostile)):
        assert all(character.isprintable() or character == "\n" for character in content)


def test_hostile_documents_are_no_markdown(hostile):
    lines = markdown(hostile).split("\n")
    outside = [line for line in lines if not line.startswith("    ")]
    assert not any("<" in line.replace("\\<", "") or "`" in line.replace("\\`", "") for line in outside)
    assert not any(re.search(r"(?<!\\)(\\\\)*[<`\[@]|https?:/", line) for line in outside)
    assert "    </pre></details></body><img src=http://evil.example/x.png onerror=alert(1)>" in lines
    tables = [line for line in outside if line.startswith("|")]
    for i, line in enumerate(tables):
        if set(line) <= set("|-:"):
            head = tables[i - 1].count(" | ")
            assert line.count("|") == head + 2
    rows = [line for line in outside if line.startswith("| web |")]
    assert rows and all(len(re.findall(r"(?<!\\)\|", line)) >= 3 for line in rows)
    assert sum(line.startswith("## ") for line in lines) == 12  # of SECTIONS all but contamination


@given(st.text())
def test_any_text_comes_back_as_it_is_shown(text):
    parsed = HTMLParser()
    got = []
    parsed.handle_data = got.append
    parsed.handle_starttag = parsed.handle_comment = parsed.handle_decl = lambda *_: pytest.fail("markup")
    parsed.feed(for_html(text))
    parsed.close()
    assert "".join(got) == shown(text) and "\n" not in shown(text) and len(shown(text)) <= 301 * 10
    assert all(line.isprintable() for line in lines_of(text))
    assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", for_markdown(text)) == shown(text)
    assert not re.search(r"(?<!\\)(?:\\\\)*(?:[`<*_\[\]|#~&:@$]|www\.)", for_markdown(text))


@pytest.mark.parametrize("together", [1, 16])
def test_the_same_bytes_every_time(together, out, data, card, tmp_path, monkeypatch):
    """Also for another folder, for data that went through a file, and however many tasks one task looks after."""
    before = {path.name: path.read_bytes() for path in (out / "card").iterdir()}
    monkeypatch.setattr(card_documents, "TOGETHER", together)
    again = prepare(tmp_path)
    write_card(tmp_path, json.loads(json.dumps(again)))
    assert {path.name: path.read_bytes() for path in (tmp_path / "card").iterdir()} == before
    assert sorted(before) == ["data.json", "data.md", "index.html"]


def test_an_empty_preparation_has_a_card(tmp_path):
    config = recipe.base()
    config.subsets.tokens = recipe.subset("megatron:x*.bin", tasks=1)
    data = {
        "config": config.to_dict(),
        "version": "1",
        "tokenizer_sha256": "0",
        "vocab_size": 9,
        "inputs": {},
    }
    write_card(tmp_path, {**data, "stores": {}, "subsets": {}})
    Page((tmp_path / "card" / "index.html").read_text())
    assert "# Data card" in (tmp_path / "card" / "data.md").read_text()


def test_documents_without_a_licence_are_counted_as_such(out, data):
    changed = json.loads(json.dumps(data))
    for stage, n in (("clean", 7), ("duplicates", 4)):
        changed["subsets"]["web"][stage]["licences"]["CC0-1.0"] -= n
    rows = [table.rows for table in tables_of("licences", make_card(out / "stages", changed))]
    assert ["web", "(not stated)", 7, 4] in rows[0]


def test_reports_of_contamination_are_added_up(out, data, tmp_path):
    folder = out / "stages" / "clean" / "contamination"
    for rank in range(3):  # books and code
        counts = {"checked": 40, "contaminated": 2}
        hit = {"id": "0", "source": NAME, "evaluation": "evals/<b>mmlu:3", "n_gram": HOSTILE[1]}
        write_json(
            folder / f"{rank:05d}.json", {"documents": counts, "sets": {"<b>mmlu": 2}, "hits": [hit] * 15}
        )
    try:
        card = make_card(out / "stages", data)
    finally:
        shutil.rmtree(folder)
    found = card["contamination"]
    assert found["subsets"]["code"] == {"checked": 80, "contaminated": 4} and list(found["subsets"]) == [
        "books",
        "code",
    ]
    assert found["sets"] == {"<b>mmlu": 6} and len(found["hits"]) == 20
    parsed = Page(page(card))
    assert "evals/<b>mmlu:3" in parsed.text and HOSTILE[1] in parsed.text and "img" not in parsed.tags
    assert "## Contamination" in markdown(card)


def test_sizes_are_written_short():
    assert [num_bytes(n) for n in (0, 999, 1000, 999_600, 61_800_000_000_000)] == [
        "0 B", "999 B", "1 kB", "1 MB", "61.8 TB"
    ]  # fmt: skip
    assert [share(*pair) for pair in ((1, 8), (1, 10**6), (0, 5), (0, 0))] == ["12.5%", "<0.1%", "0.0%", "-"]
    assert [power_of_two(n) for n in (0, 9, 10, 25)] == ["1 B", "512 B", "1 KiB", "32 MiB"]


def test_problems_of_many_tasks_are_the_first_few():
    parts = [{"problems": [f"{task}:{i}" for i in range(3)], "bad": {"x": 3}} for task in range(1000)]
    assert combine(parts) == {"problems": [f"{i // 3}:{i % 3}" for i in range(PROBLEMS)], "bad": {"x": 3000}}
