// Formats of packed weights (kernels/cuda/packing.py), and their conversion to operands of mma.
//
// A tile is 16 output features; a unit is 1024 bytes of a tile's weights (or a group, if that is
// more) with the scales of their groups; a slice is 32 input features. g = lane / 4 and
// t = lane % 4 locate a lane in fragments.

#pragma once

#include "device.cuh"

constexpr int kTileRows = 16;
constexpr int kFragmentBytes = 1024;  // of a unit's weights
constexpr uint32_t kOnes = 0x3f803f80u;

// Each type converts its weights to two A operands per slice with as few instructions as possible:
// the bits of a weight are masked into the low bits of a bfloat16, whose value is then the weight
// plus a zero point, times a power of two. x is multiplied by one part of the inverse power (the
// input scale) and the results by the rest (the output scale), which keeps sums well within the
// range of float.
//
// kUnitK: input features of a unit. kGroupSlices: slices that share a scale, 0 where the scale is
// per output feature. kSliceGroups: groups of a slice, 2 where each of its two mma has its own group,
// and else 1. kStrands: groups of a unit (pairs of them, where a slice has two). The groups at the
// same position of all units are a strand, which has its own sum. kOneChain: a group's mma
// use one accumulator, not two. kZero: the kind of zero that groups have beside a scale. kZeroPoint:
// operand minus weight, subtracted through the sums of x. kNeedsSums: the kernel needs these sums.
// kTerms: number of operands whose sum is a weight. kPermuted: the order of columns differs from that
// of the features of x. kOutputScale: factor of the results. input_scale(i): factor of x, as a pair of
// bfloat16, for the operands' registers 2i and 2i + 1. one(i): the operand of a weight of one, without
// the zero point. kPlainRows: units are copied from rows in memory, and not from packed tiles.

// kZeroPoints are subtracted before scaling, and include kZeroPoint of the values; kOffsets are
// added after it.
enum Zero { kNoZero, kZeroPoints, kOffsets };

struct Bf16 {
  static constexpr bool kPlainRows = false;
  static constexpr int kUnitK = 32, kUnitBytes = kFragmentBytes, kGroupSlices = 0, kZeroPoint = 0;
  static constexpr int kSliceGroups = 1, kTerms = 1, kStrands = 1;
  static constexpr bool kOneChain = false, kChannelScale = false, kNeedsSums = false;
  static constexpr bool kPermuted = false;
  static constexpr Zero kZero = kNoZero;
  static constexpr float kOutputScale = 1;

  static __device__ __forceinline__ constexpr uint32_t input_scale(int) { return kOnes; }

  static __device__ __forceinline__ void operands(const uint8_t* unit, int, int lane,
                                                  uint32_t a[1][2][4]) {
    for (int i = 0; i < 2; i++) {
      const uint4 words = reinterpret_cast<const uint4*>(unit)[32 * i + lane];
      a[0][i][0] = words.x, a[0][i][1] = words.y, a[0][i][2] = words.z, a[0][i][3] = words.w;
    }
  }
};

// bfloat16 [N, K] in memory. A stage holds the 16 rows of a tile one after the other, each with all
// units of the stage's copy; a unit of a row has kRowBytes.
struct PlainRows : Bf16 {
  static constexpr bool kPlainRows = true;
  static constexpr int kRowBytes = 64;

  // unit: of the tile's first row; stride: bytes from row to row.
  static __device__ __forceinline__ void operands(const uint8_t* unit, int stride, int lane,
                                                  uint32_t a[1][2][4]) {
    const uint8_t* row = unit + lane / 4 * stride + lane % 4 * 16;
    const uint4 first = *reinterpret_cast<const uint4*>(row);  // features 8t to 8t + 7 of row g
    const uint4 second = *reinterpret_cast<const uint4*>(row + 8 * stride);  // and of g + 8
    a[0][0][0] = first.x, a[0][0][1] = second.x, a[0][0][2] = first.y, a[0][0][3] = second.y;
    a[0][1][0] = first.z, a[0][1][1] = second.z, a[0][1][2] = first.w, a[0][1][3] = second.w;
  }
};

// Bytes 0 and 2 of a word are one pair of weights, bytes 1 and 3 the other.
template <class Derived>
struct EightBits {
  static constexpr bool kPlainRows = false;
  static constexpr int kUnitK = 64, kUnitBytes = kFragmentBytes, kGroupSlices = 0;
  static constexpr int kSliceBytes = 512, kSliceGroups = 1, kTerms = 1, kStrands = 1;
  static constexpr bool kOneChain = false, kChannelScale = true, kPermuted = false;
  static constexpr Zero kZero = kNoZero;

  static __device__ __forceinline__ void operands(const uint8_t* unit, int slice, int lane,
                                                  uint32_t a[1][2][4]) {
    const uint4 words = reinterpret_cast<const uint4*>(unit)[32 * slice + lane];
    Derived::convert(words.x, a[0][0][0], a[0][0][1]);
    Derived::convert(words.y, a[0][0][2], a[0][0][3]);
    Derived::convert(words.z, a[0][1][0], a[0][1][1]);
    Derived::convert(words.w, a[0][1][2], a[0][1][3]);
  }
};

// Weights plus 128. An integer i in the low byte of a bfloat16 is a subnormal: i * 2^-133.
struct Int8 : EightBits<Int8> {
  static constexpr int kZeroPoint = 128;
  static constexpr bool kNeedsSums = true;
  static constexpr float kOutputScale = 0x1p67f;

  static __device__ __forceinline__ constexpr uint32_t input_scale(int) {
    return 0x60806080u;  // 2^66
  }
  static __device__ __forceinline__ constexpr uint32_t one(int) { return 0x00010001u; }

  static __device__ __forceinline__ void convert(uint32_t word, uint32_t& even, uint32_t& odd) {
    even = word & 0x00ff00ffu;
    odd = spread_odd_bytes(word);
  }
};

// The sign, exponent and mantissa of e4m3 are shifted to their places in bfloat16. That gives the
// value times 2^-120, also for subnormals.
struct Fp8 : EightBits<Fp8> {
  static constexpr int kZeroPoint = 0;
  static constexpr bool kNeedsSums = false;
  static constexpr float kOutputScale = 0x1p60f;

  static __device__ __forceinline__ constexpr uint32_t input_scale(int) {
    return 0x5d805d80u;  // 2^60
  }

  static __device__ __forceinline__ uint32_t pair(uint32_t signs, uint32_t rest) {
    return mask_or(rest, 0x07f007f0u, signs & 0x80008000u);
  }
  static __device__ __forceinline__ void convert(uint32_t word, uint32_t& even, uint32_t& odd) {
    even = pair(word << 8, word << 4);
    odd = pair(word, word >> 4);
  }
};

// Eight weights, each plus kBias, in the nibbles of a word: both nibbles of a byte belong to one
// row, and the upper one has 16 times its value.
template <int kBias>
struct FourBits {
  static constexpr bool kPlainRows = false;
  static constexpr int kSliceBytes = 256, kZeroPoint = kBias, kTerms = 1;
  static constexpr float kOutputScale = 0x1p67f;

  static __device__ __forceinline__ constexpr uint32_t input_scale(int i) {
    return i == 0 ? 0x60806080u : 0x5e805e80u;  // 2^66, 2^62
  }
  static __device__ __forceinline__ constexpr uint32_t one(int i) {
    return i == 0 ? 0x00010001u : 0x00100010u;
  }

  static __device__ __forceinline__ void operands(const uint8_t* unit, int slice, int lane,
                                                  uint32_t a[1][2][4]) {
    const uint2 words = reinterpret_cast<const uint2*>(unit)[32 * slice + lane];
    convert(words.x, a[0][0]);
    convert(words.y, a[0][1]);
  }
  static __device__ __forceinline__ void convert(uint32_t word, uint32_t a[4]) {
    const uint32_t odd = word >> 8;
    a[0] = word & 0x000f000fu, a[2] = word & 0x00f000f0u;
    a[1] = odd & 0x000f000fu, a[3] = odd & 0x00f000f0u;
  }
};

using Int4 = FourBits<8>;
using Uint4 = FourBits<0>;

// Integers 16 h + l of two planes, each stored as Int4. The nibbles of both make a byte, the integer
// plus 136. Scales are those of the high plane, so that values are h + l / 16.
struct Nested : FourBits<8> {
  static constexpr float kZeroPoint = 8.5f;
  static constexpr float kOutputScale = 0x1p63f;

  static __device__ __forceinline__ constexpr uint32_t input_scale(int) {
    return 0x60806080u;  // 2^66
  }
  static __device__ __forceinline__ constexpr uint32_t one(int) { return 0x00100010u; }

  static __device__ __forceinline__ void operands(const uint8_t* unit, const uint8_t* low,
                                                  int slice, int lane, uint32_t a[1][2][4]) {
    const uint2 highs = reinterpret_cast<const uint2*>(unit)[32 * slice + lane];
    const uint2 lows = reinterpret_cast<const uint2*>(low)[32 * slice + lane];
    convert(highs.x, lows.x, a[0][0]);
    convert(highs.y, lows.y, a[0][1]);
  }
  static __device__ __forceinline__ void convert(uint32_t high, uint32_t low, uint32_t a[4]) {
    const uint32_t first = bytes_of(high << 4, low), second = bytes_of(high, low >> 4);
    a[0] = first & 0x00ff00ffu, a[1] = spread_odd_bytes(first);
    a[2] = second & 0x00ff00ffu, a[3] = spread_odd_bytes(second);
  }
  // The upper nibbles of one word and the lower nibbles of the other.
  static __device__ __forceinline__ uint32_t bytes_of(uint32_t upper, uint32_t lower) {
    return ((upper ^ lower) & 0xf0f0f0f0u) ^ lower;
  }
};

// Eight numbers of e2m1. Their sign and other bits are shifted to their places in bfloat16. That gives
// the value times 2^-126, subnormals included. packing.py defines their order in the word.
struct Fp4 {
  static constexpr bool kPlainRows = false;
  static constexpr int kSliceBytes = 256, kZeroPoint = 0, kTerms = 1;
  static constexpr float kOutputScale = 0x1p63f;

  static __device__ __forceinline__ constexpr uint32_t input_scale(int) {
    return 0x5f005f00u;  // 2^63
  }

  static __device__ __forceinline__ void operands(const uint8_t* unit, int slice, int lane,
                                                  uint32_t a[1][2][4]) {
    const uint2 words = reinterpret_cast<const uint2*>(unit)[32 * slice + lane];
    convert(words.x, a[0][0]);
    convert(words.y, a[0][1]);
  }
  static __device__ __forceinline__ void convert(uint32_t word, uint32_t a[4]) {
    constexpr uint32_t sign = 0x80008000u, rest = 0x01c001c0u;
    a[0] = word & (sign | rest);
    a[1] = word << 3 & (sign | rest);
    a[2] = mask_or(word >> 3, rest, word << 1 & sign);
    a[3] = mask_or(word << 6, rest, word << 2 & sign);
  }
};

// Indices into a table of sixteen numbers: the nibbles of a word, in the order of the operands'
// registers. Each number of the table is a sum of kTerms bfloat16 numbers. kWords has for each term the
// low bytes of the sixteen numbers, and then their high bytes.
template <uint32_t... kWords>
struct Table {
  static constexpr bool kPlainRows = false;
  static constexpr int kSliceBytes = 256, kZeroPoint = 0, kTerms = sizeof...(kWords) / 8;
  static constexpr float kOutputScale = 1;

  static __device__ __forceinline__ constexpr uint32_t input_scale(int) { return kOnes; }

  static __device__ __forceinline__ void operands(const uint8_t* unit, int slice, int lane,
                                                  uint32_t a[kTerms][2][4]) {
    const uint2 words = reinterpret_cast<const uint2*>(unit)[32 * slice + lane];
    look_up(words.x, 0, a);
    look_up(words.y, 1, a);
  }

  // The same by a table of pairs in shared memory: for each term and each byte (two indices), the two
  // numbers. Each lane has a copy of its own, so that lanes have no bank conflicts.

  static constexpr int kPairBytes = 4 * 32 * 256;  // of a term

  static __device__ __forceinline__ void paired_operands(SharedAddress pairs, const uint8_t* unit,
                                                         int slice, int lane,
                                                         uint32_t a[kTerms][2][4]) {
    const uint2 words = reinterpret_cast<const uint2*>(unit)[32 * slice + lane];
    look_up_pairs(pairs, words.x, 0, a);
    look_up_pairs(pairs, words.y, 1, a);
  }

  static __device__ __forceinline__ void look_up_pairs(SharedAddress pairs, uint32_t bytes, int i,
                                                       uint32_t a[kTerms][2][4]) {
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const SharedAddress pair = element<4 * 32>(pairs, byte_of(bytes, r));
#pragma unroll
      for (int term = 0; term < kTerms; term++)
        a[term][i][r] = load_constant(pair + term * kPairBytes);
    }
  }

  // Stores this lane's pairs of every `step`th byte from `first` on.
  static __device__ __forceinline__ void store_pairs(uint8_t* pairs, int first, int step,
                                                     int lane) {
    uint32_t of_lane[kTerms][2][4];  // a lane looks up a number: that of its own number
    look_up(lane % 16, 0, of_lane);
#pragma unroll
    for (int term = 0; term < kTerms; term++) {
      uint32_t* words = reinterpret_cast<uint32_t*>(pairs + term * kPairBytes) + lane;
#pragma unroll 4
      for (int byte = first; byte < 256; byte += step)
        words[32 * byte] = low_halves(shuffle(of_lane[term][0][0], byte % 16),
                                      shuffle(of_lane[term][0][0], byte / 16));
    }
  }

  static __device__ __forceinline__ void look_up(uint32_t indices, int i,
                                                 uint32_t a[kTerms][2][4]) {
    constexpr uint32_t table[] = {kWords...};
    const uint32_t among_eight = indices & 0x77777777u;
    const uint32_t half = mask_or(indices >> 1, 0x44444444u, 0x32103210u);  // of the table
#pragma unroll
    for (int term = 0; term < kTerms; term++)
#pragma unroll
      for (int four = 0; four < 2; four++) {
        const uint32_t at = among_eight >> 16 * four, which = half >> 16 * four;
        const uint32_t lows = bytes_at(table + 8 * term, at, which);
        const uint32_t highs = bytes_at(table + 8 * term + 4, at, which);
        a[term][i][2 * four] = permute_bytes(lows, highs, 0x5140);
        a[term][i][2 * four + 1] = permute_bytes(lows, highs, 0x7362);
      }
  }

  // Four of the sixteen bytes of four words.
  static __device__ __forceinline__ uint32_t bytes_at(const uint32_t words[4], uint32_t at,
                                                      uint32_t half) {
    return permute_bytes(permute_bytes(words[0], words[1], at),
                         permute_bytes(words[2], words[3], at), half);
  }
};

// Scales (or zeros) of a group's tile, rows g and g + 8 side by side.
template <class Number>
struct Sixteen;

struct Half {};
struct Float {};

template <>
struct Sixteen<Bf16> {
  static constexpr int kWords = kTileRows / 2;
  static __device__ __forceinline__ float2 at(const uint32_t* words, int g) {
    const uint32_t pair = words[g];
    return {low(pair), high(pair)};
  }
};

template <>
struct Sixteen<Half> {
  static constexpr int kWords = kTileRows / 2;
  static __device__ __forceinline__ float2 at(const uint32_t* words, int g) {
    const uint32_t pair = words[g];
    return {low_half(pair), high_half(pair)};
  }
};

template <>
struct Sixteen<Float> {
  static constexpr int kWords = kTileRows;
  static __device__ __forceinline__ float2 at(const uint32_t* words, int g) {
    return reinterpret_cast<const float2*>(words)[g];
  }
};

// Scales (and offsets) of two levels: a signed byte per group, times a half-precision factor per unit.
// The factors of the scales of rows g and g + 8 are adjacent; those of the offsets follow.
struct TwoLevels {};

template <class Scale, Zero kZeros>
struct Scales {
  static constexpr bool kHasZeros = kZeros != kNoZero;
  static constexpr int kFactorBytes = 0;
  static constexpr int kGroupBytes = 4 * Sixteen<Scale>::kWords * (kHasZeros ? 2 : 1);
  static constexpr bool kFloat = Sixteen<Scale>::kWords == kTileRows;

  static __device__ __forceinline__ float2 scales(const uint8_t*, const uint8_t* group, int g) {
    return Sixteen<Scale>::at(reinterpret_cast<const uint32_t*>(group), g);
  }
  static __device__ __forceinline__ float2 zeros(const uint8_t*, const uint8_t* group, int g) {
    return Sixteen<Scale>::at(reinterpret_cast<const uint32_t*>(group) + Sixteen<Scale>::kWords,
                              g);
  }
};

template <Zero kZeros>
struct Scales<TwoLevels, kZeros> {
  static_assert(kZeros != kZeroPoints);
  static constexpr bool kHasZeros = kZeros != kNoZero;
  static constexpr int kFactorBytes = 2 * kTileRows * (kHasZeros ? 2 : 1);
  static constexpr int kGroupBytes = kTileRows * (kHasZeros ? 2 : 1);
  static constexpr bool kFloat = true;  // the product of both

  static __device__ __forceinline__ float2 scales(const uint8_t* factors, const uint8_t* group,
                                                  int g) {
    if constexpr (kHasZeros)
      return product<0>(reinterpret_cast<const uint32_t*>(group)[g],
                        reinterpret_cast<const uint2*>(factors)[g].x);
    else
      return product<0>(reinterpret_cast<const uint16_t*>(group)[g],
                        reinterpret_cast<const uint32_t*>(factors)[g]);
  }
  static __device__ __forceinline__ float2 zeros(const uint8_t* factors, const uint8_t* group,
                                                 int g) {
    return product<2>(reinterpret_cast<const uint32_t*>(group)[g],
                      reinterpret_cast<const uint2*>(factors)[g].y);
  }

  template <int kByte>
  static __device__ __forceinline__ float2 product(uint32_t bytes, uint32_t factors) {
    return {signed_byte<kByte>(bytes) * low_half(factors),
            signed_byte<kByte + 1>(bytes) * high_half(factors)};
  }
};

// Values in groups. In memory, the fragments of a unit are followed by the factors of two-level
// scales, and then, for each group of the unit, by the scales of the tile and its zero points or
// offsets. kChannel: there is a scale per output feature as well.
template <class Values, int kGroup, class Scale, Zero kZeros, bool kChannel = false>
struct Grouped : Values {
  using Of = Scales<Scale, kZeros>;
  static constexpr int kUnitSlices =
      kFragmentBytes / Values::kSliceBytes > kGroup / 32 ? kFragmentBytes / Values::kSliceBytes
                                                         : kGroup / 32;
  static constexpr int kUnitK = 32 * kUnitSlices;
  static constexpr int kGroupSlices = kGroup < 32 ? 1 : kGroup / 32;
  static constexpr int kSliceGroups = kGroup < 32 ? 32 / kGroup : 1;
  static_assert(kSliceGroups <= 2);
  static constexpr int kStrands = kUnitSlices / kGroupSlices;
  static constexpr bool kOneChain = kStrands > 1 && kSliceGroups == 1;
  static constexpr int kUnitFragmentBytes = kUnitSlices * Values::kSliceBytes;
  static constexpr int kUnitBytes =
      kUnitFragmentBytes + Of::kFactorBytes + kUnitK / kGroup * Of::kGroupBytes;
  static constexpr auto kZeroPoint = kZeros == kZeroPoints ? 0 : Values::kZeroPoint;
  static constexpr Zero kZero = kZeros;
  static constexpr bool kFloatScales = Of::kFloat, kChannelScale = kChannel, kPermuted = false;
  static constexpr bool kNeedsSums = kZeroPoint > 0 || kZeros != kNoZero;

  // The scales of a unit's group, and its zero points or offsets, for rows g and g + 8.
  static __device__ __forceinline__ float2 scales(const uint8_t* unit, int group, int g) {
    return Of::scales(unit + kUnitFragmentBytes, group_of(unit, group), g);
  }
  static __device__ __forceinline__ float2 zeros(const uint8_t* unit, int group, int g) {
    return Of::zeros(unit + kUnitFragmentBytes, group_of(unit, group), g);
  }
  static __device__ __forceinline__ const uint8_t* group_of(const uint8_t* unit, int group) {
    return unit + kUnitFragmentBytes + Of::kFactorBytes + group * Of::kGroupBytes;
  }
};

// Bytes of a unit's low plane. The low planes of a tile's units follow its units.
template <class Weight>
constexpr int kLowBytes = 0;
template <int kGroup, class Scale, Zero kZeros>
constexpr int kLowBytes<Grouped<Nested, kGroup, Scale, kZeros>> = kFragmentBytes;

// Bytes from a unit to its low plane, if it is the `unit`th of `units` in a row.
template <class Weight>
__device__ __forceinline__ int low_plane(int units, int unit) {
  if constexpr (kLowBytes<Weight> == 0) return 0;
  return units * Weight::kUnitBytes - unit * (Weight::kUnitBytes - kLowBytes<Weight>);
}

// The operands of a slice; to_low: see low_plane.
template <class Weight>
__device__ __forceinline__ void operands_of(const uint8_t* unit, int to_low, int slice, int lane,
                                            uint32_t a[Weight::kTerms][2][4]) {
  if constexpr (kLowBytes<Weight> > 0)
    Weight::operands(unit, unit + to_low, slice, lane, a);
  else
    Weight::operands(unit, slice, lane, a);
}

// A weight whose numbers linear.cu looks up in pairs.
template <class Weight>
struct PairTable : Weight {
  static constexpr int kTableBytes = Weight::kTerms * Weight::kPairBytes;
};

template <class Weight>
constexpr int kTableBytes = 0;
template <class Weight>
constexpr int kTableBytes<PairTable<Weight>> = PairTable<Weight>::kTableBytes;

// A weight whose columns are in another order than the features of x; the kernels read the feature
// of each column from a table.
template <class Weight>
struct Permuted : Weight {
  static constexpr bool kPermuted = true;
};

// The weight that operands in register r represent: their sum, scaled, without the zero point.
template <class Weight>
__device__ __forceinline__ float weight_of(float operands, int r) {
  return operands * low(Weight::input_scale(r / 2)) * Weight::kOutputScale - Weight::kZeroPoint;
}
