"""Where prompts are computed: figure 5, and what the network has to do with it, figure 13 (FAST '25)."""

from collections.abc import Sequence

from perigee.plots.page import Section
from perigee.replay.paper.clusters import mooncake
from perigee.replay.paper.entry import Entry, entry
from perigee.replay.paper.experiments import Experiment
from perigee.replay.paper.lab import Lab, Result, Trial
from perigee.replay.paper.tables import of_entries

SCHEDULERS = {
    "global_cache_aware": "global-cache",
    "local_cache_aware": "local-cache",
    "load_balancing": "least-loaded",
    "random": "random",
}
_FASTER = (
    "All four are faster than the paper's by about the same factor: what its nodes took is not published, and ours "
    "take what the roofline says."
)
TRIALS = {name: Trial(mooncake(placement=placement)) for name, placement in SCHEDULERS.items()}
BANDWIDTHS_GBPS = (24, 100, 200, 400)
NETWORKS = {gbps: Trial(mooncake(nic_gbps=gbps)) for gbps in BANDWIDTHS_GBPS}


def scheduling() -> Experiment:
    return Experiment("prefill scheduling", list(TRIALS.values()), _ttfts, _scheduling_section)


def bandwidth() -> Experiment:
    return Experiment("bandwidth", list(NETWORKS.values()), _by_bandwidth, _bandwidth_section)


def mean_ttft_s(result: Result) -> float:
    return result.report().ttft_s.mean or 0.0


def _ttfts(lab: Lab) -> list[Entry]:
    return [
        entry(f"fig5.{name}", f"average TTFT, {name.replace('_', ' ')}", "s", mean_ttft_s(lab[trial]), _FASTER)
        for name, trial in TRIALS.items()
    ]


def _by_bandwidth(lab: Lab) -> list[Entry]:
    return [
        entry(f"fig13.{gbps}gbps", f"average TTFT with {gbps} Gbps a node", "s", mean_ttft_s(lab[trial]))
        for gbps, trial in NETWORKS.items()
    ]


def _scheduling_section(lab: Lab, entries: Sequence[Entry]) -> Section:
    text = (
        "8 prefill and 8 decode nodes, the conversation trace at its own speed. What the paper's nodes really took is "
        "not published; ours come from the roofline, so it is the proportions that count."
    )
    return Section("Figure 5: prefill scheduling", text, [of_entries(entries)])


def _bandwidth_section(lab: Lab, entries: Sequence[Entry]) -> Section:
    text = "The paper plots the curve without numbers: flat from 100 Gbps on, and rising steeply below."
    return Section("Figure 13: network bandwidth", text, [of_entries(entries)])
