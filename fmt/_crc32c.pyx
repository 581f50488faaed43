# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The compiled half of `digest`: it looks at bytes where they are, and lets other threads run while it sums up many."""

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint8_t, uint32_t

cdef extern from "crc32c.h" nogil:
    ctypedef struct crc32c_loops:
        uint32_t (*after)(uint32_t, const uint8_t *, size_t) noexcept nogil
        void (*each)(const uint8_t *, size_t, size_t, int64_t *) noexcept nogil
    const crc32c_loops crc32c_levels[2]
    int crc32c_best_level()
    void crc32c_make_table()

# The levels of this processor, see crc32c.h, are 0 to this one.
BEST_LEVEL = crc32c_best_level()

cdef const crc32c_loops *loops = &crc32c_levels[crc32c_best_level()]
# Bytes in a call. Fewer take less than 400 microseconds, and other threads can as well wait for that.
cdef size_t QUICK = 1 << 20

crc32c_make_table()


def use_level(level):
    """Makes all that follows run at that level, so that tests can reach those that a newer processor does not use."""
    global loops
    if not 0 <= level <= BEST_LEVEL:
        raise ValueError(f"level {level} where this processor has 0 to {BEST_LEVEL}")
    loops = &crc32c_levels[level]


def crc32c(data):
    return after(0, data)


def crc32c_after(uint32_t before, data):
    return after(before, data)


cdef uint32_t after(uint32_t found, data) except? 1:
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    if <size_t> view.len > QUICK:
        with nogil:
            found = loops.after(found, <const uint8_t *> view.buf, view.len)
    else:
        found = loops.after(found, <const uint8_t *> view.buf, view.len)
    PyBuffer_Release(&view)
    return found


def crc32c_each(data, Py_ssize_t size, sums):
    cdef Py_buffer view, into
    cdef size_t count
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        PyObject_GetBuffer(sums, &into, PyBUF_WRITABLE | PyBUF_ND | PyBUF_FORMAT)
        try:
            if into.itemsize != 8 or into.ndim != 1 or into.format is NULL or into.format[0] not in b"lq":
                raise TypeError("sums are 1-D int64")
            count = into.len // 8
            if size < 0 or view.len != <Py_ssize_t> count * size or (size and count != <size_t> (view.len // size)):
                raise ValueError(f"{view.len} bytes are not {count} times {size}")
            if <size_t> view.len > QUICK:
                with nogil:
                    loops.each(<const uint8_t *> view.buf, size, count, <int64_t *> into.buf)
            else:
                loops.each(<const uint8_t *> view.buf, size, count, <int64_t *> into.buf)
        finally:
            PyBuffer_Release(&into)
    finally:
        PyBuffer_Release(&view)
