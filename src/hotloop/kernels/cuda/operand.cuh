// x as wide.cu reads it: the B operand of wgmma, which lies in memory stage by stage of its ring.
//
// A stage holds lines of 64 input features, row by row, in 128 bytes each. Of a line's two slices of
// 32 features, lane t of linear.cu's fragments has features 8t to 8t + 7: the first pair is
// multiplied in columns 2t and 2t + 1 of one mma, the second pair eight columns on, and the other two
// by another mma. So pair j of lane t is word t of the slice's chunk j of 16 bytes; and chunks are
// permuted by the row, against bank conflicts.

#pragma once

#include "pointwise.cuh"

// Where the kernel that computes x stores it for the next matrix product, whose weight is plain rows:
// of units of 32 features of K, two to a stage, and no part of K has an odd number of them.
struct NextOperand {
  uint8_t* bytes;         // [parts, part_stages, rows, 128]
  uint32_t units, parts;  // of K
  int part_stages;        // stages of a part
  int rows;               // of a line

  // Where features k to k + 7 lie, k a multiple of 8: lane t's words of a slice.
  struct Place {
    uint8_t* words;
    int chunk;
  };

  __device__ __forceinline__ Place place(int k) const {
    const uint32_t unit = k / 32, part = ((unit + 1) * parts - 1) / units;
    const uint32_t of_part = unit - units * part / parts;
    const int line = part * part_stages + of_part / 2;
    return {bytes + static_cast<int64_t>(line) * rows * 128 + (k & 24) / 2,
            static_cast<int>(of_part % 2 * 4)};
  }

  // Feature i of the eight, in a row. That of eight rows further on is 1024 bytes further on.
  static __device__ __forceinline__ bf16* feature(const Place& at, int row, int i) {
    return reinterpret_cast<bf16*>(at.words + row * 128 + ((at.chunk + i / 2) ^ row % 8) * 16) +
           i % 2;
  }

  // Stores pair j of the eight.
  static __device__ __forceinline__ void store_pair(const Place& at, int row, int j,
                                                    uint32_t pair) {
    *reinterpret_cast<uint32_t*>(feature(at, row, 2 * j)) = pair;
  }
};
