"""How the Mosaic GPU kernels of flash attention cut their work: the sizes, their checks, and a table of good ones."""

from dataclasses import dataclass, replace
from typing import ClassVar

ROWS = 64  # of a product of one warpgroup (wgmma); blocks are multiples of it
WIDEST = 256  # head; also the widest result of a wgmma
WIDE = 128  # heads beyond it leave a warpgroup no registers for the gradients of both keys and values
SHARED_MEMORY = 227 << 10  # bytes of a program on Hopper
REDUCTIONS = 2048  # bytes of it that Mosaic takes for sums across a warpgroup


@dataclass(frozen=True)
class Cut:
    """How one kernel cuts its work: positions of a block, blocks on their way from HBM at once.

    `ahead`: forward and dq, a warpgroup does the softmax of a block while the matrix units do the last product of the
    block before it, for which it keeps that block's weights; dkv, both last products of a block are awaited together.
    Takes registers. Not measured yet.
    """

    queries: int
    keys: int
    stages: int
    ahead: bool = False

    def __post_init__(self) -> None:
        for name in ("queries", "keys"):
            if getattr(self, name) not in (ROWS, 2 * ROWS):
                raise ValueError(f"Cut.{name}={getattr(self, name)} must be {ROWS} or {2 * ROWS}")
        if self.stages < 2:
            raise ValueError(f"Cut.stages={self.stages} must be 2 or more: the next block comes while one is computed")


@dataclass(frozen=True)
class BlockSizes:
    """How each of the three kernels cuts its work, for heads up to `head_dim` wide. ValueError where one cannot be.

    A program of forward and of dq holds a block of queries, one of dkv a block of keys, of which a warpgroup has ROWS;
    for heads wider than WIDE both warpgroups of dkv have the same.
    """

    forward: Cut
    dkv: Cut
    dq: Cut
    head_dim: int
    resident: ClassVar[int] = 1 << 30  # rows of any length are taken whole

    def __post_init__(self) -> None:
        if self.head_dim % ROWS or not 0 < self.head_dim <= WIDEST:
            raise ValueError(f"BlockSizes.head_dim={self.head_dim} must be a multiple of {ROWS}, {WIDEST} at most")
        for name, cut in (("forward", self.forward), ("dq", self.dq)):
            if cut.ahead and cut.queries == ROWS:
                raise ValueError(f"BlockSizes.{name}: ahead takes two warpgroups: {2 * ROWS} queries, not {ROWS}")
        if self.apart and self.dkv.ahead:
            raise ValueError(f"BlockSizes.dkv: ahead awaits two products, one is there for heads wider than {WIDE}")
        if self.apart and self.dkv.keys != ROWS:
            raise ValueError(f"BlockSizes.dkv: blocks of {self.dkv.keys} keys: {ROWS} for heads wider than {WIDE}")
        for kernel, found in self.shared_bytes().items():
            if found > SHARED_MEMORY:
                raise ValueError(f"BlockSizes.{kernel} takes {found} bytes of shared memory of {SHARED_MEMORY}")

    def ahead(self) -> "BlockSizes":
        """With `Cut.ahead` of each kernel that can."""
        able = {"forward": self.forward.queries > ROWS, "dkv": not self.apart, "dq": self.dq.queries > ROWS}
        return replace(self, **{name: replace(getattr(self, name), ahead=True) for name, can in able.items() if can})

    @property
    def apart(self) -> bool:
        """Whether one warpgroup sums the gradient of the keys and the other that of the values."""
        return self.head_dim > WIDE

    @property
    def unit(self) -> int:
        """A row's length is a multiple of it, once padded."""
        return max(size for cut in (self.forward, self.dkv, self.dq) for size in (cut.queries, cut.keys))

    def shared_bytes(self) -> dict[str, int]:
        """Of each kernel's program: the blocks that it holds and those on their way, each a pair; barriers left out."""
        row = 2 * self.head_dim  # bytes; numbers of 16 bits
        f, dkv, dq = self.forward, self.dkv, self.dq
        return {
            "forward": REDUCTIONS + f.queries * row + f.stages * f.keys * (2 * row + 4),
            "dkv": REDUCTIONS + 2 * dkv.keys * row + dkv.stages * dkv.queries * (2 * row + 12),
            "dq": REDUCTIONS + 2 * dq.queries * row + dq.stages * dq.keys * (2 * row + 4),
        }


# By the head's width. At 128 the three kernels together have 0.87 to 0.93 of cuDNN's speed on an H200; other cuts and
# widths were not measured yet.
TABLE = {
    64: BlockSizes(Cut(128, 128, 3), Cut(64, 128, 3), Cut(128, 128, 3), 64),
    128: BlockSizes(Cut(128, 128, 2), Cut(64, 128, 3), Cut(128, 64, 3), 128),
    192: BlockSizes(Cut(128, 64, 3), Cut(64, 64, 3), Cut(128, 64, 2), 192),
    256: BlockSizes(Cut(128, 64, 2), Cut(64, 64, 2), Cut(64, 64, 2), 256),
}


def block_sizes(head_dim: int) -> BlockSizes:
    """Of the table; ValueError for a head that is too wide."""
    if head_dim > WIDEST:
        raise ValueError(f"flash attention takes heads of {WIDEST} at most, not {head_dim}")
    return TABLE[-(-head_dim // ROWS) * ROWS]
