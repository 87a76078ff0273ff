"""The recipe of TxT360, as shipped, on small web archives and curated sets of its kind: every stage does its part."""

import html
import io
import json
import random
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="the extra `data`")
fasttext = pytest.importorskip("fasttext", reason="the extra `langid`")

from warcio.statusandheaders import StatusAndHeaders  # noqa: E402
from warcio.warcwriter import WARCWriter  # noqa: E402

from k2jax.data.store import Store  # noqa: E402
from k2jax.data.tokenizer import train_bpe  # noqa: E402
from k2jax.prepare import build, recipe  # noqa: E402

REPO = Path(__file__).parent.parent
STEMS = [a + b for a in ("ba", "ke", "lo", "mi", "stra") for b in ("na", "re", "so", "ti")]
WORDS = [stem + end for stem in STEMS for end in ("", "ck", "ly", "ning")]
GERMAN = "Der Hafen war an diesem Abend still und die Laternen brannten noch lange nach der Ankunft des Schiffes. "


def sentences(seed: int, count: int = 14) -> list[str]:
    """English enough for the filters: stop words, ends of sentences, and no n-grams that come again."""
    draw = random.Random(seed)

    def one() -> str:
        a, b, c, d, e, f, g = draw.sample(WORDS, 7)
        return f"The {a} {b} the {c} of {d} and {e} with {f} that {g} {draw.choice(WORDS)}."

    return [one() for _ in range(count)]


def page(text: str) -> bytes:
    menu = "".join(f"<li><a href='/{i}'>Section {i}</a></li>" for i in range(8))
    paragraphs = "".join(f"<p>{html.escape(line)}</p>" for line in text.split("\n"))
    return f"<html><body><ul>{menu}</ul><article>{paragraphs}</article></body></html>".encode()


def write_warc(path: Path, pages: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:
        writer = WARCWriter(file, gzip=True)
        for url, body in pages:
            headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.1")
            writer.write_record(writer.create_warc_record(url, "response", io.BytesIO(body), http_headers=headers))


@pytest.fixture
def config(tmp_path, monkeypatch):
    """experiments/data/txt360.py with small files for its sources, and a language model that knows two languages."""
    monkeypatch.chdir(tmp_path)
    english = [" ".join(sentences(i)) for i in range(40)]
    (tmp_path / "lines.txt").write_text(
        "".join(f"__label__en {text}\n__label__de {GERMAN * 3} {i}\n" for i, text in enumerate(english))
    )
    # It sets a tenth of the weights on each of ten threads: fewer, or a rest, and some are what the memory held.
    model = fasttext.train_supervised("lines.txt", epoch=50, lr=0.1, dim=20, thread=10, verbose=0)
    model.save_model("data.bin")
    (tmp_path / "blocklist.txt").write_text("# domains\nspam.example\n")
    train_bpe(english, 400).save("tokenizer.json")
    c = recipe.load_config(str(REPO / "experiments/data/txt360.py"))
    c = c.copy_and_resolve_references()
    c.tokenizer, c.add_k2_tokens = "tokenizer.json", False
    web, curated = c.subsets["common-crawl"], c.subsets["wikipedia"]
    for name in [name for name in c.subsets if name not in ("common-crawl", "wikipedia")]:
        del c.subsets[name]
    web.source, web.language_model, web.url_blocklist = "warc:crawl/**/*.warc.gz", "data.bin", "blocklist.txt"
    web.tasks, curated.tasks, curated.source = 2, 1, "jsonl:wikipedia/*.jsonl"
    c.contamination.sources = ("jsonl:evals/*.jsonl",)
    return c


def test_every_stage_does_its_part(config, tmp_path):
    texts = [" ".join(sentences(100 + i)) for i in range(20)]
    near = texts[0].removesuffix(".") + " indeed."
    mail = " ".join([*sentences(300), "Write to jane.doe@mail.example or call +44 20 7946 0958 before the evening."])
    pages = [(f"https://a.example/{i}", page(text)) for i, text in enumerate(texts)]
    extra = [
        ("https://spam.example/1", page(" ".join(sentences(400)))),
        ("https://b.example/de", page(GERMAN * 12)),
        ("https://b.example/short", page("The door is shut.")),
        ("https://b.example/caps", page("\n".join([*sentences(401), *["THE DOOR OF THE HOUSE IS SHUT NOW."] * 6]))),
        ("https://b.example/mail", page(mail)),
        ("https://b.example/again", page(near)),
    ]
    for dump, content in (("CC-MAIN-2023-14", pages + extra), ("CC-MAIN-2024-30", pages[:5])):
        write_warc(tmp_path / f"crawl/{dump}/warc/0.warc.gz", content)
    (tmp_path / "wikipedia").mkdir()
    articles = [texts[0], *(" ".join(sentences(500 + i)) for i in range(6))]
    (tmp_path / "wikipedia/0.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in articles))
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals/quiz.jsonl").write_text(json.dumps({"question": " ".join(texts[7].split()[10:40])}) + "\n")

    data, _ = build.build(config, tmp_path / "out", workers=1)
    web = data["subsets"]["common-crawl"]
    removed = {step: counts["removed"] for step, counts in web["clean"]["steps"].items()}
    assert removed["url"]["blocked domain"]["documents"] == 1
    assert removed["language"]["language de"]["documents"] == 1
    assert removed["lines"]["over 5% of the words in removed lines"]["documents"] == 1
    assert sum(reason["documents"] for step in removed.values() for reason in step.values()) == 4
    # Of three texts[0] and one nearly the same Wikipedia's stays; of the other four that came twice the newer dump's.
    gone = {why: n["documents"] for why, n in web["duplicates"]["steps"]["duplicates"]["removed"].items()}
    assert gone == {"exact": 6, "near": 1}
    assert {name: row["documents"] for name, row in data["stores"].items()} == {
        "common-crawl": 16, "common-crawl-x3": 4, "wikipedia": 6, "wikipedia-x3": 1,
    }  # fmt: skip
    assert data["mix"]["common-crawl-x3"] == 3
    [kept] = rows(tmp_path / "out/wikipedia-x3")
    assert kept["metadata"]["duplicates"]["by"] == {
        "common-crawl/CC-MAIN-2023-14": 2, "common-crawl/CC-MAIN-2024-30": 1, "wikipedia": 1,
    }  # fmt: skip
    assert {row["metadata"]["dump"] for row in rows(tmp_path / "out/common-crawl-x3")} == {"CC-MAIN-2024-30"}
    assert all(row["metadata"]["language"] == "en" for row in rows(tmp_path / "out/common-crawl"))
    flagged = [row["metadata"].get("contaminated") for row in rows(tmp_path / "out/common-crawl")]
    assert [name for name in flagged if name] == ["evals/quiz.jsonl:1"]
    card = (tmp_path / "out/card/data.md").read_text()
    assert "quiz.jsonl" in card and "jane.doe" not in card and "blocked domain" in card


def rows(path: Path) -> list[dict]:
    store = Store.open(path)
    return [store.document(i) for i in range(store.num_documents)]
