"""k-means of frame features, in bounded memory whatever the corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_write

if TYPE_CHECKING:
    from sklearn.cluster import MiniBatchKMeans

# A dimension that hardly varies would otherwise be blown up to the weight of the others.
_LEAST_DEVIATION = 1e-5
_BATCH_FRAMES = 10_000
# Features in memory at a time. What fits is clustered in several passes, and more in one.
_BLOCK_BYTES = 512 * 2**20
_NO_FRAMES = np.empty((0, 0), dtype=np.float32)


@dataclass(frozen=True)
class Clusters:
    """A fitted k-means model, with the statistics that its features are standardized by."""

    centers: np.ndarray  # [clusters, dimensions] in standardized units
    mean: np.ndarray  # [dimensions]
    deviation: np.ndarray  # [dimensions]
    label_rate: int = 50
    frames: int = 0  # that it was fitted on
    settings: str = ""  # digest of all it was fitted with

    def assign(self, features: np.ndarray) -> np.ndarray:
        """The nearest centre of each frame: int [frames] of float [frames, dimensions]."""
        points = (features - self.mean) / self.deviation
        # |x - c|^2 without |x|^2, which is the same for every centre.
        return ((self.centers**2).sum(axis=1) - 2 * points @ self.centers.T).argmin(axis=1)

    def digest(self) -> str:
        """Equal for models that give the same labels."""
        digest = hashlib.sha256(str(self.label_rate).encode())
        for array in (self.centers, self.mean, self.deviation):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        with atomic_write(path, "wb") as file:
            np.savez(file, **vars(self))


def load_clusters(path: str | Path) -> Clusters:
    """Raises LowbitError for a missing file and for one of another kind."""
    if not Path(path).is_file():
        raise LowbitError(f"there is no k-means model {path}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Clusters(
                arrays["centers"],
                arrays["mean"],
                arrays["deviation"],
                int(arrays["label_rate"]),
                int(arrays["frames"]),
                str(arrays["settings"]),
            )
    except (KeyError, ValueError, EOFError, BadZipFile) as error:
        raise LowbitError(
            f"{path} is not a k-means model of this version; remove it, and it is fitted anew"
        ) from error


def fit_clusters(
    features: Iterable[np.ndarray], clusters: int, seed: int, standardize: bool
) -> Clusters:
    """Mini-batch k-means.

    Args:
        features: [frames, dimensions] each, in random order.

    Raises:
        LowbitError: fewer frames than clusters.
    """
    blocks = _blocks(features)
    block = next(blocks, _NO_FRAMES)
    frames = len(block)
    if frames < clusters:
        raise LowbitError(
            f"{frames} frames of audio are too few for {clusters} clusters: give more audio "
            "(--fit-seconds) or fewer --clusters"
        )
    mean, deviation = _statistics(block, standardize)
    kmeans = _kmeans(clusters, seed)
    if block.nbytes < _BLOCK_BYTES:  # all there is
        _standardize(block, mean, deviation)
        kmeans.fit(block)
    else:
        frames = 0
        random = np.random.default_rng(seed)
        while len(block):
            _standardize(block, mean, deviation)
            _partial_fit(kmeans, block, random)
            frames += len(block)
            block = next(blocks, _NO_FRAMES)
    centers = kmeans.cluster_centers_.astype(np.float32)
    return Clusters(centers, mean.astype(np.float32), deviation.astype(np.float32), frames=frames)


def _partial_fit(kmeans: MiniBatchKMeans, block: np.ndarray, random: np.random.Generator) -> None:
    # Neighbouring frames are alike, so a batch is drawn from the whole block.
    order = random.permutation(len(block))
    # The first batch has to hold all centres.
    batches = len(order) // max(_BATCH_FRAMES, kmeans.n_clusters)
    for chosen in np.array_split(order, max(1, batches)):
        kmeans.partial_fit(block[chosen])


def _kmeans(clusters: int, seed: int) -> MiniBatchKMeans:
    from sklearn.cluster import MiniBatchKMeans  # slow to import, and only needed here

    return MiniBatchKMeans(
        clusters,
        batch_size=_BATCH_FRAMES,
        max_iter=100,
        max_no_improvement=100,
        n_init=5,
        reassignment_ratio=0.0,
        random_state=seed,
    )


def _blocks(features: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    gathered: list[np.ndarray] = []
    size = 0
    for frames in features:
        gathered.append(frames)
        size += frames.nbytes
        if size >= _BLOCK_BYTES:
            block = np.concatenate(gathered)
            gathered, size = [], 0  # before the block is used: there is no room for both
            yield block
    if gathered:
        yield np.concatenate(gathered)


def _statistics(features: np.ndarray, standardize: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation, float32 [dimensions]; 0 and 1 for features that stay as they are."""
    if not standardize:
        dimensions = features.shape[1]
        return np.zeros(dimensions, np.float32), np.ones(dimensions, np.float32)
    mean = features.mean(axis=0, dtype=np.float64)
    deviation = np.maximum(features.std(axis=0, dtype=np.float64), _LEAST_DEVIATION)
    return mean, deviation


def _standardize(features: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> None:
    """In place, and in pieces: the statistics have double precision, features of a block do not
    fit into memory so."""
    for start in range(0, len(features), _BATCH_FRAMES):
        piece = features[start : start + _BATCH_FRAMES]
        piece[...] = (piece - mean) / deviation
