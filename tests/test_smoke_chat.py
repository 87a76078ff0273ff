"""experiments/smoke_chat.py from its commands: conversations are made, learned, and answered in the template's form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from k2jax.data.tokenizer import train_bpe
from k2jax.prepare.chat import made

pytest.importorskip("datatrove")


def test_what_is_made_is_the_same_each_time(tmp_path):
    for name in ("a", "b", "a"):
        made.write(tmp_path / name, count=40)
    for name in ("numbers.jsonl", "opposites.jsonl", "preferred.jsonl", "chat_template.jinja"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a" / "numbers.jsonl").read_text().splitlines()]
    assert len({json.dumps(row) for row in rows}) == 40
    for turn, answer in ((row["messages"][0], row["messages"][1]) for row in rows):
        assert (turn["role"], answer["role"]) == ("user", "assistant")
        assert int(answer["content"][:-1]) == int(turn["content"].removeprefix("After ")[:-1]) + 1
    pairs = [json.loads(line) for line in (tmp_path / "a" / "preferred.jsonl").read_text().splitlines()]
    assert len({json.dumps(pair) for pair in pairs}) == 20
    for chosen, rejected in ((pair["chosen"], pair["rejected"]) for pair in pairs):
        assert chosen[:-1] == rejected[:-1] and chosen[-1]["content"] != rejected[-1]["content"]
    texts = [pair["chosen"][-2:] for pair in pairs if pair["chosen"][-2]["content"].startswith("After")]
    assert texts and all(int(b["content"][:-1]) == int(a["content"][6:-1]) + 1 for a, b in texts)


@pytest.mark.slow
def test_the_smoke_model_answers_in_the_templates_form(tmp_path: Path):
    """Two minutes on two cores, of which the commands take one before."""
    (tmp_path / "data" / "smoke").mkdir(parents=True)
    texts = [path.read_text() for path in sorted((REPOSITORY / "k2jax").rglob("*.py"))]
    train_bpe(texts, 4096).save(str(tmp_path / "data" / "smoke" / "tokenizer.json"))
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}

    def command(*arguments: str) -> str:
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, *arguments], **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    experiments = REPOSITORY / "experiments"
    command(
        f"{REPOSITORY}/tools/prepare_data.py", f"--config={experiments}/data/smoke_chat.py", "--out=data/smoke_chat"
    )
    command("-m", "k2jax.train", f"--config={experiments}/smoke_chat.py", "--workdir=run")
    numbers = [2, 4, 7, 8, 11]
    prompts = [f"--prompt=[INST] After {number}? [/INST]" for number in numbers]
    options = ("--workdir=run", "--temperature=0", "--max-new-tokens=12", "--json")
    told = command("-m", "k2jax.generate", *options, *prompts)
    texts = [json.loads(line)["text"] for line in told.splitlines()]
    assert all(text.strip().removesuffix(".").isdigit() for text in texts), texts  # and nothing behind EOS
    assert sum(text == f" {number + 1}." for number, text in zip(numbers, texts, strict=True)) >= 4, texts
