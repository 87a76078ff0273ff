"""Where arrays live: one device mesh, and one table from logical axes to mesh axes.

Notation in comments, after the scaling book: `A[I_X, J]` is an array whose logical axis I is split over mesh axis X.
Parameters and activations name logical axes only; this file alone knows the mesh.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from k2jax.errors import ConfigError

AnyMesh = TypeVar("AnyMesh", Mesh, AbstractMesh)
MESH_AXES = ("replica", "stage", "fsdp", "context", "tensor")
COPY = "copy"  # an axis more of meshes whose replicas cannot all split the moments: see split_replicas
DATA_AXES = (COPY, "replica", "fsdp")  # a global batch is split over them; gradients are summed over them

# Logical axis -> mesh axes. A parameter's width is split over fsdp, an activation's ("width") is not: its batch is.
# Devices that share a row (context) hold other parts of the parameters, too: to parameters they are more of fsdp.
RULES: dict[str, tuple[str, ...]] = {
    "batch": DATA_AXES,
    "rows": (*DATA_AXES, "stage"),  # a batch outside the layers: what no stage computes for another
    "microbatch": (),
    "position": ("context",),
    "width": (),
    "layers": ("stage",),
    "norm": (),
    "embed": ("fsdp", "context"),
    "head_dim": (),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
}

# Activations that the model pins, by the name they have in model/decoder.py.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "x_BTD": ("batch", "position", "width"),
    "rows_BTD": ("rows", "position", "width"),
    "x_MBTD": ("microbatch", "batch", "position", "width"),
    "q_BTNH": ("batch", "position", "heads", "head_dim"),
    "k_BTKH": ("batch", "position", "kv_heads", "head_dim"),
    "q_BTE": ("batch", "position", "heads"),  # all of them side by side
    "cache_BKSH": ("batch", "kv_heads", "position", "head_dim"),
    "h_BTF": ("batch", "position", "ffn"),
    "tokens_BT": ("batch", "position"),
    "scores_BV": ("batch", "width"),  # whole rows: one gather before sampling and not one for each of its sums
}


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh` over all devices; one size may be -1, an axis that is left out is 1.

    Raises ConfigError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {**dict.fromkeys(MESH_AXES, 1), **sizes}
    shape = [sizes[axis] for axis in MESH_AXES]
    if -1 in shape:
        rest = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = len(devices) // rest if len(devices) % rest == 0 else 0
    if math.prod(shape) != len(devices):
        raise ConfigError(
            f"mesh {sizes} needs {_needs(sizes)} devices, this run has {len(devices)} "
            f"({devices[0].device_kind}): set {', '.join(f'mesh.{axis}' for axis in MESH_AXES)} to multiply to it"
        )
    if devices[0].platform == "cpu":
        return Mesh(np.asarray(devices).reshape(shape), MESH_AXES)
    slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(slices) == 1 or devices[0].platform != "tpu":  # a GPU's index is its host's: in order they lie well
        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), MESH_AXES)
    if len(set(slices.values())) > 1:
        raise ConfigError(
            f"{len(devices)} devices on {len(slices)} slices, {min(slices.values())} on one and "
            f"{max(slices.values())} on another: a mesh takes as many of each"
        )
    across = _across_slices(dict(zip(MESH_AXES, shape, strict=True)), len(slices))
    within = [size // parts for size, parts in zip(shape, across, strict=True)]
    return Mesh(
        mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True), MESH_AXES
    )


def split_replicas(mesh: AnyMesh, parts: int) -> AnyMesh:
    """The same mesh, of whose replicas only so many split what they have in common; all such groups have copies of it.

    An axis splits a dimension or does not: 15 replicas do nothing to 80 layers, 3 copies of 5 split them by 5.
    """
    replicas, *others = mesh.axis_sizes
    sizes, axes = (replicas // parts, parts, *others), (COPY, *MESH_AXES)
    if parts == replicas:
        return mesh
    return AbstractMesh(sizes, axes) if isinstance(mesh, AbstractMesh) else Mesh(mesh.devices.reshape(sizes), axes)


def _across_slices(sizes: Mapping[str, int], slices: int) -> list[int]:
    """Of every mesh axis, how many parts of it lie in slices of their own: `replica` crosses them, then `stage`.

    Raises ConfigError where those two cannot be cut into as many parts as there are slices.
    """
    replicas = math.gcd(sizes["replica"], slices)
    stages = slices // replicas
    if sizes["stage"] % stages:
        raise ConfigError(
            f"mesh.replica={sizes['replica']} on {slices} slices: replicas lie across slices, and no axis but stage "
            f"else: set mesh.replica to a multiple of {slices}, or mesh.stage={sizes['stage']} to one of {stages}"
        )
    return [{"replica": replicas, "stage": stages}.get(axis, 1) for axis in MESH_AXES]


def _needs(sizes: Mapping[str, int]) -> str:
    fixed = math.prod(sizes[axis] for axis in MESH_AXES if sizes[axis] != -1)
    return f"a multiple of {fixed}" if -1 in [sizes[axis] for axis in MESH_AXES] else str(fixed)


def spec(axes: tuple[str, ...]) -> PartitionSpec:
    """The partition of an array whose dimensions are these logical axes, over the mesh axes that are not manual here:
    within a replica, or a pipeline's stage, arrays are that one's alone."""
    left_out = _left_out(jax.sharding.get_abstract_mesh())
    parts = [tuple(axis for axis in RULES[name] if axis not in left_out) for name in axes]
    used = [axis for part in parts for axis in part]
    assert len(used) == len(set(used)), f"a mesh axis is used twice by {axes}"
    return PartitionSpec(*[part if len(part) > 1 else part[0] if part else None for part in parts])


def _left_out(mesh: Mesh | AbstractMesh) -> set[str]:
    return set(mesh.manual_axes) | ({COPY} - set(mesh.axis_names))


def data_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Those that split the rows of a batch there."""
    return tuple(axis for axis in DATA_AXES if axis not in _left_out(mesh))


def optimizer_spec(shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of an optimizer moment: its parameter's, and split over every data axis but copies besides.

    The data axes that the parameter does not use go to the first dimension that they divide; an array too small to
    be cut (a norm's weights on a large mesh) stays as its parameter is.
    """
    parts = [list(RULES[axis]) for axis in axes]
    for free in [axis for axis in ("replica", "fsdp", "context") if axis not in sum(parts, [])]:
        for size, part in zip(shape, parts, strict=True):
            if size % (math.prod(mesh.shape[a] for a in part) * mesh.shape[free]) == 0:
                part.append(free)
                break
    return PartitionSpec(*[tuple(part) if part else None for part in parts])


def check_divisible(name: str, shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh) -> None:
    """Raises ConfigError naming array, dimension and mesh axis when the mesh does not divide a dimension."""
    for size, axis in zip(shape, axes, strict=True):
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in RULES[axis])
        if size % parts:
            over = " x ".join(f"mesh.{a}={mesh.shape[a]}" for a in RULES[axis])
            raise ConfigError(
                f"{name}: its dimension {axis!r} of {size} is not divisible by {over}: "
                f"change the mesh or the size"
            )


def device_kind() -> str:
    """That of the mesh in use, which may be of devices that are not here; else of the one here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def platform() -> str:
    """JAX's backend of those devices: cpu, gpu (NVIDIA's and AMD's), tpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.devices()[0] if device is None else device).platform


def kernel_platform() -> str:
    """That for which there are attention kernels: tpu; gpu for NVIDIA's since Ampere, whose names begin so (older ones
    are called Tesla or Quadro); cpu. The device's own name otherwise."""
    kind = device_kind()
    prefixes = {"TPU": "tpu", "NVIDIA": "gpu"}
    return next((platform for prefix, platform in prefixes.items() if kind.startswith(prefix)), kind)


def shard(x: jax.Array, name: str) -> jax.Array:
    """Pins an activation to its place in the table on the current mesh (`jax.set_mesh`); nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(ACTIVATIONS[name]))


def replicated(x: jax.Array) -> jax.Array:
    """Whole on every device of the current mesh, so that every process can read it; as it is without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def row_parts(mesh: Mesh | AbstractMesh) -> int:
    """Among how many devices, or groups of them, the rows of a microbatch are split there."""
    return math.prod(mesh.shape[axis] for axis in data_axes(mesh))


def num_stages() -> int:
    """Of the pipeline, on the current mesh; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["stage"]


def named(mesh: Mesh, axes: tuple[str, ...]) -> NamedSharding:
    return NamedSharding(mesh, spec(axes))
