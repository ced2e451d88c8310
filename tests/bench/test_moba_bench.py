"""`perigee bench moba` on a tiny model: what it prints, not how fast that is."""

import json

import pytest

from perigee.bench.errors import BenchError
from perigee.bench.moba import MobaBenchConfig, run
from tests import tiny_moonlight


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_moonlight.write(tmp_path_factory.mktemp("bench-moba"), dtype="bfloat16"))


def test_it_prints_speed_by_length(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = (64, 128, 256)
    assert run(MobaBenchConfig(model=checkpoint, lengths=lengths, moba="block_size=32,top_k=2", json_file="-")) == 0
    results = json.loads(capsys.readouterr().out)
    for key in ("attention_speedup", "model_speedup", "gate_share"):
        assert results[key].keys() == {"64", "128", "256"} and all(value > 0 for value in results[key].values())
    assert isinstance(results["exponent"], float)
    assert all(
        full["gate"] == 0 < full["attention"] < full["model"]
        for full in (s["full"] for s in results["seconds"].values())
    )


def test_a_length_beyond_the_models_positions_is_named(checkpoint: str) -> None:
    with pytest.raises(BenchError, match="--lengths: 9000; the model has 8192 positions"):
        run(MobaBenchConfig(model=checkpoint, lengths=(9000,)))
