"""Newton-Schulz: pulls every singular value of a matrix towards one, by products alone."""

import itertools
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from normuon_lens.errors import LensError

Quintic: TypeAlias = tuple[float, float, float]

# X -> aX + bX(X'X) + cX(X'X)^2 with (a, b, c), one triple an iteration; the last one repeats.
COEFFICIENTS: dict[str, Sequence[Quintic]] = {
    # Keller Jordan's Muon, adopted by [NorMuon, arXiv 2510.05491]: tuned for the steepest slope at
    # zero in five steps, not for convergence to one.
    "quintic": ((3.4445, -4.7750, 2.0315),),
    # [Polar Express, arXiv 2505.16932]: each the best approximation of one on the interval [l, u]
    # that the one before leaves of [0.001, 1]; the first three on [0.0241 u, u] instead, which is
    # narrower, and rescaled for [l, u]. All but the last for X / 1.01, lest rounding lift a value
    # out of the interval.
    "polar_express": (
        *(
            (a / 1.01, b / 1.01**3, c / 1.01**5)
            for a, b, c in (
                (8.28721201814563, -23.595886519098837, 17.300387312530933),
                (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
                (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            )
        ),
        (1.875, -1.25, 0.375),
    ),
}

# Below this norm a matrix counts as zero and is not scaled up. Squares of float32 entries under
# 1e-19 underflow, so a smaller guard could divide a non-zero matrix by a norm that reads zero.
NORM_GUARD = 1e-15

# Rows of a block of a symmetric product: wide enough for full speed, narrow enough to save.
BLOCK = 192

# Iterations on the small Gram matrix before starting anew from the matrix itself. Where a singular
# value is small, an iteration multiplies an error in the Gram matrix by a². After so many, float32
# is within a few times the error of the plain iteration, after five a hundred times it (still below
# that of bfloat16); bfloat16 is worse than its plain iteration even after two.
GRAM_ITERATIONS = {"quintic": 3, "polar_express": 2}

# Long side over short side from which the small Gram matrix takes less work than the symmetric
# products alone.
ELONGATED = 1.5


def orthogonalize(
    matrix: Tensor,
    steps: int | str = 5,
    *,
    dtype: torch.dtype | None = None,
    coefficients: str = "quintic",
) -> Tensor:
    """Bring the singular values of a matrix near one and keep its singular vectors.

    What comes out is U S' V' where U S V' is the singular value decomposition of the input. With
    the default it is **not** the polar factor U V'; singular values above a small share of the
    Frobenius norm land in a band around one, smaller ones are multiplied by the product of all a
    and stay small, zero stays zero: the condition number of the result is that of its few unlifted
    values.

    =======================  ===========  ================  =======
    coefficients, steps      lifted from  into the band     slope
    =======================  ===========  ================  =======
    ``"quintic"``, 5         0.0015       [0.68, 1.21]      485
    ``"quintic"``, 6         0.00044      [0.68, 1.21]      1,670
    ``"quintic"``, 7         0.00013      [0.68, 1.21]      5,750
    ``"quintic"``, 10        0.0000031    [0.68, 1.21]      235,000
    ``"polar_express"``, 5   0.0010       [0.87, 1.13]      976
    ``"polar_express"``, 6   0.00096      [0.99, 1.01]      1,830
    ``"polar_express"``, 7   0.00087      [0.9999, 1.0000]  3,390
    ``"polar_express"``, 10  0.00014      [0.9999, 1.0000]  22,400
    ``"exact"``              rounding     1
    =======================  ===========  ================  =======

    *Lifted from* is a share of the Frobenius norm, which is up to √min(m, n) times the largest
    singular value; *slope* is what the smallest values are multiplied by. More steps of
    ``"quintic"`` lift smaller values and never settle on one; most values lie below 1.15 after
    five. ``"polar_express"`` is made for values down to 0.001: it brings those nearer to one, and
    further steps hardly lift smaller ones.

    Parameters
    ----------
    matrix : Tensor of shape (m, n), or (batch, m, n)
        Any real floating-point matrix, of any scale: the result does not depend on the scale as
        long as the norm lies in [1e-15, 1e18] (float32 squares).
    steps : int or "exact"
        Number of iterations, or the exact polar factor, see `polar_factor`; `dtype` and
        `coefficients` have no say then.
    dtype : torch.dtype or None
        Precision of the products. None takes `fast_dtype`: what this machine multiplies fastest,
        except that a float64 matrix stays float64. Results of different dtypes differ by rounding,
        multiplied by `slope` where it meets small singular values. Typical of five quintic steps,
        relative to the whole: 1e-6 to 1e-5 in float32, one percent in bfloat16, ten or twenty where
        many values are small; more than all of it in bfloat16 if the matrix has rank one.
    coefficients : {"quintic", "polar_express"}
        Which polynomials, see `COEFFICIENTS`.

    Returns
    -------
    Tensor of the shape of `matrix`
        A new tensor in the dtype of `matrix`. The zero matrix gives the zero matrix.

    Raises
    ------
    LensError
        For coefficients of another name.

    Notes
    -----
    In float32 on a CPU half of every symmetric product is left out, and an elongated matrix is
    iterated on through its small Gram matrix. That takes less time, see
    ``benchmarks/optimizer_step.py``, and stays within a few times the error of plain float32, or
    below 1e-3 where plain products happen to be exact (constant matrices, repeated rows).
    Everywhere else an iteration is three plain products on the smaller side; in float64 that makes
    the oracle of the fast paths.

    References
    ----------
    Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    [NorMuon, arXiv 2510.05491, Algorithm 1, line NS5].
    Amsel et al., "The Polar Express" (2025), arXiv 2505.16932.
    """
    if coefficients not in COEFFICIENTS:
        known = ", ".join(COEFFICIENTS)
        raise LensError(f"coefficients must be one of {known}, got {coefficients!r}.")
    if steps == "exact":
        return polar_factor(matrix)
    if dtype is None:
        dtype = matrix.dtype if matrix.dtype == torch.float64 else fast_dtype(matrix.device.type)
    if matrix.ndim > 2 and matrix.device.type == "cpu":
        # A batched product saves launches on a GPU; here it only loses the fast paths.
        parts = [orthogonalize(m, steps, dtype=dtype, coefficients=coefficients) for m in matrix]
        return torch.stack(parts)

    cycle = COEFFICIENTS[coefficients]
    schedule = [cycle[min(i, len(cycle) - 1)] for i in range(int(steps))]
    # An autocast region around the step must not lower the precision that was asked for.
    with torch.no_grad(), torch.autocast(matrix.device.type, enabled=False):
        # The norm is taken before rounding to a narrow dtype: its error would scale all of X.
        X = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        X = (X / frobenius_norm(X).clamp_min(NORM_GUARD)).to(dtype)
        if dtype != torch.float32 or matrix.device.type != "cpu":
            X = _plain(X, schedule)
        elif max(X.shape) < ELONGATED * min(X.shape):
            X = _symmetric(X, schedule)
        else:
            X = _small_gram(X, schedule, GRAM_ITERATIONS[coefficients])
        return X.to(matrix.dtype)


def _plain(X: Tensor, schedule: Sequence[Quintic]) -> Tensor:
    addmm = torch.addmm if X.ndim == 2 else torch.baddbmm
    tall = X.shape[-2] > X.shape[-1]
    for a, b, c in schedule:
        A = X.mT @ X if tall else X @ X.mT
        B = addmm(A, A, A, beta=b, alpha=c)  # bA + cA²
        X = addmm(X, X, B, beta=a) if tall else addmm(X, B, X, beta=a)
    return X


def _symmetric(X: Tensor, schedule: Sequence[Quintic]) -> Tensor:
    """Iterate like `_plain`; products that are symmetric are computed by half."""
    tall = X.shape[0] > X.shape[1]
    for a, b, c in schedule:
        A = _gram(X)
        B = _half(A, A, b, c)
        X = torch.addmm(X, X, B, beta=a) if tall else torch.addmm(X, B, X, beta=a)
    return X


def _small_gram(X: Tensor, schedule: Sequence[Quintic], iterations: int) -> Tensor:
    """Iterate on A alone: X p(A) has the Gram matrix A p(A)², and all of them commute.

    Multiples of I are kept apart: on a diagonal they would round off what else stands there, and
    where entries are all alike (constant or repeated rows) such errors add up instead of averaging.
    """
    tall = X.shape[0] > X.shape[1]
    for start in range(0, len(schedule), iterations):
        (a, b, c), *others = schedule[start : start + iterations]
        A = _gram(X)
        Q = _half(A, A, b, c)  # p(A) = aI + Q
        scale, P = a, Q  # the product of all p(A) = scale I + P
        for following in others:
            A = _half(_half(A, Q, a), Q, a)
            a, b, c = following
            Q = _half(A, A, b, c)
            P = _half(P, Q, a).add_(Q, alpha=scale)
            scale *= a
        X = torch.addmm(X, X, P, beta=scale) if tall else torch.addmm(X, P, X, beta=scale)
    return X


def _gram(X: Tensor) -> Tensor:
    return _half(X.mT, X) if X.shape[0] > X.shape[1] else _half(X, X.mT)


def _half(X: Tensor, Y: Tensor, b: float = 0.0, c: float = 1.0) -> Tensor:
    """Return bX + cXY, or XY, which is known to be symmetric: blocks on and below the diagonal."""
    s = len(X)
    blocks = s // BLOCK
    if blocks < 2:
        return _plus_product(X, X, Y, b, c)
    product = X.new_empty(s, s)
    for i, j in itertools.pairwise(s * k // blocks for k in range(blocks + 1)):
        # Not by out=, which torch.compile does not follow.
        product[i:j, :j] = _plus_product(X[i:j, :j], X[i:j], Y[:, :j], b, c)
        product[:i, i:j] = product[i:j, :i].mT
    return product


def _plus_product(Z: Tensor, X: Tensor, Y: Tensor, b: float, c: float) -> Tensor:
    return torch.addmm(Z, X, Y, beta=b, alpha=c) if b else X @ Y


def polar_factor(matrix: Tensor) -> Tensor:
    """Return U V' of the singular value decomposition: what Newton-Schulz approximates.

    Parameters
    ----------
    matrix : Tensor of shape (m, n), or (batch, m, n)

    Returns
    -------
    Tensor of the shape of `matrix`
        A new tensor in the dtype of `matrix`, computed in float64. Singular values are one, and
        zero where the input's were no larger than rounding to *its* dtype can make them: their
        singular vectors are noise. That is half its resolution times the Frobenius norm, 6e-8 in
        float32, 0.004 in bfloat16.
    """
    U, S, Vh = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    rounding = torch.finfo(matrix.dtype).eps / 2 * torch.linalg.vector_norm(S, dim=-1, keepdim=True)
    decomposing = max(matrix.shape[-2:]) * torch.finfo(S.dtype).eps * S[..., :1]
    # The guard of the iteration, for the same reason: what is that small counts as zero.
    floor = torch.maximum(rounding, decomposing).clamp_min(NORM_GUARD)
    factor: Tensor = (U * (floor < S).unsqueeze(-2)) @ Vh
    return factor.to(matrix.dtype)


def frobenius_norm(matrix: Tensor) -> Tensor:
    """Frobenius norm, summed row by row.

    Parameters
    ----------
    matrix : Tensor of shape (m, n), or (batch, m, n)

    Returns
    -------
    Tensor of shape (1, 1), or (batch, 1, 1)
        One running float32 sum over a large matrix loses 4e-5 on a CPU; this loses about 1e-7.
    """
    rows = torch.linalg.vector_norm(matrix, dim=-1, keepdim=True)
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-2, keepdim=True)
    return norm


def _fast_cpu_dtype() -> torch.dtype:
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


FAST_CPU_DTYPE = _fast_cpu_dtype()  # once: a compiled step must not ask the machine


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
        AVX512-BF16: 2 to 7 times float32), float32 elsewhere (a CPU without them takes 10 to 70
        times as long in bfloat16).
    """
    if device_type == "cpu":
        return FAST_CPU_DTYPE
    narrow = device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if narrow else torch.float32
