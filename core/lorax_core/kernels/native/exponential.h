// The exponential of a vector.

#ifndef LORAX_EXPONENTIAL_H
#define LORAX_EXPONENTIAL_H

#include "numbers.h"

// e^x to about 1e-7 of itself; 0 and infinity where float32 holds no other answer, and NaN stays NaN.
static inline Floats exponential(Floats x) {
    x = at_most(at_least(x, all(-104.0f)), all(89.0f));
    // To the nearest whole number. Not by adding a large one: sums may be reordered, which would undo it.
    const Floats half_away = (Floats)(((Words)x & 0x80000000u) | 0x3f000000u);  // 0.5 with the sign of x
    const Ints whole = converted<Ints>(x * 1.44269504088896341f + half_away);
    const Floats n = converted<Floats>(whole);
    // Constants as in Cephes: ln 2 in two parts, so that the first product is exact.
    Floats r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // 2^n in two steps: one alone would leave the exponents of float32 where the result is small or large.
    const Ints half = whole >> 1, rest = whole - half;
    return p * (Floats)((half + 127) << 23) * (Floats)((rest + 127) << 23);
}

#endif
