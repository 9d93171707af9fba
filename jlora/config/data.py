"""The ``data`` section."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from jlora.config.engine.convert import Bounds
from jlora.config.engine.faults import Fault
from jlora.config.engine.schema import ConfigSection, InputPath, LocalPath, Positive


@dataclass(frozen=True, kw_only=True)
class SourceConfig(ConfigSection):
    """One source of rows."""

    path: InputPath
    """A jsonl, json, csv or parquet file (txt for text), a folder, a glob, or a hub name."""
    format: Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text", "classification"]
    """How a row is read."""
    weight: Positive = 1.0
    """How many times an epoch takes its rows; a fraction takes part of them."""
    split: str | None = None
    """Split of a hub data set."""
    name: str | None = None
    """Configuration name of a hub data set."""
    adapter: str | None = None
    """The adapter that these rows train, in a run that trains several; its folder has this name."""

    def check(self) -> Iterator[Fault]:
        """See ConfigSection."""
        if self.adapter is None:
            return
        if not re.fullmatch(r"[\w-]+", self.adapter) or self.adapter in ("checkpoints", "merged"):
            cause = f"{self.adapter!r} cannot be a folder of the run"
            yield Fault(("adapter",), cause, "use letters, digits, _ and -")


@dataclass(frozen=True, kw_only=True)
class DataConfig(ConfigSection):
    """Rows, and how they become batches."""

    train: tuple[SourceConfig, ...]
    """Sources to train on."""
    eval: tuple[SourceConfig, ...] = ()
    """Held-out sources."""
    max_length: Annotated[int, Bounds(2)] = 1024
    """Tokens in a row of a batch; longer examples are cut."""
    packing: bool = True
    """Put several examples into one row; attention never crosses from one to another."""
    eval_packing: bool | None = None
    """The same for held-out rows; null: as packing."""
    shuffle: bool = True
    """Order by seed and epoch; false: the files' order."""
    assistant_only_loss: bool = True
    """Loss on assistant or completion tokens only; false: on every token."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A malformed row stops the run, or is counted and left out."""
    chat_template: LocalPath | None = None
    """A jinja file that replaces the tokenizer's chat template."""

    def check(self) -> Iterator[Fault]:
        """See ConfigSection."""
        if not self.train:
            yield Fault(("train",), "no source to train on", "add {path: …, format: messages}")
        named = [s.adapter for s in self.train or ()]
        if any(named) and not all(named):
            yield Fault(
                ("train",), "some sources name an adapter, others do not", "name all or none"
            )
        for i, source in enumerate(self.eval):
            if bool(source.adapter) != any(named) or source.adapter not in (*named, None):
                fix = f"name one of {', '.join(map(str, named))}" if any(named) else "leave it out"
                yield Fault((f"eval.{i}.adapter",), f"{source.adapter} is not trained", fix)
