"""What LlamaGen's and VA-pi's own code answer to random weights, into small files that tests/test_parity.py reads.

    python tests/golden/make.py LLAMAGEN VAPI       # checkouts; VAPI is the LlamaGen/ of the VA-pi repository

``problems.py`` holds the problems: sizes, seeds, inputs. The tests make the same weights and inputs again and store neither.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import problems
import upstream

HERE = Path(__file__).parent


def generators() -> dict[str, Tensor]:
    """Teacher-forced logits and greedy codes."""
    found: dict[str, Tensor] = {}
    for name, config, condition in (("c2i", problems.CLASSES, problems.LABELS), ("t2i", problems.T2I, problems.captions())):
        network = upstream.generator(config, problems.generator_state(config))
        found[f"{name}.logits"] = upstream.teacher_forced(network, condition, problems.context(config), config.prefix)
        for guidance in problems.GREEDY:
            found[f"{name}.greedy.{guidance}"] = upstream.greedy(network, condition, config.codes, cfg_scale=guidance)
    return found


def power_cosine() -> dict[str, Tensor]:
    """VA-pi's schedule of the guidance; LlamaGen knows none."""
    network = upstream.generator(problems.CLASSES, problems.generator_state(problems.CLASSES))
    return {
        f"c2i.power-cosine.{guidance}.{power}": upstream.greedy(
            network, problems.LABELS, problems.CLASSES.codes, cfg_scale=guidance, cfg_type="power-cosine", cfg_power=power
        )
        for guidance, power in problems.POWER
    }


def tokenizers() -> dict[str, Tensor]:
    """Codes, what they were before, and images decoded."""
    found: dict[str, Tensor] = {}
    for name, config in problems.VQS.items():
        network = upstream.tokenizer(config, problems.tokenizer_state(config))
        found[f"{name}.codes"], found[f"{name}.before"] = upstream.encode(network, problems.images())
        found[f"{name}.decoded"] = upstream.decode(network, found[f"{name}.codes"], config.code_dim)[:1]
    return found


def perceptual() -> dict[str, Tensor]:
    """LPIPS of images and their mirror images."""
    with torch.no_grad():
        return {"lpips": upstream.lpips(*upstream.lpips_state(5))(problems.images(), problems.images().flip(-1)).flatten()}


def crops() -> dict[str, Tensor]:
    """ADM's centre crop, uint8 (H, W, 3)."""
    import numpy as np
    from PIL import Image

    crop = upstream.theirs("dataset.augmentation").center_crop_arr
    return {
        f"crop.{w}x{h}": torch.from_numpy(np.array(crop(Image.fromarray(problems.photo(w, h)), problems.SIDE // 2)))
        for w, h in problems.CROPS
    }


def step(path: Path) -> dict[str, Tensor]:
    """Loss and gradient of the released loop, with the draws and rewards it had."""
    torch.manual_seed(0)
    transformer = upstream.generator(problems.CLASSES, problems.generator_state(problems.CLASSES))
    tokenizer = upstream.tokenizer(problems.VQS["vq16"], problems.tokenizer_state(problems.VQS["vq16"]))
    near = upstream.lpips(*upstream.lpips_state(5))
    labels = problems.LABELS[: problems.IMAGES]
    found = upstream.released_step(path, transformer, tokenizer, near, problems.images(), labels, problems.STEP_GROUP)
    gradient = found.pop("gradient")
    return {**{f"step.{name}": tensor for name, tensor in found.items()}, **{f"gradient.{name}": g for name, g in gradient.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llamagen", type=Path)
    parser.add_argument("vapi", type=Path)
    given = parser.parse_args()
    files = {}
    with upstream.checkout(given.llamagen):
        files |= {"generators": generators(), "tokenizers": tokenizers(), "others": perceptual() | crops()}
    with upstream.checkout(given.vapi):
        files["generators"] |= power_cosine()
        files["step"] = step(given.vapi)
    for name, tensors in files.items():
        small = {key: t.short() if t.dtype == torch.int64 else t for key, t in tensors.items()}
        save_file({key: tensor.contiguous() for key, tensor in small.items()}, HERE / f"{name}.safetensors")
        (HERE / f"{name}.safetensors").chmod(0o644)
    print({path.name: path.stat().st_size for path in sorted(HERE.glob("*.safetensors"))})


if __name__ == "__main__":
    main()
