"""What leaves the program: nothing that a terminal obeys, no credentials, no markup."""

import json

import pytest

from k2jax.text import as_code, for_markdown, has_secrets, printable, redacted, without_secrets

SECRETS = {
    "https://user:pass@host/a.jsonl": "https://***@host/a.jsonl",
    "https://ghp_token@github.com/x/y": "https://***@github.com/x/y",
    "HTTPS://user:p@ss@host:8080/a?b=c": "HTTPS://***@host:8080/a?b=c",
    "ftp://u:p@h": "ftp://***@h",
    "s3://KEY:SECRET@bucket/x": "s3://***@bucket/x",
    "ssh://git:secret@host/x": "ssh://***@host/x",
    "https://h/a?token=abc&part=2": "https://h/a?token=***&part=2",
    "https://h/a?X-Amz-Credential=A%2Fb&X-Amz-Date=20260101&X-Amz-Signature=0f": (
        "https://h/a?X-Amz-Credential=***&X-Amz-Date=20260101&X-Amz-Signature=***"
    ),
    "https://h/a?X-Amz-Security-Token=abc": "https://h/a?X-Amz-Security-Token=***",
    "https://h/a?x%2Damz%2Dsignature=0f": "https://h/a?x%2Damz%2Dsignature=***",
    "https://a.blob.core.windows.net/c/x?sv=2022&sig=a%2Bb%3D": "https://a.blob.core.windows.net/c/x?sv=2022&sig=***",
    "gs://b/o?X-Goog-Signature=ff&Expires=1": "gs://b/o?X-Goog-Signature=***&Expires=1",
    "https://s3.amazonaws.com/b/o?AWSAccessKeyId=AKIA&Signature=x&Expires=1": (
        "https://s3.amazonaws.com/b/o?AWSAccessKeyId=***&Signature=***&Expires=1"
    ),
    "https://h/cb#access_token=abc&state=1": "https://h/cb#access_token=***&state=1",
    "https://h/x?api_key=1;apikey=2;password=3;n=4": "https://h/x?api_key=***;apikey=***;password=***;n=4",
    "cannot read https://u:p@h/a (403), nor 's3://k:s@b/c'": "cannot read https://***@h/a (403), nor 's3://***@b/c'",
    "--config.data.root=s3://k:s@b/c": "--config.data.root=s3://***@b/c",
}
HARMLESS = [
    "https://host/a.jsonl?page=2&lang=en",
    "https://host/@user/post?tokenizer=x&monkey=1&design=2",
    "hf://datasets/org/name@main/data/x.parquet",
    "hf://org/model@v1/x",
    "abfs://container@account.dfs.core.windows.net/x",
    "s3://bucket/a@b:c/x",
    "me@example.com and key=value, a: b@c",
    "/local/path?token=x",
    "gs://bucket/x?generation=12",
]


@pytest.mark.fault("S9")
@pytest.mark.parametrize("url", SECRETS)
def test_credentials_are_taken_out_of_urls(url: str):
    assert without_secrets(url) == SECRETS[url]
    assert without_secrets(SECRETS[url]) == SECRETS[url] and has_secrets(url)


@pytest.mark.parametrize("url", HARMLESS)
def test_what_is_none_stays(url: str):
    assert without_secrets(url) == url and not has_secrets(url)


def test_in_json_text_and_in_values():
    value = {"url": "https://u:p@h/x?token=t", "n": [1, None, ("s3://k:s@b", True)]}
    clean = {"url": "https://***@h/x?token=***", "n": [1, None, ["s3://***@b", True]]}
    assert redacted(value) == clean
    assert json.loads(without_secrets(json.dumps(value))) == clean


@pytest.mark.fault("S17")
def test_no_character_commands_a_terminal():
    for code in [*range(32), *range(127, 160), 0x202E, 0x2028, 0x2066, 0x200F, 0x61C, 0xD800, 0xDFFF]:
        shown = printable(f"a{chr(code)}b")
        assert shown == (f"a{chr(code)}b" if chr(code) in "\t\n" else f"a\\u{code:04x}b")
    for text in ("äöü 漢字 \U0001f469\u200d\U0001f680 é a\xa0b", "\\x1b", ""):
        assert printable(text) == text
    told = json.dumps({"text": "\x7f\x1b[2J"})
    assert json.loads(printable(told)) == json.loads(told), "JSON stays what it is"


def test_markdown():
    assert for_markdown("a|b\n# <img src=x> [x](https://u:p@h) `c`") == (
        r"a\|b \# \<img src=x\> \[x\](https\://\*\*\*\@h) \`c\`"
    )
    assert as_code("a`b`\n|\x1b[0m") == "`a'b' |\\u001b[0m`"
