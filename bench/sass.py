"""Read the machine code of compiled kernels: its loops, and how long its instructions occupy a multiprocessor."""

import ast
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)([^;]*);")
LABEL = re.compile(r"^(\.L\w+):", re.MULTILINE)
SOURCE = re.compile(r'//## File "([^"]+)", line (\d+)')
TARGET = re.compile(r"`\((\.L\w+)\)")
# Units of a scheduler, and the cycles for which an instruction of a warp occupies one: throughputs of sm_80 and later in
# the CUDA C++ programming guide. `Sm.float_cycles` replaces the zero.
UNITS = (
    ("float", re.compile(r"IMAD"), 2),
    ("float", re.compile(r"F(ADD|MUL|FMA)|H(ADD|MUL|FMA)"), 0),
    ("integer", re.compile(r"U?(LOP|I?SETP|ISET|SEL|SHF|PRMT|LEA|PLOP|SGXT|BMSK)"), 2),
    ("integer", re.compile(r"[IFV]\w*MNMX|F(SEL|SET)|I(ADD|ABS)|[PR]2[RP]"), 2),
    ("special", re.compile(r"MUFU|POPC|FLO|BREV|I2F|F2I|F2F|I2I"), 8),
    ("memory", re.compile(r"LD|ST|ATOM|RED|SHFL|CCTL"), 4),
)


# A branch back over at most this many bytes, one of these among them, only waits for a barrier or for memory of tensor
# cores. So does one from behind the kernel's exit, where the compiler puts what is rarely executed.
SPIN, WAITING = 8 * 16, {"SYNCS", "NANOSLEEP"}


class Loop(NamedTuple):
    """A loop of the machine code, between the addresses of its first instruction and of its branch back."""

    name: str  # function and variable of the statement that it comes from
    first: int
    last: int


class Code(NamedTuple):
    """The instructions of a kernel by address, without padding, and its loops, the smallest first."""

    opcodes: Mapping[int, str]
    loops: list[Loop]

    @property
    def loop_instructions(self) -> int:
        return sum(any(loop.first <= address <= loop.last for loop in self.loops) for address in self.opcodes)

    @property
    def loop_sizes(self) -> dict[str, int]:
        """The instructions of the largest copy of each loop, with the loops in it."""
        return {
            loop.name: sum(loop.first <= address <= loop.last for address in self.opcodes)
            for loop in sorted(self.loops, key=lambda loop: loop.last - loop.first)
        }

    def executed(self, trips: Mapping[str, float], float_cycles: int) -> dict[str, float]:
        """Return the cycles of a scheduler for which a warp occupies each unit, those of issuing ("issue"), and the number
        of barriers ("barrier"). Trips of a loop are shared equally by its copies; a loop without trips runs once."""
        copies = Counter(loop.name for loop in self.loops)
        totals = defaultdict[str, float](float, barrier=0.0)
        for address, opcode in self.opcodes.items():
            loop = next((loop for loop in self.loops if loop.first <= address <= loop.last), None)
            times = 1.0 if loop is None else trips.get(loop.name, 1.0) / copies[loop.name]
            totals["issue"] += times
            totals["barrier"] += times * (opcode == "BAR")
            unit, cycles = next(((unit, cycles) for unit, kind, cycles in UNITS if kind.match(opcode)), ("issue", None))
            if cycles is not None:
                totals[unit] += times * (cycles or float_cycles)
        return dict(totals)


def parse(assembly: str) -> Code:
    """Read the output of `nvdisasm -c -g`: code with labels and source lines."""
    opcodes: dict[int, str] = {}
    places: dict[int, tuple[str, int]] = {}
    branches: list[tuple[int, str]] = []
    addresses: dict[str, int] = {}
    labels: list[str] = []
    source = ("", 0)
    for line in assembly.splitlines():
        if match := SOURCE.search(line):
            source = match[1], int(match[2])
        elif match := LABEL.match(line):
            labels.append(match[1])
        elif match := INSTRUCTION.search(line):
            address, opcode = int(match[1], 16), match[2]
            addresses |= dict.fromkeys(labels, address)
            labels.clear()
            places[address] = source
            if opcode != "NOP":
                opcodes[address] = opcode
            if opcode == "BRA" and (target := TARGET.search(match[3])):
                branches.append((address, target[1]))
    loops: dict[int, Loop] = {}
    for address, label in branches:
        first = addresses.get(label, address)
        if first == address:  # the trap behind the last instruction
            opcodes.pop(address, None)
        elif first < address:
            executed = {opcodes.get(at) for at in range(first, address, 16)}
            only_waits = "EXIT" in executed or (address - first <= SPIN and WAITING & executed)
            if not only_waits:  # several branches back to one place are one loop
                inner = {loop.name for loop in loops.values() if first <= loop.first and loop.last <= address}
                body = [places[at] for at in range(address, first - 1, -16) if at in places]
                loops[first] = Loop(name_of(body, inner), first, address)
    return Code(opcodes, sorted(loops.values(), key=lambda loop: loop.last - loop.first))


def name_of(places: Sequence[tuple[str, int]], inner: Collection[str]) -> str:
    """Return function and variable of a loop statement, such as "sum_entries.start": the innermost one around the branch
    back or, if the compiler moved a line of another function there, around a line before it, but none of the loops in it.
    `places` are file and line of the loop's instructions, the last first."""
    for nth, (file, line) in enumerate(places):
        parts = Path(file).parts[-3:]  # a cached kernel names the file of another clone
        around = [
            (last - first, name) for first, last, name in _statements(ROOT.joinpath(*parts)) if first <= line <= last
        ]
        if around and ((name := min(around)[1]) not in inner or nth == 0):
            return name
    file, line = places[0]
    return f"{'/'.join(Path(file).parts[-3:])}:{line}"


@functools.cache
def _statements(path: Path) -> list[tuple[int, int, str]]:
    """The first and last line of the loop statements of a file, and their names; not those that are unrolled."""
    statements = []
    tree = ast.parse(path.read_text() if path.is_file() else "")
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            if isinstance(node, ast.For) and "static_range" not in ast.unparse(node.iter):
                variable = ast.unparse(node.target)
            elif isinstance(node, ast.While):
                variable = re.findall(r"[a-z]\w*", ast.unparse(node.test))[0]
            else:
                continue
            statements.append((node.lineno, node.end_lineno or node.lineno, f"{function.name}.{variable}"))
    return statements
