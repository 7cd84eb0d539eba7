"""Count the bytes of tensors while something runs.

Every tensor storage is followed from its creation to its end. On fake tensors (shapes and types
without data) nothing is allocated, so a step that would need gigabytes is counted in no memory.
What no count can see is the scratch memory inside an operation; see `gim_stagewise.memory.peak`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts live storages of the tensors that operations return while it is entered.

    Attributes
    ----------
    live : Counter
        Bytes now, by category.
    peak : int
        The most bytes at any moment, in all categories together.
    at_peak : dict
        Bytes by category at that moment.
    """

    def __init__(self, default: str = "activations") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: Counter[str] = Counter()
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self._default = default
        self._found: dict[int, tuple[weakref.ref[Any], str, int]] = {}

    def label(self, category: str, tensors: Iterable[Tensor | None]) -> None:
        """Count these tensors' storages under ``category`` from now on."""
        for tensor in tensors:
            if tensor is not None:
                self._follow(tensor, category)

    def restart(self) -> None:
        """Forget the peak; what is live stays counted."""
        self.peak = 0
        self._note_peak()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf, None)
        self._note_peak()
        return result

    def _follow(self, tensor: Tensor, category: str | None) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._found.get(key)
        if known is not None:
            reference, before, size = known
            if category is not None and category != before:
                self.live[before] -= size
                self.live[category] += size
                self._found[key] = (reference, category, size)
            return
        size = storage.nbytes()
        chosen = category or self._default
        self._found[key] = (weakref.ref(storage, lambda _: self._forget(key)), chosen, size)
        self.live[chosen] += size

    def _forget(self, key: int) -> None:
        _, category, size = self._found.pop(key)
        self.live[category] -= size

    def _note_peak(self) -> None:
        total = self.live.total()
        if total > self.peak:
            self.peak = total
            self.at_peak = dict(self.live)


def make_fake(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Replace a module's parameters and buffers by fake ones, in place; tied ones stay tied."""
    faked: dict[int, Any] = {}
    for part in module.modules():
        tables: tuple[Mapping[str, Tensor | None], ...] = (part._parameters, part._buffers)
        for table in tables:
            for name, tensor in list(table.items()):
                if tensor is None:
                    continue
                if id(tensor) not in faked:
                    fake = mode.from_tensor(tensor.detach())
                    is_parameter = isinstance(tensor, nn.Parameter)
                    faked[id(tensor)] = (
                        nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                    )
                table[name] = faked[id(tensor)]  # type: ignore[index]
    return module
