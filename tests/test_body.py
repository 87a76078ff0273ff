"""Bodies as they came over the wire give what their authors wrote, or a named reason; never a part of it in silence."""

import gzip
import http.client
import io
import resource
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

zstandard = pytest.importorskip("zstandard", reason="the extra `data`")
brotli = pytest.importorskip("brotli", reason="the extra `data`")
pytest.importorskip("warcio", reason="the extra `data`")

from test_read_tables import archive, read_all  # noqa: E402

from k2jax.data.records import Bad  # noqa: E402
from k2jax.errors import ConfigError  # noqa: E402
from k2jax.prepare.sources.body import unpacked  # noqa: E402

PAGE = "<p>caf\u00e9</p> ".encode() + b"word %d " * 200 % tuple(range(200))


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


PACK = {
    "gzip": gzip.compress,
    "x-gzip": lambda data: gzip.compress(data[:7]) + gzip.compress(data[7:]),  # in two members
    "deflate": zlib.compress,
    "Deflate": raw_deflate,
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
    "ZSTD ": lambda data: zstandard.compress(data[:7]) + zstandard.compress(data[7:]),
    "br": brotli.compress,
}
LASTING = ("deflate", "zstd", "br", "gzip")  # of one member, so that any cut is seen


def chunked(data: bytes, size: int = 100) -> bytes:
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    return b"".join(b"%X;x=y\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\nServer: x\r\n\r\n"


@pytest.mark.parametrize("coding", PACK)
def test_what_is_packed_is_unpacked(coding):
    for data in (PAGE, b"", b"x" * 100_000):
        assert unpacked(PACK[coding](data), coding, is_chunked=False, most=len(data)) == data
        assert unpacked(chunked(PACK[coding](data)), coding, is_chunked=True, most=len(data)) == data
    twice = PACK["br"](PACK[coding](PAGE))
    assert unpacked(twice, f"{coding}, identity,br", is_chunked=False, most=10_000) == PAGE


@given(st.binary(max_size=50), st.integers(1, 9))
def test_chunks_are_read_as_the_standard_library_reads_them(data, size):
    class Socket:
        def makefile(self, mode):
            return io.BytesIO(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(data, size))

    response = http.client.HTTPResponse(Socket())
    response.begin()
    assert unpacked(chunked(data, size), "", is_chunked=True, most=100) == response.read() == data


@pytest.mark.parametrize("coding", LASTING)
def test_a_cut_body_is_never_a_page(coding):
    whole = PACK[coding](PAGE)
    for cut in range(1, len(whole)):
        found = unpacked(whole[:cut], coding, is_chunked=False, most=10_000)
        assert isinstance(found, Bad) and found.reason == f"damaged {coding} body", cut
    whole = chunked(PAGE)
    for cut in range(8, whole.rindex(b"0\r\n") + 2):
        assert isinstance(unpacked(whole[:cut], "", is_chunked=True, most=10_000), Bad), cut
    assert isinstance(unpacked(b"z" + whole[1:].replace(b"Server: x\r\n", b""), "", is_chunked=True, most=10_000), Bad)


@pytest.mark.parametrize("coding", ["gzip", "zstd", "deflate"])  # br has no check sum
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_damaged_body_is_a_page_only_if_it_is_the_same(coding, at, flip):
    body = bytearray(PACK[coding](PAGE))
    body[at % len(body)] ^= flip
    found = unpacked(bytes(body), coding, is_chunked=False, most=10_000)
    assert isinstance(found, Bad) or found == PAGE


@given(st.binary(max_size=300), st.sampled_from(["", *PACK, "br,gzip", "gzip,br", "compress"]), st.booleans())
def test_no_body_is_more_than_bad_input_or_more_than_is_allowed(body, coding, is_chunked):
    found = unpacked(body, coding, is_chunked=is_chunked, most=1000)
    assert isinstance(found, Bad) or len(found) <= 1000


@pytest.mark.parametrize("coding", [*PACK, "utf-8", "compress"])
def test_text_that_was_unpacked_before_is_taken_as_it_stands_and_other_bytes_are_not(coding):
    latin = PAGE.decode().encode("latin-1")
    for text in (PAGE, latin, b"plain words, in no language of computers"):
        found = unpacked(text, coding, is_chunked=True, most=10_000)
        assert found == text or (coding == "br" and isinstance(found, Bad)), text
    found = unpacked(b"\x1f\x9d\x90" + bytes(100), coding, is_chunked=False, most=10_000)
    name = coding.strip().lower().removeprefix("x-")
    assert found.reason == ("unknown body encoding" if name in ("utf-8", "compress") else f"damaged {name} body")


def test_codings_without_end_are_not_followed():
    assert unpacked(PAGE, ",".join(["br"] * 1000), is_chunked=False, most=1000).reason == "unknown body encoding"


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd", "br"])
def test_a_bomb_is_cut_off_long_before_it_is_unpacked(coding):
    quick = {"br": lambda data: brotli.compress(data, quality=1)}
    bomb = (PACK | quick)[coding](bytes(1 << 28))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bomb_again = unpacked(bomb, coding, is_chunked=False, most=1 << 16)
    assert bomb_again.reason == "longer than max_line_bytes"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 << 10  # KiB: zstd's step is 64 MiB


def test_many_tiny_members_are_read_in_one_go():
    assert unpacked(gzip.compress(b"x") * 50_000, "gzip", is_chunked=False, most=1 << 20) == b"x" * 50_000
    assert unpacked(zstandard.compress(b"x") * 50_000, "zstd", is_chunked=False, most=1 << 20) == b"x" * 50_000


@pytest.mark.parametrize("is_chunked", [True, False])
def test_pages_of_an_archive_come_out_of_every_packing(tmp_path, is_chunked):
    for name, pack in PACK.items():
        extra = [("Content-Encoding", name)] + [("Transfer-Encoding", "Chunked")] * is_chunked
        wire = chunked if is_chunked else bytes
        pages = [("200 OK", "text/html", wire(pack(PAGE)), None), ("200 OK", "text/html", wire(pack(PAGE)[:-2]), None)]
        (tmp_path / "a.warc.gz").write_bytes(archive(pages, extra=tuple(extra))[0])
        found, tally = read_all(f"warc:{tmp_path}")
        assert [one.text.encode() for one in found] == [PAGE], name
        assert sum(tally.bad.values()) == 1 and "body (it ends early)" in tally.problems[0], name


def test_an_archive_with_br_needs_the_package_by_name(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "brotli", None)
    pages = [("200 OK", "text/html", brotli.compress(PAGE), None)]
    (tmp_path / "a.warc.gz").write_bytes(archive(pages, extra=(("Content-Encoding", "br"),))[0])
    with pytest.raises(ConfigError, match="pip install brotli"):
        read_all(f"warc:{tmp_path}")
