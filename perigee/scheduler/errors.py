"""The scheduler's exceptions."""


class SchedulerError(Exception):
    """Everything that the scheduler raises."""


class InvalidMessage(SchedulerError):
    """A peer's message cannot mean anything. Names the field, its value, and what is allowed."""


class InvalidProfile(SchedulerError):
    """A cost profile, or what one is to be made of, cannot be used. Names the field, its value, and what is allowed."""


class InvalidRecording(SchedulerError):
    """An event log cannot be read, or not by this code. Names the field, its value, and what is allowed."""
