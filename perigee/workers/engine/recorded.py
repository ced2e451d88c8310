"""Decode steps that are recorded once, and then repeated in one call."""

from collections import OrderedDict
from dataclasses import dataclass, replace

from torch import Tensor

from perigee.workers.attention.base import KVPool, StepBatch
from perigee.workers.attention.decode import is_sparse
from perigee.workers.kernels.base import Captured, DecodeBatch, Rope
from perigee.workers.model.decoder import Decoder

# Batches grow and shrink by a sequence at a time, and their page tables double: few shapes return soon.
MAX_RECORDS = 16

Shape = tuple[int, int]  # sequences, pages


@dataclass(frozen=True, slots=True)
class _Inputs:
    """All that a decode step of a shape reads of its sequences."""

    x: Tensor  # [sequences, width]: the embedded tokens
    rope: Rope
    rows: Tensor
    decode: DecodeBatch

    def set(self, other: "_Inputs") -> None:
        for mine, new in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(new)

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.x, self.rope.cos, self.rope.sin, self.rows, self.decode.pages, self.decode.contexts


@dataclass(frozen=True, slots=True)
class _Record:
    inputs: _Inputs
    results: tuple[Tensor, Tensor]
    operations: Captured


class RecordedSteps:
    """Runs the model's layers; where decode steps of one shape follow each other, by repeating the record of one."""

    def __init__(self, model: Decoder, pool: KVPool) -> None:
        self._model = model
        self._pool = pool
        self._records: OrderedDict[Shape, _Record] = OrderedDict()
        self._last: Shape | None = None
        self._enabled = True

    def hidden(self, token_ids: Tensor, batch: StepBatch) -> Tensor:
        """As the model's `forward`."""
        x, rope = self._model.embed(token_ids, batch.positions)
        shape = self._shape(batch)
        residual, delta = self._repeat(shape, x, rope, batch) if shape else self._run(x, rope, batch)
        self._last = shape
        return residual + delta

    def _shape(self, batch: StepBatch) -> Shape | None:
        """None if what the step computes does not depend on its shape alone."""
        moba = self._model.config.moba
        if not (self._enabled and batch.decode) or (moba and any(is_sparse(span, moba) for span in batch.spans)):
            return None
        sequences, pages = batch.decode.pages.shape
        return sequences, pages

    def _run(self, x: Tensor, rope: Rope, batch: StepBatch) -> tuple[Tensor, Tensor]:
        return self._model.run_layers(x, rope, batch, self._pool)

    def _repeat(self, shape: Shape, x: Tensor, rope: Rope, batch: StepBatch) -> tuple[Tensor, Tensor]:
        assert batch.decode
        inputs = _Inputs(x, rope, batch.rows, batch.decode)
        record = self._records.get(shape)
        if record:
            self._records.move_to_end(shape)
            record.inputs.set(inputs)
            record.operations.replay()
            results = record.results
        elif shape == self._last:
            results = self._record(shape, inputs, replace(batch, full_pages=batch.full_pages[:0]))
        else:
            return self._run(x, rope, batch)
        for cache in self._pool.layers:  # nothing in the step reads the means of the pages that it fills
            cache.summarise(batch.full_pages)
        return results

    def _record(self, shape: Shape, inputs: _Inputs, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """The step's tensors stay where they are, for those of the steps to come."""
        results: list[tuple[Tensor, Tensor]] = []
        captured = self._model.kernels.capture(lambda: results.append(self._run(inputs.x, inputs.rope, batch)))
        if captured is None:
            self._enabled = False
        else:
            self._records[shape] = _Record(inputs, results[0], captured)
            if len(self._records) > MAX_RECORDS:
                self._records.popitem(last=False)
        return results[0]
