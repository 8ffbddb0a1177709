"""A tiny real policy (2 layers, 4 x 4 codes, 32 codes in the book) on disk, for every test that needs one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import threading
from pathlib import Path

import janus_world
import pytest
import torch

from vapi import models, track
from vapi.config import ModelConfig
from vapi.models import gpt, vq, weights
from vapi.models.text import Words

torch.set_num_threads(1)
if not torch.cuda.is_available():
    assert "triton" not in sys.modules, "Triton looks at this when it is imported"
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run in Python then

TINY_VQ = vq.VQConfig(vocab=32, code_dim=4, channels=8, multipliers=(1, 2, 2), blocks=1, z_channels=16, groups=4)
TINY_GPT = gpt.GPTConfig(dim=32, layers=2, heads=2, hidden=64, vocab=32, codes=16, classes=10)


def write_tiny(folder: Path, vq_config: vq.VQConfig = TINY_VQ, gpt_config: gpt.GPTConfig = TINY_GPT, seed: int = 0) -> ModelConfig:
    """Random weights of a tiny LlamaGen for 16 x 16 images, in files, as a ModelConfig."""
    torch.manual_seed(seed)
    tokenizer, generator = vq.VQModel(vq_config), gpt.Transformer(gpt_config)
    with torch.no_grad():  # livelier than the usual initialisation, so that predictions differ
        for parameter in generator.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    folder.mkdir(parents=True, exist_ok=True)
    weights.save(tokenizer, folder / "tokenizer.safetensors", vq.metadata(vq_config))
    weights.save(generator, folder / "generator.safetensors", gpt.metadata(gpt_config))
    return ModelConfig(
        generator=str(folder / "generator.safetensors"), tokenizer=str(folder / "tokenizer.safetensors"), image_size=16, device="cpu"
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


CAPTIONED_GPT = dataclasses.replace(TINY_GPT, classes=0, caption_dim=Words.width, prefix=9)
CAPTIONS = ("a photo of a red three", "two sevens", "a blue eight left of a green one", "nine")


@pytest.fixture(scope="session")
def captioned_model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """The same for captions, which the embedded encoder reads."""
    model = write_tiny(tmp_path_factory.mktemp("captioned"), gpt_config=CAPTIONED_GPT)
    return dataclasses.replace(model, text_encoder="words")


@pytest.fixture(scope="session")
def janus_model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A tiny Janus in transformers' layout."""
    return janus_world.write(tmp_path_factory.mktemp("janus"))


@pytest.fixture
def janus_policy(janus_model: ModelConfig) -> models.Policy:
    return models.load(janus_model)


@pytest.fixture
def captioned_policy(captioned_model: ModelConfig) -> models.Policy:
    return models.load(captioned_model)


@pytest.fixture
def tiny_policy(tiny_model: ModelConfig) -> models.Policy:
    return models.load(tiny_model)


@pytest.fixture(scope="session")
def mlflow_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database to copy; making one takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with contextlib.chdir(path.parent):  # its default artifact folder is relative to here, and must not be the clone's
        track.connect(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inception's weights in the published layout, with random values."""
    from vapi.bench.fid import RandomInception  # it imports Triton

    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.manual_seed(0)
    torch.save(RandomInception().state_dict(), path)
    return path


class SenderThread(threading.Thread):
    """What sends a run's journal, as a thread: importing mlflow in a process of its own takes seconds."""

    def __init__(self, folder: Path) -> None:
        super().__init__(target=track.sender.main, args=(folder,))
        self.start()

    def poll(self) -> int | None:
        return None if self.is_alive() else 0

    def wait(self) -> None:
        self.join()


@pytest.fixture
def sender_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are sent from this process."""
    monkeypatch.setattr(track.sender, "spawn", SenderThread)
