// y = x W^T + bias over a weight of 8 or 4 bits, and the way from a weight to such bits.
//
// Along its inputs a row of the weight is cut into groups, each with a scale in bfloat16. A record holds one group of 64 outputs:
// for each four inputs the codes of all 64 outputs side by side, then the scales. Codes are unsigned, the middle one is 0. In 4
// bits a byte holds an input of the first half of the group (low bits) and of the second half (high bits).
//
// Rows of x are rounded to 8 bits by the same groups. A group's sum is then exact, in integers, and groups are added up in their
// order: a row has the same bits in any batch, with any number of threads.

// The order in which groups are added up must not differ from one number of rows to the other.
#ifdef __clang__
#pragma clang fp reassociate(off)
#else
#pragma GCC optimize("no-associative-math")
#endif

#include <cmath>

#include "numbers.h"

#ifdef __AVX2__
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

static const int64_t OUTPUTS = 64;  // of a record
static const int64_t PARTS = OUTPUTS / LANES;
static const int64_t ROWS = 6;         // that share what is read of the weight
static const int64_t ROWS_AT_ONCE = 96;  // that pass over a part of the weight while it is in the first cache
static const int64_t PART_BYTES = 1 << 14;  // of such a part
static const int64_t AHEAD = 2048;     // bytes by which reading runs ahead
static const int64_t OWN_BYTES = 1 << 15;  // of scratch: few rows need no memory of the caller

template <int BITS>
struct Format {
    static const int64_t GROUP = BITS == 8 ? 64 : 32;
    static const int64_t MIDDLE = BITS == 8 ? 128 : 8;
    static const int64_t CODES = OUTPUTS * GROUP * BITS / 8;  // bytes
    static const int64_t RECORD = CODES + OUTPUTS * 2;
};

// `sums` and, for each of 16 outputs, four codes times four numbers of x.
static inline Ints plus(Ints sums, Words codes, int32_t x) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(x));
#elif defined(__AVXVNNI__)
    __m256i half[2], code[2];
    memcpy(half, &sums, sizeof half);
    memcpy(code, &codes, sizeof code);
    for (int i = 0; i < 2; ++i) half[i] = _mm256_dpbusd_avx_epi32(half[i], code[i], _mm256_set1_epi32(x));
    memcpy(&sums, half, sizeof half);
    return sums;
#elif defined(__AVX2__)
    // The even bytes, then the odd ones, as numbers of 16 bits.
    const __m256i four = _mm256_set1_epi32(x);
    const __m256i low = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8), high = _mm256_srai_epi16(four, 8);
    __m256i sum[2], code[2];
    memcpy(sum, &sums, sizeof sum);
    memcpy(code, &codes, sizeof code);
    for (int i = 0; i < 2; ++i) {
        sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(_mm256_and_si256(code[i], _mm256_set1_epi32(0x00ff00ff)), low));
        sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(_mm256_srli_epi16(code[i], 8), high));
    }
    memcpy(&sums, sum, sizeof sum);
    return sums;
#elif defined(__ARM_FEATURE_DOTPROD)
    // Both factors are signed there: codes lose 128 each, which the sum of the numbers of x gives back.
    const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(x)), half = vdupq_n_s8(64);
    const int32x4_t back = vdotq_s32(vdotq_s32(vdupq_n_s32(0), half, four), half, four);
    int32x4_t sum[4];
    uint8x16_t code[4];
    memcpy(sum, &sums, sizeof sum);
    memcpy(code, &codes, sizeof code);
    for (int i = 0; i < 4; ++i) {
        const int8x16_t lowered = vreinterpretq_s8_u8(veorq_u8(code[i], vdupq_n_u8(128)));
        sum[i] = vaddq_s32(vdotq_s32(sum[i], lowered, four), back);
    }
    memcpy(&sums, sum, sizeof sum);
    return sums;
#else
    for (int i = 0; i < 4; ++i) sums += (Ints)((codes >> (8 * i)) & 255) * (int32_t)(int8_t)(x >> (8 * i));
    return sums;
#endif
}

static inline Words words(const uint8_t *at) {
    Words found;
    read(found, at);
    return found;
}

static inline int32_t four(const int8_t *at) {
    int32_t found;
    memcpy(&found, at, sizeof found);
    return found;
}

// Some rows of x in 8 bits: `scales` and `zeros` are of each group; `zeros` is what the middle code adds to its sum.
struct Rounded {
    const int8_t *x;
    const float *scales;
    const int32_t *zeros;
    int64_t width, groups;
};

// The group's sums for `M` rows and 64 outputs, times both scales, are added to `sums` [M, 64].
template <int BITS, int M>
static inline void add_group(const uint8_t *record, const int8_t *x, int64_t width, const float *scales,
                             const int32_t *zeros, int64_t groups, float *sums) {
    typedef Format<BITS> F;
    Ints sum[M][PARTS];
    for (int m = 0; m < M; ++m)
        for (int z = 0; z < PARTS; ++z) sum[m][z] = (Ints){};
    const int64_t steps = F::CODES / (LANES * 4 * PARTS);
    for (int64_t k = 0; k < steps; ++k) {
        Words codes[PARTS];
        for (int z = 0; z < PARTS; ++z) {
            codes[z] = words(record + (k * PARTS + z) * sizeof(Words));
            __builtin_prefetch(record + (k * PARTS + z) * sizeof(Words) + AHEAD);
        }
        if (BITS == 8) {
            for (int m = 0; m < M; ++m)
                for (int z = 0; z < PARTS; ++z) sum[m][z] = plus(sum[m][z], codes[z], four(x + m * width + 4 * k));
        } else {
            for (int m = 0; m < M; ++m) {
                const int32_t first = four(x + m * width + 4 * k), second = four(x + m * width + 4 * (k + steps));
                for (int z = 0; z < PARTS; ++z) {
                    sum[m][z] = plus(sum[m][z], codes[z] & 0x0f0f0f0fu, first);
                    sum[m][z] = plus(sum[m][z], (codes[z] >> 4) & 0x0f0f0f0fu, second);
                }
            }
        }
    }
    const bf16 *theirs = (const bf16 *)(record + F::CODES);
    for (int z = 0; z < PARTS; ++z) {
        const Floats scale = load(theirs + z * LANES);
        for (int m = 0; m < M; ++m) {
            float *at = sums + m * OUTPUTS + z * LANES;
            const Floats exact = converted<Floats>(sum[m][z] - zeros[m * groups]);
            store(at, load(at) + exact * (scale * scales[m * groups]));
        }
    }
}

template <int BITS, int M>
static void add_all(const uint8_t *block, const Rounded &rows, int64_t start, int64_t end, int64_t first, float *sums) {
    typedef Format<BITS> F;
    for (int64_t g = start; g < end; ++g)
        add_group<BITS, M>(block + g * F::RECORD, rows.x + first * rows.width + g * F::GROUP, rows.width,
                           rows.scales + first * rows.groups + g, rows.zeros + first * rows.groups + g, rows.groups, sums);
}

// Groups `start` to `end` of some rows.
template <int BITS>
static void add_rows(const uint8_t *block, const Rounded &rows, int64_t start, int64_t end, int64_t first, int64_t count,
                     float *sums) {
    switch (count) {
        case 1: return add_all<BITS, 1>(block, rows, start, end, first, sums);
        case 2: return add_all<BITS, 2>(block, rows, start, end, first, sums);
        case 3: return add_all<BITS, 3>(block, rows, start, end, first, sums);
        case 4: return add_all<BITS, 4>(block, rows, start, end, first, sums);
        case 5: return add_all<BITS, 5>(block, rows, start, end, first, sums);
        default: return add_all<BITS, 6>(block, rows, start, end, first, sums);
    }
}

// The largest of some numbers in size, NaN when one of them is not finite. As integers, for those are compared in any order.
static inline float largest_of(const float *numbers, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        memcpy(&bits, numbers + i, sizeof bits);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float found;
    memcpy(&found, &largest, sizeof found);
    return largest < 0x7f800000 ? found : NAN;
}

static const float SMALL = 1e-36f;  // what is smaller in size counts as 0: its scale would have no inverse

// One group of one row to 8 bits. What is not finite makes the scale NaN, and so all that is computed of it.
template <int BITS, typename T>
static inline void round_group(const T *x, int64_t count, int8_t *to, float *scale, int32_t *zero) {
    typedef Format<BITS> F;
    float numbers[F::GROUP] = {};
    for (int64_t i = 0; i < count; ++i) numbers[i] = up(x[i]);
    const float largest = largest_of(numbers, F::GROUP), by = largest > SMALL ? 127.0f / largest : 0.0f;
    int32_t sum = 0;
    for (int64_t i = 0; i < F::GROUP; ++i) {
        const int32_t code = largest > SMALL ? (int32_t)nearbyintf(numbers[i] * by) : 0;
        to[i] = (int8_t)code;
        sum += code;
    }
    *scale = largest / 127.0f;
    *zero = sum * (int32_t)F::MIDDLE;
}

template <int BITS, typename T>
static void multiply(const T *x, int64_t x_row, const uint8_t *weight, const T *bias, T *y, uint8_t *scratch, int64_t rows,
                     int64_t width, int64_t out, int threads) {
    typedef Format<BITS> F;
    if (rows == 0) return;
    const int64_t groups = (width + F::GROUP - 1) / F::GROUP, blocks = (out + OUTPUTS - 1) / OUTPUTS;
    alignas(64) uint8_t own[OWN_BYTES];
    float *scales = (float *)(scratch ? scratch : own);
    int32_t *zeros = (int32_t *)(scales + rows * groups);
    int8_t *codes = (int8_t *)(zeros + rows * groups);
    const Rounded rounded = {codes, scales, zeros, groups * F::GROUP, groups};
    const int64_t chunks = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    const int64_t each = (rows + chunks - 1) / chunks;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t at = 0; at < rows * groups; ++at) {
            const int64_t r = at / groups, g = at % groups, k = g * F::GROUP;
            round_group<BITS>(x + r * x_row + k, width - k < F::GROUP ? width - k : F::GROUP, codes + r * rounded.width + k,
                              scales + at, zeros + at);
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < blocks * chunks; ++item) {
            const int64_t block = item / chunks, start = item % chunks * each;
            const int64_t end = start + each < rows ? start + each : rows;
            const int64_t first = block * OUTPUTS, count = out - first < OUTPUTS ? out - first : OUTPUTS;
            alignas(64) float sums[ROWS_AT_ONCE * OUTPUTS];
            for (int64_t i = 0; i < (end - start) * OUTPUTS; ++i) sums[i] = 0;
            // Few rows read the weight once, so it need not stay in a cache.
            const int64_t part = end - start <= ROWS ? groups : PART_BYTES / F::RECORD;
            for (int64_t g = 0; g < groups; g += part)
                for (int64_t r = start; r < end; r += ROWS)
                    add_rows<BITS>(weight + block * groups * F::RECORD, rounded, g, g + part < groups ? g + part : groups, r,
                                   end - r < ROWS ? end - r : ROWS, sums + (r - start) * OUTPUTS);
            for (int64_t r = start; r < end; ++r)
                for (int64_t n = 0; n < count; ++n)
                    put(y + r * out + first + n, sums[(r - start) * OUTPUTS + n] + (bias ? up(bias[first + n]) : 0.0f));
        }
    }
}

// --- from a weight to its codes ---

// 8 bits: -127 to 127. 4 bits: -8 to 7.
template <int BITS>
static inline Floats codes_of(Floats values, float by) {
    const Floats least = all(BITS == 8 ? -127.0f : -8.0f), most = all(BITS == 8 ? 127.0f : 7.0f);
    // Added and taken away, it leaves no place for what is behind the point: to the nearest, ties to even.
    const Floats magic = all(12582912.0f);
    const Floats codes = values * by;
    return (at_most(at_least(codes, least), most) + magic) - magic;
}

// The scale of a group of a row. In 4 bits several are tried: the least squares of the errors wins.
template <int BITS>
static float scale_of(const float *w) {
    typedef Format<BITS> F;
    const float largest = largest_of(w, F::GROUP);
    if (!(largest > SMALL)) return largest < 1 ? 0.0f : NAN;
    if (BITS == 8) return up(rounded(largest / 127.0f));
    // The largest in size may be at -8, where 7 is the most on the other side.
    bool above = false;
    for (int64_t i = 0; i < F::GROUP; ++i) above |= w[i] == largest;
    const float sign = above ? -1.0f : 1.0f;
    float best = INFINITY, found = 0;
    for (int step = 0; step < 9; ++step) {
        const float share = 0.09375f + 0.0078125f * (float)step, scale = up(rounded(sign * largest * share));
        Floats lost = {};  // as shares of the largest, whose square may have no number
        for (int64_t i = 0; i < F::GROUP; i += LANES) {
            const Floats number = load(w + i), off = (number * (1.0f / scale) - codes_of<BITS>(number, 1.0f / scale)) * share;
            lost += off * off;
        }
        float total = 0;
        for (int64_t i = 0; i < LANES; ++i) total += lost[i];
        if (total < best) best = total, found = scale;
    }
    return found;
}

template <int BITS, typename T>
static void pack(const T *weight, int64_t out, int64_t width, uint8_t *to, int threads) {
    typedef Format<BITS> F;
    const int64_t groups = (width + F::GROUP - 1) / F::GROUP, blocks = (out + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t at = 0; at < blocks * groups; ++at) {
        const int64_t block = at / groups, k = at % groups * F::GROUP;
        uint8_t *record = to + at * F::RECORD;
        memset(record, 0, F::CODES);
        for (int64_t n = 0; n < OUTPUTS; ++n) {
            const int64_t row = block * OUTPUTS + n;
            alignas(64) float numbers[F::GROUP] = {};
            const int64_t count = row >= out ? 0 : width - k < F::GROUP ? width - k : F::GROUP;
            for (int64_t i = 0; i < count; ++i) numbers[i] = up(weight[row * width + k + i]);
            const float scale = scale_of<BITS>(numbers);
            const bf16 stored = rounded(scale);
            memcpy(record + F::CODES + 2 * n, &stored, sizeof stored);
            const bool some = fabsf(scale) > 0;  // not for NaN
            for (int64_t i = 0; i < F::GROUP; i += LANES)
                store(numbers + i, some ? codes_of<BITS>(load(numbers + i), 1.0f / scale) : (Floats){});
            for (int64_t i = 0; i < F::GROUP; ++i) {
                const uint8_t code = (uint8_t)((int32_t)numbers[i] + F::MIDDLE);
                const int64_t half = BITS == 8 ? F::GROUP : F::GROUP / 2, j = i % half;
                record[(j / 4 * OUTPUTS + n) * 4 + j % 4] |= (uint8_t)(i < half ? code : code << 4);
            }
        }
    }
}

extern "C" int64_t quantized_own_bytes() { return OWN_BYTES; }

#define EXPORTED(BITS, T, TYPE)                                                                                             \
    extern "C" void multiply_int##BITS##_##TYPE(const T *x, int64_t x_row, const uint8_t *weight, const T *bias, T *y,     \
                                               uint8_t *scratch, int64_t rows, int64_t width, int64_t out, int threads) { \
        multiply<BITS>(x, x_row, weight, bias, y, scratch, rows, width, out, threads);                                     \
    }                                                                                                                       \
    extern "C" void pack_int##BITS##_##TYPE(const T *weight, int64_t out, int64_t width, uint8_t *to, int threads) {       \
        pack<BITS>(weight, out, width, to, threads);                                                                       \
    }

EXPORTED(8, float, float32)
EXPORTED(8, bf16, bfloat16)
EXPORTED(4, float, float32)
EXPORTED(4, bf16, bfloat16)
