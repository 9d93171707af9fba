"""The tokenizer of a run, and how it differs from the base model's."""

from __future__ import annotations

from typing import Any

from jlora.config import Config
from jlora.data import load_tokenizer
from jlora.errors import JloraError
from jlora.ui.console import Console


def open_tokenizer(config: Config) -> Any:
    """The tokenizer that the settings name, with ``data.chat_template`` if that is given.

    A classifier's always has a padding token: transformers finds the end of a text by it.
    """
    name, revision = config.model.name_or_path, config.model.revision
    if other := config.model.tokenizer_name_or_path:
        name, revision = other, None
    tokenizer = load_tokenizer(name, config.data.chat_template, revision)
    if config.is_classification and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def note_other_tokenizer(console: Console, config: Config, tokenizer: Any) -> None:
    """Says in what the tokenizer differs from the base model's, if it is another one."""
    other = config.model.tokenizer_name_or_path
    if not other or other == config.model.name_or_path:
        return
    try:
        base = load_tokenizer(config.model.name_or_path, None, config.model.revision)
    except JloraError:
        console.note(f"the tokenizer is that of {other}; the base's cannot be read")
        return
    ids, own = base.get_vocab(), tokenizer.get_vocab()
    if added := sorted(own.keys() - ids.keys(), key=lambda token: own[token]):
        shown = ", ".join(map(repr, added[:5])) + (", …" if added[5:] else "")
        differences = [f"tokens that the base's lacks ({len(added)}: {shown})"]
    else:
        differences = ["other tokens than the base's"] if own != ids else []
    if tokenizer.chat_template != base.chat_template:
        differences.append("another chat template")
    if differences:
        console.note(
            f"the tokenizer is that of {other}: it has {' and '.join(differences)}; "
            f"model.tokenizer_name_or_path={config.model.name_or_path} takes the base's"
        )
