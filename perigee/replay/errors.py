"""What can go wrong in a replay, apart from a single request's failure, which is a result."""


class ReplayError(Exception):
    """The replay cannot be done as asked."""


class TraceError(ReplayError):
    """The trace cannot be read or used. The message names file and line, or the field, and the value."""


class EndpointError(ReplayError):
    """The endpoint cannot be reached, or does not serve what was asked for."""


class ClusterError(ReplayError):
    """The simulated cluster cannot be like that. The message names file, field, value, and what is allowed."""
