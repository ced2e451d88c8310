"""What can be wrong with a model's files."""


class ModelError(Exception):
    """Root of this package's errors."""


class CheckpointError(ModelError):
    """A checkpoint is missing, incomplete, or of a kind that is not served. The message says which and why."""


class UnsupportedModel(ModelError):
    """The checkpoint asks for something that is not implemented, or contradicts its own configuration."""
