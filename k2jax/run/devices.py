"""What each device answers by itself, and which one has another answer than its like.

Copies of an array: every device digests the part that it holds, without a word to the others, and those that hold the
same part are compared. A self-test: every device works out the same known problem. Values travel by the control plane.
"""

import socket
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from k2jax.errors import NumericsError
from k2jax.parallel import cluster
from k2jax.run.digest import array_digest, numpy_digest
from k2jax.stability.sdc import odd_ones

SIZE, ROUNDS = 512, 8  # of the self-test: matrices of SIZE x SIZE, each product goes into the next


class Answer(NamedTuple):
    """Of a device."""

    values: tuple[int, ...]  # uint32
    kind: str
    process: int
    host: str


def of_each(what: str, values: jax.Array) -> dict[int, Answer]:
    """{device id: what it holds of an array of 4-byte numbers, as bits}, of all devices, on every process."""

    def own() -> list[Any]:
        told = {}
        for shard in values.addressable_shards:
            bits = np.asarray(shard.data).reshape(-1).view(np.uint32)
            told[str(shard.device.id)] = ["".join(f"{int(v):08x}" for v in bits), shard.device.device_kind]
        return [socket.gethostname(), told]

    found = {}
    for process, (host, told) in enumerate(cluster.gather(what, own)):
        for device, (text, kind) in told.items():
            numbers = tuple(int(text[at : at + 8], 16) for at in range(0, len(text), 8))
            found[int(device)] = Answer(numbers, kind, process, host)
    return found


def named(devices: list[int], answers: Mapping[int, Answer]) -> str:
    """Devices, their processes and hosts, at most eight of them."""
    told = [f"device {i} (process {answers[i].process} on {answers[i].host})" for i in devices[:8]]
    return ", ".join(told) + (f" and {len(devices) - 8} more" if len(devices) > 8 else "")


def _everywhere(mesh: Mesh) -> PartitionSpec:
    """One column a device."""
    return PartitionSpec(None, mesh.axis_names)


# ---- copies ----------------------------------------------------------------------------------------------------------


def check_copies(arrays: Mapping[str, jax.Array], what: str) -> None:
    """Raises NumericsError on every process, naming array and device, where copies of one array differ.

    Of arrays that no two devices have a part of in common nothing is read; with one device nothing is done.
    """
    copied = {name: x for name, x in arrays.items() if len(_holders(x)) < len(x.sharding.device_set)}
    if not copied:
        return
    answers = of_each("digests its copies", _digests(copied))
    for at, (name, x) in enumerate(copied.items()):
        for devices in _holders(x).values():
            odd = odd_ones({device: answers[device].values[at] for device in devices})
            if odd:
                others = [device for device in devices if device not in odd]
                than = f"{named(others, answers)}, which agree" if others else "one another"
                raise NumericsError(
                    f"{what}: {named(odd, answers)} hold{'s' if len(odd) == 1 else ''} other bits of {name} than "
                    f"{than}: silent corruption; nothing is saved. Take what is odd out of use: the same command goes "
                    f"on from the newest checkpoint"
                )


def _holders(x: jax.Array) -> dict[Any, list[int]]:
    """{a part of the array: ids of the devices that hold it}."""
    found: dict[Any, list[int]] = {}
    for device, index in x.sharding.devices_indices_map(x.shape).items():
        found.setdefault(tuple(s.indices(n) for s, n in zip(index, x.shape, strict=True)), []).append(device.id)
    return found


def _digests(arrays: dict[str, jax.Array]) -> jax.Array:
    """uint32 (arrays, devices): of what each device holds."""
    mesh = next(iter(arrays.values())).sharding.mesh
    return _digest_program(mesh, tuple(x.sharding.spec for x in arrays.values()))(*arrays.values())


@cache
def _digest_program(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Any:
    def own(*parts: jax.Array) -> jax.Array:
        return jnp.stack([array_digest(part) for part in parts])[:, None]

    return jax.jit(
        jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=_everywhere(mesh), check_vma=False)
    )


# ---- self-test -------------------------------------------------------------------------------------------------------


def check_devices(mesh: Mesh, what: str) -> None:
    """Raises NumericsError on every process, naming the device, where one fails the self-test.

    Its products are of integers, whose answer is known; its exponentials and sums are those of others of its kind.
    """
    answers = of_each("tests its devices", _test_program(mesh)(jnp.int32(0)))
    wrong = [device for device, answer in answers.items() if answer.values[0] != known_answer()]
    for kind in {answer.kind for answer in answers.values()}:
        wrong += odd_ones({device: answer.values for device, answer in answers.items() if answer.kind == kind})
    if wrong:
        raise NumericsError(
            f"{what}: the self-test of {named(sorted(set(wrong)), answers)} gave another answer than it must: take it "
            f"out of use; nothing is saved since, and the same command goes on from the newest checkpoint"
        )


def problem(product: Any, numbers: Any, zero: Any) -> tuple[jax.Array, jax.Array]:
    """(float32 matrix of small integers, what exponentials and sums make of it), by jax.numpy or numpy."""
    row, column = numbers.arange(SIZE)[:, None] + zero, numbers.arange(SIZE)[None, :]
    weight = ((row * 31 + column * 17 + row * column) % 7 - 3).astype(numbers.float32)
    x = ((row * 13 + column * 29) % 5 - 2).astype(numbers.float32)
    for _ in range(ROUNDS):
        x = product(weight, x) % 7 - 3  # sums of SIZE products up to 12: exact in float32
    y = numbers.exp(x / 3) / (1 + numbers.exp(x.T / 5))
    return x, (y / y.sum(axis=0)).sum(axis=1)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """By the matrix units: integers up to 256 are bfloat16's."""
    return jnp.matmul(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def own_answer(zero: jax.Array) -> jax.Array:
    """uint32 (2, 1), on each device. `zero` is an input, so that no compiler works the answer out."""
    exact, rounded = problem(_product, jnp, zero)
    return jnp.stack([array_digest(exact), array_digest(rounded)])[:, None]


@cache
def _test_program(mesh: Mesh) -> Any:
    return jax.jit(
        jax.shard_map(own_answer, mesh=mesh, in_specs=PartitionSpec(), out_specs=_everywhere(mesh), check_vma=False),
        out_shardings=NamedSharding(mesh, _everywhere(mesh)),
    )


@cache
def known_answer() -> int:
    return numpy_digest(problem(np.matmul, np, 0)[0].astype(np.float32))
