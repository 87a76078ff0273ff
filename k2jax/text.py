"""Text from outside on its way out: what a terminal would obey as escapes, what a URL holds of credentials as ***.

`printable` is for what goes to a terminal or a log, `without_secrets` for what is stored or said of a URL, `shown` does
both, `for_markdown` is for a line in a card.
"""

import re
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
# C0 and C1 but tab and line feed, what turns the direction of text, separators that end a line, lone surrogates.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Userinfo ends at the last @ before the path. A name without password is none in abfs://CONTAINER@ACCOUNT and hf://A@REV.
USERINFO = re.compile(r"\b([a-z][a-z0-9+.-]*)(:/{2,3})([^\s/?#'\"<>]+)@", re.IGNORECASE)
NAMED = ("http", "https", "ftp", "ftps", "git+https", "git+http")  # whose name alone may be a token
PARAMETER = re.compile(r"([?&;#])([^=&;?#\s'\"<>]+)=([^&;#\s'\"<>]*)")
# The end of a name says it: X-Amz-Signature, X-Goog-Credential, X-Amz-Security-Token, sig, access_key, AWSAccessKeyId.
SECRET = re.compile(
    r"(^|[-_.])(token|sig|signature|secret|password|passwd|pwd|passphrase|credentials?|auth|authorization|key|apikey"
    r"|secretkey|accesskey|jwt|session|sessionid)$|accesskeyid$|(access|refresh|id|auth)token$",
    re.IGNORECASE,
)
# What can mean something within a line of GitHub's Markdown, and what would make an address a link.
MARKUP = re.compile(r"([\\`*_\[\]<>#|~&@$:]|(?<=www)\.)", re.IGNORECASE)


def printable(text: str) -> str:
    """Text that no terminal obeys: control characters as escapes of JSON, but for tabs and line feeds."""
    return CONTROL.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def without_secrets(text: str) -> str:
    """A URL, or text with URLs in it, less what they hold of passwords, tokens, keys and signatures."""
    if "://" not in text:
        return text
    return without_secret_parameters(USERINFO.sub(_userinfo, text))


def without_secret_parameters(text: str) -> str:
    """The same of the end of a URL, from its path on."""
    return PARAMETER.sub(_parameter, text)


def shown(value: object) -> str:
    """Both: of an error, of a line for people."""
    return printable(without_secrets(str(value)))


def redacted(value: Any) -> Any:
    """The same of every text in a value of JSON's types."""
    if isinstance(value, dict):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(item) for item in value]
    return without_secrets(value) if isinstance(value, str) else value


def for_markdown(value: object) -> str:
    """One line of Markdown: no character of it is markup, no address becomes a link."""
    return MARKUP.sub(r"\\\1", " ".join(shown(value).split()))


def as_code(value: object) -> str:
    """The same in code's type, which a backtick would end."""
    return "`" + " ".join(shown(value).replace("`", "'").split()) + "`"


def has_secrets(url: str) -> bool:
    """Whether a URL holds what `without_secrets` would hide."""
    return without_secrets(url) != url


def _userinfo(found: re.Match) -> str:
    scheme, slashes, user = found.groups()
    is_secret = ":" in user or scheme.lower() in NAMED
    return f"{scheme}{slashes}{HIDDEN}@" if is_secret else found.group()


def _parameter(found: re.Match) -> str:
    before, name, value = found.groups()
    return f"{before}{name}={HIDDEN}" if value and SECRET.search(unquote(name)) else found.group()
