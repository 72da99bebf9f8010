// Numbers of 16 and 32 bits, and vectors of them, for all sources beside this.
//
// Decides how bfloat16 is read and rounded, and what a vector is where the processor's own are narrower. Knows nothing of what is computed.

#ifndef LORAX_NUMBERS_H
#define LORAX_NUMBERS_H

#include <cstdint>
#include <cstring>

// Vectors wider than the processor's own are handed on in memory. No function that takes them leaves its source, so compilers
// need not agree on how.
#pragma GCC diagnostic ignored "-Wpsabi"

typedef uint16_t bf16;

#if defined(__AVX512F__) || defined(__clang__)

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

template <typename To, typename From>
static inline To converted(From value) { return __builtin_convertvector(value, To); }

template <typename V>
static inline void read(V &to, const void *at) { memcpy(&to, at, sizeof to); }
template <typename V>
static inline void write(void *at, V value) { memcpy(at, &value, sizeof value); }

// NaN stays NaN.
static inline Floats at_least(Floats value, Floats least) { return value < least ? least : value; }
static inline Floats at_most(Floats value, Floats most) { return value > most ? most : value; }

#else  // GCC keeps vectors in memory that are wider than the processor's own: they are made of two narrower ones

#define INLINE static inline __attribute__((always_inline))

template <typename V>
struct Pair {
    V low, high;
    template <typename U>
    __attribute__((always_inline)) explicit operator Pair<U>() const { return {(U)low, (U)high}; }
    __attribute__((always_inline)) auto operator[](int64_t i) const {
        const int64_t half = sizeof(V) / sizeof(float);  // of what is indexed the numbers have 32 bits
        return i < half ? low[i] : high[i - half];
    }
};

#define EACH(OP)                                                                                                        \
    template <typename V>                                                                                               \
    INLINE Pair<V> operator OP(Pair<V> a, Pair<V> b) { return {a.low OP b.low, a.high OP b.high}; }                     \
    template <typename V, typename S>                                                                                   \
    INLINE Pair<V> operator OP(Pair<V> a, S b) { return {a.low OP b, a.high OP b}; }
EACH(+)
EACH(-)
EACH(*)
EACH(/)
EACH(&)
EACH(^)
EACH(|)
EACH(<<)
EACH(>>)
#undef EACH

template <typename V>
INLINE Pair<V> operator-(float a, Pair<V> b) { return {a - b.low, a - b.high}; }
template <typename V>
INLINE Pair<V> operator/(float a, Pair<V> b) { return {a / b.low, a / b.high}; }
template <typename V, typename S>
INLINE Pair<V> &operator+=(Pair<V> &a, S b) { return a = a + b; }

template <typename To, typename From>
struct Converting {
    static inline __attribute__((always_inline)) To of(From value) { return __builtin_convertvector(value, To); }
};
template <typename To, typename From>
struct Converting<Pair<To>, Pair<From>> {
    static inline __attribute__((always_inline)) Pair<To> of(Pair<From> value) {
        return {Converting<To, From>::of(value.low), Converting<To, From>::of(value.high)};
    }
};
template <typename To, typename From>
INLINE To converted(From value) { return Converting<To, From>::of(value); }

// Part by part: GCC copies a whole pair in pieces of 16 bytes, and reading those as one waits for all of them.
template <typename V>
INLINE void read(V &to, const void *at) { memcpy(&to, at, sizeof to); }
template <typename V>
INLINE void read(Pair<V> &to, const void *at) { read(to.low, at), read(to.high, (const char *)at + sizeof(V)); }
template <typename V>
INLINE void write(void *at, V value) { memcpy(at, &value, sizeof value); }
template <typename V>
INLINE void write(void *at, Pair<V> value) { write(at, value.low), write((char *)at + sizeof(V), value.high); }

template <typename V>
INLINE V at_least(V value, V least) { return value < least ? least : value; }
template <typename V>
INLINE Pair<V> at_least(Pair<V> value, Pair<V> least) { return {at_least(value.low, least.low), at_least(value.high, least.high)}; }
template <typename V>
INLINE V at_most(V value, V most) { return value > most ? most : value; }
template <typename V>
INLINE Pair<V> at_most(Pair<V> value, Pair<V> most) { return {at_most(value.low, most.low), at_most(value.high, most.high)}; }

#ifdef __AVX__
typedef float Floats8 __attribute__((vector_size(32)));
typedef int32_t Ints8 __attribute__((vector_size(32)));
typedef uint32_t Words8 __attribute__((vector_size(32)));
typedef uint16_t Halves8 __attribute__((vector_size(16)));
typedef Pair<Floats8> Floats;
typedef Pair<Ints8> Ints;
typedef Pair<Words8> Words;
typedef Pair<Halves8> Halves;
#else
typedef float Floats4 __attribute__((vector_size(16)));
typedef int32_t Ints4 __attribute__((vector_size(16)));
typedef uint32_t Words4 __attribute__((vector_size(16)));
typedef uint16_t Halves4 __attribute__((vector_size(8)));
typedef Pair<Pair<Floats4>> Floats;
typedef Pair<Pair<Ints4>> Ints;
typedef Pair<Pair<Words4>> Words;
typedef Pair<Pair<Halves4>> Halves;
#endif
#undef INLINE

#endif

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
    read(found, at);
    return found;
}

static inline Floats load(const bf16 *at) {
    Halves found;
    read(found, at);
    return (Floats)(converted<Words>(found) << 16);
}

static inline void store(float *at, Floats value) { write(at, value); }

static inline float total(Floats sum) {
    float found = 0;
    for (int i = 0; i < LANES; ++i) found += sum[i];
    return found;
}

#endif
