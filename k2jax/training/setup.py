"""What a run is, before its first step: data opened and identified, processes compared, the derived numbers."""

from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from k2jax import config as configuration
from k2jax.data import storage
from k2jax.data.conversations import check_kind, packed
from k2jax.data.epochs import Epoch
from k2jax.data.manifest import build_manifest, is_packed, manifest_digest
from k2jax.data.order import Order
from k2jax.data.packing import VERSION
from k2jax.data.store import Store
from k2jax.data.tokenizer import load_tokenizer, tokenizer_sha256
from k2jax.errors import ConfigError
from k2jax.keys import closest
from k2jax.model.decoder import compute_dtype, num_params
from k2jax.model.flops import flops_per_token
from k2jax.parallel import cluster
from k2jax.run import chat_template, drift
from k2jax.run.directory import environment, versions
from k2jax.training.placement import state_bytes

MOST_NAMES = 20  # of stores, in a message
MOST_UNUSED = 1.05  # ids a model may have for each of the tokenizer's: vocabularies are filled up to whole tiles


def open_data(config: ConfigDict, verify: str | None = None) -> tuple[dict[str, Store], dict[str, Any]]:
    """(stores by subset, manifest). Raises ConfigError for a store or tokenizer that is not what it should be.

    `verify` as Store.open has it; None: as data.verify says.
    """
    names = sorted({name for stage in config.stages for name in stage.mix})
    root = storage.normal_path(config.data.root)
    stores = _open_stores(config, root, names, verify or config.data.verify)
    stages = [configuration.to_dict(stage) for stage in config.stages]
    for stage in stages:
        for name in stage["mix"]:
            check_kind(stage, name, stores[name])
        if is_packed(stage):
            stage |= {"packing": VERSION, "packed": packed(stage, stores, check=verify != "no")}
    manifest = build_manifest(
        stages=stages,
        stores={name: store.summary() for name, store in stores.items()},
        seed=config.seed,
        label_shift=config.data.label_shift,
    )
    found = tokenizer_sha256(config.data.tokenizer)
    if found != manifest["tokenizer_sha256"]:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer}: its SHA-256 is {found[:12]}, the stores in {root} were "
            f"made with {manifest['tokenizer_sha256'][:12]}: name the tokenizer that made them"
        )
    if config.data.eos:
        named = load_tokenizer(config.data.tokenizer, config.data.eos).eos_id
        if named != manifest["eos_id"]:
            raise ConfigError(
                f"data.eos={config.data.eos!r}: is token {named}, the documents of the stores in {root} end with "
                f"{manifest['eos_id']}: name that, or prepare the data again with eos={config.data.eos!r}"
            )
    if manifest["vocab_size"] > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size}: the stores in {root} hold token ids up to "
            f"{manifest['vocab_size'] - 1}: set it to {manifest['vocab_size']} or more"
        )
    return stores, manifest


def _open_stores(config: ConfigDict, root: str, names: list[str], verify: str) -> dict[str, Store]:
    """Those of the mixes. Where one is not there, the error says what is, and who asks for it."""
    try:
        return {name: Store.open(f"{root}/{name}", verify=verify) for name in names}
    except ConfigError:
        there = {name for name in storage.names_in(root) if "." not in name} - {"card", "stages"}
        absent = [name for name in names if name not in there]
        if not absent:
            raise
    if not there:
        raise ConfigError(
            f"data.root={config.data.root}: no store lies there ({root}): prepare the data, or name the folder where "
            "it is"
        )
    stage = next(stage.name for stage in config.stages if absent[0] in stage.mix)
    listed = ", ".join(sorted(there)[:MOST_NAMES]) + ", ..." * (len(there) > MOST_NAMES)
    others = f" (and {len(absent) - 1} more)" if absent[1:] else ""
    raise ConfigError(
        f"stage {stage!r}: its mix names store {absent[0]!r}{others}, which is not in data.root={config.data.root}"
        f"{closest(absent[0], there)}; there are {listed}: config.mix_of({config.data.root!r}) is the mix of a "
        "prepared folder"
    )


def open_same_data(config: ConfigDict) -> tuple[dict[str, Store], dict[str, Any]]:
    """`open_data` on every process, which all raise where one cannot, or has found other data than process 0.

    Process 0 lists and verifies the files for all: K2's are 84,000, ten million requests from 128 hosts.
    """
    verify = config.data.verify if cluster.is_main() else "no"
    stores, manifest = cluster.together("opens its data", lambda: open_data(config, verify))
    found = {name: store["root_digest"] for name, store in manifest["stores"].items()}
    cluster.agree("data", found | {"manifest": manifest_digest(manifest)})
    return stores, manifest


def check_processes_agree(config: ConfigDict) -> None:
    """Raises ConfigError on every process, naming key and values, where one has not what process 0 has.

    Every key counts, also those that a resume may change: each steers when something is compiled, saved or waited for.
    """
    cluster.agree("configuration", configuration.flatten(configuration.to_dict(config)) | {"versions": versions()})


def describe_run(config: ConfigDict, order: Order, mesh: Mesh, vocab_size: int) -> str:
    """The derived numbers: parameters, tokens, FLOPs, memory of the state. `vocab_size` is the stores'."""
    tokens = sum((p.last_step - p.first_step + 1) * p.rows_per_step * p.sequence_length for p in order.stages)
    params = num_params(config.model)
    lines = [
        f"{config.name}: {params:,} parameters, {order.num_steps:,} steps, {tokens:,} tokens; "
        f"compute in {compute_dtype(config)} on {mesh.devices.size} {mesh.devices.flat[0].device_kind}, "
        f"mesh {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}",
        f"state: {state_bytes(config, mesh) / 2**30:.2f} GiB a device (fp32 parameters and moments)",
    ]
    if config.model.vocab_size > vocab_size * MOST_UNUSED:
        lines.append(
            f"model.vocab_size={config.model.vocab_size}: the tokenizer has {vocab_size:,} ids: the other "
            f"{config.model.vocab_size - vocab_size:,} rows of embedding and head are computed, and learn nothing"
        )
    for plan in (stage for stage in order.stages if stage.last_step >= stage.first_step):
        flops = flops_per_token(config.model, plan.sequence_length)
        lines.append(
            f"{plan.name}: steps {plan.first_step:,} to {plan.last_step:,}, {plan.rows_per_step} rows of "
            f"{plan.sequence_length} tokens a step, {flops.causal / 1e9:.4g} GFLOP a token causal, "
            f"{flops.noncausal / 1e9:.4g} non-causal"
        )
    return "\n".join(lines)


def checkpoint_metas(
    config: ConfigDict,
    manifest: dict[str, Any],
    mesh: Mesh,
    epochs: Sequence[Epoch],
    stores: dict[str, Store],
    restored: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """What every checkpoint of this launch says of where it came from, by stage: each has the chat template that goes
    with it. `restored` is the meta of the checkpoint that the run goes on from."""
    here = environment(dict(mesh.shape))
    meta = {
        "epoch": epochs[-1].name,
        "config": configuration.to_dict(config),
        "config_digest": drift.config_digest(config),
        "manifest_digest": manifest_digest(manifest),
        "tokenizer_sha256": manifest["tokenizer_sha256"],
        "eos_id": manifest["eos_id"],
        "versions": here["versions"],
        "commit": here["commit"],
        "devices": here["devices"],
    }
    masked = [name for name, store in stores.items() if store.masked]
    before = chat_template.began_with(epochs, restored)
    chats = cluster.decide("finds chat templates", lambda: chat_template.by_stage(config, masked, before))
    return [{**meta, "chat": chat} if chat else meta for chat in chats]
