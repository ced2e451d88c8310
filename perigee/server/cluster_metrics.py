"""The cluster's own numbers as Prometheus metrics, read from its last known state at each scrape."""

from collections.abc import Callable, Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from perigee.scheduler import scheduler_pb2 as pb

# Field of WorkerReport or StoreStatus -> metric, help.
_WORKER_COUNTERS = {
    "computed_prompt_tokens_total": ("perigee_worker_prompt_tokens_computed", "Prompt tokens that the worker computed"),
    "cached_prompt_tokens_total": ("perigee_worker_prompt_tokens_cached", "Prompt tokens that it took from the cache"),
    "output_tokens_total": ("perigee_worker_output_tokens", "Output tokens that it generated"),
    "steps_total": ("perigee_worker_steps", "Engine steps"),
}
_WORKER_GAUGES = {
    "queued_sequences": ("perigee_worker_queued_sequences", "Sequences waiting for pages or their turn"),
    "queued_prefill_tokens": ("perigee_worker_queued_prefill_tokens", "Prompt tokens not computed yet"),
    "running_sequences": ("perigee_worker_running_sequences", "Sequences in the batch"),
    "context_tokens": ("perigee_worker_context_tokens", "Tokens of the sequences in the batch"),
    "free_pages": ("perigee_worker_free_pages", "Pages of KV memory that nobody has reserved"),
    "total_pages": ("perigee_worker_pages", "Pages of KV memory"),
    "last_step_s": ("perigee_worker_last_step_seconds", "How long the last engine step took"),
}
_STORE_COUNTERS = {
    "stored_total": ("perigee_store_stored_blocks", "Blocks committed"),
    "evicted_total": ("perigee_store_evicted_blocks", "Blocks evicted"),
    "hit_blocks_total": ("perigee_store_hit_blocks", "Blocks asked for and found"),
    "miss_blocks_total": ("perigee_store_miss_blocks", "Blocks asked for and not found"),
    "ssd_hit_blocks_total": ("perigee_store_ssd_hit_blocks", "Blocks asked for and found on SSD"),
    "ssd_loaded_total": ("perigee_store_ssd_loaded_blocks", "Blocks read from SSD"),
    "ssd_spilled_total": ("perigee_store_ssd_spilled_blocks", "Blocks written to SSD"),
    "ssd_corrupt_total": ("perigee_store_ssd_corrupt_blocks", "Blocks on SSD that were torn or changed"),
    "pulled_total": ("perigee_store_pulled_blocks", "Blocks pulled from other nodes"),
    "replicated_total": ("perigee_store_replicated_blocks", "Blocks pulled because they are asked for often elsewhere"),
    "trimmed_total": ("perigee_store_trimmed_blocks", "Blocks dropped because other nodes have them"),
    "failed_pulls_total": ("perigee_store_failed_pulls", "Blocks that were to be pulled and did not come"),
    "remote_corrupt_total": ("perigee_store_remote_corrupt_blocks", "Blocks received whose checksum was wrong"),
    "served_total": ("perigee_store_served_blocks", "Blocks sent to other nodes"),
    "fenced_total": ("perigee_store_fenced", "Writers and readers that were slower than their deadline"),
}
_STORE_GAUGES = {
    "num_slots": ("perigee_store_slots", "Slots of the arena"),
    "free_slots": ("perigee_store_free_slots", "Slots that hold nothing"),
    "committed_blocks": ("perigee_store_committed_blocks", "Blocks that can be read"),
    "leased_blocks": ("perigee_store_leased_blocks", "Blocks in use"),
    "reserved_blocks": ("perigee_store_reserved_blocks", "Slots being written"),
    "overdue_blocks": ("perigee_store_overdue_blocks", "Slots kept by writers whose reservation has ended"),
    "connections": ("perigee_store_connections", "Workers connected"),
    "pinned_blocks": ("perigee_store_pinned_blocks", "Blocks that tenants have pinned"),
    "ssd_blocks": ("perigee_store_ssd_blocks", "Blocks that can be read from SSD"),
    "ssd_state": ("perigee_store_ssd_state", "SSD tier: 0 there is none, 1 on, 2 failed and off"),
}
_MOVE_COUNTERS = {
    "replications": ("perigee_replications", "Times that a store node was told to copy a prefix"),
    "replicated_blocks": ("perigee_replications_blocks", "Blocks of those prefixes"),
    "trims": ("perigee_trims", "Times that a store node was told to drop copies"),
    "trimmed_blocks": ("perigee_trims_blocks", "Blocks that it was told to drop"),
    "drains": ("perigee_role_drains", "Workers that were given no more work, to change pools"),
    "role_changes": ("perigee_role_changes", "Workers that changed pools"),
}
_SHADOW_COUNTERS = {
    "arrivals": ("perigee_shadow_arrivals", "Requests that the shadow was asked about"),
    "both_dispatched": ("perigee_shadow_both_dispatched", "Requests that both would serve"),
    "both_rejected": ("perigee_shadow_both_rejected", "Requests that both reject"),
    "rejections_made": ("perigee_shadow_rejections_made", "Requests that the shadow alone would reject"),
    "rejections_avoided": ("perigee_shadow_rejections_avoided", "Requests that the shadow alone would serve"),
    "same_prefill": ("perigee_shadow_same_prefill", "Requests that both would prefill on the same worker"),
    "same_decode": ("perigee_shadow_same_decode", "Requests that both would decode on the same worker"),
    "same_workers": ("perigee_shadow_same_workers", "Requests that both would send to the same two workers"),
    "second_checks": ("perigee_shadow_second_checks", "Computed prompts that the shadow was asked about"),
    "second_rejections_made": ("perigee_shadow_second_rejections_made", "Of those the shadow alone would reject"),
    "second_rejections_avoided": ("perigee_shadow_second_rejections_avoided", "Of those the shadow alone would serve"),
}


class ClusterCollector(Collector):
    """Metrics of every worker and store node. `state` gives the cluster's last known state."""

    def __init__(self, state: Callable[[], pb.ClusterState | None]) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        state = self._state() or pb.ClusterState()
        yield GaugeMetricFamily("perigee_ready", "Whether there is a worker for each phase", value=state.ready)
        yield from _of_predictions("ttft", state.ttft_error)
        yield from _of_predictions("tbt", state.tbt_error)
        yield from _of_workers(state)
        yield from _of_stores(state)
        for field, (name, text) in _MOVE_COUNTERS.items():
            yield CounterMetricFamily(name, text, value=getattr(state.moves, field))
        if state.HasField("shadow"):
            yield from _of_shadow(state.shadow)
        yield GaugeMetricFamily(
            "perigee_orphaned_blocks",
            "Blocks leased or reserved with no living owner",
            value=sum(store.status.orphaned_blocks for store in state.stores),
        )


def _of_predictions(what: str, error: pb.PredictionError) -> Iterator[Metric]:
    """All over the last few hundred requests."""
    text = f"|predicted - actual| / actual of the {what.upper()}"
    quantiles = GaugeMetricFamily(f"perigee_{what}_prediction_error", text, labels=["quantile"])
    quantiles.add_metric(["0.5"], error.p50)
    quantiles.add_metric(["0.9"], error.p90)
    yield quantiles
    yield GaugeMetricFamily(f"perigee_{what}_prediction_error_mean", f"Mean of {text}", value=error.mean)
    bias = f"Median of (predicted - actual) / actual of the {what.upper()}"
    yield GaugeMetricFamily(f"perigee_{what}_prediction_bias", bias, value=error.bias)
    yield GaugeMetricFamily(f"perigee_{what}_predictions", "Predictions that were compared", value=error.count)


def _of_workers(state: pb.ClusterState) -> Iterator[Metric]:
    for kind, fields in ((CounterMetricFamily, _WORKER_COUNTERS), (GaugeMetricFamily, _WORKER_GAUGES)):
        for field, (name, text) in fields.items():
            family = kind(name, text, labels=["worker", "role"])
            for worker in state.workers:
                if worker.HasField("report"):
                    family.add_metric([worker.member.id, worker.report.role], getattr(worker.report, field))
            yield family


def _of_stores(state: pb.ClusterState) -> Iterator[Metric]:
    """Of a node that did not answer in time there is nothing: counters that fall to 0 would mean that it began anew."""
    for kind, fields in ((CounterMetricFamily, _STORE_COUNTERS), (GaugeMetricFamily, _STORE_GAUGES)):
        for field, (name, text) in fields.items():
            family = kind(name, text, labels=["store"])
            for store in state.stores:
                if store.HasField("status"):
                    family.add_metric([store.member.id], getattr(store.status, field))
            yield family


def _of_shadow(shadow: pb.ShadowState) -> Iterator[Metric]:
    labels = ["placement", "admission"]
    values = [shadow.placement, shadow.admission]
    for field, (name, text) in _SHADOW_COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=labels)
        counter.add_metric(values, getattr(shadow, field))
        yield counter
    # Can be negative, so it is no counter.
    text = "Sum over what both would serve of the shadow's predicted TTFT minus the acting policies'"
    difference = GaugeMetricFamily("perigee_shadow_ttft_difference_seconds_sum", text, labels=labels)
    difference.add_metric(values, shadow.ttft_difference_s)
    yield difference
