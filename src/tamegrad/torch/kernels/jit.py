"""What all compiled code shares: the compiler with its cache on disk, and access to memory by address.

The only file that knows Numba's decorators, which have no types; everything it gives to others has.
"""

import hashlib
import logging
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import llvmlite.binding
import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

__all__ = [
    "CONVERTS_FLOAT16",
    "SOURCES",
    "Entry",
    "call",
    "digest",
    "half_to_single",
    "in_parallel",
    "inlined",
    "load",
    "pointer_to",
    "prefetch",
    "publish",
    "published",
    "reordered",
    "single_to_half",
    "take_one",
]

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

_log = logging.getLogger("tamegrad")

# What compiled code is made of: the functions of this folder, and the constants of `decide`.
_FOLDER = Path(__file__).parent
SOURCES = (*sorted(_FOLDER.glob("*.py")), *_FOLDER.parent.glob("decide.py"))


def digest(files: Iterable[Path]) -> str:
    """Returns what tells the contents of some files from others, as letters and digits."""
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
    """A compiled function that Python calls; compiled when it is first needed, or read from the disk.

    Args:
        function: What to compile.
        nogil: Whether it runs beside other threads of Python; without, it may touch Python's objects.
    """

    def __init__(self, function: Callable[..., Any], *, nogil: bool) -> None:
        # Numba takes what is on the disk for new while the function's own file has not changed. But it holds code of
        # other files too; so what was compiled from other versions of those goes by another name.
        function.__qualname__ = f"{function.__name__}_{_version}"
        self._dispatcher: Any = numba.njit(nogil=nogil, error_model="numpy")(function)
        self._ready: set[object] = set()
        try:
            self._dispatcher.enable_caching()
        except RuntimeError as error:
            # Numba found no folder that it can write to: all works, and every process compiles anew.
            _log.info("compiled code is not kept on disk: %s", error)

    def __call__(self, *args: object) -> Any:
        """Runs it."""
        if not self._ready:
            self.prepare(None, *args)
        return self._dispatcher(*args)

    def prepare(self, variant: object, *args: object) -> None:
        """Compiles it for the types of some arguments, or reads what another process compiled.

        How long compiling took is said once, on the logger `tamegrad`.

        Args:
            variant: What the types of the arguments depend on.
            *args: The arguments.
        """
        if variant in self._ready:
            return
        self._ready.add(variant)
        before, start = self.compilations, time.perf_counter()
        self._dispatcher.compile(tuple(numba.typeof(argument) for argument in args))
        if self.compilations > before:
            _log.info(
                "compiled %s in %.1f s; the next process finds it in %s",
                self._dispatcher.__name__,
                time.perf_counter() - start,
                self._dispatcher.stats.cache_path,
            )

    @property
    def compilations(self) -> int:
        """How often this process had to compile it, because the disk did not have it."""
        return sum(self._dispatcher.stats.cache_misses.values())


_WORD, _INT, _HALF_WORD = ir.IntType(64), ir.IntType(32), ir.IntType(16)
_ANYTHING = ir.IntType(8).as_pointer()

# Without such instructions LLVM would call functions that may not be there.
CONVERTS_FLOAT16: bool = platform.machine().lower() in {"arm64", "aarch64"} or bool(
    llvmlite.binding.get_host_cpu_features().get("f16c")
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
def load(_: Any, address: Any) -> Any:
    """Reads the 64-bit integer at an address."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], _WORD.as_pointer()))

    return types.int64(address), generate


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(_: Any, address: Any) -> Any:
    """Has the cache line at an address fetched, without waiting for it; an address of nothing does no harm."""

    def generate(context: Any, builder: Any, __: Any, args: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        takes = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", (byte,), takes)
        # To read, into every level of the cache, data.
        builder.call(function, [builder.inttoptr(args[0], byte), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.none(address), generate


@intrinsic  # type: ignore[untyped-decorator]
def call(_: Any, address: Any, arguments: Any) -> Any:
    """Calls a C function at an address with a tuple of 64-bit integers or pointers; returns a 64-bit integer.

    Of a C `int` only the lower half counts: `np.int32(call(...))`.
    """

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        words = [builder.extract_value(args[1], index) for index in range(len(arguments))]
        function = ir.FunctionType(_WORD, [_WORD] * len(words))
        return builder.call(builder.inttoptr(args[0], function.as_pointer()), words)

    return types.int64(address, arguments), generate


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
def publish(_: Any, place: Any, value: Any) -> Any:
    """Writes the first integer of an array; a thread that reads it with `published` sees all that was written before.

    Args:
        _: What Numba gives.
        place: An array of int64.
        value: An int64.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        builder.store_atomic(args[1], array.data, "release", 8)
        return context.get_dummy_value()

    return types.none(place, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def published(_: Any, place: Any) -> Any:
    """Reads the first integer of an array, which another thread may write with `publish` meanwhile."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.load_atomic(array.data, "acquire", 8)

    return types.int64(place), generate


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
