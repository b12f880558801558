"""Batches drawn while the one before is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from subquad.tasks.base import EVAL_SEEDS

Drawn = TypeVar("Drawn")


class Ahead(Iterator[Drawn], Generic[Drawn]):
    """``draw`` of one seed after the other, from that of update ``step`` on, without end.

    The seeds depend on ``seed`` and the update alone, so that a run that was stopped goes on with
    the same batches. Runs of different seeds read different stretches of the same line of seeds.
    """

    def __init__(self, draw: Callable[[int], Drawn], seed: int, step: int) -> None:
        self._draw, self._seed, self._step = draw, seed, step
        self._pool = ThreadPoolExecutor(1)
        self._next = self._submit()

    def _submit(self) -> Future[Drawn]:
        return self._pool.submit(self._draw, (self._seed * 100_003 + self._step) % EVAL_SEEDS)

    def __next__(self) -> Drawn:
        drawn = self._next.result()
        self._step += 1
        self._next = self._submit()
        return drawn

    def __enter__(self) -> Ahead[Drawn]:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
