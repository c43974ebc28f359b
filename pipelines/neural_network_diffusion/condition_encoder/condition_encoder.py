"""What is asked for: values of the columns of a zoo, as embeddings."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


# A config may come from anywhere, and its layers take memory before any weight is read.
MOST_COLUMNS, MOST_VALUES = 100, 10**6
# Known words that an error lists.
SHOWN = 10
# Numbers that differ by less, relative to their size, are the same but for rounding.
SMALLEST_SPREAD = 1e-9
KINDS = ("number", "numbers", "word")
Row = dict[str, Any]


class ConditionEncoder(ModelMixin, ConfigMixin):
    r"""
    Turns rows of what is asked for, such as `{"accuracy": 0.97, "classes": [0, 1, 1]}`, into embeddings. Numbers are
    standardized, words are looked up, and a learned vector stands for each column of which nothing is asked. The
    numbers of a list, such as pixels, have one unit: those that vary less than a tenth of what the most varying one
    does are divided by that tenth. Numbers of other units are columns of their own.

    Parameters:
        columns (`list[dict]`):
            What can be asked for: `{"name": str, "kind": "number", "mean": [float], "std": [float]}`; of the kind
            `"numbers"`, lists of one length, mean and std have that length; of the kind `"word"`,
            `{"name": str, "kind": "word", "words": list[str]}`.
        embedding_dim (`int`, *optional*, defaults to 128): Size E of an embedding.
    """

    @register_to_config
    def __init__(self, columns: list[dict[str, Any]], embedding_dim: int = 128):
        super().__init__()
        if not 1 <= len(columns) <= MOST_COLUMNS:
            raise ValueError(f"`columns` has to hold 1 to {MOST_COLUMNS}, and holds {len(columns)}.")
        self.unasked = nn.Parameter(torch.zeros(len(columns), embedding_dim))
        self.embeddings = nn.ModuleList([_embedding(column, embedding_dim) for column in columns])
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(embedding_dim, embedding_dim))

    @classmethod
    def from_rows(cls, rows: Sequence[Row], names: Sequence[str], embedding_dim: int = 128) -> "ConditionEncoder":
        r"""
        A new encoder of some columns, of which a row may lack some.

        Args:
            rows (`Sequence[dict]`): Rows of a zoo.
            names (`Sequence[str]`): The columns.
            embedding_dim (`int`, *optional*, defaults to 128): Size E of an embedding.

        Raises:
            `ValueError`: a column that is not there, or holds what cannot be asked for.
        """
        return cls(
            [_fitted(name, [row[name] for row in rows if row.get(name) is not None]) for name in names], embedding_dim
        )

    def codes(self, rows: Sequence[Row]) -> torch.Tensor:
        r"""
        What is asked for as numbers, `[B, K]`: standardized numbers, and places of words; NaN where nothing is asked.

        Raises:
            `ValueError`: a column, a word or a length that the encoder does not know.
        """
        columns = self.config.columns
        known = {column["name"] for column in columns}
        codes = []
        for row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"A condition has to be a dict, and is {row!r:.200}.")
            if unknown := sorted(str(name) for name in row.keys() - known):
                raise ValueError(f"{unknown[0]!r:.100} is nothing to ask for. {self.known()}")
            codes.append([code for column in columns for code in self._code(column, row.get(column["name"]))])
        return torch.tensor(codes, dtype=torch.float32).reshape(len(rows), sum(map(_width, columns)))

    def embed(self, codes: torch.Tensor, asked: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings `[B, E]` of codes `[B, K]`; of the columns that are not asked for, `[B, columns]`, nothing is
        told."""
        total = torch.zeros_like(self.unasked[0]).expand(len(codes), -1)
        start = 0
        for index, (column, embedding) in enumerate(zip(self.config.columns, self.embeddings, strict=True)):
            values = codes[:, start : start + _width(column)]
            start += _width(column)
            told = ~values.isnan().any(1, keepdim=True)
            if asked is not None:
                told = told & asked[:, index : index + 1]
            values = values.nan_to_num(0.0)
            if column["kind"] == "word":
                embedded = embedding(values[:, 0].long())
            else:
                embedded = embedding(values.to(self.unasked.dtype))
            total = total + torch.where(told, embedded, self.unasked[index])
        return self.mlp(total)

    def forward(self, rows: Sequence[Row]) -> torch.Tensor:
        r"""
        Args:
            rows (`Sequence[dict]`): What is asked for, a dict each; what it lacks, or is None, is not asked for.

        Returns:
            `torch.Tensor`: `[B, E]`.

        Raises:
            `ValueError`: as [`~ConditionEncoder.codes`].
        """
        return self.embed(self.codes(rows).to(self.device))

    def known(self) -> str:
        """A sentence that says what can be asked for."""
        return f"Known are {', '.join(map(_described, self.config.columns))}."

    def _code(self, column: dict[str, Any], value: Any) -> list[float]:
        if value is None:
            return [math.nan] * _width(column)
        if column["kind"] == "word":
            if value not in column["words"]:
                raise ValueError(f"{column['name']!r} cannot be {value!r:.100}. {self.known()}")
            return [float(column["words"].index(value))]
        values = value if column["kind"] == "numbers" else [value]
        if not isinstance(values, (list, tuple)) or len(values) != len(column["mean"]):
            raise ValueError(f"{column['name']!r} cannot be {value!r:.100}. {self.known()}")
        if not all(map(_is_finite, values)):
            raise ValueError(f"{column['name']!r} takes finite numbers, and {value!r:.100} holds others.")
        return [(one - mean) / std for one, mean, std in zip(values, column["mean"], column["std"], strict=True)]


def _fitted(name: str, values: list[Any]) -> dict[str, Any]:
    """The description of a column of these values."""
    if not values:
        raise ValueError(f"No row has {name!r}.")
    if all(isinstance(value, str) for value in values):
        return {"name": name, "kind": "word", "words": sorted(set(values))}
    lists = [value if isinstance(value, list) else [value] for value in values]
    numbers = all(_is_finite(one) for value in lists for one in value)
    same = len({(type(value) is list, len(one)) for value, one in zip(values, lists, strict=True)}) == 1
    if not numbers or not same or not lists[0]:
        raise ValueError(
            f"{name!r} cannot be asked for: its values have to be finite numbers, lists of them of one length, or "
            f"words, and among them is {values[0]!r:.100}."
        )
    table = torch.tensor(lists, dtype=torch.float64)
    std = table.std(0, correction=0)
    return {
        "name": name,
        "kind": "numbers" if isinstance(values[0], list) else "number",
        "mean": table.mean(0).tolist(),
        # What hardly varies here may well vary where it is asked for.
        "std": torch.where(
            std.amax() > SMALLEST_SPREAD * table.abs().amax(), std.clamp_min(0.1 * std.amax()), 1.0
        ).tolist(),
    }


def _width(column: dict[str, Any]) -> int:
    return 1 if column["kind"] == "word" else len(column["mean"])


def _described(column: dict[str, Any]) -> str:
    if column["kind"] == "word":
        words = column["words"]
        more = ", ..." if len(words) > SHOWN else ""
        return f"{column['name']} (one of {', '.join(map(repr, words[:SHOWN]))}{more})"
    count = len(column["mean"])
    return f"{column['name']} ({'a number' if column['kind'] == 'number' else f'a list of {count} numbers'})"


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # of whole numbers that no float holds
        return False


def _embedding(column: dict[str, Any], size: int) -> nn.Module:
    if column["kind"] not in KINDS:
        raise ValueError(f"The column {column['name']!r:.100} is of the kind {column['kind']!r:.100}.")
    width = len(column["words"]) if column["kind"] == "word" else len(column["mean"])
    if not 1 <= width <= MOST_VALUES or (column["kind"] != "word" and len(column["std"]) != width):
        raise ValueError(f"The column {column['name']!r:.100} has {width} values, which do not fit.")
    if column["kind"] == "word":
        words = column["words"]
        texts = isinstance(words, (list, tuple)) and all(isinstance(word, str) for word in words)
        if not texts or len(set(words)) < width:
            raise ValueError(f"The column {column['name']!r:.100} has words that are no texts, or stand twice.")
    elif not all(map(_is_finite, (*column["mean"], *column["std"]))) or min(column["std"]) <= 0:
        raise ValueError(
            f"The column {column['name']!r:.100} has to have finite means, and finite standard deviations above 0."
        )
    return nn.Embedding(width, size) if column["kind"] == "word" else nn.Linear(width, size)
