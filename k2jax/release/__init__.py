"""A run handed over whole: a folder that a stranger can check, and its way to a hub."""
