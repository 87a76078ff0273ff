"""Lines and paragraphs that many documents share stay in the first few of them, whatever the parts and what is held."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("datatrove")
from ml_collections import ConfigDict  # noqa: E402
from test_build import different_files, texts_of, words  # noqa: E402

from k2jax.errors import ConfigError  # noqa: E402
from k2jax.prepare import build, recipe, shuffle  # noqa: E402
from k2jax.prepare.card import tables  # noqa: E402
from k2jax.prepare.dedup import streams  # noqa: E402
from k2jax.prepare.dedup.survivors import survivors  # noqa: E402
from k2jax.prepare.rules import lines  # noqa: E402
from k2jax.prepare.shuffle import Shuffle  # noqa: E402
from k2jax.prepare.tally import Tally  # noqa: E402

FOOTER = "All rights are reserved by the owner of this page"
MENU = "Home   About\tus  Contact and imprint"
SHORT = "Read more"


def corpus_of(num_documents: int) -> list[str]:
    """Each of its own lines and of some that others have, too."""
    texts = []
    for i in range(num_documents):
        own = [f"{words(100 * i + j, 8)} {i}" for j in range(4)]
        shared = [MENU.replace("   ", " " * (1 + i % 3)), SHORT, "---------------------------"]
        if i % 3 == 0:
            shared.append(FOOTER)
        if i % 5 == 0:
            shared += [f"line {i // 10} of the few that two of them have", FOOTER]
        texts.append("\n".join([shared[0], *own[:2], *shared[1:], *own[2:]]))
    return [*texts, "\n".join([MENU, FOOTER])]


def write(folder: Path, texts: list[str], files: int) -> None:
    folder.mkdir()
    for part in range(files):
        rows = [json.dumps({"text": text}) + "\n" for text in texts[part::files]]
        (folder / f"{part}.jsonl").write_text("".join(rows))


def recipe_of(folder: Path, by: str, most: int, priority: int = 0, tasks: int = 3) -> ConfigDict:
    c = recipe.base()
    c.vocab_size, c.tokenizer_bytes, c.validation_fraction = 330, 9_000, 0.0
    c.dedup.near, c.shared.most = False, most
    c.subsets.web = recipe.subset(f"jsonl:{folder}/web/*.jsonl", tasks=tasks, drop_shared=by, min_document_bytes=60)
    c.subsets.books = recipe.subset(f"jsonl:{folder}/books/*.jsonl", drop_shared=by, priority=priority, tasks=2)
    c.subsets.code = recipe.subset(f"jsonl:{folder}/code/*.jsonl", priority=-2, tasks=1)
    recipe.validate(c)
    return c.lock()


def reference(ordered: list[str], most: int) -> list[str]:
    """Of the lines of documents in order those that few have had, as one reads it in the recipe."""
    seen, found = defaultdict(int), []
    for text in ordered:
        said = [" ".join(line.split()) for line in text.split("\n")]
        counts = [len(one) >= 20 and any(map(str.isalnum, one)) for one in said]
        kept = [line for line, one, is_one in zip(text.split("\n"), said, counts, strict=True)
                if not is_one or seen[one] < most]  # fmt: skip
        found.append("\n".join(kept))
        for one in {one for one, is_one in zip(said, counts, strict=True) if is_one}:
            seen[one] += 1
    return found


@pytest.fixture
def corpus(tmp_path) -> Path:
    texts = corpus_of(40)
    write(tmp_path / "web", texts[:25] + texts[-1:], 3)
    write(tmp_path / "books", texts[25:-1], 2)
    write(tmp_path / "code", [f"{FOOTER}\n{MENU}\n{words(i, 9)}" for i in range(9)], 1)
    return tmp_path


def read_in_order(config: ConfigDict, out: Path, name: str) -> list[str]:
    """The clean documents of a subset that stay, in their order."""
    ranks = [rank for rank, task in enumerate(recipe.tasks(config)) if task.subset == name]
    return [one.text for rank in ranks for _, one in survivors(out / "stages", rank, Tally())]


@pytest.mark.parametrize(("most", "priority"), [(1, 0), (1, -1), (3, 0)])
def test_a_line_stays_in_the_first_documents_that_have_it(most, priority, corpus):
    config, out = recipe_of(corpus, "lines", most, priority), corpus / "out"
    data, _ = build.build(config, out, workers=1, keep_stages=True)
    order = ["books", "web"] if priority else ["web", "books"]  # of equal ones that which the recipe has first
    clean = {name: read_in_order(config, out, name) for name in order}
    expected = reference([text for name in order for text in clean[name]], most)
    stores = {name: texts_of(out, name) for name in order}
    by_name, start = {}, 0
    for name in order:
        by_name[name] = expected[start : start + len(clean[name])]
        start += len(clean[name])
    shortest = {"web": 60, "books": 1}
    for name in order:
        kept = [text for text in by_name[name] if len(text.encode()) >= shortest[name]]
        assert sorted(stores[name]) == sorted(kept)
    assert sum(text.count(FOOTER) > 0 for name in order for text in stores[name]) in (most, most - 1)
    assert all(FOOTER in text for text in texts_of(out, "code")), "of one that does not ask nothing goes"
    counts = {name: data["subsets"][name]["duplicates"] for name in data["subsets"]}
    steps = counts["web"]["steps"]
    assert steps["size"]["removed"]["too short"]["documents"] == 1 and "shared" not in counts["code"]["steps"]
    assert steps["shared"]["bytes"] == sum(len(text.encode()) for text in clean["web"])
    assert steps["size"]["bytes"] - steps["size"]["removed"]["too short"]["bytes"] == counts["web"]["kept"]["bytes"]
    assert counts["web"]["kept"]["bytes"] == sum(len(text.encode()) for text in stores["web"])


def test_nothing_depends_on_parts_tasks_or_what_is_held(corpus, monkeypatch):
    build.build(recipe_of(corpus, "lines", 2), corpus / "one", workers=1)
    for name in ("FAN", "SLOTS", "OPENS"):
        monkeypatch.setattr(shuffle, name, 2)
    monkeypatch.setattr(shuffle, "PARTITION_BYTES", 500)
    monkeypatch.setattr(shuffle, "RUN_BYTES", 300)
    monkeypatch.setattr(streams, "CHUNK_BYTES", 200)
    build.build(recipe_of(corpus, "lines", 2), corpus / "two", workers=1)
    assert different_files(corpus / "one", corpus / "two") == []


@pytest.mark.parametrize("exact", [True, False])
def test_of_texts_that_are_equal_without_what_they_share_one_stays(tmp_path, exact):
    """Articles on two sites; one stands in a subset from which nothing goes, and one is of what is shared alone."""
    menus = [f"The menu of site {site}: {words(9_000 + site, 6)}" for site in range(2)]
    articles = [f"{words(50 * i, 20)}\n{words(50 * i + 25, 15)}" for i in range(20)]
    short = [f"yes {i}" for i in range(9)]
    write(tmp_path / "web", [f"{menu}\n{one}" for menu in menus for one in (*articles, *short)], 3)
    menus_alone = [f"{menus[0]}\n{menus[1]}" + "\n" * n for n in range(3, 12)]
    write(tmp_path / "books", [*menus_alone, f"{words(7_000, 30)}"], 2)
    write(tmp_path / "code", articles[:1], 1)
    for most in (1, 4):
        c = recipe_of(tmp_path, "lines", most).unlock()
        c.dedup.exact, c.subsets.web.min_document_bytes = exact, 1
        out = tmp_path / f"out{most}"
        data, _ = build.build(c.lock(), out, workers=1)
        stores = {name: texts_of(out, name) for name in ("code", "web", "books") if (out / name).exists()}
        everything = [text for texts in stores.values() for text in texts]
        whole = [text for text in everything if text.split("\n")[0] in menus]
        bare = [text for text in everything if text not in whole]
        assert set(bare) <= {*articles, *short, words(7_000, 30)} and stores["code"] == articles[:1]
        assert len(everything) == len(set(everything)) or not exact
        if exact:
            assert len([one for one in bare if one == articles[0]]) == 1
        elif most == 4:
            assert len(set(bare)) < len(bare)
        card = json.loads((out / "card" / "data.json").read_text())
        flow = tables.flow(card)
        for name, texts in stores.items():
            assert flow[name]["kept"] == len(texts) == sum(card["duplicates"]["documents_by_copies"][name].values())
            assert flow[name]["read"] == sum(count for key, count in flow[name].items() if key != "read")
            assert sum(n for _, n in card["subsets"][name]["lengths"]["duplicates"].items()) == len(texts)
        assert bool(flow["web"]["exact"]) == exact  # those of the step "equal", too
        assert all(one["text"] in stores[one["subset"]] for one in card["samples"]["kept"])
        assert sum(tables.histogram(card)[2]) == len(everything) and card["inconsistencies"] == []


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_behind_the_first_ones_of_each_key_all_are_found_once(tmp_path_factory, data):
    keys = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=40))
    most, records = data.draw(st.integers(1, 4)), np.zeros(len(keys), [("high", "<u8"), ("low", "<u8"), ("by", "<u4")])
    records["high"], records["low"] = np.array(keys, np.uint64).reshape(-1, 2).T
    records["by"] = data.draw(st.permutations(range(len(keys))))
    one = Shuffle(tmp_path_factory.mktemp("x"), 1, 1)
    with one.writer(0) as out:
        out.add_records(np.zeros(len(keys), np.int64), records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "CHUNK_BYTES", data.draw(st.sampled_from([1, 100, 300, 1 << 20])))
        found = [row["by"] for part in streams.beyond(one, 0, records.dtype, ["by"], most) for row in part]
    expected, seen = [], defaultdict(int)
    for row in np.sort(records, order="by"):
        key = row["high"], row["low"]
        seen[key] += 1
        expected += [row["by"]] if seen[key] > most else []
    assert sorted(found) == expected


@pytest.mark.parametrize(
    ("by", "text", "expected"),
    [
        ("lines", "gone\na\n  gone \nb", "a\nb"),
        ("lines", "a\ngone", "a"),
        ("lines", "gone", ""),
        ("lines", "-\ngone\n-", "-\n-"),
        ("paragraphs", "gone\n\na\ngone\n \n b\n\ngone", "a\ngone\n \n b"),
        ("paragraphs", "gone\n\n\n    def f():\n        pass\n\n    x", "    def f():\n        pass\n\n    x"),
    ],
)
def test_a_piece_goes_with_what_is_before_it(by, text, expected):
    assert lines.without(text, by, lambda said: said == "gone") == expected
    assert "-" not in list(lines.pieces(text, by))


def test_what_the_key_may_be(tmp_path):
    c = recipe.base()
    c.shared.most = 0
    c.subsets.web = recipe.subset("jsonl:x", drop_shared="sentences")
    c.subsets.chat = recipe.conversations("jsonl:x", drop_shared="lines")
    with pytest.raises(ConfigError) as error:
        recipe.validate(c)
    for part in ("shared.most=0: must be positive", "subsets.web.drop_shared='sentences': must be one of lines, para",
                 "subsets.chat.drop_shared='lines': is for text, not for conversations"):  # fmt: skip
        assert part in str(error.value)
