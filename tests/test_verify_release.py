"""A release is checked by a program that shares nothing with us; forgeries, and what shows each."""

import ast
import shutil
import sys
from pathlib import Path

import pytest
from forger import Forger, make_run
from forgeries import FORGERIES, UNSEEN
from verifier import PROGRAM, verifier

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
