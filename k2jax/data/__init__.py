"""The data of a run as a function of (manifest, journal, step): stores, order, loader."""
