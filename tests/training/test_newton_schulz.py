"""Newton–Schulz's iteration against its polynomial applied to the singular values themselves."""

import pytest
import torch
from torch import Tensor

from perigee.training.newton_schulz import BAND, COEFFICIENTS, SMALLEST, STEPS, orthogonalise

SHAPES = [(1, 1), (1, 7), (8, 8), (16, 40), (40, 16), (64, 64), (128, 96)]


def with_singular_values(rows: int, columns: int, values: Tensor) -> Tensor:
    left = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64)).Q
    return (left * values) @ right.T


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_singular_values_end_where_the_polynomial_sends_them(rows: int, columns: int) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(rows, columns, dtype=torch.float64)
    expected = torch.linalg.svdvals(matrix / matrix.norm())
    for _ in range(STEPS):
        expected = sum(c * expected**power for c, power in zip(COEFFICIENTS, (1, 3, 5), strict=True))
    found = torch.linalg.svdvals(orthogonalise(matrix, torch.float64))
    torch.testing.assert_close(found, expected.sort(descending=True).values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1e-3), (torch.bfloat16, 0.06)])
def test_singular_values_end_in_the_band(rows: int, columns: int, dtype: torch.dtype, slack: float) -> None:
    torch.manual_seed(1)
    values = torch.logspace(0, -1.5, min(rows, columns), dtype=torch.float64)
    assert (values / values.norm()).min() > SMALLEST
    found = torch.linalg.svdvals(orthogonalise(with_singular_values(rows, columns, values), dtype).double())
    assert BAND[0] - slack <= found.min() and found.max() <= BAND[1] + slack


def test_singular_vectors_stay() -> None:
    torch.manual_seed(2)
    matrix = with_singular_values(24, 40, torch.linspace(0.2, 1, 24, dtype=torch.float64))
    made = orthogonalise(matrix, torch.float64)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ made @ vt.T
    torch.testing.assert_close(inner, inner.diagonal().diag(), rtol=0, atol=1e-9)


def test_a_batch_is_its_matrices_one_by_one() -> None:
    torch.manual_seed(3)
    batch = torch.randn(2, 5, 16, 24)
    one_by_one = torch.stack([torch.stack([orthogonalise(matrix) for matrix in row]) for row in batch])
    torch.testing.assert_close(orthogonalise(batch), one_by_one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_of_a_matrix_does_not_matter_and_zeros_stay_zeros(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    matrix = torch.randn(16, 24)
    torch.testing.assert_close(orthogonalise(matrix * 2.0**-20, dtype), orthogonalise(matrix, dtype))
    assert orthogonalise(torch.zeros(16, 24), dtype).count_nonzero() == 0
