"""transformers folders: ``config.json`` and safetensors, read and written."""

from jlora.io.hf.read import load_pretrained, read_model
from jlora.io.hf.write import save_pretrained

__all__ = ["load_pretrained", "read_model", "save_pretrained"]
