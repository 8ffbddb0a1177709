"""Whether what a configuration names is here and can be read: seen in seconds, where a stage would see it after hours.

Left out: reading a network to the end, and whether it fits the others; the stage that loads it says so, before its own work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from vapi import config, data, hub, keys
from vapi.config import PERCEPTUAL, Config

Look = Callable[[], str]
"""Says in words what is there. Raises ValueError that says what to do."""
WEIGHTS = ("model.generator", "model.tokenizer", "tune.perceptual", "tune.classifier", "evaluate.extractor")
"""Fields that may name a file on a hub."""


def looks(settings: Config) -> dict[tuple[str, str], Look]:
    """A look at all that the stages will read, by field (``model.generator``) and by what that holds: a file, or a word for one."""
    named = config.named_files(settings)
    found: dict[tuple[str, str], Look] = {}
    if settings.tune.rewards.get("lpips") and settings.tune.perceptual in PERCEPTUAL:
        found["tune.perceptual", settings.tune.perceptual] = functools.partial(_perceptual, settings)
    if settings.evaluate.extractor == "inception":
        found["evaluate.extractor", "inception"] = functools.partial(_inception, settings)
    if settings.tune.rewards.get("clip"):
        found["tune.clip_model", settings.tune.clip_model] = functools.partial(_clip, settings)
    if settings.model.captions:
        judges = [settings.evaluate.detector, settings.evaluate.second_detector, *settings.evaluate.text_metrics]
        found["evaluate.prompts", f"judged by {', '.join(filter(None, judges))}"] = functools.partial(_judges, settings)
    asked = sorted(name for name, weight in settings.tune.rewards.items() if weight)
    words = f"{settings.tune.objective} by {', '.join(asked)}, {'captions' if settings.model.captions else 'classes'}"
    found["tune.objective", words] = functools.partial(_objective, settings)
    if settings.tune.rewards.get("class"):
        found["tune.classifier", settings.tune.classifier] = functools.partial(_classifier, settings)
    return {(field, name): functools.partial(_file, settings, field, name) for field, name in named.items()} | found


def _file(settings: Config, field: str, name: str) -> str:
    if field == "model.text_encoder":
        from vapi.models import text  # with torch

        return f"{name}, {text.size(name):,} bytes"
    if field in WEIGHTS:
        from vapi.models import weights

        return f"{name}, {weights.size(name):,} bytes"
    if field == "subset.source" and hub.is_address(name):
        from vapi import sources  # with the weight of what reads images

        return sources.HubParquet(settings.subset).described()
    here = keys.matches(Path(name))
    if not here:
        raise ValueError(f"{name} is not in {Path.cwd()}; put it there, or name what is")
    if field in ("evaluate.reference", "evaluate.validation") and here[0].is_file():
        _require_images(here[0])
    if field == "evaluate.dinov2":
        from vapi.metrics import features

        features.require_dinov2(here[0])
    return name + (f", {len(here)} files" if len(here) > 1 else "")


def _require_images(path: Path) -> None:
    """What images are compared with must be images: evaluation comes after hours on GPUs."""
    from vapi.metrics import published

    if path.suffix == published.SUFFIX:
        published.require(path)
    else:
        data.read_images(path, limit=1)


def _perceptual(settings: Config) -> str:
    from vapi import rewards

    named = settings.tune.perceptual
    return str(rewards.network_files(named, settings.tune.perceptual_weights)[named])


def _clip(settings: Config) -> str:
    from vapi import rewards

    return str(rewards.clip_folder(settings.tune))


def _objective(settings: Config) -> str:
    """An objective whose rewards and model do not go together would be seen when all weights are loaded."""
    from vapi import rewards

    rewards.require_fit(rewards.kinds(settings.tune), settings.tune.objective, settings.model.captions)
    return settings.tune.objective


def _classifier(settings: Config) -> str:
    from vapi import rewards

    rewards.require_classes(settings.tune.classifier, settings.subset.classes)
    return settings.tune.classifier


def _judges(settings: Config) -> str:
    """Who judges pictures of prompts, and what the gates want judged, would be seen after all tuning."""
    from vapi import prompted

    prompted.require(settings.evaluate)
    register = settings.register
    if not settings.evaluate.detector and register.min_geneval_gain:
        words = "and evaluate.detector is empty, so that nobody measures GenEval; set it to 0"
        raise ValueError(f"register.min_geneval_gain is {register.min_geneval_gain}, {words}")
    for metric, field in config.JUDGES.items():
        if metric in register.allowances and not getattr(settings.evaluate, field):
            words = f"and evaluate.{field} is empty, so that nobody measures it; name one, or leave it out"
            raise ValueError(f"register.allowances names {metric}, {words}")
    return settings.evaluate.prompts


def _inception(settings: Config) -> str:
    from vapi.metrics import features

    path = features.inception_path(settings.evaluate.extractor_weights)
    features.require_inception(path)
    return str(path)
