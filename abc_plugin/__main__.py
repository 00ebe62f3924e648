"""``python -m abc_plugin …`` is ``abc-rlhf …``."""

import sys

from abc_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
