"""`python -m opt_zoo`: the same as `opt-zoo`."""

import sys

from opt_zoo.main import main

if __name__ == "__main__":
    sys.exit(main())
