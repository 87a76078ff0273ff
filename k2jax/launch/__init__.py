"""What starts a run on many hosts: the files of `tools/launch.py`, and what `python -m k2jax.preflight` looks at."""
