// Numbers of 16 and 32 bits, and vectors of them, for all sources beside this.
//
// Decides how bfloat16 is read and rounded. Knows nothing of what is computed.

#ifndef LORAX_NUMBERS_H
#define LORAX_NUMBERS_H

#include <cstdint>
#include <cstring>

// Vectors wider than the processor's own are handed on in memory. No function that takes them leaves its source, so compilers
// need not agree on how.
#pragma GCC diagnostic ignored "-Wpsabi"

typedef uint16_t bf16;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

static const int64_t LANES = 16;

static inline float up(float value) { return value; }

static inline float up(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

// To the nearest, ties to even; NaN stays NaN.
static inline bf16 rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    return nan ? 0x7fc0 : (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline void put(float *at, float value) { *at = value; }
static inline void put(bf16 *at, float value) { *at = rounded(value); }

static inline Floats all(float value) { return value - (Floats){}; }

static inline Floats load(const float *at) {
    Floats found;
    memcpy(&found, at, sizeof found);
    return found;
}

static inline Floats load(const bf16 *at) {
    Halves found;
    memcpy(&found, at, sizeof found);
    return (Floats)(__builtin_convertvector(found, Words) << 16);
}

static inline void store(float *at, Floats value) { memcpy(at, &value, sizeof value); }

#endif
