"""The shapes of a model's weights: four GPTs by name, or any list of matrices from a file.

``gpt-124m`` and ``gpt-350m`` are GPT-2 and GPT-2 medium without biases, their vocabulary of 50,257
padded to 50,304. Of ``gpt-1.1b`` and ``gpt-5.4b`` the paper [1]_ gives layers, width, grouped
queries, an MLP of four times the width and the total. The rest is chosen here: heads as in the
well-known models of the very same layers and width, Llama 3.2 1B (32 query heads share 8 heads of
keys and values) and Qwen 2.5 7B (28 share 4), whose MLPs are gated; and 32,000 tokens with a head
of their own, because this one vocabulary brings both to the paper's totals, 1.10 and 5.37 billion.
Without the gate, 1.1 billion would take 97 thousand tokens and 5.4 billion 237 thousand.

.. [1] NorMuon, https://arxiv.org/abs/2510.05491
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from normuon_lens.errors import LensError


@dataclass(frozen=True)
class Preset:
    """A decoder-only transformer, described by its shapes.

    Attributes
    ----------
    name : str
    layers, width : int
    heads, kv_heads : int
        Query heads, and the heads of keys and values that they share (equal: none is shared).
    vocabulary, context : int
    gated : bool
        Whether the MLP multiplies a third matrix, ``mlp.gate``, into what ``mlp.up`` gives.
    learned_positions : bool
        Whether a table holds one vector per position; otherwise positions are rotary, which takes
        no parameters.
    tied : bool
        Whether the output head is the token embedding.
    mlp_ratio : int
        Width of the MLP in widths of the model.
    """

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    gated: bool
    learned_positions: bool
    tied: bool
    mlp_ratio: int = 4

    def matrices(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield name and shape (m, n) of every weight matrix, in the order of the model."""
        d = self.width
        shared = self.kv_heads * (d // self.heads)
        inner = self.mlp_ratio * d
        block = {
            "attn.q": (d, d),
            "attn.k": (shared, d),
            "attn.v": (shared, d),
            "attn.o": (d, d),
            **({"mlp.gate": (inner, d)} if self.gated else {}),
            "mlp.up": (inner, d),
            "mlp.down": (d, inner),
        }
        for layer in range(self.layers):
            for name, shape in block.items():
                yield f"blocks.{layer}.{name}.weight", shape

    def others(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of every other parameter: embeddings, norms, head."""
        d = self.width
        yield "tokens.weight", (self.vocabulary, d)
        if self.learned_positions:
            yield "positions.weight", (self.context, d)
        for layer in range(self.layers):
            yield f"blocks.{layer}.norm_attn.weight", (d,)
            yield f"blocks.{layer}.norm_mlp.weight", (d,)
        yield "norm.weight", (d,)
        if not self.tied:
            yield "head.weight", (self.vocabulary, d)

    @property
    def about(self) -> str:
        """What a reader who knows transformers wants to be told, in one line."""
        shared = f" ({self.kv_heads} of keys and values)" if self.kv_heads < self.heads else ""
        return (
            f"{self.layers} layers × {self.width:,}, {self.heads} heads{shared}, "
            f"{'gated ' if self.gated else ''}MLP {self.mlp_ratio}×, {self.vocabulary:,} tokens"
            f"{' (tied)' if self.tied else ''}"
        )

    @property
    def parameters(self) -> int:
        """Number of all parameters."""
        return sum(math.prod(shape) for _, shape in (*self.matrices(), *self.others()))


def _gpt2(name: str, layers: int, width: int, heads: int) -> Preset:
    return Preset(
        name,
        layers,
        width,
        heads,
        kv_heads=heads,
        vocabulary=50_304,
        context=1024,
        gated=False,
        learned_positions=True,
        tied=True,
    )


def _paper(name: str, layers: int, width: int, heads: int, kv_heads: int) -> Preset:
    return Preset(
        name,
        layers,
        width,
        heads,
        kv_heads,
        vocabulary=32_000,
        context=4096,
        gated=True,
        learned_positions=False,
        tied=False,
    )


PRESETS = {
    preset.name: preset
    for preset in (
        _gpt2("gpt-124m", layers=12, width=768, heads=12),
        _gpt2("gpt-350m", layers=24, width=1024, heads=16),
        _paper("gpt-1.1b", layers=16, width=2048, heads=32, kv_heads=8),
        _paper("gpt-5.4b", layers=28, width=3584, heads=28, kv_heads=4),
    )
}
"""The known models, by name, smallest first."""


def find_preset(name: str) -> Preset:
    """Return a known model.

    Parameters
    ----------
    name : str
        Such as ``"gpt-1.1b"``, or ``"1.1b"`` for short, in letters of either case.

    Raises
    ------
    LensError
        If there is none of this name; the message names the closest, and all.
    """
    wanted = name.strip().lower()
    full = f"gpt-{wanted.removeprefix('gpt-')}"
    if full in PRESETS:
        return PRESETS[full]
    close = difflib.get_close_matches(full, PRESETS, n=1, cutoff=0.75)
    hint = f"did you mean {close[0]}? All: " if close else "known are "
    raise LensError(f"no model named {_shown(name)}: {hint}{', '.join(PRESETS)}.")


# One matrix: [48 *] [name] m n. The name needs a letter, so that a third number is none.
_LINE = re.compile(
    r"(?:(?P<count>\d+)\s*\*\s*)?"
    r"(?:[^\s,]*[^\W\d][^\s,]*[\s,]+)?"
    r"(?P<m>\d+)(?:\s*[x×,]\s*|\s+)(?P<n>\d+)"
)
_EXPECTED = 'expected "name m n", "m n", "m x n" or "48 * m n"'
_EXPECTED_JSON = 'expected {"name": [m, n], ...} with whole numbers'
_LARGEST = 10**9  # rows, columns
_MOST = 10**5  # matrices
_MOST_BYTES = 2**24


def read_shapes(path: Path) -> list[tuple[int, int]]:
    """Read a list of matrices from a text or JSON file.

    Parameters
    ----------
    path : Path
        Text with one matrix a line, as ``name m n``, ``m n``, ``m, n`` or ``m x n``, with ``48 *``
        before it for 48 of them; ``#`` starts a comment. Or a JSON object ``{"name": [m, n]}``.
        UTF-8. A convolution counts as (out_channels, rest).

    Returns
    -------
    list of (int, int)
        Rows m and columns n of each matrix, in the order of the file.

    Raises
    ------
    LensError
        If the file cannot be read, or holds anything else, or nothing; the message names the
        line.
    """
    text = _read_text(path)
    shapes = _from_json(path, text) if text.lstrip().startswith("{") else _from_lines(path, text)
    if not shapes:
        raise LensError(f"{path}: no matrices in it; {_EXPECTED} on each line.")
    return shapes


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise LensError(f"{path}: cannot be read: {error.strerror}.") from None
    if len(content) > _MOST_BYTES:
        raise LensError(f"{path}: too large for a list of shapes (more than 16 MiB).")
    try:
        if b"\0" in content:
            raise ValueError
        return content.decode("utf-8-sig")
    except ValueError:
        raise LensError(f"{path}: not a text file in UTF-8; {_EXPECTED} on each line.") from None


def _from_lines(path: Path, text: str) -> list[tuple[int, int]]:
    shapes: list[tuple[int, int]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        where = f"{path}:{number}"
        found = _LINE.fullmatch(content)
        # Numbers of many digits are out of range anyway, and slow or refused in int().
        if found is None or any(len(group) > 18 for group in found.groups() if group):
            raise LensError(f"{where}: {_shown(content)} is no matrix; {_EXPECTED}.")
        count = int(found["count"] or 1)
        if not 1 <= count <= _MOST - len(shapes):
            raise LensError(f"{where}: {count:,} matrices; a list has 1 to {_MOST:,}.")
        shapes += count * [_checked(where, int(found["m"]), int(found["n"]))]
    return shapes


def _from_json(path: Path, text: str) -> list[tuple[int, int]]:
    try:
        # As pairs: a name that comes twice is two matrices.
        pairs = json.loads(text, object_pairs_hook=list)
    except json.JSONDecodeError as error:
        raise LensError(f"{path}:{error.lineno}: not valid JSON: {error.msg}.") from None
    except (RecursionError, ValueError):  # nested too deep, a number of too many digits
        raise LensError(f"{path}: {_EXPECTED_JSON}.") from None
    shapes = []
    for name, shape in pairs:
        match shape:
            case [int(m), int(n)] if not isinstance(m, bool) and not isinstance(n, bool):
                shapes.append(_checked(f"{path}: {_shown(name)}", m, n))
            case _:
                raise LensError(f"{path}: {_shown(name)} is no matrix; {_EXPECTED_JSON}.")
    return shapes


def _checked(where: str, m: int, n: int) -> tuple[int, int]:
    if min(m, n) < 2:
        raise LensError(
            f"{where}: {m} x {n} is not a matrix, which has at least two rows and two columns; "
            "leave it out, it is AdamW's."
        )
    if max(m, n) > _LARGEST:
        raise LensError(f"{where}: more than {_LARGEST:,} rows or columns.")
    return m, n


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:39]}…")
