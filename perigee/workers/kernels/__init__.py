"""The few operations that a model's time goes into: in plain torch, and in native code for machines that can run it."""
