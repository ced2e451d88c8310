"""Engines for tests: built from a checkpoint, driven to the end."""

from collections.abc import Sequence as Items
from pathlib import Path

from perigee.kvstore.blocks import chain, num_blocks
from perigee.workers.config import WorkerConfig
from perigee.workers.engine.batcher import Active
from perigee.workers.engine.engine import Engine
from perigee.workers.engine.sequence import Ref, Sampling, Sequence
from perigee.workers.loading import load_engine
from perigee.workers.model.config import load_config

BLOCK_TOKENS = 32
ROOT = bytes(32)


def engine(directory: Path, **limits: int) -> Engine:
    """A float32 engine of the checkpoint in `directory`."""
    config = WorkerConfig(
        id="test",
        role="mixed",
        model=str(directory),
        store=Path("/nonexistent"),
        directory="unix:/nonexistent",
        dtype="float32",
        block_tokens=BLOCK_TOKENS,
        **limits,
    )
    return load_engine(directory, load_config(directory), config)


def sequence(token_ids: Items[int], name: str = "r", **sampling: object) -> Sequence:
    values = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True} | sampling
    keys = tuple(chain(ROOT, token_ids, BLOCK_TOKENS))
    return Sequence(Ref(name), tuple(token_ids), len(token_ids), keys, Sampling(**values))  # type: ignore[arg-type]


def run(engine: Engine, sequences: Items[Sequence]) -> list[list[int]]:
    """Generates all of them in one batch: the output tokens of each."""
    for one in sequences:
        engine.batcher.add(one, one_token=False)
    active: dict[Ref, Active] = {}
    while len(active) < len(sequences) or engine.batcher.has_work:
        for admitted in engine.batcher.admit():
            active[admitted.ref] = admitted
            engine.ready(admitted, 0)
        engine.step()
        for done in [a for a in engine.batcher.active.values() if a.finish_reason]:
            engine.batcher.remove(done.ref)
    return [active[one.ref].token_ids[one.prompt_len :] for one in sequences]


def run_cached(source: Engine, target: Engine, one: Sequence) -> list[int]:
    """Computes the prompt in `source`, hands its blocks over as payloads, and generates in `target` from them."""
    payloads = prefill_payloads(source, one)
    target.batcher.add(one, one_token=False)
    (active,) = target.batcher.admit()
    target.ready(active, target.load_blocks(active, enumerate(payloads)))
    while target.step():
        pass
    target.batcher.remove(one.ref)
    return active.token_ids[one.prompt_len :]


def prefill_payloads(engine: Engine, one: Sequence) -> list[memoryview]:
    """The payloads of all blocks of a prompt, the last, partial one included."""
    engine.batcher.add(one, one_token=True)
    (active,) = engine.batcher.admit()
    engine.ready(active, 0)
    while engine.step():
        pass
    size = engine.runner.pool.layout.payload_bytes
    payloads = [memoryview(bytearray(size)) for _ in range(num_blocks(one.prompt_len, BLOCK_TOKENS))]
    for index, payload in enumerate(payloads):
        engine.save(active, index, payload)
    engine.batcher.remove(one.ref)
    return payloads
