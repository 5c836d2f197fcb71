// Dequantizes packed weights to plain rows of bfloat16, for GEMM with many rows.
//
// A warp takes one unit of a tile. Scales and offsets of groups are applied, and the result is
// rounded once; a scale per output feature is applied after the GEMM.

#include "weights.cuh"

struct DequantizeArgs {
  const uint8_t* weight;  // tiles of units
  bf16* rows;             // [N, K]
  int n, k;
  int tiles, units, tile_stride;
  const int* features;  // [K], of permuted weights: the feature of each column
};

// value * scale + offset, rounded as in reference.dequantize. The product of value and scale is exact
// if scales have no more than half the precision of float.
template <class Weight>
__device__ __forceinline__ float scaled(float value, float scale, float offset) {
  if constexpr (Weight::kZero == kOffsets) {
    if constexpr (Weight::kFloatScales) return rounded_product(value, scale) + offset;
  }
  return fmaf(value, scale, offset);
}

// kPaired: rows 0 to 7 of a tile are gate features, the others up features.
template <class Weight, bool kPaired, int kWarps>
__device__ __forceinline__ void dequantize(const DequantizeArgs& args) {
  constexpr int kUnitSlices = Weight::kUnitK / 32, kHalves = Weight::kSliceGroups;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (index >= static_cast<int64_t>(args.tiles) * args.units) return;
  const int tile = index / args.units, unit = index % args.units;
  const uint8_t* from =
      args.weight + static_cast<int64_t>(tile) * args.tile_stride + unit * Weight::kUnitBytes;
  const int to_low = low_plane<Weight>(args.units, unit);
  const int half = kPaired ? args.n / 2 : 8;  // rows between the first of a tile and its ninth
  const int first = (kPaired ? 8 : kTileRows) * tile + g;
  const bool has[2] = {kPaired ? first < half : first < args.n,
                       kPaired ? first < half : first + half < args.n};
#pragma unroll
  for (int slice = 0; slice < kUnitSlices; slice++) {
    uint32_t a[Weight::kTerms][2][4];
    operands_of<Weight>(from, to_low, slice, lane, a);
    float2 scale[kHalves], zero_point[kHalves], offset[kHalves];
    for (int h = 0; h < kHalves; h++) {
      scale[h] = {1, 1}, zero_point[h] = {0, 0}, offset[h] = {0, 0};
      if constexpr (Weight::kGroupSlices > 0) {
        const int group = slice / Weight::kGroupSlices * kHalves + h;
        scale[h] = Weight::scales(from, group, g);
        if constexpr (Weight::kZero == kZeroPoints) zero_point[h] = Weight::zeros(from, group, g);
        if constexpr (Weight::kZero == kOffsets) offset[h] = Weight::zeros(from, group, g);
      }
    }
    uint32_t plain[2][4];
    for (int i = 0; i < 2; i++)
      for (int r = 0; r < 4; r++) {
        const int h = i % kHalves;
        const float s = r % 2 ? scale[h].y : scale[h].x, o = r % 2 ? offset[h].y : offset[h].x;
        const float z = r % 2 ? zero_point[h].y : zero_point[h].x;
        float first = low(a[0][i][r]);
        for (int term = 1; term < Weight::kTerms; term++) first += low(a[term][i][r]);
        first = weight_of<Weight>(first, r) - z;
        float second = high(a[0][i][r]);
        for (int term = 1; term < Weight::kTerms; term++) second += high(a[term][i][r]);
        second = weight_of<Weight>(second, r) - z;
        plain[i][r] = narrow(scaled<Weight>(first, s, o), scaled<Weight>(second, s, o));
      }
    const int k = 32 * (unit * kUnitSlices + slice) + (kHalves == 1 ? 8 : 4) * t;
    if constexpr (Weight::kPermuted) {
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++) {
          const int column = k + (kHalves == 1 ? 4 : 16) * i + j;
          if (column >= args.k) continue;
          for (int h = 0; h < 2; h++)
            if (has[h])
              args.rows[static_cast<int64_t>(first + h * half) * args.k + args.features[column]] =
                  static_cast<bf16>(plain[i][2 * (j / 2) + h] >> 16 * (j % 2));
        }
      continue;
    }
    if constexpr (kHalves == 2) {
      for (int i = 0; i < 2; i++)
        for (int h = 0; h < 2; h++)
          if (has[h] && k + 16 * i < args.k)
            *reinterpret_cast<uint2*>(args.rows + static_cast<int64_t>(first + h * half) * args.k +
                                      k + 16 * i) = uint2{plain[i][h], plain[i][2 + h]};
      continue;
    }
    if (k >= args.k) continue;
    for (int h = 0; h < 2; h++)
      if (has[h])
        *reinterpret_cast<uint4*>(args.rows + static_cast<int64_t>(first + h * half) * args.k + k) =
            uint4{plain[0][h], plain[0][2 + h], plain[1][h], plain[1][2 + h]};
  }
}
