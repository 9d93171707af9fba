"""Adapter folders in PEFT's format, read and written."""

from jlora.io.peft.base_model import BASE_FILE, base_record, write_base_record
from jlora.io.peft.config import CONFIG_FILE
from jlora.io.peft.consumers import misreadings
from jlora.io.peft.embeddings import (
    embeddings_to_save,
    saved_vocab_size,
    with_adapter_embeddings,
    with_saved_embeddings,
)
from jlora.io.peft.save_load import (
    abstract_adapter_from_folder,
    file_bytes,
    load_adapter,
    save_adapter,
    to_peft_tensors,
)
from jlora.io.peft.tensors import TENSOR_FILE

__all__ = [
    "BASE_FILE",
    "CONFIG_FILE",
    "TENSOR_FILE",
    "abstract_adapter_from_folder",
    "base_record",
    "embeddings_to_save",
    "file_bytes",
    "load_adapter",
    "misreadings",
    "save_adapter",
    "saved_vocab_size",
    "to_peft_tensors",
    "with_adapter_embeddings",
    "with_saved_embeddings",
    "write_base_record",
]
