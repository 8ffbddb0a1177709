"""HPSv2, or any CLIP that open_clip trained, to a folder for ``clip.load``.

HPSv2's score is the cosine of its two towers (hpsv2/img_score.py), which are open_clip's ViT-H/14 with other numbers in it. So with
its weights in transformers' layout the score is what ``metrics/text.py`` computes anyway.

How many heads a tower has stands in no weight: open_clip's have 64 numbers each, but for the widest pictures' towers (H, g, bigG),
which have 16 heads. They use the exact GELU, which no weight tells: OpenAI's own and open_clip's -quickgelu models, laid out alike,
would say something else here. The vocabulary is every CLIP's, and comes from another folder.
What is known of it: the tests compare a converted network with towers written down after open_clip on small random weights; nobody
has yet run the published checkpoint through here. Left out: other text towers (RoBERTa, T5), open_clip's models with a ResNet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vapi.metrics import clip, conversion
from vapi.metrics.conversion import Rule, attention, both, count, same, turned

HINT = "HPSv2's is HPS_v2_compressed.pt of xswu/HPSv2 on the hub, HPSv2.1's HPS_v2.1_compressed.pt"
WORDS = ("vocab.json", "merges.txt", "tokenizer_config.json")
HEAD, MOST_HEADS = 64, 16


def convert(source: str | Path, folder: str | Path, words: str | Path) -> None:
    """A checkpoint of open_clip to a new folder. ``words``: the folder of another CLIP, whose vocabulary it shares.

    Raises ValueError for a file that is none, for keys left over, missing or of another shape (with the list), for a vocabulary of
    another size, and for a folder that is there already.
    """
    source, folder = Path(source), Path(folder)
    conversion.require_new(folder)
    path = clip.require(words, "--words")
    state = conversion.read_checkpoint(source, HINT)
    tensors = conversion.translate(state, _rules(state), f"{source} is not laid out as a CLIP of open_clip")
    config = _config(state)
    if (known := _known(path)) != config.text_config.vocab_size:
        raise ValueError(f"{path} has {known:,} words, and {source} knows {config.text_config.vocab_size:,}; name another CLIP's folder")
    from transformers import CLIPModel

    files = [path / name for name in WORDS if (path / name).is_file()]
    conversion.write(folder, source, config, tensors, CLIPModel, files)


def _known(words: Path) -> int:
    from transformers import CLIPTokenizer

    return len(CLIPTokenizer.from_pretrained(words, local_files_only=True))


def _config(state: Mapping[str, Tensor]) -> Any:
    """transformers' configuration, from the shapes of the weights."""
    from transformers import CLIPConfig

    seen, _, patch, _ = state["visual.conv1.weight"].shape
    places = len(state["visual.positional_embedding"]) - 1
    vocab, read = state["token_embedding.weight"].shape
    text = {"vocab_size": vocab, "max_position_embeddings": len(state["positional_embedding"])}
    text |= {"bos_token_id": vocab - 2, "eos_token_id": vocab - 1, "pad_token_id": vocab - 1}
    return CLIPConfig(
        text_config=_tower(state, TEXT, read, max(1, read // HEAD)) | text,
        vision_config=_tower(state, PICTURE, seen, min(MOST_HEADS, max(1, seen // HEAD)))
        | {"patch_size": patch, "image_size": patch * round(places**0.5)},
        projection_dim=state["visual.proj"].shape[1],
        architectures=["CLIPModel"],
    )


def _tower(state: Mapping[str, Tensor], name: str, width: int, heads: int) -> dict[str, Any]:
    layers, inner = count(state, f"{name}.{{}}.ln_1.weight"), len(state[f"{name}.0.mlp.c_fc.weight"])
    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers, "intermediate_size": inner}
    return sizes | {"hidden_act": "gelu"}


TEXT, PICTURE = "transformer.resblocks", "visual.transformer.resblocks"


def _rules(state: Mapping[str, Tensor]) -> Iterator[Rule]:
    """Every weight of both sides, once."""
    seen, read = "vision_model", "text_model"
    yield "logit_scale", ["logit_scale"], same
    yield "visual.class_embedding", [f"{seen}.embeddings.class_embedding"], same
    yield "visual.conv1.weight", [f"{seen}.embeddings.patch_embedding.weight"], same
    yield "visual.positional_embedding", [f"{seen}.embeddings.position_embedding.weight"], same
    yield from both("visual.ln_pre", f"{seen}.pre_layrnorm")  # as transformers spells it
    yield from both("visual.ln_post", f"{seen}.post_layernorm")
    yield "visual.proj", ["visual_projection.weight"], turned
    yield "token_embedding.weight", [f"{read}.embeddings.token_embedding.weight"], same
    yield "positional_embedding", [f"{read}.embeddings.position_embedding.weight"], same
    yield from both("ln_final", f"{read}.final_layer_norm")
    yield "text_projection", ["text_projection.weight"], turned
    for theirs, ours in ((PICTURE, seen), (TEXT, read)):
        for i in range(count(state, f"{theirs}.{{}}.ln_1.weight")):
            yield from _block(f"{theirs}.{i}", f"{ours}.encoder.layers.{i}")


def _block(theirs: str, ours: str) -> Iterator[Rule]:
    yield from attention(f"{theirs}.attn.in_proj_{{}}", [f"{ours}.self_attn.{name}_proj" for name in "qkv"])
    names = {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for name, other in names.items():
        yield from both(f"{theirs}.{name}", f"{ours}.{other}")
