// What a call asks for, and one task of it: a block of queries over the keys that it sees.
#pragma once

#include <vector>

#include "unit.h"

namespace {

constexpr int NB = 128;         // words of weights of a block of keys
// Queries (of a group of heads) that meet a key at once where keys are not packed: a vector has a
// score of each. And how many there may be, in rounds that cost less than packing.
constexpr int FEW = VL < 8 ? VL : 8, DIRECT = 4 * FEW;
constexpr int ALIGNMENT = 64;   // bytes

struct Item {  // one row of the caller's table of work
    int64_t row, rows, key, keys, causal;
};

template <typename T, typename Unit>
struct Call {
    float* out;
    float* lse;
    const typename Unit::Query* q;
    const T *k, *v;
    int64_t out_row, lse_row, q_row, q_head, k_head, k_slot, v_head, v_slot;
    int64_t kv_heads, group, head_dim;
    float scale;

    // Exponentials are of base 2. The scale goes into queries before the product if they are floats.
    float query_scale() const { return Unit::SCALES_QUERIES ? scale * LOG2E : 1.0f; }
    float score_scale() const { return Unit::SCALES_QUERIES ? 1.0f : scale * LOG2E; }
};

// Keys that a block of queries sees: `keys` slots from `key`; with `causal`, the block's query i
// (of all its rows) sees the first i + 1.
struct Span {
    int64_t key, keys;
    bool causal;
};

struct Task {
    int64_t row, rows, head;
    std::vector<Span> spans;
    int64_t partial;  // where its result goes if other tasks have a part of the same keys, or -1
    int64_t cost;
};

// The result for some queries: sums of weighted values, the exponent's maximum, the sum of weights.
struct Result {
    float *sums, *most, *total;
};

// One thread's working memory. It is kept from call to call, since new pages cost more than their use.
class Scratch {
  public:
    // Pointers to so many floats each, in order, aligned to cache lines.
    template <size_t N>
    void lay_out(const int64_t (&sizes)[N], float** const (&pointers)[N]) {
        size_t total = ALIGNMENT;
        for (int64_t size : sizes) total += up(size * 4, ALIGNMENT);
        if (memory_.size() < total) memory_.resize(total);
        auto address = up(reinterpret_cast<int64_t>(memory_.data()), ALIGNMENT);
        for (size_t i = 0; i < N; ++i) {
            *pointers[i] = reinterpret_cast<float*>(address);
            address += up(sizes[i] * 4, ALIGNMENT);
        }
    }

  private:
    std::vector<char> memory_;
};

thread_local Scratch scratch;

}  // namespace
