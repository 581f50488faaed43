/* Sessions for the marking protocol made by hand, what it must keep to, and how long a mark takes.
 *
 *   marking check FOLDER          0, or says what is wrong
 *   marking bench FOLDER TIB      lines "NAME NS" and "NAME, again NS", of a disk of so many TiB at 64 KiB
 *   marking writes FOLDER FILE    the same of writes to a file of 1 GiB, without marks, with them, and without again
 *
 * Compiled with PLAIN it takes the same steps without any atomicity: wrong, and for the bench alone.
 */

#define _GNU_SOURCE
#ifdef PLAIN
#include <stdatomic.h>
#include <stdint.h>
#undef atomic_load
#undef atomic_store
#undef atomic_fetch_or
#define atomic_load(at) atomic_load_explicit(at, memory_order_relaxed)
#define atomic_store(at, value) atomic_store_explicit(at, value, memory_order_relaxed)
#define atomic_fetch_or(at, value) (*(volatile uint64_t *)(at) |= (value))
#endif
#include "keeping.h"

#include <signal.h>
#include <sys/wait.h>

#define REQUIRE(it)                                                                                                    \
    do {                                                                                                               \
        if (!(it)) {                                                                                                   \
            fprintf(stderr, "line %d: %s\n", __LINE__, #it);                                                           \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)
#define PAGE 4096

static const char *folder;
static uint64_t size, shift = 16, bytes;
static uint64_t buffers; /* how many the arena has */
static int keepers_log = -1; /* with its lock */

static uint64_t buffer(uint64_t i)
{
    return PAGE + i * (bytes + PAGE) + PAGE;
}

static void make(const char *name, const void *head, size_t length, uint64_t size)
{
    char path[PAGE];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    unlink(path);
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
    REQUIRE(fd >= 0 && ftruncate(fd, (off_t)size) == 0 && pwrite(fd, head, length, 0) == (ssize_t)length);
    close(fd);
}

static void describe(struct dm_control *c, uint64_t interval, uint64_t at)
{
    struct dm_descriptor *d = &c->descriptors[interval % DM_INTERVALS];
    d->offset = buffer(at);
    d->granularity_bits = shift;
    d->bytes = bytes;
    d->interval = interval + 1;
}

static void begin_session(uint64_t disk, uint64_t count)
{
    static struct dm_control c;
    struct { uint8_t magic[8], uuid[16]; } head = {"", {7}};
    size = disk;
    bytes = (((size - 1) >> shift) / 64 + 1) * 8;
    buffers = count;
    memset(&c, 0, sizeof c);
    memcpy(c.magic, "DMLCTRL2", 8);
    c.order = 0x0102030405060708;
    c.machine = DM_MACHINE;
    c.version = 1;
    memcpy(c.uuid, head.uuid, 16);
    c.intent = 1;
    for (c.region_bits = 20; size >> c.region_bits > 2048;)
        c.region_bits++;
    c.size = size;
    c.patience = 10000000000;
    snprintf(c.log_path, sizeof c.log_path, "%s/log", folder);
    describe(&c, 0, 0);
    make("control", &c, offsetof(struct dm_control, slots), sizeof c);
    memcpy(head.magic, "DMLARENA", 8);
    make("bits", &head, sizeof head, buffer(buffers));
    memcpy(head.magic, "DMLMARKS", 8);
    make("markers", &head, sizeof head, PAGE);
    struct { uint8_t before[8], uuid[16]; } log_head = {"", {7}};
    make("log", &log_head, sizeof log_head, 1 << 20);
    close(keepers_log);
    REQUIRE((keepers_log = open(c.log_path, O_RDWR)) >= 0 && dm_lock(keepers_log, F_WRLCK, DM_LIVING - 1) == 0);
}

static dm_handle *attach(void)
{
    dm_handle *h;
    REQUIRE(dm_attach(folder, &h) == 0);
    return h;
}

static int is_set(dm_handle *h, uint64_t at, uint64_t offset)
{
    uint8_t *bits;
    REQUIRE(dm_map(h, buffer(buffers), &bits) == 0);
    return bits[buffer(at) + (offset >> shift) / 8] >> (offset >> shift) % 8 & 1;
}

static uint64_t count_in(dm_handle *h, uint64_t at)
{
    uint64_t n = 0;
    for (uint64_t offset = 0; offset < size; offset += 1ull << shift)
        n += (uint64_t)is_set(h, at, offset);
    return n;
}

static void cut(dm_handle *h, uint64_t interval, uint64_t at)
{
    describe(h->control, interval, at);
    REQUIRE(dm_swap(h->control, 1ull << 32) != DM_NOTHING);
}

static void *begin_in_thread(void *h)
{
    static struct dm_flight *f;
    REQUIRE(dm_begin(h, 3 << 16, 1, &f) == 0);
    return f;
}

/* Runs it in a child that is killed then. */
static void killed(void (*act)(dm_handle *))
{
    int status;
    pid_t pid = fork();
    if (pid == 0) {
        act(attach());
        kill(getpid(), SIGKILL);
    }
    REQUIRE(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

static void begin_two(dm_handle *h)
{
    struct dm_flight *f;
    REQUIRE(dm_begin(h, 10 << 16, 1 << 16, &f) == 0);
    REQUIRE(dm_begin(h, 20 << 16, 1 << 16, &f) == 0);
}

static void close_the_gate(dm_handle *h)
{
    REQUIRE(dm_close_gate(h) == 0);
}

static void check(void)
{
    struct dm_flight *f, *more[3 * DM_FLIGHTS];
    begin_session(1 << 30, 8);
    dm_handle *h = attach();
    REQUIRE(dm_keep(h) == 0);

    /* Marks. */
    REQUIRE(dm_mark(h, size, 1) == DM_RANGE && dm_mark(h, 0, size + 1) == DM_RANGE && dm_mark(h, DM_NOTHING, 2) == DM_RANGE);
    REQUIRE(dm_mark(h, size, 0) == 0 && count_in(h, 0) == 0);
    REQUIRE(dm_mark(h, 65535, 2) == 0 && count_in(h, 0) == 2);
    REQUIRE(dm_mark(h, 0, size) == 0 && count_in(h, 0) == size >> 16);
    int64_t offsets[] = {0, 1 << 20, 5}, lengths[] = {1, 0, 1 << 29};
    cut(h, 1, 1);
    lengths[1] = (int64_t)size;
    REQUIRE(dm_mark_many(h, offsets, lengths, 3) == DM_RANGE && count_in(h, 1) == 0);
    lengths[1] = 0;
    REQUIRE(dm_mark_many(h, offsets, lengths, 3) == 0 && count_in(h, 1) == (1 << 13) + 1);

    /* Flights: a cut waits for those of the intervals before. */
    REQUIRE(dm_begin(h, 1 << 16, 1, &f) == 0 && dm_flying(h, 1, 1) == 0 && dm_flying(h, 2, 1) == 1);
    cut(h, 2, 2);
    REQUIRE(dm_flying(h, 2, 1) == 1);
    dm_end(h, f);
    REQUIRE(dm_flying(h, 2, 1) == 0 && count_in(h, 2) == 0);
    for (int i = 0; i < 3 * DM_FLIGHTS; i++)
        REQUIRE(dm_begin(h, (uint64_t)i << 16, 1, &more[i]) == 0);
    REQUIRE(dm_flying(h, 3, 1) == 3 * DM_FLIGHTS && atomic_load(&h->control->high) == 3);
    for (int i = 0; i < 3 * DM_FLIGHTS; i++)
        dm_end(h, more[i]);
    REQUIRE(dm_flying(h, 3, 1) == 0);

    /* One that nobody will end is in the new interval as well; so is what a thread left that another one ends. */
    REQUIRE(dm_begin(h, 7 << 16, 1, &f) == 0);
    dm_lose(h, f);
    pthread_t thread;
    void *left;
    REQUIRE(pthread_create(&thread, NULL, begin_in_thread, h) == 0 && pthread_join(thread, &left) == 0);
    cut(h, 3, 3);
    REQUIRE(dm_flying(h, 3, 1) == 1 && is_set(h, 3, 7 << 16) && count_in(h, 3) == 1);
    dm_end(h, left);
    REQUIRE(dm_flying(h, 3, 1) == 0);
    dm_forget(h, 3);

    /* The dead. */
    killed(begin_two);
    cut(h, 4, 4);
    REQUIRE(dm_flying(h, 4, 0) == 2 && dm_flying(h, 4, 1) == 0);
    REQUIRE(is_set(h, 4, 10 << 16) && is_set(h, 4, 20 << 16) && count_in(h, 4) == 2);
    cut(h, 5, 5); /* the keeper may have died before it committed; so the next cut marks them, too */
    REQUIRE(dm_flying(h, 5, 0) == 0 && count_in(h, 5) == 2);
    dm_forget(h, 5);
    cut(h, 6, 6);
    REQUIRE(dm_flying(h, 6, 0) == 0 && count_in(h, 6) == 0);
    killed(begin_two);
    killed(begin_two); /* in the same slot */
    REQUIRE(dm_flying(h, 7, 0) == 2);
    cut(h, 7, 7);
    REQUIRE(dm_flying(h, 7, 1) == 0 && count_in(h, 7) == 2);

    /* The gate. */
    REQUIRE(dm_close_gate(h) == 0 && dm_close_gate(h) == DM_HELD && dm_all_flying(h) == 0);
    REQUIRE(dm_mark(h, 0, 1) == 0); /* a bare mark passes */
    REQUIRE(dm_try_begin(h, 0, 1, &f) == EAGAIN && dm_all_flying(h) == 0);
    atomic_store(&h->control->patience, 1000000);
    REQUIRE(dm_begin(h, 0, 1, &f) == 0); /* waits no longer than that, and then it does not hold */
    REQUIRE(dm_open_gate(h) == 0 && dm_close_gate(h) == 0 && dm_all_flying(h) == 1);
    dm_end(h, f);
    REQUIRE(dm_all_flying(h) == 0 && dm_open_gate(h) == 1);
    atomic_store(&h->control->patience, 3600 * 1000000000ull);
    killed(close_the_gate);
    REQUIRE(atomic_load(&h->control->gate) & 1 && dm_begin(h, 0, 1, &f) == 0);
    REQUIRE(!(atomic_load(&h->control->gate) & 1));
    dm_end(h, f);

    /* Signs of life are the keeper's, while it lives; then a marker's, with a beat a second. */
    uint8_t beats[2][16];
    REQUIRE(dm_live_on(h) == 0 && atomic_load(&h->control->heartbeat) == 0);
    REQUIRE(dm_lock(keepers_log, F_UNLCK, DM_LIVING - 1) == 0);
    atomic_store(&h->control->event, DM_NOTHING); /* the clock was set back since */
    atomic_store(&h->control->clock, DM_NOTHING);
    for (int i = 0; i < 2; i++) {
        uint64_t before = dm_time(CLOCK_REALTIME);
        h->beaten = 0;
        REQUIRE(dm_live_on(h) == 0 && dm_live_on(h) == 0);
        REQUIRE(atomic_load(&h->control->heartbeat) >= before && atomic_load(&h->control->event) <= dm_time(CLOCK_REALTIME));
        REQUIRE(pread(keepers_log, beats[i], 16, 4096 + i * 512) == 16 && beats[i][0]);
    }
    REQUIRE(memcmp(beats[0], beats[1], 8) < 0 && h->beats == 2 && atomic_load(&h->control->clock) < DM_NOTHING);
    REQUIRE(dm_lock(keepers_log, F_WRLCK, DM_LIVING - 1) == 0);

    /* Another keeper; a child; the end. */
    dm_handle *other = attach();
    REQUIRE(dm_keep(other) == DM_HELD);
    dm_detach(other);
    pid_t pid = fork();
    int status;
    if (pid == 0)
        _exit(dm_mark(h, 0, 1) == DM_FORKED ? 0 : 1);
    REQUIRE(waitpid(pid, &status, 0) == pid && status == 0);
    dm_refuse(h->control, EIO);
    REQUIRE(dm_mark(h, 0, 1) == DM_REFUSED && dm_swap(h->control, 2) == DM_NOTHING);
    REQUIRE(dm_attach(folder, &other) == DM_REFUSED);
    dm_detach(h);
}

/* The bench: random writes of 4 KiB, and the same in a plain loop over the same bits. Each run has writes of its own, to
 * a clean disk, and then the same again, which finds all bits set. */

static uint64_t *plan;
enum { N = 1 << 20, ROUNDS = 9 };

static int by_size(const void *a, const void *b)
{
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

static void flat(dm_handle *h)
{
    uint64_t *words = (uint64_t *)(h->bits + buffer(0));
    for (int i = 0; i < N; i++) {
        uint64_t first = plan[i] >> 16, last = (plan[i] + 4095) >> 16;
        for (uint64_t at = first; at <= last; at++)
            words[at >> 6] |= 1ull << (at & 63);
        __asm__ volatile("" ::: "memory");
    }
}

static void marks(dm_handle *h)
{
    for (int i = 0; i < N; i++)
        REQUIRE(dm_mark(h, plan[i], 4096) == 0);
}

static void writes(dm_handle *h)
{
    struct dm_flight *f;
    for (int i = 0; i < N; i++) {
        REQUIRE(dm_begin(h, plan[i], 4096, &f) == 0);
        dm_end(h, f);
    }
}

static void many(dm_handle *h)
{
    static int64_t lengths[N];
    for (int i = 0; i < N && !lengths[i]; i++)
        lengths[i] = 4096;
    REQUIRE(dm_mark_many(h, (int64_t *)plan, lengths, N) == 0);
}

static void bench(uint64_t tib)
{
    static const struct { const char *name; void (*run)(dm_handle *); } runs[] = {
        {"flat loop", flat}, {"mark", marks}, {"begin and end", writes}, {"mark many", many}};
    enum { RUNS = sizeof runs / sizeof runs[0] };
    double times[RUNS][2][ROUNDS];
    begin_session(tib << 40, 1);
    dm_handle *h = attach();
    REQUIRE(dm_mark(h, 0, size) == 0); /* all regions are logged, and all pages mapped */
    plan = malloc(N * sizeof *plan);
    uint64_t x = 88172645463325252;
    for (int round = 0; round < ROUNDS; round++)
        for (int j = 0; j < RUNS; j++) {
            int k = (j + round) % RUNS;
            for (int i = 0; i < N; i++) {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                plan[i] = x % (size / 512 - 8) * 512;
            }
            memset(h->bits + buffer(0), 0, bytes);
            for (int again = 0; again < 2; again++) {
                uint64_t start = dm_time(CLOCK_PROCESS_CPUTIME_ID);
                runs[k].run(h);
                times[k][again][round] = (double)(dm_time(CLOCK_PROCESS_CPUTIME_ID) - start) / N;
            }
        }
    for (int k = 0; k < RUNS; k++)
        for (int again = 0; again < 2; again++) {
            qsort(times[k][again], ROUNDS, sizeof(double), by_size);
            printf("%s%s %.1f\n", runs[k].name, again ? ", again" : "", times[k][again][ROUNDS / 2]);
        }
    dm_detach(h);
}

/* Random writes of 4 KiB to a file, as a server's data path makes them. */
static void writes_to(const char *path)
{
    static const char *names[] = {"without marks", "with marks", "without marks, again"};
    static char data[4096];
    enum { WRITES = 1 << 16 };
    double times[3][ROUNDS];
    struct dm_flight *f;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    REQUIRE(fd >= 0);
    begin_session(1 << 30, 1);
    dm_handle *h = attach();
    REQUIRE(dm_mark(h, 0, size) == 0);
    uint64_t x = 88172645463325252;
    for (int round = 0; round < ROUNDS; round++)
        for (int k = 0; k < 3; k++) {
            int which = (k + round) % 3;
            uint64_t start = dm_time(CLOCK_MONOTONIC);
            for (int i = 0; i < WRITES; i++) {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                uint64_t at = x % (size / 4096) * 4096;
                if (which == 1)
                    REQUIRE(dm_begin(h, at, 4096, &f) == 0);
                REQUIRE(pwrite(fd, data, 4096, (off_t)at) == 4096);
                if (which == 1)
                    dm_end(h, f);
            }
            times[which][round] = (double)(dm_time(CLOCK_MONOTONIC) - start) / WRITES;
        }
    for (int k = 0; k < 3; k++) {
        qsort(times[k], ROUNDS, sizeof(double), by_size);
        printf("%s %.1f\n", names[k], times[k][ROUNDS / 2]);
    }
    dm_detach(h);
}

int main(int argc, char **argv)
{
    REQUIRE(argc > 2);
    folder = argv[2];
    if (!strcmp(argv[1], "check"))
        check();
    else if (!strcmp(argv[1], "writes"))
        writes_to(argv[3]);
    else
        bench((uint64_t)atoi(argv[3]));
    return 0;
}
