// Low-rank updates of many adapters in one call: y[rows, columns] += (x[rows] A^T) B^T for each job.
//
// A job is one adapter's update of one range of columns for one run of rows. No two jobs share both rows and columns, so
// each is computed by one thread. Sums are kept in float32 whatever the tensors hold. Weights are read once for each row; for
// long runs of rows a matrix product of the library is faster: the caller keeps those to itself.

#include "numbers.h"

struct Job {
    const void *a;      // [rank, in]
    const void *b;      // [rank, width]
    int64_t row, rows;  // which rows of x and y
    int64_t rank;
    int64_t column, width;  // which columns of y
    int64_t at;             // where its x A^T `[rows, rank]` goes in the scratch
};

static const int64_t TILE = 512;  // columns of y that are kept at hand

template <typename T>
static void shrink(const T *x, int64_t in, const T *a, int64_t rank, float *out) {
    int64_t k = 0;
    for (; k + 4 <= rank; k += 4) {  // four at a time, so that each number of x is read once for four
        const T *a0 = a + k * in, *a1 = a0 + in, *a2 = a1 + in, *a3 = a2 + in;
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        for (int64_t i = 0; i < in; ++i) {
            float value = up(x[i]);
            s0 += value * up(a0[i]);
            s1 += value * up(a1[i]);
            s2 += value * up(a2[i]);
            s3 += value * up(a3[i]);
        }
        out[k] = s0, out[k + 1] = s1, out[k + 2] = s2, out[k + 3] = s3;
    }
    for (; k < rank; ++k) {
        float sum = 0;
        for (int64_t i = 0; i < in; ++i) sum += up(x[i]) * up(a[k * in + i]);
        out[k] = sum;
    }
}

template <typename T>
static void expand(const float *h, int64_t rank, const T *b, int64_t stride, T *y, int64_t count) {
    float sum[TILE];
    for (int64_t i = 0; i < count; ++i) sum[i] = up(y[i]);
    int64_t k = 0;
    for (; k + 4 <= rank; k += 4) {
        const T *b0 = b + k * stride, *b1 = b0 + stride, *b2 = b1 + stride, *b3 = b2 + stride;
        float h0 = h[k], h1 = h[k + 1], h2 = h[k + 2], h3 = h[k + 3];
        for (int64_t i = 0; i < count; ++i) sum[i] += h0 * up(b0[i]) + h1 * up(b1[i]) + h2 * up(b2[i]) + h3 * up(b3[i]);
    }
    for (; k < rank; ++k)
        for (int64_t i = 0; i < count; ++i) sum[i] += h[k] * up(b[k * stride + i]);
    for (int64_t i = 0; i < count; ++i) put(y + i, sum[i]);
}

template <typename T>
static void run(const T *x, int64_t x_stride, T *y, int64_t y_stride, int64_t in, const Job *jobs, int64_t count,
                float *scratch, int threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t p = 0; p < count; ++p) {
        const Job &job = jobs[p];
        float *h = scratch + job.at;
        for (int64_t r = 0; r < job.rows; ++r)
            shrink(x + (job.row + r) * x_stride, in, (const T *)job.a, job.rank, h + r * job.rank);
        for (int64_t begin = 0; begin < job.width; begin += TILE) {
            int64_t columns = job.width - begin < TILE ? job.width - begin : TILE;
            for (int64_t r = 0; r < job.rows; ++r)
                expand(h + r * job.rank, job.rank, (const T *)job.b + begin, job.width,
                       y + (job.row + r) * y_stride + job.column + begin, columns);
        }
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
