"""A run with everything that a verifier looks at, its release, and the tools of an able forger."""

import base64
import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from verifier import verifier

from k2jax.data.epochs import decide, read_epochs
from k2jax.data.journal import append_entry, read_journal
from k2jax.data.loader import batch_digest, row_digests
from k2jax.data.manifest import canonical_json, sha256_json
from k2jax.data.provenance import open_run


def make_run(straight: Path, workdir: Path, config: Callable[..., Any]) -> None:
    """A whole run of 25 steps that is rolled back to step 10, goes on with another mix, and skips its last step.

    So: two epochs, three entries in the journal, a branch, checkpoints 10, 20 and 24; evaluations and a gallery.
    """
    from k2jax.evals.session import Session, Wanted
    from k2jax.stability.ladder import ranges_of_steps
    from k2jax.train import train

    shutil.copytree(straight, workdir, ignore=shutil.ignore_patterns("evals", "gallery", "lock"))
    Session(Wanted(workdir, "20", ("validation",), None, None, None, 4, None, 8, False, 4096, 1), str).run()
    shutil.rmtree(workdir / "checkpoints" / "25")
    _decide(workdir, "defer", ranges_of_steps(open_run(workdir).order, 16, 16), 10)
    ranges = ranges_of_steps(open_run(workdir).order, 12, 13)
    more = {"attempt": 1, "crossing": 12, "seen_at": 13, "until": 14, "spike": "loss"}
    _decide(workdir, "rollback", ranges, 10, how="defer", branch=1, **more)
    other = {"stages.0.mix.web": 3.0, "allow_drift": "('stages',)"}
    train(config(**other), workdir)
    shutil.rmtree(workdir / "checkpoints" / "25")
    _decide(workdir, "skip", ranges_of_steps(open_run(workdir).order, 25, 25), 20)
    train(config(**other), workdir)
    Session(Wanted(workdir, "all", ("validation",), None, None, None, 4, None, 8, False, 4096, 1), str).run()
    (workdir / "gallery").mkdir()
    for step in (10, 20, 24):
        digest = json.loads((workdir / f"checkpoints/{step}/meta/meta.json").read_bytes())["digest"]
        values = {"format": 1, "step": step, "checkpoints": {digest: [{"prompt": "abc", "text": "d"}]}}
        (workdir / f"gallery/{step}.json").write_text(json.dumps(values))


def _decide(workdir: Path, kind: str, ranges: list, at_step: int, **more: Any) -> None:
    path = workdir / "journal.jsonl"
    said = {"by": "a test", "why": "to have one"}
    entry = decide(
        read_epochs(workdir), read_journal(path), kind=kind, ranges=ranges, at_step=at_step, **said, **more
    )
    append_entry(path, entry)


class Forger:
    """Changes a release, and then all digests that a forger can compute."""

    def __init__(self, root: Path):
        self.root = root

    def json(self, path: str, change: Callable[[Any], Any]) -> Any:
        """Reads, changes in place and writes a file of JSON."""
        values = json.loads((self.root / path).read_bytes())
        change(values)
        (self.root / path).write_text(json.dumps(values, indent=1))
        return values

    def lines(self, path: str, change: Callable[[list], Any]) -> None:
        """The same of a file of lines, or with those that `change` returns."""
        lines = [json.loads(line) for line in (self.root / path).read_bytes().splitlines()]
        changed = change(lines)
        lines = changed if isinstance(changed, list) else lines
        (self.root / path).write_bytes(b"".join(canonical_json(line) + b"\n" for line in lines))

    # ---- what makes it whole again -------------------------------------------------------------------------------

    def files(self) -> None:
        """files.json of what is there."""
        entries = {}
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            if path.is_file() and name not in ("files.json", "model.sig"):
                data = path.read_bytes()
                entries[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (self.root / "files.json").write_bytes(canonical_json({"format": 1, "files": entries}) + b"\n")

    def manifest(self, change: Callable[[list], Any], subject: str = "") -> None:
        """model.sig of what is there, by nobody."""
        data = (self.root / "files.json").read_bytes()
        digests = {name: entry["sha256"] for name, entry in json.loads(data)["files"].items()}
        digests["files.json"] = hashlib.sha256(data).hexdigest()
        resources = [{"name": n, "algorithm": "sha256", "digest": d} for n, d in sorted(digests.items())]
        change(resources)
        whole = hashlib.sha256(b"".join(bytes.fromhex(r["digest"]) for r in resources)).hexdigest()
        statement = {
            "subject": [{"digest": {"sha256": subject or whole}}],
            "predicate": {"resources": resources},
        }
        payload = base64.b64encode(canonical_json(statement)).decode()
        envelope = {"payloadType": "application/vnd.in-toto+json", "payload": payload, "signatures": []}
        (self.root / "model.sig").write_text(json.dumps({"dsseEnvelope": envelope}))

    def meta(self, folder: str, change: Callable[[dict], Any]) -> dict:
        """A checkpoint's meta, with its own digests, and its data part."""

        def whole(meta: dict) -> None:
            del meta["meta_sha256"]
            change(meta)
            digests = json.dumps(dict(sorted(meta["digests"].items())))
            meta["digest"] = hashlib.sha256(digests.encode()).hexdigest()
            (self.root / folder / "data" / "metadata").write_text(json.dumps(meta["data"], indent=1))
            meta["meta_sha256"] = sha256_json(meta)

        return self.json(f"{folder}/meta/meta.json", whole)

    def rechain(self, run: str = "run", change: Callable[[list], Any] = lambda records: None) -> None:
        """All records of a ledger from its rows, after a change of them."""
        rows = {}
        for folder in dict.fromkeys(("run", run)):
            for path in sorted((self.root / folder / "ledger").glob("chunk-*.jsonl")):
                rows |= {row["step"]: row for row in map(json.loads, path.read_bytes().splitlines())}

        def whole(records: list) -> list:
            changed = change(records)
            records = copy.deepcopy(changed if changed and isinstance(changed[0], dict) else records)
            first, previous = 1, "0" * 64
            for record in records:
                del record["record"]
                last = record["last_step"]
                text = b"".join(canonical_json(rows[step]) + b"\n" for step in range(first, last + 1))
                record |= {"first_step": first, "num_rows": last - first + 1, "previous": previous}
                record["steps"] = hashlib.sha256(text).hexdigest()
                record["record"] = previous = sha256_json(record)
                first = last + 1
            return records

        self.lines(f"{run}/ledger/records.jsonl", whole)

    def row(self, step: int, **values: Any) -> None:
        """Changes a row of the ledger."""
        for path in sorted((self.root / "run" / "ledger").glob("chunk-*.jsonl")):

            def change(rows: list) -> None:
                for row in rows:
                    row |= values if row["step"] == step else {}

            self.lines(f"run/ledger/{path.name}", change)

    def epoch(self, number: int, change: Callable[[dict], Any]) -> None:
        """Changes an epoch, and the digests of it and of all that follow."""
        previous = None
        for path in sorted((self.root / "run" / "epochs").glob("*.json")):

            def whole(epoch: dict) -> None:
                nonlocal previous
                if epoch["number"] == number:
                    change(epoch)
                epoch["previous"] = previous
                epoch["sha256"] = previous = sha256_json(
                    {k: v for k, v in epoch.items() if k not in ("format", "sha256")}
                )

            self.json(f"run/epochs/{path.name}", whole)

    def checkpoint(self, step: int, change: Callable[[dict], Any]) -> None:
        """Changes a checkpoint's meta, and all that names its digests: parents, ledger, lists, certificates, names."""
        names = {}
        for one in sorted(int(path.name) for path in (self.root / "run" / "checkpoints").iterdir()):

            def whole(meta: dict, one: int = one) -> None:
                if one == step:
                    change(meta)
                if meta["parent"] and meta["parent"]["digest"] in names:
                    meta["parent"]["digest"] = names[meta["parent"]["digest"]]

            before = json.loads((self.root / f"run/checkpoints/{one}/meta/meta.json").read_bytes())["digest"]
            after = self.meta(f"run/checkpoints/{one}", whole)
            names[before] = after["digest"]
            belongs = {
                "checkpoint": after["digest"],
                "order": after["data"]["order"],
                "config": after["config_digest"],
            }

            def renamed(records: list, one: int = one, belongs: dict = belongs) -> None:
                for record in records:
                    record |= belongs if record["last_step"] == one else {}

            self.rechain(change=renamed)
        self._rename(names)
        self.table_bytes()

    def _rename(self, names: dict[str, str]) -> None:
        for pattern in ("release.json", "checkpoints.csv", "run/evals/*/*.json", "run/gallery/*.json"):
            for path in self.root.glob(pattern):
                text = path.read_text()
                for before, after in names.items():
                    text = text.replace(before, after)
                path.write_text(text)
        for path in self.root.glob("exports/*/parity.json"):

            def whole(parity: dict) -> None:
                del parity["certificate_sha256"]
                found = parity["checkpoint"]["digest"]
                parity["checkpoint"]["digest"] = names.get(found, found)
                parity["certificate_sha256"] = sha256_json(parity)

            self.json(path.relative_to(self.root).as_posix(), whole)
        for path in self.root.glob("run/evals/*/*.json"):
            self.name_evaluation(path)

    def name_evaluation(self, path: Path) -> Path:
        """The name that its content gives it, and its samples."""
        result = json.loads(path.read_bytes())
        identity = {key: result[key] for key in ("task", "version", "settings", "seed", "checkpoint")}
        new = path.parent.parent / str(result["step"]) / f"{result['task']}-{sha256_json(identity)[:12]}.json"
        new.parent.mkdir(exist_ok=True)
        samples = new.with_suffix(".samples.jsonl")
        path.with_name(result["samples"]["file"]).rename(samples)
        result["samples"]["file"] = samples.name
        path.unlink()
        new.write_text(json.dumps(result, indent=1))
        return new

    def chunk(self, number: int, change: Callable[[dict[str, list]], Any]) -> None:
        """Changes the rows of a chunk, as lists of Python's by column."""
        path = self.root / f"data/chunk_{number:05d}.parquet"
        table = pq.read_table(path)
        columns = {name: table[name].to_pylist() for name in table.column_names}
        change(columns)
        arrays = [pa.array(columns[field.name], field.type) for field in table.schema]
        pq.write_table(pa.Table.from_arrays(arrays, schema=table.schema), path)
        self.chunks()

    def chunks(self) -> None:
        """Sizes and digests in chunks.json."""

        def whole(listed: dict) -> None:
            for one in listed["chunks"]:
                data = (self.root / "data" / one["file"]).read_bytes()
                one |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

        self.json("data/chunks.json", whole)

    def batch(self, number: int, step: int) -> str:
        """The digest of a step's released rows."""
        table = pq.read_table(self.root / f"data/chunk_{number:05d}.parquet", filters=[("step", "=", step)])
        tokens = np.array(table["token_ids"].to_pylist(), np.uint32)
        return batch_digest(row_digests(np.arange(len(tokens)), tokens))

    def documents(self, number: int) -> list[list[dict]]:
        """Of each row of a chunk."""
        return pq.read_table(self.root / f"data/chunk_{number:05d}.parquet")["documents"].to_pylist()

    def journal_orders(self) -> None:
        """The orders before and after each decision, of the epochs that there are."""
        epochs = [
            json.loads(path.read_bytes()) for path in sorted((self.root / "run" / "epochs").glob("*.json"))
        ]

        def whole(lines: list) -> None:
            for i, line in enumerate(lines):
                if "order_before" in line:
                    known = [verifier.order_of(epochs[: line["epoch"]], lines[:n]).digest for n in (i, i + 1)]
                    line["order_before"], line["order_after"] = known

        self.lines("run/journal.jsonl", whole)

    def everything(self) -> None:
        """All that follows from epochs and journal: orders, branches, checkpoints, the chain, the list of chunks."""
        self.journal_orders()
        epochs = [
            json.loads(path.read_bytes()) for path in sorted((self.root / "run" / "epochs").glob("*.json"))
        ]
        journal = [
            json.loads(line) for line in (self.root / "run" / "journal.jsonl").read_bytes().splitlines()
        ]
        for i, entry in enumerate(journal):
            if entry["kind"] == "rollback":
                branch = f"run/branches/{entry['branch']:02d}"
                (self.root / branch / "branch.json").write_text(json.dumps(entry))
                self.lines(f"{branch}/journal.jsonl", lambda lines, i=i: journal[:i])

        def whole(meta: dict) -> None:
            epoch = epochs[meta["epoch"]["number"] - 1]
            meta["epoch"]["digest"] = epoch["sha256"]
            meta["config"] = epoch["config"]
            meta["config_digest"] = verifier.config_digest(epoch["config"])
            meta["manifest_digest"] = verifier.manifest_digest(epoch["manifest"])
            order = verifier.order_of(epochs[: epoch["number"]], journal[: meta["data"]["journal"]])
            meta["data"]["order"], meta["tokens_seen"] = order.digest, order.tokens(meta["step"])

        for path in sorted(self.root.glob("run/branches/*/checkpoints/*")):
            meta = self.meta(path.relative_to(self.root).as_posix(), whole)
            belongs = {"order": meta["data"]["order"], "config": meta["config_digest"]}
            self.rechain(
                path.parents[1].relative_to(self.root).as_posix(),
                lambda rs, b=belongs: [r.update(b) for r in rs],
            )
        for path in (self.root / "run" / "checkpoints").iterdir():
            self.checkpoint(int(path.name), whole)
        order = verifier.order_of(epochs, journal)
        digests = {"order": order.digest, "data": verifier.manifest_digest(order.manifest)}
        self.json("data/chunks.json", lambda listed: listed.update(digests))

    def leave_out(self, step: int) -> None:
        """A checkpoint, with its export, as `--checkpoints` does it."""
        shutil.rmtree(self.root / "run" / "checkpoints" / str(step))
        for path in [*self.root.glob(f"exports/step{step}-*")]:
            self.drop_export(path.name)

        def whole(listed: dict) -> None:
            [one] = [one for one in listed["checkpoints"] if one["step"] == step]
            one |= {"path": None, "optimizer_state": False}

        self.json("release.json", whole)
        path = self.root / "checkpoints.csv"
        lines = [line.split(",") for line in path.read_text().splitlines()]
        lines = [[*line[:5], "", "false"] if line[1] == str(step) else line for line in lines]
        path.write_text("".join(",".join(line) + "\n" for line in lines))

    def same_sum(self, folder: str, name: str) -> None:
        """Changes an array in two places, and not its digest."""
        import tensorstore

        base = {"driver": "file", "path": f"{self.root / folder}/params/"}
        place = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        array = tensorstore.open({"driver": "zarr", "kvstore": place}, open=True).result()
        values = array.read().result().copy()
        bits = values.reshape(-1).view(np.uint32)
        first, *others = ((i * 0x9E3779B1 & 0xFFFFFFFF) | 1 for i in range(1000))
        for i, weight in enumerate(others, 1):  # bits[0] + 2**20, and elsewhere what takes that back
            taken = (int(bits[i]) - (first << 20) * pow(weight, -1, 1 << 32)) & 0xFFFFFFFF
            if 0.01 < abs(np.uint32(taken).view(np.float32)) < 1:
                bits[0], bits[i] = int(bits[0]) + (1 << 20) & 0xFFFFFFFF, taken
                break
        else:
            raise AssertionError("no such pair")
        array.write(values).result()

    # ---- exports -------------------------------------------------------------------------------------------------

    def certificate(self, export: str, change: Callable[[dict], Any]) -> None:
        def whole(parity: dict) -> None:
            del parity["certificate_sha256"]
            change(parity)
            parity["certificate_sha256"] = sha256_json(parity)

        self.json(f"exports/{export}/parity.json", whole)

    def replace_export(self, export: str, by: str) -> None:
        shutil.rmtree(self.root / "exports" / export)
        shutil.copytree(self.root / "exports" / by, self.root / "exports" / export)

    def drop_export(self, export: str) -> None:
        shutil.rmtree(self.root / "exports" / export)
        kept = [
            e
            for e in json.loads((self.root / "release.json").read_bytes())["exports"]
            if e["revision"] != export
        ]
        self.json("release.json", lambda r: r.update(exports=kept))

    def flip_weight(self, export: str) -> None:
        path = self.root / "exports" / export / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)

    def tensors_again(self, parity: dict) -> None:
        """Digests of the tensors of an export, in its certificate."""
        [folder] = [
            p for p in (self.root / "exports").iterdir() if f"step{parity['checkpoint']['step']}-" in p.name
        ]
        data = (folder / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, place in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in place["data_offsets"])
                parity["tensors"][name]["sha256"] = hashlib.sha256(data[begin:end]).hexdigest()

    def table_bytes(self) -> None:
        """Sizes in checkpoints.csv."""
        path = self.root / "checkpoints.csv"
        first, *lines = [line.split(",") for line in path.read_text().splitlines()]
        for line in lines:
            folder = self.root / "run" / "checkpoints" / line[1]
            line[5] = str(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()))
        path.write_text("".join(",".join(line) + "\n" for line in [first, *lines]))
