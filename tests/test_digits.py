"""The embedded world: the same pictures everywhere, glyphs that never meet, weights the pipeline can read."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from vapi import data, models
from vapi.config import ModelConfig
from vapi.digits import build, paint
from vapi.images import to_float
from vapi.metrics import fid
from vapi.models import features

DATA = Path("data")
GOLDEN = "311d0f77f9e4049de83bfa662628716a1c940ae84f4ff0fe98a48e10cc7b7199"
bundled = pytest.mark.skipif(not (DATA / "models").is_dir(), reason="data/ is not here: dvc pull data.dvc")


def test_splits_share_no_glyph() -> None:
    parts = [set(paint.split(name).tolist()) for name in paint.SPLITS]
    assert sum(map(len, parts)) == paint.GLYPHS == len(set.union(*parts))
    _, labels = paint.glyphs()
    for name in paint.SPLITS:
        assert set(labels[paint.split(name)]) == set(range(10))


def test_an_image_depends_on_its_seed_and_index_alone() -> None:
    together, labels = paint.paint("train", 12, seed=7)
    alone, label = paint.paint("train", 1, seed=7, first=9)
    assert np.array_equal(together[9], alone[0]) and labels[9] == label[0] == 9
    other, _ = paint.paint("train", 12, seed=8)
    assert not np.array_equal(together, other)


def test_pictures_are_the_same_bytes_everywhere() -> None:
    images, labels = paint.paint("reference", 20, seed=5)
    assert images.shape == (20, 32, 32, 3) and images.dtype == np.uint8
    assert labels.tolist() == [i % 10 for i in range(20)]
    assert build.pixel_hash(images) == GOLDEN


def test_the_glyph_stands_out() -> None:
    """Where the ink is, luminance differs from the ground around it, on nearly every picture."""
    shapes, labels = paint.glyphs()
    u = paint.uniforms(3, np.arange(200), 24)
    base = paint.ground(u[:, :14])
    contrast = np.abs(paint.inks(u[:, 14:17], base) @ paint.LUMA - base.mean(axis=(1, 2)) @ paint.LUMA)
    assert (contrast > 0.15).mean() > 0.95


def test_rebuild_at_a_tiny_size(tmp_path: Path) -> None:
    measured = build.build(tmp_path / "data", build.TINY)
    assert all(np.isfinite(list(measured.values())))
    model = ModelConfig(
        generator=str(tmp_path / "data/models/generator.safetensors"),
        tokenizer=str(tmp_path / "data/models/tokenizer.safetensors"),
        device="cpu",
    )
    policy = models.load(model)
    assert policy.generate(policy.condition([3]), [0]).shape == (1, policy.num_codes)
    images, labels, _ = data.read_images(tmp_path / "data/digits/train.parquet")
    again, _ = paint.paint("train", 60, build.SEEDS["train"])
    assert np.array_equal(images, again) and len(labels) == 60
    with pytest.raises(ValueError, match="exists; name a new folder"):
        build.build(tmp_path / "data", build.TINY)


@bundled
def test_bundled_pictures_are_what_the_painter_paints() -> None:
    for name, count in build.WORLD.painted.items():
        images, labels, _ = data.read_images(DATA / "digits" / f"{name}.parquet", limit=20)
        again, expected = paint.paint(name, 20, build.SEEDS[name])
        assert np.array_equal(images, again) and np.array_equal(labels, expected), name
        assert f"| digits/{name}.parquet | {count} |" in (DATA / "README.md").read_text()


@bundled
def test_reward_and_metric_networks_differ() -> None:
    """The metric must not grade its own reward: other weights, and features that do not follow from each other."""
    reward, metric = (features.load(DATA / "models" / f"{name}.safetensors") for name in ("reward", "metric"))
    digests = {hashlib.sha256(p.numpy().tobytes()).hexdigest() for net in (reward, metric) for p in net.stages.parameters()}
    assert len(digests) == 2 * len(list(reward.stages.parameters()))
    images, *_ = data.read_images(DATA / "digits/validation.parquet", limit=200)
    a, b = (
        torch.nn.functional.normalize(net.pooled(to_float(images)) - net.pooled(to_float(images)).mean(0), dim=0)
        for net in (reward, metric)
    )
    assert (a.T @ b).abs().max(dim=1).values.mean() < 0.9


@bundled
def test_the_metric_sees_damage() -> None:
    """Noise of 10 grey levels and a light blur are far from real pictures, as far as other real pictures are not."""
    judge = features.load(DATA / "models/metric.safetensors")
    reference, *_ = data.read_images(DATA / "digits/reference.parquet", limit=2000)
    real = torch.from_numpy(data.read_images(DATA / "digits/validation.parquet", limit=1000)[0]).permute(0, 3, 1, 2).float()
    noise = 10 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    blurred = real.lerp(torch.nn.functional.avg_pool2d(real, 3, 1, 1, count_include_pad=False), 0.5)

    def moments(pixels: torch.Tensor) -> fid.Moments:
        return fid.Moments.of(judge.pooled(to_float(pixels.clamp(0, 255).to(torch.uint8))))

    there = moments(torch.from_numpy(reference).permute(0, 3, 1, 2))
    clean, noisy, soft = (fid.frechet(moments(pixels), there) for pixels in (real, real + noise, blurred))
    assert noisy > 2 * clean and soft > 1.5 * clean, (clean, noisy, soft)


@bundled
def test_bundled_weights_are_small_and_load() -> None:
    size = sum((DATA / "models" / f"{name}.safetensors").stat().st_size for name in ("tokenizer", "generator"))
    assert size < 10e6
    policy = models.load(ModelConfig(device="cpu"))
    assert policy.num_classes == 10 and policy.num_codes == 64
