"""The scenes' Janus: whole, in transformers' layout, and one that listens."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from vapi import models
from vapi.config import ModelConfig
from vapi.digits import __main__, build_janus, build_scenes, scenes, train
from vapi.models import janus, janus_files, llamagen, vq, weights
from vapi.recipes import recipe

BUNDLED = Path(__file__).parents[1] / "data" / build_janus.FOLDER
bundled = pytest.mark.skipif(not BUNDLED.is_dir(), reason="data/ is not here: dvc pull data.dvc")
CAPTION = "a photo of a red three and a blue eight"


def built(out: Path, option: str) -> Path:
    """What the command builds at a tiny size, beside an image tokenizer."""
    torch.manual_seed(0)
    sizes = build_scenes.TINY.tokenizer
    weights.save(vq.VQModel(sizes), out / build_scenes.TOKENIZER, vq.metadata(sizes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vapi.digits", str(out), option, "--tiny"])
        __main__.main()
    return out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("janus") / "data", "--janus") / build_janus.FOLDER


def policy_of(folder: Path) -> models.Policy:
    return models.load(ModelConfig(policy="janus", generator=str(folder), tokenizer=str(folder), image_size=scenes.SIDE, device="cpu"))


@torch.no_grad()
def transformers_draws_the_same(folder: Path) -> None:
    """It loads all there but the image tokenizer, whose norms its class has in 32 groups alone, and draws the codes that are drawn here."""
    from transformers import JanusConfig, JanusForConditionalGeneration

    config = JanusConfig.from_pretrained(folder)
    config.vq_config.base_channels = 32
    theirs, loading = JanusForConditionalGeneration.from_pretrained(
        folder, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    names = {name if isinstance(name, str) else name[0] for kind in loading.values() for name in kind}
    assert names and all(name.startswith(janus_files.TOKENIZER) for name in names)
    policy = policy_of(folder)
    ids = torch.tensor(policy.prompts.ids([CAPTION]))
    codes = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_mode="image", do_sample=False)
    ours = policy.generate(policy.condition([CAPTION]), [0], top_k=1, guidance=theirs.generation_config.guidance_scale)
    assert torch.equal(codes, ours)


@torch.no_grad()
def has_the_scenes_tokenizer(folder: Path) -> None:
    policy, own = policy_of(folder), folder.parents[1] / build_scenes.TOKENIZER
    known = llamagen.load_tokenizer(ModelConfig(tokenizer=str(own), image_size=scenes.SIDE), torch.device("cpu"))
    codes = torch.randint(known.vocab, (2, policy.num_codes), generator=torch.Generator().manual_seed(0))
    assert torch.equal(policy.decode(codes), known.decode(codes))
    assert torch.equal(policy.encode(policy.decode(codes)), known.encode(known.decode(codes)))


def test_the_command_builds_a_whole_janus(tiny: Path) -> None:
    assert sorted(path.name for path in tiny.iterdir()) == sorted(
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    )
    transformers_draws_the_same(tiny)
    has_the_scenes_tokenizer(tiny)
    with pytest.raises(ValueError, match="exists; name a new folder"):
        build_janus.build(tiny.parents[1], build_janus.TINY)


def test_it_is_built_to_scenes_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scenes-tokenizer.safetensors is not here"):
        build_janus.build(tmp_path, build_janus.TINY)
    assert not (tmp_path / build_janus.FOLDER).exists()


def test_a_tuned_one_leaves_as_a_whole_one(tiny: Path, tmp_path: Path) -> None:
    policy = policy_of(tiny)
    with torch.no_grad():
        policy.generator.output.bias += torch.arange(policy.vocab) / policy.vocab
    policy.save(tmp_path / "tuned.safetensors")
    janus.export(tiny, tmp_path / "tuned.safetensors", tmp_path / "whole")
    transformers_draws_the_same(tmp_path / "whole")
    assert torch.equal(policy_of(tmp_path / "whole").generator.output.bias, policy.generator.output.bias)
    with pytest.raises(ValueError, match="norms have 4 groups, and deepseek's code knows 32 alone"):
        janus.export(tiny, tmp_path / "tuned.safetensors", tmp_path / "other", "deepseek")
    assert not (tmp_path / "other").exists()


def test_a_word_that_it_learned_from_is_one_token(tiny: Path) -> None:
    prompts = janus.Prompts(tiny)
    asked = [prompt.text for prompt in scenes.captions("train", 600, seed=2)]
    told = build_janus.conditions(prompts, asked)
    for row, caption in zip(told, asked, strict=True):
        ids = row[row != janus.NOTHING]
        assert (row[-len(ids) :] == ids).all() and len(ids) == len(caption.split()) + 8  # with the marks around them
    strange = "a purple giraffe, zwölf"
    assert strange in prompts.tokenizer.decode(prompts.ids([strange])[0])


def test_while_it_learns_one_caption_in_ten_is_not_told(tiny: Path) -> None:
    policy = policy_of(tiny)
    learner = build_janus.Learner(policy.generator.config, policy.tokenizer)
    assert torch.equal(learner.generation_embeddings.weight, policy.tokenizer.quantize.entries())
    told = policy.condition([CAPTION]).expand(400, -1)
    seen: list[torch.Tensor] = []
    learner.language_model.embed_tokens.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    codes = torch.zeros(400, policy.num_codes, dtype=torch.long)
    with torch.no_grad():
        learner.train()(told, codes)
        learner.eval()(told[:1], codes[:1])
    untold = (seen[0] == learner.null(told).clamp(min=0)).all(1)
    assert 0.04 < untold.float().mean() < 0.18 and torch.equal(seen[0][~untold], told[~untold].clamp(min=0))
    assert torch.equal(seen[1], told[:1].clamp(min=0))


@bundled
def test_the_bundled_one_is_small_and_whole() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 6e6
    made = janus_files.read(BUNDLED)
    assert set(made.unread()) == {"vision_model", "aligner", "lm_head"}
    assert json.loads((BUNDLED / "generation_config.json").read_text())["guidance_scale"] == recipe("digits-janus").evaluate.guidance
    transformers_draws_the_same(BUNDLED)
    has_the_scenes_tokenizer(BUNDLED)


@bundled
def test_the_bundled_one_reads_its_captions() -> None:
    """On pictures of unseen glyphs, in nats per picture (2.6, 0.9 and 4.9 where it was made)."""
    policy, colours = policy_of(BUNDLED), list(scenes.COLOURS)
    shown = [(digit, n) for digit in range(10) for n, colour in enumerate(colours) if (colour, digit) not in scenes.UNSEEN]

    def asked(digits: int = 0, further: int = 0) -> list[scenes.Prompt]:
        return [scenes.Prompt("colors", (scenes.Thing((digit + digits) % 10, colours[(n + further) % 6]),)) for digit, n in shown]

    def cost(captions: list[str]) -> float:
        return policy.num_codes * train.cross_entropy(policy.generator, codes, policy.condition(captions))

    codes = train.encode_all(policy.tokenizer, scenes.paint_prompts(asked(), "validation", seed=77).images)
    right = [prompt.text for prompt in asked()]
    assert cost([prompt.text for prompt in asked(further=2)]) - cost(right) > 1.5
    assert cost([prompt.text for prompt in asked(digits=3)]) - cost(right) > 0.2
    assert cost([f"{caption} and a red two" for caption in right]) - cost(right) > 3
