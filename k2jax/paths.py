"""Paths as users write them, parsed once, where they come in: on command lines and in configurations.

    paths.add(parser, "--prompts", help="a file")                         a Path of this machine, or a ConfigError
    paths.add(parser, "--workdir", buckets=True, help="run directory")    a Path or a BucketPath

What comes out is a Path, which is local, a BucketPath, or a string, which is a URL of a store; nothing further in looks
for "://" or "~".
"""

import os
import re
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from k2jax.bucket import BucketPath, at
from k2jax.errors import ConfigError
from k2jax.text import has_secrets, without_secrets

OBJECT_STORES = ("gs", "s3")  # whose URLs TensorStore and pyarrow both take
# Schemes that a path with one slash too few was meant for; other names may end in a colon.
SCHEMES = ("file", "hf", "http", "https", "hdfs", "ftp", "az", "abfs", "abfss", "gcs", "s3a", "s3n", *OBJECT_STORES)


def add(parser: Any, option: str, *, urls: bool = False, buckets: bool = False, **options: Any) -> None:
    """Adds an option whose value is a path to argparse's parser, which lets the ConfigError of a wrong one through.

    `urls` of stores are taken as they are; where `buckets` are taken, they become a BucketPath.
    """
    kind = partial(in_bucket, option=option) if buckets else partial(parse, option=option, urls=urls)
    parser.add_argument(option, type=kind, **options)


def in_bucket(text: str, option: str) -> Path | BucketPath:
    """As `parse`, with a gs:// or s3:// URL as what it names."""
    found = parse(text, option, urls=True)
    try:
        return at(found)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from error


def parse(text: str, option: str, *, urls: bool = False) -> Path | str:
    """The local path, with ~ and ~user replaced, or, where `urls` are taken, the gs:// or s3:// URL that `text` is.

    "file:///a%20b" is the local path "/a b". `option` names what is being parsed, for messages. Raises ConfigError.
    """
    where = f"{option}={text if text.isprintable() else repr(text)}"
    if not text:
        raise ConfigError(f"{where}: expected a path, found nothing: name one, '.' is the folder you are in")
    if "\0" in text:
        raise ConfigError(f"{where}: holds a NUL byte, which no path can: take it out")
    if found := re.match(r"([a-z][a-z0-9+.-]*)://(.*)", text, re.IGNORECASE | re.DOTALL):
        return _url(found[1].lower(), found[2], where, urls)
    scheme, colon, rest = text.partition(":")
    if colon and scheme.lower() in SCHEMES and rest.startswith("/"):
        meant = f"{scheme.lower()}://" + ("/" if scheme.lower() == "file" else "") + rest.lstrip("/")
        raise ConfigError(f"{where}: did you mean the URL {meant}? A local folder of that name is written ./{text}")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = text.split("/")[0]
        raise ConfigError(f"{where}: there is no user {user[1:]}: a local name that begins with ~ is written ./{user}")
    return Path(expanded)


def absolute(path: Path | BucketPath) -> Path | BucketPath:
    """The same place with no ".." in it, which TensorStore refuses; a link before one is followed, as open() does."""
    return path.resolve() if isinstance(path, Path) and ".." in path.parts else path.absolute()


def _url(scheme: str, rest: str, where: str, urls: bool) -> Path | str:
    if scheme == "file":
        path = unquote(rest.removeprefix("localhost"), errors="surrogateescape")
        if not path.startswith("/") or "\0" in path:
            raise ConfigError(f"{where}: expected file:// and an absolute path, such as file:///data")
        return Path(path)
    if not urls:
        raise ConfigError(
            f"{where}: a {scheme}:// URL, expected a path on this machine: copy what is there to a disk, or mount it"
        )
    if has_secrets(f"{scheme}://{rest}"):
        raise ConfigError(
            f"{without_secrets(where)}: holds credentials, which would end in files that others read: leave them to "
            f"the environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, an instance's role)"
        )
    if scheme not in OBJECT_STORES or rest.startswith("/") or not rest:
        raise ConfigError(f"{where}: expected a local path, or a URL as gs://BUCKET/PATH or s3://BUCKET/PATH")
    return f"{scheme}://{rest}"
