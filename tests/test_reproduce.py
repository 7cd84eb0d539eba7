"""The paper's tables and figures as commands."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import LOOKS_AT_VALUES, Heard, edit, one_error, shorten
from numpy.typing import NDArray
from PIL import Image
from warm import gim_stage

from gim_stagewise.errors import ConfigError, DataError, OverBudgetError
from gim_stagewise.memory import Budget
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.probe.probe import ProbeScores
from gim_stagewise.reproduce.exciting import Neuron, most_exciting
from gim_stagewise.reproduce.figures import figure_2, figure_3
from gim_stagewise.reproduce.paper import TABLE_1
from gim_stagewise.reproduce.runs import Reproduction, spread
from gim_stagewise.reproduce.tables import table_1, table_2
from gim_stagewise.stage.metrics import read_metrics


@pytest.fixture(scope="module")
def work(
    tmp_path_factory: pytest.TempPathFactory, new_tiny: Callable[[Path], Path]
) -> Reproduction:
    place = tmp_path_factory.mktemp("reproduce")
    file = new_tiny(place)
    text = file.read_text().replace("max_epochs = 3", "max_epochs = 1")
    context = "[context]\nchannels = 8\nlayers = 1\n\n[module.1]"
    file.write_text(text.replace("[module.1]", context).partition("[module.3]")[0])
    return Reproduction(file, place / "runs", place / "results", seeds=2, device="cpu")


def columns(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_1_has_every_mode_beside_the_paper(work: Reproduction) -> None:
    text = table_1(work).read_text()
    lines = {columns(line)[0]: columns(line)[1:] for line in text.splitlines() if "|" in line}
    for name, mode, paper in TABLE_1:
        assert lines[name][0] == paper
        if mode is None:
            assert lines[name][1:] == ["", ""]
            continue
        folders = [work.pipeline(mode, number).workspace.folder for number in (0, 1)]
        records = [json.loads((folder / "run.json").read_text()) for folder in folders]
        assert [record["mode"] for record in records] == [mode, mode]
        assert [record["seed"] for record in records] == [3, 4]
        for module in (0, 1):
            own = [100 * record["modules"][module]["probe_accuracy"] for record in records]
            assert lines[name][1 + module] == spread(own)
    assert "seeds 3 to 4" in text
    assert "Conditions:" in text


def test_what_is_there_is_not_made_again(work: Reproduction) -> None:
    heard = Heard()
    again = Reproduction(work.file, work.base, work.target, seeds=2, device="cpu", progress=heard)
    first = table_1(work).read_text()
    assert table_1(again).read_text() == first
    assert heard.tasks == []
    (work.base / "tiny-cpc" / "m2.safetensors").unlink()
    assert table_1(again).read_text() == first
    # The same weights come out, so that scores of their features are known.
    assert heard.tasks == ["modules 1 to 2: train"]


def test_table_2_counts_and_measures(work: Reproduction) -> None:
    text = table_2(work).read_text()
    rows = [columns(line) for line in text.splitlines() if "MB" in line or "kB" in line]
    assert [row[0] for row in rows[:4]] == [
        "Supervised",
        "CPC",
        "GIM, all modules",
        "GIM, 1st module",
    ]
    assert [row[1] for row in rows[:4]] == ["6.3", "7.7", "7.0", "2.5"]
    assert all(re.fullmatch(r"[\d.]+ [kM]B", row[2]) for row in rows)

    def counted(row: list[str]) -> float:
        number, unit = row[2].split()
        return float(number) * {"kB": 1e3, "MB": 1e6}[unit]

    every, first = counted(rows[2]), counted(rows[3])
    assert first < every


def test_figures_are_pictures(work: Reproduction) -> None:
    for path, panels in ((figure_2(work), 2), (figure_3(work), 2)):
        text = path.with_suffix(".md").read_text()
        assert f"({path.name})" in text
        assert "Conditions: pipeline" in text
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert pixels.shape[0] > 300
        assert pixels.shape[1] > 300 * panels
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def test_curves_are_those_of_the_logs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the legend says of a line's colour and style is what its log says."""
    from gim_stagewise.reproduce import figures

    drawn: list[Any] = []

    def noted(work: Reproduction, figure: Any, number: int, text: str) -> Path:
        drawn.append(figure)
        return save_figure(work, figure, number, text)

    save_figure = figures.save_figure
    monkeypatch.setattr(figures, "save_figure", noted)
    file = shorten(tiny, modules=2, batch=8, epochs=2, chunk=7, probe=False)
    work = Reproduction(file, tmp_path / "runs", tmp_path / "results", seeds=2, device="cpu")
    figure_3(work)
    (figure,) = drawn
    (legend,) = figure.legends
    names = {
        (line.get_color(), line.get_linestyle()): text.get_text()
        for line, text in zip(legend.get_lines(), legend.get_texts(), strict=True)
    }
    assert len(names) == 4
    assert [panel.get_title() for panel in figure.axes] == ["module 1", "module 2"]
    for module, panel in enumerate(figure.axes, start=1):
        found: dict[str, list[Any]] = {name: [] for name in names.values()}
        for line in panel.get_lines():
            found[names[line.get_color(), line.get_linestyle()]].append(line.get_xydata().tolist())
        for mode, kind in product(("iterative", "simultaneous"), ("train", "validation")):
            folders = [work.pipeline(mode, number).workspace.folder for number in (0, 1)]
            logs = [read_metrics(f / "logs" / f"m{module}" / "metrics.jsonl") for f in folders]
            name = f"{kind}_loss"
            curves = [[[line["epoch"], line[name]] for line in log if name in line] for log in logs]
            assert [len(curve) for curve in curves] == [2, 2]
            assert found[f"{mode}, {kind}"] == curves
    # Of module 1 both are the same, so that it could not tell one mode from the other.
    assert found["iterative, train"] != found["simultaneous, train"]


Batches = Iterator[tuple[list[str], NDArray[np.float32]]]


def assert_as_searched(found: list[Neuron], batches: Batches) -> None:
    """All channels, and of each what a search through everything at once finds."""
    each = list(batches)
    ids = [item_id for own, _ in each for item_id in own]
    values = np.concatenate([embeddings for _, embeddings in each])
    samples, _, columns, channels = values.shape
    assert sorted(neuron.channel for neuron in found) == list(range(channels))
    for neuron in found:
        own = values[..., neuron.channel].astype(float)
        by_sample = own.reshape(samples, -1)
        order = np.argsort(-by_sample.max(1), kind="stable")[:4]
        places = [(ids[n], *map(int, divmod(int(by_sample[n].argmax()), columns))) for n in order]
        assert neuron.patches == places
        above = (by_sample.max(1)[order].mean() - own.mean()) / own.std()
        assert neuron.selectivity == pytest.approx(above)


def test_the_most_exciting_patches_are_those_of_a_search() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(size=(23, 3, 4, 6)).astype(np.float32)
    values[7, 1, 2, 4] = 9.0  # the most selective channel
    ids = [f"sample-{number}" for number in range(23)]

    def batches() -> Batches:
        for start in range(0, 23, 5):
            yield ids[start : start + 5], values[start : start + 5]

    found = most_exciting(batches(), patches=4, neurons=6)
    assert found[0].channel == 4
    assert found[0].patches[0] == ("sample-7", 1, 2)
    assert_as_searched(found, batches())


def test_a_search_holds_no_more_of_many_samples_than_of_few() -> None:
    def batches(count: int) -> Batches:
        draw = np.random.default_rng(0)
        for number in range(count):
            ids = [f"sample-{number}-{n}" for n in range(8)]
            yield ids, draw.normal(size=(8, 3, 4, 6)).astype(np.float32)

    peaks = {}
    for count in (1, 10, 1000):  # at first also what NumPy loads when it is needed
        tracemalloc.start()
        try:
            found = most_exciting(batches(count), patches=4, neurons=6)
            _, peaks[count] = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert_as_searched(found, batches(count))
    # A batch is 2.3 kB. Python's own tables vary by some kB; a number kept of each is 32 bytes.
    assert peaks[1000] - peaks[10] < 16 * 1000


def test_a_channel_that_shows_the_same_again_is_passed_over() -> None:
    values = np.random.default_rng(1).normal(size=(40, 2, 2, 5)).astype(np.float32)
    values[3:7, 0, 1, 2] = 30.0
    values[3:7, 0, 1, 4] = 20.0  # the same patches, less so
    ids = [str(number) for number in range(40)]
    found = most_exciting([(ids, values)], patches=4, neurons=4)
    assert found[0].channel == 2
    assert sorted(neuron.channel for neuron in found) == [0, 1, 2, 3]
    every = most_exciting([(ids, values)], patches=4, neurons=5)
    assert [neuron.channel for neuron in every][:2] == [2, 4]


def test_few_samples_and_silent_channels_are_taken_as_they_are() -> None:
    values = np.zeros((2, 2, 2, 3), np.float32)
    found = most_exciting([(["a", "b"], values)], patches=4, neurons=8)
    assert [neuron.selectivity for neuron in found] == [0.0] * 3
    assert [len(neuron.patches) for neuron in found] == [2, 2, 2]
    assert most_exciting([], patches=4, neurons=8) == []


def test_patches_are_shown_as_they_were(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With views of their own for training, and normalised pixels."""
    edit(tiny, "[patches]", "[augment]\nflip = 0.5\nmean = [0.4]\nstd = [0.2]\n\n[patches]")
    tiny.write_text(tiny.read_text().partition("[module.2]")[0])
    shown: list[NDArray[np.float32]] = []
    from gim_stagewise.reproduce import figures

    visible = figures._visible

    def noted(*arguments: Any) -> NDArray[np.float32]:
        shown.append(visible(*arguments))
        return shown[-1]

    monkeypatch.setattr(figures, "_visible", noted)
    figure_2(Reproduction(tiny, tmp_path / "runs", tmp_path / "results", device="cpu"))
    raw = np.concatenate([np.load(tmp_path / f"{n}.npy") for n in ("train", "test")]) / 255
    assert len(shown) == 4 * 6
    for patch in shown:
        windows = np.lib.stride_tricks.sliding_window_view(raw, (4, 4), (1, 2))
        distance = np.abs(windows - patch[..., 0]).max((-2, -1))
        assert distance.min() < 1e-6


def test_figure_2_needs_no_activations(tiny: Path, tmp_path: Path) -> None:
    """Where those of modules below are removed on the way, it is the same picture."""
    shorten(tiny, modules=3, batch=8, epochs=1, chunk=7, probe=False)
    edit(tiny, "seed = 3\n", 'seed = 3\nkeep = "all"\n')
    own = Reproduction(tiny, tmp_path / "runs", tmp_path / "results", device="cpu")
    pictures = []
    for keep, left in (("all", [1, 2, 3]), ("last-two", [2, 3])):
        edit(tiny, 'keep = "all"', f'keep = "{keep}"')
        with Image.open(figure_2(own)) as picture:
            pictures.append(np.asarray(picture))
        paths = {n: own.pipeline("iterative").workspace.cache_path(n) for n in (1, 2, 3)}
        assert [n for n in paths if (paths[n] / "activations").exists()] == left
    np.testing.assert_array_equal(pictures[0], pictures[1])


def test_the_command(work: Reproduction) -> None:
    done = gim_stage(
        "reproduce", "table1", "--pipeline", work.file, "--seeds", "2", "--dir", work.base, "-q"
    )
    assert done.returncode == 0, done.stderr
    assert "| Greedy InfoMax (GIM), iterative | 79.8 |" in done.stdout
    assert (work.base / "tiny-reproduced" / "table1.md").is_file()


def test_without_labels_nothing_can_be_compared(tiny: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        edit(tiny, f', labels = "{split}_labels.npy"', "")
    done = gim_stage("reproduce", "table1", "--pipeline", tiny, "--dir", tmp_path / "runs")
    assert "needs labels" in one_error(done, 2)


def test_what_cannot_be_drawn_is_said(tiny: Path, tmp_path: Path) -> None:
    edit(tiny, "splits.train", 'splits.unlabeled = { images = "train.npy" }\n#')
    edit(tiny, "splits.test", "#")
    edit(tiny, "[patches]", "[augment]\nflip = 0.5\n\n[patches]")
    tiny.write_text(tiny.read_text().partition("[module.2]")[0])
    with pytest.raises(DataError, match="there are none"):
        figure_2(Reproduction(tiny, tmp_path / "runs", tmp_path / "results", device="cpu"))


def test_what_no_mode_trains_is_probed_once(tiny: Path, tmp_path: Path) -> None:
    heard = Heard()
    own = Reproduction(tiny, tmp_path / "runs", tmp_path / "results", progress=heard)

    def probed(mode: str) -> tuple[list[str], ProbeScores]:
        heard.tasks.clear()
        (scores,) = own.run(mode).probes
        return [label for label in heard.tasks if label.startswith("probe")], scores

    everything = ["probe", "probe: random modules", "probe: pixels"]
    tasks, first = probed("iterative")
    assert tasks == everything
    tasks, second = probed("simultaneous")
    assert tasks == ["probe"]
    assert (second.random, second.baselines) == (first.random, first.baselines)
    (alone,) = replace(own, base=tmp_path / "alone").run("simultaneous").probes
    assert alone == second
    for file in own.base.glob("*/probe.json"):
        file.write_text(file.read_text().replace("0.", "0.9"))
    tasks, third = probed("supervised")
    assert tasks == everything
    assert (third.random, third.baselines) == (first.random, first.baselines)


class Interrupted(Heard):
    """Until the part of a probe that is called so."""

    def task(self, label: str, **numbers: Any) -> Any:
        if label == "probe: pixels":
            raise KeyboardInterrupt
        return super().task(label, **numbers)


def test_parts_of_a_probe_that_are_done_stay(tiny: Path, tmp_path: Path) -> None:
    own = Reproduction(tiny, tmp_path / "runs", tmp_path / "results")
    with pytest.raises(KeyboardInterrupt):
        replace(own, progress=Interrupted()).run("random")
    heard = Heard()
    found = replace(own, progress=heard).run("random").probes
    assert heard.tasks == ["probe: pixels"]
    assert found[0].trained == found[0].random
    assert replace(own, base=tmp_path / "again").run("random").probes == found


def test_what_one_mode_cannot_have_is_said_before_any_is_trained(
    tiny: Path, tmp_path: Path
) -> None:
    edit(tiny, "[module.2]", "[module.2]\ntrain.max_epochs = 2")
    heard = Heard()
    own = Reproduction(tiny, tmp_path / "runs", tmp_path / "results", progress=heard)
    with pytest.raises(ConfigError, match=r"module\.2\.train\.max_epochs"):
        table_1(own)
    assert heard.tasks == []


@pytest.mark.parametrize("make", [table_1, figure_3])
def test_what_caches_cannot_have_is_said_before_other_modes_are_trained(
    tiny: Path, tmp_path: Path, make: Callable[[Reproduction], Path]
) -> None:
    edit(tiny, "[train]", '[train]\nshuffle_window = "1kB"')
    heard = Heard()
    own = Reproduction(tiny, tmp_path / "runs", tmp_path / "results", progress=heard)
    with pytest.raises(ConfigError, match=r"shuffle_window"):
        make(own)
    assert heard.tasks == []


def test_a_step_that_cannot_be_counted_is_measured(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "looking_nets.py").write_text(LOOKS_AT_VALUES)
    text = tiny.read_text().partition("[module.1]")[0]
    tiny.write_text(f'{text}[module.1]\nbuild = "looking_nets:Own"\n')
    found = table_2(Reproduction(tiny, tmp_path / "runs", tmp_path / "results", device="cpu"))
    row = r"\| GIM, 1st module \| 2.5 \| cannot be counted \| [\d.]+ [kM]B \|"
    assert re.search(row, found.read_text())


def test_a_step_that_is_over_the_budget_is_not_measured(work: Reproduction) -> None:
    small = replace(work, budget=Budget(device=1000), target=work.target / "small")
    assert table_2(small).read_text().count("does not fit here") >= 4


def test_what_fits_is_in_the_table_without_what_does_not(work: Reproduction) -> None:
    heard = Heard()
    small = replace(work, base=work.base / "small", target=work.target / "little", seeds=1)
    small.run("iterative")
    small = replace(small, budget=Budget(device=1000), progress=heard)
    text = table_1(small).read_text()
    lines = {columns(line)[0]: columns(line)[2:] for line in text.splitlines() if "|" in line}
    names = {mode: name for name, mode, _ in TABLE_1 if mode is not None}
    for mode in ("cpc", "simultaneous", "supervised", "greedy_supervised"):
        assert lines[names[mode]] == ["does not fit"] * 2
    assert all(float(cell) > 0 for mode in ("iterative", "random") for cell in lines[names[mode]])
    assert not [label for label in heard.tasks if label.endswith(": train")]
    with pytest.raises(OverBudgetError):
        replace(small, base=work.base / "smaller").runs("iterative")


def test_seeds_have_folders_of_their_own(work: Reproduction) -> None:
    places = {
        work.pipeline(mode, number).workspace.folder.name
        for mode in ("iterative", "cpc")
        for number in (0, 1)
    }
    assert places == {"tiny", "tiny-seed4", "tiny-cpc", "tiny-cpc-seed4"}
    own = Pipeline.from_file(work.file, device="cpu", mode="cpc")
    assert own.workspace.folder == Path("cache/tiny-cpc")
