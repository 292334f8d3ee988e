// Rows of `bytes` each, [rows, heads], to slots of a pool's heads; strides are in bytes.

#include <cstdint>
#include <cstring>

extern "C" void longspan_scatter(char* pool, int64_t pool_head, int64_t pool_slot,
                                 const int64_t* slots, const char* from, int64_t from_row,
                                 int64_t from_head, int64_t rows, int64_t heads, int64_t bytes) {
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t r = 0; r < rows; ++r)
            std::memcpy(pool + h * pool_head + slots[r] * pool_slot,
                        from + r * from_row + h * from_head, bytes);
}
