"""Readers of what a run has logged: files are parsed, and nothing in them is ever run."""
