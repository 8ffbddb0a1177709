"""Every layout of a checkpoint gives the same network; whatever is no checkpoint is refused in words, and never executed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_GPT, TINY_VQ, write_tiny
from safetensors.torch import save_file
from torch import Tensor

from vapi import cli, data, models
from vapi.config import ModelConfig
from vapi.models import gpt, llamagen, vq, weights

SMALL_VQ = dataclasses.replace(TINY_VQ, channels=32, multipliers=(1, 1, 1), groups=32)  # the published groups: no shape shows them
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def tiny_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's layouts have no place for the number of heads: like a published size, this one is known by width and depth."""
    monkeypatch.setitem(gpt.PUBLISHED, "GPT-tiny", (TINY_GPT.dim, TINY_GPT.layers, TINY_GPT.heads))


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, State, State]:
    """A config with weights, and the two state dicts."""
    model = write_tiny(tmp_path_factory.mktemp("small"), vq_config=SMALL_VQ)
    return model, weights.read(model.generator)[0], weights.read(model.tokenizer)[0]


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def inside(state: State) -> State:
    """Activation checkpointing and compilation of each block leave names in the middle."""
    return {name.replace(".attention.", "._checkpoint_wrapped_module._orig_mod.attention."): tensor for name, tensor in state.items()}


def beside(**more: Any) -> Callable[[State], dict[str, Any]]:
    """The weights as LlamaGen's training stores them, with what else it keeps in the file."""
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "params": [0]}]}
    return lambda state: {"model": state, "optimizer": optimizer, "steps": 3, **more}


LAYOUTS: dict[str, Callable[[State], dict[str, Any]]] = {
    "raw": dict,
    "model": lambda s: {"model": s},
    "module": lambda s: {"module": s, "global_steps": 7},
    "state_dict": lambda s: {"state_dict": s},
    "ema": lambda s: {"ema": s},
    "model wins over ema": lambda s: {"ema": {name: tensor + 1 for name, tensor in s.items()}, "model": s},
    "nested": lambda s: {"model": {"state_dict": s}},
    "with optimizer, steps and arguments": beside(
        args=argparse.Namespace(image_size=16, downsample_size=4, vocab_size=32, ema=True, lr=None)
    ),
    "DDP": lambda s: {"model": prefixed("module.", s)},
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "DDP, compiled": lambda s: {"model": prefixed("module._orig_mod.", s)},
    "compiled, DDP": lambda s: {"model": prefixed("_orig_mod.module.", s)},
    "blocks wrapped": lambda s: prefixed("_fsdp_wrapped_module.", inside(s)),
    "parameters": lambda s: {"model": {name: torch.nn.Parameter(tensor) for name, tensor in s.items()}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])  # a name says nothing
def test_every_layout_gives_the_same_network(states: tuple[ModelConfig, State, State], tmp_path: Path, layout: str, suffix: str) -> None:
    model, generator, tokenizer = states
    changed = {}
    for name, state in (("generator", generator), ("tokenizer", tokenizer)):
        torch.save(LAYOUTS[layout](state), tmp_path / f"{name}{suffix}")
        changed[name] = str(tmp_path / f"{name}{suffix}")
    policy = models.load(dataclasses.replace(model, **changed))
    for network, state in ((policy.generator, generator), (policy.tokenizer, tokenizer)):
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert all(p.requires_grad for p in policy.generator.parameters()) and not any(p.requires_grad for p in policy.tokenizer.parameters())


@pytest.mark.parametrize("suffix", [".bin", ".pth", ".ckpt", ".pt"])
def test_safetensors_under_any_name(states: tuple[ModelConfig, State, State], tmp_path: Path, suffix: str) -> None:
    model, generator, _ = states
    save_file(prefixed("module.", generator), tmp_path / f"g{suffix}")
    policy = models.load(model, tmp_path / f"g{suffix}")
    assert torch.equal(policy.generator.state_dict()["output.weight"], generator["output.weight"])


def test_torch_files_of_before_version_1_6(states: tuple[ModelConfig, State, State], tmp_path: Path) -> None:
    model, generator, _ = states
    torch.save({"model": generator}, tmp_path / "g.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(models.load(model, tmp_path / "g.pt").generator.state_dict()["norm.weight"], generator["norm.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(states: tuple[ModelConfig, State, State], tmp_path: Path, dtype: torch.dtype) -> None:
    model, generator, _ = states
    torch.save({name: tensor.to(dtype) for name, tensor in generator.items()}, tmp_path / "g.pt")
    for name, tensor in models.load(model, tmp_path / "g.pt").generator.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, generator[name].to(dtype).float())


def test_a_loaded_network_is_independent_of_its_file(states: tuple[ModelConfig, State, State], tmp_path: Path) -> None:
    """The file is mapped while it is read, and only then."""
    model, generator, _ = states
    torch.save(generator, tmp_path / "g.pt")
    policy = models.load(model, tmp_path / "g.pt")
    with open(tmp_path / "g.pt", "r+b") as file:
        file.truncate(100)
    assert torch.equal(policy.generator.state_dict()["output.weight"], generator["output.weight"])


# --- sizes -------------------------------------------------------------------------------------

MILLIONS = {  # of parameters; class-conditional, 1,000 classes, and text-conditional
    "GPT-B": (110.9, 112.3), "GPT-L": (342.9, 345.0), "GPT-XL": (774.7, 777.7), "GPT-XXL": (1411.0, 1414.9),
    "GPT-XXXL": (3893.0, 3902.3), "GPT-1B": (1199.6, 1206.0), "GPT-3B": (3096.7, 3110.2), "GPT-7B": (6614.6, 6635.7),
}  # fmt: skip


@pytest.mark.parametrize("name", MILLIONS)
@pytest.mark.parametrize("text", [False, True], ids=["c2i", "t2i"])
def test_every_published_generator_is_known_by_its_shapes(name: str, text: bool) -> None:
    config = gpt.published(name)
    if text:
        config = dataclasses.replace(config, classes=0, caption_dim=2048, prefix=120)
    with torch.device("meta"):
        network = gpt.Transformer(config)
    assert gpt.infer_config(weights.shapes(network.state_dict()), codes=576) == config
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == MILLIONS[name][text]
    assert network.rotary.device.type == "cpu" and len(network.rotary) == config.prefix + 576  # computed, not read


@pytest.mark.parametrize("multipliers, factor, millions", [((1, 1, 2, 2, 4), 16, 71.9), ((1, 2, 2, 4), 8, 70.1)], ids=["VQ-16", "VQ-8"])
def test_both_published_tokenizers_are_known_by_their_shapes(multipliers: tuple[int, ...], factor: int, millions: float) -> None:
    config = vq.VQConfig(multipliers=multipliers)
    with torch.device("meta"):
        network = vq.VQModel(config)
    assert vq.infer_config(weights.shapes(network.state_dict())) == config and config.factor == factor
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


MEASURE = """
import resource, sys, torch
from vapi.config import ModelConfig
from vapi.models import llamagen, weights
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
generator = llamagen.load_generator(ModelConfig(image_size=64), sys.argv[1], 16, torch.device("cpu"))
print((peak() - before) / sum(p.numel() * 4 for p in generator.parameters()))
"""


def test_loading_takes_the_file_and_one_copy(tmp_path: Path) -> None:
    config = gpt.GPTConfig(dim=768, layers=12, heads=12, hidden=1024, vocab=64, codes=16, classes=10)
    with torch.device("meta"):
        shapes = weights.shapes(gpt.Transformer(config).state_dict())
    torch.save({"model": {name: torch.ones(shape) for name, shape in shapes.items()}}, tmp_path / "g.pt")
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "g.pt")], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2.2  # the pages of the file count, though the system may take them back


# --- captions ----------------------------------------------------------------------------------


def captions_of(*words: int) -> Tensor:
    """Random captions of so many words, at most 5, padded on the left: (B, 5, 24 + 1)."""
    there = torch.stack([torch.arange(5) >= 5 - count for count in words])[..., None].float()
    return torch.cat([torch.randn(len(words), 5, 24) * there, there], dim=-1)


CAPTIONED = dataclasses.replace(TINY_GPT, classes=0, caption_dim=24, prefix=5)


@torch.no_grad()
def test_padding_decides_nothing() -> None:
    """What stands in padded positions changes no bit, and a caption alone gets what it gets among longer ones."""
    torch.manual_seed(1)
    network = gpt.Transformer(CAPTIONED).eval()
    captions, context = captions_of(2, 5, 1), torch.randint(32, (3, 16))
    logits = network(captions, context)
    noise = captions.clone()
    noise[..., :-1] += torch.randn(3, 5, 24) * (1 - captions[..., -1:])
    assert not torch.equal(noise, captions) and torch.equal(network(noise, context), logits)
    torch.testing.assert_close(network(captions[:1], context[:1]), logits[:1], rtol=1e-5, atol=1e-6)
    last = captions.clone()
    last[0, -1, :-1] += 1
    assert not torch.allclose(network(last, context)[0, 0], logits[0, 0])  # a word does


@torch.no_grad()
def test_a_short_caption_is_a_shorter_prefix() -> None:
    """With the padding cut off, a network of that prefix says the same."""
    torch.manual_seed(2)
    network = gpt.Transformer(CAPTIONED).eval()
    short = gpt.Transformer(dataclasses.replace(CAPTIONED, prefix=2)).eval()
    state = network.state_dict()
    short.load_state_dict({**state, "cls_embedding.uncond_embedding": state["cls_embedding.uncond_embedding"][:2]})
    captions, context = captions_of(2), torch.randint(32, (1, 16))
    torch.testing.assert_close(short(captions[:, -2:], context), network(captions, context), rtol=1e-5, atol=1e-6)


def test_a_dropped_caption_is_the_null_condition() -> None:
    torch.manual_seed(0)
    network = gpt.Transformer(dataclasses.replace(CAPTIONED, class_dropout=1.0)).train()
    captions = captions_of(3, 5)
    assert torch.equal(network.cls_embedding(captions), network.eval().cls_embedding(network.cls_embedding.null(captions)))


@torch.no_grad()
def test_captions_teacher_forced_and_step_by_step() -> None:
    torch.manual_seed(0)
    network = gpt.Transformer(CAPTIONED).eval()
    captions, context = captions_of(5, 1, 3), torch.randint(32, (3, 16))
    logits = network(captions, context)
    assert logits.shape == (3, 16, 32)
    cache, starts = network.new_cache(3), network.cls_embedding.starts(captions)
    stepped = [network.prefill(network.cls_embedding(captions), cache, starts)]
    stepped += [network.step(context[:, t - 1], t, cache, starts) for t in range(1, 16)]
    torch.testing.assert_close(torch.stack(stepped, 1), logits, rtol=1e-5, atol=1e-5)
    changed = context.clone()
    changed[:, 7:] = 0
    assert torch.equal(network(captions, changed)[:, :8], logits[:, :8])  # causal
    assert not torch.allclose(network(captions.flip(0), context)[0], logits[0])
    nothing = network.cls_embedding.null(captions)
    assert nothing.shape == captions.shape and torch.equal(nothing[0, :, :-1], nothing[2, :, :-1])
    assert torch.equal(nothing[..., -1], captions[..., -1])
    assert network.train().cls_embedding(captions).shape == (3, 5, 32)


# --- the way back ------------------------------------------------------------------------------


def test_export_is_read_as_llamagen_reads_it_and_comes_back(tiny_model: ModelConfig, tmp_path: Path) -> None:
    tuned = tmp_path / "tune"
    policy = models.load(tiny_model)
    policy.save(tuned / "model.safetensors")
    with pytest.raises(SystemExit) as leaving:
        cli.main(["export", str(tuned), str(tmp_path / "out" / "tuned.pt")])
    assert leaving.value.code == 0
    state = torch.load(tmp_path / "out" / "tuned.pt")["model"]  # their very words
    assert list(state) == list(policy.generator.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in policy.generator.state_dict().items())
    assert (tmp_path / "out" / "tuned.pt").stat().st_size < 1.2 * (tuned / "model.safetensors").stat().st_size
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tuned.pt"]  # nothing half-written


def test_a_tuned_tokenizer_is_exported_from_its_folder(tiny_model: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tune").mkdir()
    shutil.copy(tiny_model.tokenizer, tmp_path / "tune" / "tokenizer.safetensors")
    with pytest.raises(SystemExit) as leaving:
        cli.main(["export", str(tmp_path / "tune"), str(tmp_path / "tuned.pt")])
    assert leaving.value.code == 0
    tokenizer = models.load(tiny_model).tokenizer.state_dict()
    state = torch.load(tmp_path / "tuned.pt")["model"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in tokenizer.items())
    data.write_json(tmp_path / "tune" / "config.json", {"sections": {"model": {"policy": "janus"}}})
    with pytest.raises(SystemExit) as leaving:
        cli.main(["export", str(tmp_path / "tune"), str(tmp_path / "again.pt")])
    assert leaving.value.code == cli.MISTAKE and "is a Janus's tokenizer" in capsys.readouterr().err


def test_what_was_exported_loads_again(states: tuple[ModelConfig, State, State], tmp_path: Path) -> None:
    model, *wanted = states
    for name in ("generator", "tokenizer"):
        llamagen.export(getattr(model, name), tmp_path / f"{name}.pt")
        llamagen.export(tmp_path / f"{name}.pt", tmp_path / f"{name}.pt")  # over itself
    policy = models.load(dataclasses.replace(model, generator=str(tmp_path / "generator.pt"), tokenizer=str(tmp_path / "tokenizer.pt")))
    for network, state in zip((policy.generator, policy.tokenizer), wanted):
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_export_refuses_what_is_no_network_of_ours(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not the weights of a LlamaGen generator"):
        llamagen.export(tmp_path / "other.pt", tmp_path / "out.pt")
    with pytest.raises(ValueError, match="is not here"):
        llamagen.export(tmp_path / "nothing.pt", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_export_to_where_nothing_can_be_written(tiny_model: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write"):
        llamagen.export(tiny_model.generator, tmp_path / "file" / "tuned.pt")


# --- bad input ---------------------------------------------------------------------------------


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_executed(tiny_model: ModelConfig, tmp_path: Path, zipped: bool) -> None:
    canary, path = tmp_path / "canary", tmp_path / "bad.pt"
    state = weights.read(tiny_model.generator)[0]
    torch.save({"model": state, "args": argparse.Namespace(hook=Code(canary))}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="not executed"):
        models.load(tiny_model, path)
    assert not canary.exists()
    torch.load(path, weights_only=False)  # the trap is real
    assert canary.exists()


def test_a_bare_pickle_is_not_executed(tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Code(tmp_path / "canary"), protocol=2))
    with pytest.raises(ValueError, match="not executed"):
        weights.read(tmp_path / "bad.pt")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_half_a_torch_file(tiny_model: ModelConfig, tmp_path: Path, share: float) -> None:
    torch.save({"model": weights.read(tiny_model.generator)[0]}, tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="fetch it again"):
        models.load(tiny_model, tmp_path / "half.pt")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_half_a_safetensors_file(tiny_model: ModelConfig, tmp_path: Path, share: float) -> None:
    data = Path(tiny_model.generator).read_bytes()
    (tmp_path / "half.safetensors").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="fetch it again"):
        models.load(tiny_model, tmp_path / "half.safetensors")


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><title>404</title>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_no_checkpoint_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "g.pt").write_bytes(content)
    with pytest.raises(ValueError, match="is no checkpoint"):
        weights.read(tmp_path / "g.pt")


def test_a_checkpoint_without_weights(tmp_path: Path) -> None:
    for content in ({"model": {}}, {"steps": 3}, [torch.zeros(1)]):
        torch.save(content, tmp_path / "g.pt")
        with pytest.raises(ValueError, match="holds no weights"):
            weights.read(tmp_path / "g.pt")


def test_weights_that_are_there_twice(states: tuple[ModelConfig, State, State], tmp_path: Path) -> None:
    torch.save({**states[1], **prefixed("module.", states[1])}, tmp_path / "g.pt")
    with pytest.raises(ValueError, match="twice"):
        weights.read(tmp_path / "g.pt")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"image_size": 256, "downsample_size": 16}, "trained with image_size 256, but model.image_size is 16"),
        ({"num_classes": 11}, "trained with num_classes 11, but its table, less the row for no class, holds 10"),
        ({"image_size": 16, "downsample_size": 8}, "trained with downsample_size 8, but pixels per code of this tokenizer are 4"),
    ],
)
def test_arguments_in_the_file_must_fit(
    states: tuple[ModelConfig, State, State], tmp_path: Path, arguments: dict[str, int], words: str
) -> None:
    model, generator, _ = states
    torch.save({"model": generator, "args": argparse.Namespace(**arguments)}, tmp_path / "g.pt")
    with pytest.raises(ValueError, match=words):
        models.load(model, tmp_path / "g.pt")


def test_another_size_vocabulary_or_downsampling(states: tuple[ModelConfig, State, State], tmp_path: Path) -> None:
    model, generator, tokenizer = states
    with pytest.raises(ValueError, match="32 and 1 layers is none of GPT-B"):
        torch.save({n: t for n, t in generator.items() if not n.startswith("layers.1.")}, tmp_path / "g.pt")
        models.load(model, tmp_path / "g.pt")
    with pytest.raises(ValueError, match="predicts 48 codes, the tokenizer has 32"):
        wide = {n: torch.zeros(48, 32) if n in ("tok_embeddings.weight", "output.weight") else t for n, t in generator.items()}
        torch.save(wide, tmp_path / "g.pt")
        models.load(model, tmp_path / "g.pt")
    with pytest.raises(ValueError, match=r"(?s)does not fit the network.*output.weight is \(48, 32\), not \(32, 32\)"):
        torch.save({**generator, "output.weight": torch.zeros(48, 32)}, tmp_path / "g.pt")
        models.load(model, tmp_path / "g.pt")
    with pytest.raises(ValueError, match="holds torch.int64"):
        torch.save({**generator, "norm.weight": torch.zeros(32, dtype=torch.int64)}, tmp_path / "g.pt")
        models.load(model, tmp_path / "g.pt")
    coarse = write_tiny(tmp_path / "coarse", vq_config=dataclasses.replace(TINY_VQ, multipliers=(1, 1, 2, 2)))  # 8 pixels per code, not 4
    with pytest.raises(ValueError, match="draws 16 codes, but model.image_size 16 makes 4"):
        models.load(dataclasses.replace(coarse, generator=str(write_tiny(tmp_path / "fine").generator)))
    with pytest.raises(ValueError, match="multiple of 8"):
        models.load(dataclasses.replace(coarse, image_size=20))


def test_a_header_that_lies(tmp_path: Path) -> None:
    """A safetensors file whose header points beyond the file."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]}}).encode()
    (tmp_path / "bad.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(ValueError, match="fetch it again"):
        weights.read(tmp_path / "bad.safetensors")
