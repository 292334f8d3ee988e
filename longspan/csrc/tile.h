// A tile of a matrix product, as large as registers are many, and the panels that it is made from.
#pragma once

#include "unit.h"

namespace {

// NR rows of words, each multiplied by its scale, side by side as the columns of [words, NR].
template <typename Unit, typename T>
inline void to_panel(const T* const* rows, const float* scales, int64_t words, float* to) {
    for (int first = 0; first < NR; first += VL) {
        int64_t i = 0;
        for (; i + VL <= words; i += VL) {
            Vector square[VL];
            for (int r = 0; r < VL; ++r)
                square[r] = Unit::words_of_key(rows[first + r], i, scales[first + r]);
            transpose(square);
            for (int word = 0; word < VL; ++word) store(to + (i + word) * NR + first, square[word]);
        }
        for (; i < words; ++i)
            for (int r = 0; r < VL; ++r)
                to[i * NR + first + r] = Unit::word(rows[first + r], i, scales[first + r]);
    }
}

// c [MR, NR] = scale a [MR, depth] b [depth, NR], or where it ADDS: c = scales c + a b, by rows. The
// product is summed by itself, since short sums round less than one that goes on. It is a function
// of its own to have all registers.
template <typename Unit, int DEPTH_STRIDE, int ROW_STRIDE, bool ADDS>
[[gnu::noinline]] void tile(const float* a, const float* b, int64_t depth, float* c, int64_t c_row,
                            float scale, const float* scales) {
    Vector sums[MR][2] = {};
    for (int64_t i = 0; i < depth; ++i) {
        const Vector b0 = load(b + i * NR), b1 = load(b + i * NR + VL);
#pragma GCC unroll 12
        for (int r = 0; r < MR; ++r) {
            const Vector x = splat(a[i * DEPTH_STRIDE + r * ROW_STRIDE]);
            sums[r][0] = Unit::fused(x, b0, sums[r][0]);
            sums[r][1] = Unit::fused(x, b1, sums[r][1]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            float* to = c + r * c_row + i * VL;
            if constexpr (ADDS) store(to, splat(scales[r]) * load(to) + sums[r][i]);
            else store(to, splat(scale) * sums[r][i]);
        }
}

}  // namespace
