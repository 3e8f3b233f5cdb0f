"""A SLURM cluster: `--on slurm` writes a job script into the run folder and submits it, once or as a chain."""

from launch.backends.slurm.backend import Slurm

__all__ = ["Slurm"]
