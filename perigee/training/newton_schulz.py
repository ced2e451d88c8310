"""The nearest semi-orthogonal matrix, roughly, by a Newton–Schulz iteration."""

import torch
from torch import Tensor

STEPS = 5
# Of x, x³ and x⁵ in the polynomial that each step applies to all singular values: chosen to lift small ones as fast as
# can be, at the price that they end somewhere in BAND rather than at 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Where singular values end that were at least SMALLEST of their matrix's Frobenius norm. Smaller ones end below.
BAND = (0.68, 1.21)
SMALLEST = 0.002


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """U Vᵀ of each matrix U S Vᵀ in `matrices` [..., rows, columns], but for singular values within BAND instead of 1.

    The iteration runs in `dtype`, in which the result is, too ("Muon is Scalable for LLM Training", 2.1).
    """
    is_wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if is_wide else matrices.mT).to(dtype)  # so that x xᵀ is the smaller of its two Gram matrices
    norm = x.to(torch.promote_types(dtype, torch.float32)).norm(dim=(-2, -1), keepdim=True)
    # A matrix of zeros, such as the gradient of an expert that nobody chose, stays one.
    x = x / norm.clamp_min(torch.finfo(torch.float32).tiny).to(dtype)
    for _ in range(STEPS):
        x = _step(x)
    return x if is_wide else x.mT


def _step(x: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    gram = x @ x.mT
    return a * x + (b * gram + c * (gram @ gram)) @ x
