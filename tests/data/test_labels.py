import numpy as np
import pytest
import soundfile

from fairseq_lowbit.data.labels import Clusters, make_labels
from fairseq_lowbit.data.manifest import write_manifest
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


def saved_clusters(corpus) -> Clusters:
    with np.load(corpus / "kmeans.npz") as arrays:
        return Clusters(**arrays)


def test_saved_model_gives_the_same_labels(corpus):
    make_labels(corpus, 8)
    model = saved_clusters(corpus)
    samples, _ = soundfile.read(corpus / "test24321.flac", dtype="float32")
    assert model.assign(mfcc(samples)[::2]).tolist() == read(corpus / "test.km")[-1]
    assert model.label_rate == 50


def test_features_are_standardised_with_train_statistics(corpus):
    make_labels(corpus, 8)
    model = saved_clusters(corpus)
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
    ],
)
def test_impossible_requests(corpus, options, message):
    with pytest.raises(LowbitError, match=message):
        make_labels(corpus, **options)
