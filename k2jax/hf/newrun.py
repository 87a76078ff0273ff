"""The run directory that an import leaves: checkpoint 0, what explains it, and an experiment to train on with."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from k2jax import config as configuration
from k2jax.data.epochs import new_epoch, write_epoch
from k2jax.data.launches import write_launches
from k2jax.data.tokenizer import tokenizer_sha256
from k2jax.errors import ConfigError
from k2jax.files import write_text
from k2jax.hf import side_files
from k2jax.hf.families import HfModel
from k2jax.hf.untrusted import StoredTensor
from k2jax.run import drift
from k2jax.run.chat_template import of_side_files
from k2jax.run.checkpoint import Checkpoints
from k2jax.run.directory import environment
from k2jax.run.fork import new_name
from k2jax.run.state import TrainState

MAX_SEQUENCE_LENGTH = 8192  # that experiment.py proposes, however long the model's context
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Source(NamedTuple):
    """A folder that was found to be what its config.json says; no weight is read yet."""

    folder: Path
    config: dict[str, Any]  # config.json as found
    hf: HfModel
    weights: dict[str, StoredTensor]
    eos_id: int
    tokenizer: Path
    side_files: dict[str, str]  # by name, see side_files.py
    base_model: str | None = None  # its name on the hub, if that is known

    @property
    def dtype(self) -> str:
        """Of the weights: "bfloat16", or "bfloat16, float32" where they are mixed."""
        return ", ".join(sorted({DTYPE_NAMES[stored.dtype] for stored in self.weights.values()}))


def write_run(
    run: Path, source: Source, params: dict[str, jax.Array], files: dict[str, str], name: str
) -> dict[str, Any]:
    """All of the run directory, in the folder `run`; returns the checkpoint's meta."""
    shutil.copyfile(source.tokenizer, run / "tokenizer.json")
    identity = tokenizer_sha256(run / "tokenizer.json")
    if identity != files["tokenizer.json"]:
        raise ConfigError(f"{source.tokenizer} has changed while it was read: import again once it stands still")
    config = saved_config(source.hf, name)
    here = environment({})
    imported = {
        "source": source.folder.resolve().name,
        "base_model": source.base_model,
        "files": files,
        "config": source.config,
        "dtype": source.dtype,
        "context": source.hf.context,
        "ignored": source.hf.ignored,
        "bos_id": side_files.bos_id(source.side_files, run / "tokenizer.json"),
    }
    kept = {"eos_id": source.eos_id, "tokenizer_sha256": identity, "side_files": source.side_files}
    origin = {"kind": "import", **kept, **imported}
    epoch = new_epoch(
        [], run=new_name(), after_step=0, config=configuration.to_dict(config), manifest=None, origin=origin
    )
    meta = {
        "epoch": epoch.name,
        "config": configuration.to_dict(config),
        "config_digest": drift.config_digest(config),
        "tokenizer_sha256": identity,
        "eos_id": source.eos_id,
        "stage": 0,
        "versions": here["versions"],
        "commit": here["commit"],
        "imported": imported,
    }
    if chat := of_side_files(source.side_files, source.folder.resolve().name):
        meta["chat"] = chat
    write_epoch(run, epoch)
    write_launches(run, [{**here, "newest_step": None}])
    write_text(run / "experiment.py", experiment(source, name))
    zero = jax.device_put(np.int32(0), params["embed_VD"].sharding)
    with Checkpoints(run, [0], log=lambda _: None) as checkpoints:
        state = TrainState(zero, zero, zero, params, {}, {})
        checkpoints.save(state, 0, data={"next_step": 1, "order": None, "journal": 0}, meta=meta)
        saved = checkpoints.wait()
        checkpoints.close()
    return saved


def saved_config(hf: HfModel, name: str) -> ConfigDict:
    """The configuration of checkpoint 0: one stage of no data, that gives rope base and context to readers."""
    config = configuration.base().unlock()
    config.name, config.model = name, hf.model
    config.stages = (configuration.stage(name="imported", rope_base=hf.rope_base, sequence_length=hf.rows),)
    return config.lock()


EXPERIMENT = '''"""{name}: trains on from weights that were imported from Hugging Face's format.

Fill in what is marked below: the data, how long, how fast. The stores must be made with the tokenizer.json beside this
file, and end each document with token {eos_id}.
Command: python -m k2jax.train --config=THIS FILE --workdir=THIS FOLDER
"""

from pathlib import Path

from ml_collections import ConfigDict

from k2jax import config


def get_config() -> ConfigDict:
    c = config.base()
    c.name = "{name}"
    # The model that was imported: these keys stay.
{model}
    c.data.root = "data"  # fill in: the folder with a store for each subset of the mix
    c.data.tokenizer = str(Path(__file__).resolve().parent / "tokenizer.json")
    c.stages = (
        config.stage(
            name="stage1",
            sequence_length={sequence_length},  # the model's context is {context}
            rope_base={rope_base!r},
            rows_per_step=64,  # fill in, as the five below: nothing of this is known to be good
            steps_per_chunk=100,
            chunks=10,
            lr_peak=1e-5,
            lr_final=1e-6,
            warmup_steps=50,
            mix={{}},  # fill in: {{subset: repeats}}, such as {{"web": 1, "code": 2}}
        ),
    )
    return c
'''


def experiment(source: Source, name: str) -> str:
    """The text of experiment.py. It is code: of the folder's own, only numbers and flags enter."""
    hf = source.hf
    keys = configuration.flatten({"model": configuration.to_dict(hf.model)})
    fixed = {key: value for key, value in keys.items() if key not in configuration.FREE_KEYS}
    return EXPERIMENT.format(
        name=name,
        eos_id=source.eos_id,
        model="\n".join(f"    c.{key} = {value!r}" for key, value in fixed.items()),
        sequence_length=min(hf.rows, MAX_SEQUENCE_LENGTH),
        context=hf.context,
        rope_base=hf.rope_base,
    )
