"""Which GPUs a process takes, by the variables of its launcher."""

import random
import subprocess

import pytest

from jlora.distributed import local_gpus
from jlora.errors import ConfigError

EIGHT = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


def slurm(tasks, node=0, local=0):
    return {
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(local),
    }


@pytest.mark.parametrize(
    ("environ", "indices"),
    [
        (slurm("1(x4)", node=3), []),
        (slurm("8(x2)", node=1, local=5), [5]),
        (slurm("2,4(x2),1", node=0, local=1), [4, 5, 6, 7]),
        (slurm("2,4(x2),1", node=2, local=3), [6, 7]),
        (slurm("2,4(x2),1", node=3), []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, [2, 3]),
        # Each task sees its own GPUs already.
        (slurm("4", local=2) | {"SLURM_GPUS_PER_TASK": "8"}, []),
        (slurm("4", local=2) | {"SLURM_TRES_PER_TASK": "cpu=4,gres/gpu=8"}, []),
        (slurm("2", local=1) | {"SLURM_STEP_GPUS": ",".join(map(str, range(16)))}, []),
        (slurm("8", local=3) | {"JAX_LOCAL_DEVICE_IDS": "0,7"}, [0, 7]),
        # Without GPUs of NVIDIA, as JAX does: those of other makers are one for each process.
        (slurm("8", local=3) | {"CUDA_VISIBLE_DEVICES": ""}, [3]),
        ({}, []),
    ],
)
def test_the_processes_of_a_machine_share_its_gpus(environ, indices):
    assert local_gpus.local_gpus(EIGHT | environ) == indices


def test_gpus_that_cannot_be_shared_evenly_are_an_error():
    for tasks, visible in (("3", EIGHT), ("2", {"CUDA_VISIBLE_DEVICES": "0"})):
        with pytest.raises(ConfigError, match="cannot share") as error:
            local_gpus.local_gpus(visible | slurm(tasks))
        assert "one process a machine" in str(error.value)


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        (EIGHT, 8),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8a1f, GPU-77b2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "0,1,-1,2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        (EIGHT | {"JAX_PLATFORMS": "cpu"}, 0),
        (EIGHT | {"JAX_PLATFORMS": "cuda,cpu"}, 8),
    ],
)
def test_visible_gpus_are_counted(environ, count):
    assert local_gpus.visible_gpus(environ) == count


def test_without_a_variable_nvidia_smi_counts_them(monkeypatch):
    listed = "GPU 0: NVIDIA H200 (UUID: GPU-1)\n  MIG 1g.18gb Device 0: (UUID: MIG-1)\n"
    listed += "GPU 1: NVIDIA H200 (UUID: GPU-2)\n"
    answer = subprocess.CompletedProcess([], 0, listed)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: answer)
    assert local_gpus.visible_gpus({}) == 2

    def missing(*args, **options):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    assert local_gpus.visible_gpus({}) == 0


def test_fewer_gpus_than_the_process_should_use_are_told():
    assert local_gpus.missing_gpus(8, EIGHT) is None
    assert local_gpus.missing_gpus(1, EIGHT | slurm("8", local=2)) is None
    for environ in ({}, slurm("2", local=1)):
        assert local_gpus.missing_gpus(0, {"CUDA_VISIBLE_DEVICES": ""} | environ) is None
    assert "uses 1 of 8 GPUs" in local_gpus.missing_gpus(1, EIGHT)
    assert "uses 0 of 4 GPUs" in local_gpus.missing_gpus(0, EIGHT | slurm("2", local=1))


UNDER_SLURM = """
import os, sys
names = ("JLORA_COORDINATOR", "JLORA_NUM_PROCESSES", "JLORA_PROCESS_ID")
os.environ["SLURM_PROCID"] = os.environ["SLURM_NODEID"] = os.environ["JLORA_PROCESS_ID"]
if sys.argv[1] == "SLURM alone":
    for name in names:
        del os.environ[name]
from jlora.distributed import processes
assert processes.initialize()
import jax
print(jax.process_index(), jax.local_device_count(), jax.device_count())
print(jax.config.read("jax_cuda_visible_devices"))
"""


@pytest.mark.parametrize("launcher", ["SLURM alone", "the variables of train_slurm.sh"])
def test_one_task_a_node_uses_all_devices_of_its_node(two_processes, launcher):
    """JAX's own reading of SLURM's variables would make one GPU of each node visible."""
    environ = {
        "SLURM_JOB_ID": str(random.randrange(4096)),  # which decides the port
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_LOCALID": "0",
        "JAX_NUM_CPU_DEVICES": "4",
    }
    runs = two_processes(UNDER_SLURM, launcher, **environ)
    for index, run in enumerate(runs):
        out, err = run.communicate(timeout=120)
        assert out.split() == [str(index), "4", "8", "all"], err
