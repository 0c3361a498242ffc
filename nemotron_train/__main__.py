"""`python -m nemotron_train` does the same as the console script `nemotron-train`."""

import sys

from nemotron_train.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
