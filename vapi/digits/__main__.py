"""``python -m vapi.digits OUT``: rebuild the embedded data, pictures and weights, from scikit-learn's digits."""

from __future__ import annotations

import argparse
from pathlib import Path

from vapi.digits.build import TINY, WORLD, build


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vapi.digits", description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write; it must not exist yet")
    parser.add_argument("--tiny", action="store_true", help="a minute instead of an hour: to try the road, not to use the weights")
    parser.add_argument("--pretraining-seed", type=int, default=0, help="seed of the generator's pretraining")
    arguments = parser.parse_args()
    try:
        build(arguments.out, TINY if arguments.tiny else WORLD, arguments.pretraining_seed)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
