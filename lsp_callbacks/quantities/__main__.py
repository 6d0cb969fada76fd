"""Print the tables of the documentation: ``python -m lsp_callbacks.quantities [NAME ...]``."""

from __future__ import annotations

import sys

from lsp_callbacks.quantities.tables import key_table, quantity_table, registry, summary


def main(names: list[str]) -> None:
    """Print the table of all quantities, then the keys of each; with names, of these alone."""
    chosen = names or list(registry())
    print(quantity_table(chosen))
    for name in chosen:
        print(f"\n## `{name}`\n\n{summary(registry()[name])}\n\n{key_table(name)}")


if __name__ == "__main__":
    main(sys.argv[1:])
