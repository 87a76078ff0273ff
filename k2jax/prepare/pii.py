"""Personal data in texts: e-mail addresses and public IPv4 addresses as in datatrove, and phone numbers.

Each kind has one placeholder, of those that are nobody's: with several, taken in turn as datatrove does by default,
what a document becomes would depend on the documents before it.
"""

import re
from collections.abc import Callable

EMAIL = "email@example.com"  # RFC 2606
ADDRESS = "192.0.2.1"  # RFC 5737
PHONE = "555-0100"  # of the numbers that North America keeps for fiction

# datatrove's pattern for e-mail takes time that grows with the square of a run without spaces (1.9 s for 12,000
# characters of "a-a-a-"), so it is given the characters around an @ alone; RFC 5321 allows 64 and 255 of them.
LOCAL = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}\Z")
DOMAIN = re.compile(r"[A-Za-z0-9.:\[\]-]{1,255}")

# Numbers as people write them, with a country's code or an area's, and separators: "+44 20 7946 0958",
# "(212) 664-7665", "212-664-7665". Not bare digits, dates, versions, decimals, ISBNs or part of anything longer.
NUMBER = re.compile(
    r"(?<![\w.+/:=#-])(?<!\d\s)(?:"
    r"\+[1-9]\d{0,2}(?:[ .-]\(?\d{1,4}\)?){2,5}"  # the digits in all are counted below
    r"|(?:1[ .-])?(?:\([2-9]\d{2}\)\s?|[2-9]\d{2}[.-])[2-9]\d{2}[.-]\d{4}"
    r")(?![\w-]|[.,/:]\d|\s\d)"
)
DIGITS = 8, 15  # of an international number (E.164 allows 15)


def pii_replacer() -> Callable[[str], str]:
    """What puts the placeholders in a text; applied again it changes nothing."""
    from datatrove.pipeline.formatters import PIIFormatter

    emails = PIIFormatter(remove_ips=False, email_replacement=EMAIL)
    addresses = PIIFormatter(remove_emails=False, ip_replacement=ADDRESS)
    return lambda text: NUMBER.sub(_phone, addresses.format(_around_at(text, emails.format)))


def _phone(found: re.Match) -> str:
    digits = sum(c.isdigit() for c in found[0])
    return PHONE if not found[0].startswith("+") or DIGITS[0] <= digits <= DIGITS[1] else found[0]


def _around_at(text: str, replace: Callable[[str], str]) -> str:
    parts, done = [], 0
    at = text.find("@")
    while at >= 0:
        local = LOCAL.search(text, max(done, at - 64), at)
        domain = DOMAIN.match(text, at + 1)
        if local and domain:
            address = text[local.start() : domain.end()]
            replaced = replace(address)
            if replaced != address or EMAIL in address:
                parts += [text[done : local.start()], replaced]
                done = domain.end()
        at = text.find("@", at + 1)
    return "".join([*parts, text[done:]])
