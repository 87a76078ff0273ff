"""The README's "Train on your own folder": its commands, as they stand there, on a small folder."""

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import REPOSITORY

SHORTER = "--config.stages.0.steps_per_chunk=3 --config.stages.0.chunks=2 --config.stages.0.warmup_steps=1"
SCRIPT = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "from k2jax.command import main; main()" "$@"\n'


def commands() -> list[str]:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Train on your own folder\n")[2].partition("\n## ")[0]
    return re.findall(r"^    (.+)$", section, re.MULTILINE)


def write_documents(folder: Path) -> None:
    """3 MB of this Python's own sources."""
    folder.mkdir()
    size, sources = 0, sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    with (folder / "a.jsonl").open("w") as file:
        for path in sources:
            text = path.read_text(errors="replace")
            size += file.write(json.dumps({"text": text}) + "\n") if size < 3e6 else 0


@pytest.mark.processes
def test_the_commands_of_the_readme(tmp_path):
    """All but the first, which installs; and the training is shorter."""
    install, *rest = commands()
    assert install.startswith("pip install --constraint requirements.lock ") and len(rest) == 4
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "k2jax").write_text(SCRIPT)
    (tmp_path / "bin" / "k2jax").chmod(0o755)
    (tmp_path / "experiments").symlink_to(REPOSITORY / "experiments")
    write_documents(tmp_path / "mine")
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)}
    said = []
    for command in rest:
        line = [*shlex.split(command), *(SHORTER.split() if " train " in command else [])]
        answer = subprocess.run(line, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=600)
        assert answer.returncode == 0, f"{command}: {answer.stderr}"
        said.append(answer.stdout)
    assert "tokenizer of 8,192 ids" in said[0] and "nothing is held out" not in said[0]
    assert "saved 6" in said[1] and "validation documents " in said[1] and "no validation loss" not in said[1]
    assert "model.vocab_size" not in said[1], "the template's model and tokenizer are of one size"
    assert "step 6 validation" in said[2] and said[3].startswith("The")
