"""Newton-Schulz: pulls every singular value of a matrix towards one, by products alone."""

import functools

import torch
from torch import Tensor

# Quintic X -> aX + bX(X'X) + cX(X'X)^2 of Keller Jordan's Muon, adopted by [NorMuon, arXiv
# 2510.05491]. Tuned for the steepest slope at zero in five steps, not for convergence to one.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)

# Below this norm a matrix counts as zero and is not scaled up. Squares of float32 entries under
# 1e-19 underflow, so a smaller guard could divide a non-zero matrix by a norm that reads zero.
NORM_GUARD = 1e-15


def orthogonalize(matrix: Tensor, steps: int = 5, *, dtype: torch.dtype | None = None) -> Tensor:
    """Bring the singular values of a matrix near one and keep its singular vectors.

    What comes out is U S' V' where U S V' is the singular value decomposition of the input. It is
    **not** the polar factor U V': after five steps a singular value that was above 0.0015 of the
    Frobenius norm lies in [0.68, 1.21], mostly below 1.15, and never settles on one. Smaller ones
    are multiplied by up to 485 (3.4445 to the fifth) and stay small, zero stays zero: the
    condition number of the result is that of its few unlifted values.

    Parameters
    ----------
    matrix : Tensor of shape (m, n)
        Any real floating-point matrix, of any scale: the result does not depend on the scale as
        long as the norm lies in [1e-15, 1e18] (float32 squares).
    steps : int
        Number of iterations. Each is three matrix products on the smaller side.
    dtype : torch.dtype or None
        Precision of the products. None takes `fast_dtype`: what this machine multiplies fastest,
        except that a float64 matrix stays float64. Results of different dtypes differ by the
        rounding of the dtype (about one percent in bfloat16).

    Returns
    -------
    Tensor of shape (m, n)
        A new tensor in the dtype of `matrix`. The zero matrix gives the zero matrix.

    References
    ----------
    Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    [NorMuon, arXiv 2510.05491, Algorithm 1, line NS5].
    """
    a, b, c = COEFFICIENTS
    if dtype is None:
        dtype = matrix.dtype if matrix.dtype == torch.float64 else fast_dtype(matrix.device.type)
    tall = matrix.shape[0] > matrix.shape[1]

    # An autocast region around the step must not lower the precision that was asked for.
    with torch.autocast(matrix.device.type, enabled=False):
        # The norm is taken before rounding to a narrow dtype: its error would scale all of X.
        X = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        X = (X / frobenius_norm(X).clamp_min(NORM_GUARD)).to(dtype)
        for _ in range(steps):
            A = X.mT @ X if tall else X @ X.mT
            B = torch.addmm(A, A, A, beta=b, alpha=c)  # bA + cA²
            X = torch.addmm(X, X, B, beta=a) if tall else torch.addmm(X, B, X, beta=a)
        return X.to(matrix.dtype)


def frobenius_norm(matrix: Tensor) -> Tensor:
    """Frobenius norm, summed row by row.

    Parameters
    ----------
    matrix : Tensor of shape (m, n)

    Returns
    -------
    Tensor of shape ()
        One running float32 sum over a large matrix loses 4e-5 on a CPU; this loses about 1e-7.
    """
    norm: Tensor = torch.linalg.vector_norm(torch.linalg.vector_norm(matrix, dim=1))
    return norm


@functools.cache
def fast_dtype(device_type: str) -> torch.dtype:
    """Dtype in which this machine multiplies matrices fastest.

    Parameters
    ----------
    device_type : str
        A torch device type, such as "cpu" or "cuda".

    Returns
    -------
    torch.dtype
        bfloat16 on GPUs that have it natively and on CPUs with bfloat16 dot products (AMX or
        AVX512-BF16: 2 to 7 times float32), float32 elsewhere.
    """
    if device_type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device_type == "cpu":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32
