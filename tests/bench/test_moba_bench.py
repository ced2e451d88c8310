"""`perigee bench moba` on a tiny model: what it prints, not how fast that is."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from perigee.bench import random_moonlight
from perigee.bench.errors import BenchError
from perigee.bench.moba import MobaBenchConfig, run
from perigee.workers.model.config import load_config
from perigee.workers.model.moonlight_config import MoonlightConfig
from perigee.workers.model.shards import check_shards
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
    for seconds in results["seconds"].values():
        assert seconds["full"]["gate"] == 0 < min(seconds["full"]["attention"], seconds["full"]["model"])


def test_a_length_beyond_the_models_positions_is_named(checkpoint: str) -> None:
    with pytest.raises(BenchError, match="--lengths: 9000; the model has 8192 positions"):
        run(MobaBenchConfig(model=checkpoint, lengths=(9000,)))


def test_without_a_model_it_makes_one_of_moonlights_shape(tmp_path: Path) -> None:
    config = load_config(random_moonlight.write(tmp_path))
    assert isinstance(config, MoonlightConfig)
    assert (config.kv_lora_rank, config.rope_dim, config.max_context) == (512, 64, 131072)
    assert 71e6 < sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values()) < 73e6
    check_shards(tmp_path)
