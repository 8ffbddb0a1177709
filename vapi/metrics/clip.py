"""CLIP through the library transformers, fed as open_clip feeds it; and GenEval's judge of colours on top.

Weights are a folder as Hugging Face keeps them (openai/clip-vit-large-patch14). Pictures pass torchvision's transforms on PIL
images, which are open_clip's: transformers' own processor differs by one or two grey levels, and more on small crops.

A colour is judged as GenEval does: what lies outside of an object's mask becomes #999, the picture is cropped to the box, and the
nearest of ten colours wins, each the mean of three sentences. On a GPU both towers run under float16 autocast, as clip_benchmark
does by default; on a CPU in float32, so that colours near a tie may differ.
Left out: open_clip's own checkpoints; a crop without pixels, at which the official code stops with a division by zero: here it is
a ValueError that says so. (Mask2Former never finds one: its boxes hold at least a pixel, or score 0.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms

from vapi.metrics import pretrained
from vapi.metrics.detections import Objects
from vapi.metrics.features import sha256
from vapi.metrics.geneval import COLOURS

SETTING, EXAMPLE = "evaluate.clip", "openai/clip-vit-large-patch14"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OFFICIAL = "CLIP ViT-L/14"
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GROUND = "#999"
CROPS = 16  # at a time


@dataclass(frozen=True)
class Clip:
    """Pictures and sentences to vectors of one space."""

    network: Any
    tokenizer: Any
    device: torch.device
    sha256: str = ""

    @cached_property
    def transform(self) -> transforms.Compose:
        """A PIL image to float32 (3, S, S): the shorter side scaled to S (bicubic), the middle cut out, normalised."""
        side = self.network.config.vision_config.image_size
        return transforms.Compose(
            [
                transforms.Resize(side, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(side),
                transforms.Lambda(lambda image: image.convert("RGB")),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    @property
    def architecture(self) -> str:
        """GenEval's, or what it is instead."""
        seen = self.network.config.vision_config
        shape = (seen.hidden_size, seen.num_hidden_layers, seen.patch_size, seen.image_size, self.network.config.projection_dim)
        return OFFICIAL if shape == (1024, 24, 14, 224, 768) else f"CLIP of width {shape[0]}, {shape[1]} layers, patch {shape[2]}"

    @property
    def arithmetic(self) -> str:
        """Of colours."""
        return "float32" if self.device.type == "cpu" else "float16 autocast"

    @torch.inference_mode()
    def image_features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(B, D), not normalised."""
        pixels = torch.stack([self.transform(picture) for picture in pictures]).to(self.device)
        with pretrained.exact():
            return self.network.visual_projection(self.network.vision_model(pixel_values=pixels).pooler_output)

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(B, D), not normalised. What goes beyond the network's 77 tokens is cut off."""
        length = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        with pretrained.exact():
            pooled = self.network.text_model(input_ids=tokens["input_ids"].to(self.device)).pooler_output
            return self.network.text_projection(pooled)


def require(folder: str | Path, setting: str = SETTING) -> Path:
    """The folder, after all that can be checked without loading it. Raises ValueError where the library or a file is missing, or
    for another kind of network."""
    pretrained.require_transformers(f"{setting} {folder}")
    path = pretrained.locate(folder, setting, EXAMPLE, more=("vocab.json", "merges.txt"))
    pretrained.read_config(path, "clip", setting, EXAMPLE)
    return path


def load(folder: str | Path, device: torch.device | str = "cpu", setting: str = SETTING) -> Clip:
    """CLIP from a folder (or a hub id org/name), frozen. Raises ValueError as ``require`` does, and for weights that do not fit."""
    path = require(folder, setting)
    from transformers import CLIPModel, CLIPTokenizer

    network = pretrained.load(CLIPModel, path, device)
    tokenizer = CLIPTokenizer.from_pretrained(path, local_files_only=True)
    known, most = len(tokenizer), network.config.text_config.vocab_size
    if known > most:
        raise ValueError(f"{path} has {known} tokens in vocab.json, but its network knows {most}; they are of two different networks")
    return Clip(network, tokenizer, torch.device(device), sha256(path / pretrained.WEIGHTS))


@dataclass(frozen=True)
class ColourClassifier:
    """GenEval's: the colour of each of several objects of one class."""

    clip: Clip
    classifiers: dict[str, Tensor] = field(default_factory=dict, repr=False)  # (D, 10) by class, made at first use

    @torch.inference_mode()
    def __call__(self, picture: np.ndarray, objects: Objects) -> list[str]:
        """uint8 (H, W, 3) and the objects on it, named, to a colour of ``COLOURS`` each. Without masks the box alone counts.

        Raises ValueError for objects without a class or a box without pixels.
        """
        if not objects.name:
            raise ValueError("a colour is judged by the class of its object; these objects have none (Objects.name)")
        found = crops(picture, objects)
        named: list[str] = []
        with self._precision():
            for start in range(0, len(found), CROPS):
                seen = F.normalize(self.clip.image_features(found[start : start + CROPS]), dim=-1)
                logits = 100.0 * seen @ self._classifier(objects.name)
                named += [COLOURS[index] for index in logits.float().argmax(dim=1).tolist()]
        return named

    def _classifier(self, name: str) -> Tensor:
        """(D, 10): of each colour the mean direction of its sentences, of length one."""
        if name not in self.classifiers:
            columns = []
            for colour in COLOURS:
                said = self.clip.text_features([template.format(colour=colour, name=name) for template in TEMPLATES])
                mean = F.normalize(said, dim=-1).mean(dim=0)
                columns.append(mean / mean.norm())
            self.classifiers[name] = torch.stack(columns, dim=1)
        return self.classifiers[name]

    def _precision(self) -> torch.autocast:
        kind = self.clip.device.type
        return torch.autocast(kind, torch.float16 if kind != "cpu" else torch.bfloat16, enabled=kind != "cpu")


def crops(picture: np.ndarray, objects: Objects) -> list[Image.Image]:
    """What CLIP is shown of each object. Raises ValueError for a box without pixels."""
    image = Image.fromarray(picture).convert("RGB")
    ground = Image.new("RGB", image.size, GROUND)
    cut = []
    for index, box in enumerate(objects.boxes):
        x0, y0, x1, y1 = (round(float(end)) for end in box[:4])
        if x1 <= x0 or y1 <= y0:
            raise ValueError(
                f"a {objects.name or 'detection'} has the box {x0}, {y0}, {x1}, {y1}, which holds no pixel to judge a colour by"
            )
        shown = image
        if objects.masks is not None:
            assert objects.masks[index].shape == picture.shape[:2], (objects.masks[index].shape, picture.shape)
            shown = Image.composite(image, ground, Image.fromarray(objects.masks[index].astype(bool)))
        cut.append(shown.crop((x0, y0, x1, y1)))
    return cut
