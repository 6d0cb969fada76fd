"""One training step, held still: what it was, and how it is computed again."""
