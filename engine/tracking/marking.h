/* The marking protocol of SPEC.md, "Marking": how any thread of any process marks writes in a session's live files.
 *
 * SPEC.md has the steps, and the argument why no mark is lost; the functions below are named as there. The order of
 * accesses is part of the argument: all that is not called plain or relaxed is sequentially consistent. This is all that
 * a *marker* needs, a thread that marks: `dm_attach` once, `dm_begin` and `dm_end` around each write, `dm_live_on` at
 * times, `dm_detach`. What the session's *keeper* needs beside it is in keeping.h.
 *
 * Of libc it needs POSIX, OFD locks and fallocate. It knows no Python: what must reach a disk, and what waits, goes
 * through hooks. A handle is of one process; a forked child cannot use it. Functions return 0, an errno, or one of the
 * negative numbers below. Offsets and lengths are bytes of the disk.
 */

#ifndef DIRTMAP_MARKING_H
#define DIRTMAP_MARKING_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#define DM_MACHINE 62 /* ELF's e_machine: an emulated process of another machine has other atomics */
#elif defined(__aarch64__)
#define DM_MACHINE 183
#else
#error "marking is for x86-64 and aarch64"
#endif

enum {
    DM_RANGE = -1,     /* the range is not inside the disk; nothing is marked */
    DM_REFUSED = -2,   /* the session has ended, or a sync has failed: see `reason` in the control file */
    DM_DAMAGED = -3,   /* the live files are not as described */
    DM_NO_SLOT = -4,   /* as many threads mark as can, or as many writes are in flight */
    DM_FORKED = -5,    /* the handle is the parent's */
    DM_FOREIGN = -6,   /* no live files of this version and machine, or not of one session */
    DM_HELD = -7,      /* another process keeps the session, or has closed the gate */
    DM_OWN = -8,       /* it would wait for its own thread */
    DM_DEAD = -10,     /* nobody is left who marks in the session or keeps it; it can be recovered */
    DM_HOOK = -9,      /* a hook has failed, and says itself why; a failed sync has poisoned the session already */
};

#define DM_SLOTS 512
#define DM_FLIGHTS 28
#define DM_INTERVALS 256
#define DM_REGIONS (1u << 20)
#define DM_ORPHAN (1ull << 63)
#define DM_ENDED (1ull << 32) /* a reason that is no errno: the session has ended */
#define DM_KEEPER 4096        /* bytes of `markers` that are locked: those of slots, the keeper's, the gate's */
#define DM_GATE 4097
#define DM_LIVING ((1ll << 40) + 1) /* the byte of the log that every marker locks, shared; the keeper has the one before */
#define DM_NOTHING UINT64_MAX

typedef _Atomic uint64_t dm_word;
#define DM_LIKELY(it) __builtin_expect(!!(it), 1)
/* A processor that waits for memory looks only so many loads and stores ahead, and a call that saves and restores
 * registers takes some twenty of them. So what every mark and write does is no call, and what is rare is one. */
#define DM_HOT inline __attribute__((always_inline))
#define DM_RARE __attribute__((noinline, unused))
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && sizeof(dm_word) == 8, "words of 64 bits are atomic");

struct dm_descriptor { /* of the writeset of an interval */
    dm_word interval;  /* its number + 1; 0: none */
    dm_word offset;    /* of the bits in `bits` */
    dm_word granularity_bits;
    dm_word bytes;     /* of the bits, whole words */
};

struct dm_flight {    /* a write that has begun and not ended */
    dm_word start, end;
    dm_word interval; /* its number + 1, and DM_ORPHAN where nobody will end it; 0: the entry is free */
    dm_word thread;   /* of the process that has the slot: who alone can end it, 0: any; nobody else reads it */
};

struct dm_slot {
    dm_word seen;    /* offset in `bits` of the buffer that its marker may touch; 0: none */
    dm_word logging; /* 1 + the log that it writes records to; 0: none */
    dm_word event;   /* when its thread last ended a write, ns since 1970 */
    dm_word bare;    /* not 0: it has marked writes of whose end nobody tells */
    dm_word writes;  /* how many have begun; for people */
    dm_word reserved[11];
    struct dm_flight flights[DM_FLIGHTS];
};

struct dm_control {
    uint8_t magic[8];
    uint64_t order;
    uint32_t machine, version;
    uint8_t uuid[16];
    uint8_t image_filesystem[16];
    uint64_t image_inode, image_birth;
    uint64_t region_bits, intent;
    uint64_t reserved1[5];
    dm_word state; /* bits 63..32 interval, 31..1 log, 0 refuse; it only rises */
    dm_word gate;  /* odd: closed; it only rises */
    uint64_t reserved2[14];
    dm_word size, recycled, high, reason, heartbeat, event, clock, patience;
    uint64_t reserved3[472];
    struct dm_descriptor descriptors[DM_INTERVALS];
    char log_path[4096];
    struct dm_slot slots[DM_SLOTS];
    dm_word logged[2][DM_REGIONS / 64];
};

#define DM_AT(type, field, offset) _Static_assert(offsetof(struct type, field) == (offset), #type "." #field)
DM_AT(dm_descriptor, interval, 0);
DM_AT(dm_descriptor, offset, 8);
DM_AT(dm_descriptor, granularity_bits, 16);
DM_AT(dm_descriptor, bytes, 24);
DM_AT(dm_flight, start, 0);
DM_AT(dm_flight, end, 8);
DM_AT(dm_flight, interval, 16);
DM_AT(dm_flight, thread, 24);
DM_AT(dm_slot, seen, 0);
DM_AT(dm_slot, logging, 8);
DM_AT(dm_slot, event, 16);
DM_AT(dm_slot, bare, 24);
DM_AT(dm_slot, writes, 32);
DM_AT(dm_slot, flights, 128);
DM_AT(dm_control, magic, 0);
DM_AT(dm_control, order, 8);
DM_AT(dm_control, machine, 16);
DM_AT(dm_control, version, 20);
DM_AT(dm_control, uuid, 24);
DM_AT(dm_control, image_filesystem, 40);
DM_AT(dm_control, image_inode, 56);
DM_AT(dm_control, image_birth, 64);
DM_AT(dm_control, region_bits, 72);
DM_AT(dm_control, intent, 80);
DM_AT(dm_control, state, 128);
DM_AT(dm_control, gate, 136);
DM_AT(dm_control, size, 256);
DM_AT(dm_control, recycled, 264);
DM_AT(dm_control, high, 272);
DM_AT(dm_control, reason, 280);
DM_AT(dm_control, heartbeat, 288);
DM_AT(dm_control, event, 296);
DM_AT(dm_control, clock, 304);
DM_AT(dm_control, patience, 312);
DM_AT(dm_control, descriptors, 4096);
DM_AT(dm_control, log_path, 12288);
DM_AT(dm_control, slots, 16384);
DM_AT(dm_control, logged, 540672);
_Static_assert(sizeof(struct dm_slot) == 1024 && sizeof(struct dm_flight) == 32, "slots");
_Static_assert(sizeof(struct dm_control) == 802816, "control");

struct dm_hooks {
    int (*lock)(void *);    /* around the log: one thread of a process at a time; the same thread may take it again */
    void (*unlock)(void *);
    int (*write)(void *, const void *, size_t, uint64_t); /* to the log */
    int (*sync)(void *);
    int (*pause)(void *, long); /* so many ns */
};

struct dm_followed {     /* a state, and the bits of its interval; a value, since what is in memory is read again behind
                          * each atomic access */
    uint64_t state;
    dm_word *words;
    unsigned shift;
};

struct dm_own {          /* a slot, as the process that has it knows it; its thread alone changes it */
    struct dm_followed follows;
    uint64_t size;       /* of the disk, by that state */
    unsigned region_bits;
    unsigned hint;       /* where a free entry is likely */
    unsigned depth;      /* of *log region*, which a signal's handler can interrupt and do again */
    int bare;
    struct dm_slot *slot;
    struct dm_own *more; /* a further slot of the same thread */
    long thread;         /* that has it, which may have ended; 0: none yet. Needs the mutex */
    int first;           /* its thread's first slot */
};

typedef struct dm_handle {
    _Atomic uint64_t serial; /* of this handle alone; DM_NOTHING in a forked child */
    struct dm_control *control;
    uint8_t *bits;
    uint64_t window; /* so many bytes are mapped */
    int control_fd, bits_fd, markers_fd, probe_fd, log_fd;
    unsigned region_bits;
    int forked, kept, closing;
    _Atomic int left; /* 1: but for writes in flight; 2: wholly */
    uint64_t closed; /* the gate's number, by this handle */
    uint64_t beaten; /* when it last wrote a beat */
    unsigned beats;
    pthread_mutex_t mutex, logging;
    dm_word wanted[DM_REGIONS / 64]; /* regions that threads wait for to be logged */
    struct dm_hooks hooks;
    void *context;
    struct dm_own *owns[DM_SLOTS];
    struct { void *at; uint64_t size; } maps[64];
    unsigned nmaps;
    struct dm_handle *next;
} dm_handle;

/* Threads and processes. */

static _Thread_local struct { uint64_t serial; struct dm_own *own; } dm_cache;
static pthread_mutex_t dm_all_mutex = PTHREAD_MUTEX_INITIALIZER;
static dm_handle *dm_all;
static int dm_watched; /* forks are */

static inline long dm_thread(void)
{
    return syscall(SYS_gettid);
}

/* A thread of this process. Another one that gets its number afterwards can as well have what it had. */
static inline int dm_has_ended(long thread)
{
    return syscall(SYS_tgkill, getpid(), thread, 0) && errno == ESRCH;
}

static inline void dm_before_fork(void)
{
    pthread_mutex_lock(&dm_all_mutex);
}

static inline void dm_in_parent(void)
{
    pthread_mutex_unlock(&dm_all_mutex);
}

static inline void dm_close_files(dm_handle *h)
{
    int *fds[] = {&h->control_fd, &h->bits_fd, &h->markers_fd, &h->probe_fd, &h->log_fd};
    for (int i = 0; i < 5; i++) {
        if (*fds[i] >= 0)
            close(*fds[i]);
        *fds[i] = -1;
    }
}

static inline void dm_in_child(void)
{
    pthread_mutex_init(&dm_all_mutex, NULL);
    for (dm_handle *h = dm_all; h; h = h->next) {
        h->forked = 1;
        atomic_store(&h->serial, DM_NOTHING);
        dm_close_files(h); /* the locks are the parent's, and end with it */
        pthread_mutex_init(&h->mutex, NULL);
    }
}

static inline void dm_watch_forks(void)
{
    pthread_mutex_lock(&dm_all_mutex);
    if (!dm_watched)
        dm_watched = !pthread_atfork(dm_before_fork, dm_in_parent, dm_in_child);
    pthread_mutex_unlock(&dm_all_mutex);
}

/* Locks. -1: another process has it. The system call itself, since libc's function has another name from 2.28 on. */

static inline int dm_lock(int fd, int type, long long byte)
{
    struct flock l = {.l_type = (short)type, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
    while (syscall(SYS_fcntl, fd, F_OFD_SETLK, &l))
        if (errno != EINTR)
            return errno == EAGAIN || errno == EACCES ? -1 : errno;
    return 0;
}

static inline int dm_is_free(int fd, long long byte)
{
    struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
    return syscall(SYS_fcntl, fd, F_OFD_GETLK, &l) == 0 && l.l_type == F_UNLCK;
}

/* What the hooks do in a process without any. */

static inline int dm_lock_plainly(void *h)
{
    return pthread_mutex_lock(&((dm_handle *)h)->logging);
}

static inline void dm_unlock_plainly(void *h)
{
    pthread_mutex_unlock(&((dm_handle *)h)->logging);
}

static inline int dm_write_plainly(void *h, const void *data, size_t length, uint64_t offset)
{
    for (size_t done = 0; done < length;) {
        ssize_t n = pwrite(((dm_handle *)h)->log_fd, (const char *)data + done, length - done, (off_t)(offset + done));
        if (n < 0 && errno != EINTR)
            return errno;
        done += n > 0 ? (size_t)n : 0;
    }
    return 0;
}

static inline int dm_sync_plainly(void *h)
{
    return fdatasync(((dm_handle *)h)->log_fd) ? errno : 0;
}

static inline int dm_pause_plainly(void *h, long ns)
{
    struct timespec t = {0, ns};
    (void)h;
    nanosleep(&t, NULL);
    return 0;
}

static inline uint64_t dm_time(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline void dm_raise(dm_word *word, uint64_t value)
{
    uint64_t was = atomic_load(word);
    while (was < value && !atomic_compare_exchange_weak(word, &was, value))
        ;
}

/* Poison. */

static inline void dm_refuse(struct dm_control *c, uint64_t why)
{
    uint64_t was = atomic_load(&c->reason); /* the first stays, but a session that is ending can still be poisoned */
    while ((was == 0 || was == DM_ENDED) && was != why && !atomic_compare_exchange_strong(&c->reason, &was, why))
        ;
    atomic_fetch_or(&c->state, 1);
    atomic_thread_fence(memory_order_seq_cst); /* plain reads of the bits come after it */
}

/* Attach. */

/* Where the arena is mapped, up to that offset at least. */
static inline int dm_map(dm_handle *h, uint64_t end, uint8_t **bits)
{
    int r = 0;
    pthread_mutex_lock(&h->mutex);
    if (end > h->window) {
        /* Far more than there is, so that the file can grow without a map; as much as a process with a limit gets. */
        uint64_t least = (end + 0xffff) & ~(uint64_t)0xffff, window = least * 8 > 1ull << 30 ? least * 8 : 1ull << 30;
        void *at = MAP_FAILED;
        for (; h->nmaps < sizeof h->maps / sizeof h->maps[0] && at == MAP_FAILED && window >= least; window /= 2)
            at = mmap(NULL, window, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, h->bits_fd, 0);
        window *= 2;
        if (at == MAP_FAILED)
            r = ENOMEM;
        else {
            /* Others may still use the older ones. */
            h->maps[h->nmaps].at = at;
            h->maps[h->nmaps++].size = window;
            h->bits = at;
            h->window = window;
        }
    }
    *bits = h->bits;
    pthread_mutex_unlock(&h->mutex);
    return r;
}

static inline int dm_open_in(const char *folder, const char *name, int *fd)
{
    char path[4096 + 16];
    if (snprintf(path, sizeof path, "%s/%s", folder, name) >= (int)sizeof path)
        return ENAMETOOLONG;
    *fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    return *fd < 0 ? errno : 0;
}

/* Of a slot whose marker is dead: nobody will end what it has begun. Needs the slot's lock. */
static inline void dm_orphan(struct dm_slot *slot)
{
    for (int k = 0; k < DM_FLIGHTS; k++)
        if (atomic_load(&slot->flights[k].interval))
            atomic_fetch_or(&slot->flights[k].interval, DM_ORPHAN);
    atomic_store(&slot->logging, 0);
    atomic_store(&slot->seen, 0);
}

/* The same, if it is dead: true. */
static inline int dm_disown(dm_handle *h, unsigned slot)
{
    if (dm_lock(h->probe_fd, F_WRLCK, slot))
        return 0;
    dm_orphan(&h->control->slots[slot]);
    dm_lock(h->probe_fd, F_UNLCK, slot);
    return 1;
}

/* A slot for this process. Needs the mutex. */
static inline int dm_new_slot(dm_handle *h, struct dm_own **result)
{
    struct dm_control *c = h->control;
    for (unsigned i = 0; i < DM_SLOTS; i++) {
        if (h->owns[i])
            continue;
        int r = dm_lock(h->markers_fd, F_WRLCK, i);
        if (r < 0)
            continue;
        uint64_t high = atomic_load(&c->high);
        struct dm_own *own = r ? NULL : calloc(1, sizeof *own);
        if (!r && !own)
            r = ENOMEM;
        /* All slots below `high` have memory: a keeper that reads one never meets a hole in a tmpfs that is full. */
        if (!r && high <= i)
            r = posix_fallocate(h->control_fd, (off_t)(offsetof(struct dm_control, slots) + high * sizeof(struct dm_slot)),
                                (off_t)((i + 1 - high) * sizeof(struct dm_slot)));
        if (r) {
            free(own);
            dm_lock(h->markers_fd, F_UNLCK, i);
            return r;
        }
        own->slot = &c->slots[i];
        dm_orphan(own->slot);
        own->bare = atomic_load(&own->slot->bare) != 0;
        dm_raise(&c->high, i + 1);
        h->owns[i] = *result = own;
        return 0;
    }
    return DM_NO_SLOT;
}

static inline void dm_detach(dm_handle *h)
{
    if (!h)
        return;
    if (h->serial) {
        pthread_mutex_lock(&dm_all_mutex);
        for (dm_handle **at = &dm_all; *at; at = &(*at)->next)
            if (*at == h) {
                *at = h->next;
                break;
            }
        pthread_mutex_unlock(&dm_all_mutex);
    }
    for (int i = 0; i < DM_SLOTS; i++)
        free(h->owns[i]);
    for (unsigned i = 0; i < h->nmaps; i++)
        munmap(h->maps[i].at, h->maps[i].size);
    if (h->control)
        munmap(h->control, sizeof *h->control);
    dm_close_files(h);
    pthread_mutex_destroy(&h->mutex);
    pthread_mutex_destroy(&h->logging);
    free(h);
}

/* Gives up all locks, and so every slot. Nothing can be marked through the handle any more.
 *
 * What is in flight still counts until it has ended, and its slots stay until then; unless `at_once`, after which ends
 * mean nothing: for a session that refuses all, as any other one may give such an entry to somebody else. No other
 * thread may be inside a call of this handle, but where a hook of it waits: that call is refused then.
 */
static DM_RARE void dm_leave(dm_handle *h, int at_once)
{
    int flying = 0;
    pthread_mutex_lock(&h->mutex);
    atomic_store(&h->serial, DM_NOTHING);
    atomic_store(&h->left, 1);
    for (int i = 0; i < DM_SLOTS && !at_once; i++)
        for (int k = 0; k < DM_FLIGHTS && h->owns[i]; k++) {
            uint64_t v = atomic_load(&h->owns[i]->slot->flights[k].interval);
            flying += v && !(v & DM_ORPHAN);
        }
    if (!flying) {
        atomic_store(&h->left, 2);
        dm_close_files(h);
    }
    pthread_mutex_unlock(&h->mutex);
}

/* A handle for the session whose live files are in that folder. Its hooks may be replaced before it is used. */
static inline int dm_attach(const char *folder, dm_handle **result)
{
    static _Atomic uint64_t serials;
    static const uint8_t arena[8] = "DMLARENA", lock_file[8] = "DMLMARKS";
    uint8_t heads[3][24];
    int r;
    dm_handle *h = calloc(1, sizeof *h);
    if (!h)
        return ENOMEM;
    dm_watch_forks();
    pthread_mutex_init(&h->mutex, NULL);
    pthread_mutex_init(&h->logging, NULL);
    h->control_fd = h->bits_fd = h->markers_fd = h->probe_fd = h->log_fd = -1;
    if ((r = dm_open_in(folder, "control", &h->control_fd)) || (r = dm_open_in(folder, "bits", &h->bits_fd)) ||
        (r = dm_open_in(folder, "markers", &h->markers_fd)) || (r = dm_open_in(folder, "markers", &h->probe_fd)))
        goto failed;
    r = DM_FOREIGN;
    if (lseek(h->control_fd, 0, SEEK_END) != (off_t)sizeof *h->control)
        goto failed;
    void *at = mmap(NULL, sizeof *h->control, PROT_READ | PROT_WRITE, MAP_SHARED, h->control_fd, 0);
    if (at == MAP_FAILED) {
        r = errno;
        goto failed;
    }
    struct dm_control *c = h->control = at;
    if (memcmp(c->magic, "DMLCTRL2", 8) || c->order != 0x0102030405060708 || c->machine != DM_MACHINE ||
        c->version != 1 || c->region_bits > 63 || c->log_path[sizeof c->log_path - 1] ||
        pread(h->bits_fd, heads[0], 24, 0) != 24 || pread(h->markers_fd, heads[1], 24, 0) != 24 ||
        memcmp(heads[0], arena, 8) || memcmp(heads[1], lock_file, 8) || memcmp(heads[0] + 8, c->uuid, 16) ||
        memcmp(heads[1] + 8, c->uuid, 16))
        goto failed;
    h->region_bits = (unsigned)c->region_bits;
    h->log_fd = open(c->log_path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (h->log_fd < 0) {
        r = errno;
        goto failed;
    }
    if ((r = dm_lock(h->log_fd, F_RDLCK, DM_LIVING))) {
        r = r < 0 ? DM_HELD : r;
        goto failed;
    }
    r = DM_REFUSED;
    /* The path is that of the next session's log, too, once this one has ended. */
    if (atomic_load(&c->state) & 1 || pread(h->log_fd, heads[2], 24, 0) != 24 || memcmp(heads[2] + 8, c->uuid, 16))
        goto failed;
    /* Once nobody is left, recovery reads, and nobody may come any more. So whoever comes must have found, behind its
     * own lock, the keeper or somebody with a slot; and then gets one itself. */
    int living = !dm_is_free(h->log_fd, DM_LIVING - 1);
    for (unsigned i = 0; i < DM_SLOTS && i < atomic_load(&c->high) && !living; i++)
        living = !dm_is_free(h->probe_fd, i);
    struct dm_own *own;
    if ((r = living ? dm_new_slot(h, &own) : DM_DEAD))
        goto failed;
    h->hooks = (struct dm_hooks){dm_lock_plainly, dm_unlock_plainly, dm_write_plainly, dm_sync_plainly, dm_pause_plainly};
    h->context = h;
    pthread_mutex_lock(&dm_all_mutex);
    atomic_store(&h->serial, atomic_fetch_add(&serials, 1) + 1);
    h->next = dm_all;
    dm_all = h;
    pthread_mutex_unlock(&dm_all_mutex);
    *result = h;
    return 0;
failed:
    dm_detach(h);
    return r;
}

/* A free slot of this process's, or a new one, for this thread. */
static inline int dm_take_slot(dm_handle *h, struct dm_own **result, int first)
{
    long me = dm_thread();
    int r = 0;
    pthread_mutex_lock(&h->mutex);
    struct dm_own *own = NULL;
    for (int i = 0; i < DM_SLOTS && !own; i++)
        if (h->owns[i] && (!h->owns[i]->thread || dm_has_ended(h->owns[i]->thread)))
            own = h->owns[i];
    if (own || !(r = dm_new_slot(h, &own))) {
        own->thread = me;
        own->follows.state = DM_NOTHING;
        own->hint = own->depth = 0;
        own->more = NULL;
        own->first = first;
        *result = own;
    }
    pthread_mutex_unlock(&h->mutex);
    return r;
}

/* Why a handle cannot be used any more, or 0. */
static inline int dm_unusable(dm_handle *h)
{
    return atomic_load(&h->serial) != DM_NOTHING ? 0 : h->forked ? DM_FORKED : DM_REFUSED;
}

static DM_RARE int dm_find(dm_handle *h, struct dm_own **result)
{
    uint64_t serial = atomic_load(&h->serial);
    int r = dm_unusable(h);
    if (r)
        return r;
    struct dm_own *own = NULL;
    pthread_mutex_lock(&h->mutex);
    for (int i = 0; i < DM_SLOTS && !own; i++)
        if (h->owns[i] && h->owns[i]->thread == dm_thread() && h->owns[i]->first)
            own = h->owns[i];
    pthread_mutex_unlock(&h->mutex);
    if (!own && (r = dm_take_slot(h, &own, 1)))
        return r;
    dm_cache.serial = serial;
    dm_cache.own = *result = own;
    return 0;
}

/* The area of logged regions of a state. */
static inline dm_word *dm_logged(struct dm_control *c, uint64_t state)
{
    return c->logged[state >> 1 & 1];
}

static DM_HOT int dm_mine(dm_handle *h, struct dm_own **own)
{
    if (DM_LIKELY(dm_cache.serial == atomic_load_explicit(&h->serial, memory_order_relaxed))) {
        *own = dm_cache.own;
        return 0;
    }
    return dm_find(h, own);
}

/* Follow. */

static inline int dm_follow(dm_handle *h, struct dm_own *own)
{
    struct dm_control *c = h->control;
    for (;;) {
        uint64_t s = atomic_load(&c->state);
        if (s & 1)
            return DM_REFUSED;
        struct dm_descriptor *d = &c->descriptors[(s >> 32) % DM_INTERVALS];
        uint64_t interval = atomic_load_explicit(&d->interval, memory_order_relaxed);
        uint64_t offset = atomic_load_explicit(&d->offset, memory_order_relaxed);
        uint64_t shift = atomic_load_explicit(&d->granularity_bits, memory_order_relaxed);
        uint64_t bytes = atomic_load_explicit(&d->bytes, memory_order_relaxed);
        atomic_store(&own->slot->seen, offset);
        uint64_t size = atomic_load(&c->size);
        if (atomic_load(&c->state) != s)
            continue;
        if (interval != (s >> 32) + 1 || shift > 62 || offset % 8 || offset > INT64_MAX / 16 || bytes > INT64_MAX / 16 ||
            size > INT64_MAX || (size && ((size - 1) >> shift >= bytes * 8 || (size - 1) >> h->region_bits >= DM_REGIONS)))
            return DM_DAMAGED;
        uint8_t *bits;
        int r = dm_map(h, offset + bytes, &bits);
        if (r)
            return r;
        own->follows = (struct dm_followed){s, (dm_word *)(bits + offset), (unsigned)shift};
        own->size = size;
        own->region_bits = h->region_bits;
        return 0;
    }
}

/* Bits first..last, both inside. */

static inline uint64_t dm_mask(uint64_t word, uint64_t first, uint64_t last)
{
    return (word == first >> 6 ? DM_NOTHING << (first & 63) : DM_NOTHING) &
           (word == last >> 6 ? DM_NOTHING >> (~last & 63) : DM_NOTHING);
}

static inline int dm_have(dm_word *words, uint64_t first, uint64_t last)
{
    if (DM_LIKELY(first == last))
        return atomic_load(&words[first >> 6]) >> (first & 63) & 1;
    for (uint64_t w = first >> 6; w <= last >> 6; w++)
        if (~atomic_load(&words[w]) & dm_mask(w, first, last))
            return 0;
    return 1;
}

static DM_RARE void dm_set_many(dm_word *words, uint64_t first, uint64_t last)
{
    for (uint64_t w = first >> 6; w <= last >> 6; w++) {
        uint64_t mask = dm_mask(w, first, last);
        if (~atomic_load(&words[w]) & mask)
            atomic_fetch_or(&words[w], mask);
    }
}

static DM_HOT void dm_set(dm_word *words, uint64_t first, uint64_t last)
{
    if (DM_LIKELY(first >> 6 == last >> 6)) {
        uint64_t mask = DM_NOTHING << (first & 63) & DM_NOTHING >> (~last & 63);
        if (~atomic_load(&words[first >> 6]) & mask)
            atomic_fetch_or(&words[first >> 6], mask);
    } else
        dm_set_many(words, first, last);
}

/* Log region. */

static inline uint32_t dm_crc32c(uint32_t crc, const void *data, size_t length)
{
    crc = ~crc;
    for (const uint8_t *at = data; length--; at++) {
        crc ^= *at;
        for (int k = 0; k < 8; k++)
            crc = crc >> 1 ^ (0x82f63b78 & -(crc & 1));
    }
    return ~crc;
}

static inline void dm_big(uint8_t *to, uint64_t number, int bytes)
{
    while (bytes--) {
        to[bytes] = (uint8_t)number;
        number >>= 8;
    }
}

/* Writes the records of the regions that `need` names, in that log, and syncs them. */
static inline int dm_write_records(dm_handle *h, uint64_t log, const uint64_t *need, uint64_t regions)
{
    uint8_t seed[24], data[4096];
    memcpy(seed, h->control->uuid, 16);
    dm_big(seed + 16, log, 8);
    uint32_t crc = dm_crc32c(0, seed, 24);
    for (uint64_t r = 0; r < regions;) {
        if (!(need[r >> 6] >> (r & 63) & 1)) {
            r += need[r >> 6] >> (r & 63) ? 1 : 64 - (r & 63);
            continue;
        }
        uint64_t from = r;
        size_t length = 0;
        do { /* those of one page */
            dm_big(data + length, r, 4);
            dm_big(data + length + 4, dm_crc32c(crc, data + length, 4), 4);
            length += 8;
            r++;
        } while (r < regions && r % 512 && need[r >> 6] >> (r & 63) & 1);
        int failed = h->hooks.write(h->context, data, length, 8192 + from / 512 * 8192 + (log & 1) * 4096 + from % 512 * 8);
        if (failed)
            return failed;
    }
    int failed = h->hooks.sync(h->context);
    if (failed > 0)
        dm_refuse(h->control, (uint64_t)failed);
    return failed;
}

static inline int dm_write_tally(dm_handle *h, uint64_t log, uint64_t regions)
{
    uint8_t text[5 + 16 + 16] = "tally";
    uint64_t count = 0;
    for (uint64_t w = 0; w <= (regions - 1) >> 6; w++)
        count += (uint64_t)__builtin_popcountll(atomic_load(&h->control->logged[log & 1][w]));
    memcpy(text + 5, h->control->uuid, 16);
    dm_big(text + 21, log, 8);
    dm_big(text + 29, count, 4);
    dm_big(text + 33, dm_crc32c(0, text, 33), 4);
    return h->hooks.write(h->context, text + 21, 16, 5120 + (log & 1) * 512);
}

/* Logs the regions of these ranges in the log of the state that is followed. The caller then begins again.
 *
 * What other threads want meanwhile gathers, and whoever is next writes the records of all of it with one sync.
 */
static inline int dm_log(dm_handle *h, struct dm_own *own, const int64_t *offsets, const int64_t *lengths, size_t n)
{
    struct dm_control *c = h->control;
    uint64_t s = own->follows.state, log = (s & 0xffffffff) >> 1, regions = ((own->size - 1) >> own->region_bits) + 1;
    uint64_t *need = calloc((regions + 63) / 64, 8);
    struct dm_own *announcing = own;
    for (size_t i = 0; i < n; i++)
        if (lengths[i])
            dm_set(h->wanted, (uint64_t)offsets[i] >> h->region_bits,
                   (uint64_t)(offsets[i] + lengths[i] - 1) >> h->region_bits);
    int r = need ? h->hooks.lock(h->context) : ENOMEM;
    if (r) {
        free(need);
        return r;
    }
    /* A signal's handler that does this in the middle of the same may not take the other's announcement back. */
    for (unsigned k = own->depth++; k && !r; k--) {
        if (!announcing->more)
            r = dm_take_slot(h, &announcing->more, 0);
        announcing = announcing->more;
    }
    if (r)
        goto end;
    atomic_store(&announcing->slot->logging, log + 1);
    if (atomic_load(&c->state) == s) {
        dm_word *logged = dm_logged(c, s);
        int any = 0;
        for (uint64_t w = 0; w < (regions + 63) / 64; w++) {
            uint64_t here = dm_mask(w, 0, regions - 1); /* others may know of a larger disk already */
            if (atomic_load(&h->wanted[w]) & here)
                need[w] = atomic_fetch_and(&h->wanted[w], ~here) & here & ~atomic_load(&logged[w]);
            any |= need[w] != 0;
        }
        if (any && c->intent)
            r = dm_write_records(h, log, need, regions);
        if (!r)
            for (uint64_t w = 0; w < (regions + 63) / 64; w++)
                if (need[w])
                    atomic_fetch_or(&logged[w], need[w]);
        if (!r && any && c->intent)
            r = dm_write_tally(h, log, regions);
    }
    atomic_store(&announcing->slot->logging, 0);
end:
    own->depth--;
    h->hooks.unlock(h->context);
    free(need);
    return r;
}

/* Signs of life: recovery takes writes to the image for the session's own as long after the last one as SPEC.md says. */

#define DM_CLOCK_TOLERANCE 5000000 /* ns; two values of dm_booted differ by less, if nobody has set the clock between */
#define DM_BEAT 1000000000

/* When the machine was booted, by its clock as it is set now. */
static inline uint64_t dm_booted(void)
{
    uint64_t least = DM_NOTHING, booted = 0;
    for (int i = 0; i < 3; i++) { /* the look that was least interrupted is the most exact one */
        uint64_t before = dm_time(CLOCK_BOOTTIME), now = dm_time(CLOCK_REALTIME), took = dm_time(CLOCK_BOOTTIME) - before;
        if (took < least) {
            least = took;
            booted = now > before ? now - before : 0;
        }
    }
    return booted;
}

/* A heartbeat. If the clock was set back, times from before that mean nothing any more. */
static inline void dm_sign(struct dm_control *c, uint64_t now, uint64_t booted)
{
    uint64_t clock = atomic_load(&c->clock), high = atomic_load(&c->high);
    if (booted + DM_CLOCK_TOLERANCE < clock) {
        atomic_store(&c->event, now);
        for (uint64_t i = 0; i < high && i < DM_SLOTS; i++)
            if (atomic_load(&c->slots[i].event) > now)
                atomic_store(&c->slots[i].event, now);
    }
    atomic_store(&c->heartbeat, now);
    if (booted + DM_CLOCK_TOLERANCE < clock || clock + DM_CLOCK_TOLERANCE < booted)
        atomic_store(&c->clock, booted);
}

/* What a process that marks calls four times a second, in a thread of its own: where the keeper is dead, it gives the
 * signs of life instead, and once a second a durable one. Else a write that is under way when all die, or that the loss
 * of power meets, would look like one of others. */
static inline int dm_live_on(dm_handle *h)
{
    uint8_t beat[16] = {0};
    int r = dm_unusable(h);
    if (r || atomic_load(&h->control->state) & 1 || !dm_is_free(h->log_fd, DM_LIVING - 1))
        return r;
    uint64_t now = dm_time(CLOCK_REALTIME);
    dm_sign(h->control, now, dm_booted());
    if (now >= h->beaten && now < h->beaten + DM_BEAT)
        return 0;
    dm_big(beat, now, 8);
    dm_big(beat + 12, dm_crc32c(dm_crc32c(0, h->control->uuid, 16), beat, 12), 4);
    if ((r = h->hooks.lock(h->context)))
        return r;
    if (!(r = h->hooks.write(h->context, beat, sizeof beat, 4096 + h->beats % 2 * 512)) &&
        (r = h->hooks.sync(h->context)) > 0)
        dm_refuse(h->control, (uint64_t)r);
    h->hooks.unlock(h->context);
    h->beats += !r;
    h->beaten = r ? h->beaten : now;
    return r;
}

/* Is the range inside the disk, which may have grown since it was last looked at? */
static inline int dm_inside(dm_handle *h, struct dm_own *own, uint64_t offset, uint64_t length)
{
    if (length <= own->size && offset <= own->size - length)
        return 0;
    int r = dm_follow(h, own);
    return r ? r : length <= own->size && offset <= own->size - length ? 0 : DM_RANGE;
}

/* Steps 1 and 2 of a mark: it follows the state, the range is inside the disk, and its regions are logged. */
static DM_RARE int dm_prepare(dm_handle *h, struct dm_own *own, uint64_t offset, uint64_t length)
{
    for (;;) {
        int r;
        if (atomic_load(&h->control->state) != own->follows.state) {
            if ((r = dm_follow(h, own)))
                return r;
            continue;
        }
        if ((r = dm_inside(h, own, offset, length)))
            return r;
        if (length == 0 || dm_have(dm_logged(h->control, own->follows.state), offset >> own->region_bits,
                                   (offset + length - 1) >> own->region_bits))
            return 0;
        int64_t at = (int64_t)offset, bytes = (int64_t)length;
        if ((r = dm_log(h, own, &at, &bytes, 1)) || (r = dm_unusable(h)))
            return r;
    }
}

/* The same, where that is so already, and the range is in one region: without a call. */
static DM_HOT int dm_is_prepared(struct dm_control *c, struct dm_own *own, uint64_t state, uint64_t offset, uint64_t length)
{
    unsigned bits = own->region_bits;
    uint64_t last = offset + length - 1, region = offset >> bits;
    return DM_LIKELY(atomic_load(&c->state) == state && last < own->size && last >= offset && last >> bits == region &&
                     atomic_load(&dm_logged(c, state)[region >> 6]) >> (region & 63) & 1);
}

/* Mark, without the note that it was bare. */
static DM_HOT int dm_touch(dm_handle *h, struct dm_own *own, uint64_t offset, uint64_t length)
{
    struct dm_control *c = h->control;
    struct dm_followed s;
    int r;
    do {
        s = own->follows;
        if (!dm_is_prepared(c, own, s.state, offset, length)) {
            if ((r = dm_prepare(h, own, offset, length)) || !length)
                return r;
            s = own->follows;
        }
        dm_set(s.words, offset >> s.shift, (offset + length - 1) >> s.shift);
    } while (!DM_LIKELY(atomic_load(&c->state) == s.state));
    return 0;
}

static inline void dm_note_bare(struct dm_own *own)
{
    if (!DM_LIKELY(own->bare)) {
        own->bare = 1;
        atomic_store(&own->slot->bare, 1);
    }
}

/* Mark: every granule that has a byte in the range. It is right only where no cut falls between it and the write's end. */
static DM_HOT int dm_mark(dm_handle *h, uint64_t offset, uint64_t length)
{
    struct dm_own *own;
    int r = dm_mine(h, &own);
    if (!DM_LIKELY(r == 0))
        return r;
    dm_note_bare(own);
    return dm_touch(h, own, offset, length);
}

/* Mark many; all ranges are checked before the first is marked. */
static inline int dm_mark_many(dm_handle *h, const int64_t *offsets, const int64_t *lengths, size_t n)
{
    enum { BLOCK = 1024, AHEAD = 16 };
    struct dm_own *own;
    int r = dm_mine(h, &own);
    if (r || (r = dm_prepare(h, own, 0, 0)))
        return r;
    for (size_t i = 0; i < n; i++)
        if (offsets[i] < 0 || lengths[i] < 0 || (r = dm_inside(h, own, (uint64_t)offsets[i], (uint64_t)lengths[i])))
            return r ? r : DM_RANGE;
    dm_note_bare(own);
    for (size_t from = 0; from < n;) {
        size_t count = n - from < BLOCK ? n - from : BLOCK;
        const int64_t *o = offsets + from, *l = lengths + from;
        size_t i = 0;
        if ((r = dm_prepare(h, own, 0, 0)))
            return r;
        struct dm_followed s = own->follows;
        for (dm_word *logged = dm_logged(h->control, s.state); i < count; i++) {
            uint64_t first = (uint64_t)o[i], last = (uint64_t)(o[i] + l[i] - 1);
            if (i + AHEAD < count)
                __builtin_prefetch((const void *)&s.words[(uint64_t)o[i + AHEAD] >> s.shift >> 6], 1);
            if (!l[i])
                continue;
            if (!dm_have(logged, first >> own->region_bits, last >> own->region_bits))
                break;
            dm_set(s.words, first >> s.shift, last >> s.shift);
        }
        /* Those that are missing in one sync. */
        if (i < count && ((r = dm_log(h, own, o + i, l + i, count - i)) || (r = dm_unusable(h))))
            return r;
        if (i == count && atomic_load(&h->control->state) == s.state)
            from += count;
    }
    return 0;
}

/* The gate, for who waits. `*since`: when this begin began to wait, 0: not yet. */

static inline int dm_wait_gate(dm_handle *h, uint64_t *since)
{
    struct dm_control *c = h->control;
    uint64_t now = dm_time(CLOCK_MONOTONIC), patience = atomic_load(&c->patience);
    *since = *since ? *since : now;
    for (unsigned turn = 1;; turn++) {
        uint64_t gate = atomic_load(&c->gate);
        if (!(gate & 1) || atomic_load(&c->state) & 1)
            return 0;
        int late = now - *since >= patience;
        if (late || (turn % 16 == 0 && dm_is_free(h->probe_fd, DM_GATE))) {
            atomic_compare_exchange_strong(&c->gate, &gate, gate + 1);
            continue;
        }
        int r = h->hooks.pause(h->context, 100000);
        if (r)
            return r;
        now = dm_time(CLOCK_MONOTONIC);
    }
}

/* Begin, and end. */

static inline int dm_entry_elsewhere(dm_handle *h, struct dm_own *own, struct dm_flight **entry)
{
    for (int r;; own = own->more) {
        for (unsigned i = 0; i < DM_FLIGHTS; i++) {
            struct dm_flight *f = &own->slot->flights[(own->hint + i) % DM_FLIGHTS];
            if (!atomic_load(&f->interval)) {
                own->hint = (own->hint + i) % DM_FLIGHTS;
                *entry = f;
                return 0;
            }
        }
        if (!own->more && (r = dm_take_slot(h, &own->more, 0)))
            return r;
    }
}

/* Steps 2b to 4 of a begin: 1 where the write has begun; else its entry is free again. */
static DM_HOT int dm_enter(struct dm_control *c, struct dm_followed s, struct dm_slot *slot, struct dm_flight *f,
                           uint64_t offset, uint64_t length, uint64_t *gate)
{
    atomic_store_explicit(&f->start, offset, memory_order_relaxed);
    atomic_store_explicit(&f->end, offset + length, memory_order_relaxed);
    atomic_store_explicit(&f->thread, 0, memory_order_relaxed);
    atomic_store(&f->interval, (s.state >> 32) + 1);
    if (length)
        dm_set(s.words, offset >> s.shift, (offset + length - 1) >> s.shift);
    *gate = atomic_load(&c->gate);
    if (DM_LIKELY(atomic_load(&c->state) == s.state && !(*gate & 1))) {
        uint64_t writes = atomic_load_explicit(&slot->writes, memory_order_relaxed);
        atomic_store_explicit(&slot->writes, writes + 1, memory_order_relaxed);
        return 1;
    }
    atomic_store(&f->interval, 0);
    return 0;
}

/* Begin, whatever is in its way. */
static DM_RARE int dm_begin_slowly(dm_handle *h, uint64_t offset, uint64_t length, struct dm_flight **flight, int wait)
{
    struct dm_own *own;
    uint64_t since = 0, gate;
    int r = dm_mine(h, &own);
    if (r)
        return r;
    for (;;) {
        if ((r = dm_prepare(h, own, offset, length)))
            return r;
        struct dm_flight *f = &own->slot->flights[own->hint];
        if (atomic_load_explicit(&f->interval, memory_order_acquire) && (r = dm_entry_elsewhere(h, own, &f)))
            return r;
        if (dm_enter(h->control, own->follows, own->slot, f, offset, length, &gate)) {
            *flight = f;
            return 0;
        }
        if (gate & 1 && ((r = wait ? dm_wait_gate(h, &since) : EAGAIN) || (r = dm_unusable(h))))
            return r;
    }
}

/* Begins a write: marks its range, and lets every later cut wait for `dm_end`.
 *
 * A thread that waits at the gate cannot end other writes for which the gate waits. So one that has several in flight
 * does not wait, but gets EAGAIN where the gate is closed, and tries again later.
 */
static DM_HOT int dm_begin_how(dm_handle *h, uint64_t offset, uint64_t length, struct dm_flight **flight, int wait)
{
    if (DM_LIKELY(dm_cache.serial == atomic_load_explicit(&h->serial, memory_order_relaxed))) {
        struct dm_control *c = h->control;
        struct dm_own *own = dm_cache.own;
        struct dm_followed s = own->follows;
        uint64_t gate;
        /* The store of the entry lets no load pass. So what is not in the cache is asked for before it. */
        __builtin_prefetch((const void *)((uintptr_t)s.words + (offset >> s.shift >> 6 << 3)), 1);
        if (dm_is_prepared(c, own, s.state, offset, length)) {
            struct dm_slot *slot = own->slot;
            struct dm_flight *f = &slot->flights[own->hint];
            if (DM_LIKELY(atomic_load_explicit(&f->interval, memory_order_acquire) == 0) &&
                dm_enter(c, s, slot, f, offset, length, &gate)) {
                *flight = f;
                return 0;
            }
        }
    }
    return dm_begin_slowly(h, offset, length, flight, wait);
}

static DM_HOT int dm_begin(dm_handle *h, uint64_t offset, uint64_t length, struct dm_flight **flight)
{
    return dm_begin_how(h, offset, length, flight, 1);
}

static inline int dm_try_begin(dm_handle *h, uint64_t offset, uint64_t length, struct dm_flight **flight)
{
    return dm_begin_how(h, offset, length, flight, 0);
}

/* Notes when a write ended, for a thread without a slot: 0 where its end means nothing any more. */
static DM_RARE int dm_note_end(dm_handle *h, uint64_t now)
{
    if (h->forked || h->left == 2)
        return 0;
    dm_raise(&h->control->event, now);
    return 1;
}

/* Ends a write, in any thread of the process; once. */
static DM_HOT void dm_end(dm_handle *h, struct dm_flight *flight)
{
    uint64_t now = dm_time(CLOCK_REALTIME_COARSE);
    if (DM_LIKELY(dm_cache.serial == atomic_load_explicit(&h->serial, memory_order_relaxed)))
        atomic_store_explicit(&dm_cache.own->slot->event, now, memory_order_relaxed); /* one writer: it never goes back */
    else if (!dm_note_end(h, now))
        return;
    atomic_store_explicit(&flight->interval, 0, memory_order_release);
    if (!DM_LIKELY(!h->left))
        dm_leave(h, 0);
}

/* Says that nobody will end it: a cut marks it in the interval that it begins, and does not wait. */
static inline void dm_lose(dm_handle *h, struct dm_flight *flight)
{
    if (h->forked || h->left == 2)
        return;
    atomic_fetch_or(&flight->interval, DM_ORPHAN);
    if (h->left)
        dm_leave(h, 0);
}

/* Threads that mark for a while, and more of them than there are slots. */

/* Leaves this thread's slots to the others of its process; its next write takes one anew. Nothing of it is in flight. */
static inline void dm_rest(dm_handle *h)
{
    long me = dm_thread();
    pthread_mutex_lock(&h->mutex);
    for (int i = 0; i < DM_SLOTS; i++)
        if (h->owns[i] && h->owns[i]->thread == me)
            h->owns[i]->thread = 0;
    pthread_mutex_unlock(&h->mutex);
    dm_cache.serial = 0;
}

#endif
