"""Which parameters go to NorMuon: on models shaped like those people train."""

import pytest
import torch
from torch import nn

from normuon_lens.errors import LensError
from normuon_lens.optim import split_parameters


class Block(nn.Module):
    """A transformer block without its attention."""

    def __init__(self, d):
        super().__init__()
        self.norm = nn.RMSNorm(d)
        self.q = nn.Linear(d, d, bias=False)
        self.output = nn.Linear(d, d)  # a name like a head's, inside a block
        self.up = nn.Linear(d, 4 * d)
        self.down = nn.Linear(4 * d, d)


class GPT(nn.Module):
    """Embeddings, blocks, and maybe a head."""

    def __init__(self, head="lm_head", tied=False, vocabulary=50, d=8):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, d)
        self.wpe = nn.Embedding(16, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(2))
        self.norm = nn.LayerNorm(d)
        if head:
            self.add_module(head, nn.Linear(d, vocabulary, bias=False))
            if tied:
                getattr(self, head).weight = self.wte.weight


BLOCK_MATRICES = [
    f"blocks.{i}.{name}.weight" for i in range(2) for name in ("q", "output", "up", "down")
]


def split_names(model, **options):
    names = {id(p): name for name, p in model.named_parameters()}
    return tuple([names[id(p)] for p in part] for part in split_parameters(model, **options))


# A known name; a head of unknown name, found by its size; tied; no head at all, so that the
# model's last linear is a block's.
@pytest.mark.parametrize(
    "model",
    [GPT("lm_head"), GPT("output"), GPT("project"), GPT("project", tied=True), GPT(None)],
    ids=["named", "named output", "by size", "tied", "headless"],
)
def test_a_language_model_gives_the_matrices_of_its_blocks(model):
    matrices, others = split_names(model)
    assert matrices == BLOCK_MATRICES
    assert sorted(matrices + others) == sorted(name for name, _ in model.named_parameters())


def test_a_last_linear_of_another_size_is_a_matrix():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 16), nn.Linear(16, 12))
    assert split_names(model)[0] == ["1.weight", "2.weight"]


def test_a_block_as_wide_as_the_vocabulary_is_no_head():
    model = GPT(None, vocabulary=8)
    assert split_names(model)[0] == BLOCK_MATRICES


def test_a_tied_embedding_is_found_by_either_name():
    # The head is registered first, so the shared weight bears the head's name alone.
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(8, 50, bias=False)
            self.hidden = nn.Linear(8, 8)
            self.embed = nn.Embedding(50, 8)
            self.embed.weight = self.project.weight

    model = Reversed()
    assert split_names(model) == (["hidden.weight"], ["project.weight", "hidden.bias"])
    matrices, others = split_parameters(model)
    assert len({id(p) for p in matrices + others}) == len(matrices + others) == 3


def test_a_network_for_images():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 8, 4)
            self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
            self.gate = nn.Conv2d(8, 1, 1)
            self.grow = nn.ConvTranspose2d(8, 4, 2)
            self.norm = nn.LayerNorm([8, 5])
            self.temperature = nn.Parameter(torch.tensor(1.0))
            self.lift = nn.Linear(1, 8)
            self.position = nn.Parameter(torch.zeros(1, 5, 8))
            self.relative_bias_table = nn.Parameter(torch.zeros(9, 4))
            self.classifier = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))

    matrices, _ = split_names(Net())
    assert matrices == ["patch.weight", "depthwise.weight", "classifier.0.weight"]


def test_exclude_takes_patterns_and_any_name_of_a_tied_matrix():
    model = GPT()
    model.blocks[1].q.weight = model.blocks[0].q.weight
    matrices, others = split_names(model, exclude=["blocks.*.up.*", "blocks.1.q.weight"])
    assert "blocks.0.q.weight" in others
    assert matrices == [n for n in BLOCK_MATRICES if ".up" not in n and ".q." not in n]
    assert split_names(model, exclude="*.down.weight")[0] == [
        n for n in BLOCK_MATRICES if ".down" not in n and n != "blocks.1.q.weight"
    ]


def test_a_pattern_without_a_match_is_refused():
    with pytest.raises(LensError, match=r"'blocks.0.k.weight' matches no.*blocks.0.q.weight"):
        split_parameters(GPT(), exclude=["blocks.0.k.weight"])


def test_frozen_parameters_belong_to_nobody():
    model = GPT()
    model.blocks[0].requires_grad_(False)
    matrices, others = split_names(model)
    assert not any(name.startswith("blocks.0") for name in matrices + others)
    assert matrices == [n for n in BLOCK_MATRICES if n.startswith("blocks.1")]


@pytest.mark.parametrize(
    "model", [nn.LayerNorm(8), nn.Embedding(9, 8), GPT().requires_grad_(False)]
)
def test_a_model_without_matrices_is_refused(model):
    with pytest.raises(LensError, match=f"no matrix.*{type(model).__name__}.*AdamW alone"):
        split_parameters(model)
