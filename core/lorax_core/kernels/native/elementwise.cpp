// Norms by the root mean square, gates and activations of rows, each in one call.
//
// Rows are `[rows, size]` with neighbouring numbers side by side. Results are rounded where the readable form rounds. A row has
// the same bits beside any others and with any number of threads: each is computed by one thread, in one order.

// A row must not have other bits where the compiler sees another number of rows.
#ifdef __clang__
#pragma clang fp reassociate(off)
#else
#pragma GCC optimize("no-associative-math")
#endif

#include "exponential.h"
#include "numbers.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

static const int64_t WORTH_THREADS = 1 << 15;  // numbers; with fewer, waking a thread takes longer than it saves

static inline Floats rounded_as(const float *, Floats value) { return value; }

#ifndef __AVX512BF16__
static inline Floats chosen(Ints mask, Floats one, Floats other) {
    return (Floats)((Ints)other ^ (((Ints)one ^ (Ints)other) & mask));
}

// The upper half of each number, to the nearest, ties to even; NaN stays NaN.
static inline Words rounded_bits(Floats value) {
    const Words bits = (Words)value, infinite = (Words)all(__builtin_inff());
    const Words nearest = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    const Ints nan = (Ints)(infinite - (bits & 0x7fffffffu)) >> 31;
    return (Words)chosen(nan, (Floats)((bits & 0) | 0x7fc00000u), (Floats)nearest);
}
#endif

static inline void put_all(float *at, Floats value) { store(at, value); }

static inline void put_all(bf16 *at, Floats value) {
#ifdef __AVX512BF16__
    write(at, (Halves)_mm512_cvtneps_pbh((__m512)value));
#else
    write(at, converted<Halves>(rounded_bits(value) >> 16));
#endif
}

static inline Floats rounded_as(const bf16 *, Floats value) {
#ifdef __AVX512BF16__
    return (Floats)(converted<Words>((Halves)_mm512_cvtneps_pbh((__m512)value)) << 16);
#else
    return (Floats)rounded_bits(value);
#endif
}

// So many numbers, at most 16, the others zero.
template <typename T>
static inline Floats load_some(const T *at, int64_t count) {
    if (count >= LANES) return load(at);
    T numbers[LANES] = {};
    memcpy(numbers, at, count * sizeof(T));
    return load(numbers);
}

template <typename T>
static inline void put_some(T *at, Floats value, int64_t count) {
    if (count >= LANES) return put_all(at, value);
    T numbers[LANES];
    put_all(numbers, value);
    memcpy(at, numbers, count * sizeof(T));
}

enum { SILU, GELU_TANH };

template <int ACT>
static inline Floats act(Floats x) {
    if (ACT == SILU) return x / (exponential(x * -1.0f) + 1.0f);
    // 0.5 (1 + tanh u) is 1 / (1 + e^-2u).
    const Floats u = x * 0.79788456f * (x * x * 0.044715f + 1.0f);
    return x / (exponential(u * -2.0f) + 1.0f);
}

template <int ACT, typename T>
static void act_row(const T *x, const T *gated, T *out, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) {
        Floats value = act<ACT>(load_some(x + i, size - i));
        if (gated) value = rounded_as(x, value) * load_some(gated + i, size - i);
        put_some(out + i, value, size - i);
    }
}

template <typename T>
static void act_rows(int act, const T *x, int64_t x_row, const T *gated, T *out, int64_t rows, int64_t size, int threads) {
    auto *one = act == SILU ? act_row<SILU, T> : act_row<GELU_TANH, T>;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 1 && rows * size >= WORTH_THREADS)
    for (int64_t r = 0; r < rows; ++r) one(x + r * x_row, gated ? gated + r * x_row : nullptr, out + r * size, size);
}

// By the root mean square, with a weight of `offset` more; rounded before the weight where that is 0, as Llama's is.
template <typename T>
static void norm_row(const T *x, const T *residual, const T *weight, T *out, T *sum, int64_t size, float eps, float offset) {
    Floats squares = all(0.0f);
    for (int64_t i = 0; i < size; i += LANES) {
        Floats value = load_some(x + i, size - i);
        if (residual) {
            value = rounded_as(x, value + load_some(residual + i, size - i));
            put_some(sum + i, value, size - i);
        }
        squares += value * value;
    }
    const T *from = residual ? sum : x;
    const float scale = 1.0f / __builtin_sqrtf(total(squares) / size + eps);
    for (int64_t i = 0; i < size; i += LANES) {
        Floats value = load_some(from + i, size - i) * scale;
        if (offset == 0.0f) value = rounded_as(x, value);
        put_some(out + i, value * (load_some(weight + i, size - i) + offset), size - i);
    }
}

template <typename T>
static void norm_rows(const T *x, int64_t x_row, const T *residual, int64_t residual_row, const T *weight, T *out, T *sums,
                      int64_t rows, int64_t size, float eps, float offset, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 1 && rows * size >= WORTH_THREADS)
    for (int64_t r = 0; r < rows; ++r)
        norm_row(x + r * x_row, residual ? residual + r * residual_row : nullptr, weight, out + r * size,
                 residual ? sums + r * size : nullptr, size, eps, offset);
}

extern "C" void rms_norm_float32(const float *x, int64_t x_row, const float *residual, int64_t residual_row,
                                 const float *weight, float *out, float *sums, int64_t rows, int64_t size, float eps,
                                 float offset, int threads) {
    norm_rows(x, x_row, residual, residual_row, weight, out, sums, rows, size, eps, offset, threads);
}

extern "C" void rms_norm_bfloat16(const bf16 *x, int64_t x_row, const bf16 *residual, int64_t residual_row,
                                  const bf16 *weight, bf16 *out, bf16 *sums, int64_t rows, int64_t size, float eps,
                                  float offset, int threads) {
    norm_rows(x, x_row, residual, residual_row, weight, out, sums, rows, size, eps, offset, threads);
}

extern "C" void act_float32(int act, const float *x, int64_t x_row, const float *gated, float *out, int64_t rows,
                            int64_t size, int threads) {
    act_rows(act, x, x_row, gated, out, rows, size, threads);
}

extern "C" void act_bfloat16(int act, const bf16 *x, int64_t x_row, const bf16 *gated, bf16 *out, int64_t rows, int64_t size,
                             int threads) {
    act_rows(act, x, x_row, gated, out, rows, size, threads);
}
