"""The plots of a run: latencies, load and throughput over time, hits by tier."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from perigee.plots.svg import COLORS, DASHES, Line, Plot
from perigee.replay.metrics import CachedByTier, Outcome, RequestRecord
from perigee.replay.series import Sample, columns

_POINTS = 400  # of a curve, at the most: more do not show
_RATE_WINDOW_S = 30.0

# Title, unit, and the series that it shows with what each is called.
_SERIES = (
    ("Requests", "requests", {"in_flight": "in flight", "decoding": "on decode workers"}),
    ("Prompt tokens that wait", "tokens", {"queued_tokens": "not computed yet"}),
    ("Work that waits for a prefill worker", "seconds", {"prefill_load_s": "mean of the prefill workers"}),
    ("Load of the decode workers", "share taken", {"decode_load": "mean of the decode workers"}),
)
_TOTALS = {"rejected": "rejected", "failed": "failed"}
_RATES = {"completed": "completed", "good": "good: completed within the SLO"}
_TIERS: dict[str, Callable[[CachedByTier], int]] = {
    "in memory": lambda cached: cached.dram,
    "on SSD": lambda cached: cached.ssd,
    "on another node": lambda cached: cached.remote,
}


def latencies(records: Sequence[RequestRecord]) -> Iterator[Plot]:
    """Of completed requests, a plot for each of TTFT and TBT that was measured."""
    done = [record for record in records if record.outcome is Outcome.COMPLETED]
    for name, values in (
        ("Time to first token", [record.ttft_s for record in done if record.ttft_s]),
        ("Time between tokens, the slowest tenth of each request", [record.tbt_s for record in done if record.tbt_s]),
    ):
        if values:
            lines = [Line("requests that took no longer", COLORS[0], _cumulative(values))]
            yield Plot(name, "seconds", "share of requests", lines, from_zero=True, logarithmic=True)


def over_time(samples: Sequence[Sample]) -> Iterator[Plot]:
    """A plot for each group of series that there is."""
    table = columns(samples)
    for title, unit, names in _SERIES:
        if known := {name: label for name, label in names.items() if table.get(name)}:
            yield _plot(title, unit, known, table["at_s"], table)
    if len(samples) > 1:
        rates = {name: _rates(table["at_s"], table[name]) for name in _RATES}
        yield _plot("Throughput and goodput", "requests/s", _RATES, table["at_s"], rates)
        if any(table[name][-1] for name in _TOTALS):
            yield _plot("Requests turned away or failed, in total", "requests", _TOTALS, table["at_s"], table)


def hits_over_time(records: Sequence[RequestRecord]) -> Iterator[Plot]:
    """The share of all prompt tokens of requests completed so far that came from each tier, where that is told."""
    told = [record for record in records if record.outcome is Outcome.COMPLETED and record.cached_by_tier]
    if not told:
        return
    told.sort(key=lambda record: record.ended_s)
    times_s = [record.ended_s for record in told]
    asked = list(accumulate(record.prompt_tokens for record in told))
    shares = {}
    for tier, tokens in _TIERS.items():
        found = accumulate(tokens(record.cached_by_tier) for record in told if record.cached_by_tier)
        shares[tier] = [part / max(1, whole) for part, whole in zip(found, asked, strict=True)]
    labels = {tier: tier for tier in _TIERS}
    yield _plot("Prompt tokens from the cache, so far", "share of prompt tokens", labels, times_s, shares)


def _plot(
    title: str, unit: str, labels: dict[str, str], times_s: Sequence[float], table: dict[str, list[float]]
) -> Plot:
    lines = [
        Line(label, COLORS[index], _thinned(list(zip(times_s, table[name], strict=True))), DASHES[index])
        for index, (name, label) in enumerate(labels.items())
    ]
    return Plot(title, "seconds since the start", unit, lines, from_zero=True)


def _cumulative(values: Sequence[float]) -> list[tuple[float, float]]:
    ordered = sorted(values)
    return [(value, (index + 1) / len(ordered)) for index, value in _thinned(list(enumerate(ordered)))]


def _rates(times_s: Sequence[float], totals: Sequence[float]) -> list[float]:
    """Per second, over the window that ends at each time, or what there is of it."""
    rates = []
    for at_s, total in zip(times_s, totals, strict=True):
        first = max(0, bisect_right(times_s, at_s - _RATE_WINDOW_S) - 1)
        rates.append((total - totals[first]) / max(at_s - times_s[first], 1e-9))
    return rates


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_POINTS` of them, the first and the last among these."""
    if len(points) <= _POINTS:
        return points
    step = (len(points) - 1) / (_POINTS - 1)
    return [points[round(index * step)] for index in range(_POINTS)]
