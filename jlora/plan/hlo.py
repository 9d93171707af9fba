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
from typing import NamedTuple

import numpy as np

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
SHAPE = re.compile(r"\b(pred|[suf]\d+\w*|bf16|c64|c128)\[([\d,]*)\]")
NAME = re.compile(r"%([\w.\-]+)")
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

SLICES = ("dynamic-slice", "slice", "gather")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    """Its attributes."""
    root: bool


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
            elif found := _parse(line):
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
            inner += self.work(called, within).times(self._trips(one))
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
        """Bytes that an operation reads and writes."""
        if one.opcode.endswith("-done"):
            return 0.0
        if one.opcode in SLICES:
            return 2 * n_bytes(one.type)
        kind = one.opcode.removesuffix("-start")
        if kind == "dynamic-update-slice":
            return 2 * n_bytes(own[one.operands[1]].type)
        given = [n_bytes(own[name].type) for name in one.operands if name in own]
        if kind == "copy":
            return 2 * sum(given)
        if kind in SLICES:  # one that starts: operands, result and a number
            return 2 * (n_bytes(one.type) - sum(given) - 4)
        if one.opcode != "fusion":
            return n_bytes(one.type) + sum(given)
        called = CALLED.search(one.rest)
        inner = self.computations[called[1]] if called else {}
        return _read(inner, given) + _written(inner, n_bytes(one.type))


def n_bytes(type_: str) -> float:
    """Bytes of a type's arrays."""
    return sum(
        BYTES.get(dtype, 1) * math.prod(_numbers(dims)) for dtype, dims in SHAPE.findall(type_)
    )


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _dims(type_: str) -> list[int]:
    """The dimensions of a type's first array."""
    match = SHAPE.search(type_)
    return _numbers(match[2]) if match else []


def _parse(line: str) -> Instruction | None:
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        return None
    rest = line[match.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opcode, paren, rest = rest.partition("(")
    if not paren:
        return None
    end = _closing(f"({rest}") - 1
    given, rest = rest[:end], rest[end + 1 :]
    if opcode == "constant":
        rest = f"({given}){rest}"
    operands = tuple(NAME.findall(given))
    return Instruction(match[2], type_, opcode, operands, rest, bool(match[1]))


def _closing(text: str) -> int:
    """Where the first parenthesis of a text is closed."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(text)


def _product(one: Instruction, own: Mapping[str, Instruction]) -> float:
    """FLOPs of a matrix product: two for each element of the result and contracted index."""
    results = math.prod(_dims(one.type))
    if match := LABELS.search(one.rest):  # a convolution, as TPUs have them
        return _convolution(one, own, match)
    match, left = CONTRACTED.search(one.rest), _dims(own[one.operands[0]].type)
    if match is None:
        return 0.0
    return 2.0 * results * math.prod(left[axis] for axis in _numbers(match[1]))


def _convolution(one: Instruction, own: Mapping[str, Instruction], labels: re.Match[str]) -> float:
    """FLOPs of a convolution: two for each result, input feature, and place of its window.

    XLA makes them of products, whose further axes become windows that mostly lie outside.
    """
    given, kernel = (_dims(own[name].type) for name in one.operands[:2])
    result = _dims(one.type)
    total = 2.0 * math.prod(result) * kernel[labels[2].index("i")]
    match = WINDOW.search(one.rest)
    window = dict(part.split("=") for part in match[1].split()) if match else {}

    def option(name: str, axis: int, default: int) -> int:
        values = window[name].split("x") if name in window else []
        return int(values[axis].partition("_")[0]) if values else default

    for axis, size in enumerate(_numbers(window.get("size", ""))):
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
    return int(match[1]) if match[1] else len(_numbers(match[2]))


def _users(inner: Mapping[str, Instruction], name: str) -> Iterator[tuple[Instruction, int]]:
    """What uses a value in a fusion, and as which operand, seen through what moves nothing."""
    for one in inner.values():
        for place, operand in enumerate(one.operands):
            if operand != name:
                continue
            if one.opcode in ("bitcast", "copy") and not one.root:
                yield from _users(inner, one.name)
            else:
                yield one, place


def _read(inner: Mapping[str, Instruction], given: list[float]) -> float:
    """Bytes that a fusion reads: of what it only takes slices of, the slices."""
    total, seen = 0.0, 0
    for one in inner.values():
        if one.opcode != "parameter":
            continue
        seen += 1
        users = list(_users(inner, one.name))
        whole = n_bytes(one.type)
        sliced = [n_bytes(u.type) for u, place in users if u.opcode in SLICES and place == 0]
        updated = [0.0 for u, place in users if u.opcode == "dynamic-update-slice" and place == 0]
        partial = sliced + updated
        total += min(whole, sum(partial)) if len(partial) == len(users) else whole
    return total if seen else sum(given)


def _written(inner: Mapping[str, Instruction], whole: float) -> float:
    """Bytes that a fusion writes: of what it updates in place, the update."""
    root = next((one for one in inner.values() if one.root), None)
    if root is None:
        return whole
    results = [inner[n] for n in root.operands if n in inner] if root.opcode == "tuple" else [root]
    total = 0.0
    for one in results:
        while one.opcode in ("bitcast", "copy") and one.operands and one.operands[0] in inner:
            one = inner[one.operands[0]]
        if one.opcode == "dynamic-update-slice" and one.operands[1] in inner:
            total += n_bytes(inner[one.operands[1]].type)
        else:
            total += n_bytes(one.type)
    return total
