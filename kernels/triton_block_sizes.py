"""How the Triton kernels of flash attention cut their work: the sizes, their checks, and a table of good ones."""

from dataclasses import dataclass
from typing import ClassVar

SMALLEST = 16  # side of a product on the matrix units
HOPPER = ("H100", "H200", "H800", "H20", "GH200")  # in the name of the device


@dataclass(frozen=True)
class Cut:
    """How one kernel cuts its work: positions of a block, warps of a program, blocks on their way from HBM at once."""

    queries: int
    keys: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name in ("queries", "keys"):
            size = getattr(self, name)
            if size < SMALLEST or size & (size - 1):
                raise ValueError(f"Cut.{name}={size} must be a power of two, {SMALLEST} or more")
        if self.warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"Cut.warps={self.warps} must be a power of two, 16 or less")
        if self.stages < 1:
            raise ValueError(f"Cut.stages={self.stages} must be positive")


@dataclass(frozen=True)
class BlockSizes:
    """How each of the three kernels cuts its work. Raises ValueError where one cannot be cut so."""

    forward: Cut
    dkv: Cut
    dq: Cut
    resident: ClassVar[int] = 1 << 30  # rows of any length are taken whole

    @property
    def unit(self) -> int:
        """A row's length is a multiple of it, once padded."""
        return max(size for cut in (self.forward, self.dkv, self.dq) for size in (cut.queries, cut.keys))


# Of bfloat16, by the generation and whether heads are wider than 128. Not measured on a GPU yet: the largest within its
# shared memory for which ptxas spills no more than 32 bytes a thread and leaves wgmma in flight, and three stages where
# they fit: PTX then waits for a block with the next still on its way, at two it waits for all.
TABLE = {
    ("hopper", False): BlockSizes(Cut(128, 128, 8, 3), Cut(64, 128, 8, 3), Cut(128, 64, 8, 3)),
    ("hopper", True): BlockSizes(Cut(128, 32, 8, 3), Cut(16, 64, 8, 3), Cut(64, 32, 8, 3)),
    ("a100", False): BlockSizes(Cut(128, 64, 8, 3), Cut(64, 64, 8, 3), Cut(128, 32, 8, 3)),
    ("a100", True): BlockSizes(Cut(64, 32, 8, 3), Cut(32, 32, 8, 3), Cut(32, 32, 4, 3)),
    ("other", False): BlockSizes(Cut(128, 32, 8, 3), Cut(32, 64, 8, 3), Cut(64, 32, 4, 3)),
    ("other", True): BlockSizes(Cut(64, 32, 8, 2), Cut(32, 32, 8, 2), Cut(32, 32, 4, 2)),
}


def block_sizes(device_kind: str, head_dim: int, itemsize: int) -> BlockSizes:
    """Of the table. float32 is multiplied in full, without the matrix units, in blocks that fit all GPUs since Ampere.

    Args:
        itemsize: of q, k and v.
    """
    if itemsize > 2:
        return BlockSizes(*[Cut(32, 32, 4, 1) if head_dim <= 128 else Cut(16, 16, 4, 1)] * 3)
    named = {"hopper": HOPPER, "a100": ("A100", "A800", "A30")}
    generation = next((g for g, names in named.items() if any(name in device_kind for name in names)), "other")
    return TABLE[generation, head_dim > 128]
