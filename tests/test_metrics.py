"""Metrics on plain feature arrays: against scipy, against torch-fidelity, and on cases with known answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from vapi import data, metrics
from vapi.metrics import features as extractors
from vapi.metrics import fid, neighbours, published
from vapi.metrics.fid import Features, Moments, frechet
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


def concatenate(parts: list[Features]) -> Features:
    tables = [part.tensors() for part in parts]
    return Features.of({name: torch.cat([table[name] for table in tables]) for name in tables[0]})


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


def test_frechet_of_few_images_and_many() -> None:
    few, many = cloud(20, 0, dim=40), cloud(2000, 1, dim=40, shift=0.2)
    ours = frechet(few.moments, many.moments)
    assert ours == pytest.approx(by_sqrtm(few.pooled, many.pooled), rel=1e-5)
    by_singular_values = np.linalg.svd(few.moments.factor.T @ many.moments.factor, compute_uv=False).sum()
    difference = few.moments.mean - many.moments.mean
    exact = difference @ difference + few.moments.trace + many.moments.trace - 2 * by_singular_values
    assert ours == pytest.approx(exact, rel=1e-8) and ours == pytest.approx(frechet(many.moments, few.moments), rel=1e-12)


def test_frechet_of_known_gaussians() -> None:
    # independent axes: sum of (difference of means)^2 + (difference of standard deviations)^2
    a = Moments(np.zeros(3), np.diag([1.0, 2.0, 0.0]))
    b = Moments(np.array([1.0, 0.0, 0.0]), np.diag([3.0, 2.0, 1.0]))
    assert frechet(a, b) == pytest.approx(1 + 4 + 0 + 1)
    full = [Moments(one.mean, full=one.covariance) for one in (a, b)]
    assert frechet(*full) == pytest.approx(1 + 4 + 0 + 1)


def test_frechet_is_exact_where_eigenvalues_all_but_vanish() -> None:
    """Three quarters of the features are dead or copies: roots of rounding errors must not add up."""
    sets = []
    for seed in (0, 1):
        x = cloud(300, seed, dim=6, shift=0.1 * seed).pooled.repeat(1, 4)
        x[:, 18:] = 0
        sets.append(x)
    one, other = map(Moments.of, sets)
    assert one.rows is None
    few = frechet(*(Moments.of(x[:, :6].contiguous()) for x in sets))
    assert frechet(one, other) == pytest.approx(3 * few, rel=1e-8)  # three copies of the same six features


def test_moments_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    features = cloud(500, 3).pooled
    whole = Moments.of(features)
    monkeypatch.setattr(fid, "ROWS", 64)
    blocked = Moments.of(features)
    expected = np.cov(features.double().numpy(), rowvar=False)
    for found in (whole, blocked):
        np.testing.assert_allclose(found.covariance, expected, rtol=1e-12, atol=1e-14)


def test_precision_and_recall_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = cloud(300, 0).pooled, cloud(200, 1, shift=0.4).pooled
    theirs = prc_features_to_metric(one, other, prc_neighborhood=3, verbose=False)
    whole = neighbours.precision_recall(one, other, neighbours.distances)
    monkeypatch.setattr(neighbours, "BLOCK", 64)
    assert whole == neighbours.precision_recall(one, other, neighbours.distances)
    assert whole == pytest.approx((theirs["precision"], theirs["recall"]))
    assert 0 < whole[0] < 1 and 0 < whole[1] < 1


def by_the_book(generated: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """ADM's formula in float16, distance by distance; sums of products in float32."""

    def squared(u: np.ndarray, v: np.ndarray) -> np.float16:
        norms = [np.float16((x * x).astype(np.float32).sum()) for x in (u, v)]
        product = np.float16(u.astype(np.float32) @ v.astype(np.float32))
        return max(np.float16(np.float16(norms[0] - np.float16(2) * product) + norms[1]), np.float16(0))

    def reach(rows: np.ndarray) -> list[np.float16]:
        return [sorted(squared(u, v) for v in rows)[3] for u in rows]

    of_generated, of_real = reach(generated), reach(real)
    precision = [any(squared(r, g) <= radius for r, radius in zip(real, of_real)) for g in generated]
    recall = [any(squared(r, g) <= radius for g, radius in zip(generated, of_generated)) for r in real]
    return float(np.mean(precision)), float(np.mean(recall))


def test_half_precision_distances_are_those_of_adm() -> None:
    one, other = 4 * cloud(40, 0).pooled, 4 * cloud(30, 1, shift=0.4).pooled
    found = neighbours.precision_recall(one, other, neighbours.half_distances)
    assert found == pytest.approx(by_the_book(one.half().numpy(), other.half().numpy()))
    block = neighbours.half_distances(one, other)
    assert len(block.unique()) < len(torch.cdist(one, other).unique())  # that is why its values are higher
    # too large for float16: the whole block in float32
    torch.testing.assert_close(neighbours.half_distances(1000 * one, other), torch.cdist(1000 * one, other).square(), rtol=1e-4, atol=1.0)


def test_inception_score_equals_torch_fidelity_and_knows_the_order() -> None:
    one = cloud(10_000, 0)
    theirs = isc_features_to_metric(one.logits, splits=2, shuffle=True)["inception_score_mean"]
    assert fid.inception_score(one, one)["inception_score"] == pytest.approx(theirs, rel=1e-10)
    in_order = isc_features_to_metric(one.logits, splits=2, shuffle=False)["inception_score_mean"]
    assert fid.inception_score_adm(one, one)["inception_score_adm"] == pytest.approx(in_order, rel=1e-10)
    by_class = one[one.labels.argsort()]
    assert fid.inception_score_adm(by_class, one)["inception_score_adm"] < 0.7 * in_order


def test_kid_equals_torch_fidelity() -> None:
    one, other = cloud(300, 0), cloud(200, 1, shift=0.4)
    theirs = kid_features_to_metric(one.pooled.double(), other.pooled.double(), kid_subsets=10, kid_subset_size=200, verbose=False)
    assert fid.kid(one, other)["kid"] == theirs["kernel_inception_distance_mean"]


def test_published_moments_go_before_those_of_the_images() -> None:
    one, few = cloud(300, 0), cloud(60, 1, shift=0.3)
    many = cloud(4000, 2, shift=0.3)
    known = dataclasses.replace(few, published={"pooled": many.moments})
    assert fid.fid(one, known) == fid.fid(one, many) != fid.fid(one, few)
    assert fid.kid(one, known) == fid.kid(one, few)


# --- a published reference ---------------------------------------------------------------------


def npz(path: Path, without: tuple[str, ...] = (), **other: np.ndarray) -> Path:
    """The layout of VIRTUAL_imagenet256_labeled.npz, small."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 6)), rng.normal(size=(50, 5))
    arrays = {"mu": x.mean(0), "sigma": np.cov(x, rowvar=False), "mu_s": y.mean(0), "sigma_s": np.cov(y, rowvar=False)}
    arrays |= {"arr_0": rng.integers(256, size=(8, 16, 16, 3), dtype=np.uint8), **other}
    np.savez(path, **{name: array for name, array in arrays.items() if name not in without})
    return path


def test_a_published_reference_is_read_as_it_is(tmp_path: Path) -> None:
    path = npz(tmp_path / "reference.npz")
    published.require(path)
    found = published.moments(path)
    with np.load(path) as file:
        np.testing.assert_array_equal(found["pooled"].mean, file["mu"])
        np.testing.assert_allclose(found["spatial"].covariance, file["sigma_s"], rtol=1e-14)
        np.testing.assert_array_equal(published.images(path), file["arr_0"])
    assert found["pooled"].mean.dtype == np.float64


def test_a_reference_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lacks mu, sigma, mu_s, sigma_s; it holds samples, not a reference"):
        published.require(npz(tmp_path / "samples.npz", without=("mu", "sigma", "mu_s", "sigma_s")))
    with pytest.raises(ValueError, match="lacks mu_s, sigma_s; a published reference has"):
        published.require(npz(tmp_path / "own.npz", without=("mu_s", "sigma_s")))
    with pytest.raises(ValueError, match="lacks arr_0;"):
        published.require(npz(tmp_path / "moments.npz", without=("arr_0",)))
    whole = npz(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="half-downloaded"):
        published.require(tmp_path / "half.npz")
    with pytest.raises(ValueError, match="do not belong together"):
        published.moments(npz(tmp_path / "mixed.npz", mu=np.zeros(7)))
    with pytest.raises(ValueError, match="not finite"):
        published.moments(npz(tmp_path / "nan.npz", mu=np.full(6, np.nan)))
    with pytest.raises(ValueError, match=r"arr_0 is float64 \(8, 16, 16, 3\)"):
        published.images(npz(tmp_path / "floats.npz", arr_0=np.zeros((8, 16, 16, 3))))
    with pytest.raises(ValueError, match="cannot be read"):  # a pickle, which is not executed
        published.images(npz(tmp_path / "pickle.npz", arr_0=np.array([{"a": 1}], dtype=object)))


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


def test_a_class_that_nobody_believes_in_adds_nothing() -> None:
    """Its probability is 0 in float64 too, once logits lie 800 apart."""
    one = cloud(60, 0)
    sure = torch.full_like(one.logits, -2000.0)
    sure[torch.arange(60), torch.arange(60) % 2] = 0.0
    found = metrics.score(dataclasses.replace(one, logits=sure), one, ["inception_score"])
    assert found["inception_score"] == pytest.approx(2)


def test_features_that_are_not_finite_are_named() -> None:
    one = cloud(60, 0)
    with pytest.raises(ValueError, match=r"generated features \(pooled\) are not finite"):
        metrics.score(dataclasses.replace(one, pooled=one.pooled * float("nan")), cloud(50, 1), ["fid"])


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


def test_threads_do_not_take_each_others_maps(judge: extractors.Extractor) -> None:
    batches = [noise(2, seed, size=32) for seed in range(6)]
    alone = [judge(batch, torch.zeros(2)).more["spatial"] for batch in batches]
    together = data.parallel(lambda batch: judge(batch, torch.zeros(2)).more["spatial"], batches, 2)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_inception_with_another_hash_is_refused(inception_file: Path) -> None:
    with pytest.raises(ValueError, match=r"not the published Inception: its sha256 is .* and not 6726825d"):
        extractors.inception(inception_file, networks.random_twin(), torch.device("cpu"))
