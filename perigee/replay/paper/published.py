"""What the papers say: Mooncake at FAST '25, and the earlier arXiv version (2407.00079v1) for overload.

What is not here is shown there in a plot without a number; readings of plots are not given as if they were numbers.
"""

from collections.abc import Mapping

OVERLOAD_REQUESTS = 23_000
"""That were replayed for table 3 of the arXiv version."""

PUBLISHED: Mapping[str, float] = {
    "fig1.gain.100ms": 498.0,
    "fig1.gain.300ms": 59.0,
    "fig5.global_cache_aware": 3.07,
    "fig5.local_cache_aware": 3.58,
    "fig5.load_balancing": 5.27,
    "fig5.random": 19.65,
    "fig8.vllm": 1 / 0.64,
    "fig8.vllm_prefix_caching": 1.43,
    "fig8.vllm_chunked_prefill": 1.90,
    "fig10.hit_gain": 2.36,
    "fig10.prefill_time": 0.52,
    "fig15.best_prefill_nodes": 8.0,
    "overload.at_decode": 4183.0,
    "overload.early": 3771.0,
    "overload.prediction": 3589.0,
}


def published(experiment: str) -> float | None:
    return PUBLISHED.get(experiment)
