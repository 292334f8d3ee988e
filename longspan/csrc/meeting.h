// Memory in which processes of one host meet: what each has computed a part of, all then have.
//
// Each process has a flag and two places, one of which is written while the other may still be read.
// A process that writes to a place for the second time has met all others since, so nobody reads the
// first any more.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

#include "vector.h"

namespace {

constexpr int64_t LINE = 64;          // bytes of a cache line
constexpr int TRIES = 4000;           // to look at a flag before others may have the core

struct Meeting {
    char* memory;           // a line for each rank's flag, then two times a place for each
    int64_t ranks;          // that have a place
    int64_t place_floats;
    const int64_t* members; // the ranks that meet, in order, of which this is
    int64_t num_members, index;
    int64_t turn;           // how often they have met; those who meet agree on the first one

    // Where this rank may write until it meets the others.
    float* own() const { return place(turn, index); }

    // What a member had written when they last met; it stays until the next meeting.
    const float* found(int64_t member) const { return place(turn - 1, member); }

    // This rank has written to its place. Returns when all have.
    void meet() {
        flag(index).store(turn + 1, std::memory_order_release);
        for (int64_t member = 0; member < num_members; ++member)
            for (int tries = 0; flag(member).load(std::memory_order_acquire) <= turn; ++tries) {
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
                if (tries >= TRIES) sched_yield();
            }
        ++turn;
    }

    // Where a member's part of so many numbers, a multiple of 16, begins; the last one's ends it.
    int64_t first_of(int64_t numbers, int64_t member) const {
        return numbers / 16 * member / num_members * 16;
    }

  private:
    float* place(int64_t of_turn, int64_t member) const {
        const int64_t at = (of_turn & 1) * ranks + members[member];
        return reinterpret_cast<float*>(memory + ranks * LINE) + at * place_floats;
    }

    std::atomic<int64_t>& flag(int64_t member) const {
        return *reinterpret_cast<std::atomic<int64_t>*>(memory + members[member] * LINE);
    }
};

}  // namespace
