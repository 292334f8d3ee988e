// y = x W^T + b for few rows x. All are float32 or bfloat16; y is rounded to its type once.

#include "product.h"

namespace {

template <typename T>
void linear(const T* x, const T* w, const T* bias, T* y, int64_t rows, int64_t outputs,
            int64_t inputs, int threads) {
    const Input<T>* own = as_inputs(x, rows * inputs);
#pragma omp parallel num_threads(threads) if (threads > 1)
    product(own, rows, w, outputs, inputs, [=](int64_t output, int64_t row, float sum) {
        narrow(sum + (bias ? widen(bias[output]) : 0.0f), y + row * outputs + output);
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
