"""What is done to a document after it is read: each rule looks at one document alone, edits it or names a reason.

A rule gives the reason for which the document is left out, or None; the same document has the same fate on every
machine and beside any other. The order is fixed, by what they cost (a block list before text is taken out of HTML, a
scorer of the user's on what all others left): url, extract, language, lines, repeated, quality, the filters, scorer,
nfc, pii, size.
"""

import functools
import logging
import re
import unicodedata
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.data import Document
from ml_collections import ConfigDict

from k2jax.data.records import Bad, text_of
from k2jax.errors import ConfigError
from k2jax.prepare.rules import scores
from k2jax.prepare.rules.lines import drop_lines, without_repeated
from k2jax.prepare.rules.pii import pii_replacer
from k2jax.prepare.rules.scores import Apply, import_of
from k2jax.prepare.sources.read import size_problem
from k2jax.prepare.tally import Tally, clean_name

# A crawler keeps 1 MiB of a page (Common Crawl until 2025, then 5); what trafilatura takes grows faster than the page.
HTML_BYTES = 5 << 20
NO_DOMAIN = re.compile(r"[\s/:*|^@]")  # of files of hosts, of addresses, and of filters of advertisements


class Rule(NamedTuple):
    """A step of cleaning, by the name that it is counted under; `together` sees some documents at once before that."""

    step: str
    apply: Apply
    together: Callable[[list[Document]], None] | None = None


def build(chosen: ConfigDict, tally: Tally | None = None) -> list[Rule]:
    """The rules that a subset names, in their order; ConfigError for a file or package that is not there.

    `tally` counts the personal data that they replace, and scores.
    """
    tally = tally or Tally()
    rules = [Rule("url", _url(chosen.url_blocklist))] if chosen.url_blocklist else []
    if chosen.extract:
        rules.append(Rule("extract", _extract()))
    if chosen.language_model:
        rules.append(Rule("language", scores.language(chosen)))
    if chosen.line_rules:
        rules.append(Rule("lines", drop_lines))
    if chosen.drop_repeated:
        rules.append(Rule("repeated", _repeated(chosen.drop_repeated)))
    if chosen.quality_model:
        rules.append(Rule("quality", scores.quality(chosen, tally)))
    rules += [Rule(name, _filter(name)) for name in chosen.filters]
    if chosen.scorer:
        score, judge = scores.scorer(chosen, tally)
        rules.append(Rule("scorer", judge, score))
    rules += edits(chosen, tally)
    if rules:
        rules.append(Rule("size", _size(chosen.min_document_bytes, chosen.max_document_bytes)))
    return rules


def files_of(chosen: ConfigDict) -> list[str]:
    """The files whose content the rules depend on: models, the block list, the module of a scorer."""
    paths = [chosen[key] for key in ("language_model", "quality_model", "url_blocklist")]
    return [path for path in (*paths, scores.file_of(chosen.scorer) if chosen.scorer else "") if path]


def edits(chosen: ConfigDict, tally: Tally | None = None) -> list[Rule]:
    """Of the rules those that change a text and leave out none."""
    rules = [Rule("nfc", _nfc)] if chosen.nfc else []
    return rules + ([Rule("pii", _pii(chosen, tally or Tally()))] if chosen.pii else [])


def _extract() -> Apply:
    """The text of a page, by trafilatura with FineWeb's choice: rather less text than boilerplate in it.

    It runs in this process: in a process with a time limit, as in datatrove, what a machine under load gives is not
    the same twice, and a missing package drops every page as "timeout". `deduplicate` is off: it would drop a
    paragraph for what stood on earlier pages.
    """
    trafilatura = import_of("trafilatura", "trafilatura lxml_html_clean")
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # what it cannot extract is counted here

    def extract(one: Document) -> str | None:
        if len(one.text.encode()) > HTML_BYTES:
            return f"page over {HTML_BYTES >> 20} MiB"
        try:
            text = trafilatura.extract(one.text, favor_precision=True, include_comments=False, deduplicate=False)
        except Exception as error:  # of lxml and of trafilatura's own, over what pages hold
            return f"extraction failed: {type(error).__name__}"
        if not text:
            return "nothing extracted"
        text = text_of(text, HTML_BYTES * 2)
        if isinstance(text, Bad):
            return text.reason
        one.text = text
        return None

    return extract


def _url(path: str) -> Apply:
    """Leaves out documents whose host is a domain of the list or below one; those without a URL stay."""
    try:
        lines = Path(path).read_text("utf-8-sig").lower().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"url_blocklist={path} cannot be read ({error}): expected domains, one a line") from error
    domains = set()
    for number, line in enumerate(lines, 1):
        if domain := line.partition("#")[0].strip().strip("."):
            if NO_DOMAIN.search(domain):
                what = clean_name(domain)
                raise ConfigError(f"url_blocklist={path}:{number}: {what} is no domain; expected one a line")
            domains.add(_ascii(domain))
    if not domains:
        raise ConfigError(f"url_blocklist={path} names no domain; expected domains, one a line")

    def blocked(one: Document) -> str | None:
        try:
            host = urllib.parse.urlsplit(one.metadata.get("url", "")).hostname or ""
        except ValueError:  # brackets around what is no address
            return None
        parts = _ascii(host.lower().strip(".")).split(".")
        return "blocked domain" if any(".".join(parts[i:]) in domains for i in range(len(parts))) else None

    return blocked


def _ascii(domain: str) -> str:
    """A domain as the network has it, where it can be one."""
    try:
        return domain if domain.isascii() else domain.encode("idna").decode()
    except UnicodeError:
        return domain


@functools.cache
def _words() -> Any:
    """datatrove's filters ask this for words and sentences: its own for English, spaCy, is 80% of their time."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    from k2jax.prepare.rules.lines import sentences

    class Words(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return sentences(text)

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            ends = [0]
            for sentence in sentences(text):
                ends.append(text.index(sentence, ends[-1]) + len(sentence))
            return list(zip(ends[:-1], ends[1:], strict=True))

    return Words()


def _filter(name: str) -> Apply:
    """One of datatrove's filters of documents, with the thresholds of the papers; c4 edits the text as well."""
    from datatrove.pipeline import filters

    kind = {
        "gopher-repetition": filters.GopherRepetitionFilter,
        "gopher-quality": filters.GopherQualityFilter,
        "c4": filters.C4QualityFilter,
    }[name]
    chosen = kind(language=_words())

    def apply(one: Document) -> str | None:
        if not one.text.strip():
            return "empty"
        result = chosen.filter(one)
        kept, reason = result if isinstance(result, tuple) else (result, name)
        return None if kept else reason

    return apply


def _repeated(parts: tuple[str, ...]) -> Apply:
    def apply(one: Document) -> None:
        one.text = without_repeated(one.text, lines="lines" in parts, paragraphs="paragraphs" in parts)

    return apply


def _nfc(one: Document) -> None:
    one.text = unicodedata.normalize("NFC", one.text)


def _pii(chosen: ConfigDict, tally: Tally) -> Apply:
    replace = pii_replacer(chosen.pii, chosen.pii_regions)

    def apply(one: Document) -> None:
        one.text, counts = replace(one.text)
        tally.replaced(counts)

    return apply


def _size(shortest: int, longest: int) -> Apply:
    return lambda one: size_problem(len(one.text.encode()), shortest, longest)
