"""Effective request capacity: figures 1 and 8, and the share of prefill nodes, figure 15 (FAST '25)."""

from collections.abc import Sequence

from perigee.plots.page import Section, Table
from perigee.plots.svg import COLORS, DASHES, Line, Plot
from perigee.replay.paper.clusters import NUM_NODES, VLLM, mooncake
from perigee.replay.paper.entry import Entry, entry
from perigee.replay.paper.experiments import Experiment
from perigee.replay.paper.lab import Lab, Trial
from perigee.replay.paper.tables import of_entries

TTFT_S = 30.0
TBT_MS = (100, 200, 300)
OURS = Trial(mooncake())
THEIRS = {name: Trial(cluster) for name, cluster in VLLM.items()}
SPLITS = {prefill: Trial(mooncake(prefill, NUM_NODES - prefill), speed=1.5) for prefill in range(5, 12)}

_GAIN = (
    "The baselines are better here than in the paper: their steps cost what the roofline says, without the overhead of "
    "an engine of 2024, so a prompt stalls fewer gaps between tokens. At 1.5 and 2 times the trace's speed they fall "
    "further behind eleven prefill and five decode nodes (table below)."
)
SPEEDS = (1.5, 2.0)
FASTER = {speed: Trial(mooncake(11, 5), speed) for speed in SPEEDS}
FASTER_THEIRS = {(name, speed): Trial(cluster, speed) for name, cluster in VLLM.items() for speed in SPEEDS}


def capacity() -> Experiment:
    trials = [OURS, *THEIRS.values(), *FASTER.values(), *FASTER_THEIRS.values()]
    return Experiment("effective request capacity", trials, _gains, _capacity_section)


def split() -> Experiment:
    return Experiment("prefill and decode nodes", list(SPLITS.values()), _best_split, _split_section)


def _gains(lab: Lab) -> list[Entry]:
    """Over plain vLLM, as figure 1 has it, and over the best baseline."""
    entries = []
    for tbt_ms in TBT_MS:
        ours = lab[OURS].capacity(TTFT_S, tbt_ms / 1000)
        theirs = {name: lab[trial].capacity(TTFT_S, tbt_ms / 1000) for name, trial in THEIRS.items()}
        what = f"effective request capacity, TTFT ≤ {TTFT_S:g} s and TBT ≤ {tbt_ms} ms"
        entries.append(
            entry(f"fig1.gain.{tbt_ms}ms", f"{what}: gain over vLLM", "%", _gain(ours, theirs["vllm"]), _GAIN)
        )
        best = _gain(ours, max(theirs.values()))
        entries.append(entry(f"fig1.gain_over_best.{tbt_ms}ms", f"{what}: gain over the best baseline", "%", best))
        entries.append(entry(f"fig1.capacity.{tbt_ms}ms", what, "of all requests", ours))
    compute_s = lab[OURS].prefill_s()
    for name, trial in THEIRS.items():
        what = f"time that {trial.cluster.name} computes prompts, over Mooncake's"
        entries.append(entry(f"fig8.{name}", what, "×", lab[trial].prefill_s() / compute_s))
    return entries


def _gain(ours: float, theirs: float) -> float:
    return 100 * (ours / theirs - 1) if theirs else float("inf")


def _best_split(lab: Lab) -> list[Entry]:
    best = max(SPLITS, key=lambda prefill: lab[SPLITS[prefill]].capacity(TTFT_S, 0.1))
    what = f"prefill nodes of {NUM_NODES} with the greatest effective request capacity, TBT ≤ 100 ms"
    return [entry("fig15.best_prefill_nodes", what, "nodes", float(best))]


def _capacity_section(lab: Lab, entries: Sequence[Entry]) -> Section:
    systems = {"Mooncake": OURS, **{trial.cluster.name: trial for trial in THEIRS.values()}}
    plot = Plot(
        "Effective request capacity",
        "TBT threshold, ms",
        "share of all requests",
        [_curve(lab, index, *each) for index, each in enumerate(systems.items())],
        from_zero=True,
    )
    rows = [
        [f"{speed:g}×", *(f"{100 * lab[trial].capacity(TTFT_S, 0.1):.1f}%" for trial in _at(speed))] for speed in SPEEDS
    ]
    faster = Table(["speed, TBT ≤ 100 ms", "Mooncake 11P+5D", *(trial.cluster.name for trial in THEIRS.values())], rows)
    text = "16 nodes each. Of all requests of the conversation trace, the share that meets both bounds."
    return Section("Figures 1 and 8: effective request capacity", text, [of_entries(entries), faster], [plot])


def _at(speed: float) -> list[Trial]:
    return [FASTER[speed], *(FASTER_THEIRS[name, speed] for name in VLLM)]


def _curve(lab: Lab, index: int, name: str, trial: Trial) -> Line:
    points = [(ms, lab[trial].capacity(TTFT_S, ms / 1000)) for ms in range(10, 410, 10)]
    return Line(name, COLORS[index], points, DASHES[index])


def _split_section(lab: Lab, entries: Sequence[Entry]) -> Section:
    rows = []
    for prefill, trial in SPLITS.items():
        report = lab[trial].report(TTFT_S, 0.1)
        ttft_s, tbt_s = report.ttft_s.mean or 0.0, report.tbt_s.mean or 0.0
        rows.append(
            [
                f"{prefill}P+{NUM_NODES - prefill}D",
                f"{report.goodput_ratio:.1%}",
                f"{ttft_s:.2f} s",
                f"{1000 * tbt_s:.1f} ms",
            ]
        )
    table = Table(["nodes", "capacity", "mean TTFT", "mean TBT"], rows)
    text = "At 1.5 times the trace's speed. Of splits that are equally good the one with fewer prefill nodes counts."
    return Section("Figure 15: prefill and decode nodes", text, [of_entries(entries), table])
