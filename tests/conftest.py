"""Fixtures for every package's tests."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import tiny_llama as tiny

# How long an example takes, or to draw it, depends on what else the machine does.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a seeded random Llama of about a million parameters, in Hugging Face layout."""
    return tiny.write(tmp_path_factory.mktemp("tiny-llama"))
