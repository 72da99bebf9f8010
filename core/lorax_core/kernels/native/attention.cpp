// Causal attention straight off the pages of the cache, for sequences that bring a few rows each.
//
// A job is some rows of one sequence. Its keys are cut into parts, so that a long context keeps all threads busy; each part gives
// a maximum, a sum and a weighted sum of values (the online softmax), and the parts of a row are joined at the end. How keys are
// cut depends on the jobs and the number of threads alone, so the same step gives the same bits. Sums are kept in float32.

#include <cmath>

#include "exponential.h"
#include "numbers.h"

typedef uint8_t fp8;  // e4m3: no infinities, NaN is 0x7f and 0xff

static const int64_t KEYS = 16;      // keys that are scored together
static const int64_t QUERIES = 16;   // queries that share what was read of them
static const int64_t MOST_DIM = 256;
static const int64_t AHEAD = 32;     // keys by which reading runs ahead

#if defined(__AVX512F__) || defined(__clang__)

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLED
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
#endif

// Lane i is the sum of vector i: halves of two vectors are added side by side, then quarters, and so on.
static inline Floats sums_of(Floats (&v)[LANES]) {
    for (int i = 0; i < 8; ++i)
        v[i] = SHUFFLED(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               SHUFFLED(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; ++i)
        v[i] = SHUFFLED(v[i], v[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               SHUFFLED(v[i], v[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; ++i)
        v[i] = SHUFFLED(v[i], v[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               SHUFFLED(v[i], v[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return SHUFFLED(v[0], v[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           SHUFFLED(v[0], v[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

#else

// Lane i is the sum of vector i.
static inline Floats sums_of(Floats (&v)[LANES]) {
    float each[LANES][LANES], sums[LANES];
    for (int i = 0; i < LANES; ++i) store(each[i], v[i]);
    for (int i = 0; i < LANES; ++i) {
        sums[i] = 0;
        for (int j = 0; j < LANES; ++j) sums[i] += each[i][j];
    }
    return load(sums);
}

#endif

struct Shape {
    int64_t heads, kv_heads, dim;
    int64_t page_size, page_stride, token_stride, head_stride;  // of the cache, in numbers
    float cap;                                                  // 0: none
    float k_scale, v_scale;                                     // of an 8-bit cache
    int64_t window;                                             // keys that a row sees, itself included; 0: all
};

struct Job {
    const int32_t *pages;
    int64_t row, rows;  // which rows of q
    int64_t keys;       // of the sequence, once this step is written
    int64_t at;         // its first part in the scratch
    int64_t parts;
};

static const float *fp8_values() {
    static float table[256];
    static bool made = [] {
        for (int bits = 0; bits < 256; ++bits) {
            int exponent = (bits >> 3) & 15, fraction = bits & 7;
            float value = exponent ? ldexpf(1 + fraction / 8.0f, exponent - 7) : ldexpf(fraction / 8.0f, -6);
            if ((bits & 127) == 127) value = NAN;
            table[bits] = bits & 128 ? -value : value;
        }
        return true;
    }();
    (void)made;
    return table;
}

// `count` keys of one head to float32, side by side.
static inline const float *widened(const float *at, int64_t stride, int64_t count, int64_t dim, float, float *to,
                                   int64_t &step) {
    (void)count, (void)dim, (void)to;
    step = stride;  // read where they lie
    return at;
}

static inline const float *widened(const bf16 *at, int64_t stride, int64_t count, int64_t dim, float, float *to,
                                   int64_t &step) {
    step = dim;
    for (int64_t k = 0; k < count; ++k)
        for (int64_t i = 0; i < dim; i += LANES) store(to + k * dim + i, load(at + k * stride + i));
    return to;
}

static inline const float *widened(const fp8 *at, int64_t stride, int64_t count, int64_t dim, float scale, float *to,
                                   int64_t &step) {
    const float *values = fp8_values();
    step = dim;
    for (int64_t k = 0; k < count; ++k)
        for (int64_t i = 0; i < dim; ++i) to[k * dim + i] = values[at[k * stride + i]] * scale;
    return to;
}

// What a part keeps of a query: the largest score, the sum of weights, and the weighted values `[dim]`.
struct Queries {
    float q[QUERIES * MOST_DIM];
    float values[QUERIES * MOST_DIM];
    float largest[QUERIES], total[QUERIES];
};

// Scores of `count` keys for each query; keys outside `[first[i], last[i])` are minus infinity.
template <int64_t DIM>
static inline void score(const Queries &kept, int64_t queries, const float *k, int64_t step, int64_t count, int64_t dim,
                         int64_t key, const int64_t *first, const int64_t *last, float cap, float (*scores)[KEYS]) {
    if (DIM) dim = DIM;
    for (int64_t i = 0; i < queries; ++i) {
        const float *q = kept.q + i * dim;
        Floats sums[KEYS] = {};
        for (int64_t d = 0; d < dim; d += LANES) {
            const Floats mine = load(q + d);
            if (count == KEYS)  // the usual case, whose sums stay in registers
                for (int64_t j = 0; j < KEYS; ++j) sums[j] += mine * load(k + j * step + d);
            else
                for (int64_t j = 0; j < count; ++j) sums[j] += mine * load(k + j * step + d);
        }
        store(scores[i], sums_of(sums));
        for (int64_t j = count; j < KEYS; ++j) scores[i][j] = -INFINITY;
        if (cap > 0)
            for (int64_t j = 0; j < count; ++j) scores[i][j] = cap * tanhf(scores[i][j] / cap);
        for (int64_t j = 0; j < count; ++j)
            if (key + j < first[i] || key + j >= last[i]) scores[i][j] = -INFINITY;
    }
}

template <int64_t DIM>
static inline void weigh(Queries &kept, int64_t queries, const float *v, int64_t step, int64_t count, int64_t dim,
                         float (*scores)[KEYS]) {
    if (DIM) dim = DIM;
    for (int64_t i = 0; i < queries; ++i) {
        float largest = kept.largest[i];
        for (int64_t j = 0; j < KEYS; ++j) largest = scores[i][j] > largest || scores[i][j] != scores[i][j] ? scores[i][j] : largest;
        if (largest == -INFINITY) continue;  // nothing is seen yet, and inf - inf is NaN
        const Floats exact = exponential(load(scores[i]) - largest);
        float weights[KEYS];
        store(weights, exact);
        float before = largest == kept.largest[i] ? 1.0f : expf(kept.largest[i] - largest);
        kept.largest[i] = largest;
        kept.total[i] = kept.total[i] * before + total(exact);
        float *values = kept.values + i * dim;
        for (int64_t d = 0; d < dim; d += LANES) {
            Floats sums = load(values + d) * before;
            for (int64_t j = 0; j < count; ++j) sums += load(v + j * step + d) * weights[j];
            store(values + d, sums);
        }
    }
}

// One part of one job for one key head.
template <typename T, typename C, int64_t DIM>
static void attend(const Shape &shape, const Job &job, int64_t head, int64_t part, const T *q, int64_t q_row,
                   const C *k_cache, const C *v_cache, float *scratch) {
    const int64_t dim = DIM ? DIM : shape.dim, group = shape.heads / shape.kv_heads, all_queries = job.rows * group;
    // What no row of the job sees is cut off before the rest is shared out.
    const int64_t seen = job.keys - job.rows + 1;
    const int64_t lowest = shape.window && seen > shape.window ? (seen - shape.window) / KEYS * KEYS : 0;
    const int64_t share = ((job.keys - lowest + job.parts - 1) / job.parts + KEYS - 1) / KEYS * KEYS;
    const float scale = 1.0f / sqrtf((float)dim);
    static thread_local Queries kept;
    static thread_local float k_wide[KEYS * MOST_DIM], v_wide[KEYS * MOST_DIM];
    float scores[QUERIES][KEYS];
    int64_t first[QUERIES], last[QUERIES];
    for (int64_t from = 0; from < all_queries; from += QUERIES) {
        const int64_t queries = all_queries - from < QUERIES ? all_queries - from : QUERIES;
        int64_t begin = job.keys, end = 0;
        for (int64_t i = 0; i < queries; ++i) {
            const int64_t row = (from + i) / group, member = (from + i) % group;
            last[i] = job.keys - job.rows + row + 1;
            first[i] = shape.window && last[i] > shape.window ? last[i] - shape.window : 0;
            begin = first[i] < begin ? first[i] : begin;
            end = last[i] > end ? last[i] : end;
            const T *at = q + (job.row + row) * q_row + (head * group + member) * dim;
            for (int64_t d = 0; d < dim; d += LANES) {
                store(kept.q + i * dim + d, load(at + d) * scale);
                store(kept.values + i * dim + d, (Floats){});
            }
            kept.largest[i] = -INFINITY;
            kept.total[i] = 0;
        }
        const int64_t from_key = lowest + part * share;
        begin = begin > from_key ? begin : from_key;
        end = end < from_key + share ? end : from_key + share;
        for (int64_t key = begin; key < end;) {
            const int64_t offset = key % shape.page_size;
            int64_t count = shape.page_size - offset < end - key ? shape.page_size - offset : end - key;
            count = count < KEYS ? count : KEYS;
            const int64_t at = job.pages[key / shape.page_size] * shape.page_stride + offset * shape.token_stride +
                               head * shape.head_stride;
            // One head's rows lie apart, so the processor does not guess the next ones by itself.
            if (const int64_t next = key + AHEAD; next < end) {
                const int64_t there = job.pages[next / shape.page_size] * shape.page_stride +
                                      next % shape.page_size * shape.token_stride + head * shape.head_stride;
                for (int64_t j = 0; j < count; ++j)
                    for (int64_t d = 0; d < dim; d += 64 / (int64_t)sizeof(C)) {
                        __builtin_prefetch(k_cache + there + j * shape.token_stride + d);
                        __builtin_prefetch(v_cache + there + j * shape.token_stride + d);
                    }
            }
            int64_t step;
            const float *k = widened(k_cache + at, shape.token_stride, count, dim, shape.k_scale, k_wide, step);
            score<DIM>(kept, queries, k, step, count, dim, key, first, last, shape.cap, scores);
            const float *v = widened(v_cache + at, shape.token_stride, count, dim, shape.v_scale, v_wide, step);
            weigh<DIM>(kept, queries, v, step, count, dim, scores);
            key += count;
        }
        // [parts, kv_heads, rows * group, dim + 2]
        float *out = scratch + ((job.at + part * job.rows) * shape.heads + head * all_queries + from) * (dim + 2);
        for (int64_t i = 0; i < queries; ++i, out += dim + 2) {
            memcpy(out, kept.values + i * dim, dim * sizeof(float));
            out[dim] = kept.largest[i];
            out[dim + 1] = kept.total[i];
        }
    }
}

// The parts of one row and head to its answer.
template <typename T>
static void join(const Shape &shape, const Job &job, int64_t row, int64_t member, const float *scratch, T *out,
                 int64_t out_row) {
    const int64_t dim = shape.dim, group = shape.heads / shape.kv_heads, head = member / group;
    const int64_t step = job.rows * shape.heads * (dim + 2);
    const float *at = scratch + (job.at * shape.heads + head * job.rows * group + row * group + member % group) * (dim + 2);
    float largest = -INFINITY, total = 0;
    for (int64_t p = 0; p < job.parts; ++p)
        if (at[p * step + dim] > largest || at[p * step + dim] != at[p * step + dim]) largest = at[p * step + dim];
    float sums[MOST_DIM] = {};
    for (int64_t p = 0; p < job.parts; ++p) {
        const float *part = at + p * step;
        if (part[dim] == -INFINITY) continue;
        float weight = part[dim] == largest ? 1.0f : expf(part[dim] - largest);
        total += weight * part[dim + 1];
        for (int64_t d = 0; d < dim; ++d) sums[d] += weight * part[d];
    }
    T *to = out + (job.row + row) * out_row + member * dim;
    for (int64_t d = 0; d < dim; ++d) put(to + d, sums[d] / total);
}

template <typename T, typename C, int64_t DIM>
static void run(const Shape &shape, const Job *jobs, int64_t count, const T *q, int64_t q_row, const C *k, const C *v,
                T *out, int64_t out_row, float *scratch, int threads) {
    int64_t most = 1, most_rows = 1;
    for (int64_t j = 0; j < count; ++j) {
        most = jobs[j].parts > most ? jobs[j].parts : most;
        most_rows = jobs[j].rows > most_rows ? jobs[j].rows : most_rows;
    }
    const int64_t items = count * most * shape.kv_heads, ends = count * most_rows * shape.heads;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < items; ++item) {
            const Job &job = jobs[item / (most * shape.kv_heads)];
            const int64_t part = item / shape.kv_heads % most;
            if (part < job.parts)
                attend<T, C, DIM>(shape, job, item % shape.kv_heads, part, q, q_row, k, v, scratch);
        }
#pragma omp for schedule(static)
        for (int64_t end = 0; end < ends; ++end) {
            const Job &job = jobs[end / (most_rows * shape.heads)];
            const int64_t row = end / shape.heads % most_rows;
            if (row < job.rows) join(shape, job, row, end % shape.heads, scratch, out, out_row);
        }
    }
}

#ifdef __clang__
#define AS_WRITTEN
#else
#define AS_WRITTEN __attribute__((optimize("fp-contract=off")))
#endif

// Half-split rotation of one head, each product and sum rounded to T as torch rounds them: a row has the same bits whether
// it is rotated here or there, so products and sums must not become one operation.
template <typename T>
AS_WRITTEN static void rotate(const T *x, const T *cos, const T *sin, int64_t half, int64_t dim, T *out) {
#ifdef __clang__
#pragma clang fp contract(off)
#endif
    for (int64_t i = 0; i < half; ++i) {
        const float c = up(cos[i]), s = up(sin[i]), one = up(x[i]), two = up(x[half + i]);
        T a, b, d, e;
        put(&a, one * c), put(&b, two * s), put(&d, two * c), put(&e, one * s);
        put(out + i, up(a) - up(b)), put(out + half + i, up(d) + up(e));
    }
    for (int64_t i = 2 * half; i < dim; ++i) out[i] = x[i];
}

struct Call {
    const void *q, *k, *v;  // [tokens, heads | kv_heads, dim], whose rows may lie apart
    const void *cos, *sin;  // [tokens, half], or null
    void *k_cache, *v_cache;
    const int64_t *slots;  // [tokens]; null where keys and values are in the cache already
    void *rotated;         // [tokens, heads, dim]
    void *out;             // [tokens, heads, dim]
    const Job *jobs;
    float *scratch;
    int64_t tokens, count, half;
    int64_t q_row, k_row, v_row;
    int64_t threads;
};

// Rotates q and k and puts k and v into the cache.
template <typename T>
static void append(const Shape &shape, const Call &call) {
    const int64_t dim = shape.dim, heads = shape.heads, kv_heads = shape.kv_heads;
#pragma omp parallel for schedule(static) num_threads(call.threads) if (call.tokens * heads > 64)
    for (int64_t t = 0; t < call.tokens; ++t) {
        const int64_t slot = call.slots[t];
        const int64_t at = slot / shape.page_size * shape.page_stride + slot % shape.page_size * shape.token_stride;
        const T *k = (const T *)call.k + t * call.k_row, *v = (const T *)call.v + t * call.v_row;
        const T *cos = (const T *)call.cos + t * call.half, *sin = (const T *)call.sin + t * call.half;
        for (int64_t h = 0; h < kv_heads; ++h) {
            T *to = (T *)call.k_cache + at + h * shape.head_stride;
            if (call.cos)
                rotate(k + h * dim, cos, sin, call.half, dim, to);
            else
                memcpy(to, k + h * dim, dim * sizeof(T));
            memcpy((T *)call.v_cache + at + h * shape.head_stride, v + h * dim, dim * sizeof(T));
        }
        if (call.cos)
            for (int64_t h = 0; h < heads; ++h)
                rotate((const T *)call.q + t * call.q_row + h * dim, cos, sin, call.half, dim,
                       (T *)call.rotated + (t * heads + h) * dim);
    }
}

template <typename T, typename C>
static void of_any_size(const Shape &shape, const Call &call) {
    const bool turned = call.slots && call.cos;
    const int64_t q_row = turned ? shape.heads * shape.dim : call.q_row, out_row = shape.heads * shape.dim;
    auto *chosen = shape.dim == 64 ? run<T, C, 64> : shape.dim == 128 ? run<T, C, 128> : run<T, C, 0>;
    chosen(shape, call.jobs, call.count, (const T *)(turned ? call.rotated : call.q), q_row, (const C *)call.k_cache,
           (const C *)call.v_cache, (T *)call.out, out_row, call.scratch, (int)call.threads);
}

extern "C" void attend_float32(const Shape *shape, const Call *call) {
    if (call->slots) append<float>(*shape, *call);
    of_any_size<float, float>(*shape, *call);
}

extern "C" void attend_bfloat16(const Shape *shape, const Call *call) {
    if (call->slots) append<bf16>(*shape, *call);
    of_any_size<bf16, bf16>(*shape, *call);
}

// Eight bits are written by the caller, who knows the scales.
extern "C" void attend_float32_fp8(const Shape *shape, const Call *call) { of_any_size<float, fp8>(*shape, *call); }
extern "C" void attend_bfloat16_fp8(const Shape *shape, const Call *call) { of_any_size<bf16, fp8>(*shape, *call); }
