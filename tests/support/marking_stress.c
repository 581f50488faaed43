/* A stress of the marking protocol: markers, a keeper and one who closes the gate, all killed at random.
 *
 *   marking_stress FOLDER SEED processes KILLS    each in a process of its own
 *   marking_stress FOLDER SEED threads CUTS       all in one process, and nobody is killed; for ThreadSanitizer
 *
 * Markers write to a disk, which is an array in shared memory: a counter for each granule. Each cut is followed by an
 * incremental backup, which copies the granules that are dirty in the window that has ended. From then on, whatever
 * differs between the disk and the chain of backups must be dirty in the new window, in its saved bits or its writesets,
 * and after a loss of power by its saved bits or the logs that count. What a marker had begun to write when it was killed
 * may reach the disk later, after one more cut at most.
 *
 * What a sync of the log has made durable is an array, too. The store is a record in two copies, and which of them counts
 * is one atomic word: so a commit has happened or not, whenever the keeper dies.
 *
 * Prints how much it has done, one line "NAME NUMBER" each; says on standard error what is wrong, and then exits with 1.
 */

#define _GNU_SOURCE
#include <inttypes.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>

/* Every access to a word may be the one at which another thread or process comes first. */
static _Thread_local uint64_t lot = 1;
static int jitter = 1;

static uint64_t draw(void)
{
    lot ^= lot << 13;
    lot ^= lot >> 7;
    lot ^= lot << 17;
    return lot * 0x2545f4914f6cdd1d >> 11;
}

static void stumble(void)
{
    uint64_t n = jitter ? draw() % 1024 : 1023;
    if (n < 2)
        usleep((useconds_t)(draw() % 200));
    else if (n < 24)
        sched_yield();
}

#undef atomic_load
#undef atomic_store
#undef atomic_fetch_or
#define atomic_load(at) (stumble(), atomic_load_explicit(at, memory_order_seq_cst))
#define atomic_store(at, value) (stumble(), atomic_store_explicit(at, value, memory_order_seq_cst))
#define atomic_fetch_or(at, value) (stumble(), atomic_fetch_or_explicit(at, value, memory_order_seq_cst))
#include "keeping.h"

#include <signal.h>
#include <sys/wait.h>

enum {
    SHIFT = 12,
    REGION_SHIFT = 16,
    GRANULES = 512,
    REGIONS = GRANULES >> (REGION_SHIFT - SHIFT),
    WORDS = GRANULES / 64,
    BUFFERS = 64,
    PAGE = 4096,
    MARKERS = 4,
    THREADS = 2, /* of a marker's process */
    OPEN = 3,    /* writes of a thread that are in flight at once */
    UNSAVED = 24 /* intervals */
};
#define LANDED (1ull << 63) /* in a granule: what a dead marker had sent on has come there last */

struct store { /* the record of a store that counts */
    uint64_t oldest, log, began;
    uint64_t saved[WORDS]; /* of the window that is open */
    uint64_t todo[WORDS];  /* what the next backup copies */
};

static struct shared {
    struct store copies[2];
    _Atomic uint64_t which;
    _Atomic uint64_t disk[GRANULES];
    uint64_t backup[GRANULES];
    _Atomic uint64_t durable[2][REGIONS];
    _Atomic uint64_t version, cuts, saves, writes, holds, held, adoptions;
    _Atomic uint64_t late; /* the last cut, when the marker died whose writes have not landed yet */
    _Atomic uint64_t pending[MARKERS][THREADS][OPEN]; /* what a marker is about to write: first granule, and the last */
    _Atomic int stop, wrong;
    char what[256];
} *all;

static const char *folder;

static void fail(const char *format, uint64_t a, uint64_t b, uint64_t c)
{
    int none = 0;
    if (atomic_compare_exchange_strong(&all->wrong, &none, 1)) {
        snprintf(all->what, sizeof all->what, format, a, b, c);
        atomic_store(&all->wrong, 2);
    }
    atomic_store(&all->stop, 1);
}

static void must(int result, const char *what)
{
    if (result) {
        fprintf(stderr, "%s: %d\n", what, result);
        fail("an act has failed: %" PRIu64, (uint64_t)(int64_t)result, 0, 0);
        _exit(3);
    }
}

/* The session. */

static uint64_t buffer(uint64_t i)
{
    return PAGE + i * 2 * PAGE + PAGE;
}

static void make(const char *name, const void *head, size_t length, uint64_t size)
{
    char path[PAGE];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
    must(fd < 0 || ftruncate(fd, (off_t)size) || pwrite(fd, head, length, 0) != (ssize_t)length, name);
    close(fd);
}

static void describe(struct dm_control *c, uint64_t interval, uint64_t at)
{
    struct dm_descriptor *d = &c->descriptors[interval % DM_INTERVALS];
    atomic_store_explicit(&d->offset, buffer(at), memory_order_relaxed);
    atomic_store_explicit(&d->granularity_bits, SHIFT, memory_order_relaxed);
    atomic_store_explicit(&d->bytes, WORDS * 8, memory_order_relaxed);
    atomic_store_explicit(&d->interval, interval + 1, memory_order_relaxed);
}

static void begin_session(void)
{
    static struct dm_control c;
    struct { uint8_t magic[8], uuid[16]; } head = {"", {7}};
    memcpy(c.magic, "DMLCTRL2", 8);
    c.order = 0x0102030405060708;
    c.machine = DM_MACHINE;
    c.version = 1;
    memcpy(c.uuid, head.uuid, 16);
    c.intent = 1;
    c.region_bits = REGION_SHIFT;
    c.size = (uint64_t)GRANULES << SHIFT;
    c.patience = 20000000;
    snprintf(c.log_path, sizeof c.log_path, "%s/log", folder);
    describe(&c, 0, 0);
    make("control", &c, sizeof c, sizeof c);
    memcpy(head.magic, "DMLARENA", 8);
    make("bits", &head, sizeof head, buffer(BUFFERS));
    memcpy(head.magic, "DMLMARKS", 8);
    make("markers", &head, sizeof head, PAGE);
    memcpy(head.magic, "DML\xfb\0\0\0\1", 8);
    make("log", &head, sizeof head, 1 << 16);
    /* Whoever attaches must find somebody who lives, and all may be dead for a moment. */
    int fd = open(c.log_path, O_RDWR | O_CLOEXEC);
    must(fd < 0 || dm_lock(fd, F_WRLCK, DM_LIVING - 1), "lock the log");
}

/* The log of a process: what was written becomes durable with the sync of the same thread. */

static _Thread_local struct { uint64_t region, value; int parity; } written[REGIONS];
static _Thread_local unsigned written_count;

static int write_log(void *h, const void *data, size_t length, uint64_t offset)
{
    uint64_t page = offset / PAGE - 2, first = page / 2 * 512 + offset % PAGE / 8;
    if (offset >= 2 * PAGE)
        for (size_t i = 0; i < length / 8; i++) {
            memcpy(&written[written_count].value, (const char *)data + 8 * i, 8);
            written[written_count].region = first + i;
            written[written_count++].parity = (int)(page & 1);
        }
    stumble();
    return dm_write_plainly(h, data, length, offset);
}

static int sync_log(void *h)
{
    (void)h;
    if (jitter)
        usleep((useconds_t)(draw() % 300));
    while (written_count) {
        written_count--;
        atomic_store(&all->durable[written[written_count].parity][written[written_count].region],
                     written[written_count].value);
    }
    return 0;
}

static int is_logged(dm_handle *h, uint64_t log, uint64_t region)
{
    uint8_t bytes[24], record[8];
    uint64_t there;
    memcpy(bytes, h->control->uuid, 16);
    dm_big(bytes + 16, log, 8);
    uint32_t crc = dm_crc32c(0, bytes, 24);
    dm_big(record, region, 4);
    dm_big(record + 4, dm_crc32c(crc, record, 4), 4);
    there = atomic_load(&all->durable[log & 1][region]);
    return !memcmp(record, &there, 8);
}

static dm_handle *attach(void)
{
    dm_handle *h;
    int r = dm_attach(folder, &h);
    must(r, "attach");
    h->hooks.write = write_log;
    h->hooks.sync = sync_log;
    return h;
}

/* A marker. */

static void write_to(uint64_t first, uint64_t last, uint64_t tag)
{
    for (uint64_t g = first; g <= last; g++)
        atomic_store(&all->disk[g], (atomic_fetch_add(&all->version, 1) + 1) | tag);
}

struct marker { dm_handle *h; int process, thread; uint64_t seed, turns; };
struct open { struct dm_flight *flight; uint64_t first, last; };

/* Makes a write that has begun, and ends it. */
static void end_one(const struct marker *me, const struct open *open, int at)
{
    write_to(open->first, open->last, 0);
    atomic_store(&all->pending[me->process][me->thread][at], 0);
    dm_end(me->h, open->flight);
    atomic_fetch_add_explicit(&all->writes, 1, memory_order_relaxed);
}

static void *mark(void *argument)
{
    struct marker me = *(struct marker *)argument;
    struct open open[OPEN];
    int count = 0;
    lot = me.seed | 1;
    for (uint64_t turn = 0; turn < me.turns && !atomic_load_explicit(&all->stop, memory_order_relaxed); turn++) {
        uint64_t what = draw() % 16, first = draw() % GRANULES, last = first + draw() % (draw() % 8 ? 3 : 40);
        if (jitter && draw() % 2)
            usleep((useconds_t)(draw() % 400)); /* else all bits are soon set, and a lost one is not noticed */
        last = last < GRANULES ? last : GRANULES - 1;
        uint64_t from = (first << SHIFT) + draw() % (1 << SHIFT), end = (last + 1) << SHIFT;
        if (what == 0)
            must(dm_mark(me.h, from, end - from), "mark");
        else if (what == 1) {
            int64_t offsets[3] = {(int64_t)from, 0, (int64_t)(last << SHIFT)}, lengths[3] = {1, 0, 1};
            must(dm_mark_many(me.h, offsets, lengths, 3), "mark many");
        } else if (count < OPEN && what < 9) {
            _Atomic uint64_t *pending = &all->pending[me.process][me.thread][count];
            open[count].first = first;
            open[count].last = last;
            /* Who has writes in flight must not wait at the gate, which may wait for them. */
            int r = (count ? dm_try_begin : dm_begin)(me.h, from, end - from, &open[count].flight);
            if (r == EAGAIN) {
                count--;
                end_one(&me, &open[count], count);
                continue;
            }
            must(r, "begin");
            atomic_store(pending, (first << 32 | last) + 1);
            count++;
        } else if (count) {
            count--;
            end_one(&me, &open[count], count);
        }
    }
    while (count) {
        count--;
        end_one(&me, &open[count], count);
    }
    return NULL;
}

/* What a dead marker had sent on comes to the disk now. */
static void land(int process)
{
    for (int t = 0; t < THREADS; t++)
        for (int i = 0; i < OPEN; i++) {
            uint64_t range = atomic_load(&all->pending[process][t][i]);
            if (range--)
                write_to(range >> 32, range & 0xffffffff, LANDED);
            atomic_store(&all->pending[process][t][i], 0);
        }
}

/* The keeper. */

static struct store *store(void)
{
    return &all->copies[atomic_load(&all->which)];
}

static void commit(const struct store *changed)
{
    uint64_t other = !atomic_load(&all->which);
    all->copies[other] = *changed;
    atomic_store(&all->which, other);
}

static dm_word *bits(dm_handle *h, uint64_t interval)
{
    uint8_t *at;
    struct dm_descriptor *d = &h->control->descriptors[interval % DM_INTERVALS];
    if (atomic_load(&d->interval) != interval + 1)
        fail("interval %" PRIu64 " has no descriptor", interval, 0, 0);
    must(dm_map(h, atomic_load(&d->offset) + WORDS * 8, &at), "map");
    return (dm_word *)(at + atomic_load(&d->offset));
}

static void add(dm_handle *h, uint64_t *to, uint64_t from, uint64_t end)
{
    for (uint64_t i = from; i < end; i++) {
        dm_word *words = bits(h, i);
        for (int w = 0; w < WORDS; w++)
            to[w] |= atomic_load_explicit(&words[w], memory_order_relaxed);
    }
}

static uint64_t larger(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static int has(const uint64_t *words, uint64_t g)
{
    return words[g / 64] >> g % 64 & 1;
}

/* What differs from the backups must be told by what is left, whatever dies now. */
static void check(dm_handle *h)
{
    struct store now = *store();
    for (uint64_t g = 0; g < GRANULES; g++) {
        uint64_t is = atomic_load(&all->disk[g]);
        if (is == all->backup[g])
            continue;
        uint64_t found[WORDS], interval = atomic_load(&h->control->state) >> 32;
        memcpy(found, now.saved, sizeof found);
        add(h, found, larger(now.began, now.oldest), interval + 1);
        if (!has(found, g) && !has(now.todo, g))
            fail("granule %" PRIu64 " was written and is not dirty from interval %" PRIu64 " on, in %" PRIu64, g, now.began,
                 interval);
        uint64_t region = g >> (REGION_SHIFT - SHIFT);
        if (!has(now.saved, g) && !has(now.todo, g) && !is_logged(h, now.log, region) &&
            !is_logged(h, now.log + 1, region))
            fail("granule %" PRIu64 " was written and is neither saved nor logged, log %" PRIu64 ", state's %" PRIu64, g,
                 now.log, (atomic_load(&h->control->state) & 0xffffffff) >> 1);
    }
}

static void backup(void)
{
    struct store changed = *store();
    for (uint64_t g = 0; g < GRANULES; g++)
        if (has(changed.todo, g))
            all->backup[g] = atomic_load(&all->disk[g]);
    memset(changed.todo, 0, sizeof changed.todo);
    commit(&changed);
}

static uint64_t free_buffer(dm_handle *h, uint64_t oldest, uint64_t current)
{
    for (uint64_t at = draw() % BUFFERS, tries = 0; tries < BUFFERS; at = (at + 1) % BUFFERS, tries++) {
        int used = 0;
        for (uint64_t i = oldest; i <= current; i++)
            used |= atomic_load(&h->control->descriptors[i % DM_INTERVALS].offset) == buffer(at);
        if (!used && !dm_is_seen(h, buffer(at)))
            return at;
    }
    fail("no buffer is free", 0, 0, 0);
    return 0;
}

static void cut(dm_handle *h)
{
    struct dm_control *c = h->control;
    uint64_t state = atomic_load(&c->state), new = (state >> 32) + 1;
    while (atomic_load(&all->late) < store()->began && !atomic_load(&all->stop))
        usleep(50); /* a dead marker's writes are under way for one more cut, and no longer */
    uint64_t at = free_buffer(h, store()->oldest, new - 1);
    atomic_fetch_add(&c->recycled, 1);
    describe(c, new, at);
    dm_word *words = bits(h, new);
    for (int w = 0; w < WORDS; w++)
        atomic_store_explicit(&words[w], 0, memory_order_relaxed);
    if (dm_swap(c, 1ull << 32) == DM_NOTHING)
        fail("refused", 0, 0, 0);
    int waits;
    for (uint64_t turn = 0; (waits = dm_flying(h, new, turn % 8 == 7)) > 0; turn++)
        usleep(20);
    if (waits)
        fail("wait: %" PRIu64, (uint64_t)-waits, 0, 0);
    struct store changed = *store();
    for (int w = 0; w < WORDS; w++)
        changed.todo[w] |= changed.saved[w];
    add(h, changed.todo, larger(changed.began, changed.oldest), new);
    memset(changed.saved, 0, sizeof changed.saved);
    changed.began = new;
    commit(&changed);
    dm_forget(h, new);
    backup();
    atomic_fetch_add(&all->cuts, 1);
    check(h);
}

static void save(dm_handle *h)
{
    struct dm_control *c = h->control;
    uint64_t log = (atomic_load(&c->state) & 0xffffffff) >> 1;
    struct store changed = *store();
    if (changed.log == log) {
        int waits;
        for (uint64_t turn = 0; log && (waits = dm_logging(h, log - 1, turn % 8 == 7)); turn++) {
            if (waits < 0)
                fail("wait for records: %" PRIu64, (uint64_t)-waits, 0, 0);
            usleep(20);
        }
        atomic_store_explicit(&c->logged[(log + 1) & 1][0], 0, memory_order_relaxed); /* no region is elsewhere */
        if (dm_swap(c, 2) == DM_NOTHING)
            fail("refused", 0, 0, 0);
        log++;
    } else if (changed.log + 1 != log)
        fail("the store's log is %" PRIu64 ", the state's %" PRIu64, changed.log, log, 0);
    uint64_t current = atomic_load(&c->state) >> 32, oldest = changed.oldest;
    add(h, changed.saved, larger(changed.began, oldest), current + 1);
    changed.oldest = current;
    changed.log = log;
    stumble();
    commit(&changed);
    for (uint64_t i = oldest; i < current; i++)
        atomic_store(&c->descriptors[i % DM_INTERVALS].interval, 0);
    atomic_fetch_add(&c->recycled, 1);
    atomic_fetch_add(&all->saves, 1);
    check(h);
}

static void *keep(void *argument)
{
    struct marker me = *(struct marker *)argument;
    lot = me.seed | 1;
    int r;
    while ((r = dm_keep(me.h)) == DM_HELD)
        usleep(100);
    must(r, "keep");
    atomic_fetch_add(&all->adoptions, 1);
    backup(); /* a predecessor may have died before it had copied all */
    check(me.h);
    while (!atomic_load_explicit(&all->stop, memory_order_relaxed)) {
        uint64_t current = atomic_load(&me.h->control->state) >> 32;
        if (draw() % 3 == 0 || current - store()->oldest > UNSAVED)
            save(me.h);
        else
            cut(me.h);
        if (jitter)
            usleep((useconds_t)(draw() % 500));
    }
    return NULL;
}

/* Who closes the gate: while nothing is in flight, the disk stays as it is. */
static void *hold(void *argument)
{
    struct marker me = *(struct marker *)argument;
    lot = me.seed | 1;
    while (!atomic_load_explicit(&all->stop, memory_order_relaxed)) {
        uint64_t before[GRANULES], other = 0, at = 0;
        int r = dm_close_gate(me.h);
        if (r == DM_HELD)
            continue;
        must(r, "close the gate");
        while (dm_all_flying(me.h) && !atomic_load_explicit(&all->stop, memory_order_relaxed))
            usleep(20);
        int drained = !atomic_load(&all->stop);
        for (int g = 0; g < GRANULES; g++)
            before[g] = atomic_load(&all->disk[g]);
        usleep((useconds_t)(draw() % (draw() % 16 ? 1000 : 30000)));
        for (uint64_t g = 0; g < GRANULES; g++) {
            uint64_t is = atomic_load(&all->disk[g]);
            if (is != before[g] && !(is & LANDED)) {
                other = 1;
                at = g;
            }
        }
        int held = dm_open_gate(me.h);
        if (held && other && drained)
            fail("granule %" PRIu64 " was written while the gate was closed, and who closed it is not told", at, 0, 0);
        atomic_fetch_add(&all->holds, 1);
        atomic_fetch_add(&all->held, (uint64_t)held);
        usleep((useconds_t)(draw() % 2000));
    }
    return NULL;
}

/* Processes. */

typedef void *act(void *);

static pid_t start(int who, uint64_t seed)
{
    pid_t pid = fork();
    if (pid)
        return pid;
    lot = seed | 1;
    dm_handle *h = attach();
    pthread_t thread;
    struct marker me[THREADS] = {{h, who, 0, draw(), UINT64_MAX}, {h, who, 1, 0, 0}};
    if (who < MARKERS) {
        must(pthread_create(&thread, NULL, mark, &me[0]), "thread");
        while (!atomic_load(&all->stop)) { /* threads come and go, and use each other's slots */
            pthread_t other;
            me[1].seed = draw();
            me[1].turns = draw() % 200;
            must(pthread_create(&other, NULL, mark, &me[1]), "thread");
            pthread_join(other, NULL);
        }
        pthread_join(thread, NULL);
    } else
        (who == MARKERS ? keep : hold)(&me[0]);
    _exit(0);
}

static uint64_t run_processes(uint64_t enough)
{
    enum { ALL = MARKERS + 2 };
    pid_t pids[ALL];
    uint64_t kills = 0;
    int status, died = 0;
    for (int i = 0; i < ALL; i++)
        pids[i] = start(i, draw());
    while (kills < enough && !atomic_load(&all->stop) && !died) {
        usleep((useconds_t)(draw() % 6000));
        uint64_t lucky = draw() % 16;
        int who = lucky < 10 ? (int)(lucky % MARKERS) : lucky < 14 ? MARKERS : MARKERS + 1;
        if (who < MARKERS)
            atomic_store(&all->late, store()->began);
        kill(pids[who], SIGKILL);
        if (waitpid(pids[who], &status, 0) != pids[who] || !WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
            died = 1;
        kills++;
        if (who < MARKERS) {
            usleep((useconds_t)(draw() % 3000));
            land(who);
            atomic_store(&all->late, DM_NOTHING);
        }
        pids[who] = start(who, draw());
    }
    atomic_store(&all->stop, 1);
    for (int i = 0; i < ALL; i++) {
        usleep(1000);
        if (i < MARKERS + 1)
            kill(pids[i], SIGKILL);
        waitpid(pids[i], &status, 0);
    }
    if (died)
        fail("a process has ended by itself", 0, 0, 0);
    for (int i = 0; i < MARKERS; i++)
        land(i);
    return kills;
}

static void run_threads(uint64_t enough)
{
    enum { ALL = MARKERS + 2 };
    pthread_t threads[ALL];
    struct marker them[ALL];
    dm_handle *h = attach();
    for (int i = 0; i < ALL; i++) {
        them[i] = (struct marker){h, i, 0, draw(), UINT64_MAX}; /* one mapping: ThreadSanitizer knows memory by its address */
        must(pthread_create(&threads[i], NULL, i < MARKERS ? mark : i == MARKERS ? keep : hold, &them[i]), "thread");
    }
    while (atomic_load(&all->cuts) < enough && !atomic_load(&all->stop))
        usleep(1000);
    atomic_store(&all->stop, 1);
    for (int i = 0; i < ALL; i++)
        pthread_join(threads[i], NULL);
    dm_detach(h);
}

int main(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    folder = argv[1];
    lot = strtoull(argv[2], NULL, 10) * 2 + 1;
    all = mmap(NULL, sizeof *all, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED)
        return 2;
    atomic_store(&all->late, DM_NOTHING);
    begin_session();
    uint64_t kills = 0, enough = strtoull(argv[4], NULL, 10);
    if (!strcmp(argv[3], "threads"))
        run_threads(enough);
    else
        kills = run_processes(enough);
    if (!atomic_load(&all->wrong)) { /* the last one out */
        jitter = 0;
        dm_handle *h = attach();
        must(dm_keep(h), "keep");
        backup();
        check(h);
        dm_detach(h);
    }
    if (atomic_load(&all->wrong)) {
        fprintf(stderr, "%s\n", all->what);
        return 1;
    }
    printf("kills %" PRIu64 "\nkeepers %" PRIu64 "\nwrites %" PRIu64 "\ncuts %" PRIu64 "\nsaves %" PRIu64 "\nholds %" PRIu64
           "\nheld %" PRIu64 "\n",
           kills, atomic_load(&all->adoptions), atomic_load(&all->writes), atomic_load(&all->cuts), atomic_load(&all->saves),
           atomic_load(&all->holds), atomic_load(&all->held));
    return 0;
}
