// Norms and gates over rows, each in one pass. Rounding happens where the readable form rounds; sums are kept in float32 and are of
// one row alone, so a row has the same bits in any batch.

#include <cmath>
#include <cstdint>
#include <cstring>

typedef uint16_t bf16;

static inline float up(float value) { return value; }

static inline float up(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static inline void put(float *at, float value) { *at = value; }

static inline void put(bf16 *at, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    *at = nan ? 0x7fc0 : (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to the nearest, ties to even
}

template <typename T>
static inline float cut(float value) {  // as it is once it was stored
    T stored;
    put(&stored, value);
    return up(stored);
}

static const int64_t SMALL = 1 << 15;  // numbers that one thread does sooner than two

// x and residual `[rows, size]`, the latter null where nothing is added; `total` takes their sum.
template <typename T>
static void rms(const T *x, int64_t x_row, const T *residual, int64_t residual_row, const T *weight, T *out, T *total,
                int64_t rows, int64_t size, float eps, float offset, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size > SMALL)
    for (int64_t r = 0; r < rows; ++r) {
        const T *from = x + r * x_row;
        if (residual) {
            const T *more = residual + r * residual_row;
            for (int64_t i = 0; i < size; ++i) put(total + r * size + i, up(from[i]) + up(more[i]));
            from = total + r * size;
        }
        float squares = 0;
        for (int64_t i = 0; i < size; ++i) squares += up(from[i]) * up(from[i]);
        const float scale = 1 / sqrtf(squares / size + eps);
        T *to = out + r * size;
        if (offset != 0)
            for (int64_t i = 0; i < size; ++i) put(to + i, up(from[i]) * scale * (offset + up(weight[i])));
        else
            for (int64_t i = 0; i < size; ++i) put(to + i, cut<T>(up(from[i]) * scale) * up(weight[i]));
    }
}

template <typename T>
static void layer(const T *x, int64_t x_row, const T *residual, int64_t residual_row, const T *weight, const T *bias,
                  T *out, T *total, int64_t rows, int64_t size, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size > SMALL)
    for (int64_t r = 0; r < rows; ++r) {
        const T *from = x + r * x_row, *more = residual + r * residual_row;
        T *sum = total + r * size, *to = out + r * size;
        float mean = 0, squares = 0;
        for (int64_t i = 0; i < size; ++i) put(sum + i, up(from[i]) + up(more[i])), mean += up(sum[i]);
        mean /= size;
        // From the mean, not as the mean of squares: that would lose the digits of rows far from zero.
        for (int64_t i = 0; i < size; ++i) squares += (up(sum[i]) - mean) * (up(sum[i]) - mean);
        const float scale = 1 / sqrtf(squares / size + eps);
        for (int64_t i = 0; i < size; ++i)
            put(to + i, (up(sum[i]) - mean) * scale * (weight ? up(weight[i]) : 1.0f) + (bias ? up(bias[i]) : 0.0f));
    }
}

// e^x to about 1e-7 of itself, between the smallest and the largest number of float32.
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;  // NaN stays
    const int32_t n = (int32_t)(x * 1.44269504088896341f + (x < 0 ? -0.5f : 0.5f));
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const uint32_t bits = (uint32_t)(n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

static inline float silu(float x) { return x / (1 + exponential(-x)); }

static inline float gelu_tanh(float x) {
    // tanh(y) = 1 - 2 / (e^2y + 1), so x / 2 (1 + tanh(y)) is x times the logistic function of 2y
    const float y = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return x / (1 + exponential(-2 * y));
}

static inline float relu(float x) { return x < 0 ? 0 : x; }

template <typename T, float (*ACT)(float)>
static void gate(const T *gate_up, int64_t row, T *out, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size > SMALL / 4)
    for (int64_t r = 0; r < rows; ++r) {
        const T *one = gate_up + r * row, *two = one + size;
        T *to = out + r * size;
        for (int64_t i = 0; i < size; ++i) put(to + i, cut<T>(ACT(up(one[i]))) * up(two[i]));
    }
}

#define ENTRIES(NAME, T)                                                                                                  \
    extern "C" void rms_norm_##NAME(const T *x, int64_t x_row, const T *residual, int64_t residual_row, const T *weight, \
                                    T *out, T *total, int64_t rows, int64_t size, float eps, float offset, int threads) { \
        rms<T>(x, x_row, residual, residual_row, weight, out, total, rows, size, eps, offset, threads);                   \
    }                                                                                                                    \
    extern "C" void layer_norm_##NAME(const T *x, int64_t x_row, const T *residual, int64_t residual_row,                \
                                      const T *weight, const T *bias, T *out, T *total, int64_t rows, int64_t size,       \
                                      float eps, int threads) {                                                          \
        layer<T>(x, x_row, residual, residual_row, weight, bias, out, total, rows, size, eps, threads);                   \
    }                                                                                                                    \
    extern "C" void silu_##NAME(const T *x, int64_t row, T *out, int64_t rows, int64_t size, int threads) {              \
        gate<T, silu>(x, row, out, rows, size, threads);                                                                 \
    }                                                                                                                    \
    extern "C" void gelu_tanh_##NAME(const T *x, int64_t row, T *out, int64_t rows, int64_t size, int threads) {         \
        gate<T, gelu_tanh>(x, row, out, rows, size, threads);                                                            \
    }                                                                                                                    \
    extern "C" void relu_##NAME(const T *x, int64_t row, T *out, int64_t rows, int64_t size, int threads) {              \
        gate<T, relu>(x, row, out, rows, size, threads);                                                                 \
    }

ENTRIES(float32, float)
ENTRIES(bfloat16, bf16)
