"""Each rule removes what it should and leaves the rest alone; the tally and the samples say what was removed."""

import sys
import time
import unicodedata

import pytest

for _package in ("datatrove", "trafilatura", "fasttext"):
    pytest.importorskip(_package, reason="the extra `data`")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from k2jax.errors import ConfigError  # noqa: E402
from k2jax.prepare.clean import clean  # noqa: E402
from k2jax.prepare.documents import document  # noqa: E402
from k2jax.prepare.recipe import subset  # noqa: E402
from k2jax.prepare.rule_checks import FILTERS  # noqa: E402
from k2jax.prepare.rules import lines, rules  # noqa: E402
from k2jax.prepare.tally import Tally  # noqa: E402

PROSE = """The lighthouse at the end of the island was built in the summer of 1871, and it has stood there ever since.
Its keeper lived with his family in the small house below, which the sea reached in the worst of the winter storms.
They kept a garden, some goats and a boat, with which the eldest son rowed to the village for flour and for letters.
Nobody has lived there for forty years now, but the lamp still turns, and ships that pass at night still look for it.
Every spring a painter comes to whiten the tower, because salt and wind take the colour off within a few months.
"""
MENU = '<nav><a href="/">Home</a><a href="/shop">Shop</a></nav>'
PAGE = f"""<!doctype html><html><head><title>The lighthouse</title><script>var x = "tracking";</script></head>
<body>{MENU}<article><h1>The lighthouse</h1>{"".join(f"<p>{line}</p>" for line in PROSE.splitlines())}</article>
<footer>Copyright 2024 <a href="/imprint">Imprint</a></footer></body></html>"""


def apply(text: str, *, metadata: dict | None = None, **options):
    """(reason or None, text, metadata) after a subset's rules."""
    one = document(text, **(metadata or {}))
    for rule in rules.build(subset("text:x", **options)):
        if reason := rule.apply(one):
            return f"{rule.step}: {reason}", one.text, one.metadata
    return None, one.text, one.metadata


def test_a_page_survives_extraction_without_its_menu_and_scripts():
    """datatrove's extractor, in a process of its own, drops every page as "timeout" if lxml_html_clean is missing."""
    reason, text, _ = apply(PAGE, extract=True)
    assert reason is None
    assert all(line in text for line in PROSE.splitlines())
    assert "tracking" not in text and "Imprint" not in text and "<" not in text


def test_extraction_of_a_page_does_not_depend_on_earlier_pages():
    [extract, _] = rules.build(subset("text:x", extract=True))
    texts = set()
    for _ in range(12):
        one = document(PAGE)
        assert extract.apply(one) is None
        texts.add(one.text)
    assert len(texts) == 1


def test_what_cannot_be_extracted_has_a_reason():
    for page, reason in (
        ("", "nothing extracted"),
        ("\x01\x02 no page", "nothing extracted"),
        ("<html><body></body></html>", "nothing extracted"),
        ("<p>" + "x" * rules.HTML_BYTES, "page over 5 MiB"),
    ):
        assert apply(page, extract=True)[0] == f"extract: {reason}"
    deep = "<div>" * 5000 + PROSE + "</div>" * 5000
    assert apply(deep, extract=True)[0] is None or "extract" in apply(deep, extract=True)[0]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A real model of fastText, of a few sentences: its shipped one is 126 MB to download."""
    import fasttext

    folder = tmp_path_factory.mktemp("model")
    english = "the house by the sea|where is the station|we have eaten all of the bread|it was raining that day"
    german = "das haus am meer|wo ist der bahnhof|wir haben das ganze brot gegessen|an dem tag hat es geregnet"
    with open(folder / "train.txt", "w") as file:
        for label, text in (("en", english), ("de", german)):
            file.writelines(f"__label__{label} {line}\n" for line in text.split("|"))
    # It sets a tenth of the weights on each thread: with fewer than ten some stay what the memory held, at times NaN.
    model = fasttext.train_supervised(
        str(folder / "train.txt"), epoch=300, lr=0.1, dim=20, thread=10, verbose=0
    )
    model.save_model(str(folder / "model.bin"))
    return str(folder / "model.bin")


def test_languages_are_labelled_and_others_left_out(language_model):
    options = {"language_model": language_model, "languages": ("en",)}
    english, german = "where is the house by\nthe sea", "wo ist das haus am\nmeer"
    assert apply(english, **options) == (None, english, {"language": "en"})
    assert apply(german, **options)[0] == "language: language de"
    assert apply(german, **(options | {"languages": ("en", "de")}))[0] is None
    assert apply(german, language_model=language_model) == (None, german, {"language": "de"})  # labelled alone
    mixed = "where is the bahnhof am meer das haus by the sea"
    assert apply(mixed, **(options | {"languages": ("en", "de"), "language_threshold": 1.0}))[0] == (
        "language: language unsure"
    )


def test_a_language_that_the_model_does_not_know_is_named(language_model):
    """Else all of its documents are left out as of another."""
    with pytest.raises(ConfigError, match="languages: .*model.bin has no label for 'eng'; it has __label__de, "):
        rules.build(subset("text:x", language_model=language_model, languages=("de", "eng")))


def test_a_wrong_language_model_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        rules.build(subset("text:x", language_model=str(tmp_path / "lid.176.bin")))
    (tmp_path / "lid.176.bin").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(ConfigError, match="is no model of fastText"):
        rules.build(subset("text:x", language_model=str(tmp_path / "lid.176.bin")))


def test_blocked_domains_and_those_below_them_are_left_out(tmp_path):
    path = tmp_path / "domains"
    path.write_text("# spam\nbad.example\n\nWWW.Worse.example.\n")
    for url, blocked in (
        ("https://bad.example/page", True),
        ("http://a.b.BAD.example:8080/?q=1", True),
        ("https://user@bad.example./", True),
        ("https://notbad.example/", False),
        ("https://example/bad.example", False),
        ("https://bad.example.org/", False),
        ("https://www.worse.example/", True),
        ("https://worse.example/", False),
        ("http://[bad.example/", False),
        ("", False),
    ):
        assert (apply("x", metadata={"url": url}, url_blocklist=str(path))[0] == "url: blocked domain") == blocked, url
    path.write_text("\ufeffbad.example # spam\nb\u00fccher.example\n", encoding="utf-8")  # as Windows has it
    for url in ("https://bad.example/", "https://xn--bcher-kva.example/", "https://b\u00fccher.example/"):
        assert apply("x", metadata={"url": url}, url_blocklist=str(path))[0] == "url: blocked domain"
    for line in ("0.0.0.0 bad.example", "https://bad.example/", "||bad.example^", "*.bad.example"):  # blocks none
        path.write_text(f"# a list\n{line}\n")
        with pytest.raises(ConfigError, match=r"url_blocklist=.*domains:2: .* is no domain"):
            rules.build(subset("text:x", url_blocklist=str(path)))
    path.write_text("# a list\n")
    with pytest.raises(ConfigError, match="names no domain"):
        rules.build(subset("text:x", url_blocklist=str(path)))
    with pytest.raises(ConfigError, match="url_blocklist=.*cannot be read"):
        rules.build(subset("text:x", url_blocklist=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("line", "dropped"),
    [
        ("ALL RIGHTS RESERVED", True),
        ("NASA", True),
        ("12 345,00", True),
        ("3 likes", True),
        ("1.2K views", True),
        ("Menu", True),
        ("Sign in to your account", True),
        ("Three ways to cook rice. Read more...", True),
        ("2 items in cart", True),
        ("3 likes are not enough for that", False),
        ("In 1871 it was built", False),
        ("\u00c9TIENNE came home", False),
        ("- - -", False),
        ("", False),
        ("You have to sign in before you can read more of what they wrote there", False),
    ],
)
def test_lines_that_are_no_prose_go_and_others_stay(line, dropped):
    prose = PROSE * 3
    reason, text, _ = apply(prose + line + "\n" + prose, line_rules=True)
    assert reason is None and text == prose + ("" if dropped else line + "\n") + prose


def test_a_document_of_which_too_many_words_are_in_such_lines_goes():
    prose = " ".join(["word"] * 95)
    assert apply(prose + "\nA B C D E", line_rules=True)[0] is None  # 5 of 100 words
    reason, text, _ = apply(prose + "\nA B C D E F", line_rules=True)
    assert reason == "lines: over 5% of the words in removed lines" and text.endswith("F")
    assert lines.REMOVED_WORDS == 0.05 and "appendix G.2" in lines.__doc__


FILTERED = {
    "gopher-repetition": {
        "dup_line_frac": "the same line again and again\n" * 20,
        "top_2_gram": "so much " + "buy now " * 30 + PROSE[:100],
        "empty": " \n",
    },
    "gopher-quality": {
        "gopher_short_doc": "Too short.",
        "gopher_enough_stop_words": "lighthouse island summer keeper family winter " * 12,
        "gopher_too_many_hashes": PROSE + "# " * 40,
        "gopher_too_many_bullets": "\n".join(f"- {line}" for line in PROSE.splitlines()),
        "gopher_below_alpha_threshold": PROSE + "1234 " * 50,
    },
    "c4": {
        "curly_bracket": PROSE + "\nA function { of this kind } is a line.",
        "lorem_ipsum": PROSE + "\nLorem ipsum dolor sit amet is what it says.",
        "too_few_sentences": "Just one sentence is here.",
    },
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_of_datatrove_run_without_spacy_and_keep_prose(name):
    """datatrove asks spaCy for words unless it is told otherwise: missing it is an error, having it 80% of the time."""
    assert apply(PROSE, filters=(name,))[:2] == (None, PROSE.strip() if name == "c4" else PROSE)
    for reason, text in FILTERED[name].items():
        assert apply(text, filters=(name,))[0] == f"{name}: {reason}"
    assert "spacy" not in sys.modules and "nltk" not in sys.modules


def test_c4_drops_lines_as_well():
    text = PROSE + "no full stop here\nThis line is on javascript, which is off.\n" + PROSE
    assert apply(text, filters=("c4",))[1] == (PROSE + PROSE).strip()


def test_nfc():
    assert apply("e\u0301", nfc=True)[1] == "\u00e9"


@pytest.mark.parametrize("unit", ["a-", "@", "a@", "1-", "212-664-"])
def test_no_text_makes_the_patterns_slow(unit):
    text = (unit * 300_000)[:300_000]
    before = time.process_time()
    apply(text, line_rules=True)
    lines.sentences(text)
    apply(text.replace("-", " "), line_rules=True)
    assert time.process_time() - before < 20  # of the processor: seconds where the square would be an hour


@given(st.text(alphabet="ab \n.!?\u3002", max_size=40))
def test_sentences_lose_nothing_but_space(text):
    assert "".join("".join(lines.sentences(text)).split()) == "".join(text.split())


def test_every_step_is_counted_and_samples_are_handed_out():
    chosen = subset("text:x", min_document_bytes=10, max_document_bytes=3000, nfc=True, pii=True, filters=("c4",))
    tally, removed = Tally(), []
    texts = [PROSE, "One short line.", PROSE.replace("Nobody", "nobody@example.org e\u0301"), PROSE * 10, "Too few."]
    found = list(
        clean(
            [document(text, subset="web", source=str(i), language="en") for i, text in enumerate(texts)],
            rules.build(chosen),
            tally=tally,
            keep_removed=lambda *what: removed.append(what),
        )
    )
    steps = tally.to_json()["steps"]
    assert list(steps) == ["c4", "nfc", "pii", "size"] and [steps[step]["documents"] for step in steps] == [5, 3, 3, 3]
    assert steps["c4"]["bytes"] == sum(len(text.encode()) for text in texts)
    assert steps["nfc"]["bytes"] - steps["pii"]["bytes"] == 1 and steps["size"]["removed"]["too long"]["documents"] == 1
    assert [(one.metadata["source"], step, reason) for one, step, reason in removed] == [
        ("1", "c4", "too_few_sentences"),
        ("3", "size", "too long"),
        ("4", "c4", "too_few_sentences"),
    ]
    assert [one.metadata["source"] for one in found] == ["0", "2"] and tally.languages == {"en": 2}
    for one in found:
        assert one.id == document(one.text).id and unicodedata.is_normalized("NFC", one.text)
    assert "email@example.com" in found[1].text
