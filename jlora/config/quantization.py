"""The ``quantization`` section: how the frozen base is quantized (``jlora.QuantConfig``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from jlora.config.engine.convert import Bounds
from jlora.config.engine.faults import Fault
from jlora.config.engine.schema import DTYPE_ALIASES, ConfigSection, DType


@dataclass(frozen=True, kw_only=True)
class QuantConfig(ConfigSection):
    """Quantization of the base's linear layers; fields of transformers' ``BitsAndBytesConfig``."""

    ALIASES: ClassVar = {"bnb_4bit_compute_dtype": DTYPE_ALIASES}

    load_in_4bit: bool | None = None
    """Quantize to 4 bits; null: true, unless load_in_8bit is."""
    load_in_8bit: bool = False
    """Quantize weights to int8 with one scale per output channel; activations stay in the compute
    dtype, unlike in LLM.int8()."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type. NF4 is made for normally distributed weights and loses less than FP4."""
    # transformers' default is false; QLoRA's own runs have it on.
    bnb_4bit_use_double_quant: bool = True
    """Quantize the absmax of each block, too: 4.13 instead of 4.5 bits per parameter."""
    bnb_4bit_compute_dtype: DType = "bfloat16"
    """Data type of products with dequantized weights. A run computes in the one type that
    train.bf16 and train.fp16 choose, and warns if this differs."""
    block_size: Annotated[int, Bounds(32, 4096)] = 64
    """Number of consecutive values that share one absmax (4-bit only); a power of two."""
    llm_int8_skip_modules: Sequence[str] = ()
    """Modules to leave unquantized, by name, in all layers or in one (model.layers.0.mlp);
    embeddings and lm_head always are."""
    include_modules: Sequence[str] = ()
    """Modules to quantize although they are skipped by default: embed_tokens, lm_head."""

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
            yield Fault(keys, f"{name} is in both", "remove it from one of them")
        if self.block_size & (self.block_size - 1):
            yield Fault(("block_size",), f"must be a power of two, got {self.block_size}")
