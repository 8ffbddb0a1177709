"""The folders on disk: the only place that knows their layout.

A stage turns folders into a folder. What it writes appears whole or not at all (``output_folder``),
says what made it (``describe``: config.json), and is the same to the bit when the same command is
repeated; only timing.json differs. Images are kept as the encoded bytes they came as, in Parquet as
Hugging Face writes it (image: {bytes, path}, label, caption), so other tools read them too.

What must outlive a stage's folder (token cache, resume state, unsent metrics) lies under
``state_dir``: DVC deletes the folder of a stage before it runs it.

    subset/   images-00000.parquet ...   manifest.parquet   quality.json   quality.html   quarantine.csv
    tokens/   codes.npy   features.npy (of captions)   index.parquet   summary.json
    any/      config.json   timing.json
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vapi import images
from vapi.config import Config, ModelConfig, named_files, nearest, plain, write_text

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No room on the disk, for this user, or in this file."""
AGAIN = "Make room and run the same command again"

SHEET_ROWS = ("real", "reconstruction", "draw", "sample")
"""Rows of the sheets of the stage tune."""
SHEET_COLUMNS = 10
"""Columns of the sheets of the stage evaluate."""
PROMPTS_SHOWN = 3
"""Prompts of each task on its sheet of prompts."""
NOTICES = "notices.json"
"""Sentences about a run that was fetched from MLflow, beside its stages' folders: what could not be fetched."""

_PACKAGE = Path(__file__).resolve().parent


# --- where things lie --------------------------------------------------------------------------


def project_root() -> Path:
    """The clone that the user works in: DVC_ROOT, else the nearest folder upwards with .dvc or params.yaml, else here.

    ``dvc exp run --queue`` works in throw-away copies under ``.dvc/tmp/exps``; those belong to the clone around them.
    """
    here = Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()
    if "DVC_ROOT" not in os.environ:
        marked = (folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir() or (folder / "params.yaml").is_file())
        here = next(marked, here)
    for folder in (here, *here.parents):
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):
            return folder.parents[2]
    return here


def state_dir(*parts: str) -> Path:
    """A folder under ``.vapi`` of the project, or under ``VAPI_STATE`` (a cluster's volume), made if need be. Git ignores it and
    DVC does not know it."""
    folder = Path(os.environ.get("VAPI_STATE") or project_root() / ".vapi").joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make {folder}: {error.strerror}; name a folder that can be written in VAPI_STATE") from error
    return folder


def file_digest(path: Path, of: Callable[[Path], str] | None = None) -> str:
    """sha256 (hex) of a file; of a folder: over the sorted relative names and digests of its files, provenance.json aside. ``of``
    gives these."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise ValueError(f"{path} is not here")
    whole = hashlib.sha256()
    # linked folders too: so data sets are often put together
    files = [Path(folder) / name for folder, _, names in os.walk(path, followlinks=True) for name in names if name != "provenance.json"]
    for part in sorted(file for file in files if file.is_file()):
        whole.update(f"{part.relative_to(path).as_posix()}\0{(of or file_digest)(part)}\n".encode())
    return whole.hexdigest()


def known_digest(path: Path) -> str:
    """``file_digest`` of a large file, or of a folder of some, remembered until a file's size or time of change differ."""
    path = Path(path).resolve()
    if path.is_dir():
        return file_digest(path, known_digest)
    stat = path.stat()
    name = text_digest(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}")[:32]
    known = state_dir("digests") / name
    if not known.is_file():
        write_text(known, file_digest(path))
    return known.read_text()


@contextlib.contextmanager
def locked(path: Path, wait: bool | float = True) -> Iterator[None]:
    """Hold ``path`` (a lock file) against other processes: wait for them (for so many seconds) and say so, or refuse at once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        refusal = f"another process is at work here ({path} is locked); wait for it to end or stop it"
        if not wait:
            raise ValueError(refusal) from None
        print(f"waiting for another process to release {path} ...", file=sys.stderr, flush=True)
        try:
            lock.acquire(timeout=-1 if wait is True else wait)
        except filelock.Timeout:
            raise ValueError(refusal) from None
    try:
        yield
    finally:
        lock.release()


# --- a stage's folder --------------------------------------------------------------------------


@contextlib.contextmanager
def output_folder(out: Path, stage: str) -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out`` if the block ends well and vanishes if it does not.

    Enter it before anything expensive: an ``out`` that cannot be replaced, or that holds something
    other than an earlier result of the same stage, is a ValueError at once.
    """
    out = Path(out).resolve()  # what a link leads to is replaced, not the link
    _require_replaceable(out, stage)
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    name = short_digest(str(out))
    with locked(state_dir("locks") / f"{name}.lock", wait=False):
        try:
            _clear(partial, old, out)  # what a killed process left
            partial.mkdir(parents=True)
        except OSError as error:
            raise ValueError(f"cannot write to {out.parent}: {error.strerror}") from error
        try:
            yield partial
            _sync(partial)
            if out.exists():
                out.rename(old)
            partial.rename(out)
        except OSError as error:
            if error.errno in FULL:
                raise ValueError(f"cannot write {out}: {error.strerror or error}; what was there before is intact. {AGAIN}") from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if old.exists() and not out.exists():
                old.rename(out)
            shutil.rmtree(old, ignore_errors=True)


def _clear(partial: Path, old: Path, out: Path) -> None:
    """Remove what a killed process left; killed between its two renames, it left the earlier result aside."""
    if partial.exists():
        shutil.rmtree(partial)
    if old.exists() and not out.exists():
        old.rename(out)
    elif old.exists():
        shutil.rmtree(old)


def _require_replaceable(out: Path, stage: str) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file; a stage writes a folder")
    if out.is_mount():
        raise ValueError(f"{out} is a mount point and cannot be replaced; give a folder inside it")
    if not os.access(out, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write to {out}: it is read-only")
    config = out / "config.json"
    theirs = read_json(config).get("stage") if config.is_file() else None
    if any(out.iterdir()) and theirs != stage:
        what = f"the result of vapi {theirs}" if theirs else "files that no stage of vapi wrote"
        raise ValueError(f"{out} holds {what}; give another folder, or move them away")


def _sync(folder: Path) -> None:
    for path in (p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def describe(folder: Path, stage: str, sections: dict[str, Any], inputs: dict[str, str], seconds: float, **more: float | str) -> None:
    """Write config.json (what decides the folder's content: config sections, digests of the inputs) and provenance.json
    (what may differ where the content does not: code version, seconds, ``more`` such as the device), which DVC and ``file_digest``
    leave out."""
    made = {
        "stage": stage,
        "sections": {name: plain(section) for name, section in sections.items()},
        "inputs": inputs,
    }
    write_json(folder / "config.json", made)
    write_json(folder / "provenance.json", {"code": code_version(), "seconds": round(seconds, 3), **more})


@functools.cache
def code_version() -> dict[str, str]:
    """Package version, commit (the clone's, or what ``VAPI_COMMIT`` says where there is no clone: the container image), and a
    digest of the package's source (edits show there: git's own "dirty" would also tell of dvc.lock, which changes while a
    pipeline runs)."""
    import vapi

    return {"version": vapi.__version__, "commit": _commit(_PACKAGE.parent), "source": source_digest()[:16]}


def source_digest(without: Sequence[str] = ()) -> str:
    """sha256 (hex) over the package's source as it lies there now, ``without`` some files of its top folder."""
    source = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        if (name := file.relative_to(_PACKAGE).as_posix()) not in without:
            source.update(f"{name}\0{file_digest(file)}\n".encode())
    return source.hexdigest()


def _commit(clone: Path) -> str:
    if not (clone / ".git").exists():
        return os.environ.get("VAPI_COMMIT", "")
    if shutil.which("git") is None:
        return ""
    found = subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else ""


def write_json(path: Path, values: Any) -> None:
    """Indented JSON, whole or not at all. NaN and infinity are refused: no other tool reads them."""
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The values in a JSON file of ours. Raises ValueError when it is not there."""
    if not Path(path).is_file():
        raise ValueError(f"{path} is not here; run the stage that makes it: vapi {Path(path).parent.name}")
    return json.loads(Path(path).read_text())


def cores() -> int:
    """This process's share of the machine's cores."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def parallel(function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int = 0) -> Iterator[R]:
    """``map`` with threads: results in order, and never more than ``ahead`` (4 per thread) of them waiting in memory."""
    ahead = ahead or 4 * workers
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        waiting: collections.deque[concurrent.futures.Future[R]] = collections.deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for left in waiting:  # after an error, or when nobody wants them any more
                left.cancel()


# --- subset/ -----------------------------------------------------------------------------------

ROWS = 32
"""Images per Parquet row group: one of them is read to get at one image."""

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_FEATURES = {
    "key": {"dtype": "string", "_type": "Value"},
    "image": {"_type": "Image"},
    "label": {"dtype": "int64", "_type": "Value"},
    "caption": {"dtype": "string", "_type": "Value"},
}
_SHARD = pa.schema(
    [("key", pa.string()), ("image", _IMAGE), ("label", pa.int64()), ("caption", pa.string())],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)
_NUMBERS = ("label", "width", "height", "bytes", "shard", "row")
_NAMES = ("key", "label", "caption", "width", "height", "mode", "bytes", "sha256", "shard", "row")
_MANIFEST = pa.schema([(name, pa.int64() if name in _NUMBERS else pa.string()) for name in _NAMES])


@dataclass(frozen=True)
class Row:
    """One image of a subset, with its encoded bytes as they came."""

    key: str
    label: int
    caption: str
    width: int
    height: int
    mode: str
    data: bytes
    sha256: str


class Subset:
    """A subset folder, opened. Columns are in memory, images are read when asked for (from any thread)."""

    def __init__(self, folder: Path) -> None:
        columns = pq.read_table(folder / "manifest.parquet").to_pydict()
        self.folder = folder
        self.keys: list[str] = columns["key"]
        self.labels = np.array(columns["label"], dtype=np.int64)  # (N,), -1: none
        self.captions: list[str] = columns["caption"]
        self.sha256: list[str] = columns["sha256"]
        self._places: list[tuple[int, int]] = list(zip(columns["shard"], columns["row"]))
        self._lock = threading.Lock()
        self._group = functools.lru_cache(maxsize=8)(self._read_group)
        self._file = functools.lru_cache(maxsize=8)(lambda shard: pq.ParquetFile(folder / _shard_name(shard)))

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def source(self) -> str:
        """What it was picked from, by the name that its configuration gave; empty where nobody wrote that down."""
        made = self.folder / "config.json"
        return str(read_json(made)["sections"]["subset"]["source"]) if made.is_file() else ""

    def image(self, i: int) -> bytes:
        """The encoded bytes of image ``i``, as they were in the source."""
        shard, row = self._places[i]
        with self._lock:
            return self._group(shard, row // ROWS)[row % ROWS]

    def pixels(self, i: int, size: int) -> np.ndarray:
        """Image ``i`` as the tokenizer sees it: uint8 (size, size, 3). Raises ValueError that names it."""
        encoded = self.image(i)
        try:
            # no limit of our own: the subset stage has applied the user's
            return images.center_crop(images.decode(encoded, max_pixels=2**62), size)
        except ValueError as error:
            raise ValueError(f"{self.keys[i]}: {error}; the subset was made for another purpose or is damaged") from error

    def _read_group(self, shard: int, group: int) -> list[bytes]:
        try:
            return [image["bytes"] for image in self._file(shard).read_row_group(group, columns=["image"])["image"].to_pylist()]
        except (OSError, pa.ArrowInvalid) as error:
            again = "put it back, or make it again with vapi subset, and run the same command again"
            raise ValueError(f"{self.folder} was there and cannot be read any more ({error}); {again}") from error


def read_subset(folder: Path) -> Subset:
    """Open what the stage ``subset`` made."""
    if not (Path(folder) / "manifest.parquet").is_file():
        raise ValueError(f"{folder} holds no subset (manifest.parquet is missing); make one with: vapi subset")
    return Subset(Path(folder))


def _shard_name(shard: int) -> str:
    return f"images-{shard:05d}.parquet"


def write_subset(folder: Path, rows: Iterable[Row], images_per_shard: int = 10_000) -> pa.Table:
    """Stream rows into Parquet shards, write manifest.parquet, return it."""
    manifest: list[dict[str, Any]] = []
    group: list[Row] = []
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(_shard_writer(folder, 0))
        for n, row in enumerate(rows):
            shard, place = divmod(n, images_per_shard)
            if place % ROWS == 0:
                _write_group(writer, group)
            if shard > 0 and place == 0:
                stack.close()
                writer = stack.enter_context(_shard_writer(folder, shard))
            group.append(row)
            described = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "data"}
            manifest.append({**described, "bytes": len(row.data), "shard": shard, "row": place})
        _write_group(writer, group)
    table = pa.Table.from_pylist(manifest, schema=_MANIFEST)
    pq.write_table(table, folder / "manifest.parquet")
    return table


def _shard_writer(folder: Path, shard: int) -> pq.ParquetWriter:
    # encoded images do not compress further, and a dictionary of distinct images would only cost
    return pq.ParquetWriter(folder / _shard_name(shard), _SHARD, compression="none", use_dictionary=["label"])


def _write_group(writer: pq.ParquetWriter, group: list[Row]) -> None:
    if not group:
        return
    columns = {
        "key": [row.key for row in group],
        "image": [{"bytes": row.data, "path": row.key} for row in group],
        "label": [row.label for row in group],
        "caption": [row.caption for row in group],
    }
    writer.write_table(pa.table(columns, schema=_SHARD))
    group.clear()


# --- tokens/ -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """What the frozen text encoder made of a subset's captions, equal captions once: bfloat16 without padding, one below the other."""

    bits: np.ndarray  # uint16 (words of all captions, C), mapped from the file
    places: np.ndarray  # int64 (N, 2): the first word of an image's caption, and how many
    sha256: list[str]  # of each image's caption

    @property
    def width(self) -> int:
        """C."""
        return int(self.bits.shape[1])

    def __getitem__(self, i: int) -> Tensor:
        """Features of image ``i``'s caption, float32 (L, C)."""
        import torch

        start, words = self.places[i]
        return torch.from_numpy(np.array(self.bits[start : start + words])).view(torch.bfloat16).float()


@dataclass(frozen=True)
class Tokens:
    """What the frozen tokenizer, and the frozen text encoder if there is one, made of a subset, row for row."""

    codes: np.ndarray  # uint16 (N, T)
    labels: np.ndarray  # int64 (N,)
    keys: list[str]
    sha256: list[str]
    crop: list[str]
    summary: dict[str, Any]
    captions: Features | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def features(self, rows: Iterable[int]) -> list[Tensor]:
        """Features of some images' captions, float32 (L, C) each. Raises ValueError if captions were not encoded."""
        if self.captions is None:
            raise ValueError("the tokens hold no features of captions; name model.text_encoder and run: vapi tokens")
        return [self.captions[int(i)] for i in rows]

    def require(self, model: ModelConfig, subset: Subset) -> None:
        """Raises ValueError unless these are the codes of that subset under that model's tokenizer, and the features of its captions
        under its text encoder, if it has one."""
        if self.summary["image_size"] != model.image_size:
            made, wanted = self.summary["image_size"], model.image_size
            raise ValueError(f"the tokens are of {made}-pixel images and model.image_size is {wanted}; run: vapi tokens")
        if self.summary["tokenizer"] != tokenizer_digest(model):
            raise ValueError(f"the tokens were made by another tokenizer than {model.tokenizer}; run: vapi tokens")
        if self.sha256 != subset.sha256 or self.keys != subset.keys:
            raise ValueError("the tokens were made of another subset; run: vapi tokens")
        if model.text_encoder:
            self._require_captions(model, subset)

    def _require_captions(self, model: ModelConfig, subset: Subset) -> None:
        if self.captions is None:
            raise ValueError("the tokens hold no features of captions, and model.text_encoder names an encoder; run: vapi tokens")
        if self.summary["captions"]["encoder"] != encoder_digest(model):
            raise ValueError(f"the captions were encoded by another encoder than {model.text_encoder}; run: vapi tokens")
        if self.captions.sha256 != [text_digest(caption) for caption in subset.captions]:
            raise ValueError("the tokens were made of a subset with other captions; run: vapi tokens")


def text_digest(text: str) -> str:
    """sha256 (hex) of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def short_digest(text: str) -> str:
    """The first 16 digits of it, for names."""
    return text_digest(text)[:16]


def tokenizer_digest(model: ModelConfig) -> str:
    """sha256 of the tokenizer's weights, wherever they lie."""
    from vapi.models import weights  # with torch, which whoever only reads a folder can do without

    path = weights.locate(model.tokenizer)
    return known_digest(path) if path.is_dir() else file_digest(path)  # a whole model takes half a minute


def encoder_digest(model: ModelConfig) -> str:
    """What names the text encoder's weights and rules, wherever they lie; empty where there is none."""
    if not model.text_encoder:
        return ""
    from vapi.models import text

    return text.digest(model.text_encoder)


def write_judges(settings: Config, folder: Path) -> None:
    """Write what DVC depends on in place of the networks that judge, which a field may name by a word: judges.json. (References and
    prompts are files always, and it depends on them.)"""
    named = named_files(settings, ["evaluate"])
    judges = {name: path for name, path in named.items() if name.rpartition(".")[2] not in ("reference", "validation", "prompts")}
    write_json(folder / "judges.json", _digests(judges))


def write_rewards(settings: Config, folder: Path) -> None:
    """The same of the networks that reward: rewards.json."""
    write_json(folder / "rewards.json", _digests(named_files(settings, ["tune"])))


def _digests(named: Mapping[str, str]) -> dict[str, str]:
    """Of files and folders by the field that names them; what is not here by its name."""
    return {field: known_digest(Path(path)) if Path(path).exists() else path for field, path in named.items()}


def write_weights(model: ModelConfig, folder: Path) -> None:
    """Write what DVC depends on in place of the weights, which may lie on a hub: generator.json, tokenizer.json, text_encoder.json."""
    for name, where in (("generator", model.generator), ("tokenizer", model.tokenizer)):
        path = Path(where)
        if path.is_file():
            size = path.stat().st_size
        else:
            from vapi.models import weights

            path = weights.locate(where)
            size = weights.size(path)
        write_json(folder / f"{name}.json", {"bytes": size, "sha256": known_digest(path)})
    write_json(folder / "text_encoder.json", {"sha256": encoder_digest(model) if model.text_encoder else "none"})


def read_tokens(folder: Path) -> Tokens:
    """Open what the stage ``tokens`` made."""
    folder = Path(folder)
    if not (folder / "codes.npy").is_file():
        raise ValueError(f"{folder} holds no tokens (codes.npy is missing); make them with: vapi tokens")
    index = pq.read_table(folder / "index.parquet").to_pydict()
    codes = np.load(folder / "codes.npy", allow_pickle=False)
    assert codes.dtype == np.uint16 and len(codes) == len(index["key"]), (codes.dtype, codes.shape, len(index["key"]))
    labels = np.array(index["label"], dtype=np.int64)
    captions = _read_features(folder, index) if "caption_sha256" in index else None
    return Tokens(codes, labels, index["key"], index["sha256"], index["crop"], read_json(folder / "summary.json"), captions)


def _read_features(folder: Path, index: dict[str, list[Any]]) -> Features:
    try:
        bits = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'features.npy'} is missing or not whole ({error}); run: vapi tokens") from None
    places = np.stack([np.array(index[name], dtype=np.int64) for name in ("caption_start", "caption_words")], axis=1)
    assert bits.dtype == np.uint16 and len(bits) >= places.sum(axis=1).max(), (bits.dtype, bits.shape)
    return Features(bits, places, index["caption_sha256"])


def write_tokens(
    folder: Path, codes: np.ndarray, subset: Subset, crop: str, summary: dict[str, Any], features: Sequence[np.ndarray] | None = None
) -> None:
    """Write codes (uint16 (N, T)) beside the keys of the subset they belong to, and the features of its captions, of each
    distinct one in the order of ``distinct``, as bits of bfloat16 (uint16 (L, C))."""
    assert codes.dtype == np.uint16 and codes.ndim == 2 and len(codes) == len(subset), (codes.dtype, codes.shape)
    buffer = io.BytesIO()  # numpy's own writing does not tell a full disk from any other error
    np.save(buffer, codes, allow_pickle=False)
    (folder / "codes.npy").write_bytes(buffer.getbuffer())
    columns = {"key": subset.keys, "label": subset.labels, "sha256": subset.sha256, "crop": [crop] * len(subset)}
    if features is not None:
        columns |= _write_features(folder / "features.npy", subset.captions, features)
    pq.write_table(pa.table(columns), folder / "index.parquet")
    write_json(folder / "summary.json", summary)


def distinct(captions: Iterable[str]) -> list[str]:
    """Each caption once, in the order in which they first occur."""
    return list(dict.fromkeys(captions))


def _write_features(path: Path, captions: Sequence[str], features: Sequence[np.ndarray]) -> dict[str, Any]:
    """Stream features to a file, and say where each image's are."""
    named = distinct(captions)
    assert len(named) == len(features) and all(one.dtype == np.uint16 for one in features), (len(named), len(features))
    ends = np.cumsum([len(one) for one in features])
    shape = (int(ends[-1]), features[0].shape[1])
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": shape})
        for one in features:
            file.write(one.tobytes())
    places = {caption: (int(end) - len(one), len(one)) for caption, end, one in zip(named, ends, features, strict=True)}
    return {
        "caption_sha256": [text_digest(caption) for caption in captions],
        "caption_start": np.array([places[caption][0] for caption in captions], np.int64),
        "caption_words": np.array([places[caption][1] for caption in captions], np.int64),
    }


# --- references --------------------------------------------------------------------------------


def read_images(path: Path, limit: int = 0, image_column: str = "image") -> tuple[np.ndarray, np.ndarray, list[str]]:
    """All (or the first ``limit``) images of a Parquet file or folder at their own, common size.

    Returns uint8 (N, H, W, 3), labels int64 (N,) and captions; label -1 and caption "" where the file has no such column.
    """
    path = Path(path)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"{path} is neither a Parquet file nor a folder with some")
    pixels: list[np.ndarray] = []
    labels: list[int] = []
    captions: list[str] = []
    for file in files:
        for key, data, label, caption in _parquet_images(file, image_column):
            if limit and len(pixels) == limit:
                break
            pixels.append(_sized_like(pixels, data, key))
            labels.append(label)
            captions.append(caption)
    if not pixels:
        raise ValueError(f"{path} holds no images")
    return np.stack(pixels), np.array(labels, dtype=np.int64), captions


def _parquet_images(file: Path, image_column: str) -> Iterator[tuple[str, bytes, int, str]]:
    parquet = pq.ParquetFile(file)
    names = parquet.schema_arrow.names
    require_column(image_column, names, file)
    columns = [name for name in (image_column, "label", "caption") if name in names]
    row = 0
    for batch in parquet.iter_batches(batch_size=256, columns=columns):
        for item in batch.to_pylist():
            data = item[image_column]
            encoded = data["bytes"] if isinstance(data, dict) else data
            yield f"{file}:{row}", encoded, item.get("label", -1), item.get("caption") or ""
            row += 1


def _sized_like(pixels: list[np.ndarray], data: bytes, key: str) -> np.ndarray:
    try:
        image = np.asarray(images.decode(data))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    if pixels and image.shape != pixels[0].shape:
        height, width = pixels[0].shape[:2]
        raise ValueError(f"{key} is {image.shape[1]} x {image.shape[0]} and the images before it are {width} x {height}; they must agree")
    return image


def require_column(name: str, names: Iterable[str], where: Any) -> None:
    """Raises ValueError that names the nearest column when ``name`` is not among ``names``."""
    names = list(names)
    if name not in names:
        raise ValueError(f"{where} has no column {name!r}; {nearest(name, names)}")
