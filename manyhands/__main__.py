"""`python -m manyhands`: the command line."""

import sys

from manyhands.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
