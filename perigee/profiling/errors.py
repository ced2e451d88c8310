"""What can go wrong in measuring a cluster."""


class ProfilingError(Exception):
    """The cluster cannot be measured, or not now. Says what was asked of whom, and what came instead."""
