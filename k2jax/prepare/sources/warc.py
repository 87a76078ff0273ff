"""Pages out of web archives: responses with status 200 that are HTML or plain text, and the texts of WET files."""

import io
import re
from collections.abc import Iterator
from typing import Any

from warcio.archiveiterator import ArchiveIterator
from warcio.exceptions import ArchiveLoadFailed

from k2jax.data.records import TOO_LONG, Bad
from k2jax.prepare.sources.body import unpacked
from k2jax.prepare.sources.files import DAMAGE, File, opened
from k2jax.prepare.sources.records import Record

HTML = ("text/html", "application/xhtml+xml")
CHARSET = re.compile(rb"charset\s*=\s*[\"']?\s*([\w-]{2,20})", re.IGNORECASE)
HEAD_BYTES = 1024  # in which HTML must name its encoding
# Of those that pages come in. Python has codecs that are none (rot13) or take for ever (punycode).
ENCODINGS = re.compile(r"iso-?8859-?\d\d?|latin-?1|windows-?\d+|cp125\d|gb\w+|big5\w*|euc-\w+|shift.?jis|koi8-\w")


def warc_records(file: File, *, most: int, html_only: bool, text_key: str) -> Iterator[Record]:
    """(number of the record from 1, its page or what is wrong with it), for .warc, .warc.gz and .warc.zst.

    Records that are no responses (requests, metadata) are passed over. A record whose length or digest is not what
    its header says is bad, and so is one whose body is not packed as its headers say (body.py); where none can be
    recognised the rest of the file is lost, and counted as such.
    """
    number, page = 0, None
    try:
        with opened(file) as stream:
            watched = _Watched(stream)
            archive = ArchiveIterator(watched, check_digests=True)
            for record in archive:
                number += 1
                page = _damage(record)
                if page is None and record.rec_type in ("response", "conversion"):
                    page = _page(record, most, html_only, text_key)
                damage, is_longer = _end(archive)
                if is_longer:
                    page = Bad("damaged record", "it is longer than its Content-Length")
                if page is not None:
                    yield number, page
                if damage:  # behind a page that is whole
                    raise damage
            stream.read(1)  # within headers warcio takes an error for the end of the file: here it is raised again
            counted = isinstance(page, Bad) and page.reason == "damaged record"
            if archive.offset < watched.size or (watched.end.strip() and not counted):
                raise EOFError("it ends within a record")
    except DAMAGE as error:
        reason = "truncated file" if isinstance(error, EOFError) else "damaged file"
        yield number + 1, Bad(reason, f"{error}; what follows is lost")
    except (ArchiveLoadFailed, ValueError, AttributeError, TypeError) as error:  # of headers that are none
        yield number + 1, Bad("damaged record", f"{error}"[:80].strip() + "; what follows is lost")
    else:
        if not number:
            yield 0, Bad("empty file")


class _Watched:
    """How much was read, and its end: of a whole file, the two empty lines behind each record."""

    def __init__(self, stream: io.BufferedReader):
        self._stream, self.end, self.size = stream, b"", 0

    def read(self, size: int) -> bytes:
        data = self._stream.read1(size)  # what stands before a damage
        self.end, self.size = (self.end + data)[-4:], self.size + len(data)
        return data


def _end(archive: ArchiveIterator) -> tuple[Exception | None, bool]:
    """Goes to the end of the record: the damage on the way, and whether more than empty lines stands behind it."""
    before, damage = archive.err_count, None
    try:
        archive.read_to_end()
    except DAMAGE as error:
        damage = error
    return damage, archive.err_count > before


def _damage(record: Any) -> Bad | None:
    """What is wrong with a record's header, of whatever type: without a length it swallows those behind it."""
    length = record.rec_headers.get_header("Content-Length") or "none"
    if not length.isdigit():
        return Bad("damaged record", f"Content-Length: {length}; what follows is lost")
    return None if record.rec_type else Bad("damaged record", "no WARC-Type")


def _page(record: Any, most: int, html_only: bool, text_key: str) -> dict[str, Any] | Bad:
    headers = record.rec_headers
    if record.length > most:
        return Bad(TOO_LONG, f"{record.length} bytes")
    http = record.http_headers
    if record.rec_type == "response" and (http is None or http.get_statuscode() != "200"):
        return Bad("not status 200")
    declared = (http or headers).get_header("Content-Type") or ""
    kind = (headers.get_header("WARC-Identified-Payload-Type") or declared).partition(";")[0].strip().lower()
    if kind not in HTML and (html_only or kind != "text/plain"):
        return Bad("no page", kind)
    body = record.raw_stream.read()
    if record.raw_stream.limit:
        return Bad("damaged record", f"it ends {record.raw_stream.limit} bytes early")
    if any(problem.startswith("block digest failed") for problem in record.digest_checker.problems):
        return Bad("damaged record", "its digest is another")
    is_chunked = "chunked" in _header(http, "Transfer-Encoding").lower()
    content = unpacked(body, _header(http, "Content-Encoding"), is_chunked=is_chunked, most=most)
    text = content if isinstance(content, Bad) else _decoded(content, declared)
    if isinstance(text, Bad):
        return text
    return {
        text_key: text,
        "url": headers.get_header("WARC-Target-URI"),
        "id": headers.get_header("WARC-Record-ID"),
        "date": headers.get_header("WARC-Date"),
    }


def _header(http: Any, name: str) -> str:
    """All values of a header of the response."""
    return ", ".join(value for key, value in (http.headers if http else ()) if key.lower() == name.lower())


def _decoded(content: bytes, declared: str) -> str | Bad:
    """UTF-8 if it is, else by the encoding that the server or the page names."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        named = CHARSET.search(declared.encode("latin-1", "replace")) or CHARSET.search(content[:HEAD_BYTES])
        encoding = named[1].decode().lower() if named else "utf-8"
    try:
        if ENCODINGS.fullmatch(encoding):
            return content.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        pass  # counted below
    return Bad("not in its encoding", encoding)
