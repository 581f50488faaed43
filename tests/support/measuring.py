"""One call measured beside others, in turns.

What else the machine does weighs on all of them alike, so ratios hold where times do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Peer(NamedTuple):
    """What a call is compared with.

    Attributes:
        call: it.
        aim: the ratio of our time to its that is aimed at, or None where it is shown for information.
        calls: how many things a run of it does; as many as ours where None.
        limit: nothing that does the same could be faster, so it is no competitor but a bound.
    """

    call: Callable[[], object]
    aim: float | None = None
    calls: int | None = None
    limit: bool = False


class Against:
    """Measures calls; the fixture ``against`` makes one.

    Args:
        benchmark: pytest-benchmark's own fixture. Its ``extra_info`` has what BENCHMARKS.md is made of.
        section: of BENCHMARKS.md.
        say: shows a line to whoever watches.
    """

    def __init__(self, benchmark: Any, section: str, say: Callable[[str], object]) -> None:
        self._benchmark, self._section, self._say = benchmark, section, say

    def __call__(
        self,
        what: str,
        ours: Callable[[], object],
        peers: dict[str, Peer],
        *,
        calls: int = 1,
        rounds: int,
        warm: int = 1,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """Measures a call beside its peers.

        Args:
            what: the call does, as a row of BENCHMARKS.md has it.
            ours: the call.
            peers: what it is compared with, by name.
            calls: how many things a run of ours does.
            rounds: how often each is run.
            warm: runs of each that do not count.
            before: is run before each run of ours, and not measured.
        """
        taken: dict[str, list[float]] = {name: [] for name in peers}

        def run_peers() -> None:
            for name, peer in peers.items():
                begun = time.perf_counter()
                peer.call()
                taken[name].append(time.perf_counter() - begun)
            before()

        self._benchmark.pedantic(ours, setup=run_peers, rounds=rounds, warmup_rounds=warm)
        if self._benchmark.stats is None:  # --benchmark-disable
            return
        found = {name: statistics.median(taken[name][warm:]) / (peer.calls or calls) for name, peer in peers.items()}
        self._keep(what, self._benchmark.stats.stats.median / calls, peers, found)

    def told(self, what: str, ours: str, run: Callable[[], dict[str, float]], peers: dict[str, Peer]) -> None:
        """Keeps what a program has measured itself, as the median of five runs.

        Args:
            what: as above.
            ours: the name of our time among those that it tells.
            run: runs it; returns times by name, in seconds.
            peers: the names of the others. Their calls are not called.
        """
        runs: list[dict[str, float]] = []
        self._benchmark.pedantic(lambda: runs.append(run()), rounds=5)
        times = {name: statistics.median(one[name] for one in runs) for name in runs[0]}
        self._keep(what, times[ours], peers, times)

    def _keep(self, what: str, mine: float, peers: dict[str, Peer], theirs: dict[str, float]) -> None:
        found = {
            name: {"seconds": theirs[name], "ratio": mine / theirs[name], "aim": peer.aim, "limit": peer.limit}
            for name, peer in peers.items()
        }
        self._benchmark.extra_info.update(section=self._section, what=what, seconds=mine, peers=found)
        said = [f"{name} {shown(peer['seconds'])}, ratio {peer['ratio']:.3g}" for name, peer in found.items()]
        self._say(f"\n{what}: {shown(mine)}; " + "; ".join(said))


def shown(seconds: float) -> str:
    """A time with three digits, in the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
