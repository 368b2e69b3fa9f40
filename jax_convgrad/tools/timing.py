"""Interleaved timing: peers take turns within one run, so that they meet the same machine.

A shared machine's speed drifts by more than the differences to be measured. So every
round times each peer once, in an order that rotates, and the ratio of two peers is the
median of their ratios round by round.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from typing import Protocol

# One measured call of the fastest peer lasts at least this long, so that starting it weighs
# little. All peers have as many problems in a call: with fewer, what a call costs besides
# would count more often, and with more, its results would not stay in a cache.
CALL_US = 1_000.0
MIN_ROUNDS, MAX_ROUNDS = 3, 60


class Peer(Protocol):
    """Something that can be timed."""

    name: str

    def run(self, first: int, instances: int, calls: int) -> float:
        """Runs `calls` calls of `instances` problems each and waits for the last.

        Args:
            first: index into the pool of operands of the first problem; the others follow.
            instances: problems in one call, each with its own operands.
            calls: calls, issued without waiting in between.

        Returns:
            Microseconds per problem.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)


@dataclasses.dataclass(frozen=True)
class Timing:
    """One peer's microseconds per problem, in every round, and how they were measured."""

    samples_us: tuple[float, ...]
    instances: int
    calls: int

    @property
    def us(self) -> Spread:
        """Median and quartiles of the rounds."""
        return Spread.of(self.samples_us)

    def ratio_of(self, other: Timing) -> Spread:
        """How many times longer `other` takes, from the ratios within each round."""
        pairs = zip(self.samples_us, other.samples_us, strict=True)
        return Spread.of([theirs / ours for ours, theirs in pairs])


def _single_us(peer: Peer, instances: int) -> float:
    """Microseconds per problem, about. The first run may meet memory that nobody has touched."""
    return min(peer.run(0, instances, 1) for _ in range(2))


def measure(
    peers: Sequence[Peer], *, pool: int, batched: bool, row_seconds: float
) -> dict[str, Timing]:
    """Times peers in turns.

    Args:
        peers: at least one, warmed up by one call each.
        pool: number of operand sets that they cycle through.
        batched: every call takes the whole pool, and calls are issued back to back: for
            devices where issuing costs as much as a problem. Otherwise a call has as many
            problems as last `CALL_US` for the fastest peer.
        row_seconds: time to spend; a row of slow peers takes longer for `MIN_ROUNDS`.

    Returns:
        The timings by name.
    """
    instances = pool if batched else 1
    single_us = {peer.name: _single_us(peer, instances) for peer in peers}
    if not batched:
        instances = max(1, min(pool, math.ceil(CALL_US / min(single_us.values()))))
    plans: dict[str, tuple[int, int]] = {}
    for peer in peers:
        calls = math.ceil(CALL_US / (single_us[peer.name] * pool)) if batched else 1
        plans[peer.name] = instances, max(1, calls)
        peer.run(0, *plans[peer.name])  # compiles that many instances
    samples: dict[str, list[float]] = {peer.name: [] for peer in peers}
    cursors = dict.fromkeys(samples, 0)
    deadline = time.perf_counter() + row_seconds
    for round_ in range(MAX_ROUNDS):
        if round_ >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        turn = round_ % len(peers)
        for peer in (*peers[turn:], *peers[:turn]):
            instances, calls = plans[peer.name]
            samples[peer.name].append(peer.run(cursors[peer.name], instances, calls))
            cursors[peer.name] = (cursors[peer.name] + instances * calls) % pool
    return {name: Timing(tuple(values), *plans[name]) for name, values in samples.items()}
