"""What ptxas made of the CUDA kernels, read off the compiled module's machine code. No GPU.

cuobjdump takes a module apart, nvdisasm lists the instructions of every kernel for every
architecture. `ROWS` says what each family of kernels must and must not hold; a kernel that
no row describes is an error.

    python tests/machine_code.py [FILE...]    tables and complaints, exit status 1 if any

A file is a module, an object or a cubin; without one, it is the installed CUDA module.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence

# ---- what is expected ---------------------------------------------------------------

TENSOR_CORES = ("HMMA", "HGMMA", "DMMA", "UTCHMMA")
# Copies from global to shared memory that pass no register.
ASYNC_COPIES = ("LDGSTS", "UBLKCP", "UTMALDG")
MATRIX_LOADS = ("LDSM",)
NO_TENSOR_CORES = TENSOR_CORES + ASYNC_COPIES + MATRIX_LOADS


@dataclasses.dataclass(frozen=True)
class Row:
    """A family of kernels.

    Instructions are named by their opcode and, after dots, by what else it has to say in
    any order: "STG.128" is every STG.E.128.

    Attributes:
        kernel: regular expression for the whole name, template arguments included.
        threads: of a block, as in the kernel's launch bounds.
        blocks: that a multiprocessor holds at once. Less is allowed on `SMALL`.
        dynamic_shared: bytes of shared memory that every launch adds.
        planned_shared: whether a plan says how many bytes its launch adds.
        needs: instructions that must occur.
        never: instructions that must not.
        at_most: how often some may occur at most; "" stands for all together.
        only: the architectures that have it, all of `shipped` if none are named.
        divides: why 64-bit integer divisions are called, "" if they must not be.
        local: why there is local memory, "" if there must be none.
    """

    kernel: str
    threads: int
    blocks: int
    dynamic_shared: int = 0
    planned_shared: bool = False
    needs: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    at_most: tuple[tuple[str, int], ...] = ()
    only: tuple[str, ...] = ()
    divides: str = ""
    local: str = ""


_WIDE_OFFSETS = "64-bit offsets and phases beyond the table"
_BITS_16 = "(__half|__nv_bfloat16)"
# Tensor cores fed by copies of 16 bytes. Sums leave as 16 bytes too, in float32 only those
# that are split.
_MMA_16 = ("HMMA.16816", "LDGSTS.128", "LDSM", "LDSM.MT88", "STG.128")
_MMA_32 = ("HMMA.1688.TF32", "LDGSTS.128", "LDSM", "STG.128", "STG.64")

# Both operands from shared memory, put there by TMA, dY in im2col mode, or by
# threads.
_WGMMA = ("HGMMA", "USETMAXREG", "SYNCS", "STG.128")
_WGMMA_TMA = (*_WGMMA, "UTMALDG.IM2COL")
_WGMMA_COPIES = (*_WGMMA, "LDGSTS.128", "LDGSTS.64", "FENCE.ASYNC")


def _at_most(instructions: int) -> tuple[tuple[str, int], ...]:
    """Of the largest tile. The tensor cores wait while a tile is placed and stored, and an
    integer division begins with a reciprocal: only split sums have some.
    """
    return (("MUFU.RCP", 8), ("", instructions))


ROWS = (
    Row("DirectKernel<.*, int>", 256, 4, never=NO_TENSOR_CORES),
    Row("DirectKernel<.*, long>", 256, 1, never=NO_TENSOR_CORES, divides=_WIDE_OFFSETS),
    Row("EpilogueKernel<.*>", 256, 1, never=NO_TENSOR_CORES),
    Row("TiledKernel<float>", 128, 3, needs=("LDS.128", "STG.128"), never=NO_TENSOR_CORES),
    Row("TiledKernel<double>", 128, 2, needs=("LDS.128", "STG.128"), never=NO_TENSOR_CORES),
    Row(f"TiledKernel<{_BITS_16}>", 128, 3, needs=("LDS.128", "STG.64"),
        never=NO_TENSOR_CORES),
    Row(f"MmaKernel<{_BITS_16}, false, 128, 128, true>", 256, 2, 69744, needs=_MMA_16),
    Row(f"MmaKernel<{_BITS_16}, false, 128, 64, .*>", 128, 3, 53360, needs=_MMA_16),
    Row(f"MmaKernel<{_BITS_16}, false, 64, 64, .*>", 128, 4, 34928, needs=_MMA_16),
    Row("MmaKernel<float, false, 128, 128, true>", 256, 2, 69744, needs=_MMA_32),
    Row("MmaKernel<float, false, 128, 64, .*>", 128, 3, 53360, needs=_MMA_32),
    Row("MmaKernel<float, false, 64, 64, .*>", 128, 4, 34928, needs=_MMA_32),
    Row("MmaKernel<float, true, 128, 64, .*>", 128, 2, 53360, needs=_MMA_32),
    Row("MmaKernel<float, true, 64, 64, .*>", 128, 3, 34928, needs=_MMA_32),
    Row(f"MmaReduceKernel<{_BITS_16}>", 128, 4, needs=("LDG.128", "STG.128"),
        never=NO_TENSOR_CORES),
    Row(f"DepthwiseRingKernel<.*RingShape<({_BITS_16}|float), (1|3), 3, .*>", 128, 4,
        never=NO_TENSOR_CORES),
    Row(f"DepthwiseRingKernel<.*RingShape<({_BITS_16}|float), (5|7), .*>", 128, 3,
        never=NO_TENSOR_CORES),
    Row("DepthwiseWindowKernel<.*>", 256, 2, planned_shared=True, never=NO_TENSOR_CORES),
    Row(f"GroupedKernel<{_BITS_16}, .*>", 256, 2, planned_shared=True,
        needs=("HMMA.16816", "LDGSTS.128", "LDSM", "STG.128")),
    Row("GroupedKernel<float, .*>", 256, 2, planned_shared=True,
        needs=("HMMA.1688.TF32", "LDGSTS.128", "LDSM", "STG.64")),
    Row(f"FewChannelsKernel<{_BITS_16}, .*>", 384, 1, planned_shared=True,
        needs=("HMMA.16816", "LDGSTS.128", "LDSM", "STG.128")),
    Row("FewChannelsKernel<float, false, .*>", 384, 1, planned_shared=True,
        needs=("HMMA.1688.TF32", "LDGSTS.128", "LDSM", "STG.128")),
    Row("FewChannelsKernel<float, true, .*>", 256, 1, planned_shared=True,
        needs=("HMMA.1688.TF32", "LDGSTS.128", "LDSM", "STG.128")),
    Row("MmaReduceKernel<float>", 128, 4, needs=("LDG.128", "STG.64"), never=NO_TENSOR_CORES),
    Row("WgmmaKernel<__nv_bfloat16, .*, false>", 384, 1, planned_shared=True, only=("sm_90a",),
        needs=(*_WGMMA_TMA, "HGMMA.BF16", "UTMALDG.5D"), never=("HMMA", "LDGSTS", "LDSM"),
        at_most=_at_most(7000)),
    Row("WgmmaKernel<__half, .*, false>", 384, 1, planned_shared=True, only=("sm_90a",),
        needs=(*_WGMMA_TMA, "UTMALDG.5D"), never=("HMMA", "LDGSTS", "LDSM"),
        at_most=_at_most(7000)),
    Row("WgmmaKernel<float, .*, false>", 384, 1, planned_shared=True, only=("sm_90a",),
        needs=(*_WGMMA_TMA, "HGMMA.TF32", "UTMALDG.3D", "STG.64"),
        never=("HMMA", "LDGSTS", "LDSM"), at_most=_at_most(10000)),
    Row("WgmmaKernel<__nv_bfloat16, .*, true>", 384, 1, planned_shared=True, only=("sm_90a",),
        needs=(*_WGMMA_COPIES, "HGMMA.BF16"), never=("HMMA", "UTMALDG", "LDSM"),
        at_most=_at_most(14000)),
    Row("WgmmaKernel<__half, .*, true>", 384, 1, planned_shared=True, only=("sm_90a",),
        needs=_WGMMA_COPIES, never=("HMMA", "UTMALDG", "LDSM"), at_most=_at_most(14000)),
    Row("WgmmaKernel<float, .*, true>", 384, 1, planned_shared=True, only=("sm_90a",),
        needs=(*_WGMMA_COPIES, "HGMMA.TF32", "STG.64"), never=("HMMA", "UTMALDG", "LDSM"),
        at_most=_at_most(18000)),
    Row("WgmmaRepackKernel", 256, 4, only=("sm_90a",), never=NO_TENSOR_CORES),
)  # fmt: skip

# ---- what a chip has ----------------------------------------------------------------

REGISTERS = 65536  # of a multiprocessor, dealt out to warps in portions
REGISTER_PORTION = 256
RESERVED_SHARED = 1024  # of each block, by CUDA


@dataclasses.dataclass(frozen=True)
class Chip:
    """Shared memory in bytes, of a multiprocessor and at most of a block; its threads."""

    shared: int
    block_shared: int
    threads: int


CHIPS = {
    "sm_80": Chip(164 << 10, 163 << 10, 2048),
    "sm_90": Chip(228 << 10, 227 << 10, 2048),
    "sm_90a": Chip(228 << 10, 227 << 10, 2048),
    "sm_100": Chip(228 << 10, 227 << 10, 2048),
    "sm_120": Chip(100 << 10, 99 << 10, 1536),
}
# Tiles are made for the others. Here it is enough that one block fits.
SMALL = ("sm_120",)


def shipped() -> list[str]:
    """What JAX_CONVGRAD_CUDA_ARCHITECTURES=all makes machine code for."""
    text = pathlib.Path(__file__).parents[1].joinpath("cmake/CudaArchitectures.cmake").read_text()
    found = re.search(r"set\(_all (.*)\)", text)
    assert found is not None
    return [f"sm_{word}" for word in found[1].split() if word != "ptx"]


# ---- reading machine code -----------------------------------------------------------


@dataclasses.dataclass
class Kernel:
    """A kernel's machine code for one architecture.

    Attributes:
        name: without namespaces and parameters.
        arch: "sm_90".
        registers: of a thread.
        static_shared: bytes of a block.
        stack: bytes of a thread, spilled registers included.
        threads: of a block at most, by its launch bounds.
        opcodes: how often each occurs.
        calls: functions that are called and were not inlined.
    """

    name: str
    arch: str
    registers: int
    static_shared: int
    stack: int
    threads: int
    opcodes: collections.Counter[str]
    calls: frozenset[str]

    def count(self, instruction: str) -> int:
        """How many instructions a name stands for; `Row` says how they are named."""
        if not instruction:
            return self.opcodes.total()
        opcode, *rest = instruction.split(".")
        total = 0
        for found, number in self.opcodes.items():
            first, *words = found.split(".")
            if first == opcode and set(rest) <= set(words):
                total += number
        return total

    @property
    def spills(self) -> int:
        """Accesses to local memory."""
        return self.count("LDL") + self.count("STL")

    def resident(self, dynamic_shared: int, threads: int | None = None) -> int:
        """Blocks, the largest or of so many threads, that a multiprocessor holds at once."""
        chip = CHIPS[self.arch]
        portion = -(-self.registers * 32 // REGISTER_PORTION) * REGISTER_PORTION
        warps = -(-(threads or self.threads) // 32)
        shared = self.static_shared + dynamic_shared + RESERVED_SHARED
        by_registers = REGISTERS // portion // warps
        return min(by_registers, chip.shared // shared, chip.threads // (32 * warps))


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on the PATH, in CUDA_HOME, or from NVIDIA's wheels."""
    folders = [os.environ.get("PATH", "")]
    if home := os.environ.get("CUDA_HOME"):
        folders.append(os.path.join(home, "bin"))
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec is not None else None
    folders += [os.path.join(place, "cu13", "bin") for place in places or ()]
    return shutil.which(name, path=os.pathsep.join([*folders, "/usr/local/cuda/bin"]))


def missing() -> str | None:
    """What reading machine code lacks here, or None."""
    needed = ("nvcc", "cuobjdump", "nvdisasm", "c++filt")
    lacking = [name for name in needed if tool(name) is None]
    return f"{', '.join(lacking)} not found" if lacking else None


def _output_of(*command: str | os.PathLike[str], cwd: pathlib.Path | None = None) -> str:
    program = tool(str(command[0]))
    assert program is not None, command[0]
    done = subprocess.run([program, *command[1:]], cwd=cwd, capture_output=True, text=True,
                          check=False)  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def _demangle(names: Sequence[str]) -> dict[str, str]:
    text = _output_of("c++filt", *names)
    return {name: _short(line) for name, line in zip(names, text.splitlines(), strict=True)}


def _short(name: str) -> str:
    """`void space::Name<arguments>(parameters)` as `Name<arguments>`."""
    depth = 0
    for at in range(len(name) - 1, 0, -1):  # to the parenthesis that opens the parameters
        depth += {")": 1, "(": -1}.get(name[at], 0)
        if depth == 0:
            break
    name = name[:at] if name.endswith(")") else name
    head, bracket, arguments = name.partition("<")
    return re.split(r"::|\s", head)[-1] + bracket + arguments


_SECTION = re.compile(r"^\s*\.section\s+(\.text|\.nv\.info)\.([^,\s]+)")
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)(.*)"
)
_CALLED = re.compile(r"`\(([^)]*)\)")
_WORD = re.compile(r"\.word\s+(0x[0-9a-f]+)")
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


Code = tuple[collections.Counter[str], set[str]]  # opcodes, and what is called


def _parse(listing: str) -> tuple[dict[str, Code], dict[str, int]]:
    """The code and the threads of a block of each kernel that nvdisasm listed."""
    code: dict[str, Code] = {}
    threads: dict[str, int] = {}
    kind = name = ""
    words: list[int] | None = None  # of the attribute that holds the launch bounds
    for line in listing.splitlines():
        if section := _SECTION.match(line):
            kind, name = section.groups()
            words = None
        elif line.lstrip().startswith(".section\t"):
            kind = ""
        elif kind == ".text" and (found := _INSTRUCTION.match(line)):
            opcodes, calls = code.setdefault(name, (collections.Counter(), set()))
            opcodes[found[1]] += 1
            if found[1].startswith("CALL"):
                target = _CALLED.search(found[2])
                called = target[1] if target else found[2].strip(" ;")
                # Before sm_90, a call within the kernel is how warps converge.
                if not called.startswith(".L_"):
                    calls.add(called)
        elif kind == ".nv.info":
            if "nvinfo" in line:
                words = [] if "EIATTR_MAX_THREADS" in line else None
            elif words is not None and (word := _WORD.search(line)):
                words.append(int(word[1], 16))
                if len(words) == 3:
                    threads[name] = words[0] * words[1] * words[2]
    return code, threads


def _read_cubin(path: pathlib.Path) -> list[Kernel]:
    listing = _output_of("nvdisasm", path)
    target = re.search(r"\.target\s+(sm_(\d+)\w*)", listing)
    assert target is not None, path
    new = int(target[2]) >= 90
    usage = _output_of("cuobjdump", "-res-usage", path)
    code, threads = _parse(listing)
    names = _demangle(sorted(code))
    kernels = []
    for symbol, registers, stack, shared, local in _USAGE.findall(usage):
        opcodes, calls = code[symbol]
        kernels.append(
            Kernel(
                name=names[symbol],
                arch=target[1],
                registers=int(registers),
                # From sm_90 on the tool adds what CUDA reserves, unless there is no other.
                static_shared=max(0, int(shared) - (RESERVED_SHARED if new else 0)),
                stack=int(stack) + int(local),
                threads=threads.get(symbol, 1024),
                opcodes=opcodes,
                calls=frozenset(calls),
            )
        )
    return kernels


def read(path: pathlib.Path) -> list[Kernel]:
    """All kernels of a module, an object or a cubin."""
    path = path.resolve()
    if path.suffix == ".cubin":
        return _read_cubin(path)
    with tempfile.TemporaryDirectory() as folder:
        _output_of("cuobjdump", "-xelf", "all", path, cwd=pathlib.Path(folder))
        cubins = sorted(pathlib.Path(folder).glob("*.cubin"))
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            found = [kernel for kernels in pool.map(_read_cubin, cubins) for kernel in kernels]
    return sorted(found, key=lambda kernel: (kernel.name, list(CHIPS).index(kernel.arch)))


# ---- judging it ---------------------------------------------------------------------

_DIVISION = re.compile(r"__cuda_sm20_(div|rem)_[su]64$")


def row_of(kernel: Kernel, rows: Iterable[Row] = ROWS) -> Row:
    """The one row that describes a kernel.

    Raises:
        LookupError: there is none, or more than one.
    """
    found = [row for row in rows if re.fullmatch(row.kernel, kernel.name)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows of machine_code.ROWS describe {kernel.name}")
    return found[0]


def complaints(kernel: Kernel, rows: Iterable[Row] = ROWS) -> list[str]:
    """How a kernel differs from its row."""
    try:
        row = row_of(kernel, rows)
    except LookupError as e:
        return [str(e)]
    wrong = []
    if not row.local and (kernel.stack or kernel.spills):
        wrong.append(f"local memory: {kernel.stack} bytes of stack, {kernel.spills} accesses")
    for called in sorted(kernel.calls):
        if not _DIVISION.search(called):
            wrong.append(f"calls {called}")
        elif not row.divides:
            wrong.append(f"64-bit division: calls {called}")
    wrong += [f"lacks {name}" for name in row.needs if not kernel.count(name)]
    wrong += [f"has {kernel.count(name)} {name}" for name in row.never if kernel.count(name)]
    wrong += [
        f"{count} {name or 'instructions'}, expected at most {most}"
        for name, most in row.at_most
        if (count := kernel.count(name)) > most
    ]
    if kernel.threads != row.threads:
        wrong.append(f"launch bounds of {kernel.threads} threads, expected {row.threads}")
    shared = kernel.static_shared + row.dynamic_shared
    if shared > CHIPS[kernel.arch].block_shared:
        wrong.append(f"a block has no room for {shared} bytes of shared memory")
    wanted = 1 if kernel.arch in SMALL else row.blocks
    if (resident := kernel.resident(row.dynamic_shared)) < wanted:
        wrong.append(
            f"{resident} blocks fit, expected {wanted}: {kernel.registers} registers, "
            f"{shared} bytes of shared memory"
        )
    return wrong


COUNTED = ("HMMA", "HGMMA", "UTMALDG", "LDGSTS", "LDSM", "LDG.128", "STG.128")


def table(kernels: Iterable[Kernel], rows: Iterable[Row] = ROWS) -> str:
    """A line for every kernel and architecture."""
    lines = [("kernel", "arch", "registers", "shared", "stack", "spills", *COUNTED, "blocks")]
    for kernel in kernels:
        try:
            dynamic = row_of(kernel, rows).dynamic_shared
        except LookupError:
            dynamic = 0
        numbers = [kernel.registers, kernel.static_shared + dynamic, kernel.stack, kernel.spills]
        numbers += [kernel.count(name) for name in COUNTED]
        numbers.append(kernel.resident(dynamic))
        lines.append((kernel.name, kernel.arch, *map(str, numbers)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def main(arguments: Sequence[str]) -> int:
    """Prints the tables and complaints of some files."""
    if not arguments:
        from jax_convgrad import native

        if native.cuda is None:
            sys.exit("the CUDA module was not built")
        arguments = [native.cuda.__file__]
    if (lacking := missing()) is not None:
        sys.exit(lacking)
    status = 0
    for argument in arguments:
        kernels = read(pathlib.Path(argument))
        print(table(kernels))
        for kernel in kernels:
            for complaint in complaints(kernel):
                print(f"WRONG {kernel.name} {kernel.arch}: {complaint}")
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
