"""The body of an HTTP response as it came over the wire: chunked, and packed in gzip, deflate, zstd or br.

Some crawlers keep a body as it came, others keep it unpacked and leave its headers as they were: what a header says is
tried, and a body that is none of it, but text, is taken as it stands. One that ends early never is.
"""

import re
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import zstandard

from k2jax.data.records import TOO_LONG, Bad
from k2jax.errors import ConfigError
from k2jax.prepare.sources.packed import PACKINGS, UNPACKING, ZSTD_STEP, Damaged

WINDOW = 8 << 20  # of zstd, as RFC 9659 bounds it for HTTP, and browsers do
MOST_CODINGS = 4  # of one body, one around the other
NO_CODINGS = ("", "identity", "none")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]{0,4096})?\r?\n")
NO_TEXT = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")  # ESC is of ISO-2022-JP


def unpacked(body: bytes, codings: str, *, is_chunked: bool, most: int) -> bytes | Bad:
    """The body as its author wrote it, of at most `most` bytes, or what is wrong with it.

    Args:
        codings: of Content-Encoding, the last one outermost.
    """
    if is_chunked and (CHUNK_SIZE.match(body) or body.endswith(b"\r\n0\r\n\r\n")):
        found = _joined(body)
        if found is None:
            return Bad("damaged chunked body", "it ends early, or a chunk has another length than it says")
        body = found
    names = [name.strip().lower() for name in codings.split(",")]
    names = [name.removeprefix("x-") for name in names if name not in NO_CODINGS]
    if len(names) > MOST_CODINGS:
        return Bad("unknown body encoding", codings)
    for name in reversed(names):
        if name not in DECODERS:
            return body if _is_text(body) else Bad("unknown body encoding", name)
        try:
            content = DECODERS[name](body, most)
        except EOFError:
            return Bad(f"damaged {name} body", "it ends early") if body else body
        except (Damaged, *UNPACKING) as error:
            return body if _is_text(body) else Bad(f"damaged {name} body", str(error))
        if len(content) > most:
            return Bad(TOO_LONG, f"more than {most} bytes once unpacked")
        body = content
    return body


def _is_text(body: bytes) -> bool:
    """As no packed bytes are."""
    if NO_TEXT.search(body) or body.startswith(zstandard.FRAME_HEADER):
        return False
    try:
        body.decode()
    except UnicodeDecodeError:
        return body.lstrip()[:1] == b"<"  # HTML in another encoding
    return True


def _joined(body: bytes) -> bytes | None:
    """The chunks without their sizes; None where they do not fit together. What stands behind the last is left out."""
    parts, at = [], 0
    while size := CHUNK_SIZE.match(body, at):
        start, length = size.end(), int(size[1], 16)
        if not length:
            return b"".join(parts)
        at = start + length
        end = body[at : at + 2]
        if end != b"\r\n" and end[:1] != b"\n":
            return None
        parts.append(body[start:at])
        at += 2 if end == b"\r\n" else 1
    return None


# Each gives more than `most` bytes if there are more, and not many more; an EOFError if the packed bytes end early.


def _members(body: bytes, most: int, packing: tuple[bytes, Any, Callable[[], Any], int]) -> bytes:
    """All members or frames, one behind the other; what stands behind them and is none is left out."""
    first, _, new_decoder, step = packing
    parts, size, at, decoder = [], 0, 0, None
    while at < len(body) and size <= most:
        if decoder is None and at and not body.startswith(first, at):
            break
        decoder = decoder or new_decoder()
        parts.append(decoder.decompress(body[at : at + step]))
        size += len(parts[-1])
        at += step
        if decoder.eof:
            at, decoder = min(at, len(body)) - len(decoder.unused_data), None
    if size <= most and (decoder or not body):
        raise EOFError
    return b"".join(parts)


def _deflate(body: bytes, most: int) -> bytes:
    """With zlib's header, as HTTP says, or without, as servers once did."""
    has_header = body[:1] and body[0] & 15 == zlib.DEFLATED and int.from_bytes(body[:2]) % 31 == 0
    decoder = zlib.decompressobj(zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS)
    content = decoder.decompress(body, most + 1)
    if len(content) <= most and not decoder.eof:
        raise EOFError
    return content


def _brotli(body: bytes, most: int) -> bytes:
    try:
        import brotli  # most archives hold no such body
    except ImportError as error:
        raise ConfigError("a web archive has pages in br: brotli is not installed: pip install brotli") from error
    decoder = brotli.Decompressor()
    try:
        content = decoder.process(body, output_buffer_limit=most + 1)
    except brotli.error as error:
        raise Damaged(str(error)) from error
    if len(content) <= most and not decoder.is_finished():
        raise EOFError
    return content


def _zstd_decoder() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()


ZSTD = (zstandard.FRAME_HEADER, (), _zstd_decoder, ZSTD_STEP)
DECODERS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": partial(_members, packing=PACKINGS["gzip"]),
    "deflate": _deflate,
    "zstd": partial(_members, packing=ZSTD),
    "br": _brotli,
}
