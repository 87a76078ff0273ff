"""What sources of tokens give: documents that are ids already."""

import hashlib
from typing import Any, NamedTuple

import numpy as np


class TokenDocument(NamedTuple):
    """One document, or row, of tokens."""

    ids: np.ndarray  # (n,), without EOS if `eos`
    id: str
    source: str
    metadata: dict[str, Any]
    eos: bool  # whether the store ends it with EOS
    part: str = ""  # of the subset: its store is SUBSET-PART
    held_out: bool = False


def token_document(ids: np.ndarray, *, source: str, eos: bool, **more: Any) -> TokenDocument:
    """A document with its id made of `ids`: SHA-256 (hex) of them as little-endian uint32, less the store's EOS."""
    digest = hashlib.sha256(np.ascontiguousarray(ids, "<u4").tobytes()).hexdigest()
    return TokenDocument(ids, digest, source, more.pop("metadata", {}), eos, **more)
