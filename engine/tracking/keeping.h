/* What the keeper of a session does beside marking: the acts of SPEC.md, "Marking", that a marker has no use for. Each
 * function is one step, or one look; what comes between them, waits, stores and commits, is the caller's. Also the gate,
 * for who closes it.
 */

#ifndef DIRTMAP_KEEPING_H
#define DIRTMAP_KEEPING_H

#include "marking.h"

/* Takes the session over, or begins to keep it: 0, or DM_HELD. */
static inline int dm_keep(dm_handle *h)
{
    int r = dm_lock(h->markers_fd, F_WRLCK, DM_KEEPER);
    h->kept = !r;
    return r < 0 ? DM_HELD : r;
}

/* The swap: adds to the state, unless it refuses. The one before, or DM_NOTHING. */
static inline uint64_t dm_swap(struct dm_control *c, uint64_t add)
{
    uint64_t s = atomic_load(&c->state);
    while (!(s & 1))
        if (atomic_compare_exchange_strong(&c->state, &s, s + add)) {
            atomic_thread_fence(memory_order_seq_cst); /* plain reads of the old bits come after it */
            return s;
        }
    return DM_NOTHING;
}

/* One look whether writes of intervals before that one are in flight: how many must be waited for, or an error.
 *
 * Those that nobody will end, as the dead's where `probe`, are not: they are marked in the current interval. They stay
 * there for the next cut until this one has been committed, when dm_forget forgets them.
 */
static inline int dm_flying(dm_handle *h, uint64_t before, int probe)
{
    struct dm_control *c = h->control;
    struct dm_own *own = NULL;
    int waits = 0, r = dm_mine(h, &own);
    uint64_t high = atomic_load(&c->high), size = atomic_load(&c->size);
    for (uint64_t i = 0; i < high && i < DM_SLOTS && !r; i++) {
        struct dm_slot *slot = &c->slots[i];
        int living = 0;
        for (int k = 0; k < DM_FLIGHTS && !r; k++) {
            struct dm_flight *f = &slot->flights[k];
            uint64_t v = atomic_load(&f->interval);
            if (!v || (v & ~DM_ORPHAN) > before)
                continue;
            if (!(v & DM_ORPHAN)) {
                if (!probe || !dm_disown(h, (unsigned)i)) {
                    living++;
                    continue;
                }
            }
            uint64_t start = atomic_load_explicit(&f->start, memory_order_relaxed);
            uint64_t end = atomic_load_explicit(&f->end, memory_order_relaxed);
            end = end < size ? end : size;
            if (start < end)
                r = dm_touch(h, own, start, end - start);
        }
        waits += living;
    }
    return r ? (r > 0 ? -r - 1000 : r) : waits;
}

/* Forgets what dm_flying has marked; behind the commit of the cut. */
static inline void dm_forget(dm_handle *h, uint64_t before)
{
    uint64_t high = atomic_load(&h->control->high);
    for (uint64_t i = 0; i < high && i < DM_SLOTS; i++)
        for (int k = 0; k < DM_FLIGHTS; k++) {
            dm_word *interval = &h->control->slots[i].flights[k].interval;
            uint64_t v = atomic_load(interval);
            if (v & DM_ORPHAN && (v & ~DM_ORPHAN) <= before) {
                dm_raise(&h->control->event, dm_time(CLOCK_REALTIME_COARSE));
                atomic_store(interval, 0);
            }
        }
}

/* True if this thread has that slot. */
static inline int dm_is_own(dm_handle *h, struct dm_slot *slot)
{
    struct dm_own *own = NULL;
    if (!dm_mine(h, &own))
        while (own && own->slot != slot)
            own = own->more;
    return own != NULL;
}

/* One look whether records are being written to that log: by how many; DM_OWN if by this thread itself. */
static inline int dm_logging(dm_handle *h, uint64_t log, int probe)
{
    struct dm_control *c = h->control;
    int waits = 0;
    uint64_t high = atomic_load(&c->high);
    for (uint64_t i = 0; i < high && i < DM_SLOTS; i++) {
        if (atomic_load(&c->slots[i].logging) != log + 1)
            continue;
        if (dm_is_own(h, &c->slots[i]))
            return DM_OWN;
        waits += !probe || !dm_disown(h, (unsigned)i);
    }
    return waits;
}

/* True if a living marker may touch the buffer at that offset of `bits`. */
static inline int dm_is_seen(dm_handle *h, uint64_t offset)
{
    uint64_t high = atomic_load(&h->control->high);
    for (uint64_t i = 0; i < high && i < DM_SLOTS; i++)
        if (atomic_load(&h->control->slots[i].seen) == offset && !dm_is_free(h->probe_fd, (long long)i))
            return 1;
    return 0;
}

/* The gate, for who closes it. Any handle may. */

static inline int dm_close_gate(dm_handle *h)
{
    if (h->forked)
        return DM_FORKED;
    pthread_mutex_lock(&h->mutex);
    int r = h->closing ? DM_HELD : dm_lock(h->markers_fd, F_WRLCK, DM_GATE);
    h->closing |= !r;
    pthread_mutex_unlock(&h->mutex);
    if (r)
        return r < 0 ? DM_HELD : r;
    uint64_t gate = atomic_load(&h->control->gate), next;
    do /* a dead one's may be closed still: whoever waits for that one must not open this one */
        next = gate + 1 + (gate & 1);
    while (!atomic_compare_exchange_strong(&h->control->gate, &gate, next));
    h->closed = next;
    return 0;
}

/* One look whether a write is in flight: how many, without those that nobody will end. */
static inline int dm_all_flying(dm_handle *h)
{
    struct dm_control *c = h->control;
    int waits = 0;
    uint64_t high = atomic_load(&c->high);
    for (uint64_t i = 0; i < high && i < DM_SLOTS; i++) {
        int flying = 0;
        for (int k = 0; k < DM_FLIGHTS; k++) {
            uint64_t v = atomic_load(&c->slots[i].flights[k].interval);
            flying += v && !(v & DM_ORPHAN);
        }
        if (flying && !dm_is_free(h->probe_fd, (long long)i))
            waits += flying;
    }
    return waits;
}

/* Opens it. 1 if it was still closed, so that no write has begun since it was drained; else 0. */
static inline int dm_open_gate(dm_handle *h)
{
    uint64_t gate = h->closed;
    int held = atomic_compare_exchange_strong(&h->control->gate, &gate, gate + 1);
    pthread_mutex_lock(&h->mutex);
    dm_lock(h->markers_fd, F_UNLCK, DM_GATE);
    h->closing = 0;
    pthread_mutex_unlock(&h->mutex);
    return held;
}

#endif
