"""Decoder models: Flax NNX inside, plain trees outside. No file is read here, see ``io.hf``.

``Model`` computes; ``registry`` and ``config`` say which families there are.
"""

from jlora.models.config import DecoderConfig
from jlora.models.model import Model, init_params
from jlora.models.registry import as_classifier
from jlora.models.tying import untie

__all__ = ["DecoderConfig", "Model", "as_classifier", "init_params", "untie"]
