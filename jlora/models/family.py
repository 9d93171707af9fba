"""A model family: how its ``config.json`` is read and how its tensors are named.

The decoder's modules have Llama's names. The parameter tree has the names of the modules in
transformers; ``Family.stored`` lists the tensors in files that are named differently.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

from jlora.models.config import DecoderConfig
from jlora.models.config_reader import ConfigReader

LANGUAGE_MODEL = "(ForCausalLM|LMHeadModel|ForConditionalGeneration)$"
"""The suffixes of transformers' model classes with a language model's head."""

CLASSIFIER = "ForSequenceClassification"
"""The suffix of transformers' model classes with a score head."""


@dataclasses.dataclass(frozen=True)
class TensorPart:
    """One or more tensors of a file that hold a part of one layer's leaf.

    ``name`` follows the layer's prefix, or is the full name outside layers. ``{}`` in it counts
    along the leaf's first axis, one tensor per index; each tensor is the ``part``-th of ``parts``
    equal slices of the next axis.
    """

    name: str
    part: int = 0
    parts: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One ``model_type``."""

    read: Callable[[ConfigReader], DecoderConfig]
    """Makes the DecoderConfig from the keys of a ``config.json``."""
    architecture: str
    """transformers' class of the language model."""
    scored: str | None = None
    """transformers' class with a score head, if its name has another stem."""
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Llama's name of a module (or of a leaf other than weight and bias) → this family's. A dotted
    name stands for nested modules, an empty one for none."""
    stored: Mapping[str, tuple[TensorPart, ...]] = dataclasses.field(default_factory=dict)
    """End of a leaf's dotted path → the tensors that hold it, where their names differ."""
    transposed: bool = True
    """Linear weights are [out, in] in files (torch's Linear); False: [in, out] (Conv1D)."""
    flipped: tuple[str, ...] = ()
    """Kinds of other leaves whose files hold the transpose of the leaf."""
    quant_methods: tuple[str, ...] = ("bitsandbytes",)
    """Quantization methods (``quantization_config.quant_method``) whose folders can be read."""
    buffers: str = r"(.*\.)?rotary_emb\.inv_freq"
    """Regular expression of the names of constants that some checkpoints contain; ignored."""
    prefixes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Prefix of module names → what it is in files; a prefix that is not listed is the same."""
    other_tensors: str | None = None
    """Regular expression of the names of tensors in files that belong to no part of the model (a
    vision tower): they are not read, and copied when the model is saved."""

    @property
    def classifier(self) -> str:
        """The class with a score head in transformers, as far as there is one."""
        return self.scored or re.sub(LANGUAGE_MODEL, CLASSIFIER, self.architecture)

    def name_in_files(self, name: str) -> str:
        """The name that files have for the tensor of a module."""
        for module, stored in self.prefixes.items():
            if name.startswith(module):
                return stored + name.removeprefix(module)
        return name

    def rename(self, path: tuple[str, ...]) -> tuple[str, ...]:
        """``path`` with Llama's names replaced by the family's."""
        new = (self.names.get(key, key) for key in path)
        return tuple(part for key in new if key for part in key.split("."))
