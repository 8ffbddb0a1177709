"""``python -m vapi.digits OUT``: rebuild the embedded data, pictures and weights, from scikit-learn's digits.

Two worlds: digits with a class each, and scenes with a caption each; ``--scenes`` builds the second alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vapi.digits import build, build_scenes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vapi.digits", description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write; it must not exist yet")
    parser.add_argument("--tiny", action="store_true", help="a minute instead of an hour: to try the road, not to use the weights")
    parser.add_argument("--pretraining-seed", type=int, default=0, help="seed of the generator's pretraining")
    parser.add_argument("--scenes", action="store_true", help="the scenes alone")
    arguments = parser.parse_args()
    try:
        if not arguments.scenes:
            build.build(arguments.out, build.TINY if arguments.tiny else build.WORLD, arguments.pretraining_seed)
        world = build_scenes.TINY if arguments.tiny else build_scenes.WORLD
        build_scenes.build(arguments.out, world, arguments.pretraining_seed)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
