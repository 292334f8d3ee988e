// Vectors of floats as wide as the target has them, in the types of GCC and Clang.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int VL = 16, MR = 12;  // floats in a vector; rows of a register tile: 24 accumulators
#elif defined(__AVX__)
constexpr int VL = 8, MR = 6;  // 12 accumulators of 16 registers
#else
constexpr int VL = 4, MR = 6;
#endif
constexpr int NR = 2 * VL;      // columns of a register tile

typedef float Vector __attribute__((vector_size(VL * 4)));
typedef int32_t Ints __attribute__((vector_size(VL * 4)));
typedef float Unaligned __attribute__((vector_size(VL * 4), aligned(4), may_alias));

constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LN2 = 0.69314718055994530942f;

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };
struct Int8 { int8_t bits; };  // rows of these end with the float32 that all are multiplied by

inline Vector splat(float x) { return x - Vector{}; }
inline Vector load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, Vector x) { *reinterpret_cast<Unaligned*>(p) = x; }

// Keeps the compiler from loading the same number again for each use.
inline Vector in_register(Vector x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#endif
    return x;
}

inline Vector load(const BFloat16* p) {
#if defined(__AVX512F__)
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
#elif defined(__AVX2__)
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
#else
    typedef uint16_t Halves __attribute__((vector_size(VL * 2), aligned(2), may_alias));
    typedef uint32_t Words __attribute__((vector_size(VL * 4)));
    const Halves halves = *reinterpret_cast<const Halves*>(p);
    return reinterpret_cast<Vector>(__builtin_convertvector(halves, Words) << 16);
#endif
}

// x y + z. Asked for by name where a result may not depend on which loop the compiler put it in.
inline Vector fused(Vector x, Vector y, Vector z) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(x, y, z);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(x, y, z);
#else
    return x * y + z;
#endif
}

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) {
    const uint32_t word = static_cast<uint32_t>(x.bits) << 16;
    float wide;
    __builtin_memcpy(&wide, &word, sizeof wide);
    return wide;
}

inline void narrow(float x, float* to) { *to = x; }

// To the nearest, of two equally near the even one; a NaN stays one.
inline void narrow(float x, BFloat16* to) {
    uint32_t word;
    __builtin_memcpy(&word, &x, sizeof word);
    const uint32_t rounded = (word + 0x7fffu + (word >> 16 & 1u)) >> 16;
    to->bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}

// A vector, in a row of either type.
inline void narrow(Vector x, float* to) { store(to, x); }
inline void narrow(Vector x, BFloat16* to) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
#else
    for (int i = 0; i < VL; ++i) narrow(x[i], to + i);
#endif
}

template <typename T>
inline void narrow_all(const float* x, T* to, int64_t numbers) {
    int64_t i = 0;
    for (; i + VL <= numbers; i += VL) narrow(load(x + i), to + i);
    for (; i < numbers; ++i) narrow(x[i], to + i);
}

inline float widen(Float16 x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    uint32_t word = (rest << 13) + 0x38000000u;          // normal: exponents are 112 apart
    if (rest >= 0x7c00u) word += 0x38000000u;            // infinity and NaN
    float wide;
    if (rest < 0x0400u) {                                // zero and subnormal
        wide = static_cast<float>(rest) * 5.9604644775390625e-8f;
        __builtin_memcpy(&word, &wide, sizeof word);
    }
    word |= sign;
    __builtin_memcpy(&wide, &word, sizeof wide);
    return wide;
}

inline Vector load(const Float16* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    Vector x;
    for (int i = 0; i < VL; ++i) x[i] = widen(p[i]);
    return x;
#endif
}

inline float widen(Int8 x) { return x.bits; }

inline Vector load(const Int8* p) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    Vector x;
    for (int i = 0; i < VL; ++i) x[i] = widen(p[i]);
    return x;
#endif
}

// Two vectors of numbers that lie side by side, in an order of their own: `number_at(i)` says which
// of the 2 VL numbers became the i-th. Pairs of bfloat16 come apart by a shift and a mask, which is
// less work than to widen them in order.
template <typename T>
inline void load_pair(const T* p, Vector& first, Vector& second) {
    if constexpr (std::is_same<T, BFloat16>::value) {
        typedef uint32_t Words __attribute__((vector_size(VL * 4), aligned(2), may_alias));
        const Words words = *reinterpret_cast<const Words*>(p);
        first = reinterpret_cast<Vector>(words << 16);
        second = reinterpret_cast<Vector>(words & 0xffff0000u);
    } else {
        first = load(p);
        second = load(p + VL);
    }
}

template <typename T>
constexpr int64_t number_at(int64_t i) {
    if (!std::is_same<T, BFloat16>::value) return i;
    return i / (2 * VL) * (2 * VL) + i % VL * 2 + i / VL % 2;
}

template <typename T>
constexpr bool HAS_SCALE = std::is_same<T, Int8>::value;

// What the numbers of a row are multiplied by.
template <typename T>
inline float scale_of(const T* row, int64_t numbers) {
    if constexpr (HAS_SCALE<T>) {
        float scale;
        __builtin_memcpy(&scale, row + numbers, sizeof scale);
        return scale;
    }
    return 1.0f;
}

inline Vector larger(Vector x, Vector y) { return x > y ? x : y; }

inline float largest(Vector x) {
    const auto fold = [&](auto distance) {
        Ints other;
        for (int i = 0; i < VL; ++i) other[i] = i ^ decltype(distance)::value;
        x = larger(x, __builtin_shuffle(x, other));
    };
    if constexpr (VL > 8) fold(std::integral_constant<int, 8>());
    if constexpr (VL > 4) fold(std::integral_constant<int, 4>());
    fold(std::integral_constant<int, 2>());
    fold(std::integral_constant<int, 1>());
    return x[0];
}

inline float sum(Vector x) {
    float total = 0;
    for (int i = 0; i < VL; ++i) total += x[i];
    return total;
}

#if defined(__AVX__)
// The sums of the low and of the high halves of four vectors.
inline __m256 sum_halves(const Vector* x) {
#if defined(__AVX512F__)
    const auto half = [](Vector x) {
        return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    };
#else
    const auto half = [](Vector x) { return x; };
#endif
    return _mm256_hadd_ps(_mm256_hadd_ps(half(x[0]), half(x[1])),
                          _mm256_hadd_ps(half(x[2]), half(x[3])));
}
#endif

// VL vectors as the columns of a square become its rows: in each round the vectors of a pair, some
// places apart, exchange what lies as many places apart in them.
inline void transpose(Vector (&x)[VL]) {
    const auto exchange = [&](auto distance) {
        constexpr int D = decltype(distance)::value;
        Ints low, high;
        for (int i = 0; i < VL; ++i) {
            low[i] = i & D ? VL + i - D : i;
            high[i] = i & D ? VL + i : i + D;
        }
#pragma GCC unroll 16
        for (int i = 0; i < VL; ++i) {
            if (i & D) continue;
            const Vector a = x[i], b = x[i + D];
            x[i] = __builtin_shuffle(a, b, low);
            x[i + D] = __builtin_shuffle(a, b, high);
        }
    };
    exchange(std::integral_constant<int, 1>());
    exchange(std::integral_constant<int, 2>());
    if constexpr (VL > 4) exchange(std::integral_constant<int, 4>());
    if constexpr (VL > 8) exchange(std::integral_constant<int, 8>());
}

// The sums of COUNT vectors, side by side; each is added up in the same order.
template <int COUNT>
inline void sum_each(const Vector* x, float* sums) {
    int i = 0;
#if defined(__AVX__)
    for (; i + 8 <= COUNT; i += 8) {
        const __m256 a = sum_halves(x + i), b = sum_halves(x + i + 4);
        _mm256_storeu_ps(sums + i, _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20),
                                                 _mm256_permute2f128_ps(a, b, 0x31)));
    }
    for (; i + 4 <= COUNT; i += 4) {
        const __m256 a = sum_halves(x + i);
        _mm_storeu_ps(sums + i, _mm_add_ps(_mm256_castps256_ps128(a),
                                           _mm256_extractf128_ps(a, 1)));
    }
#endif
    for (; i < COUNT; ++i) sums[i] = sum(x[i]);
}

#if defined(__AVX512F__)
// The sums of sixteen vectors, side by side. At each level two vectors become one: half of the
// numbers of each stay where they are, the others are brought beside them.
__attribute__((always_inline)) inline Vector sum_sixteen(const Vector* x) {
    __m512 four[4];
    for (int i = 0; i < 4; ++i) {
        const auto halves = [](__m512 a, __m512 b) {
            return _mm512_mask_blend_ps(0xff00, a, b) + _mm512_shuffle_f32x4(a, b, 0x4e);
        };
        const __m512 a = halves(x[i], x[i + 8]), b = halves(x[i + 4], x[i + 12]);
        const __m512 rest = _mm512_mask_blend_ps(0xf0f0, b, a);
        four[i] = _mm512_mask_blend_ps(0xf0f0, a, b) + _mm512_shuffle_f32x4(rest, rest, 0xb1);
    }
    const auto pairs = [](__m512 a, __m512 b) {
        const __m512 rest = _mm512_castpd_ps(
            _mm512_shuffle_pd(_mm512_castps_pd(a), _mm512_castps_pd(b), 0x55));
        return _mm512_mask_blend_ps(0xcccc, a, b) + rest;
    };
    const __m512 a = pairs(four[0], four[2]), b = pairs(four[1], four[3]);
    const __m512 rest = _mm512_mask_blend_ps(0xaaaa, b, a);
    return _mm512_mask_blend_ps(0xaaaa, a, b) + _mm512_permute_ps(rest, 0xb1);
}
#endif

// 2^x for x <= 0, by a polynomial of degree 6 (relative error 3e-9) on [-1/2, 1/2]. Without
// AVX-512, which scales by powers of 2 in one instruction, it is 0 below 2^-126.
inline Vector exp2(Vector x) {
#if defined(__AVX512DQ__)
    const Vector f = _mm512_reduce_ps(x, 8);  // less the nearest integer
#else
    const Vector magic = splat(12582912.0f);  // adding it rounds to an integer
    const Vector clipped = larger(x, splat(-126.0f));
    const Vector shifted = clipped + magic;
    const Vector f = clipped - (shifted - magic);
#endif
    Vector y = splat(1.54697320e-4f);
    y = y * f + splat(1.34004322e-3f);
    y = y * f + splat(9.61802560e-3f);
    y = y * f + splat(5.55032721e-2f);
    y = y * f + splat(2.40226512e-1f);
    y = y * f + splat(6.93147207e-1f);
    y = y * f + splat(1.0f);
#if defined(__AVX512DQ__)
    return _mm512_scalef_ps(y, x - f);
#else
    const Ints exponent = reinterpret_cast<Ints>(shifted) << 23;
    const Vector power = reinterpret_cast<Vector>(reinterpret_cast<Ints>(y) + exponent);
    return x > splat(-126.0f) ? power : Vector{};
#endif
}

inline float exp2(float x) { return x > -126.0f ? std::exp2(x) : 0.0f; }

constexpr int64_t up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

}  // namespace
