// How numbers meet in products: floats one by one, or bfloat16 in pairs where the CPU has units for
// that. Operands are made of words of 32 bits, each of which is PACE numbers that are summed together.
#pragma once

#include "vector.h"

namespace {

// Queries and weights are float32; keys and values of type T are widened.
template <typename T>
struct Floats {
    using Query = float;
    static constexpr int PACE = 1;
    static constexpr bool SCALES_QUERIES = true;

    static float query(float x, float scale) { return x * scale; }

    static Vector fused(Vector x, Vector y, Vector sums) { return ::fused(x, y, sums); }

    // A word of a key or query.
    template <typename Number>
    static float word(const Number* p, int64_t i, float scale) { return widen(p[i]) * scale; }

    // VL words of a key.
    static Vector words_of_key(const T* key, int64_t i, float scale) {
        return load(key + i) * splat(scale);
    }

    // 2 VL columns of PACE rows of values, as words; no second row counts as zeros.
    static void words(const T* values, const T*, float scale, Vector (&x)[2]) {
        x[0] = load(values) * splat(scale), x[1] = load(values + VL) * splat(scale);
    }

    // Weights of 2 VL keys of one query, as words to the i-th and so on.
    static void store_weights(float* to, int64_t i, Vector first, Vector second) {
        store(to + i, first), store(to + i + VL, second);
    }

    // The same in the order that costs least, unscaled: `number_at` says which that is.
    static void load_key(const T* key, Vector (&x)[2]) { load_pair(key, x[0], x[1]); }
    static void load_words(const T* values, const T*, Vector (&x)[2]) {
        load_pair(values, x[0], x[1]);
    }
    static constexpr int64_t number_at(int64_t i) { return ::number_at<T>(i); }

    // Weights of a vector of keys by QUERIES, as words for each of the queries.
    template <int QUERIES>
    static void store_weights_of_keys(float* to, int64_t i, Vector weights) {
        store(to + i, weights);
    }
};

#if defined(__AVX512BF16__)
// 32 numbers of each of two rows become words (first, second), in order.
inline void interleave(const BFloat16* first, const BFloat16* second, Vector (&words)[2]) {
    alignas(64) static constexpr struct Indices {
        int16_t of[2][32] = {};
        constexpr Indices() {
            for (int i = 0; i < 64; ++i) of[i / 32][i % 32] = i / 2 + i % 2 * 32;
        }
    } indices;
    const __m512i a = _mm512_loadu_si512(first);
    const __m512i b = second ? _mm512_loadu_si512(second) : _mm512_setzero_si512();
    for (int i = 0; i < 2; ++i)
        words[i] = reinterpret_cast<Vector>(
            _mm512_permutex2var_epi16(a, _mm512_load_si512(indices.of[i]), b));
}

// Queries, keys and values are bfloat16, weights are rounded to it; sums are float32.
struct Pairs {
    using Query = BFloat16;
    static constexpr int PACE = 2;
    static constexpr bool SCALES_QUERIES = false;

    static BFloat16 query(BFloat16 x, float) { return x; }

    static Vector fused(Vector x, Vector y, Vector sums) {
        return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
    }

    static float word(const BFloat16* key, int64_t i, float) {
        float bits;
        __builtin_memcpy(&bits, key + 2 * i, sizeof bits);
        return bits;
    }

    static Vector words_of_key(const BFloat16* key, int64_t i, float) {
        return load(reinterpret_cast<const float*>(key + 2 * i));
    }

    static void words(const BFloat16* values, const BFloat16* next, float, Vector (&x)[2]) {
        interleave(values, next, x);
    }

    static void store_weights(float* to, int64_t i, Vector first, Vector second) {
        store(to + i / 2, reinterpret_cast<Vector>(_mm512_cvtne2ps_pbh(second, first)));
    }

    static void load_key(const BFloat16* key, Vector (&x)[1]) {
        x[0] = load(reinterpret_cast<const float*>(key));
    }
    static void load_words(const BFloat16* values, const BFloat16* next, Vector (&x)[2]) {
        interleave(values, next, x);
    }
    static constexpr int64_t number_at(int64_t i) { return i; }

    template <int QUERIES>
    static void store_weights_of_keys(float* to, int64_t i, Vector weights) {
        alignas(32) static constexpr struct Indices {
            int16_t of[16] = {};
            constexpr Indices() {
                for (int k = 0; k < 16; ++k)
                    of[k] = (k / (2 * QUERIES) * 2 + k % 2) * QUERIES + k / 2 % QUERIES;
            }
        } indices;
        const __m256i narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(weights));
        const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(indices.of));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i / 2),
                            _mm256_permutexvar_epi16(order, narrow));
    }
};
#endif

}  // namespace
