"""What all compiled code shares: the compiler, its cache on disk, and access to memory by address.

The only file that knows Numba's decorators, which have no types; everything it gives to others has.
"""

import hashlib
import logging
import pickle
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import llvmlite.binding
import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.extending import intrinsic

__all__ = [
    "CONVERTS_FLOAT16",
    "SOURCES",
    "Entry",
    "digest",
    "half_to_single",
    "in_parallel",
    "inlined",
    "pointer_to",
    "reordered",
    "single_to_half",
    "take_one",
]

if numba.config.DISABLE_JIT:
    # The loops read memory by address, which only compiled code can.
    raise ImportError("NUMBA_DISABLE_JIT is set")

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

_log = logging.getLogger("tamegrad")

# The files that compiled code comes from: the functions of this folder, and the constants of `decide`.
_FOLDER = Path(__file__).parent
SOURCES = (*sorted(_FOLDER.glob("*.py")), *_FOLDER.parents[2].glob("ranges.py"))


def digest(files: Iterable[Path]) -> str:
    """Returns a digest of the contents of some files."""
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


_version = digest(SOURCES)


def inlined(function: FunctionT) -> FunctionT:
    """Makes a function that compiled code may call."""
    return cast("FunctionT", numba.njit(nogil=True, error_model="numpy")(function))


def reordered(function: FunctionT) -> FunctionT:
    """Makes a function that compiled code may call, whose sums are taken in any order: what vector instructions need.

    Nothing else is given up that would change a result: NaN and infinities keep their meaning.
    """
    return cast("FunctionT", numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})(function))


class Entry:
    """A compiled function that Python calls; compiled when it is first needed, or read from the cache on disk.

    Args:
        function: What to compile. It runs without the GIL.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        # Numba checks the function's own file for changes, but compiled code includes functions of other files. With
        # their digest in the name, code that was compiled from other versions is never found.
        function.__qualname__ = f"{function.__name__}_{_version}"
        self._dispatcher: Any = numba.njit(nogil=True, error_model="numpy")(function)
        self._ready: set[object] = set()
        self._cache: _Cache | None = None
        try:
            self._cache = _Cache(function)
            self._dispatcher._cache = self._cache  # noqa: SLF001  what `enable_caching` does, with our own class
        except RuntimeError as error:
            # Numba found no folder that it can write to: every process compiles anew.
            _log.info("compiled code is not cached on disk: %s", error)

    def __call__(self, *args: object) -> Any:
        """Runs it."""
        return self._dispatcher(*args)

    def prepare(self, variant: object, *args: object) -> None:
        """Compiles it for the types of some arguments, or reads what another process compiled.

        Logs once, on the logger `tamegrad`, how long compiling took.

        Args:
            variant: What the types of the arguments depend on.
            *args: The arguments.
        """
        if variant in self._ready:
            return
        before, start = self.compilations, time.perf_counter()
        self._dispatcher.compile(tuple(numba.typeof(argument) for argument in args))
        self._ready.add(variant)
        if self.compilations > before:
            seconds, then = time.perf_counter() - start, "it is not cached, so the next process compiles it again"
            if self._cache is not None and self._cache.saved:
                then = f"the next process finds it in {self._cache.cache_path}"
            _log.info("compiled %s in %.1f s; %s", self._dispatcher.__name__, seconds, then)

    @property
    def compilations(self) -> int:
        """How often this process had to compile it, because the cache did not have it."""
        return sum(self._dispatcher.stats.cache_misses.values())


class _Cache(FunctionCache):  # type: ignore[misc]  # Numba has no types
    """Numba's cache on disk, without its faults: what is damaged is compiled again, what cannot be saved is not."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file.__class__ = _CheckedFile
        self.saved = False  # what was compiled last

    def load_overload(self, sig: object, target_context: object) -> object:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # noqa: BLE001  reading damaged bytes can raise anything
            _log.warning("the cache in %s is damaged (%r): compiling again", self.cache_path, error)
            return None

    def save_overload(self, sig: object, data: object) -> None:
        try:
            super().save_overload(sig, data)
            self.saved = True
        except Exception as error:  # noqa: BLE001  it reads the index first, which may be damaged
            self.saved = False
            _log.warning("compiled code is not cached in %s: %r", self.cache_path, error)
            self._start_anew()

    def _start_anew(self) -> None:
        try:
            self.flush()
        except OSError as error:
            _log.info("the cache in %s cannot be emptied: %s", self.cache_path, error)


class _CheckedFile(IndexDataCacheFile):  # type: ignore[misc]  # Numba has no types
    """Numba's files of machine code with a checksum, for what runs has to be what was written."""

    def _save_data(self, name: str, data: object) -> None:
        content = self._dump(data)
        with self._open_for_write(self._data_path(name)) as file:
            file.write(hashlib.sha256(content).digest() + content)

    def _load_data(self, name: str) -> object:
        content = Path(self._data_path(name)).read_bytes()
        if hashlib.sha256(content[_CHECKSUM:]).digest() != content[:_CHECKSUM]:
            raise ValueError(f"{name} is not what was written")
        return pickle.loads(content[_CHECKSUM:])  # noqa: S301  what this class wrote, as its checksum says


_CHECKSUM = hashlib.sha256().digest_size
_WORD, _INT, _HALF_WORD = ir.IntType(64), ir.IntType(32), ir.IntType(16)
_ANYTHING = ir.IntType(8).as_pointer()

# The features that Numba compiles for, which its settings may restrict; None if those of this CPU.
_features = numba.config.CPU_FEATURES
# Without instructions for it LLVM would call conversion functions that may not exist.
CONVERTS_FLOAT16: bool = platform.machine().lower() in {"arm64", "aarch64"} or (
    bool(llvmlite.binding.get_host_cpu_features().get("f16c")) if _features is None else "+f16c" in _features
)


@intrinsic  # type: ignore[untyped-decorator]
def half_to_single(_: Any, bits: Any) -> Any:
    """Returns the float16 that 16 bits stand for as float32; only where `CONVERTS_FLOAT16`."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(bits), generate


@intrinsic  # type: ignore[untyped-decorator]
def single_to_half(_: Any, value: Any) -> Any:
    """Rounds a float32 to float16 and returns its bits; only where `CONVERTS_FLOAT16`."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), _HALF_WORD)

    return types.int16(value), generate


@intrinsic  # type: ignore[untyped-decorator]
def pointer_to(_: Any, address: Any, like: Any) -> Any:
    """Returns an address as a pointer to values of an array's dtype, for `numba.carray`."""
    pointer: Any = types.CPointer(like.dtype)  # type: ignore[attr-defined]  # mypy reads another `types`

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(address, like), generate


@intrinsic  # type: ignore[untyped-decorator]
def take_one(_: Any, count: Any) -> Any:
    """Adds 1 to the first integer of an array, which no other thread can do in between; returns what it was."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.atomic_rmw("add", array.data, _WORD(1), "monotonic")

    return types.int64(count), generate


@intrinsic  # type: ignore[untyped-decorator]
def in_parallel(typing: Any, address: Any, threads: Any, function: Any, arguments: Any) -> Any:
    """Calls a compiled function with a tuple of arguments on every thread of an OpenMP team, and waits for all.

    Args:
        typing: What Numba gives.
        address: Of `GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags)`.
        threads: How many.
        function: Made by `inlined`, without a result.
        arguments: Its arguments.
    """
    called = function.get_call_type(typing, arguments.types, {})

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        start, threads, _, packed = args
        compiled = function.dispatcher.get_compile_result(called)
        context.add_linking_libs([compiled.library])
        body = ir.Function(
            builder.module, ir.FunctionType(ir.VoidType(), [_ANYTHING]), builder.module.get_unique_name("on_thread")
        )
        body.linkage = "internal"
        inside = ir.IRBuilder(body.append_basic_block())
        unpacked = inside.load(inside.bitcast(body.args[0], packed.type.as_pointer()))
        values = [inside.extract_value(unpacked, index) for index in range(len(arguments))]
        context.call_internal_no_propagate(inside, compiled.fndesc, called, values)
        inside.ret_void()

        parallel = ir.FunctionType(ir.VoidType(), [body.type, _ANYTHING, _INT, _INT])
        data = builder.bitcast(cgutils.alloca_once_value(builder, packed), _ANYTHING)
        team = builder.trunc(threads, _INT)
        builder.call(builder.inttoptr(start, parallel.as_pointer()), [body, data, team, _INT(0)])
        return context.get_dummy_value()

    return types.none(address, threads, function, arguments), generate
