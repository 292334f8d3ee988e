// Attention of few queries, as in decode: keys are read once, where they lie, for all query heads of
// their group. The speed is that of memory: while one block is used, the next one is called up.
#pragma once

#include "task.h"

namespace {

constexpr int DIRECT_KEYS = 64;   // of a block: its keys and values stay in cache
constexpr int LONG_SPAN = 2048;   // keys from which on what comes next is called up a block earlier

template <typename T, typename Unit>
class Direct {
  public:
    explicit Direct(const Call<T, Unit>& call)
        : call_(call), depth_(call.head_dim), words_(call.head_dim / PACE) {
        scratch.lay_out({DIRECT * depth_, DIRECT * depth_, FEW * DIRECT_KEYS},
                        {&all_queries_, &all_sums_, &scores_});
    }

    Result run(const Task& task) {
        const int64_t rows = task.rows * call_.group, all = up(rows, FEW);
        for (int64_t r = 0; r < all; ++r) {
            const int64_t row = task.row + r / call_.group;
            const int64_t head = task.head * call_.group + r % call_.group;
            const auto* from = call_.q + row * call_.q_row + head * call_.q_head;
            auto* to = reinterpret_cast<typename Unit::Query*>(all_queries_ + r * words_);
            for (int64_t d = 0; d < depth_; ++d)
                to[d] = r < rows ? Unit::query(from[Unit::number_at(d)], call_.query_scale())
                                 : typename Unit::Query{};
        }
        std::fill_n(all_sums_, all * depth_, 0.0f);
        std::fill_n(all_most_, all, NONE);
        std::fill_n(all_total_, all, 0.0f);
        if (rows == 1) attend<1>(task, rows);
        else if (rows == 2) attend<2>(task, rows);
        else if (rows <= 4) attend<4>(task, rows);
        else attend<FEW>(task, rows);
        restore_order(all);
        return {all_sums_, all_most_, all_total_};
    }

    int64_t width() const { return depth_; }

  private:
    static constexpr int PACE = Unit::PACE;
    static constexpr int PARTS = 2 / PACE;  // vectors of words that are 2 VL numbers of a key

    // Each block of keys meets ROWS queries after the other while it is in cache.
    template <int ROWS>
    void attend(const Task& task, int64_t rows) {
        for (const Span& span : task.spans)
            for (int64_t first = 0; first < span.keys; first += DIRECT_KEYS)
                for (int64_t row = 0; row < rows; row += ROWS) {
                    queries_ = all_queries_ + row * words_;
                    sums_ = all_sums_ + row * depth_;
                    most_ = all_most_ + row, total_ = all_total_ + row;
                    attend_to<ROWS>(task, span, first, row);
                }
    }

    template <int ROWS>
    void attend_to(const Task& task, const Span& span, int64_t first, int64_t row) {
        const int64_t keys = std::min<int64_t>(DIRECT_KEYS, span.keys - first);
        const T* k = call_.k + task.head * call_.k_head + (span.key + first) * call_.k_slot;
        const T* v = call_.v + task.head * call_.v_head + (span.key + first) * call_.v_slot;
        const int64_t ahead = span.keys < LONG_SPAN ? 0 : DIRECT_KEYS;
        const T* next_v = first + ahead < span.keys ? v + ahead * call_.v_slot : v;
        const int64_t after = ahead + DIRECT_KEYS;
        const T* next_k = first + after < span.keys ? k + after * call_.k_slot : k;
        score<ROWS>(k, next_v, keys);
        multiply<ROWS>(k, call_.k_slot, keys);
        if (span.causal)
            for (int r = 0; r < ROWS; ++r)
                for (int64_t j = std::max<int64_t>((row + r) / call_.group - first + 1, 0);
                     j < keys; ++j)
                    scores_[j * ROWS + r] = NONE;
        float factors[ROWS];
        soften<ROWS>(keys, factors);
        multiply<ROWS>(v, call_.v_slot, keys);
        constexpr int PAIRS = ROWS > 4 ? 1 : (VL == 16 ? 8 : 4) / ROWS;  // by registers
        int64_t d = 0;
        for (; d + PAIRS * 2 * VL <= depth_; d += PAIRS * 2 * VL)
            weigh<ROWS, PAIRS>(v + d, keys, sums_ + d, factors, next_k + d * keys);
        for (; d < depth_; d += 2 * VL)
            weigh<ROWS, 1>(v + d, keys, sums_ + d, factors, next_k + d * keys);
    }

    // Scores [keys, ROWS]; as many values at `next` are called up.
    template <int ROWS>
    void score(const T* k, const T* next, int64_t keys) {
        constexpr int SUMS = VL == 16 && ROWS >= 4 ? 16 : 8;  // accumulators
        constexpr int KEYS = SUMS / ROWS;
        int64_t j = 0;
        for (; j + KEYS <= keys; j += KEYS) {
            Vector sums[SUMS] = {};
            for (int64_t d = 0; d < depth_; d += 2 * VL) {
                Vector x[KEYS][PARTS];
#pragma GCC unroll 8
                for (int i = 0; i < KEYS; ++i) {
                    Unit::load_key(k + (j + i) * call_.k_slot + d, x[i]);
                    for (Vector& part : x[i]) part = in_register(part);
                    call_up<2 * VL>(next + (j + i) * call_.v_slot + d);
                }
#pragma GCC unroll 16
                for (int r = 0; r < PARTS * ROWS; ++r) {
                    const Vector q = in_register(
                        load(queries_ + r % ROWS * words_ + d / PACE + r / ROWS * VL));
#pragma GCC unroll 8
                    for (int i = 0; i < KEYS; ++i) {
                        Vector& sum = sums[i * ROWS + r % ROWS];
                        sum = Unit::fused(q, x[i][r / ROWS], sum);
                    }
                }
            }
            if constexpr (SUMS == 8) sum_each<SUMS>(sums, scores_ + j * ROWS);
            else store(scores_ + j * ROWS, sum_sixteen(sums));
        }
        for (; j < keys; ++j)
            for (int r = 0; r < ROWS; ++r) {
                Vector sums = {}, x[PARTS];
                for (int64_t d = 0; d < depth_; d += 2 * VL) {
                    Unit::load_key(k + j * call_.k_slot + d, x);
                    for (int part = 0; part < PARTS; ++part)
                        sums = Unit::fused(load(queries_ + r * words_ + d / PACE + part * VL),
                                           x[part], sums);
                }
                scores_[j * ROWS + r] = sum(sums);
            }
        for (int64_t i = 0; i < keys * ROWS; i += VL)  // there is room for a whole vector
            store(scores_ + i, load(scores_ + i) * splat(call_.score_scale()));
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

    // Scores [keys, ROWS] become words of weights [keys / PACE, ROWS], for all rows at once: a vector
    // has several keys' scores.
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
            Unit::template store_weights_of_keys<ROWS>(scores_, i, x);
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
        const auto add = [&](int64_t j, const T* row, const T* row_after) {
            Vector x[PAIRS][2];
#pragma GCC unroll 4
            for (int c = 0; c < PAIRS; ++c)
                Unit::load_words(row + c * 2 * VL, row_after ? row_after + c * 2 * VL : nullptr, x[c]);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                const Vector weight = splat(scores_[j / PACE * ROWS + r]);
#pragma GCC unroll 8
                for (int c = 0; c < 2 * PAIRS; ++c)
                    columns[r][c] = Unit::fused(weight, x[c / 2][c % 2], columns[r][c]);
            }
        };
        int64_t j = 0;
#pragma GCC unroll 2
        for (; j + PACE <= keys; j += PACE) {
            const T* row = v + j * call_.v_slot;
            add(j, row, row + (PACE - 1) * call_.v_slot);
            call_up<2 * VL * PAIRS * PACE>(next + j * 2 * VL * PAIRS);
        }
        if (j < keys) add(j, v + j * call_.v_slot, nullptr);
        for (int r = 0; r < ROWS; ++r)
            for (int c = 0; c < 2 * PAIRS; ++c) {
                float* to = sums + r * depth_ + c * VL;
                store(to, splat(factors[r]) * load(to) + columns[r][c]);
            }
    }

    void restore_order(int64_t rows) {
        if (Unit::number_at(1) == 1) return;
        for (int64_t r = 0; r < rows; ++r) {
            float* sums = all_sums_ + r * depth_;
            std::copy_n(sums, depth_, all_queries_);
            for (int64_t d = 0; d < depth_; ++d) sums[Unit::number_at(d)] = all_queries_[d];
        }
    }

    const Call<T, Unit>& call_;
    const int64_t depth_, words_;
    float *all_queries_, *all_sums_, all_most_[DIRECT], all_total_[DIRECT];
    float *queries_, *sums_, *most_, *total_;  // of those that meet a block now
    float* scores_;
};

}  // namespace
