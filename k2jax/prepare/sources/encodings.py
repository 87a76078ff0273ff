"""Text of any encoding as UTF-8: known by its byte order mark, named by the recipe, or guessed where that says so.

A mark says more than the recipe. Without one, and without a name, text is UTF-8, and what is none of it is counted
where it stands. "detect" guesses an encoding for each file, by chardet, from those of its first bytes that are not
ASCII: a guess, right for 19 files of 20 (tools/bench/file_encodings.py); how many files each encoding had is on
the card. What cannot be decoded becomes bytes that are no UTF-8, so that the reader counts the line, or the file, and
goes on.
"""

import codecs
import io
import re

from k2jax.prepare.rule_checks import DETECT
from k2jax.prepare.sources.files import BLOCK, DAMAGE
from k2jax.prepare.sources.packed import Damaged

UTF_8, UNKNOWN = "utf-8", "unknown"
MARKS = (  # UTF-32's little one begins with that of UTF-16
    (codecs.BOM_UTF8, UTF_8),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
HEAD_BYTES = 1 << 20  # by which an encoding is guessed,
SAMPLE_BYTES = 1 << 12  # and of those that many, of the lines that are not ASCII: it takes a tenth of a second
# Encodings whose letters another has, too, beside quotation marks and more: what says nothing against it is that.
MORE = {
    "iso8859-1": "cp1252", "iso8859-15": "cp1252", "iso8859-7": "cp1253", "iso8859-8": "cp1255", "iso8859-9": "cp1254",
    "iso8859-13": "cp1257", "euc_kr": "cp949", "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932",
}  # fmt: skip
JAPANESE_ESCAPE = re.compile(rb"\x1b\$[@B]")  # ISO-2022-JP, which is of seven bits


def as_utf8(stream: io.BufferedReader, encoding: str, *, begins: bool = True) -> tuple[io.BufferedReader, str]:
    """The stream's text in UTF-8, without a mark, and the encoding it is in; `begins` False: it is a later part.

    What is not of that encoding is not of UTF-8 either, afterwards. UNKNOWN is what nothing could be guessed for: its
    bytes stay.
    """
    head, damage = _head(stream, HEAD_BYTES if encoding == DETECT else max(len(mark) for mark, _ in MARKS))
    marked = [(mark, name) for mark, name in MARKS if begins and head.startswith(mark)]
    if marked:
        mark, found = marked[0]
        head = head[len(mark) :]
    else:
        found = guessed(head) if encoding == DETECT else codecs.lookup(encoding or UTF_8).name
    rest = io.BufferedReader(_Joined(head, damage, stream), BLOCK)
    if found in (UTF_8, UNKNOWN):
        return rest, found
    return io.BufferedReader(_Recoded(rest, found), BLOCK), found


def guessed(head: bytes) -> str:
    """The encoding of a file that begins so; UNKNOWN where nothing fits."""
    first, second = head[0::2].count(0), head[1::2].count(0)
    if max(first, second) * 8 > len(head) and min(first, second) * 4 < max(first, second):
        return "utf-16-le" if second > first else "utf-16-be"  # every other byte of it that is Latin
    if JAPANESE_ESCAPE.search(head):
        return "iso2022_jp"
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(head)  # a character may be cut at its end
    wrong = text.count("\N{REPLACEMENT CHARACTER}")
    if sum(one > "\x7f" for one in text) >= 2 * wrong:  # at worst with damages: those are counted where they stand
        return UTF_8
    if b"\0" in head:  # no text has it, but UTF-16
        return UNKNOWN
    import chardet  # for these files alone
    from chardet.enums import EncodingEra

    eras = EncodingEra.MODERN_WEB | EncodingEra.LEGACY_ISO | EncodingEra.LEGACY_REGIONAL  # no old Macs, DOS, mainframes
    lines = b"\n".join(line for line in head.splitlines() if not line.isascii())[:SAMPLE_BYTES]
    name = chardet.detect(lines, encoding_era=eras)["encoding"]
    try:
        found = codecs.lookup(name).name if name else UNKNOWN
    except LookupError:  # Python has not all that it knows
        return UNKNOWN
    more = MORE[found] if found in MORE else found
    return more if found in MORE and lines.decode(more, "replace") == lines.decode(found, "replace") else found


def _head(stream: io.BufferedReader, size: int) -> tuple[bytes, Exception | None]:
    """The first bytes, and the damage that ends them: it is raised again behind them."""
    head = b""
    try:
        while len(head) < size and (data := stream.read1(size - len(head))):
            head += data
    except DAMAGE as error:
        return head, error
    return head, None


class _Joined(io.RawIOBase):
    """What was read, then the rest."""

    def __init__(self, head: bytes, damage: Exception | None, stream: io.BufferedReader):
        self._head, self._damage, self._stream = memoryview(head), damage, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        if not self._head and self._damage:
            raise self._damage
        if not self._head:
            return self._stream.readinto1(buffer)
        size = min(len(buffer), len(self._head))
        buffer[:size], self._head = self._head[:size], self._head[size:]
        return size


class _Recoded(io.RawIOBase):
    """Text of another encoding in UTF-8; what is none of it becomes what is no UTF-8."""

    def __init__(self, stream: io.BufferedReader, encoding: str):
        # Both give half surrogates, which are written as they are, and which UTF-8 does not have.
        errors = "surrogatepass" if encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"
        self._stream, self._encoding = stream, encoding
        self._decoder, self._ready, self._over = codecs.getincrementaldecoder(encoding)(errors), memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        while not self._ready and not self._over:
            data = self._stream.read1(BLOCK)
            self._over = not data
            try:
                text = self._decoder.decode(data, final=self._over)
            except UnicodeDecodeError as error:
                raise Damaged(f"no text of {self._encoding}: {error.reason}") from error
            self._ready = memoryview(text.encode("utf-8", "surrogatepass"))
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size
