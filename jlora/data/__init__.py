"""Rows → chat → examples → packing → order → batches. NumPy and tokenizers only, no JAX."""

from jlora.data.batches import HostBatch, batch_at, eval_batches, prefetch
from jlora.data.chat import ChatRenderer
from jlora.data.labelled_texts import infer_label_names
from jlora.data.loading import load_rows
from jlora.data.order import Order
from jlora.data.preparation import Prepared, SourceReport, prepare
from jlora.data.replies import ReplyRow, reply_row, reply_rows
from jlora.data.show import show_batch
from jlora.data.tokenizer import add_tokens, ensure_template, load_tokenizer

__all__ = [
    "ChatRenderer",
    "HostBatch",
    "Order",
    "Prepared",
    "ReplyRow",
    "SourceReport",
    "add_tokens",
    "batch_at",
    "ensure_template",
    "eval_batches",
    "infer_label_names",
    "load_rows",
    "load_tokenizer",
    "prefetch",
    "prepare",
    "reply_row",
    "reply_rows",
    "show_batch",
]
