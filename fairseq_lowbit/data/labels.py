"""First-iteration HuBERT labels: k-means clusters of MFCC, in the files fairseq expects."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fairseq_lowbit.data.audio import SAMPLE_RATE, UnusableAudio, read_audio
from fairseq_lowbit.data.manifest import Manifest, read_manifest
from fairseq_lowbit.data.mfcc import FRAME_RATE, mfcc
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_write

# A dimension that hardly varies would otherwise be blown up to the weight of the others.
_LEAST_DEVIATION = 1e-5
_NO_FRAMES = np.empty((0, 39), dtype=np.float32)


@dataclass(frozen=True)
class Clusters:
    """A fitted k-means model with the statistics its features are standardised by: the deltas are
    an order of magnitude smaller than the cepstra and would not count otherwise."""

    centers: np.ndarray  # [clusters, 39] in standardised units
    mean: np.ndarray  # [39]
    deviation: np.ndarray  # [39]
    label_rate: int

    def assign(self, features: np.ndarray) -> np.ndarray:
        """The nearest centre of each frame: int [frames] of float [frames, 39]."""
        points = (features - self.mean) / self.deviation
        # |x - c|^2 without |x|^2, which is the same for every centre.
        return ((self.centers**2).sum(axis=1) - 2 * points @ self.centers.T).argmin(axis=1)

    def save(self, path: str | Path) -> None:
        with atomic_write(path, "wb") as file:
            np.savez(file, **vars(self))


@dataclass
class LabelSummary:
    """How the labels came out; shares and counts are over the frames of each split."""

    clusters: int
    fitted_frames: int
    frames: dict[str, int]
    used_clusters: dict[str, int]
    top_share: dict[str, float]  # of the most frequent label: a model that only guesses it
    unusable: list[str]  # one message per file whose line was left empty


def make_labels(
    data_dir: str | Path,
    clusters: int = 100,
    *,
    splits: Sequence[str] = ("train", "valid", "test"),
    label_rate: int = 50,
    fit_seconds: float = 5 * 3600,
    seed: int = 0,
) -> LabelSummary:
    """Labels every file of `<split>.tsv` in `data_dir`; writes `<split>.km` next to it.

    k-means is fitted on at most `fit_seconds` of randomly chosen files of the first split only.
    Also writes `dict.km.txt` (the dictionary for fairseq) and `kmeans.npz` (see `Clusters`).

    Label t stands for samples t * hop to t * hop + 400 with hop = 16000 / label_rate, which is the
    field of view of the convolutional front-end: at 50 Hz there are exactly as many labels as
    frames. A file that cannot be used gets an empty line and a place in the summary.

    Raises LowbitError for missing manifests or too little usable audio.
    """
    if clusters < 2 or label_rate <= 0 or FRAME_RATE % label_rate:
        raise LowbitError(
            f"labels need two or more clusters and a rate that divides {FRAME_RATE} Hz, "
            f"not {clusters} and {label_rate}"
        )
    data_dir = Path(data_dir)
    manifests = {split: read_manifest(data_dir / f"{split}.tsv") for split in splits}
    features = _fit_features(manifests[splits[0]], fit_seconds, seed)
    if len(features) < clusters:
        raise LowbitError(f"{len(features)} frames of audio are too few for {clusters} clusters")
    model = _fit(features, clusters, label_rate, seed)
    model.save(data_dir / "kmeans.npz")
    unusable: list[str] = []
    counts = {
        s: _label_split(m, model, data_dir / f"{s}.km", unusable) for s, m in manifests.items()
    }
    with atomic_write(data_dir / "dict.km.txt") as file:
        file.writelines(f"{i} {count}\n" for i, count in enumerate(counts[splits[0]]))
    return LabelSummary(
        clusters,
        fitted_frames=len(features),
        frames={s: int(c.sum()) for s, c in counts.items()},
        used_clusters={s: int((c > 0).sum()) for s, c in counts.items()},
        top_share={s: float(c.max() / max(c.sum(), 1)) for s, c in counts.items()},
        unusable=unusable,
    )


def _fit_features(manifest: Manifest, seconds: float, seed: int) -> np.ndarray:
    """MFCC of random files until `seconds` are full: [frames, 39]."""
    order = np.random.default_rng(seed).permutation(len(manifest))
    before = np.cumsum(manifest.sizes[order]) - manifest.sizes[order]
    chosen = order[before < seconds * SAMPLE_RATE]
    paths = [manifest.root / manifest.names[i] for i in chosen]
    return np.concatenate([_NO_FRAMES, *_all_features(paths, "features", [])])


def _all_features(paths: list[Path], title: str, unusable: list[str]) -> Iterator[np.ndarray]:
    """MFCC of each file in order, empty for an unusable one, whose message joins ``unusable``."""
    # Threads help: numpy and the decoder release the lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # A bounded number of files in flight: a large corpus does not fit into memory.
        for start in tqdm(range(0, len(paths), 256), title, disable=None, leave=False):
            for features in pool.map(_file_features, paths[start : start + 256]):
                if isinstance(features, UnusableAudio):
                    unusable.append(str(features))
                    features = _NO_FRAMES
                yield features


def _file_features(path: Path) -> np.ndarray | UnusableAudio:
    try:
        return mfcc(read_audio(path, SAMPLE_RATE), SAMPLE_RATE)
    except UnusableAudio as error:
        return error


def _fit(features: np.ndarray, clusters: int, label_rate: int, seed: int) -> Clusters:
    from sklearn.cluster import MiniBatchKMeans  # slow to import, and only needed here

    mean = features.mean(axis=0, dtype=np.float64)
    deviation = np.maximum(features.std(axis=0, dtype=np.float64), _LEAST_DEVIATION)
    points = ((features - mean) / deviation).astype(np.float32)
    kmeans = MiniBatchKMeans(
        clusters,
        batch_size=10_000,
        max_iter=100,
        max_no_improvement=100,
        n_init=5,
        reassignment_ratio=0.0,
        random_state=seed,
    )
    centers = kmeans.fit(points).cluster_centers_
    mean, deviation = mean.astype(np.float32), deviation.astype(np.float32)
    return Clusters(centers.astype(np.float32), mean, deviation, label_rate)


def _label_split(
    manifest: Manifest, model: Clusters, path: Path, unusable: list[str]
) -> np.ndarray:
    """Writes one line of labels per file; returns how often each label occurs: int [clusters]."""
    step = FRAME_RATE // model.label_rate
    counts = np.zeros(len(model.centers), dtype=np.int64)
    with atomic_write(path) as file:
        for features in _all_features(list(manifest.files()), path.name, unusable):
            labels = model.assign(features[::step])
            counts += np.bincount(labels, minlength=len(counts))
            file.write(" ".join(map(str, labels)) + "\n")
    return counts
