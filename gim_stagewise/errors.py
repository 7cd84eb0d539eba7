"""Every error a user can meet, and the exit code each ends with.

An error is a domain type and a builtin at once, so that ``except FileNotFoundError``
works as well as ``except GimStageError``. Its message says what is wrong, which value,
and what to do.

Exit codes: 0 done, 1 a defect of ours, 2 bad input or configuration, 3 over budget,
4 storage failed, 130 interrupted.
"""

from __future__ import annotations


class GimStageError(Exception):
    """Base of all errors that are the user's to mend."""

    exit_code = 2


class ConfigError(GimStageError, ValueError):
    """A pipeline file or a command-line value cannot be used as it is."""

    def __init__(self, problem: str, *, key: str | None = None, file: str | None = None) -> None:
        self.problem = problem
        self.key = key
        self.file = file
        super().__init__(": ".join(part for part in (file, key, problem) if part))

    def in_file(self, file: str) -> ConfigError:
        """The same error, naming ``file`` where no file was named yet."""
        return type(self)(self.problem, key=self.key, file=self.file or file)


class ModuleRefusedError(ConfigError):
    """A module breaks a rule of gradient-isolated, cacheable modules."""


class DataNotFoundError(GimStageError, FileNotFoundError):
    """A dataset is not where the pipeline file says it is.

    ``item`` is the id of the sample that it is about, if it is about one.
    """

    def __init__(self, message: str, *, item: str | None = None) -> None:
        super().__init__(message)
        self.item = item


class DataError(GimStageError, ValueError):
    """A dataset was found but cannot be used (wrong shape, non-finite values, ...).

    ``item`` is the id of the sample that it is about, if it is about one.
    """

    def __init__(self, message: str, *, item: str | None = None) -> None:
        super().__init__(message)
        self.item = item


class CacheNotFoundError(GimStageError, FileNotFoundError):
    """No cache, or no frozen module, at the given path."""


class PartialCacheError(GimStageError, RuntimeError):
    """A cache was begun but never sealed."""


class StaleCacheError(GimStageError, RuntimeError):
    """A cache or a frozen module belongs to other settings, weights or data."""


class CorruptCacheError(GimStageError, RuntimeError):
    """Stored bytes are not what was written."""


class FolderInUseError(GimStageError, RuntimeError):
    """Another run is working in the same folder."""


class WorkersLostError(GimStageError, RuntimeError):
    """The workers of a cluster are gone, or cannot do the work."""

    exit_code = 4


class OverBudgetError(GimStageError, MemoryError):
    """What is asked for needs more memory or disk than is allowed.

    ``needed`` is what it takes, in bytes.
    """

    exit_code = 3

    def __init__(self, message: str, *, needed: int = 0) -> None:
        self.needed = needed
        super().__init__(message)


class PrecisionLossError(GimStageError, ValueError):
    """Values cannot be stored in the precision asked for, or not as exactly as is asked for."""


class NonFiniteError(GimStageError, ArithmeticError):
    """NaN or infinity turned up in training or in activations."""


class StorageError(GimStageError, OSError):
    """The disk refused to read or write."""

    exit_code = 4
