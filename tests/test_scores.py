"""Quality by fastText, scores by a function of the user's, thresholds by language, and the order of rules by cost."""

import sys

import pytest

for _package in ("datatrove", "trafilatura", "fasttext"):
    pytest.importorskip(_package, reason="the extra `data`")

from test_rules import PAGE, apply  # noqa: E402

from k2jax.errors import ConfigError  # noqa: E402
from k2jax.prepare import recipe  # noqa: E402
from k2jax.prepare.card.scores import histograms  # noqa: E402
from k2jax.prepare.clean import GROUP, clean  # noqa: E402
from k2jax.prepare.documents import document  # noqa: E402
from k2jax.prepare.recipe import subset  # noqa: E402
from k2jax.prepare.rules import rules  # noqa: E402
from k2jax.prepare.tally import Tally, combine  # noqa: E402

GOOD = "a proof of the theorem|the cell is the unit of life|water boils at a hundred degrees|the war ended in that year"
BAD = "click here to buy now|best price free shipping|you will not believe this trick|sign up and win a prize"


@pytest.fixture(scope="module")
def quality_model(tmp_path_factory):
    """A real model of fastText, of a few sentences."""
    import fasttext

    folder = tmp_path_factory.mktemp("quality")
    with open(folder / "train.txt", "w") as file:
        for label, text in (("hq", GOOD), ("lq", BAD)):
            file.writelines(f"__label__{label} {line}\n" for line in text.split("|"))
    # As many threads as it takes to set all of its weights before it trains (test_rules.py).
    model = fasttext.train_supervised(str(folder / "train.txt"), epoch=300, lr=0.1, dim=20, thread=10, verbose=0)
    model.save_model(str(folder / "model.bin"))
    return str(folder / "model.bin")


def run(texts: list[str], **options) -> tuple[list, Tally, list]:
    tally, removed = Tally(), []
    documents = [document(text, subset="web", source=str(i)) for i, text in enumerate(texts)]
    steps = rules.build(subset("text:x", **options), tally)
    found = list(clean(documents, steps, tally=tally, keep_removed=lambda *what: removed.append(what)))
    return found, tally, removed


def test_documents_keep_their_probability_and_those_below_the_threshold_go(quality_model):
    import fasttext

    good, bad = "the unit of\nlife is the cell", "buy now and\nwin free shipping"
    options = {"quality_model": quality_model, "quality_label": "hq"}
    found, tally, _ = run([good, bad], **options)
    model = fasttext.load_model(quality_model)
    for one in found:
        labels, scores = model.predict(one.text.replace("\n", " "), k=-1)
        expected = min(1.0, scores[labels.index("__label__hq")])
        assert one.metadata["quality"] == pytest.approx(expected, abs=1e-6)
    assert found[0].metadata["quality"] > 0.5 > found[1].metadata["quality"]
    assert sum(tally.scores["quality"].values()) == 2 and not tally.steps["quality"]["removed"]
    threshold = found[0].metadata["quality"]
    for least, left in ((threshold, 1), (min(1.0, threshold + 2e-6), 0), (0.0, 2)):
        found, tally, removed = run([good, bad], quality_threshold=least, **options)
        assert len(found) == left and sum(tally.scores["quality"].values()) == 2  # also of those that go
        assert {(step, reason) for _, step, reason in removed} <= {("quality", f"quality below {least:g}")}
    assert len(run([good, bad], quality_threshold=0.5, **(options | {"quality_label": "__label__lq"}))[0]) == 1


def test_a_word_that_is_fasttexts_end_of_a_sentence_hides_nothing(quality_model):
    options = {"quality_model": quality_model, "quality_label": "hq"}
    good, bad = "the unit of life is the cell", "buy now and win free shipping click here to buy now"
    for end in ("</s>", "\n</s>\n", "\t</s> </s> "):
        [both], [plain] = run([f"{good} {end} {bad}"], **options)[0], run([f"{good} {bad}"], **options)[0]
        assert both.metadata["quality"] == pytest.approx(plain.metadata["quality"], abs=0.05)
        assert both.metadata["quality"] < run([good], **options)[0][0].metadata["quality"] - 0.2


def test_a_wrong_quality_model_or_label_is_one_line(quality_model, tmp_path):
    with pytest.raises(ConfigError, match="quality_label=good: .*model.bin has no such label; it has __label__hq, "):
        run(["x"], quality_model=quality_model, quality_label="good")
    with pytest.raises(ConfigError, match="quality_model=.*no such file"):
        run(["x"], quality_model=str(tmp_path / "none"), quality_label="hq")
    with open(quality_model, "rb") as file:
        data = file.read()
    (tmp_path / "nan.bin").write_bytes(data[:-160] + b"\xff" * 160)  # its output's weights
    with pytest.raises(ConfigError, match="quality_model=.*nan.bin fails on a document .*: it is damaged"):
        run(["the cell is the unit"], quality_model=str(tmp_path / "nan.bin"), quality_label="hq")


SCORERS = '''
import math

calls = []

def length(texts):
    calls.append(len(texts))
    return [len(text) / 10 for text in texts]

def one_less(texts):
    return [0.0] * (len(texts) - 1)

def nan(texts):
    return [math.nan for _ in texts]

def words(texts):
    return ["good" for _ in texts]

def ranks(texts):
    return [sorted(texts).index(text) for text in texts]

def raises(texts):
    raise RuntimeError("no GPU here\\nand more")

number = 3
'''


@pytest.fixture
def scorers(tmp_path, monkeypatch):
    (tmp_path / "my_scorers.py").write_text(SCORERS)
    (tmp_path / "broken_scorer.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("my_scorers", "broken_scorer"):
        sys.modules.pop(name, None)


def test_a_scorer_gets_texts_together_and_each_keeps_its_own_score(scorers):
    texts = ["x" * (i % 50 + 1) for i in range(150)]
    found, tally, _ = run(texts, scorer="my_scorers:length")
    assert [one.text for one in found] == texts
    assert [one.metadata["score"] for one in found] == [len(text) / 10 for text in texts]
    assert sys.modules["my_scorers"].calls == [GROUP, 1, GROUP, 150 - 2 * GROUP]
    found, tally, removed = run(texts, scorer="my_scorers:length", scorer_threshold=4.0)
    assert [one.text for one in found] == [text for text in texts if len(text) >= 40]
    assert {(step, reason) for _, step, reason in removed} == {("scorer", "score below 4")}
    assert tally.steps["scorer"]["documents"] == 150 and sum(tally.scores["score"].values()) == 150
    assert list(tally.steps) == ["scorer", "size"] and tally.steps["size"]["documents"] == len(found)


def test_a_scorer_that_judges_a_text_by_those_beside_it_ends_it(scorers):
    """Ranks, or scores less their mean: other numbers with other tasks."""
    with pytest.raises(ConfigError, match="ranks gave 0 for a text alone and 1 for it beside others: it must"):
        run(["b", "a"], scorer="my_scorers:ranks")


def test_a_scorer_sees_what_the_rules_before_it_left_as_they_left_it(scorers):
    found, _, _ = run(["e\u0301" * 5, "x", "y" * 30], scorer="my_scorers:length", drop_repeated=("lines",), nfc=True)
    assert [one.metadata["score"] for one in found] == [1.0, 0.1, 3.0]  # nfc comes after it: ten characters, then five
    long = [char * (6 << 20) for char in "abcd"]  # few at a time where they are large
    run(long, scorer="my_scorers:length")
    assert sys.modules["my_scorers"].calls[-3:] == [3, 1, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_scorers:nothing", "scorer=my_scorers:nothing: module 'my_scorers' has no attribute 'nothing'"),
        ("my_scorers:number", "is no function but int"),
        ("no_such_module:f", "no_such_module cannot be imported .*put its folder on PYTHONPATH"),
        ("broken_scorer:f", "broken_scorer cannot be imported .*a_package_that_is_not_there"),
        ("my_scorers:one_less", "gave 0 numbers for 1 texts"),
        ("my_scorers:nan", "gave nan for a text"),
        ("my_scorers:words", "failed .*could not convert string to float: 'good'"),
        ("my_scorers:raises", r"failed \(RuntimeError: no GPU here\)"),
    ],
)
def test_a_wrong_scorer_is_one_line(scorers, name, message):
    with pytest.raises(ConfigError, match=message) as error:
        run(["x"], scorer=name)
    assert "\n" not in str(error.value)


def test_the_files_that_rules_depend_on_are_known(scorers, tmp_path, quality_model):
    """What was cleaned by others is to be cleaned again."""
    chosen = subset("text:x", scorer="my_scorers:length", quality_model=quality_model, url_blocklist="domains")
    assert rules.files_of(chosen) == [quality_model, "domains", str(tmp_path / "my_scorers.py")]
    assert rules.files_of(subset("text:x")) == []


def test_thresholds_differ_by_language(tmp_path, quality_model):
    """Any model of fastText labels documents; of this one hq and lq are the languages."""
    mixed, options = "the cell and a prize", {"language_model": quality_model, "languages": ("hq", "lq")}
    language = apply(mixed, language_threshold=0.0, **options)[2]["language"]
    other = {"hq": "lq", "lq": "hq"}[language]
    assert apply(mixed, language_threshold=1.0, **options)[0] == "language: language unsure"
    assert apply(mixed, language_threshold=1.0, language_thresholds=((language, 0.0),), **options)[0] is None
    assert apply(mixed, language_threshold=1.0, language_thresholds=((other, 0.0),), **options)[0] is not None
    assert apply(mixed, language_threshold=0.0, language_thresholds=((language, 1.0),), **options)[0] is not None


def test_a_blocked_page_is_not_extracted_first(tmp_path):
    """Extraction is a hundred times what the list costs."""
    (tmp_path / "domains").write_text("bad.example\n")
    options = {"extract": True, "url_blocklist": str(tmp_path / "domains"), "nfc": True}
    steps = [rule.step for rule in rules.build(subset("warc:x", **options))]
    assert steps == ["url", "extract", "nfc", "size"]
    reason, text, _ = apply(PAGE, metadata={"url": "https://bad.example/"}, **options)
    assert reason == "url: blocked domain" and text == PAGE


def test_repeated_lines_and_paragraphs_of_a_document_go():
    text = "Home\nAbout\n\n  First   words.\nMore\n\n---\n\nHome\nAbout\n \t\n"
    text += "First words.\nOther\n\n---\n\nFirst words.\nMore"
    assert apply(text, drop_repeated=("paragraphs",))[1] == (
        "Home\nAbout\n\n  First   words.\nMore\n\n---\n \t\nFirst words.\nOther\n\n---"
    )
    assert apply(text, drop_repeated=("lines",))[1] == (
        "Home\nAbout\n\n  First   words.\nMore\n\n---\n\n \t\nOther\n\n---\n"
    )
    both = apply(text, drop_repeated=("lines", "paragraphs"))[1]
    assert both == "Home\nAbout\n\n  First   words.\nMore\n\n---\n \t\nOther\n\n---"
    for same in ("", "\n", "a\n\nb\n", "  a\n}\n}\n", "\n\na"):
        assert apply(same or "x", drop_repeated=("lines", "paragraphs"))[1] == (same or "x")


def test_a_scores_histogram_is_of_few_bins_that_hold_all():
    for scores in ([0.0, 1.0, 0.5, 0.999], [-3.2, 4.8], [0.31], [-1e9, 1e9], [0.05 * i for i in range(101)]):
        tally = Tally()
        for score in scores:
            tally.scored("quality", score)
        counts = combine([tally.to_json(), Tally().to_json()])["scores"]
        [[title, rows]] = histograms({"subsets": {"web": {"scores": counts}}}).items()
        assert title == "web: quality" and 0 < len(rows) <= 20 and rows[0][2] == "100.0%"
        assert sum(n for _, n, _ in rows) == len(scores)
        least = max(-100.0, min(scores))
        assert float(rows[0][0]) <= least + 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality_model": "m"}, "needs quality_label"),
        ({"quality_label": "hq"}, "quality_label=hq: needs quality_model"),
        ({"quality_threshold": 0.0}, "quality_threshold=0.0: needs quality_model"),
        ({"quality_model": "m", "quality_label": "hq", "quality_threshold": 1.5}, "quality_threshold=1.5: must lie in"),
        ({"quality_model": "m", "quality_label": "hq", "quality_threshold": "x"}, "quality_threshold='x'"),
        ({"scorer": "module.function"}, "must be package.module:function"),
        ({"scorer_threshold": 1}, "needs scorer"),
        ({"scorer": "a:b", "scorer_threshold": float("nan")}, "scorer_threshold=nan"),
        ({"languages": ("en",), "language_thresholds": (("de", 0.5),)}, r"\('de', 0.5\) must be"),
        ({"language_thresholds": ("en", 0.5)}, "'en' must be"),
        ({"languages": ("en",), "language_thresholds": (("en", 2),)}, r"\('en', 2\) must be"),
        ({"language_threshold": 2.0}, "language_threshold=2.0: must lie in"),
        ({"drop_repeated": ("line",)}, "drop_repeated: .'line'. unknown; there are lines, paragraphs"),
    ],
)
def test_wrong_values_are_named(options, message):
    config = recipe.base()
    config.subsets.web = subset("text:x", **options)
    with pytest.raises(ConfigError, match=message):
        recipe.validate(config)
    config.subsets.web = subset("text:x", scorer="a.b:c", scorer_threshold=-2)
    recipe.validate(config)
