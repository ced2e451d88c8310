"""Decode steps that are recorded and repeated, against the same steps computed one operation at a time."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from perigee.workers.engine import recorded
from perigee.workers.engine.engine import Engine
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


@pytest.fixture(scope="module")
def tiny_moon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moonlight.write(tmp_path_factory.mktemp("tiny-moonlight"))


@pytest.fixture(params=["llama", "moonlight"])
def checkpoint(request: pytest.FixtureRequest, tiny_llama: Path, tiny_moon: Path) -> Path:
    return tiny_llama if request.param == "llama" else tiny_moon


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
def test_what_a_gate_needs_is_computed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, decode: str) -> None:
    """Pages that a step fills are summarised, and queries that choose blocks choose."""
    moba = f"block_size=32,top_k=2,full_layers=1,min_length=64,decode={decode}"
    expected = computed(checkpoint, PROMPTS, [100] * 4, moba)
    made = bfloat16(checkpoint, moba)
    steps = Steps(made, monkeypatch)
    assert generated(made, PROMPTS, [100] * 4) == expected
    assert steps.repeated if decode == "full" else steps.computed > steps.repeated


@needs_native
def test_only_the_shapes_used_last_are_kept(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "MAX_RECORDS", 1)
    lengths = [90, 60, 30, 90]
    assert generated(bfloat16(tiny_llama), PROMPTS, lengths) == computed(tiny_llama, PROMPTS, lengths)


def test_kernels_that_cannot_record_are_asked_once(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(TorchKernels, "capture", lambda kernels, step: (asked.append(kernels), step())[1])
    made = engine(tiny_llama)
    steps = Steps(made, monkeypatch)
    generated(made, PROMPTS, [20] * 4)
    assert (len(asked), steps.repeated) == (1, 0)


@needs_native
def test_a_step_with_an_operation_of_torch_is_done_and_not_recorded() -> None:
    kernels, made = load(), []
    gate_up = torch.ones(2, 64, dtype=torch.bfloat16)
    assert kernels.capture(lambda: made.append(kernels.gated_silu(gate_up) + 1)) is None
    assert torch.equal(made[0], kernels.gated_silu(gate_up) + 1)


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
