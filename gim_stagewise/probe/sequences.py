"""How good frozen features of recordings are: who speaks, and what (section 4.2).

A recording as a whole is classified by the mean of its embeddings over time, a step by its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.cache import mean_feature
from gim_stagewise.config import PipelineConfig
from gim_stagewise.labels import NO_LABEL
from gim_stagewise.memory import resident_bytes
from gim_stagewise.probe.classifier import Accuracy
from gim_stagewise.probe.probe import (
    BASELINES,
    RANDOM,
    TRAINED,
    Probes,
    Rows,
    probe_accuracy,
)
from gim_stagewise.probe.splits import (
    ProbeSplit,
    half_labelled,
    left_out_of_test,
    nothing_to_probe,
    of_known_labels,
    probe_splits,
)
from gim_stagewise.probe.step_classifier import Walk, of_known_step_labels, step_accuracies
from gim_stagewise.probe.walks import chain_walk, mfcc_walk, sample_rate
from gim_stagewise.sources import RegionSource, Source, StepLabelled, step_labelled
from gim_stagewise.stage.chain import fresh_chain
from gim_stagewise.stage.shape import Shape
from gim_stagewise.stage.workspace import Workspace

# Bytes of features that are kept in memory rather than read or computed for each epoch, at most;
# and what part of the memory that may be used.
MOST_KEPT, KEPT_PART = 4_000_000_000, 4
MFCC, MFCC_STATISTICS = "MFCC", "MFCC statistics"


@dataclass(frozen=True)
class RecordingProbe:
    """Classifiers of recordings by an encoder's features, and of steps where these have labels.

    Parameters
    ----------
    config : PipelineConfig
    splits : (ProbeSplit, ProbeSplit)
        Recordings to fit and to test, with their labels.
    stepped : StepLabelled or None
        Knows the labels of steps.
    most_kept : int
        Bytes of features that may be kept in memory.
    """

    config: PipelineConfig
    splits: tuple[ProbeSplit, ProbeSplit]
    stepped: StepLabelled | None
    most_kept: int

    @classmethod
    def of(cls, space: Workspace, source: Source) -> RecordingProbe | None:
        """The probe of a dataset; None if it has no labelled recordings."""
        splits = probe_splits(source)
        if splits is None:
            if why := half_labelled(source):
                space.progress.note(why)
            return None
        room = max(0, space.budget.host_bytes() - resident_bytes())
        most_kept = min(MOST_KEPT, room // KEPT_PART)
        return cls(space.config, splits, step_labelled(source), most_kept)

    def __call__(self, walk: Walk, steps_of: Sequence[int]) -> list[list[Accuracy | None]]:
        """Accuracies of each module's features: for labels of recordings, then of steps.

        ``steps_of`` are the modules, counted from 0, that have a feature for each label of a step.
        There are none of recordings where nothing can be learned of their labels.
        """
        kept = _kept(walk, self._ids, self.most_kept)
        whole: list[Accuracy | None] = [*self.of_recordings(kept)]
        if self.stepped is None:
            return [whole]
        found = self._of_steps(kept, steps_of, self.stepped)
        return [whole, [found.get(number) for number in range(len(whole))]]

    def of_recordings(self, walk: Walk, *, deviation: bool = False) -> Iterator[Accuracy | None]:
        """By the mean over time of each module's features, or their standard deviation too.

        None where nothing can be learned of their labels.
        """
        train, test = self.splits
        learnable = not nothing_to_probe(train, test, "", self.config)
        test = of_known_labels(train, test)
        pooled = [
            [mean_feature(own, deviation=deviation) for own in features]
            for features in walk([*train.ids, *test.ids])
        ]
        for own in zip(*pooled, strict=True):
            config = self.config
            yield (
                probe_accuracy(np.stack(own), train, test, config.probe, seed=config.seed)
                if learnable
                else None
            )

    def _of_steps(
        self, walk: Walk, modules: Sequence[int], source: StepLabelled
    ) -> dict[int, Accuracy]:
        if not modules:
            return {}
        train, test = (
            {item_id: source.step_labels(item_id).astype(np.int16) for item_id in split.ids}
            for split in self.splits
        )
        tested = of_known_step_labels(train, test)
        if not any((own != NO_LABEL).any() for own in tested.values()):
            return {}
        found = step_accuracies(
            lambda ids: ([own[number] for number in modules] for own in walk(ids)),
            train,
            tested,
            self.config.probe,
            seed=self.config.seed,
        )
        return dict(zip(modules, found, strict=True))

    @property
    def _ids(self) -> list[str]:
        train, test = self.splits
        return [*train.ids, *test.ids]


def probe_recordings(
    space: Workspace,
    source: RegionSource,
    shapes: Sequence[Shape],
    trained: Callable[[], Walk],
) -> Probes:
    """Trained modules, the same before training, and MFCC, for each kind of labels.

    Labels of recordings come first, then those of steps, where there are any. Modules whose
    embeddings lie closer together than labels of steps, or further apart, have no accuracy for
    those.

    Parameters
    ----------
    space : Workspace
    source : RegionSource
        The dataset.
    shapes : sequence of Shape
        Of the modules to probe, from module 1 on.
    trained : callable
        Gives the embeddings of the trained modules.
    """
    probe = RecordingProbe.of(space, source)
    if probe is None:
        return Probes([], {})
    name = source.label_names[0]
    if why := (
        nothing_to_probe(*probe.splits, name, space.config) or left_out_of_test(*probe.splits, name)
    ):
        space.progress.note(why)
    stepped, rate = probe.stepped, sample_rate(source)

    @cache
    def fitting() -> list[int]:
        return [] if stepped is None else modules_with_steps(space, shapes, stepped)

    def of_modules(what: str, walk: Callable[[], Walk]) -> list[Rows]:
        with space.progress.task(what, total=1, unit="encoder") as task:
            found = probe(walk(), fitting())
            task.advance()
        return [{str(n): own for n, own in enumerate(kind, start=1)} for kind in found]

    def random() -> Walk:
        chain = fresh_chain(space, [shape.cell_in[0] for shape in shapes])
        return chain_walk(chain, source, space)

    def mfcc() -> list[Rows]:
        with space.progress.task("probe: MFCC", total=1, unit="encoder") as task:
            walk = mfcc_walk(source, rate)
            found: list[Rows] = [{MFCC: accuracy} for (accuracy,) in probe(walk, [0])]
            (found[0][MFCC_STATISTICS],) = probe.of_recordings(walk, deviation=True)
            task.advance()
        return found

    parts = {
        TRAINED: lambda: of_modules("probe", trained),
        RANDOM: lambda: of_modules("probe: random modules", random),
    }
    names = [name, *([str(stepped.step_label_name)] if stepped else [])]
    return Probes(names, parts | ({BASELINES: mfcc} if rate else {}))


def modules_with_steps(
    space: Workspace, shapes: Sequence[Shape], source: StepLabelled
) -> list[int]:
    """Modules, counted from 0, of which there is a stored embedding for each label of a step."""
    found = []
    for number, stored in enumerate(stored_spacings(space.config, shapes)):
        if stored == source.step_label_hop:
            found.append(number)
        else:
            space.progress.note(
                f"module {number + 1}: its steps are not probed; it has an embedding every "
                f"{stored} samples, and labels come every {source.step_label_hop}: set "
                f"module.{number + 1}.cache.pool"
            )
    return found


def stored_spacings(config: PipelineConfig, shapes: Sequence[Shape]) -> list[int]:
    """Samples from one stored embedding of each module to the next."""
    found, spacing = [], 1
    for number, shape in enumerate(shapes, start=1):
        spacing *= math.prod(own.stride for own in shape.geometry)
        found.append(spacing * config.stored_pool(number))
    return found


def _kept(walk: Walk, ids: Sequence[str], most: int) -> Walk:
    """The same features, kept in memory where they are few enough."""
    kept: dict[str, Sequence[NDArray[np.float32]]] = {}
    size = 0
    for item_id, features in zip(ids, walk(ids), strict=True):
        size += sum(own.nbytes for own in features)
        if size > most:
            return walk
        kept[item_id] = features
    return lambda chosen: [kept[item_id] for item_id in chosen]
