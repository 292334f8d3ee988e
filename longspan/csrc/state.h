// Attention states: what some queries have found among some keys, and how two become one.
#pragma once

#include "vector.h"

namespace {

// Merge other states of the same queries and heads into `out` [rows, depth] and `lse` [rows].
void absorb(float* out, float* lse, const float* other_out, int64_t other_row,
            const float* other_lse, int64_t lse_row, int64_t rows, int64_t depth, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t r = 0; r < rows; ++r) {
        const float mine = lse[r], theirs = other_lse[r * lse_row];
        if (theirs == NONE) continue;
        float* to = out + r * depth;
        const float most = std::max(mine, theirs);
        const float* from = other_out + r * other_row;
        if (mine == NONE) {  // what an empty state holds is nobody's business
            std::copy_n(from, depth, to);
            lse[r] = theirs;
            continue;
        }
        const float old = 1.0f / (1.0f + std::exp(theirs - mine));
        const float added = 1.0f / (1.0f + std::exp(mine - theirs));
        for (int64_t d = 0; d < depth; ++d) to[d] = to[d] * old + from[d] * added;
        lse[r] = most + std::log1p(std::exp(std::min(mine, theirs) - most));
    }
}

}  // namespace
