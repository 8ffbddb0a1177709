"""CLIP, GenEval's judge of colours and the scores of pictures for prompts: against an implementation of their own, on small weights."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vapi.config import EvaluateConfig
from vapi.metrics import clip as clips
from vapi.metrics import text
from vapi.metrics.detections import Objects

transformers = pytest.importorskip("transformers", reason="pip install 'vapi-align[geneval]'")
SIDE, HEADS, LAYERS = 28, 2, 2


def write(folder: Path, seed: int = 0) -> Path:
    """A small CLIP with weights large enough to tell things apart, and a vocabulary of letters."""
    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(33, 127)]
    words = letters + [letter + "</w>" for letter in letters] + ["ph", "re", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\np h\nr e\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}))
    common = {"num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "hidden_act": "quick_gelu", "intermediate_size": 48}
    config = transformers.CLIPConfig(
        text_config=common | {"hidden_size": 16, "vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1},
        vision_config=common | {"hidden_size": 24, "image_size": SIDE, "patch_size": 14},
        projection_dim=12,
    )
    torch.manual_seed(seed)
    network = transformers.CLIPModel(config)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(
                torch.randn(weight.shape) / weight[0].numel() ** 0.5 if weight.dim() > 1 else weight + 0.2 * torch.randn(weight.shape)
            )
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("weights") / "clip")


@pytest.fixture(scope="module")
def clip(folder: Path) -> clips.Clip:
    return clips.load(folder)


# --- another implementation -------------------------------------------------------------------------


def tower(state: dict[str, Tensor], name: str, x: Tensor, causal: bool) -> Tensor:
    """A pre-norm transformer with the gates x sigmoid(1.702 x) that OpenAI trained with."""

    def affine(part: str, y: Tensor) -> Tensor:
        return y @ state[f"{part}.weight"].T + state[f"{part}.bias"]

    def norm(part: str, y: Tensor) -> Tensor:
        centred = y - y.mean(-1, keepdim=True)
        return centred / (y.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * state[f"{part}.weight"] + state[f"{part}.bias"]

    count = x.shape[0]
    for i in range(LAYERS):
        layer = f"{name}.encoder.layers.{i}"
        y = norm(f"{layer}.layer_norm1", x)
        q, k, v = (affine(f"{layer}.self_attn.{part}_proj", y).view(count, HEADS, -1).transpose(0, 1) for part in "qkv")
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if causal:
            scores = scores + torch.full((count, count), -torch.inf).triu(1)
        x = x + affine(f"{layer}.self_attn.out_proj", (scores.softmax(-1) @ v).transpose(0, 1).reshape(count, -1))
        y = affine(f"{layer}.mlp.fc1", norm(f"{layer}.layer_norm2", x))
        x = x + affine(f"{layer}.mlp.fc2", y * torch.sigmoid(1.702 * y))
    return norm(f"{name}.post_layernorm" if not causal else f"{name}.final_layer_norm", x)


def see(clip: clips.Clip, image: Image.Image) -> Tensor:
    """A picture's features, with open_clip's steps by hand. (1, D) float32."""
    state = clip.network.state_dict()
    width, height = image.size
    if width <= height:
        scaled = image.resize((SIDE, int(SIDE * height / width)), Image.Resampling.BICUBIC)
    else:
        scaled = image.resize((int(SIDE * width / height), SIDE), Image.Resampling.BICUBIC)
    left, top = round((scaled.width - SIDE) / 2), round((scaled.height - SIDE) / 2)
    pixels = np.asarray(scaled.convert("RGB"), np.float32)[top : top + SIDE, left : left + SIDE] / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    x = torch.from_numpy((pixels - np.float32(mean)) / np.float32(std)).permute(2, 0, 1)[None]
    patches = torch.nn.functional.conv2d(x, state["vision_model.embeddings.patch_embedding.weight"], stride=14).flatten(2)[0].T
    x = (
        torch.cat([state["vision_model.embeddings.class_embedding"][None], patches])
        + state["vision_model.embeddings.position_embedding.weight"]
    )
    names = [f"vision_model.pre_layrnorm.{kind}" for kind in ("weight", "bias")]
    x = torch.nn.functional.layer_norm(x, x.shape[-1:], *(state[name] for name in names))
    return tower(state, "vision_model", x, causal=False)[:1] @ state["visual_projection.weight"].T


def read(clip: clips.Clip, said: str) -> Tensor:
    """A sentence's features, at its end token; nothing is padded. (1, D) float32."""
    state = clip.network.state_dict()
    ids = clip.tokenizer(said)["input_ids"]
    assert ids[0] == len(clip.tokenizer) - 2 and ids[-1] == len(clip.tokenizer) - 1
    x = state["text_model.embeddings.token_embedding.weight"][ids] + state["text_model.embeddings.position_embedding.weight"][: len(ids)]
    return tower(state, "text_model", x, causal=True)[-1:] @ state["text_projection.weight"].T


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


NAMES = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]


def directions(clip: clips.Clip, name: str) -> Tensor:
    """(10, D): GenEval's rule in words of its own."""
    rows = []
    for one in NAMES:
        said = [f"a photo of a {one} {name}", f"a photo of a {one}-colored {name}", f"a photo of a {one} object"]
        rows.append(unit(sum(unit(read(clip, line)) for line in said) / 3))
    return torch.cat(rows)


def colour(clip: clips.Clip, crop: Image.Image, name: str) -> tuple[str, float]:
    """The colour, and by how much it won."""
    found = (directions(clip, name) @ unit(see(clip, crop)).T).flatten().tolist()
    best = sorted(found)[-2:]
    return NAMES[int(np.argmax(found))], best[1] - best[0]


def picture(seed: int = 0, height: int = 60, width: int = 50) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR))


BOXES = [(0, 0, 50, 60), (5, 7, 30, 40), (10, 3, 14, 55), (1, 20, 49, 27), (40, 50, 41, 51)]


def objects(masks: bool = True, boxes: list[tuple[int, ...]] = BOXES) -> Objects:
    """Ellipses in boxes; without masks the boxes alone."""
    y, x = np.mgrid[:60, :50]
    inside = [((2 * x + 1 - a - c) / (c - a)) ** 2 + ((2 * y + 1 - b - d) / (d - b)) ** 2 <= 1 for a, b, c, d in boxes]
    rows = np.array([(*box, 0.9) for box in boxes], np.float32)
    return Objects(rows, np.stack(inside) if masks else None, "fire hydrant")


# --- tests -------------------------------------------------------------------------------------------


def test_features_are_those_of_another_implementation(clip: clips.Clip) -> None:
    shown = [
        Image.fromarray(picture(seed, height, width)) for seed, (height, width) in enumerate([(60, 50), (28, 28), (31, 97), (200, 40)])
    ]
    said = ["a photo of a red car", "x", "Two Dogs, left of a vase!"]
    assert clip.image_features(shown).shape == (4, 12) and clip.text_features(said).shape == (3, 12)
    torch.testing.assert_close(clip.image_features(shown), torch.cat([see(clip, one) for one in shown]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(clip.text_features(said), torch.cat([read(clip, one) for one in said]), rtol=1e-4, atol=1e-4)
    assert clip.text_features(["a " * 500]).isfinite().all()
    assert "width 24" in clip.architecture and clip.architecture != clips.OFFICIAL and clip.arithmetic == "float32"


def test_vit_l_14_is_known_by_its_shape(clip: clips.Clip) -> None:
    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14, "intermediate_size": 4096}
    with torch.device("meta"):
        network = transformers.CLIPModel(
            transformers.CLIPConfig(vision_config=vision, text_config={"num_hidden_layers": 1}, projection_dim=768)
        )
    assert clips.Clip(network, None, torch.device("meta")).architecture == "CLIP ViT-L/14"


@pytest.mark.parametrize("masks", [True, False])
def test_colours_are_judged_by_genevals_rule(clip: clips.Clip, masks: bool) -> None:
    shown, found = picture(), objects(masks)
    expected = []
    for index, box in enumerate(BOXES):
        grey = np.full_like(shown, 0x99)
        seen = np.where(found.masks[index][..., None], shown, grey) if masks else shown
        expected.append(colour(clip, Image.fromarray(seen[box[1] : box[3], box[0] : box[2]]), "fire hydrant"))
    assert min(margin for _, margin in expected) > 1e-5
    judge = clips.ColourClassifier(clip)
    assert judge(shown, found) == [name for name, _ in expected]
    torch.testing.assert_close(judge.classifiers["fire hydrant"].T, directions(clip, "fire hydrant"), rtol=1e-4, atol=1e-5)


def test_what_clip_is_shown() -> None:
    shown, found = picture(), objects()
    for index, crop in enumerate(clips.crops(shown, found)):
        x0, y0, x1, y1 = BOXES[index]
        inside = found.masks[index][y0:y1, x0:x1]
        seen = np.asarray(crop)
        assert np.array_equal(seen[inside], shown[y0:y1, x0:x1][inside]) and (seen[~inside] == 153).all()
    assert (~found.masks[0]).any()


def test_the_ground_matters(clip: clips.Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that puts objects on white names other colours, so the comparison above would see it."""
    judge = clips.ColourClassifier(clip)
    shown = [picture(seed) for seed in range(12)]
    grey = [judge(one, objects()) for one in shown]
    monkeypatch.setattr(clips, "GROUND", "#fff")
    assert [judge(one, objects()) for one in shown] != grey


def test_sentences_are_genevals(clip: clips.Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    whole = clips.Clip.text_features
    monkeypatch.setattr(clips.Clip, "text_features", lambda self, texts: said.extend(texts) or whole(self, texts))
    judge = clips.ColourClassifier(clip)
    for _ in range(2):
        judge(picture(), objects())
    assert len(said) == 30, "said once a class"
    assert said[:3] == ["a photo of a red fire hydrant", "a photo of a red-colored fire hydrant", "a photo of a red object"]
    assert " ".join(line.split()[4] for line in said[2::3]) == "red orange yellow green blue purple pink brown black white"


def test_colours_need_a_class_and_pixels(clip: clips.Clip) -> None:
    judge = clips.ColourClassifier(clip)
    assert judge(picture(), Objects(np.empty((0, 5), np.float32), None, "car")) == []
    for box in [(5, 5, 5, 9, 1), (5, 5, 9, 5, 1), (9, 5, 5, 9, 1)]:
        with pytest.raises(ValueError, match="holds no pixel"):
            judge(picture(), Objects(np.array([box], np.float32), None, "car"))
    with pytest.raises(ValueError, match=re.escape("Objects.name")):
        judge(picture(), Objects(objects().boxes))


def test_bad_folders_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="evaluate.clip is .*nowhere, which lacks config.json.*openai/clip-vit-large-patch14"):
        clips.load(tmp_path / "nowhere")
    other = write(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"projection_dim": 13}))
    with pytest.raises(ValueError, match="another shape: text_projection.weight"):
        clips.load(other)
    (other / "config.json").write_text(json.dumps(config))
    vocabulary = json.loads((other / "vocab.json").read_text())
    (other / "vocab.json").write_text(json.dumps(vocabulary | {"more": len(vocabulary)}))
    with pytest.raises(ValueError, match="two different networks"):
        clips.load(other)
    (other / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
    with pytest.raises(ValueError, match="holds a siglip network, not clip"):
        clips.load(other)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("pip install 'vapi-align[geneval]'")):
        clips.load(folder)


# --- scores for prompts -----------------------------------------------------------------------------


def test_clipscore_is_the_plain_cosine(clip: clips.Clip, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PICTURES", 2)
    metric = text.load(EvaluateConfig(clip=str(folder), text_metrics=["clipscore"]), "cpu")["clipscore"]
    images = np.stack([picture(seed) for seed in range(3)])
    prompts = ["a red bench", "two cats", "a photo of a cow left of a stop sign"]
    expected = [float(unit(see(clip, Image.fromarray(image))) @ unit(read(clip, said)).T) for image, said in zip(images, prompts)]
    assert metric(images, prompts, [{}] * 3) == pytest.approx(expected, abs=1e-5)
    assert "no prefix" in metric.describe and clip.sha256 in metric.describe


def test_hpsv2_is_the_same_cosine_by_a_network_of_its_own(folder: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "hps", seed=1)
    config = EvaluateConfig(clip=str(folder), hps=str(other), text_metrics=["clipscore", "hpsv2"])
    images, prompts = np.stack([picture(0)]), ["a red bench"]
    (clipscore,), (hpsv2,) = (metric(images, prompts, [{}]) for metric in text.load(config, "cpu").values())
    as_clip = text.load(EvaluateConfig(clip=str(other), text_metrics=["clipscore"]), "cpu")["clipscore"]
    assert hpsv2 == as_clip(images, prompts, [{}])[0] != clipscore
    with pytest.raises(ValueError, match="asks for hpsv2; set evaluate.hps to a folder of its weights"):
        text.load(EvaluateConfig(text_metrics=["hpsv2"]), "cpu")
    with pytest.raises(ValueError, match="evaluate.hps is nowhere, which lacks config.json"):
        text.require(EvaluateConfig(hps="nowhere", text_metrics=["hpsv2"]))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts.jsonl", '{"prompt": "a red bench", "tag": "colours"}\n{"prompt": "two cats", "tag": "2", "more": 1}\n'),
        ("prompts.csv", "Prompts,Category\na red bench,colours\ntwo cats,2\n"),
        ("prompts.tsv", "Prompt\tCategory\tChallenge\na red bench\tcolours\tx\ntwo cats\t2\ty\n"),
    ],
)
def test_prompts_of_files_as_they_are_published(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert [(one.text, one.tag, one.include) for one in text.read_prompts(tmp_path / name)] == [
        ("a red bench", "colours", ()),
        ("two cats", "2", ()),
    ]
    (tmp_path / "plain.txt").write_text("a red bench\n\ntwo cats, one of them NA\n")
    assert [one.text for one in text.read_prompts(tmp_path / "plain.txt")] == ["a red bench", "two cats, one of them NA"]


def test_prompts_keep_their_quotation_marks_and_groups(tmp_path: Path) -> None:
    """In TSV nothing is quoted; a group that a line lacks is none, and a number is a word."""
    (tmp_path / "a.tsv").write_text('Prompt\tCategory\n"Fly" on a wall\tArts\na 5" screen\t\nthree, two\tArts\n')
    rows = [(one.text, one.tag) for one in text.read_prompts(tmp_path / "a.tsv")]
    assert rows == [('"Fly" on a wall', "Arts"), ('a 5" screen', text.ALL), ("three, two", "Arts")]
    (tmp_path / "a.CSV").write_text('prompt\n"a cat, a dog"\n')
    assert [one.text for one in text.read_prompts(tmp_path / "a.CSV")] == ["a cat, a dog"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "tag": 3}\n{"prompt": "y", "tag": null}\n{"prompt": "z"}\n')
    assert [one.tag for one in text.read_prompts(tmp_path / "a.jsonl")] == ["3", text.ALL, text.ALL]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text\nx\n", "line 2 has the fields text; one must be called prompt or prompts or caption"),
        ("a.csv", "prompt,tag\n,x\n", "line 2: prompt is ''; it must be a text"),
        ("a.csv", "prompt\na cat, a dog\n", "line 2 has more or fewer fields than its first line; put quotation marks around"),
        ("a.csv", "prompt,tag\na cat\n", "line 2 has more or fewer fields"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1: prompt is 3; it must be a text"),
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.json", '["a", "b"]', "line 1 is .*; give a mapping with a field prompt"),
        ("a.jsonl", "", "is empty"),
        ("a.txt", "", "is empty"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        text.read_prompts(tmp_path / name)
    with pytest.raises(ValueError, match="is not here"):
        text.read_prompts(tmp_path / "nowhere.csv")


def test_the_documented_metric_of_ones_own_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "text-metrics.md").read_text()
    (code,) = re.findall(r"```python\n(# my_scores.py\n.*?)```", page, re.DOTALL)
    assert len(code.splitlines()) <= 10
    (tmp_path / "my_scores.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_scores", raising=False)
    ((name, metric),) = text.load(EvaluateConfig(text_metrics=["my_scores:brightness"]), "cpu").items()
    images = np.stack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)])
    assert metric(images, ["dark", "light"], [{}, {}]) == [0.0, 1.0] and name == "my_scores:brightness"
    assert metric.describe == f"my_scores:brightness; code {hashlib.sha256(code.encode()).hexdigest()[:16]}"


def test_bad_text_metrics_are_refused() -> None:
    def refused(message: str, *names: str) -> None:
        with pytest.raises(ValueError, match=message):
            text.load(EvaluateConfig(text_metrics=list(names)), "cpu")

    refused("names 'clip_score'; .*clipscore.*, or give module:function", "clip_score")
    refused("cannot be imported", "no_such_module:score")
    refused("cannot be imported", "json:no_such_function")
    refused("set evaluate.clip to a folder", "clipscore")
    for message, found in (("returned 1 numbers for 2 images", [1.0]), ("not finite", [1.0, float("nan")])):
        metric = text.Checked("short", lambda *given, found=found: found)
        with pytest.raises(ValueError, match=f"the text metric short returned .*{message.removeprefix('returned ')}"):
            metric(np.zeros((2, 4, 4, 3), np.uint8), ["a", "b"], [{}, {}])
