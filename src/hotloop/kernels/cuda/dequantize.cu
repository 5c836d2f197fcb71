// Dequantizes packed weights to plain rows of bfloat16, for GEMM with many rows.
//
// A warp takes one unit of a tile. Scales and offsets of groups are applied, and the result is
// rounded once; a scale per output feature is applied after the GEMM.

#include "weights.cuh"

struct DequantizeArgs {
  const uint8_t* weight;  // [tiles, units, bytes of a unit]
  bf16* rows;             // [N, K]
  int n, k;
  int tiles, units;
};

// value * scale + offset, with both roundings of reference.dequantize: the product is exact where
// scales have half the precision of float.
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
  constexpr int kUnitSlices = Weight::kUnitK / 32;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (index >= static_cast<int64_t>(args.tiles) * args.units) return;
  const int tile = index / args.units, unit = index % args.units;
  const uint8_t* from = args.weight + index * Weight::kUnitBytes;
  const int half = kPaired ? args.n / 2 : 8;  // rows between the first of a tile and its ninth
  const int first = (kPaired ? 8 : kTileRows) * tile + g;
  const bool has[2] = {kPaired ? first < half : first < args.n,
                       kPaired ? first < half : first + half < args.n};
#pragma unroll
  for (int slice = 0; slice < kUnitSlices; slice++) {
    uint32_t a[2][4];
    Weight::operands(from, slice, lane, a);
    float2 scale = {1, 1}, zero_point = {0, 0}, offset = {0, 0};
    if constexpr (Weight::kGroupSlices > 0) {
      const uint32_t* group = Weight::group(from, slice);
      scale = Weight::scales(group, g);
      if constexpr (Weight::kZero == kZeroPoints) zero_point = Weight::zeros(group, g);
      if constexpr (Weight::kZero == kOffsets) offset = Weight::zeros(group, g);
    }
    for (int i = 0; i < 2; i++)
      for (int r = 0; r < 4; r++) {
        const float s = r % 2 ? scale.y : scale.x, o = r % 2 ? offset.y : offset.x;
        const float z = r % 2 ? zero_point.y : zero_point.x;
        const float first = weight_of<Weight>(low(a[i][r]), r) - z;
        const float second = weight_of<Weight>(high(a[i][r]), r) - z;
        a[i][r] = narrow(scaled<Weight>(first, s, o), scaled<Weight>(second, s, o));
      }
    const int k = 32 * (unit * kUnitSlices + slice) + 8 * t;
    if (k >= args.k) continue;
    for (int h = 0; h < 2; h++)
      if (has[h])
        *reinterpret_cast<uint4*>(args.rows + static_cast<int64_t>(first + h * half) * args.k + k) =
            uint4{a[0][h], a[0][2 + h], a[1][h], a[1][2 + h]};
  }
}
