# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, binding=False
"""marking.h and keeping.h for Python: marks without a Python frame, and the acts of the keeper, one step each.

What is hot keeps the interpreter's lock, which takes longer to give up than a mark does. What reaches a disk, or waits,
is done by methods of the subclass; so a signal's handler can run there, and nowhere else inside a mark.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.ref cimport PyObject
from cpython.long cimport PyLong_CheckExact
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memcpy, memset

import operator
from threading import get_ident

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object number, int *overflow) except? -1
    unsigned long PyThread_get_thread_ident() nogil
    ctypedef struct PyTypeObject:
        Py_ssize_t tp_vectorcall_offset
        unsigned long tp_flags
    unsigned long Py_TPFLAGS_HAVE_VECTORCALL
    Py_ssize_t PyVectorcall_NARGS(size_t)

cdef extern from "<fcntl.h>" nogil:
    int posix_fallocate(int fd, int64_t offset, int64_t length)
    int fallocate(int fd, int mode, int64_t offset, int64_t length)
    enum:
        FALLOC_FL_PUNCH_HOLE
        FALLOC_FL_KEEP_SIZE

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *at, size_t length, int advice)

cdef extern from "keeping.h" nogil:
    ctypedef struct dm_word:
        pass
    struct dm_flight:
        dm_word interval, thread
    struct dm_slot:
        dm_flight flights[1]
    struct dm_descriptor:
        dm_word interval, offset, granularity_bits, bytes
    struct dm_control:
        dm_word state, gate, size, recycled, high, reason
        uint64_t intent, region_bits
        uint8_t uuid[16]
        dm_descriptor descriptors[256]
        dm_slot slots[1]
        dm_word logged[2][1]
    struct dm_own:
        dm_slot *slot
    struct dm_hooks:
        int (*lock)(void *) noexcept nogil
        void (*unlock)(void *) noexcept nogil
        int (*write)(void *, const void *, size_t, uint64_t) noexcept nogil
        int (*sync)(void *) noexcept nogil
        int (*pause)(void *, long) noexcept nogil
    ctypedef struct dm_handle:
        dm_control *control
        int bits_fd, control_fd, forked
        uint64_t closed
        dm_hooks hooks
        void *context
        dm_own *owns[512]
    enum:
        DM_RANGE
        DM_REFUSED
        DM_DAMAGED
        DM_NO_SLOT
        DM_FORKED
        DM_FOREIGN
        DM_HELD
        DM_OWN
        DM_HOOK
        DM_DEAD
        DM_ORPHAN
        DM_FLIGHTS
        DM_SLOTS
        DM_REGIONS
    int dm_attach(const char *folder, dm_handle **)
    void dm_detach(dm_handle *)
    void dm_leave(dm_handle *, int at_once)
    int dm_map(dm_handle *, uint64_t end, uint8_t **)
    int dm_mark(dm_handle *, uint64_t offset, uint64_t length)
    int dm_mark_many(dm_handle *, const int64_t *, const int64_t *, size_t)
    int dm_begin(dm_handle *, uint64_t offset, uint64_t length, dm_flight **)
    void dm_end(dm_handle *, dm_flight *)
    void dm_lose(dm_handle *, dm_flight *)
    void dm_set(dm_word *, uint64_t first, uint64_t last)
    void dm_refuse(dm_control *, uint64_t why)
    void dm_sign(dm_control *, uint64_t now, uint64_t booted)
    int dm_live_on(dm_handle *)
    int dm_keep(dm_handle *)
    uint64_t dm_swap(dm_control *, uint64_t add)
    int dm_flying(dm_handle *, uint64_t before, int probe)
    void dm_forget(dm_handle *, uint64_t before)
    int dm_logging(dm_handle *, uint64_t log, int probe)
    int dm_is_seen(dm_handle *, uint64_t offset)
    int dm_close_gate(dm_handle *)
    int dm_all_flying(dm_handle *)
    int dm_open_gate(dm_handle *)
    uint64_t dm_load "atomic_load"(dm_word *)
    void dm_store "atomic_store"(dm_word *, uint64_t)
    void dm_note "atomic_store_explicit"(dm_word *, uint64_t, int)
    int memory_order_relaxed
    uint64_t dm_add "atomic_fetch_add"(dm_word *, uint64_t)
    int __builtin_popcountll(unsigned long long)

RANGE, REFUSED, DAMAGED, NO_SLOT, FORKED = DM_RANGE, DM_REFUSED, DM_DAMAGED, DM_NO_SLOT, DM_FORKED
FOREIGN, HELD, OWN, DEAD = DM_FOREIGN, DM_HELD, DM_OWN, DM_DEAD

cdef enum:
    PAGE = 4096
    POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, of Linux 5.14; older libcs do not name it


cdef int hook_lock(void *marks) noexcept with gil:
    try:
        (<Marks> marks).log_lock.acquire()
        return 0
    except BaseException as error:
        return (<Marks> marks).keep_error(error)


cdef void hook_unlock(void *marks) noexcept with gil:
    (<Marks> marks).log_lock.release()


cdef int hook_write(void *marks, const void *data, size_t length, uint64_t offset) noexcept with gil:
    try:
        (<Marks> marks)._write(offset, (<const char *> data)[:length])
        return 0
    except BaseException as error:
        return (<Marks> marks).keep_error(error)


cdef int hook_sync(void *marks) noexcept with gil:
    try:
        (<Marks> marks)._sync()
        return 0
    except BaseException as error:
        return (<Marks> marks).keep_error(error)


cdef int hook_pause(void *marks, long ns) noexcept with gil:
    try:
        (<Marks> marks)._pause(ns / 1e9)
        return 0
    except BaseException as error:
        return (<Marks> marks).keep_error(error)


cdef inline int64_t number_of(object number) except? -1:
    """A number from 0 on; -2 if it is none that a disk has."""
    cdef int over = 0
    cdef int64_t value
    if not PyLong_CheckExact(number):
        number = operator.index(number)
    value = PyLong_AsLongLongAndOverflow(number, &over)
    return -2 if over or value < 0 else value


cdef class Marks:
    """The live files of a session, attached; see marking.h.

    A subclass defines what it cannot do itself: ``_write(offset, data)``, ``_sync()``, ``_pause(seconds)``, and
    ``_fail_to_attach(code)`` and ``_fail(code, offset, length)``, which raise the error for a code of this module, or
    for an errno. Nothing else is called before it is attached.
    """

    cdef dm_handle *handle
    cdef object log_lock
    cdef dict errors
    cdef object __weakref__

    def __dealloc__(self):
        dm_detach(self.handle)

    def __reduce__(self):
        raise TypeError("live files cannot be copied")

    def attach(self, bytes folder, log_lock):
        """Attaches; ``log_lock`` is a lock that a thread may take again."""
        cdef int r
        cdef const char *at = folder
        assert self.handle == NULL
        self.log_lock, self.errors = log_lock, {}
        with nogil:
            r = dm_attach(at, &self.handle)
        if r:
            self._fail_to_attach(r)
            raise AssertionError(r)
        self.handle.hooks = dm_hooks(hook_lock, hook_unlock, hook_write, hook_sync, hook_pause)
        self.handle.context = <void *> self

    def leave(self, bint at_once):
        """Gives up all locks, with those of writes in flight when these have ended, or ``at_once``; see dm_leave."""
        if self.handle != NULL and not self.handle.forked:
            dm_leave(self.handle, at_once)

    @property
    def uuid(self):
        """Of the session, 16 bytes."""
        return bytes(self.handle.control.uuid[:16])

    cdef int keep_error(self, error) noexcept:
        self.errors[get_ident()] = error
        return DM_HOOK

    cdef int raises(self, int code, offset, length) except -1:
        if code == DM_HOOK:
            raise self.errors.pop(get_ident())
        self._fail(-1000 - code if code < -1000 else code, offset, length)
        raise AssertionError(code)

    cdef inline int require_attached(self) except -1:
        if self.handle == NULL:
            raise ValueError("not attached")
        return 0

    # Marks.

    def mark(self, offset, length):
        """Makes every granule dirty that has a byte in the range; see `Tracker.mark`."""
        cdef int64_t at = number_of(offset), count = number_of(length)
        cdef int r = DM_RANGE
        self.require_attached()
        if at >= 0 and count >= 0:
            r = dm_mark(self.handle, at, count)
        if r:
            self.raises(r, offset, length)

    def begin(self, offset, length):
        """Marks a write that is about to begin; see `Tracker.begin`."""
        cdef Ticket ticket = Ticket.__new__(Ticket)
        ticket.owner = self
        self.begins(&ticket.flight, number_of(offset), number_of(length))
        return ticket

    cdef int begins(self, dm_flight **flight, int64_t offset, int64_t length) except -1:
        cdef int r = DM_RANGE
        self.require_attached()
        if offset >= 0 and length >= 0:
            r = dm_begin(self.handle, offset, length, flight)
        if r:
            self.raises(r, offset, length)
        return 0

    def end(self, Ticket ticket not None):
        """Says that the write of that ticket has ended, successfully or not."""
        ticket.ends()

    def write(self, offset, length):
        """`begin` and `end` as a ``with`` block; see `Tracker.write`."""
        cdef Write write = Write.__new__(Write)
        write.owner = self
        write.offset = number_of(offset)
        write.length = number_of(length)
        write.called = <void *> write_called
        return write

    def mark_arrays(self, const int64_t[::1] offsets, const int64_t[::1] lengths):
        """Like `mark` for each offset and length, all or none."""
        cdef int r
        cdef size_t n = offsets.shape[0]
        cdef int64_t i
        self.require_attached()
        if offsets.shape[0] != lengths.shape[0]:
            raise ValueError("as many offsets as lengths")
        with nogil:
            r = dm_mark_many(self.handle, &offsets[0], &lengths[0], n) if n else 0
        if r == DM_RANGE:
            for i in range(offsets.shape[0]):
                if offsets[i] < 0 or lengths[i] < 0 or lengths[i] > self.size - offsets[i]:
                    self.raises(r, offsets[i], lengths[i])
        if r:
            self.raises(r, 0, 0)

    # What everybody may know.

    @property
    def interval(self):
        """The number of the current interval."""
        return dm_load(&self.handle.control.state) >> 32

    @property
    def log(self):
        """The number of the current log."""
        return (dm_load(&self.handle.control.state) & 0xffffffff) >> 1

    @property
    def refused(self):
        """Why marks are refused, see ``reason`` of the control file; None if they are not."""
        if dm_load(&self.handle.control.state) & 1:
            return dm_load(&self.handle.control.reason)
        return None

    @property
    def size(self):
        """Bytes of the disk that can be marked."""
        return dm_load(&self.handle.control.size)

    @size.setter
    def size(self, uint64_t size):
        dm_store(&self.handle.control.size, size)

    @property
    def logged(self):
        """How many regions are in the current log."""
        cdef uint64_t count = 0
        cdef int w, parity = self.log % 2
        for w in range(self.words()):
            count += __builtin_popcountll(dm_load(&self.handle.control.logged[parity][w]))
        return count

    @property
    def in_flight(self):
        """How many writes have begun and not ended, without those that nobody will end."""
        return dm_all_flying(self.handle)

    def has_own(self):
        """True if this thread is inside a `write` of its own."""
        cdef int i, k
        cdef uint64_t v, me = PyThread_get_thread_ident()
        for i in range(DM_SLOTS):
            if self.handle.owns[i] != NULL:
                for k in range(DM_FLIGHTS):
                    v = dm_load(&self.handle.owns[i].slot.flights[k].interval)
                    if v and not v & DM_ORPHAN and dm_load(&self.handle.owns[i].slot.flights[k].thread) == me:
                        return True
        return False

    # The keeper.

    def keep(self):
        """Becomes the session's keeper."""
        cdef int r = dm_keep(self.handle)
        if r:
            self.raises(r, 0, 0)

    def describe(self, uint64_t interval, uint64_t offset, uint64_t granularity_bits, uint64_t octets):
        """Says where the bits of an interval are."""
        cdef dm_descriptor *one = &self.handle.control.descriptors[interval % 256]
        dm_store(&one.offset, offset)
        dm_store(&one.granularity_bits, granularity_bits)
        dm_store(&one.bytes, octets)
        dm_store(&one.interval, interval + 1)

    def described(self, uint64_t interval):
        """Where the bits of an interval are: offset, log2 of the granularity, bytes. None if nowhere."""
        cdef dm_descriptor *one = &self.handle.control.descriptors[interval % 256]
        if dm_load(&one.interval) != interval + 1:
            return None
        return dm_load(&one.offset), dm_load(&one.granularity_bits), dm_load(&one.bytes)

    def withdraw(self, uint64_t interval):
        """Says that the bits of an interval are nowhere any more, before their buffer is used for others."""
        cdef dm_descriptor *one = &self.handle.control.descriptors[interval % 256]
        if dm_load(&one.interval) == interval + 1:
            dm_store(&one.interval, 0)
        dm_add(&self.handle.control.recycled, 1)

    def swap(self, uint64_t add):
        """Adds to the state: 2^32 begins an interval, 2 a log."""
        if dm_swap(self.handle.control, add) == <uint64_t> -1:
            self.raises(DM_REFUSED, 0, 0)

    def flying(self, uint64_t before, bint probe):
        """How many writes must be waited for that began in intervals before that one; see dm_flying."""
        cdef int r = dm_flying(self.handle, before, probe)
        if r < 0:
            self.raises(r, 0, 0)
        return r

    def forget(self, uint64_t before):
        """Forgets those that nobody will end, once the cut has been committed."""
        dm_forget(self.handle, before)

    def logging(self, uint64_t log, bint probe):
        """How many markers write to that log."""
        cdef int r = dm_logging(self.handle, log, probe)
        if r < 0:
            self.raises(r, 0, 0)
        return r

    def clear_logged(self, uint64_t log):
        """Says that no region is in that log, the next one."""
        memset(<void *> &self.handle.control.logged[log % 2][0], 0, self.words() * 8)

    cdef uint64_t words(self) noexcept:
        """Words with the bits of the disk's regions; those behind them may have no memory."""
        cdef uint64_t size = dm_load(&self.handle.control.size)
        return ((size - 1) >> self.handle.control.region_bits) // 64 + 1 if size else 0

    def is_seen(self, uint64_t offset):
        """True if a living marker may touch the buffer at that offset."""
        return bool(dm_is_seen(self.handle, offset))

    def refuse(self, uint64_t why):
        """Makes every further mark fail, in every process."""
        if not self.handle.forked:
            dm_refuse(self.handle.control, why)

    def sign(self, uint64_t now, uint64_t booted):
        """Writes a heartbeat, at that time; ``booted`` is when the machine was, by its clock. Both in ns since 1970."""
        dm_sign(self.handle.control, now, booted)

    def live_on(self):
        """Gives signs of life where the keeper is dead; to be called again and again. See dm_live_on."""
        cdef int r
        with nogil:
            r = dm_live_on(self.handle)
        if r:
            self.raises(r, 0, 0)

    # The gate.

    def close_gate(self):
        """Lets no write begin from now on, in any process."""
        cdef int r = dm_close_gate(self.handle)
        if r:
            self.raises(r, 0, 0)

    @property
    def gate_holds(self):
        """True while the gate that this one has closed is closed."""
        return dm_load(&self.handle.control.gate) == self.handle.closed

    def open_gate(self):
        """Opens it; True if nobody else had."""
        return bool(dm_open_gate(self.handle))

    # The arena.

    def reserve(self, uint64_t offset, uint64_t length):
        """Gets memory for a part of the arena, which is made longer for it, and maps all its pages."""
        cdef int r
        cdef uint8_t *bits = NULL
        cdef uint64_t at
        cdef volatile uint8_t *page
        with nogil:
            r = posix_fallocate(self.handle.bits_fd, offset, length)
            if not r:
                r = dm_map(self.handle, offset + length, &bits)
            if not r and madvise(bits + offset, length, POPULATE_WRITE):
                at = 0
                while at < length:
                    page = bits + offset + at
                    page[0]
                    at += PAGE
        if r:
            self.raises(r, 0, 0)

    def release(self, uint64_t offset, uint64_t length):
        """Gives memory of the arena back; it reads as zeros."""
        with nogil:
            fallocate(self.handle.bits_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)

    cdef uint8_t *at(self, uint64_t offset, uint64_t length) except NULL:
        cdef uint8_t *bits = NULL
        cdef int r = dm_map(self.handle, offset + length, &bits)
        if r:
            self.raises(r, 0, 0)
        return bits + offset

    def put(self, uint64_t offset, const uint8_t[::1] data):
        """Writes to the arena."""
        memcpy(self.at(offset, data.shape[0]), &data[0], data.shape[0])

    def wipe(self, uint64_t offset, uint64_t length):
        """Makes a part of the arena zeros."""
        cdef uint8_t *to = self.at(offset, length)
        with nogil:
            memset(to, 0, length)

    def set_bits(self, uint64_t offset, uint64_t start, uint64_t end):
        """Sets bits of the buffer there, from ``start`` up to ``end``."""
        if start < end:
            dm_set(<dm_word *> self.at(offset, (end + 63) // 64 * 8), start, end - 1)

    def view(self, uint64_t offset, uint64_t length):
        """A part of the arena as a buffer, read-only."""
        cdef View view = View.__new__(View)
        view.at, view.length, view.readonly, view.owner = self.at(offset, length), length, 1, self
        return view

    def head(self):
        """The control file's first page as a buffer."""
        cdef View view = View.__new__(View)
        view.at, view.length, view.readonly, view.owner = <uint8_t *> self.handle.control, PAGE, 0, self
        return view

    def reserve_logged(self, uint64_t regions):
        """Gets memory for the bits of so many regions, in both areas."""
        cdef int64_t offset = <uint8_t *> &self.handle.control.logged[0][0] - <uint8_t *> self.handle.control
        cdef int64_t length = (regions + 63) // 64 * 8
        cdef int parity, r = 0
        for parity in range(2):
            r = r or posix_fallocate(self.handle.control_fd, offset + parity * (DM_REGIONS // 8), length)
        if r:
            self.raises(r, 0, 0)


@cython.final
cdef class View:
    """Memory of `Marks`, which it keeps mapped."""

    cdef uint8_t *at
    cdef uint64_t length
    cdef int readonly
    cdef Marks owner

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.at, self.length, self.readonly, flags)


@cython.final
@cython.no_gc
@cython.freelist(64)
cdef class Ticket:
    """A write that has begun; see `Tracker.begin`. A ticket that is destroyed before its write has ended is lost."""

    cdef Marks owner
    cdef dm_flight *flight

    def __dealloc__(self):
        # At any time, in the middle of anything, and in any thread.
        if self.flight != NULL:
            dm_lose(self.owner.handle, self.flight)

    def __reduce__(self):
        raise TypeError("a write cannot be copied")

    cdef void ends(self) noexcept:
        cdef dm_flight *flight = self.flight
        if flight != NULL:
            self.flight = NULL
            dm_end(self.owner.handle, flight)

    def end(self):
        """Says that the write has ended, successfully or not. A second call does no harm."""
        self.ends()


@cython.final
cdef class Step:
    """What a ``with`` block finds as ``__enter__`` and ``__exit__`` of a `Write`: the write itself, which it then calls.

    Of methods it would make two bound ones for each block, which takes as long as a mark.
    """

    def __get__(self, write, kind):
        return self if write is None else write

    def __call__(self, write, *args):  # as `contextlib.ExitStack` does
        return write(*args)


@cython.final
@cython.no_gc
@cython.freelist(16)
cdef class Write:
    """A write in progress; see `Tracker.write`."""

    cdef Marks owner
    cdef dm_flight *flight
    cdef int64_t offset, length
    cdef bint begun
    cdef void *called

    __enter__ = Step()
    __exit__ = Step()

    def __dealloc__(self):
        if self.flight != NULL:
            dm_lose(self.owner.handle, self.flight)

    def __reduce__(self):
        raise TypeError("a write cannot be copied")

    def __call__(self, *args):
        if args:
            self.ends()
        else:
            self.begins()

    cdef int ends(self) except -1:
        cdef dm_flight *flight = self.flight
        if flight != NULL:
            self.flight = NULL
            dm_end(self.owner.handle, flight)
        return 0

    cdef int begins(self) except -1:
        if self.owner is None:
            raise TypeError("made by the write method of a tracker or a marker only")
        if self.begun:
            self.owner._fail(0, 0, 0)
        self.begun = True
        self.owner.begins(&self.flight, self.offset, self.length)
        dm_note(&self.flight.thread, PyThread_get_thread_ident(), memory_order_relaxed)
        return 0


# A `Write` that is called gets its arguments without a tuple around them, by Python's vectorcall protocol, which Cython
# knows of functions alone.
cdef object write_called(Write write, PyObject **args, size_t count, PyObject *names):
    if PyVectorcall_NARGS(count):
        write.ends()
    else:
        write.begins()
    return None


cdef Write some = Write.__new__(Write)
(<PyTypeObject *> Write).tp_vectorcall_offset = <char *> &some.called - <char *> <void *> some
(<PyTypeObject *> Write).tp_flags |= Py_TPFLAGS_HAVE_VECTORCALL
