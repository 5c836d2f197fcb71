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

// How each type of weight becomes two A operands for each block of 32 input features.
//
// kUnitK: input features of a unit. kGroupBlocks: blocks that share a scale, 0 if all do. kOffset:
// groups have offsets too, so that what x adds up to over each group is known. Then operands can be
// kRaised more than the weights, since that comes off with the offset.

struct Bf16 {
  static constexpr int kUnitK = 32, kUnitBytes = kFragmentBytes, kGroupBlocks = 0;
  static constexpr int kRaised = 0;
  static constexpr bool kChannelScale = false, kOffset = false;

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
  static constexpr int kRaised = 0;
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

struct Int8 : EightBits<Int8> {
  // A bfloat16 of 128 plus the lower seven bits, less 128 or 256 by the sign: exact.
  static __device__ __forceinline__ uint32_t pair(uint32_t word) {
    const uint32_t magnitude = mask_or(word, 0x007f007fu, 0x43004300u);
    const uint32_t minus = mask_or(word, 0x00800080u, 0xc300c300u);
    return fma_pair(magnitude, kOnes, minus);
  }
  static __device__ __forceinline__ void convert(uint32_t word, uint32_t& even, uint32_t& odd) {
    even = pair(word);
    odd = pair(word >> 8);
  }
};

struct Fp8 : EightBits<Fp8> {
  // Sign, exponent and mantissa of e4m3 moved to their places in bfloat16 are the value times
  // 2^-120, subnormal ones too: exact.
  static __device__ __forceinline__ uint32_t pair(uint32_t shifted) {
    const uint32_t moved = mask_or(shifted >> 4, 0x07f007f0u, shifted & 0x80008000u);
    return fma_pair(moved, 0x7b807b80u, kMinusZeros);
  }
  static __device__ __forceinline__ void convert(uint32_t word, uint32_t& even, uint32_t& odd) {
    even = pair(word << 8);
    odd = pair(word);
  }
};

// Four pairs of weights, each plus 8, in the nibbles of a word. After the fragments of a unit come,
// for each of its groups, the scales of the tile and then its offsets, rows g and g + 8 together.
template <int kGroup, bool kAsymmetric>
struct Int4 {
  static constexpr int kUnitK = 128, kGroupBlocks = kGroup / 32;
  static constexpr int kGroupBytes = (kAsymmetric ? 4 : 2) * kTileRows;
  static constexpr int kUnitBytes = kFragmentBytes + kUnitK / kGroup * kGroupBytes;
  static constexpr int kRaised = kAsymmetric ? 136 : 0;
  static constexpr bool kChannelScale = false, kOffset = kAsymmetric;

  // A bfloat16 of 128 plus the nibble, less 136 if need be: exact.
  static __device__ __forceinline__ uint32_t pair(uint32_t word) {
    const uint32_t raised = mask_or(word, 0x000f000fu, 0x43004300u);
    return kRaised > 0 ? raised : fma_pair(raised, kOnes, 0xc308c308u);
  }
  static __device__ __forceinline__ void operands(const uint8_t* unit, int block, int lane,
                                                  uint32_t a[2][4]) {
    const uint2 words = reinterpret_cast<const uint2*>(unit)[32 * block + lane];
    for (int r = 0; r < 4; r++) a[0][r] = pair(words.x >> 4 * r);
    for (int r = 0; r < 4; r++) a[1][r] = pair(words.y >> 4 * r);
  }
  static __device__ __forceinline__ const uint32_t* group(const uint8_t* unit, int block) {
    return reinterpret_cast<const uint32_t*>(unit + kFragmentBytes +
                                             block / kGroupBlocks * kGroupBytes);
  }
};
