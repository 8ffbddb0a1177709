"""How many operations one image costs, shared against released, for every published size: counted on shapes, no machine's business.

    python benchmarks/operations.py               # JSON on standard output, two minutes, no weights and little memory

LlamaGen with VQ-16 and LPIPS on VGG-16, eight draws per image. ``ratio`` is what ``vapi bench tune`` measures; with
``unused_base`` the released run's frozen base model counts too, which it forwards and whose divergence it never uses.
"""

from __future__ import annotations

import datetime
import json

import torch

from vapi.bench import world

GROUP = 8
CASES = [  # of classes, or of captions of 120 positions
    ("GPT-B", 256, False), ("GPT-L", 256, False), ("GPT-XL", 384, False), ("GPT-XXL", 384, False), ("GPT-3B", 384, False),
    ("GPT-XL", 256, True), ("GPT-XL", 512, True),
]  # fmt: skip


def case(size: str, image_size: int, captions: bool) -> dict[str, object]:
    """Operations per image in units of 1e12."""
    counted = world.count_published(size, image_size, captions)
    shared, released = counted.shared(GROUP), counted.released(GROUP)
    base = counted.released(GROUP, base=True)

    def tera(operations: dict[str, int]) -> dict[str, float]:
        return {name: round(count / 1e12, 3) for name, count in operations.items()}

    return {
        "size": size,
        "image_size": image_size,
        "captions": captions,
        "forward": round(counted.forward / 1e12, 4),
        "shared": tera(shared),
        "released": tera(released),
        "transformer_ratio": round(released["transformer"] / shared["transformer"], 2),
        "ratio": round(sum(released.values()) / sum(shared.values()), 2),
        "ratio_with_unused_base": round(sum(base.values()) / sum(shared.values()), 2),
    }


def main() -> None:
    about = {"date": datetime.date.today().isoformat(), "command": "python benchmarks/operations.py", "torch": torch.__version__}
    print(json.dumps({**about, "group_size": GROUP, "unit": "1e12 operations per image", "cases": [case(*one) for one in CASES]}, indent=1))


if __name__ == "__main__":
    main()
