"""The ``model`` section."""

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
    """A transformers folder, a hub name, or jlora://… for what the package ships."""
    dtype: DType = "bfloat16"
    """Type of the parameters in memory and of the computation."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    attention: str = "auto"
    """auto, or one of reference, chunked, cudnn and splash; the run header says what auto took."""
    num_labels: Annotated[int, Bounds(2)] | None = None
    """Classes of a classifier; null: the model's own, else those in the training data."""
    id2label: Sequence[str] | None = None
    """Names of the classes in the order of their ids; null: the model's own, else the data's."""

    def check(self) -> Iterator[Fault]:
        """See ConfigSection."""
        names, keys = self.id2label, ("id2label", "num_labels")
        if names is None:
            return
        if len(set(names)) != len(names) or len(names) < 2:
            yield Fault(("id2label",), "needs two names or more, each once")
        elif self.num_labels not in (None, len(names)):
            yield Fault(keys, f"has {len(names)} names, but num_labels is {self.num_labels}")
