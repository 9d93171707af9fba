"""What sets a family of models apart: how its ``config.json`` reads and how its tensors are called.

Modules are written with Llama's names (``transformer``). The parameter tree has the family's own
names, those of transformers' modules; where a file has yet others, ``Family.stored`` says how.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

from jlora.models.config import DecoderConfig
from jlora.models.config_reader import ConfigReader

CLASSIFIER = "ForSequenceClassification"
"""How transformers' classes with a score head are called at the end."""


@dataclasses.dataclass(frozen=True)
class TensorPart:
    """Tensors of a file that make up a leaf of one layer.

    ``name`` follows the layer's number, or is whole outside layers. ``{}`` in it counts along the
    leaf's first axis, one tensor each; the tensors are the ``part``-th of ``parts`` equal parts of
    the axis that follows.
    """

    name: str
    part: int = 0
    parts: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One ``model_type``.

    ``read`` makes the configuration of a ``config.json``. ``architecture`` is the class that
    transformers builds; ``scored`` is its class with a score head, where that has another stem.
    ``names`` are the family's own for Llama's: of a node, or of a leaf that is no weight or bias; a
    dotted one is several nodes, an empty one none. ``stored`` says which tensors of a file hold a
    leaf, by the end of its dotted path in the tree. Linear weights lie [out, in] in files (torch's
    Linear) if ``transposed``, else [in, out] (Conv1D); other leaves of the kinds ``flipped`` lie
    there as the transpose of what they are here.
    ``quant_methods`` are the ways in which a file's weights may be packed. Tensors whose whole name
    matches ``buffers`` are constants that some checkpoints store.
    """

    read: Callable[[ConfigReader], DecoderConfig]
    architecture: str
    scored: str | None = None
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stored: Mapping[str, tuple[TensorPart, ...]] = dataclasses.field(default_factory=dict)
    transposed: bool = True
    flipped: tuple[str, ...] = ()
    quant_methods: tuple[str, ...] = ("bitsandbytes",)
    buffers: str = r"(.*\.)?rotary_emb\.inv_freq"

    @property
    def classifier(self) -> str:
        """The class that transformers builds with a score head, as far as it has one."""
        return self.scored or re.sub("(ForCausalLM|LMHeadModel)$", CLASSIFIER, self.architecture)

    def rename(self, path: tuple[str, ...]) -> tuple[str, ...]:
        """A path with the family's names in place of Llama's."""
        new = (self.names.get(key, key) for key in path)
        return tuple(part for key in new if key for part in key.split("."))
