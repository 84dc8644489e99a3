"""Shapes of known models against models that were built, and shapes from files."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from normuon_lens.errors import LensError
from normuon_lens.optim import split_parameters
from normuon_lens.optim.presets import PRESETS, Preset, find_preset, read_shapes
from normuon_lens.sample_runs.model import GPT, Shape


def shapes_of(model: torch.nn.Module) -> Counter[tuple[int, ...]]:
    return Counter(tuple(parameter.shape) for parameter in model.parameters())


def elements(shapes: Counter[tuple[int, ...]]) -> int:
    return sum(count * math.prod(shape) for shape, count in shapes.items())


@pytest.mark.parametrize("name", ["gpt-1.1b", "gpt-5.4b"])
def test_the_papers_models_are_llamas(name: str) -> None:
    preset = PRESETS[name]
    config = LlamaConfig(
        vocab_size=preset.vocabulary,
        hidden_size=preset.width,
        intermediate_size=preset.mlp_ratio * preset.width,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        max_position_embeddings=preset.context,
        tie_word_embeddings=preset.tied,
    )
    with torch.device("meta"):
        built = shapes_of(LlamaForCausalLM(config))
    assert built == Counter(shape for _, shape in (*preset.matrices(), *preset.others()))
    assert elements(built) == preset.parameters


@pytest.mark.parametrize(("name", "known"), [("gpt-124m", 124_439_808), ("gpt-350m", 354_823_168)])
def test_the_small_ones_are_gpt2_without_biases(name: str, known: int) -> None:
    preset = PRESETS[name]
    config = GPT2Config(n_embd=preset.width, n_layer=preset.layers, n_head=preset.heads)
    assert config.n_positions == preset.context
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    built = sum(parameter.numel() for parameter in model.parameters())
    biases = sum(p.numel() for path, p in model.named_parameters() if path.endswith("bias"))
    padding = (preset.vocabulary - config.vocab_size) * preset.width
    assert built == known
    assert preset.parameters == known - biases + padding


@pytest.mark.parametrize(
    ("name", "total"),
    [("gpt-124m", 124e6), ("gpt-350m", 355e6), ("gpt-1.1b", 1.10e9), ("gpt-5.4b", 5.37e9)],
)
def test_totals_are_those_of_the_names(name: str, total: float) -> None:
    assert PRESETS[name].parameters == pytest.approx(total, rel=5e-3)


@pytest.mark.parametrize(
    ("preset", "shape"),
    [
        (
            Preset("demo", 2, 64, 4, 4, 256, 64, gated=False, learned_positions=True, tied=False),
            Shape(),
        ),
        (PRESETS["gpt-124m"], Shape(50304, 1024, 768, 12, 12)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_names_are_those_of_the_demos_gpt(preset: Preset, shape: Shape) -> None:
    with torch.device("meta"):
        model = GPT(shape)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, others = (
        [(names[id(parameter)], tuple(parameter.shape)) for parameter in kind]
        for kind in split_parameters(model)
    )
    assert list(preset.matrices()) == matrices
    head = [("head.weight", (shape.vocabulary, shape.width))] if preset.tied else []
    assert [*preset.others(), *head] == others


def test_queries_share_keys_and_values() -> None:
    matrices = dict(PRESETS["gpt-5.4b"].matrices())
    assert matrices["blocks.27.attn.q.weight"] == (3584, 3584)
    assert matrices["blocks.27.attn.k.weight"] == (512, 3584)
    assert matrices["blocks.0.mlp.gate.weight"] == (14336, 3584)
    assert matrices["blocks.0.mlp.down.weight"] == (3584, 14336)
    assert len(matrices) == 28 * 7


@pytest.mark.parametrize("name", ["gpt-1.1b", "1.1b", "GPT-1.1B", " 1.1B "])
def test_a_name_may_be_short_and_of_either_case(name: str) -> None:
    assert find_preset(name) is PRESETS["gpt-1.1b"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpt-1b", "no model named 'gpt-1b': did you mean gpt-1.1b? All: gpt-124m, gpt-350m, "),
        ("354m", "did you mean gpt-350m?"),
        ("llama", "no model named 'llama': known are gpt-124m, gpt-350m, gpt-1.1b, gpt-5.4b."),
        ("", "no model named '': known are"),
        ("x" * 500, f"no model named '{'x' * 39}…': known are"),
    ],
)
def test_an_unknown_name_gets_the_closest(name: str, says: str) -> None:
    with pytest.raises(LensError) as error:
        find_preset(name)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("up 8192 2048", [(8192, 2048)]),
        ("8192 2048\n2048\t8192\r\n", [(8192, 2048), (2048, 8192)]),
        ("8192, 2048\n3,4\n5 , 6", [(8192, 2048), (3, 4), (5, 6)]),
        ("8192 x 2048\n3x4\n5 × 6", [(8192, 2048), (3, 4), (5, 6)]),
        ("3 * 4 5\n2*6 x 7", 3 * [(4, 5)] + 2 * [(6, 7)]),
        ("3 * blocks.*.up 4 5", 3 * [(4, 5)]),
        ("name,4,5\n0.weight 6 7\nx 8 9", [(4, 5), (6, 7), (8, 9)]),
        ("# a model\n\n  4 5  # up\n#6 7", [(4, 5)]),
        ("\ufeff4 5", [(4, 5)]),
        ('{"up": [4, 5], "up": [6, 7],\n "down": [5, 4]}', [(4, 5), (6, 7), (5, 4)]),
        ('\ufeff \n{"up": [4, 5]}', [(4, 5)]),
    ],
)
def test_shapes_are_read_as_people_write_them(
    text: str, expected: list[tuple[int, int]], tmp_path: Path
) -> None:
    path = tmp_path / "shapes.txt"
    path.write_bytes(text.encode())
    assert read_shapes(path) == expected


FORMS = 'expected "name m n", "m n", "m x n" or "48 * m n"'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", f": no matrices in it; {FORMS}"),
        ("# only a comment\n\n", ": no matrices in it"),
        ("4 5\nup 768", f":2: 'up 768' is no matrix; {FORMS}."),
        ("768", ":1: '768' is no matrix"),
        ("12 768 768", ":1: '12 768 768' is no matrix"),
        ("conv 64 3 7 7", ":1: 'conv 64 3 7 7' is no matrix"),
        ("4 -5", ":1: '4 -5' is no matrix"),
        ("4.0 5", ":1: '4.0 5' is no matrix"),
        ("1e3 5", ":1: '1e3 5' is no matrix"),
        ("48 * 768", ":1: '48 * 768' is no matrix"),
        ("name,m,n", ":1: 'name,m,n' is no matrix"),
        ("up\x1b[31m four", r":1: 'up\x1b[31m four' is no matrix"),
        ("[[4, 5]]", ":1: '[[4, 5]]' is no matrix"),
        ("0 5", ":1: 0 x 5 is not a matrix"),
        ("bias 1 768", ":1: 1 x 768 is not a matrix, which has at least two rows and two columns"),
        ("768 1", ":1: 768 x 1 is not a matrix"),
        ("4000000000 5", ":1: more than 1,000,000,000 rows or columns"),
        ("9" * 5000 + " 5", f":1: '{'9' * 39}…' is no matrix"),
        ("0 * 4 5", ":1: 0 matrices; a list has 1 to 100,000"),
        ("60000 * 4 5\n60000 * 4 5", ":2: 60,000 matrices; a list has 1 to 100,000"),
        ("{}", ": no matrices in it"),
        ('{"up": [4, 5],\n', ":2: not valid JSON: "),
        ('{"up": [4]}', ": 'up' is no matrix; expected {\"name\": [m, n], ...}"),
        ('{"up": [4, 5, 6]}', ": 'up' is no matrix"),
        ('{"up": [4, true]}', ": 'up' is no matrix"),
        ('{"up": [4, 5.0]}', ": 'up' is no matrix"),
        ('{"up": {"m": 4, "n": 5}}', ": 'up' is no matrix"),
        ('{"up": [4, -5]}', ": 'up': 4 x -5 is not a matrix"),
        ('{"up": [4, ' + "9" * 5000 + "]}", ': expected {"name": [m, n], ...}'),
        ('{"up": ' + "[" * 100_000, ': expected {"name": [m, n], ...}'),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_bad_list_is_one_clear_line(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "shapes.txt"
    path.write_bytes(text.encode())
    with pytest.raises(LensError) as error:
        read_shapes(path)
    message = str(error.value)
    assert message.startswith(f"{path}{says}")
    assert "\n" not in message


def test_what_is_no_text_file(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    for content in (b"4 5\0", b"4 \xff", "4 5".encode("utf-16")):
        binary.write_bytes(content)
        with pytest.raises(LensError, match="binary: not a text file in UTF-8; expected"):
            read_shapes(binary)
    with pytest.raises(LensError, match="none: cannot be read: No such file or directory"):
        read_shapes(tmp_path / "none")
    with pytest.raises(LensError, match=f"{tmp_path}: cannot be read: Is a directory"):
        read_shapes(tmp_path)
    with pytest.raises(LensError, match="/dev/zero: too large for a list of shapes"):
        read_shapes(Path("/dev/zero"))
