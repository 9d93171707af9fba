"""Eight virtual CPU devices, strict promotion, and every jaxtyping annotation of jlora checked."""

import gc
import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs here run once: this halves the suite's time. XLA's own passes are the usual ones.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import compiled_once
import jax
import jaxlib
from jaxtyping import install_import_hook

if tuple(map(int, jaxlib.__version__.split(".")[:2])) == (0, 10):
    # A quarter less time to compile, and losses that are equal to six digits; 0.12 aborts on it.
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
    )
compiled_once.install()

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Before any module of jlora is imported: pytest imports this file first. Only modules that annotate
# arrays: to check all calls of the others, too, takes a sixth of the tests' time.
package = Path(*importlib.util.find_spec("jlora").submodule_search_locations)
annotated = [file for file in package.rglob("*.py") if "from jaxtyping import" in file.read_text()]
names = [".".join(file.relative_to(package.parent).with_suffix("").parts) for file in annotated]
install_import_hook(names, "checker.check")

gc.set_threshold(100_000, 20, 20)  # by default the collector takes a twentieth of the tests' time


LONGEST = (
    "test_parity_quant_params.py",
    "test_train_resume.py",
    "test_train.py",
    "test_train_mesh.py",
    "test_devices.py",
    "test_plan_command.py",
    "test_models.py",
    "test_training_step.py",
    "test_parity_train.py",
    "test_parity_lora.py",
    "test_parity_models_logits.py",
    "test_parity_training_optim_eight_bit.py",
)
"""Files that take minutes. They come first, or one of them would run alone at the end."""


def pytest_collection_modifyitems(items):
    """Sorts the files; within a file tests stay in their order."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish():
    """What imports made stays: the garbage collector need not look at it again."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def programs():
    """A file's traced functions go with it; its executables stay while there is room for them.

    Every executable of XLA's CPU backend holds several memory maps; a process that keeps those of
    all files meets Linux's limit (``vm.max_map_count``, 65530) and dies inside the compiler.
    """
    yield
    jax.clear_caches()
    compiled_once.drop_if_too_many()


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with the public small models and data sets, or a skip."""
    folder = os.environ.get("JLORA_TEST_ASSETS")
    if not folder:
        pytest.skip("set JLORA_TEST_ASSETS to the folder with the public test models and data")
    return Path(folder)


@pytest.fixture
def standard_promotion():
    """optax does not promote strictly."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def two_processes():
    """Starts Python code in two processes of one run, on CPUs; gives both, their output piped."""

    def start(code: str, *arguments: object, **environ: str) -> list[subprocess.Popen[str]]:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{one.getsockname()[1]}"
        shared = {"JLORA_COORDINATOR": address, "JLORA_NUM_PROCESSES": "2"}
        shared |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **environ}
        return [
            subprocess.Popen(
                [sys.executable, "-c", code, *map(str, arguments)],
                env=os.environ | shared | {"JLORA_PROCESS_ID": str(i)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        ]

    return start


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A tiny model with a tokenizer and rows to train and to evaluate on, see ``tiny_runs``."""
    from tiny_runs import make_base

    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory) -> Path:
    """The user's cache folder of runs in processes of their own."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def place(tmp_path, tiny_base, tiny_cache):
    """Where a test runs the command, see ``tiny_runs.Place``."""
    from tiny_runs import Place

    return Place(tmp_path, tiny_base, tiny_cache)


@pytest.fixture(scope="session")
def result(tmp_path_factory, tiny_base, tiny_cache):
    """A run that has an adapter, see ``tiny_results``; tests write to folders of other names."""
    from tiny_results import make_result
    from tiny_runs import Place

    return make_result(Place(tmp_path_factory.mktemp("result"), tiny_base, tiny_cache))
