// A decoder layer but for its attention: what comes before it and what comes after it, in one call
// each.
//
// As modules, a layer of a small model spends more time between its matrix products than in them:
// for the few rows of a decode step in calls, for the many of a prompt in memory.
// x is float32 or bfloat16, as the weights are; what products take is rounded to bfloat16 with them
// where the CPU has products of pairs, and all else between is float32.

#include "layer.h"

namespace {

// From x [rows, hidden] all heads that are wanted.
template <typename T>
void before_few(const Layer& layer, const T* x, const Heads<T>& heads, int64_t rows, int threads) {
    const int64_t hidden = layer.hidden, count = heads.count(), width = count * layer.head_dim;
    float* all = memory_of<BETWEEN>(rows * (width + hidden));
    auto* normal = reinterpret_cast<Input<T>*>(all + rows * width);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r)
            normalize(layer.norm1, x + r * hidden, normal + r * hidden, hidden);
        float* to = all;
        for (const Linear* linear : {&layer.q, &layer.k, &layer.v}) {
            if (linear == &layer.q && !heads.q) continue;
            apply<T>(*linear, normal, rows, hidden, [=](int64_t output, int64_t row, float value) {
                to[row * width + output] = value;
            });
            to += linear->outputs;
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * count; ++i)
            heads.finish(all + i * layer.head_dim, i / count, i % count);
    }
}

// The same for `rows` of many rows from row `first` on, by one thread.
template <typename T>
void before_many(const Layer& layer, const T* x, const Heads<T>& heads, int64_t first,
                 int64_t rows) {
    const int64_t hidden = layer.hidden, count = heads.count(), width = count * layer.head_dim;
    float* all = memory_of<BETWEEN>(rows * width + up(rows, MR) * hidden);
    float* normal = all + rows * width;
    lay_all<T>(rows, hidden, normal, [&](int64_t r, Input<T>* one) {
        normalize(layer.norm1, x + (first + r) * hidden, one, hidden);
    });
    float* to = all;
    for (const Linear* linear : {&layer.q, &layer.k, &layer.v}) {
        if (linear == &layer.q && !heads.q) continue;
        apply_to_many<T>(*linear, normal, rows, hidden, [=](int64_t row, int64_t output, float* sums,
                                                            int64_t outputs) {
            std::copy_n(sums, outputs, to + row * width + output);
        });
        to += linear->outputs;
    }
    for (int64_t i = 0; i < rows * count; ++i)
        heads.finish(all + i * layer.head_dim, first + i / count, i % count);
}

// From attention [rows, heads, head_dim] and x [rows, hidden] y [rows, hidden]: the output
// projection, and the gated MLP with SiLU (arXiv 2002.05202), each added to what it began with.
template <typename T>
void after_few(const Layer& layer, const float* attention, const T* x, T* y, int64_t rows,
               int threads) {
    const int64_t hidden = layer.hidden, inner = layer.gate.outputs;
    const int64_t width = layer.heads * layer.head_dim;
    float* sums = memory_of<BETWEEN>(rows * (hidden + 2 * inner + std::max({hidden, width, inner})));
    float *gate = sums + rows * hidden, *up = gate + rows * inner;
    auto* input = reinterpret_cast<Input<T>*>(up + rows * inner);  // of one product after the other
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * width; i += VL) narrow(load(attention + i), input + i);
        apply<T>(layer.o, input, rows, width,
                 [=](int64_t output, int64_t row, float value) {
                     const int64_t at = row * hidden + output;
                     sums[at] = widen(x[at]) + value;
                 });
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r)
            normalize(layer.norm2, sums + r * hidden, input + r * hidden, hidden);
        const auto keep = [=](float* to) {
            return [=](int64_t output, int64_t row, float value) { to[row * inner + output] = value; };
        };
        apply<T>(layer.gate, input, rows, hidden, keep(gate));
        apply<T>(layer.up, input, rows, hidden, keep(up));
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * inner; i += VL)
            narrow(silu(load(gate + i)) * load(up + i), input + i);
        apply<T>(layer.down, input, rows, inner, [=](int64_t output, int64_t row, float value) {
            const int64_t at = row * hidden + output;
            narrow(sums[at] + value, y + at);
        });
    }
}

// The same for `rows` rows of many, by one thread.
template <typename T>
void after_many(const Layer& layer, const float* attention, const T* x, T* y, int64_t rows) {
    const int64_t hidden = layer.hidden, inner = layer.gate.outputs;
    const int64_t width = layer.heads * layer.head_dim, widest = std::max({hidden, width, inner});
    float* sums = memory_of<BETWEEN>(rows * (hidden + inner) + up(rows, MR) * widest);
    float *gate = sums + rows * hidden, *input = gate + rows * inner;
    lay_all<T>(rows, width, input, [=](int64_t r, Input<T>* one) {
        narrow_all(attention + r * width, one, width);
    });
    apply_to_many<T>(layer.o, input, rows, width, [=](int64_t row, int64_t output, float* found,
                                                      int64_t outputs) {
        const int64_t at = row * hidden + output;
        for (int64_t i = 0; i < outputs; ++i) sums[at + i] = widen(x[at + i]) + found[i];
    });
    lay_all<T>(rows, hidden, input, [&](int64_t r, Input<T>* one) {
        normalize(layer.norm2, sums + r * hidden, one, hidden);
    });
    apply_to_many<T>(layer.gate, input, rows, hidden, [=](int64_t row, int64_t output, float* found,
                                                          int64_t outputs) {
        for (int64_t i = 0; i < outputs; i += VL)
            store(gate + row * inner + output + i, silu(load(found + i)));
    });
    apply_to_many<T>(layer.up, input, rows, hidden, [=](int64_t row, int64_t output, float* found,
                                                        int64_t outputs) {
        float* to = gate + row * inner + output;
        for (int64_t i = 0; i < outputs; i += VL) store(to + i, load(to + i) * load(found + i));
    });
    lay_all<T>(rows, inner, input, [=](int64_t r, Input<T>* one) {
        narrow_all(gate + r * inner, one, inner);
    });
    apply_to_many<T>(layer.down, input, rows, inner, [=](int64_t row, int64_t output, float* found,
                                                         int64_t outputs) {
        const int64_t at = row * hidden + output;
        for (int64_t i = 0; i < outputs; ++i) narrow(sums[at + i] + found[i], y + at + i);
    });
}

template <typename T>
void before(const Layer& layer, const T* x, const Heads<T>& heads, int64_t rows, int threads) {
    if (rows <= FEW_ROWS) return before_few(layer, x, heads, rows, threads);
    const int64_t widest = std::max(layer.hidden, heads.count() * layer.head_dim);
    in_parts(rows, widest, threads, [&](int64_t first, int64_t count) {
        before_many(layer, x, heads, first, count);
    });
}

template <typename T>
void after(const Layer& layer, const float* attention, const T* x, T* y, int64_t rows,
           int threads) {
    if (rows <= FEW_ROWS) return after_few(layer, attention, x, y, rows, threads);
    const int64_t hidden = layer.hidden, width = layer.heads * layer.head_dim;
    const int64_t widest = std::max({hidden, width, layer.gate.outputs});
    in_parts(rows, widest, threads, [&](int64_t first, int64_t count) {
        after_many(layer, attention + first * width, x + first * hidden, y + first * hidden, count);
    });
}

}  // namespace

#define LONGSPAN_LAYER(name, T)                                                                 \
    extern "C" void longspan_before_##name(const Layer* layer, const T* x, const T* cos,        \
                                           const T* sin, int64_t rotated, T* q, T* k, T* v,     \
                                           int64_t rows, int threads) {                         \
        before(*layer, x, Heads<T>{*layer, cos, sin, rotated, q, k, v}, rows, threads);         \
    }                                                                                           \
    extern "C" void longspan_after_##name(const Layer* layer, const float* attention,           \
                                          const T* x, T* y, int64_t rows, int threads) {        \
        after(*layer, attention, x, y, rows, threads);                                          \
    }

LONGSPAN_LAYER(float32, float)
LONGSPAN_LAYER(bfloat16, BFloat16)
