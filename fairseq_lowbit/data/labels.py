"""HuBERT's labels: k-means clusters of frame features, in the files that fairseq expects.

Three steps, each of which leaves finished work alone: fit k-means on a sample of the first split,
label every shard of every split, and join the shards.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import cached_property
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fairseq_lowbit.data.audio import SAMPLE_RATE, UnusableAudio
from fairseq_lowbit.data.clusters import Clusters, fit_clusters, load_clusters
from fairseq_lowbit.data.features import FrameFeatures, Mfcc, read_features
from fairseq_lowbit.data.label_shards import (
    Shard,
    ShardResult,
    finish_shard,
    read_shard,
    shard_settings,
    write_shard,
)
from fairseq_lowbit.data.manifest import Manifest, read_manifest
from fairseq_lowbit.data.progress import tqdm_options
from fairseq_lowbit.errors import LowbitError, require_number
from fairseq_lowbit.files import atomic_write, check_writable
from fairseq_lowbit.machine import usable_cores

logger = logging.getLogger(__name__)
_MOST_THREADS = 8
_SECONDS_BETWEEN_LOOKS = 1.0
_files_of_workers: Synchronized  # set where a worker process begins


@dataclass(frozen=True)
class LabelJob:
    """The labels of a corpus; raises LowbitError for settings that make no sense.

    Writes ``<split>.<name>``, ``dict.<name>.txt`` and ``kmeans.<name>.npz`` into ``data_dir``, and
    ``<name>.shards/`` with what the first is joined from.

    Label t stands for what follows sample t * 16000 / ``label_rate``. At 50 Hz there are exactly as
    many as frames of the convolutional front-end, for MFCC too: a label and a frame see the same
    400 samples. A file that cannot be used has an empty line.
    """

    data_dir: Path
    features: FrameFeatures = field(default_factory=Mfcc)
    clusters: int = 100
    label_rate: int = 50
    fit_seconds: float = 5 * 3600  # of random files of the first split, which k-means is fitted on
    seed: int = 0
    splits: tuple[str, ...] = ("train", "valid", "test")
    name: str = "km"
    shards: int = 1

    def __post_init__(self) -> None:
        rate = self.features.rate
        if self.clusters < 2 or self.label_rate <= 0 or rate % self.label_rate:
            raise LowbitError(
                f"labels need two or more clusters and a rate that divides {rate} Hz, "
                f"not {self.clusters} and {self.label_rate}"
            )
        require_number("--fit-seconds", self.fit_seconds, 0, excluded=True)
        require_number("--seed", self.seed, 0)
        require_number("--shards", self.shards, 1)
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name) or self.name in ("tsv", "wrd"):
            raise LowbitError(
                f"--name {self.name}: it becomes the end of the label files' names, so give "
                "letters, digits, - and _ (not tsv or wrd), for example km500"
            )

    @property
    def kmeans(self) -> Path:
        return self.data_dir / f"kmeans.{self.name}.npz"

    @property
    def dictionary(self) -> Path:
        return self.data_dir / f"dict.{self.name}.txt"

    @property
    def folder(self) -> Path:
        """Of the shards."""
        return self.data_dir / f"{self.name}.shards"

    def labels(self, split: str) -> Path:
        return self.data_dir / f"{split}.{self.name}"

    @cached_property
    def manifests(self) -> dict[str, Manifest]:
        return {split: read_manifest(self.data_dir / f"{split}.tsv") for split in self.splits}

    def fit_settings(self) -> str:
        """Digest of all that the k-means model follows from."""
        train = self.manifests[self.splits[0]].digest()
        own = (self.clusters, self.label_rate, float(self.fit_seconds), self.seed)
        parts = (train, self.features.digest(), own)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def all_shards(self) -> list[Shard]:
        numbers = range(1, self.shards + 1)
        return [Shard(split, number, self.shards) for split in self.splits for number in numbers]


@dataclass
class LabelSummary:
    """How the labels came out; shares and counts are over the frames of each split."""

    clusters: int
    fitted_frames: int
    frames: dict[str, int]
    used_clusters: dict[str, int]
    top_share: dict[str, float]  # of the most frequent label: a model that only guesses it
    unusable: list[str]  # one message per file whose line was left empty


def make_labels(job: LabelJob, workers: int = 1) -> LabelSummary:
    """All steps, or what is left of them.

    Args:
        workers: processes; more than one need more than one shard.

    Raises:
        LowbitError: missing manifests, fewer frames than clusters, a full disk.
    """
    fit(job)
    label_shards(job, job.all_shards(), workers)
    return join(job)


def fit(job: LabelJob) -> Clusters:
    """Fits k-means and writes it, unless it has been fitted with the same settings before."""
    settings = job.fit_settings()
    if job.kmeans.is_file():
        earlier = load_clusters(job.kmeans)
        if earlier.settings == settings:
            return earlier
        logger.warning(f"{job.kmeans} was fitted with other settings or files: it is fitted again")
    check_writable(job.kmeans)
    found = fit_clusters(_fit_features(job), job.clusters, job.seed, job.features.standardize)
    clusters = replace(found, label_rate=job.label_rate, settings=settings)
    clusters.save(job.kmeans)
    return clusters


def _fit_features(job: LabelJob) -> Iterator[np.ndarray]:
    """Features of random files of the first split until ``fit_seconds`` are full."""
    manifest = job.manifests[job.splits[0]]
    order = np.random.default_rng(job.seed).permutation(len(manifest))
    before = np.cumsum(manifest.sizes[order]) - manifest.sizes[order]
    chosen = order[before < job.fit_seconds * SAMPLE_RATE]
    paths = [manifest.root / manifest.names[i] for i in chosen]
    found = read_features(paths, job.features, _threads(1))
    for features in tqdm(found, "features for k-means", len(paths), **tqdm_options()):
        if not isinstance(features, UnusableAudio):
            yield features


def fitted(job: LabelJob) -> Clusters:
    """The k-means model that :func:`fit` has written.

    Raises:
        LowbitError: it is missing, or was fitted with other settings.
    """
    if not job.kmeans.is_file() or load_clusters(job.kmeans).settings != job.fit_settings():
        state = "was fitted with other settings or files" if job.kmeans.is_file() else "is missing"
        raise LowbitError(
            f"k-means model {job.kmeans} {state}: run the same command with --fit-only, once, "
            "before the jobs of the shards"
        )
    return load_clusters(job.kmeans)


def label_shards(job: LabelJob, shards: Sequence[Shard], workers: int = 1) -> int:
    """Labels the ``shards`` that are not finished, each in one process; returns how many.

    Raises:
        LowbitError: k-means is not fitted, a full disk, a worker process that was killed.
    """
    require_number("--workers", workers, 1)
    clusters = fitted(job)
    job.folder.mkdir(exist_ok=True)
    settings = _settings(job, shards, clusters)
    todo = _unfinished(job, settings)
    files = sum(len(shard.lines(len(job.manifests[shard.split]))) for shard in todo)
    with tqdm(total=files, desc="files labelled", **tqdm_options()) as bar:
        if workers == 1 or len(todo) < 2:
            for shard in todo:
                _label(job, shard, settings[shard], _threads(1), bar.update)
        else:
            _label_in_processes(job, {s: settings[s] for s in todo}, workers, bar)
    return len(todo)


def _unfinished(job: LabelJob, settings: dict[Shard, str]) -> list[Shard]:
    """The shards that are to be labelled; tells of those that are there and do not do."""
    found = {shard: read_shard(shard, job.folder, digest) for shard, digest in settings.items()}
    again = [(shard, reason) for shard, (_, reason) in found.items() if reason]
    if again:
        shard, reason = again[0]
        logger.warning(
            f"labelled again: {len(again)} of {len(found)} shards, first "
            f"{shard.labels(job.folder)}, which was {reason}"
        )
    return [shard for shard, (result, _) in found.items() if result is None]


def _settings(job: LabelJob, shards: Sequence[Shard], clusters: Clusters) -> dict[Shard, str]:
    manifests = {split: manifest.digest() for split, manifest in job.manifests.items()}
    model = (clusters.digest(), job.features.digest())
    return {shard: shard_settings(shard, manifests[shard.split], *model) for shard in shards}


def _label_in_processes(job: LabelJob, shards: dict[Shard, str], workers: int, bar: tqdm) -> None:
    threads = _threads(workers)
    # A forked process would inherit the threads of numpy and torch in a state of no use.
    context = get_context("spawn")
    # A copy, without the manifests: reading them again is faster than sending them every time.
    sent = replace(job)
    files = context.Value("q", 0)  # labelled by all of them
    begin = (job.features, threads, files)
    with ProcessPoolExecutor(workers, context, _begin_worker, begin) as pool:
        waiting = {
            pool.submit(_label_in_worker, sent, shard, digest, threads)
            for shard, digest in shards.items()
        }
        try:
            while waiting:
                done, waiting = wait(waiting, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                for future in done:
                    future.result()
                bar.update(files.value - bar.n)
        except BrokenProcessPool as error:
            raise LowbitError(
                "a worker process was killed, most likely for want of memory: run the same command "
                "with fewer --workers to go on; finished shards are kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_worker(features: FrameFeatures, threads: int, files: Synchronized) -> None:
    global _files_of_workers
    _files_of_workers = files
    features.limit_threads(threads)


def _label_in_worker(job: LabelJob, shard: Shard, settings: str, threads: int) -> None:
    _label(job, shard, settings, threads, _count_for_all)


def _count_for_all(count: int) -> None:
    with _files_of_workers.get_lock():
        _files_of_workers.value += count


def _label(
    job: LabelJob,
    shard: Shard,
    settings: str,
    threads: int,
    on_files: Callable[[int], object] = lambda count: None,
) -> None:
    """Labels one shard; calls ``on_files`` with the number of files done since."""
    manifest = job.manifests[shard.split]
    names = (manifest.names[line] for line in shard.lines(len(manifest)))
    paths = [manifest.root / name for name in names]
    clusters = load_clusters(job.kmeans)
    # The old stamp must not vouch for new labels.
    shard.stamp(job.folder).unlink(missing_ok=True)
    found = _counted(read_features(paths, job.features, threads), on_files)
    step = job.features.rate // job.label_rate
    result = write_shard(shard.labels(job.folder), found, clusters, step)
    finish_shard(shard, job.folder, settings, result)


def _counted(found: Iterator, on_files: Callable[[int], object]) -> Iterator:
    for entry in found:
        yield entry
        on_files(1)


def _threads(workers: int) -> int:
    return max(1, min(_MOST_THREADS, usable_cores() // workers))


def join(job: LabelJob) -> LabelSummary:
    """Writes ``<split>.<name>`` from its shards, and the dictionary.

    Raises:
        LowbitError: a shard is missing; a full disk.
    """
    clusters = fitted(job)
    results = _results(job, clusters)
    for split in job.splits:
        with atomic_write(job.labels(split), "wb") as file:
            for shard in (shard for shard in results if shard.split == split):
                with open(shard.labels(job.folder), "rb") as part:
                    shutil.copyfileobj(part, file)
    for leftover in job.folder.glob(".*.tmp"):  # of processes that were killed
        leftover.unlink(missing_ok=True)
    counts = {
        split: np.sum([r.counts for shard, r in results.items() if shard.split == split], axis=0)
        for split in job.splits
    }
    with atomic_write(job.dictionary) as file:
        file.writelines(f"{i} {count}\n" for i, count in enumerate(counts[job.splits[0]]))
    return LabelSummary(
        job.clusters,
        fitted_frames=clusters.frames,
        frames={s: int(c.sum()) for s, c in counts.items()},
        used_clusters={s: int((c > 0).sum()) for s, c in counts.items()},
        top_share={s: float(c.max() / max(c.sum(), 1)) for s, c in counts.items()},
        unusable=[message for result in results.values() for message in result.unusable],
    )


def _results(job: LabelJob, clusters: Clusters) -> dict[Shard, ShardResult]:
    shards = job.all_shards()
    settings = _settings(job, shards, clusters)
    results = {shard: read_shard(shard, job.folder, settings[shard])[0] for shard in shards}
    missing = [shard for shard, result in results.items() if result is None]
    if missing:
        raise LowbitError(
            f"{len(missing)} of {len(shards)} shards are missing, first "
            f"{missing[0].labels(job.folder)}: label them first"
        )
    return results
