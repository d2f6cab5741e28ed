"""Floating-point operations of a step: those of matrix products, convolutions and attention, forward and backward.

Counting takes a step about twice as long, so that it is done once for each kind of step, and not for its first ones: a
recovery, or a stage of a few steps, does not wait for it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

WARM = 8
"""The step of a kind that is counted, from 1."""


class Count(TorchDispatchMode):
    """Adds up what passes. Unlike ``torch.utils.flop_counter.FlopCounterMode`` it runs each operation as it came and
    decomposes none: the numbers that training computes stay the same, bit for bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        formula: Callable[..., int] | None = flop_registry.get(operation._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


class FlopMeter:
    """Adds up the operations of steps by their kind; what is recomputed for the backward pass counts again, as the
    hardware does it.

    ``total`` are the operations so far. Those of a kind's first steps are added when they are known.
    """

    def __init__(self) -> None:
        self.total = 0
        self._seen: Counter[Hashable] = Counter()
        self._known: dict[Hashable, int] = {}

    @contextlib.contextmanager
    def step(self, kind: Hashable) -> Iterator[None]:
        """Around the forward and backward passes of a step of that kind, on one rank."""
        self._seen[kind] += 1
        if kind in self._known:
            yield
            self.total += self._known[kind]
        elif self._seen[kind] < WARM:
            yield
        else:
            with Count() as count:
                yield
            self._known[kind] = count.total
            self.total += WARM * count.total
