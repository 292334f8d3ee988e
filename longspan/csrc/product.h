// x W^T for the few rows x of a decode step: weights are read once, at memory's speed.
//
// Libraries' matrix products repack the weights first, which costs more than the product when there
// are few rows. Here some rows of W, where they lie, meet up to three rows of x at a time. Sums are
// float32, in an order that does not depend on how many rows there are.
#pragma once

#include <vector>

#include "vector.h"

namespace {

constexpr int OUTPUTS = 8;  // rows of W that are met at a time
constexpr int AHEAD = 64 / VL;  // bytes to call up for each input: a line for each vector

// Calls `take(output, row, sum)` for ROWS rows of x, counted from `row`. Meanwhile weights that will
// be read next are called up: AHEAD bytes from `ahead` on for each input. An address that is not
// there does no harm.
template <int COUNT, int ROWS, typename W, typename Take>
inline void meet(const float* x, int64_t row, const W* w, int64_t output, int64_t inputs,
                 const char* ahead, const Take& take) {
    Vector sums[COUNT * ROWS] = {};
    for (int64_t i = 0; i < inputs; i += VL) {
        Vector own[ROWS];
        for (int r = 0; r < ROWS; ++r) own[r] = in_register(load(x + (row + r) * inputs + i));
        for (int o = 0; o < COUNT; ++o) {
            const Vector weights = in_register(load(w + o * inputs + i));
            for (int r = 0; r < ROWS; ++r)
                sums[o * ROWS + r] = fused(weights, own[r], sums[o * ROWS + r]);
        }
        __builtin_prefetch(ahead + i * AHEAD, 0, 2);
    }
    float found[COUNT * ROWS];
    sum_each<COUNT * ROWS>(sums, found);
    for (int o = 0; o < COUNT; ++o)
        for (int r = 0; r < ROWS; ++r) take(output + o, row + r, found[o * ROWS + r]);
}

template <int COUNT, typename W, typename Take>
inline void meet_all(const float* x, int64_t rows, const W* w, int64_t output, int64_t inputs,
                     const char* ahead, const Take& take) {
    if (rows == 1) return meet<COUNT, 1>(x, 0, w, output, inputs, ahead, take);
    constexpr int PART = COUNT > 1 ? COUNT / 2 : 1;  // as many sums as there are registers
    for (int o = 0; o < COUNT; o += PART) {
        const W* own = w + o * inputs;
        int64_t r = 0;
        for (; rows - r > 4 || rows - r == 3; r += 3, ahead += inputs * AHEAD)
            meet<PART, 3>(x, r, own, output + o, inputs, ahead, take);
        for (; rows - r >= 2; r += 2, ahead += inputs * AHEAD)
            meet<PART, 2>(x, r, own, output + o, inputs, ahead, take);
        if (r < rows) meet<PART, 1>(x, r, own, output + o, inputs, ahead, take);
    }
}

// Some of a thread's own memory, for weights that are widened once to meet several rows.
inline float* wide_weights(int64_t floats) {
    static thread_local std::vector<float> memory;
    if (static_cast<int64_t>(memory.size()) < floats) memory.resize(floats);
    return memory.data();
}

// x W^T for COUNT rows of W from row `output` on.
template <int COUNT, typename W, typename Take>
inline void stripe(const float* x, int64_t rows, const W* w, int64_t output, int64_t inputs,
                   const Take& take) {
    const W* own = w + output * inputs;
    const char* next = reinterpret_cast<const char*>(own + COUNT * inputs);
    if constexpr (sizeof(W) < sizeof(float)) {
        if (rows > 2) {
            float* wide = wide_weights(COUNT * inputs);
            for (int64_t i = 0; i < COUNT * inputs; i += VL) store(wide + i, load(own + i));
            return meet_all<COUNT>(x, rows, wide, output, inputs, next, take);
        }
    }
    meet_all<COUNT>(x, rows, own, output, inputs, next, take);
}

// A thread's share of x W^T, W having `outputs` rows; to be called by all threads of a team. It
// does not wait for the others.
template <typename W, typename Take>
inline void product(const float* x, int64_t rows, const W* w, int64_t outputs, int64_t inputs,
                    const Take& take) {
    const int64_t whole = outputs / OUTPUTS * OUTPUTS;
#pragma omp for schedule(static) nowait
    for (int64_t o = 0; o < whole; o += OUTPUTS) stripe<OUTPUTS>(x, rows, w, o, inputs, take);
#pragma omp for schedule(static) nowait
    for (int64_t o = whole; o < outputs; ++o) stripe<1>(x, rows, w, o, inputs, take);
}

}  // namespace
