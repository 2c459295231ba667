"""Corpora of a few seconds in the layouts of SUPERB's, and a tiny model to judge on them."""

import csv
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import soundfile
import torch

from fairseq_lowbit.models import Hubert
from fairseq_lowbit.nn import calibrate
from fairseq_lowbit.precision import Precision
from tests.shapes import TINY

RATE = 16000
SHAPE = replace(TINY, conv_feature_layers="[(8,10,5)]+[(8,3,2)]*4+[(12,2,2)]*2")
WORDS = ("ONE", "TWO", "TEN")
LEXICON = "ONE W AH N\nTWO T UW\nTWO T AO\nTEN T EH N\n"


def write_checkpoint(path: Path) -> None:
    torch.manual_seed(0)
    model = Hubert(SHAPE, precision=Precision("bitla_w2a2"))
    calibrate(model, [torch.randn(2, RATE)], model.final_output)
    precision = model.plan.precision.to_mapping()
    config = {**asdict(SHAPE), "_name": "lowbit_hubert", "precision": precision}
    torch.save(
        {"cfg": {"model": config, "task": {"normalize": True}}, "model": model.state_dict()}, path
    )


def write_tone(path: Path, hertz: float, seconds: float = 1.0) -> None:
    """A tone with a little noise; only noise for 0 Hz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(int(RATE * seconds)) / RATE
    noise = 0.02 * np.random.default_rng(len(path.name)).standard_normal(len(time))
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * hertz * time) + noise, RATE)


def write_commands(folder: Path) -> None:
    """Speech Commands: a tone to a keyword, high for yes and low for no."""
    tones = {"yes": 2000, "no": 200}
    for part, others in {
        "train": {"bed": 700, "_background_noise_": 0},
        "test": {"_unknown_": 700, "_silence_": 0},
    }.items():
        for name, hertz in (tones | others).items():
            for index in range(24 if part == "train" else 4):
                path = folder / part / name / f"{index:08x}_nohash_0.wav"
                write_tone(path, hertz, 1 if hertz else 2)


def write_librispeech(folder: Path) -> None:
    """Utterances of one and two words, each word a tone."""
    for subset, speaker in {"train-clean-100": 11, "dev-clean": 12, "test-clean": 13}.items():
        chapter = folder / "LibriSpeech" / subset / str(speaker) / "7"
        lines = []
        for index in range(8 if speaker == 11 else 3):
            name = f"{speaker}-7-{index:04d}"
            said = [WORDS[index % 3], WORDS[(index + 1) % 3]][: 1 + index % 2]
            write_tone(chapter / f"{name}.flac", 300 * (1 + index % 3), 0.5 + 0.1 * index)
            lines.append(f"{name} {' '.join(said)}\n")
        (chapter / f"{speaker}-7.trans.txt").write_text("".join(lines))


def write_intents(folder: Path) -> None:
    """Fluent Speech Commands: two intents."""
    for part in ("train", "valid", "test"):
        rows = []
        for index, action in enumerate(("increase", "decrease", "increase", "decrease")):
            path = f"wavs/speakers/{part}/{index}.wav"
            write_tone(folder / path, 2000 if action == "increase" else 200)
            rows.append({"path": path, "action": action, "object": "heat", "location": "none"})
        (folder / "data").mkdir(exist_ok=True)
        with open(folder / f"data/{part}_data.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def write_voxceleb(folder: Path) -> None:
    """VoxCeleb1: two speakers, and the published list of what is trained, watched and tested on."""
    lines = []
    for speaker, hertz in (("id10001", 200), ("id10002", 2000)):
        for use in (1, 1, 2, 3):
            name = f"{speaker}/clip/{len(lines):05d}.wav"
            write_tone(folder / "dev/wav" / name, hertz)
            lines.append(f"{use} {name}\n")
    write_tone(folder / "test/wav/id10270/clip/00001.wav", 500)
    (folder / "iden_split.txt").write_text("".join(lines))


def write_emotions(folder: Path) -> None:
    """IEMOCAP: in every session a happy and an angry voice."""
    for number in range(1, 6):
        session, dialog = folder / f"Session{number}", f"Ses0{number}F_impro01"
        lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n"]
        for index, (emotion, hertz) in enumerate((("hap", 2000), ("ang", 200)) * 2):
            name = f"{dialog}_F{index:03d}"
            write_tone(session / f"sentences/wav/{dialog}/{name}.wav", hertz)
            lines.append(f"[0.0 - 1.0]\t{name}\t{emotion}\t[2.5, 2.5, 2.5]\n")
        evaluation = session / f"dialog/EmoEvaluation/{dialog}.txt"
        evaluation.parent.mkdir(parents=True)
        evaluation.write_text("".join(lines))


def write_conversations(folder: Path) -> None:
    """Kaldi's folders of two recordings, in each of which two speakers take turns."""
    for part in ("train", "dev", "test"):
        (folder / part).mkdir(parents=True)
        files: dict[str, list[str]] = {
            name: [] for name in ("wav.scp", "segments", "utt2spk", "spk2utt", "reco2dur")
        }
        for index in range(2):
            recording = f"{part}{index}"
            path = folder / "wav" / f"{recording}.wav"
            write_tone(path, 400, 4)
            files["wav.scp"].append(f"{recording} {path}\n")
            files["reco2dur"].append(f"{recording} 4.0\n")
            for speaker, (begin, end) in {"a": (0, 2), "b": (2, 4)}.items():
                turn, name = f"{recording}{speaker}_1", f"{recording}{speaker}"
                files["segments"].append(f"{turn} {recording} {begin} {end}\n")
                files["utt2spk"].append(f"{turn} {name}\n")
                files["spk2utt"].append(f"{name} {turn}\n")
        for name, lines in files.items():
            (folder / part / name).write_text("".join(lines))


def write_queries(folder: Path) -> None:
    """QUESST 2014: two spoken queries to a set, two utterances, and a scorer that prefers the
    second layer."""
    scoring = folder / "scoring"
    scoring.mkdir(parents=True)
    for part in ("utterances", "dev", "eval"):
        lines = []
        for index in range(2):
            write_tone(folder / f"Audio/{part}_{index}.wav", 300 * (1 + index))
            lines.append(f"quesst14/Audio/{part}_{index}.wav nnenglish\n")
        (scoring / f"language_key_{part}.lst").write_text("".join(lines))
    (scoring / "score-TWV-Cnxe.sh").write_text(
        'case "$1" in *layer1*) twv=0.5 ;; *) twv=0.25 ;; esac\n'
        'test -s "$1/benchmark.stdlist.xml" &&\n'
        '    echo "actTWV: 0.1  maxTWV: $twv  Threshold: 2.0" >"$1/score.out"\n'
    )
