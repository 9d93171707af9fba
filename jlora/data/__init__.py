"""Rows → chat → examples → packing → order → batches. NumPy and tokenizers only, no JAX."""

from jlora.data.chat import ChatRenderer
from jlora.data.classification import find_classes
from jlora.data.loader import (
    Batch,
    Prepared,
    SourceReport,
    batch_at,
    eval_batches,
    prefetch,
    prepare,
)
from jlora.data.order import Order
from jlora.data.replies import ReplyRow, reply_row, reply_rows
from jlora.data.rows import load_rows
from jlora.data.show import show_batch
from jlora.data.tokenizer import ensure_template, load_tokenizer

__all__ = [
    "Batch",
    "ChatRenderer",
    "Order",
    "Prepared",
    "ReplyRow",
    "SourceReport",
    "batch_at",
    "ensure_template",
    "eval_batches",
    "find_classes",
    "load_rows",
    "load_tokenizer",
    "prefetch",
    "prepare",
    "reply_row",
    "reply_rows",
    "show_batch",
]
