"""Rewards: how well a decoded token map reconstructs its image (eq. 10), as a weighted sum that keeps its parts.

A reward is a function ``(images, targets) -> (N,)`` of two batches (N, 3, H, W) in [-1, 1]; higher is better. One that can
tell where has a method ``map`` too: (N, h, w), of which it is the mean. One that does not look at the target, but at what was asked
for, is ``OfRequest(function)``: ``(images, asked) -> (N,)``, asked being N class ids or captions. On a CPU, ``vapi.tune`` calls
rewards from several threads.
To add one, register it in Python,

    REWARDS["edges"] = edges          # then: vapi.tune.tune(..., TuneConfig(rewards={"mse": 1.0, "edges": 0.5}), ...)

or pass it to ``Reward``. The decoded image is not clamped and the target is the raw
image, not the tokenizer's reconstruction of it, as in the paper. LPIPS reads the features of each
image once for its G reconstructions.

Left out: adversarial and embedding rewards, which the released code carries and the paper does not use.

Shapes: B images, G group, N = B x G, T places of a grid.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapi.config import TuneConfig, nearest
from vapi.images import to_uint8
from vapi.models import features, weights

RewardFunction = Callable[[Tensor, Tensor], Tensor]
Asked = Tensor | Sequence[str]  # classes (B,) or captions
VGG_FILE = "vgg16-397923af.pth"  # torchvision's name for VGG-16 trained on ImageNet
ALEX_FILE = "alexnet-owt-7be5be79.pth"  # and for AlexNet
LPIPS_FILE = "vgg.pth"  # the lpips package's name for its linear weights on VGG-16, v0.1


class Pixelwise:
    """Minus an error of pixels, mean over channels and pixels, (N, 3, H, W) twice -> (N,)."""

    def __init__(self, error: Callable[[Tensor], Tensor]) -> None:
        self.error = error

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        return -self.error(images - targets).flatten(1).mean(1)

    def map(self, images: Tensor, targets: Tensor) -> Tensor:
        """Where it comes from: (N, H, W)."""
        return -self.error(images - targets).mean(1)


mse = Pixelwise(torch.square)
l1 = Pixelwise(torch.abs)


class Lpips:
    """Minus LPIPS (arXiv 1801.03924): squared distance of channel-normalised features, summed over layers.

    ``layers`` turns images into a list of feature maps; ``weights`` holds one non-negative number
    per channel of each. Compares all draws of an image with one set of the image's features.
    """

    def __init__(self, layers: Callable[[Tensor], list[Tensor]], weights: list[Tensor] | None = None) -> None:
        self.layers, self.weights = layers, weights

    @property
    def network(self) -> nn.Module | None:
        """The module behind ``layers``, if there is one."""
        owner = getattr(self.layers, "__self__", self.layers)
        return owner if isinstance(owner, nn.Module) else None

    def grouped(self, images: Tensor, targets: Tensor, side: int = 0) -> Tensor:
        """Images (B, G, 3, H, W) against their targets (B, 3, H, W) -> (B, G), or by place of a grid of ``side`` x ``side``,
        (B, G, T)."""
        total = images.new_zeros((*images.shape[:2], *([side * side] if side else [])))
        pairs = zip(self.layers(images.flatten(0, 1)), self.layers(targets))
        for layer, (ours, theirs) in enumerate(pairs):
            near = (_normalised(ours).unflatten(0, images.shape[:2]) - _normalised(theirs)[:, None]).square_()  # (B, G, C, h, w)
            if side:
                # a sum of products by hand: a matrix product would be bfloat16's under autocast
                total -= pooled(near.mean(2) if self.weights is None else (near * self.weights[layer][:, None, None]).sum(2), side)
            else:
                difference = near.mean((3, 4))
                total -= difference.mean(-1) if self.weights is None else (difference * self.weights[layer]).sum(-1)
        return total

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        return self.grouped(images[:, None], targets)[:, 0]


def pooled(maps: Tensor, side: int) -> Tensor:
    """Maps (..., h, w) to the places of a grid of ``side`` x ``side``, (..., T), row by row: the mean of what lies in each."""
    return F.adaptive_avg_pool2d(maps.flatten(0, -3), side).reshape(*maps.shape[:-2], side * side)


def _normalised(maps: Tensor) -> Tensor:
    """Unit length over channels, in float32 at least."""
    maps = maps.float()
    return maps / (maps.norm(dim=1, keepdim=True) + 1e-10)


class Published(nn.Module):
    """The five feature maps that LPIPS compares of a network that torchvision publishes, from images in [-1, 1]."""

    shift: Tensor
    scale: Tensor
    ends: ClassVar[tuple[int, ...]]  # layers after which a map is taken

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.body = self.layers()[: self.ends[-1]].eval().requires_grad_(False)
        used = {f"features.{name}" for name in self.body.state_dict()}
        self.body.load_state_dict({name.removeprefix("features."): tensor for name, tensor in state.items() if name in used})
        # ImageNet's mean and standard deviation, for images in [-1, 1] (lpips's scaling layer)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

    @staticmethod
    def layers() -> nn.Sequential:
        """The convolutional part, with weights of no use."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> list[Tensor]:
        maps, x = [], (images - self.shift) / self.scale
        for number, layer in enumerate(self.body, 1):
            x = layer(x)
            if number in self.ends:
                maps.append(x)
        return maps


class Vgg(Published):
    """VGG-16, as the training of LlamaGen and the released VA-pi of it have."""

    ends = (4, 9, 16, 23, 30)  # after relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

    @staticmethod
    def layers() -> nn.Sequential:
        from torchvision.models import vgg16

        return vgg16(weights=None, init_weights=False).features


class Alex(Published):
    """AlexNet, the lpips package's default, as the released VA-pi of Janus has."""

    ends = (2, 5, 8, 10, 12)  # after each relu

    @staticmethod
    def layers() -> nn.Sequential:
        from torchvision.models import alexnet

        return alexnet(weights=None).features


NETWORKS: dict[str, tuple[type[Published], str]] = {"vgg": (Vgg, VGG_FILE), "alex": (Alex, ALEX_FILE)}
"""What ``tune.perceptual`` calls by a word, with torchvision's name of the weights."""


def network_files(perceptual: str, folder: str = "") -> dict[str, Path]:
    """The files behind the lpips reward. ``perceptual`` is a .safetensors of ours, ``vgg`` or ``alex``: then ``folder``
    holds vgg16-397923af.pth or alexnet-owt-7be5be79.pth (torchvision's), torch's own cache if it is empty, and the v0.1 weights of
    LPIPS are those of the installed lpips package, unless a vgg.pth or alex.pth lies in the folder too.

    Raises ValueError with the expected file if one is missing; nothing is downloaded.
    """
    if perceptual not in NETWORKS:
        return {"perceptual": weights.locate(perceptual)}
    package = importlib.util.find_spec("lpips")
    assert package is not None and package.origin is not None
    _, file = NETWORKS[perceptual]
    network = Path(folder) / file if folder else Path(torch.hub.get_dir()) / "checkpoints" / file
    lines = Path(folder) / f"{perceptual}.pth"
    if not (folder and lines.is_file()):
        lines = Path(package.origin).parent / "weights" / "v0.1" / f"{perceptual}.pth"
    if not network.is_file():
        raise ValueError(
            f"the lpips reward with perceptual {perceptual} needs {network}; put https://download.pytorch.org/models/{file} there"
        )
    return {perceptual: network, "lpips": lines}


def files(tune: TuneConfig) -> dict[str, Path]:
    """The files behind a configuration's rewards. Raises ValueError as ``network_files`` does."""
    found = network_files(tune.perceptual, tune.perceptual_weights) if tune.rewards.get("lpips") else {}
    found |= {"classifier": weights.locate(tune.classifier)} if tune.rewards.get("class") else {}
    return found | ({"clip": clip_folder(tune)} if tune.rewards.get("clip") else {})


def clip_folder(tune: TuneConfig) -> Path:
    """The folder behind the reward clip. Raises ValueError where it is not one of CLIP's weights."""
    from vapi.metrics import clip

    return clip.require(tune.clip_model, CLIP_MODEL)


def load_lpips(perceptual: str, folder: str = "", device: str | torch.device = "cpu") -> Lpips:
    """The lpips reward: LPIPS as published (``vgg``, ``alex``), or with uniform weights on a network of ours. See ``network_files``."""
    files = network_files(perceptual, folder)
    if perceptual not in NETWORKS:
        return Lpips(features.load(files["perceptual"], device).features)
    kind, _ = NETWORKS[perceptual]
    lines, _ = weights.read(files["lpips"])
    return Lpips(
        kind(weights.read(files[perceptual])[0]).to(device),
        [lines[f"lin{i}.model.1.weight"].flatten().to(device) for i in range(len(kind.ends))],
    )


class OfRequest:
    """A reward of an image for what was asked: ``function`` (images (N, 3, H, W), N classes or captions) -> (N,)."""

    gradient = True  # whether one reaches the images

    def __init__(self, function: Callable[[Tensor, Asked], Tensor]) -> None:
        self.function = function

    def __call__(self, images: Tensor, asked: Asked) -> Tensor:
        return self.function(images, asked)


class OfClass(OfRequest):
    """Log-probability of the class that was asked, by a classifier: a .safetensors of ours (``features.FeatureNet``)."""

    def __init__(self, path: str, device: str | torch.device = "cpu") -> None:
        self.network = features.load(weights.locate(path), device)

    def __call__(self, images: Tensor, asked: Asked) -> Tensor:
        """Raises ValueError for classes that the classifier does not know."""
        assert isinstance(asked, Tensor)
        logits = self.network.logits(images).float()
        _require_known(logits.shape[1], int(asked.max()) + 1)
        return logits.log_softmax(-1).gather(1, asked[:, None])[:, 0]


def require_classes(classifier: str, count: int) -> None:
    """Raises ValueError for a classifier that does not know the classes 0 .. ``count`` - 1."""
    _require_known(features.load(weights.locate(classifier)).head.out_features, count)


def _require_known(known: int, count: int) -> None:
    if count > known:
        raise ValueError(f"tune.classifier knows the classes 0 .. {known - 1}, and {count - 1} is asked for; name one that knows them all")


class OfCaption(OfRequest):
    """Cosine of CLIP's features of picture and caption (``metrics.text``): ViT-L/14, or HPSv2's weights in the same layout."""

    gradient = False  # pictures pass through PIL, as the published scores' do

    def __init__(self, folder: str, device: str | torch.device = "cpu") -> None:
        """Raises ValueError where there is no folder of CLIP's weights."""
        from vapi.metrics import clip, text

        self.score = text.ClipScore(clip.load(folder, device, CLIP_MODEL))

    def __call__(self, images: Tensor, asked: Asked) -> Tensor:
        assert not isinstance(asked, Tensor)
        pictures = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
        with torch.autocast(images.device.type, enabled=False):  # as published: draws of one caption differ by little
            return torch.tensor(self.score(pictures, asked, [{}] * len(asked)), device=images.device)


REWARDS: dict[str, RewardFunction | OfRequest | type] = {  # a class has a network to read, see Reward
    "mse": mse,
    "l1": l1,
    "lpips": Lpips,
    "class": OfClass,
    "clip": OfCaption,
}
CLIP_MODEL = "tune.clip_model"


def require_fit(functions: Mapping[str, object], objective: str, captions: bool) -> None:
    """Raises ValueError for rewards (or their classes, by name) that an objective cannot follow, or that a model of captions, or of
    classes, is not asked for; and for an objective that it has no use for."""

    def named(fits: Callable[[type, object], bool]) -> str:
        return ", ".join(name for name, one in functions.items() if fits(one if isinstance(one, type) else type(one), one))

    if objective == "cca" and captions:
        raise ValueError("tune.objective cca contrasts classes, and this model draws from captions; take another objective")
    if objective == "ar_grpo" and (compare := named(lambda kind, _: not issubclass(kind, OfRequest))):
        raise ValueError(f"free draws have no image that {compare} could compare them with; set their weights to 0, and class or clip to 1")
    if objective in ("ste", "tokenizer") and (blind := named(lambda _, one: not getattr(one, "gradient", True))):
        raise ValueError(f"no gradient passes through the reward {blind}, which tune.objective {objective} needs; leave it out")
    if captions and (classes := named(lambda kind, _: issubclass(kind, OfClass))):
        raise ValueError(f"the reward {classes} needs class ids, and this model draws from captions; take clip, or one of yours")
    if not captions and (words := named(lambda kind, _: issubclass(kind, OfCaption))):
        raise ValueError(f"the reward {words} needs captions, and this model draws from class ids; take class, or one of yours")


def kinds(tune: TuneConfig) -> dict[str, object]:
    """The configuration's rewards as ``require_fit`` takes them, before any network is read. Raises ValueError for an unknown name."""
    for name in tune.rewards:
        if name not in REWARDS:
            raise ValueError(f"no reward is called {name!r}; {nearest(name, REWARDS)}")
    return {name: REWARDS[name] for name, weight in tune.rewards.items() if weight}


class Reward:
    """A weighted sum of rewards that keeps its parts.

    ``Reward({"mse": 1.0, "lpips": 1.0}, perceptual="vgg")`` takes rewards by name;
    ``Reward({"mse": 1.0, "edges": 0.5}, functions={"edges": edges})`` takes one of yours as well.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        perceptual: str = "",
        perceptual_weights: str = "",
        device: str | torch.device = "cpu",
        functions: Mapping[str, RewardFunction | OfRequest] | None = None,
        classifier: str = "",
        clip: str = "",
    ) -> None:
        """Raises ValueError for an unknown name (with the nearest known one) or a missing network."""
        known: dict[str, Any] = {**REWARDS, **(functions or {})}
        for name in weights:
            if name not in known:
                raise ValueError(f"no reward is called {name!r}; {nearest(name, known)}")
        if not any(weights.values()):
            raise ValueError(f"every reward has weight 0 in {dict(weights)}; there is nothing to optimise")
        # in one order, whatever order a configuration has been through: a sum of floats hangs on it
        self.weights = {name: weight for name, weight in sorted(weights.items()) if weight}
        made: dict[object, Callable[[], RewardFunction | OfRequest]] = {
            Lpips: lambda: load_lpips(perceptual, perceptual_weights, device),
            OfClass: lambda: OfClass(classifier, device),
            OfCaption: lambda: OfCaption(clip, device),
        }
        self.functions = {name: made[known[name]]() if known[name] in made else known[name] for name in self.weights}

    @classmethod
    def of(cls, tune: TuneConfig, device: str | torch.device = "cpu") -> Reward:
        """The reward of a configuration, with its networks. Raises ValueError as the constructor does."""
        return cls(tune.rewards, tune.perceptual, tune.perceptual_weights, device, classifier=tune.classifier, clip=tune.clip_model)

    @property
    def networks(self) -> list[nn.Module]:
        """The frozen networks behind it."""
        found = [function.network for function in self.functions.values() if isinstance(function, Lpips | OfClass)]
        return [network for network in found if network is not None]

    def compile(self) -> None:
        """Compile what has a network, with the distances around it: they cost as much memory traffic as the network."""
        for function in self.functions.values():
            if isinstance(function, Lpips):
                function.grouped = torch.compile(function.grouped, dynamic=False)  # type: ignore[method-assign]

    def score(self, images: Tensor, targets: Tensor, side: int = 0, asked: Asked = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Decoded images (B, G, 3, H, W) against their targets (B, 3, H, W), or for the B things ``asked``: total (B, G), and each
        part unweighted. With ``side``, all of these by place of a grid of ``side`` x ``side``: (B, G, T).

        Networks may run in low precision (autocast); images and distances are float32 at least.
        """
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        parts = {name: self._part(name, images, targets, side, asked) for name in self.weights}
        total = torch.stack([weight * parts[name] for name, weight in self.weights.items()]).sum(0)
        return total, parts

    def require_places(self) -> None:
        """Raises ValueError for a reward that does not tell where."""
        if dumb := [name for name, function in self.functions.items() if not (isinstance(function, Lpips) or hasattr(function, "map"))]:
            raise ValueError(f"tune.credit token asks rewards where they come from, and {', '.join(dumb)} has no map; use credit image")

    def _part(self, name: str, images: Tensor, targets: Tensor, side: int, asked: Asked) -> Tensor:
        function: Any = self.functions[name]
        if isinstance(function, OfRequest):
            group = images.shape[1]
            each = asked.repeat_interleave(group) if isinstance(asked, Tensor) else [one for one in asked for _ in range(group)]
            return _one_each(name, function(images.flatten(0, 1), each), len(images) * group).unflatten(0, images.shape[:2])
        if isinstance(function, Lpips):
            return function.grouped(images, targets, side)
        flat = targets[:, None].expand_as(images).flatten(0, 1)
        if side:
            return pooled(function.map(images.flatten(0, 1), flat), side).unflatten(0, images.shape[:2])
        return _one_each(name, function(images.flatten(0, 1), flat), len(flat)).unflatten(0, images.shape[:2])


def _one_each(name: str, values: Tensor, count: int) -> Tensor:
    if values.shape != (count,):
        raise ValueError(f"reward {name!r} returned shape {tuple(values.shape)} for {count} images; it must be one number each")
    return values
