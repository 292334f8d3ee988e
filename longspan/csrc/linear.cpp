// y = x W^T + b. All are float32 or bfloat16; y is rounded to its type once.

#include "many.h"

namespace {

template <typename T>
void linear_of_few(const T* x, const T* w, const T* bias, T* y, int64_t rows, int64_t outputs,
            int64_t inputs, int threads) {
    const Input<T>* own = as_inputs(x, rows * inputs);
#pragma omp parallel num_threads(threads) if (threads > 1)
    product(own, rows, w, outputs, inputs, [=](int64_t output, int64_t row, float sum) {
        narrow(sum + (bias ? widen(bias[output]) : 0.0f), y + row * outputs + output);
    });
}

// By one thread.
template <typename T>
void linear_of_many(const T* x, const T* w, const T* bias, T* y, int64_t rows, int64_t outputs,
                    int64_t inputs) {
    float* panels = memory_of<BETWEEN>(up(rows, MR) * inputs);
    for (int64_t r = 0; r < rows; ++r) lay<T>(as_inputs(x + r * inputs, inputs), r, inputs, panels);
    product_of_many(panels, rows, w, outputs, inputs,
                    [=](int64_t row, int64_t output, float* sums, int64_t count) {
                        if (bias)
                            for (int64_t i = 0; i < count; ++i) sums[i] += widen(bias[output + i]);
                        narrow_all(sums, y + row * outputs + output, count);
                    });
}

template <typename T>
void linear(const T* x, const T* w, const T* bias, T* y, int64_t rows, int64_t outputs,
            int64_t inputs, int threads) {
    if (rows <= FEW_ROWS) return linear_of_few(x, w, bias, y, rows, outputs, inputs, threads);
    in_parts(rows, inputs, threads, [=](int64_t first, int64_t count) {
        linear_of_many(x + first * inputs, w, bias, y + first * outputs, count, outputs, inputs);
    });
}

}  // namespace

// x [rows, inputs], w [outputs, inputs], bias [outputs] or null, y [rows, outputs]; inputs are a
// multiple of 16; all contiguous.
#define LONGSPAN_LINEAR(name, T)                                                                \
    extern "C" void longspan_linear_##name(const T* x, const T* w, const T* bias, T* y,         \
                                           int64_t rows, int64_t outputs, int64_t inputs,       \
                                           int threads) {                                       \
        linear(x, w, bias, y, rows, outputs, inputs, threads);                                  \
    }

LONGSPAN_LINEAR(float32, float)
LONGSPAN_LINEAR(bfloat16, BFloat16)
