"""experiments/colab.ipynb from end to end, at small size, as a newcomer runs it: every cell, in an empty folder."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY, Later

nbformat, nbclient = Later("nbformat"), Later("nbclient")
NOTEBOOK = REPOSITORY / "experiments" / "colab.ipynb"
CELL_S = 300  # no cell takes longer, whatever else the machine does
DATA = '''"""A few hundred documents, for the test of the notebook."""
from ml_collections import ConfigDict
from k2jax.prepare.recipe import base, subset

def get_config() -> ConfigDict:
    c = base()
    c.vocab_size = 512
    c.tokenizer_bytes = 200_000
    c.validation_fraction = 0.05
    for name, source in (("code", "code"), ("docstrings", "docstrings"), ("documentation", "documents")):
        c.subsets[name] = subset(f"python:{source}", max_bytes=300_000, min_document_bytes=200,
                                 max_document_bytes=20_000)
    return c
'''
MODEL = {"vocab_size": 512, "dim": 32, "num_layers": 2, "head_dim": 16, "ffn_dim": 64}
MODEL |= {"num_heads": 2, "num_kv_heads": 2}
STAGE = {"sequence_length": 64, "rows_per_step": 8, "steps_per_chunk": 6, "warmup_steps": 0}
SMALL = {
    **{f"model.{key}": value for key, value in MODEL.items()},
    **{f"stages.{i}.{key}": value for i in (0, 1) for key, value in STAGE.items()},
    **{"log.tensorboard": False, "eval.windows": 2, "eval.new_tokens": 4, "checkpoint.every_steps": 0},
}


def notebook() -> object:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(read: object) -> list:
    return [cell for cell in read.cells if cell.cell_type == "code"]


def text_of(cell: object) -> str:
    """What a cell has printed."""
    return "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")


@pytest.mark.processes
def test_the_notebook_runs_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for needed in ("ipykernel", "matplotlib", "transformers", "torch"):
        pytest.importorskip(needed)
    (tmp_path / "data.py").write_text(DATA)
    (tmp_path / "work").mkdir()
    changed = {"DATA": str(tmp_path / "data.py"), "OVERRIDES": SMALL, "NEW_TOKENS": 4}
    monkeypatch.setenv("K2JAX_NOTEBOOK", json.dumps(changed))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")  # a CPU as a user has it
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))  # not what the developer has

    read = notebook()
    client = nbclient.NotebookClient(read, timeout=CELL_S, resources={"metadata": {"path": str(tmp_path / "work")}})
    client.execute()

    def cell(part: str) -> object:
        [found] = [cell for cell in code_cells(read) if part in cell.source]
        return found

    train = text_of(cell("k2jax.train"))
    for line in ("stage stage1: 24 steps", "step 1 was done", "saved 36", "validation code", "the run: "):
        assert f"\n{line}" in train, train
    chart = cell("plt.show()")
    assert any("image/png" in output.get("data", {}) for output in chart.outputs)
    metrics = sorted((tmp_path / "work" / "run" / "metrics").glob("*.jsonl"))
    rows = [json.loads(line) for file in metrics for line in file.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 37)) and rows[-1]["loss"] < rows[0]["loss"]
    documents = text_of(cell("which_docs"))
    assert re.search(r"^row 0: \w+, epoch \d+, window \d+", documents) and "\n    '" in documents
    generated = text_of(cell("k2jax.generate"))
    answer = json.loads(next(line for line in generated.splitlines() if line.startswith("{")))
    assert answer["step"] == 36 and 1 <= answer["num_tokens"] <= 4
    assert "def read_file(path" in text_of(cell("AutoModelForCausalLM"))
    assert (tmp_path / "work" / "export" / "model.safetensors").exists()
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["data", "export", "run"]


@pytest.mark.processes
def test_a_command_that_fails_stops_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Which the notebook's own `!command` would not."""
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("K2JAX_NOTEBOOK", json.dumps({"DATA": "experiments/data/none.py"}))
    read = notebook()
    last = next(i for i, cell in enumerate(read.cells) if "prepare_data" in cell.source and cell.cell_type == "code")
    read.cells = read.cells[: last + 1]
    client = nbclient.NotebookClient(read, timeout=CELL_S, resources={"metadata": {"path": str(tmp_path)}})
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="exit code 78"):
        client.execute()
    assert "none.py" in text_of(read.cells[-1])


@pytest.mark.parametrize(
    ("says", "packages", "overrides"),
    [
        ("Tesla T4, 7.5, 550.54.15", "jax[cuda12]", {"precision.compute": "float32"}),
        ("NVIDIA A100-SXM4-40GB, 8.0, 580.65.06", "jax[cuda13]", {}),
        ("NVIDIA L4, 8.9, 550.54.15\nNVIDIA L4, 8.9, 550.54.15", "jax[cuda12]", {}),
        ("", "jax[tpu]", {}),
    ],
)
def test_the_notebook_knows_the_accelerator(tmp_path: Path, monkeypatch, says: str, packages: str, overrides: dict):
    """By what the driver's own program says; one that fails, as on a machine whose GPU is gone, says nothing."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{says}'\n" if says else "#!/bin/sh\necho no devices >&2\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    [cell] = [cell for cell in code_cells(notebook()) if "nvidia-smi" in cell.source]
    names: dict = {"OVERRIDES": {}, "os": os, "subprocess": subprocess}
    is_there = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/vfio/0" or is_there(path))
    exec(compile(cell.source, "cell", "exec"), names)
    assert names["accelerator"] == packages and names["OVERRIDES"] == overrides


def test_the_notebook_is_tidy():
    """Valid, no outputs kept, short cells, lines as in the code; what it names is there."""
    read = notebook()
    nbformat.validate(read)
    assert len({cell.id for cell in read.cells}) == len(read.cells)
    for cell in read.cells:
        lines = cell.source.splitlines()
        assert max(map(len, lines)) <= 120 and not any(line != line.rstrip() for line in lines)
        assert len(lines) <= 18, f"a long cell: {lines[0]}"
    for cell in code_cells(read):
        assert cell.outputs == [] and cell.execution_count is None
        compile(cell.source, "cell", "exec")
        assert "import jax" not in cell.source, "the kernel would hold the accelerator"
    source = "\n".join(cell.source for cell in read.cells)
    named = re.findall(r"[\"`/ ]((?:experiments|tools|k2jax)/[\w/]+(?:\.py)?)", source)
    assert len(named) >= 6 and all((REPOSITORY / name).exists() for name in named), named
    assert NOTEBOOK.read_text() == json.dumps(json.loads(NOTEBOOK.read_text()), indent=1, ensure_ascii=False) + "\n"
    assert os.path.getsize(NOTEBOOK) < 20_000
