"""Free-running sampling: ``Policy.generate`` against a loop as LlamaGen's (``naive.generate``).

Sampling reads every weight and every key and value so far for each code, so on a GPU it is memory that bounds it:
``bandwidth_utilisation`` is the bytes that must be read over what the card could read in that time. Codes are timed;
``vapi evaluate`` decodes them beside the sampling of the next batch.

Shapes: B images, T codes.
"""

from __future__ import annotations

from typing import Any

from vapi import models
from vapi.bench import meter, naive, world
from vapi.config import Measured
from vapi.models import memory
from vapi.models.sampler import Sampling


def sample(settings: Measured) -> dict[str, Any]:
    """Time a batch of ``evaluate.images_per_batch`` images with the recipe's sampling."""
    built = world.world(settings)
    policy, device, precision, wanted = built.policy, built.device, settings.model.precision, settings.evaluate
    if not hasattr(policy.generator, "cls_embedding"):
        raise ValueError(f"{built.weights}: there is no naive loop to compare the sampling of Janus with; measure a LlamaGen")
    guided = wanted.guidance != 1.0
    with models.autocast(precision, device):
        images = wanted.images_per_batch or memory.images_per_batch(policy.footprint(guided), device)
    condition = world.condition(policy, images)
    how: Sampling = {
        "temperature": wanted.temperature,
        "top_k": wanted.top_k,
        "top_p": wanted.top_p,
        "guidance": wanted.guidance,
    }

    scheduled: Sampling = {**how, "guidance_schedule": wanted.guidance_schedule, "guidance_power": wanted.guidance_power}

    def ours() -> None:
        with models.autocast(precision, device):
            policy.generate(condition, range(images), images, **scheduled)

    def theirs() -> None:
        with models.autocast(precision, device):
            naive.generate(policy.generator, condition, **how)  # type: ignore[arg-type, misc]

    ours()  # on a GPU this records the loop, which takes a minute once
    taken = meter.peak_memory(device, ours)
    took = meter.take_turns(device, {"ours": ours, "naive": theirs}, settings.bench.rounds)
    rows = 2 * images if guided else images
    peak = meter.peak(device, precision)
    return {
        "weights": built.weights,
        "image_size": policy.image_size,
        "precision": precision,
        "images_per_batch": images,
        "guidance": wanted.guidance,
        "guidance_schedule": wanted.guidance_schedule,
        "seconds_per_image": took["ours"] / images,
        "naive_seconds_per_image": took["naive"] / images,
        "speedup": took["naive"] / took["ours"],
        "images_per_second": images / took["ours"],
        "codes_per_second": images * policy.num_codes / took["ours"],
        "bandwidth_utilisation": bytes_read(policy.generator, policy.num_codes, rows, precision) / took["ours"] / peak.bandwidth,
        "peak_bandwidth": peak.bandwidth,
        "peak_source": peak.source,
        "peak_memory_bytes": taken,
    }


def bytes_read(generator: Any, codes: int, rows: int, precision: str) -> int:
    """What sampling ``rows`` sequences must read: all weights once per code, and the keys and values of all codes before it."""
    size = 2 if precision == "bfloat16" else 4
    weights = sum(p.numel() for name, p in generator.named_parameters() if "embed" not in name)  # of those one row each
    keys_and_values = 2 * generator.config.layers * generator.config.dim * rows
    return size * (codes * weights + keys_and_values * codes * (codes + 1) // 2)
