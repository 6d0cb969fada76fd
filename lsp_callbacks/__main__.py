"""Run the command line: ``python -m lsp_callbacks``."""

import sys

from lsp_callbacks.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
