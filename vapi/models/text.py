"""What a generator of captions reads them with: text encoders, all frozen, behind one protocol.

A caption becomes features (L, C), one row for each of its L words (or pieces of words), as many as it has. Padding
is no business of an encoder: ``pad`` puts features in front of a generator as it was trained, on the right of its
S positions, with a channel more that tells words from padding.

    words    embedded: hashes of words and of their neighbours; no weights, no download, the same bits on every machine
    a T5     its encoder, from a folder or a hub, fed and computed as LlamaGen does (flan-t5-xl, bfloat16, 120 pieces of words)

Whatever an encoder gives fits in bfloat16 without loss, so that features are kept in half precision: a T5 computes in it (and
its outliers do not fit in float16), and the numbers of ``words`` are few and round.

Captions meet a T5 sorted by length, in batches that depend on nothing else: a caption's length names the shape (rows and
positions) of every batch it can be in, and the last of a shape is filled up with repeats. So features are the same to the bit
whichever captions they were encoded with. Left out: the chance of 30 % at which LlamaGen trains on a second, shorter caption of
the same image, which VA-pi does not have; and prefixes or prompts of other T5s.

Shapes: B captions, L words of a caption, S positions of a condition, C channels of a feature.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vapi import data
from vapi.models.cleaning import clean

MAX_WORDS = 120
"""LlamaGen's: its encoder cuts there, and its generators of captions have as many positions."""
STEP = 4
"""Captions are padded to a multiple of it while they are encoded."""


class TextEncoder(Protocol):
    """A frozen encoder. ``digest`` names its weights and rules: equal digests give equal features, but for rounding."""

    width: int  # C
    digest: str
    arithmetic: str  # what features' last bits hang on besides, where they do
    max_words: int
    end_marks: int  # of the words of every caption: not its own

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Words of each caption before any cut. Raises ValueError for a caption that this encoder cannot read."""

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Features of each caption, float32 (L, C) on the CPU, 1 <= L <= ``max_words``: what is longer is cut at its end.
        Raises ValueError for a caption that this encoder cannot read."""


def load(name: str, device: torch.device | str = "cpu", words_per_batch: int = 4096) -> TextEncoder:
    """The encoder that ``model.text_encoder`` names. Raises ValueError if there is none of that name, or no whole one.

    A T5 computes ``words_per_batch`` pieces of words at a time, and always that many (see above): on a CPU take fewer.
    """
    return Words() if name == "words" else T5(name, device, words_per_batch)


def digest(name: str) -> str:
    """What the encoder of that name has for a ``digest``, without loading it."""
    return Words.digest if name == "words" else _digest_of_t5(_folder(name))


def batches(lengths: Sequence[int], words_per_batch: int) -> Iterator[list[int]]:
    """Numbers of captions of these lengths, sorted by length, in the batches that an encoder computes at a time."""
    by_shape: dict[torch.Size, list[int]] = {}
    for number, length in enumerate(lengths):
        by_shape.setdefault(shape(length, words_per_batch), []).append(number)
    for (rows, _), numbers in sorted(by_shape.items(), key=lambda item: item[0][1]):
        yield from (numbers[start : start + rows] for start in range(0, len(numbers), rows))


def shape(length: int, words_per_batch: int) -> torch.Size:
    """Rows and positions of every batch that a caption of this length is computed in: a little padding for few shapes."""
    positions = min(MAX_WORDS, STEP * math.ceil(length / STEP))
    return torch.Size((max(1, words_per_batch // positions), positions))


def pad(features: Sequence[Tensor], positions: int) -> Tensor:
    """The condition of captions with these features (L, C): float32 (B, S, C + 1), words on the right, a last channel that is
    1 for a word and 0 for padding, whose features are 0. What is longer than S positions is cut at its end."""
    condition = torch.zeros(len(features), positions, features[0].shape[1] + 1)
    for row, feature in zip(condition, features, strict=True):
        kept = feature[:positions]
        row[positions - len(kept) :, :-1] = kept
        row[positions - len(kept) :, -1] = 1
    return condition


# --- words -------------------------------------------------------------------------------------


class Words:
    """The embedded encoder. A caption's words are its runs of letters and digits, in lower case; anything else separates.

    A word's vector is 32 signs, bits of the sha256 of the word. Its feature is the vectors of the three words before it,
    its own and that of the next one, zeros beyond the ends, and 16 numbers that tell where in the caption it stands.
    Neighbours are in it because LlamaGen's attention takes all of a caption's positions evenly (their keys are zero, see
    ``gpt.rotary_table``): who belongs to whom ("a red 3 left of a blue 7") must be said within a position.
    """

    REACH = (-3, -2, -1, 0, 1)
    SIGNS = 32
    TURNS = 8

    width = SIGNS * len(REACH) + 2 * TURNS
    arithmetic = ""
    max_words = MAX_WORDS
    end_marks = 0
    digest = hashlib.sha256(b"words, version 1").hexdigest()

    def lengths(self, captions: Sequence[str]) -> list[int]:
        return [len(_split(caption)) for caption in captions]

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        return [self._encode(_split(caption)[: self.max_words]) for caption in captions]

    def _encode(self, words: Sequence[str]) -> Tensor:
        edge = [torch.zeros(self.SIGNS)] * max(map(abs, self.REACH))
        vectors = [*edge, *map(_signs, words), *edge]
        around = [torch.stack(vectors[len(edge) + step :][: len(words)]) for step in self.REACH]
        return torch.cat([*around, _turns(self.max_words, self.TURNS)[: len(words)]], dim=1)


def _split(caption: str) -> list[str]:
    words = re.findall("[a-z0-9]+", caption.lower())
    if not words:
        raise ValueError(f"the caption {caption!r} has no word of the letters a to z and digits, and the encoder words reads no other")
    return words


@functools.lru_cache(maxsize=2**16)
def _signs(word: str) -> Tensor:
    """+1 and -1 by the first 32 bits of a word's sha256."""
    bits = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
    return torch.tensor([1.0 if bits >> place & 1 else -1.0 for place in range(Words.SIGNS)])


@functools.cache
def _turns(count: int, pairs: int) -> Tensor:
    """sin and cos of positions (count, 2 * pairs), in periods from 6 words to 350; steps of 1/256 fit in bfloat16."""
    angles = [[position / 100 ** (pair / pairs) for pair in range(pairs)] for position in range(count)]
    return torch.tensor([[round(256 * turn(angle)) / 256 for angle in row for turn in (math.sin, math.cos)] for row in angles])


# --- T5 ----------------------------------------------------------------------------------------


class T5:
    """The encoder of a T5, with the tokenizer beside it. A word is a piece of one here, and every caption ends
    with one that says so, so that a caption of which cleaning leaves nothing has a length of 1.

    Weights and features are bfloat16, and so is what lies between on a GPU. On a CPU that is float32: many imitate bfloat16,
    a hundred times slower.

    As LlamaGen does in training and sampling: captions are cleaned, cut at 120 pieces (the end mark among them), and padding
    is masked. LlamaGen pads every caption to 120 positions, and here it is to the next multiple of 4: a T5's positions are
    relative, and nothing sees padding.
    """

    max_words = MAX_WORDS
    end_marks = 1

    def __init__(self, name: str, device: torch.device | str = "cpu", words_per_batch: int = 4096) -> None:
        """Raises ValueError if ``name`` is no folder or hub id of a T5, whole, with its tokenizer."""
        folder = _folder(name)
        self.words_per_batch = words_per_batch
        self.device = torch.device(device)
        self.digest = _digest_of_t5(folder)
        self.tokenizer, self.model = _read_t5(folder)
        number = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.arithmetic = f"{number}, {words_per_batch} at a time"
        self.model.to(self.device, number)
        self.width = int(self.model.config.d_model)

    def lengths(self, captions: Sequence[str]) -> list[int]:
        return [len(pieces) for pieces in self._pieces(captions, truncation=False)]

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        pieces = self._pieces(captions, truncation=True, max_length=self.max_words)
        features: list[Tensor] = [torch.empty(0)] * len(captions)
        for some in batches([len(one) for one in pieces], self.words_per_batch):
            for number, feature in zip(some, self._encode([pieces[number] for number in some]), strict=True):
                features[number] = feature
        return features

    def _pieces(self, captions: Sequence[str], **how: Any) -> list[list[int]]:
        if not captions:
            return []
        return self.tokenizer([clean(caption) for caption in captions], add_special_tokens=True, **how)["input_ids"]

    @torch.inference_mode()
    def _encode(self, pieces: Sequence[Sequence[int]]) -> list[Tensor]:
        """Features of captions whose lengths round to the same, in a batch of the one shape that is theirs."""
        size = shape(len(pieces[0]), self.words_per_batch)
        words = torch.full(size, self.model.config.pad_token_id)
        there = torch.zeros(size, dtype=torch.long)
        for row in range(len(words)):
            own = pieces[row] if row < len(pieces) else pieces[0]
            words[row, : len(own)] = torch.tensor(own)
            there[row, : len(own)] = 1
        found = self.model(input_ids=words.to(self.device), attention_mask=there.to(self.device)).last_hidden_state
        kept = found[: len(pieces)].bfloat16().cpu().float()
        return [feature[: len(own)].clone() for feature, own in zip(kept, pieces, strict=True)]


RULES = f"T5, version 1: cleaned as LlamaGen cleans, {MAX_WORDS} pieces, bfloat16"
READABLE = ("config.json", "tokenizer*", "special_tokens_map.json", "spiece.model")
NOWHERE = "model.text_encoder {!r} is neither words, nor a folder that is here, nor a hub id (google/flan-t5-xl)"
WEIGHTS = (("*.safetensors", "*.safetensors.index.json"), ("pytorch_model*.bin", "pytorch_model*.bin.index.json"))


def _folder(name: str, local_files_only: bool = False) -> Path:
    """A local folder as it is, or what of ``org/name`` on the hub is needed (downloaded once, then from its cache, or from there alone)."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.count("/") != 1:
        raise ValueError(NOWHERE.format(name))
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{name} is no local folder; to take it from the hub: pip install huggingface_hub") from None
    try:
        for kind in WEIGHTS:
            folder = Path(snapshot_download(name, allow_patterns=[*READABLE, *kind], local_files_only=local_files_only))
            if any(folder.glob(kind[0])):
                break
    except Exception as error:
        raise ValueError(f"{name} is no local folder, and the hub did not give it: {error}") from error
    return folder


def size(name: str) -> int:
    """Bytes of a T5, of which nothing is fetched for it. Raises ValueError if it cannot be reached, or is none."""
    if Path(name).is_dir():
        return sum(path.stat().st_size for path in _files(Path(name)))
    if name.count("/") != 1:
        raise ValueError(NOWHERE.format(name))
    with contextlib.suppress(ValueError):  # it was fetched before
        return sum(path.stat().st_size for path in _files(_folder(name, local_files_only=True)))
    try:
        from huggingface_hub import HfApi

        found = HfApi().model_info(name, files_metadata=True, timeout=10).siblings or []
    except Exception as error:
        raise ValueError(f"{name} is no local folder, and the hub does not show it: {error}") from error
    of_kind = [[file.size or 0 for file in found if any(fnmatch(file.rfilename, pattern) for pattern in kind)] for kind in WEIGHTS]
    if not any(of_kind):
        raise ValueError(f"{name} holds no weights (*.safetensors or pytorch_model*.bin)")
    return sum(next(sizes for sizes in of_kind if sizes))


def _files(folder: Path) -> list[Path]:
    """What a T5 is read from: of two kinds of weights, the first."""
    found = {path for pattern in READABLE for path in folder.glob(pattern)}
    kind = next((kind for kind in WEIGHTS if any(folder.glob(kind[0]))), None)
    if kind is None or not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no T5: {'config.json' if kind else 'weights (*.safetensors or pytorch_model*.bin)'} missing")
    return sorted(found | {path for pattern in kind for path in folder.glob(pattern)})


def _digest_of_t5(folder: Path) -> str:
    whole = hashlib.sha256(RULES.encode())
    for path in _files(folder):
        whole.update(f"\n{path.name}\0{data.known_digest(path)}".encode())
    return whole.hexdigest()


def _read_t5(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and encoder, the latter in bfloat16 on the CPU, frozen."""
    try:
        import transformers
    except ImportError:
        raise ValueError("a T5 needs transformers and sentencepiece: pip install 'vapi-align[t2i]'") from None
    transformers.utils.logging.disable_progress_bar()
    _files(folder)
    kind = data.read_json(folder / "config.json").get("model_type")
    if kind != "t5":
        raise ValueError(f"{folder} holds a model of type {kind!r}, not a T5")
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        read: Any = transformers.T5EncoderModel.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    except Exception as error:  # the library has many kinds for a damaged file
        raise ValueError(f"{folder} holds no T5 that can be read: {error}") from error
    model, told = read
    lacking = sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]]))
    if lacking:
        raise ValueError(f"{folder} holds no whole T5: {', '.join(lacking[:5])}{' and more' if len(lacking) > 5 else ''} missing")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"{folder}: its tokenizer knows {len(tokenizer)} pieces and its weights {model.config.vocab_size}")
    return tokenizer, model.eval().requires_grad_(False)
