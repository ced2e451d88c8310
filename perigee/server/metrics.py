"""What is counted about requests. The cluster's own numbers come from `cluster_metrics`."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TBT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "perigee_requests", "Requests by how they ended", ["endpoint", "outcome"], registry=self.registry
        )
        self.running = Gauge("perigee_running_requests", "Requests being answered", registry=self.registry)
        self.ttft = Histogram(
            "perigee_ttft_seconds", "Time to first token", buckets=_TTFT_BUCKETS, registry=self.registry
        )
        self.tbt = Histogram("perigee_tbt_seconds", "Time between tokens", buckets=_TBT_BUCKETS, registry=self.registry)
        self.prompt_tokens = Counter("perigee_prompt_tokens", "Prompt tokens taken in", registry=self.registry)
        self.output_tokens = Counter("perigee_output_tokens", "Output tokens generated", registry=self.registry)
        self.cached_tokens = Counter(
            "perigee_cached_tokens", "Prompt tokens that were not computed, by tier", ["tier"], registry=self.registry
        )
        self.failed_attempts = Counter(
            "perigee_failed_attempts", "Attempts that a worker failed", ["code"], registry=self.registry
        )

    def count_cached(self, tokens_by_tier: Mapping[str, int]) -> None:
        for tier, tokens in tokens_by_tier.items():
            self.cached_tokens.labels(tier).inc(tokens)

    def exposition(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
