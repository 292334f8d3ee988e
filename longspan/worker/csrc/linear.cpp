// y = x W^T + b for the few rows x of a decode step: weights are read once, at memory's speed.
//
// Libraries' matrix products repack the weights first, which costs more than the product when there
// are few rows. Here four rows of W, where they lie, meet up to three rows of x at a time. Sums are float32,
// in an order that does not depend on how many rows there are. W and b are float32 or bfloat16; y is
// rounded to their type once.

#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __FMA__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int lanes = 16;
#else
constexpr int lanes = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * lanes)));
typedef uint32_t Words __attribute__((vector_size(4 * lanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * lanes)));

struct BFloat16 {
    uint16_t bits;
};

inline Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

inline Floats load(const BFloat16* from) {
    Halves bits;
    std::memcpy(&bits, from, sizeof bits);
    return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

// Asked for by name: compilers fuse in some tiles and not in others, and rows would differ by tile.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

inline float widened(float value) { return value; }

inline float widened(BFloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void store(float value, float* to) { *to = value; }

// To the nearest, of two equally near the even one; a NaN stays one.
inline void store(float value, BFloat16* to) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bool number = value == value;
    to->bits = number ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : uint16_t(0x7fc0);
}

inline float sum(Floats values) {
    typedef float Quad __attribute__((vector_size(16)));
    Quad quads[lanes / 4];
    std::memcpy(quads, &values, sizeof values);
    Quad all = quads[0] + quads[1];
    if (lanes == 16) all += quads[lanes / 4 - 2] + quads[lanes / 4 - 1];
    return (all[0] + all[2]) + (all[1] + all[3]);
}

// `outputs` rows of w by `rows` rows of x.
template <int outputs, int rows, typename W, typename T>
inline void tile(const float* x, const W* w, const T* bias, T* y, int64_t k, int64_t n) {
    Floats sums[outputs][rows] = {};
    for (int64_t i = 0; i < k; i += lanes) {
        Floats own[rows];
        for (int r = 0; r < rows; r++) own[r] = load(x + r * k + i);
        for (int o = 0; o < outputs; o++) {
            Floats weights = load(w + o * k + i);
            for (int r = 0; r < rows; r++) sums[o][r] = fused(weights, own[r], sums[o][r]);
        }
    }
    for (int o = 0; o < outputs; o++)
        for (int r = 0; r < rows; r++)
            store(sum(sums[o][r]) + (bias ? widened(bias[o]) : 0), y + r * n + o);
}

template <int outputs, typename W, typename T>
inline void stripe(
    const float* x, const W* w, const T* bias, T* y, int64_t m, int64_t n, int64_t k) {
    int64_t r = 0;
    for (; m - r > 4 || m - r == 3; r += 3) tile<outputs, 3>(x + r * k, w, bias, y + r * n, k, n);
    for (; m - r >= 2; r += 2) tile<outputs, 2>(x + r * k, w, bias, y + r * n, k, n);
    if (r < m) tile<outputs, 1>(x + r * k, w, bias, y + r * n, k, n);
}

template <int outputs>
inline void stripe_of(
    const float* x, const float* w, const float* bias, float* y, int64_t m, int64_t n, int64_t k,
    float*) {
    stripe<outputs>(x, w, bias, y, m, n, k);
}

// With more than one tile to meet, weights are widened once, into `wide`.
template <int outputs>
inline void stripe_of(
    const float* x, const BFloat16* w, const BFloat16* bias, BFloat16* y, int64_t m, int64_t n,
    int64_t k, float* wide) {
    if (m <= 2) return stripe<outputs>(x, w, bias, y, m, n, k);
    for (int64_t i = 0; i < outputs * k; i += lanes) {
        Floats values = load(w + i);
        std::memcpy(wide + i, &values, sizeof values);
    }
    stripe<outputs>(x, wide, bias, y, m, n, k);
}

template <typename T>
void linear(
    const float* x, const T* w, const T* bias, T* y, int64_t m, int64_t n, int64_t k,
    int threads) {
    constexpr int outputs = 4;
    const int64_t whole = n / outputs * outputs;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> wide(sizeof(T) < sizeof(float) && m > 2 ? outputs * k : 0);
#pragma omp for schedule(static)
        for (int64_t o = 0; o < whole; o += outputs)
            stripe_of<outputs>(
                x, w + o * k, bias ? bias + o : nullptr, y + o, m, n, k, wide.data());
    }
    for (int64_t o = whole; o < n; o++)
        stripe<1>(x, w + o * k, bias ? bias + o : nullptr, y + o, m, n, k);
}

}  // namespace

// x [m, k] float32, w [n, k], bias [n] or null, y [m, n]; k is a multiple of 16; all contiguous.
extern "C" void longspan_linear_float32(
    const float* x, const float* w, const float* bias, float* y, int64_t m, int64_t n, int64_t k,
    int threads) {
    linear(x, w, bias, y, m, n, k, threads);
}

extern "C" void longspan_linear_bfloat16(
    const float* x, const BFloat16* w, const BFloat16* bias, BFloat16* y, int64_t m, int64_t n,
    int64_t k, int threads) {
    linear(x, w, bias, y, m, n, k, threads);
}
