"""Compiled walks over Python's own objects, for what would take Python a microsecond a tensor.

They call CPython's C functions by address, and find a tensor's memory through the C interface that DLPack defines
(https://dmlc.github.io/dlpack/latest/python_spec.html), which PyTorch has from 2.10 on. All of it holds the GIL.
"""

import ctypes
import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tamegrad.torch.kernels.jit import Entry, call, inlined, load

__all__ = ["AVAILABLE", "gather", "unchanged"]

# Where `DLPackExchangeAPI` has the function that describes a tensor, and the version that says so.
_DESCRIBE, _VERSION = 40, 1
# Where every object has its type in builds with a GIL.
_TYPE = 8
_NAMES = ("PyObject_GetAttr", "PyList_SetItem", "PyErr_Clear", "PyDict_Size", "PyDict_Next")


def _describe_address() -> int:
    """Returns the address of PyTorch's `dltensor_from_py_object_no_sync`, or 0 where there is none."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or object.__basicsize__ != 2 * _TYPE or sys.maxsize < 2**32:
        return 0
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    interface = pointer_of(capsule, b"dlpack_exchange_api")
    version = ctypes.c_uint32.from_address(interface).value
    return ctypes.c_int64.from_address(interface + _DESCRIBE).value if version == _VERSION else 0


def _address(name: str) -> int:
    return ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value or 0


_FUNCTIONS = np.array([_describe_address(), *map(_address, _NAMES)], dtype=np.int64)
_NAME = sys.intern("grad")
_OBJECTS = np.array([id(None), id(torch.Tensor), id(_NAME)], dtype=np.int64)
AVAILABLE = bool(_FUNCTIONS[0])

# What DLPack calls the CPU, and its codes and bits of the dtypes, in the order of `DTYPES`.
_CPU = 1
_CODES = np.array([(2, 16), (4, 16), (2, 32), (2, 64), (5, 64), (5, 128)], dtype=np.int64)


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


def _gather(parameters: Any, values: Any, functions: Any, objects: Any, codes: Any, table: Any) -> Any:
    describe, get_attribute, set_item, clear_error = functions[:4]
    none, tensor_type, name = objects
    described = np.empty(6, np.int64)
    for index in range(parameters.size):
        gradient = call(get_attribute, (parameters[index], name))
        if gradient == 0:
            call(clear_error, ())
            return False
        # The list takes over the reference.
        call(set_item, (values, index, gradient))
        table[index, 0], table[index, 1], table[index, 2] = 0, 0, -1
        if gradient == none:
            continue
        if load(gradient + _TYPE) != tensor_type:
            return False
        if np.int32(call(describe, (gradient, described.ctypes.data))) != 0:
            call(clear_error, ())
            return False
        # data, device, rank and dtype, shape, strides, offset
        kind = _kind(described[2], codes)
        count = _dense_count(np.int32(described[2]), described[3], described[4])
        if np.int32(described[1]) != _CPU or kind < 0 or count < 0:
            return False
        table[index, 0], table[index, 1], table[index, 2] = described[0] + described[5], count, kind
    return True


@inlined
def _kind(word: Any, codes: Any) -> Any:
    code, bits = (word >> 32) & 0xFF, (word >> 40) & 0xFF
    for kind in range(codes.shape[0]):
        if codes[kind, 0] == code and codes[kind, 1] == bits:
            return kind
    return -1


def _unchanged(tables: Any, sizes: Any, entries: Any, functions: Any) -> Any:
    dict_size, dict_next = functions[4:6]
    # What PyDict_Next needs and gives: a place, a key, a value.
    state = np.zeros(3, np.int64)
    place = state.ctypes.data
    entry = 0
    for index in range(tables.size):
        if call(dict_size, (tables[index],)) != sizes[index]:
            return False
        state[0] = 0
        for _ in range(sizes[index]):
            call(dict_next, (tables[index], place, place + 8, place + 16))
            if load(place + 8) != entries[entry, 0] or load(place + 16) != entries[entry, 1]:
                return False
            entry += 1
    return True


_gather_compiled = Entry(_gather, nogil=False)
_unchanged_compiled = Entry(_unchanged, nogil=False)


def gather(parameters: NDArray[np.int64], values: list[Any], table: NDArray[np.int64]) -> bool:
    """Puts the gradients of parameters into a list, and where they are in memory into a table.

    Args:
        parameters: The `id` of each parameter; they must be alive.
        values: A list of as many entries, which are replaced.
        table: `(P, 3)`, written: of each gradient the address, how many values, and the position of its dtype in
            `DTYPES`; -1 where there is none.

    Returns:
        Whether all gradients are plain tensors on the CPU that fill their memory. If not, the list and the table are of
        no use. A conjugation or negation that PyTorch has put off is not seen.
    """
    return bool(_gather_compiled(parameters, id(values), _FUNCTIONS, _OBJECTS, _CODES, table))


def unchanged(tables: NDArray[np.int64], sizes: NDArray[np.int64], entries: NDArray[np.int64]) -> bool:
    """Says whether dictionaries hold the same keys and values as before, in the same order.

    Args:
        tables: The `id` of each dictionary; they must be alive.
        sizes: How many entries each had.
        entries: `(N, 2)`: the `id` of each key and value, which must be alive, too.

    Returns:
        Whether all are the same objects.
    """
    return bool(_unchanged_compiled(tables, sizes, entries, _FUNCTIONS))
