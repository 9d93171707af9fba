"""The ``data`` section: sources of rows, and how rows become batches."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from jlora.config.engine.convert import Bounds, FrozenMap
from jlora.config.engine.faults import Fault
from jlora.config.engine.schema import ConfigSection, InputPath, LocalPath, Positive

RESERVED_FOLDERS = ("checkpoints", "merged")
"""Folders of a run that an adapter cannot be named like."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig(ConfigSection):
    """One source of rows, in data.train or data.eval."""

    path: InputPath
    """A JSONL, JSON, CSV, TSV, Parquet, Arrow or text file (also .gz or .zst), a folder, a glob
    pattern, or a hub name."""
    format: Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text", "classification"]
    """Format of the rows; see docs/data_formats.md."""
    weight: Positive = 1.0
    """Number of times each row occurs in an epoch; with 0.5, half of the rows occur."""
    split: str | None = None
    """Split of a folder or a hub dataset, or a slice of it, such as test[:100]; null: train, or a
    folder's only split. A file has slices only."""
    name: str | None = None
    """Configuration name of a hub dataset, or of a folder whose README.md lists configurations."""
    adapter: str | None = None
    """In a multi-adapter run, the adapter that these rows train, which is also its folder's
    name."""

    def check(self) -> Iterator[Fault]:
        """See ConfigSection."""
        if self.adapter is None:
            return
        if not re.fullmatch(r"[\w-]+", self.adapter) or self.adapter in RESERVED_FOLDERS:
            cause = f"{self.adapter!r} cannot be the name of an adapter's folder"
            fix = f"use letters, digits, _ and -, and none of {', '.join(RESERVED_FOLDERS)}"
            yield Fault(("adapter",), cause, fix)


@dataclass(frozen=True, kw_only=True)
class DataConfig(ConfigSection):
    """Training and held-out rows, and how they become batches."""

    train: tuple[SourceConfig, ...]
    """Sources to train on."""
    eval: tuple[SourceConfig, ...] = ()
    """Held-out sources for evaluation."""
    max_length: Annotated[int, Bounds(2)] = 1024
    """Length of a row in tokens; longer examples are truncated."""
    packing: bool = True
    """Pack several examples into one row; attention never crosses from one to another."""
    eval_packing: bool | None = None
    """Packing of held-out rows; null: as packing."""
    shuffle: bool = True
    """Shuffle the rows in each epoch, by train.seed; false: keep the order of the files."""
    assistant_only_loss: bool = True
    """Compute the loss on assistant messages or completions only; false: on all tokens, except
    those of messages with weight 0 or train: false."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a malformed row causes: error stops the run, skip drops and counts the row."""
    on_unknown_key: Literal["warn", "error"] = "warn"
    """What keys of rows cause that are not read: warn lists them with their numbers of rows."""
    chat_template: LocalPath | None = None
    """A Jinja file to use instead of the tokenizer's chat template."""
    chat_template_kwargs: Mapping[str, str | int | float | bool | None] = FrozenMap()
    """Variables for the chat template, such as enable_thinking: false; those of a row prevail."""

    def check(self) -> Iterator[Fault]:
        """See ConfigSection."""
        if not self.train:
            yield Fault(("train",), "no source to train on", "add {path: …, format: messages}")
        trained = [source.adapter for source in self.train or ()]
        if any(trained) and not all(trained):
            cause = "some sources name an adapter and others do not"
            yield Fault(("train",), cause, "name an adapter in all of them or in none")
        for i, source in enumerate(self.eval):
            if bool(source.adapter) != any(trained) or source.adapter not in (*trained, None):
                names = ", ".join(dict.fromkeys(str(name) for name in trained))
                fix = f"name one of {names}" if any(trained) else "leave it out"
                yield Fault((f"eval.{i}.adapter",), f"{source.adapter} is not trained", fix)
