"""The fault matrix: what can go wrong, what must happen then, and the tests that hold it, marked with the row's id.

A: interruption. B: storage. C: what differs between save and resume. D: numerics. E: several processes. F: data.
S: what comes from others. Exit codes: 75 saved, restart; 74 storage; 65 numerics; 78 configuration or data; 70 others.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

MATRIX = {
    "A1": "SIGTERM: the step ends, all is saved, 75; the resumed run has the bits of an undisturbed one",
    "A2": "SIGTERM to one of two, to both, twice, or while saving: both save the same step, 75",
    "A3": "SIGTERM before the first step: 75 soon, no new checkpoint, the old one as it was",
    "A4": "SIGKILL at any moment: the newest complete checkpoint is resumed from, every listed one is good, same bits",
    "A5": "SIGKILL of either process while both save: the other ends; one process alone resumes from what is complete",
    "A6": "SIGKILL while an old checkpoint is deleted: no listed one is unreadable, the next start cleans up",
    "A7": "Ctrl-C, also in a notebook: as SIGTERM, and the notebook's cell ends with KeyboardInterrupt",
    "A8": "launch after launch dies before a new checkpoint: the run stops with 78 and says so",
    "B1": "the disk is full: 74 naming what could not be written, older checkpoints good, no litter after the restart",
    "B2": "an array file is cut, empty or lost: named, moved aside, the checkpoint before it is used",
    "B3": "a bit of an array is flipped, on disk or in one copy of several: the digest names the array",
    "B4": "a small file of a run is damaged: one line that names it, or the same answer; never another answer",
    "B5": "checkpoints exist and none is good: 74 naming all, nothing moved, nothing trained from scratch",
    "B6": "the workdir cannot be made or written: 74 with its path, before anything is compiled",
    "B7": "an older checkpoint is half deleted: nothing goes on from it or reads it as whole",
    "B8": "a second run in one workdir: 78 naming the holder; a killed holder is in nobody's way",
    "B9": "rolled back to an earlier step: what came after is kept aside, and saves succeed again",
    "B10": "the storage is slow: training goes on beside one save and waits with the next",
    "B11": "a step is saved twice: what is there is never overwritten",
    "C1": "another mesh or number of devices: the same arrays, losses within 1e-4",
    "C2": "another number of processes: the same run, no row lost or read twice",
    "C3": "a mesh that does not divide a dimension: parameter, dimension and axis are named before the compiler runs",
    "C4": "another model: 78, key by key",
    "C5": "another optimizer, schedule, batch, seed or mix: 78 unless allowed by name, which is kept for ever",
    "C6": "an array of another dtype or shape: 78, no cast",
    "C7": "another tokenizer of the same size: 78 by its SHA-256, from the trainer and from readers",
    "C8": "other data under the same name: refused by root digest, size, SHA-256 or checksum",
    "C9": "a checkpoint of another format or of an older version: 78, not guessed at",
    "C10": "other versions of JAX or Orbax than the checkpoint's: said once, with both; the run goes on",
    "D1": "one NaN or Inf in loss or gradient, on one device: found before the update, the step costs itself alone",
    "D2": "three such steps in a row: 65, and the newest checkpoint is from before",
    "D3": "nothing is saved that is not finite or not looked at",
    "D4": "a finite spike: skipped by limits of accepted finite steps; if it lasts, rolled back",
    "D5": "no false alarm on clean curves and through the warm-up",
    "D6": "rolled back and skipped or deferred: what was left out is recorded and stays so after the next resume",
    "D7": "the detector decides the same after a resume in the middle of its window",
    "D8": "a device errs once: found by computing a step again, counted, the run goes on",
    "D9": "a device errs every time: 65 with its name",
    "D10": "copies of a replicated array differ: the odd device is named, 65, not saved",
    "D11": "bfloat16 computes and float32 adds up: losses, norms, softmax, gradients, moments",
    "D12": "rows without a target, queries without a key, rows of one token: no NaN and no weight",
    "E1": "a process dies: the others end within a minute with 70 and who is gone",
    "E2": "a process is stuck but alive: limits end all of them, with who, at what, and its stack",
    "E3": "what is slow within its limit, or was stopped by the system, is no hang",
    "E4": "processes differ in configuration, code or versions: 78 on all, naming the odd one",
    "E5": "the others do not come: one line with address and remedy after the limit",
    "E6": "a process raises: it ends with its own line and code, the others soon, with its reason",
    "E7": "of several processes one writes and speaks",
    "F1": "a data worker is killed: 70 naming it, and the resumed run reads what it would have read",
    "F2": "the trainer is killed: its workers are gone within seconds",
    "F3": "the data hang: the message says that it is the data",
    "F4": "other numbers of workers, threads or hosts: the same global batches in the same order",
    "F5": "a token outside the vocabulary: refused where it is written and where it is read",
    "F6": "a shard cut, empty or lost: named at start, and when it is read",
    "F7": "the data end: whole epochs before a repeat, the same last step on all processes",
    "F8": "documents in one row, where they are masked: each has the loss that it has alone",
    "F9": "rows of repeated n-grams: masked where asked, counted, reported",
    "S1": "a pickle as weights: refused, not opened; no unpickling, eval or shell anywhere in the code",
    "S2": "an index with paths: plain names within the folder only, links out of it not followed",
    "S3": "names of tensors: only expected ones, each once, never a path",
    "S4": "sizes that a file claims: compared with what is expected before memory is taken for them",
    "S5": "imported numbers that are not finite: counted by tensor and refused unless allowed",
    "S6": "code in a model's folder: never imported, config.json is data",
    "S7": "names that climb: output stays in its folder, whatever a subset, record or document is called",
    "S8": "archives: there is no code that unpacks them",
    "S9": "secrets in the environment or in URLs: in no file and in no message",
    "S10": "a saved configuration that holds code: text",
    "S11": "the coordinator's port: on the given address alone, loopback for one machine",
    "S12": "compiled programs: in a folder that is the user's alone; a damaged one is compiled again",
    "S13": "file modes: nothing that others may write, the workdir not for others to read",
    "S14": "dependencies: all in one lock, released versions within bounds",
    "S15": "bytes of a checkpoint, ledger, store or export changed at rest: found by digest, and named",
    "S16": "endless lines, bad UTF-8, NUL: refused by file and line within bounded memory",
    "S17": "control characters in names and ids: escaped wherever they are shown or stored",
}
# Rows, or parts of rows, that nothing here holds, with the reason. TPUs' notices of preemption, their links, XLA's own
# check for corruption, and several slices need what is not here.
NOT_HELD = {
    "S14": "hashes: the lock constrains pip and has none; pip's own mode with hashes takes no editable package",
    "S15": "a forger, who makes all digests anew: what is published needs a signature",
}
TESTS = Path(__file__).parent.parent


@cache
def marked() -> dict[str, list[str]]:
    """{id: tests marked with it, as pytest names them}. From the source: no file is imported for it."""
    found: dict[str, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        text = path.read_text()
        for function in ast.parse(text).body if "mark.fault" in text else []:
            for mark in getattr(function, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    for row in mark.args:
                        found.setdefault(row.value, []).append(f"{path.relative_to(TESTS)}::{function.name}")
    return found


@pytest.mark.parametrize("row", MATRIX)
def test_every_row_has_a_test(row: str):
    assert marked().get(row), f"no test is marked with {row}: {MATRIX[row]}"


def test_no_mark_is_of_no_row():
    assert set(marked()) | set(NOT_HELD) <= set(MATRIX)
    sizes = {"A": 8, "B": 11, "C": 10, "D": 12, "E": 7, "F": 9, "S": 17}
    assert list(MATRIX) == [f"{part}{number}" for part, size in sizes.items() for number in range(1, size + 1)]
