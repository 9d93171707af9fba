"""Tokenizers and chat templates, by transformers; code in a model folder is never executed."""

from __future__ import annotations

import bisect
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jlora.errors import ConfigError, DataError

PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif -%}
"""
"""Chats as ``### User:``, ``### Assistant:`` …, each reply followed by eos; without tools."""


def load_tokenizer(
    path_or_hub_id: str, chat_template: str | None = None, revision: str | None = None
) -> Any:
    """The tokenizer of a model folder or hub name.

    Args:
      path_or_hub_id: where the model is.
      chat_template: a jinja file that replaces the tokenizer's own template.
      revision: a commit or branch on the hub.

    Raises:
      ConfigError: there is no tokenizer, or no template file.
      DataError: the tokenizer's files are damaged.
    """
    # At its import transformers warns that PyTorch is missing, which jlora does not need.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path_or_hub_id, revision=revision, trust_remote_code=False
        )
    except Exception as e:  # transformers raises many kinds, and users need one message
        raise _no_tokenizer(path_or_hub_id, e) from e
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    return tokenizer


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[str]:
    """Adds tokens, which are never split; returns those that the tokenizer has already.

    They are not special: decoded replies show them, also where special tokens are left out.
    """
    from transformers import AddedToken

    # To add one again would change its properties, such as that it is special.
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    # Not normalized: a lower-casing tokenizer would not find what it changes.
    new = [AddedToken(t, special=False, normalized=False) for t in tokens if t not in known]
    tokenizer.add_tokens(new)
    return [token for token in tokens if token in known]


def _no_tokenizer(path: str, error: Exception) -> Exception:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if (Path(path) / "tokenizer.json").is_file():
        fix = "copy tokenizer.json and tokenizer_config.json anew"
        return DataError(f"the tokenizer cannot be read: {reason}", where=path, fix=fix)
    fix = "name a folder with tokenizer.json, or a model on the hub"
    return ConfigError(f"no tokenizer here: {reason}", where=path, fix=fix)


def read_template(path: str) -> str:
    """The text of a chat template file; ConfigError if it cannot be read."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        fix = "name a jinja file"
        raise ConfigError(f"no chat template here: {e}", where=path, fix=fix) from e


def bos_prefix(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer adds before a text: ``[bos]`` for Llama, ``[]`` for GPT-2."""
    bos = tokenizer.bos_token_id
    # Tried out: what a fast tokenizer adds is in its post-processor, whatever add_bos_token says.
    ids = tokenizer("a")["input_ids"]
    return [bos] if bos is not None and ids[:1] == [bos] and len(ids) > 1 else []


def eos_suffix(tokenizer: Any) -> list[int]:
    """``[eos]``, or ``[]`` if the tokenizer has no end-of-sequence token."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def ensure_template(tokenizer: Any) -> bool:
    """Gives a tokenizer without a chat template PLAIN_TEMPLATE, which is then saved with it.

    Returns:
      Whether it had none.
    """
    if tokenizer.chat_template:
        return False
    bos = "{{- bos_token -}}\n" if bos_prefix(tokenizer) else ""
    tokenizer.chat_template = bos + PLAIN_TEMPLATE
    return True


def token_ids(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text without special ones: rendered chat templates contain their bos."""
    return list(_ids_only(text, tokenizer))


def prefix_ids(
    texts: Sequence[str], cuts: Sequence[Sequence[int]], tokenizer: Any
) -> Iterator[list[list[int]]]:
    """For each text the ids of ``text[:cut]``, without added special tokens, for each of its cuts.

    A tokenizer splits a text at special tokens before anything else. What lies before the last of
    them is therefore tokenized once for all cuts after it: the time grows with the length of a
    chat, not with its length times the number of its replies.
    """
    special, splitting = _special_tokens(tokenizer)
    plans, segments = [], []
    for text, ends in zip(texts, cuts, strict=True):
        found = [m for m in special.finditer(text) if m[0] in splitting] if splitting else []
        stops = [m.end() for m in found]
        counts = [bisect.bisect_right(stops, end) for end in ends]
        anchors = [found[n - 1].start() if n else 0 for n in counts]
        inner = sorted({0, *anchors})
        plans.append((inner, anchors))
        segments += [text[a:b] for a, b in itertools.pairwise(inner)]
        segments += [text[a:end] for a, end in zip(anchors, ends, strict=True)]
    encoded = _encode(segments, tokenizer)
    for inner, anchors in plans:
        before = {0: []}
        for a, b in itertools.pairwise(inner):
            before[b] = before[a] + next(encoded)
        yield [before[a] + next(encoded) for a in anchors]


def _encode(texts: list[str], tokenizer: Any) -> Iterator[list[int]]:
    """The tokens of each text; equal ones (a special token, a system prompt) are tokenized once."""
    numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    ids = _ids_only(list(numbers), tokenizer) if numbers else []
    return (ids[numbers[text]] for text in texts)


def _ids_only(texts: Any, tokenizer: Any) -> Any:
    """The tokens of a text, or of several in parallel, without added special tokens."""
    # Not verbose: it warns of texts longer than the model's maximum, which are cut later. Masks,
    # which nobody reads, are a part of why it took twice encode_batch's time for many short texts.
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"]


def _special_tokens(tokenizer: Any) -> tuple[re.Pattern[str], set[str]]:
    """A pattern of all added tokens, and those at which a text can be tokenized in parts.

    Not those that take white space before them or depend on the letters around them, and none of
    tokenizers in Python, which treat white space around any of them in ways of their own.
    """
    added = list(tokenizer.added_tokens_decoder.values()) if tokenizer.is_fast else []
    longest_first = sorted((token.content for token in added), key=len, reverse=True)
    splitting = {
        token.content
        for token in added
        if token.special and not (token.lstrip or token.single_word or token.normalized)
    }
    return re.compile("|".join(map(re.escape, longest_first))), splitting


class UnwritableCharacters:
    """Finds the printable characters that a tokenizer has no tokens for, each looked up once."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.known: dict[str, bool] = {}

    def count(self, texts: Sequence[str], totals: dict[str, int]) -> None:
        """Adds the numbers of texts that have each such character to ``totals``."""
        for text in texts:
            for character in set(text):
                if character not in self.known:
                    self.known[character] = self._is_unwritable(character)
                if self.known[character]:
                    totals[character] = totals.get(character, 0) + 1

    def _is_unwritable(self, character: str) -> bool:
        if character.isspace() or not character.isprintable():
            return False  # normalizers leave these out on purpose
        ids, unknown = token_ids(character, self.tokenizer), self.tokenizer.unk_token_id
        return not ids or (unknown is not None and unknown in ids)
