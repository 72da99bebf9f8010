/* How fast this machine reads memory: nanoseconds in which all threads read `count` numbers once, in order. */
#include <stdint.h>
#include <time.h>

int64_t read_all(const float *numbers, int64_t count, int threads, float *result) {
    struct timespec start, end;
    float total = 0;
    clock_gettime(CLOCK_MONOTONIC, &start);
#pragma omp parallel for simd reduction(+ : total) schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) total += numbers[i];
    clock_gettime(CLOCK_MONOTONIC, &end);
    *result = total;
    return (end.tv_sec - start.tv_sec) * 1000000000LL + end.tv_nsec - start.tv_nsec;
}
