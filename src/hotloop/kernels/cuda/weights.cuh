// Weights as they lie in memory (kernels/cuda/packing.py), and what they are worth.
//
// A tile is 16 output features, a unit what a tile has of 1024 bytes of weights, with the scales of
// its groups, a block 32 input features. g = lane / 4 and t = lane % 4 are a lane's place in
// fragments.

#pragma once

#include "device.cuh"

constexpr int kTileRows = 16;
constexpr int kFragmentBytes = 1024;  // of a unit
constexpr uint32_t kOnes = 0x3f803f80u;

// How each type of weight becomes two A operands for each block of 32 input features, with as few
// instructions as can be: its bits are cut out and lie where a bfloat16 of few bits has its own, so
// that its value is the weight's but for a power of two. x makes up for a part of that, and the
// results for the rest, which keeps sums far from both ends of what float can hold.
//
// kUnitK: input features of a unit. kGroupBlocks: blocks that share a scale, 0 if all do. kOffset:
// groups have offsets too. kRaised: by how much operands are more than the weights; what x adds up
// to takes that back. kFall: what results are multiplied by. lift(i), a pair of bfloat16: what x is
// multiplied by where it meets the operands' registers 2i and 2i + 1. one(i): what a weight of one
// would be there, if it were not raised.

struct Bf16 {
  static constexpr int kUnitK = 32, kUnitBytes = kFragmentBytes, kGroupBlocks = 0, kRaised = 0;
  static constexpr bool kChannelScale = false, kOffset = false;
  static constexpr float kFall = 1;

  static __device__ __forceinline__ constexpr uint32_t lift(int) { return kOnes; }

  static __device__ __forceinline__ void operands(const uint8_t* unit, int, int lane,
                                                  uint32_t a[2][4]) {
    for (int i = 0; i < 2; i++) {
      const uint4 words = reinterpret_cast<const uint4*>(unit)[32 * i + lane];
      a[i][0] = words.x, a[i][1] = words.y, a[i][2] = words.z, a[i][3] = words.w;
    }
  }
};

// Bytes 0 and 2 of a word are one pair of weights, 1 and 3 the other.
template <class Derived>
struct EightBits {
  static constexpr int kUnitK = 64, kUnitBytes = kFragmentBytes, kGroupBlocks = 0;
  static constexpr bool kChannelScale = true, kOffset = false;

  static __device__ __forceinline__ void operands(const uint8_t* unit, int block, int lane,
                                                  uint32_t a[2][4]) {
    const uint4 words = reinterpret_cast<const uint4*>(unit)[32 * block + lane];
    Derived::convert(words.x, a[0][0], a[0][1]);
    Derived::convert(words.y, a[0][2], a[0][3]);
    Derived::convert(words.z, a[1][0], a[1][1]);
    Derived::convert(words.w, a[1][2], a[1][3]);
  }
};

// Weights plus 128. A byte that ends a bfloat16 of zeros is worth 2^-133 times the integer in it.
struct Int8 : EightBits<Int8> {
  static constexpr int kRaised = 128;
  static constexpr float kFall = 0x1p67f;

  static __device__ __forceinline__ constexpr uint32_t lift(int) { return 0x60806080u; }  // 2^66
  static __device__ __forceinline__ constexpr uint32_t one(int) { return 0x00010001u; }

  static __device__ __forceinline__ void convert(uint32_t word, uint32_t& even, uint32_t& odd) {
    even = word & 0x00ff00ffu;
    odd = spread_odd_bytes(word);
  }
};

// Sign, exponent and mantissa of e4m3 moved to their places in bfloat16 are the value times 2^-120,
// subnormal ones too.
struct Fp8 : EightBits<Fp8> {
  static constexpr int kRaised = 0;
  static constexpr float kFall = 0x1p60f;

  static __device__ __forceinline__ constexpr uint32_t lift(int) { return 0x5d805d80u; }  // 2^60

  static __device__ __forceinline__ uint32_t pair(uint32_t signs, uint32_t rest) {
    return mask_or(rest, 0x07f007f0u, signs & 0x80008000u);
  }
  static __device__ __forceinline__ void convert(uint32_t word, uint32_t& even, uint32_t& odd) {
    even = pair(word << 8, word << 4);
    odd = pair(word, word >> 4);
  }
};

// Four pairs of weights, each plus 8, in the nibbles of a word: a byte's nibbles are of the same
// row, and the higher counts 16 times. After the fragments of a unit come, for each of its groups,
// the scales of the tile and then its offsets, rows g and g + 8 together.
template <int kGroup, bool kAsymmetric>
struct Int4 {
  static constexpr int kUnitK = 128, kGroupBlocks = kGroup / 32, kRaised = 8;
  static constexpr int kGroupBytes = (kAsymmetric ? 4 : 2) * kTileRows;
  static constexpr int kUnitBytes = kFragmentBytes + kUnitK / kGroup * kGroupBytes;
  static constexpr bool kChannelScale = false, kOffset = kAsymmetric;
  static constexpr float kFall = 0x1p67f;

  static __device__ __forceinline__ constexpr uint32_t lift(int i) {
    return i == 0 ? 0x60806080u : 0x5e805e80u;  // 2^66, 2^62
  }
  static __device__ __forceinline__ constexpr uint32_t one(int i) {
    return i == 0 ? 0x00010001u : 0x00100010u;
  }

  static __device__ __forceinline__ void operands(const uint8_t* unit, int block, int lane,
                                                  uint32_t a[2][4]) {
    const uint2 words = reinterpret_cast<const uint2*>(unit)[32 * block + lane];
    convert(words.x, a[0]);
    convert(words.y, a[1]);
  }
  static __device__ __forceinline__ void convert(uint32_t word, uint32_t a[4]) {
    const uint32_t odd = word >> 8;
    a[0] = word & 0x000f000fu, a[2] = word & 0x00f000f0u;
    a[1] = odd & 0x000f000fu, a[3] = odd & 0x00f000f0u;
  }
  static __device__ __forceinline__ const uint32_t* group(const uint8_t* unit, int block) {
    return reinterpret_cast<const uint32_t*>(unit + kFragmentBytes +
                                             block / kGroupBlocks * kGroupBytes);
  }
};

// The weight that an operand of register r stands for.
template <class Weight>
__device__ __forceinline__ float weight_of(float operand, int r) {
  return operand * low(Weight::lift(r / 2)) * Weight::kFall - Weight::kRaised;
}
