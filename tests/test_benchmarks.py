"""What the tables of benchmarks say of runs: differences, intervals and goals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

pytest.importorskip("torchaudio")  # of one of them

import audio
import iterative_gap
import vision

SHIFT = {0: -1.0, 1: 0.0, 2: 1.0}  # of each seed, the same in paired runs


def rows(lines: list[str]) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return {row[0]: row[1:] for row in cells}


def test_audio_compares_what_has_the_same_seed() -> None:
    def run(row: str, seed: int, phones: list[float], speakers: float) -> dict[str, Any]:
        return {
            "row": row,
            "seed": seed,
            "phone": [own + SHIFT[seed] for own in phones],
            "speaker": [speakers + SHIFT[seed]] * 6,
            "statistics": speakers + 3 + SHIFT[seed],
            "epochs": [8] * 6,
            "validation_loss": [None] * 6 if row == audio.RANDOM else [20.0, 19, 18, 17, 16, 15],
            "guessing": 28.8,
        }

    runs = [run(audio.RANDOM, seed, [30, 31, 32, 33, 34, 35], 70) for seed in (2, 0, 1)]
    for seed in SHIFT:
        runs.append(run(audio.ITERATIVE, seed, [30, 40, 45, 44, 50, 60], 90))
        runs[-1] |= {
            "mfcc": {"phone": 56.0 + SHIFT[seed], "speaker": 75.0 + SHIFT[seed]},
            "mfcc_statistics": 92.0 + SHIFT[seed],
            "without_bptt": {"phone": 58.0 + SHIFT[seed], "speaker": 88.0 + SHIFT[seed]},
        }
    found = rows(audio.judged(runs))
    # Seeds differ as much as pairs are alike: no difference has a spread.
    assert found["speakers, module 6 less MFCC, both averaged"][0] == "+15.0 ± 0.0"
    assert found["speakers, module 6 averaged less mean and deviation of MFCC"][0] == "-2.0 ± 0.0"
    assert found["the same, of both mean and deviation"][:2] == ["+20.0 ± 0.0", "10"]
    assert found["phones, module 2 less module 1"] == ["+10.0 ± 0.0", "0", "+1.0 ± 0.0"]
    assert found["phones, module 4 less module 3"][0] == "-1.0 ± 0.0"
    table_4 = rows(audio.context_network(runs))
    assert table_4["GIM"] == ["60.0 ± 1.0", "90.0 ± 1.0", "", ""]
    assert table_4["GIM without BPTT"][2:] == ["-2.0 ± 0.0", "-2.0 ± 0.0"]
    assert table_4["GIM without g_ar"][2:] == ["-10.0 ± 0.0", "+0.0"]
    assert rows(audio.trained_for(runs))[audio.ITERATIVE] == [
        "8",
        "20.00 19.00 18.00 17.00 16.00 15.00",
        "28.80",
    ]
    assert audio.RANDOM not in rows(audio.trained_for(runs))


def gap_run(condition: str, seed: int, gap: float, accuracy: float) -> dict[str, Any]:
    return {
        "data": "photos",
        "regime": "equal work",
        "condition": condition,
        "seed": seed,
        "train_loss": [2.0 + seed, 2.0, 2.0],
        "validation_loss": [2.0, 2.0 + gap, 2.0 + gap],
        "epochs": [12] * 3,
        "validation_accuracy": [50.0, 50.0, accuracy],
        "test_accuracy": [50.0, 50.0, accuracy],
    }


@pytest.mark.parametrize(
    ("gap", "accuracy", "seeds", "expected"),
    [
        (0.1, 60.0, 5, "yes"),
        (0.1, 59.0, 5, "no"),  # less accurate
        (0.3, 60.0, 5, "no"),  # a larger gap
        (0.1, 60.0, 4, ""),  # given up
    ],
)
def test_the_gap_study_judges_gaps_and_accuracy(
    gap: float, accuracy: float, seeds: int, expected: str
) -> None:
    runs = [gap_run("simultaneous", seed, 0.2, 60.0) for seed in iterative_gap.SEEDS]
    runs += [gap_run("iterative", s, gap, accuracy) for s in list(iterative_gap.SEEDS)[:seeds]]
    lines = iterative_gap.table(runs, "photos", "equal work")
    found = rows(lines)
    assert found["iterative"][2 + 7] == expected
    assert ("iterative" in iterative_gap.reaching(runs, "photos", "equal work")) == (
        expected == "yes"
    )
    assert f"Module 1 is the same in both runs of {seeds} of {seeds} pairs." in lines


def test_vision_says_what_is_short_and_which_gaps_are_larger() -> None:
    def run(row: str, seed: int, top: float, gap: float) -> dict[str, Any]:
        return {
            "data": "photos",
            "row": row,
            "seed": seed,
            "accuracy": [60.0, top, top],
            "statistics": 59.0,
            "raw": None,
            "epochs": [7] * 3,
            "train_loss": [2.0] * 3,
            "validation_loss": [2.0, 2.0 + gap, 2.0 + gap],
        }

    runs = [run(row, seed, 62.0, 0.0) for row in vision.RANDOM for seed in (0, 1)]
    runs += [run(vision.TOGETHER, seed, 66.0, 0.2) for seed in (0, 1)]
    runs += [run(vision.PLAIN, seed, 66.0, 0.3) for seed in (0, 1)]
    runs += [run(vision.ITERATIVE, seed, 70.0, 0.1) for seed in (0, 1)]
    text = "\n".join(vision.judged(runs, "photos"))
    assert (
        f"Larger in the mean: module 2 of *{vision.PLAIN}* (+0.100); "
        f"module 3 of *{vision.PLAIN}* (+0.100)." in text
    )
    short = next(line for line in text.splitlines() if f"mean, *{vision.PLAIN}*" in line)
    assert "module 2 less randomly initialized, He (+4.0 of 5)" in short
    assert "module 3 less pixel statistics (+7.0 of 10)" in short
    assert f"Short of the goal in the mean, *{vision.ITERATIVE}*: nothing." in text
