"""The names of the Python contract, in whatever order the package's modules are imported."""

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import jlora
from jlora.quant import params as quantization

ROOT = Path(jlora.__file__).parents[1]


def python(code: str) -> str:
    """The output of a new interpreter."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_public_name_exists():
    for name in jlora.__all__:
        assert getattr(jlora, name) is getattr(jlora, name)
        assert name in dir(jlora)
    assert jlora.quantize is quantization.quantize_params
    with pytest.raises(AttributeError, match="no attribute 'mrege'"):
        _ = jlora.mrege  # pyright: ignore


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, jlora; jlora.LoraConfig; print('jax' in sys.modules, jlora.__version__)"
    assert python(code) == f"False {jlora.__version__}"


MERGE = """
{imports}
import types
import jax, jax.numpy as jnp
import jlora
params = {{"layer": {{"kernel": jnp.ones((4, 3))}}}}
adapter = jlora.init_adapter(jax.random.key(0), params, jlora.LoraConfig(target_modules=["layer"]))
merged = jlora.merge(params, adapter)
assert jnp.array_equal(merged["layer"]["kernel"], params["layer"]["kernel"])
from jlora.merge import main, run
from jlora.ops.dot import dot
assert callable(main) and callable(run) and jlora.dot is dot
assert isinstance(sys.modules["jlora.merge"], types.ModuleType)
import importlib
assert importlib.import_module("jlora.merge").run is run
jlora.merge(params, adapter)
from jlora import merge
assert merge is jlora.merge and not isinstance(merge, types.ModuleType)
from jlora.quantize import run
assert isinstance(sys.modules["jlora.quantize"], types.ModuleType) and callable(run)
quantized = jlora.quantize(params, jlora.QuantConfig())
assert jlora.quantize.__name__ == "quantize_params" and quantized["layer"]["kernel"].nbytes < 48
print("fine")
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import sys",
        "import sys, jlora.merge, jlora.train, jlora.ops.dot",
        "import sys; from jlora.merge import main; import jlora.ops.dot, jlora.lora",
        "import sys, jlora; jlora.merge; jlora.dot; import jlora.merge, jlora.ops.dot",
        "import sys, jlora.quantize; jlora.quantize; from jlora.quantize import main",
    ],
)
def test_a_submodule_of_the_same_name_does_not_hide_a_function(imports):
    assert python(MERGE.format(imports=imports)) == "fine"


BY_CONTRACT = {"jlora.merge", "jlora.quantize"}
"""Commands whose names are functions of the package."""


def test_no_module_is_hidden_by_a_function_of_its_name():
    """``import a.b.c as m`` reads attributes, which a package may have bound to another object."""
    found = {module.name for module in pkgutil.walk_packages(jlora.__path__, "jlora.")}
    names = {n for n in found if ".assets" not in n and not n.endswith("__main__")}
    hidden = set()
    for name in sorted(names):
        module, attribute = importlib.import_module(name), jlora
        for part in name.split(".")[1:]:
            attribute = getattr(attribute, part)
        if attribute is not module:
            hidden.add(name)
    assert hidden == BY_CONTRACT


def test_modules_of_the_contract_are_imported_by_their_public_names():
    code = """
import jlora.nf4, jlora.sharding as s
from jlora.nf4 import NF4Array
from jlora.quant import nf4
from jlora.distributed import sharding
assert NF4Array is nf4.NF4Array and jlora.nf4 is nf4 and s is sharding
assert {"make_mesh", "shardings", "place", "describe"} <= set(vars(s))
print("fine")
"""
    assert python(code) == "fine"
