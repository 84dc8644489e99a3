"""Which parameters are matrices for Muon and NorMuon, and which belong to AdamW."""

import difflib
import fnmatch
import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from normuon_lens.errors import LensError

# A module of this name, outside any repeated block, ends in the output head.
HEAD_NAMES = {
    "classifier",
    "embed_out",
    "head",
    "heads",
    "lm_head",
    "logits",
    "output",
    "output_layer",
    "output_projection",
    "predictions",
    "score",
    "to_logits",
    "unembed",
    "unembedding",
}

# Axis 0 of a transposed convolution is its *inputs*: no row of it is an output neuron.
NOT_MATRICES = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def split_parameters(
    model: nn.Module, *, exclude: str | Iterable[str] = ()
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split the trainable parameters into matrices, for Muon or NorMuon, and the others, for AdamW.

    A matrix has at least two dimensions, two rows and two columns (a convolution counts as
    (out_channels, rest)). The others are vectors, biases of any shape, and

    - embeddings: parameters of `torch.nn.Embedding` and `EmbeddingBag`, and whatever is tied to
      them;
    - the output head: the last matrix under a module named ``lm_head``, ``head``, ``output``,
      ``classifier`` and the like (`HEAD_NAMES`), or, whatever its name, the model's last
      `torch.nn.Linear` if it has one output per entry of an embedding. Neither is looked for
      inside a repeated block (``blocks.3.mlp.output`` is not a head);
    - weights of norms, and of transposed convolutions, whose rows are not output neurons.

    Where these rules miss, say it by `exclude`.

    Parameters
    ----------
    model : Module
    exclude : str or iterable of str
        Glob patterns of parameter names that go to the others, such as ``"*.router.weight"``. A
        tied parameter goes by any of its names.

    Returns
    -------
    matrices, others : lists of Parameter
        In the order of the model, each parameter that requires a gradient exactly once.

    Raises
    ------
    LensError
        If no matrix is found, or if a pattern matches no parameter.

    Examples
    --------
    >>> import torch
    >>> from normuon_lens.optim import NorMuon, split_parameters
    >>> model = torch.nn.Sequential(torch.nn.Embedding(64, 8), torch.nn.Linear(8, 16))
    >>> matrices, others = split_parameters(model)
    >>> [tuple(p.shape) for p in matrices], [tuple(p.shape) for p in others]
    ([(16, 8)], [(64, 8), (16,)])
    >>> optimizers = [NorMuon(matrices, lr=0.01), torch.optim.AdamW(others, lr=0.003)]
    """
    # Every name of every parameter: a tied one is judged by all of them.
    names = dict(model.named_parameters(remove_duplicate=False))
    other_ids = {
        id(parameter)
        for parameter in (
            *(p for name, p in names.items() if _is_bias(name) or not is_matrix(p)),
            *(names[name] for name in _matching(names, exclude)),
            *_of_other_modules(model),
            *_heads(model, names),
        )
    }
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (others if id(parameter) in other_ids else matrices).append(parameter)
    if not matrices:
        raise LensError(
            f"split_parameters: no matrix for Muon or NorMuon among the {len(others)} trainable "
            f"parameters of {type(model).__name__}: all are vectors, embeddings, output heads, "
            "excluded, or frozen. Train this model with AdamW alone."
        )
    return matrices, others


def is_matrix(parameter: torch.Tensor) -> bool:
    """Tell whether a parameter counts as a matrix.

    Parameters
    ----------
    parameter : Tensor
        Seen as (rows, rest).

    Returns
    -------
    bool
        False for scalars, vectors, single rows and single columns.
    """
    # By its shape alone: indexing a sharded parameter would wait for other ranks.
    rows, *rest = parameter.shape or (0,)
    return len(rest) > 0 and rows > 1 and math.prod(rest) > 1


def _is_bias(name: str) -> bool:
    return "bias" in name.rpartition(".")[2]


def _matching(names: dict[str, nn.Parameter], patterns: str | Iterable[str]) -> Iterator[str]:
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            close = difflib.get_close_matches(pattern, names) or list(names)[:3]
            raise LensError(
                f"split_parameters: exclude pattern {pattern!r} matches no parameter. "
                f"Closest names: {', '.join(close)}."
            )
        yield from matched


def _of_other_modules(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, NOT_MATRICES):
            yield from module.parameters(recurse=False)


def _heads(model: nn.Module, names: dict[str, nn.Parameter]) -> Iterator[torch.Tensor]:
    last_under: dict[str, nn.Parameter] = {}
    for name, parameter in names.items():
        if parameter.ndim == 2 and not _in_repeated_block(name):
            parts = name.split(".")
            for depth, part in enumerate(parts, start=1):
                if part in HEAD_NAMES:
                    last_under[".".join(parts[:depth])] = parameter
    yield from last_under.values()

    vocabularies = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if linears:
        name, last = linears[-1]
        if last.out_features in vocabularies and not _in_repeated_block(f"{name}.weight"):
            yield last.weight


def _in_repeated_block(name: str) -> bool:
    """Whether a numbered module holds the parameter, other than as its own: blocks.3.up.weight."""
    return any(part.isdigit() for part in name.split(".")[:-2])
