"""Eight virtual CPU devices, strict promotion, and every jaxtyping annotation of jlora checked."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Before any module of jlora is imported: pytest imports this file first.
install_import_hook("jlora", "beartype.beartype")


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with the public small models and data sets, or a skip."""
    folder = os.environ.get("JLORA_TEST_ASSETS")
    if not folder:
        pytest.skip("set JLORA_TEST_ASSETS to the folder with the public test models and data")
    return Path(folder)
