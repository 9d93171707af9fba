"""FLOPs, memory traffic and collectives of a compiled step, read from its optimized HLO.

XLA's ``cost_analysis`` counts the body of a loop once, so it is not used here. All counts are for
one device and one execution of the step: a loop body is multiplied by its trip count, and of the
branches of a conditional the most expensive one counts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from jlora.plan.hlo_text import (
    INSTRUCTION_NAME,
    PLACED,
    Instruction,
    closing,
    dims_of,
    in_memory,
    n_bytes,
    numbers,
    parse_instruction,
)

CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CONTRACTED = re.compile(r"lhs_contracting_dim(?:ension)?s\"?[=:][{\[]([\d,\"]*)[}\]]")
LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
WINDOW = re.compile(r"window=\{([^}]*)\}")
GROUPS = re.compile(r"replica_groups=(?:\[(?:\d+,)*(\d+)\]<=|\{\{([\d,]*)\})")
MESH = re.compile(r"replica_groups=@?\w*\[([^\]]*)\](?:, device_ids=\([^{]*\))? ?\{([^}]*)\}")
PARTITIONS = re.compile(r"num_partitions=(\d+)")
TARGET = re.compile(r'custom_call_target="([^"]*)"')

KERNEL_NAMES = re.compile(r"fmha|tpu_custom_call|triton_kernel|mosaic")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# async-start is one of them: what it starts moves the bytes, which would count twice.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "async-start", "async-update", "after-all", "partition-id", "replica-id",
    "opt-barrier", "iota", "domain",
}  # fmt: skip
"""Opcodes that cause no memory traffic themselves."""

CONTINUATIONS = ("async_collective_fusion", "async-collective-done")
"""Name prefixes of fusions that overlap a collective which another instruction started.

Their computations repeat that collective, which must not be counted twice.
"""

SAME = ("bitcast", "copy")
SLICE_OPCODES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives with the same opcode and group size."""

    kind: str
    group: int
    """Devices in a replica group."""
    count: int
    bytes: int
    """Operand bytes per device, summed over these collectives."""

    @property
    def sent(self) -> float:
        """Bytes that each device sends, at least: those of a ring algorithm."""
        others = (self.group - 1) / self.group
        factor = {"all-gather": self.group - 1, "all-reduce": 2 * others, "collective-permute": 1}
        return self.bytes * factor.get(self.kind, others)


@dataclasses.dataclass(frozen=True)
class HloWork:
    """FLOPs, memory traffic, collectives and custom calls of a computation."""

    flops: float = 0.0
    """Of matrix products; custom kernels (attention, Pallas) are not included."""
    bytes: float = 0.0
    """Read from and written to device memory; of a sliced array only the slice counts."""
    collectives: Mapping[tuple[str, int], tuple[int, float]] = dataclasses.field(
        default_factory=dict
    )
    """(opcode, group size) → (number of executions, operand bytes)."""
    calls: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Target of a custom call → number of executions."""

    @property
    def kernels(self) -> tuple[str, ...]:
        """Custom call targets that are attention or Pallas kernels."""
        return tuple(sorted(name for name in self.calls if KERNEL_NAMES.search(name)))

    def __add__(self, other: HloWork) -> HloWork:
        both = dict(self.collectives)
        for key, (count, size) in other.collectives.items():
            n, total = both.get(key, (0, 0.0))
            both[key] = n + count, total + size
        calls = Counter(self.calls) + Counter(other.calls)
        return HloWork(self.flops + other.flops, self.bytes + other.bytes, both, calls)

    def times(self, n: int) -> HloWork:
        """The work of ``n`` executions."""
        collectives = {
            key: (n * count, n * size) for key, (count, size) in self.collectives.items()
        }
        calls = {name: n * count for name, count in self.calls.items()}
        return HloWork(n * self.flops, n * self.bytes, collectives, calls)

    def exchanges(self) -> list[Collective]:
        """The collectives, most bytes first."""
        collectives = [
            Collective(kind, group, count, round(size))
            for (kind, group), (count, size) in self.collectives.items()
        ]
        return sorted(collectives, key=lambda collective: -collective.bytes)


def work_of(text: str) -> HloWork:
    """The work of an HLO module, given as text (``Compiled.as_text()``)."""
    return Module(text).work()


class Module:
    """A parsed module of optimized HLO."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        count = PARTITIONS.search(text[: text.find("\n")])
        self.devices = int(count[1]) if count else 1
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line[:1] in ("%", "E") and line.endswith("{"):
                match = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
                assert match is not None
                current = self.computations.setdefault(match[2], {})
                self.entry = match[2] if match[1] else self.entry
            elif instruction := parse_instruction(line):
                current[instruction.name] = instruction

    def instructions(self) -> Iterator[Instruction]:
        """All instructions, including those within fusions."""
        for computation in self.computations.values():
            yield from computation.values()

    @functools.cache  # noqa: B019 (modules are small and short-lived)
    def work(self, name: str = "", fused: bool = False) -> HloWork:
        """The work of a computation, by default the entry's.

        Within a fusion (``fused``) instructions cause no traffic: the fusion's operands and results
        are counted where it is called.
        """
        computation = self.computations[name or self.entry]
        total = HloWork()
        for instruction in computation.values():
            total += self._work(instruction, computation, fused)
        return total

    def _work(
        self, instruction: Instruction, computation: Mapping[str, Instruction], fused: bool
    ) -> HloWork:
        moved = (
            0.0 if fused or instruction.opcode in FREE else self._moved(instruction, computation)
        )
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            size = sum(
                n_bytes(computation[name].type)
                for name in instruction.operands
                if name in computation
            )
            return HloWork(
                bytes=moved, collectives={(kind, _group(instruction.rest, self.devices)): (1, size)}
            )
        if instruction.opcode in ("dot", "convolution"):
            return HloWork(_product(instruction, computation), moved)
        if instruction.opcode == "custom-call":
            match = TARGET.search(instruction.rest)
            target = match[1] if match else ""
            gemm = "cublas" in target or "matmul" in target
            return HloWork(
                _product(instruction, computation) if gemm else 0.0, moved, calls={target: 1}
            )
        inner = HloWork(bytes=moved)
        if instruction.opcode == "conditional":
            names = BRANCHES.search(instruction.rest)
            branches = (
                INSTRUCTION_NAME.findall(names[1]) if names else CALLED.findall(instruction.rest)
            )
            works = [self.work(branch, fused) for branch in branches]
            # A branch with a kernel before others: the kernel's FLOPs are not counted here, so that
            # by FLOPs its fallback would be the most expensive.
            return max(works, key=lambda work: (len(work.kernels), work.flops, work.bytes))
        within = fused or instruction.opcode not in ("while", "call", "async-start")
        for called in CALLED.findall(instruction.rest):
            work = self.work(called, within)
            if called.startswith(CONTINUATIONS) or instruction.name.startswith(CONTINUATIONS):
                work = dataclasses.replace(work, collectives={})
            inner += work.times(self._trips(instruction))
        return inner

    def _trips(self, instruction: Instruction) -> int:
        """Trip count of a loop; 1 if unknown, and for other instructions."""
        if instruction.opcode != "while":
            return 1
        if match := TRIPS.search(instruction.rest):
            return int(match[1])
        match = re.search(r"condition=%([\w.\-]+)", instruction.rest)
        limits = [
            re.match(r"\((\d+)\)|(\d+)", constant.rest)
            for constant in self.computations.get(match[1] if match else "", {}).values()
            if constant.opcode == "constant" and constant.type.startswith("s32[]")
        ]
        # a counted loop starts at zero: its condition compares the counter with the trip count
        return max((int(limit[1] or limit[2]) for limit in limits if limit), default=1)

    def _moved(self, instruction: Instruction, computation: Mapping[str, Instruction]) -> float:
        """Bytes that an instruction reads from and writes to device memory."""
        if instruction.opcode.endswith("-done"):
            return 0.0
        operand_types = [
            computation[name].type for name in instruction.operands if name in computation
        ]
        kind = instruction.opcode.removesuffix("-start")
        if kind in SLICE_OPCODES:
            return _slice_bytes(operand_types[0], _result(instruction)) + in_memory(
                _result(instruction)
            )
        if kind == "dynamic-update-slice":
            return in_memory(operand_types[1]) + _slice_bytes(operand_types[0], operand_types[1])
        if kind == "copy":
            return in_memory(operand_types[0]) + in_memory(_result(instruction))
        if instruction.opcode != "fusion":
            return in_memory(instruction.type) + sum(map(in_memory, operand_types))
        inner = self._called(instruction)
        return self._read(inner) + _written(inner)

    def _called(self, fusion: Instruction) -> dict[str, Instruction]:
        called = CALLED.search(fusion.rest)
        assert called is not None
        return self.computations[called[1]]

    def _read(self, inner: Mapping[str, Instruction]) -> float:
        """Bytes that a fusion reads; of a parameter that is only sliced, the slices."""
        total = 0.0
        for instruction in inner.values():
            if instruction.opcode != "parameter":
                continue
            users = list(self._users(inner, instruction.name))
            size = in_memory(instruction.type)
            sliced = [
                n_bytes(u.type) for u, place in users if u.opcode in SLICE_OPCODES and not place
            ]
            updated = [u for u, place in users if u.opcode == "dynamic-update-slice" and not place]
            partial = len(sliced) + len(updated) == len(users)
            total += min(size, sum(sliced)) if partial else size
        return total

    def _users(
        self, inner: Mapping[str, Instruction], name: str
    ) -> Iterator[tuple[Instruction, int]]:
        """(Instruction, operand number) of each use of a value in a fusion.

        Bitcasts, copies and nested fusions are looked through.
        """
        for instruction in inner.values():
            for place, operand in enumerate(instruction.operands):
                if operand != name:
                    continue
                if instruction.opcode in SAME and not instruction.root:
                    yield from self._users(inner, instruction.name)
                elif instruction.opcode == "fusion":
                    yield from self._users_within(instruction, place, inner)
                else:
                    yield instruction, place

    def _users_within(
        self, fusion: Instruction, place: int, outer: Mapping[str, Instruction]
    ) -> Iterator[tuple[Instruction, int]]:
        """Uses of operand ``place`` of a nested fusion, which may only change the layout."""
        inner = self._called(fusion)
        parameter = next(
            instruction
            for instruction in inner.values()
            if instruction.opcode == "parameter" and instruction.rest.startswith(f"({place})")
        )
        for instruction, at in self._users(inner, parameter.name):
            if instruction.root and instruction.opcode in SAME:
                yield from self._users(outer, fusion.name)
            else:
                yield instruction, at


def _result(instruction: Instruction) -> str:
    """The type of an instruction's result.

    The type of an asynchronous start is a tuple that also holds its operands.
    """
    if not instruction.opcode.endswith("-start"):
        return instruction.type
    text = instruction.type[1:]
    match = PLACED.search(text, closing(text) if text.startswith("(") else 0)
    return match[0] if match else ""


def _slice_bytes(array_type: str, slice_type: str) -> float:
    """Bytes of a slice of an array in device memory; 0 if the array is in another memory."""
    return n_bytes(slice_type) if in_memory(array_type) else 0.0


def _product(instruction: Instruction, computation: Mapping[str, Instruction]) -> float:
    """FLOPs of a matrix product: 2 × elements of the result × size of the contracted axes."""
    results = math.prod(dims_of(instruction.type))
    if match := LABELS.search(instruction.rest):  # XLA for TPU turns products into convolutions
        return _convolution(instruction, computation, match)
    match, left = (
        CONTRACTED.search(instruction.rest),
        dims_of(computation[instruction.operands[0]].type),
    )
    if match is None:
        return 0.0
    return 2.0 * results * math.prod(left[axis] for axis in numbers(match[1]))


def _convolution(
    instruction: Instruction, computation: Mapping[str, Instruction], labels: re.Match[str]
) -> float:
    """FLOPs of a convolution: 2 × elements of the result × input features × window positions.

    XLA makes convolutions of batched products, whose batch axes become windows that mostly cover
    padding; only positions inside the input count.
    """
    lhs, kernel = (dims_of(computation[name].type) for name in instruction.operands[:2])
    result = dims_of(instruction.type)
    total = 2.0 * math.prod(result) * kernel[labels[2].index("i")]
    match = WINDOW.search(instruction.rest)
    window = dict(part.split("=") for part in match[1].split()) if match else {}

    def option(name: str, axis: int, default: int) -> int:
        values = window[name].split("x") if name in window else []
        return int(values[axis].partition("_")[0]) if values else default

    for axis, size in enumerate(numbers(window.get("size", ""))):
        before, stride = option("pad", axis, 0), option("stride", axis, 1)
        spread, apart = option("lhs_dilate", axis, 1), option("rhs_dilate", axis, 1)
        inputs = lhs[labels[1].index(str(axis))]
        outputs = result[labels[3].index(str(axis))]
        at = np.add.outer(np.arange(outputs) * stride, np.arange(size) * apart) - before
        # With the whole window counted, a step for a TPU had 1.46 times its FLOPs: a product with
        # heads has one window position for each head, and all but one are padding.
        inside = (at >= 0) & (at <= (inputs - 1) * spread) & (at % spread == 0)
        total *= inside.sum() / outputs
    return total


def _group(rest: str, devices: int) -> int:
    """Devices in a replica group of a collective; all devices if it lists no groups."""
    if "source_target_pairs" in rest:
        return 2
    if match := MESH.search(rest):  # mesh['axis_0'=4,'axis_1'=2] {'axis_0'}; parts: 'axis_0':(1)2
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    match = GROUPS.search(rest)
    if match is None:
        return devices
    return int(match[1]) if match[1] else len(numbers(match[2]))


def _written(inner: Mapping[str, Instruction]) -> float:
    """Bytes that a fusion writes; of an array updated in place, the bytes of the update."""
    root = next(instruction for instruction in inner.values() if instruction.root)
    results = [inner[n] for n in root.operands if n in inner] if root.opcode == "tuple" else [root]
    total = 0.0
    for result in results:
        instruction = result
        while (
            instruction.opcode in SAME and instruction.operands and instruction.operands[0] in inner
        ):
            instruction = inner[instruction.operands[0]]
        update = instruction.opcode == "dynamic-update-slice" and instruction.operands[1] in inner
        total += _slice_bytes(
            result.type, (inner[instruction.operands[1]] if update else result).type
        )
    return total
