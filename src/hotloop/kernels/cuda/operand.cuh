// The layout of x for wide.cu: the B operand of wgmma, stored stage by stage of its ring.
//
// A stage holds lines of 64 input features, row by row, in 128 bytes each. A line has two slices of 32
// features. In the fragments of linear.cu, lane t has features 8t to 8t + 7 of a slice: one mma
// multiplies the first pair in columns 2t and 2t + 1, and the second pair eight columns further on;
// another mma multiplies the other two pairs. So pair j of lane t is word t of chunk j (16 bytes) of
// the slice. Chunks are permuted by the row, against bank conflicts.

#pragma once

#include "pointwise.cuh"

// The place where the kernel that computes x stores it for the next matrix product, if that product's
// weight is plain rows. A unit has 32 features of K, a stage two units, and every part of K whole
// stages.
struct NextOperand {
  uint8_t* bytes;         // [parts, part_stages, rows, 128]
  uint32_t units, parts;  // of K
  int part_stages;        // stages of a part, at most
  int rows;               // of x in a stage, in whole octets

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

  // Feature i of the eight, in a row. The same feature eight rows further on is 1024 bytes further on.
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
