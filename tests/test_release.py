"""A release of a run: every part of it, checked with the libraries that others read it with."""

import hashlib
import json
import re
import resource
import shutil
from pathlib import Path

import pytest
from conftest import Later
from release_runs import MADE, copy_of, killed_release, rolled_back

from k2jax.data.manifest import canonical_json
from k2jax.errors import StorageError
from k2jax.hf.verify import verify
from k2jax.release import cards, datacard, retrospective
from k2jax.release.build import Options, plan, release
from k2jax.release.record import read_record
from k2jax.run import storage
from k2jax.run.ledger import Ledger
from k2jax.run.saved import open_step, restore_params, saved_steps

huggingface_hub = Later("huggingface_hub")
mlcroissant = Later("mlcroissant")

SMALL = Options("last", False, "none", "digests")  # what most tests need


@pytest.fixture(scope="module")
def key(tmp_path_factory) -> Path:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    made, folder = ec.generate_private_key(ec.SECP256R1()), tmp_path_factory.mktemp("key")
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(made.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public = made.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "key.pub").write_bytes(public)
    return folder / "key.pem"


@pytest.fixture(scope="module")
def whole(tiny_run, tmp_path_factory, key) -> Path:
    """All that a release can hold, signed."""
    out = tmp_path_factory.mktemp("whole") / "release"
    release(tiny_run, out, Options("all", True, "last", "tokens"), sign_key=key)
    return out


def listed(out: Path) -> dict[str, dict]:
    return json.loads((out / "files.json").read_bytes())["files"]


def files_below(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ---- what is in it ---------------------------------------------------------------------------------------------------


def test_every_file_is_listed_with_its_digest_and_no_other(whole):
    found = files_below(whole)
    del found["files.json"], found["model.sig"]
    entries = listed(whole)
    assert {name: entry["sha256"] for name, entry in entries.items()} == found
    assert all((whole / name).stat().st_size == entry["bytes"] for name, entry in entries.items())
    text = (whole / "files.json").read_bytes()
    assert text == canonical_json(json.loads(text)) + b"\n"
    assert not [p for p in whole.rglob("*") if p.is_symlink() or p.name.startswith(".export") or ".new-" in p.name]
    expected = "README.md DATA.md LICENSES.md RETROSPECTIVE.md checkpoints.csv release.json croissant.json bom.cdx.json"
    expected += " report.html SPECIFICATION.md openness.json"
    expected += " source/k2jax.tar.gz source/requirements.lock data/chunks.json run/tokenizer.json"
    assert set(expected.split()) <= set(entries)
    assert not whole.with_name("release.partial").exists()


def test_the_run_in_it_is_the_run(whole, tiny_run):
    run, found = files_below(tiny_run), files_below(whole / "run")
    assert found and all(run[name] == sha256 for name, sha256 in found.items())
    kinds = {name.split("/")[0] for name in run}
    left_out = kinds - {name.split("/")[0] for name in found}
    assert left_out <= {"lock", "tensorboard", "plan.json"}, "anything else would be missing"
    Ledger(whole / "run" / "ledger", None).verify()
    assert saved_steps(whole / "run") == saved_steps(tiny_run)


def test_checkpoints_as_the_release_lists_them(whole, tiny_run):
    told = json.loads((whole / "release.json").read_bytes())
    lines = (whole / "checkpoints.csv").read_text().splitlines()
    assert lines[0] == "stage,step,tokens,loss,digest,bytes,optimizer_state"
    rows = [line.split(",") for line in lines[1:]]
    assert [int(row[1]) for row in rows] == [c["step"] for c in told["checkpoints"]] == saved_steps(tiny_run)
    entries = listed(whole)
    for row, checkpoint in zip(rows, told["checkpoints"], strict=True):
        saved = open_step(whole / "run", checkpoint["step"])
        assert checkpoint["digest"] == saved.digest == row[4] and checkpoint["optimizer_state"] and row[6] == "true"
        assert checkpoint["tokens"] == saved.meta["tokens_seen"] == int(row[2])
        size = sum(entry["bytes"] for name, entry in entries.items() if name.startswith(f"{checkpoint['path']}/"))
        assert size == int(row[5])
    metrics = [json.loads(line) for path in (tiny_run / "metrics").glob("*") for line in path.read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in metrics}
    assert [float(row[3]) for row in rows] == [losses[int(row[1])] for row in rows]
    assert told["step"] == told["num_steps"] == 25 and told["chunks"] == 3 and told["tokens"] == int(rows[-1][2])


def test_an_export_is_verified_by_its_certificate(whole):
    [export] = json.loads((whole / "release.json").read_bytes())["exports"]
    assert export["revision"] == f"step25-tokens{20 * 8 * 32 + 5 * 8 * 64}"
    verify(open_step(whole / "run", 25), whole / export["path"], lambda size: None)


def test_without_optimizer_state_a_checkpoint_looks_thinned(tiny_run, tmp_path):
    release(tiny_run, tmp_path / "r", SMALL)
    run = tmp_path / "r" / "run"
    assert saved_steps(run) == [25] and storage.is_thinned(run / "checkpoints" / "25")
    assert not (run / "checkpoints" / "25" / "moments").exists()
    from k2jax.parallel import sharding

    saved = open_step(run)
    restore_params(saved, sharding.make_mesh(saved.config.mesh))
    told = json.loads((tmp_path / "r" / "release.json").read_bytes())
    assert [c["path"] for c in told["checkpoints"]] == [None, None, "run/checkpoints/25"]
    assert not any(c["optimizer_state"] for c in told["checkpoints"])
    steps = [json.loads(line) for line in (tmp_path / "r" / "data" / "digests.jsonl").read_text().splitlines()]
    rows = Ledger(tiny_run / "ledger", None).steps.rows()
    assert steps == [{"batch": row["batch"], "step": row["step"]} for row in rows]
    stores = json.loads((tmp_path / "r" / "data" / "stores.json").read_bytes())["parts"]
    assert set(stores[0]["stores"]) == {"books", "code", "web"}


def test_which_checkpoints(tiny_run):
    def steps(text: str) -> list[int]:
        return plan(tiny_run, Options(text, False, "none", "digests")).steps

    assert [steps(text) for text in ("none", "last", "all", "every:1", "every:2", "every:9")] == [
        [], [25], [10, 20, 25], [10, 20, 25], [20, 25], [25],
    ]  # fmt: skip


def test_no_folder_of_the_release_is_named_in_it(whole):
    for name in listed(whole):
        assert str(whole.parent).encode() not in (whole / name).read_bytes(), name


# ---- as others read it -----------------------------------------------------------------------------------------------


def test_cards_by_hugging_face(whole):
    card = huggingface_hub.ModelCard((whole / "README.md").read_text())
    assert card.data.license == "other" and card.data.pipeline_tag == "text-generation"
    assert {result.metric_type for result in card.data.eval_results} >= {"loss"}
    data = huggingface_hub.DatasetCard((whole / "DATA.md").read_text()).data
    assert data.task_categories == ["text-generation"] and data.size_categories == ["n<1K"]


def test_croissant_reads_the_rows(whole, monkeypatch):
    dataset = mlcroissant.Dataset(jsonld=str(whole / "croissant.json"))
    assert not dataset.metadata.ctx.issues.errors
    row = next(iter(dataset.records("rows")))
    assert row["rows/step"] == 1 and row["rows/row"] == 0 and len(row["rows/token_ids"]) == 33
    objects = [item for item in json.loads((whole / "croissant.json").read_bytes())["distribution"] if "sha256" in item]
    assert {item["@id"]: item["sha256"] for item in objects} == {
        name: entry["sha256"] for name, entry in listed(whole).items() if name.endswith(".parquet")
    }


def test_croissant_of_digests(tiny_run, tmp_path):
    release(tiny_run, tmp_path / "r", SMALL._replace(checkpoints="none"))
    dataset = mlcroissant.Dataset(jsonld=str(tmp_path / "r" / "croissant.json"))
    assert [int(row["steps/step"]) for row in dataset.records("steps")] == list(range(1, 26))


def test_the_bill_of_materials_is_valid(whole):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (whole / "bom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found = json.loads(text)
    assert {item["name"] for item in found["components"] if item["type"] == "data"} == {"books", "code", "web"}
    assert any(item.get("purl", "").startswith("pkg:pypi/jax@") for item in found["components"])


def test_the_signature_is_verified_by_its_library(whole, key, tmp_path):
    """Red with a byte changed, a file added, and another key."""
    from model_signing import hashing, verifying

    def check(folder: Path) -> None:
        hashed = hashing.Config().set_ignored_paths(paths=["model.sig"], ignore_git_paths=False)
        config = verifying.Config().set_hashing_config(hashed)
        config.use_elliptic_key_verifier(public_key=key.with_name("key.pub")).verify(folder, folder / "model.sig")

    check(whole)
    changed = shutil.copytree(whole, tmp_path / "changed")
    (changed / "checkpoints.csv").write_bytes((whole / "checkpoints.csv").read_bytes().replace(b"25", b"26"))
    with pytest.raises(ValueError, match=r"checkpoints\.csv"):
        check(changed)
    shutil.copyfile(whole / "checkpoints.csv", changed / "checkpoints.csv")
    (changed / "run" / "more").write_text("x")
    with pytest.raises(ValueError, match="more"):
        check(changed)


def test_openness_counts_what_is_there(whole, tiny_run, tmp_path):
    found = json.loads((whole / "openness.json").read_bytes())
    parts = {part["component"]: part for part in found["mof"]["components"]}
    assert parts["training code"]["met"] and parts["intermediate model parameters"]["where"]
    assert found["mof"]["class"] is None and found["mof"]["next"] == "III" and found["mof"]["missing_for_next"]
    assert not found["osaid"]["met"], "nobody has stated a licence of the weights"
    release(tiny_run, tmp_path / "r", SMALL)
    less = {p["component"]: p for p in json.loads((tmp_path / "r" / "openness.json").read_bytes())["mof"]["components"]}
    assert not less["intermediate model parameters"]["where"] and not less["datasets"]["where"]


def test_source_is_an_archive_that_tar_reads(whole):
    import io
    import tarfile

    data = (whole / "source" / "k2jax.tar.gz").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert "k2jax/k2jax/train.py" in archive.getnames()
    from k2jax.release import source

    with tarfile.open(fileobj=io.BytesIO(source._tar())) as archive:  # where git has not the commit
        name = "k2jax/k2jax/release/source.py"
        assert archive.extractfile(name).read() == Path(source.__file__).read_bytes()
        assert all(member.isreg() and member.mode == 0o644 for member in archive)


NAME = "x\n---\nlicense: mit\n---\n# <script>alert(1)</script> [a](http://b) | ` \x1b[31m \u202e"


def test_hostile_names_stay_text(tiny_run, whole):
    """Seen red with names put in as they are."""
    record = read_record(tiny_run)
    named = record.epochs[-1]._replace(config={**record.config, "name": NAME})
    launch = {**record.launches[-1], "devices": {"kind": NAME, "count": 1}, "commit": NAME, "versions": {"jax": NAME}}
    entry = {"kind": NAME, "by": NAME, "why": NAME, "at_step": 3, "time": NAME}
    record = record._replace(epochs=[named], launches=[launch], journal=[entry])
    told = json.loads((whole / "release.json").read_bytes())

    class Files:
        def names(self, prefix: str = "") -> list[str]:
            return [prefix]

    results = [{"task": NAME, "metrics": {NAME: 1.5}}]
    card = cards.model_card(record, told, Files(), results, NAME, "open model")
    data = huggingface_hub.ModelCard(card).data
    assert data.license == "other" and data.eval_results[0].metric_value == 1.5
    texts = [card, datacard.data_card(record, told, 7), retrospective.retrospective(record)]
    for text in texts:
        prose = re.sub(r"`[^`\n]*`", "", text.split("\n---\n", 1)[-1])
        assert not re.search(r"(?<!\\)(<script|\]\(http)", prose) and "\x1b" not in text and "\u202e" not in text
        assert not any(line.startswith("license: mit") for line in text.splitlines())
    assert huggingface_hub.DatasetCard(texts[1]).data.license == "other"


def test_steps_without_an_update_are_one_line(tiny_run):
    """A long run has thousands, and the people who look back have to find its decisions."""
    entry = {"by": "k2jax.train", "why": "not finite", "time": "2026-11-28T12:00:00+00:00"}
    skipped = [entry | {"kind": "no_update", "at_step": step} for step in (3, 9)]
    journal = [*skipped, entry | {"kind": "abandon", "at_step": 10}]
    text = retrospective.retrospective(read_record(tiny_run)._replace(journal=journal))
    assert "2 single steps made no update" in text and "at step 9" not in text and "at step 10" in text


# ---- whole or not at all ---------------------------------------------------------------------------------------------


def test_killed_at_many_points_it_ends_with_the_same_bytes(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", MADE)
    options, out = Options("last", False, "last", "tokens"), tmp_path / "killed"
    release(tiny_run, tmp_path / "straight", options)
    arguments = ["--workdir", tiny_run, "--out", out, "--checkpoints=last", "--exports=last"]
    kept = {}
    for point in ("run/ledger", "half", "data/chunk_00001", "exports/", "listed"):
        assert killed_release(point, *arguments) == -9
        assert not out.exists(), point
        done = (tmp_path / "killed.partial" / "done.jsonl").read_bytes()
        assert len(done) >= len(kept.get("done", b"")), "what was finished is kept"
        kept = {"done": done}
    (tmp_path / "killed.partial" / "release" / "data" / "chunk_00002.parquet").write_bytes(b"of a bad disk")
    assert killed_release("renamed", *arguments) == -9
    assert (out / "files.json").read_bytes() == (tmp_path / "straight" / "files.json").read_bytes()
    assert files_below(out) == files_below(tmp_path / "straight")
    with pytest.raises(Exception, match="is there and not empty"):
        release(tiny_run, out, options)
    assert not (tmp_path / "killed.partial").exists()


def test_what_was_finished_is_checked_and_what_is_strange_goes(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", MADE)
    release(tiny_run, tmp_path / "straight", SMALL)
    with monkeypatch.context() as patch:
        patch.setattr("k2jax.release.build._tell", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            release(tiny_run, tmp_path / "r", SMALL)
    scratch = tmp_path / "r.partial"
    (scratch / "release" / "run" / "tokenizer.json").write_text("{}")
    (scratch / "release" / "run" / "validation.json").unlink()
    (scratch / "release" / "run" / "stranger").write_text("x")
    (scratch / "release" / "link").symlink_to("/etc/passwd")
    with (scratch / "done.jsonl").open("a") as file:
        file.write('{"name": "run/half')
    release(tiny_run, tmp_path / "r", SMALL)
    assert files_below(tmp_path / "r") == files_below(tmp_path / "straight")


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tiny_run, tmp_path, monkeypatch):
    """RLIMIT_FSIZE stands for it: no file grows over the limit."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", MADE)
    options = Options("last", False, "last", "tokens")
    release(tiny_run, tmp_path / "straight", options)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (3_000, 20_000, 60_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(StorageError) as error:
                release(tiny_run, tmp_path / "r", options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "\n" not in str(error.value) and "File too large" in str(error.value)
        assert not (tmp_path / "r").exists()
    release(tiny_run, tmp_path / "r", options)
    assert files_below(tmp_path / "r") == files_below(tmp_path / "straight")


def test_a_disk_without_room_is_told_before(tiny_run, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("k2jax.release.checks.shutil.disk_usage", lambda _: free)
    with pytest.raises(StorageError, match=r"needs .* MB.*0\.0 free"):
        release(tiny_run, tmp_path / "r", SMALL)
    assert list(tmp_path.iterdir()) == []


# ---- runs with a past ------------------------------------------------------------------------------------------------


def test_branches_go_along_with_their_checkpoints(tiny_run, tmp_path):
    workdir = rolled_back(tiny_run, tmp_path / "run")
    release(workdir, tmp_path / "r", Options("all", False, "none", "tokens"))
    branch = tmp_path / "r" / "run" / "branches" / "01"
    assert saved_steps(tmp_path / "r" / "run") == [10] and saved_steps(branch) == [20, 25]
    assert storage.is_thinned(branch / "checkpoints" / "25") and open_step(branch, 25).digest
    found, was = files_below(branch), files_below(workdir / "branches" / "01")
    assert {n for n in was if "/moments/" not in n} == {n for n in found if not n.endswith("thinned.json")}
    told = json.loads((tmp_path / "r" / "release.json").read_bytes())
    assert told["branches"] == [1] and told["step"] == 10 and told["num_steps"] == 25
    text = (tmp_path / "r" / "RETROSPECTIVE.md").read_text()
    assert "rollback at step 10, by k2jax.train: loss above its limit \\<b\\>" in text and "branches/01/" in text
    assert "rolled back to step 10: defer" in (tmp_path / "r" / "DATA.md").read_text()


def test_rows_after_the_last_checkpoint_stay_behind(tiny_run, tmp_path):
    """Of its chunk, and of those after it; in the last a kill came in the middle of a row."""
    workdir = copy_of(tiny_run, tmp_path / "run")
    records = (workdir / "ledger" / "records.jsonl").read_bytes().splitlines(keepends=True)
    (workdir / "ledger" / "records.jsonl").write_bytes(records[0])
    last = json.loads(records[1])
    # A step between chunks' ends, whose checkpoint is not there any more.
    Ledger(workdir / "ledger", None).append_record(13, {key: last[key] for key in ("checkpoint", "order", "config")})
    for step in ("20", "25"):
        shutil.rmtree(workdir / "checkpoints" / step)
    third = workdir / "ledger" / "chunk-00003.jsonl"
    third.write_bytes(third.read_bytes()[:-9])
    release(workdir, tmp_path / "r", SMALL._replace(checkpoints="none"))
    run = tmp_path / "r" / "run"
    Ledger(run / "ledger", None).verify()
    for name in ("ledger", "metrics"):
        paths = sorted((run / name).glob("chunk-*"))
        assert [path.name for path in paths] == ["chunk-00001.jsonl", "chunk-00002.jsonl"]
        steps = [json.loads(line)["step"] for path in paths for line in path.read_text().splitlines()]
        assert steps == list(range(1, 14))
    told = json.loads((tmp_path / "r" / "release.json").read_bytes())
    assert told["step"] == 13 and told["chunks"] == 2 and [c["step"] for c in told["checkpoints"]] == [10, 13]
