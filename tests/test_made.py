"""What lies in a preparation's folder is noted by what it was made of, and removed whole or again, never trusted."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("datatrove")

from k2jax.errors import ConfigError  # noqa: E402
from k2jax.prepare import made, plan, reads, recipe  # noqa: E402
from k2jax.prepare.made import Made, Unit, lines  # noqa: E402


def units(nfc: bool = False, seed: int = 1, web: bool = True) -> dict[str, Unit]:
    """Two stages, of which one has parts."""
    found = {"clean/books": Unit({"seed": seed}, ranks=(0, 2), outputs=("stages/clean/{rank}.txt",))}
    if web:
        found["clean/web"] = Unit({"nfc": nfc}, ranks=(2, 3), outputs=("stages/clean/{rank}.txt", "stages/web-*"))
    return found | {"kept": Unit({}, tuple(found), outputs=("stages/kept",))}


def make(out: Path, wanted: dict[str, Unit]) -> None:
    """As a preparation does: notes, outputs, marks."""
    begun = Made(out)
    for stage in ("clean", "kept"):
        own = plan.of_stage(wanted, stage)
        begun.begin(own, stage, 3)
        for name, unit in own.items():
            for rank in range(*(unit.ranks or [3])):
                for path in (f"stages/done/{stage}/completions/{rank:05d}", f"stages/{stage}/{rank:05d}.txt"):
                    (out / path).parent.mkdir(parents=True, exist_ok=True)
                    (out / path).write_text(name)
        if stage == "clean":
            (out / "stages/web-7").mkdir(exist_ok=True)


def files(out: Path) -> set[str]:
    return {str(path.relative_to(out / "stages")) for path in out.rglob("*") if path.name != "made.json"}


def test_only_what_changed_and_what_follows_it_is_stale_and_it_is_said_why(tmp_path):
    (tmp_path / "stages").mkdir()
    make(tmp_path, units())
    assert Made(tmp_path).stale(units()) == {}
    stale = Made(tmp_path).stale(units(nfc=True))
    assert stale == {"clean/web": ["nfc was false, is true"], "kept": ["follows clean"]}
    assert lines(stale, units(nfc=True)) == [
        "stage clean: again for web (nfc was false, is true)", "stage kept: again (follows clean)"
    ]  # fmt: skip
    stale = Made(tmp_path).stale(units(web=False))
    assert stale == {"clean/web": ["no longer asked for"], "kept": ["follows clean"]}
    assert lines(stale, units(web=False))[0] == "stage clean: removed of web"
    before = files(tmp_path)
    begun = Made(tmp_path)
    begun.remove(list(begun.stale(units(nfc=True))))
    gone = before - files(tmp_path)
    assert {"clean/00002.txt", "done/clean/completions/00002", "web-7", "kept", "done/kept"} <= gone
    assert not any("00000" in path or "00001" in path for path in gone if "clean" in path)


def test_what_followed_an_earlier_attempt_is_stale_even_where_the_recipe_is_its_own_again(tmp_path):
    """What is made twice may differ: by another code, by a file that could not be read."""
    (tmp_path / "stages").mkdir()
    make(tmp_path, units())
    begun = Made(tmp_path)
    begun.remove(["clean/web"])
    begun.begin(plan.of_stage(units(), "clean"), "clean", 3)
    assert Made(tmp_path).stale(units()) == {"kept": ["follows clean"]}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(12))
def test_a_removal_that_is_killed_anywhere_is_gone_on_with(tmp_path, monkeypatch, moment):
    """Nothing of it is taken for done, and in the end all of it is gone."""
    (tmp_path / "stages").mkdir()
    make(tmp_path, units())
    wanted, left = units(nfc=True), moment

    def killed(act):
        def one(*arguments, **options):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return act(*arguments, **options)

        return one

    with monkeypatch.context() as patch:
        patch.setattr(made, "_remove", killed(made._remove))
        patch.setattr(made, "write_json", killed(made.write_json))
        begun = Made(tmp_path)
        try:
            begun.remove(list(begun.stale(wanted)))
        except Killed:
            pass
        else:
            assert moment > 8, "the last moments come behind the end"
    again = Made(tmp_path)
    for recipe_of in (wanted, units()):  # the user may have thought better of it
        stale = again.stale(recipe_of)
        for name in ("clean/web", "kept"):
            stages = [path for path in files(tmp_path) if "00002" in path and "clean" in path] + ["kept"]
            whole = set(stages) <= files(tmp_path) and len(stages) == 3
            assert name in stale or name not in again.rows or (whole and recipe_of == units())
    again.remove(list(again.stale(wanted)))
    assert not {path for path in files(tmp_path) if "kept" in path or "00002" in path or "web" in path}
    make(tmp_path, wanted)
    assert Made(tmp_path).stale(wanted) == {}


@pytest.mark.parametrize("path", ["../thesis", "/thesis", "", "stages/../../thesis", "."])
def test_notes_from_elsewhere_remove_nothing_outside_of_the_folder(tmp_path, path):
    out, thesis = tmp_path / "out", tmp_path / "thesis"
    (out / "stages").mkdir(parents=True)
    thesis.write_text("mine")
    row = {"reads": {}, "follows": {}, "stamp": "", "ranks": None, "stages": {}, "outputs": [path], "stale": False}
    for found in (row, row | {"outputs": [], "stages": {f"../../../{path}": 1}}):
        (out / "stages/made.json").write_text(json.dumps({"kept": found}))
        with pytest.raises(ConfigError, match="which is not in .*: remove the folder"):
            Made(out).remove(["kept"])
        assert thesis.read_text() == "mine" and out.exists()


def test_a_link_goes_and_what_it_points_to_stays(tmp_path):
    out = tmp_path / "out"
    (out / "stages").mkdir(parents=True)
    make(out, units())
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/file").touch()
    shutil.rmtree(out / "stages/kept")
    (out / "stages/kept").symlink_to(tmp_path / "disk")
    Made(out).remove(["kept"])
    assert not (out / "stages/kept").is_symlink() and (tmp_path / "disk/file").exists()


def every_key() -> set[str]:
    """Of a recipe, a subset's with SUBSET for its name."""
    c = recipe.base()
    c.subsets.SUBSET = recipe.conversations("jsonl:x", pairs=True)
    return set(reads.flat(c.to_dict()))


# What comes out does not depend on these, or data.json and the card alone do.
OF_NO_STAGE = {"slurm.partition", "slurm.time", "slurm.gib_per_cpu", "slurm.environment"}
OF_NO_STAGE |= {f"subsets.SUBSET.{key}" for key in ("repeats", "max_unreadable")}
# These are looked at before the first stage; what is compared is the tokenizer and the template that they give.
OF_FILES = {"tokenizer", "add_k2_tokens", "eos", "chat.template", "chat.name", "chat.date"}


def test_every_key_is_some_stages_or_known_to_be_none():
    c = recipe.base()
    c.tokenizer, c.contamination.sources = "", ("jsonl:y",)
    c.subsets.SUBSET = recipe.conversations("jsonl:x", pairs=True, max_bytes=5, tasks=1).unlock()
    c.subsets.SUBSET.drop_shared = "lines"
    read = {key for unit in plan.units(c, plan.named(c, {"SUBSET": {"files": 1, "bytes": 1, "digest": ""}})).values()
            for key in unit.reads}  # fmt: skip
    assert every_key() - read == OF_NO_STAGE | OF_FILES - {"eos"} | {"eos"}


def test_a_stage_that_reads_a_key_of_another_ends():
    c = recipe.base()
    c.subsets.web = recipe.subset("jsonl:x", nfc=True, tasks=1)
    tokenizing = reads.view(c, reads.TOKENIZING)
    assert tokenizing.subsets.web.fim_rate == 0.0 and not tokenizing.subsets.web.conversations
    for section, key in ((tokenizing.subsets.web, "nfc"), (tokenizing.subsets.web, "repeats"), (tokenizing, "dedup")):
        with pytest.raises(AttributeError, match=key):
            _ = getattr(section, key)
        with pytest.raises(KeyError, match=key):
            _ = section[key]


@given(st.recursive(st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner), max_leaves=9))
def test_values_are_flat_and_none_is_lost(value):
    section = {"a": value}
    found = reads.flat(section)
    assert not any(isinstance(one, dict) and one for one in found.values())
    assert (found == {"a": value}) == (not isinstance(value, dict) or not value)
