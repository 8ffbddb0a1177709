"""Rewards: parts by hand, LPIPS against the package, custom functions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import test_clip
import torch
from torch import Tensor

from vapi import rewards
from vapi.config import TuneConfig
from vapi.images import to_uint8
from vapi.metrics import clip, text
from vapi.models import features, weights


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_parts_by_hand() -> None:
    target = torch.zeros(2, 3, 8, 8)
    decoded = torch.stack([target + 0.5, target - 2.0], dim=1)  # (B, G, 3, H, W), the second far outside [-1, 1]
    total, parts = rewards.Reward({"mse": 1.0, "l1": 0.5}).score(decoded, target)
    torch.testing.assert_close(parts["mse"], torch.tensor([[-0.25, -4.0]]).expand(2, 2))  # not clamped
    torch.testing.assert_close(parts["l1"], torch.tensor([[-0.5, -2.0]]).expand(2, 2))
    torch.testing.assert_close(total, parts["mse"] + 0.5 * parts["l1"])


def test_small_lpips_by_hand() -> None:
    network = features.random_twin(3)
    lpips = rewards.Lpips(network.features)
    a, b = images(2, 3, 16, 16), images(2, 3, 16, 16, seed=1)
    expected = torch.zeros(2)
    for x, y in zip(network.features(a), network.features(b)):
        x, y = (m / (m.square().sum(1, keepdim=True).sqrt() + 1e-10) for m in (x, y))
        expected -= (x - y).square().mean((1, 2, 3))
    torch.testing.assert_close(lpips(a, b), expected)
    assert torch.equal(lpips(a, a), torch.zeros(2))


def test_groups_are_rows() -> None:
    lpips = rewards.Lpips(features.random_twin().features)
    decoded, target = images(3, 4, 3, 16, 16), images(3, 3, 16, 16, seed=2)
    total, parts = rewards.Reward({"mse": 1.0, "near": 1.0}, functions={"near": lpips}).score(decoded, target)
    torch.testing.assert_close(parts["near"], torch.stack([lpips(decoded[:, g], target) for g in range(4)], dim=1))
    torch.testing.assert_close(total, parts["mse"] + parts["near"])


@pytest.mark.parametrize("weighted", [False, True])
def test_rewards_of_places_average_to_those_of_images(weighted: bool) -> None:
    """On a grid whose places hold as many pixels each; and what changes in one place is felt there alone, by pixels."""
    network = features.random_twin()
    used = [torch.rand(m.shape[1]) for m in network.features(images(1, 3, 32, 32))] if weighted else None
    reward = rewards.Reward({"mse": 1.0, "l1": 0.3, "near": 2.0}, functions={"near": rewards.Lpips(network.features, used)})
    decoded, target = images(2, 3, 3, 32, 32), images(2, 3, 32, 32, seed=2)
    (whole, parts), (places, theirs) = reward.score(decoded, target), reward.score(decoded, target, side=4)
    assert places.shape == (2, 3, 16) and theirs.keys() == parts.keys()
    torch.testing.assert_close(places.mean(-1), whole)
    for name, part in parts.items():
        torch.testing.assert_close(theirs[name].mean(-1), part)
    moved = decoded.clone()
    moved[..., 8:16, 16:24] += 0.5  # second row, third column
    changed = rewards.Reward({"mse": 1.0}).score(moved, target, side=4)[0] != rewards.Reward({"mse": 1.0}).score(decoded, target, side=4)[0]
    assert changed.nonzero()[:, 2].unique().tolist() == [6]


def test_a_reward_that_does_not_tell_where_is_refused() -> None:
    rewards.Reward({"mse": 1.0}).require_places()
    with pytest.raises(ValueError, match="tune.credit token .* edges has no map; use credit image"):
        rewards.Reward({"mse": 1.0, "edges": 1.0}, functions={"edges": lambda a, b: (a - b).mean((1, 2, 3))}).require_places()


def test_features_of_an_image_are_computed_once() -> None:
    seen: list[int] = []

    def layers(x: Tensor) -> list[Tensor]:
        seen.append(len(x))
        return [x]

    reward = rewards.Reward({"near": 1.0}, functions={"near": rewards.Lpips(layers)})
    reward.score(images(4, 4, 3, 8, 8), images(4, 3, 8, 8))
    assert sum(seen) == 4 * 4 + 4


def test_custom_reward_registered_or_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    def brightness(images: Tensor, targets: Tensor) -> Tensor:
        return -(images.mean((1, 2, 3)) - targets.mean((1, 2, 3))).abs()

    decoded, target = images(2, 3, 3, 8, 8), images(2, 3, 8, 8, seed=1)
    passed, _ = rewards.Reward({"brightness": 2.0}, functions={"brightness": brightness}).score(decoded, target)
    monkeypatch.setitem(rewards.REWARDS, "brightness", brightness)
    registered, parts = rewards.Reward({"brightness": 2.0}).score(decoded, target)
    assert torch.equal(passed, registered) and torch.equal(registered, 2 * parts["brightness"])


def test_a_class_that_was_asked_for(tmp_path: Path) -> None:
    """The log-probability of the classifier; what compares with an image goes beside it."""
    network, path = features.random_twin(3), str(tmp_path / "classifier.safetensors")
    weights.save(network, path, {})
    decoded, target, asked = images(2, 3, 3, 8, 8), images(2, 3, 8, 8, seed=1), torch.tensor([4, 9])
    tune = TuneConfig(rewards={"class": 2.0, "mse": 1.0}, classifier=path)
    reward = rewards.Reward.of(tune)
    total, parts = reward.score(decoded, target, asked=asked)
    expected = [network.logits(rows).log_softmax(-1)[:, label] for rows, label in zip(decoded, asked, strict=True)]
    torch.testing.assert_close(parts["class"], torch.stack(expected))
    torch.testing.assert_close(total, 2 * parts["class"] + parts["mse"])
    with pytest.raises(ValueError, match="knows the classes 0 .. 9, and 10 is asked for"):
        reward.score(decoded, target, asked=torch.tensor([4, 10]))
    rewards.require_classes(path, 10)
    with pytest.raises(ValueError, match="knows the classes 0 .. 9, and 999 is asked for"):
        rewards.require_classes(path, 1000)
    weights.save(features.FeatureNet(1000), wide := str(tmp_path / "wide.safetensors"), {})
    rewards.require_classes(wide, 1000)
    with pytest.raises(ValueError, match="credit token asks rewards where they come from, and class has no map"):
        reward.require_places()
    assert [type(network).__name__ for network in reward.networks] == ["FeatureNet"]
    assert rewards.files(tune) == {"classifier": Path(path)}, "and no network of a reward that is not asked"


def test_a_caption_that_was_asked_for(tmp_path: Path) -> None:
    """CLIPScore's cosine, one for each draw of each caption."""
    folder = test_clip.write(tmp_path / "clip")
    decoded, captions = images(2, 3, 3, 32, 32), ["a red three", "two sevens"]
    total, _ = rewards.Reward.of(TuneConfig(rewards={"clip": 1.0}, clip_model=str(folder))).score(decoded, decoded[:, 0], asked=captions)
    score = text.ClipScore(clip.load(folder))
    pictures = to_uint8(decoded[1]).permute(0, 2, 3, 1).numpy()
    torch.testing.assert_close(total[1], torch.tensor(score(pictures, ["two sevens"] * 3, [{}] * 3)))
    tune = TuneConfig(rewards={"clip": 1.0}, clip_model=str(folder))
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = rewards.Reward.of(tune).score(decoded, decoded[:, 0], asked=captions)
    assert torch.equal(again, total), "draws of one caption differ by little"
    assert rewards.files(tune) == {"clip": folder}
    (folder / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"tune.clip_model is .*, which lacks merges.txt"):
        rewards.files(tune)


@pytest.mark.parametrize(
    ("weights", "objective", "captions", "words"),
    [
        ({"mse": 1.0}, "ar_grpo", False, "no image that mse could compare them with"),
        ({"clip": 1.0}, "ste", True, "no gradient passes through the reward clip"),
        ({"class": 1.0, "mse": 0.0}, "ar_grpo", True, "class needs class ids, and this model draws from captions"),
        ({"clip": 1.0}, "ar_grpo", False, "clip needs captions, and this model draws from class ids"),
        ({"mse": 1.0}, "cca", True, "cca contrasts classes, and this model draws from captions"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(weights: dict[str, float], objective: str, captions: bool, words: str) -> None:
    knobs = {"prior": "kl"} if objective == "ar_grpo" else {}
    tune = TuneConfig(rewards=weights, objective=objective, clip_model="somewhere", **knobs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        rewards.require_fit(rewards.kinds(tune), objective, captions)


def test_a_reward_without_its_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="tune.clip_model is empty; name the weights that it reads"):
        TuneConfig(rewards={"clip": 1.0})
    with pytest.raises(ValueError, match="tune.classifier is empty"):
        TuneConfig(rewards={"class": 1.0}, classifier="")


def test_bad_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="no reward is called 'lipps'; did you mean 'lpips'"):
        rewards.Reward({"lipps": 1.0})
    with pytest.raises(ValueError, match="nothing to optimise"):
        rewards.Reward({"mse": 0.0})
    with pytest.raises(ValueError, match="nowhere.safetensors is not here"):
        rewards.Reward({"lpips": 1.0}, perceptual="data/nowhere.safetensors")
    flat = rewards.Reward({"flat": 1.0}, functions={"flat": lambda images, targets: images.mean()})
    with pytest.raises(ValueError, match="'flat' returned shape"):
        flat.score(images(2, 3, 3, 8, 8), images(2, 3, 8, 8))


@pytest.fixture(scope="module", params=["vgg", "alex"])
def package(request: pytest.FixtureRequest) -> Iterator[tuple[str, torch.nn.Module]]:
    import lpips

    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield request.param, lpips.LPIPS(net=request.param, pnet_rand=True, verbose=False)


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_published_networks_equal_the_lpips_package(package: tuple[str, torch.nn.Module], tmp_path: Path) -> None:
    name, theirs = package
    names = {k.split(".", 1)[1]: v for k, v in theirs.net.state_dict().items()}  # slice3.10.weight -> 10.weight
    classifier = {"classifier.1.weight": torch.zeros(1)}  # torchvision's files hold one, which LPIPS has no use for
    torch.save({f"features.{k}": v for k, v in names.items()} | classifier, tmp_path / rewards.NETWORKS[name][1])
    torch.save({k: v for k, v in theirs.state_dict().items() if k.startswith("lin") and "lins" not in k}, tmp_path / f"{name}.pth")
    a, b = images(3, 3, 64, 64), images(3, 3, 64, 64, seed=1)
    with torch.no_grad():
        expected = theirs(a, b).flatten()
    torch.testing.assert_close(-rewards.load_lpips(name, str(tmp_path))(a, b), expected, rtol=1e-5, atol=1e-5)
    assert rewards.network_files(name, str(tmp_path))["lpips"] == tmp_path / f"{name}.pth"


@pytest.mark.parametrize("side", [0, 4])
def test_distances_are_float32_under_autocast(side: int) -> None:
    """Networks may run in bfloat16; a sum over channels in it would make ties of what the group compares."""
    perceptual = rewards.Lpips(lambda x: [x], [torch.rand(3, generator=torch.Generator().manual_seed(0))])
    a, b = images(2, 4, 3, 8, 8), images(2, 3, 8, 8, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = perceptual.grouped(a, b, side)
    assert low.dtype == torch.float32 and torch.equal(low, perceptual.grouped(a, b, side))


def test_missing_vgg_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"needs {tmp_path}/vgg16-397923af.pth; put https://download.pytorch.org"):
        rewards.Reward({"lpips": 1.0}, perceptual="vgg", perceptual_weights=str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"{tmp_path}/hub/checkpoints/vgg16-397923af.pth"):
        rewards.Reward({"lpips": 1.0}, perceptual="vgg")


def test_the_weights_of_lpips_come_with_its_package_or_from_the_folder(tmp_path: Path) -> None:
    (tmp_path / rewards.VGG_FILE).touch()
    files = rewards.network_files("vgg", str(tmp_path))
    assert files["vgg"] == tmp_path / rewards.VGG_FILE and files["lpips"].is_file() and tmp_path not in files["lpips"].parents
    (tmp_path / rewards.LPIPS_FILE).touch()
    assert rewards.network_files("vgg", str(tmp_path))["lpips"] == tmp_path / rewards.LPIPS_FILE
