"""Decode steps that are recorded once, and then repeated in one call."""

from collections import OrderedDict
from dataclasses import dataclass, replace

from torch import Tensor

from perigee.workers.attention.base import KVPool, StepBatch
from perigee.workers.attention.decode import is_sparse
from perigee.workers.kernels.base import Captured, DecodeBatch, Rope
from perigee.workers.model.decoder import Decoder

# Some forty kilobytes each. Batches change by a sequence at a time and their page tables double, so shapes come back.
MAX_RECORDS = 128

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
    """Runs the model's layers. The second of two decode steps of one shape in succession is recorded, and later ones of
    that shape repeat the record.
    """

    def __init__(self, model: Decoder, pool: KVPool) -> None:
        self._model = model
        self._pool = pool
        self._records: OrderedDict[Shape, _Record | None] = OrderedDict()  # None: of a shape that can't be recorded
        self._last: Shape | None = None

    def hidden(self, token_ids: Tensor, batch: StepBatch) -> Tensor:
        """As the model's `forward`."""
        x, rope = self._model.embed(token_ids, batch.positions)
        if batch.decode is None or self._is_sparse(batch):
            self._last = None
            residual, delta = self._run(x, rope, batch)
        else:
            residual, delta = self._decode(_Inputs(x, rope, batch.rows, batch.decode), batch)
        return residual + delta

    def _is_sparse(self, batch: StepBatch) -> bool:
        """Whether what a step computes depends on more than its shape: then a gate chooses pages."""
        moba = self._model.config.moba
        return moba is not None and any(is_sparse(span, moba) for span in batch.spans)

    def _decode(self, inputs: _Inputs, batch: StepBatch) -> tuple[Tensor, Tensor]:
        sequences, pages = inputs.decode.pages.shape
        shape = (sequences, pages)
        before, self._last = self._last, shape
        if shape not in self._records and shape == before:
            return self._record(shape, inputs, batch)
        if record := self._records.get(shape):
            self._records.move_to_end(shape)
            record.inputs.set(inputs)
            record.operations.replay()
            self._summarise(batch)
            return record.results
        return self._run(inputs.x, inputs.rope, batch)

    def _record(self, shape: Shape, inputs: _Inputs, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """The step's tensors stay where they are, for those of the steps to come."""
        made: list[tuple[Tensor, Tensor]] = []
        plain = replace(batch, full_pages=batch.full_pages[:0])
        captured = self._model.kernels.capture(lambda: made.append(self._run(inputs.x, inputs.rope, plain)))
        self._records[shape] = _Record(inputs, made[0], captured) if captured else None
        if len(self._records) > MAX_RECORDS:
            self._records.popitem(last=False)
        self._summarise(batch)
        return made[0]

    def _run(self, x: Tensor, rope: Rope, batch: StepBatch) -> tuple[Tensor, Tensor]:
        return self._model.run_layers(x, rope, batch, self._pool)

    def _summarise(self, batch: StepBatch) -> None:
        """The means of the pages that a step fills, which nothing in the step itself reads."""
        for cache in self._pool.layers:
            cache.summarise(batch.full_pages)
