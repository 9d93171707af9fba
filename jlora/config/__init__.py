"""Settings: a frozen dataclass for each section, a strict YAML loader, and their text.

config = load("configs/quickstart.yaml", ["lora.r=32"])     # all faults in one ConfigError
config.lora.r                                               # 32
to_yaml(config)                                             # resolved; loads back equal
"""

from jlora.config.config import Config, load, options
from jlora.config.data import DataConfig, SourceConfig
from jlora.config.engine.convert import FrozenMap
from jlora.config.engine.help_text import Option
from jlora.config.engine.yaml_text import in_lines, to_yaml
from jlora.config.evaluate import EvaluateConfig
from jlora.config.export import ExportConfig
from jlora.config.generate import GenerateConfig
from jlora.config.lora import PRESETS, EvaConfig, LoftQConfig, LoraConfig
from jlora.config.merge import MergeConfig
from jlora.config.mesh import MeshConfig
from jlora.config.model import ModelConfig
from jlora.config.quantization import QuantConfig
from jlora.config.quantize import QuantizeConfig
from jlora.config.train import OPTAX, TrainConfig

__all__ = [
    "OPTAX",
    "PRESETS",
    "Config",
    "DataConfig",
    "EvaConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FrozenMap",
    "GenerateConfig",
    "LoftQConfig",
    "LoraConfig",
    "MergeConfig",
    "MeshConfig",
    "ModelConfig",
    "Option",
    "QuantConfig",
    "QuantizeConfig",
    "SourceConfig",
    "TrainConfig",
    "in_lines",
    "load",
    "options",
    "to_yaml",
]
