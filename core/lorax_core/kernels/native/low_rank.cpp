// Low-rank updates of many adapters in one call: y[rows, columns] += (x[rows] A^T) B^T for each job.
//
// A job is one adapter's update of one range of columns for one run of rows. No two jobs share both rows and columns. First
// all x A^T are computed, then all sums of y; each half is divided among threads by its cost, in the order of memory, reading
// ahead across jobs. Sums are kept in float32 whatever the tensors hold, each in one order: a row has the same bits beside any
// others. For long runs of rows a matrix product of the library is faster: the caller keeps those to itself.

// A row must not have other bits where the compiler sees another number of rows.
#ifdef __clang__
#pragma clang fp reassociate(off)
#else
#pragma GCC optimize("no-associative-math")
#endif

#include "numbers.h"

#ifdef _OPENMP
// Not from omp.h, which compilers for other processors may lack.
extern "C" int omp_get_thread_num(void), omp_get_num_threads(void);
#endif
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

struct Job {
    const void *a;      // [rank, in]
    const void *b;      // [rank, width]
    int64_t row, rows;  // which rows of x and y
    int64_t rank;
    int64_t column, width;  // which columns of y
    int64_t at;             // where its x A^T `[rows, rank]` goes in the scratch
};

static const int64_t AHEAD = 1024;  // bytes of each row of A or B
static const int64_t RANKS = 8;     // rows of A that are read together
static const int64_t TILE = 64;     // columns of B that are read together

// How many neighbouring inputs `times` takes, and their products with x added to 16 sums.
static inline int64_t taken(const float *) { return LANES; }
static inline int64_t taken(const bf16 *) { return 2 * LANES; }
static inline Floats times(Floats sum, const float *x, const float *a) { return sum + load(x) * load(a); }

static inline Floats times(Floats sum, const bf16 *x, const bf16 *a) {
#ifdef __AVX512BF16__
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(x), (__m512bh)_mm512_loadu_si512(a));
#else
    sum += load(x) * load(a);
    return sum + load(x + LANES) * load(a + LANES);
#endif
}

// x A^T for `M` rows of x and `N` of A; `next` is where the rows of A lie that are read after these.
template <typename T, int M, int N>
static void shrink(const T *x, int64_t x_row, const T *a, int64_t in, const T *next, float *h, int64_t rank) {
    const int64_t step = taken(a), whole = in - in % step, ahead = AHEAD / sizeof(T);
    Floats sum[M][N] = {};
    int64_t i = 0;
    for (int part = 0; part < 2; ++part) {
        const int64_t stop = part ? whole : whole > ahead ? whole - ahead : 0;
        const int64_t from = part ? (next - a) + ahead - whole : ahead;
        for (; i < stop; i += step) {
            for (int n = 0; n < N; ++n) __builtin_prefetch(a + n * in + i + from);
            for (int m = 0; m < M; ++m)
                for (int n = 0; n < N; ++n) sum[m][n] = times(sum[m][n], x + m * x_row + i, a + n * in + i);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) {
            float found = total(sum[m][n]);
            for (int64_t k = whole; k < in; ++k) found += up(x[m * x_row + k]) * up(a[n * in + k]);
            h[m * rank + n] = found;
        }
}

template <typename T, int N>
static void shrink_rows(const T *x, int64_t x_row, int64_t rows, const T *a, int64_t in, const T *next, float *h,
                        int64_t rank) {
    for (; rows >= 2; rows -= 2, x += 2 * x_row, h += 2 * rank) shrink<T, 2, N>(x, x_row, a, in, next, h, rank);
    if (rows) shrink<T, 1, N>(x, x_row, a, in, next, h, rank);
}

// Columns of y `[M, count]`, count at most TILE, plus h `[M, rank]` times B; `next` and `next_row` tell which B is read later.
template <typename T, int M>
static void expand(const float *h, int64_t rank, const T *b, int64_t b_row, const T *next, int64_t next_row, T *y,
                   int64_t y_row, int64_t count) {
    if (count < TILE) {
        for (int m = 0; m < M; ++m)
            for (int64_t i = 0; i < count; ++i) {
                float sum = up(y[m * y_row + i]);
                for (int64_t k = 0; k < rank; ++k) sum = __builtin_fmaf(h[m * rank + k], up(b[k * b_row + i]), sum);
                put(y + m * y_row + i, sum);
            }
        return;
    }
    const int Z = TILE / LANES;
    Floats sum[M][Z];
    for (int m = 0; m < M; ++m)
        for (int z = 0; z < Z; ++z) sum[m][z] = load(y + m * y_row + z * LANES);
    for (int64_t k = 0; k < rank; ++k) {
        Floats weights[Z];
        for (int z = 0; z < Z; ++z) weights[z] = load(b + k * b_row + z * LANES);
        for (int64_t z = 0; z < TILE; z += 64 / (int64_t)sizeof(T)) __builtin_prefetch(next + k * next_row + z);
        for (int m = 0; m < M; ++m)
            for (int z = 0; z < Z; ++z) sum[m][z] += weights[z] * h[m * rank + k];
    }
    for (int m = 0; m < M; ++m)
        for (int z = 0; z < Z; ++z)
            for (int i = 0; i < LANES; ++i) put(y + m * y_row + z * LANES + i, sum[m][z][i]);
}

// Calls `work(job, next job, first, last)` for the parts of jobs that are this thread's: `units(job)` in all, each of `cost`.
template <typename Units, typename Cost, typename Work>
static void share(const Job *jobs, int64_t count, int64_t thread, int64_t threads, Units units, Cost cost, Work work) {
    int64_t all = 0, before = 0;
    for (int64_t p = 0; p < count; ++p) all += units(jobs[p]) * cost(jobs[p]);
    const int64_t low = all * thread / threads, high = all * (thread + 1) / threads;
    for (int64_t p = 0; p < count && before < high; ++p) {
        const int64_t many = units(jobs[p]), each = cost(jobs[p]);
        if (many == 0 || each == 0) continue;  // of no rank or width
        // A unit is the thread's in whose share it begins.
        const int64_t first = low <= before ? 0 : (low - before + each - 1) / each;
        const int64_t last = (high - before + each - 1) / each;
        if (first < many) work(jobs[p], jobs[p + 1 < count ? p + 1 : p], first, last < many ? last : many);
        before += many * each;
    }
}

template <typename T>
static void run(const T *x, int64_t x_row, T *y, int64_t y_row, int64_t in, const Job *jobs, int64_t count, float *scratch,
                int threads) {
    auto passes = [](const Job &job) { return job.rows < 2 ? (int64_t)2 : job.rows; };
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
#else
        const int64_t thread = 0, all = 1;
#endif
        share(
            jobs, count, thread, all, [](const Job &job) { return (job.rank + RANKS - 1) / RANKS; },
            [&](const Job &job) { return passes(job) * in; },
            [&](const Job &job, const Job &after, int64_t first, int64_t last) {
                for (int64_t unit = first; unit < last; ++unit) {
                    const int64_t stop = (unit + 1) * RANKS < job.rank ? (unit + 1) * RANKS : job.rank;
                    const T *following = unit + 1 < last ? (const T *)job.a + stop * in : (const T *)after.a;
                    const T *from = x + job.row * x_row;
                    int64_t k = unit * RANKS;
                    while (k < stop) {
                        const T *a = (const T *)job.a + k * in;
                        float *h = scratch + job.at + k;
                        if (k + 8 <= stop)
                            shrink_rows<T, 8>(from, x_row, job.rows, a, in, following, h, job.rank), k += 8;
                        else if (k + 4 <= stop)
                            shrink_rows<T, 4>(from, x_row, job.rows, a, in, following, h, job.rank), k += 4;
                        else
                            shrink_rows<T, 1>(from, x_row, job.rows, a, in, following, h, job.rank), k += 1;
                    }
                }
            });
#pragma omp barrier
        share(
            jobs, count, thread, all, [](const Job &job) { return (job.width + TILE - 1) / TILE; },
            [&](const Job &job) { return passes(job) * job.rank; },
            [&](const Job &job, const Job &after, int64_t first, int64_t last) {
                const int64_t ahead = AHEAD / (int64_t)sizeof(T) / TILE;
                for (int64_t unit = first; unit < last; ++unit) {
                    const int64_t column = unit * TILE;
                    const int64_t many = job.width - column < TILE ? job.width - column : TILE;
                    const T *b = (const T *)job.b + column;
                    const bool here = unit + ahead < last;
                    const T *next = here ? b + ahead * TILE : (const T *)after.b + (unit + ahead - last) * TILE;
                    const int64_t next_row = here ? job.width : after.width;
                    const float *h = scratch + job.at;
                    T *out = y + job.row * y_row + job.column + column;
                    int64_t rows = job.rows;
                    for (; rows >= 4; rows -= 4, h += 4 * job.rank, out += 4 * y_row)
                        expand<T, 4>(h, job.rank, b, job.width, next, next_row, out, y_row, many);
                    for (; rows; --rows, h += job.rank, out += y_row)
                        expand<T, 1>(h, job.rank, b, job.width, next, next_row, out, y_row, many);
                }
            });
    }
}

extern "C" void low_rank_float32(const float *x, int64_t x_stride, float *y, int64_t y_stride, int64_t in,
                                 const Job *jobs, int64_t count, float *scratch, int threads) {
    run(x, x_stride, y, y_stride, in, jobs, count, scratch, threads);
}

extern "C" void low_rank_bfloat16(const bf16 *x, int64_t x_stride, bf16 *y, int64_t y_stride, int64_t in,
                                  const Job *jobs, int64_t count, float *scratch, int threads) {
    run(x, x_stride, y, y_stride, in, jobs, count, scratch, threads);
}
