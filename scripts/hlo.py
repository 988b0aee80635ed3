"""Reads the text of a program that XLA optimised for a TPU: its instructions and their cost.

A computation of XLA's text is a block of instructions, `%name = shape op(operands), attributes`.
libtpu's compiler adds `estimated_cycles` to what it schedules, and stack frames to the module.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

BYTES = {
    **dict.fromkeys(("pred", "s8", "u8"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
}
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "iota", "opt-barrier"),
}
"""Instructions that move nothing."""

MOVES = {
    *("copy", "transpose", "reshape", "slice", "dynamic-slice", "pad", "concatenate"),
    *("dynamic-update-slice", "gather", "scatter"),
}
HARMLESS = FREE | {
    "broadcast",
    "convert",
    "compare",
    "select",
    "clamp",
    "add",
    "custom-call",
    "and",
}
"""What a fusion that only moves numbers has beside moves: indices, casts and masks."""

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a computation.

    Attributes:
      name: its name, unique in the module.
      shape: shape of its result, with layout; of a tuple's parts where it has several.
      op: its operation.
      operands: names of its operands.
      text: operands as text, of a constant its value.
      attributes: the text behind the operands.
    """

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    text: str
    attributes: str

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    @property
    def scope(self) -> str:
        """The names of the functions that made it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, attribute: str) -> str:
        """The computation that an attribute names."""
        return re.search(rf"{attribute}=%([\w.\-]+)", self.attributes)[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return nbytes(self.shape)

    @property
    def sent(self) -> int:
        """Bytes of a collective's result; where it starts, its shape has the operands as well."""
        parts = [(kind, sizes) for kind, sizes in arrays(self.shape) if sizes]
        size = sum(BYTES.get(kind, 0) * math.prod(sizes) for kind, sizes in parts)
        return size // 2 if self.op.endswith("start") else size


def nbytes(shape: str) -> int:
    """Bytes of a shape."""
    return sum(BYTES.get(kind, 0) * math.prod(sizes) for kind, sizes in arrays(shape))


def arrays(shape: str) -> list[tuple[str, list[int]]]:
    """The dtype and sizes of each array in a shape."""
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    return [(kind, [int(n) for n in sizes.split(",") if n]) for kind, sizes in found]


@dataclasses.dataclass(frozen=True)
class Use:
    """An instruction as often as a run of the program executes it.

    Attributes:
      instruction: the instruction.
      times: executions.
      computation: name of its computation.
      loops: trips of each loop around it, from outside in.
    """

    instruction: Instruction
    times: float
    computation: str
    loops: tuple[int, ...]


class Module:
    """A module of an optimised program.

    Attributes:
      computations: instructions of each computation, as scheduled.
      entry: name of the first computation.
      unknown: loops whose trips the text does not tell; they count once.
    """

    def __init__(self, text: str):
        self.computations, self.entry = _computations(text)
        self.unknown: list[str] = []
        self._frames = _frames(text)

    def uses(self) -> list[Use]:
        """The instructions outside of fusions, with loops and branches entered.

        Of a branch the dearest counts.
        """
        return list(self._uses(self.entry, 1.0, ()))

    def _uses(self, name: str, times: float, loops: tuple[int, ...]) -> Iterator[Use]:
        for one in self.computations[name]:
            if one.op == "while":
                trips = self._trips(one)
                yield from self._uses(one.called("body"), times * trips, (*loops, trips))
            elif one.op == "conditional":
                yield from max(
                    (list(self._uses(branch, times, loops)) for branch in _branches(one)),
                    key=lambda uses: sum((u.instruction.cycles or 0) * u.times for u in uses),
                )
            elif one.op == "call":
                yield from self._uses(one.called("to_apply"), times, loops)
            else:
                yield Use(one, times, name, loops)

    def work(self, one: Instruction) -> int:
        """The compiler's cycles of an instruction, of a loop's turns and a branch's dearest."""
        if one.op == "while":
            return self._trips(one) * self.total(one.called("body"))
        if one.op == "conditional":
            return max(map(self.total, _branches(one)))
        return self.total(one.called("to_apply")) if one.op == "call" else one.cycles or 0

    def total(self, computation: str) -> int:
        """`work` of a computation."""
        return sum(map(self.work, self.computations[computation]))

    def _trips(self, loop: Instruction) -> int:
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition")]
        bounds = [int(x.text) for x in condition if x.op == "constant" and x.text.isdecimal()]
        if not bounds:
            self.unknown.append(loop.name)
        return max(bounds, default=1)

    def ops(self, computation: str) -> collections.Counter:
        """How often each operation occurs in a computation, fusions inside it included."""
        found = collections.Counter()
        for one in self.computations[computation]:
            found[one.op] += 1
            if one.op == "fusion":
                found += self.ops(one.called("calls"))
        return found

    def kind(self, one: Instruction) -> str:
        """What an instruction does, in the words of docs/tpu.md."""
        if one.op == "custom-call":
            return "kernel" if 'custom_call_target="tpu_custom_call"' in one.attributes else "free"
        if one.op.startswith(COLLECTIVES) or (
            one.op.startswith("async") and any(name in one.attributes for name in COLLECTIVES)
        ):
            return "collective"
        if one.op in FREE:
            return "free"
        if re.fullmatch(r"(copy|slice|async)-(start|done|update)", one.op):
            return "prefetch"
        ops = set(self.ops(one.called("calls"))) if one.op == "fusion" else {one.op}
        if ops & {"convolution", "dot"}:
            return "products"
        if ops & MOVES and ops <= MOVES | HARMLESS:
            return "copies"
        if ops & {"reduce", "reduce-window"}:
            return "reductions"
        return "elementwise"

    def flops(self, one: Instruction) -> int:
        """Operations of an instruction's matrix products, two per multiply-add."""
        if one.op in ("convolution", "dot"):
            raise ValueError(f"{one.name} is not in a fusion")
        if one.op != "fusion":
            return 0
        inside = self.computations[one.called("calls")]
        shapes = {x.name: x.shape for x in inside}
        found = sum(self.flops(x) for x in inside if x.op == "fusion")
        return found + sum(_product_flops(x, shapes) for x in inside if x.op == "convolution")

    def line(self, one: Instruction, folder: str) -> str:
        """The innermost line of the code under a folder that made an instruction."""
        found = re.search(r"stack_frame_id=(\d+)", one.attributes)
        for file, function, number in self._frames(found[1]) if found else ():
            if folder in file:
                short = file.split(folder, 1)[1].lstrip("/")
                return f"{short}:{number} {function.replace('.<locals>', '')}"
        return "-"


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    found: dict[str, list[str]] = {}
    current = entry = None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line)
        if header:
            current = found[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line == "}":
            current = None
        elif current is not None and re.match(r"\s+(ROOT )?%[\w.\-]+ = ", line):
            current.append(line)
        elif current:
            current[-1] += line
    parsed = {name: [_instruction(line) for line in lines] for name, lines in found.items()}
    return parsed, entry


def _instruction(line: str) -> Instruction:
    name, rest = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)$", line).groups()
    end = _closing(rest) if rest[0] == "(" else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    op, rest = re.match(r"([\w\-]+)(\(.*)$", rest).groups()
    end = _closing(rest)
    text = rest[1 : end - 1]
    return Instruction(name, shape, op, tuple(re.findall(r"%([\w.\-]+)", text)), text, rest[end:])


def _closing(text: str) -> int:
    """The place behind the bracket that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place + 1
    raise ValueError(f"brackets do not close: {text[:80]}")


def _branches(one: Instruction) -> list[str]:
    several = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
    if several:
        return re.findall(r"%([\w.\-]+)", several[1])
    return [one.called("true_computation"), one.called("false_computation")]


def _product_flops(one: Instruction, shapes: dict[str, str]) -> int:
    """Operations of a product, which XLA writes as a convolution."""
    _, out = arrays(one.shape)[0]
    right = re.search(r"dim_labels=\w+_(\w+)->", one.attributes)[1]
    _, kernel = arrays(shapes[one.operands[1]])[0]
    window = re.search(r"window=\{size=([\dx]+)", one.attributes)
    # A padded or dilated window stands for a batch: each result needs one place of it.
    batched = re.search(r"pad=|lhs_dilate|lhs_reversal|rhs_reversal", one.attributes)
    places = 1 if batched or not window else math.prod(int(n) for n in window[1].split("x"))
    return 2 * math.prod(out) * kernel[right.index("i")] * places


def _frames(text: str):
    """A function from a frame's number to the file, function and line of each, innermost first."""
    tables = {}
    for name in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
        found = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.M)
        tables[name] = dict(row.split(" ", 1) for row in found[1].splitlines()) if found else {}

    def numbers(row: str) -> dict[str, str]:
        """The numbered fields of a row."""
        return dict(re.findall(r"(\w+)=(\d+)", row))

    def stack(number: str) -> Iterator[tuple[str, str, int]]:
        """The frames from one outwards."""
        seen = set()
        while number in tables["StackFrames"] and number not in seen:
            seen.add(number)
            frame = numbers(tables["StackFrames"][number])
            place = numbers(tables["FileLocations"][frame["file_location_id"]])
            file = tables["FileNames"][place["file_name_id"]].strip('"')
            function = tables["FunctionNames"][place["function_name_id"]].strip('"')
            yield file, function, int(place["line"])
            number = str(int(frame.get("parent_frame_id", "1")) - 1)

    return stack
