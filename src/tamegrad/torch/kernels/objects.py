"""Compiled walks over Python's own objects, for what would take Python a microsecond a tensor.

They call CPython's C functions by address, and find a tensor's memory through the C interface that DLPack defines
(https://dmlc.github.io/dlpack/latest/python_spec.html), which PyTorch has from 2.10 on. All of it holds the GIL.
"""

import ctypes
import sys
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tamegrad.torch.kernels.jit import Entry, call, inlined, load, prefetch, publish
from tamegrad.torch.kernels.layout import find_layout
from tamegrad.torch.kernels.memory import DTYPES, ModuleTables

__all__ = ["AVAILABLE", "CONSTANTS", "GIVE_GIL", "gather", "is_unchanged", "unchanged", "walk"]

# Where `DLPackExchangeAPI` has the function that describes a tensor, and the version that says so.
_DESCRIBE, _VERSION = 40, 1
# Where every object has its type in builds with a GIL.
_TYPE = 8
# Where a dictionary mostly points to its entries; where it does not, nothing but time is lost.
_ENTRIES = 32
# How many objects ahead a walk has each step to what it reads fetched.
_AHEAD, _TABLES_AHEAD = 3, 8
_NAMES = (
    "PyList_SetItem",
    "PyErr_Clear",
    "PyDict_Size",
    "PyDict_Next",
    "PyEval_SaveThread",
    "PyEval_RestoreThread",
)
# What the stable ABI calls the function of a descriptor that returns an attribute of an object.
_DESCRIPTOR_GET = 54


def _describe_address() -> int:
    """Returns the address of PyTorch's `dltensor_from_py_object_no_sync`, or 0 where there is none."""
    capsule: object = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or object.__basicsize__ != 2 * _TYPE or sys.maxsize < 2**32:
        return 0
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    interface = pointer_of(capsule, b"dlpack_exchange_api")
    version = ctypes.c_uint32.from_address(interface).value
    return ctypes.c_int64.from_address(interface + _DESCRIBE).value if version == _VERSION else 0


def _getter_address() -> int:
    """Returns the address of what calls PyTorch's own `grad`: looking the attribute up takes as long as that does."""
    slot_of = ctypes.pythonapi.PyType_GetSlot
    slot_of.restype, slot_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_int)
    address: int = slot_of(type(_GRAD), _DESCRIPTOR_GET)
    return address


def _address(name: str) -> int:
    return ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value or 0


_GRAD: Any = torch.Tensor.grad
_FUNCTIONS = _describe_address(), _getter_address(), *map(_address, _NAMES)
_OBJECTS = id(None), id(torch.Tensor), id(_GRAD)
AVAILABLE = bool(_FUNCTIONS[0])
# Where in `CONSTANTS` there are the functions that give the GIL away and, next to it, take it back.
GIVE_GIL = 6

# What DLPack calls the CPU, and its codes and bits of the dtypes, in the order of `DTYPES`.
_CPU = 1
_CODES = np.array([(2, 16), (4, 16), (2, 32), (2, 64), (5, 64), (5, 128)], dtype=np.int64)
_layout = find_layout() if AVAILABLE else None
# What compiled code needs to know of this process: functions, objects, and the layout or zeros. They are one array,
# because every array that compiled code is called with takes its time.
_OBJECTS_AT, _LAYOUT_AT = len(_FUNCTIONS), len(_FUNCTIONS) + len(_OBJECTS)
CONSTANTS = np.array([*_FUNCTIONS, *_OBJECTS, *(astuple(_layout) if _layout is not None else [0] * 5)], dtype=np.int64)
_COMPLEX = DTYPES.index(torch.complex64)
# 2**64 divided by the golden ratio, odd, as a signed number.
_MIXER = 0x9E3779B97F4A7C15 - 2**64


@inlined
def _dense_count(rank: Any, shape: Any, strides: Any) -> Any:
    """Returns how many values a tensor has, or -1 if they leave gaps in memory or overlap."""
    count = 1
    for dimension in range(rank):
        count *= load(shape + 8 * dimension)
    reached = 1
    while 0 < reached < count:
        # What comes next in memory is the dimension whose stride is what those before it fill; mostly the last one.
        before = reached
        for dimension in range(rank - 1, -1, -1):
            size = load(shape + 8 * dimension)
            if size > 1 and load(strides + 8 * dimension) == reached:
                reached *= size
        if reached == before:
            return -1
    return count


@inlined
def _prefetch_lines(address: Any, lines: Any) -> None:
    for line in range(lines):
        prefetch(address + 64 * line)


@inlined
def _look_ahead(parameters: Any, index: Any, layout: Any) -> None:
    """Has fetched what a walk comes to soon, a step at a time: where to look next stands in what was fetched before.

    Nothing is read but what living parameters have; their gradients live as long as the GIL is held.
    """
    to_tensor, to_autograd, to_gradient, to_storage, to_object = layout
    last = parameters.size - 1
    prefetch(parameters[min(index + 5 * _AHEAD, last)])
    _prefetch_lines(load(parameters[min(index + 4 * _AHEAD, last)] + to_tensor), 3)
    _prefetch_lines(load(load(parameters[min(index + 3 * _AHEAD, last)] + to_tensor) + to_autograd), 2)
    autograd = load(load(parameters[min(index + 2 * _AHEAD, last)] + to_tensor) + to_autograd)
    if autograd != 0:
        _prefetch_lines(load(autograd + to_gradient), 3)
    autograd = load(load(parameters[min(index + _AHEAD, last)] + to_tensor) + to_autograd)
    if autograd != 0:
        # Where there is no gradient PyTorch has an empty tensor.
        gradient = load(autograd + to_gradient)
        prefetch(load(gradient + to_storage))
        prefetch(load(gradient + to_object))


@inlined
def walk(parameters: Any, values: Any, constants: Any, table: Any, sizes: Any, known: Any) -> Any:
    """Puts gradients into a list and a table, as `gather` says. Only for compiled code.

    Args:
        parameters: As in `gather`.
        values: The `id` of the list.
        constants: `CONSTANTS`.
        table: As in `gather`.
        sizes: `(P, 2)`: what the last two columns of the table may turn out to be; or nothing.
        known: Where to publish after each gradient how many rows of the table are written, all of them of those sizes
            and on the CPU. If one is not, -1 is, and nothing more.

    Returns:
        What `gather` returns, and whether all was as expected.
    """
    describe, get, set_item, clear_error = constants[:4]
    none, tensor_type, descriptor = constants[_OBJECTS_AT:_LAYOUT_AT]
    layout = constants[_LAYOUT_AT:]
    described = np.empty(6, np.int64)
    plain, may_be_lazy, expected = True, False, sizes.shape[0] == parameters.size
    for index in range(parameters.size):
        if layout[0] != 0:
            _look_ahead(parameters, index, layout)
        gradient = call(get, (descriptor, parameters[index], 0))
        if gradient == 0:
            call(clear_error, ())
            return False, False, False
        # The list takes over the reference.
        call(set_item, (values, index, gradient))
        address, count, kind = 0, 0, -1
        if gradient != none:
            if load(gradient + _TYPE) != tensor_type:
                return False, False, False
            if np.int32(call(describe, (gradient, described.ctypes.data))) != 0:
                call(clear_error, ())
                return False, False, False
            # data, device, rank and dtype, shape, strides, offset
            address, kind = described[0] + described[5], _kind(described[2])
            count = _dense_count(np.int32(described[2]), described[3], described[4])
            plain &= np.int32(described[1]) == _CPU and kind >= 0 and count >= 0
            may_be_lazy |= count == 1 or kind >= _COMPLEX
        table[index, 0], table[index, 1], table[index, 2] = address, count, kind
        expected = expected and plain and count == sizes[index, 0] and kind == sizes[index, 1]
        publish(known, index + 1 if expected else -1)
    return plain and not _shares_memory(table), may_be_lazy, expected


def _gather(parameters: Any, values: Any, constants: Any, table: Any) -> Any:
    plain, may_be_lazy, _ = walk(
        parameters, values, constants, table, np.empty((0, 2), np.int64), np.empty(1, np.int64)
    )
    return plain, may_be_lazy


@inlined
def _shares_memory(table: Any) -> Any:
    """Says whether two gradients begin at one address, by a table of those seen that is at least half empty."""
    size = 16
    while size < 2 * table.shape[0]:
        size *= 2
    seen = np.zeros(size, np.int64)
    for index in range(table.shape[0]):
        if table[index, 1] == 0:
            continue
        # Gradients lie at multiples of some power of two: the product has the other bits mixed into the higher ones.
        place = (table[index, 0] * _MIXER >> 40) & (size - 1)
        while seen[place] != 0:
            if seen[place] == table[index, 0]:
                return True
            place = (place + 1) & (size - 1)
        seen[place] = table[index, 0]
    return False


@inlined
def _kind(word: Any) -> Any:
    code, bits = (word >> 32) & 0xFF, (word >> 40) & 0xFF
    for kind in range(_CODES.shape[0]):
        if _CODES[kind, 0] == code and _CODES[kind, 1] == bits:
            return kind
    return -1


@inlined
def is_unchanged(tables: Any, entries: Any, constants: Any) -> Any:
    """Says what `unchanged` does. Only for compiled code."""
    dict_size, dict_next = constants[4:6]
    # What PyDict_Next needs and gives: a place, a key, a value.
    state = np.zeros(3, np.int64)
    place = state.ctypes.data
    entry = 0
    last = tables.shape[0] - 1
    for index in range(tables.shape[0]):
        prefetch(tables[min(index + 2 * _TABLES_AHEAD, last), 0])
        _prefetch_lines(load(tables[min(index + _TABLES_AHEAD, last), 0] + _ENTRIES), 2)
        table, size = tables[index]
        if call(dict_size, (table,)) != size:
            return False
        state[0] = 0
        for _ in range(size):
            call(dict_next, (table, place, place + 8, place + 16))
            if load(place + 8) != entries[entry, 0] or load(place + 16) != entries[entry, 1]:
                return False
            entry += 1
    return True


def _unchanged(tables: Any, entries: Any, constants: Any) -> Any:
    return is_unchanged(tables, entries, constants)


_gather_compiled = Entry(_gather, nogil=False)
_unchanged_compiled = Entry(_unchanged, nogil=False)


def gather(parameters: NDArray[np.int64], values: list[Any], table: NDArray[np.int64]) -> tuple[bool, bool]:
    """Puts the gradients of parameters into a list, and where they are in memory into a table.

    Args:
        parameters: The `id` of each parameter, a tensor whose `grad` is PyTorch's own; they must be alive.
        values: A list of as many entries, which are replaced.
        table: `(P, 3)`, written: of each gradient the address, how many values, and the position of its dtype in
            `DTYPES`; -1 where there is none.

    Returns:
        Whether all gradients are plain tensors on the CPU that fill memory of their own; if not, the list and the table
        are of no use. And whether some are complex or single values: those may have a conjugation or negation that
        PyTorch has put off, which is not seen.
    """
    plain, may_be_lazy = _gather_compiled(parameters, id(values), CONSTANTS, table)
    return plain, may_be_lazy


def unchanged(modules: ModuleTables) -> bool:
    """Says whether modules hold the same objects under the same keys as before, in the same order.

    Args:
        modules: Their dictionaries as they were.

    Returns:
        Whether all are the same objects.
    """
    return bool(_unchanged_compiled(*modules, CONSTANTS))
