"""What goes wrong while a run runs, and what a run must make of it. See runs.py."""
