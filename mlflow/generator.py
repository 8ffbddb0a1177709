"""A registered generator as MLflow serves it (models from code): class ids or prompts in, images out.

    model = mlflow.pyfunc.load_model("models:/vapi-digits@challenger")
    model.predict({"class_id": [7, 7, 3]}, params={"seed": 1, "temperature": 0.9})

gives a row for each class id: ``class_id`` and ``png_base64``; a generator of captions takes ``prompt``,
a string, in its place. Row n is drawn with seed ``seed + n`` and depends on nothing else in the request.
Parameters left out are those at which the model did best
when it was evaluated.

This file is read by path when a model is logged and is never imported as ``mlflow.generator``: a
module of that name would hide the library.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image

from vapi import images, models
from vapi.config import ModelConfig, build
from vapi.models import sampler

BATCH = 64  # images drawn at a time; the result does not depend on it


class Generator(PythonModel):
    """Loads the weights once, draws on request."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read generator and tokenizer from the model's own artifacts."""
        files = context.artifacts
        values = json.loads(Path(files["config"]).read_text())
        here = {name: files[name] for name in ("generator", "tokenizer", "text_encoder") if name in files}
        model = build(ModelConfig, {**values, **here}, "model")
        self.precision, self.policy = model.precision, models.load(model)

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Draw one image for each ``class_id`` or ``prompt``. Raises ValueError for a class that the model does not know."""
        name = "class_id" if self.policy.num_classes else "prompt"
        asked: list[Any] = self._classes(model_input[name]) if self.policy.num_classes else self._prompts(model_input[name])
        options = dict(params or {})
        seed = int(options.pop("seed", 0))
        drawn = [png for at in range(0, len(asked), BATCH) for png in self._draw(asked[at : at + BATCH], seed + at, options)]
        return pd.DataFrame({name: asked, "png_base64": drawn})

    def _prompts(self, column: pd.Series) -> list[str]:
        for number, prompt in enumerate(column):
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"prompt {number} is {prompt!r}; this model draws what words say")
        return list(column)

    def _classes(self, column: pd.Series) -> list[int]:
        labels, classes = [int(label) for label in column], self.policy.num_classes
        if strange := sorted({label for label in labels if not 0 <= label < classes}):
            raise ValueError(f"class_id {strange[0]} is unknown; this model draws classes 0 .. {classes - 1}")
        return labels

    @torch.inference_mode()
    def _draw(self, asked: list[Any], seed: int, options: dict[str, Any]) -> list[str]:
        with models.autocast(self.precision, self.policy.device):  # as it was evaluated
            codes = self.policy.generate(self.policy.condition(asked), [seed + n for n in range(len(asked))], **options)
        pixels = images.to_uint8(sampler.decode(self.policy, codes)).permute(0, 2, 3, 1).cpu().numpy()
        return [base64.b64encode(images.png_bytes(Image.fromarray(image))).decode() for image in pixels]


set_model(Generator())
