"""Compiles CUDA or PTX for the simulator and launches kernels on numpy arrays."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .counters import NOT_ISSUED, BufferTraffic, Counters, SiteTraffic
from .translate import Module as Translation

HERE = Path(__file__).resolve().parent
HEADERS = ("runtime.hpp", "arithmetic.hpp", "scheduler.hpp")
# -frounding-math and -ffp-contract=off: PTX says exactly which operations round and fuse.
CXX_FLAGS = (
    "-std=c++17 -Og -w -fPIC -shared -fvisibility=hidden -fno-gnu-unique -ffp-contract=off "
    "-frounding-math -fno-strict-aliasing -fwrapv"
).split()
DEVICE_ALIGNMENT = 256  # what cudaMalloc guarantees
# Shared memory a block may use in all, by compute capability.
MAX_SHARED = {
    75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99,
    121: 99,
}  # fmt: skip


_LAUNCH_LOCK = threading.Lock()


class KernelError(Exception):
    """A launch failed on the (simulated) device."""

    def __init__(
        self, message: str, kernel: str, block: tuple, thread: tuple, ptx_line: int | None,
        ptx_text: str, source: str | None,
    ):  # fmt: skip
        self.message = message
        self.kernel = kernel
        self.block = block
        self.thread = thread
        self.ptx_line = ptx_line
        self.ptx_text = ptx_text
        self.source = source
        where = f"kernel {kernel}, block {block}, thread {thread}"
        if ptx_line is not None:
            where += f", PTX line {ptx_line}: {ptx_text}"
        if source:
            where += f" [{source}]"
        super().__init__(f"{message}\n  at {where}")


class BuildError(Exception):
    """nvcc or the C++ compiler failed."""


# --- structures shared with runtime.hpp (keep both in step) ---------------------------------------


class _Waiting(ctypes.Structure):
    _fields_ = [("site", ctypes.c_int32), ("threads", ctypes.c_uint32)]


class _ErrorInfo(ctypes.Structure):
    _fields_ = [
        ("message", ctypes.c_char * 320), ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3), ("site", ctypes.c_int32),
        ("waiting_count", ctypes.c_uint32), ("waiting", _Waiting * 8),
    ]  # fmt: skip


class _Range(ctypes.Structure):
    _fields_ = [
        ("low", ctypes.c_uint64), ("high", ctypes.c_uint64), ("read_only", ctypes.c_uint32),
        ("constant", ctypes.c_uint32), ("touched", ctypes.c_void_p),
        ("bytes_loaded", ctypes.c_uint64), ("bytes_stored", ctypes.c_uint64),
        ("bytes_atomic", ctypes.c_uint64),
    ]  # fmt: skip


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_uint32), ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3), ("shared_bytes", ctypes.c_uint32),
        ("param_bytes", ctypes.c_uint32), ("range_count", ctypes.c_uint32),
        ("check_races", ctypes.c_uint32), ("params", ctypes.c_void_p),
        ("ranges", ctypes.POINTER(_Range)), ("seed", ctypes.c_uint64),
        ("timeout", ctypes.c_double), ("thread_counts", ctypes.c_void_p),
        ("warp_counts", ctypes.c_void_p), ("sites", ctypes.c_void_p),
        ("error", ctypes.POINTER(_ErrorInfo)),
    ]  # fmt: skip


SITE_COLUMNS = 7  # u64 fields of SiteStatistics


# --- tools ----------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """PTXSIM_CACHE, or ptxsim in the user's cache directory, or a temporary directory."""
    base = os.environ.get("PTXSIM_CACHE")
    if not base:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        base = os.path.join(root, "ptxsim")
    try:
        os.makedirs(base, exist_ok=True)
        if os.access(base, os.W_OK):
            return Path(base)
    except OSError:
        pass
    fallback = Path(tempfile.gettempdir()) / f"ptxsim-{os.getuid()}"
    fallback.mkdir(mode=0o700, exist_ok=True)
    return fallback


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.path.join(home, "bin", "nvcc")] if home else []
    found = shutil.which("nvcc")
    candidates += [found] if found else []
    for nvcc in candidates:
        if os.path.exists(nvcc):
            return nvcc
    raise BuildError("nvcc not found: set CUDA_HOME or PATH")


def _run(command: Sequence[str], what: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"{what} failed:\n{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout


def _digest(*parts: str | bytes) -> str:
    h = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()[:24]


def _tsan() -> bool:
    return bool(os.environ.get("PTXSIM_TSAN"))


@lru_cache(maxsize=1)
def _compiler() -> tuple[str, str]:
    cxx = os.environ.get("CXX", "g++")
    return cxx, _run([cxx, "--version"], "the C++ compiler").splitlines()[0]


@lru_cache(maxsize=1)
def _context_flags() -> tuple[str, ...]:
    """Boost.Context if it compiles and links (much faster switches), otherwise ucontext."""
    if os.environ.get("PTXSIM_UCONTEXT"):
        return ()
    flags = ("-DPTXSIM_USE_BOOST", "-lboost_context")
    marker = cache_dir() / f"boost-{_digest(*_compiler())}"
    if marker.exists():
        return flags
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(
            "#include <boost/context/detail/fcontext.hpp>\n"
            "using namespace boost::context::detail;\n"
            "int main() { return make_fcontext(nullptr, 0, nullptr) == nullptr; }\n"
        )
        command = [
            _compiler()[0],
            str(source),
            "-o",
            str(Path(folder) / "probe"),
            "-lboost_context",
        ]
        if subprocess.run(command, capture_output=True).returncode:
            return ()
    marker.touch()
    return flags


@contextmanager
def _alone(target: Path) -> Iterator[Path]:
    """A folder beside `target` to make it in, while other processes that want to make it wait."""
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            yield Path(folder)


def demangle(names: Sequence[str]) -> list[str]:
    if not names or not shutil.which("c++filt"):
        return list(names)
    result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    lines = result.stdout.splitlines()
    return lines if result.returncode == 0 and len(lines) == len(names) else list(names)


# --- device arguments -----------------------------------------------------------------------------


class Struct:
    """By-value struct parameter with C layout. Arrays among the fields become device pointers, None
    a null pointer."""

    def __init__(self, *fields: Any):
        self.fields = fields


@dataclass
class _DeviceMemory:
    """Copies of the array arguments.

    An array lies at the same offset modulo 256 as in the array it is a view of, as if that one came
    from cudaMalloc: x[1:] is as misaligned as it would be on the device. Arguments that share host
    memory share device memory.
    """

    arrays: list[np.ndarray] = field(default_factory=list)
    pieces: list[list] = field(default_factory=list)  # host low, host high, device address, offset

    def add(self, array: np.ndarray) -> None:
        if not array.flags.c_contiguous:
            raise TypeError("array arguments must be C-contiguous")
        self.arrays.append(array)

    def place(self) -> None:
        spans = sorted(
            (a.ctypes.data, a.ctypes.data + a.nbytes, _offset_in_base(a)) for a in self.arrays
        )
        for low, high, offset in spans:
            if self.pieces and low < self.pieces[-1][1]:
                self.pieces[-1][1] = max(high, self.pieces[-1][1])
            elif high > low:
                self.pieces.append([low, high, 0, offset % DEVICE_ALIGNMENT])
        total = sum(h - low + 3 * DEVICE_ALIGNMENT for low, h, _, _ in self.pieces)
        self.storage = np.empty(total + DEVICE_ALIGNMENT, np.uint8)
        at = self.storage.ctypes.data
        for piece in self.pieces:
            at = -(-at // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT + DEVICE_ALIGNMENT
            piece[2] = at + piece[3]
            ctypes.memmove(piece[2], piece[0], piece[1] - piece[0])
            at = piece[2] + piece[1] - piece[0]

    def pointer(self, array: np.ndarray) -> int:
        host = array.ctypes.data
        for low, high, device, _ in self.pieces:
            if low <= host < high:
                return device + host - low
        return self.storage.ctypes.data  # an empty array: no byte of it is legal

    def copy_back(self) -> None:
        """Writes results to the (writeable) arrays."""
        for array in self.arrays:
            if array.flags.writeable and array.nbytes:
                ctypes.memmove(array.ctypes.data, self.pointer(array), array.nbytes)


def _offset_in_base(array: np.ndarray) -> int:
    base = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    return array.ctypes.data - base.ctypes.data


def _arrays_of(argument: Any) -> list[np.ndarray]:
    if isinstance(argument, np.ndarray):
        return [argument]
    if isinstance(argument, Struct):
        return [a for part in argument.fields for a in _arrays_of(part)]
    return []


def _pack_struct(struct: Struct, memory: _DeviceMemory) -> bytes:
    data, widest = b"", 1
    for part in struct.fields:
        if isinstance(part, np.ndarray):
            item, align = memory.pointer(part).to_bytes(8, "little"), 8
        elif part is None:
            item, align = bytes(8), 8
        elif isinstance(part, Struct):
            item = _pack_struct(part, memory)
            align = min(8, len(item) & -len(item))
        elif isinstance(part, (np.generic, ctypes._SimpleCData)):
            item = bytes(part) if isinstance(part, ctypes._SimpleCData) else part.tobytes()
            align = len(item)
        else:
            raise TypeError(
                f"a struct field of type {type(part).__name__}: use arrays, None, Struct, "
                "or numpy or ctypes scalars"
            )
        widest = max(widest, align)
        data += b"\0" * (-len(data) % align) + item
    return data + b"\0" * (-len(data) % widest)


def _pack_number(value: int | float, parameter: dict) -> bytes:
    kind, size = parameter["type"], parameter["size"]
    if kind in ("f32", "f64"):
        return (
            np.dtype(kind.replace("f32", "float32").replace("f64", "float64")).type(value).tobytes()
        )
    if isinstance(value, float):
        raise TypeError(f"a Python float for a .{kind} parameter: use np.float32 or np.float64")
    return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _pack_argument(value: Any, parameter: dict, memory: _DeviceMemory) -> bytes:
    kind = parameter["type"]
    if isinstance(value, np.ndarray):
        data = memory.pointer(value).to_bytes(8, "little")
    elif value is None:
        data = bytes(8)
    elif isinstance(value, Struct):
        data = _pack_struct(value, memory)
    elif isinstance(value, (bool, int, float)) and not isinstance(value, np.generic):
        data = _pack_number(value, parameter)
    elif isinstance(value, np.generic):
        is_float = value.dtype.kind == "f" and value.dtype.itemsize >= 4
        if (kind in ("f32", "f64")) != is_float and kind[0] in "fus" and kind not in ("u16", "u8"):
            raise TypeError(f"{value.dtype} for a .{kind} parameter")
        data = value.tobytes()
    elif isinstance(value, (ctypes._SimpleCData, ctypes.Structure, ctypes.Array, bytes, bytearray)):
        data = bytes(value)
    else:
        raise TypeError(f"cannot pass {type(value).__name__} to a kernel")
    if len(data) != parameter["size"]:
        raise TypeError(f"argument has {len(data)} bytes, the parameter {parameter['size']}")
    return data


# --- translation ----------------------------------------------------------------------------------


def _translated(ptx: str, path: str) -> tuple[str, dict]:
    """C++ and description of a PTX text; kept on disk, since every process asks for it."""
    key = _digest(ptx, path, (HERE / "translate.py").read_bytes())
    target = cache_dir() / f"translation-{key}.json"
    with _alone(target) as folder:
        if not target.exists():
            translation = Translation(ptx, path)
            found = {"cpp": translation.cpp, "info": translation.describe()}
            (folder / "translation.json").write_text(json.dumps(found))
            os.replace(folder / "translation.json", target)
    found = json.loads(target.read_text())
    return found["cpp"], found["info"]


# --- simulated module -----------------------------------------------------------------------------


class Simulator:
    """A translated PTX module whose kernels can be launched."""

    def __init__(self, ptx: str, path: str = "<ptx>"):
        self.path = path
        self._cpp, self._info = _translated(ptx, path)
        names = [k["name"] for k in self._info["kernels"]]
        self.kernels: dict[str, str] = dict(zip(names, demangle(names), strict=True))
        self._libraries: dict[bool, ctypes.CDLL] = {}

    # building

    def _library(self, count: bool) -> ctypes.CDLL:
        if count not in self._libraries:
            self._libraries[count] = ctypes.CDLL(str(self.build(count)))
        return self._libraries[count]

    def build(self, count: bool = True) -> Path:
        """Compiles the C++ unless the cache has it; launches do so by themselves."""
        cxx, version = _compiler()
        flags = [*CXX_FLAGS, f"-DPTXSIM_COUNT={int(count)}"]
        if _tsan():
            flags += ["-fsanitize=thread", "-g"]
        context = _context_flags()
        headers = [(HERE / name).read_bytes() for name in HEADERS]
        key = _digest(self._cpp, *headers, " ".join([*flags, *context]), cxx, version)
        target = cache_dir() / f"module-{key}.so"
        if target.exists():
            return target
        with _alone(target) as folder:
            if not target.exists():
                source, output = folder / "module.cpp", folder / "module.so"
                source.write_text(self._cpp)
                _run([cxx, *flags, f"-I{HERE}", str(source), "-o", str(output), *context], "g++")
                os.replace(output, target)
        return target

    # lookup

    def find_kernel(self, name: str) -> str:
        """Mangled name for an exact name or a part of exactly one demangled name."""
        if name in self.kernels:
            return name
        found = [m for m, d in self.kernels.items() if name in d or name in m]
        exact = [m for m, d in self.kernels.items() if re.split(r"[<(]", d)[0].split()[-1] == name]
        if len(found) != 1 and len(exact) == 1:
            return exact[0]
        if len(found) != 1:
            known = "\n  ".join(self.kernels.values())
            raise KeyError(f"{name!r} names {len(found)} kernels of:\n  {known}")
        return found[0]

    def kernel_info(self, name: str) -> dict:
        """Parameters, static shared bytes and launch bounds of a kernel."""
        mangled = self.find_kernel(name)
        return next(k for k in self._info["kernels"] if k["name"] == mangled)

    def global_array(self, name: str, dtype: Any = np.uint8, count: bool = True) -> np.ndarray:
        """View of a __device__ variable (each of the count=True/False builds has its own)."""
        names = [g["name"] for g in self._info["globals"]]
        index = next(n for n, g in enumerate(names) if g == name or demangle([g])[0] == name)
        address, size = self._global(self._library(count), index)
        raw = (ctypes.c_uint8 * size).from_address(address)
        return np.frombuffer(raw, dtype)

    @staticmethod
    def _global(library: ctypes.CDLL, index: int) -> tuple[int, int]:
        count = index + 1
        addresses = (ctypes.c_uint64 * count).in_dll(library, "ptxsim_globals")
        sizes = (ctypes.c_uint64 * count).in_dll(library, "ptxsim_global_sizes")
        return addresses[index], sizes[index]

    # launching

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        shared_bytes: int = 0,
        cluster: Sequence[int] | None = None,
        seed: int = 0,
        readonly: Iterable[np.ndarray] = (),
        count: bool = True,
        check_races: bool = True,
        timeout: float = 600.0,
    ) -> Counters:
        """Runs a kernel to its end and updates the array arguments in place.

        `shared_bytes` is dynamic shared memory. `readonly` names arrays (from `args`) that the
        kernel must not write. Seed 0 runs threads in order, any other seed is a random schedule.
        If the kernel fails, KernelError is raised and no array has changed.
        """
        if _tsan():  # watches the kernel's accesses alone
            count = check_races = False
        info = self.kernel_info(name)
        shape = _Shape.check(info, self._info["target"], grid, block, cluster, shared_bytes)
        parameters = info["parameters"]
        if len(args) != len(parameters):
            raise TypeError(f"{info['name']} takes {len(parameters)} arguments, not {len(args)}")
        memory = _DeviceMemory()
        named_arrays = [(n, a) for n, value in enumerate(args) for a in _arrays_of(value)]
        for _, array in named_arrays:
            memory.add(array)
        memory.place()
        library = self._library(count)
        ranges, touched = self._ranges(library, named_arrays, memory, list(readonly), count)
        size = max((p["offset"] + p["size"] for p in parameters), default=0)
        params = np.zeros(size + 64, np.uint8)
        start = -params.ctypes.data % 64
        for value, parameter in zip(args, parameters, strict=True):
            data = _pack_argument(value, parameter, memory)
            at = start + parameter["offset"]
            params[at : at + len(data)] = np.frombuffer(data, np.uint8)

        counters, sites = self._info["counters"], self._info["sites"]
        thread_counts = np.zeros(len(counters) + 1, np.uint64)
        warp_counts = np.zeros(len(counters) + 1, np.uint64)
        site_counts = np.zeros((len(sites) + 1, SITE_COLUMNS), np.uint64)
        error = _ErrorInfo()
        launch = _Launch(
            kernel=self._info["kernels"].index(info), grid=shape.grid, block=shape.block,
            cluster=shape.cluster, shared_bytes=shape.shared_bytes, param_bytes=size,
            range_count=len(ranges), check_races=int(check_races),
            params=params.ctypes.data + start, ranges=ranges, seed=seed, timeout=timeout,
            thread_counts=thread_counts.ctypes.data, warp_counts=warp_counts.ctypes.data,
            sites=site_counts.ctypes.data, error=ctypes.pointer(error),
        )  # fmt: skip
        with _LAUNCH_LOCK:  # the runtime of a module has one state
            failed = library.ptxsim_launch(ctypes.byref(launch))
        if failed:
            raise self._error(info["name"], error, [f"arg{n}" for n, _ in named_arrays])
        memory.copy_back()
        blocks = int(np.prod(shape.grid))
        result = Counters(
            self.kernels[info["name"]], blocks, blocks * int(np.prod(shape.block)), count
        )
        if count:
            result.instructions = self._instructions(thread_counts, "thread")
            result.warp_instructions = self._instructions(warp_counts, "warp")
            result.sites = self._site_traffic(site_counts)
            result.lines = self._issued_by_line(warp_counts)
            result.buffers = self._buffer_traffic(ranges, touched, named_arrays)
        return result

    def _ranges(
        self, library: ctypes.CDLL, arrays: list, memory: _DeviceMemory, readonly: list, count: bool
    ) -> tuple[Any, list[np.ndarray]]:
        for array in readonly:
            if not any(a is array for _, a in arrays):
                raise ValueError("readonly names an array that is not an argument")
        variables = self._info["globals"]
        ranges = (_Range * (len(arrays) + len(variables) + 1))()
        touched = []
        for r, (_, array) in zip(ranges, arrays, strict=False):
            r.low = memory.pointer(array)
            r.high = r.low + array.nbytes
            r.read_only = int(any(array is a for a in readonly) or not array.flags.writeable)
            if count:
                touched.append(np.zeros(array.nbytes + 1, np.uint8))
                r.touched = touched[-1].ctypes.data
        for n, variable in enumerate(variables):
            r = ranges[len(arrays) + n]
            r.low, size = self._global(library, n)
            r.high = r.low + size
            r.read_only = r.constant = int(variable["constant"])
        return ranges, touched

    # results

    def _instructions(self, counts: np.ndarray, kind: str) -> dict[str, int]:
        result: dict[str, int] = {}
        for executions, counter in zip(counts.tolist(), self._info["counters"], strict=False):
            for name, n in counter[kind].items():
                if executions:
                    result[name] = result.get(name, 0) + n * executions
        return result

    def _issued_by_line(self, counts: np.ndarray) -> dict[tuple[str, ...], int]:
        result: dict[tuple[str, ...], int] = {}
        for executions, counter in zip(counts.tolist(), self._info["counters"], strict=False):
            for location, classes in counter["locations"] if executions else ():
                issued = sum(name not in NOT_ISSUED for name in classes)
                chain = self._info["locations"][location] if location >= 0 else []
                line = tuple(f"{file}:{number}" for file, number in chain)
                result[line] = result.get(line, 0) + issued * executions
        return result

    def _site_traffic(self, counts: np.ndarray) -> list[SiteTraffic]:
        result = []
        for site, row in zip(self._info["sites"], counts.tolist(), strict=False):
            if any(row):
                source = self._source(site["location"]) or ""
                result.append(SiteTraffic(site["line"], source, site["text"], site["access"], *row))
        return result

    def _buffer_traffic(self, ranges: Any, touched: list, arrays: list) -> list[BufferTraffic]:
        result = []
        for r, flags, (n, array) in zip(ranges, touched, arrays, strict=False):
            loaded = int(np.count_nonzero(flags & 1))
            stored = int(np.count_nonzero(flags & 6))
            result.append(
                BufferTraffic(
                    f"arg{n}", array.nbytes, r.bytes_loaded, r.bytes_stored, r.bytes_atomic,
                    loaded, stored,
                )
            )  # fmt: skip
        return result

    def _source(self, location: int) -> str | None:
        if location < 0:
            return None
        chain = self._info["locations"][location]
        text = f"{chain[0][0]}:{chain[0][1]}"
        if len(chain) > 1:
            text += f", inlined at {chain[-1][0]}:{chain[-1][1]}"
        return text

    def _describe_site(self, site: int) -> str:
        s = self._info["sites"][site]
        source = self._source(s["location"])
        return f"PTX line {s['line']}: {s['text']}" + (f" [{source}]" if source else "")

    def _error(self, kernel: str, info: _ErrorInfo, ranges: list[str]) -> KernelError:
        variables = [g["name"] for g in self._info["globals"]]
        names = [*ranges, *variables]
        message = info.message.decode(errors="replace")
        message = re.sub(r"\{range (\d+)\}", lambda m: names[int(m.group(1))], message)
        message = re.sub(r"\{site (\d+)\}", lambda m: self._describe_site(int(m.group(1))), message)
        for w in info.waiting[: info.waiting_count]:
            place = self._describe_site(w.site) if w.site >= 0 else "its start"
            message += f"\n  {w.threads} threads wait at {place}"
        site = self._info["sites"][info.site] if info.site >= 0 else None
        return KernelError(
            message, self.kernels[kernel], tuple(info.block), tuple(info.thread),
            site["line"] if site else None, site["text"] if site else "",
            self._source(site["location"]) if site else None,
        )  # fmt: skip


@dataclass
class _Shape:
    """Launch dimensions, checked against what the device would accept."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared_bytes: int

    @classmethod
    def check(
        cls, info: dict, target: str, grid: Any, block: Any, cluster: Any, dynamic: int
    ) -> _Shape:
        declared = info["cluster"] or None
        shape = cls(
            _three(grid), _three(block), _three(cluster or declared or 1),
            info["static_shared"] + dynamic,
        )  # fmt: skip
        if declared and cluster and _three(declared) != _three(cluster):
            raise ValueError(f"the kernel declares cluster dimensions {declared}")
        threads = int(np.prod(shape.block))
        if not 1 <= threads <= 1024:
            raise ValueError(f"{threads} threads in a block")
        if min(shape.grid) < 1 or min(shape.cluster) < 1 or np.prod(shape.cluster) > 16:
            raise ValueError(f"grid {shape.grid}, cluster {shape.cluster}")
        if any(g % c for g, c in zip(shape.grid, shape.cluster, strict=True)):
            raise ValueError(f"grid {shape.grid} is not a multiple of the cluster {shape.cluster}")
        limit = int(np.prod(info["max_threads"])) if info["max_threads"] else 1024
        if threads > limit:
            raise ValueError(f"{threads} threads exceed the kernel's launch bound {limit}")
        if info["required_threads"] and threads != int(np.prod(info["required_threads"])):
            raise ValueError(f"the kernel requires {info['required_threads']} threads")
        number = re.sub(r"\D", "", target)
        capacity = MAX_SHARED.get(int(number), 227) * 1024 if number else 227 * 1024
        if shape.shared_bytes > capacity:
            raise ValueError(
                f"{shape.shared_bytes} bytes of shared memory; {target} has {capacity}"
            )
        if int(np.prod(shape.cluster)) > 1 and number and int(number) < 90:
            raise ValueError(f"clusters need sm_90 or later, the target is {target}")
        return shape


def _three(value: Any) -> tuple[int, int, int]:
    items = [value] if isinstance(value, (int, np.integer)) else list(value)
    if not 1 <= len(items) <= 3:
        raise ValueError(f"dimensions {value!r}")
    return tuple([int(v) for v in items] + [1] * (3 - len(items)))  # type: ignore[return-value]


# --- entry points ---------------------------------------------------------------------------------


def load_ptx(path: str | os.PathLike) -> Simulator:
    """Simulator for a PTX file."""
    return Simulator(Path(path).read_text(), str(path))


def compile_cuda(
    path: str | os.PathLike,
    arch: str | int = "sm_90",
    include_dirs: Iterable[str | os.PathLike] = (),
    defines: Mapping[str, Any] | None = None,
    options: Sequence[str] = (),
) -> Simulator:
    """Simulator for a CUDA source file: nvcc -ptx (cached while the source and all its headers
    stay the same), then load_ptx. `options` are further nvcc options."""
    number = re.sub(r"^(sm|compute)_", "", str(arch))
    command = [find_nvcc(), "-ptx", f"-arch=compute_{number}", "-std=c++17", "-lineinfo"]
    command += [f"-I{d}" for d in include_dirs]
    for key, value in (defines or {}).items():
        command.append(f"-D{key}" if value is None else f"-D{key}={value}")
    command += options
    key = _digest(*command, str(Path(path).resolve()))
    ptx, manifest = cache_dir() / f"nvcc-{key}.ptx", cache_dir() / f"nvcc-{key}.json"
    with _alone(ptx) as folder:
        if not _is_current(ptx, manifest):
            output, depends = folder / "out.ptx", folder / "out.d"
            _run([*command, "-MD", "-MF", str(depends), str(path), "-o", str(output)], "nvcc")
            manifest.unlink(missing_ok=True)
            text = depends.read_text().replace("\\\n", " ").partition(":")[2]
            names = [name.replace("\\ ", " ") for name in re.findall(r"(?:\\ |\S)+", text)]
            stamps = {name: _stamp(name) for name in names}
            os.replace(output, ptx)
            manifest.write_text(json.dumps(stamps))
    return load_ptx(ptx)


def _stamp(name: str) -> str:
    """By content: a fresh checkout has new times, and its files are the same."""
    status = os.stat(name)
    return _content_digest(name, status.st_mtime_ns, status.st_size)


@cache
def _content_digest(name: str, modified: int, size: int) -> str:
    return _digest(Path(name).read_bytes())


def _is_current(ptx: Path, manifest: Path) -> bool:
    try:
        stamps = json.loads(manifest.read_text())
        return ptx.exists() and all(_stamp(name) == stamp for name, stamp in stamps.items())
    except (OSError, ValueError):
        return False
