// Attention of many queries: scores, softmax and the product with V for a few queries at a time,
// while they are in registers and L1 (arXiv 2205.14135, the online softmax of arXiv 1805.02867).
#pragma once

#include "task.h"

namespace {

// c [MR, NR] = a [MR, depth] b [depth, NR], or with `factor`: c = factor c + a b, by rows. The
// product is summed by itself, since short sums round less than one that goes on.
template <int DEPTH_STRIDE, int ROW_STRIDE>
inline void tile(const float* a, const float* b, int64_t depth, float* c, int64_t c_row,
                 const float* factor) {
    Vector sums[MR][2] = {};
    for (int64_t i = 0; i < depth; ++i) {
        const Vector b0 = load(b + i * NR), b1 = load(b + i * NR + VL);
#pragma GCC unroll 12
        for (int r = 0; r < MR; ++r) {
            const Vector x = splat(a[i * DEPTH_STRIDE + r * ROW_STRIDE]);
            sums[r][0] += x * b0;
            sums[r][1] += x * b1;
        }
    }
    for (int r = 0; r < MR; ++r)
        for (int i = 0; i < 2; ++i) {
            float* to = c + r * c_row + i * VL;
            store(to, factor ? splat(factor[r]) * load(to) + sums[r][i] : sums[r][i]);
        }
}

// Scores of one row become weights 2^(score - maximum); the old sums are to be multiplied by the
// returned factor.
inline float soften(float* scores, int64_t keys, float& most, float& total) {
    Vector high = load(scores);
    for (int64_t j = VL; j < keys; j += VL) {
        const Vector x = load(scores + j);
        high = high > x ? high : x;
    }
    const float before = most;
    most = std::max(before, largest(high));
    if (most == NONE) {  // the row sees none of these keys, and saw none before
        for (int64_t j = 0; j < keys; ++j) scores[j] = 0;
        return 1;
    }
    Vector weights = {};
    for (int64_t j = 0; j < keys; j += VL) {
        const Vector x = exp2(load(scores + j) - splat(most));
        store(scores + j, x);
        weights += x;
    }
    const float factor = before == most ? 1.0f : exp2(before - most);
    total = total * factor + sum(weights);
    return factor;
}

// Keys are packed into panels as wide as two vectors, and serve all queries of the block.
template <typename T>
class Packed {
  public:
    Packed(const Call<T>& call, int64_t most_rows)
        : call_(call), depth_(call.head_dim), width_(up(call.head_dim, NR)) {
        const int64_t rows = up(most_rows * call.group, MR);
        scratch.lay_out({rows * depth_, rows * width_, NB * depth_, NB * width_, MR * NB, rows, rows},
                        {&queries_, &sums_, &keys_, &values_, &scores_, &most_, &total_});
    }

    Result run(const Task& task) {
        task_ = &task;
        rows_ = task.rows * call_.group;
        pack_queries();
        std::fill_n(sums_, up(rows_, MR) * width_, 0.0f);
        std::fill_n(most_, up(rows_, MR), NONE);
        std::fill_n(total_, up(rows_, MR), 0.0f);
        filled_ = 0;
        for (const Span& span : task.spans) {
            if (span.causal) {
                flush(-1);
                for (int64_t first = 0; first < span.keys; first += NB) {
                    pack_keys(span.key + first, std::min<int64_t>(NB, span.keys - first));
                    flush(first);
                }
            } else {
                for (int64_t first = 0; first < span.keys;) {
                    const int64_t keys = std::min<int64_t>(NB - filled_, span.keys - first);
                    pack_keys(span.key + first, keys);
                    first += keys;
                    if (filled_ == NB) flush(-1);
                }
            }
        }
        flush(-1);
        return {sums_, most_, total_};
    }

    int64_t width() const { return width_; }

  private:
    void pack_queries() {
        const float scale = call_.scale * LOG2E;
        for (int64_t r = 0; r < up(rows_, MR); ++r) {
            float* to = queries_ + r / MR * MR * depth_ + r % MR;
            const int64_t row = task_->row + r / call_.group;
            const int64_t head = task_->head * call_.group + r % call_.group;
            const float* from = call_.q + row * call_.q_row + head * call_.q_head;
            for (int64_t d = 0; d < depth_; ++d)
                to[d * MR] = r < rows_ ? from[d] * scale : 0.0f;
        }
    }

    // Keys to panels [NB / NR, D, NR], values to panels [D / NR, NB, NR].
    void pack_keys(int64_t first, int64_t keys) {
        const T* k = call_.k + task_->head * call_.k_head + first * call_.k_slot;
        const T* v = call_.v + task_->head * call_.v_head + first * call_.v_slot;
        for (int64_t j = 0; j < keys; ++j) {
            const int64_t at = filled_ + j;
            float* to = keys_ + at / NR * NR * depth_ + at % NR;
            const T* from = k + j * call_.k_slot;
            float scale = scale_of(from, depth_);
            for (int64_t d = 0; d < depth_; ++d) to[d * NR] = widen(from[d]) * scale;
            from = v + j * call_.v_slot;
            scale = scale_of(from, depth_);
            to = values_ + at * NR;
            int64_t d = 0;
            for (; d + VL <= depth_; d += VL)
                store(to + d / NR * NR * NB + d % NR, load(from + d) * splat(scale));
            for (; d < width_; ++d)
                to[d / NR * NR * NB + d % NR] = d < depth_ ? widen(from[d]) * scale : 0.0f;
        }
        filled_ += keys;
    }

    // Attend to the packed keys. With `diagonal` >= 0 they are those from that one on of a causal
    // square whose first query is the block's first.
    void flush(int64_t diagonal) {
        if (filled_ == 0) return;
        const int64_t columns = up(filled_, NR);
        for (int64_t j = filled_; j < columns; ++j) {  // what was there before may be no number
            float* to = keys_ + j / NR * NR * depth_ + j % NR;
            for (int64_t d = 0; d < depth_; ++d) to[d * NR] = 0;
            for (int64_t d = 0; d < width_; d += NR)
                std::fill_n(values_ + d * NB + j * NR, NR, 0.0f);
        }
        for (int64_t row = 0; row < rows_; row += MR) {
            int64_t seen = filled_;
            if (diagonal >= 0) {
                const int64_t last = std::min(row + MR, rows_) - 1;
                seen = std::min(seen, last / call_.group - diagonal + 1);
                if (seen <= 0) continue;
            }
            attend(row, seen, diagonal);
        }
        filled_ = 0;
    }

    void attend(int64_t row, int64_t seen, int64_t diagonal) {
        const int64_t columns = up(seen, NR);
        for (int64_t j = 0; j < columns; j += NR)
            tile<MR, 1>(queries_ + row * depth_, keys_ + j * depth_, depth_, scores_ + j, NB,
                        nullptr);
        float factors[MR];
        for (int r = 0; r < MR; ++r) {
            int64_t limit = seen;
            if (diagonal >= 0) limit = std::min(seen, (row + r) / call_.group - diagonal + 1);
            float* scores = scores_ + r * NB;
            for (int64_t j = std::max<int64_t>(limit, 0); j < columns; ++j) scores[j] = NONE;
            factors[r] = soften(scores, columns, most_[row + r], total_[row + r]);
        }
        for (int64_t d = 0; d < width_; d += NR)
            tile<1, NB>(scores_, values_ + d * NB, seen, sums_ + row * width_ + d, width_, factors);
    }

    const Call<T>& call_;
    const Task* task_ = nullptr;
    const int64_t depth_, width_;
    int64_t rows_ = 0, filled_ = 0;
    float *queries_, *sums_, *keys_, *values_, *scores_, *most_, *total_;
};

}  // namespace
