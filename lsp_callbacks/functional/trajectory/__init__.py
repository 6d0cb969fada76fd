"""The training map and its products along the run."""
