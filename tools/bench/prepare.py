"""What a preparation costs: CPU-seconds, MB/s and peak memory of each stage and of each rule, on this machine's files.

    python tools/bench/prepare.py [--megabytes=100] [--smoke]

The corpus is what `python:` sources give, with every file three times over in part, so that there are duplicates; pages
are its documents in HTML with the menus, scripts and styles of a site, in a web archive. One JSON line for each stage,
each rule, reading pages and extracting their text, the tokenizer library alone, and the whole: CPU-hours a TB of text
in stages of many tasks, and the core-years of what TxT360 deduplicated: 61.8 TB of compressed text (k2-facts 4.6),
taken to be packed as this corpus is by gzip. In neither is extraction, which goes by pages.
"""

import argparse
import gzip
import html
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ml_collections import ConfigDict  # noqa: E402
from warcio.statusandheaders import StatusAndHeaders  # noqa: E402
from warcio.warcwriter import WARCWriter  # noqa: E402

from k2jax.data.tokenizer import load_tokenizer  # noqa: E402
from k2jax.prepare import build, recipe, rule_checks  # noqa: E402
from k2jax.prepare.documents import document  # noqa: E402
from k2jax.prepare.engine import engine  # noqa: E402
from k2jax.prepare.rules import rules  # noqa: E402
from k2jax.prepare.sources import python_corpus  # noqa: E402
from k2jax.prepare.sources.files import File  # noqa: E402
from k2jax.prepare.sources.warc import warc_records  # noqa: E402

TXT360_BYTES = 61.8e12
ALONE = ("files", "tokenizer")  # stages of one task, whatever the corpus
RULES = ("line_rules", "gopher-repetition", "gopher-quality", "c4", "nfc", "pii")
SHARDS = 8


def texts() -> Iterator[str]:
    """Documents of this Python installation: code, docstrings and descriptions."""
    for source in ("python:documents", "python:docstrings", "python:code"):
        for one in python_corpus.candidates(source):
            try:
                text = python_corpus.text_of(source, one.name, Path(one.path).read_text(encoding="utf-8"))
                (text or "").encode()
            except (OSError, UnicodeError):
                continue
            if text and len(text) < 1_000_000:
                yield text


def write_corpus(folder: Path, num_bytes: int) -> None:
    """JSON lines of about that much text; every fifth document comes again, every tenth with another first line."""
    files = [open(folder / f"{i}.jsonl", "w", encoding="utf-8") for i in range(SHARDS)]
    size = 0
    while size < num_bytes:  # a small installation is read again: then most of it is duplicates
        for i, text in enumerate(texts()):
            copies = [text] * (1 + (i % 5 == 0)) + [f"copy {i}\n{text}"] * (i % 10 == 3)
            for copy in copies:
                files[(i + len(copy)) % SHARDS].write(json.dumps({"text": copy}) + "\n")
                size += len(copy.encode())
            if size >= num_bytes:
                break
    for file in files:
        file.close()


def make_recipe(corpus: Path) -> ConfigDict:
    c = recipe.base()
    c.vocab_size, c.tokenizer_bytes = 4096, 2_000_000
    c.subsets.corpus = recipe.subset(f"jsonl:{corpus}/*.jsonl", tasks=SHARDS, max_document_bytes=1_000_000)
    recipe.validate(c)
    return c


def rule_costs(num_bytes: int) -> Iterator[dict]:
    """MB of text a CPU-second of each rule alone."""
    found, size = [], 0
    for text in texts():
        found.append(text)
        size += len(text.encode())
        if size >= num_bytes:
            break
    for name in RULES:
        filters = (name,) if name in rule_checks.FILTERS else ()
        flags = {} if filters else {name: True}
        apply = rules.build(recipe.subset("text:x", filters=filters, **flags))[0].apply
        given = [document(text, subset="x", source="x") for text in found]
        total = sum(len(one.text.encode()) for one in given)
        start = time.process_time()
        for one in given:
            apply(one)
        seconds = time.process_time() - start
        speed = {"mb_per_cpu_second": total / 1e6 / seconds, "documents_per_cpu_second": len(given) / seconds}
        yield {"rule": name, **speed}


def page(text: str) -> bytes:
    """The text as a web page might hold it."""
    links = "".join(f"<li><a href='/{i}' title='no. {i}'>Section {i}</a></li>" for i in range(40))
    card = "<div class='card'><img src='/x.jpg'><h3><a href='/y'>Another one</a></h3><p>Its first words ...</p></div>"
    script = "<script>" + "window.push({id: 1, name: 'value', list: [1, 2, 3]});\n" * 300 + "</script>"
    style = "<style>" + ".card > a:hover { color: #123456; margin: 0 auto; }\n" * 100 + "</style>"
    paragraphs = "".join(f"<p>{html.escape(part)}</p>" for part in text.split("\n\n"))
    return (
        f"<html><head><title>A page</title><meta charset=utf-8>{style}{script}</head><body><nav><ul>{links}</ul></nav>"
        f"<main><article><h1>A page</h1>{paragraphs}</article></main><aside>{card * 20}</aside>"
        f"<footer><ul>{links}</ul><p>All rights reserved</p></footer>{script}</body></html>"
    ).encode()


def write_archive(path: Path, num_bytes: int, source: Iterator[str]) -> int:
    """Pages of the texts, up to 20 kB of each, about `num_bytes` of HTML; returns how many."""
    headers, size, number = [("Content-Type", "text/html; charset=utf-8")], 0, 0
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        for text in source:
            content = page(text[:20_000])
            record = writer.create_warc_record(
                f"https://example.org/{number}", "response", io.BytesIO(content),
                http_headers=StatusAndHeaders("200 OK", headers, protocol="HTTP/1.1"),
            )  # fmt: skip
            writer.write_record(record)
            size, number = size + len(content), number + 1
            if size >= num_bytes:
                break
    return number


def page_costs(folder: Path, num_bytes: int) -> Iterator[dict]:
    """CPU-seconds of reading a web archive, and of trafilatura on its pages."""
    path = folder / "pages.warc.gz"
    number = write_archive(path, num_bytes, texts())
    start = time.process_time()
    file = File(path.name, str(path), path.stat().st_size)
    pages = [one["text"] for _, one in warc_records(file, most=1 << 28, html_only=True, text_key="text")]
    assert len(pages) == number
    size = sum(len(one.encode()) for one in pages)
    yield {"pages": "read", **_page_speed(number, size, time.process_time() - start)}
    extract = rules.build(recipe.subset("text:x", extract=True))[0].apply
    documents = [document(one, subset="x", source="x") for one in pages]
    start = time.process_time()
    kept = [one for one in documents if extract(one) is None]
    seconds = time.process_time() - start
    text_share = sum(len(one.text.encode()) for one in kept) / size
    yield {"pages": "extract", **_page_speed(number, size, seconds), "kept": len(kept), "text_share": text_share}


def _page_speed(number: int, size: int, seconds: float) -> dict:
    return {
        "num_pages": number,
        "mb": size / 1e6,
        "pages_per_cpu_second": number / seconds,
        "cpu_hours_per_tb": seconds / size * 1e12 / 3600,
    }


def library_alone(documents: list[str], tokenizer: Path) -> float:
    """CPU-seconds that the tokenizer takes for the texts, in batches as ours."""
    encoder = load_tokenizer(tokenizer)
    start = time.process_time()
    for i in range(0, len(documents), 64):
        encoder.encode_batch(documents[i : i + 64])
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100, help="of text (default: 100)")
    parser.add_argument("--smoke", action="store_true", help="2 MB: shows that it runs, its figures mean nothing")
    args = parser.parse_args()
    num_bytes = int(2e6 if args.smoke else args.megabytes * 1e6)
    os.environ["RAYON_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        corpus, out = Path(folder) / "corpus", Path(folder) / "out"
        corpus.mkdir()
        write_corpus(corpus, num_bytes)
        config = make_recipe(corpus)
        data, _ = build.build(config, out, workers=2, keep_stages=True)
        read = data["subsets"]["corpus"]["clean"]["steps"]["read"]
        costs = engine.usage(out / "stages" / "done")
        for stage, cost in costs.items():
            report("stage", stage, cost["cpu_seconds"], read, peak_mib=cost["peak_bytes"] / 2**20)
        kept = [json.loads(line)["text"] for path in sorted(corpus.iterdir()) for line in path.open()]
        stored = data["stores"]["corpus"]
        share_stored = stored["bytes"] / sum(len(text.encode()) for text in kept)
        alone, ours = library_alone(kept, out / "tokenizer.json") * share_stored, costs["tokens"]["cpu_seconds"]
        print(json.dumps({"tokenizer_alone_cpu_seconds": alone, "stage_tokens": ours, "share": alone / ours}))
        whole = sum(cost["cpu_seconds"] for stage, cost in costs.items() if stage not in ALONE)
        report("stage", f"all but {', '.join(ALONE)}", whole, read)
        for line in page_costs(Path(folder), num_bytes // 4):
            print(json.dumps(line), flush=True)
        each = list(rule_costs(num_bytes // 10))
        for line in each:
            print(json.dumps(line))
        sample = "".join(kept)[: 1 << 24].encode()
        packed = len(sample) / len(gzip.compress(sample, 6))
        hours = {"plain": whole / read["bytes"] * 1e12 / 3600}
        hours["web"] = hours["plain"] + sum(1e6 / line["mb_per_cpu_second"] / 3600 for line in each)
        years = hours["web"] * TXT360_BYTES / 1e12 * packed / 24 / 365
        print(json.dumps({"cpu_hours_per_tb": hours, "gzip_ratio": packed, "txt360_core_years": years}))


def report(kind: str, name: str, cpu_seconds: float, read: dict, **more: float) -> None:
    speed = {
        "mb_per_cpu_second": read["bytes"] / 1e6 / cpu_seconds,
        "documents_per_cpu_second": read["documents"] / cpu_seconds,
    }
    print(json.dumps({kind: name, "cpu_seconds": cpu_seconds, **speed, **more}), flush=True)


if __name__ == "__main__":
    main()
