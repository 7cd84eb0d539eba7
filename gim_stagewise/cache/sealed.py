"""What all sealed caches are alike in, whatever their layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.cache.columns import (
    label_names,
    metadata_problem,
    read_checksums,
    read_label_values,
    read_numbers,
    read_strings,
)
from gim_stagewise.cache.digests import Digest, files_digest
from gim_stagewise.cache.features import Pooling
from gim_stagewise.cache.frames import FrameError, read_chunk_file
from gim_stagewise.cache.manifest import Manifest, read_manifest
from gim_stagewise.cache.precision import Precision
from gim_stagewise.errors import CorruptCacheError, DataError, PartialCacheError
from gim_stagewise.sources import SPLITS, Split, labels_of


class SealedCache:
    """A cache that is complete: its identity, ids, splits and labels.

    Parameters
    ----------
    path : Path
    verify : bool
        Whether every chunk is compared with its checksum before it is used.

    Raises
    ------
    CacheNotFoundError
        If there is none.
    PartialCacheError
        If it was never sealed.
    CorruptCacheError
        If its metadata is damaged.
    """

    def __init__(self, path: str | Path, *, verify: bool = True) -> None:
        self.path = Path(path)
        self._verify = verify
        self._sums: dict[str, NDArray[np.uint32]] = {}
        self.manifest: Manifest = read_manifest(self.path)
        if not self.manifest.sealed:
            raise PartialCacheError(
                f"{self.path} was begun but never finished; `gim-stage run` or `gim-stage extract` "
                "goes on where it stopped"
            )
        self._check_files()
        if problem := metadata_problem(self.path, self.manifest):
            raise CorruptCacheError(self._damage(*problem.split(" ", 1)))

    def __repr__(self) -> str:
        stored = self.manifest.precision.name if self.materialized else "embeddings alone"
        return (
            f"{type(self).__name__}({str(self.path)!r}, module {self.manifest.module}, "
            f"{self._shape}, {stored}, sealed)"
        )

    @property
    def _shape(self) -> str:
        """Axes and their lengths, in a few words."""
        raise NotImplementedError

    def _check_files(self) -> None:
        """Compare all files but the chunks, which are small, with what was sealed."""
        for name, digest in self.manifest.files.items():
            try:
                found = files_digest(self.path, [name])
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise CorruptCacheError(self._damage(name, "is missing")) from None
            if found != digest:
                raise CorruptCacheError(self._damage(name, "was altered or damaged"))

    @cached_property
    def ids(self) -> Sequence[str]:
        """Ids of all samples, in storage order."""
        with self._naming("ids"):
            return read_strings(self.path / "ids", self.manifest.layout.samples)

    def split(self, name: Split) -> Sequence[str]:
        """Ids of the samples of a split, in storage order; none if the dataset has no such split.

        Parameters
        ----------
        name : str
            "unlabeled", "train" or "test"; splits may share samples.

        Raises
        ------
        DataError
            If there is no split of that name.
        CorruptCacheError
            If splits or ids are damaged.
        """
        if name not in SPLITS:
            raise DataError(f"no split {name!r}; there are: {', '.join(SPLITS)}")
        mask = self._small_array("splits", "uint8")
        return list(compress(self.ids, mask & (1 << SPLITS.index(name))))

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the kinds of labels, such as "class"; empty if samples have none."""
        return label_names(self.manifest)

    def labels(self, name: str) -> NDArray[np.int64]:
        """Labels of all samples in the order of `ids`: int64 [sample], -1 where there is none.

        Parameters
        ----------
        name : str
            One of `label_names`.

        Raises
        ------
        DataError
            If there are no labels of that name.
        CorruptCacheError
            If they are damaged.
        """
        if name not in self.label_names:
            raise DataError(
                f"no labels called {name!r} in {self.path}; there are: {self.label_names}"
            )
        return self._small_array(f"labels/{name}", "int64")

    def label_values(self, name: str) -> tuple[str, ...]:
        """What labels of that name mean, such as names of classes or speakers, from 0 on.

        Empty where the dataset does not say.

        Raises
        ------
        CorruptCacheError
            If they are damaged.
        """
        if name not in self.label_names:
            return ()
        with self._naming(f"labels/{name}"):
            return read_label_values(self.path, name)

    def features(
        self, split: Split, *, labels: str | None = None, pooling: Pooling = "mean"
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Features and labels of a split, as scikit-learn takes them: those of the linear probe.

        Embeddings of view 0, of the patches in the middle if modules were trained on those alone
        (``augment.grid_crop``). Samples without a label are left out.

        Parameters
        ----------
        split : str
            "unlabeled", "train" or "test".
        labels : str, optional
            The kind of labels; by default the first of `label_names`.
        pooling : "mean" or "all"
            Means over a sample, or all embeddings of its grid side by side (``probe.pooling``).

        Returns
        -------
        (array, array)
            Features, float32 [sample, channel], or [sample, grid_row · grid_col · channel] of
            "all"; labels, int64 [sample]. In storage order.

        Raises
        ------
        DataError
            If there are no such labels, none in that split, or items have no grid of one size.
        CorruptCacheError
            If something is missing or damaged.
        """
        if pooling not in ("mean", "all"):
            raise DataError(f'no pooling {pooling!r}; there are "mean" and "all"')
        if not self.label_names:
            raise DataError(f"{self.path} has no labels; read_pooled gives embeddings alone")
        chosen = labels_of(self, split, labels)
        if not chosen:
            raise DataError(
                f"no sample of split {split!r} in {self.path} has a "
                f"{labels or self.label_names[0]!r}; read_pooled gives embeddings alone"
            )
        return self._features(list(chosen), pooling), np.array(list(chosen.values()), np.int64)

    def _features(self, ids: Sequence[str], pooling: Pooling) -> NDArray[np.float32]:
        raise NotImplementedError

    @property
    def materialized(self) -> bool:
        """Whether activations are stored, and not embeddings alone."""
        return self.manifest.layout.materialized

    @property
    def precision(self) -> Precision:
        """The form in which activations are stored."""
        return self.manifest.precision

    def require_activations(self) -> None:
        """Refuse a cache of embeddings alone.

        Raises
        ------
        DataError, StaleCacheError
        """
        if not self.materialized:
            raise DataError(
                f'{self.path} stores embeddings alone (cache.materialize = "never", or keep); '
                "`gim-stage run` of its pipeline computes activations where they are needed"
            )

    def content_digest(self) -> str:
        # Activations are the same whatever lossless codec they went through, or were pooled to.
        unread = {"numerics.codec", "geometry.pool"}
        parts = self.manifest.content.parts
        return Digest({k: v for k, v in parts.items() if k not in unread}).value

    def _read_file(self, kind: str, block: int, number: int, file: str) -> NDArray[Any]:
        """A chunk, until this thread reads another one.

        Parameters
        ----------
        kind : str
            "activations" or "pooled".
        block : int
            Index of the block that it belongs to.
        number : int
            Which of the block's files of that kind it is.
        file : str
            Its path in the group.
        """
        layout = self.manifest.layout
        # Its own checksum says that it is whole, the sealed one that it belongs here.
        known = self._verify and f"checksums/{kind}/c.0.0" in self.manifest.files
        try:
            sealed = self._chunk_sums(kind)[block, number] if known else None
        except IndexError:
            raise CorruptCacheError(
                self._damage(f"checksums/{kind}", "is of fewer blocks or files than there are")
            ) from None
        try:
            return read_chunk_file(self.path, layout, file, verify=self._verify, sealed=sealed)
        except FileNotFoundError:
            # Zarr reads an absent chunk as the fill value; here it is a loss.
            raise CorruptCacheError(self._damage(file, "is missing")) from None
        except (FrameError, RuntimeError) as error:
            raise CorruptCacheError(self._damage(file, str(error))) from None

    def _chunk_sums(self, kind: str) -> NDArray[np.uint32]:
        """CRC-32C of all chunk files of a kind, as they were sealed: [block, file]."""
        if kind not in self._sums:
            with self._naming(f"checksums/{kind}"):
                _, sums = read_checksums(self.path, kind)
                file = f"checksums/{kind}/c.0.0"
                if files_digest(self.path, [file]) != self.manifest.files[file]:
                    raise ValueError("is not what was sealed")
                self._sums[kind] = sums
        return self._sums[kind]

    def _small_array(self, name: str, dtype: str) -> NDArray[Any]:
        """An array with an entry per sample."""
        _ = self.ids  # they confirm how many samples there are
        with self._naming(name):
            return read_numbers(self.path / name, (self.manifest.layout.samples,), dtype)

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise CorruptCacheError(self._damage(name, "is missing")) from None
        except ValueError as error:
            raise CorruptCacheError(self._damage(name, str(error))) from None

    def _damage(self, where: str, what: str) -> str:
        return (
            f"cache {self.path}: {where} {what}; `gim-stage verify {self.path} --repair` looks for "
            "more of that and computes it again"
        )
