"""``python -m pipelines``: see ``commands``."""

import sys

from pipelines.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
