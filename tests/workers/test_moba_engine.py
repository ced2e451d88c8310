"""Block-sparse attention in the whole engine, in float32: a position's mode never depends on how it is computed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from perigee.kvstore.blocks import PayloadHeader
from perigee.workers.engine.engine import Engine
from perigee.workers.model.config import load_config
from perigee.workers.model.errors import UnsupportedModel
from perigee.workers.model.moba_config import MobaConfig
from tests import tiny_moonlight
from tests.workers.engines import BLOCK_TOKENS, engine, hidden_states, prefill_payloads, run, run_cached, sequence

MOBA = "block_size=64,top_k=2,full_layers=1,min_length=96"
PROMPT = [(7919 * i) % 300 + 20 for i in range(400)]


def outputs(directory: Path, moba: str, prompts: list[list[int]], **limits: int) -> list[list[int]]:
    return run(engine(directory, moba=moba, **limits), [sequence(p, str(i)) for i, p in enumerate(prompts)])


@pytest.mark.parametrize("decode", ["full", "moba"])
def test_outputs_do_not_depend_on_chunk_or_batch(checkpoint: Path, decode: str) -> None:
    moba = f"{MOBA},decode={decode}"
    prompts = [PROMPT, PROMPT[:150], PROMPT[100:330], PROMPT[:40]]
    together = outputs(checkpoint, moba, prompts, max_batched_tokens=2048)
    for chunk in (37, 64, 200):
        assert outputs(checkpoint, moba, prompts, max_batched_tokens=chunk) == together
    assert [outputs(checkpoint, moba, [p])[0] for p in prompts] == together


@pytest.mark.parametrize("decode", ["full", "moba"])
def test_a_cached_prefix_changes_nothing(checkpoint: Path, decode: str) -> None:
    moba = f"{MOBA},decode={decode}"
    source, target = engine(checkpoint, moba=moba), engine(checkpoint, moba=moba)
    one = sequence(PROMPT)
    assert run_cached(source, target, one) == outputs(checkpoint, moba, [PROMPT])[0]


@pytest.mark.parametrize("decode", ["full", "moba"])
def test_a_sequence_that_comes_back_longer_goes_on_as_it_would_have(checkpoint: Path, decode: str) -> None:
    """After a failure outputs are computed again in chunks: with the mode of their positions, not that of a prompt."""
    moba = f"{MOBA},decode={decode}"
    whole = outputs(checkpoint, moba, [PROMPT[:200]])[0]
    again = sequence(PROMPT[:200])
    again = replace(again, token_ids=again.token_ids + tuple(whole[:9]))
    (active,) = run(engine(checkpoint, moba=moba, max_batched_tokens=50), [again])
    assert active == whole


def test_it_is_off_where_every_block_is_chosen(checkpoint: Path) -> None:
    everything = outputs(checkpoint, "block_size=32,top_k=99", [PROMPT])
    assert everything == outputs(checkpoint, "off", [PROMPT])


def test_it_changes_what_is_computed(checkpoint: Path) -> None:
    assert hidden(engine(checkpoint, moba="block_size=32,top_k=1")).allclose(hidden(engine(checkpoint))) is False


def test_positions_below_the_least_length_attend_to_everything(checkpoint: Path) -> None:
    sparse = hidden(engine(checkpoint, moba="block_size=32,top_k=1,min_length=300"))
    full = hidden(engine(checkpoint))
    assert torch.allclose(sparse[:300], full[:300], atol=1e-4) and not torch.allclose(sparse[300:], full[300:])


def hidden(subject: Engine) -> Tensor:
    """What the last layer makes of each position of the prompt."""
    with hidden_states(subject) as batches:
        run(subject, [sequence(PROMPT, max_tokens=1)])
    return torch.cat(batches)


def test_blocks_carry_the_centroids_that_the_gate_saw(checkpoint: Path) -> None:
    subject = engine(checkpoint, moba=MOBA)
    one = sequence(PROMPT)
    payloads = prefill_payloads(subject, one)
    plain = prefill_payloads(engine(checkpoint, moba="off"), one)
    assert PayloadHeader.unpack(payloads[0]).num_tokens == BLOCK_TOKENS
    # The first blocks lie below min_length, so both engines computed the same: also their centroids.
    assert bytes(payloads[0][64:]) == bytes(plain[0][64:])


def test_every_full_page_has_the_mean_of_its_keys_whoever_filled_it(checkpoint: Path) -> None:
    """Chunks, decode over a page's end, a prefix from the store with a partial block, pages used again."""
    source, subject = (engine(checkpoint, moba=MOBA, max_batched_tokens=50, kv_tokens=1024) for _ in range(2))
    run_cached(source, subject, sequence(PROMPT[:150], "cached", max_tokens=40))
    run(subject, [sequence(PROMPT[i : i + 170], str(i), max_tokens=60) for i in range(3)])
    one = sequence(PROMPT[:100], "last", max_tokens=40)
    subject.batcher.add(one, one_token=False)
    (active,) = subject.batcher.admit()
    subject.load_blocks(active, list(enumerate(prefill_payloads(source, one))))
    subject.ready(active, 99)
    while subject.step():
        pass
    pool = subject.runner.pool
    assert pool.centroids is not None
    for page in active.pages.pages[: active.computed // BLOCK_TOKENS]:
        mean = pool.page(page, BLOCK_TOKENS)[:, 0].mean(dim=1)
        assert torch.allclose(pool.centroids[:, page], mean, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("block_size=512", "top_k: None; allowed are integers from 1 on"),
        ("block_size=512,top_k=0", "top_k: 0; allowed are integers from 1 on"),
        ("block_size=512,top_k=3,decode=half", "decode: 'half'; allowed are full, moba"),
        ("size=512", "size: no such field"),
    ],
)
def test_what_it_does_not_understand_is_named(tiny_llama: Path, text: str, problem: str) -> None:
    with pytest.raises(UnsupportedModel, match=problem):
        load_config(tiny_llama, text)


def test_a_checkpoint_may_ask_for_it_and_an_operator_overrule_it(tmp_path: Path) -> None:
    wanted = {"block_size": 512, "top_k": 3, "full_layers": 1, "min_length": 4096, "decode": "moba"}
    tiny_moonlight.write(tmp_path, moba=wanted)
    assert load_config(tmp_path).moba == MobaConfig(512, 3, 1, 4096, "moba")
    assert load_config(tmp_path, "off").moba is None
    assert load_config(tmp_path, "block_size=64,top_k=2").moba == MobaConfig(64, 2)


def test_a_block_must_be_whole_kvcache_blocks() -> None:
    with pytest.raises(UnsupportedModel, match="block_size: 48 is not a multiple of block_tokens, which is 32"):
        MobaConfig(48, 3).check(32, 4)


def test_equal_configurations_have_one_namespace_and_others_another() -> None:
    configs = [MobaConfig(512, 3), MobaConfig(512, 4), MobaConfig(512, 3, decode="moba"), MobaConfig(512, 3, 2)]
    assert len({config.describe() for config in configs}) == 4
    assert MobaConfig(512, 3).describe() == MobaConfig.parse("block_size=512,top_k=3").describe()
