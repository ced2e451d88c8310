"""The Mooncake paper's experiments in virtual time, ours beside the published figures."""
