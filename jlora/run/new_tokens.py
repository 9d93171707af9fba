"""``model.new_tokens``: their ids, the size of the vocabulary, and which rows are not trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jlora.config import Config, LoraConfig
from jlora.errors import ConfigError
from jlora.io.peft import saved_vocab_size
from jlora.lora.targets import is_replaced, rank_of, token_indices
from jlora.models import Model, vocabulary_leaves


def new_token_ids(config: Config, tokenizer: Any) -> dict[str, int]:
    """The settings' new tokens and their ids."""
    return {token: tokenizer.convert_tokens_to_ids(token) for token in config.model.new_tokens}


def adapter_folder(config: Config, trained: bool) -> str | None:
    """The folder that the adapter is read from; None for a new one and in full fine-tuning."""
    if config.lora is None:
        return None
    return config.train.output_dir if trained else config.lora.init_from


def vocab_size(config: Config, tokenizer: Any, model: Model, trained: bool) -> int:
    """The number of tokens that the base must have rows for.

    Spare rows of the embedding are used first, as in transformers. Where the folder of an adapter
    has an embedding or a head, it is the number of its rows.

    Args:
      config: the settings.
      tokenizer: with the new tokens; None if it cannot be read: each is then taken to need a row.
      model: the base as it is in its files.
      trained: see ``open_job``.
    """
    in_files = model.config.vocab_size
    if tokenizer is None:
        needed = in_files + len(config.model.new_tokens)
    else:
        needed = 1 + max(new_token_ids(config, tokenizer).values(), default=0)
    folder = adapter_folder(config, trained)
    saved = saved_vocab_size(folder, model) if folder else None
    if saved is not None and saved < needed:
        raise ConfigError(
            f"the tokenizer has {needed} tokens with them, the adapter in {folder} has {saved}",
            where="model.new_tokens",
            fix="name the tokens that it was trained with, in the same order",
        )
    return max(in_files, needed) if saved is None else saved


def new_tokens_text(config: Config, tokenizer: Any, model: Model) -> str:
    """The ids of the new tokens, and where their rows are from, for the run header."""
    ids = new_token_ids(config, tokenizer)
    listed = ", ".join(f"{token} = {i}" for token, i in ids.items())
    in_files = model.config.vocab_size_in_files or model.config.vocab_size
    added = sum(i >= in_files for i in ids.values())
    spare = len(ids) - added
    word = "row" if added == 1 else "rows"
    rows = [f"{added} {word} added, the mean of the others"] * bool(added)
    rows += [f"{spare} in rows that the base has"] * bool(spare)
    return f"{listed} ({'; '.join(rows)})"


def untrained_rows(
    config: Config, adapter: LoraConfig, tokenizer: Any, model: Model
) -> Iterator[str]:
    """A message if rows of new tokens keep their first values, and what to write.

    Args:
      config: the settings.
      adapter: the resolved config of the adapter.
      tokenizer: with the new tokens.
      model: the base.
    """
    ids = new_token_ids(config, tokenizer)
    if not ids:
        return
    rows: dict[str, list[int]] = {}
    for leaf in vocabulary_leaves(model):
        name, kind = leaf.module(), leaf.kind
        in_full = is_replaced(adapter, name, kind) or rank_of(adapter, name) > 0
        if in_full and kind == "embedding" and model.config.head_is_tied:
            yield (
                "the output head is tied to the embedding, but does not follow an embedding that "
                "is trained in full or by LoRA: its rows of new tokens keep their first values; "
                f"train the rows alone (lora.trainable_token_indices: {[*ids.values()]}), or "
                "untie the head (model.untie: true) and train it, too"
            )
        missing = [i for i in ids.values() if i not in token_indices(adapter, name)]
        if missing and not in_full and kind != "bias":
            rows[name] = missing
    if rows:
        yield _untrained_text(rows, ids, model.config.head_is_tied)


def _untrained_text(rows: dict[str, list[int]], ids: dict[str, int], tied: bool) -> str:
    tokens = {i: token for token, i in ids.items()}
    listed = "; ".join(f"{name} of {', '.join(tokens[i] for i in r)}" for name, r in rows.items())
    mapping = [f"{name.rpartition('.')[2]}: {missing}" for name, missing in rows.items()]
    setting = str(next(iter(rows.values()))) if tied else f"{{{', '.join(mapping)}}}"
    return (
        f"rows of new tokens keep their first values: {listed}; to train them, add them to "
        f"lora.trainable_token_indices: {setting}"
    )
