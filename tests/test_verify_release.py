"""A release is checked by a program that shares nothing with us; forgeries, and what shows each."""

import ast
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forger import Forger, make_run
from forgeries import FORGERIES, UNSEEN
from verifier import PROGRAM, verifier

from k2jax.data.manifest import sha256_json
from k2jax.release.build import Options, release


@pytest.fixture(scope="session")
def whole(made_once, tiny_run, tiny_config):
    """A release with everything: all checkpoints with moments, all exports, all rows."""

    def make(folder: Path) -> None:
        folder.mkdir()
        make_run(tiny_run, folder / "run", tiny_config)
        release(folder / "run", folder / "out", Options("all", True, "all", "tokens"))

    return made_once("verify", make) / "out"


@pytest.fixture
def forger(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    return Forger(tmp_path / "out")


def checked(root, **options):
    """{name: result}."""
    told = []
    found = verifier.verify(verifier.Release(root, options.pop("steps", None)), say=told.append, **options)
    assert len(told) >= len(found) and not any("\n" in line for line in told)
    return {result.name: result for result in found}


def failed(root, **options):
    return {name for name, result in checked(root, **options).items() if result.state == verifier.FAILED}


def test_a_release_holds(whole):
    found = checked(whole)
    assert {name: r.found for name, r in found.items() if r.state == verifier.FAILED} == {}
    assert {n for n, r in found.items() if r.state == verifier.UNCHECKED} == {"signature", "digest", "replay"}
    counts = {
        "journal": 4,
        "epochs": 2,
        "ledger": 3,
        "branches": 1,
        "checkpoints": 4,
        "exports": 3,
        "gallery": 3,
    }
    counts |= {"evaluations": 4, "order": 24, "batches": 24, "metrics": 24, "arrays": 4 * 39}
    assert {name: found[name].count for name in counts} == counts


def test_a_release_without_some_checkpoints_holds(forger):
    forger.leave_out(20)
    forger.files()
    assert failed(forger.root) == set()


def test_what_a_hub_adds_to_a_copy_is_no_part_of_it(forger):
    """And nothing else is: the same file one folder down."""
    (forger.root / ".gitattributes").write_text("*.safetensors filter=lfs")
    (forger.root / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (forger.root / ".cache" / "huggingface" / "download" / "x.metadata").write_text("1")
    assert failed(forger.root) == set()
    (forger.root / "run" / ".gitattributes").write_text("x")
    assert "files" in failed(forger.root)


def test_it_needs_python_numpy_and_pyarrow_alone():
    tree = ast.parse(PROGRAM.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    others = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert others == {"numpy", "pyarrow"}


# ---- forgeries: each changes a release, makes whatever digests its forger can make anew, and names what shows it -----


@pytest.mark.parametrize("name", sorted(FORGERIES))
def test_a_forgery_is_seen(forger, name):
    forge, checks, sealed = FORGERIES[name]
    forge(forger)
    if sealed:
        forger.files()
    assert failed(forger.root) == checks


@pytest.mark.parametrize("name", sorted(UNSEEN))
def test_what_only_a_published_digest_or_a_replay_shows(forger, whole, name):
    """All else holds: as the README says, and the verifier itself under "not proven"."""
    forge, by = UNSEEN[name]
    forge(forger)
    forger.files()
    published = verifier.Release(whole).digest
    assert failed(forger.root) == set() and failed(forger.root, published=published) == {"digest"}
    assert failed(whole, published=published) == set()
    assert by in ("digest", "replay")


# ---- steps that are run again ----------------------------------------------------------------------------------------


def again(root, first, count, say=lambda line: None):
    """Steps of a release, run again here, where the run was made: no store is opened, all bits are the same."""
    from k2jax.replay import replay

    return replay(root / "run", first, count, say=say)


def test_a_release_is_run_again_without_its_stores(whole, monkeypatch):
    """Over a change of data, and a decision that makes a stage shorter: its learning rate, too, is as it was."""
    from k2jax.data.store import Store

    monkeypatch.setattr(Store, "open", None)
    found = again(whole, 9, 16)
    assert [one.step for one in found] == [*range(9, 25)]
    assert all(one.batch and one.bits for one in found), found
    assert {one.step: one.arrays for one in found if one.arrays is not None} == {10: True, 20: True, 24: True}


def test_what_a_replay_shows(forger):
    """A loss, a token, and the weights of a checkpoint, each changed with all digests that hang on it."""
    UNSEEN["losses_edited_everywhere"][0](forger)
    assert [one.bits for one in again(forger.root, 14, 2)] == [True, False]


def test_a_replay_shows_other_tokens(forger):
    UNSEEN["tokens_of_a_row_changed_with_the_ledger"][0](forger)
    [one] = again(forger.root, 15, 1)
    assert one.batch and not one.bits and one.apart > 1e-6


def test_a_replay_shows_other_weights(forger):
    UNSEEN["weights_of_the_last_checkpoint_changed_everywhere"][0](forger)
    assert [one.arrays for one in again(forger.root, 21, 4)] == [None, None, None, False]


# ---- hostile files: a line of a failed check, never a traceback, never memory without end ---------------------------

NASTY = [None, True, -1, 10**30, 1e300, "", "x" * 1000, "\x1b[31m\u202e", [], [[]], {}, {"": None}]
JSON_FILES = (
    "release.json",
    "files.json",
    "data/chunks.json",
    "run/epochs/0001.json",
    "run/environment.json",
)
JSON_FILES += ("run/checkpoints/20/meta/meta.json", "run/branches/01/branch.json", "run/gallery/10.json")
JSON_FILES += ("exports/step20-tokens5120/parity.json", "run/checkpoints/20/data/metadata")
LINE_FILES = ("run/journal.jsonl", "run/ledger/records.jsonl", "run/ledger/chunk-00001.jsonl")
LINE_FILES += ("run/metrics/chunk-00002.jsonl", "run/branches/01/ledger/chunk-00002.jsonl")


def spoil(values, draw):
    """Puts something else in one place of a value of JSON."""
    places = []

    def walk(value):
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, inner in items:
            places.append((value, key))
            walk(inner)

    walk(values)
    inside, key = draw.choice(places)
    inside[key] = draw.choice([nasty for nasty in NASTY if nasty != inside[key]])


@pytest.mark.parametrize("path", [*JSON_FILES, *LINE_FILES])
def test_other_types_and_sizes_are_a_line(forger, path):
    """With the digests that hide them from the first look, where a forger can make them."""
    draw, original = random.Random(path), (forger.root / path).read_bytes()
    for _ in range(3):
        (forger.root / path).write_bytes(original)
        if path in LINE_FILES:
            forger.lines(path, lambda lines: spoil(lines, draw))
        elif path.endswith("meta.json"):
            meta = json.loads(original)
            del meta["meta_sha256"]
            spoil(meta, draw)
            (forger.root / path).write_text(json.dumps({**meta, "meta_sha256": sha256_json(meta)}))
        elif "epochs" in path:
            epoch = json.loads(original)
            spoil(epoch, draw)
            kept = {key: value for key, value in epoch.items() if key not in ("format", "sha256")}
            (forger.root / path).write_text(json.dumps({**epoch, "sha256": sha256_json(kept)}))
        else:
            forger.json(path, lambda values: spoil(values, draw))
        if path != "files.json":
            forger.files()
        free = ("release.json", "data/chunks.json", "run/gallery/10.json", "run/metrics/chunk-00002.jsonl")
        assert failed(forger.root) or path in free, "of some things nobody has a second account"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"[" * 10**6, "recursion|no JSON"),
        (b'{"format": ' + b"9" * 10**6 + b"}", "no JSON"),
        (b'{"format": 1, "format": 1}', "a key comes twice"),
        (b'{"format": NaN}', "NaN is no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"", "no JSON"),
        (b"3", "expected an object"),
    ],
)
@pytest.mark.parametrize("path", ["release.json", "run/epochs/0002.json", "files.json"])
def test_hostile_json_is_a_line(forger, path, text, complaint):
    (forger.root / path).write_bytes(text)
    if path != "files.json":
        forger.files()
    found = checked(forger.root)
    wrong = {"release.json": "release", "run/epochs/0002.json": "epochs", "files.json": "files"}[path]
    assert found[wrong].state == verifier.FAILED
    assert path == "release.json" or re.search(complaint, found[wrong].found), found[wrong]


FLIPPED = {
    "run/checkpoints/20/params/**/*": ("arrays", "weights"),
    "data/*.parquet": ("order", "batches", "documents"),
    "exports/step20*/*.safetensors": ("exports", "weights"),
}


@pytest.mark.parametrize("pattern", FLIPPED)
def test_flipped_bytes_are_a_line(forger, pattern):
    """Of indices, pages, headers: whatever a library makes of them is an exception, of which a check makes a line."""
    draw = random.Random(pattern)
    paths = [p for p in sorted(forger.root.glob(pattern)) if p.is_file() and p.stat().st_size]
    seen = 0
    for _ in range(40):
        path = draw.choice(paths)
        original = path.read_bytes()
        data = bytearray(original)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(min(len(data), draw.choice([50, len(data)])))] ^= 1 << draw.randrange(8)
        path.write_bytes(data if draw.random() < 0.9 else data[: len(data) // 2])
        release = verifier.Release(forger.root)
        for name in FLIPPED[pattern]:
            try:
                verifier.CHECKS[name](release)
            except Exception as error:
                seen += 1
                assert "\n" not in verifier.says(error)
        path.write_bytes(original)
    assert seen > 5


def peak_of(*arguments):
    """(exit code, what it printed, MiB at most) of the program."""
    code = "import re,runpy,sys;sys.argv=sys.argv[1:]\ntry: runpy.run_path(sys.argv[0],run_name='__main__')\n"
    code += (
        "finally: print(re.search(r'VmHWM:\\s+(\\d+)',open('/proc/self/status').read())[1],file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, str(PROGRAM), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, int(done.stderr.splitlines()[-1]) >> 10


def test_a_chunk_that_unpacks_to_gigabytes_is_refused(forger):
    """Rows of ids without end, all alike, in a file of some kilobytes."""
    path = forger.root / "data/chunk_00000.parquet"
    table = pq.read_table(path)
    ids = pa.DictionaryArray.from_arrays(pa.array(np.zeros(80 * 2**20, np.int32)), pa.array([7], pa.uint16()))
    bomb = pa.ListArray.from_arrays(pa.array(np.arange(81, dtype=np.int32) * 2**20), ids.dictionary_decode())
    index = table.schema.get_field_index("token_ids")
    pq.write_table(table.set_column(index, "token_ids", bomb), path, compression="zstd")
    assert path.stat().st_size < 2**20
    forger.chunks()
    forger.files()
    code, told, peak = peak_of(forger.root)
    assert code == 65 and "token ids in a row group" in told and peak < 1000, (told, peak)


def test_an_array_that_unpacks_to_gigabytes_is_refused(forger):
    import tensorstore

    base = {"driver": "file", "path": f"{forger.root}/run/checkpoints/20/params/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    about = json.loads(store.read("params/embed_VD/.zarray").result().value)
    about["chunks"] = [1 << 13, 1 << 13]
    zeros = pa.compress(b"\0" * (1 << 30), codec="zstd", asbytes=True)
    store.write("params/embed_VD/.zarray", json.dumps(about).encode()).result()
    store.write("params/embed_VD/0.0", zeros + zeros).result()
    forger.files()
    code, told, peak = peak_of(forger.root, "--memory=2")
    assert code == 65 and re.search(r"failed +arrays", told) and peak < 1000, (told, peak)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command(whole, forger, tmp_path):
    code, told, _ = peak_of(whole, "--steps=5", f"--digest={verifier.Release(whole).digest}")
    assert code == 0 and "All that was checked holds: 19 checks hold, 0 do not, 2 could not be made." in told
    assert "rows of 19 of 24 steps: one changed step is missed with 79.2%" in told
    code, told, _ = peak_of(whole, "--json")
    values = json.loads(told)
    assert code == 0 and values["holds"] and {c["state"] for c in values["checks"]} == {"ok", "not checked"}
    forger.row(3, loss="00000000")
    (forger.root / "run" / "evals" / "\x1b[31mred").write_bytes(b"")
    forger.files()
    code, told, _ = peak_of(forger.root)
    assert code == 65 and "FAILED: " in told and "\x1b" not in told and r"\x1b[31mred" in told
    for folder in (tmp_path, tmp_path / "none"):
        assert peak_of(folder)[:2] == (78, "")


def test_steps_that_are_drawn_follow_from_the_digest(forger):
    """One changed token: seen where its step is drawn, and by another seed or digest not."""
    FORGERIES["one_token_changed"][0](forger)
    forger.files()
    seen = ["batches" in verifier.Release(forger.root, 6, seed).fact("rows").wrong for seed in range(60)]
    assert 5 < sum(seen) < 30  # of 60, a fourth
    assert verifier.drawn("a", 3, 10) == verifier.drawn("a", 3, 10) != verifier.drawn("b", 3, 10)
    assert verifier.drawn("a", 50, 10) == [*range(10)]


def test_a_drawn_step_and_a_drawn_chunk_are_run_again(forger):
    """By the verifier, in a process of its own."""
    release = verifier.Release(forger.root)
    assert sum(n for _, n in verifier.challenges(release, 2, 1)) in (2 + 4, 2 + 10)
    shutil.rmtree(forger.root / "run/checkpoints/10/moments")
    shutil.rmtree(forger.root / "run/checkpoints/20/moments")
    assert verifier.challenges(verifier.Release(forger.root), 0, 5) == [(1, 10)]


def test_a_signed_release_holds(forger, tmp_path):
    """By the library's own manifest."""
    pytest.importorskip("model_signing.signing", exc_type=ImportError)
    from k2jax.release.signing import sign, signer

    key = tmp_path / "key.pem"
    options = ["-genkey", "-name", "prime256v1", "-noout"]
    subprocess.run(["openssl", "ecparam", *options, "-out", key], check=True, capture_output=True)
    sign(signer(key), forger.root, forger.root / "model.sig")
    assert checked(forger.root)["signature"].state == verifier.OK
    (forger.root / "DATA.md").write_text("other")
    forger.files()
    assert failed(forger.root) == {"signature"}


def test_which_documents_a_released_step_read(whole):
    """As the run itself says it of its stores, but for their numbers in these."""
    from k2jax.data.provenance import open_run, which_docs
    from k2jax.errors import ConfigError

    here, there = open_run(whole / "run"), open_run(whole.parent / "run")
    assert here.released and not there.released
    for step in (3, 17, 24):
        for ours, theirs in zip(
            which_docs(here, step, text=True), which_docs(there, step, text=True), strict=True
        ):
            assert ours._replace(documents=[]) == theirs._replace(documents=[])
            assert [part._replace(index=None) for part in theirs.documents] == ours.documents
    with pytest.raises(ConfigError, match="step 25: the run's steps are 1 to 24"):
        which_docs(here, 25)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda v: v["chunks"][0].update(file="../../secret.parquet"), "no list of a release's chunks"),
        (lambda v: v.update(chunks=3), "no list of a release's chunks"),
        (lambda v: v["chunks"].pop(0), "step 3: its rows are not released"),
        (lambda v: v["chunks"][0].update(last_step=2), "step 3: its rows are not released"),
    ],
)
def test_a_damaged_list_of_released_rows_is_a_line(forger, change, complaint):
    from k2jax.data.provenance import open_run
    from k2jax.errors import ConfigError

    forger.json("data/chunks.json", change)
    with pytest.raises(ConfigError, match=complaint):
        open_run(forger.root / "run").released.read(3, np.arange(8), 8, 33)


def test_a_damaged_file_of_released_rows_is_a_line(forger):
    from k2jax.data.provenance import open_run
    from k2jax.errors import StorageError

    (forger.root / "data/chunk_00000.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(StorageError, match="chunk_00000.parquet: cannot be read"):
        open_run(forger.root / "run").released.read(3, np.arange(8), 8, 33)
