"""Janus: what a caption becomes, where a code is predicted, which weights are whose, and how they leave again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import janus_world
import pytest
import torch
from conftest import CAPTIONS
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from vapi import cli, data, images, models, tokens
from vapi.config import ModelConfig, TokensConfig, TuneConfig
from vapi.models import janus, janus_files, weights
from vapi.objective import optimizer_of

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Janus in transformers' layout."""
    return Path(janus_world.write(tmp_path_factory.mktemp("whole")).generator)


@pytest.fixture(scope="module")
def deepseek(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in deepseek's."""
    folder = tmp_path_factory.mktemp("deepseek") / "janus"
    janus_files.write(janus_files.read(whole), {}, folder, "deepseek")
    return folder


def config(folder: Path) -> ModelConfig:
    return ModelConfig(policy="janus", generator=str(folder), tokenizer=str(folder), image_size=16, device="cpu")


def context(rows: int = 2) -> Tensor:
    return torch.randint(32, (rows, 16), generator=torch.Generator().manual_seed(0))


# --- where a code is predicted -----------------------------------------------------------------


@torch.no_grad()
def test_code_t_is_predicted_where_code_t_minus_1_stands(janus_policy: models.Policy) -> None:
    """The off-by-one of the released training: it reads hidden states Lp .. Lp + T - 1, so position t has read code t before it is
    scored on it. Ours are Lp - 1 .. Lp + T - 2, by transformers' own forward of the same tokens."""
    policy, network = janus_policy, janus_world.network().model
    ids, codes = torch.tensor(policy.prompts.ids(CAPTIONS[:1])), context(1)
    pictures = network.generation_aligner(network.generation_embeddings(codes))
    inputs = torch.cat([network.language_model.embed_tokens(ids), pictures], dim=1)
    seen = network.language_model(inputs_embeds=inputs).last_hidden_state
    prompt, count = ids.shape[1], codes.shape[1]
    right = network.generation_head(seen[:, prompt - 1 : prompt + count - 1])
    released = network.generation_head(seen[:, prompt : prompt + count])
    ours = policy.logits(policy.condition(CAPTIONS[:1]), codes)
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[:, 1:], released[:, :-1], rtol=1e-4, atol=1e-4)  # late by one: theirs never predicts the first
    changed = codes.clone()
    changed[:, 3] += 1
    assert torch.equal(policy.logits(policy.condition(CAPTIONS[:1]), changed % 32)[:, :4], ours[:, :4])


@torch.no_grad()
def test_transformers_draws_the_same_codes(janus_policy: models.Policy) -> None:
    network, policy = janus_world.network(), janus_policy
    ids = torch.tensor(policy.prompts.ids(CAPTIONS[:1]))
    network.generation_config.update(
        bos_token_id=policy.prompts.bos, pad_token_id=policy.prompts.pad, guidance_scale=5, do_sample=False, max_length=200
    )
    network.generation_config.generation_kwargs = {"boi_token_id": policy.prompts.start}
    theirs = network.generate(ids, attention_mask=torch.ones_like(ids), generation_mode="image")
    ours = policy.generate(policy.condition(CAPTIONS[:1]), [0], top_k=1, guidance=5.0)
    assert torch.equal(ours, theirs) and len(ours.unique()) > 3


@torch.no_grad()
def test_how_far_a_prompt_is_padded_does_not_matter(janus_policy: models.Policy) -> None:
    """The released training pads on the right, between prompt and image: there the longest caption of a batch moves all others."""
    policy, codes = janus_policy, context(1)
    alone = policy.condition([CAPTIONS[3]])
    with_a_long_one = policy.condition([CAPTIONS[3], "a long caption " * 5])[:1]
    assert with_a_long_one.shape[1] > alone.shape[1]
    torch.testing.assert_close(policy.logits(alone, codes), policy.logits(with_a_long_one, codes), rtol=1e-5, atol=1e-5)
    how = {"guidance": 3.0, "top_k": 1}
    assert torch.equal(policy.generate(alone, [0], **how), policy.generate(with_a_long_one, [0], **how))


# --- what a caption becomes --------------------------------------------------------------------


def test_a_prompt_is_a_conversation_that_ends_where_the_image_begins(janus_policy: models.Policy) -> None:
    prompts, condition = janus_policy.prompts, janus_policy.condition(CAPTIONS)
    assert condition.shape[1] % janus.STEP == 0
    for row, caption in zip(condition, CAPTIONS, strict=True):
        ids = row[row != janus.NOTHING].tolist()
        assert (row[: len(row) - len(ids)] == janus.NOTHING).all(), "padding on the left alone"
        assert ids[0] == prompts.bos and ids[-1] == prompts.start
        words = prompts.tokenizer.decode(ids[1:], skip_special_tokens=False)
        assert words == f"<|User|>: {caption}\n\n<|Assistant|>:<begin_of_image>"
    assert prompts.ids([f"  {CAPTIONS[0]}\n"]) == prompts.ids([CAPTIONS[0]])


def test_nothing_is_asked_with_as_many_tokens(janus_policy: models.Policy) -> None:
    condition, prompts = janus_policy.condition(CAPTIONS), janus_policy.prompts
    for row, nothing in zip(condition, janus_policy.generator.null(condition), strict=True):
        ids = nothing[row != janus.NOTHING].tolist()
        assert ids == [prompts.bos, *[prompts.pad] * (len(ids) - 2), prompts.start]
        assert (nothing[row == janus.NOTHING] == janus.NOTHING).all()


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("a very long one " * 12, "makes 2.. tokens, and 129 fit before 16 codes: 'a very long one"),
        ("a <begin_of_image> b", "the model's own marks"),
        ("<｜begin▁of▁sentence｜>", "the model's own marks"),
    ],
)
def test_captions_that_cannot_be_asked_for(janus_policy: models.Policy, caption: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        janus_policy.condition(["nine", caption])


def test_as_long_as_there_is_room(janus_policy: models.Policy) -> None:
    caption = "x" * (janus_policy.generator.config.room - len(janus_policy.prompts.ids(["x"])[0]) + 1)
    condition = janus_policy.condition([caption])
    assert condition.shape[1] == 129 and (condition != janus.NOTHING).all()
    assert janus_policy.generate(condition, [0]).shape == (1, 16)


# --- whose weights -----------------------------------------------------------------------------


def test_what_is_tuned_and_what_is_not_in_memory(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = models.load(config(whole))
    parts = {name.split(".")[0] for name, p in policy.generator.named_parameters() if p.requires_grad and p.dtype == torch.float32}
    assert parts == {"language_model", "generation_embeddings", "generation_aligner", "generation_head"}
    assert not any(p.requires_grad for p in policy.tokenizer.parameters())
    assert "stay unread: lm_head (1), aligner (4), vision_model (21)" in capsys.readouterr().err
    whole_count = sum(tensor.numel() for tensor in load_file(whole / "model.safetensors").values())
    read = sum(p.numel() for network in (policy.generator, policy.tokenizer) for p in network.parameters())
    unread = sum(t.numel() for n, t in load_file(whole / "model.safetensors").items() if n.startswith(janus_files.UNDERSTANDING))
    assert read + unread == whole_count


def same(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].float(), b[name].float()), name


def test_from_one_layout_to_the_other_and_back(whole: Path, deepseek: Path, tmp_path: Path) -> None:
    there = load_file(deepseek / "model.safetensors")
    assert there["vision_model.vision_tower.blocks.0.attn.qkv.weight"].shape == (96, 32)
    assert there["vision_model.vision_tower.pos_embed"].shape == (1, 16, 32)
    janus_files.write(janus_files.read(deepseek), {}, tmp_path / "again", "transformers")
    same(load_file(tmp_path / "again/model.safetensors"), load_file(whole / "model.safetensors"))
    janus_files.write(janus_files.read(tmp_path / "again"), {}, tmp_path / "thence", "deepseek")
    same(load_file(tmp_path / "thence/model.safetensors"), there)
    assert json.loads((tmp_path / "thence/config.json").read_text()) == json.loads((deepseek / "config.json").read_text())


def test_either_layout_is_the_same_policy(whole: Path, deepseek: Path) -> None:
    one, other = (models.load(config(folder)) for folder in (whole, deepseek))
    assert one.generator.config == other.generator.config
    same(one.generator.state_dict(), other.generator.state_dict())
    same(one.tokenizer.state_dict(), other.tokenizer.state_dict())


@pytest.mark.parametrize("layout", ["transformers", "deepseek"])
@torch.no_grad()
def test_a_tuned_one_loads_in_transformers(whole: Path, deepseek: Path, tmp_path: Path, layout: str) -> None:
    """Whatever the base's layout: its tuned parts are ours, and the others the base's, bit for bit."""
    from transformers import JanusForConditionalGeneration

    folder = whole if layout == "transformers" else deepseek
    policy = models.load(config(folder))
    for parameter in policy.generator.parameters():
        parameter += 1e-5
    policy.save(tmp_path / "model.safetensors")
    janus.export(folder, tmp_path, tmp_path / "out")
    theirs, told = JanusForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    state = theirs.state_dict()
    for name, tensor in policy.generator.state_dict().items():
        assert torch.equal(state[f"model.{name}"], tensor) and tensor.dtype == torch.float32, name
    base = load_file(whole / "model.safetensors")
    for name in base:
        if not name.startswith(janus_files.TRAINED):
            assert torch.equal(state[name], base[name]), name
    assert theirs.lm_head.weight is not theirs.model.language_model.embed_tokens.weight
    if layout == "deepseek":  # what its own files do not say
        assert theirs.generation_config.generation_kwargs == {"boi_token_id": policy.prompts.start}
        assert theirs.generation_config.pad_token_id == policy.prompts.pad
    assert theirs.config.vq_config.num_patches == 4 and theirs.config.text_config.num_hidden_layers == 2
    assert theirs(input_ids=torch.arange(8)[None]).logits.isfinite().all()
    again = models.load(config(tmp_path / "out"))
    same(again.generator.state_dict(), policy.generator.state_dict())


def test_the_command_line_exports(whole: Path, janus_policy: models.Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tune").mkdir()
    janus_policy.save(tmp_path / "tune/model.safetensors")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", str(tmp_path / "tune"), str(tmp_path / "out")])
    assert "name the whole one that it was tuned from with --base" in capsys.readouterr().err
    data.write_json(tmp_path / "tune/config.json", {"sections": {"model": {"generator": str(whole)}}})
    for layout in ("transformers", "deepseek"):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["export", str(tmp_path / "tune"), str(tmp_path / layout), "--layout", layout])
        same(models.load(config(tmp_path / layout)).generator.state_dict(), janus_policy.generator.state_dict())


def test_a_hundred_small_steps_survive_save_and_load(whole: Path, tmp_path: Path) -> None:
    """At the paper's rate a hundred of Adam's steps move a weight by 1e-5 at most: in the bfloat16 that the released training saves,
    most of that is gone."""
    policy = models.load(config(whole))
    before = {name: p.detach().clone() for name, p in policy.generator.named_parameters()}
    optimizer = optimizer_of(policy.generator, TuneConfig(lr=1e-7))
    condition, codes = policy.condition(CAPTIONS), context(4)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(policy.logits(condition, codes).flatten(0, 1), codes.flatten()).backward()
        optimizer.step()
    policy.save(tmp_path / "model.safetensors")
    again = models.load(config(whole), tmp_path / "model.safetensors")
    same(again.generator.state_dict(), policy.generator.state_dict())
    janus.export(whole, tmp_path / "model.safetensors", tmp_path / "deepseek", "deepseek")
    same(models.load(config(tmp_path / "deepseek")).generator.state_dict(), policy.generator.state_dict())
    name = "language_model.layers.0.mlp.up_proj.weight"
    after = dict(policy.generator.named_parameters())[name].detach()
    moved = after != before[name]
    kept_by_bfloat16 = after.bfloat16() != before[name].bfloat16()
    assert moved.float().mean() > 0.95 and (after - before[name]).abs().max() < 2e-5
    assert kept_by_bfloat16.float().mean() < 0.1


# --- files -------------------------------------------------------------------------------------


def as_bin(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({name: tensor.bfloat16() for name, tensor in state.items()}, folder / "pytorch_model.bin")


def sharded(folder: Path, kind: str = "safetensors", index: bool = True) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, names = {"safetensors": "model", "bin": "pytorch_model"}[kind], sorted(state)
    places = {name: f"{stem}-{1 + i * 3 // len(names):05}-of-00003.{kind}" for i, name in enumerate(names)}
    for file in set(places.values()):
        part = {name: state[name] for name in names if places[name] == file}
        (save_file if kind == "safetensors" else torch.save)(part, folder / file)
    if index:
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("layout", ["transformers", "deepseek"])
@pytest.mark.parametrize(
    "change", [as_bin, sharded, lambda f: sharded(f, "bin"), lambda f: sharded(f, index=False)], ids=["bin", "shards", "bins", "no index"]
)
def test_whatever_files_they_lie_in(whole: Path, deepseek: Path, tmp_path: Path, layout: str, change: Callable[[Path], None]) -> None:
    shutil.copytree(whole if layout == "transformers" else deepseek, tmp_path / "janus")
    change(tmp_path / "janus")
    expected = janus_files.read(whole).state
    found = janus_files.read(tmp_path / "janus").state
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), expected[name], rtol=1e-2, atol=1e-2)


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        state.pop(name)
        save_file(state, folder / "model.safetensors")

    return change


def with_more(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        save_file({**load_file(folder / "model.safetensors"), name: torch.zeros(3)}, folder / "model.safetensors")

    return change


def lacks_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def lacks_part(folder: Path) -> None:
    sharded(folder, index=False)
    (folder / "model-00002-of-00003.safetensors").unlink()


def lacks_indexed(folder: Path) -> None:
    sharded(folder)
    path = folder / "model.safetensors.index.json"
    places = json.loads(path.read_text())
    places["weight_map"]["lm_head.extra"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(places))


def another_config(**text: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        values["text_config"].update(text)
        (folder / "config.json").write_text(json.dumps(values))

    return change


def no_image_tokens(folder: Path) -> None:
    janus_world.write_words(folder, special=tuple(mark for mark in janus_world.SPECIAL if "image" not in mark))


def a_t5(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lacks_shard, "lacks model-00002-of-00003.safetensors, which model.safetensors.index.json names; fetch it again"),
        (lacks_part, "lacks model-00002-of-00003.safetensors; fetch it again"),
        (lacks_indexed, "lacks tensors that model.safetensors.index.json names: lm_head.extra"),
        (without("model.generation_head.proj_out.bias"), "(?s)does not fit the network.*missing generation_head.proj_out.bias"),
        (without("model.vqmodel.decoder.mid.block_1.conv1.bias"), "(?s)does not fit the network.*missing decoder.mid.0.conv1.bias"),
        (with_more("model.sound.weight"), "tensors that no Janus has: model.sound.weight"),
        (another_config(hidden_size=64), "of width 64 and 2 layers, and the weights beside it have 32 and 2; they do not belong together"),
        (another_config(num_hidden_layers=30), "of width 32 and 30 layers, and the weights beside it have 32 and 2"),
        (another_config(num_key_value_heads=1), "no Janus here has: num_key_value_heads 1, not 2"),
        (no_image_tokens, "tokenizer.json knows no <begin_of_image>; it is not the tokenizer of a model that draws"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is not here"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json is no tokenizer"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is not here"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (a_t5, "describes a model of type 't5', not a Janus"),
    ],
)
def test_what_is_not_whole_is_refused(whole: Path, tmp_path: Path, change: Callable[[Path], object], words: str) -> None:
    shutil.copytree(whole, tmp_path / "janus")
    change(tmp_path / "janus")
    with pytest.raises(ValueError, match=words):
        models.load(config(tmp_path / "janus"))


def of_a_larger_one(folder: Path) -> None:
    """As who puts Janus-Pro-7B's weights beside the configuration of the 1B."""
    larger = janus_world.write(folder.parent / "larger", hidden_size=64, num_hidden_layers=3)
    shutil.copyfile(Path(larger.generator) / "model.safetensors", folder / "model.safetensors")


def on_a_hub(folder: Path) -> None:
    shutil.rmtree(folder.parent)


def as_it_is(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "caption", "words"),
    [
        (of_a_larger_one, "nine", "of width 32 and 2 layers, and the weights beside it have 64 and 3; they do not belong together"),
        (lacks_shard, "nine", "lacks model-00002-of-00003.safetensors, which model.safetensors.index.json names; fetch it again"),
        (no_image_tokens, "nine", "tokenizer.json knows no <begin_of_image>; it is not the tokenizer of a model that draws"),
        (on_a_hub, "nine", "nobody/janus is no local file, and the hub did not give it"),
        (as_it_is, "a very long one " * 12, "a caption makes 2.. tokens, and 129 fit before 16 codes: 'a very long one"),
        (as_it_is, "a <begin_of_image> b", "the model's own marks; take them out"),
    ],
)
def test_the_first_stage_that_reads_it_refuses_it_before_anything_is_on_a_device(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], caption: str, words: str
) -> None:
    """And so does whoever loads it, if it is not the caption's fault."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, tmp_path / "nobody/janus")
    change(tmp_path / "nobody/janus")
    png = images.png_bytes(Image.new("RGB", (16, 16)))
    (tmp_path / "subset").mkdir()
    data.write_subset(tmp_path / "subset", [data.Row("one", -1, caption, 16, 16, "RGB", png, data.text_digest("one"))])
    monkeypatch.setattr(weights, "fill", lambda *given: pytest.fail("weights are on a device"))
    model = config(Path("nobody/janus"))
    with pytest.raises(ValueError, match=words):
        tokens.tokens(model, TokensConfig(), tmp_path / "subset", tmp_path / "tokens")
    if change is not as_it_is:
        with pytest.raises(ValueError, match=words):
            models.load(model)


def test_what_does_not_belong_together(
    whole: Path, janus_policy: models.Policy, tiny_model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(whole)
    with pytest.raises(ValueError, match="model.text_encoder is 'words'; Janus reads captions itself: leave it empty"):
        models.load(dataclasses.replace(made, text_encoder="words"))
    with pytest.raises(ValueError, match="model.image_size is 32, and .* draws 16 pixels"):
        models.load(dataclasses.replace(made, image_size=32))
    with pytest.raises(ValueError, match="holds no tuned Janus"):
        models.load(made, tiny_model.generator)
    other = models.load(janus_world.write(tmp_path / "other", num_hidden_layers=3))
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="was tuned from another Janus than model.generator: layers 3, not 2"):
        models.load(made, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is a folder; name a file of weights in it"):
        models.load(dataclasses.replace(tiny_model, generator=str(whole)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="nobody/janus is no local file, and the hub did not give it"):
        models.load(dataclasses.replace(made, generator="nobody/janus", tokenizer="nobody/janus"))
    with pytest.raises(ValueError, match="there is no layout 'deepsek'"):
        janus.export(whole, tmp_path / "other.safetensors", tmp_path / "out", "deepsek")
    with pytest.raises(ValueError, match="is there already"):
        janus.export(whole, whole, tmp_path)


def test_a_tuned_file_may_stand_for_the_base(whole: Path, janus_policy: models.Policy, tmp_path: Path) -> None:
    """As MLflow serves it: what is no weights comes from the folder that is named as the tokenizer."""
    janus_policy.save(tmp_path / "tuned.safetensors")
    again = models.load(dataclasses.replace(config(whole), generator=str(tmp_path / "tuned.safetensors")))
    assert torch.equal(again.condition(CAPTIONS), janus_policy.condition(CAPTIONS))


def test_a_tokenizer_of_ones_own(whole: Path, janus_policy: models.Policy, tmp_path: Path) -> None:
    weights.save(janus_policy.tokenizer, tmp_path / "tokenizer.safetensors", {})
    again = models.load(dataclasses.replace(config(whole), tokenizer=str(tmp_path / "tokenizer.safetensors")))
    same(again.tokenizer.state_dict(), janus_policy.tokenizer.state_dict())


@torch.no_grad()
def test_codes_are_those_of_the_normalised_codebook(janus_policy: models.Policy) -> None:
    """transformers' encoder leaves the vectors as they are and so finds other codes; deepseek's, like LlamaGen's, compares directions."""
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    theirs = janus_world.network().model.vqmodel
    codes = janus_policy.encode(pixels)
    z = theirs.quant_conv(theirs.encoder(pixels)).flatten(2).transpose(1, 2).double()
    directions = [torch.nn.functional.normalize(x, dim=-1) for x in (z, theirs.quantize.embedding.weight.double())]
    assert torch.equal(codes, torch.cdist(*directions).argmin(-1))
    torch.testing.assert_close(janus_policy.decode(codes), theirs.decode(codes), rtol=1e-5, atol=1e-5)
