"""Ours against LlamaGen's and VA-pi's own code at full size, in float32, on random weights. JSON on standard output.

    python benchmarks/parity.py LLAMAGEN VAPI        # checkouts; VAPI is the LlamaGen/ of the VA-pi repository
    python benchmarks/parity.py LLAMAGEN VAPI --parts tokenizer,export

GPT-B at 384 pixels (576 codes) and VQ-16 at 256 and 384, VQ-8 at 256; LPIPS; greedy sampling without guidance, with
it, and with VA-pi's schedule; the released step on 256 pixels with its dropout off; tuned weights, exported, in their
network. ``memory`` writes GPT-XXL (5.6 GB) to a temporary folder and reads it. Largest absolute differences, beside
the size of what is compared; ``codes_differ`` and the like count.

A code can only be equal if the best is better than the second by more than rounding: ``closest_call`` is the smallest
such margin that occurred.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import upstream
from torch import Tensor

from vapi import grpo, rewards
from vapi.config import TuneConfig
from vapi.models import gpt, llamagen, sampler, vq, weights
from vapi.objective import Batch, Draws, Objective

LABELS = torch.tensor([207, 979])
TOKENIZERS = {"VQ-16": vq.VQConfig(), "VQ-8": vq.VQConfig(multipliers=(1, 2, 2, 4))}
GREEDY: dict[str, dict[str, Any]] = {  # name -> how upstream is asked
    "greedy": {"cfg_scale": 1.0},
    "greedy, guidance 1.75": {"cfg_scale": 1.75},
    "greedy, power-cosine to 4": {"cfg_scale": 4.0, "cfg_type": "power-cosine", "cfg_power": 2.75},
}


def difference(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Largest difference, and the standard deviation of what differs."""
    return {"largest": float((ours - theirs).abs().max()), "size": float(theirs.std())}


def generator_state(config: gpt.GPTConfig) -> upstream.State:
    with torch.device("meta"):
        network = gpt.Transformer(config)
    state = upstream.random_state(network, 1)
    state["output.weight"] *= 3  # some codes likelier than others
    return state


def ours(network: Any, state: upstream.State) -> Any:
    weights.fill(network, state, "random weights")
    return network.eval().requires_grad_(False)


def images(count: int, side: int) -> Tensor:
    """Coarse colours under fine noise."""
    coarse = upstream.uniform((count, 3, 8, 8), 6).repeat_interleave(side // 8, 2).repeat_interleave(side // 8, 3)
    return (coarse + 0.5 * upstream.uniform((count, 3, side, side), 7)).clamp(-1, 1)


def margin(scores: Tensor) -> float:
    """How much better the best is than the second, where that is least."""
    best = scores.topk(2, dim=-1).values
    return float((best[..., 0] - best[..., 1]).min())


# --- the parts ---------------------------------------------------------------------------------


@torch.no_grad()
def tokenizer(llamagen_: Path, vapi: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, side in (("VQ-16", 256), ("VQ-16", 384), ("VQ-8", 256)):
        config, pixels = TOKENIZERS[name], images(1, side)
        with torch.device("meta"):
            network = vq.VQModel(config)
        state = upstream.random_state(network, 2)
        network = ours(network, state)
        with upstream.checkout(llamagen_):
            other = upstream.theirs("tokenizer.tokenizer_image.vq_model").VQ_models[name]()
            other.load_state_dict(state, strict=True)
            other.eval()
            theirs, before = upstream.encode(other, pixels)
            decoded = upstream.decode(other, theirs, config.code_dim)
        mine = network.encoder(pixels)
        z = torch.nn.functional.normalize(network.quant_conv(mine).flatten(2).transpose(1, 2), dim=-1)
        found[f"{name} at {side}"] = {
            "encode": difference(network.quant_conv(mine), before),
            "codes": theirs.numel(), "codes_differ": int((network.quantize.nearest(before) != theirs).sum())
            + int((network.encode(pixels) != theirs).sum()),
            "closest_call": margin(z @ network.quantize.entries().T), "decode": difference(network.decode(theirs), decoded),
        }  # fmt: skip
    return found


@torch.no_grad()
def logits(llamagen_: Path, vapi: Path) -> dict[str, Any]:
    config = gpt.published("GPT-B", codes=576)
    state = generator_state(config)
    context = upstream.integers(config.vocab, (len(LABELS), config.codes), 3)
    mine = ours(gpt.Transformer(config), state)(LABELS, context)
    with upstream.checkout(llamagen_):
        other = upstream.theirs("autoregressive.models.gpt").GPT_models["GPT-B"](block_size=576)
        other.load_state_dict(state, strict=True)
        return difference(mine, upstream.teacher_forced(other.eval(), LABELS, context))


@torch.no_grad()
def sampling(llamagen_: Path, vapi: Path) -> dict[str, Any]:
    config = gpt.published("GPT-B", codes=576)
    state = generator_state(config)
    network, found = ours(gpt.Transformer(config), state), {}
    for name, how in GREEDY.items():
        with upstream.checkout(vapi if "cfg_type" in how else llamagen_):
            theirs = upstream.greedy(upstream.generator(config, state), LABELS, config.codes, **how)
        schedule = {"guidance_schedule": how["cfg_type"], "guidance_power": how["cfg_power"]} if "cfg_type" in how else {}
        mine = sampler.generate(network, LABELS, [0, 0], top_k=1, guidance=how["cfg_scale"], **schedule)
        scales = sampler.guidance_scales(how["cfg_scale"], schedule.get("guidance_schedule", "constant"), how.get("cfg_power", 1.0), 576)
        seen = torch.cat([network(LABELS, theirs), network(network.cls_embedding.null(LABELS), theirs)])
        guided = sampler.guide(seen, scales[:, None])
        found[name] = {"codes": theirs.numel(), "codes_differ": int((mine != theirs).sum()), "closest_call": margin(guided)}
    return found


@torch.no_grad()
def perceptual(llamagen_: Path, vapi: Path) -> dict[str, Any]:
    pixels = images(2, 256)
    with upstream.checkout(llamagen_):
        theirs = upstream.lpips(*upstream.lpips_state(5))(pixels, pixels.flip(-1)).flatten()
    return difference(-_lpips()(pixels, pixels.flip(-1)), theirs) | {"values": theirs.tolist()}


def _lpips() -> rewards.Lpips:
    vgg, lines = upstream.lpips_state(5)
    return rewards.Lpips(rewards.Vgg(vgg), [line.flatten() for line in lines.values()])


def step(llamagen_: Path, vapi: Path) -> dict[str, Any]:
    """GPT-B and VQ-16 at 256 pixels, 2 images, 4 draws of each."""
    group, side, pixels = 4, 256, images(2, 256)
    config = gpt.published("GPT-B", codes=256)
    state = generator_state(config)
    with torch.device("meta"):
        codec = vq.VQModel(vq.VQConfig())
    codec_state = upstream.random_state(codec, 2)
    with upstream.checkout(vapi):
        torch.manual_seed(0)
        near = upstream.lpips(*upstream.lpips_state(5))
        released = upstream.released_step(
            vapi, upstream.generator(config, state), upstream.tokenizer(vq.VQConfig(), codec_state), near, pixels, LABELS, group
        )
    network = gpt.Transformer(config)
    weights.fill(network, state, "random weights")
    policy = llamagen.LlamaGen(network.eval(), ours(codec, codec_state), side)
    tune = TuneConfig(rewards={"mse": 1.0, "lpips": 1.0}, group_size=group)
    objective = Objective(policy, tune, rewards.Reward(tune.rewards, functions={"lpips": _lpips()}))
    batch = Batch(torch.arange(2), pixels, policy.encode(pixels), LABELS)
    draws = released["draws"].unflatten(0, (2, group))
    theirs = released["rewards"].view(2, group)
    drawn = Draws(draws, grpo.advantages(theirs, tune.advantage_clip))
    loss, terms = objective.loss(objective.predict(policy, LABELS, batch.codes), batch.codes, drawn, 1, {})
    loss.backward()
    gradient = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert gradient.keys() == released["gradient"].keys()
    apart = sum((gradient[name] - g).double().square().sum() for name, g in released["gradient"].items())
    size = sum(g.double().square().sum() for g in released["gradient"].values())
    return {
        "codes_differ": int((batch.codes != released["codes"]).sum()),
        "rewards": difference(objective.score(draws, pixels)[0], theirs),
        "loss_relative": abs(loss.item() / released["loss"].item() - 1),
        "gradient_relative": float((apart / size) ** 0.5),
        "clip_fraction": float(terms["clip_fraction"]),
    }


def export(llamagen_: Path, vapi: Path) -> dict[str, Any]:
    """Weights of ours through ``vapi export`` into their networks, strictly, as their sampling script reads them."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            networks = {"GPT-B": gpt.Transformer(gpt.published("GPT-B")), "VQ-16": vq.VQModel(vq.VQConfig())}
        for name, network in networks.items():
            weights.fill(network, upstream.random_state(network, 1), "random weights")
            weights.save(network, Path(folder) / "ours.safetensors", {})
            llamagen.export(Path(folder) / "ours.safetensors", Path(folder) / "theirs.pt")
            with upstream.checkout(llamagen_):
                module, table = (
                    ("autoregressive.models.gpt", "GPT_models") if name == "GPT-B" else ("tokenizer.tokenizer_image.vq_model", "VQ_models")
                )
                size = {"block_size": 576} if name == "GPT-B" else {}
                other = getattr(upstream.theirs(module), table)[name](**size)
                other.load_state_dict(torch.load(Path(folder) / "theirs.pt", map_location="cpu")["model"], strict=True)
            pairs = zip(other.state_dict().items(), network.state_dict().items(), strict=True)
            found[name] = {"keys": len(other.state_dict()), "equal": all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)}
    return found


READ = """
import json, resource, sys, time, torch
from vapi.config import ModelConfig
from vapi.models import llamagen
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
own = lambda: int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon"))) * 1024
before, begin = (peak(), own()), time.perf_counter()
network = llamagen.load_generator(ModelConfig(image_size=384), sys.argv[1], 16, torch.device("cpu"))
size = sum(p.numel() * 4 for p in network.parameters())
print(json.dumps({"weights_bytes": size, "peak_with_the_files_pages": (peak() - before[0]) / size,
                  "own_memory": (own() - before[1]) / size, "seconds": time.perf_counter() - begin}))
"""


def memory(llamagen_: Path, vapi: Path) -> dict[str, Any]:
    """Reading GPT-XXL: memory as a multiple of its weights."""
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            shapes = weights.shapes(gpt.Transformer(gpt.published("GPT-XXL")).state_dict())
        torch.save({"model": {name: torch.ones(shape) for name, shape in shapes.items()}}, Path(folder) / "xxl.pt")
        done = subprocess.run([sys.executable, "-c", READ, f"{folder}/xxl.pt"], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)


PARTS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "tokenizer": tokenizer, "logits": logits, "sampling": sampling, "lpips": perceptual, "step": step, "export": export, "memory": memory,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llamagen", type=Path)
    parser.add_argument("vapi", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    given = parser.parse_args()
    report: dict[str, Any] = {}
    for name in given.parts.split(","):
        begin = time.perf_counter()
        report[name] = PARTS[name](given.llamagen, given.vapi)
        report[name]["part_seconds"] = round(time.perf_counter() - begin, 1)
        print(name, json.dumps(report[name]), file=sys.stderr, flush=True)
    report["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
