/* An nbdkit filter that marks every write in a session of dirtmap before it is made.
 *
 *   nbdkit --filter=.../nbdkit-dirtmap-filter.so file disk.raw dirtmap-session=FOLDER
 *
 * FOLDER has the live files of the disk's tracker ("live" of `dirtmap track status`). dirtmap-outlive=true lets nbdkit
 * go on when the process dies that has started it.
 *
 * A write, zero or trim is begun there, passed on, and ended, whatever became of it: one that fails stays marked. What
 * cannot be begun is not passed on, and its client gets an error. Flush and FUA go through as they are: a region's
 * record is durable before the first write into it is passed on, so that a flush has nothing to add.
 *
 * The protocol is `marking.h`'s, in which each thread of nbdkit is a marker. nbdkit must not be given a filter between
 * this one and the plugin that moves bytes to other places or changes the size of the disk.
 */

#include "marking.h"

#include <nbdkit-filter.h>
#include <signal.h>
#include <sys/prctl.h>

#define PAUSE_NS 1000000
#define PATIENCE_NS 10000000000 /* for a slot */
#define SIGN_NS 250000000
#define MOST_AT_REST 128        /* slots that threads keep between two writes; the others have some for their time alone */

static char *folder;
static int outlives;
static dm_handle *session;

/* Any number of clients. Each has threads of its own, 16 by default, and a session has slots for 512. */

static _Atomic int keepers;
static _Thread_local int keeps;
static pthread_key_t key;

static void thread_ends(void *ignored)
{
    (void)ignored;
    atomic_fetch_sub(&keepers, 1);
}

static void keep_slot(void)
{
    if (!DM_LIKELY(keeps)) {
        keeps = 1;
        atomic_fetch_add(&keepers, 1);
        pthread_setspecific(key, &keepers);
    }
}

static void rest(void)
{
    if (!DM_LIKELY(atomic_load_explicit(&keepers, memory_order_relaxed) <= MOST_AT_REST)) {
        dm_rest(session);
        keeps = 0;
        pthread_setspecific(key, NULL);
        atomic_fetch_sub(&keepers, 1);
    }
}

/* Errors. */

static const char *refusal(char *text, size_t size, int r)
{
    switch (r) {
    case DM_RANGE:
        return "the write is not inside the disk that is tracked";
    case DM_REFUSED:
        if (session && atomic_load(&session->control->reason) != DM_ENDED) {
            snprintf(text, size, "the session takes no more marks after a failed sync: %s",
                     strerror((int)atomic_load(&session->control->reason)));
            return text;
        }
        return "the session has ended";
    case DM_NO_SLOT:
        return "as many threads mark already as a session has room for";
    case DM_FOREIGN:
        return "these are no live files of this version of dirtmap, and of this machine";
    case DM_HELD:
        return "the session is being recovered";
    case DM_DAMAGED:
        return "the live files are damaged";
    default:
        return r > 0 ? strerror(r) : "marking failed";
    }
}

static void complain(const char *what, int r)
{
    char text[256];
    nbdkit_error("dirtmap session %s: %s: %s", folder, what, refusal(text, sizeof text, r));
}

static int errno_of(int r)
{
    return r == ENOSPC || r == EDQUOT ? ENOSPC : r == ENOMEM ? ENOMEM : EIO;
}

/* Begin and end. */

static int begin(uint64_t offset, uint32_t count, struct dm_flight **flight, int *err)
{
    uint64_t since = 0;
    for (;;) {
        int r = dm_begin(session, offset, count, flight);
        if (DM_LIKELY(r == 0)) {
            keep_slot();
            return 0;
        }
        if (r == DM_NO_SLOT) { /* others of this process give theirs up when their writes end */
            uint64_t now = dm_time(CLOCK_MONOTONIC);
            since = since ? since : now;
            if (now - since < PATIENCE_NS && nbdkit_nanosleep(0, PAUSE_NS) == 0)
                continue;
        }
        complain("nothing was written", r);
        *err = errno_of(r);
        return -1;
    }
}

static void end(struct dm_flight *flight)
{
    dm_end(session, flight);
    rest();
}

static int tracked_pwrite(nbdkit_next *next, void *handle, const void *buf, uint32_t count, uint64_t offset,
                          uint32_t flags, int *err)
{
    struct dm_flight *flight;
    (void)handle;
    if (begin(offset, count, &flight, err))
        return -1;
    int r = next->pwrite(next, buf, count, offset, flags, err);
    end(flight);
    return r;
}

static int tracked_zero(nbdkit_next *next, void *handle, uint32_t count, uint64_t offset, uint32_t flags, int *err)
{
    struct dm_flight *flight;
    (void)handle;
    if (begin(offset, count, &flight, err))
        return -1;
    int r = next->zero(next, count, offset, flags, err);
    end(flight);
    return r;
}

static int tracked_trim(nbdkit_next *next, void *handle, uint32_t count, uint64_t offset, uint32_t flags, int *err)
{
    struct dm_flight *flight;
    (void)handle;
    if (begin(offset, count, &flight, err))
        return -1;
    int r = next->trim(next, count, offset, flags, err);
    end(flight);
    return r;
}

/* Signs of life, where the tracker has died. */

static pthread_t living;
static int lives;
static pthread_mutex_t ending = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t ended; /* by the clock that nobody sets */

static void *live_on(void *ignored)
{
    (void)ignored;
    pthread_mutex_lock(&ending);
    while (lives) {
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += SIGN_NS;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        if (pthread_cond_timedwait(&ended, &ending, &until) == ETIMEDOUT) {
            pthread_mutex_unlock(&ending);
            dm_live_on(session); /* a failure is told to the next write, if it concerns that */
            pthread_mutex_lock(&ending);
        }
    }
    pthread_mutex_unlock(&ending);
    return NULL;
}

static int begin_to_live(void)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_condattr_t how;
    pthread_condattr_init(&how);
    pthread_condattr_setclock(&how, CLOCK_MONOTONIC);
    pthread_cond_init(&ended, &how);
    pthread_condattr_destroy(&how);
    lives = 1;
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for nbdkit's own threads */
    int r = pthread_create(&living, NULL, live_on, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (r) {
        lives = 0;
        nbdkit_error("pthread_create: %s", strerror(r));
        return -1;
    }
    return 0;
}

static void cease_to_live(void)
{
    if (!lives)
        return;
    pthread_mutex_lock(&ending);
    lives = 0;
    pthread_cond_signal(&ended);
    pthread_mutex_unlock(&ending);
    pthread_join(living, NULL);
}

/* From the command line to the first client. */

static int config(nbdkit_next_config *next, nbdkit_backend *backend, const char *name, const char *value)
{
    if (strcmp(name, "dirtmap-outlive") == 0) {
        outlives = nbdkit_parse_bool(value);
        return outlives < 0 ? -1 : 0;
    }
    if (strcmp(name, "dirtmap-session") != 0)
        return next(backend, name, value);
    free(folder);
    folder = nbdkit_realpath(value); /* nbdkit goes to another folder when it becomes a daemon */
    return folder ? 0 : -1;
}

static int config_complete(nbdkit_next_config_complete *next, nbdkit_backend *backend)
{
    if (!folder) {
        nbdkit_error("dirtmap-session=FOLDER is missing: the live files of the disk's tracker");
        return -1;
    }
    return next(backend);
}

static int attach(void)
{
    int r = dm_attach(folder, &session);
    if (r) {
        session = NULL;
        complain("cannot be used", r);
        return -1;
    }
    return 0;
}

/* Before nbdkit becomes a daemon, while its error still reaches who has started it. */
static int get_ready(int thread_model)
{
    (void)thread_model;
    if (attach())
        return -1;
    dm_detach(session);
    session = NULL;
    return 0;
}

static int after_fork(nbdkit_backend *backend)
{
    (void)backend;
    /* Some builds of nbdkit end with their parent, asked to or not (tried with Debian's 1.32.5). */
    if (outlives && prctl(PR_SET_PDEATHSIG, 0) == -1) {
        nbdkit_error("prctl: %m");
        return -1;
    }
    return attach() ? -1 : begin_to_live();
}

static int prepare(nbdkit_next *next, void *handle, int readonly)
{
    (void)handle;
    int64_t size = next->get_size(next);
    if (size < 0)
        return -1;
    uint64_t tracked = atomic_load(&session->control->size);
    if (!readonly && (uint64_t)size != tracked) {
        nbdkit_error("dirtmap session %s: a disk of %llu bytes is tracked, and this one has %lld", folder,
                     (unsigned long long)tracked, (long long)size);
        return -1;
    }
    return 0;
}

static void load(void)
{
    pthread_key_create(&key, thread_ends);
}

static void unload(void)
{
    cease_to_live();
    dm_detach(session);
    free(folder);
    pthread_key_delete(key);
}

static struct nbdkit_filter filter = {
    .name = "dirtmap",
    .longname = "dirtmap: marks what is written in dirty bitmaps",
    .load = load,
    .unload = unload,
    .config = config,
    .config_complete = config_complete,
    .config_help = "dirtmap-session=<FOLDER>  (required) The live files of the disk's tracker.\n"
                   "dirtmap-outlive=<BOOL>    Go on when the process dies that has started nbdkit.",
    .get_ready = get_ready,
    .after_fork = after_fork,
    .prepare = prepare,
    .pwrite = tracked_pwrite,
    .zero = tracked_zero,
    .trim = tracked_trim,
};

NBDKIT_REGISTER_FILTER(filter)
