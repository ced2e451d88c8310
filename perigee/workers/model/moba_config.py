"""Which positions of which layers attend to some blocks only (MoBA), as a checkpoint or an operator says."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from perigee.workers.model.errors import UnsupportedModel

OFF = "off"
_DECODE = ("full", "moba")


@dataclass(frozen=True, slots=True)
class MobaConfig:
    """Mixture of block attention ("MoBA", section 2.2).

    A query attends to its own block of `block_size` tokens, causally, and to the `top_k` - 1 blocks before it that its
    gate likes best. The last `full_layers` layers, and queries at positions below `min_length`, attend to everything;
    so do the positions of the output if `decode` is "full", which is the paper's way of serving.
    """

    block_size: int
    top_k: int
    full_layers: int = 0
    min_length: int = 0
    decode: str = "full"

    def sparse_from(self, prompt_len: int) -> tuple[int, int]:
        """The positions [first, stop) of a sequence whose queries choose blocks. Chunk and batch decide nothing."""
        stop = prompt_len if self.decode == "full" else 2**62
        return min(self.min_length, stop), stop

    def describe(self) -> str:
        """A text that is equal for equal configurations: part of the namespace of blocks."""
        return "moba:" + ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))

    def check(self, block_tokens: int, num_layers: int) -> None:
        """Raises UnsupportedModel if blocks of this size are not made of whole KVCache blocks of `block_tokens`."""
        if self.block_size % block_tokens:
            raise UnsupportedModel(
                f"moba: block_size: {self.block_size} is not a multiple of block_tokens, which is {block_tokens}"
            )
        if self.full_layers > num_layers:
            raise UnsupportedModel(f"moba: full_layers: {self.full_layers}; the model has {num_layers}")

    @classmethod
    def from_json(cls, values: Mapping[str, Any], origin: str = "config.json: moba") -> "MobaConfig":
        """Raises UnsupportedModel naming the field, its value and what is allowed."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise UnsupportedModel(f"{origin}: {unknown[0]}: no such field; allowed are {', '.join(sorted(known))}")
        decode = values.get("decode", "full")
        if decode not in _DECODE:
            raise UnsupportedModel(f"{origin}: decode: {decode!r}; allowed are {', '.join(_DECODE)}")
        return cls(
            block_size=_integer(values, "block_size", 1, origin),
            top_k=_integer(values, "top_k", 1, origin),
            full_layers=_integer(values, "full_layers", 0, origin),
            min_length=_integer(values, "min_length", 0, origin),
            decode=decode,
        )

    @classmethod
    def parse(cls, text: str) -> "MobaConfig":
        """From `block_size=512,top_k=3,...`, as a flag says it. Raises UnsupportedModel."""
        values: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = part.partition("=")
            values[name.strip()] = int(value) if value.strip().isdigit() else value.strip()
        return cls.from_json(values, "moba")


def _integer(values: Mapping[str, Any], name: str, least: int, origin: str) -> int:
    value = values.get(name, 0 if least == 0 else None)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UnsupportedModel(f"{origin}: {name}: {value!r}; allowed are integers from {least} on")
    return value
