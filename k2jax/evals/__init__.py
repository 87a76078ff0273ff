"""Evaluation of a run's checkpoints: what is measured, and the append-only record of it."""
