// y = x W^T + bias for few rows x, over a weight in oneDNN's packed layout, which is read where it lies.
//
// The layout is `[blocks, in / vector, rows of a block, vector]`: for `vector` neighbouring inputs the numbers of all outputs of
// a block lie side by side. With few rows a product takes as long as its weight takes to be read, so each weight is read from
// memory once and in order, running ahead. Sums are kept in float32, in an order that does not depend on the number of rows or
// threads: a row has the same bits in any batch.

#include "numbers.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

static const int64_t MOST_ROWS = 64;
static const int64_t TILE_BYTES = 1 << 16;  // of a block that stay in the cache while all rows pass over them
static const int64_t AHEAD = 2048;          // bytes

// One step along the inputs: `vector` of them for 16 outputs.
static inline Floats plus(Floats sum, Floats weights, const float *x) { return sum + weights * *x; }

static inline Floats plus(Floats sum, Floats weights, const bf16 *x) {
    uint32_t pair;
    memcpy(&pair, x, sizeof pair);
#ifdef __AVX512BF16__
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32((int)pair));
#else
    const Words words = (Words)weights;
    sum += (Floats)(words << 16) * up((bf16)(pair & 0xffff));
    return sum + (Floats)(words & 0xffff0000u) * up((bf16)(pair >> 16));
#endif
}

// `M` rows over some inputs of one block of `Z` times 16 outputs; `sums` [M, 64].
template <typename T, int Z, int M>
static inline void multiply(const T *w, const T *x, int64_t x_row, int64_t steps, float *sums) {
    const int64_t vector = 4 / sizeof(T);
    Floats sum[M][Z];
    for (int m = 0; m < M; ++m)
        for (int z = 0; z < Z; ++z) sum[m][z] = load(sums + m * 64 + z * LANES);
    for (int64_t k = 0; k < steps; ++k) {
        const T *at = w + k * Z * LANES * vector;
        Floats weights[Z];
        for (int z = 0; z < Z; ++z) {
            weights[z] = load((const float *)(at + z * LANES * vector));  // in bf16 pairs
            __builtin_prefetch((const char *)(at + z * LANES * vector) + AHEAD);
        }
        for (int m = 0; m < M; ++m)
            for (int z = 0; z < Z; ++z) sum[m][z] = plus(sum[m][z], weights[z], x + m * x_row + k * vector);
    }
    for (int m = 0; m < M; ++m)
        for (int z = 0; z < Z; ++z) store(sums + m * 64 + z * LANES, sum[m][z]);
}

template <typename T, int Z>
static inline void multiply(const T *w, const T *x, int64_t x_row, int64_t steps, float *sums, int64_t rows) {
    while (rows > 0) {
        // So many that sums and weights fit the registers.
        switch (rows < 6 ? rows : rows == 7 || rows == 8 ? 4 : 6) {
            case 1: multiply<T, Z, 1>(w, x, x_row, steps, sums); return;
            case 2: multiply<T, Z, 2>(w, x, x_row, steps, sums); return;
            case 3: multiply<T, Z, 3>(w, x, x_row, steps, sums); return;
            case 4: multiply<T, Z, 4>(w, x, x_row, steps, sums), rows -= 4, x += 4 * x_row, sums += 4 * 64; break;
            case 5: multiply<T, Z, 5>(w, x, x_row, steps, sums); return;
            default: multiply<T, Z, 6>(w, x, x_row, steps, sums), rows -= 6, x += 6 * x_row, sums += 6 * 64;
        }
    }
}

template <typename T, int Z>
static void product(const T *x, int64_t x_row, const T *w, const T *bias, T *y, int64_t y_row, int64_t rows, int64_t in,
                    int64_t out, int threads) {
    const int64_t width = Z * LANES, blocks = (out + width - 1) / width, vector = 4 / sizeof(T), steps = in / vector;
    const int64_t tile = TILE_BYTES / (width * 4);
#pragma omp parallel num_threads(threads)
    {
        float sums[MOST_ROWS * 64];
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            memset(sums, 0, rows * 64 * sizeof(float));
            const T *from = w + block * width * in;
            for (int64_t k = 0; k < steps; k += tile)
                multiply<T, Z>(from + k * width * vector, x + k * vector, x_row, steps - k < tile ? steps - k : tile, sums,
                               rows);
            const int64_t first = block * width, count = out - first < width ? out - first : width;
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t i = 0; i < count; ++i)
                    put(y + r * y_row + first + i, sums[r * 64 + i] + (bias ? up(bias[first + i]) : 0.0f));
        }
    }
}

template <typename T>
static void of_any_width(const T *x, int64_t x_row, const T *w, int64_t width, const T *bias, T *y, int64_t y_row,
                         int64_t rows, int64_t in, int64_t out, int threads) {
    auto *chosen = width == 64 ? product<T, 4> : width == 48 ? product<T, 3> : width == 32 ? product<T, 2> : product<T, 1>;
    chosen(x, x_row, w, bias, y, y_row, rows, in, out, threads);
}

extern "C" void skinny_float32(const float *x, int64_t x_row, const float *w, int64_t width, const float *bias, float *y,
                               int64_t y_row, int64_t rows, int64_t in, int64_t out, int threads) {
    of_any_width(x, x_row, w, width, bias, y, y_row, rows, in, out, threads);
}

extern "C" void skinny_bfloat16(const bf16 *x, int64_t x_row, const bf16 *w, int64_t width, const bf16 *bias, bf16 *y,
                                int64_t y_row, int64_t rows, int64_t in, int64_t out, int threads) {
    of_any_width(x, x_row, w, width, bias, y, y_row, rows, in, out, threads);
}
