"""What a compiled step does, read from its optimized HLO: XLA's own account counts loops once.

Every count is of one device and of one run of the step: a loop's body counts as often as the loop
runs, and of a conditional's branches the one with the most work.
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
    NAME,
    PLACED,
    Instruction,
    closing,
    dims_of,
    in_memory,
    n_bytes,
    numbers,
    parse,
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

KERNELS = re.compile(r"fmha|tpu_custom_call|triton_kernel|mosaic")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "async-start", "async-update", "after-all", "partition-id", "replica-id",
    "opt-barrier", "iota", "domain",
}  # fmt: skip
"""Instructions that move nothing by themselves."""

GOING_ON = ("async_collective_fusion", "async-collective-done")
"""Beginnings of the names of fusions beside which an exchange goes on that another one started."""

SAME = ("bitcast", "copy")
SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All exchanges of one kind among groups of one size."""

    kind: str
    group: int
    """Devices that exchange with each other."""
    count: int
    bytes: int
    """Of one device's operands, over all of them."""

    @property
    def sent(self) -> float:
        """Bytes that a device sends at least, as a ring does."""
        others = (self.group - 1) / self.group
        factor = {"all-gather": self.group - 1, "all-reduce": 2 * others, "collective-permute": 1}
        return self.bytes * factor.get(self.kind, others)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a computation does."""

    flops: float = 0.0
    """Of matrix products; a kernel that is called by name is not looked into."""
    bytes: float = 0.0
    """Read and written by its operations, slices counted as slices."""
    collectives: Mapping[tuple[str, int], tuple[int, float]] = dataclasses.field(
        default_factory=dict
    )
    """(kind, devices in a group) → (how many, bytes)."""
    calls: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Custom call's target → how often it is called."""

    @property
    def kernels(self) -> tuple[str, ...]:
        """Named kernels of attention and of Pallas; the rest are products and copies."""
        return tuple(sorted(name for name in self.calls if KERNELS.search(name)))

    def __add__(self, other: Work) -> Work:
        both = dict(self.collectives)
        for key, (count, size) in other.collectives.items():
            n, total = both.get(key, (0, 0.0))
            both[key] = n + count, total + size
        calls = Counter(self.calls) + Counter(other.calls)
        return Work(self.flops + other.flops, self.bytes + other.bytes, both, calls)

    def times(self, n: int) -> Work:
        """The same, ``n`` times over."""
        collectives = {
            key: (n * count, n * size) for key, (count, size) in self.collectives.items()
        }
        calls = {name: n * count for name, count in self.calls.items()}
        return Work(n * self.flops, n * self.bytes, collectives, calls)

    def exchanges(self) -> list[Collective]:
        """The collectives, most bytes first."""
        found = [
            Collective(kind, group, count, round(size))
            for (kind, group), (count, size) in self.collectives.items()
        ]
        return sorted(found, key=lambda one: -one.bytes)


def work_of(text: str) -> Work:
    """What the module of this text (``Compiled.as_text()``) does."""
    return Module(text).work()


class Module:
    """The computations of an optimized module."""

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
            elif found := parse(line):
                current[found.name] = found

    def instructions(self) -> Iterator[Instruction]:
        """All of them, those within fusions included."""
        for computation in self.computations.values():
            yield from computation.values()

    @functools.cache  # noqa: B019 (a module is small, and gone with its last use)
    def work(self, name: str = "", fused: bool = False) -> Work:
        """What one computation does; in a fusion only its results and what it is given move."""
        own = self.computations[name or self.entry]
        total = Work()
        for one in own.values():
            total += self._work(one, own, fused)
        return total

    def _work(self, one: Instruction, own: Mapping[str, Instruction], fused: bool) -> Work:
        moved = 0.0 if fused or one.opcode in FREE else self._moved(one, own)
        kind = one.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            size = sum(n_bytes(own[name].type) for name in one.operands if name in own)
            return Work(
                bytes=moved, collectives={(kind, _group(one.rest, self.devices)): (1, size)}
            )
        if one.opcode in ("dot", "convolution"):
            return Work(_product(one, own), moved)
        if one.opcode == "custom-call":
            match = TARGET.search(one.rest)
            target = match[1] if match else ""
            gemm = "cublas" in target or "matmul" in target
            return Work(_product(one, own) if gemm else 0.0, moved, calls={target: 1})
        inner = Work(bytes=moved)
        if one.opcode == "conditional":
            names = BRANCHES.search(one.rest)
            branches = NAME.findall(names[1]) if names else CALLED.findall(one.rest)
            works = [self.work(branch, fused) for branch in branches]
            return max(works, key=lambda work: (len(work.kernels), work.flops, work.bytes))
        within = fused or one.opcode not in ("while", "call", "async-start")
        for called in CALLED.findall(one.rest):
            work = self.work(called, within)
            if called.startswith(GOING_ON) or one.name.startswith(GOING_ON):
                work = dataclasses.replace(work, collectives={})
            inner += work.times(self._trips(one))
        return inner

    def _trips(self, one: Instruction) -> int:
        """How often a loop's body runs; 1 where that is not known before."""
        if one.opcode != "while":
            return 1
        if match := TRIPS.search(one.rest):
            return int(match[1])
        match = re.search(r"condition=%([\w.\-]+)", one.rest)
        limits = [
            re.match(r"\((\d+)\)|(\d+)", each.rest)
            for each in self.computations.get(match[1] if match else "", {}).values()
            if each.opcode == "constant" and each.type.startswith("s32[]")
        ]
        found = [int(limit[1] or limit[2]) for limit in limits if limit]
        return max(found, default=1)

    def _moved(self, one: Instruction, own: Mapping[str, Instruction]) -> float:
        """Bytes that an operation reads from the device's memory and writes to it."""
        if one.opcode.endswith("-done"):
            return 0.0
        given = [own[name].type for name in one.operands if name in own]
        kind = one.opcode.removesuffix("-start")
        if kind in SLICES:
            return _part(given[0], _result(one)) + in_memory(_result(one))
        if kind == "dynamic-update-slice":
            return in_memory(given[1]) + _part(given[0], given[1])
        if kind == "copy":
            return in_memory(given[0]) + in_memory(_result(one))
        if one.opcode != "fusion":
            return in_memory(one.type) + sum(map(in_memory, given))
        inner = self._called(one)
        return self._read(inner) + _written(inner)

    def _called(self, fusion: Instruction) -> dict[str, Instruction]:
        called = CALLED.search(fusion.rest)
        assert called is not None
        return self.computations[called[1]]

    def _read(self, inner: Mapping[str, Instruction]) -> float:
        """Bytes that a fusion reads: of what it only takes slices of, the slices."""
        total = 0.0
        for one in inner.values():
            if one.opcode != "parameter":
                continue
            users = list(self._users(inner, one.name))
            whole = in_memory(one.type)
            sliced = [n_bytes(u.type) for u, place in users if u.opcode in SLICES and not place]
            updated = [u for u, place in users if u.opcode == "dynamic-update-slice" and not place]
            partial = len(sliced) + len(updated) == len(users)
            total += min(whole, sum(sliced)) if partial else whole
        return total

    def _users(
        self, inner: Mapping[str, Instruction], name: str
    ) -> Iterator[tuple[Instruction, int]]:
        """What uses a value in a fusion, and as which operand, seen through what moves nothing."""
        for one in inner.values():
            for place, operand in enumerate(one.operands):
                if operand != name:
                    continue
                if one.opcode in SAME and not one.root:
                    yield from self._users(inner, one.name)
                elif one.opcode == "fusion":
                    yield from self._users_within(one, place, inner)
                else:
                    yield one, place

    def _users_within(
        self, fusion: Instruction, place: int, outer: Mapping[str, Instruction]
    ) -> Iterator[tuple[Instruction, int]]:
        """What uses an operand of a fusion within a fusion, which may only be another layout."""
        inner = self._called(fusion)
        given = next(
            one
            for one in inner.values()
            if one.opcode == "parameter" and one.rest.startswith(f"({place})")
        )
        for one, at in self._users(inner, given.name):
            if one.root and one.opcode in SAME:
                yield from self._users(outer, fusion.name)
            else:
                yield one, at


def _result(one: Instruction) -> str:
    """The type of what an operation gives; one that starts has operands or a target before it."""
    if not one.opcode.endswith("-start"):
        return one.type
    text = one.type[1:]
    match = PLACED.search(text, closing(text) if text.startswith("(") else 0)
    return match[0] if match else ""


def _part(whole: str, part: str) -> float:
    """Bytes of a part, where the whole of it is in the device's memory."""
    return n_bytes(part) if in_memory(whole) else 0.0


def _product(one: Instruction, own: Mapping[str, Instruction]) -> float:
    """FLOPs of a matrix product: two for each element of the result and contracted index."""
    results = math.prod(dims_of(one.type))
    if match := LABELS.search(one.rest):  # a convolution, as TPUs have them
        return _convolution(one, own, match)
    match, left = CONTRACTED.search(one.rest), dims_of(own[one.operands[0]].type)
    if match is None:
        return 0.0
    return 2.0 * results * math.prod(left[axis] for axis in numbers(match[1]))


def _convolution(one: Instruction, own: Mapping[str, Instruction], labels: re.Match[str]) -> float:
    """FLOPs of a convolution: two for each result, input feature, and place of its window.

    XLA makes them of products, whose further axes become windows that mostly lie outside.
    """
    given, kernel = (dims_of(own[name].type) for name in one.operands[:2])
    result = dims_of(one.type)
    total = 2.0 * math.prod(result) * kernel[labels[2].index("i")]
    match = WINDOW.search(one.rest)
    window = dict(part.split("=") for part in match[1].split()) if match else {}

    def option(name: str, axis: int, default: int) -> int:
        values = window[name].split("x") if name in window else []
        return int(values[axis].partition("_")[0]) if values else default

    for axis, size in enumerate(numbers(window.get("size", ""))):
        before, stride = option("pad", axis, 0), option("stride", axis, 1)
        spread, apart = option("lhs_dilate", axis, 1), option("rhs_dilate", axis, 1)
        inputs = given[labels[1].index(str(axis))]
        outputs = result[labels[3].index(str(axis))]
        at = np.add.outer(np.arange(outputs) * stride, np.arange(size) * apart) - before
        inside = (at >= 0) & (at <= (inputs - 1) * spread) & (at % spread == 0)
        total *= inside.sum() / outputs
    return total


def _group(rest: str, devices: int) -> int:
    """How many devices exchange with each other; all where no groups are named."""
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
    """Bytes that a fusion writes: of what it updates in place, the update."""
    root = next(one for one in inner.values() if one.root)
    results = [inner[n] for n in root.operands if n in inner] if root.opcode == "tuple" else [root]
    total = 0.0
    for result in results:
        one = result
        while one.opcode in SAME and one.operands and one.operands[0] in inner:
            one = inner[one.operands[0]]
        update = one.opcode == "dynamic-update-slice" and one.operands[1] in inner
        total += _part(result.type, (inner[one.operands[1]] if update else result).type)
    return total
