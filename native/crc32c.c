/* CRC-32C (Castagnoli), reflected, as in iSCSI; the hardware instruction where there is one. */
#include <pthread.h>
#include <string.h>

#include "edgemoe.h"

static uint32_t table[8][256];
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void build_table(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++) c = c & 1 ? (c >> 1) ^ 0x82f63b78u : c >> 1;
        table[0][i] = c;
    }
    for (int t = 1; t < 8; t++)
        for (int i = 0; i < 256; i++) table[t][i] = (table[t - 1][i] >> 8) ^ table[0][table[t - 1][i] & 255];
}

static uint32_t software(uint32_t c, const uint8_t *p, size_t n) {
    pthread_once(&once, build_table);
    for (; n >= 8; n -= 8, p += 8) {
        const uint32_t a =
            c ^ ((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
        c = table[7][a & 255] ^ table[6][a >> 8 & 255] ^ table[5][a >> 16 & 255] ^ table[4][a >> 24] ^
            table[3][p[4]] ^ table[2][p[5]] ^ table[1][p[6]] ^ table[0][p[7]];
    }
    for (; n; n--) c = (c >> 8) ^ table[0][(c ^ *p++) & 255];
    return c;
}

#if defined(__x86_64__)
#define HARDWARE __attribute__((target("sse4.2")))
#define CRC_WORD(c, word) ((uint32_t)__builtin_ia32_crc32di(c, word))
#define CRC_BYTE(c, byte) __builtin_ia32_crc32qi(c, byte)
static int has_hardware(void) { return __builtin_cpu_supports("sse4.2"); }
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <sys/auxv.h>
#define HARDWARE __attribute__((target("+crc")))
#define CRC_WORD(c, word) __crc32cd(c, word)
#define CRC_BYTE(c, byte) __crc32cb(c, byte)
static int has_hardware(void) { return (getauxval(AT_HWCAP) & 1 << 7) != 0; } /* HWCAP_CRC32 */
#endif

#ifdef HARDWARE
/* The instruction takes three cycles but one can begin in each: three runs of the data go side by side, a
 * page each, which is what the processor fetches ahead by. */
enum { RUN = 4096 };

static uint32_t shifted[4][256]; /* by byte of a CRC: what RUN zero bytes after it make of it */
static pthread_once_t shifted_once = PTHREAD_ONCE_INIT;

HARDWARE static uint32_t serial(uint32_t c, const uint8_t *p, size_t n) {
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        c = CRC_WORD(c, word);
    }
    for (; n; n--) c = CRC_BYTE(c, *p++);
    return c;
}

static void build_shifted(void) {
    static const uint8_t zeros[RUN];
    for (int byte = 0; byte < 4; byte++)
        for (uint32_t i = 0; i < 256; i++) shifted[byte][i] = serial(i << 8 * byte, zeros, RUN);
}

static uint32_t shift(uint32_t c) {
    return shifted[0][c & 255] ^ shifted[1][c >> 8 & 255] ^ shifted[2][c >> 16 & 255] ^ shifted[3][c >> 24];
}

HARDWARE static uint32_t hardware(uint32_t c, const uint8_t *p, size_t n) {
    if (n >= 3 * RUN) pthread_once(&shifted_once, build_shifted);
    for (; n >= 3 * RUN; n -= 3 * RUN, p += 3 * RUN) {
        uint32_t second = 0, third = 0;
        for (int i = 0; i < RUN; i += 8) {
            uint64_t word[3];
            for (int run = 0; run < 3; run++) memcpy(&word[run], p + run * RUN + i, 8);
            c = CRC_WORD(c, word[0]);
            second = CRC_WORD(second, word[1]);
            third = CRC_WORD(third, word[2]);
        }
        c = shift(shift(c) ^ second) ^ third;
    }
    return serial(c, p, n);
}
#endif

uint32_t em_crc32c(uint32_t crc, const void *data, size_t n) {
    const uint8_t *p = data;
#ifdef HARDWARE
    if (has_hardware()) return ~hardware(~crc, p, n);
#endif
    return ~software(~crc, p, n);
}
