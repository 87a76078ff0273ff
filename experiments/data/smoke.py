"""Real text with no download: what every Python installation holds, for experiments/smoke.py.

    python tools/prepare_data.py --config=experiments/data/smoke.py --out=data/smoke

Three subsets: library source as `code`, docstrings and package documentation as prose. Which text that is
depends on the Python and the packages installed here: figures compare on one machine, not between machines.
"""

from ml_collections import ConfigDict

from k2jax.prepare.recipe import base, subset


def get_config() -> ConfigDict:
    c = base()
    c.vocab_size = 4096
    c.tokenizer_bytes = 2_000_000
    c.validation_fraction = 0.05
    c.dedup.unit, c.dedup.n_grams, c.dedup.bands, c.dedup.hashes_per_band = "words", 5, 14, 8  # FineWeb's
    # Generated tables are long, stubs are short; neither is text to learn from.
    c.subsets.code = subset(
        "python:code", tasks=2, max_bytes=8_000_000, min_document_bytes=200, max_document_bytes=200_000
    )
    c.subsets.docstrings = subset("python:docstrings", tasks=2, max_bytes=6_000_000, min_document_bytes=200)
    c.subsets.documentation = subset(
        "python:documents", max_bytes=6_000_000, min_document_bytes=200, max_document_bytes=200_000
    )
    return c
