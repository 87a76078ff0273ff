"""Pipeline parallelism: the layers are split over the mesh axis `stage`, and microbatches pass from stage to stage.

The layers are cut into S R groups of consecutive ones (S stages, R `repeats`); group g is on stage g mod S. A batch is
cut into M microbatches along its rows. A turn is one group's work on one microbatch, on all stages at once; after each
turn every microbatch moves on by one stage, from the last to the first. Stage s works in turn t on item t - s, where
item r M + m is microbatch m on its round r; the first stage keeps a microbatch that waits for its next round.
With R = 1 this is GPipe (arXiv:1811.06965), with more the circular or interleaved order of Megatron-LM
(arXiv:2104.04473), whose bubble is R times smaller.

Axes as in model/decoder.py; M microbatches, B rows of one, S stages (no keys here), R repeats, G layers of a group.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from k2jax.errors import ConfigError
from k2jax.keys import ON_HOST
from k2jax.parallel import sharding
from k2jax.parallel.sharding import shard

Layer = Callable[..., jax.Array]  # x_BTD, arrays of one layer, rope, document_BT or None: to (B, T, D)

STAGE = PartitionSpec("stage")


def keep_computed(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of rematerialisation: keeps what is computed, not what is picked out or reshaped. That is before all
    parameters: every turn would keep a copy of a group's."""
    return primitive.name not in ("dynamic_slice", "squeeze", "reshape", "broadcast_in_dim")


def num_turns(stages: int, repeats: int, microbatches: int) -> int:
    """From the first stage's first item to the last stage's last one."""
    return repeats * microbatches + stages - 1


def bubble_fraction(config: ConfigDict, mesh: Mesh) -> float:
    """The share of turns in which a stage has no item: (S - 1) / (R M + S - 1); 0 without a pipeline."""
    p, stages = config.model.pipeline, mesh.shape["stage"]
    return (stages - 1) / num_turns(stages, p.repeats, p.microbatches)


def check(config: ConfigDict, mesh: Mesh) -> None:
    """Raises ConfigError when layers or rows cannot be cut as `model.pipeline` says, or are to be kept by the host."""
    p, layers, stages = config.model.pipeline, config.model.num_layers, mesh.shape["stage"]
    if stages == 1:
        return
    if ON_HOST in config.model.remat:  # libtpu 0.0.42 takes all turns' arrays to the host and back in every turn
        raise ConfigError(
            f"model.remat={config.model.remat!r}: no array is kept by the host where mesh.stage={stages}: take "
            f"{ON_HOST} away, or set mesh.stage=1"
        )
    if layers % (stages * p.repeats):
        raise ConfigError(
            f"model.num_layers={layers}: not divisible by mesh.stage x model.pipeline.repeats = {stages} x {p.repeats}"
        )
    if stages % p.repeats and p.repeats % stages:  # else no all-to-all takes the layers to their stages
        raise ConfigError(f"model.pipeline.repeats={p.repeats} must divide mesh.stage={stages} or be a multiple of it")
    if p.microbatches % stages:
        raise ConfigError(f"model.pipeline.microbatches={p.microbatches} must be a multiple of mesh.stage={stages}")
    parts = p.microbatches * sharding.row_parts(mesh)
    for i, row in enumerate(config.stages):
        rows = row.rows_per_step // row.microbatches
        if rows % parts:
            raise ConfigError(
                f"stages.{i}: rows_per_step={row.rows_per_step} in {row.microbatches} microbatch(es) gives {rows}, "
                f"no multiple of model.pipeline.microbatches x mesh.replica x mesh.fsdp = {parts}"
            )


def run_layers(
    layer: Layer,
    remat: Callable[[Layer], Layer],
    x_BTD: jax.Array,
    layers: Any,
    rope: Any,
    document_BT: jax.Array | None,
    m: ConfigDict,
) -> jax.Array:
    """All layers of (B, T, D), on the current mesh, which has stages. `layers`: a tree of arrays (L, ...).

    Rows come and leave split over the stages, too, so that no stage computes the head and the loss of another's.
    `remat` is jax.checkpoint with a policy that keeps no parameters of a layer: they are picked again.
    """
    mesh, p = jax.sharding.get_abstract_mesh(), m.pipeline
    stages = mesh.shape["stage"]
    cut = partial(_cut, microbatches=p.microbatches, parts=sharding.row_parts(mesh))

    of_rows = jax.tree.leaves(rope)[0].ndim == 3  # each row has positions of its own
    rope = jax.tree.map(cut, rope) if of_rows else rope

    def deal(w: jax.Array) -> jax.Array:
        """Layers in the order of stages, then rounds. Parameters keep theirs, which is that of all checkpoints: here
        they move, by an all-to-all over the stages. With R = 1 none does."""
        shape = (p.repeats, stages, -1, *w.shape[1:])
        return w.reshape(shape).swapaxes(0, 1).reshape(w.shape)

    on_stage = jax.shard_map(
        partial(_on_stage, layer=layer, remat=remat, repeats=p.repeats, unroll=max(m.unroll, 1), rope_of_rows=of_rows),
        in_specs=(STAGE, STAGE, PartitionSpec(), PartitionSpec()),
        out_specs=STAGE,
        axis_names={"stage"},  # the others stay with the partitioner
        check_vma=False,
    )
    documents_MBT = None if document_BT is None else cut(document_BT)
    x_MBTD = on_stage(cut(x_BTD), jax.tree.map(deal, layers), rope, documents_MBT)
    return _join(x_MBTD, sharding.row_parts(mesh))


def _on_stage(
    x_MBTD: jax.Array,
    layers: Any,
    rope: Any,
    document_MBT: jax.Array | None,
    *,
    layer: Layer,
    remat: Callable[[Layer], Layer],
    repeats: int,
    unroll: int,
    rope_of_rows: bool,
) -> jax.Array:
    """What the devices of one stage do, with `layers` a tree of (R G, ...), from (M/S, B, T, D) to (M/S, B, T, D)."""
    stage, stages = jax.lax.axis_index("stage"), jax.lax.axis_size("stage")
    num_layers = jax.tree.leaves(layers)[0].shape[0] // repeats  # of a turn
    waiting_MBTD = _to_first(x_MBTD)
    M = waiting_MBTD.shape[0]

    @remat
    def pick_and_apply(x_BTD: jax.Array, number: jax.Array, own: Any, document_BT: jax.Array | None) -> jax.Array:
        arrays = jax.tree.map(lambda w: w[number], layers)
        return layer(x_BTD, arrays, own, document_BT)

    def work(x_BTD: jax.Array, item: jax.Array) -> jax.Array:
        first = jnp.clip(item // M, 0, repeats - 1) * num_layers
        document_BT = None if document_MBT is None else document_MBT[item % M]
        own = jax.tree.map(lambda t: t[item % M], rope) if rope_of_rows else rope

        def step(x_BTD: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            return pick_and_apply(x_BTD, number, own, document_BT), None

        return jax.lax.scan(step, x_BTD, first + jnp.arange(num_layers), unroll=unroll)[0]

    def turn(carry: tuple[jax.Array, jax.Array], t: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        waiting_MBTD, x_BTD = carry
        x_BTD = shard(jnp.where(stage == 0, waiting_MBTD[t % M], x_BTD), "x_BTD")
        x_BTD = shard(work(x_BTD, t - stage), "x_BTD")
        x_BTD = shard(jax.lax.ppermute(x_BTD, "stage", [(s, (s + 1) % stages) for s in range(stages)]), "x_BTD")
        back = t - (stages - 1)  # the item that has come from the last stage to the first
        kept_BTD = jnp.where(back >= 0, x_BTD, waiting_MBTD[back % M])
        return (shard(waiting_MBTD.at[back % M].set(kept_BTD), "x_MBTD"), x_BTD), None

    start = waiting_MBTD, shard(jnp.zeros_like(waiting_MBTD[0]), "x_BTD")
    (done_MBTD, _), _ = jax.lax.scan(turn, start, jnp.arange(num_turns(stages, repeats, M)))
    return _from_first(done_MBTD)


# Written with permutes alone: within a shard_map over some axes, XLA runs a gather or a scatter on rows gathered from
# all the others, and its CPU compiler crashes on sums of bfloat16 (jax 0.10).


def _to_first(x_MBTD: jax.Array) -> jax.Array:
    """(M/S, B, T, D) of each stage to (M, B, T, D), which only the first stage has."""
    others = [jax.lax.ppermute(x_MBTD, "stage", [(s, 0)]) for s in range(1, jax.lax.axis_size("stage"))]
    return shard(jnp.concatenate([x_MBTD, *others]), "x_MBTD")


def _from_first(x_MBTD: jax.Array) -> jax.Array:
    """The inverse of `_to_first`."""
    first, *others = jnp.split(x_MBTD, jax.lax.axis_size("stage"))
    received = sum(jax.lax.ppermute(part, "stage", [(0, s)]) for s, part in enumerate(others, 1))
    return shard(jnp.where(jax.lax.axis_index("stage") == 0, first, received), "x_MBTD")


def _cut(x_XT: jax.Array, *, microbatches: int, parts: int) -> jax.Array:
    """(rows, T, ...) to (M, rows/M, T, ...): every microbatch has rows of each of the `parts` of the data axes."""
    tail = x_XT.shape[1:]
    return x_XT.reshape(parts, microbatches, -1, *tail).swapaxes(0, 1).reshape(microbatches, -1, *tail)


def _join(x_MBT: jax.Array, parts: int) -> jax.Array:
    """The inverse of `_cut`."""
    tail = x_MBT.shape[2:]
    return x_MBT.reshape(x_MBT.shape[0], parts, -1, *tail).swapaxes(0, 1).reshape(-1, *tail)
