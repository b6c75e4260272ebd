/* How fast codes of 2 bits can be decoded and multiplied by a vector, AVX-512, one thread, codes in the L3 cache.
 *
 *   bytes      the codes are only read
 *   lm2        levels by a register permute: what a scalar code costs
 *   table      trellis of 12-bit states, levels from a table of 4,096 floats in L1
 *   computed   the same, levels computed: four bytes of 34038481 s + 76625530 summed (QTIP's 1MAD)
 *   lattice    E8P: 8 bytes from a table of 256, signs from 7 bits and their parity, a shift of 1/4
 *
 * Prints one line each: name and nanoseconds of processor time per weight. Values are arbitrary: no instruction depends
 * on them. */
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define WEIGHTS (1L << 24)
#define WIDTH 4096
#define REPEATS 9

static uint8_t *codes;
static float x[WIDTH], levels[4096];
static int8_t patterns[256 * 8];

static float total(__m512 a, __m512 b) { return _mm512_reduce_add_ps(_mm512_add_ps(a, b)); }

static __m512 inputs(long first) { return _mm512_loadu_ps(x + (first & (WIDTH - 1))); }

static float bytes(void) {
    __m512i sum = _mm512_setzero_si512();
    for (long i = 0; i < WEIGHTS / 4; i += 64) sum = _mm512_xor_si512(sum, _mm512_loadu_si512(codes + i));
    return (float)_mm512_reduce_add_epi32(sum);
}

static __m512 scalar(long word) {
    const __m512 four = _mm512_broadcast_f32x4(_mm_setr_ps(-1.51f, -0.45f, 0.45f, 1.51f));
    const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    __m512i code = _mm512_srlv_epi32(_mm512_set1_epi32(((const int32_t *)codes)[word]), shifts);
    return _mm512_permutexvar_ps(code, four);
}

/* The states of 16 weights: windows of 12 bits, 2 bits apart. */
static __m512i states(long word) {
    __m512i bits = _mm512_set1_epi64(*(const int64_t *)(codes + 4 * word));
    __m512i low = _mm512_srlv_epi64(bits, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14));
    __m512i high = _mm512_srlv_epi64(bits, _mm512_setr_epi64(16, 18, 20, 22, 24, 26, 28, 30));
    __m512i both = _mm512_castsi256_si512(_mm512_cvtepi64_epi32(low));
    both = _mm512_inserti64x4(both, _mm512_cvtepi64_epi32(high), 1);
    return _mm512_and_si512(both, _mm512_set1_epi32(4095));
}

static __m512 table(long word) { return _mm512_i32gather_ps(states(word), levels, 4); }

static __m512 computed(long word) {
    __m512i product = _mm512_mullo_epi32(states(word), _mm512_set1_epi32(34038481));
    product = _mm512_add_epi32(product, _mm512_set1_epi32(76625530));
    __m512i summed = _mm512_dpbusd_epi32(_mm512_set1_epi32(-510), product, _mm512_set1_epi8(1));
    return _mm512_cvtepi32_ps(summed);
}

static __m512 lattice(long word) {
    uint32_t pair = ((const uint32_t *)codes)[word], first = pair & 0xffff, second = pair >> 16;
    const int8_t *a = patterns + 8 * (first >> 8), *b = patterns + 8 * (second >> 8);
    __m128i both = _mm_set_epi64x(*(const int64_t *)b, *(const int64_t *)a);
    uint32_t odd = (first & 127) | ((__builtin_popcount(first & 127) & 1u) << 7);
    uint32_t even = (second & 127) | ((__builtin_popcount(second & 127) & 1u) << 7);
    __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(both));
    value = _mm512_mask_sub_ps(value, (__mmask16)(odd | even << 8), _mm512_setzero_ps(), value);
    __mmask16 up = (__mmask16)((first >> 7 & 1 ? 0xff : 0) | (second >> 7 & 1 ? 0xff00 : 0));
    return _mm512_add_ps(value, _mm512_mask_blend_ps(up, _mm512_set1_ps(-0.25f), _mm512_set1_ps(0.25f)));
}

#define PRODUCT(name)                                                                          \
    static float name##_product(void) {                                                        \
        __m512 a = _mm512_setzero_ps(), b = a;                                                 \
        for (long i = 0; i < WEIGHTS / 16; i += 2) {                                           \
            a = _mm512_fmadd_ps(name(i), inputs(16 * i), a);                                   \
            b = _mm512_fmadd_ps(name(i + 1), inputs(16 * i + 16), b);                          \
        }                                                                                      \
        return total(a, b);                                                                    \
    }
PRODUCT(scalar)
PRODUCT(table)
PRODUCT(computed)
PRODUCT(lattice)

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void measure(const char *name, float (*run)(void)) {
    double best = 1e9;
    volatile float kept = 0;
    for (int i = 0; i < REPEATS; i++) {
        double began = now();
        kept = kept + run();
        double spent = now() - began;
        if (spent < best) best = spent;
    }
    printf("%s %.4f\n", name, 1e9 * best / WEIGHTS);
}

int main(void) {
    codes = aligned_alloc(64, WEIGHTS / 4 + 64);
    if (!codes) return 1;
    for (long i = 0; i < WEIGHTS / 4 + 64; i++) codes[i] = (uint8_t)rand();
    for (int i = 0; i < WIDTH; i++) x[i] = (float)(i % 7 - 3), levels[i] = (float)(i % 11 - 5);
    for (int i = 0; i < 256 * 8; i++) patterns[i] = (int8_t)(1 + 2 * (rand() % 3));
    measure("bytes", bytes);
    measure("lm2", scalar_product);
    measure("table", table_product);
    measure("computed", computed_product);
    measure("lattice", lattice_product);
    return 0;
}
