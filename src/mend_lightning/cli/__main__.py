"""`python -m mend_lightning.cli` is `mend-lightning`."""

import sys

from mend_lightning.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
