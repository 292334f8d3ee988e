// What comes after a decoder layer's attention, for few rows that some processes have in common.
//
// Each has attended to keys of its own, and computes a part of the outputs of each linear layer: so
// it reads a part of the weights (as in Helix, arXiv 2507.07120, but that all processes have all
// weights). Outputs are whole sums, whoever computes them, so a row is the same as if one process
// had computed all of it.

#include "layer.h"
#include "meeting.h"
#include "state.h"

namespace {

// One row of the members' states, out [rows, heads, depth] and then lse [rows, heads] in what each has
// written, becomes `to` [heads, depth]; `own` has room for a row of both.
template <typename To>
inline void merge_all(const Meeting& meeting, int64_t row, int64_t rows, const Layer& layer,
                      float* own, To* to) {
    const int64_t heads = layer.heads, depth = layer.head_dim, width = heads * depth;
    float* own_lse = own + width;
    for (int64_t member = 0; member < meeting.num_members; ++member) {
        const float* out = meeting.found(member) + row * width;
        const float* lse = meeting.found(member) + rows * width + row * heads;
        if (member) {
            absorb(own, own_lse, out, depth, lse, 1, heads, depth, 1);
        } else {
            std::copy_n(out, width, own);
            std::copy_n(lse, heads, own_lse);
        }
    }
    for (int64_t i = 0; i < width; i += VL) narrow(load(own + i), to + i);
}

// This member's outputs of x W^T + b go to [rows, its outputs] from `to` on.
template <typename W>
inline void apply_part(const Meeting& meeting, const Linear& linear, const Input<W>* x,
                       int64_t rows, int64_t inputs, float* to) {
    const int64_t first = meeting.first_of(linear.outputs, meeting.index);
    const int64_t count = meeting.first_of(linear.outputs, meeting.index + 1) - first;
    const Linear part{static_cast<const W*>(linear.weight) + first * inputs,
                      linear.bias ? linear.bias + first : nullptr, count};
    apply<W>(part, x, rows, inputs, [=](int64_t output, int64_t row, float value) {
        to[row * count + output] = value;
    });
}

// Calls `take(output, part, count)` for each member's part of so many outputs.
template <typename Take>
inline void gather(const Meeting& meeting, int64_t outputs, const Take& take) {
    for (int64_t member = 0; member < meeting.num_members; ++member) {
        const int64_t first = meeting.first_of(outputs, member);
        take(first, meeting.found(member), meeting.first_of(outputs, member + 1) - first);
    }
}

// From this member's states and x [rows, hidden] y [rows, hidden], the same for all members.
template <typename T>
void after(const Layer& layer, Meeting& meeting, const float* out, const float* lse, const T* x,
           T* y, int64_t rows, int threads) {
    const int64_t hidden = layer.hidden, inner = layer.gate.outputs, heads = layer.heads;
    const int64_t width = heads * layer.head_dim;
    const int64_t state = width + heads, widest = std::max({hidden, width, inner});
    float* states = memory_of<BETWEEN>(rows * (state + hidden + widest));
    float* sums = states + rows * state;
    auto* input = reinterpret_cast<Input<T>*>(sums + rows * hidden);  // of one product after the other
    const auto meet = [&] {
#pragma omp barrier
#pragma omp single
        meeting.meet();
    };
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp single
        {
            std::copy_n(out, rows * width, meeting.own());
            std::copy_n(lse, rows * heads, meeting.own() + rows * width);
        }
        meet();
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r)
            merge_all(meeting, r, rows, layer, states + r * state, input + r * width);
        apply_part<T>(meeting, layer.o, input, rows, width, meeting.own());
        meet();
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            float* own = sums + r * hidden;
            gather(meeting, hidden, [&](int64_t first, const float* part, int64_t count) {
                const float* found = part + r * count;
                for (int64_t i = 0; i < count; i += VL)
                    store(own + first + i, load(x + r * hidden + first + i) + load(found + i));
            });
            normalize(layer.norm2, own, input + r * hidden, hidden);
        }
        const int64_t own = meeting.first_of(inner, meeting.index + 1) -
                            meeting.first_of(inner, meeting.index);
        apply_part<T>(meeting, layer.gate, input, rows, hidden, meeting.own());
        apply_part<T>(meeting, layer.up, input, rows, hidden, meeting.own() + rows * own);
        meet();
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r)
            gather(meeting, inner, [&](int64_t first, const float* part, int64_t count) {
                const float *gate = part + r * count, *up = gate + rows * count;
                for (int64_t i = 0; i < count; i += VL)
                    narrow(silu(load(gate + i)) * load(up + i), input + r * inner + first + i);
            });
        apply_part<T>(meeting, layer.down, input, rows, inner, meeting.own());
        meet();
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r)
            gather(meeting, hidden, [&](int64_t first, const float* part, int64_t count) {
                for (int64_t i = 0; i < count; i += VL) {
                    const int64_t at = r * hidden + first + i;
                    narrow(load(sums + at) + load(part + r * count + i), y + at);
                }
            });
    }
}

}  // namespace

// Of as many numbers of each rank the largest one at each place. That takes two meetings, so that a
// step still has an even number of them, and the next one begins with the place that is not read.
extern "C" void longspan_largest(Meeting* meeting, int32_t* numbers, int64_t count) {
    std::copy_n(numbers, count, reinterpret_cast<int32_t*>(meeting->own()));
    meeting->meet();
    for (int64_t member = 0; member < meeting->num_members; ++member) {
        const auto* found = reinterpret_cast<const int32_t*>(meeting->found(member));
        for (int64_t i = 0; i < count; ++i) numbers[i] = std::max(numbers[i], found[i]);
    }
    meeting->meet();
}

#define LONGSPAN_AFTER_JOINTLY(name, T)                                                         \
    extern "C" void longspan_after_jointly_##name(                                              \
        const Layer* layer, Meeting* meeting, const float* out, const float* lse, const T* x,   \
        T* y, int64_t rows, int threads) {                                                      \
        after(*layer, *meeting, out, lse, x, y, rows, threads);                                 \
    }

LONGSPAN_AFTER_JOINTLY(float32, float)
LONGSPAN_AFTER_JOINTLY(bfloat16, BFloat16)
