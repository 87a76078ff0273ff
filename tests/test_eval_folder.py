"""A folder of tasks that would have the harness build without end is refused by name, at once; real tasks are not."""

import os
from pathlib import Path

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
lm_eval = pytest.importorskip("lm_eval")

import yaml  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from k2jax.errors import ConfigError  # noqa: E402
from k2jax.evals import folder, tasks  # noqa: E402

TASK = "task: mine\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\n"


def laughs(levels: int, wide: int = 10) -> str:
    """A list of lists of lists: wide ** levels values in a few lines."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * wide)}]" for i in range(1, levels)]
    return TASK + "\n".join(lines) + "\n"


def merges(levels: int) -> str:
    lines = ["a0: &a0 {k: x, j: x}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, levels)]
    return TASK + "\n".join(lines) + "\n"


BAD = {  # what is written, and what is said of it
    "a bomb": ({"b.yaml": laughs(12)}, r"b\.yaml: its aliases stand for more than 8,388,608 values"),
    "a bomb of merged keys": ({"b.yaml": merges(12)}, "its aliases stand for more"),
    "a bomb of one long text": (
        {"b.yaml": f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 1000)}]\n"}, "its aliases stand for more"
    ),
    "a bomb in UTF-16": ({"b.yaml": laughs(12).encode("utf-16")}, "its aliases stand for more"),
    "a bomb that is included": ({"b.yaml": "include: c.txt\n" + TASK, "c.txt": laughs(12)}, r"c\.txt: its aliases"),
    "a bomb with functions": ({"b.yaml": "f: !function gone.f\n" + laughs(12)}, "its aliases stand for more"),
    "itself": ({"b.yaml": "a: &a [1, {b: *a}]\n"}, r"b\.yaml: \*a stands within what it names"),
    "itself, included": ({"b.yaml": "include: b.yaml\n"}, r"b\.yaml includes itself, by way of .*b\.yaml"),
    "a cycle": ({"b.yaml": "include: [x, c]\n", "c": "include: d/../b.yaml\n"}, r"b\.yaml includes itself, by .*/c"),
    "a chain": ({f"{i}.yaml": f"include: {i + 1}.yaml\n" for i in range(50)}, "more than 20 files deep"),
    "much with aliases": ({"b.yaml": "a: &a 1\nb: *a\nc:\n" + "- x\n" * 600_000}, "has 2,400,017 bytes"),
}  # fmt: skip


def write(where: Path, files: dict[str, str | bytes]) -> None:
    for name, text in files.items():
        (where / name).write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_never_ends_is_refused_by_name(tmp_path, name):
    files, said = BAD[name]
    write(tmp_path, files)
    with pytest.raises(ConfigError, match=said) as error:
        tasks.open_manager(["mine"], tmp_path)
    assert "\n" not in str(error.value)


def test_a_pipe_in_the_folder_is_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "p.yaml")
    with pytest.raises(ConfigError, match=r"p\.yaml is no file"):
        folder.check(tmp_path)
    (tmp_path / "p.yaml").unlink()
    write(tmp_path, {"b.yaml": "include: /dev/zero\n"})
    with pytest.raises(ConfigError, match="/dev/zero is no file"):
        folder.check(tmp_path)


def test_aliases_includes_and_files_that_are_no_tasks_are_left_alone(tmp_path):
    files = {
        "mine.yaml": "include: [_base.yaml, gone.yaml]\n",
        "_base.yaml": TASK + "metadata: &m {version: 1, more: [&x a, *x, *x]}\nother: *m\n",
        "broken.yaml": "a: [&b, *c, *",
        "binary.yaml": b"\xff\xfe&*include\0\xd8",
        "pipeline.yaml": "include:\n- {project: x}\n- 7\n- https://x/y.yaml\n",
        "large.yaml": "- include x\n" * 20_000,
        "nested.yaml": "include: &a " + "[" * 100_000,
        "wide.yaml": "".join(f"a{i}: &a{i} [1, *a{max(i - 1, 0)}]\n" for i in range(1, 100)).replace("*a0", "x"),
    }
    write(tmp_path, files)
    (tmp_path / "lost.yaml").symlink_to("nowhere.yaml")
    folder.check(tmp_path)
    write(tmp_path, {"mine.yaml": "include: _base.yaml\n"})
    manager = tasks.open_manager(["mine"], tmp_path)
    assert manager.task_index["mine"].cfg["other"] == {"version": 1, "more": ["a", "a", "a"]}


def test_includes_that_fan_out_are_followed_once_each(tmp_path):
    write(tmp_path, {f"{i}.yaml": f"include: [{', '.join([f'{i + 1}.yaml'] * 10)}]\n" for i in range(19)})
    folder.check(tmp_path)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"g0": ["g1", "mine"], "g1": [{"group": "g2"}], "g2": ["g0"]}, "group g0 is inside itself, by way of g2"),
        ({f"g{i}": [f"g{i + 1}"] * 10 for i in range(15)}, "stands for more than 100,000 tasks"),
        ({f"g{i}": [f"g{i + 1}"] for i in range(2000)}, "group g0 has groups more than 20 deep"),
        ({f"g{i}": [f"g{i + 1}", "mine"] for i in range(19)}, None),
    ],
)
def test_groups_that_never_end_are_refused_by_name(tmp_path, groups, said):
    write(tmp_path, {"mine.yaml": TASK})
    files = {f"{name}.yaml": {"group": name, "task": inside} for name, inside in groups.items()}
    write(tmp_path, {name: yaml.safe_dump(written) for name, written in files.items()})
    if said is None:
        assert len(tasks.groups_of(tasks.open_manager(["g0"], tmp_path), "g0")) == 19
        return
    with pytest.raises(ConfigError, match=said):
        tasks.open_manager(["g0"], tmp_path)


def test_every_file_of_the_harness_passes():
    own = Path(lm_eval.__file__).parent / "tasks"
    folder.check(own)
    assert sum(1 for _ in own.glob("**/*.yaml")) > 10_000


VALUES = st.recursive(st.text(max_size=3) | st.integers(0, 99), lambda inner: st.lists(inner, max_size=4), max_leaves=9)


@settings(deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=4), st.data())
def test_what_is_counted_is_what_is_built(values, data):
    """As PyYAML dumps it, with aliases where a value comes again, against all of it written out."""
    shared = [data.draw(st.sampled_from(values)) for _ in range(6)]

    def size(value):
        return 1 + sum(map(size, value)) if isinstance(value, list) else 1 + len(str(value))

    text = yaml.safe_dump(shared).encode()
    whole = size(shared)
    limit = folder.MOST_EXPANDED
    try:
        folder.MOST_EXPANDED = whole
        folder._check_aliases(Path("x.yaml"), text)
        folder.MOST_EXPANDED = whole - 1
        with pytest.raises(ConfigError):
            folder._check_aliases(Path("x.yaml"), text)
    finally:
        folder.MOST_EXPANDED = limit
