"""The scheduler's exceptions."""


class SchedulerError(Exception):
    """Everything that the scheduler raises."""


class InvalidMessage(SchedulerError):
    """A peer's message cannot mean anything. Names the field, its value, and what is allowed."""
