"""A published reference: OpenAI's .npz of the ADM evaluation, VIRTUAL_imagenet256_labeled.npz and its like.

    mu, sigma       mean (2048,) and covariance of Inception's pooled features, of a whole data set
    mu_s, sigma_s   the same of its spatial features (2023,)
    arr_0           10,000 of that set's images, uint8 (N, H, W, 3): for precision, recall and KID

FID and sFID compare with the published moments and never with moments of arr_0, which are those of other,
fewer images: a file without mu is refused. Arrays are read one by one, and nothing in them is unpickled.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from vapi.metrics.fid import Moments

SUFFIX = ".npz"
SETS = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # our name of the features: theirs of the moments
IMAGES = "arr_0"


def _array(path: Path, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as file:
            found: np.ndarray = file[name]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}); it is damaged or half-downloaded, fetch it again") from None
    return found


def require(path: Path) -> None:
    """Raises ValueError for a file that is no published reference, in a moment: no array is read."""
    try:
        with zipfile.ZipFile(path) as file:
            names = {name.removesuffix(".npy") for name in file.namelist()}
    except (zipfile.BadZipFile, OSError):
        raise ValueError(f"{path} is no .npz: it is damaged or half-downloaded; fetch it again") from None
    missing = [name for pair in SETS.values() for name in pair if name not in names] + [IMAGES] * (IMAGES not in names)
    if missing:
        hint = "it holds samples, not a reference: " if IMAGES in names and "mu" not in names else ""
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; {hint}a published reference has mu, sigma, mu_s, sigma_s and arr_0. "
            "For a reference of your own, name a Parquet file of real images; its moments are measured"
        )


def moments(path: Path) -> dict[str, Moments]:
    """The published moments by the features they belong to. Raises ValueError where shapes or numbers make no sense."""
    found = {}
    for features, (mean_name, covariance_name) in SETS.items():
        mean, covariance = (_array(path, name).astype(np.float64) for name in (mean_name, covariance_name))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"{path}: {mean_name} is {mean.shape} and {covariance_name} {covariance.shape}; they do not belong together")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError(f"{path}: {mean_name} or {covariance_name} holds numbers that are not finite")
        found[features] = Moments(mean, full=(covariance + covariance.T) / 2)
    return found


def images(path: Path) -> np.ndarray:
    """uint8 (N, H, W, 3). Raises ValueError for anything else."""
    found = _array(path, IMAGES)
    if found.dtype != np.uint8 or found.ndim != 4 or found.shape[-1] != 3:
        raise ValueError(f"{path}: {IMAGES} is {found.dtype} {found.shape}; images are uint8 (N, H, W, 3)")
    return found
