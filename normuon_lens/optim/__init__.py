"""The subjects of study: Muon and NorMuon, complete and readable next to their papers.

This is the one room of the core that needs torch (``pip install "normuon-lens[torch]"``).

Examples
--------
>>> import torch
>>> from normuon_lens.optim import NorMuon, split_parameters
>>> model = torch.nn.Sequential(torch.nn.Embedding(64, 8), torch.nn.Linear(8, 16))
>>> matrices, others = split_parameters(model)
>>> optimizers = [NorMuon(matrices, lr=0.01), torch.optim.AdamW(others, lr=0.003)]
"""

# ruff: noqa: E402, the imports below need torch
from normuon_lens.extras import require

require("torch", "torch")

from normuon_lens.optim.groups import split_parameters
from normuon_lens.optim.muon import Muon
from normuon_lens.optim.normuon import NorMuon
from normuon_lens.optim.orthogonalize import orthogonalize

__all__ = ["Muon", "NorMuon", "orthogonalize", "split_parameters"]
