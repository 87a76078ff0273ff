"""Stores in buckets, on real servers: written, read, verified, written over."""

import numpy as np
import pytest
from test_store import documents, write  # noqa: F401

from k2jax import bucket
from k2jax.data.store import Store
from k2jax.errors import ConfigError, StorageError


def test_a_store_in_a_bucket(server, tmp_path, documents):  # noqa: F811
    url = f"{server.bucket()}/data/a #1%20b"
    write(tmp_path / "s", documents)
    with pytest.raises(ConfigError, match="no store.json: it is unfinished"):
        Store.open(url)
    write(url, documents)
    there, here = Store.open(url, verify="sha256"), Store.open(tmp_path / "s")
    assert there.root_digest == here.root_digest and there.path == url
    np.testing.assert_array_equal(there.read([5, 900], 100), here.read([5, 900], 100))
    assert there.document(3) == here.document(3) and there.find_documents(here.document(3)["id"]) == [3]
    folder = bucket.at(url)
    [shard, *_] = [key for key in folder.keys() if key.startswith("tokens/c")]
    damaged = bytearray((folder / shard).read_bytes())
    damaged[len(damaged) // 3] ^= 1
    (folder / shard).put(bytes(damaged))
    with pytest.raises(ConfigError, match=r"tokens/c.*SHA-256"):
        Store.open(url, verify="sha256")
    with pytest.raises(StorageError, match="cannot read the window"):
        store = Store.open(url)
        for start in range(0, store.num_tokens - 100, 100):
            store.read([start], 100)
    (folder / shard).unlink()
    with pytest.raises(ConfigError, match="tokens/c.*no file"):
        Store.open(url)
    write(url, documents, overwrite=True)
    assert Store.open(url, verify="sha256").root_digest == here.root_digest
