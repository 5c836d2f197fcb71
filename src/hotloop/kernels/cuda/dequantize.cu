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
    const uint32_t* group = nullptr;
    if constexpr (Weight::kGroupSlices > 0) group = Weight::group(from, slice);
    const uint32_t scale = group != nullptr ? group[g] : kOnes;
    const uint32_t offset = Weight::kOffset ? group[8 + g] : 0;
    for (int i = 0; i < 2; i++)
      for (int r = 0; r < 4; r++) {
        const float s = r % 2 ? high(scale) : low(scale), o = r % 2 ? high(offset) : low(offset);
        const float first = weight_of<Weight>(low(a[i][r]), r);
        const float second = weight_of<Weight>(high(a[i][r]), r);
        a[i][r] = narrow(fmaf(first, s, o), fmaf(second, s, o));
      }
    const int k = 32 * (unit * kUnitSlices + slice) + 8 * t;
    if (k >= args.k) continue;
    for (int h = 0; h < 2; h++)
      if (has[h])
        *reinterpret_cast<uint4*>(args.rows + static_cast<int64_t>(first + h * half) * args.k + k) =
            uint4{a[0][h], a[0][2 + h], a[1][h], a[1][2 + h]};
  }
}
