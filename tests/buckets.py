"""Servers of buckets on loopback: moto for S3, gcp-storage-emulator for GCS, each a process of its own.

    with buckets.serving("s3") as server:       the environment points at it; server.url is a new bucket's
        server.fail(503, every=3)               from now on, of every three requests one is answered so

Run as `python tests/buckets.py s3 PORT` it is such a server. The emulator knows no conditional writes, no offsets in
listings, no ranges from the end and no empty objects; what Google documents of them is added to it here. It answers one
request at a time.
"""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

CONTROL = "/_control"
VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")


class Faults:
    """What of the requests is answered with an error, or late; and how many there were."""

    def __init__(self):
        self.set({})

    def set(self, wanted: dict) -> None:
        self.status, self.every, self.delay_s = (
            wanted.get(k, d) for k, d in (("status", 0), ("every", 1), ("delay_s", 0))
        )
        self.match, self.method = wanted.get("match", ""), wanted.get("method", "")
        self.seen, self.failed = 0, 0

    def next(self, method: str, path: str) -> int:
        """The status to answer instead, 0 for none."""
        if self.match not in unquote(path) or self.method not in ("", method):
            return 0
        time.sleep(self.delay_s)
        self.seen += 1
        fails = self.status and self.seen % self.every == 0
        self.failed += bool(fails)
        return self.status if fails else 0


class Server:
    """A running one, and a bucket of it."""

    def __init__(self, scheme: str, port: int):
        self.scheme, self.endpoint = scheme, f"http://127.0.0.1:{port}"

    def environment(self) -> dict[str, str]:
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
        own = {"AWS_ENDPOINT_URL": self.endpoint, **keys} if self.scheme == "s3" else {}
        return own if own else {"STORAGE_EMULATOR_HOST": self.endpoint, "GOOGLE_CLOUD_PROJECT": "test"}

    def bucket(self) -> str:
        """The URL of a new one."""
        name = f"b{uuid.uuid4().hex[:8]}"
        if self.scheme == "s3":
            self._ask(f"/{name}", "PUT")
        else:
            self._ask("/storage/v1/b", "POST", json.dumps({"name": name}).encode())
        return f"{self.scheme}://{name}"

    def fail(self, status: int = 503, **wanted: object) -> None:
        """Answers with `status` every `every`-th request whose method is `method` and whose path holds `match`."""
        self._ask(CONTROL, "POST", json.dumps({"status": status, **wanted}).encode())

    def heal(self) -> None:
        self._ask(CONTROL, "POST", b"{}")

    def counted(self) -> dict[str, int]:
        """{"seen", "failed"} since the last `fail` or `heal`."""
        return json.loads(self._ask(CONTROL, "GET"))

    def _ask(self, path: str, method: str, data: bytes | None = None) -> bytes:
        signed = "AWS4-HMAC-SHA256 Credential=a/b/us-east-1/s3/x"  # moto takes the service from it
        headers = {"Content-Type": "application/json", "Authorization": signed}
        request = urllib.request.Request(self.endpoint + path, data, headers, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return answer.read()


@contextlib.contextmanager
def serving(scheme: str) -> Iterator[Server]:
    """A server in a process of its own, to which this one's environment, and that of what it starts, points."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, __file__, scheme, str(port)], stderr=subprocess.PIPE, text=True
    )
    server = Server(scheme, port)
    before = {name: os.environ.pop(name, None) for name in {*VARIABLES, *server.environment()}}
    try:
        for _ in range(150):
            assert process.poll() is None, process.stderr.read()
            with contextlib.suppress(OSError):
                server.counted()
                break
            time.sleep(0.2)
        os.environ.update(server.environment())
        yield server
    finally:
        process.kill()
        process.wait()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


# ---- the process -----------------------------------------------------------------------------------------------------


def control(faults: Faults, method: str, body: bytes) -> bytes:
    if method == "POST":
        faults.set(json.loads(body))
    return json.dumps({"seen": faults.seen, "failed": faults.failed}).encode()


def serve_s3(port: int) -> None:
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    faults, moto = Faults(), DomainDispatcherApplication(create_backend_app)

    def answer(environ: dict, start: Callable) -> list[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path == CONTROL:
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("200 OK", [("Content-Type", "application/json")])
            return [control(faults, method, body)]
        if status := faults.next(method, f"{path}?{environ['QUERY_STRING']}"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(f"{status} Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"]
        return moto(environ, start)

    make_server("127.0.0.1", port, answer, threaded=True).serve_forever()


def serve_gs(port: int) -> None:
    from gcp_storage_emulator import server as emulator

    faults = Faults()

    class Router(emulator.Router):
        """The emulator's, with conditions and faults."""

        def handle(self, method: str) -> None:
            handler = self._request_handler
            request = emulator.Request(handler, method)
            body = emulator._read_raw_data(handler) or b""
            handler.rfile = io.BytesIO(body)  # whoever answers early has read all
            query, path = {key: values[0] for key, values in request.query.items()}, unquote(request.path)
            if path == CONTROL:
                return self.answer(200, control(faults, method, body))
            if status := faults.next(method, f"{path}/{query.get('name', '')}?"):
                return self.answer(status, b"try again")
            bucket, _, name = path.partition("/b/")[2].partition("/o")
            name = query.get("name") or name.removeprefix("/")
            there = handler.storage.objects.get(bucket, {}).get(name, {"generation": "0", "size": "0"})
            found, size, wanted = there["generation"], int(there["size"]), handler.headers.get("Range", "")
            if wanted.startswith("bytes=-"):  # the last so many
                handler.headers.replace_header("Range", f"bytes={max(size - int(wanted[7:]), 0)}-{size - 1}")
            if query.get("ifGenerationMatch", found) != found:
                return self.answer(412, b"conditionNotMet")
            if query.get("ifGenerationNotMatch") == found:
                return self.answer(304, b"")
            self.found, self.query = found, query
            super().handle(method)

        def answer(self, status: int, body: bytes) -> None:
            self._request_handler.send_response(status)
            self._request_handler.send_header("Content-Length", str(len(body)))
            self._request_handler.end_headers()
            self._request_handler.wfile.write(body)

    def read_data(handler: object, query: dict) -> object:
        found = of_emulator(handler, query)
        return b"" if found is None and query.get("uploadType") == ["media"] else found

    def download(request: object, response: object, storage: object) -> None:
        names = request.params["bucket_name"], request.params["object_id"]
        if names[1] in storage.objects.get(names[0], {}):
            response["x-goog-generation"] = storage.objects[names[0]][names[1]]["generation"]
        of_objects(request, response, storage)

    def listed(
        storage: object, bucket: str, prefix: str | None = None, *args: object, **options: object
    ) -> tuple:
        found, prefixes = of_storage(storage, bucket, prefix, *args, **options)
        first, last = (offsets.get(key, [""])[0] for key in ("startOffset", "endOffset"))
        return [o for o in found if o["name"] >= first and (not last or o["name"] < last)], prefixes

    def ls(request: object, response: object, storage: object) -> None:
        offsets.clear()
        offsets.update(request.query)
        list_objects(request, response, storage)

    offsets: dict[str, list[str]] = {}  # of the listing under way: there is one thread
    of_emulator, emulator._read_data = emulator._read_data, read_data
    of_objects, emulator.objects.download = emulator.objects.download, download
    of_storage, emulator.Storage.get_file_list = emulator.Storage.get_file_list, listed
    list_objects, emulator.objects.ls = emulator.objects.ls, ls
    emulator.HANDLERS = tuple(
        (pattern, {verb: {of_objects: download, list_objects: ls}.get(f, f) for verb, f in handlers.items()})
        for pattern, handlers in emulator.HANDLERS
    )
    emulator.Router = Router
    emulator.create_server("127.0.0.1", port, in_memory=True).run()


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # whose modules are named as others'
    {"s3": serve_s3, "gs": serve_gs}[sys.argv[1]](int(sys.argv[2]))
