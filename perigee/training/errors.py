"""What can go wrong in training."""


class TrainingError(Exception):
    """Root of this package's errors. The message names the field, the value, and what is allowed."""
