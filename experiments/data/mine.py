"""A folder of your own: documents as JSON lines, {"text": ...} each. The README's "Train on your own folder".

    python tools/prepare_data.py --config=experiments/data/mine.py --out=data/mine

Copy it, and change what is yours: every key of a subset, and what it does, is in k2jax/prepare/recipe.py.
"""

from ml_collections import ConfigDict

from k2jax.prepare.recipe import base, subset


def get_config() -> ConfigDict:
    c = base()
    # Trained on these documents, which must be enough for it: some 2 MB for 8,192 ids. K2-1B's has 32,018; or name a
    # tokenizer that there is: c.tokenizer = "folder/tokenizer.json". An experiment's model.vocab_size is no smaller.
    c.vocab_size = 8192
    c.validation_fraction = 0.01  # of each store, held out; it must be some windows of sequence_length
    # A name of its own for each kind of text, whose loss and share of the mix you want to see. Other files are
    # "parquet:folder", "text:folder"; text under another key is text_key="content"; repeats=2 reads it twice as often.
    c.subsets.documents = subset("jsonl:mine", min_document_bytes=100)
    return c
