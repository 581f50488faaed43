/* The loops of dirtmap.fmt.digest: the CRC32C of bytes, and of many pieces of the same length. Source: RFC 3720.
 *
 * Nothing here allocates, raises or knows Python. x86-64 and 64-bit ARM have an instruction for it, whose result takes
 * three cycles and which can begin anew in each. So three pieces are summed at once, each with a sum of its own. What
 * the processor has is found out when it runs; others use tables.
 */

#ifndef DIRTMAP_CRC32C_H
#define DIRTMAP_CRC32C_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "eight bytes are summed as a little-endian number, and so must the machine be"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#define CRC32C_TARGET __attribute__((target("sse4.2")))
#define CRC32C_EIGHT(sum, word) ((uint32_t)_mm_crc32_u64(sum, word))
#define CRC32C_ONE(sum, octet) _mm_crc32_u8(sum, octet)
#elif defined(__aarch64__) && defined(__linux__)
#pragma GCC push_options
#pragma GCC target("+crc")
#include <arm_acle.h>
#pragma GCC pop_options
#include <sys/auxv.h>
#define CRC32C_TARGET __attribute__((target("+crc")))
#define CRC32C_EIGHT(sum, word) __crc32cd(sum, word)
#define CRC32C_ONE(sum, octet) __crc32cb(sum, octet)
#endif

static inline uint64_t crc32c_word(const uint8_t *data)
{
    uint64_t word;
    memcpy(&word, data, 8);
    return word;
}

/* The sum of an octet that is followed by so many zeros. */
static uint32_t crc32c_table[8][256];

static void crc32c_make_table(void)
{
    for (uint32_t octet = 0; octet < 256; octet++) {
        uint32_t sum = octet;
        for (int bit = 0; bit < 8; bit++)
            sum = sum >> 1 ^ (sum & 1 ? 0x82f63b78 : 0); /* the polynomial, its bits reversed */
        crc32c_table[0][octet] = sum;
    }
    for (int zeros = 1; zeros < 8; zeros++)
        for (int octet = 0; octet < 256; octet++) {
            uint32_t sum = crc32c_table[zeros - 1][octet];
            crc32c_table[zeros][octet] = sum >> 8 ^ crc32c_table[0][sum & 0xff];
        }
}

static inline uint32_t crc32c_eight_by_table(uint32_t sum, uint64_t word)
{
    word ^= sum;
    sum = 0;
    for (int at = 0; at < 8; at++)
        sum ^= crc32c_table[7 - at][word >> 8 * at & 0xff];
    return sum;
}

static inline uint32_t crc32c_one_by_table(uint32_t sum, uint8_t octet)
{
    return sum >> 8 ^ crc32c_table[0][(sum ^ octet) & 0xff];
}

/* crc32c_after_LEVEL: the sum of what had the sum that is given and of the bytes behind it.
 * crc32c_each_LEVEL: those of `count` pieces of `size` bytes, one behind the other. */
#define CRC32C_AT(level, target, eight, one) \
    target static uint32_t crc32c_after_##level(uint32_t sum, const uint8_t *data, size_t size) \
    { \
        sum = ~sum; \
        for (; size >= 8; data += 8, size -= 8) \
            sum = eight(sum, crc32c_word(data)); \
        for (; size; data++, size--) \
            sum = one(sum, *data); \
        return ~sum; \
    } \
    target static void crc32c_each_##level(const uint8_t *data, size_t size, size_t count, int64_t *sums) \
    { \
        for (; count >= 3; count -= 3, data += 3 * size, sums += 3) { \
            const uint8_t *a = data, *b = a + size, *c = b + size; \
            uint32_t x = UINT32_MAX, y = UINT32_MAX, z = UINT32_MAX; \
            size_t whole = size & ~(size_t)7; \
            for (size_t at = 0; at < whole; at += 8) { \
                x = eight(x, crc32c_word(a + at)); \
                y = eight(y, crc32c_word(b + at)); \
                z = eight(z, crc32c_word(c + at)); \
            } \
            sums[0] = crc32c_after_##level(~x, a + whole, size - whole); \
            sums[1] = crc32c_after_##level(~y, b + whole, size - whole); \
            sums[2] = crc32c_after_##level(~z, c + whole, size - whole); \
        } \
        for (; count; count--, data += size) \
            *sums++ = crc32c_after_##level(0, data, size); \
    }

CRC32C_AT(base, , crc32c_eight_by_table, crc32c_one_by_table)
#ifdef CRC32C_TARGET
CRC32C_AT(v2, CRC32C_TARGET, CRC32C_EIGHT, CRC32C_ONE)
#endif

typedef struct {
    uint32_t (*after)(uint32_t sum, const uint8_t *data, size_t size);
    void (*each)(const uint8_t *data, size_t size, size_t count, int64_t *sums);
} crc32c_loops;

static const crc32c_loops crc32c_levels[] = {
    {crc32c_after_base, crc32c_each_base},
#ifdef CRC32C_TARGET
    {crc32c_after_v2, crc32c_each_v2},
#endif
};

/* The highest level that this processor has, from 0. */
static inline int crc32c_best_level(void)
{
#if defined(__x86_64__)
    return __builtin_cpu_supports("sse4.2") != 0;
#elif defined(CRC32C_TARGET)
    return (getauxval(AT_HWCAP) & 1 << 7) != 0; /* HWCAP_CRC32, of which not all headers know */
#else
    return 0;
#endif
}

#endif
