"""Settings: frozen dataclasses (``weights``, ``tables``), a strict YAML loader, and their text.

config = load("configs/quickstart.yaml", ["lora.r=32"])     # all faults in one ConfigError
config.lora.r                                               # 32
to_yaml(config)                                             # resolved; loads back equal
"""

from jlora.config.fields import OPTAX
from jlora.config.loader import load
from jlora.config.tables import (
    Config,
    DataConfig,
    EvaluateConfig,
    GenerateConfig,
    MeshConfig,
    SourceConfig,
    TrainConfig,
)
from jlora.config.text import Option, in_lines, options, to_yaml
from jlora.config.weights import (
    PRESETS,
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    MergeConfig,
    ModelConfig,
    QuantConfig,
)

__all__ = [
    "OPTAX",
    "PRESETS",
    "Config",
    "DataConfig",
    "EvaConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "LoftQConfig",
    "LoraConfig",
    "MergeConfig",
    "MeshConfig",
    "ModelConfig",
    "Option",
    "QuantConfig",
    "SourceConfig",
    "TrainConfig",
    "in_lines",
    "load",
    "options",
    "to_yaml",
]
