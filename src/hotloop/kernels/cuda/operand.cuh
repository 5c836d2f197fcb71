// The layout of x for wide.cu: the B operand of wgmma, stored stage by stage of its ring.
//
// A stage holds lines of 64 input features, row by row, in 128 bytes each. A line has two slices of 32
// features. In the fragments of linear.cu, lane t has features 8t to 8t + 7 of a slice: one mma
// multiplies the first pair in columns 2t and 2t + 1, and the second pair eight columns further on;
// another mma multiplies the other two pairs. So pair j of lane t is word t of chunk j (16 bytes) of
// the slice. Chunks are permuted by the row, against bank conflicts.

#pragma once

#include "pointwise.cuh"

// The place where the kernel that computes x stores it for the next matrix product, whose weight has
// whole units of K.
struct NextOperand {
  uint8_t* bytes;         // [parts, part_stages, lines of a stage, rows, 128]
  uint32_t units, parts;  // of K
  int part_stages;        // stages of a part, at most
  int unit_shift;         // log2 of the input features of a unit
  int stage_shift;        // log2 of the units of a stage
  int rows;               // of x in a stage, in whole octets
  uint32_t scales[2];     // factors of pairs 0 and 2, and of pairs 1 and 3: two of bfloat16 each

  // Where features k to k + 7 lie, k a multiple of 8: lane t's words of a slice.
  struct Place {
    uint8_t* words;
    int chunk;
  };

  __device__ __forceinline__ Place place(int k) const {
    const uint32_t unit = k >> unit_shift, part = ((unit + 1) * parts - 1) / units;
    const int of_part = unit - units * part / parts, shift = unit_shift + stage_shift;
    const int stage = part * part_stages + (of_part >> stage_shift);
    const int of_unit = k & ((1 << unit_shift) - 1);
    const int of_stage = ((of_part << unit_shift) + of_unit) & ((1 << shift) - 1);
    const int line = (stage << (shift - 6)) + (of_stage >> 6);
    return {bytes + static_cast<int64_t>(line) * rows * 128 + (of_stage & 24) / 2,
            (of_stage & 32) / 8};
  }

  // Feature i of the eight, in a row. The same feature eight rows further on is 1024 bytes further on.
  static __device__ __forceinline__ bf16* feature(const Place& at, int row, int i) {
    return reinterpret_cast<bf16*>(at.words + row * 128 + ((at.chunk + i / 2) ^ row % 8) * 16) +
           i % 2;
  }

  // Feature i of the eight, as it is stored.
  __device__ __forceinline__ bf16 scaled(bf16 x, int i) const {
    return static_cast<bf16>(times(x, scales[i / 2 % 2]));
  }

  // Stores pair j of the eight.
  __device__ __forceinline__ void store_pair(const Place& at, int row, int j,
                                             uint32_t pair) const {
    *reinterpret_cast<uint32_t*>(feature(at, row, 2 * j)) = times(pair, scales[j % 2]);
  }
};
