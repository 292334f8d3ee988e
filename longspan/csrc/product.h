// x W^T for the few rows x of a decode step: weights are read once, at memory's speed.
//
// Libraries' matrix products repack the weights first, which costs more than the product when there
// are few rows. Here some rows of W, where they lie, meet up to three rows of x at a time. Sums are
// float32, in an order that does not depend on how many rows there are. x is float32, or bfloat16 as
// W is where the CPU has products of pairs.
#pragma once

#include <vector>

#include "unit.h"

namespace {

constexpr int64_t FEW_ROWS = 32;  // more are faster with packed weights
constexpr int OUTPUTS = 8;  // rows of W that are met at a time

// Numbers of x and W as words in a vector; W is of type T. Inputs are a multiple of 16.
template <typename T>
struct Words : Floats<T> {
    using Input = float;
    static constexpr int STEP = VL;  // inputs of a vector

    template <typename Number>
    static Vector take(const Number* p) { return load(p); }
    template <typename Number>
    static Vector take_last(const Number*, int64_t) { return Vector{}; }
};

#if defined(__AVX512BF16__)
template <>
struct Words<BFloat16> : Pairs {
    using Input = BFloat16;
    static constexpr int STEP = 2 * VL;

    static Vector take(const BFloat16* p) { return load(reinterpret_cast<const float*>(p)); }
    // The first of them, which may be fewer than a vector has.
    static Vector take_last(const BFloat16* p, int64_t inputs) {
        return _mm512_maskz_loadu_ps((1u << inputs / 2) - 1, p);
    }
};
#endif

template <typename T>
using Input = typename Words<T>::Input;

// Calls `take(output, row, sum)` for ROWS rows of x, counted from `row`. Meanwhile weights that will
// be read next are called up: for one row as many as are used, for several, which use each of them
// several times, a line for each vector of inputs, from `ahead` on. An address that is not there does
// no harm.
template <int COUNT, int ROWS, typename Words, typename X, typename W, typename Take>
inline void meet(const X* x, int64_t row, const W* w, int64_t output, int64_t inputs,
                 const char* ahead, const Take& take) {
    Vector sums[COUNT * ROWS] = {};
    const auto add = [&](int64_t i, const auto& load) {
        Vector own[ROWS];
        for (int r = 0; r < ROWS; ++r) own[r] = in_register(load(x + (row + r) * inputs + i));
        for (int o = 0; o < COUNT; ++o) {
            const Vector weights = in_register(load(w + o * inputs + i));
            if (ROWS == 1) __builtin_prefetch(w + (COUNT + o) * inputs + i, 0, 2);
            for (int r = 0; r < ROWS; ++r)
                sums[o * ROWS + r] = Words::fused(weights, own[r], sums[o * ROWS + r]);
        }
    };
    int64_t i = 0;
    for (; i + Words::STEP <= inputs; i += Words::STEP, ahead += 64) {
        add(i, [](const auto* p) { return Words::take(p); });
        if (ROWS > 1) __builtin_prefetch(ahead, 0, 2);
    }
    if (i < inputs) add(i, [=](const auto* p) { return Words::take_last(p, inputs - i); });
    float found[COUNT * ROWS];
    sum_each<COUNT * ROWS>(sums, found);
    for (int o = 0; o < COUNT; ++o)
        for (int r = 0; r < ROWS; ++r) take(output + o, row + r, found[o * ROWS + r]);
}

template <int COUNT, typename Words, typename X, typename W, typename Take>
inline void meet_all(const X* x, int64_t rows, const W* w, int64_t output, int64_t inputs,
                     const char* ahead, const Take& take) {
    if (rows == 1) return meet<COUNT, 1, Words>(x, 0, w, output, inputs, ahead, take);
    constexpr int PART = COUNT > 1 ? COUNT / 2 : 1;  // as many sums as there are registers
    const int64_t lines = inputs / Words::STEP * 64;
    for (int o = 0; o < COUNT; o += PART) {
        const W* own = w + o * inputs;
        int64_t r = 0;
        for (; rows - r > 4 || rows - r == 3; r += 3, ahead += lines)
            meet<PART, 3, Words>(x, r, own, output + o, inputs, ahead, take);
        for (; rows - r >= 2; r += 2, ahead += lines)
            meet<PART, 2, Words>(x, r, own, output + o, inputs, ahead, take);
        if (r < rows) meet<PART, 1, Words>(x, r, own, output + o, inputs, ahead, take);
    }
}

// A thread's own memory for so many floats, kept from call to call; a place for each purpose.
enum Purpose { WEIGHTS, INPUTS, BETWEEN };
template <Purpose PURPOSE>
inline float* memory_of(int64_t floats) {
    static thread_local std::vector<float> memory;
    if (static_cast<int64_t>(memory.size()) < floats) memory.resize(floats);
    return memory.data();
}

// Numbers of type T as products take them.
template <typename T>
inline const Input<T>* as_inputs(const T* x, int64_t numbers) {
    if constexpr (std::is_same<Input<T>, T>::value) return x;
    else {
        float* wide = memory_of<INPUTS>(numbers);
        for (int64_t i = 0; i < numbers; ++i) wide[i] = widen(x[i]);
        return wide;
    }
}

// x W^T for COUNT rows of W from row `output` on.
template <int COUNT, typename W, typename Take>
inline void stripe(const Input<W>* x, int64_t rows, const W* w, int64_t output, int64_t inputs,
                   const Take& take) {
    const W* own = w + output * inputs;
    const char* next = reinterpret_cast<const char*>(own + COUNT * inputs);
    if constexpr (sizeof(W) < sizeof(Input<W>)) {
        if (rows > 2) {
            float* wide = memory_of<WEIGHTS>(COUNT * inputs);
            for (int64_t i = 0; i < COUNT * inputs; i += VL) store(wide + i, load(own + i));
            return meet_all<COUNT, Words<float>>(x, rows, wide, output, inputs, next, take);
        }
    }
    meet_all<COUNT, Words<W>>(x, rows, own, output, inputs, next, take);
}

// A thread's share of x W^T, W having `outputs` rows; to be called by all threads of a team. It
// does not wait for the others.
template <typename W, typename Take>
inline void product(const Input<W>* x, int64_t rows, const W* w, int64_t outputs, int64_t inputs,
                    const Take& take) {
    const int64_t whole = outputs / OUTPUTS * OUTPUTS;
#pragma omp for schedule(static) nowait
    for (int64_t o = 0; o < whole; o += OUTPUTS) stripe<OUTPUTS>(x, rows, w, o, inputs, take);
#pragma omp for schedule(static) nowait
    for (int64_t o = whole; o < outputs; ++o) stripe<1>(x, rows, w, o, inputs, take);
}

}  // namespace
