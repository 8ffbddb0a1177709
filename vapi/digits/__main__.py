"""``python -m vapi.digits OUT``: rebuild the embedded data, pictures and weights, from scikit-learn's digits.

Two worlds: digits with a class each, and scenes with a caption each; ``--scenes`` builds the second alone.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

SCENES = ["build_scenes", "build_janus", "build_clip"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vapi.digits", description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write; what is built must not be in it yet")
    parser.add_argument("--tiny", action="store_true", help="a minute instead of an hour: to try the road, not to use the weights")
    parser.add_argument("--pretraining-seed", type=int, default=0, help="seed of the generator's pretraining")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--scenes", dest="parts", action="store_const", const=SCENES, help="the scenes alone")
    one.add_argument("--janus", dest="parts", action="store_const", const=["build_janus"], help="the Janus alone, to scenes that are there")
    one.add_argument("--clip", dest="parts", action="store_const", const=["build_clip"], help="the CLIP alone, to scenes that are there")
    parser.set_defaults(parts=["build", *SCENES])
    arguments = parser.parse_args()
    try:
        # all before the first: whether the library that Janus and CLIP need is there is known at once
        for part in [importlib.import_module(f"vapi.digits.{name}") for name in arguments.parts]:
            part.build(arguments.out, part.TINY if arguments.tiny else part.WORLD, arguments.pretraining_seed)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
