"""The shell launchers, with stand-ins for python, SLURM and gcloud that record their calls."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("gpu_scripts/*.sh"), *ROOT.glob("tpu_scripts/*.sh")])
VARIABLES = ("JLORA_COORDINATOR", "JLORA_NUM_PROCESSES", "JLORA_PROCESS_ID", "JAX_PLATFORMS")

NOTE = 'printf "%s\\n" "$(basename "$0")" "$@" >> "$CALLS"; echo >> "$CALLS"\n'
STANDINS = {
    "python": "".join(f'echo "{name}=${{{name}:-}}" >> "$CALLS"\n' for name in VARIABLES)
    + NOTE
    + "exit ${RETURNS:-0}",
    "scontrol": '[[ $1 == show ]] && printf "node7\\nnode8\\n"\n' + NOTE,
    "srun": "shift\nfor SLURM_PROCID in 0 1; do export SLURM_PROCID; "
    '"$@" || code=$?; done\nexit ${code:-0}',
    "gcloud": NOTE,
}


@pytest.fixture
def run(tmp_path):
    """Runs a script with the stand-ins; returns its exit code, its errors, and the calls."""
    for name, body in STANDINS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()

    def go(script, *arguments, **environment):
        clean = {k: v for k, v in os.environ.items() if k not in VARIABLES}
        result = subprocess.run(
            [ROOT / script, *arguments],
            env=clean
            | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)}
            | environment,
            capture_output=True,
            text=True,
        )
        return result.returncode, result.stderr, calls.read_text().splitlines()

    return go


def test_there_are_scripts_for_gpus_and_tpus():
    assert {script.parent.name for script in SCRIPTS} == {"gpu_scripts", "tpu_scripts"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_parse_and_can_be_executed(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.name.startswith("train")], ids=str)
def test_without_a_config_they_print_their_usage(run, script):
    code, errors, calls = run(script)
    assert code == 2 and "CONFIG.yaml" in errors and not calls


def test_single_node_passes_its_arguments_on(run):
    code, _, calls = run(
        "gpu_scripts/train_single_node.sh", "a b.yaml", "train.seed=1", RETURNS="70"
    )
    assert code == 70
    assert calls[3:9] == [
        "JAX_PLATFORMS=cuda",
        "python",
        "-m",
        "jlora.train",
        "a b.yaml",
        "train.seed=1",
    ]


SLURM = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "2"}


def test_slurm_gives_every_process_its_id(run):
    code, errors, calls = run("gpu_scripts/train_slurm.sh", "a b.yaml", **SLURM)
    assert code == 0, errors
    assert calls.count("JLORA_COORDINATOR=node7:23456") == 2
    assert calls.count("JLORA_NUM_PROCESSES=2") == calls.count("a b.yaml") == 2
    assert [c for c in calls if c.startswith("JLORA_PROCESS_ID")] == [
        "JLORA_PROCESS_ID=0",
        "JLORA_PROCESS_ID=1",
    ]
    assert "requeue" not in calls


@pytest.mark.parametrize(("returns", "requeued"), [("143", True), ("70", False)])
def test_slurm_requeues_a_run_that_saved_before_its_limit(run, returns, requeued):
    code, _, calls = run("gpu_scripts/train_slurm.sh", "a.yaml", RETURNS=returns, **SLURM)
    assert code == int(returns) and ("requeue" in calls) == requeued


def test_the_slurm_script_must_be_submitted(run):
    code, errors, _ = run("gpu_scripts/train_slurm.sh", "a.yaml")
    assert code != 0 and "sbatch" in errors


def test_pod_runs_the_same_command_on_every_host(run):
    slice_ = {"TPU_NAME": "mine", "ZONE": "here", "RUN_ENV": "HF_TOKEN=x"}
    code, errors, calls = run("tpu_scripts/train_pod.sh", "a b.yaml", "mesh.fsdp=-1", **slice_)
    assert code == 0, errors
    assert calls[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "mine"]
    assert "--worker=all" in calls and "--zone=here" in calls
    command = next(c for c in calls if c.startswith("--command="))
    assert command.rstrip().endswith(
        r"HF_TOKEN=x .venv/bin/python -m jlora.train a\ b.yaml mesh.fsdp=-1"
    )


def test_pod_scripts_ask_for_the_slice(run):
    for script, arguments in (("train_pod.sh", ["a.yaml"]), ("setup_pod.sh", [])):
        code, errors, calls = run(f"tpu_scripts/{script}", *arguments)
        assert code != 0 and "TPU_NAME" in errors and not calls
