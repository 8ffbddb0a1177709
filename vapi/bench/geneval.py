"""GenEval from codes to verdicts: how many pictures a second are drawn, looked at, and both.

The prompts are the recipe's, as many pictures of each as it asks for; captions' features and weights are random where files
are missing. A random detector is sure of nothing, so that nobody asks it for colours: how fast these are judged is timed apart.

Shapes: D width of CLIP's space.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vapi import images, models
from vapi.bench import meter, say, world
from vapi.config import Measured
from vapi.geneval import AT_ONCE, detector_of
from vapi.metrics import geneval as metric
from vapi.metrics.detections import Detector, Identity, Objects
from vapi.models import memory, sampler
from vapi.models.sampler import Sampling


def geneval(settings: Measured) -> dict[str, Any]:
    """Time drawing, detecting and judging colours on a batch each, then all prompts' pictures from the first to the last."""
    built, wanted, precision = world.world(settings), settings.evaluate, settings.model.precision
    policy, device = built.policy, built.device
    if policy.num_classes:
        raise ValueError(f"{built.weights} draws classes, and GenEval asks with captions; measure --recipe llamagen-xl-t2i, say")
    known = wanted.detector == "digits" or Path(wanted.detector).exists()
    detector = detector_of(wanted.detector, wanted.clip, device) if known else _random_detector(device)
    prompts = [
        one for one in metric.read_prompts(wanted.prompts, detector.classes, detector.colours) for _ in range(wanted.images_per_prompt)
    ]
    condition = world.condition(policy, len(prompts))
    how: Sampling = {"temperature": wanted.temperature, "top_k": wanted.top_k, "top_p": wanted.top_p, "guidance": wanted.guidance}
    arithmetic = models.autocast(precision, device)
    with arithmetic:
        batch = min(wanted.images_per_batch or memory.images_per_batch(policy.footprint(wanted.guidance != 1.0), device), len(prompts))

    def pictures(count: int) -> Iterator[list[np.ndarray]]:
        ranges = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
        batches = ((condition[list(numbers)], list(numbers)) for numbers in ranges)
        for decoded in sampler.stream(policy, batches, batch, arithmetic, **how):
            yield list(images.to_uint8(decoded).permute(0, 2, 3, 1).cpu().numpy())

    def everything() -> None:
        asked = iter(prompts)
        for drawn in pictures(len(prompts)):
            for start in range(0, len(drawn), AT_ONCE):
                some = drawn[start : start + AT_ONCE]
                metric.outcomes(detector, [next(asked) for _ in some], some, detector.detect(some))

    with torch.inference_mode():
        drawn = next(pictures(batch))  # on a GPU this records the loop, which takes a minute once
        few = drawn[:AT_ONCE]
        ways = {"draw": lambda: list(pictures(batch)), "detect": lambda: detector.detect(few)}
        if detector.identity.name == "mask2former" and detector.colours:
            ways["colour"] = lambda: detector.colour(few[0], _whole(few[0]))
        took = meter.take_turns(device, ways, settings.bench.rounds)
        say(f"all {len(prompts)} pictures")
        whole = meter.seconds(device, everything)
    return {
        "weights": built.weights,
        "detector": detector.identity.name,
        "detector_weights": detector.identity.weights,
        "image_size": policy.image_size,
        "precision": precision,
        "guidance": wanted.guidance,
        "images_per_batch": batch,
        "drawn_per_second": batch / took["draw"],
        "detected_per_second": len(few) / took["detect"],
        **({"colours_per_second": 1 / took["colour"]} if "colour" in took else {}),
        "images": len(prompts),
        "seconds": whole,
        "images_per_second": len(prompts) / whole,
    }


def _whole(picture: np.ndarray) -> Objects:
    """One object that is the whole picture, uint8 (H, W, 3)."""
    height, width, _ = picture.shape
    return Objects(np.array([[0.0, 0.0, width, height, 1.0]]), np.ones((1, height, width), bool), metric.CLASSES[0])


def _random_detector(device: torch.device) -> Detector:
    """Mask2Former with a Swin-S and CLIP ViT-L/14, both with random weights."""
    from transformers import CLIPConfig, CLIPModel, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    from vapi.metrics import clip, mask2former

    say("random weights of Mask2Former and CLIP")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin: Any = SwinConfig  # its signature hides out_features
    names = dict(enumerate(metric.CLASSES))
    backbone = swin(embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7, out_features=stages)
    seen = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
    said = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    torch.manual_seed(0)
    with device:
        # moved below: transformers makes one of its weights on the CPU whatever is said
        network: Any = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, id2label=names))
        near = CLIPModel(CLIPConfig(vision_config=seen, text_config=said, projection_dim=768)).eval()
        sentences = torch.nn.functional.normalize(torch.randn(768, len(metric.COLOURS)), dim=0)  # (D, 10), in place of a text tokenizer
    colourist = clip.ColourClassifier(clip.Clip(near, None, device), {metric.CLASSES[0]: sentences})
    at_once = mask2former.ON_CPU if device.type == "cpu" else mask2former.ON_GPU
    return mask2former.Mask2Former(network.to(device).eval(), device, Identity("mask2former", "random"), colourist, at_once)
