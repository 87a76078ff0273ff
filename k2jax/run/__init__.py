"""A run on disk: its directory, checkpoints and their digests, the ledger, and how readers open a saved step."""
