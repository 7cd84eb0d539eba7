"""Whatever is done in whatever order, a cache that can be read is the right one."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_tiny
from helpers import edit, weights_of
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from numpy.typing import NDArray

from gim_stagewise import durable
from gim_stagewise.cache import Cache
from gim_stagewise.errors import CacheNotFoundError, CorruptCacheError, GimStageError
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.progress import Silent
from gim_stagewise.report.record import save_record
from gim_stagewise.sources import Request
from gim_stagewise.verify import mend, verify

# Texts of the pipeline: as it is, with another module 2, and with another module 1.
VARIANTS = [
    {},
    {"options = { channels = 8, stride = 2 }": "options = { channels = 7, stride = 2 }"},
    {"options = { stem = 4, channels = 6 }": "options = { stem = 5, channels = 6 }"},
]

Arrays = dict[str, NDArray[Any]]
_place = Path(tempfile.mkdtemp(prefix="gim-stage-anything-"))
_references: dict[str, Arrays] = {}


@pytest.fixture(scope="module", autouse=True)
def removed_at_the_end() -> Any:
    yield
    shutil.rmtree(_place, ignore_errors=True)


def pipeline_file(variant: int) -> Path:
    folder = _place / f"variant{variant}"
    if not folder.exists():
        folder.mkdir(parents=True)
        file = write_tiny(folder)
        file.write_text(file.read_text().partition("[module.3]")[0])
        for old, new in {
            "batch = 8\n": "batch = 18\n",
            "max_epochs = 3": "max_epochs = 1",
            "chunk = 7": "chunk = 20",
            **VARIANTS[variant],
        }.items():
            edit(file, old, new)
    return folder / "tiny.toml"


def run(variant: int, folder: Path) -> None:
    pipeline = Pipeline.from_file(pipeline_file(variant), folder=folder, device="cpu")
    save_record(pipeline, pipeline.run())


def read(path: Path) -> tuple[str, Arrays]:
    """Content digest and all values of a cache."""
    cache = Cache(path)
    ids = list(cache.ids)
    return cache.manifest.content.value, {
        "ids": np.array(ids),
        "activations": np.stack(cache.read([Request(item_id) for item_id in ids])),
        "pooled": cache.read_pooled(ids),
        "labels": cache.labels("class"),
    }


def reference(content: str) -> Arrays:
    """What a cache of that content holds, by runs that nothing happened to."""
    if not _references:
        for variant in range(len(VARIANTS)):
            folder = _place / f"reference{variant}"
            run(variant, folder)
            for index in (1, 2):
                digest, arrays = read(folder / f"m{index}.zarr")
                _references[digest] = arrays
    return _references[content]


class PowerCutError(BaseException):
    """Nobody catches it."""


class Folder(RuleBasedStateMachine):
    """A run's folder, and all that can happen to it."""

    @initialize()
    def begin(self) -> None:
        self.parent = Path(tempfile.mkdtemp(dir=_place))
        self.folder = self.parent / "run0"
        self.moves = 0
        self.variant = 0

    @rule()
    def run(self) -> None:
        # A damaged cache is not made again behind the user's back.
        with suppress(CorruptCacheError):
            run(self.variant, self.folder)
            self.check_against(self.variant)

    @rule(number=st.integers(0, 250))
    def kill(self, number: int) -> None:
        """What is on the disk at the n-th operation is what stays."""
        image = self.parent / "image"
        count = 0

        def die(when: str, name: str, path: Path) -> None:
            nonlocal count
            if count == number:
                shutil.copytree(self.folder, image, symlinks=True)
            count += 1
            if count > number:
                raise PowerCutError

        durable.observers.append(die)
        try:
            with suppress(PowerCutError, CorruptCacheError):
                run(self.variant, self.folder)
        finally:
            durable.observers.remove(die)
        if image.exists():
            shutil.rmtree(self.folder)
            image.rename(self.folder)

    @rule(variant=st.integers(0, len(VARIANTS) - 1))
    def edit(self, variant: int) -> None:
        self.variant = variant

    @precondition(lambda self: self.files())
    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        file = data.draw(st.sampled_from(self.files()))
        content = bytearray(file.read_bytes())
        if content:
            bit = data.draw(st.integers(0, 8 * len(content) - 1))
            content[bit // 8] ^= 1 << bit % 8
            file.write_bytes(content)

    @precondition(lambda self: self.files())
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(self.files()))
        for _ in range(data.draw(st.integers(0, 2))):
            path = path if path.parent == self.folder else path.parent
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    @precondition(lambda self: self.folder.exists())
    @rule()
    def move(self) -> None:
        self.moves += 1
        target = self.parent / f"run{self.moves}"
        self.folder.rename(target)
        self.folder = target

    @rule()
    def verify(self) -> None:
        with suppress(CacheNotFoundError):
            found = verify(self.folder, Silent())
            for index in (1, 2):
                path = self.folder / f"m{index}.zarr"
                assert not (path in found.checked and path in found.unfinished)
                whole = path in found.checked and not [
                    file for file, _, _ in found.problems if path in (file, *file.parents)
                ]
                if whole:
                    content, arrays = read(path)
                    assert_equal(arrays, reference(content))

    @rule()
    def repair(self) -> None:
        with suppress(CacheNotFoundError):
            for cache, damage in sorted(verify(self.folder, Silent()).damage.items()):
                with suppress(GimStageError):
                    mend(Pipeline.from_cache(cache, device="cpu"), cache, damage)
                    content, arrays = read(cache)
                    assert_equal(arrays, reference(content))

    @invariant()
    def what_can_be_read_is_right(self) -> None:
        for path in sorted(self.folder.glob("m*.zarr")):
            try:
                content, arrays = read(path)
            except GimStageError:
                continue
            assert_equal(arrays, reference(content))

    def teardown(self) -> None:
        """In the end it can always be made right: repaired where that is asked for, or anew."""
        if not hasattr(self, "folder"):
            return
        try:
            run(self.variant, self.folder)
        except CorruptCacheError:
            shutil.rmtree(self.folder)
            run(self.variant, self.folder)
        self.check_against(self.variant)
        shutil.rmtree(self.parent)

    def files(self) -> list[Path]:
        return sorted(file for file in self.folder.rglob("*") if file.is_file())

    def check_against(self, variant: int) -> None:
        """Weights are those of the variant, and each cache is, or says that it is damaged."""
        for index in (1, 2):
            with suppress(CorruptCacheError):
                content, arrays = read(self.folder / f"m{index}.zarr")
                assert_equal(arrays, reference(content))
                own = read(_place / f"reference{variant}" / f"m{index}.zarr")[0]
                assert content == own
        weights = weights_of(_place / f"reference{variant}")
        for name, tensor in weights_of(self.folder).items():
            assert (tensor == weights[name]).all()


def assert_equal(found: Arrays, expected: Arrays) -> None:
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        stateful_step_count=14,
        deadline=None,
        # The same every time; and what fails is long to make smaller, and clear enough as it is.
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


class LongerFolder(Folder):
    """The same, with more that happens."""


TestFolder = Folder.TestCase
TestFolder.settings = examples(4)
TestLongerFolder = pytest.mark.slow(LongerFolder.TestCase)
TestLongerFolder.settings = examples(20)
