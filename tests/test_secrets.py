"""Credentials in a source's URL are in nothing that a preparation leaves, and in nothing that it says."""

import base64
import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2jax import paths
from k2jax.data.store import Store
from k2jax.errors import ConfigError, StorageError
from k2jax.prepare import recipe
from k2jax.prepare.build import build

SECRETS = ("Hunter2secret", "0f1e2d3csig")


class Guarded(http.server.SimpleHTTPRequestHandler):
    """Files for who has the password and the signature."""

    def do_GET(self) -> None:
        if not self._may():
            return self.send_error(403)
        self.path = self.path.partition("?")[0]
        super().do_GET()

    def do_HEAD(self) -> None:
        return self.do_GET() if not self._may() else super().do_HEAD()

    def _may(self) -> bool:
        return self.path.endswith(f"X-Amz-Signature={SECRETS[1]}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "served"
    folder.mkdir()
    rows = [
        {"text": f"document {i} of some words " * 20, "url": f"https://me:{SECRETS[0]}@site/{i}?token={SECRETS[1]}"}
        for i in range(20)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    handler = functools.partial(Guarded, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def recipe_of(url: str):
    config = recipe.base()
    config.subsets.a = recipe.subset(f"jsonl:{url}")
    config.vocab_size = 300
    return config


def texts_of(folder: Path) -> dict[str, bytes]:
    """Every file, and what Parquet has compressed in it."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in folder.rglob("store.json"):
        opened = Store.open(path.parent)
        documents = [opened.document(i) for i in range(opened.num_documents)]
        found[f"{path.parent.name} documents"] = repr(documents).encode()
    return found


@pytest.mark.fault("S9")
def test_a_signed_url_is_read_and_never_told(server: str, tmp_path: Path):
    """Seen red without the hiding of secrets."""
    pytest.importorskip("aiohttp")  # what fsspec reads http with
    out = tmp_path / "out"
    data, _ = build(recipe_of(f"http://{server}/a.jsonl?X-Amz-Signature={SECRETS[1]}"), out, workers=1)
    assert data["stores"]["a"]["documents"] == 20
    texts = texts_of(out)
    assert b"https://***@site/3?token=***" in texts["a documents"] and "card/data.md" in texts
    for secret in SECRETS:
        for form in (secret.encode(), base64.b64encode(secret.encode())):
            assert not [name for name, text in texts.items() if form in text]
    # With a new signature it is the same recipe.
    again, was_there = build(recipe_of(f"http://{server}/a.jsonl?X-Amz-Signature=another"), out, workers=1)
    assert was_there and again == data


def test_who_may_read_the_stages_is_their_owner(tmp_path: Path):
    """Tasks are told there what to read, with all that its URL holds."""
    (tmp_path / "x.txt").write_text(" ".join(f"{n * 7919:x} {n * 104729:b}" for n in range(500)))
    config = recipe.base()
    config.subsets.a = recipe.subset(f"text:{tmp_path / 'x.txt'}")
    config.vocab_size = 300
    build(config, tmp_path / "out", workers=1, keep_stages=True)
    assert (tmp_path / "out" / "stages").stat().st_mode & 0o777 == 0o700


@pytest.mark.fault("S9")
@pytest.mark.parametrize("url", ["s3://KEY:Hunter2secret@bucket/x", "gs://bucket/x?X-Goog-Signature=Hunter2secret"])
def test_a_run_takes_no_credentials(url: str):
    """Its manifest has to name the store as it is."""
    with pytest.raises(ConfigError, match="holds credentials") as error:
        paths.parse(url, "data.root", urls=True)
    assert "Hunter2secret" not in str(error.value)


@pytest.mark.fault("S9")
def test_an_error_tells_none(monkeypatch: pytest.MonkeyPatch):
    from k2jax.prepare.sources import stored
    from k2jax.prepare.tally import shown_name

    monkeypatch.setattr(stored, "WAITS", (0,))
    with pytest.raises(StorageError) as error:
        stored.Stored("http://me:Hunter2secret@127.0.0.1:9/x?sig=Hunter2secret")
    assert "Hunter2secret" not in shown_name(str(error.value))
