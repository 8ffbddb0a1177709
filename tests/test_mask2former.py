"""GenEval's detector: a converted checkpoint computes what mmdet's layers do, and outputs are read as mmdet reads them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import mmdet_layout as mmdet
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from vapi.metrics import conversion, mask2former, pretrained
from vapi.metrics.detections import Detections, Detector

pytest.importorskip("transformers", reason="pip install 'vapi-align[geneval]'")
LAYOUT = mmdet.Layout()


def write(path: Path, state: mmdet.State) -> Path:
    """As mmdet keeps its checkpoints."""
    torch.save({"meta": {"CLASSES": ("person",), "epoch": 1, "config": "model = dict()"}, "state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def state() -> mmdet.State:
    return mmdet.random(LAYOUT)


@pytest.fixture(scope="module")
def source(state: mmdet.State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("mmdet") / "checkpoint.pth", state)


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mask2former.convert(source, tmp_path_factory.mktemp("converted") / "detector")


@pytest.fixture(scope="module")
def detector(folder: Path) -> mask2former.Mask2Former:
    return mask2former.load(folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def pictures(count: int, height: int = 64, width: int = 80) -> list[np.ndarray]:
    random = np.random.default_rng(5)
    small = random.integers(0, 256, (count, 5, 6, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BILINEAR)) for one in small]


# --- the conversion -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 96), (224, 160)])
def test_a_converted_network_computes_what_mmdets_layers_do(
    state: mmdet.State, detector: mask2former.Mask2Former, size: tuple[int, int]
) -> None:
    """Windows that are shifted and padded, odd maps, all levels: class and mask logits agree to rounding."""
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        classes, masks = mmdet.forward(state, LAYOUT, pixels)
        seen = detector.network(pixel_values=pixels)
    assert classes.std() > 0.5 and masks.std() > 0.5
    torch.testing.assert_close(seen.class_queries_logits, classes, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(seen.masks_queries_logits, masks, rtol=1e-4, atol=1e-3)


def test_neighbours_are_merged_in_transformers_order() -> None:
    from transformers.models.swin.modeling_swin import SwinPatchMerging

    torch.manual_seed(0)
    theirs, x = SwinPatchMerging(8), torch.randn(2, 5, 7, 8)
    norm, reduction = (torch.randn(32), torch.randn(32)), torch.randn(16, 32)
    expected = mmdet.merge(x, norm, reduction)

    def merged(change: Callable[[Tensor], Tensor]) -> Tensor:
        theirs.load_state_dict({"norm.weight": change(norm[0]), "norm.bias": change(norm[1]), "reduction.weight": change(reduction)})
        return theirs(x.flatten(1, 2), (5, 7)).view(expected.shape)

    torch.testing.assert_close(merged(lambda tensor: mask2former._merged(tensor)[0]), expected)
    assert not torch.allclose(merged(lambda tensor: tensor), expected, atol=0.1)
    rows_first = lambda tensor: tensor.unflatten(-1, (8, 2, 2)).movedim(-3, -1).flatten(-3)  # noqa: E731
    assert not torch.allclose(merged(rows_first), expected, atol=0.1)


def test_names_and_shapes_are_transformers(folder: Path, detector: mask2former.Mask2Former, tmp_path: Path) -> None:
    """The file is laid out as transformers itself would write it, and older versions of it: with the table of places."""
    detector.network.save_pretrained(tmp_path)
    own, theirs = (load_file(place / pretrained.WEIGHTS) for place in (folder, tmp_path))
    tables = {name for name in own if name.endswith("relative_position_index")}
    assert len(tables) == sum(LAYOUT.depths) and all(torch.equal(own[name], mmdet.index(7)) for name in tables)
    assert {name: tensor.shape for name, tensor in own.items() if name not in tables} == {n: t.shape for n, t in theirs.items()}
    assert all(torch.equal(own[name], theirs[name]) for name in theirs)


def test_the_published_size_has_the_names_and_shapes_of_facebooks() -> None:
    """Swin-S, on the device that holds no numbers: every key of the one is a key of the other."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = SwinConfig(
        embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7, out_features=[f"stage{i}" for i in "1234"]
    )
    with torch.device("meta"):
        network = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, num_labels=80))
        theirs = {_as_stored(name): tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        state = {name: torch.empty(shape) for name, shape in mmdet.shapes(mmdet.SWIN_S)}
    made = mask2former.translate(state, "meta")
    own = {name: tuple(tensor.shape) for name, tensor in made.items() if not name.endswith("relative_position_index")}
    assert own == theirs and sum(math.prod(shape) for shape in own.values()) > 68e6
    derived = mask2former._config(state, Path("meta")).to_dict()
    expected = network.config.to_dict()
    names = ("feature_size", "hidden_dim", "mask_feature_size", "encoder_feedforward_dim", "dim_feedforward", "encoder_layers")
    names += ("decoder_layers", "num_attention_heads", "num_queries")
    assert {name: derived[name] for name in names} == {name: expected[name] for name in names}
    names = ("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "out_features", "hidden_size", "patch_size")
    assert {n: derived["backbone_config"][n] for n in names} == {n: expected["backbone_config"][n] for n in names}


def _as_stored(name: str) -> str:
    """A name in memory (transformers 5) as it is in files."""
    name = re.sub(r"encoder\.swin\.(embeddings|encoder)\.", r"encoder.\1.", name)
    if ".blocks." in name:
        for memory, file in {
            "attention.q_proj": "attention.self.query",
            "attention.k_proj": "attention.self.key",
            "attention.v_proj": "attention.self.value",
            "attention.o_proj": "attention.output.dense",
            "attention.relative_position_bias.": "attention.self.",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
        }.items():
            name = name.replace(memory, file)
    return name


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


def test_bad_checkpoints_are_refused(state: mmdet.State, source: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def refused(message: str, change: Callable[[mmdet.State], object]) -> None:
        changed = dict(state)
        change(changed)
        with pytest.raises(ValueError, match=message):
            mask2former.convert(write(tmp_path / "bad.pth", changed), tmp_path / "out")
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()

    norm = "backbone.stages.2.blocks.1.norm2.bias"
    refused(f"missing {norm}", lambda s: s.pop(norm))
    refused("unexpected neck.convs.0.weight", lambda s: s.update({"neck.convs.0.weight": torch.zeros(3)}))
    refused("another shape: .*layernorm_after.bias", lambda s: s.update({norm: torch.zeros(5)}))
    refused("tells 133 classes", lambda s: s.update({"panoptic_head.cls_embed.weight": torch.zeros(134, 32)}))
    refused("no Mask2Former of mmdet 2.x with a Swin backbone", lambda s: s.pop("backbone.patch_embed.norm.weight"))
    refused("holds no weights", lambda s: s.clear())
    torch.save({"state_dict": state, "meta": Code()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="not executed"):
        mask2former.convert(tmp_path / "code.pth", tmp_path / "out")
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="743b7d99.pth"):
        mask2former.convert(tmp_path / "none.pth", tmp_path / "out")
    with pytest.raises(ValueError, match="is there already"):
        mask2former.convert(source, folder)


# --- before and after the network -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "inner", "padded"),
    [((256, 256), (800, 800), (800, 800)), ((1024, 1024), (800, 800), (800, 800)), ((300, 100), (1333, 444), (1344, 448)),
     ((480, 640), (800, 1067), (800, 1088)), ((640, 480), (1067, 800), (1088, 800)), ((512, 500), (819, 800), (832, 800))],
)  # fmt: skip
def test_pictures_are_scaled_as_mmdet_does(size: tuple[int, int], inner: tuple[int, int], padded: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    picture = random.integers(0, 256, (*size, 3), dtype=np.uint8)
    made, found = mask2former.prepare(torch.from_numpy(picture).permute(2, 0, 1)[None])
    assert found == inner and made.shape == (1, 3, *padded)
    assert not made[..., inner[0] :, :].any() and not made[..., inner[1] :].any()
    back = made[0, :, : inner[0], : inner[1]] * torch.tensor(mask2former.STD)[:, None, None] + torch.tensor(mask2former.MEAN)[:, None, None]
    assert (back - back.round()).abs().max() < 1e-3, "grey levels are whole"
    np.testing.assert_allclose(back.permute(1, 2, 0).numpy(), bilinear(picture, inner), atol=0.55)  # half, and float32


def bilinear(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Between the four nearest pixels, whether it grows or shrinks (as cv2 does): no smoothing."""
    made = picture.astype(np.float64)
    for axis, count in enumerate(size):
        old = picture.shape[axis]
        place = ((np.arange(count) + 0.5) * old / count - 0.5).clip(0, old - 1)
        low = np.floor(place).astype(int)
        share = (place - low).reshape(-1, *[1] * (2 - axis))
        made = np.take(made, low, axis) * (1 - share) + np.take(made, (low + 1).clip(max=old - 1), axis) * share
    return made


def by_the_book(classes: Tensor, masks: Tensor, padded: tuple[int, int], inner: tuple[int, int], size: tuple[int, int]) -> list[tuple]:
    """mmdet's rule, pair by pair: (score, label, box, mask), the surest first."""
    large = F.interpolate(masks[None], size=padded, mode="bilinear", align_corners=False)[0][:, : inner[0], : inner[1]]
    large = F.interpolate(large[None], size=size, mode="bilinear", align_corners=False)[0].numpy()
    shares = torch.softmax(classes, dim=1).numpy()
    pairs = [(shares[q, c], q, c) for q in range(len(classes)) for c in range(classes.shape[1] - 1)]
    found = []
    for share, q, c in sorted(pairs, reverse=True)[:100]:
        inside = large[q] > 0
        rows, columns = np.nonzero(inside)
        sure = (1 / (1 + np.exp(-large[q][inside].astype(np.float64)))).sum() / (inside.sum() + 1e-6)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if inside.any() else (0, 0, 0, 0)
        found.append((share * sure, c, box, inside))
    return sorted(found, key=lambda one: -one[0])


def test_outputs_are_read_by_mmdets_rule() -> None:
    generator = torch.Generator().manual_seed(3)
    classes = 3 * torch.randn(20, 81, generator=generator)
    masks = F.interpolate(torch.randn(1, 20, 4, 5, generator=generator), size=(24, 28), mode="bicubic")[0] - 0.3
    masks[7] = -1.0  # a query that marks nothing
    classes[7, 0] = 20.0  # and is sure of it
    sizes = (96, 112), (90, 101), (57, 64)
    found = mask2former.postprocess(classes, masks, *sizes)
    expected = by_the_book(classes, masks, *sizes)
    assert len(found.labels) == len(expected) == 100
    np.testing.assert_allclose(found.boxes[:, 4], [one[0] for one in expected], atol=1e-6)
    assert found.labels.tolist() == [one[1] for one in expected]
    np.testing.assert_array_equal(found.boxes[:, :4], [one[2] for one in expected])
    np.testing.assert_array_equal(found.masks, [one[3] for one in expected])
    assert found.boxes[-1].tolist() == [0, 0, 0, 0, 0] and found.labels[-1] == 0 and not found.masks[-1].any()
    queries = {mask.numpy().tobytes() for mask in found.masks}
    assert len(queries) < 100, "a query may stand for several classes"
    x0, y0, x1, y1 = found.boxes[0, :4].int().tolist()
    assert found.masks[0, y0:y1, x0:x1].sum() == found.masks[0].sum()


def flat(found: Detections) -> tuple[list[str], np.ndarray]:
    names = sorted(found)
    return names, np.concatenate([found[name].boxes for name in names])


def test_a_picture_does_not_depend_on_its_batch_mates(detector: mask2former.Mask2Former) -> None:
    mixed = [*pictures(1), *pictures(1, 80, 64), *pictures(2)[1:]]
    alone = [detector.detect([picture])[0] for picture in mixed]
    together = dataclasses.replace(detector, images_per_batch=3).detect(mixed)
    shapes = [next(iter(found.values())).masks.shape[1:] for found in together]
    assert shapes == [(64, 80), (80, 64), (64, 80)]
    for one, other in zip(alone, together):
        assert flat(one)[0] == flat(other)[0]
        np.testing.assert_allclose(flat(one)[1][:, 4], flat(other)[1][:, 4], atol=1e-4)
        assert np.abs(flat(one)[1][:, :4] - flat(other)[1][:, :4]).mean() < 0.1
    assert not np.allclose(flat(alone[0])[1][:5], flat(alone[2])[1][:5])


def test_it_is_a_detector(detector: mask2former.Mask2Former) -> None:
    as_one: Detector = detector
    (found,) = as_one.detect(pictures(1))
    assert sum(map(len, found.values())) == 100 and set(found) <= set(as_one.classes)
    for name, objects in found.items():
        assert objects.name == name and objects.boxes.dtype == np.float32 and objects.masks.dtype == bool
        assert (np.diff(objects.boxes[:, 4]) <= 0).all() and objects.boxes[:, 4].max() <= 1
    assert as_one.detect([]) == []
    assert as_one.rules.threshold == 0.3 and as_one.rules.counting_threshold == 0.9 and as_one.rules.max_overlap == 1
    assert not as_one.colours
    with pytest.raises(ValueError, match="evaluate.clip"):
        as_one.colour(pictures(1)[0], found[next(iter(found))])


# --- names, titles, refusals ------------------------------------------------------------------------


def edited(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_classes_go_by_index(detector: mask2former.Mask2Former, copy: Path) -> None:
    """A checkpoint that calls a computer mouse "mouse", and a motorcycle "motorbike", sees the same things."""
    assert len(mask2former.CLASSES) == len(set(mask2former.CLASSES)) == 80
    assert [mask2former.CLASSES[i] for i in (0, 62, 64, 65, 66, 79)] == [
        "person", "tv", "computer mouse", "tv remote", "computer keyboard", "toothbrush"
    ]  # fmt: skip
    dialect = dict(enumerate(mask2former.CLASSES)) | {3: "motorbike", 4: "aeroplane", 57: "sofa", 62: "tvmonitor", 64: "mouse"}
    other = mask2former.load(edited(copy, id2label={str(index): name for index, name in dialect.items()}))
    assert flat(other.detect(pictures(1))[0])[0] == flat(detector.detect(pictures(1))[0])[0]
    shuffled = {str(index): name for index, name in enumerate(mask2former.CLASSES[::-1])}
    with pytest.raises(ValueError, match="not COCO's in COCO's order"):
        mask2former.require(edited(copy, id2label=shuffled))
    with pytest.raises(ValueError, match="tells 133 classes; GenEval needs COCO's 80"):
        mask2former.require(edited(copy, id2label={str(index): f"c{index}" for index in range(133)}))


def test_only_genevals_own_weights_are_called_geneval(
    folder: Path, source: Path, copy: Path, detector: mask2former.Mask2Former, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = pretrained_sha(source)
    assert detector.identity.title == "GenEval (HF)" and "CC BY-NC 4.0" in detector.identity.licence
    assert detector.identity.weights == pretrained_sha(folder / "model.safetensors")
    assert detector.identity.more["converted from"] == digest
    monkeypatch.setattr(mask2former, "OFFICIAL", digest[:8])
    identity = mask2former._identity(folder, None)
    assert identity.title == "GenEval" and identity.licence == "Apache-2.0 (OpenMMLab)"
    weights = load_file(copy / "model.safetensors")  # the marker stays, the weights do not
    weights["class_predictor.bias"] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert mask2former._identity(copy, None).title == "GenEval (HF)"
    (copy / conversion.MARKER).unlink()
    assert mask2former._identity(copy, None).title == "GenEval (HF)"


def pretrained_sha(path: Path) -> str:
    from vapi.metrics.features import sha256

    return sha256(path)


def damaged(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


PATCH = "model.pixel_level_module.encoder.embeddings.patch_embeddings.projection"


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("missing class_predictor.bias", lambda w: w.pop("class_predictor.bias")),
        ("unexpected more", lambda w: w.update(more=torch.zeros(1))),
        ("another shape: .*queries_features", lambda w: w.update({f"{mask2former.QUERIES}.queries_features.weight": torch.zeros(3, 32)})),
        ("not finite", lambda w: w["class_predictor.bias"].fill_(math.nan)),
        ("every score is 0", lambda w: _blind(w)),
        ("its mirror image", lambda w: w[f"{PATCH}.weight"].zero_()),
    ],
)  # fmt: skip
def test_bad_weights_are_refused(copy: Path, message: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    with pytest.raises(ValueError, match=message):
        mask2former.load(damaged(copy, change))


def _blind(weights: dict[str, Tensor]) -> None:
    """No mask is ever above 0."""
    for name in weights:
        if ".mask_embedder.2." in name or "mask_projection" in name:
            weights[name].zero_()


def test_bad_folders_are_refused(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="evaluate.detector is .*lacks config.json, model.safetensors; give a folder"):
        mask2former.load(tmp_path)
    with pytest.raises(ValueError, match="holds a clip network, not mask2former"):
        mask2former.load(edited(copy, model_type="clip"))
    edited(copy, model_type="mask2former")
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not whole"):
        mask2former.load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        mask2former.load(copy)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no local folder, and the hub did not give it"):
        mask2former.load("nobody/nothing")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("pip install 'vapi-align[geneval]'")):
        mask2former.load(copy)


def test_weights_that_are_known_must_see_what_they_saw(detector: mask2former.Mask2Former, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = detector.detect([mask2former.drawn_picture()])
    name = max(found, key=lambda one: found[one].boxes[0, 4])
    row = (name, *map(float, found[name].boxes[0]))
    monkeypatch.setattr(mask2former, "KNOWN", {detector.identity.weights: [row]})
    mask2former.self_check(detector)
    monkeypatch.setattr(mask2former, "KNOWN", {detector.identity.weights: [(*row[:-1], row[-1] + 0.1)]})
    with pytest.raises(ValueError, match=f"known to see a {name}"):
        mask2former.self_check(detector)
