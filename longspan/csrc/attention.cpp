// Attention with its log-sum-exp on CPU, over keys that lie in a pool, merged into states in place.
//
// A *work item* is a rectangle of queries and keys that is seen whole, or a square on the diagonal
// of a causal mask. Queries are cut into blocks at the ends of items; a task is one block of
// queries of one key/value head over all (or a part of) its keys, so K and V are read once for the
// whole group of query heads. Sums are float32; what products take is up to `unit.h`. Exponentials
// are of base 2, with log2(e) folded into the scale.

#include <unistd.h>

#include <vector>

#include "direct.h"
#include "packed.h"
#include "state.h"

namespace {

// Merge results for a block of queries into the caller's states.
template <typename T, typename Unit>
void merge(const Call<T, Unit>& call, const Task& task, const Result& found, int64_t width) {
    for (int64_t r = 0; r < task.rows * call.group; ++r) {
        if (found.most[r] == NONE) continue;
        const int64_t row = task.row + r / call.group;
        const int64_t head = task.head * call.group + r % call.group;
        float* out = call.out + row * call.out_row + head * call.head_dim;
        float* lse = call.lse + row * call.lse_row + head;
        const float before = *lse * LOG2E, most = std::max(before, found.most[r]);
        const float old = exp2(before - most), added = exp2(found.most[r] - most);
        const float total = old + added * found.total[r];
        const float* sums = found.sums + r * width;
        if (old == 0.0f)  // what an empty state holds is nobody's business
            for (int64_t d = 0; d < call.head_dim; ++d) out[d] = sums[d] * added / total;
        else
            for (int64_t d = 0; d < call.head_dim; ++d)
                out[d] = (out[d] * old + sums[d] * added) / total;
        *lse = (most + std::log2(total)) * LN2;
    }
}

// The blocks of queries, with the keys that each sees, for one head.
std::vector<Task> cut(const Item* items, int64_t num_items, int64_t most_rows) {
    std::vector<int64_t> ends;
    for (int64_t i = 0; i < num_items; ++i)
        if (items[i].rows && items[i].keys) {
            ends.push_back(items[i].row);
            ends.push_back(items[i].row + items[i].rows);
        }
    std::sort(ends.begin(), ends.end());
    ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
    std::vector<Task> blocks;
    for (size_t i = 0; i + 1 < ends.size(); ++i)
        for (int64_t row = ends[i]; row < ends[i + 1]; row += most_rows)
            blocks.push_back({row, std::min(most_rows, ends[i + 1] - row), 0, {}, -1, 0});
    for (int64_t i = 0; i < num_items; ++i) {
        const Item& item = items[i];
        if (!item.rows || !item.keys) continue;
        auto block = std::lower_bound(blocks.begin(), blocks.end(), item.row,
                                      [](const Task& b, int64_t row) { return b.row < row; });
        for (; block != blocks.end() && block->row < item.row + item.rows; ++block) {
            const int64_t before = block->row - item.row;
            if (!item.causal) {
                block->spans.push_back({item.key, item.keys, false});
            } else {
                if (before) block->spans.push_back({item.key, before, false});
                block->spans.push_back({item.key + before, block->rows, true});
            }
        }
    }
    blocks.erase(std::remove_if(blocks.begin(), blocks.end(),
                                [](const Task& b) { return b.spans.empty(); }),
                 blocks.end());
    return blocks;
}

int64_t keys_of(const Task& task) {
    int64_t keys = 0;
    for (const Span& span : task.spans) keys += span.keys;
    return keys;
}

// A block's keys in parts of about `most` each; a causal square stays whole.
std::vector<Task> split(const Task& block, int64_t most) {
    std::vector<Task> parts;
    int64_t room = 0;
    for (Span span : block.spans)
        while (span.keys) {
            if (room <= 0) {
                parts.push_back(block);
                parts.back().spans.clear();
                room = most;
            }
            const int64_t keys = span.causal ? span.keys : std::min(span.keys, up(room, NB));
            parts.back().spans.push_back({span.key, keys, span.causal});
            span.key += keys, span.keys -= keys, room -= keys;
        }
    return parts;
}

int64_t l2_bytes() {
    constexpr int64_t USUAL = 512 << 10;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return size > 0 ? std::min<int64_t>(size, 4 * USUAL) : USUAL;  // 0: the system doesn't know
#else
    return USUAL;
#endif
}

template <typename T, typename Unit>
void attend(const Call<T, Unit>& call, const Item* items, int64_t num_items, int threads) {
    // A block's packed queries and sums take half of the L2 cache.
    const int64_t most = std::max<int64_t>(l2_bytes() / 16 / up(call.head_dim, NR) / MR * MR, MR);
    const int64_t most_rows = std::max<int64_t>(most / call.group, 1);
    const bool direct_fits = call.head_dim % (2 * VL) == 0;
    std::vector<Task> tasks;
    const std::vector<Task> blocks = cut(items, num_items, most_rows);
    int64_t work = 0;
    for (const Task& block : blocks) work += block.rows * keys_of(block) * call.kv_heads;
    const int64_t share = work / (4 * threads) + 1;
    const bool few_tasks = threads > 1 &&
        static_cast<int64_t>(blocks.size()) * call.kv_heads < 4 * threads;
    int64_t partials = 0, parts_of = 0;
    for (const Task& block : blocks) {
        const int64_t most_keys = few_tasks ? std::max<int64_t>(share / block.rows, 4 * NB)
                                            : std::numeric_limits<int64_t>::max() / 2;
        const std::vector<Task> parts = split(block, most_keys);
        for (int64_t head = 0; head < call.kv_heads; ++head)
            for (const Task& part : parts) {
                tasks.push_back(part);
                Task& task = tasks.back();
                task.head = head;
                task.cost = task.rows * keys_of(task);
                if (parts.size() > 1) task.partial = partials++;
            }
        if (parts.size() > 1) parts_of = std::max(parts_of, block.rows * call.group);
    }
    std::sort(tasks.begin(), tasks.end(),
              [](const Task& a, const Task& b) { return a.cost > b.cost; });
    const int64_t width = up(call.head_dim, NR) + 2;
    std::vector<float> kept(partials * parts_of * width);
    const auto place = [&](const Task& task) {
        float* sums = kept.data() + task.partial * parts_of * width;
        float* most = sums + parts_of * (width - 2);
        return Result{sums, most, most + parts_of};
    };
    const auto finish = [&](const Task& task, const Result& found, int64_t stride) {
        if (task.partial < 0) return merge(call, task, found, stride);
        const Result to = place(task);
        for (int64_t r = 0; r < task.rows * call.group; ++r) {
            std::copy_n(found.sums + r * stride, call.head_dim, to.sums + r * (width - 2));
            to.most[r] = found.most[r], to.total[r] = found.total[r];
        }
    };
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (tasks.size() > 1)
    for (size_t i = 0; i < tasks.size(); ++i) {
        const Task& task = tasks[i];
        if (direct_fits && task.rows * call.group <= DIRECT) {
            Direct<T, Unit> few(call);
            finish(task, few.run(task), few.width());
        } else {
            Packed<T, Unit> many(call, most_rows);
            finish(task, many.run(task), many.width());
        }
    }
    for (const Task& task : tasks)
        if (task.partial >= 0) merge(call, task, place(task), width - 2);
}

}  // namespace

extern "C" void longspan_absorb(float* out, float* lse, const float* other_out, int64_t other_row,
                                const float* other_lse, int64_t lse_row, int64_t rows,
                                int64_t depth, int threads) {
    absorb(out, lse, other_out, other_row, other_lse, lse_row, rows, depth, threads);
}

#define LONGSPAN_ATTEND(name, T, Unit)                                                           \
    extern "C" void longspan_attend_##name(                                                     \
        float* out, float* lse, const Unit::Query* q, const T* k, const T* v,            \
        const int64_t* strides, const int64_t* shape, float scale, const Item* items,           \
        int64_t num_items, int threads) {                                                       \
        const Call<T, Unit> call{                                                        \
            out, lse, q, k, v, strides[0], strides[1], strides[2], strides[3], strides[4],      \
            strides[5], strides[6], strides[7], shape[0], shape[1], shape[2], scale};           \
        attend(call, items, num_items, threads);                                                \
    }

LONGSPAN_ATTEND(float32, float, Floats<float>)
LONGSPAN_ATTEND(bfloat16, BFloat16, Floats<BFloat16>)
LONGSPAN_ATTEND(float16, Float16, Floats<Float16>)
LONGSPAN_ATTEND(int8, Int8, Floats<Int8>)
#if defined(__AVX512BF16__)
LONGSPAN_ATTEND(bfloat16_pairs, BFloat16, Pairs)
#endif
