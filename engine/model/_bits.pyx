# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The compiled half of `bits`: it holds arrays against what the loops in bits.h need, and gives up the lock meanwhile.

Arrays come as buffers, so that nothing of numpy is needed to build this. Each function checks kind, width and length of
what it is given: what has passed is never read or written behind its end.
"""

cimport cython
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.long cimport PyLong_CheckExact
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memmove

cdef extern from "Python.h":
    ctypedef struct PyThreadState:
        pass
    PyThreadState *PyEval_SaveThread() noexcept
    void PyEval_RestoreThread(PyThreadState *) noexcept
    long long PyLong_AsLongLongAndOverflow(object number, int *overflow) noexcept

cdef extern from "bits.h" nogil:
    ctypedef uint64_t bits_word
    ctypedef int64_t bits_number
    ctypedef struct bits_loops:
        uint64_t (*count)(const uint8_t *, size_t)
        uint64_t (*runs)(const bits_word *, size_t, size_t)
        uint64_t (*combine)(const bits_word *, const bits_word *, bits_word *, size_t, int)
        void (*extents)(const bits_word *, size_t, size_t, uint64_t, bits_number *, bits_number *, size_t, size_t)
        void (*coarsen)(const bits_word *, size_t, bits_word *, int)
        void (*refine)(const bits_word *, bits_word *, size_t, int)
    const bits_loops bits_levels[3]
    int bits_best_level()
    void bits_set_range(bits_word *, uint64_t, uint64_t)
    void bits_clear_range(bits_word *, uint64_t, uint64_t)
    size_t bits_first_outside(const bits_number *, const bits_number *, size_t, int64_t)
    size_t bits_mark_ranges(bits_word *, uint64_t, const bits_number *, const bits_number *, size_t, int, uint64_t)
    size_t bits_scatter(bits_word *, uint64_t, const bits_number *, const bits_number *, size_t, uint64_t)
    void bits_union(const bits_word *const *, size_t, bits_word *, size_t)
    int bits_all(const uint8_t *, size_t, uint8_t)
    void bits_uniform(const bits_word *, size_t, size_t, bits_number *)
    int __builtin_ctzll(unsigned long long)
    enum:
        BITS_OR
        BITS_AND
        BITS_AND_NOT
        BITS_XOR

OR, AND, AND_NOT, XOR = BITS_OR, BITS_AND, BITS_AND_NOT, BITS_XOR
# The levels of this processor, see bits.h, are 0 to this one.
BEST_LEVEL = bits_best_level()

cdef const bits_loops *loops = &bits_levels[bits_best_level()]


def use_level(level):
    """Makes all that follows run at that level, so that tests can reach those that a newer processor does not use."""
    global loops
    if not 0 <= level <= BEST_LEVEL:
        raise ValueError(f"level {level} where this processor has 0 to {BEST_LEVEL}")
    loops = &bits_levels[level]


# Bytes in a call. Fewer take less than 100 microseconds, and other threads can as well wait for that.
cdef size_t QUICK = 1 << 20


cdef PyThreadState *unlock(size_t size) noexcept:
    """Gives up the interpreter's lock for work on so many bytes, if it is worth it."""
    return PyEval_SaveThread() if size > QUICK else NULL


cdef void lock(PyThreadState *state) noexcept:
    if state is not NULL:
        PyEval_RestoreThread(state)


@cython.final
@cython.internal
cdef class Buffer:
    """An array's memory, for as long as this object is there."""

    cdef Py_buffer view

    def __dealloc__(self):
        PyBuffer_Release(&self.view)


cdef Buffer elements(array, str kinds, int flags):
    """A one-dimensional, contiguous array of native 8-byte integers of one of these kinds, in the letters of struct."""
    cdef Buffer buffer = Buffer.__new__(Buffer)
    PyObject_GetBuffer(array, &buffer.view, flags | PyBUF_ND | PyBUF_FORMAT)
    kind = "" if buffer.view.format is NULL else (<bytes> buffer.view.format).decode().lstrip("@=<")
    if buffer.view.itemsize != 8 or buffer.view.ndim != 1 or len(kind) != 1 or kind not in kinds:
        raise TypeError("an array of packed words is 1-D uint64, one of positions 1-D int64")
    return buffer


cdef Buffer octets_of(data):
    cdef Buffer buffer = Buffer.__new__(Buffer)
    PyObject_GetBuffer(data, &buffer.view, PyBUF_SIMPLE)
    return buffer


cdef inline Buffer words_of(array, int flags=PyBUF_SIMPLE):
    return elements(array, "LQ", flags)


cdef inline Buffer numbers_of(array, int flags=PyBUF_SIMPLE):
    return elements(array, "lq", flags)


cdef inline size_t length_of(Buffer buffer) noexcept:
    return buffer.view.len // 8


cdef int shift_of(int64_t granularity) except -1:
    if granularity <= 0 or granularity & (granularity - 1):
        raise ValueError(f"{granularity} is not a power of two")
    return __builtin_ctzll(granularity)


cdef class Marker:
    """Where `mark` puts the marks of a bitmap, with the shape of its disk: `InPlace` or `Notes`."""

    cdef int64_t size
    cdef int shift

    cdef int set_shape(self, int64_t size, int64_t granularity) except -1:
        if size < 0:
            raise ValueError(f"a disk of {size} bytes")
        self.size = size
        self.shift = shift_of(granularity)
        return 0

    cdef bint put(self, uint64_t first, uint64_t last) noexcept:
        return False

    def __reduce__(self):
        # A copy of the bitmap has words of its own, so there is no marker for them yet.
        return type(None), ()


@cython.final
cdef class InPlace(Marker):
    """The words of a bitmap.

    Args:
        words: one bit per granule; writable. They are not replaced or shortened while there is a marker.
        size: of the disk, bytes.
        granularity: bytes, a power of two.
    """

    cdef Buffer words

    def __cinit__(self, words, int64_t size, int64_t granularity):
        self.words = words_of(words, PyBUF_WRITABLE)
        self.set_shape(size, granularity)
        if size and <size_t> (size - 1 >> self.shift >> 6) >= length_of(self.words):
            raise ValueError(f"{length_of(self.words)} words are too few for {size} bytes at {granularity}")

    cdef bint put(self, uint64_t first, uint64_t last) noexcept:
        bits_set_range(<bits_word *> self.words.view.buf, first, last)
        return True


@cython.final
cdef class Notes(Marker):
    """What is to be set later, in two arrays: the first bit of each range, and the last.

    Args:
        firsts, lasts: int64, writable, as many as there is room for.
        size: of the disk, bytes.
        granularity: bytes, a power of two.

    Attributes:
        count: how many ranges there are; they are the first ones of the arrays.
        forgotten: how many there were before these.
    """

    cdef Buffer firsts, lasts
    cdef readonly size_t count, forgotten

    def __cinit__(self, firsts, lasts, int64_t size, int64_t granularity):
        self.firsts, self.lasts = numbers_of(firsts, PyBUF_WRITABLE), numbers_of(lasts, PyBUF_WRITABLE)
        check_pair(self.firsts, self.lasts)
        self.set_shape(size, granularity)

    cdef bint put(self, uint64_t first, uint64_t last) noexcept:
        if self.count == length_of(self.firsts):
            return False
        (<bits_number *> self.firsts.view.buf)[self.count] = first
        (<bits_number *> self.lasts.view.buf)[self.count] = last
        self.count += 1
        return True

    def forget(self, size_t count, size_t forgotten):
        """Forgets so many, the oldest ones, which have been set; nothing, if others have forgotten any meanwhile."""
        if self.forgotten != forgotten:
            return
        check_part(self.firsts, count, self.count)
        self.count -= count
        self.forgotten += count
        for numbers in (self.firsts, self.lasts):
            memmove((<Buffer> numbers).view.buf, <bits_number *> (<Buffer> numbers).view.buf + count, self.count * 8)


@cython.binding(False)
def mark(Marker marker, offset, length):
    cdef int offset_over, length_over
    cdef int64_t first, count
    if marker is None or not PyLong_CheckExact(offset) or not PyLong_CheckExact(length):
        return False
    first = PyLong_AsLongLongAndOverflow(offset, &offset_over)
    count = PyLong_AsLongLongAndOverflow(length, &length_over)
    if offset_over or length_over or first < 0 or count < 0 or first > marker.size - count:
        return False
    return count == 0 or marker.put(first >> marker.shift, (first + (count - 1)) >> marker.shift)


def set_range(words, Py_ssize_t start, Py_ssize_t end):
    cdef Buffer buffer = words_of(words, PyBUF_WRITABLE)
    if start < end:
        check_range(buffer, start, end)
        bits_set_range(<bits_word *> buffer.view.buf, start, end - 1)


def clear_range(words, Py_ssize_t start, Py_ssize_t end):
    cdef Buffer buffer = words_of(words, PyBUF_WRITABLE)
    if start < end:
        check_range(buffer, start, end)
        bits_clear_range(<bits_word *> buffer.view.buf, start, end - 1)


cdef int check_range(Buffer buffer, Py_ssize_t start, Py_ssize_t end) except -1:
    if start < 0 or <size_t> end > length_of(buffer) * 64:
        raise IndexError(f"bits {start} to {end} where there are {length_of(buffer) * 64}")
    return 0


# Without the lock, nothing but numbers and pointers may be touched. So each function first takes them out.


def first_outside(offsets, lengths, int64_t size):
    cdef Buffer one = numbers_of(offsets), two = numbers_of(lengths)
    cdef const bits_number *offset = <bits_number *> one.view.buf
    cdef const bits_number *length = <bits_number *> two.view.buf
    cdef size_t found, n = length_of(one)
    check_pair(one, two)
    cdef PyThreadState *state = unlock(n * 16)
    found = bits_first_outside(offset, length, n, size)
    lock(state)
    return None if found == n else found


cdef int check_pair(Buffer one, Buffer two) except -1:
    if length_of(one) != length_of(two):
        raise ValueError(f"{length_of(one)} elements beside {length_of(two)}")
    return 0


def mark_ranges(words, offsets, lengths, int64_t granularity):
    cdef Buffer buffer = words_of(words, PyBUF_WRITABLE), one = numbers_of(offsets), two = numbers_of(lengths)
    cdef bits_word *word = <bits_word *> buffer.view.buf
    cdef const bits_number *offset = <bits_number *> one.view.buf
    cdef const bits_number *length = <bits_number *> two.view.buf
    cdef size_t done, n = length_of(one), there = length_of(buffer)
    cdef int shift = shift_of(granularity)
    check_pair(one, two)
    cdef PyThreadState *state = unlock(n * 16 + there * 8)
    done = bits_mark_ranges(word, there * 64, offset, length, n, shift, there * 2)
    lock(state)
    return done


def scatter(words, firsts, lasts):
    cdef Buffer buffer = words_of(words, PyBUF_WRITABLE), one = numbers_of(firsts), two = numbers_of(lasts)
    cdef bits_word *word = <bits_word *> buffer.view.buf
    cdef const bits_number *first = <bits_number *> one.view.buf
    cdef const bits_number *last = <bits_number *> two.view.buf
    cdef size_t done, n = length_of(one), there = length_of(buffer)
    check_pair(one, two)
    cdef PyThreadState *state = unlock(n * 16 + there * 8)
    done = bits_scatter(word, there * 64, first, last, n, there * 2)
    lock(state)
    return done


def count(data):
    cdef Buffer buffer = octets_of(data)
    cdef const uint8_t *octets = <const uint8_t *> buffer.view.buf
    cdef size_t size = buffer.view.len
    cdef uint64_t total
    cdef PyThreadState *state = unlock(size)
    total = loops.count(octets, size)
    lock(state)
    return total


def all_are(data, uint8_t octet):
    cdef Buffer buffer = octets_of(data)
    cdef const uint8_t *octets = <const uint8_t *> buffer.view.buf
    cdef size_t size = buffer.view.len
    cdef int found
    cdef PyThreadState *state = unlock(size)
    found = bits_all(octets, size, octet)
    lock(state)
    return found != 0


def uniform(words, kinds):
    cdef Buffer buffer = words_of(words), result = numbers_of(kinds, PyBUF_WRITABLE)
    cdef const bits_word *word = <bits_word *> buffer.view.buf
    cdef bits_number *kind = <bits_number *> result.view.buf
    cdef size_t n = length_of(buffer), count = length_of(result)
    if n and (not count or n % count) or count > n:
        raise ValueError(f"{n} words in {count} pieces")
    cdef PyThreadState *state = unlock(n * 8)
    if count:
        bits_uniform(word, n // count, count, kind)
    lock(state)


def combine(one, other, into, int how):
    cdef Buffer first = words_of(one), second = words_of(other), result = words_of(into, PyBUF_WRITABLE)
    cdef const bits_word *a = <bits_word *> first.view.buf
    cdef const bits_word *b = <bits_word *> second.view.buf
    cdef bits_word *c = <bits_word *> result.view.buf
    cdef size_t n = length_of(first)
    cdef uint64_t total
    check_pair(first, second)
    check_pair(first, result)
    cdef PyThreadState *state = unlock(n * 24)
    total = loops.combine(a, b, c, n, how)
    lock(state)
    return total


def union(list parts, into):
    cdef Buffer buffer, result = words_of(into, PyBUF_WRITABLE)
    cdef list buffers = [words_of(part) for part in parts]
    cdef size_t at, n = len(buffers)
    for buffer in buffers:
        check_pair(buffer, result)
    cdef bits_word *target = <bits_word *> result.view.buf
    cdef const bits_word **sources = <const bits_word **> PyMem_Malloc((n + 1) * sizeof(bits_word *))
    if sources is NULL:
        raise MemoryError
    for at, buffer in enumerate(buffers):
        sources[at] = <const bits_word *> buffer.view.buf
    cdef PyThreadState *state = unlock(length_of(result) * 8 * n)
    bits_union(sources, n, target, length_of(result))
    lock(state)
    PyMem_Free(sources)


def runs(words, size_t start, size_t end):
    cdef Buffer buffer = words_of(words)
    cdef const bits_word *word = <bits_word *> buffer.view.buf
    cdef uint64_t total
    check_part(buffer, start, end)
    cdef PyThreadState *state = unlock((end - start) * 8)
    total = loops.runs(word, start, end)
    lock(state)
    return total


def extents(words, size_t start, size_t end, uint64_t unit, starts, lengths, size_t at, size_t behind):
    cdef Buffer buffer = words_of(words)
    cdef Buffer one = numbers_of(starts, PyBUF_WRITABLE), two = numbers_of(lengths, PyBUF_WRITABLE)
    cdef const bits_word *word = <bits_word *> buffer.view.buf
    cdef bits_number *begins = <bits_number *> one.view.buf
    cdef bits_number *sizes = <bits_number *> two.view.buf
    check_pair(one, two)
    check_part(buffer, start, end)
    check_part(one, at, behind)
    cdef PyThreadState *state = unlock((end - start) * 8 + (behind - at) * 16)
    loops.extents(word, start, end, unit, begins, sizes, at, behind)
    lock(state)


cdef int check_part(Buffer buffer, size_t start, size_t end) except -1:
    if start > end or end > length_of(buffer):
        raise IndexError(f"elements {start} to {end} where there are {length_of(buffer)}")
    return 0


def coarsen(fine, coarse, int factor):
    cdef Buffer one = words_of(fine), two = words_of(coarse, PyBUF_WRITABLE)
    cdef const bits_word *source = <bits_word *> one.view.buf
    cdef bits_word *result = <bits_word *> two.view.buf
    cdef size_t n = length_of(one)
    check_factor(one, two, factor)
    cdef PyThreadState *state = unlock(n * 8)
    loops.coarsen(source, n, result, factor)
    lock(state)


def refine(coarse, fine, int factor):
    cdef Buffer one = words_of(coarse), two = words_of(fine, PyBUF_WRITABLE)
    cdef const bits_word *source = <bits_word *> one.view.buf
    cdef bits_word *result = <bits_word *> two.view.buf
    cdef size_t n = length_of(two)
    check_factor(two, one, factor)
    cdef PyThreadState *state = unlock(n * 8)
    loops.refine(source, result, n, factor)
    lock(state)


cdef int check_factor(Buffer fine, Buffer coarse, int factor) except -1:
    if factor not in (2, 4, 8, 16, 32, 64):
        raise ValueError(f"a factor of {factor}")
    if length_of(coarse) != (length_of(fine) + factor - 1) // factor:
        raise ValueError(f"{length_of(fine)} words beside {length_of(coarse)} at a factor of {factor}")
    return 0
