"""The ``quantization`` section."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from jlora.config.engine.convert import Bounds
from jlora.config.engine.faults import Fault
from jlora.config.engine.schema import DTYPE_ALIASES, ConfigSection, DType


@dataclass(frozen=True, kw_only=True)
class QuantConfig(ConfigSection):
    """How frozen linear layers are packed (names of ``BitsAndBytesConfig``)."""

    ALIASES: ClassVar = {"bnb_4bit_compute_dtype": DTYPE_ALIASES}

    load_in_4bit: bool | None = None
    """Pack into 4 bits; null: unless load_in_8bit."""
    load_in_8bit: bool = False
    """Pack into 8 bits with one scale for each output; products stay in the computation's type."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit code: nf4 suits trained weights better."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the blocks' scales too: 4.13 bits a parameter instead of 4.5."""
    bnb_4bit_compute_dtype: DType = "bfloat16"
    """Type to multiply in; a run multiplies everything in one type (train.bf16), and warns."""
    block_size: Annotated[int, Bounds(32, 4096)] = 64
    """Values that share one scale; a power of two."""
    llm_int8_skip_modules: Sequence[str] = ()
    """Names of modules to leave unquantized, besides embeddings and the output head."""
    include_modules: Sequence[str] = ()
    """Names of modules to quantize that are left out otherwise: embed_tokens, lm_head."""

    def derive_defaults(self) -> None:
        """See ConfigSection."""
        if self.load_in_4bit is None:
            object.__setattr__(self, "load_in_4bit", not self.load_in_8bit)

    def check(self) -> Iterator[Fault]:
        """See ConfigSection."""
        if self.load_in_4bit and self.load_in_8bit:
            yield Fault(("load_in_8bit", "load_in_4bit"), "both are true", "set one to false")
        if self.load_in_4bit is False and not self.load_in_8bit:
            yield Fault(("load_in_4bit",), "nothing is quantized", "leave the section out")
        for name in {*self.llm_int8_skip_modules} & {*self.include_modules}:
            keys = ("include_modules", "llm_int8_skip_modules")
            yield Fault(keys, f"{name} is in both", "remove it from one")
        if self.block_size & (self.block_size - 1):
            yield Fault(("block_size",), f"must be a power of two, got {self.block_size}")
