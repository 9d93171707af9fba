"""Settings: frozen dataclasses (``tables``)."""

from jlora.config.tables import (
    Config,
    DataConfig,
    EvaluateConfig,
    GenerateConfig,
    LoraConfig,
    MergeConfig,
    MeshConfig,
    ModelConfig,
    QuantConfig,
    SourceConfig,
    TrainConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "LoraConfig",
    "MergeConfig",
    "MeshConfig",
    "ModelConfig",
    "QuantConfig",
    "SourceConfig",
    "TrainConfig",
]
