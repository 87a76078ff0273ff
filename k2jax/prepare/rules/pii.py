"""Personal data in texts: e-mail addresses, public IP addresses and phone numbers, each kind by one placeholder.

What decides is a kept library's: datatrove's pattern of e-mail, `ipaddress`, and Google's libphonenumber (the package
phonenumberslite). Here are linear patterns that find candidates for them, and what around a candidate says that it is
none: an expression, a version, a section. (Presidio's recognisers come with spaCy's models, ask this same library for
phones, and guess names and places.)

A placeholder is nobody's. With several, taken in turn as datatrove does by default, what a document becomes would
depend on the documents before it. What is replaced again does not change: kinds go one after the other, a placeholder
is no candidate, and its ends say the same to its neighbours as those of what it stands for.
"""

import functools
import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from k2jax.errors import ConfigError

Span = tuple[int, int]
PLACEHOLDERS = {  # by kind, in the order in which they are looked for
    "email": "email@example.com",  # RFC 2606
    "ipv6": "2001:db8::1",  # RFC 3849
    "ipv4": "192.0.2.1",  # RFC 5737
    "phone": "+1-202-555-0100",  # of the numbers that North America keeps for fiction
}
REGIONS = ("US",)  # unless a recipe says others
BEFORE = 40  # characters in which the words before a candidate are looked for

# datatrove's pattern for e-mail takes time that grows with the square of a run without spaces (1.9 s for 12,000
# characters of "a-a-a-"), so it is given the characters around an @ alone; RFC 5321 allows 64 and 255 of them.
LOCAL = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}\Z")
DOMAIN = re.compile(r"[A-Za-z0-9.:\[\]-]{1,255}")
TOP_LEVEL = re.compile(r"\.(?:[A-Za-z]{2,}|xn--[A-Za-z0-9-]+)\Z|\]\Z")  # not of lodash@4.17.21

# Addresses given out so far begin with 2 or 3 (IANA: 2000::/3). In a bracket behind a name it is a slice: x[2000::2].
# (?a:\w) is English: Chinese puts no spaces around them. A set of characters first, what is before it second: that is
# four times as fast.
IPV6 = re.compile(r"(?a:[23](?<![\w:.].)(?<!\w\[.)[0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:]|\.\d))")
IPV4 = re.compile(r"(?a:[0-9](?<![\w.-].)(?<!\w/.)[0-9]{0,2}(?:\.\d{1,3}){3}(?![\w-]|\.\d))")
# A version's first two parts are small (V8 has 11.3.244.4). So are those of one address in sixty, which need a word.
SMALL = 32
ADDRESS = re.compile(
    r"(?:\b(?:ip|ipv4|inet|addr|address|addresses|host|hosts|server|servers|nameserver|dns|ping|resolver|gateway|client"
    r"|proxy)\b[\s:=\"'(]*|[/@]/?)\Z",
    re.IGNORECASE,
)

# Numbers as people write them: with a country's code, or with gaps; the library says whether it is one. Bare digits
# without a code are anything. What follows a number, or stands in an expression, is no beginning.
GAP = "(?: [-./\u2010-\u2013\u2212] |[-./ \u00a0\u2010-\u2013\u2212])?"
MOST_GROUPS = 7  # of digits, as in +33 (0)1 40 20 53 17: the library is not asked about rows of a table
AREA = rf"\(\d{{1,5}}\){GAP}"
RUN = re.compile("[+(\\d][-+()\\d ./\u00a0\u2010-\u2013\u2212]{6,}")  # in which a number lies, if there is one
NUMBER = re.compile(
    rf"{re.escape(PLACEHOLDERS['phone'])}(?!\d)"
    rf"|(?<!(?a:[\w+./#@-]))\+[1-9]\d{{0,2}}{GAP}(?:{AREA})?\d(?:{GAP}\d){{4,13}}"
    rf"|(?<!(?a:[\w+./#@*^$\u20ac\u00a3-]))(?:(?:(?<!\d[ ,:\u00a0])[018]{GAP})?{AREA}\d(?:{GAP}\d){{3,11}}"
    rf"|(?<!\d[ ,:\u00a0])\d(?:{GAP}\d){{6,14}})"
)
PHONE = re.compile(
    r"(?:\b(?:tel|telephone|t\u00e9l|t\u00e9l\u00e9phone|telefon|telefone|telefono|tel\u00e9fono|phone|phones|fon|puh|fax"
    r"|mob|mobile|mobil|cell|call|dial|sms|whatsapp|hotline|contact|\u0442\u0435\u043b|\u03c4\u03b7\u03bb)\b"
    r"|\u96fb\u8a71|\u7535\u8bdd|\uc804\ud654)[\s:=.\"'(\uff1a]*(?:(?:no|nr|number|us|me|at|on|is)\b[\s:=.\"'(]*)?\Z",
    re.IGNORECASE,
)
# What such numbers count else; the rule of those before an IP address, too.
COUNTED = re.compile(
    r"(?:\b(?:v|version|versions|release|build|section|sections|sec|chapter|figure|fig|table|equation|eq|theorem|lemma"
    r"|page|pages|pp|part|item|order|invoice|case|docket|patent|serial|model|sku|ref|id|isbn|issn|doi|pmid|arxiv|rfc"
    r"|oid|cas|ean|upc|iban|account|card)\b[\s.:#]*(?:no\b[\s.:#]*)?|\u00a7\s*)\Z",
    re.IGNORECASE,
)
EXPRESSION = re.compile("[=<>*^\u00d7\u00f7\u2248\u2264\u2265~%\\\\_{][ \u00a0]?\\Z")
# Beside that, of numbers without a country's code: 5 - 212-664-7665, f(212-664-7665), key:212-664-7665.
OPERAND = re.compile("(?:(?<!\\w)\\w|[\\d)\\]]) [-+][ \u00a0]?\\Z|(?a:\\w)[(:]\\Z")
BEHIND = re.compile("(?!x\\d)(?a:[\\w@])|[-/]\\w|[.,:]\\d|[ \u00a0]\\d|[ \u00a0]?[=*^\u00d7\u00f7%}]")
BEHIND_CODE = re.compile("(?!x\\d)(?a:[\\w@])|[-/.,]\\d")


def problems(where: str, kinds: tuple[str, ...], regions: tuple[str, ...]) -> list[str]:
    """What is wrong with a subset's keys pii and pii_regions. Whether libphonenumber knows them is seen at work."""
    found = []
    if unknown := set(kinds) - set(PLACEHOLDERS):
        found.append(f"{where}.pii: {sorted(unknown)} unknown; there are {', '.join(PLACEHOLDERS)}, or True for all")
    if "phone" not in kinds and tuple(regions) != REGIONS:
        found.append(f"{where}.pii_regions={regions}: are of phone numbers, and 'phone' is not among pii={kinds}")
    return found


def pii_replacer(kinds: tuple[str, ...], regions: tuple[str, ...]) -> Callable[[str], tuple[str, Counter[str]]]:
    """What puts the placeholders of `kinds` in a text, and counts them; applied again it changes nothing.

    Args:
        kinds: of PLACEHOLDERS.
        regions: whose phone numbers are known without their country's code, such as US, FR. With it, all are.

    Raises ConfigError for a library that is not there, or a region that it does not know.
    """
    makers = {"email": emails, "ipv6": lambda: ipv6, "ipv4": lambda: ipv4, "phone": lambda: phones(regions)}
    finders = {kind: makers[kind]() for kind in PLACEHOLDERS if kind in kinds}

    def replace(text: str) -> tuple[str, Counter[str]]:
        counts: Counter[str] = Counter()
        for kind, find in finders.items():
            parts, done = [], 0
            for start, end in find(text):
                parts += [text[done:start], PLACEHOLDERS[kind]]
                done = end
            if parts:
                counts[kind] = len(parts) // 2
                text = "".join([*parts, text[done:]])
        return text, counts

    return replace


@functools.cache
def emails() -> Callable[[str], Iterator[Span]]:
    """A finder of e-mail addresses by datatrove's pattern, of those whose last label can be a top-level domain."""
    from datatrove.pipeline.formatters import PIIFormatter

    pattern = PIIFormatter().emails_replacer.regex

    def find(text: str) -> Iterator[Span]:
        done, at = 0, text.find("@")
        while at >= 0:
            local = LOCAL.search(text, max(done, at - 64), at)
            domain = DOMAIN.match(text, at + 1)
            found = pattern.search(text[local.start() : domain.end()]) if local and domain else None
            if found and TOP_LEVEL.search(found[0]):
                start, done = local.start() + found.start(), local.start() + found.end()
                if not found[0].endswith(PLACEHOLDERS["email"]):  # behind what is left of a local part over 64
                    yield start, done
            at = text.find("@", at + 1)

    return find


def ipv6(text: str) -> Iterator[Span]:
    """IPv6 addresses of the whole Internet, less networks: they end with ::, as does a year before one."""
    for found in IPV6.finditer(text):
        if _public(found[0]) and not found[0].endswith("::"):
            yield found.span()


def ipv4(text: str) -> Iterator[Span]:
    """IPv4 addresses of the whole Internet, less what looks or is called like a version."""
    for found in IPV4.finditer(text):
        if not _public(found[0]):
            continue
        before = text[max(0, found.start() - BEFORE) : found.start()]
        small = all(int(part) < SMALL for part in found[0].split(".")[:2])
        named = ADDRESS.search(before) or re.match(r":\d", text[found.end() : found.end() + 2])
        if named or not (small or COUNTED.search(before)):
            yield found.span()


def _public(address: str) -> bool:
    """Not of documentation, as the placeholders are, of private networks, or of groups."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return found.is_global and not found.is_multicast


def phones(regions: tuple[str, ...]) -> Callable[[str], Iterator[Span]]:
    """A finder of phone numbers: with a country's code, or as they are written in one of `regions`."""
    library = _phonenumbers()
    if unknown := sorted(set(regions) - library.SUPPORTED_REGIONS):
        raise ConfigError(f"pii_regions: {', '.join(unknown)}: libphonenumber knows none; ISO codes such as US, GB, FR")

    def find(text: str) -> Iterator[Span]:
        for run in RUN.finditer(text):
            yield from find_in(text, *run.span())

    def find_in(text: str, start: int, stop: int) -> Iterator[Span]:
        found = NUMBER.search(text, start, stop)
        while found:
            start, end = found.span()
            if found[0] == PLACEHOLDERS["phone"]:
                length = 0
            elif found[0][0] == "+":
                length = _international(library, text, start, found[0])
            else:
                length = _national(library, text, start, found[0], regions)
            if length:
                yield start, start + length
            is_placeholder = found[0] == PLACEHOLDERS["phone"]
            found = NUMBER.search(text, end if is_placeholder else start + max(length, 1), stop)

    return find


def _international(library: Any, text: str, start: int, number: str) -> int:
    """The characters of `number`, which has its country's code, that are a phone number; 0 if none are.

    What is behind it on its line may be a number of its own: "+1 212 664 7665 24 hours".
    """
    before = text[max(0, start - BEFORE) : start]
    if EXPRESSION.search(before) and not PHONE.search(before):
        return 0
    for part in _shorter(number, " "):
        is_end = not BEHIND_CODE.match(text, start + len(part))
        if is_end and _is_number(part, None, library.Leniency.VALID):
            return len(part)
    return 0


def _national(library: Any, text: str, start: int, number: str, regions: tuple[str, ...]) -> int:
    """The same of a number without the code: one that a word calls so, or that is grouped as its region groups them.

    Without a word, spaces alone are a table's, but behind a 0 or an area's code, and signs between spaces are minus.
    """
    before = text[max(0, start - BEFORE) : start]
    called = PHONE.search(before)
    if not called and any(rule.search(before) for rule in (COUNTED, EXPRESSION, OPERAND)):
        return 0
    leniency = library.Leniency.VALID if called else library.Leniency.EXACT_GROUPING
    for part in _shorter(number, " [-/\u2013] "):
        gaps = set(re.findall("[^\\d() \u00a0]", part))
        # Dots go with no other sign: 252.227-7014 is a clause of a law, 0.5482 12.34 a row.
        is_clause = "." in gaps and (len(gaps) > 1 or re.search("\\d[ \u00a0]\\d", part))
        is_row = part.isdigit() or not (gaps or "(" in part or part[0] == "0") or re.search(" [^\\d(]", part)
        if is_clause or is_row and not called or BEHIND.match(text, start + len(part)):
            continue
        if any(_is_number(part, region, leniency) for region in regions):
            return len(part)
    return 0


def _shorter(number: str, gap: str) -> list[str]:
    """`number`, and what is before its last gap, its last but one, and the one before: rows of a table have more."""
    return [number, *(number[: found.start()] for found in list(re.finditer(gap, number))[:-4:-1])]


@functools.lru_cache(1 << 14)  # what stands at the foot of every page is asked once
def _is_number(number: str, region: str | None, leniency: int) -> bool:
    if len(re.findall(r"\d+", number)) > MOST_GROUPS:
        return False
    library = _phonenumbers()
    try:
        if not library.is_valid_number(library.parse(number, region)):  # the matcher takes long to find none
            return False
    except library.NumberParseException:
        return False
    found = next(iter(library.PhoneNumberMatcher(number, region, leniency)), None)
    return found is not None and (found.start, found.end) == (0, len(number))


def phones_version() -> str:
    """Of the library that knows phone numbers; ConfigError if it is not there."""
    return _phonenumbers().__version__


def _phonenumbers() -> Any:
    try:
        import phonenumbers
    except ImportError as error:
        raise ConfigError(f"phonenumbers cannot be imported ({error}): pip install phonenumberslite") from error
    return phonenumbers
