"""What a cache is worth: figures 9 and 10 (FAST '25)."""

from collections.abc import Sequence

from perigee.plots.page import Section
from perigee.replay.paper.clusters import NODE_TOKENS, mooncake
from perigee.replay.paper.entry import Entry, entry
from perigee.replay.paper.experiments import Experiment
from perigee.replay.paper.lab import Lab, Trial
from perigee.replay.paper.tables import of_entries

CAPACITIES = (1, 3, 10, 30, 50)
"""In millions of tokens."""

GLOBAL = Trial(mooncake(10, 6, placement="global-cache"))
LOCAL = Trial(mooncake(10, 6, placement="local-cache", prefix_cache="local"))
_GAIN = (
    "The paper's 2.36 is the best of its three workloads. Here requests are already sent to where their prefix is, so "
    "that even local caches find most of it."
)


def capacity() -> Experiment:
    return Experiment("cache capacity", [], _hit_ratios, _capacity_section)


def sharing() -> Experiment:
    return Experiment("local and global cache", [GLOBAL, LOCAL], _sharing, _sharing_section)


def _hit_ratios(lab: Lab) -> list[Entry]:
    """One cache under all prompts, one after another, as the paper has it."""
    entries = []
    for millions in CAPACITIES:
        what = f"block hit ratio of one LRU cache of {millions}M tokens"
        entries.append(entry(f"fig9.conversation.{millions}M", what, "of blocks", lab.hit_ratio(millions * 1_000_000)))
    what = "the same, with room for everything"
    return [*entries, entry("fig9.conversation.max", what, "of blocks", lab.hit_ratio(None))]


def _sharing(lab: Lab) -> list[Entry]:
    ours, local = lab[GLOBAL], lab[LOCAL]
    hits = ours.report().cached_token_ratio / (local.report().cached_token_ratio or 1.0)
    compute = ours.prefill_s() / (local.prefill_s() or 1.0)
    return [
        entry("fig10.hit_gain", "hit ratio with the global cache over that with local ones", "×", hits, _GAIN),
        entry("fig10.prefill_time", "time that prompts are computed, likewise", "×", compute),
    ]


def _capacity_section(lab: Lab, entries: Sequence[Entry]) -> Section:
    text = (
        "The paper plots the curve; its text says that one node's 3M tokens reach less than half of what is possible, "
        "and that 50M tokens come close to all of it."
    )
    return Section("Figure 9: cache capacity", text, [of_entries(entries)])


def _sharing_section(lab: Lab, entries: Sequence[Entry]) -> Section:
    text = f"10 prefill nodes of {NODE_TOKENS // 1_000_000}M tokens each. The paper gives the best of three workloads."
    return Section("Figure 10: local and global cache", text, [of_entries(entries)])
