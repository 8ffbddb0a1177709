"""Metrics on plain feature arrays: against scipy, against torch-fidelity, and on cases with known answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from vapi import metrics
from vapi.metrics import features as extractors
from vapi.metrics.fid import Features, Moments, concatenate, frechet
from vapi.models import features as networks
from vapi.models import weights


def cloud(count: int, seed: int, dim: int = 12, shift: float = 0.0, scale: float = 1.0) -> Features:
    """Correlated Gaussian features with class scores that depend on the label."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)) / dim**0.5 + torch.eye(dim)
    pooled = (torch.randn(count, dim, generator=generator) @ mix) * scale + shift
    labels = torch.arange(count) % 10
    logits = 5 * torch.nn.functional.one_hot(labels, 10) + torch.randn(count, 10, generator=generator)
    return Features(pooled, logits, pooled[:, :5], labels)


def by_sqrtm(a: torch.Tensor, b: torch.Tensor) -> float:
    """The textbook formula with scipy's matrix square root."""
    x, y = a.double().numpy(), b.double().numpy()
    sx, sy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(sx @ sy).real
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(sx + sy - 2 * root))


def test_frechet_equals_scipy_and_torch_fidelity() -> None:
    a, b = cloud(400, 0), cloud(500, 1, shift=0.3, scale=1.4)
    ours = frechet(a.moments, b.moments)
    assert ours == pytest.approx(by_sqrtm(a.pooled, b.pooled), rel=1e-9)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(x.pooled.double()) for x in (a, b)), verbose=False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)


def test_frechet_with_fewer_images_than_dimensions() -> None:
    a, b = cloud(20, 0, dim=40), cloud(25, 1, dim=40, shift=0.2)
    assert frechet(a.moments, b.moments) == pytest.approx(by_sqrtm(a.pooled, b.pooled), rel=1e-5)
    assert a.moments.factor.shape == (40, 20)


def test_frechet_of_known_gaussians() -> None:
    # independent axes: sum of (difference of means)^2 + (difference of standard deviations)^2
    a = Moments(np.zeros(3), np.diag([1.0, 2.0, 0.0]))
    b = Moments(np.array([1.0, 0.0, 0.0]), np.diag([3.0, 2.0, 1.0]))
    assert frechet(a, b) == pytest.approx(1 + 4 + 0 + 1)


def test_a_set_with_itself() -> None:
    same = metrics.score(cloud(300, 0), cloud(300, 0))
    assert same["fid"] == pytest.approx(0, abs=1e-9)
    assert same["fid_random"] == pytest.approx(0, abs=1e-9)
    assert same["precision"] == same["recall"] == 1.0


def test_dead_features_do_not_go_below_zero() -> None:
    flat = torch.zeros(50, 8)
    assert frechet(Moments.of(flat), Moments.of(flat)) == 0.0


def test_frechet_grows_with_distance_and_kid_agrees() -> None:
    reference = cloud(300, 0)
    scores = [metrics.score(cloud(300, 1, shift=shift), reference, ["fid", "kid"]) for shift in (0.0, 0.3, 0.6, 1.0)]
    for name in ("fid", "kid"):
        values = [s[name] for s in scores]
        assert values == sorted(values)


def test_kid_is_unbiased() -> None:
    values = [metrics.score(cloud(100, seed), cloud(100, seed + 100), ["kid"])["kid"] for seed in range(20)]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_fid_of_equal_distributions_falls_with_the_number_of_images() -> None:
    """Why protocols record their number of images: the bias is about proportional to 1/N."""
    few, many = (metrics.score(cloud(n, 1), cloud(4000, 0), ["fid"])["fid"] for n in (100, 1000))
    assert few > 3 * many


def test_precision_and_recall_of_a_collapsed_generator() -> None:
    reference = cloud(500, 0)
    generator = torch.Generator().manual_seed(1)
    collapsed = reference.pooled[:1] + 1e-3 * torch.randn(500, 12, generator=generator)
    found = metrics.score(Features(collapsed, reference.logits, collapsed, reference.labels), reference, ["precision_recall"])
    assert found["precision"] > 0.99 and found["recall"] < 0.02


def test_inception_score_knows_its_extremes() -> None:
    labels = torch.arange(500) % 10
    sure = 100.0 * torch.nn.functional.one_hot(labels, 10)
    one = cloud(500, 0)
    value = {
        "sure": Features(one.pooled, sure, one.random, labels),
        "one class": Features(one.pooled, sure[:1].expand(500, -1), one.random, labels),
    }
    assert metrics.score(value["sure"], one, ["inception_score"])["inception_score"] == pytest.approx(10)
    assert metrics.score(value["one class"], one, ["inception_score"])["inception_score"] == pytest.approx(1)
    assert metrics.score(value["sure"], one, ["class_accuracy"])["class_accuracy"] == 1.0
    assert metrics.score(value["one class"], one, ["class_accuracy"])["class_accuracy"] == pytest.approx(0.1)


def test_every_metric_of_the_table_is_scored() -> None:
    found = metrics.score(cloud(60, 0), cloud(50, 1))
    assert set(found) == {"fid", "kid", "inception_score", "precision", "recall", "class_accuracy", "fid_random"}
    assert all(np.isfinite(value) for value in found.values())


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="4 generated images are too few"):
        metrics.score(cloud(4, 0), cloud(50, 1))
    with pytest.raises(ValueError, match="3 reference images are too few"):
        metrics.score(cloud(50, 0), cloud(3, 1))


def test_features_of_different_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="different networks"):
        metrics.score(cloud(50, 0, dim=12), cloud(50, 1, dim=8))


def test_concatenation_keeps_the_order() -> None:
    whole = cloud(50, 0)
    again = concatenate([whole[:20], whole[20:45], whole[45:]])
    assert torch.equal(again.pooled, whole.pooled) and torch.equal(again.labels, whole.labels)


# --- extractors --------------------------------------------------------------------------------


def noise(count: int, seed: int, size: int = 16) -> torch.Tensor:
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def network_file(folder: Path, seed: int = 3) -> Path:
    path = folder / "metric.safetensors"
    weights.save(extractors.calibrated(networks.random_twin(seed), noise(64, 9)), path, {})
    return path


def small(path: Path) -> extractors.Extractor:
    extractors.register(networks.load)
    random = extractors.calibrated(networks.random_twin(), noise(64, 8))
    return extractors.small(path, random, torch.device("cpu"))


def test_features_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    judge, images, labels = small(network_file(tmp_path)), noise(30, 0), torch.arange(30) % 10
    whole = judge(images, labels)
    parts = concatenate([judge(images[a:b], labels[a:b]) for a, b in ((0, 7), (7, 8), (8, 30))])
    for name in ("pooled", "logits", "random"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=1e-5, atol=1e-5)


class Images(torch.utils.data.Dataset):
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def test_torch_fidelity_comes_to_the_same_numbers(tmp_path: Path) -> None:
    path = network_file(tmp_path)
    judge = small(path)
    generated, reference = noise(60, 0) // 2, noise(70, 1)
    ours = metrics.score(judge(generated, torch.zeros(60)), judge(reference, torch.zeros(70)))
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(generated), input2=Images(reference), cuda=False, cache=False, save_cpu_ram=True, verbose=False,
        feature_extractor=extractors.SMALL, feature_extractor_weights_path=str(path),
        fid=True, isc=True, kid=True, prc=True, isc_splits=1, kid_subsets=10, kid_subset_size=60,
    )  # fmt: skip
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)  # theirs has float32 means
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours["precision"] == pytest.approx(theirs["precision"]) and ours["recall"] == pytest.approx(theirs["recall"])


def test_the_random_judge_is_calibrated_and_not_the_metric(tmp_path: Path) -> None:
    seen = small(network_file(tmp_path))(noise(200, 5), torch.zeros(200))
    assert 0.1 < seen.random.mean() < 3 and seen.random.std(dim=0).mean() > 1e-3
    assert not torch.allclose(seen.random, seen.pooled)


def test_damaged_weights_give_an_error_not_a_number(tmp_path: Path) -> None:
    judge = small(network_file(tmp_path))
    with torch.no_grad():
        judge.network.network.head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        judge(noise(4, 0), torch.zeros(4))


def test_inception_names_the_place_it_looked_in(tmp_path: Path) -> None:
    path = extractors.inception_path(str(tmp_path / "inception.pth"))
    with pytest.raises(ValueError, match=r"inception\.pth is not here; fetch https://"):
        extractors.inception(path, networks.random_twin(), torch.device("cpu"))
    assert extractors.inception_path("").name == extractors.INCEPTION_FILE


def test_inception_with_code_in_its_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"weights": Path("x")}, tmp_path / "bad.pth")
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", extractors.sha256(tmp_path / "bad.pth"))
    with pytest.raises(ValueError, match="more than weights"):
        extractors.inception(tmp_path / "bad.pth", networks.random_twin(), torch.device("cpu"))


class Blank(FeatureExtractorInceptionV3):
    """Inception with random weights, whatever file it is given."""

    def load_state_dict(self, *_: object) -> None:
        """Keeps what it was born with."""


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inception's weights in the published layout, with random values."""
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    torch.save(Blank(extractors.INCEPTION, ["2048"], feature_extractor_weights_path=str(path)).state_dict(), path)
    return path


@pytest.fixture
def judge(inception_file: Path, monkeypatch: pytest.MonkeyPatch) -> extractors.Extractor:
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", extractors.sha256(inception_file)[:8])
    return extractors.inception(inception_file, extractors.calibrated(networks.random_twin(), noise(64, 8)), torch.device("cpu"))


def test_inception_from_a_local_file(judge: extractors.Extractor, inception_file: Path) -> None:
    assert judge.sha256 == extractors.sha256(inception_file)
    seen = judge(noise(2, 0, size=32), torch.tensor([3, 4]))
    assert seen.pooled.shape == (2, 2048) and seen.logits.shape == (2, 1008) and seen.random.shape == (2, 64)


def test_spatial_features_are_mixed_6_conv_channels_last(judge: extractors.Extractor) -> None:
    """And asking for them changes nothing else."""
    images = noise(2, 0, size=32)
    seen = judge(images, torch.zeros(2))
    network = FeatureExtractorInceptionV3.forward
    judge.network.features_list = ["2048", "logits_unbiased"]
    pooled, logits = network(judge.network, images)
    assert torch.equal(seen.pooled, pooled) and torch.equal(seen.logits, logits)
    caught = []
    handle = judge.network.Mixed_6d.register_forward_hook(lambda *found: caught.append(found[-1]))
    network(judge.network, images)
    handle.remove()
    maps = caught[0]  # (2, 768, 17, 17), of which the first branch comes first
    assert seen.more["spatial"].shape == (2, 17 * 17 * 7)
    assert seen.more["spatial"].view(2, 17, 17, 7)[1, 4, 9, 3] == maps[1, 3, 4, 9]


def test_inception_with_another_hash_is_refused(inception_file: Path) -> None:
    with pytest.raises(ValueError, match=r"not the published Inception: its sha256 is .* and not 6726825d"):
        extractors.inception(inception_file, networks.random_twin(), torch.device("cpu"))
