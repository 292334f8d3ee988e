// Attention of many queries: scores, softmax and the product with V for a few queries at a time,
// while they are in registers and L1 (arXiv 2205.14135, the online softmax of arXiv 1805.02867).
#pragma once

#include "task.h"
#include "tile.h"

namespace {

// The maximum of a row of scores.
inline float most_of(const float* scores, int64_t keys) {
    Vector high = load(scores), other = load(scores + VL);
    for (int64_t j = NR; j < keys; j += NR) {
        high = larger(high, load(scores + j));
        other = larger(other, load(scores + j + VL));
    }
    return largest(larger(high, other));
}

// Scores of one row become words of weights 2^(score - most); returns their sums.
template <typename Unit>
inline Vector soften(float* scores, int64_t keys, float most) {
    Vector sums[2] = {};
    for (int64_t j = 0; j < keys; j += NR) {
        const Vector x = exp2(load(scores + j) - splat(most));
        const Vector y = exp2(load(scores + j + VL) - splat(most));
        Unit::store_weights(scores, j, x, y);
        sums[0] += x, sums[1] += y;
    }
    return sums[0] + sums[1];
}

// Keys are packed into panels as wide as two vectors, and serve all queries of the block.
template <typename T, typename Unit>
class Packed {
  public:
    Packed(const Call<T, Unit>& call, int64_t most_rows)
        : call_(call),
          depth_(call.head_dim),
          words_(up(call.head_dim, PACE) / PACE),
          width_(up(call.head_dim, NR)) {
        const int64_t rows = up(most_rows * call.group, MR);
        scratch.lay_out({rows * words_, rows * width_, BLOCK * words_, NB * width_, MR * BLOCK, rows,
                         rows * VL, depth_ + 1},
                        {&queries_, &sums_, &keys_, &values_, &scores_, &most_, &total_, &zeros_});
        std::fill_n(zeros_, depth_ + 1, 0.0f);
    }

    Result run(const Task& task) {
        task_ = &task;
        rows_ = task.rows * call_.group;
        pack_queries();
        std::fill_n(sums_, up(rows_, MR) * width_, 0.0f);
        std::fill_n(most_, up(rows_, MR), NONE);
        std::fill_n(total_, up(rows_, MR) * VL, 0.0f);
        filled_ = 0;
        for (const Span& span : task.spans) {
            if (span.causal) {
                flush(-1);
                for (int64_t first = 0; first < span.keys; first += BLOCK) {
                    take(span.key + first, std::min<int64_t>(BLOCK, span.keys - first));
                    flush(first);
                }
            } else {
                for (int64_t first = 0; first < span.keys;) {
                    const int64_t keys = std::min<int64_t>(BLOCK - filled_, span.keys - first);
                    take(span.key + first, keys);
                    first += keys;
                    if (filled_ == BLOCK) flush(-1);
                }
            }
        }
        flush(-1);
        for (int64_t r = 0; r < rows_; ++r) total_[r] = sum(load(total_ + r * VL));
        return {sums_, most_, total_};
    }

    int64_t width() const { return width_; }

  private:
    static constexpr int PACE = Unit::PACE, BLOCK = NB * PACE;  // keys of a block: NB words

    void pack_queries() {
        for (int64_t r = 0; r < up(rows_, MR); ++r) {
            float* to = queries_ + r / MR * MR * words_ + r % MR;
            const int64_t row = task_->row + r / call_.group;
            const int64_t head = task_->head * call_.group + r % call_.group;
            const auto* from = call_.q + row * call_.q_row + head * call_.q_head;
            for (int64_t i = 0; i < words_; ++i)
                to[i * MR] = r < rows_ ? Unit::word(from, i, call_.query_scale()) : 0.0f;
        }
    }

    // More keys for the block.
    void take(int64_t first, int64_t keys) {
        const T* k = call_.k + task_->head * call_.k_head + first * call_.k_slot;
        const T* v = call_.v + task_->head * call_.v_head + first * call_.v_slot;
        for (int64_t j = 0; j < keys; ++j, ++filled_) {
            key_rows_[filled_] = k + j * call_.k_slot;
            value_rows_[filled_] = v + j * call_.v_slot;
        }
    }

    // Keys to panels [BLOCK / NR, words, NR], values to panels [D / NR, NB, NR]; what is missing in
    // a panel is zero.
    void pack() {
        const int64_t columns = up(filled_, NR);
        for (int64_t j = filled_; j < columns; ++j)
            key_rows_[j] = value_rows_[j] = reinterpret_cast<const T*>(zeros_);
        for (int64_t j = 0; j < columns; ++j) scales_[j] = scale_of(key_rows_[j], depth_);
        for (int64_t j = 0; j < columns; j += NR)
            to_panel<Unit>(key_rows_ + j, scales_ + j, words_, keys_ + j * words_);
        for (int64_t j = 0; j < columns; j += PACE) {
            const T *v = value_rows_[j], *next = value_rows_[j + PACE - 1];
            const float scale = scale_of(v, depth_);
            float* to = values_ + j / PACE * NR;
            Vector x[2];
            int64_t d = 0;
            for (; d + NR <= depth_; d += NR, to += NB * NR) {
                Unit::words(v + d, next + d, scale, x);
                store(to, x[0]), store(to + VL, x[1]);
            }
            if (d < depth_) {
                T rest[2][NR] = {};
                std::copy_n(v + d, depth_ - d, rest[0]);
                std::copy_n(next + d, depth_ - d, rest[1]);
                Unit::words(rest[0], rest[1], scale, x);
                store(to, x[0]), store(to + VL, x[1]);
            }
        }
    }

    // Attend to the block's keys. With `diagonal` >= 0 they are those from that one on of a causal
    // square whose first query is the block's first.
    void flush(int64_t diagonal) {
        if (filled_ == 0) return;
        pack();
        for (int64_t row = 0; row < rows_; row += MR) {
            call_up(row * filled_ / rows_, std::min(row + MR, rows_) * filled_ / rows_);
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

    // Ask for what is likely to be the next block, in the places of some keys of this one.
    void call_up(int64_t first, int64_t last) const {
        for (int64_t j = first; j < last; ++j)
            for (const T* row :
                 {key_rows_[j] + BLOCK * call_.k_slot, value_rows_[j] + BLOCK * call_.v_slot})
                for (int64_t d = 0; d < depth_; d += 64 / static_cast<int64_t>(sizeof(T)))
                    __builtin_prefetch(row + d, 0, 2);
    }

    void attend(int64_t row, int64_t seen, int64_t diagonal) {
        const int64_t columns = up(seen, NR);
        for (int64_t j = 0; j < columns; j += NR)
            tile<Unit, MR, 1, false>(queries_ + row * words_, keys_ + j * words_, words_, scores_ + j,
                                     BLOCK, call_.score_scale(), nullptr);
        for (int r = 0; r < MR; ++r) {
            int64_t limit = seen;
            if (diagonal >= 0) limit = std::min(seen, (row + r) / call_.group - diagonal + 1);
            float* scores = scores_ + r * BLOCK;
            std::fill(scores + std::max<int64_t>(limit, 0), scores + columns, NONE);
        }
        float factors[up(MR, VL)];
        weigh(row, columns, factors);
        for (int64_t d = 0; d < width_; d += NR)
            tile<Unit, 1, BLOCK, true>(scores_, values_ + d * NB, up(seen, PACE) / PACE,
                                    sums_ + row * width_ + d, width_, 1.0f, factors);
    }

    // Scores become weights; sums so far are to be multiplied by `factors`. Each step is done for all
    // rows, so that none of them waits for its own results.
    void weigh(int64_t row, int64_t columns, float (&factors)[up(MR, VL)]) {
        float before[up(MR, VL)] = {}, most[up(MR, VL)] = {};
        for (int r = 0; r < MR; ++r) {
            before[r] = most_[row + r];
            most_[row + r] = std::max(before[r], most_of(scores_ + r * BLOCK, columns));
            most[r] = most_[row + r] == NONE ? 0.0f : most_[row + r];  // -inf - -inf is not a number
        }
        for (int r = 0; r < MR; r += VL) store(factors + r, exp2(load(before + r) - load(most + r)));
        for (int r = 0; r < MR; ++r) {
            float *scores = scores_ + r * BLOCK, *total = total_ + (row + r) * VL;
            store(total, splat(factors[r]) * load(total) + soften<Unit>(scores, columns, most[r]));
        }
    }

    const Call<T, Unit>& call_;
    const Task* task_ = nullptr;
    const int64_t depth_, words_, width_;
    int64_t rows_ = 0, filled_ = 0;
    const T *key_rows_[BLOCK], *value_rows_[BLOCK];
    float scales_[BLOCK];  // of keys
    float *queries_, *sums_, *keys_, *values_, *scores_, *most_, *zeros_;
    float* total_;  // of each row VL sums until its end
};

}  // namespace
