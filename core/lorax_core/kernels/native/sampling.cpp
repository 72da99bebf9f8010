// From float32 logits to tokens, scores and masked logits, a row of the batch at a time.
//
// A row is read once for its largest number, and once more only where its settings need the mass of the whole vocabulary. The
// largest number of each block of neighbours shows where the most likely tokens lie, so the vocabulary is never sorted. A row is
// computed by one thread, in one order: its token depends on nothing else in the batch. Sums and exponentials are in float64,
// as a sum of many small float32 loses them.

#include <algorithm>

#include "numbers.h"

#ifdef __AVX512F__
#define WIDTH 64
#else  // GCC keeps in memory what is wider than the processor's own
#define WIDTH 32
#endif
typedef float Singles __attribute__((vector_size(WIDTH)));
typedef int32_t Flags __attribute__((vector_size(WIDTH)));
typedef double Doubles __attribute__((vector_size(WIDTH)));
typedef int64_t Longs __attribute__((vector_size(WIDTH)));
typedef int32_t Whole __attribute__((vector_size(WIDTH / 2)));
typedef float Narrow __attribute__((vector_size(WIDTH / 2)));
typedef float Eight __attribute__((vector_size(32)));
typedef int32_t Bits __attribute__((vector_size(32)));
static const int64_t SINGLES = WIDTH / 4, DOUBLES = WIDTH / 8;

static const int64_t BLOCK = 128;
static const int64_t FIRST = 256;  // candidates that are looked at first where only their mass says how many are needed
static const float NOTHING = -__builtin_inff();

// In the order of the dtype in sampling.py. A temperature of 0 is greedy; a top_k of 0 leaves all.
struct Settings {
    double temperature, point, top_p, min_p, typical_p;
    int64_t top_k;
};

struct Near { double distance; uint64_t key; };

// What one thread writes to while it computes a row.
struct Scratch {
    float *maxima;     // [blocks]
    double *sums;      // [blocks]
    uint64_t *keys;    // [vocab]
    double *mass;      // [vocab]
    Near *near;        // [vocab]
};

struct Peak { float best; bool nan; };

static inline int64_t blocks_of(int64_t vocab) { return (vocab + BLOCK - 1) / BLOCK; }

// The numbers of a block, with nothing behind the end of the row.
static inline const float *block(const float *row, int64_t vocab, int64_t at, float *room) {
    const int64_t count = vocab - at * BLOCK;
    if (count >= BLOCK) return row + at * BLOCK;
    std::fill(room, room + BLOCK, NOTHING);
    std::copy(row + at * BLOCK, row + vocab, room);
    return room;
}

static Peak peak(const float *row, int64_t vocab, float *maxima) {
    float room[BLOCK];
    Flags nan = {};
    float best = NOTHING;
    for (int64_t at = 0; at < blocks_of(vocab); ++at) {
        const float *x = block(row, vocab, at, room);
        Singles most, values;
        read(most, x);
        nan |= most != most;
        for (int64_t i = SINGLES; i < BLOCK; i += SINGLES) {
            read(values, x + i);
            nan |= values != values;
            most = values > most ? values : most;
        }
        float one = NOTHING;
        for (int64_t i = 0; i < SINGLES; ++i) one = most[i] > one ? most[i] : one;
        maxima[at] = one;
        best = one > best ? one : best;
    }
    bool any = false;
    for (int64_t i = 0; i < SINGLES; ++i) any |= nan[i] != 0;
    return {best, any};
}

static inline bool finite(const Peak &found) { return !found.nan && found.best > NOTHING && found.best < -NOTHING; }

// The first of the largest.
static int64_t first_best(const float *row, int64_t vocab, const float *maxima, float best) {
    int64_t at = 0;
    while (at < blocks_of(vocab) - 1 && maxima[at] != best) ++at;
    for (int64_t i = at * BLOCK; i < vocab; ++i)
        if (row[i] == best) return i;
    return 0;
}

// e^x for x <= 0, to the last bits of a double; 0 below -708.
static inline Doubles exponential(Doubles x) {
    const Doubles lowest = Doubles{} - 708.0, safe = x < lowest ? lowest : x;
    const Whole twos = __builtin_convertvector(safe * 1.4426950408889634 - 0.5, Whole);
    const Doubles r = safe - __builtin_convertvector(twos, Doubles) * 0.6931471805599453;
    // Taylor's series: r is at most ln(2) / 2 away from 0.
    Doubles sum = Doubles{} + 1.0 / 479001600;
    for (double factor : {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120,
                          1.0 / 24, 1.0 / 6, 1.0 / 2, 1.0, 1.0})
        sum = sum * r + factor;
    const Doubles power = (Doubles)((__builtin_convertvector(twos, Longs) + 1023) << 52);
    return x < lowest ? Doubles{} : sum * power;
}

// No temperature above 0 is too small: the largest number is at 0, and all others at nothing.
static inline double inverse(double temperature) { return temperature > 1e-300 ? 1.0 / temperature : 1e300; }

// How far some logits are below the best, over the temperature.
static inline Doubles below(const float *x, float best, double scale) {
    Narrow values;
    read(values, x);
    return (__builtin_convertvector(values, Doubles) - (double)best) * scale;
}

static inline Doubles mass_of(const float *x, float best, double scale) { return exponential(below(x, best, scale)); }

static inline double mass_of(float x, float best, double scale) {
    float same[DOUBLES];
    std::fill(same, same + DOUBLES, x);
    return mass_of(same, best, scale)[0];
}

// The mass of the whole row, the most likely token having 1; of each block in `sums`.
static double total_mass(const float *row, int64_t vocab, float best, double scale, double *sums) {
    float room[BLOCK];
    double total = 0;
    for (int64_t at = 0; at < blocks_of(vocab); ++at) {
        const float *x = block(row, vocab, at, room);
        Doubles sum = {};
        for (int64_t i = 0; i < BLOCK; i += DOUBLES) sum += mass_of(x + i, best, scale);
        double one = 0;
        for (int64_t i = 0; i < DOUBLES; ++i) one += sum[i];
        sums[at] = one;
        total += one;
    }
    return total;
}

// Inverse transform over the whole vocabulary, in its order.
static int64_t draw(const float *row, int64_t vocab, float best, double scale, double point, double *sums) {
    const double target = point * total_mass(row, vocab, best, scale, sums);
    const int64_t blocks = blocks_of(vocab);
    int64_t at = 0, last = 0;
    double before = 0;
    // Rounding may push a draw past the last block that has mass.
    for (int64_t i = 0; i < blocks && before <= target; ++i)
        if (sums[i] > 0) at = i, last = 1, before += sums[i];
    before -= last ? sums[at] : 0;
    int64_t token = at * BLOCK;
    for (int64_t i = token; i < std::min(vocab, (at + 1) * BLOCK); ++i) {
        const double one = mass_of(row[i], best, scale);
        if (one <= 0) continue;
        token = i;
        before += one;
        if (before > target) break;
    }
    return token;
}

// Keys fall as logits fall; of equal logits the first token has the larger key.
static inline uint64_t key_of(float value, int64_t token) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (bits == 0x80000000u) bits = 0;  // -0 is no less than 0
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (uint32_t)~(uint32_t)token;
}

static inline int64_t token_of(uint64_t key) { return (int64_t)(uint32_t)~(uint32_t)key; }

// The tokens whose logit is not below `least`, in their order; gives how many.
static int64_t collect(const float *row, int64_t vocab, float least, Scratch to) {
    int64_t count = 0;
    for (int64_t at = 0; at < blocks_of(vocab); ++at) {
        if (to.maxima[at] < least) continue;
        for (int64_t i = at * BLOCK; i < std::min(vocab, (at + 1) * BLOCK); ++i)
            if (row[i] >= least) to.keys[count++] = key_of(row[i], i);
    }
    return count;
}

static inline bool larger(uint64_t a, uint64_t b) { return a > b; }

// The `wanted` most likely tokens in falling order.
static void most_likely(const float *row, int64_t vocab, int64_t wanted, Scratch to) {
    const int64_t blocks = blocks_of(vocab);
    float least = NOTHING;
    if (wanted < blocks) {
        // So many blocks have a number that is no less: so has the row.
        float *maxima = (float *)to.sums;
        std::copy(to.maxima, to.maxima + blocks, maxima);
        std::nth_element(maxima, maxima + wanted - 1, maxima + blocks, [](float a, float b) { return a > b; });
        least = maxima[wanted - 1];
    }
    const int64_t count = collect(row, vocab, least, to);
    if (wanted < count) std::nth_element(to.keys, to.keys + wanted - 1, to.keys + count, larger);
    std::sort(to.keys, to.keys + wanted, larger);
}

// A logit below which no token is left by top_p (of the whole mass `left`) and min_p.
static float least_kept(const float *row, int64_t vocab, float best, const Settings &by, double left, double scale) {
    static const int BINS = 1024;
    static const double STEP = 1.0 / 32;
    double bins[BINS] = {};
    float room[BLOCK];
    for (int64_t at = 0; at < blocks_of(vocab); ++at) {
        const float *x = block(row, vocab, at, room);
        for (int64_t i = 0; i < BLOCK; i += DOUBLES) {
            const Doubles one = below(x + i, best, scale), mass = exponential(one);
            const Doubles last = Doubles{} + (BINS - 1), far = one / -STEP;
            const Whole bin = __builtin_convertvector(far > last ? last : far, Whole);
            for (int64_t lane = 0; lane < DOUBLES; ++lane) bins[bin[lane]] += mass[lane];
        }
    }
    // A little more than top_p, as the sums are rounded.
    double before = 0;
    for (int bin = 0; bin < BINS - 1; ++bin) {
        before += bins[bin];
        const bool all = by.top_p < 1 && before >= left * by.top_p * (1 + 1e-9);
        if (all || exponential(Doubles{} - (bin + 1) * STEP)[0] < by.min_p * (1 - 1e-9))
            return (float)(best - (bin + 2) * STEP / scale);  // a bin more, for the rounding of logits
    }
    return NOTHING;
}

// How many of the candidates top_p and min_p keep; `left` is the mass that top_p is a share of. `more`: none was the first to go.
static int64_t kept(const Settings &by, const double *mass, int64_t count, double left, bool *more) {
    double before = 0;
    int64_t at = 0;
    while (at < count && before / left < by.top_p && mass[at] >= by.min_p) before += mass[at++];
    *more = at == count && before / left < by.top_p;
    return at;
}

// Leaves of `count` tokens, in any order, those whose surprise is nearest the entropy, up to a share of the mass; gives how many.
static int64_t typical(const float *row, float best, double scale, double share, int64_t count, Scratch to) {
    double total = 0, entropy = 0;
    for (int64_t i = 0; i < count; ++i) {
        // Their surprise, beside that of the most likely.
        to.near[i] = {((double)best - row[token_of(to.keys[i])]) * scale, to.keys[i]};
        total += to.mass[i];
    }
    for (int64_t i = 0; i < count; ++i) entropy += to.mass[i] > 0 ? to.mass[i] / total * to.near[i].distance : 0;
    for (int64_t i = 0; i < count; ++i) {
        const double distance = to.near[i].distance - entropy;
        to.near[i].distance = to.mass[i] > 0 ? (distance < 0 ? -distance : distance) : -(double)NOTHING;
    }
    // Ties fall to the likelier token.
    auto nearer = [](const Near &a, const Near &b) {
        return a.distance < b.distance || (a.distance == b.distance && a.key > b.key);
    };
    double before = 0;
    int64_t sorted = 0, at = 0;
    while (at < count && before / total < share) {
        if (at == sorted) {  // a part at a time: few are needed as a rule
            sorted = std::min(count, std::max(FIRST, sorted * 8));
            if (sorted < count) std::nth_element(to.near + at, to.near + sorted - 1, to.near + count, nearer);
            std::sort(to.near + at, to.near + sorted, nearer);
        }
        to.keys[at] = to.near[at].key;
        before += mass_of(row[token_of(to.near[at++].key)], best, scale);
    }
    return at;
}

static void masses(const float *row, float best, double scale, int64_t count, Scratch to) {
    for (int64_t i = 0; i < count; ++i) to.mass[i] = mass_of(row[token_of(to.keys[i])], best, scale);
}

// The tokens that top_k, top_p and min_p leave, with their mass; gives how many.
static int64_t filtered(const float *row, int64_t vocab, float best, const Settings &by, double scale, Scratch to) {
    const double all = -(double)NOTHING;
    if (by.top_k <= 0 && by.top_p >= 1 && by.min_p <= 0) {
        const int64_t count = collect(row, vocab, NOTHING, to);
        masses(row, best, scale, count, to);
        return count;
    }
    // Without a top_k the whole vocabulary is left.
    double left = by.top_k > 0 || by.top_p >= 1 ? 0 : total_mass(row, vocab, best, scale, to.sums);
    int64_t count = std::min(by.top_k > 0 ? by.top_k : FIRST, vocab);
    most_likely(row, vocab, count, to);
    masses(row, best, scale, count, to);
    if (by.top_k > 0)
        for (int64_t i = 0; i < count; ++i) left += to.mass[i];
    bool more;
    const int64_t keep = kept(by, to.mass, count, by.top_p < 1 ? left : all, &more);
    if (by.top_k > 0 || count == vocab || !more) return keep;
    count = collect(row, vocab, least_kept(row, vocab, best, by, left, scale), to);
    std::sort(to.keys, to.keys + count, larger);
    masses(row, best, scale, count, to);
    return kept(by, to.mass, count, by.top_p < 1 ? left : all, &more);
}

// Inverse transform over the tokens that the filters leave, most likely first.
static int64_t draw_filtered(const float *row, int64_t vocab, float best, const Settings &by, Scratch to) {
    const double scale = inverse(by.temperature);
    int64_t count = filtered(row, vocab, best, by, scale, to);
    if (by.typical_p < 1) {
        count = typical(row, best, scale, by.typical_p, count, to);
        std::sort(to.keys, to.keys + count, larger);
        masses(row, best, scale, count, to);
    }
    double total = 0, before = 0;
    for (int64_t i = 0; i < count; ++i) total += to.mass[i];
    int64_t at = 0;
    for (int64_t i = 0; i < count && before <= by.point * total; ++i)
        if (to.mass[i] > 0) at = i, before += to.mass[i];
    return token_of(to.keys[at]);
}

static int64_t token_for(const float *row, int64_t vocab, float best, const Settings &by, Scratch to) {
    if (by.temperature <= 0) return first_best(row, vocab, to.maxima, best);
    if (by.top_k > 0 || by.top_p < 1 || by.min_p > 0 || by.typical_p < 1) return draw_filtered(row, vocab, best, by, to);
    return draw(row, vocab, best, inverse(by.temperature), by.point, to.sums);
}

static Scratch part(char *scratch, int64_t vocab, int64_t thread) {
    // The order of the widths keeps each aligned; only what a row needs is touched.
    char *at = scratch + thread * vocab * 48;
    Scratch to;
    to.near = (Near *)at, at += vocab * 16;
    to.keys = (uint64_t *)at, at += vocab * 8;
    to.mass = (double *)at, at += vocab * 8;
    to.sums = (double *)at, at += blocks_of(vocab) * 8;
    to.maxima = (float *)at;
    return to;
}

// Does something with each row, in a thread that has memory of its own.
template <typename Do>
static void each(int64_t rows, int64_t vocab, char *scratch, int threads, Do with) {
    int started = 0;
#pragma omp parallel num_threads(threads)
    {
        int mine;
#pragma omp atomic capture
        mine = started++;
        const Scratch to = part(scratch, vocab, mine);
#pragma omp for schedule(dynamic, 1)
        for (int64_t r = 0; r < rows; ++r) with(r, to);
    }
}

// `raw` is what the model gave, of which `logits` were made; the same where nothing was changed. `sound` says that the model
// gave numbers, `open` that a token is left; the others' tokens are 0.
extern "C" void sample(const float *logits, int64_t row, const float *raw, int64_t raw_row, int64_t rows, int64_t vocab,
                       const Settings *settings, int64_t *tokens, bool *sound, bool *open, char *scratch, int threads) {
    each(rows, vocab, scratch, threads, [&](int64_t r, const Scratch &to) {
        const float *x = logits + r * row;
        sound[r] = raw == logits || finite(peak(raw + r * raw_row, vocab, to.maxima));
        const Peak found = peak(x, vocab, to.maxima);
        sound[r] &= raw != logits || finite(found);
        open[r] = sound[r] && found.best > NOTHING;
        tokens[r] = open[r] ? token_for(x, vocab, found.best, settings[r], to) : 0;
    });
}

// The most likely `count` tokens of each row with their logits, and the row's largest logit and mass at temperature 1. The mass
// of a row that is no distribution is NaN.
extern "C" void score(const float *logits, int64_t row, int64_t rows, int64_t vocab, int64_t count, int64_t *tokens,
                      float *values, float *best, double *mass, char *scratch, int threads) {
    each(rows, vocab, scratch, threads, [&](int64_t r, const Scratch &to) {
        const float *x = logits + r * row;
        const Peak found = peak(x, vocab, to.maxima);
        const bool sound = finite(found);
        best[r] = found.best;
        mass[r] = sound ? total_mass(x, vocab, found.best, 1.0, to.sums) : (double)__builtin_nanf("");
        if (sound && count > 0) most_likely(x, vocab, count, to);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t token = sound ? token_of(to.keys[i]) : i;
            tokens[r * count + i] = token;
            values[r * count + i] = x[token];
        }
    });
}

// -inf in the given rows for tokens whose bit is not set, the lowest first, and for those beyond the bits.
extern "C" void mask(float *logits, int64_t row, int64_t vocab, const int64_t *at, const uint8_t *bits, int64_t bytes,
                     int64_t masked, int threads) {
    const Bits bit = {1, 2, 4, 8, 16, 32, 64, 128};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t m = 0; m < masked; ++m) {
        float *x = logits + at[m] * row;
        const uint8_t *allowed = bits + m * bytes;
        int64_t i = 0;
        for (; i + 8 <= vocab && i / 8 < bytes; i += 8) {
            Eight values;
            read(values, x + i);
            values = ((Bits{} + (int32_t)allowed[i / 8]) & bit) != 0 ? values : Eight{} + NOTHING;
            write(x + i, values);
        }
        for (; i < vocab; ++i)
            if (i / 8 >= bytes || !(allowed[i / 8] >> i % 8 & 1)) x[i] = NOTHING;
    }
}
