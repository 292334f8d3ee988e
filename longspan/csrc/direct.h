// Attention of few queries, as in decode: keys are read once, where they lie, for all query heads of
// their group. The speed is that of memory: while one part of a block is used, the next one is
// called up.
#pragma once

#include "task.h"

namespace {

constexpr int DIRECT_KEYS = 64;  // of a block: its keys and values stay in cache

template <typename T>
class Direct {
  public:
    explicit Direct(const Call<T>& call) : call_(call), depth_(call.head_dim) {
        scratch.lay_out({FEW * depth_, FEW * depth_, FEW * DIRECT_KEYS}, {&queries_, &sums_, &scores_});
    }

    Result run(const Task& task) {
        const int64_t rows = task.rows * call_.group;
        for (int64_t r = 0; r < FEW; ++r) {
            const int64_t row = task.row + r / call_.group;
            const int64_t head = task.head * call_.group + r % call_.group;
            const float* from = call_.q + row * call_.q_row + head * call_.q_head;
            for (int64_t d = 0; d < depth_; ++d)
                queries_[r * depth_ + d] =
                    r < rows ? from[number_at<T>(d)] * call_.scale * LOG2E : 0.0f;
        }
        std::fill_n(sums_, FEW * depth_, 0.0f);
        std::fill_n(most_, FEW, NONE);
        std::fill_n(total_, FEW, 0.0f);
        if (rows == 1) attend<1>(task);
        else if (rows == 2) attend<2>(task);
        else if (rows <= 4) attend<4>(task);
        else attend<8>(task);
        restore_order();
        return {sums_, most_, total_};
    }

    int64_t width() const { return depth_; }

  private:
    template <int ROWS>
    void attend(const Task& task) {
        for (const Span& span : task.spans)
            for (int64_t first = 0; first < span.keys; first += DIRECT_KEYS) {
                const int64_t keys = std::min<int64_t>(DIRECT_KEYS, span.keys - first);
                const T* k = call_.k + task.head * call_.k_head + (span.key + first) * call_.k_slot;
                const T* v = call_.v + task.head * call_.v_head + (span.key + first) * call_.v_slot;
                const T* next = first + DIRECT_KEYS < span.keys ? k + DIRECT_KEYS * call_.k_slot : k;
                score<ROWS>(k, v, keys);
                multiply<ROWS>(k, call_.k_slot, keys);
                if (span.causal)
                    for (int r = 0; r < ROWS; ++r)
                        for (int64_t j = std::max<int64_t>(r / call_.group - first + 1, 0);
                             j < keys; ++j)
                            scores_[j * ROWS + r] = NONE;
                float factors[ROWS];
                soften<ROWS>(keys, factors);
                multiply<ROWS>(v, call_.v_slot, keys);
                constexpr int PAIRS = ROWS > 4 ? 1 : 4 / ROWS;
                int64_t d = 0;
                for (; d + PAIRS * 2 * VL <= depth_; d += PAIRS * 2 * VL)
                    weigh<ROWS, PAIRS>(v + d, keys, sums_ + d, factors, next + d * keys);
                for (; d < depth_; d += 2 * VL)
                    weigh<ROWS, 1>(v + d, keys, sums_ + d, factors, next + d * keys);
            }
    }

    // Scores [keys, ROWS]; the values that will be read next are called up.
    template <int ROWS>
    void score(const T* k, const T* v, int64_t keys) {
        constexpr int KEYS = 8 / ROWS;  // 8 accumulators
        int64_t j = 0;
        for (; j + KEYS <= keys; j += KEYS) {
            Vector sums[8] = {};
            for (int64_t d = 0; d < depth_; d += 2 * VL) {
                Vector x[KEYS][2];
#pragma GCC unroll 8
                for (int i = 0; i < KEYS; ++i) {
                    load_pair(k + (j + i) * call_.k_slot + d, x[i][0], x[i][1]);
                    x[i][0] = in_register(x[i][0]), x[i][1] = in_register(x[i][1]);
                    call_up<2 * VL>(v + (j + i) * call_.v_slot + d);
                }
#pragma GCC unroll 16
                for (int r = 0; r < 2 * ROWS; ++r) {
                    const Vector q =
                        in_register(load(queries_ + r % ROWS * depth_ + d + r / ROWS * VL));
#pragma GCC unroll 8
                    for (int i = 0; i < KEYS; ++i) sums[i * ROWS + r % ROWS] += q * x[i][r / ROWS];
                }
            }
            sum_each<8>(sums, scores_ + j * ROWS);
        }
        for (; j < keys; ++j)
            for (int r = 0; r < ROWS; ++r) {
                Vector sums = {}, x, y;
                for (int64_t d = 0; d < depth_; d += 2 * VL) {
                    load_pair(k + j * call_.k_slot + d, x, y);
                    const float* q = queries_ + r * depth_ + d;
                    sums += load(q) * x + load(q + VL) * y;
                }
                scores_[j * ROWS + r] = sum(sums);
            }
    }

    // Ask for so many numbers to be brought from memory.
    template <int NUMBERS>
    static void call_up(const T* p) {
        constexpr int LINE = 64 / static_cast<int>(sizeof(T));
#pragma GCC unroll 4
        for (int i = 0; i < NUMBERS; i += LINE) __builtin_prefetch(p + i, 0, 2);
    }

    // Scores or weights [keys, ROWS] times the scales of the rows that they were or will be used on.
    template <int ROWS>
    void multiply(const T* rows, int64_t stride, int64_t keys) {
        if constexpr (HAS_SCALE<T>)
            for (int64_t j = 0; j < keys; ++j) {
                const float scale = scale_of(rows + j * stride, depth_);
                for (int r = 0; r < ROWS; ++r) scores_[j * ROWS + r] *= scale;
            }
        else (void)rows, (void)stride, (void)keys;
    }

    // Scores [keys, ROWS] become weights, for all rows at once: a vector has several keys' scores.
    template <int ROWS>
    void soften(int64_t keys, float* factors) {
        const int64_t all = up(keys * ROWS, VL);
        for (int64_t i = keys * ROWS; i < all; ++i) scores_[i] = NONE;
        Vector high = load(scores_);
        for (int64_t i = VL; i < all; i += VL) {
            const Vector x = load(scores_ + i);
            high = high > x ? high : x;
        }
        Vector maximum = {};
        for (int r = 0; r < ROWS; ++r) {
            const float before = most_[r];
            for (int i = r; i < VL; i += ROWS) most_[r] = std::max(most_[r], high[i]);
            factors[r] = before == most_[r] ? 1.0f : exp2(before - most_[r]);
            // A row that has seen no key yet: its scores are all -inf, and so are their differences.
            for (int i = r; i < VL; i += ROWS) maximum[i] = most_[r] == NONE ? 0.0f : most_[r];
        }
        Vector weights = {};
        for (int64_t i = 0; i < all; i += VL) {
            const Vector x = exp2(load(scores_ + i) - maximum);
            store(scores_ + i, x);
            weights += x;
        }
        for (int r = 0; r < ROWS; ++r) {
            total_[r] *= factors[r];
            for (int i = r; i < VL; i += ROWS) total_[r] += weights[i];
        }
    }

    // A few columns of the sums: sums = factor sums + weights V; what lies at `next` is called up.
    template <int ROWS, int PAIRS>
    void weigh(const T* v, int64_t keys, float* sums, const float* factors, const T* next) {
        Vector columns[ROWS][2 * PAIRS] = {};
#pragma GCC unroll 2
        for (int64_t j = 0; j < keys; ++j) {
            Vector x[2 * PAIRS];
#pragma GCC unroll 4
            for (int c = 0; c < PAIRS; ++c)
                load_pair(v + j * call_.v_slot + c * 2 * VL, x[2 * c], x[2 * c + 1]);
            call_up<2 * VL * PAIRS>(next + j * 2 * VL * PAIRS);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                const Vector weight = splat(scores_[j * ROWS + r]);
#pragma GCC unroll 8
                for (int c = 0; c < 2 * PAIRS; ++c) columns[r][c] += weight * x[c];
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int c = 0; c < 2 * PAIRS; ++c) {
                float* to = sums + r * depth_ + c * VL;
                store(to, splat(factors[r]) * load(to) + columns[r][c]);
            }
    }

    void restore_order() {
        if (number_at<T>(1) == 1) return;
        for (int64_t r = 0; r < FEW; ++r) {
            std::copy_n(sums_ + r * depth_, depth_, queries_);
            for (int64_t d = 0; d < depth_; ++d)
                sums_[r * depth_ + number_at<T>(d)] = queries_[d];
        }
    }

    const Call<T>& call_;
    const int64_t depth_;
    float *queries_, *sums_, *scores_, most_[FEW], total_[FEW];
};

}  // namespace
