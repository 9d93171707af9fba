"""Decoder-only language models: Flax NNX modules inside, nested dicts of parameters outside.

``Model`` is the public interface; ``registry`` lists the families. No file is read here: see
``io.hf``.
"""

from jlora.models.config import DecoderConfig
from jlora.models.model import Model, init_params
from jlora.models.registry import as_classifier
from jlora.models.resizing import resize_token_embeddings, vocabulary_leaves, with_vocab_size
from jlora.models.tying import head_differs, untie, with_untied_head

__all__ = [
    "DecoderConfig",
    "Model",
    "as_classifier",
    "head_differs",
    "init_params",
    "resize_token_embeddings",
    "untie",
    "vocabulary_leaves",
    "with_untied_head",
    "with_vocab_size",
]
