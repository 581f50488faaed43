/* The inner loops of dirtmap.engine.model.bits, on packed little-endian 64-bit words; see there for the structure.
 *
 * Nothing here allocates, raises or knows Python. What a function may touch is given by lengths that its caller has
 * checked, and is not exceeded even if another thread changes the input meanwhile: then the result is wrong, and the
 * memory behind it is not. Words and numbers may lie at any address.
 *
 * Each loop is written once, in an inline function, and compiled for up to three levels of x86-64, of which the
 * processor's own is chosen when it runs; elsewhere there is one level, the compiler's. A level is there only for loops
 * that it makes faster, which tests/bench/bench_bitmap.py shows.
 */

#ifndef DIRTMAP_BITS_H
#define DIRTMAP_BITS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed bits are little-endian, and so must the machine be"
#endif

typedef uint64_t bits_word __attribute__((aligned(1), may_alias));
typedef int64_t bits_number __attribute__((aligned(1), may_alias));

#define BITS_ALL UINT64_MAX
#define BITS_INLINE static inline __attribute__((always_inline))

enum { BITS_OR, BITS_AND, BITS_AND_NOT, BITS_XOR };

/* Levels. */

#if defined(__x86_64__)
#include <immintrin.h>
/* Every processor since 2013 (Intel) or 2015 (AMD). */
#define BITS_FOR_V3 __attribute__((target("avx2,bmi,bmi2,lzcnt,popcnt")))
/* Ice Lake, Zen 4, and what came after: they count the bits of eight words at once, and list those of one. */
#define BITS_FOR_V4 __attribute__((target("avx2,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512vpopcntdq")))
#endif

/* The highest level that this processor has, from 0. */
static inline int bits_best_level(void)
{
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("bmi") || !__builtin_cpu_supports("bmi2") ||
        !__builtin_cpu_supports("popcnt"))
        return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512vbmi2") || !__builtin_cpu_supports("avx512vpopcntdq"))
        return 1;
    return 2;
#else
    return 0;
#endif
}

/* One range. Bits first..last, both inside. */

BITS_INLINE uint64_t bits_head(uint64_t first)
{
    return BITS_ALL << (first & 63);
}

BITS_INLINE uint64_t bits_tail(uint64_t last)
{
    return BITS_ALL >> (~last & 63);
}

BITS_INLINE void bits_set_range(bits_word *words, uint64_t first, uint64_t last)
{
    uint64_t begin = first >> 6, end = last >> 6;
    if (begin == end) {
        words[begin] |= bits_head(first) & bits_tail(last);
        return;
    }
    words[begin] |= bits_head(first);
    if (end - begin > 1)
        memset((void *)(words + begin + 1), 0xff, (end - begin - 1) * 8);
    words[end] |= bits_tail(last);
}

BITS_INLINE void bits_clear_range(bits_word *words, uint64_t first, uint64_t last)
{
    uint64_t begin = first >> 6, end = last >> 6;
    if (begin == end) {
        words[begin] &= ~(bits_head(first) & bits_tail(last));
        return;
    }
    words[begin] &= ~bits_head(first);
    if (end - begin > 1)
        memset((void *)(words + begin + 1), 0, (end - begin - 1) * 8);
    words[end] &= ~bits_tail(last);
}

/* Many ranges, in bytes of a disk or in bits. */

/* The first range that is not inside 0..size, or n. No sum or difference overflows. */
static inline size_t bits_first_outside(const bits_number *offsets, const bits_number *lengths, size_t n, int64_t size)
{
    for (size_t i = 0; i < n; i++) {
        int64_t offset = offsets[i], length = lengths[i];
        if ((offset < 0) | (length < 0) | (length > size) || offset > size - length)
            return i;
    }
    return n;
}

/* Sets the granules of each range offsets[i], lengths[i]; if `to_last`, of offsets[i]..lengths[i], both inside.
 *
 * A million ranges that each cover the disk must not take the time of a million disks. So the words that ranges cover
 * beside their first are counted, and it stops before there are more than `budget`. Returns how many ranges are done.
 */
BITS_INLINE size_t bits_mark_body(bits_word *words, uint64_t nbits, const bits_number *offsets,
                                  const bits_number *lengths, size_t n, int shift, uint64_t budget, const int to_last)
{
    /* The first word of the range that is so far ahead is fetched, which takes about as long as the marks between. */
    enum { AHEAD = 16 };
    for (size_t i = 0; i < n; i++) {
        if (i + AHEAD < n)
            __builtin_prefetch((void *)((uintptr_t)words + ((uint64_t)offsets[i + AHEAD] >> shift >> 6 << 3)), 1);
        uint64_t first = offsets[i], last = lengths[i];
        if (!to_last) {
            if (!last)
                continue;
            last += first - 1;
        }
        first >>= shift;
        last >>= shift;
        if (last >= nbits || first > last)
            continue; /* another thread has changed the input since it was checked */
        uint64_t more = (last >> 6) - (first >> 6);
        if (more > budget)
            return i;
        budget -= more;
        bits_set_range(words, first, last);
    }
    return n;
}

static inline size_t bits_mark_ranges(bits_word *words, uint64_t nbits, const bits_number *offsets,
                                      const bits_number *lengths, size_t n, int shift, uint64_t budget)
{
    return bits_mark_body(words, nbits, offsets, lengths, n, shift, budget, 0);
}

static inline size_t bits_scatter(bits_word *words, uint64_t nbits, const bits_number *firsts,
                                  const bits_number *lasts, size_t n, uint64_t budget)
{
    return bits_mark_body(words, nbits, firsts, lasts, n, 0, budget, 1);
}

/* Counting and combining. */

BITS_INLINE uint64_t bits_count_body(const uint8_t *data, size_t size)
{
    const bits_word *words = (const bits_word *)data;
    uint64_t total = 0, rest = 0;
#pragma GCC unroll 8
    for (size_t i = 0; i < size / 8; i++)
        total += __builtin_popcountll(words[i]);
    memcpy(&rest, data + size / 8 * 8, size % 8);
    return total + __builtin_popcountll(rest);
}

BITS_INLINE uint64_t bits_apply(uint64_t a, uint64_t b, int how)
{
    return how == BITS_OR ? a | b : how == BITS_AND ? a & b : how == BITS_AND_NOT ? a & ~b : a ^ b;
}

BITS_INLINE uint64_t bits_combine_as(const bits_word *a, const bits_word *b, bits_word *into, size_t n, int how)
{
    uint64_t total = 0;
#pragma GCC ivdep
    for (size_t i = 0; i < n; i++) {
        uint64_t word = bits_apply(a[i], b[i], how);
        into[i] = word;
        total += __builtin_popcountll(word);
    }
    return total;
}

BITS_INLINE uint64_t bits_combine_body(const bits_word *a, const bits_word *b, bits_word *into, size_t n, int how)
{
    switch (how) {
    case BITS_OR:
        return bits_combine_as(a, b, into, n, BITS_OR);
    case BITS_AND:
        return bits_combine_as(a, b, into, n, BITS_AND);
    case BITS_AND_NOT:
        return bits_combine_as(a, b, into, n, BITS_AND_NOT);
    default:
        return bits_combine_as(a, b, into, n, BITS_XOR);
    }
}

/* ORs several arrays of `length` words. Blocks without a bit are not written: they are clear in `into` already.
 *
 * Five arrays at a time, so that what they have together is loaded and stored less often; where fewer are left, the last
 * one fills the places.
 */
static inline void bits_union(const bits_word *const *parts, size_t count, bits_word *into, size_t length)
{
    enum { BLOCK = 512, SOME = 5 };
    for (size_t at = 0; at < length; at += BLOCK) {
        uint64_t block[BLOCK] = {0}, any = 0;
        size_t n = length - at < BLOCK ? length - at : BLOCK;
        for (size_t k = 0; k < count; k += SOME) {
            const bits_word *part[SOME];
            for (size_t j = 0; j < SOME; j++)
                part[j] = parts[k + j < count ? k + j : count - 1] + at;
            for (size_t i = 0; i < n; i++)
                block[i] |= part[0][i] | part[1][i] | part[2][i] | part[3][i] | part[4][i];
        }
        for (size_t i = 0; i < n; i++)
            any |= block[i];
        if (any)
            memcpy((void *)(into + at), block, n * 8);
    }
}

/* Whether all bytes are the one that is given. It looks at blocks, so it stops early. */
static inline int bits_all(const uint8_t *data, size_t size, uint8_t octet)
{
    const bits_word *words = (const bits_word *)data;
    uint64_t wanted = octet * UINT64_C(0x0101010101010101);
    size_t i = 0;
    for (; i + 64 <= size / 8; i += 64) {
        uint64_t differs = 0;
        for (size_t k = 0; k < 64; k++)
            differs |= words[i + k] ^ wanted;
        if (differs)
            return 0;
    }
    for (i *= 8; i < size; i++)
        if (data[i] != octet)
            return 0;
    return 1;
}

/* What all bits of each `per` words are: 0 or 1; -1 where they differ; most that differ do so in the first word. */
static inline void bits_uniform(const bits_word *words, size_t per, size_t count, bits_number *kinds)
{
    for (size_t k = 0; k < count; k++, words += per) {
        uint64_t first = words[0];
        int same = (first == 0 || first == BITS_ALL) && bits_all((const uint8_t *)words, per * 8, (uint8_t)first);
        kinds[k] = same ? (int64_t)(first & 1) : -1;
    }
}

/* Runs. A run begins at a set bit behind a clear one, and ends at a clear bit behind a set one. */

/* How many runs begin in words[from..to]. */
BITS_INLINE uint64_t bits_runs_body(const bits_word *words, size_t from, size_t to)
{
    uint64_t total = 0;
    if (from < to && from == 0) {
        total = __builtin_popcountll(words[0] & ~(words[0] << 1));
        from = 1;
    }
#pragma GCC unroll 8
    for (size_t i = from; i < to; i++)
        total += __builtin_popcountll(words[i] & ~(words[i] << 1 | words[i - 1] >> 63));
    return total;
}

/* The runs that begin in one word: `begins` has where, `ends` where they end, but for the last if it goes on. Puts them
 * at place `at`, starts and lengths in units of `unit`, and returns the place behind. `base` is the word's first bit.
 *
 * It writes some numbers more than there are, as long as there is room: to find out costs more.
 */
BITS_INLINE size_t bits_append_slowly(bits_number *starts, bits_number *lengths, size_t at, size_t end,
                                      uint64_t begins, uint64_t ends, uint64_t base, uint64_t unit)
{
    for (; begins && at < end; at++) {
        /* No end is left: its length is written when it is known, so any number will do. */
        uint64_t first = __builtin_ctzll(begins), behind = __builtin_ctzll(ends | UINT64_C(1) << 63);
        starts[at] = (base + first) * unit;
        lengths[at] = (behind - first) * unit;
        begins &= begins - 1;
        ends &= ends - 1;
    }
    return at;
}

BITS_INLINE size_t bits_append(bits_number *starts, bits_number *lengths, size_t at, size_t end, uint64_t begins,
                               uint64_t ends, uint64_t base, uint64_t unit)
{
    size_t behind_all = at + __builtin_popcountll(begins);
    if (behind_all + 3 > end)
        return bits_append_slowly(starts, lengths, at, end, begins, ends, base, unit);
    for (; at < behind_all; at += 4)
        for (size_t k = 0; k < 4; k++) {
            uint64_t first = __builtin_ctzll(begins | UINT64_C(1) << 63);
            uint64_t behind = __builtin_ctzll(ends | UINT64_C(1) << 63);
            starts[at + k] = (base + first) * unit;
            lengths[at + k] = (behind - first) * unit;
            begins &= begins - 1;
            ends &= ends - 1;
        }
    return behind_all;
}

#if defined(__x86_64__)
/* The same, eight at a time. */
BITS_FOR_V4 static inline size_t bits_append_v4(bits_number *starts, bits_number *lengths, size_t at, size_t end,
                                                uint64_t begins, uint64_t ends, uint64_t base, uint64_t unit)
{
    static const uint8_t places[64] = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
        22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
        44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    size_t n = __builtin_popcountll(begins);
    if (at + n + 7 > end)
        return bits_append_slowly(starts, lengths, at, end, begins, ends, base, unit);
    /* Words begin at most 32 runs. */
    __m512i all = _mm512_loadu_si512(places), from = _mm512_set1_epi64(base), by = _mm512_set1_epi64(unit);
    __m256i firsts = _mm512_castsi512_si256(_mm512_maskz_compress_epi8(begins, all));
    __m256i behinds = _mm512_castsi512_si256(_mm512_maskz_compress_epi8(ends, all));
    for (size_t k = 0; k < n; k += 8) {
        __m512i first = _mm512_cvtepu8_epi64(_mm256_castsi256_si128(firsts));
        __m512i behind = _mm512_cvtepu8_epi64(_mm256_castsi256_si128(behinds));
        _mm512_storeu_si512(starts + at + k, _mm512_mullo_epi64(_mm512_add_epi64(first, from), by));
        _mm512_storeu_si512(lengths + at + k, _mm512_mullo_epi64(_mm512_sub_epi64(behind, first), by));
        firsts = _mm256_permute4x64_epi64(firsts, 0x39);
        behinds = _mm256_permute4x64_epi64(behinds, 0x39);
    }
    return at + n;
}
#endif

/* A bit for each of 64 words that has an edge, a bit that differs from the one before. words[-1] is there, too. */
static uint64_t bits_edgy_base(const bits_word *words)
{
    uint64_t edgy = 0;
    for (int i = 0; i < 64; i++)
        edgy |= (uint64_t)((words[i] ^ (words[i] << 1 | words[i - 1] >> 63)) != 0) << i;
    return edgy;
}

#if defined(__x86_64__)
BITS_FOR_V3 static uint64_t bits_edgy_v3(const bits_word *words)
{
    uint64_t same = 0;
    for (int i = 0; i < 64; i += 4) {
        __m256i word = _mm256_loadu_si256((const void *)(words + i));
        __m256i before = _mm256_srli_epi64(_mm256_loadu_si256((const void *)(words + i - 1)), 63);
        __m256i shifted = _mm256_or_si256(_mm256_slli_epi64(word, 1), before);
        same |= (uint64_t)_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(word, shifted))) << i;
    }
    return ~same;
}
#endif

typedef size_t bits_appender(bits_number *starts, bits_number *lengths, size_t at, size_t end, uint64_t begins,
                             uint64_t ends, uint64_t base, uint64_t unit);

/* Writes where the runs of words[from..to] start, and how long they are. No run may be open at `from`; of one that is
 * open at `to` the length is missing. Numbers go from place `begin` up to `end`, and not further. */
BITS_INLINE void bits_extents_body(const bits_word *words, size_t from, size_t to, uint64_t unit, bits_number *starts,
                                   bits_number *lengths, size_t begin, size_t end,
                                   uint64_t (*edgy_words)(const bits_word *), bits_appender append)
{
    size_t at = begin;
#define BITS_APPEND(k, before) \
    do { \
        uint64_t word = words[k], shifted = word << 1 | (before) >> 63, base = (uint64_t)(k) * 64; \
        uint64_t begins = word & ~shifted, ends = ~word & shifted; \
        if ((shifted & 1) && ends && at > begin) { \
            lengths[at - 1] = (base + __builtin_ctzll(ends)) * unit - (uint64_t)starts[at - 1]; \
            ends &= ends - 1; \
        } \
        at = append(starts, lengths, at, end, begins, ends, base, unit); \
    } while (0)
    if (from < to)
        BITS_APPEND(from, UINT64_C(0));
    size_t i = from + 1;
    for (; i + 64 <= to; i += 64) {
        uint64_t edgy = edgy_words(words + i);
        if (__builtin_popcountll(edgy) > 32)
            for (size_t k = i; k < i + 64; k++)
                BITS_APPEND(k, words[k - 1]);
        else
            for (; edgy; edgy &= edgy - 1) {
                size_t k = i + __builtin_ctzll(edgy);
                BITS_APPEND(k, words[k - 1]);
            }
    }
    for (; i < to; i++)
        BITS_APPEND(i, words[i - 1]);
#undef BITS_APPEND
}

/* Granularities. A group is `factor` bits, a power of two from 2 to 64. */

/* `width` set bits, once every `stride` bits. */
#define BITS_COMB(stride, width) \
    (((width) == 64 ? BITS_ALL : (UINT64_C(1) << (width) % 64) - 1) * \
     ((stride) == 64 ? 1 : BITS_ALL / ((UINT64_C(1) << (stride) % 64) - 1)))

/* The word's groups, a bit each, in its lowest 64 / factor bits. */
BITS_INLINE uint64_t bits_gather(uint64_t word, const int factor)
{
    if (factor == 64)
        return word != 0;
#define BITS_FOLD(by) \
    if (factor > (by)) \
        word |= word >> (by)
    BITS_FOLD(16);
    BITS_FOLD(8);
    BITS_FOLD(4);
    BITS_FOLD(2);
    BITS_FOLD(1);
#undef BITS_FOLD
    word &= BITS_COMB(factor, 1);
#define BITS_CLOSE_UP(stride) \
    if (factor <= (stride)) \
        word = (word | word >> ((stride) - (stride) / factor)) & BITS_COMB((stride) * 2, (stride) / factor * 2)
    BITS_CLOSE_UP(2);
    BITS_CLOSE_UP(4);
    BITS_CLOSE_UP(8);
    BITS_CLOSE_UP(16);
    BITS_CLOSE_UP(32);
#undef BITS_CLOSE_UP
    return word;
}

/* The other way round: each of the lowest 64 / factor bits becomes a group. */
BITS_INLINE uint64_t bits_spread(uint64_t word, const int factor)
{
    if (factor == 64)
        return -(word & 1);
    word &= BITS_COMB(64, 64 / factor);
#define BITS_DRAW_OUT(stride) \
    if (factor <= (stride)) \
        word = (word | word << ((stride) - (stride) / factor)) & BITS_COMB(stride, (stride) / factor)
    BITS_DRAW_OUT(32);
    BITS_DRAW_OUT(16);
    BITS_DRAW_OUT(8);
    BITS_DRAW_OUT(4);
    BITS_DRAW_OUT(2);
#undef BITS_DRAW_OUT
    return (word << factor) - word;
}

/* n words to ceil(n / factor) ones. */
BITS_INLINE void bits_coarsen_by(const bits_word *fine, size_t n, bits_word *coarse, int factor)
{
    size_t whole = n / factor;
    for (size_t i = 0; i < whole; i++, fine += factor) {
        uint64_t word = 0;
        for (int k = 0; k < factor; k++)
            word |= bits_gather(fine[k], factor) << k * (64 / factor);
        coarse[i] = word;
    }
    if (n % factor) {
        uint64_t word = 0;
        for (size_t k = 0; k < n % factor; k++)
            word |= bits_gather(fine[k], factor) << k * (64 / factor);
        coarse[whole] = word;
    }
}

/* n words from ceil(n / factor) ones. */
BITS_INLINE void bits_refine_by(const bits_word *coarse, bits_word *fine, size_t n, int factor)
{
    size_t whole = n / factor;
    for (size_t i = 0; i < whole; i++, fine += factor)
        for (int k = 0; k < factor; k++)
            fine[k] = bits_spread(coarse[i] >> k * (64 / factor), factor);
    for (size_t k = 0; k < n % factor; k++)
        fine[k] = bits_spread(coarse[whole] >> k * (64 / factor), factor);
}

#define BITS_FOR_FACTOR(call_with) \
    switch (factor) { \
    case 2: call_with(2); break; \
    case 4: call_with(4); break; \
    case 8: call_with(8); break; \
    case 16: call_with(16); break; \
    case 32: call_with(32); break; \
    default: call_with(64); break; \
    }

BITS_INLINE void bits_coarsen_body(const bits_word *fine, size_t n, bits_word *coarse, int factor)
{
#define BITS_CALL(constant) bits_coarsen_by(fine, n, coarse, constant)
    BITS_FOR_FACTOR(BITS_CALL)
#undef BITS_CALL
}

BITS_INLINE void bits_refine_body(const bits_word *coarse, bits_word *fine, size_t n, int factor)
{
#define BITS_CALL(constant) bits_refine_by(coarse, fine, n, constant)
    BITS_FOR_FACTOR(BITS_CALL)
#undef BITS_CALL
}

/* The loops at each level: NAME_body, inlined into NAME_base and its like. */

#define BITS_COUNT (const uint8_t *data, size_t size)
#define BITS_COMBINE (const bits_word *a, const bits_word *b, bits_word *into, size_t n, int how)
#define BITS_RUNS (const bits_word *words, size_t from, size_t to)
#define BITS_EXTENTS \
    (const bits_word *words, size_t from, size_t to, uint64_t unit, bits_number *starts, bits_number *lengths, \
     size_t begin, size_t end)
#define BITS_COARSEN (const bits_word *fine, size_t n, bits_word *coarse, int factor)
#define BITS_REFINE (const bits_word *coarse, bits_word *fine, size_t n, int factor)

#define BITS_RUNS_AT(level, target, edgy, append) \
    target static uint64_t bits_count_##level BITS_COUNT { return bits_count_body(data, size); } \
    target static uint64_t bits_runs_##level BITS_RUNS { return bits_runs_body(words, from, to); } \
    target static void bits_extents_##level BITS_EXTENTS \
    { \
        bits_extents_body(words, from, to, unit, starts, lengths, begin, end, edgy, append); \
    }
#define BITS_OTHERS_AT(level, target) \
    target static uint64_t bits_combine_##level BITS_COMBINE { return bits_combine_body(a, b, into, n, how); } \
    target static void bits_coarsen_##level BITS_COARSEN { bits_coarsen_body(fine, n, coarse, factor); } \
    target static void bits_refine_##level BITS_REFINE { bits_refine_body(coarse, fine, n, factor); }

BITS_RUNS_AT(base, , bits_edgy_base, bits_append)
BITS_OTHERS_AT(base, )
#if defined(__x86_64__)
BITS_RUNS_AT(v3, BITS_FOR_V3, bits_edgy_v3, bits_append)
BITS_OTHERS_AT(v3, BITS_FOR_V3)
BITS_RUNS_AT(v4, BITS_FOR_V4, bits_edgy_v3, bits_append_v4)
#endif

typedef struct {
    uint64_t (*count) BITS_COUNT;
    uint64_t (*runs) BITS_RUNS;
    void (*extents) BITS_EXTENTS;
    uint64_t (*combine) BITS_COMBINE;
    void (*coarsen) BITS_COARSEN;
    void (*refine) BITS_REFINE;
} bits_loops;

#define BITS_LOOPS(level, others) \
    {bits_count_##level, bits_runs_##level, bits_extents_##level, bits_combine_##others, bits_coarsen_##others, \
     bits_refine_##others}

static const bits_loops bits_levels[] = {
    BITS_LOOPS(base, base),
#if defined(__x86_64__)
    BITS_LOOPS(v3, v3),
    BITS_LOOPS(v4, v3),
#endif
};

#endif
