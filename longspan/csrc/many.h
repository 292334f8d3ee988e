// x W^T for the many rows x of a prompt: W is packed into panels, each of which meets all rows.
//
// A thread has up to a thousand rows of its own, and takes them through all that is done to them; the
// threads share nothing and don't wait for each other. What is packed for so many rows costs them
// one percent.
#pragma once

#include "product.h"
#include "tile.h"

namespace {

constexpr int64_t DEPTH = 128;          // words that are summed by themselves
constexpr int64_t PANELS = 256 << 10;   // bytes of packed weights, which stay in L2
constexpr int64_t ROWS = 84 * MR, ROWS_BYTES = 16 << 20;  // most of a thread, and in their widest form

template <typename W>
inline int64_t words_of(int64_t numbers) { return numbers / Words<W>::PACE; }

// A row of inputs goes as words to where tiles look for it: panels [rows / MR, words, MR].
template <typename W>
inline void lay(const Input<W>* x, int64_t row, int64_t numbers, float* panels) {
    const int64_t words = words_of<W>(numbers);
    float* to = panels + row / MR * MR * words + row % MR;
    for (int64_t i = 0; i < words; ++i) to[i * MR] = Words<W>::word(x, i, 1.0f);
}

// Lays all rows that `make(row, numbers)` makes.
template <typename W, typename Make>
inline void lay_all(int64_t rows, int64_t numbers, float* panels, const Make& make) {
    auto* one = reinterpret_cast<Input<W>*>(memory_of<INPUTS>(numbers));
    for (int64_t r = 0; r < rows; ++r) {
        make(r, one);
        lay<W>(one, r, numbers, panels);
    }
}

// x W^T by one thread, x in panels. Calls `take(row, output, sums, count)` with each row's sums of
// up to NR outputs from `output` on.
template <typename W, typename Take>
inline void product_of_many(const float* x, int64_t rows, const W* w, int64_t outputs,
                            int64_t inputs, const Take& take) {
    using Unit = Words<W>;
    static const auto ones = [] { std::array<float, NR> x; x.fill(1.0f); return x; }();
    const int64_t words = words_of<W>(inputs);
    const int64_t most = std::max<int64_t>(PANELS / 4 / words / NR, 1) * NR;
    float* panels = memory_of<WEIGHTS>(most * words);
    for (int64_t first = 0; first < outputs; first += most) {
        const int64_t columns = std::min(most, outputs - first);
        for (int64_t j = 0; j < columns; j += NR) {
            const W* from[NR];  // columns that are not there repeat the last
            for (int i = 0; i < NR; ++i)
                from[i] = w + std::min(first + j + i, outputs - 1) * inputs;
            to_panel<Unit>(from, ones.data(), words, panels + j * words);
        }
        for (int64_t row = 0; row < rows; row += MR)
            for (int64_t j = 0; j < columns; j += NR) {
                alignas(64) float sums[MR * NR];
                for (int64_t i = 0; i < words; i += DEPTH) {
                    const int64_t depth = std::min(DEPTH, words - i);
                    const float *a = x + row * words + i * MR, *b = panels + j * words + i * NR;
                    if (i == 0) tile<Unit, MR, 1, false>(a, b, depth, sums, NR, 1, nullptr);
                    else tile<Unit, MR, 1, true>(a, b, depth, sums, NR, 1, ones.data());
                }
                for (int64_t r = 0; r < std::min<int64_t>(MR, rows - row); ++r)
                    take(row + r, first + j, sums + r * NR, std::min<int64_t>(NR, columns - j));
            }
    }
}

// Calls `work(first, count)` for all rows in parts of the size that a thread takes, none of whose
// rows has more than `widest` numbers.
template <typename Work>
inline void in_parts(int64_t rows, int64_t widest, int threads, const Work& work) {
    const int64_t fit = std::max<int64_t>(ROWS_BYTES / 4 / widest / MR * MR, MR);
    const int64_t most = std::min(ROWS, fit), turns = (rows + threads * most - 1) / (threads * most);
    const int64_t parts = turns * threads, size = up((rows + parts - 1) / parts, MR);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t first = 0; first < rows; first += size) work(first, std::min(size, rows - first));
}

}  // namespace
