"""``python -m vapi.track JOURNAL``: the process that a run starts beside it."""

import os
import sys
from pathlib import Path

from vapi.track.sender import main

if __name__ == "__main__":
    os.nice(10)
    sys.exit(0 if main(Path(sys.argv[1])) else 1)
