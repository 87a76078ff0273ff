"""Runs a stage's tasks: on processes of this machine, on Ray, on Slurm."""
