"""Decoder models and their files: Flax NNX inside, plain trees outside.

``load_pretrained`` reads a transformers folder into ``(model, params)``, ``save_pretrained`` writes
one, ``Model`` computes; ``registry`` and ``config`` say which families there are.
"""

from jlora.models.config import DecoderConfig
from jlora.models.hf_read import load_pretrained, read_model
from jlora.models.hf_write import save_pretrained
from jlora.models.model import Model, init_params
from jlora.models.registry import as_classifier
from jlora.models.tying import untie

__all__ = [
    "DecoderConfig",
    "Model",
    "as_classifier",
    "init_params",
    "load_pretrained",
    "read_model",
    "save_pretrained",
    "untie",
]
