// A decoder layer like Llama's: its parts, and what is done to a row between its matrix products.
#pragma once

#include "many.h"

namespace {

struct Linear {
    const void* weight;  // [outputs, inputs]
    const float* bias;   // [outputs], or null
    int64_t outputs;
};

struct Norm {
    const float* weight;  // or null: no norm
    float epsilon;
};

// All inputs of products and lengths of norms are multiples of 16.
struct Layer {
    int64_t hidden, heads, kv_heads, head_dim;
    Norm norm1, q_norm, k_norm, norm2;
    Linear q, k, v, o, gate, up, down;
};

// to = weight x / rms(x), which may be in place (RMSNorm, arXiv 1910.07467).
template <typename T, typename To>
inline void normalize(const Norm& norm, const T* x, To* to, int64_t length) {
    Vector squares = {};
    for (int64_t i = 0; i < length; i += VL) squares += load(x + i) * load(x + i);
    const Vector factor = splat(1.0f / std::sqrt(sum(squares) / length + norm.epsilon));
    for (int64_t i = 0; i < length; i += VL)
        narrow(load(x + i) * factor * load(norm.weight + i), to + i);
}

template <typename W, typename Take>
inline void apply(const Linear& linear, const Input<W>* x, int64_t rows, int64_t inputs,
                  const Take& take) {
    const float* bias = linear.bias;
    product(x, rows, static_cast<const W*>(linear.weight), linear.outputs, inputs,
            [&](int64_t output, int64_t row, float sum) {
                take(output, row, sum + (bias ? bias[output] : 0.0f));
            });
}

// The same for many rows by one thread, x in panels; calls `take(row, output, sums, count)`.
template <typename W, typename Take>
inline void apply_to_many(const Linear& linear, const float* x, int64_t rows, int64_t inputs,
                          const Take& take) {
    const float* bias = linear.bias;
    product_of_many(x, rows, static_cast<const W*>(linear.weight), linear.outputs, inputs,
                    [&](int64_t row, int64_t output, float* sums, int64_t count) {
                        if (bias) for (int64_t i = 0; i < count; ++i) sums[i] += bias[output + i];
                        take(row, output, sums, count);
                    });
}

// Rotary position embedding of a head in place (arXiv 2104.09864), number i with i + rotated / 2.
template <typename T>
inline void rotate(float* x, const T* cos, const T* sin, int64_t rotated) {
    const int64_t half = rotated / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float low = x[i], high = x[i + half];
        x[i] = low * widen(cos[i]) - high * widen(sin[i]);
        x[i + half] = high * widen(cos[i + half]) + low * widen(sin[i + half]);
    }
}

// x / (1 + e^-x), with exponents that can't overflow.
inline Vector silu(Vector x) {
    const Vector one = splat(1.0f), power = exp2((x < Vector{} ? x : -x) * splat(LOG2E));
    return x * (x < Vector{} ? power : one) / (one + power);
}

// What a thread has computed of a row's heads becomes its part of q, k and v, or without q of k, v.
template <typename T>
struct Heads {
    const Layer& layer;
    const T *cos, *sin;  // [rows, rotated], which may be 0
    int64_t rotated;
    T *q, *k, *v;  // [rows, heads or kv_heads, head_dim]; q may be null

    int64_t first() const { return q ? 0 : layer.heads; }
    int64_t count() const { return layer.heads + 2 * layer.kv_heads - first(); }

    void finish(float* own, int64_t row, int64_t head) const {
        head += first();
        const int64_t depth = layer.head_dim, kv_head = (head - layer.heads) % layer.kv_heads;
        const bool is_q = head < layer.heads, is_k = !is_q && head < layer.heads + layer.kv_heads;
        const Norm& norm = is_q ? layer.q_norm : layer.k_norm;
        if ((is_q || is_k) && norm.weight) normalize(norm, own, own, depth);
        if (is_q || is_k) rotate(own, cos + row * rotated, sin + row * rotated, rotated);
        T* out = is_q ? q + (row * layer.heads + head) * depth
                      : (is_k ? k : v) + (row * layer.kv_heads + kv_head) * depth;
        narrow_all(own, out, depth);
    }
};

}  // namespace
