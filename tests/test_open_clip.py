"""A checkpoint of open_clip, converted: against towers written down after open_clip, on small random weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import test_clip
import torch
from PIL import Image
from torch import Tensor, nn

from vapi import cli
from vapi.config import EvaluateConfig
from vapi.metrics import clip as clips
from vapi.metrics import open_clip, text

transformers = pytest.importorskip("transformers", reason="pip install 'vapi-align[geneval]'")
SIDE, PATCH, SEEN, READ, WORDS, PLACES, JOINT = 28, 7, 128, 64, 192, 77, 24


class Block(nn.Module):
    """Its names are open_clip's, so that its state dict is laid out as one of theirs."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        parts = {"c_fc": nn.Linear(width, 2 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(2 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(SEEN))
        self.positional_embedding = nn.Parameter(torch.randn((SIDE // PATCH) ** 2 + 1, SEEN))
        self.conv1 = nn.Conv2d(3, SEEN, PATCH, PATCH, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(SEEN), nn.LayerNorm(SEEN)
        self.transformer = Tower(SEEN, 2, 3)
        self.proj = nn.Parameter(torch.randn(SEEN, JOINT) / SEEN**0.5)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(images), 1, -1), patches], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Visual()
        self.token_embedding = nn.Embedding(WORDS, READ)
        self.positional_embedding = nn.Parameter(torch.randn(PLACES, READ))
        self.transformer = Tower(READ, 1, 2)
        self.ln_final = nn.LayerNorm(READ)
        self.text_projection = nn.Parameter(torch.randn(READ, JOINT) / READ**0.5)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_text(self, ids: Tensor) -> Tensor:
        """From the end of the text, which bears the highest number of all words."""
        mask = torch.full((PLACES, PLACES), float("-inf")).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, mask))
        return x[torch.arange(len(ids)), ids.argmax(dim=1)] @ self.text_projection


@pytest.fixture(scope="module")
def theirs() -> OpenClip:
    torch.manual_seed(3)
    network = OpenClip().eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.dim() == 1 and name != "logit_scale":
                weight.add_(0.2 * torch.randn_like(weight))
    return network


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return test_clip.write(tmp_path_factory.mktemp("words") / "clip")


def write(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"epoch": 3, "state_dict": state}, path)
    return path


def test_a_converted_network_says_what_open_clips_does(theirs: OpenClip, words: Path, tmp_path: Path) -> None:
    source, folder = write(tmp_path / "HPS.pt", theirs.state_dict()), tmp_path / "hps"
    with pytest.raises(SystemExit) as stop:
        cli.main(["geneval", "convert-clip", str(source), str(folder), "--words", str(words)])
    assert stop.value.code == 0
    ours = clips.load(folder)
    images = [Image.fromarray(test_clip.picture(seed)) for seed in range(2)]
    said = ["a red bench", "two cats left of a cow"]
    ids = ours.tokenizer(said, padding="max_length", max_length=PLACES, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        seen, read = theirs.visual(torch.stack([ours.transform(image) for image in images])), theirs.encode_text(ids)
    torch.testing.assert_close(ours.image_features(images), seen, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.text_features(said), read, atol=1e-4, rtol=1e-4)

    metric = text.load(EvaluateConfig(hps=str(folder), text_metrics=["hpsv2"]), "cpu")["hpsv2"]
    score = (nn.functional.normalize(seen) @ nn.functional.normalize(read).T).diagonal()  # as hpsv2/img_score.py
    assert metric(np.stack([np.asarray(image) for image in images]), said, [{}] * 2) == pytest.approx(score.tolist(), abs=1e-5)


def test_heads_as_open_clip_counts_them() -> None:
    """ViT-B, L and H of pictures, and H's text: 12, 16, 16 and 16."""
    assert [min(open_clip.MOST_HEADS, width // open_clip.HEAD) for width in (768, 1024, 1280)] == [12, 16, 16]
    assert 1024 // open_clip.HEAD == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("visual.ln_pre.bias"), "not laid out as a CLIP of open_clip:\n  missing visual.ln_pre.bias"),
        (lambda state: state.update(more=torch.zeros(1)), "unexpected more"),
        (lambda state: state.update({"visual.ln_pre.bias": torch.zeros(3)}), "another shape: vision_model.pre_layrnorm.bias"),
        (lambda state: state.update({"token_embedding.weight": torch.zeros(50, READ)}), "has 192 words, and .* knows 50"),
    ],
)
def test_what_does_not_fit_is_refused(
    theirs: OpenClip, words: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    state = dict(theirs.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        open_clip.convert(write(tmp_path / "bad.pt", state), tmp_path / "out", words)
    assert not list(tmp_path.glob("*out*"))


def test_mistakes_are_told_in_words(words: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="HPSv2's is HPS_v2_compressed.pt of xswu/HPSv2 on the hub"):
        open_clip.convert(tmp_path / "none.pt", tmp_path / "out", words)
    with pytest.raises(ValueError, match="is there already"):
        open_clip.convert(tmp_path / "none.pt", words, words)
    with pytest.raises(ValueError, match="--words is .*nowhere, which lacks"):
        open_clip.convert(tmp_path / "none.pt", tmp_path / "out", tmp_path / "nowhere")
