"""Deduplication in many parts: clusters are the connected components of any edges, with bounded memory and few files;
what is interrupted goes on; the files are the same to the byte however many parts, tasks at once or processes.
"""

import itertools
import os
import random
import resource
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

pytest.importorskip("datatrove")
from test_dedup import SUBSETS, corpus, recipe_of, reference, rows_of, run_stages, write_clean  # noqa: E402

from k2jax.prepare import shuffle  # noqa: E402
from k2jax.prepare.dedup import components, duplicates, exact, index, members, near, streams  # noqa: E402
from k2jax.prepare.engine.engine import Engine, Stage  # noqa: E402
from k2jax.prepare.shuffle import Shuffle  # noqa: E402

TINY = [
    *((module, "FAN", 3) for module in (shuffle, index, members, duplicates)),
    *((module, "TOGETHER", 1) for module in (exact, members, duplicates)),
    *((shuffle, name, value) for name, value in {"SLOTS": 4, "RUN_BYTES": 700, "PARTITION_BYTES": 900}.items()),
    *((streams, name, value) for name, value in {"CHUNK_BYTES": 100, "BLOCK": 2}.items()),
    (index, "BATCH", 3),
    (near, "HELD", 2),
]


@pytest.fixture
def no_sync(monkeypatch):
    """Of thousands of tiny files, which takes minutes on some disks; only a power cut would show it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def tiny(monkeypatch, no_sync):
    """Many partitions of few bytes, read a few records at a time."""
    for module, name, value in TINY:
        monkeypatch.setattr(module, name, value)


# --- Components -------------------------------------------------------------------------------------------------------


def labels_of(edges: np.ndarray, folder: Path, writers: int, partitions: int) -> tuple[dict[int, int], list[str]]:
    """What the stages say of edges (n, 2) that tasks wrote: {node: the least of its component}, and their names."""
    written = Shuffle(folder / "edges", writers, partitions)
    for rank in range(writers):
        with written.writer(rank) as out:
            components.add_edges(out, written, *edges[rank::writers].T)
    tasks = int(edges.max() >> np.uint64(32)) + 1 if len(edges) else 1
    found = Shuffle(folder / "labels", partitions, tasks)

    def stages() -> Iterator[Stage]:
        yield from written.stages("edges")
        stars = yield from components.rounds(written, folder / "rounds")
        for rank in range(partitions):
            components.write_labels(rank, stars=stars, labels=found)
        yield from found.stages("labels")

    names = list(run_stages(stages(), order=lambda ranks: random.sample(ranks, len(ranks))))
    labels = {}
    for task in range(tasks):
        for one, component in found.read_records(task, components.LABEL).tolist():
            assert (node := task << 32 | one) not in labels
            labels[node] = component
    return labels, names


def expected_labels(edges: np.ndarray) -> dict[int, int]:
    """scipy's."""
    nodes, places = np.unique(edges, return_inverse=True)
    ends = places.reshape(-1, 2).T
    _, groups = connected_components(coo_array((np.ones(len(edges)), ends), shape=(len(nodes),) * 2), directed=False)
    least = np.full(len(nodes), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, groups, nodes)
    return dict(zip(nodes.tolist(), least[groups].tolist(), strict=True))


def shapes(draw: random.Random) -> np.ndarray:
    """Chains, stars, cliques, rings and random edges, some of them joined, some there twice, over some tasks."""
    nodes = [task << 32 | one for task in range(draw.choice([1, 3, 9])) for one in range(draw.choice([2, 20, 60]))]
    draw.shuffle(nodes)
    edges: list[tuple[int, int]] = []
    while nodes and draw.random() < 0.95:
        some = [nodes.pop() for _ in range(min(len(nodes), draw.choice([2, 3, 9, 50])))]
        kind = draw.choice(["chain", "star", "clique", "ring", "random"])
        if kind in ("chain", "ring"):
            edges += itertools.pairwise([*some, some[0]] if kind == "ring" and len(some) > 2 else some)
        elif kind == "star":
            edges += [(some[0], other) for other in some[1:]]
        elif kind == "clique":
            edges += itertools.combinations(some[:9], 2)
        elif len(some) > 1:
            edges += [tuple(draw.sample(some, 2)) for _ in some]
        if draw.random() < 0.2:
            nodes.append(some[0])
    edges += draw.choices(edges, k=len(edges) // 3) if edges else []
    draw.shuffle(edges)
    return np.array([draw.sample(edge, 2) for edge in edges], np.uint64).reshape(-1, 2)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 5), st.integers(1, 7))
@example(0, 1, 1)
def test_clusters_are_connected_components(tmp_path_factory, seed, writers, partitions):
    folder = tmp_path_factory.mktemp("x")
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in [*TINY, (os, "fsync", lambda descriptor: None)]:
            patch.setattr(module, name, value)
        edges = shapes(random.Random(seed))
        assert labels_of(edges, folder, writers, partitions)[0] == expected_labels(edges)
    shutil.rmtree(folder)


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_a_long_path_takes_few_rounds(order, tmp_path):
    """The worst for labels that only pass on to neighbours: those would take 20,000 rounds."""
    nodes = np.arange(20_000, dtype=np.uint64)
    if order == "shuffled":
        nodes = np.random.default_rng(0).permutation(nodes)
    labels, names = labels_of(np.stack([nodes[:-1], nodes[1:]], axis=1), tmp_path, 2, 3)
    assert labels == dict.fromkeys(range(20_000), 0)
    assert len([name for name in names if name.endswith("-large")]) <= 16
    left = {path.parent.name for path in (tmp_path / "rounds").rglob("*.runs")}
    assert left == {"small"} and len(list((tmp_path / "rounds").rglob("*.runs"))) == 3, "only the last round's stars"


def test_a_node_with_a_million_edges_takes_little_memory(tmp_path, monkeypatch):
    """16 MB from one end, of which a task holds a few chunks and a number of each of its nodes."""
    for module, name in ((shuffle, "RUN_BYTES"), (streams, "CHUNK_BYTES")):
        monkeypatch.setattr(module, name, 1 << 19)
    others = np.delete(np.arange(1_000_001, dtype=np.uint64), 500_000)
    edges = Shuffle(tmp_path / "edges", 1, 64)
    with edges.writer(0) as out:
        for start in range(0, len(others), 1 << 14):
            some = others[start : start + (1 << 14)]
            components.add_edges(out, edges, np.full_like(some, 500_000), some)
    del others
    tracemalloc.start()
    names = run_stages(components.rounds(edges, tmp_path / "rounds"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(names) == 3, "joined to the least by a round, and seen to be"
    assert peak < 9e6, f"{peak:,} bytes"


# --- All stages -------------------------------------------------------------------------------------------------------


def results(folder: Path) -> dict[str, bytes]:
    """The files that are read by others."""
    return {path.name: path.read_bytes() for path in [*folder.glob("*.parquet"), folder / "summary.json"]}


@pytest.mark.parametrize("dedup", [{}, {"unit": "characters", "n_grams": 5}, {"exact": False}], ids=str)
def test_nothing_depends_on_partitions_or_what_is_held(dedup, tmp_path, monkeypatch, request):
    config, tasks = recipe_of(SUBSETS, **dedup), corpus(7, families=60)
    write_clean(config, tmp_path / "clean", tasks)
    run_stages(duplicates.stages(config, tmp_path / "clean", tmp_path / "one"))
    request.getfixturevalue("tiny")
    monkeypatch.setattr(shuffle, "_remove", lambda folder: None)  # for the last stage, which runs twice
    found = run_stages(
        duplicates.stages(config, tmp_path / "clean", tmp_path / "two"),
        order=lambda ranks: random.sample(ranks, len(ranks)),
    )
    sizes = {name: stage.tasks for name, stage in found.items()}
    assert min(sizes[name] for name in ("near", "clusters-01-large", "labels", "survivors")) > 4
    expected_between = ("ids-group", "signatures-split", "edges-group", "clusters-00-large-group", "members-split")
    assert set(expected_between) - set(sizes) <= ({"ids-group"} if dedup.get("exact") is False else set())
    assert results(tmp_path / "one") == results(tmp_path / "two")
    monkeypatch.setattr(duplicates, "RANGE", 5)  # groups of rows of other sizes, and the same rows
    run_stages([found["duplicates"]])
    rows = rows_of(tmp_path / "two", 4)
    assert len(rows) > 30 and rows == rows_of(tmp_path / "one", 4)


@pytest.mark.parametrize("seed", range(2))
def test_many_parts_find_what_the_reference_finds(seed, tmp_path, tiny):
    config, tasks = recipe_of(SUBSETS, sources_kept=seed), corpus(20 + seed, families=25)
    write_clean(config, tmp_path / "clean", tasks)
    run_stages(duplicates.stages(config, tmp_path / "clean", tmp_path / "out"))
    assert rows_of(tmp_path / "out", 4) == reference(config, tasks)


class Killed(Exception):
    pass


def test_it_goes_on_wherever_it_was_killed(tmp_path, tiny):
    """After each of its tasks: the next command runs what is not complete, and asks for nothing that is gone."""
    config = recipe_of(SUBSETS)
    write_clean(config, tmp_path / "clean", corpus(5, families=12))
    stages = run_stages(duplicates.stages(config, tmp_path / "clean", tmp_path / "whole"))
    assert "clusters-01-large" in stages
    complete: set[tuple[str, int]] = set()

    def command(out: Path, tasks: int) -> None:
        """Is killed in its last task, when part of it is written."""
        for stage in duplicates.stages(config, tmp_path / "clean", out):
            for rank in range(stage.tasks):
                if (stage.name, rank) in complete:
                    continue
                stage.function(rank)
                if not (tasks := tasks - 1):
                    raise Killed
                complete.add((stage.name, rank))

    for tasks in (1, 6):
        commands = 0
        while True:
            try:
                command(tmp_path / f"out{tasks}", tasks + 1)
                break
            except Killed:
                commands += 1
        assert commands > 20 // tasks
        assert results(tmp_path / f"out{tasks}") == results(tmp_path / "whole")
        complete.clear()


@pytest.mark.processes
def test_executors_give_the_same_bytes(tmp_path):
    config = recipe_of(SUBSETS)
    write_clean(config, tmp_path / "clean", corpus(9, families=40))
    for workers in (1, 3):
        engine = Engine(tmp_path / f"done{workers}", "local", workers, {})
        for stage in duplicates.stages(config, tmp_path / "clean", tmp_path / f"out{workers}"):
            engine.run(stage)
    assert results(tmp_path / "out1") == results(tmp_path / "out3")


@pytest.mark.parametrize(("tasks", "fan"), [(200, 12), pytest.param(2000, 40, marks=pytest.mark.slow)])
def test_many_tasks_need_few_files(tasks, fan, tmp_path, monkeypatch, no_sync):
    """All but two of them without a document. The limit on open files is the system's own."""
    for module in (shuffle, index, members, duplicates):
        monkeypatch.setattr(module, "FAN", fan)
    monkeypatch.setattr(shuffle, "SLOTS", 100)
    config = recipe_of({"books": {"tasks": tasks // 3}, "web": {"tasks": tasks - tasks // 3}})
    ends = {3: [("one two three four five", None, "a")], tasks - 1: [("one two three four five", None, "b")]}
    write_clean(config, tmp_path / "clean", [ends.get(rank, []) for rank in range(tasks)])
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + fan + 10, usual[1]))
    try:
        stages = run_stages(duplicates.stages(config, tmp_path / "clean", tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)
    assert {"ids-group", "exact-split", "labels-split", "survivors-split"} <= set(stages)
    found = {path: pq.read_table(path).to_pylist() for path in (tmp_path / "out").glob("*.parquet")}
    assert len(found) == tasks and sum(map(len, found.values())) == 2
    [row] = found[tmp_path / f"out/{tasks - 1:05d}.parquet"]
    assert [row["reason"], row["survivor_rank"], row["survivor_index"]] == ["exact", 3, 0]


def test_what_tasks_are_told_does_not_grow_with_their_number(tmp_path):
    config = recipe_of({"books": {"tasks": 70_000}, "web": {"tasks": 30_000}})
    first = next(duplicates.stages(config, tmp_path, tmp_path))
    assert first.tasks == 196
    clean = first.function.keywords["clean"]
    assert len(clean.subsets) == 2 and clean.num_tasks == 100_000
    assert clean.subsets_of(np.array([0, 69_999, 70_000, 99_999])).tolist() == [0, 0, 1, 1]
