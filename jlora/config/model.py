"""The ``model`` section: which base model is loaded, and how it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from jlora.config.engine.convert import Bounds
from jlora.config.engine.faults import Fault
from jlora.config.engine.schema import DTYPE_ALIASES, ConfigSection, DType, InputPath


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ConfigSection):
    """The base model."""

    ALIASES: ClassVar = {"dtype": DTYPE_ALIASES}

    name_or_path: InputPath
    """A transformers model folder, a hub name, or jlora://… for a model shipped with jlora."""
    dtype: DType = "bfloat16"
    """Data type of the parameters; also of the computation, unless train.bf16 or train.fp16 says
    otherwise."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    tokenizer_name_or_path: InputPath | None = None
    """Folder or hub name of the tokenizer; null: the model's. For a PEFT adapter's folder: that
    folder, if it has a tokenizer."""
    attention: str = "auto"
    """Attention implementation: reference, chunked, cudnn (GPU) or splash (TPU); auto picks one,
    which is printed when a run starts."""
    untie: bool = False
    """Give an output head that is tied to the embedding its own copy of it, so that either can be
    trained or merged without the other."""
    new_tokens: Sequence[str] = ()
    """Tokens to add to the tokenizer. Where the embedding has no spare rows for them, it and the
    output head get new ones, each the mean of the others; to train them, name their ids in
    lora.trainable_token_indices, or the embedding and the head in lora.modules_to_save."""
    num_labels: Annotated[int, Bounds(2)] | None = None
    """Number of classes of a classifier; null: the model's, or else the number in the training
    data."""
    id2label: Sequence[str] | None = None
    """Class names in the order of their ids; null: the model's, or else those in the training
    data."""

    def check(self) -> Iterator[Fault]:
        """See ConfigSection."""
        if len(set(self.new_tokens)) < len(self.new_tokens):
            yield Fault(("new_tokens",), "a token is listed twice")
        if not all(token.strip() for token in self.new_tokens):
            yield Fault(("new_tokens",), "a token is empty, or white space only")
        names, keys = self.id2label, ("id2label", "num_labels")
        if names is None:
            return
        if len(set(names)) != len(names) or len(names) < 2:
            yield Fault(("id2label",), "needs at least two names, all different")
        elif self.num_labels not in (None, len(names)):
            yield Fault(keys, f"has {len(names)} names, but num_labels is {self.num_labels}")
