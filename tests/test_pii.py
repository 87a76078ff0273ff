"""Personal data: found where it is, left alone where numbers are something else, and counted for the data card."""

import importlib.util
import sys
import time

import pytest

for _package in ("datatrove", "phonenumbers"):
    pytest.importorskip(_package, reason="the extra `data`")

from conftest import REPOSITORY  # noqa: E402
from hypothesis import example, given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from k2jax.errors import ConfigError  # noqa: E402
from k2jax.prepare import claim, clean, finished, plan, recipe  # noqa: E402
from k2jax.prepare.card import card  # noqa: E402
from k2jax.prepare.card.pii_figures import FIGURES  # noqa: E402
from k2jax.prepare.card.tables import tables_of  # noqa: E402
from k2jax.prepare.documents import document  # noqa: E402
from k2jax.prepare.rules import pii, rules  # noqa: E402
from k2jax.prepare.tally import Tally, combine  # noqa: E402

PHONE = pii.PLACEHOLDERS["phone"]
REPLACED = [
    ("write to bob.smith+x@mail.example.co.uk, please", "write to email@example.com, please"),
    ("<a@b.org>;a@b.org", "<email@example.com>;email@example.com"),
    ("a@b.org@c.org and a@b@c.org", "email@example.com@c.org and a@email@example.com"),
    ("server 8.8.8.8:53", "server 192.0.2.1:53"),
    ("from 203.119.4.77, 3.11.7.2", "from 192.0.2.1, 3.11.7.2"),  # an address; a version, which is one, too
    ("服务器203.119.4.77", "服务器192.0.2.1"),
    ("at ::ffff:151.101.1.140", "at ::ffff:192.0.2.1"),
    ("http://[2a00:1450:4001:81b::200e]:80/", "http://[2001:db8::1]:80/"),
    ("2A02:C7D:7E2F:8D00:1C5F:3A4B:9A11:22F0.", "2001:db8::1."),
    ("call +44 20 7946 0958.", f"call {PHONE}."),
    ("+49 (0)30 18170 or +33 1 40 20 53 17", f"{PHONE} or {PHONE}"),
    ("+1 212 664 7665 24 hours", f"{PHONE} 24 hours"),
    ("tel:(212) 664-7665", f"tel:{PHONE}"),
    ("tel: (212) 664-7665 or 212-664-7665,", f"tel: {PHONE} or {PHONE},"),
    ("212.664.7665", PHONE),
    ("1-800-555-1234", PHONE),
    ("in 1999 (212) 664-7665 (212) 664-7666", f"in 1999 {PHONE} {PHONE}"),
    ("John - 212-664-7665 / (212) 664-7666", f"John - {PHONE} / {PHONE}"),
    ("212-664-7665 / 212-664-7666", f"{PHONE} / {PHONE}"),
    ("phone = 212 664 7665; 212 664 7665", f"phone = {PHONE}; 212 664 7665"),  # spaces alone are a table's
    ("本社電話212-664-7665(代表)", f"本社電話{PHONE}(代表)"),
]
LEFT = [
    "x = 200-300-4000", "x = 212-664-7665 + 1", "section 212-555-1234", "f(212-664-7665)", "7 - 212-664-7665",
    "Python 3.11.7.2, version 212.66.47.65, v203.119.4.77", "lodash@4.17.21", "clause 252.227-7014",
    "on 2024-01-02 at 12:30, 2024-01-02T12:30:45+0100", "call 555-1234", "3.14159265 and 1234567890",
    "ISBN 978-0-306-40615-7", "192.168.0.1, 127.0.0.1, 10.0.0.1, 224.0.0.1", "212-664-76655", "x +1 234",
    "version 1.2.3-4567", "a @decorator\ndef f(x @ y): pass", "@user and user@host", "1.212.664.7665.1", "+1 2 3",
    "ssn 123-45-6789", "id=212-664-7665", "/212-664-7665/", "100 200-300-4000", "Chrome/99.100.120.5",
    "x[2000::2], fe80::1, ::1, 2001:db8::5, dead::beef, a::b", "2021:10:05 12:30:45", "aa:bb:cc:dd:ee:ff",
    "2.6.25: Jun 6 2006::", "V8 11.3.244.4, libX11 1.4.99.1",
    *pii.PLACEHOLDERS.values(),
]  # fmt: skip
REGIONS = [("US",), ("DE", "FR", "GB", "IS", "US"), ()]
PIECES = [
    "212-664-7665", "(212) 664-7665", "1(212) 664-7665", "+44 20 7946 0958", "+49(0)30 18170", "030 18170", "8.8.8.8",
    "01 42 68 53 00", "203.119.4.77", "2a00:1450::8", "a@b.org", "bob@x.fig", "tel: ", "section ", "ip ", "555-0100",
    *pii.PLACEHOLDERS.values(), *" \n-.,:+()[]/=@x109#%",
]  # fmt: skip


def replaced(text: str, kinds=recipe.PII, regions=("US",)) -> str:
    return pii.pii_replacer(kinds, regions)(text)[0]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_pii", REPOSITORY / "tools/bench/pii.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.mark.parametrize(("text", "expected"), REPLACED + [(text, text) for text in LEFT])
def test_personal_data_gets_one_placeholder_and_numbers_that_are_none_stay(text, expected):
    assert replaced(text) == expected


def test_the_figures_of_data_cards_are_those_of_the_labelled_sample(bench):
    """A rule, a line of the sample or a library has changed: `python tools/bench/pii.py --write` counts again."""
    rules_of = {"k2jax": bench.counts(bench.ours), "datatrove": bench.counts(bench.datatroves)}
    assert FIGURES["rules"] == rules_of and FIGURES["sample_sha256"] == bench.sample_sha256()
    assert FIGURES["lines"] == len(bench.sample()) > 300


def test_what_the_bench_scores_is_what_a_preparation_replaces(bench):
    for region, text, _ in bench.sample():
        found, parts, done = sorted(bench.ours(text, region), key=lambda one: one[1]), [], 0
        for kind, start, end in found:
            parts += [text[done:start], pii.PLACEHOLDERS[kind]]
            done = end
        assert "".join([*parts, text[done:]]) == replaced(text, regions=(region,))


def test_the_placeholder_does_not_depend_on_what_was_replaced_before():
    replace = pii.pii_replacer(recipe.PII, ("US",))
    assert len({replace("a@b.org 8.8.8.8")[0] for _ in range(7)}) == 1


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.sampled_from(REGIONS))
@example("212-664-7665 1(212) 664-7665", ("US",))
@example("212-664-7665/ 01 42 68 53 00", ("US", "FR"))
@example("212-664-7665" * 5 + "email@example.com", ())
def test_replacing_again_changes_nothing(text, regions):
    """These examples once did: a number became one's neighbour that was none, an e-mail's first part was over 64."""
    replace = pii.pii_replacer(recipe.PII, regions)
    once, _ = replace(text)
    assert replace(once) == (once, {})


@given(st.text(max_size=60) | st.text(alphabet="a1@. +-()\n8:", max_size=60))
def test_nothing_but_placeholders_is_added_and_counts_are_of_them(text):
    after, counts = pii.pii_replacer(recipe.PII, ("US",))(text)
    for kind, placeholder in pii.PLACEHOLDERS.items():
        assert after.count(placeholder) - text.count(placeholder) == counts[kind]
    assert any(counts.values()) or after == text


@pytest.mark.parametrize(
    "unit",
    ["a-", "@", "a@", "a.b@c", "1-", "1 ", "1) ", "(1", "+1 1 1 1", "+1 1 1 1 1 1 1 ", "::", "2001::", "212-664-",
     "12/ 34/ 56 / 78 ", "8.8.8.", "x" * 64 + "@y.", "(212) 664-1234; "],
)  # fmt: skip
def test_no_text_makes_the_patterns_slow(unit):
    """datatrove's pattern for e-mail alone takes minutes for these: it grows with the square of the length."""
    before = time.process_time()
    replaced((unit * 100_000)[:100_000])
    assert time.process_time() - before < 15  # of the processor: a second, where the square would be an hour


def test_a_subset_has_its_own_kinds_and_regions():
    text = "a@b.org 203.119.4.77 (212) 664-7665, Tel. 030 18170"
    assert replaced(text, ("email",)) == "email@example.com 203.119.4.77 (212) 664-7665, Tel. 030 18170"
    assert replaced(text, ("phone",), ("DE",)) == f"a@b.org 203.119.4.77 (212) 664-7665, Tel. {PHONE}"
    assert recipe.subset("text:x").pii == recipe.subset("text:x", pii=False).pii == ()
    assert recipe.subset("text:x", pii=True).pii == recipe.PII
    c = recipe.base()
    c.subsets.a = recipe.subset("text:x", pii=("emails",))
    c.subsets.b = recipe.subset("text:x", pii=("email",), pii_regions=("GB",))
    c.subsets.c = recipe.subset("text:x", pii="email")
    wrong = "3 problem.*a.pii: .'emails'. unkn.*b.pii_regions=.*'phone'.*c.pii='email': must be a tuple, such as .'x',"
    with pytest.raises(ConfigError, match=wrong):
        recipe.validate(c)


def test_an_unknown_region_or_a_missing_library_ends_it_before_anything_is_read(monkeypatch):
    chosen = recipe.subset("text:x", pii=("phone",), pii_regions=("US", "UK"))
    with pytest.raises(ConfigError, match="pii_regions: UK: libphonenumber knows none"):
        rules.build(chosen)
    monkeypatch.setitem(sys.modules, "phonenumbers", None)
    rules.build(recipe.subset("text:x", pii=("email",)))
    with pytest.raises(ConfigError, match="pip install phonenumberslite"):
        rules.build(recipe.subset("text:x", pii=True))


@pytest.mark.parametrize(("before", "now", "same"), [(False, (), True), (True, recipe.PII, False)])
def test_what_was_made_by_the_rules_before_these_is_another_recipes(tmp_path, before, now, same):
    c = recipe.base()
    c.subsets.web = recipe.subset("text:x", pii=now, tasks=1)
    c = claim.numbered(c)
    made = claim.redacted(c.to_dict())
    made["subsets"]["web"]["pii"] = before
    del made["subsets"]["web"]["pii_regions"]
    assert bool(finished.changes({"config": made}, c)) != same
    data = {"config": made, "inputs": {}}
    if same:
        finished.check_possible(c, tmp_path, data)
    else:
        with pytest.raises(ConfigError, match="recipe .*pii was .*rules before.* begins again at stage clean/web"):
            finished.check_possible(c, tmp_path, data)


def test_another_release_of_the_phones_library_cleans_again(monkeypatch):
    """The plans of the world's numbers change every other week: where phones are replaced, and there alone."""
    c = recipe.base()
    c.subsets.phones, c.subsets.others = (recipe.subset("text:x", pii=pii, tasks=1) for pii in (True, False))
    before = plan.units(c, plan.named(c, {}))
    monkeypatch.setattr("phonenumbers.__version__", "9.9.9")
    after = plan.units(c, plan.named(c, {}))
    assert [name for name in before if before[name] != after[name]] == ["clean/phones"]


def test_the_card_has_counts_by_subset_and_kind_beside_the_rules_figures():
    """What the samples of removed documents hold is replaced, and not counted."""
    chosen, tally = recipe.subset("text:x", pii=True, min_document_bytes=20), Tally()
    removed = clean._Removed(5, rules.edits(chosen))
    texts = ["Write to a@b.org or c@d.org, (212) 664-7665.", "e@f.org", "A text without any of it."]
    found = clean.clean(map(document, texts), rules.build(chosen, tally), tally=tally, keep_removed=removed.keep)
    assert [one.text for one in found] == [f"Write to email@example.com or email@example.com, {PHONE}.", texts[2]]
    assert [one.text for one in removed.documents] == ["email@example.com"]
    counts = combine([tally.to_json(), tally.to_json()])
    assert counts["personal"] == {"email": 6, "phone": 2}
    config = {"subsets": {name: {"pii": list(kinds), "pii_regions": ["US"]} for name, kinds in
                          {"code": (), "papers": ("email",), "web": recipe.PII}.items()}}  # fmt: skip
    personal = card._personal({"web": {"clean": counts, "duplicates": {}}, "papers": {"clean": {}}}, config)
    assert personal["measured"] == FIGURES
    assert personal["subsets"] == {
        "papers": {"replaced": {"email": 0}, "regions": []},
        "web": {"replaced": {"email": 6, "ipv6": 0, "ipv4": 0, "phone": 2}, "regions": ["US"]},
    }
    counted, measured = tables_of("personal", {"personal": personal})
    assert counted.rows == [["papers", 0, "off", "off", "off", ""], ["web", 6, 0, 0, 2, "US"]]
    assert len(measured.rows) == 10 and measured.rows[0][:2] == ["k2jax", "email"]
    nothing = card._personal({}, {"subsets": {"code": {"pii": []}}})
    assert nothing == {"subsets": {}, "measured": {}} and not tables_of("personal", {"personal": nothing})
