"""A file that cannot be read is tried again; where a subset allows it, it is left out by name, and the rest goes on."""

import errno
import http.server
import io
import json
import os
import threading
from functools import partial
from pathlib import Path

import fsspec
import pytest

pytest.importorskip("datatrove")

from test_build import BOOKS, different_files  # noqa: E402

from k2jax.errors import StorageError, UnreadableError  # noqa: E402
from k2jax.prepare import build, recipe  # noqa: E402
from k2jax.prepare.sources import parts, stored, unreadable  # noqa: E402
from k2jax.prepare.sources.files import list_files  # noqa: E402
from k2jax.prepare.sources.records import json_records  # noqa: E402


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited."""
    found: list[float] = []
    monkeypatch.setattr(stored.time, "sleep", found.append)
    return found


class Breaking(io.BytesIO):
    """A file whose connection breaks at some places, once at each."""

    def __init__(self, data: bytes, broken: set[int], error: Exception):
        super().__init__(data)
        self.broken, self.error = broken, error

    def read(self, size: int = -1) -> bytes:
        data = super().read(min(size, 1000))
        if reached := {place for place in self.broken if self.tell() > place}:
            self.broken -= {min(reached)}
            self.close()
            raise self.error
        return data


@pytest.mark.parametrize("error", [TimeoutError("lost"), OSError(errno.ESTALE, "Stale"), RuntimeError("of a storage")])
def test_a_read_that_breaks_goes_on_where_it_was(monkeypatch, waits, error):
    data, broken = os.urandom(50_000), {0, 1000, 20_500, 49_999}
    monkeypatch.setattr(stored, "open", lambda *_, **__: Breaking(data, broken, error), raising=False)
    with stored.Stored("x") as file:
        file.seek(300)
        assert io.BufferedReader(file, 4096).read() == data[300:]
    assert not broken and len(waits) == 4 and max(waits) <= 4


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EIO, "Input/output error"), [1, 4, 16, 64]),
        (FileNotFoundError(2, "No such file"), []),
        (PermissionError("forbidden"), []),
    ],
)
def test_what_another_try_may_help_is_tried_again_and_no_more(monkeypatch, waits, error, expected):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(stored, "open", fails, raising=False)
    with pytest.raises(UnreadableError, match="x cannot be read") as raised:
        stored.Stored("x")
    assert waits == expected and raised.value.path == "x"


class Answers(http.server.BaseHTTPRequestHandler):
    """A file behind a server that first answers with a status, to so many requests."""

    status, times, protocol_version = 503, 0, "HTTP/1.1"

    def do_HEAD(self) -> None:
        refused = type(self).times > 0
        type(self).times -= 1
        data = b"" if refused else b"all of it"
        self.send_response(self.status if refused else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_GET = do_HEAD

    def log_message(self, *_) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "times", "expected"),
    [(503, 4, True), (429, 4, True), (503, 99, False), (401, 99, False), (403, 99, False), (404, 99, False)],
)
def test_a_server_that_is_busy_is_asked_again_and_one_that_refuses_is_not(waits, status, times, expected):
    answers = type("Answers", (Answers,), {"status": status, "times": times})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with stored.Stored(f"http://127.0.0.1:{server.server_port}/a.jsonl") as file:
                assert file.readall() == b"all of it" and expected
        except UnreadableError as error:
            assert not expected and f"the answer was {status}" in str(error)
        finally:
            server.shutdown()
    assert bool(waits) == (status in (503, 429))


def with_attributes(error: Exception, **attributes: object) -> Exception:
    """As a storage's library has them."""
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


NoCredentialsError = type("NoCredentialsError", (Exception,), {})
REFUSED = OSError(errno.EIO, "An error occurred (401) when calling the HeadObject operation")
REFUSED.__cause__ = with_attributes(Exception(), response={"ResponseMetadata": {"HTTPStatusCode": 401}})


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (NoCredentialsError("Unable to locate credentials"), False),  # botocore's
        (REFUSED, False),  # s3fs's
        (with_attributes(RuntimeError(), code=401), False),  # gcsfs's
        (with_attributes(RuntimeError(), code=503), True),
        (with_attributes(OSError(), response=with_attributes(RuntimeError(), status_code=403)), False),  # requests'
        (with_attributes(OSError(), response=with_attributes(RuntimeError(), status_code=429)), True),
        (OSError(errno.EIO, "Input/output error"), True),
    ],
)
def test_what_a_server_answered_decides(error, passes):
    assert stored._may_pass(error) == passes


def test_a_file_that_was_replaced_between_two_tries_is_no_mixture(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old " * 1000)
    file = stored.Stored(str(path))
    assert file.read(4) == b"old "
    file._file.close()
    monkeypatch.setattr(stored, "_may_pass", lambda error: "closed file" in str(error))
    (tmp_path / "b").write_bytes(b"new " * 1000)
    os.replace(tmp_path / "b", path)
    with pytest.raises(UnreadableError, match="it has changed while it was read"):
        file.read(4)


ROWS = "".join(json.dumps({"text": f"row {i} " * 20}) + "\n" for i in range(400)).encode()


@pytest.mark.parametrize("where", ["", "memory://", "packed", "linked"])
@pytest.mark.parametrize("now", [ROWS + ROWS[:170], ROWS[170:], b""])
def test_a_file_that_was_written_after_it_was_listed_is_an_error(tmp_path, where, now):
    path = f"{'memory:/' * (where == 'memory://')}{tmp_path}/a.jsonl{'.gz' * (where == 'packed')}"
    write = partial(fsspec.open, compression="gzip" if where == "packed" else None)
    target = f"{path}.target" if where == "linked" else path
    with write(target, "wb") as file:
        file.write(ROWS)
    if where == "linked":
        os.symlink(target, path)
    source, chosen = f"jsonl:{path}", recipe.subset(f"jsonl:{path}")
    [whole] = list_files(source)
    halves = [parts.measure(whole, chosen, 1 << 14, *piece) for piece in parts.pieces(whole, chosen, 1 << 14)]
    found = [whole] if where == "packed" else parts.of_pieces(whole, halves)
    assert len(found) == 1 or where != "packed" and len(found) > 3
    read = [row["text"] for file in found for _, row in json_records(file, 1 << 20)]
    assert read == [json.loads(line)["text"] for line in ROWS.splitlines()]
    with write(target, "wb") as file:
        file.write(now)
    for file in found:
        with pytest.raises(UnreadableError, match=r"written since it was listed, [\d,]+ bytes and [\d,]+ then"):
            list(json_records(file, 1 << 20))


def books(folder: Path, **options) -> recipe.ConfigDict:
    """Files of text in two tasks; no. 3 cannot be read."""
    config = recipe.base()
    config.vocab_size, config.tokenizer_bytes, config.validation_fraction = 330, 20_000, 0.2
    config.subsets.books = recipe.subset(f"text:{folder}/*.txt", tasks=2, **options)
    recipe.validate(config.lock())
    return config


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Files of which one cannot be read, and the same without it."""
    all_of_them, without = tmp_path / "all", tmp_path / "without"
    for folder in (all_of_them, without):
        folder.mkdir()
        for i, book in enumerate(BOOKS[:12]):
            if folder == all_of_them or i != 3:
                (folder / f"{i:02}.txt").write_text(book, encoding="utf-8")
    whole = stored.Stored.readinto

    def readinto(self, buffer):
        if self.path == f"{all_of_them}/03.txt":
            raise self._error(OSError(errno.EIO, "Input/output error"))
        return whole(self, buffer)

    monkeypatch.setattr(stored.Stored, "readinto", readinto)
    return all_of_them, without


@pytest.mark.parametrize("max_bytes", [0, sum(len(book.encode()) for book in BOOKS[:12]) * 5 // 6])
def test_the_rest_goes_on_and_the_card_names_the_file(tmp_path, folders, max_bytes):
    all_of_them, without = folders
    found, _ = build.build(
        books(all_of_them, max_unreadable=1, max_bytes=max_bytes), tmp_path / "a", workers=1, keep_stages=True
    )
    expected, _ = build.build(books(without, max_bytes=max_bytes), tmp_path / "b", workers=1)
    assert different_files(tmp_path / "a/books", tmp_path / "b/books") == []
    assert found["stores"] == expected["stores"]
    [note] = (tmp_path / "a/stages/unreadable/books").iterdir()
    assert json.loads(note.read_bytes())["name"] == "03.txt"
    if not max_bytes:
        assert list(found["unreadable"]["books"]) == ["03.txt"] and "unreadable" not in expected
        assert "1 file that cannot be read" in build.describe(found)
        card = json.loads((tmp_path / "a/card/data.json").read_bytes())["subsets"]["books"]
        assert "Input/output error" in card["unreadable"]["03.txt"] and card["problems"][0].startswith("03.txt: file")


def test_more_files_than_are_allowed_end_it_and_leave_no_note_that_would_outlast_the_storage(tmp_path, folders):
    all_of_them, without = folders
    with pytest.raises(StorageError, match="03.txt cannot be read .Input/output error"):
        build.build(books(all_of_them), tmp_path / "a", workers=1)
    chosen = books(all_of_them, max_unreadable=1).subsets.books
    files = [unreadable.File(f"{i}.txt", f"{i}", 9) for i in range(3)]
    errors = [UnreadableError(f"{i} cannot be read") for i in range(3)]
    for i, error in enumerate(errors):
        error.path = str(i)
    unreadable.note(tmp_path, "books", chosen, files, errors[0])
    unreadable.note(tmp_path, "books", chosen, files, errors[0])  # of another attempt
    with pytest.raises(UnreadableError, match="1 cannot be read; subsets.books.max_unreadable=1 are left out already"):
        unreadable.note(tmp_path, "books", chosen, files, errors[1])
    assert list(unreadable.noted(tmp_path, "books")) == ["0.txt"]
    other = UnreadableError("an evaluation set")
    with pytest.raises(UnreadableError, match="an evaluation set"):
        unreadable.note(tmp_path, "books", chosen, files, other)
