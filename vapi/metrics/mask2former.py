"""GenEval's detector without mmdet: Mask2Former of the library transformers, its outputs read as mmdet reads them.

GenEval looks with OpenMMLab's Mask2Former (Swin-S, COCO instances). The architecture is in transformers, what differs is
everything around it: pictures are scaled as mmdet does, (1333, 800) with the ratio kept, then normalised and padded to 32;
masks go from logits to the padded picture, lose the padding, go to the picture's own size and are cut at 0 there; a score is
class probability times mean mask probability; the best 100 pairs of query and class count; a box ends one pixel behind its
mask. (transformers' own post-processing cuts masks at 384 x 384, keeps the padding and one class per query.)
Classes go BY INDEX to GenEval's names: checkpoints call "computer mouse" and others by names of their own.

Weights. ``convert`` turns OpenMMLab's checkpoint into a folder for transformers; only its numbers are called "GenEval".
facebook's weights of the same architecture are another training: "GenEval (HF)".

What is known of ``convert``: the tests compare a converted network with a forward pass written down after mmdet 2.x (windows,
patch merging, deformable and masked attention), on small random weights. mmdet itself does not install beside this project, so
no output of it was compared, and nobody has yet run the published checkpoint through here. Where cv2 scales a uint8 picture with
integer weights, we round the exact value: one grey level apart at most.
Left out: mmdet 3's checkpoints, other backbones, panoptic checkpoints (133 labels).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vapi.metrics import clip as clips
from vapi.metrics import conversion, pretrained
from vapi.metrics.conversion import Rule, both, count, same, thirds
from vapi.metrics.detections import Detections, Identity, Objects, Rules
from vapi.metrics.features import sha256
from vapi.metrics.geneval import CLASSES, COLOURS

SETTING, EXAMPLE = "evaluate.detector", "facebook/mask2former-swin-small-coco-instance, or one that convert-detector wrote"
SHORT, LONG, DIVISOR = 800, 1333, 32  # pixels
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of RGB in 0..255
TOP = 100  # pairs of query and class that count
COMMON_NAMES = 60  # of COCO's classes that checkpoints spell alike; dialects differ in about nine
ON_GPU, ON_CPU = 8, 1  # pictures at a time

OFFICIAL = "743b7d99"  # GenEval's checkpoint: OpenMMLab puts the first digits of its sha256 into the file's name
LICENCES = {
    True: "Apache-2.0 (OpenMMLab)",
    False: "that of the weights' author; facebook's Mask2Former weights: CC BY-NC 4.0, not for commercial use",
}
KNOWN: Mapping[str, Sequence[tuple[str, float, float, float, float, float]]] = {}
"""By sha256 of model.safetensors: class, x0, y0, x1, y1 and score of what these weights see on ``drawn_picture``. A row is what
``python -m vapi.metrics.mask2former FOLDER`` prints on a machine that is trusted. Empty until somebody with weights adds one."""
PIXELS_OFF, SCORE_OFF = 3.0, 0.02  # what another card and library may move


class Found(NamedTuple):
    """What stands on one picture, the surest first."""

    labels: Tensor  # int64 (n,)
    boxes: Tensor  # float32 (n, 5): x0, y0, x1, y1 and score; the ends lie one pixel behind the mask
    masks: Tensor  # bool (n, H, W)


@dataclass(frozen=True)
class Mask2Former:
    """A detector (detections.py) of COCO's classes; colours by CLIP, if there is one."""

    network: Any
    device: torch.device
    identity: Identity
    colourist: clips.ColourClassifier | None = None
    images_per_batch: int = ON_CPU
    rules: Rules = field(default_factory=Rules)
    classes: Sequence[str] = CLASSES

    @property
    def colours(self) -> Sequence[str]:
        """None without CLIP, so that prompts with colours are refused before anything is drawn."""
        return COLOURS if self.colourist else ()

    def detect(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        """uint8 (H, W, 3) each, any size, to the best 100 objects. Pictures of one size are looked at together, which moves
        results by rounding only. Raises ValueError if the network returns numbers that are not finite."""
        found: dict[int, Detections] = {}
        for some in _alike(pictures, self.images_per_batch):
            for index, one in zip(some, self._look(np.stack([pictures[i] for i in some]))):
                found[index] = _by_class(one)
        return [found[index] for index in range(len(pictures))]

    def colour(self, picture: np.ndarray, objects: Objects) -> list[str]:
        """The colour of each of these objects, whose class ``objects.name`` says. Raises ValueError without CLIP."""
        if self.colourist is None:
            raise ValueError("colours need CLIP ViT-L/14; set evaluate.clip to a folder of its weights (openai/clip-vit-large-patch14)")
        return self.colourist(picture, objects)

    @torch.inference_mode()
    def _look(self, pictures: np.ndarray) -> Iterator[Found]:
        """uint8 (B, H, W, 3)."""
        size = pictures.shape[1:3]
        pixels, inner = prepare(torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2))
        with pretrained.exact():
            seen = self.network(pixel_values=pixels)
        for classes, masks in zip(seen.class_queries_logits.float(), seen.masks_queries_logits.float()):
            if not (classes.isfinite().all() and masks.isfinite().all()):
                raise ValueError(f"the detector returned numbers that are not finite on {self.device}; its weights are damaged")
            yield postprocess(classes, masks, (pixels.shape[-2], pixels.shape[-1]), inner, (size[0], size[1]))


def _alike(pictures: Sequence[np.ndarray], at_once: int) -> Iterator[list[int]]:
    """Indices of pictures of one size, at most ``at_once`` at a time."""
    sizes: dict[tuple[int, ...], list[int]] = {}
    for index, picture in enumerate(pictures):
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3, (picture.dtype, picture.shape)
        sizes.setdefault(picture.shape, []).append(index)
    for indices in sizes.values():
        yield from (indices[start : start + at_once] for start in range(0, len(indices), at_once))


def _by_class(found: Found) -> Detections:
    labels, boxes, masks = (part.cpu().numpy() for part in found)
    return {CLASSES[label]: Objects(boxes[labels == label], masks[labels == label], CLASSES[label]) for label in np.unique(labels)}


# --- before and after the network, as mmdet 2.x does it ------------------------------------------


def prepare(pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """uint8 (B, 3, H, W) to the network's input, float32 (B, 3, H', W') with sides that 32 divides, and the size less the padding."""
    height, width = pixels.shape[-2:]
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    inner = int(height * scale + 0.5), int(width * scale + 0.5)
    # cv2's bilinear: no smoothing where it shrinks, and uint8 again afterwards
    scaled = F.interpolate(pixels.float(), size=inner, mode="bilinear", align_corners=False).round()
    mean, std = (scaled.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return F.pad((scaled - mean) / std, (0, -inner[1] % DIVISOR, 0, -inner[0] % DIVISOR)), inner


def postprocess(classes: Tensor, masks: Tensor, padded: tuple[int, int], inner: tuple[int, int], size: tuple[int, int]) -> Found:
    """Logits of classes (Q, C + 1, the last: none) and masks (Q, h, w) of one picture to its best objects.

    ``padded``, ``inner``: the input's size with and without padding; ``size``: the picture's own; all (height, width).
    """
    probabilities = classes.softmax(dim=-1)[:, :-1]
    count = probabilities.shape[1]
    best, pairs = probabilities.flatten().topk(min(TOP, probabilities.numel()))
    queries, which = (pairs // count).unique(return_inverse=True)  # a query may stand for several classes
    logits = F.interpolate(masks[queries][:, None], size=padded, mode="bilinear", align_corners=False)
    logits = F.interpolate(logits[..., : inner[0], : inner[1]], size=size, mode="bilinear", align_corners=False)[:, 0]
    inside = logits > 0
    mean = (logits.sigmoid() * inside).flatten(1).sum(dim=1) / (inside.flatten(1).sum(dim=1) + 1e-6)
    scores = best * mean[which]
    boxes = torch.cat([extents(inside)[which], scores[:, None]], dim=1)
    order = scores.argsort(descending=True, stable=True)
    return Found((pairs % count)[order], boxes[order], inside[which][order])


def extents(masks: Tensor) -> Tensor:
    """bool (n, H, W) to x0, y0, x1, y1, float32 (n, 4), the ends one pixel behind the mask; zeros for an empty one."""
    ends = []
    for seen in (masks.any(dim=1), masks.any(dim=2)):  # columns, rows
        places = torch.arange(seen.shape[1], device=masks.device)
        ends += [torch.where(seen, places, seen.shape[1]).amin(dim=1), torch.where(seen, places + 1, 0).amax(dim=1)]
    x0, x1, y0, y1 = ends
    return torch.stack([x0, y0, x1, y1], dim=1).float() * masks.flatten(1).any(dim=1)[:, None]


# --- from a folder ---------------------------------------------------------------------------------


def require(folder: str | Path) -> Path:
    """The folder (fetched, if it names a hub's) after all that can be checked without loading it.

    Raises ValueError where the library or a file is missing, and for a network that does not tell COCO's 80 classes.
    """
    pretrained.require_transformers(f"{SETTING} {folder}")
    path = pretrained.locate(folder, SETTING, EXAMPLE)
    config = pretrained.read_config(path, "mask2former", SETTING, EXAMPLE)
    names = config.get("id2label") or {}
    if len(names) != len(CLASSES):
        raise ValueError(
            f"{SETTING} is {folder}, which tells {len(names)} classes; GenEval needs COCO's {len(CLASSES)} of instance segmentation "
            f"(with panoptic or semantic weights its thresholds mean nothing): {EXAMPLE}"
        )
    spelt = [str(names.get(str(index), "")) for index in range(len(CLASSES))]
    alike = sum(mine == theirs for mine, theirs in zip(CLASSES, spelt))
    if alike < COMMON_NAMES and not all(name == f"LABEL_{index}" for index, name in enumerate(spelt)):
        raise ValueError(f"{SETTING} is {folder}, whose 80 classes are not COCO's in COCO's order (they begin {', '.join(spelt[:4])})")
    return path


def load(folder: str | Path, clip_folder: str | Path = "", device: torch.device | str = "cpu", images_per_batch: int = 0) -> Mask2Former:
    """The detector in a folder (or of a hub id org/name), after a look at a drawn picture (``self_check``).

    ``clip_folder``: CLIP ViT-L/14, for colours; empty: none. ``images_per_batch``: 0 for 8 on a GPU, 1 on a CPU.
    Raises ValueError as ``require`` does, and for weights that do not fit in every key and shape or fail the check.
    """
    path, device = require(folder), torch.device(device)
    from transformers import Mask2FormerForUniversalSegmentation

    clip = clips.load(clip_folder, device) if str(clip_folder) else None
    network = pretrained.load(Mask2FormerForUniversalSegmentation, path, device)
    detector = Mask2Former(
        network,
        device,
        _identity(path, clip),
        clips.ColourClassifier(clip) if clip else None,
        images_per_batch or (ON_CPU if device.type == "cpu" else ON_GPU),
    )
    self_check(detector)
    return detector


def _identity(folder: Path, clip: clips.Clip | None) -> Identity:
    weights = sha256(folder / pretrained.WEIGHTS)
    source = conversion.source_of(folder, weights)
    official = source.startswith(OFFICIAL) and (clip is None or clip.architecture == clips.OFFICIAL)
    more = {"classes": "by index", "processing": "mmdet 2.x", "arithmetic": "float32"}
    if source:
        more["converted from"] = source
    if clip:
        more |= {"colours": clip.architecture, "colours' weights": clip.sha256, "colours' arithmetic": clip.arithmetic}
    title = "GenEval" if official else "GenEval (HF)"
    return Identity("mask2former", weights, title, LICENCES[source.startswith(OFFICIAL)], more)


def drawn_picture() -> np.ndarray:
    """uint8 (256, 256, 3): a red octagon in a white frame on a pole, an orange ball and a wooden table, before a sky."""
    y, x = np.mgrid[:256, :256].astype(np.int64)
    picture = np.empty((256, 256, 3), np.uint8)
    picture[:] = np.stack([120 + y // 4, 170 + y // 4, 230 + 0 * y], axis=-1)
    for shape, colour in (
        (y >= 190, (120, 80, 45)),
        ((abs(x - 80) < 4) & (y > 60) & (y < 200), (130, 130, 130)),
        (np.maximum.reduce([abs(x - 80), abs(y - 70), (abs(x - 80) + abs(y - 70)) * 7 // 10]) < 46, (245, 245, 245)),
        (np.maximum.reduce([abs(x - 80), abs(y - 70), (abs(x - 80) + abs(y - 70)) * 7 // 10]) < 41, (190, 20, 25)),
        ((abs(x - 80) < 28) & (abs(y - 70) < 8), (245, 245, 245)),
        ((x - 190) ** 2 + (y - 170) ** 2 < 34**2, (235, 130, 20)),
    ):
        picture[shape] = colour
    return picture


def self_check(detector: Mask2Former) -> None:
    """Looks at a drawn picture twice and at its mirror image once. Raises ValueError if scores are all zero, not the same twice, or
    deaf to the picture (a kernel that returns zeros, weights of another layout), or not what weights listed in ``KNOWN`` saw.

    Honest but weak: of weights that are not listed nobody knows what they should see, so that wrong ones may pass.
    """
    picture = drawn_picture()
    first, again, mirrored = (_all(detector.detect([seen])[0]) for seen in (picture, picture, np.ascontiguousarray(picture[:, ::-1])))
    failed = f"the detector fails its check on {detector.device}:"
    if not len(first) or first[:, 4].max() == 0:
        raise ValueError(f"{failed} every score is 0; the weights are of another layout, or a kernel returns nothing")
    if first.shape != again.shape or not np.allclose(first, again, rtol=0, atol=1e-3):
        raise ValueError(f"{failed} it sees different things on the same picture; look for a faulty card or driver")
    if first.shape == mirrored.shape and np.array_equal(first, mirrored):
        raise ValueError(f"{failed} it sees the same on a picture and on its mirror image, so it does not look at all")
    seen = detector.detect([picture])[0] if detector.identity.weights in KNOWN else {}
    for name, *expected in KNOWN.get(detector.identity.weights, ()):
        off = np.abs(seen[name].boxes - np.array(expected)) if name in seen else np.empty((0, 5))
        if not ((off[:, :4] <= PIXELS_OFF).all(axis=1) & (off[:, 4] <= SCORE_OFF)).any():
            raise ValueError(f"{failed} these weights are known to see a {name} at {expected[:4]} with score {expected[4]}, and do not")


def _all(found: Detections) -> np.ndarray:
    """Boxes of all classes, the surest first."""
    boxes = np.concatenate([found[name].boxes for name in sorted(found)]) if found else np.empty((0, 5), np.float32)
    return boxes[np.argsort(-boxes[:, 4], kind="stable")]


# --- from OpenMMLab's checkpoint ---------------------------------------------------------------------


def convert(source: str | Path, folder: str | Path) -> Path:
    """OpenMMLab's Mask2Former with a Swin backbone (mmdet 2.x, 80 classes) to a new folder for ``load``.

    Read as weights alone, never executed. Raises ValueError for a file that is none, for keys left over, missing or of another
    shape (with the list), and for a folder that is there already.
    """
    source, folder = Path(source), Path(folder)
    pretrained.require_transformers("converting a detector")
    conversion.require_new(folder)
    state = conversion.read_checkpoint(source, CHECKPOINT)
    config, tensors = _config(state, source), translate(state, source)
    from transformers import Mask2FormerForUniversalSegmentation

    conversion.write(folder, source, config, tensors, Mask2FormerForUniversalSegmentation)
    return folder


CHECKPOINT = f"GenEval's is mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-{OFFICIAL}.pth"


def _config(state: Mapping[str, Tensor], source: Path) -> Any:
    """transformers' configuration, from the shapes of mmdet's weights. Raises ValueError where they do not tell it."""
    from transformers import Mask2FormerConfig, SwinConfig

    swin: Any = SwinConfig  # its signature hides out_features

    try:
        stages = count(state, "backbone.stages.{}.blocks.0.norm1.weight")
        width = len(state["backbone.patch_embed.norm.weight"])
        tables = [state[f"backbone.stages.{i}.blocks.0.attn.w_msa.relative_position_bias_table"].shape for i in range(stages)]
        labels = len(state["panoptic_head.cls_embed.weight"]) - 1
        if labels != len(CLASSES):
            raise ValueError(f"{source} tells {labels} classes, not COCO's {len(CLASSES)}; panoptic checkpoints are of no use here")
        encoder, decoder = "panoptic_head.pixel_decoder.encoder.layers.{}", "panoptic_head.transformer_decoder.layers.{}"
        queries, features = state["panoptic_head.query_feat.weight"].shape
        backbone = swin(
            embed_dim=width,
            depths=[count(state, f"backbone.stages.{i}.blocks.{{}}.norm1.weight") for i in range(stages)],
            num_heads=[heads for _, heads in tables],
            window_size=(round(tables[0][0] ** 0.5) + 1) // 2,
            mlp_ratio=len(state["backbone.stages.0.blocks.0.ffn.layers.0.0.weight"]) / width,
            drop_path_rate=0.3,
            out_features=[f"stage{i + 1}" for i in range(stages)],
        )
        return Mask2FormerConfig(
            backbone_config=backbone,
            id2label=dict(enumerate(CLASSES)),
            label2id={name: index for index, name in enumerate(CLASSES)},
            num_queries=queries,
            feature_size=features,
            hidden_dim=features,
            mask_feature_size=len(state["panoptic_head.mask_embed.4.weight"]),
            encoder_feedforward_dim=len(state[encoder.format(0) + ".ffns.0.layers.0.0.weight"]),
            dim_feedforward=len(state[decoder.format(0) + ".ffns.0.layers.0.0.weight"]),
            encoder_layers=count(state, encoder + ".norms.0.weight"),
            decoder_layers=count(state, decoder + ".norms.0.weight") + 1,  # as transformers counts: the first look is one
            # an offset has x and y, for each of 4 points on 3 levels
            num_attention_heads=len(state[encoder.format(0) + ".attentions.0.sampling_offsets.bias"]) // 24,
            architectures=["Mask2FormerForUniversalSegmentation"],
        )
    except KeyError as error:
        raise ValueError(f"{source} is no Mask2Former of mmdet 2.x with a Swin backbone: it lacks {error}") from None


def translate(state: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """mmdet's weights under the names of transformers' files. Raises ValueError, with the list, for keys left over or missing."""
    made = conversion.translate(state, _names(state), f"{source} is not laid out as mmdet 2.x's Mask2Former with a Swin backbone")
    labels = len(made["class_predictor.weight"])
    # what transformers keeps besides: a weight of its loss, and a norm behind the last stage that no map passes
    made["criterion.empty_weight"] = torch.tensor([1.0] * (labels - 1) + [0.1])
    last = made[f"{SWIN}.hidden_states_norms.stage{count(state, 'backbone.norm{}.weight')}.weight"]
    made |= {f"{SWIN}.swin.layernorm.weight": torch.ones_like(last), f"{SWIN}.swin.layernorm.bias": torch.zeros_like(last)}
    return made


SWIN, PIXELS, QUERIES = "model.pixel_level_module.encoder", "model.pixel_level_module.decoder", "model.transformer_module"


def _names(state: Mapping[str, Tensor]) -> Iterator[Rule]:
    """Every weight of both sides, once."""
    yield from both("backbone.patch_embed.projection", f"{SWIN}.embeddings.patch_embeddings.projection")
    yield from both("backbone.patch_embed.norm", f"{SWIN}.embeddings.norm")
    stages = count(state, "backbone.stages.{}.blocks.0.norm1.weight")
    for i in range(stages):
        for j in range(count(state, f"backbone.stages.{i}.blocks.{{}}.norm1.weight")):
            yield from _block(f"backbone.stages.{i}.blocks.{j}", f"{SWIN}.encoder.layers.{i}.blocks.{j}")
        if i + 1 < stages:
            theirs, ours = f"backbone.stages.{i}.downsample", f"{SWIN}.encoder.layers.{i}.downsample"
            yield from ((f"{theirs}.{name}", [f"{ours}.{name}"], _merged) for name in ("norm.weight", "norm.bias", "reduction.weight"))
        yield from both(f"backbone.norm{i}", f"{SWIN}.hidden_states_norms.stage{i + 1}")
    yield from _pixel_decoder(state, "panoptic_head.pixel_decoder")
    for i in range(count(state, "panoptic_head.transformer_decoder.layers.{}.norms.0.weight")):
        yield from _layer(f"panoptic_head.transformer_decoder.layers.{i}", f"{QUERIES}.decoder.layers.{i}")
    yield from both("panoptic_head.transformer_decoder.post_norm", f"{QUERIES}.decoder.layernorm")
    for theirs, ours in (("query_embed", "queries_embedder"), ("query_feat", "queries_features"), ("level_embed", "level_embed")):
        yield f"panoptic_head.{theirs}.weight", [f"{QUERIES}.{ours}.weight"], same
    yield from both("panoptic_head.cls_embed", "class_predictor")
    for i in range(3):
        yield from both(f"panoptic_head.mask_embed.{2 * i}", f"{QUERIES}.decoder.mask_predictor.mask_embedder.{i}.0")


def _block(theirs: str, ours: str) -> Iterator[Rule]:
    """A block of the Swin transformer."""
    for name in ("relative_position_bias_table", "relative_position_index"):
        yield f"{theirs}.attn.w_msa.{name}", [f"{ours}.attention.self.{name}"], same
    for kind in ("weight", "bias"):
        split = [f"{ours}.attention.self.{name}.{kind}" for name in ("query", "key", "value")]
        yield f"{theirs}.attn.w_msa.qkv.{kind}", split, thirds
    for theirs_, ours_ in (
        ("norm1", "layernorm_before"),
        ("attn.w_msa.proj", "attention.output.dense"),
        ("norm2", "layernorm_after"),
        ("ffn.layers.0.0", "intermediate.dense"),
        ("ffn.layers.1", "output.dense"),
    ):
        yield from both(f"{theirs}.{theirs_}", f"{ours}.{ours_}")


def _pixel_decoder(state: Mapping[str, Tensor], head: str) -> Iterator[Rule]:
    for i in range(count(state, f"{head}.input_convs.{{}}.conv.weight")):  # both from the smallest map on
        yield from both(f"{head}.input_convs.{i}.conv", f"{PIXELS}.input_projections.{i}.0")
        yield from both(f"{head}.input_convs.{i}.gn", f"{PIXELS}.input_projections.{i}.1")
    for i in range(count(state, f"{head}.encoder.layers.{{}}.norms.0.weight")):
        theirs, ours = f"{head}.encoder.layers.{i}", f"{PIXELS}.encoder.layers.{i}"
        for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            yield from both(f"{theirs}.attentions.0.{name}", f"{ours}.self_attn.{name}")
        yield from _tail(theirs, ours, ("self_attn_layer_norm", "final_layer_norm"))
    for theirs_, ours_ in (("lateral_convs.0", "adapter_1"), ("output_convs.0", "layer_1")):
        yield f"{head}.{theirs_}.conv.weight", [f"{PIXELS}.{ours_}.0.weight"], same
        yield from both(f"{head}.{theirs_}.gn", f"{PIXELS}.{ours_}.1")
    yield f"{head}.level_encoding.weight", [f"{PIXELS}.level_embed"], same
    yield from both(f"{head}.mask_feature", f"{PIXELS}.mask_projection")


def _layer(theirs: str, ours: str) -> Iterator[Rule]:
    """A layer of the decoder of queries: they look at the picture first, then at each other."""
    for kind in ("weight", "bias"):
        yield f"{theirs}.attentions.0.attn.in_proj_{kind}", [f"{ours}.cross_attn.in_proj_{kind}"], same
        split = [f"{ours}.self_attn.{name}.{kind}" for name in ("q_proj", "k_proj", "v_proj")]
        yield f"{theirs}.attentions.1.attn.in_proj_{kind}", split, thirds
    yield from both(f"{theirs}.attentions.0.attn.out_proj", f"{ours}.cross_attn.out_proj")
    yield from both(f"{theirs}.attentions.1.attn.out_proj", f"{ours}.self_attn.out_proj")
    yield from _tail(theirs, ours, ("cross_attn_layer_norm", "self_attn_layer_norm", "final_layer_norm"))


def _tail(theirs: str, ours: str, norms: Sequence[str]) -> Iterator[Rule]:
    yield from both(f"{theirs}.ffns.0.layers.0.0", f"{ours}.fc1")
    yield from both(f"{theirs}.ffns.0.layers.1", f"{ours}.fc2")
    for i, name in enumerate(norms):
        yield from both(f"{theirs}.norms.{i}", f"{ours}.{name}")


def _merged(tensor: Tensor) -> list[Tensor]:
    """Inputs of a patch merging. Of four neighbours mmdet's ``nn.Unfold`` puts the channel first, then row, then column; Swin's
    own order, which transformers keeps, is column, row, channel."""
    *out, inputs = tensor.shape
    return [tensor.reshape(*out, inputs // 4, 2, 2).movedim((-1, -2), (-3, -2)).reshape(tensor.shape)]


def main() -> None:
    """Prints the row of ``KNOWN`` for a folder: its sha256 and the five surest objects on the drawn picture."""
    detector = load(sys.argv[1], device="cuda" if torch.cuda.is_available() else "cpu")
    found = detector.detect([drawn_picture()])[0]
    rows = [(float(box[4]), name, *(round(float(end), 3) for end in box)) for name, objects in found.items() for box in objects.boxes]
    print({detector.identity.weights: [row for _, *row in sorted(rows, reverse=True)[:5]]})


if __name__ == "__main__":
    main()
