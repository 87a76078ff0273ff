"""Stages on Slurm, of shell scripts: no rank is lost or run twice, whatever sbatch and squeue say."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("datatrove")

from test_engine import SLURM, die, engine, note, runs  # noqa: E402

from k2jax.errors import ConfigError, RunError  # noqa: E402
from k2jax.prepare.engine import slurm as slurm_module  # noqa: E402
from k2jax.prepare.engine.engine import Stage, check_executor  # noqa: E402
from k2jax.prepare.engine.slurm import arrays  # noqa: E402

# sbatch runs the job's script for every rank of its array, at once, in turn. It notes what it was asked for.
SBATCH = """
echo "$@" >>{calls}
script="${{@: -1}}"
ranks=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
sed -n 's/^#SBATCH --array=//p' "$script" >>{arrays}
for word in "$@"; do case $word in --export=ALL,*) export "${{word#--export=ALL,}}";; esac; done
for rank in $(seq 0 $ranks); do
  SLURM_ARRAY_TASK_ID=$rank SLURM_NODELIST=here bash "$script" >>{out} 2>&1
done
echo "17$(wc -l <{calls});cluster"
"""
SRUN = 'while [ "$1" != launch_pickled_pipeline ]; do shift; done\nexec "$@"\n'


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Programs in a folder; `calls` has sbatch's arguments, `arrays` what it found in scripts."""
    programs = tmp_path / "bin"
    programs.mkdir()
    names = {name: tmp_path / name for name in ("calls", "arrays", "out")}
    for name, text in {
        "sbatch": SBATCH.format(**names), "srun": SRUN, "squeue": "exit 0\n", "scontrol": "echo here\n"
    }.items():  # fmt: skip
        program(programs, name, text)
    tests = Path(__file__).parent
    monkeypatch.setenv("PATH", os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(slurm_module, "POLL_SECONDS", 0.01)
    return programs


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}")
    (folder / name).chmod(0o755)


def stage_of(tmp_path: Path, num_ranks: int, task=note) -> Stage:
    return Stage("note", num_ranks, partial(task, folder=tmp_path))


def test_slurm_runs_the_job_script_and_a_job_that_dies_is_an_error(tmp_path, slurm):
    check_executor("slurm", SLURM)
    with pytest.raises(RunError, match="stage note: 1 of 4 tasks did not end, the first is 2"):
        engine(tmp_path, "slurm", 2).run(stage_of(tmp_path, 4, die))
    engine(tmp_path, "slurm", 2).run(stage_of(tmp_path, 4, die))
    assert runs(tmp_path) == {0: 1, 1: 1, 2: 2, 3: 1}, (tmp_path / "out").read_text()
    assert (tmp_path / "arrays").read_text().split() == ["0-3%2", "0-0%1"]


def test_a_folder_whose_name_the_shell_would_take_apart(tmp_path, slurm):
    """Seen red without the quotes."""
    folder = tmp_path / "my $HOME's #1 50% \"data\""
    engine(folder, "slurm", 2).run(stage_of(tmp_path, 2))
    assert runs(tmp_path) == {0: 1, 1: 1}, (tmp_path / "out").read_text()
    script = (folder / "done/note/launch_0.slurm").read_text()
    [output] = [line.partition("=")[2] for line in script.splitlines() if line.startswith("#SBATCH --output=")]
    plain = output.replace("\\#", "#").replace('\\"', '"').replace("%%", "%")  # as sbatch reads it
    assert plain == f'"{folder}/done/note/slurm_logs/%A_%a.out"' and f"#SBATCH --error={output}\n" in script
    assert output.count("%") == 4 and output.count("#") == output.count("\\#")


def queued(tmp_path: Path, job: str) -> Path:
    """What an earlier attempt left: a job that runs rank 1 of two."""
    done = tmp_path / "done/note"
    (done / "completions").mkdir(parents=True)
    (done / "job").write_text(job)
    return done / "completions/00001"


def test_a_job_of_an_earlier_attempt_is_waited_for_not_started_again(tmp_path, slurm):
    """Its rank 1 ends while we wait: only rank 0 is left to launch."""
    end = queued(tmp_path, "15\n16\n")
    program(slurm, "squeue", f"if [ ! -e {end} ] && [ $3 = 16 ]; then echo 16 running; touch {end}; fi\n")
    engine(tmp_path, "slurm", 2).run(stage_of(tmp_path, 2))
    assert runs(tmp_path) == {0: 1}


def test_a_squeue_that_fails_does_not_say_that_a_job_is_over(tmp_path, slurm, capsys):
    end, asked = queued(tmp_path, "16"), tmp_path / "asked"
    program(
        slurm,
        "squeue",
        f"[ $3 = 16 ] || exit 0\necho x >>{asked}\n"
        "case $(wc -l <" + str(asked) + ") in\n"
        "1|2|4) printf 'slurm_load_jobs error: Unable to contact \\033[2J controller\\n' >&2; exit 1;;\n"
        f"3) echo 16 running;;\n5) echo 16 running; touch {end};;\n"
        "*) echo slurm_load_jobs error: Invalid job id specified >&2; exit 1;;\nesac\n",
    )
    engine(tmp_path, "slurm", 2).run(stage_of(tmp_path, 2))
    assert runs(tmp_path) == {0: 1} and len(asked.read_text().split()) == 6
    said = capsys.readouterr().err
    assert said.count("\n") == 2 and "Unable to contact \\u001b[2J controller): it is asked again" in said


def test_a_squeue_that_fails_for_ever_ends_the_command_and_the_next_one_waits_for_the_job(tmp_path, slurm, monkeypatch):
    monkeypatch.setattr(slurm_module, "MOST_FAILURES", 3)
    end = queued(tmp_path, "16")
    program(slurm, "squeue", "exit 1\n")
    with pytest.raises(RunError, match="squeue fails .it says nothing.*, and job 16 may still run"):
        engine(tmp_path, "slurm", 2).run(stage_of(tmp_path, 2))
    assert runs(tmp_path) == {} and (tmp_path / "done/note/job").read_text() == "16"
    program(slurm, "squeue", f"[ ! -e {end} ] && [ $3 = 16 ] && echo 16 && touch {end}; exit 0")
    engine(tmp_path, "slurm", 2).run(stage_of(tmp_path, 2))
    assert runs(tmp_path) == {0: 1}


def test_jobs_of_a_stage_that_is_done_again_are_cancelled_and_waited_for(tmp_path, slurm, monkeypatch):
    """They would write beside the new ones."""
    queued(tmp_path, "15\n16\n")
    (tmp_path / "running").write_text("15\n16\n")
    program(slurm, "squeue", f"grep -w $3 {tmp_path}/running; true\n")
    program(slurm, "scancel", f"echo $1 >>{tmp_path}/cancelled; sed -i /$1/d {tmp_path}/running\n")
    slurm_module.cancel(tmp_path / "done/note")
    assert (tmp_path / "cancelled").read_text() == "15\n16\n" and not (tmp_path / "done/note/job").exists()
    slurm_module.cancel(tmp_path / "done/none")
    queued(tmp_path / "b", "17")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="job: jobs of Slurm .17. may still write there, .* on a login node"):
        slurm_module.cancel(tmp_path / "b/done/note")


def test_a_refused_sbatch_is_one_line(tmp_path, slurm, capfd):
    program(slurm, "sbatch", "echo sbatch: error: a hint >&2; echo sbatch: error: Invalid partition >&2; exit 1\n")
    with pytest.raises(ConfigError, match="^sbatch refused a job .sbatch: error: Invalid partition.: corr") as error:
        engine(tmp_path, "slurm", 2).run(stage_of(tmp_path, 2))
    assert "\n" not in str(error.value) and capfd.readouterr().err == "" and runs(tmp_path) == {}
    program(slurm, "sbatch", "echo welcome to the cluster\n")
    with pytest.raises(RunError, match="sbatch printed 'welcome to the cluster', expected the id of a job"):
        engine(tmp_path, "slurm", 2).run(stage_of(tmp_path, 2))


def test_more_ranks_than_an_array_holds_are_several_beside_each_other_noted_as_they_are_made(tmp_path, slurm):
    noted = tmp_path / "done/note/job"
    program(slurm, "scontrol", "echo 'MaxArrayTasks = 9'; echo 'MaxArraySize            = 2'\n")
    seen = f"cat {noted} >{tmp_path}/seen.$(wc -l <{tmp_path}/calls) 2>/dev/null || true\n"
    program(slurm, "sbatch", seen + SBATCH.format(**{name: tmp_path / name for name in ("calls", "arrays", "out")}))
    (tmp_path / "calls").touch()
    engine(tmp_path, "slurm", 3).run(stage_of(tmp_path, 5))
    assert runs(tmp_path) == dict.fromkeys(range(5), 1), (tmp_path / "out").read_text()
    assert (tmp_path / "arrays").read_text().split() == ["0-1%1", "0-1%1", "0-0%1"]
    assert "--dependency" not in (tmp_path / "calls").read_text()
    assert [(tmp_path / f"seen.{i}").read_text().split() for i in range(3)] == [[], ["171"], ["171", "172"]]
    assert not noted.exists()


def test_arrays_that_slurm_does_not_take_at_once_come_later(tmp_path, slurm, capsys):
    """As where a user may have so many tasks in the queue."""
    program(slurm, "scontrol", "echo 'MaxArraySize = 2'\n")
    full = f"[ $(cat {tmp_path}/calls 2>/dev/null | wc -l) = 1 ] && [ ! -e {tmp_path}/full ] && touch {tmp_path}/full"
    refuse = f"{full} && {{ echo job limit >&2; exit 1; }}\n"
    program(slurm, "sbatch", refuse + SBATCH.format(**{name: tmp_path / name for name in ("calls", "arrays", "out")}))
    engine(tmp_path, "slurm", 1).run(stage_of(tmp_path, 4))
    assert runs(tmp_path) == dict.fromkeys(range(4), 1)
    assert "job limit" in (said := capsys.readouterr().err) and "it has 1 of 2 arrays" in said and said.count("\n") == 1


def test_arrays_in_one_lane_wait_for_each_other(tmp_path, slurm):
    program(slurm, "scontrol", "echo 'MaxArraySize = 1'\n")
    engine(tmp_path, "slurm", 2).run(stage_of(tmp_path, 3))
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ["--dependency=afterany:171" in call for call in calls] == [False, False, True]
    assert json.loads((tmp_path / "done/note/ranks_to_run.json").read_text()) == [0, 1, 2]


@given(st.integers(1, 5000), st.integers(1, 3000), st.integers(1, 1500))
def test_arrays_hold_every_rank_and_have_the_workers_between_them(num_ranks, workers, largest):
    workers = min(workers, num_ranks)
    parts = arrays(num_ranks, workers, largest)
    assert sum(part.size for part in parts) == num_ranks and 0 < min(part.size for part in parts)
    assert max(part.size for part in parts) <= largest
    assert all(part.size == parts[0].size for part in parts[:-1])  # by which a task finds its rank
    first = {part.lane: part for part in reversed(parts)}
    assert sum(part.at_once for part in first.values()) == workers
    assert all(part.at_once == first[part.lane].at_once for part in parts)
    assert all(part.at_once <= part.size for part in parts[:-1])
