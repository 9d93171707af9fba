"""Memory and peak rates of accelerators, from vendors' data sheets; imports no jax.

FLOP rates are dense bfloat16 peaks with float32 accumulation; link rates are what one device can
send to the others of its node or slice, in one direction. Sources:

NVIDIA  data sheets of A100, H100, H200 and L4, and the whitepaper of the Ada architecture (4090);
        the host is connected by 16 lanes of PCIe 4.0, or 5.0 (H100, H200);
        ``Chip`` follows XLA's target descriptions
        (``xla/backends/gpu/target_config/specs``), or CUDA's limits for its compute capability
Google  cloud.google.com/tpu/docs: v5e, v6e; memory is what XLA leaves to programs
"""

from __future__ import annotations

import dataclasses

GB, TERA, GiB = 10**9, 10**12, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Properties of an NVIDIA GPU that XLA's compiler needs and that differ between GPUs."""

    capability: tuple[int, int]
    cores: int
    fpus: int
    """Per core."""
    threads: int
    """Per core."""
    shared_memory: int
    """Bytes per core; one block can use up to 1024 bytes less."""
    l2_cache: int
    clock: float
    """GHz."""


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Memory and peak rates of one type of accelerator."""

    name: str
    """As in ``--target``."""
    title: str
    kinds: tuple[str, ...]
    """Prefixes of JAX's ``device_kind``."""
    platform: str
    """``cuda`` or ``tpu``."""
    memory: int
    """Bytes."""
    flops: float
    """Per second."""
    bandwidth: float
    """Bytes per second between the device and its memory."""
    link: float
    """Bytes per second, in one direction."""
    most: int
    """Largest number of devices with such links."""
    host: float | None
    """Bytes per second to host memory, in each direction; None if the vendor names no rate."""
    chip: Chip | None = None


AMPERE = Chip((8, 0), 108, 64, 2048, 167_936, 41_943_040, 1.41)
HOPPER = Chip((9, 0), 132, 128, 2048, 233_472, 52_428_800, 1.98)

HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware(
            "rtx4090", "NVIDIA GeForce RTX 4090", ("NVIDIA GeForce RTX 4090",), "cuda",
            25_757_220_864, 165.2 * TERA, 1008 * GB, 32 * GB, 8, 32 * GB,
            Chip((8, 9), 128, 128, 1536, 102_400, 75_497_472, 2.52),
        ),
        Hardware(
            "l4", "NVIDIA L4", ("NVIDIA L4",), "cuda",
            24_152_899_584, 121 * TERA, 300 * GB, 32 * GB, 8, 32 * GB,
            Chip((8, 9), 58, 128, 1536, 102_400, 50_331_648, 2.04),
        ),
        Hardware(
            "a100-40", "NVIDIA A100-SXM4-40GB", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
            "cuda", 42_331_013_120, 312 * TERA, 1555 * GB, 300 * GB, 8, 32 * GB, AMPERE,
        ),
        Hardware(
            "a100-80", "NVIDIA A100-SXM4-80GB", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB"),
            "cuda", 85_100_068_864, 312 * TERA, 2039 * GB, 300 * GB, 8, 32 * GB, AMPERE,
        ),
        Hardware(
            "h100", "NVIDIA H100 80GB HBM3", ("NVIDIA H100",), "cuda",
            84_942_979_072, 989.4 * TERA, 3352 * GB, 450 * GB, 8, 64 * GB, HOPPER,
        ),
        Hardware(
            "h200", "NVIDIA H200", ("NVIDIA H200",), "cuda",
            # As CUDA reports it, 139.80 GiB; the data sheet says 141 GB.
            150_109_106_995, 989.4 * TERA, 4800 * GB, 450 * GB, 8, 64 * GB, HOPPER,
        ),
        Hardware(
            "v5e", "TPU v5e", ("TPU v5 lite", "TPU v5e"), "tpu",
            int(15.75 * GiB), 197 * TERA, 819 * GB, 200 * GB, 256, None,
        ),
        Hardware(
            "v6e", "TPU v6e", ("TPU v6 lite", "TPU v6e"), "tpu",
            int(31.25 * GiB), 918 * TERA, 1640 * GB, 400 * GB, 256, None,
        ),
    )
}  # fmt: skip


def of_kind(device_kind: str) -> Hardware | None:
    """The entry for JAX's ``device_kind``; None if it is not in the table."""
    return next(
        (h for h in HARDWARE.values() if any(device_kind.startswith(k) for k in h.kinds)), None
    )


def target_config(hardware: Hardware) -> str:
    """XLA's ``GpuTargetConfigProto`` as text, for compiling without the GPU."""
    chip = hardware.chip
    assert chip is not None
    major, minor = chip.capability
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {chip.shared_memory}
  threads_per_core_limit: {chip.threads}
  core_count: {chip.cores}
  fpus_per_core: {chip.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {round(hardware.bandwidth)}
  l2_cache_size: {chip.l2_cache}
  clock_rate_ghz: {chip.clock}
  device_memory_size: {hardware.memory}
  shared_memory_per_block_optin: {chip.shared_memory - 1024}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{hardware.title}"
"""
