"""Checkpoints of Janus as files: what deepseek publishes, what transformers writes, and how one becomes the other.

    deepseek       model_type multi_modality; gen_head.*, gen_vision_model.*, language_model.model.* ...
    transformers   model_type janus; model.generation_head.*, model.vqmodel.*, model.language_model.* ...

Which of the two a folder holds follows from the names of its tensors, and every name must be known: of what is tuned
(``TRAINED``), of the image tokenizer (``TOKENIZER``), or of what only understands images (``UNDERSTANDING``), which is not
read while tuning. Weights lie in one file or in several with an index, as safetensors or as torch's, mapped and never executed.
Writing takes everything along: the tuned tensors in the place of the old ones, the rest as it was, all in float32.

Left out: deepseek's image processor in transformers' words (the folders of deepseek-community have it, and it does not
depend on weights); and on the way to transformers SigLIP's attention pool, which no code of either uses.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vapi.models import weights

Layout = Literal["transformers", "deepseek"]
State = dict[str, Tensor]

TRAINED = ("model.language_model.", "model.generation_embeddings.", "model.generation_aligner.", "model.generation_head.")
TOKENIZER = "model.vqmodel."
UNDERSTANDING = ("model.vision_model.", "model.aligner.", "lm_head.")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
KINDS = ("*.safetensors", "*.bin")
UNUSED = "vision_model.vision_tower.attn_pool."  # of SigLIP: deepseek's files carry it
COUNTER = "quantize.codebook_used"  # of pretraining: deepseek's files carry it
PUBLISHED = {"Janus-Pro-1B": (2048, 24, 16, 5632), "Janus-Pro-7B": (4096, 30, 32, 11008)}  # width, layers, heads, feed-forward
SIZES = "janus"  # metadata of this name are the sizes of what was tuned, as JSON
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Checkpoint:
    """A whole Janus. ``state``: tensors under transformers' names, mapped from the files."""

    folder: Path
    layout: Layout
    config: dict[str, Any]  # config.json
    state: State

    def trained(self) -> State:
        """What is tuned, under the names that it has in ``janus.Generator``."""
        return {name.removeprefix("model."): tensor for name, tensor in self.state.items() if name.startswith(TRAINED)}

    def tokenizer(self) -> State:
        """The image tokenizer, under the names that it has in ``vq.VQModel``."""
        state = {name.removeprefix(TOKENIZER): tensor for name, tensor in self.state.items() if name.startswith(TOKENIZER)}
        return {COUNTER: torch.zeros(65536), **{_renamed(name, VQ, back=True): tensor for name, tensor in state.items()}}

    @property
    def norm_groups(self) -> int:
        """Of the image tokenizer's norms, if config.json says so; 0: as published. transformers' own class reads no such field."""
        return int(self.config.get("vq_config", {}).get("norm_groups", 0))

    def unread(self) -> dict[str, int]:
        """What only understands images: number of tensors by part."""
        parts = [name.removeprefix("model.").split(".")[0] for name in self.state if name.startswith(UNDERSTANDING)]
        return {part: parts.count(part) for part in dict.fromkeys(parts)}


# --- names -------------------------------------------------------------------------------------

MIDDLE = ("block_1", "attn_1", "block_2")
Rules = tuple[tuple[str, str], ...]  # deepseek's beginning of a name, transformers'; {} stands for a number

VQ: Rules = (
    ("encoder.conv_blocks.{}.res.", "encoder.down.{}.block."),
    ("encoder.conv_blocks.", "encoder.down."),
    ("decoder.conv_blocks.{}.res.", "decoder.up.{}.block."),
    ("decoder.conv_blocks.", "decoder.up."),
    *((f"{half}.mid.{i}.", f"{half}.mid.{name}.") for half in ("encoder", "decoder") for i, name in enumerate(MIDDLE)),
)
SIGLIP: Rules = (
    ("blocks.{}.norm1.", "encoder.layers.{}.layer_norm1."),
    ("blocks.{}.norm2.", "encoder.layers.{}.layer_norm2."),
    ("blocks.{}.attn.proj.", "encoder.layers.{}.self_attn.projection_layer."),
    ("blocks.{}.attn.", "encoder.layers.{}.self_attn."),
    ("blocks.", "encoder.layers."),
    ("norm.", "post_layernorm."),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("pos_embed", "embeddings.position_embedding.weight"),
)
WHOLE: Rules = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("gen_embed.", "model.generation_embeddings."),
    ("gen_head.output_mlp_projector.", "model.generation_head.proj_out."),
    ("gen_head.vision_head.", "model.generation_head.vision_head."),
    ("gen_vision_model.", TOKENIZER),
    ("vision_model.vision_tower.", "model.vision_model."),
)
ALIGNERS = (("gen_aligner.", "model.generation_aligner."), ("aligner.", "model.aligner."))
INSIDE = ((TOKENIZER, VQ), ("model.vision_model.", SIGLIP))


def _renamed(name: str, rules: Rules, back: bool = False) -> str:
    """A name after the first rule that fits its beginning; as it is if none does."""
    for rule in rules:
        old, new = reversed(rule) if back else rule
        if found := re.match(re.escape(old).replace(r"\{\}", r"(\d+)"), name):
            return new.format(*found.groups()) + name[found.end() :]
    return name


def to_transformers(name: str) -> str:
    """transformers' name of a tensor of deepseek's. Raises ValueError for one that Janus does not have."""
    for theirs, ours in ALIGNERS:  # linear layers with activations between them, which deepseek counts
        if found := re.fullmatch(re.escape(theirs) + r"layers\.(\d*[02468])\.(weight|bias)", name):
            depth = int(found[1]) // 2
            return f"{ours}{'fc1' if depth == 0 else f'hidden_layers.{depth - 1}'}.{found[2]}"
    renamed = _renamed(name, WHOLE)
    if renamed == name:
        raise ValueError(name)
    for prefix, rules in INSIDE:
        if renamed.startswith(prefix):
            return prefix + _renamed(renamed.removeprefix(prefix), rules)
    return renamed


def to_deepseek(name: str) -> str:
    """deepseek's name of a tensor of transformers'. Raises ValueError for one that Janus does not have."""
    for theirs, ours in ALIGNERS:
        if found := re.fullmatch(re.escape(ours) + r"(?:fc1|hidden_layers\.(\d+))\.(weight|bias)", name):
            return f"{theirs}layers.{0 if found[1] is None else 2 * int(found[1]) + 2}.{found[2]}"
    inner = name
    for prefix, rules in INSIDE:
        if name.startswith(prefix):
            inner = prefix + _renamed(name.removeprefix(prefix), rules, back=True)
    renamed = _renamed(inner, WHOLE, back=True)
    if renamed == inner:
        raise ValueError(name)
    return renamed


def _known(name: str) -> bool:
    return name.startswith((*TRAINED, TOKENIZER, *UNDERSTANDING))


def layout_of(names: Mapping[str, Any]) -> Layout | None:
    """Whose names these are, by the head that generates images; None: nobody's."""
    if any(name.startswith("gen_head.") for name in names):
        return "deepseek"
    return "transformers" if any(name.startswith("model.generation_head.") for name in names) else None


def _as_transformers(state: State) -> State:
    """deepseek's tensors under transformers' names: queries, keys and values of SigLIP apart, what nobody uses left out."""
    found: State = {}
    for name, tensor in state.items():
        if name.startswith(UNUSED) or name == f"gen_vision_model.{COUNTER}":
            continue
        renamed = to_transformers(name)
        if ".qkv." in renamed:
            found |= {renamed.replace("qkv", f"{part}_proj"): third for part, third in zip("qkv", tensor.chunk(3))}
        else:
            found[renamed] = tensor[0] if name.endswith("pos_embed") else tensor
    return found


def _as_deepseek(state: State) -> State:
    found: State = {f"gen_vision_model.{COUNTER}": torch.zeros(65536)}
    for name, tensor in state.items():
        if re.search(r"vision_model\..*\.[kv]_proj\.", name):
            continue  # with the queries
        if re.search(r"vision_model\..*\.q_proj\.", name):
            thirds = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[to_deepseek(name.replace("q_proj", "qkv"))] = torch.cat(thirds)
        else:
            found[to_deepseek(name)] = tensor[None] if name.endswith("vision_model.embeddings.position_embedding.weight") else tensor
    return found


# --- reading -----------------------------------------------------------------------------------


def read(name: str | Path) -> Checkpoint:
    """A whole Janus from a folder or a hub id (deepseek-ai/Janus-Pro-1B). Raises ValueError for what is none, or not all there."""
    folder = weights.locate(name)
    if not folder.is_dir():
        raise ValueError(f"{name} is a file; Janus is a folder with config.json, tokenizer.json and weights, or a hub id")
    config = _json(folder / "config.json")
    state = _read_all(folder)
    layout = layout_of(state)
    if layout is None:
        raise ValueError(f"{folder} holds no Janus: none of its {len(state)} tensors belongs to a head that generates images")
    if layout == "deepseek":
        state = _translated(state, folder)
    strangers = [name for name in state if not _known(name)]
    if strangers:
        raise ValueError(f"{folder} holds tensors that no Janus has: {_few(strangers)}")
    return Checkpoint(folder, layout, config, state)


def _translated(state: State, folder: Path) -> State:
    try:
        return _as_transformers(state)
    except ValueError as error:
        raise ValueError(f"{folder} holds tensors that no Janus has: {error}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is not here; Janus is a folder with config.json, tokenizer.json and weights") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no object")
    return found


def _read_all(folder: Path) -> State:
    """All tensors of a folder, whatever number of files they lie in."""
    for index in INDICES:
        if (folder / index).is_file():
            return _read_indexed(folder, index)
    for kind in KINDS:
        if files := sorted(folder.glob(kind)):
            _require_parts(folder, [file.name for file in files])
            return _merged(files)
    raise ValueError(f"{folder} holds no weights ({' or '.join(KINDS)})")


def _read_indexed(folder: Path, index: str) -> State:
    places = _json(folder / index).get("weight_map", {})
    files = sorted(set(places.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {_few(missing)}, which {index} names; fetch it again")
    state = _merged([folder / name for name in files])
    absent = [name for name in places if name not in state]
    if absent:
        raise ValueError(f"{folder} lacks tensors that {index} names: {_few(absent)}; fetch it again")
    return state


def _require_parts(folder: Path, names: list[str]) -> None:
    """Raises ValueError if files say of themselves that there are more of them."""
    for name in names:
        if found := re.fullmatch(r"(.*)-\d{5}-of-(\d{5})(\.\w+)", name):
            all_of_them = [f"{found[1]}-{i:05}-of-{found[2]}{found[3]}" for i in range(1, int(found[2]) + 1)]
            if missing := [part for part in all_of_them if part not in names]:
                raise ValueError(f"{folder} lacks {_few(missing)}; fetch it again")


def _merged(files: list[Path]) -> State:
    state: State = {}
    for file in files:
        part, _ = weights.read(file)
        if twice := part.keys() & state.keys():
            raise ValueError(f"{file} holds tensors that another file beside it holds too: {_few(sorted(twice))}")
        state |= part
    return state


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def is_tuned(source: str | Path) -> bool:
    """Whether a file holds the tuned part of a Janus."""
    return SIZES in weights.read(source)[1]


# --- writing -----------------------------------------------------------------------------------


def write(base: Checkpoint, tuned: Mapping[str, Tensor], target: str | Path, layout: str) -> None:
    """A whole Janus: ``base`` with the tensors of ``tuned`` (names of ``janus.Generator``) in place of its own, in float32.

    Raises ValueError for a layout that is none, tensors that the base does not have, and where ``target`` cannot be written.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"there is no layout {layout!r}; known: {', '.join(get_args(Layout))}")
    if layout == "deepseek" and base.norm_groups:
        raise ValueError(f"{base.folder}: the image tokenizer's norms have {base.norm_groups} groups, and deepseek's code knows 32 alone")
    target = Path(target)
    if target.exists():
        raise ValueError(f"{target} is there already; name a new folder")
    renamed = {f"model.{name}": tensor for name, tensor in tuned.items()}
    if strangers := [name for name in renamed if name not in base.state]:
        raise ValueError(f"{base.folder} has no {_few(strangers)}")
    # never tied: the words that are read were tuned, those that are written were not
    state = {"lm_head.weight": base.state["model.language_model.embed_tokens.weight"], **base.state, **renamed}
    state = {name: tensor.float().clone() for name, tensor in state.items()}
    texts = dict(_texts(base, layout))
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    weights.save_tensors(state if layout == "transformers" else _as_deepseek(state), partial / "model.safetensors", {})
    for name in TEXT_FILES if layout != base.layout else [path.name for path in _beside(base.folder)]:
        if name not in texts and (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, partial / name)
    for name, values in texts.items():
        (partial / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    partial.rename(target)


def _beside(folder: Path) -> Iterator[Path]:
    """What lies beside the weights and belongs to the model."""
    return (path for path in folder.iterdir() if path.suffix in (".json", ".jinja", ".model") and not path.name.endswith(".index.json"))


def _texts(base: Checkpoint, layout: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Configurations that must be written anew."""
    if layout == base.layout:
        yield "config.json", {**base.config, **({"tie_word_embeddings": False} if layout == "transformers" else {}), **FLOAT32[layout]}
        return
    write: Callable[[Checkpoint], dict[str, Any]] = _transformers_config if layout == "transformers" else _deepseek_config
    yield "config.json", write(base)
    if layout == "transformers":
        ids = _ids(base.folder, {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD})
        start = _ids(base.folder, {"boi_token_id": START})
        yield "generation_config.json", {**ids, "guidance_scale": 5, "generation_kwargs": start}
        settings = base.folder / "tokenizer_config.json"
        named = {"image_token": IMAGE, "boi_token": START, "eoi_token": END}
        yield "tokenizer_config.json", {**(_json(settings) if settings.is_file() else {}), **named}


BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
START, END, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
FLOAT32 = {"transformers": {"dtype": "float32"}, "deepseek": {"torch_dtype": "float32"}}


def _ids(folder: Path, names: Mapping[str, str]) -> dict[str, int]:
    """Ids of tokens by what they are wanted for, where the text tokenizer has them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = {field: tokenizer.token_to_id(name) for field, name in names.items()}
    return {field: number for field, number in found.items() if number is not None}


def _sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """What configurations say and tensors show."""
    aligner, generating = (f"model.{name}" for name in ("aligner", "generation_aligner"))
    patch = state["model.vision_model.embeddings.patch_embedding.weight"]
    places = state["model.vision_model.embeddings.position_embedding.weight"]
    return {
        "dim": state["model.language_model.embed_tokens.weight"].shape[1],
        "vocab": state["model.generation_embeddings.weight"].shape[0],
        "code_dim": state["model.generation_embeddings.weight"].shape[1],
        "generating": 1 + sum(name.startswith(f"{generating}.hidden_layers.") and name.endswith("weight") for name in state),
        "aligner": 1 + sum(name.startswith(f"{aligner}.hidden_layers.") and name.endswith("weight") for name in state),
        "siglip": patch.shape[0],
        "patch": patch.shape[-1],
        "image": round(places.shape[0] ** 0.5) * patch.shape[-1],
        "siglip_layers": _count(state, "model.vision_model.encoder.layers."),
        "siglip_hidden": state["model.vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
    }


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _transformers_config(base: Checkpoint) -> dict[str, Any]:
    """transformers' config.json of a checkpoint of deepseek's. Raises ValueError for a SigLIP whose heads nobody knows."""
    from vapi.models import vq

    sizes, tokenizer = _sizes(base.state), vq.infer_config(weights.shapes(base.tokenizer()))
    text = {**base.config["language_config"], "model_type": "llama", "dtype": "float32"}
    text.pop("torch_dtype", None)
    ids = _ids(base.folder, {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD})
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        "dtype": "float32",
        "tie_word_embeddings": False,
        **({"image_token_id": number} if (number := _ids(base.folder, {"image": IMAGE}).get("image")) is not None else {}),
        "text_config": {**text, "tie_word_embeddings": False, **ids},
        "vision_config": {
            "model_type": "janus_vision_model",
            "hidden_size": sizes["siglip"],
            "num_hidden_layers": sizes["siglip_layers"],
            "num_attention_heads": max(1, sizes["siglip"] // 64),  # SigLIP-L: 1024 in 16 heads
            "mlp_ratio": sizes["siglip_hidden"] / sizes["siglip"],
            "image_size": sizes["image"],
            "patch_size": sizes["patch"],
            "projection_dim": sizes["dim"],
            "depth": sizes["aligner"],
            "num_image_tokens": (sizes["image"] // sizes["patch"]) ** 2,
        },
        "vq_config": {
            "model_type": "janus_vqgan",
            "embed_dim": sizes["code_dim"],
            "num_embeddings": sizes["vocab"],
            "latent_channels": tokenizer.z_channels,
            "base_channels": tokenizer.channels,
            "channel_multiplier": list(tokenizer.multipliers),
            "num_res_blocks": tokenizer.blocks,
            "num_patches": sizes["image"] // sizes["patch"],
            "projection_dim": sizes["dim"],
            "image_token_embed_dim": sizes["dim"],
            "num_hidden_layers": sizes["generating"],
        },
    }


def _deepseek_config(base: Checkpoint) -> dict[str, Any]:
    """deepseek's config.json of a checkpoint of transformers'. Its code knows one SigLIP and one tokenizer by name."""
    sizes = _sizes(base.state)

    def projector(kind: str, into: int, depth: int) -> dict[str, Any]:
        params = {"depth": depth, "input_dim": into, "n_embed": sizes["dim"], "projector_type": "mlp_gelu"}
        return {"cls": "MlpProjector", "model_type": kind, "params": params}

    head = {"image_token_embed": sizes["dim"], "image_token_size": sizes["vocab"], "n_embed": sizes["dim"]}
    siglip = {"image_size": sizes["image"], "model_name": "siglip_large_patch16_384", "select_feature": "same", "select_layer": -1}
    text = {k: v for k, v in base.config["text_config"].items() if k not in ("dtype", "bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": "float32",
        "aligner_config": projector("aligner", sizes["siglip"], sizes["aligner"]),
        "gen_aligner_config": projector("gen_aligner", sizes["code_dim"], sizes["generating"]),
        "gen_head_config": {"cls": "vision_head", "model_type": "gen_head", "params": head},
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {"image_token_size": sizes["vocab"], "n_embed": sizes["code_dim"]},
        },
        "language_config": {**text, "torch_dtype": "float32"},
        "vision_config": {"cls": "CLIPVisionTower", "model_type": "vision", "params": siglip},
    }
