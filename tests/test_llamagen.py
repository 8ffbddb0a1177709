"""The recipe of a full-size run from end to end, through the command line: the architecture and the file layouts of LlamaGen,
ImageNet, VGG, Inception and ADM's reference, with random weights, in minutes on a CPU. What is smaller than the real
thing: the generator (GPT-B), the side of the images (64) and their number."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import vgg16

from vapi import cli, references
from vapi.config import Config, build, dump, plain, write_text
from vapi.metrics import features as extractors
from vapi.models import gpt, vq
from vapi.recipes import recipe
from vapi.rewards import VGG_FILE

SIDE, CODES = 64, 16
SMALLER = {
    "model.generator": "data/llamagen/c2i_B.pt", "model.image_size": SIDE, "subset.images": 24, "tokens.images_per_batch": 8,
    "tune.images_per_step": 4, "tune.holdout_images": 4, "tune.steps": 2, "tune.compile": False, "tune.perceptual_weights": "data",
    "evaluate.protocol": "own", "evaluate.samples": 10, "evaluate.sweep_samples": 8, "evaluate.temperatures": [1.0],
    "evaluate.guidances": [1.0], "evaluate.images_per_batch": 5, "evaluate.sheet_images": 5,
    "track.uri": "off",
}  # fmt: skip


def write_imagenet(folder: Path) -> None:
    """A thousand class folders, one small JPEG in each."""
    rng = np.random.default_rng(0)
    for number in range(1000):
        wnid = folder / f"n{10_000_000 + 7 * number}"
        wnid.mkdir(parents=True)
        pixels = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((75, 90), Image.Resampling.BICUBIC).save(wnid / f"{wnid.name}_1.JPEG")


def write_weights(folder: Path) -> None:
    """Checkpoints under the names and in the layouts in which they are published."""
    torch.manual_seed(0)
    llamagen = folder / "llamagen"
    llamagen.mkdir(parents=True)
    width, layers, heads = gpt.PUBLISHED["GPT-B"]
    generator = gpt.Transformer(gpt.GPTConfig(width, layers, heads, 2048, 16384, CODES, 1000))
    torch.save({"model": generator.state_dict(), "steps": 300_000}, llamagen / "c2i_B.pt")
    torch.save({"model": vq.VQModel(vq.VQConfig()).state_dict()}, llamagen / "vq_ds16_c2i.pt")
    features = vgg16(weights=None).features
    torch.save({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, folder / VGG_FILE)


def write_reference(path: Path) -> None:
    """Images and moments as ADM publishes them."""
    rng = np.random.default_rng(1)
    moments = {"mu": rng.normal(size=2048), "sigma": np.eye(2048), "mu_s": rng.normal(size=2023), "sigma_s": np.eye(2023)}
    np.savez(path, arr_0=rng.integers(0, 256, (12, 256, 256, 3), dtype=np.uint8), **moments)


def call(*words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    assert stop.value.code == 0, words


@pytest.mark.slow
def test_a_full_size_run_in_small(tmp_path: Path, inception_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imagenet = tmp_path / "data" / "imagenet"
    write_imagenet(imagenet / "train")
    shutil.copytree(imagenet / "train", imagenet / "validation")
    write_weights(tmp_path / "data")
    write_reference(imagenet / "VIRTUAL_imagenet256_labeled.npz")
    values = plain(recipe("llamagen-xl-c2i"))
    for name, value in {**SMALLER, "evaluate.extractor_weights": str(inception_file)}.items():
        section, _, knob = name.partition(".")
        values[section][knob] = value
    write_text(tmp_path / "params.yaml", dump(build(Config, values)))
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", extractors.sha256(inception_file)[:8])
    monkeypatch.setattr(references, "VALIDATION_IMAGES", 12)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for stage in ("subset", "tokens", "tune", "evaluate", "register"):
        call(stage)
    found = json.loads(Path("artifacts/evaluate/metrics.json").read_text())
    for name in ("base", "tuned"):
        assert {"fid", "sfid", "inception_score", "precision", "recall"} <= found[name].keys() and found[name]["images"] == 10
    call("export", "artifacts/tune", "tuned.pt")
    ours, theirs = (torch.load(path, weights_only=True)["model"] for path in (SMALLER["model.generator"], "tuned.pt"))
    assert ours.keys() == theirs.keys() and any(not torch.equal(ours[name], theirs[name]) for name in ours)


# --- captions ----------------------------------------------------------------------------------

# float32, since a CPU without instructions for bfloat16 takes half an hour for the recipe's
SMALLER_T2I = {
    "model.generator": "data/llamagen/t2i_B.pt", "model.image_size": SIDE, "model.precision": "float32",
    "subset.images": 24, "subset.min_size": 32,
    "tokens.images_per_batch": 8, "tune.images_per_step": 4, "tune.holdout_images": 4, "tune.steps": 2, "tune.compile": False,
    "tune.perceptual_weights": "data", "evaluate.samples": 8, "evaluate.sweep_samples": 8, "evaluate.guidances": [2.0],
    "evaluate.images_per_batch": 8, "evaluate.sheet_images": 4, "evaluate.images_per_prompt": 1, "track.uri": "off",
}  # fmt: skip
PROMPTS = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"},
]


def write_tars(folder: Path, count: int) -> None:
    """Webdataset shards as LAION-COCO's: 000.jpg beside 000.json; one caption is null, one sample has more words than a caption may."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(2)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * count // 2, (shard + 1) * count // 2):
                buffer = io.BytesIO()
                pixels = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
                pixels.resize((70, 90), Image.Resampling.BICUBIC).save(buffer, "JPEG")
                caption = None if number == 3 else "a photo of " + "something red, " * (100 if number == 5 else 2) + str(number)
                for suffix, content in (("jpg", buffer.getvalue()), ("json", json.dumps({"caption": caption}).encode())):
                    entry = tarfile.TarInfo(f"{number:03d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


@pytest.mark.slow
def test_a_run_from_captions_in_small(tmp_path: Path, inception_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe llamagen-xl-t2i from tars to GenEval: real architectures and layouts, random weights of small sizes."""
    import mmdet_layout
    import test_clip
    import test_mask2former
    import test_text

    values = plain(recipe("llamagen-xl-t2i"))
    for name, value in {**SMALLER_T2I, "evaluate.extractor_weights": str(inception_file)}.items():
        section, _, knob = name.partition(".")
        values[section][knob] = value
    write_text(tmp_path / "params.yaml", dump(build(Config, values)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", extractors.sha256(inception_file)[:8])
    write_tars(Path(values["subset"]["source"]), 30)
    for name in ("reference", "validation"):
        write_tars(Path(values["evaluate"][name]), 12)
        for tar in Path(values["evaluate"][name]).glob("*1.tar"):  # without the caption that is none, which a reference may not lack
            tar.rename(tar.with_name("kept.tar"))
        (Path(values["evaluate"][name]) / "00000.tar").unlink()
    write_weights(Path("data"))
    width, layers, heads = gpt.PUBLISHED["GPT-B"]
    sizes = gpt.GPTConfig(width, layers, heads, 2048, 16384, CODES, 0, caption_dim=32, prefix=120)
    torch.save({"model": gpt.Transformer(sizes).state_dict()}, "data/llamagen/t2i_B.pt")
    Path("data/llamagen/vq_ds16_c2i.pt").rename("data/llamagen/vq_ds16_t2i.pt")
    test_text.write_t5(Path("data/llamagen/flan-t5-xl"))
    Path("data/geneval").mkdir()
    Path("data/geneval/prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    checkpoint = test_mask2former.write(Path("detector.pth"), mmdet_layout.random(test_mask2former.LAYOUT))
    call("geneval", "convert-detector", str(checkpoint), "data/geneval/mask2former")
    test_clip.write(Path("data/geneval/clip-vit-large-patch14"))
    for stage in ("subset", "tokens", "tune", "evaluate", "register"):
        call(stage)
    assert "no caption" in Path("artifacts/subset/quarantine.csv").read_text()
    captions = json.loads(Path("artifacts/tokens/summary.json").read_text())["captions"]
    assert (captions["captions"], captions["width"]) == (24, 32) and captions["longest"] > 120, "before it was cut"
    found = json.loads(Path("artifacts/evaluate/metrics.json").read_text())
    judged = found["prompts"]["detectors"]["geneval"]
    assert judged["base"]["title"] == "GenEval (HF)" and judged["base"]["images"] == 2  # that checkpoint is nobody's
    assert -1 <= found["tuned"]["clipscore"] <= 1 and {"fid", "sfid", "geneval"} <= found["tuned"].keys()
    call("export", "artifacts/tune", "tuned.pt")
    ours, theirs = (torch.load(path, weights_only=True)["model"] for path in (SMALLER_T2I["model.generator"], "tuned.pt"))
    assert ours.keys() == theirs.keys() and any(not torch.equal(ours[name], theirs[name]) for name in ours)
