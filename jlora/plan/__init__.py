"""``jlora plan CONFIG``: memory, time and disk of a run, from its compiled step; reads no weights.

command         ``jlora plan``, up to the import of jax
show_forecast   reads the data, makes the forecast, prints it
target          the devices to compile for: those of this machine, or absent ones
hardware        memory and peak rates of accelerators
hlo, hlo_text   FLOPs, memory traffic and collectives of optimized HLO
flops           FLOPs of a step, from its jaxpr
memory          device memory of a compiled step
estimate        the same by formula, without a compiler for the device
forecast        all of these for one run
remedies        settings to change if it does not fit
report          the forecast as text and as JSON
check           the same check before ``jlora train`` starts
jax_cudnn_shim  JAX's check of the GPU, answered for an absent one
"""

from jlora.plan.command import main, run

__all__ = ["main", "run"]
