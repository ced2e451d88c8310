"""Decode steps that are recorded and repeated, against the same steps computed one operation at a time."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from perigee.workers.engine import recorded
from perigee.workers.engine.engine import Engine
from perigee.workers.engine.runner import Runner
from perigee.workers.kernels.build import NativeUnavailable, library
from perigee.workers.kernels.capture import Scratch
from perigee.workers.kernels.native import NativeKernels, load
from perigee.workers.kernels.reference import TorchKernels
from tests import tiny_moonlight
from tests.workers.engines import engine, run, sequence


def _is_native() -> bool:
    try:
        library()
    except NativeUnavailable:
        return False
    return True


needs_native = pytest.mark.skipif(not _is_native(), reason="no compiler, or no AVX-512 bfloat16 on this machine")
PROMPTS = [[(31 * i + 7 * n) % 280 + 20 for i in range(length)] for n, length in enumerate((3, 40, 63, 100))]


def bfloat16(directory: Path, moba: str = "") -> Engine:
    return engine(directory, moba=moba, dtype="bfloat16", kv_tokens=2048)


def computed(directory: Path, prompts: list[list[int]], lengths: list[int], moba: str = "") -> list[list[int]]:
    """What an engine generates that records nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeKernels, "capture", TorchKernels.capture)
        return generated(bfloat16(directory, moba), prompts, lengths)


def generated(made: Engine, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
    return run(made, [sequence(p, str(i), max_tokens=lengths[i]) for i, p in enumerate(prompts)])


class Steps:
    """Counts an engine's steps, and those among them that ran its model's layers."""

    def __init__(self, made: Engine, patch: pytest.MonkeyPatch) -> None:
        self._totals, self._before, self.computed = made.totals, made.totals.steps, 0
        layers = made.runner.model.run_layers

        def run_layers(*arguments: object) -> tuple[Tensor, Tensor]:
            self.computed += 1
            return layers(*arguments)  # type: ignore[arg-type]

        patch.setattr(made.runner.model, "run_layers", run_layers)

    @property
    def repeated(self) -> int:
        return self._totals.steps - self._before - self.computed


@needs_native
def test_repeated_steps_generate_what_computed_ones_do(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across the ends of pages, with page tables that grow and a batch that shrinks, and again in other pages."""
    lengths = [90, 60, 30, 90]
    expected = computed(checkpoint, PROMPTS, lengths)
    made = bfloat16(checkpoint)
    steps = Steps(made, monkeypatch)
    assert generated(made, PROMPTS, lengths) == expected
    assert steps.repeated > steps.computed
    others = [prompt[::-1] for prompt in reversed(PROMPTS)]
    assert generated(made, others, lengths) == computed(checkpoint, others, lengths)


@needs_native
@pytest.mark.parametrize("decode", ["full", "moba"])
def test_gates_choose_as_they_would(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, decode: str) -> None:
    """Pages that repeated steps filled are summarised, and a shape that was full is computed where it is sparse."""
    moba = f"block_size=32,top_k=2,full_layers=1,min_length=96,decode={decode}"
    prompts, lengths = [PROMPTS[0], PROMPTS[0] + [300]], [200, 200]
    expected = computed(checkpoint, prompts, lengths, moba)
    made = bfloat16(checkpoint, moba)
    steps = Steps(made, monkeypatch)
    assert generated(made, prompts, lengths) == expected
    assert steps.repeated > 50
    assert decode == "full" or steps.computed > 90


@needs_native
def test_a_model_with_a_query_latent_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny_moonlight.write(tmp_path, q_lora_rank=64)
    expected = computed(directory, PROMPTS, [40] * 4)
    made = bfloat16(directory)
    steps = Steps(made, monkeypatch)
    assert generated(made, PROMPTS, [40] * 4) == expected
    assert steps.repeated > steps.computed


@needs_native
@pytest.mark.parametrize(("room", "recorded_again"), [(3, 0), (2, 1), (1, 3)])
def test_the_shapes_used_last_are_kept(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, room: int, recorded_again: int
) -> None:
    captures: list[int] = []
    capture = NativeKernels.capture
    monkeypatch.setattr(NativeKernels, "capture", lambda *given: (captures.append(1), capture(*given))[1])
    made = bfloat16(tiny_llama)
    made.runner = Runner(made.runner.model, made.runner.pool, made.runner.eos_token_ids)
    monkeypatch.setattr(recorded, "MAX_RECORDS", room)
    captures.clear()
    for streams in (1, 2, 1, 3, 1, 2):  # each a shape; with room for two, the third takes that of two streams
        generated(made, [PROMPTS[0]] * streams, [10] * streams)
    assert len(captures) == 3 + recorded_again


@needs_native
def test_a_shape_that_cannot_be_recorded_leaves_the_others(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bfloat16(tiny_llama)
    run_layers = made.runner.model.run_layers

    def foreign_for_two(x: Tensor, *given: object) -> tuple[Tensor, Tensor]:
        residual, delta = run_layers(x, *given)  # type: ignore[arg-type]
        return (residual, delta) if len(x) != 2 else (residual + 0, delta)

    monkeypatch.setattr(made.runner.model, "run_layers", foreign_for_two)
    steps = Steps(made, monkeypatch)
    for streams in (2, 1, 2, 1):
        generated(made, [PROMPTS[0]] * streams, [20] * streams)
    assert 15 < steps.repeated < 40


def test_kernels_that_cannot_record_are_asked_once_a_shape(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(TorchKernels, "capture", lambda kernels, step: (asked.append(kernels), step())[1])
    made = engine(tiny_llama)
    steps = Steps(made, monkeypatch)
    asked.clear()
    generated(made, PROMPTS[:1], [20])
    assert (len(asked), steps.repeated) == (1, 0)


@needs_native
def test_a_step_with_an_operation_of_torch_is_done_and_not_recorded() -> None:
    kernels, made = load(), []
    gate_up = torch.ones(2, 64, dtype=torch.bfloat16)
    assert kernels.capture(lambda: made.append(kernels.gated_silu(gate_up) + 1)) is None
    assert torch.equal(made[0], kernels.gated_silu(gate_up) + 1)


@needs_native
def test_a_step_that_changes_or_brings_a_tensor_is_not_recorded() -> None:
    kernels, gate_up = load(), torch.ones(2, 64, dtype=torch.bfloat16)
    assert kernels.capture(lambda: gate_up.add_(1)) is None
    assert kernels.capture(lambda: kernels.gated_silu(torch.tensor([[1.0] * 32], dtype=torch.bfloat16))) is None


@needs_native
def test_a_step_with_a_kernel_that_takes_structures_is_not_recorded() -> None:
    kernels = load()
    q = torch.ones(2, 1, 32, dtype=torch.bfloat16)
    assert kernels.capture(lambda: kernels.attend_chunk(q, q, q, 0, 1.0)) is None


@needs_native
def test_a_record_reads_what_its_inputs_hold_when_it_is_repeated() -> None:
    kernels, made = load(), []
    gate_up = torch.ones(2, 64, dtype=torch.bfloat16)
    record = kernels.capture(lambda: made.append(kernels.gated_silu(gate_up).view(-1)))
    assert record
    gate_up.fill_(2)
    record.replay()
    assert torch.equal(made[0], kernels.gated_silu(gate_up).view(-1))


def test_scratch_is_lent_again_once_no_tensor_needs_it() -> None:
    scratch = Scratch()
    whole = scratch.tensor((4, 8), torch.float32)
    part, at = whole.view(-1)[3:], whole.data_ptr()
    del whole
    other = scratch.tensor((16,), torch.bfloat16)
    assert other.data_ptr() != at
    del part
    assert scratch.tensor((2, 4), torch.int64).data_ptr() == at
    assert scratch.tensor((9, 9), torch.int64).data_ptr() != at
