"""``python -m jaxreg``: the same as the script ``jaxreg``."""

import sys

from jaxreg.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
