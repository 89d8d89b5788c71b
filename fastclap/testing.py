"""Assertions shared by the test suite and by anyone who ports a loss or a front-end onto fastclap."""

from __future__ import annotations

from torch import Tensor


def relative_error(reference: Tensor, out: Tensor) -> float:
    """‖out − reference‖ / ‖reference‖ in float64; the absolute norm when the reference is all zero."""
    reference64, out64 = reference.detach().double().cpu(), out.detach().double().cpu()
    scale = reference64.norm().item()
    return (out64 - reference64).norm().item() / (scale if scale > 0 else 1.0)


def assert_close_rel(name: str, reference: Tensor, out: Tensor, tol: float) -> None:
    """Assert that ``out`` is within the relative error ``tol`` of ``reference``, naming the tensor on failure.

    Args:
        name: what the tensor is, for the message.
        reference: the trusted value, any floating dtype.
        out: the value under test, same shape.
        tol: largest admissible ‖out − reference‖ / ‖reference‖.
    """
    assert tuple(out.shape) == tuple(reference.shape), (
        f"{name}: shape {tuple(out.shape)}, expected {tuple(reference.shape)}"
    )
    error = relative_error(reference, out)
    assert error <= tol, f"{name}: relative error {error:.3e} exceeds {tol:.1e}"  # NaN fails the comparison too
