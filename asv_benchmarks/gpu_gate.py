"""Instruction budgets of the GPU kernels, from their machine code; no GPU is needed.

``python -m asv_benchmarks.gpu_gate`` compiles kernels.cu for compute capability 9.0 with NVRTC,
disassembles the result and prints the instructions that a thread executes per output.  The exit
status is 1 if a kernel is over a limit.  It needs nvidia-cuda-nvrtc and nvidia-cuda-nvdisasm.

An H200 issues 132 x 4 x 32 instructions per cycle, at 1.98 GHz.  A kernel that reads and writes 8
bytes per output reaches 70 % of 4.3 TB/s if it executes at most 89 instructions per output.

Code in loops is counted with their trips, code outside of loops once.  Filters have two loops: the
one that stores vectors is for warps without a border; the other one is not counted.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import lowrank.engine.cuda

KERNELS = Path(lowrank.engine.cuda.__file__).with_name("kernels.cu")
ARCHITECTURE = "sm_90"
INSTRUCTIONS_PER_BYTE = 132 * 4 * 32 * 1.98e9 / (0.7 * 4.3e12)
ROWS = 64  # of a strip of a filter
TILE, THREADS, WARPS = 8 * 16, 256, 8  # of a fused kernel: outputs per channel, and its block
HALO = 10 * 18
FORMS = {"taps": 0, "one term": 1, "terms": 2}  # of `planes` in kernels.cu

Trips = tuple["Trips | float", ...]  # of a loop, then of the loops in it


class Row(NamedTuple):
    """A kernel and its limits.

    Attributes
    ----------
    title, name : str
        Description, and name with template arguments.
    outputs : float
        Outputs per thread.
    trips : tuple
        Trips of each loop in program order; 0 for a loop that is not counted.
    bytes : float
        Bytes that the memory moves per output.
    limit : float
        Largest number of instructions per output.
    registers, shared : int
        Largest number of registers, and bytes of static shared memory.
    """

    title: str
    name: str
    outputs: float
    trips: Trips
    bytes: float
    limit: float
    registers: int
    shared: int = 0

    @property
    def has_products(self) -> bool:
        """Whether tensor cores have to be used."""
        return self.name.startswith("fused")


def planes(
    title: str, kinds: tuple[str, str], taps: int, columns: int, limit: float, registers: int,
    form: str = "one term", terms: int = 1, step: int = 1,
) -> Row:  # fmt: skip
    """Return the row of a filter or depthwise stage of `taps` x `taps`."""
    unrolled = taps if taps >= 4 else taps * (4 // taps)
    periods = -(-(ROWS + taps - 1) // unrolled)
    rows = periods * unrolled - taps + 1
    size = {"float": 4, "f16": 2, "u8": 1}
    width = min(columns, 16 // size[kinds[0]])
    offset = -(taps // 2 * step) % width
    name = (
        f"planes<{', '.join(kinds)}, {taps}, {taps}, 1, {step}, {columns}, {offset}, {FORMS[form]}>"
    )
    inner = (terms,) * unrolled if form == "terms" else ()
    moved = sum(size[kind] for kind in kinds)
    return Row(title, name, rows * columns, (0, (periods, *inner)), moved, limit, registers)


def fused(
    title: str, kind: str, channels: int, outs: int, limit: float, ins: int = 0
) -> Row:  # fmt: skip
    """Return the row of a fused step; `ins` are the inputs of its first pointwise stage, if any."""
    size = 4 if kind == "float" else 2
    unit = 64 // size  # inputs per iteration of a product
    columns = channels / 4 * TILE / 4 / THREADS
    loops: Trips = (columns,), (TILE / 32 * outs / 32 / WARPS, channels / unit)
    if ins:
        loops = ((-(-HALO // 32) * channels / 32 / WARPS, ins / unit), *loops)
    name = f"fused<{kind}, 3, 3, 1, 8, 16, 4, {int(ins > 0)}>"
    moved = size * ((ins or channels) / outs + 1)
    return Row(title, name, TILE * outs / THREADS, loops, moved, limit, 128)


FLOATS, HALVES, BYTES = ("float", "float"), ("f16", "f16"), ("u8", "u8")
TABLE = (
    planes("filter 3 x 3, float32", FLOATS, 3, 4, 80, 64),
    planes("filter 3 x 3, three terms", FLOATS, 3, 4, 80, 64, "terms", 3),
    planes("filter 15 x 15, float32", FLOATS, 15, 4, 160, 168),
    planes("filter 3 x 3, float16", HALVES, 3, 8, 44, 96),
    planes("filter 3 x 3, uint8", BYTES, 3, 16, 22, 168),
    planes("filter 3 x 3, uint8, 3 channels", BYTES, 3, 16, 22, 168, step=3),
    planes("depthwise 3 x 3, float32", FLOATS, 3, 4, 80, 64, "taps"),
    planes("depthwise 5 x 5, float32", FLOATS, 5, 4, 89, 96, "taps"),
    Row("depthwise 3 x 3, NHWC", "depthwise_last<float, 3, 3, 1, 8, 4>", 32, (), 8, 80, 128),
    Row("depthwise 3 x 3, NHWC, f16", "depthwise_last<f16, 3, 3, 1, 8, 4>", 32, (), 4, 44, 128),
    fused("dw + pw 64 -> 128, TF32", "float", 64, 128, 67),
    fused("dw + pw 64 -> 128, float16", "f16", 64, 128, 36),
    fused("dw + pw 64 -> 128, bfloat16", "bf16", 64, 128, 36),
    fused("pw + dw + pw 256 -> 64 -> 256, TF32", "float", 64, 256, 89, 256),
    fused("pw + dw + pw 256 -> 64 -> 256, float16", "f16", 64, 256, 44, 256),
)  # fmt: skip


class Count(NamedTuple):
    """Counts of a kernel's machine code.

    Attributes
    ----------
    per_output : float
        Instructions that a thread executes per output.
    registers, shared, spilled : int
        Registers per thread; bytes of static shared memory; bytes of spilled registers.
    vectors, products, calls : int
        Numbers of 128-bit loads, of instructions of the tensor cores, and of calls.
    """

    per_output: float
    registers: int
    shared: int
    spilled: int
    vectors: int
    products: int
    calls: int

    def excesses(self, row: Row) -> list[str]:
        """Return what exceeds the limits of a row."""
        found = {
            f"{self.per_output:.1f} instructions per output": self.per_output > row.limit,
            f"{self.registers} registers": self.registers > row.registers,
            f"{self.shared} bytes of shared memory": self.shared > row.shared,
            f"{self.spilled} bytes spilled": self.spilled > 0,
            "no 128-bit loads": not self.vectors,
            f"{self.calls} calls": self.calls > 0,
            "no tensor cores": row.has_products and not self.products,
        }
        return [what for what, is_true in found.items() if is_true]


def find_tools() -> tuple[Path, Path]:
    """Return NVRTC's library and nvdisasm, from their wheels.

    Raises
    ------
    FileNotFoundError
        If one of the wheels is not installed.
    """
    site = Path(sysconfig.get_path("purelib"), "nvidia")
    libraries = [p for p in site.rglob("libnvrtc.so.*") if re.fullmatch(r"[\d.]+", p.name[12:])]
    disassemblers = list(site.rglob("bin/nvdisasm"))
    for wheel, found in (("nvrtc", libraries), ("nvdisasm", disassemblers)):
        if not found:
            raise FileNotFoundError(
                f"nvidia-cuda-{wheel} is not installed: pip install nvidia-cuda-{wheel}"
            )
    return libraries[0], disassemblers[0]


def compile_kernels(
    library: Path, names: Sequence[str], options: Sequence[str]
) -> tuple[int, str, list[str], bytes]:
    """Compile kernels with NVRTC; return the status, the log, mangled names and machine code.

    There is no machine code for a virtual architecture.
    """
    nvrtc = ctypes.CDLL(str(library))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert not nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), KERNELS.read_bytes(), b"kernels.cu", 0, None, None
    )

    def read(what: str) -> bytes:
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        held = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, held)
        return held.raw

    for name in names:
        assert not nvrtc.nvrtcAddNameExpression(program, name.encode())
    given = (ctypes.c_char_p * len(options))(*map(str.encode, options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), given)
    log, lowered, code = read("ProgramLog").rstrip(b"\0").decode(), [], b""
    if not status:
        for name in names:
            mangled = ctypes.c_char_p()
            assert not nvrtc.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(mangled))
            lowered.append((mangled.value or b"").decode())
        code = read("CUBIN")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return status, log, lowered, code


def measure(rows: Sequence[Row] = TABLE) -> Iterator[tuple[Row, Count]]:
    """Compile and disassemble the kernels of a table, and count their instructions."""
    library, disassembler = find_tools()
    options = [f"--gpu-architecture={ARCHITECTURE}", "--std=c++17", "--ptxas-options=-v"]
    status, log, lowered, code = compile_kernels(library, [row.name for row in rows], options)
    if status:
        raise RuntimeError(f"kernels.cu does not compile:\n{log}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [str(disassembler), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sections = re.split(r"\n\s*\.section\s+\.text\.", text)[1:]
    bodies = {section.partition(",")[0]: section for section in sections}
    for row, name in zip(rows, lowered):
        yield row, count(row, bodies[name], log.partition(f"entry function '{name}'")[2])


def count(row: Row, body: str, log: str) -> Count:
    """Count the instructions of a kernel; `log` begins with ptxas's messages about it."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in body.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(re.sub(r"^@!?U?P\w+\s+", "", instruction[1]))
    code = code[: max(k for k, text in enumerate(code) if text.startswith("EXIT")) + 1]
    weights = [1.0] * len(code)
    _weigh(weights, _loops(code, labels), row.trips, row.name)
    numbers = {
        "registers": r"Used (\d+) registers", "shared": r"(\d+) bytes smem",
        "spilled": r"(\d+) bytes spill stores",
    }  # fmt: skip
    message = log.partition("Compile time")[0]
    found = {k: re.search(pattern, message) for k, pattern in numbers.items()}
    return Count(
        sum(weights) / row.outputs,
        **{k: int(match[1]) if match else 0 for k, match in found.items()},
        vectors=sum(text.startswith("LDG.E.128") for text in code),
        products=sum(text.startswith(("HMMA", "HGMMA")) for text in code),
        calls=sum(text.startswith("CALL") for text in code),
    )


def _loops(code: Sequence[str], labels: dict[str, int]) -> list[tuple[int, int]]:
    """Return the first and last instruction of each loop, outer loops first."""
    last: dict[int, int] = {}
    for k, text in enumerate(code):
        target = re.match(r"BRA\b.*`\((\.L_x_\d+)\)", text)
        if target and labels[target[1]] < k:
            last[labels[target[1]]] = k  # a loop may have several branches to its beginning
    return sorted(last.items(), key=lambda loop: (loop[0], -loop[1]))


def _weigh(weights: list[float], loops: Sequence[tuple[int, int]], trips: Trips, name: str) -> None:
    """Multiply the weight of each instruction by the trips of the loops that it is in."""
    outer = [a for a in loops if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in loops)]
    if len(outer) != len(trips):
        raise RuntimeError(f"{name} must have {len(trips)} loops, got {len(outer)}: {outer}")
    for (first, last), (times, *within) in zip(outer, map(_as_tuple, trips)):
        inner = [a for a in loops if a != (first, last) and first <= a[0] and a[1] <= last]
        for k in range(first, last + 1):
            weights[k] *= times
        if times:
            _weigh(weights, inner, tuple(within), name)


def _as_tuple(trips: Trips | float) -> tuple:
    return trips if isinstance(trips, tuple) else (trips,)


def main() -> None:
    """Print the table; the exit status tells whether all kernels are within their limits."""
    print(
        f"{'kernel':40} {'per output':>10} {'limit':>6} {'70 %':>6} {'registers':>9} 128-bit HMMA"
    )
    is_over = False
    for row, found in measure():
        budget = row.bytes * INSTRUCTIONS_PER_BYTE
        excesses = found.excesses(row)
        is_over |= bool(excesses)
        print(
            f"{row.title:40} {found.per_output:10.1f} {row.limit:6.0f} {budget:6.0f} "
            f"{found.registers:9} {found.vectors:7} {found.products:4} {', '.join(excesses)}"
        )
    sys.exit(int(is_over))


if __name__ == "__main__":
    main()
