import errno
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sklearn.cluster import MiniBatchKMeans

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.data import clusters as clusters_module
from fairseq_lowbit.data.clusters import Clusters, fit_clusters, load_clusters
from fairseq_lowbit.data.label_file import LabelFile, check_labels
from fairseq_lowbit.data.labels import LabelJob, LabelSummary, fit, label_shards
from fairseq_lowbit.data.labels import make_labels as run_job
from fairseq_lowbit.data.manifest import read_manifest, write_manifest
from fairseq_lowbit.data.mfcc import mfcc
from fairseq_lowbit.errors import LowbitError

SPLITS = ("train", "valid", "test")
LENGTHS = (300, 400, 719, 720, 5000, 16000, 24321)
# Kernels and strides of the 13-layer front-end of HuBERT-FastConv; HuBERT's own gives the same.
KERNELS = (10, 3, 1, 3, 1, 3, 1, 3, 1, 2, 1, 2, 1)
STRIDES = (5, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1)


def front_end_frames(samples):
    for kernel, stride in zip(KERNELS, STRIDES, strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


def tones(rng, samples):
    """Notes of 0.1 s: something that clusters can tell apart."""
    hertz = np.repeat(rng.choice([200, 500, 1200, 3000], samples // 1600 + 1), 1600)[:samples]
    noise = 0.01 * rng.standard_normal(samples)
    return 0.3 * np.sin(2 * np.pi * np.cumsum(hertz) / 16000) + noise


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    for split in SPLITS:
        for samples in LENGTHS:
            soundfile.write(tmp_path / f"{split}{samples}.flac", tones(rng, samples), 16000)
        write_manifest(
            tmp_path / f"{split}.tsv", tmp_path, [(f"{split}{n}.flac", n) for n in LENGTHS]
        )
    return tmp_path


def make_labels(corpus: Path, clusters: int, workers: int = 1, **options) -> LabelSummary:
    return run_job(LabelJob(corpus, clusters=clusters, **options), workers)


def read(path):
    return [[int(label) for label in line.split()] for line in path.read_text().splitlines()]


def test_as_many_labels_as_frames(corpus):
    make_labels(corpus, 8)
    for split in SPLITS:
        counts = [len(line) for line in read(corpus / f"{split}.km")]
        assert counts == [max(1, front_end_frames(n)) for n in LENGTHS]


def test_label_rate_of_100(corpus):
    make_labels(corpus, 8, label_rate=100)
    assert len(read(corpus / "train.km")[-1]) == 1 + (LENGTHS[-1] - 400) // 160


def test_a_label_describes_the_samples_its_frame_sees(corpus):
    """Frame t sees 400 samples from 320 t on; their MFCC alone must give the same cepstra."""
    samples, _ = soundfile.read(corpus / "train24321.flac")
    step = mfcc(samples)[::2]
    for t in (0, 17, 60):
        alone = mfcc(samples[320 * t : 320 * t + 400])[0]
        np.testing.assert_allclose(step[t, :13], alone[:13], rtol=1e-4, atol=1e-3)


def test_dictionary_holds_every_cluster_with_its_count(corpus):
    make_labels(corpus, 8)
    lines = (corpus / "dict.km.txt").read_text().splitlines()
    ids, counts = zip(*(map(int, line.split()) for line in lines), strict=True)
    assert ids == tuple(range(8))
    labels = [label for line in read(corpus / "train.km") for label in line]
    assert list(counts) == np.bincount(labels, minlength=8).tolist()


def test_unused_clusters_stay_in_the_dictionary(corpus):
    """Duplicate centres attract nothing: more clusters than there are different frames."""
    write_manifest(corpus / "train.tsv", corpus, [("train16000.flac", 16000)] * 2)
    make_labels(corpus, 98)
    assert len((corpus / "dict.km.txt").read_text().splitlines()) == 98


def test_summary(corpus):
    summary = make_labels(corpus, 8)
    for split in SPLITS:
        labels = [label for line in read(corpus / f"{split}.km") for label in line]
        counts = np.bincount(labels)
        assert summary.frames[split] == len(labels)
        assert summary.used_clusters[split] == np.count_nonzero(counts)
        assert summary.top_share[split] == counts.max() / len(labels)


def test_saved_model_gives_the_same_labels(corpus):
    make_labels(corpus, 8)
    model = load_clusters(corpus / "kmeans.km.npz")
    samples, _ = soundfile.read(corpus / "test24321.flac", dtype="float32")
    assert model.assign(mfcc(samples)[::2]).tolist() == read(corpus / "test.km")[-1]
    assert model.label_rate == 50


def test_features_are_standardised_with_train_statistics(corpus):
    make_labels(corpus, 8)
    model = load_clusters(corpus / "kmeans.km.npz")
    paths = (corpus / f"train{n}.flac" for n in LENGTHS)
    features = np.concatenate([mfcc(soundfile.read(path, dtype="float32")[0]) for path in paths])
    np.testing.assert_allclose(model.mean, features.mean(axis=0), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(model.deviation, features.std(axis=0), rtol=1e-3)


def test_deterministic_and_fitted_on_train_only(corpus):
    make_labels(corpus, 8)
    first = (corpus / "train.km").read_bytes()
    write_manifest(corpus / "test.tsv", corpus, [("test5000.flac", 5000)])
    make_labels(corpus, 8)
    assert (corpus / "train.km").read_bytes() == first


def test_fit_seconds_bounds_the_frames(corpus):
    everything = make_labels(corpus, 8).fitted_frames
    assert 0 < make_labels(corpus, 8, fit_seconds=0.3).fitted_frames < everything


def test_assignment_is_the_nearest_centre():
    rng = np.random.default_rng(0)
    mean, deviation = rng.standard_normal(39), rng.uniform(0.5, 2, 39)
    model = Clusters(rng.standard_normal((5, 39)), mean, deviation, 50)
    features = rng.standard_normal((20, 39)) * deviation + mean
    distances = [
        [np.linalg.norm((x - mean) / deviation - center) for center in model.centers]
        for x in features
    ]
    assert model.assign(features).tolist() == np.argmin(distances, axis=1).tolist()


def test_unusable_audio_is_counted_and_named_and_keeps_its_line(corpus):
    soundfile.write(corpus / "test5000.flac", np.zeros(5000), 16000)
    summary = make_labels(corpus, 8)
    assert len(summary.unusable) == 1
    assert "test5000.flac: silent" in summary.unusable[0]
    names = [line.split("\t")[0] for line in (corpus / "test.tsv").read_text().splitlines()[1:]]
    lines = (corpus / "test.km").read_text().splitlines()
    assert [name for name, line in zip(names, lines, strict=True) if not line] == ["test5000.flac"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"clusters": 1}, "two or more"),
        ({"label_rate": 30}, "divides 100"),
        ({"label_rate": 0}, "divides 100"),
        ({"clusters": 5000}, "too few for 5000"),
        ({"splits": ("train", "extra")}, "no manifest"),
        ({"fit_seconds": 0}, "--fit-seconds 0"),
        ({"shards": 0}, "--shards 0"),
        ({"workers": 0}, "--workers 0"),
        ({"name": "tsv"}, "--name tsv"),
        ({"name": "a/b"}, "--name a/b"),
    ],
)
def test_impossible_requests(corpus, options, message):
    with pytest.raises(LowbitError, match=message):
        make_labels(corpus, **{"clusters": 8, **options})


def files(corpus: Path, name: str = "km") -> dict[str, bytes]:
    """The label files and the dictionary."""
    names = [*(f"{split}.{name}" for split in SPLITS), f"dict.{name}.txt"]
    return {name: (corpus / name).read_bytes() for name in names}


def times(corpus: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (corpus / "km.shards").glob("*.labels")}


@pytest.mark.parametrize("shards, workers", [(3, 1), (3, 2), (10, 1)])
def test_shards_and_workers_change_nothing(corpus: Path, shards: int, workers: int) -> None:
    """Ten shards of seven files: some are empty."""
    one = make_labels(corpus, 8)
    expected = files(corpus)
    (corpus / "train.km").unlink()
    summary = make_labels(corpus, 8, workers=workers, shards=shards)
    assert files(corpus) == expected
    assert summary == one


def test_jobs_of_a_cluster_fit_first_and_join_last(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_labels(corpus, 8)
    expected = files(corpus)
    (corpus / "kmeans.km.npz").unlink()
    command = ["labels", str(corpus), "--clusters", "8", "--shards", "2"]
    assert main([*command, "--shard", "1"]) == 2
    assert "is missing: run the same command with --fit-only" in capsys.readouterr().err
    assert main([*command, "--fit-only"]) == 0
    assert main([*command, "--shard", "2"]) == 0
    before = times(corpus)
    assert main([*command, "--shard", "1"]) == 0
    (corpus / "train.km").unlink()
    assert main(command) == 0
    assert files(corpus) == expected
    assert before.items() <= times(corpus).items()
    assert "6 of 6 shards were finished before" in capsys.readouterr().out


def test_jobs_of_other_settings_are_refused(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["labels", str(corpus), "--shards", "2", "--clusters"]
    assert main([*command, "8", "--fit-only"]) == 0
    assert main([*command, "9", "--shard", "1"]) == 2
    assert "was fitted with other settings" in capsys.readouterr().err
    assert main([*command, "8", "--shard", "3"]) == 2
    assert "--shard 3: give a number from 1 to --shards 2" in capsys.readouterr().err


def test_a_second_run_labels_nothing(corpus: Path) -> None:
    summary = make_labels(corpus, 8, shards=2)
    before = times(corpus)
    assert make_labels(corpus, 8, shards=2) == summary
    assert times(corpus) == before


@pytest.mark.parametrize("damage", ["cut", "no stamp", "bad stamp"])
def test_a_half_written_shard_is_made_again(
    corpus: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    make_labels(corpus, 8, shards=2)
    expected, before = files(corpus), times(corpus)
    shard = corpus / "km.shards" / "train.2-of-2.labels"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-9])
    elif damage == "no stamp":
        shard.with_suffix(".json").unlink()
    else:
        shard.with_suffix(".json").write_text("{")
    with caplog.at_level(logging.WARNING):
        make_labels(corpus, 8, shards=2)
    assert "labelled again: 1 of 6 shards, first" in caplog.text
    assert f"{shard}, which was half-written" in caplog.text
    assert files(corpus) == expected
    del before[shard]
    assert before.items() <= times(corpus).items()


def test_shards_of_other_files_are_made_again(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_labels(corpus, 8, shards=2)
    before = times(corpus)
    write_manifest(corpus / "test.tsv", corpus, [("test5000.flac", 5000), ("test719.flac", 719)])
    make_labels(corpus, 8, shards=2)
    assert "labelled again: 2 of 6 shards" in caplog.text
    assert "test.1-of-2.labels, which was made with other settings or of other files" in caplog.text
    assert len(read(corpus / "test.km")) == 2
    kept = {path: time for path, time in before.items() if not path.name.startswith("test")}
    assert kept.items() <= times(corpus).items()


def test_a_killed_run_goes_on_with_the_shard_it_was_in(corpus: Path) -> None:
    make_labels(corpus, 8)
    expected = files(corpus)
    program = (
        "import sys, time\n"
        "from fairseq_lowbit.data import labels\n"
        "from fairseq_lowbit.cli.main import main\n"
        "def slow(found, on_files):\n"
        "    for number, entry in enumerate(found):\n"
        "        yield entry\n"
        "        if counted.calls == 2 and number == 1:\n"
        "            print('here', flush=True)\n"
        "            time.sleep(60)\n"
        "def counted(found, on_files):\n"
        "    counted.calls += 1\n"
        "    return slow(found, on_files)\n"
        "counted.calls = 0\n"
        "labels._counted = counted\n"
        "main(sys.argv[1:])\n"
    )
    arguments = ["labels", str(corpus), "--clusters", "8", "--shards", "2"]
    command = [sys.executable, "-c", program, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
    before = times(corpus)
    finished = corpus / "km.shards" / "train.1-of-2.labels"
    assert finished in before
    assert corpus / "km.shards" / "train.2-of-2.labels" not in before
    assert main(arguments) == 0
    assert files(corpus) == expected
    assert times(corpus)[finished] == before[finished]
    assert not list((corpus / "km.shards").glob(".*"))


def test_a_full_disk_leaves_the_old_labels(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_labels(corpus, 8)
    expected = files(corpus)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("fairseq_lowbit.data.labels.shutil.copyfileobj", full)
        with pytest.raises(LowbitError, match=r"cannot write .*train\.km: No space left"):
            make_labels(corpus, 9)
    assert files(corpus) == expected


class Killed:
    """Features whose process dies, as one that takes too much memory."""

    rate, standardize, is_threaded = 50, False, True

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        if self.worker:
            os._exit(9)
        return samples[:390].reshape(-1, 3)

    worker = False

    def digest(self) -> str:
        return "killed"

    def limit_threads(self, threads: int) -> None:
        Killed.worker = True


@pytest.mark.full
def test_a_killed_worker(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where a worker process finds the class above.
    monkeypatch.setattr(Killed, "__module__", "test_labels")
    monkeypatch.setitem(sys.modules, "test_labels", sys.modules[__name__])
    monkeypatch.syspath_prepend(Path(__file__).parent)
    write_manifest(corpus / "train.tsv", corpus, [("train16000.flac", 16000)] * 2)
    job = LabelJob(corpus, Killed(), clusters=8, splits=("train",), shards=2)
    fit(job)
    with pytest.raises(LowbitError, match="a worker process was killed.* fewer --workers"):
        label_shards(job, job.all_shards(), workers=2)


def test_names_keep_label_sets_apart(corpus: Path) -> None:
    make_labels(corpus, 8)
    first = files(corpus)
    make_labels(corpus, 4, name="km4")
    assert files(corpus) == first
    labels = LabelFile(corpus / "train.km4", corpus / "dict.km4.txt")
    assert labels.classes == 4 + 4
    check_labels(labels, read_manifest(corpus / "train.tsv"), 50, 16000)


def groups(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Points around four corners."""
    corners = np.array([[0, 0], [9, 0], [0, 9], [9, 9]], dtype=np.float32)
    noise = rng.standard_normal((frames, 2)).astype(np.float32)
    return corners[rng.integers(0, 4, frames)] + 0.1 * noise


def test_what_does_not_fit_into_memory_is_clustered_in_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clusters_module, "_BLOCK_BYTES", 8_000)
    monkeypatch.setattr(clusters_module, "_BATCH_FRAMES", 250)
    sizes = []

    class Watched(MiniBatchKMeans):
        def partial_fit(self, points):
            sizes.append(len(points))
            return super().partial_fit(points)

    monkeypatch.setattr("sklearn.cluster.MiniBatchKMeans", Watched)
    rng = np.random.default_rng(0)
    found = fit_clusters((groups(rng, 100) for _ in range(100)), 4, seed=0, standardize=False)
    assert found.frames == sum(sizes) == 10_000
    assert max(sizes) <= 500
    centers = sorted(found.centers.round().astype(int).tolist())
    assert centers == [[0, 0], [0, 9], [9, 0], [9, 9]]


def test_features_of_one_scale_stay_as_they_are() -> None:
    rng = np.random.default_rng(0)
    points = groups(rng, 1000) * [1, 100] + 5
    raw = fit_clusters([points], 2, seed=0, standardize=False)
    assert raw.mean.tolist() == [0, 0]
    assert raw.deviation.tolist() == [1, 1]
    # Only the larger dimension counts.
    assert abs(np.diff(raw.centers[:, 1])) > 800
    assert abs(np.diff(raw.centers[:, 0])) < 2


def test_another_file_is_no_model(corpus: Path) -> None:
    (corpus / "kmeans.km.npz").write_bytes(b"nothing of the kind")
    with pytest.raises(LowbitError, match=r"kmeans\.km\.npz is not a k-means model"):
        make_labels(corpus, 8)


def labelled(corpus: Path, lines: list[str]) -> LabelFile:
    (corpus / "train.km").write_text("".join(f"{line}\n" for line in lines))
    (corpus / "dict.km.txt").write_text("0 1\n1 1\n")
    return LabelFile(corpus / "train.km", corpus / "dict.km.txt")


SECONDS = (1, 2, 3)


@pytest.fixture
def manifest(tmp_path: Path):
    items = [(f"{n}.flac", n * 16000) for n in SECONDS]
    write_manifest(tmp_path / "train.tsv", tmp_path, items)
    return read_manifest(tmp_path / "train.tsv")


def test_labels_that_fit_pass(manifest, tmp_path: Path) -> None:
    """A frame less than a label every 20 ms, as a front-end has it, and a line that is empty."""
    lines = [" ".join("0" * (50 * n - 1)) for n in SECONDS]
    check_labels(labelled(tmp_path, lines), manifest, 50, 16000)
    check_labels(labelled(tmp_path, ["", *lines[1:]]), manifest, 50, 16000)


def test_another_number_of_lines_is_refused(manifest, tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=r"train\.km has 1 lines and .*train\.tsv has 3 files"):
        check_labels(labelled(tmp_path, ["0 1"]), manifest, 50, 16000)


def test_labels_of_other_files_are_refused(manifest, tmp_path: Path) -> None:
    """As many lines and labels in all, but in another order."""
    lines = [" ".join("0" * 50 * n) for n in (1, 3, 2)]
    message = (
        r"train\.km line 2 has 150 labels for 2.00 s of audio \(2\.flac\), not 50 a second: make"
    )
    with pytest.raises(LowbitError, match=message):
        check_labels(labelled(tmp_path, lines), manifest, 50, 16000)


def test_labels_of_another_rate_are_refused(manifest, tmp_path: Path) -> None:
    lines = [" ".join("0" * 100 * n) for n in SECONDS]
    with pytest.raises(
        LowbitError, match=r"line 1 has 100 .*: set task\.label_rate to 100, or make"
    ):
        check_labels(labelled(tmp_path, lines), manifest, 50, 16000)
