"""Text of any encoding: by its mark, by its name, by a guess; what is none of it costs a line, not a file."""

import codecs
import gzip
import io
import json

import pytest

pytest.importorskip("datatrove", reason="the extra `data`")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from test_read import jsonl, read_all  # noqa: E402

from k2jax.errors import ConfigError  # noqa: E402
from k2jax.prepare import recipe  # noqa: E402
from k2jax.prepare.sources import encodings  # noqa: E402
from k2jax.prepare.sources.encodings import as_utf8, guessed  # noqa: E402
from k2jax.prepare.sources.files import File  # noqa: E402
from k2jax.prepare.sources.listing import num_parts  # noqa: E402
from k2jax.prepare.sources.read import documents  # noqa: E402
from k2jax.prepare.tally import Tally  # noqa: E402

MARKED = [
    ("utf-8", codecs.BOM_UTF8), ("utf-16-le", codecs.BOM_UTF16_LE), ("utf-16-be", codecs.BOM_UTF16_BE),
    ("utf-32-le", codecs.BOM_UTF32_LE), ("utf-32-be", codecs.BOM_UTF32_BE),
]  # fmt: skip
SENTENCES = {
    "cp1252": "Übung macht den Meister – und größere Brötchen schmecken süßer als „kleine“.",
    "iso8859_1": "Blåbærsyltetøy er godt på brødskive.",
    "latin_1": "Le garçon a été élevé à la campagne près de l'église où il naquit.",
    "iso8859_15": "A educação é a chave do coração; não há solução fácil.",
    "cp1254": "Çok güzel bir gün, öğretmen şöyle dedi.",
    "cp1251": "Москва является столицей России и крупнейшим городом страны.",
    "koi8_r": "Москва является столицей России и крупнейшим городом страны.",
    "gb18030": "北京是中华人民共和国的首都,也是全国的政治中心和文化中心。",
    "big5": "臺北市是中華民國的首都,也是臺灣的政治文化中心。",
    "shift_jis": "東京は日本の首都であり、世界最大の都市圏の一つである。",
    "iso2022_jp": "東京は日本の首都であり、世界最大の都市圏の一つである。",
    "euc_kr": "서울은 대한민국의 수도이자 최대 도시이다. 한강이 흐른다.",
    "cp1250": "Příliš žluťoučký kůň úpěl ďábelské ódy v pražských ulicích.",
    "cp1253": "Η Αθήνα είναι η πρωτεύουσα της Ελλάδας και η μεγαλύτερη πόλη.",
    "cp1255": "ירושלים היא בירתה של מדינת ישראל והעיר הגדולה ביותר בה.",
    "cp1256": "القاهرة هي عاصمة جمهورية مصر العربية وأكبر مدنها.",
    "utf-16-le": "Without a mark, as some editors of Windows write it: façade.",
    "utf-8": "Without a mark: façade, naïve, 東京.",
}


def lines_of(*texts: str) -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


@pytest.mark.parametrize(("name", "mark"), MARKED)
def test_a_byte_order_mark_says_how_a_file_is_written(tmp_path, name, mark):
    (tmp_path / "a.txt").write_bytes(mark + "façade 東京 \U0001f40d\n".encode(name))
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(mark + lines_of("façade", "東京 \U0001f40d").encode(name)))
    for encoding in ("", "latin-1", "detect"):  # it says more than a name does
        found, tally = read_all(f"text:{tmp_path}/a.txt", encoding=encoding)
        assert [one.text for one in found] == ["façade 東京 \U0001f40d\n"] and tally.encodings == {name: 1}
        found, tally = read_all(f"jsonl:{tmp_path}/a.jsonl", encoding=encoding)
        assert [one.text for one in found] == ["façade", "東京 \U0001f40d"] and tally.encodings == {name: 1}
        assert not tally.bad


def test_files_without_a_mark_are_utf8_or_what_the_recipe_says(tmp_path):
    (tmp_path / "a.txt").write_bytes("façade".encode("latin-1"))
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "plain"}\n' + lines_of("façade").encode("latin-1"))
    assert read_all(f"text:{tmp_path}/a.txt")[1].bad == {"not UTF-8": 1}
    found, tally = read_all(f"jsonl:{tmp_path}/a.jsonl")
    assert [one.text for one in found] == ["plain"] and tally.bad == {"not UTF-8": 1}
    for encoding in ("latin-1", "ISO-8859-1"):
        found, tally = read_all(f"text:{tmp_path}/a.txt", encoding=encoding)
        assert [one.text for one in found] == ["façade"] and tally.encodings == {"iso8859-1": 1}
        assert [one.text for one in read_all(f"jsonl:{tmp_path}/a.jsonl", encoding=encoding)[0]] == ["plain", "façade"]


@pytest.mark.parametrize(
    ("encoding", "wrong"),
    [("utf-16-le", b"\x00\xd8"), ("utf-16-be", b"\xdc\x00"), ("shift_jis", b"\xff"), ("cp1252", b"\x81"),
     ("gb18030", b"\xff"), ("euc_kr", b"\xc9\xfe")],
)  # fmt: skip
def test_a_line_that_is_not_of_the_encoding_is_bad_alone(tmp_path, encoding, wrong):
    good, bad = lines_of("東京" if encoding[0] in "us" else "one"), lines_of("b@d")
    at = bad.index("@")
    data = (good + bad[:at]).encode(encoding) + wrong + (bad[at + 1 :] + good).encode(encoding)
    (tmp_path / "a.jsonl").write_bytes(data)
    found, tally = read_all(f"jsonl:{tmp_path}/a.jsonl", encoding=encoding)
    assert len(found) == 2 and found[0].text == found[1].text and found[1].metadata["source"] == "a.jsonl:3"
    name = codecs.lookup(encoding).name
    assert tally.bad == {f"not {name}": 1} and tally.problems[0].startswith(f"a.jsonl:2: not {name} (character ")
    (tmp_path / "a.txt").write_bytes(data)
    assert read_all(f"text:{tmp_path}/a.txt", encoding=encoding)[1].bad == {f"not {name}": 1}


@pytest.mark.parametrize("cut", [1, 3])
def test_a_file_that_ends_within_a_character_keeps_what_stands_before(tmp_path, cut):
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF16_LE + lines_of("one", "two").encode("utf-16-le")[:-cut])
    found, tally = read_all(f"jsonl:{tmp_path}/a.jsonl")
    assert [one.text for one in found][:1] == ["one"] and len(found) + sum(tally.bad.values()) == 2
    packed = gzip.compress(codecs.BOM_UTF16_LE + lines_of(*("x" * 999 for _ in range(99))).encode("utf-16-le"))
    (tmp_path / "a.jsonl").write_bytes(packed[:-9])
    for encoding in ("", "detect"):
        found, tally = read_all(f"jsonl:{tmp_path}/a.jsonl", encoding=encoding)
        assert len(found) >= 98 and sum(tally.bad.values()) == 1, tally.problems


@pytest.mark.parametrize("name", SENTENCES)
def test_an_encoding_is_guessed_file_by_file(tmp_path, name):
    text = SENTENCES[name]
    (tmp_path / "a.txt").write_bytes(text.encode(name))
    (tmp_path / "a.jsonl").write_bytes((lines_of("plain") * 9 + lines_of(text)).encode(name))
    found, tally = read_all(f"text:{tmp_path}/a.txt", encoding="detect")
    assert [one.text for one in found] == [text] and sum(tally.encodings.values()) == 1
    assert read_all(f"jsonl:{tmp_path}/a.jsonl", encoding="detect")[0][-1].text == text


def test_a_guess_is_of_the_encoding_that_has_more(tmp_path):
    """Quotation marks of Windows, behind what is guessed by: in ISO 8859 they would be control characters."""
    early, late = "Le garçon a été élevé à la campagne.", "“Où?” – dit-il."
    lines = [early] * 40_000 + [late]
    (tmp_path / "a.txt").write_bytes("\n".join(lines).encode("cp1252"))
    [one], _ = read_all(f"text:{tmp_path}/a.txt", encoding="detect")
    assert one.text.endswith(late) and "\n".join(lines).encode("cp1252").index(b"\x93") > encodings.HEAD_BYTES
    assert guessed("Le cœur coûte 5 € à Noël.".encode("iso8859-15")) == "iso8859-15"


def test_a_guess_does_not_turn_damaged_utf8_into_another_encodings_letters(tmp_path):
    """As a guesser does that is asked about the whole: each letter that is fine would become two."""
    data = lines_of("größer", "süßer") + lines_of("da@mage") + lines_of("naïve")
    (tmp_path / "a.jsonl").write_bytes(data.encode().replace(b"@", b"\xff"))
    found, tally = read_all(f"jsonl:{tmp_path}/a.jsonl", encoding="detect")
    assert [one.text for one in found] == ["größer", "süßer", "naïve"] and tally.bad == {"not UTF-8": 1}
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"text": "a\0b"}]) + b'{"text": "a\0b"}\n' + lines_of("fine").encode())
    found, tally = read_all(f"jsonl:{tmp_path}/b.jsonl", encoding="detect")
    assert [one.text for one in found] == ["fine"] and tally.encodings == {"utf-8": 1}
    assert guessed(("x" * (encodings.HEAD_BYTES - 1) + "é").encode()[: encodings.HEAD_BYTES]) == "utf-8"
    assert guessed(b"\xff\x00\x81" * 50) == guessed(b"\x81\x8d\x8f\x90\x9d" * 9 + b"\0") == "unknown"
    (tmp_path / "c.txt").write_bytes(b"\x81\x8d\x8f\x90\x9d" * 9 + b"\0")
    assert read_all(f"text:{tmp_path}/c.txt", encoding="detect")[1].bad == {"unknown encoding": 1}


def test_a_mark_alone_is_an_empty_file_and_bytes_are_counted_as_utf8(tmp_path):
    for _, mark in MARKED:
        (tmp_path / "a.txt").write_bytes(mark)
        (tmp_path / "a.jsonl").write_bytes(mark)
        for source in (f"text:{tmp_path}/a.txt", f"jsonl:{tmp_path}/a.jsonl"):
            assert read_all(source)[1].bad == {"empty file": 1}
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF16_LE + "東京".encode("utf-16-le"))
    assert len(read_all(f"text:{tmp_path}/a.txt", max_line_bytes=6)[0]) == 1
    assert read_all(f"text:{tmp_path}/a.txt", max_line_bytes=5)[1].bad == {"longer than max_line_bytes": 1}


NO_ENCODINGS = ["latin1x", "rot13", "hex", "zlib", "idna", "punycode", "utf-16", "utf_32", "utf-7", "a\0"]


@pytest.mark.parametrize("name", NO_ENCODINGS)
def test_names_that_are_no_encoding_of_files_are_refused(name):
    config = recipe.base()
    config.subsets.web = recipe.subset("text:x", encoding=name)
    with pytest.raises(ConfigError, match="1 problem.*subsets.web.encoding="):
        recipe.validate(config)


def test_tables_and_archives_have_their_own_encoding():
    config = recipe.base()
    config.subsets.a = recipe.subset("parquet:x", encoding="latin-1")
    config.subsets.b = recipe.subset("warc:x", encoding="detect")
    config.subsets.c = recipe.subset("jsonl:x", encoding="cp1252")
    with pytest.raises(ConfigError, match="2 problem.*a.encoding.*parquet: has its own.*b.encoding"):
        recipe.validate(config)


class _Dribble(io.BytesIO):
    """A storage that gives a few bytes at a time."""

    def readinto(self, buffer) -> int:
        data = self.read(min(3, len(buffer)))
        buffer[: len(data)] = data
        return len(data)


@given(st.text(max_size=40), st.sampled_from(["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "gb18030"]))
def test_every_text_comes_back_however_it_is_cut(text, name):
    mark = dict(MARKED).get(name, b"")
    if text.startswith("\0") or (not mark and any(text.encode(name).startswith(one) for _, one in MARKED)):
        return  # UTF-16's mark and a NUL are UTF-32's
    stream, found = as_utf8(io.BufferedReader(_Dribble(mark + text.encode(name)), 4), "gb18030")
    assert stream.read() == text.encode() and found == name


@given(st.binary(max_size=60), st.sampled_from(["", "detect", "shift_jis", "utf-16-le", "utf-32-be", "iso2022_jp"]))
def test_no_bytes_are_more_than_bad_input(tmp_path_factory, data, encoding):
    path = tmp_path_factory.mktemp("x") / "a.jsonl"
    path.write_bytes(data)
    for kind in ("jsonl", "text"):
        read_all(f"{kind}:{path}", encoding=encoding)


def test_a_later_part_of_a_file_has_no_mark_and_one_of_another_encoding_is_not_cut(tmp_path):
    """A line that is no UTF-8 would else turn the part that it begins into UTF-16."""
    path, first = tmp_path / "a.jsonl", lines_of("one", "two").encode()
    rest = b"\xff\xfe\n" + lines_of("three").encode()
    path.write_bytes(first + rest)
    whole = File("a.jsonl", str(path), len(first + rest))
    whole_size = whole.size
    parts = [whole._replace(size=len(first), end=len(first), whole=whole_size),
             whole._replace(size=len(rest), begin=len(first), end=whole_size, first=2, whole=whole_size)]  # fmt: skip
    tally = Tally()
    found = list(documents(recipe.subset(f"jsonl:{path}"), parts, name="web", tally=tally))
    assert [one.metadata["source"] for one in found] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4"]
    assert tally.bad == {"not UTF-8": 1} and tally.encodings == {"utf-8": 1}
    assert num_parts(whole, recipe.subset(f"jsonl:{path}"), 10) > 1
    for encoding in ("detect", "gb18030"):
        assert num_parts(whole, recipe.subset(f"jsonl:{path}", encoding=encoding), 10) == 1
