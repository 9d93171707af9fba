"""The tokenizer of a run, and how it differs from the base model's."""

from __future__ import annotations

import dataclasses
from typing import Any

from jlora.config import Config
from jlora.data import add_tokens, load_tokenizer
from jlora.errors import JloraError
from jlora.ui.console import Console


def open_tokenizer(config: Config) -> Any:
    """The tokenizer that the settings name, with ``model.new_tokens`` and ``data.chat_template``.

    A classifier's always has a padding token: transformers finds the end of a text by it.
    """
    name, revision = config.model.name_or_path, config.model.revision
    if other := config.model.tokenizer_name_or_path:
        name, revision = other, None
    tokenizer = load_tokenizer(name, config.data.chat_template, revision)
    add_tokens(tokenizer, config.model.new_tokens)
    if config.is_classification and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def open_with_new_tokens(config: Config, console: Console) -> tuple[Config, Any]:
    """The tokenizer, and the settings without new tokens that the base has already.

    These are noted. A tokenizer that is not the base's may have tokens that the base lacks.
    """
    asked = config.model
    without = dataclasses.replace(config, model=dataclasses.replace(asked, new_tokens=()))
    tokenizer = open_tokenizer(without)
    known = add_tokens(tokenizer, asked.new_tokens)
    if asked.tokenizer_name_or_path:
        return config, tokenizer
    for token in known:
        number = tokenizer.convert_tokens_to_ids(token)
        console.note(f"model.new_tokens: the tokenizer has {token} already, as token {number}")
    new = tuple(token for token in asked.new_tokens if token not in known)
    return dataclasses.replace(config, model=dataclasses.replace(asked, new_tokens=new)), tokenizer


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
