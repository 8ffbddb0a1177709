"""What LlamaGen's, VA-pi's and Janus's own code answer to random weights, into small files that tests/test_parity.py reads.

    python tests/golden/make.py LLAMAGEN VAPI JANUS # checkouts; VAPI is the LlamaGen/ of the VA-pi repository, "-" leaves one out

Janus's needs attrdict, einops and timm.

``problems.py`` holds the problems: sizes, seeds, inputs. The tests make the same weights and inputs again and store neither.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1]))
import janus_world
import problems
import upstream

from vapi.models import janus_files
from vapi.models.janus import Prompts

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


def janus() -> dict[str, Tensor]:
    """Logits, codes, pixels, greedy codes and prompts of deepseek's code, and the names of its tensors."""
    with tempfile.TemporaryDirectory() as folder:
        words = Path(folder) / "words"
        janus_world.write_words(words)
        (words / "config.json").write_text(janus_world.config().to_json_string(use_diff=False))
        save_file(problems.janus_state(), words / "model.safetensors")
        janus_files.write(janus_files.read(words), {}, Path(folder) / "deepseek", "deepseek")
        config = json.loads((Path(folder) / "deepseek/config.json").read_text())
        network = upstream.janus(config, problems.SIGLIP, problems.JANUS_VQ, load_file(Path(folder) / "deepseek/model.safetensors"))
        prompts = Prompts(words)
    asked = [upstream.janus_prompt(caption) for caption in problems.ASKED]
    ids = [[prompts.bos, *prompts.tokenizer.encode(text, add_special_tokens=False).ids] for text in asked]
    with torch.no_grad():
        codes = network.gen_vision_model.encode(problems.small_images())[2][2].view(2, -1)
        decoded = network.gen_vision_model.decode_code(codes, [2, problems.JANUS_VQ.code_dim, 4, 4])
    logits = [upstream.janus_logits(network, one, row) for one, row in zip(ids, problems.janus_codes(), strict=True)]
    greedy = [upstream.janus_greedy(network, one, prompts.pad, 16, problems.JANUS_GUIDANCE) for one in ids]
    names = "\n".join(sorted(name for name in network.state_dict() if "rotary_emb" not in name))
    return {
        "logits": torch.stack(logits),
        "greedy": torch.stack(greedy),
        "codes": codes,
        "decoded": decoded,
        **{f"prompt.{i}": torch.tensor(list(text.encode()), dtype=torch.uint8) for i, text in enumerate(asked)},
        "names": torch.tensor(list(names.encode()), dtype=torch.uint8),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llamagen", type=Path)
    parser.add_argument("vapi", type=Path)
    parser.add_argument("janus", type=Path)
    given = parser.parse_args()
    files = {}
    if given.llamagen != Path("-"):
        with upstream.checkout(given.llamagen):
            files |= {"generators": generators(), "tokenizers": tokenizers(), "others": perceptual() | crops()}
        with upstream.checkout(given.vapi):
            files["generators"] |= power_cosine()
            files["step"] = step(given.vapi)
    if given.janus != Path("-"):
        with upstream.checkout(given.janus):
            files["janus"] = janus()
    for name, tensors in files.items():
        small = {key: t.short() if t.dtype == torch.int64 else t for key, t in tensors.items()}
        save_file({key: tensor.contiguous() for key, tensor in small.items()}, HERE / f"{name}.safetensors")
        (HERE / f"{name}.safetensors").chmod(0o644)
    print({path.name: path.stat().st_size for path in sorted(HERE.glob("*.safetensors"))})


if __name__ == "__main__":
    main()
