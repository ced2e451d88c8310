"""Engines for tests: built from a checkpoint, driven to the end."""

from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from perigee.kvstore.blocks import DType, chain, num_blocks
from perigee.workers.config import WorkerConfig
from perigee.workers.engine.batcher import Active
from perigee.workers.engine.engine import Engine, StepResult
from perigee.workers.engine.sequence import Ref, Sampling, Sequence
from perigee.workers.loading import load_engine
from perigee.workers.model.config import load_config

BLOCK_TOKENS = 32
ROOT = bytes(32)


def engine(directory: Path, moba: str = "", dtype: DType = "float32", **limits: int) -> Engine:
    """An engine of the checkpoint in `directory`."""
    config = WorkerConfig(
        id="test",
        role="mixed",
        model=str(directory),
        store=Path("/nonexistent"),
        directory="unix:/nonexistent",
        dtype=dtype,
        block_tokens=BLOCK_TOKENS,
        **limits,
    )
    return load_engine(directory, load_config(directory, moba), config)


def sequence(token_ids: Items[int], name: str = "r", **sampling: object) -> Sequence:
    values = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True} | sampling
    keys = tuple(chain(ROOT, token_ids, BLOCK_TOKENS))
    return Sequence(Ref(name), tuple(token_ids), len(token_ids), keys, Sampling(**values))  # type: ignore[arg-type]


def run(engine: Engine, sequences: Items[Sequence]) -> list[list[int]]:
    """Generates all of them in one batch: the output tokens of each."""
    actives = {chunk.active.ref: chunk.active for step in _steps(engine, sequences) for chunk in step.chunks}
    return [_tokens(actives[one.ref])[one.prompt_len :] for one in sequences]


def logits(engine: Engine, sequences: Items[Sequence]) -> list[tuple[list[int], Tensor]]:
    """Generates all of them in one batch: the tokens of each, and the logits after each but the last."""
    model = engine.runner.model
    hidden: dict[Ref, list[Tensor]] = defaultdict(list)
    actives: dict[Ref, Active] = {}
    with hidden_states(engine) as made:
        for step in _steps(engine, sequences):
            rows = torch.split(made.pop(), [chunk.length for chunk in step.chunks])
            for chunk, own in zip(step.chunks, rows, strict=True):
                actives[chunk.active.ref] = chunk.active
                hidden[chunk.active.ref].append(own)
    return [(_tokens(actives[one.ref]), model.logits(torch.cat(hidden[one.ref]))) for one in sequences]


@contextmanager
def hidden_states(engine: Engine) -> Iterator[list[Tensor]]:
    """What the last layer makes of each step that is not a repeated one."""
    made: list[Tensor] = []
    last = engine.runner.model.layers[-1]
    hook = last.register_forward_hook(lambda module, arguments, output: made.append(output[0] + output[1]))
    try:
        yield made
    finally:
        hook.remove()


def _steps(engine: Engine, sequences: Items[Sequence]) -> Iterator[StepResult]:
    for one in sequences:
        engine.batcher.add(one, one_token=False)
    while engine.batcher.has_work or engine.batcher.waiting:
        for admitted in engine.batcher.admit():
            engine.ready(admitted, 0)
        if step := engine.step():
            yield step
        for done in [active for active in engine.batcher.active.values() if active.finish_reason]:
            engine.batcher.remove(done.ref)


def run_cached(source: Engine, target: Engine, one: Sequence) -> list[int]:
    """Computes the prompt in `source`, hands its blocks over as payloads, and generates in `target` from them."""
    payloads = prefill_payloads(source, one)
    target.batcher.add(one, one_token=False)
    (active,) = target.batcher.admit()
    target.ready(active, target.load_blocks(active, enumerate(payloads)))
    while target.step():
        pass
    target.batcher.remove(one.ref)
    return _tokens(active)[one.prompt_len :]


def _tokens(active: Active) -> list[int]:
    return list(active.tokens(0, active.num_tokens))


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
