"""Under which licence each thing came that a tuned model was made of or judged by, for its card.

Nothing in a file of weights says it, so the table goes by the names that recipes and hubs use. Whoever knows better, or
has data of their own, says so in ``register.licences``. What nobody said is ``unknown``, never a guess.

Left out: what follows from the licences. That is for a reader to judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from vapi import config, recipes

UNKNOWN = "unknown"
ROLES = {"model": "part of it", "subset": "tuned on", "tune": "rewarded it", "evaluate": "measured it"}
"""What an input has to do with the model, by the section that names it."""

_OURS = "Apache-2.0 (this project)"
DIGITS = "Apache-2.0 (this project), made of UCI's digits, CC BY 4.0"
_IMAGENET = "terms of access: research and teaching, no commerce"
_TORCHVISION = "LPIPS: BSD-2-Clause; torchvision's weights: their own terms, from ImageNet's"
_LLAMAGEN = "MIT (LlamaGen)"
WORDS = {"words": _OURS, "digits": _OURS, "vgg": _TORCHVISION, "alex": _TORCHVISION, "inception": "Apache-2.0 (torch-fidelity)"}
"""What stands in place of a file's name (``config.WORDS``), where a word may."""
KNOWN = {
    "data/geneval/prompts.jsonl": "MIT (GenEval)",
    "*janus-pro*": "DeepSeek License Agreement 1.0: its restrictions of use (Attachment A) bind tuned weights too",
    "*flan-t5*": "Apache-2.0 (Google)",
    "*clip-vit-*": "MIT (OpenAI's CLIP)",
    "*hpsv2*": "Apache-2.0 (HPSv2)",
    "*dinov2*": "Apache-2.0 (Meta)",
    "*flux-reason*": "Apache-2.0 by its card; drawn by FLUX.1 [dev], whose licence (2 d) forbids training competing models on its pictures",
    "*laion-coco*": "CC BY 4.0 by its card, for captions and addresses; the pictures': unknown",
    "*imagenet*": _IMAGENET,
    "data/coco/*": "captions: CC BY 4.0; pictures: terms of Flickr and of their authors",
    "*llamagen*": _LLAMAGEN,
    "*c2i_?*_[0-9][0-9][0-9].pt": _LLAMAGEN,
    "*t2i_xl_stage[12]_[0-9][0-9][0-9].pt": _LLAMAGEN,
    "*vq_ds*_?2i.pt": _LLAMAGEN,
}
"""Licences by pattern of the name, in small letters; the first that fits counts. Detectors say theirs when they judge."""


EMBEDDED = frozenset(
    name for recipe in ("digits", "digits-t2i", "digits-janus") for name in config.named_files(recipes.recipe(recipe)).values()
) | {config.TuneConfig().classifier, recipes.recipe("digits-t2i").tune.clip_model}
"""Files and folders that come with the clone."""


@dataclass(frozen=True)
class Licence:
    """One input of a model: the name it was read by, its part in it, its licence, and who says so."""

    input: str
    name: str
    role: str
    licence: str
    source: str


def licences(named: Mapping[str, str], stated: Mapping[str, str], judges: Mapping[str, str]) -> list[Licence]:
    """Of every input that a configuration names, ``{"model.generator": ...}``. ``stated``: ``register.licences``; ``judges``: what
    detectors said of their weights while they judged, by input."""
    return [
        Licence(each, named[field], ROLES[field.partition(".")[0]], *_known(each, named[field], stated, judges))
        for each, field in config.INPUTS.items()
        if named.get(field)
    ]


def _known(each: str, name: str, stated: Mapping[str, str], judges: Mapping[str, str]) -> tuple[str, str]:
    if each in stated:
        return stated[each], "register.licences"
    if judges.get(each):
        return judges[each], "the detector"
    if each != "data" and name in WORDS:
        return WORDS[name], "its name"
    known = [DIGITS] if name in EMBEDDED else [licence for pattern, licence in KNOWN.items() if fnmatchcase(name.lower(), pattern)]
    return (known[0], "its name") if known else (UNKNOWN, "nobody")
