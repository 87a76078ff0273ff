"""Deduplication on one rule for all subsets: `duplicates.py` is the order of its stages."""
