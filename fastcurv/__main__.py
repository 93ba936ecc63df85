"""`python -m fastcurv` is the command `fastcurv`."""

import sys

from fastcurv.cli import main

if __name__ == "__main__":
    sys.exit(main())
