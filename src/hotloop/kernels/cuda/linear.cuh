// The common parts of the matrix-product kernels: arguments, arithmetic of a group, epilogue.
//
// Letters: M rows of x, N output features, K input features. A tile is 16 output features; a unit
// is 1024 bytes of a tile's weights with their scales; a slice is 32 input features; an octet is
// eight rows of x, the width of one mma. g = lane / 4 and t = lane % 4 locate a lane in the
// fragments of mma.

#pragma once

#include "operand.cuh"
#include "weights.cuh"

struct LinearArgs {
  const uint8_t* weight;         // [tiles, units, bytes of a unit]
  const float* scale;            // [N], with eight-bit weights
  const bf16* x;                 // [M, K]; with kNorm, the prescaled input; not of wide.cu
  const uint8_t* operand;        // x in the layout of wide.cu (operand.cuh)
  const float* squares;          // [M, tiles of K], with kNorm: partial sums of the input's squares
  const bf16* bias;              // [N], or null
  const bf16* residual;          // added; shaped like y, or null; not with kLogits
  void* y;                       // bf16 [M, N]; kSwiGLU: bf16 [M, N / 2]; kLogits: float [M, N];
                                 // kPart: bf16 [M, y_width]
  const bf16* next_norm;         // [N]: weight of the norm that follows, or null; with kPlain
  bf16* next_x;                  // [M, N]: its prescaled input, y * next_norm
  float* next_squares;           // [M, tiles]: partial sums of y's squares
  float* best_value;             // [M, candidates], with kLogits: each one's largest, or null
  int* best_index;               // [M, candidates]: its output feature
  float4* partial;               // with split K: [tiles, parts, octets, 32]
  uint32_t* counters;            // with split K: zeros, one per group of tiles and warp
  const uint8_t* prefetch_weight;  // of a later matrix product, or null
  int rows, n, k;
  int n_best;                    // the largest is taken among the first n_best output features
  int tiles, units;
  int tile_stride;               // bytes from a tile of the weight to the next
  int parts, splits;             // of K: parts with separate sums; blocks that share K
  int part_stages;               // stages of a part, of wide.cu
  int stages, units_per_stage;   // of a ring
  int source_rows;               // of x, in shared memory at a time, where linear.cu gathers it
  int early_stages;              // whose copies a warp issues before it waits for x
  int prefetch_n_tiles, prefetch_stride;  // tiles of that weight, and bytes per tile
  int prefetch_first, prefetch_step;  // block 0's first tile; tiles between two of a block's
  int prefetch_tiles;            // tiles per block
  int prefetch_tile_bytes;       // bytes of each, from its beginning
  int prefetch_items_left;       // a block prefetches when it has this many items left
  float eps;                     // with kNorm
  int y_width, y_first;          // of kPart: features of y, and the first of these N
  const float* gate;             // [M, N], of kGated
  const int* features;           // [K], of permuted weights: the feature of x of each column
  NextOperand next_operand;      // with kHasNext: takes y of kSwiGLU, and next_x of kPlain
};

// The same for a weight of plain rows, of which ``weight`` is not used.
struct PlainRowsArgs {
  LinearArgs linear;
  TensorMap map;  // [tiles, halves of a tile, 8 rows, K]
};

// kPart writes some features of y; kGated multiplies the results by silu(gate). A projection whose
// parts have weights of different types uses both: each part has a launch of its own.
enum Epilogue { kPlain, kSwiGLU, kLogits, kPart, kGated };

// x as B operands: features 8t to 8t + 7 of a slice, multiplied by the weight type's input scale.
template <class Weight>
__device__ __forceinline__ uint4 scale_input(uint4 x) {
  if constexpr (Weight::kOutputScale == 1) return x;
  return {times(x.x, Weight::input_scale(0)), times(x.y, Weight::input_scale(1)),
          times(x.z, Weight::input_scale(0)), times(x.w, Weight::input_scale(1))};
}

// Loads the features of a row of x for columns k to k + 3 of the weight.
template <class Weight>
__device__ __forceinline__ uint2 load_four(const bf16* row, const int* features, int k) {
  if constexpr (!Weight::kPermuted) return *reinterpret_cast<const uint2*>(row + k);
  const int4 at = *reinterpret_cast<const int4*>(features + k);
  return {row[at.x] | static_cast<uint32_t>(row[at.y]) << 16,
          row[at.z] | static_cast<uint32_t>(row[at.w]) << 16};
}

// Loads the features of a row of x for columns k to k + 7 of the weight.
template <class Weight>
__device__ __forceinline__ uint4 load_eight(const bf16* row, const int* features, int k) {
  if constexpr (!Weight::kPermuted) return *reinterpret_cast<const uint4*>(row + k);
  const uint2 first = load_four<Weight>(row, features, k);
  const uint2 second = load_four<Weight>(row, features, k + 4);
  return {first.x, first.y, second.x, second.y};
}

// Loads the features of a row of x for a lane's columns of a slice whose halves are groups: columns
// 4t to 4t + 3 of each half. Columns from `end` on, a multiple of 16, are zeros. slice: its first
// column.
template <class Weight>
__device__ __forceinline__ uint4 load_halves(const bf16* row, const int* features, int slice,
                                             int t, int end) {
  uint2 half[2] = {};
#pragma unroll
  for (int i = 0; i < 2; i++)
    if (slice + 16 * i < end) half[i] = load_four<Weight>(row, features, slice + 16 * i + 4 * t);
  return {half[0].x, half[0].y, half[1].x, half[1].y};
}

// Sums of x over features, by mma with weights of one. Two accumulators alternate, so that one mma
// does not wait for the one before it. Each lane gets the sums of rows 2t and 2t + 1.
template <class Weight>
__device__ __forceinline__ void add_x(float x_total[2][4], uint4 x) {
  const uint32_t ones[4] = {Weight::one(0), Weight::one(0), Weight::one(1), Weight::one(1)};
  mma(x_total[0], ones, x.x, x.y);
  mma(x_total[1], ones, x.z, x.w);
}

// The sums of x over a group that ends with a slice. If the halves of slices are groups, `half` is
// the number of the half.
template <class Weight>
__device__ __forceinline__ float2 x_sum_of(const float x_total[2][4], int half) {
  if constexpr (Weight::kSliceGroups == 2) return {x_total[half][0], x_total[half][1]};
  return {x_total[0][0] + x_total[1][0], x_total[0][1] + x_total[1][1]};
}

// Weights are stored plus a zero point: subtracts its part of the sums.
template <class Weight>
__device__ __forceinline__ void subtract_zero_point(float sum[4], float2 x_sum) {
  if constexpr (Weight::kZeroPoint == 0) return;
#pragma unroll
  for (int i = 0; i < 4; i++)
    sum[i] = fmaf(-Weight::kZeroPoint, i % 2 == 0 ? x_sum.x : x_sum.y, sum[i]);
}

// Adds more * scale; rows g and g + 8 of a tile have a scale each.
__device__ __forceinline__ void add_scaled(float sum[4], float2 scales, const float more[4]) {
  sum[0] = fmaf(scales.x, more[0], sum[0]);
  sum[1] = fmaf(scales.x, more[1], sum[1]);
  sum[2] = fmaf(scales.y, more[2], sum[2]);
  sum[3] = fmaf(scales.y, more[3], sum[3]);
}

// Adds the sums of a unit's group.
template <class Weight>
__device__ __forceinline__ void add_group(float sum[4], float more[4], float2 x_sum,
                                          const uint8_t* unit, int group, int g) {
  const float x_sums[4] = {x_sum.x, x_sum.y, x_sum.x, x_sum.y};
  if constexpr (Weight::kZero == kZeroPoints) {
    const float2 zeros = Weight::zeros(unit, group, g);
    add_scaled(more, {-zeros.x, -zeros.y}, x_sums);
  } else {
    subtract_zero_point<Weight>(more, x_sum);
  }
  add_scaled(sum, Weight::scales(unit, group, g), more);
  if constexpr (Weight::kZero == kOffsets) add_scaled(sum, Weight::zeros(unit, group, g), x_sums);
}

// Adds the sums of the groups that end with a slice: either of one group, which has two
// accumulators, or of two groups with an accumulator each.
template <class Weight>
__device__ __forceinline__ void add_groups(float sum[4], float even[4], float odd[4],
                                           const float2 x_sum[Weight::kSliceGroups],
                                           const uint8_t* unit, int group, int g) {
  if constexpr (Weight::kSliceGroups == 2) {
    add_group<Weight>(sum, even, x_sum[0], unit, group, g);
    add_group<Weight>(sum, odd, x_sum[1], unit, group + 1, g);
  } else {
    if (!Weight::kOneChain)
#pragma unroll
      for (int i = 0; i < 4; i++) even[i] += odd[i];
    add_group<Weight>(sum, even, x_sum[0], unit, group, g);
  }
}

// Factors of an RMS norm, 1 / rms of each row of its input. Args: rows, k, squares and eps as in
// LinearArgs.
template <class Args>
struct NormFactors {
  const Args& args;
  const int lane;

  static constexpr int kAtOnce = 16;  // loads of a lane in flight

  __device__ __forceinline__ void load(int row, int begin, float squares[kAtOnce]) const {
    const int parts = (args.k + kTileRows - 1) / kTileRows;
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      const int part = begin + 32 * i + lane;
      squares[i] = row < args.rows && part < parts ? args.squares[row * parts + part] : 0;
    }
  }

  // The factor of a row, whose first squares are loaded.
  __device__ __forceinline__ float of(int row, float squares[kAtOnce]) const {
    const int parts = (args.k + kTileRows - 1) / kTileRows;
    float sum = 0;
    for (int begin = 0; begin < parts; begin += 32 * kAtOnce) {
      if (begin > 0) load(row, begin, squares);
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) sum += squares[i];
    }
    return rsqrtf(warp_sum(sum) / args.k + args.eps);
  }
};

// The epilogue of an octet's sums over a tile. A lane has features g and g + 8 of a tile (with
// kSwiGLU gate and up of one feature) of rows 8c + 2t and 8c + 2t + 1.
// kHasNext: see wide.cu.
template <class Weight, Epilogue kEpilogue, bool kNorm, bool kHasNext = false>
struct Output {
  const LinearArgs& args;
  const int g, t;

  static_assert(!kHasNext || kEpilogue == kPlain || kEpilogue == kSwiGLU);

  struct Features {
    int width;   // of y
    int n0, n1;  // output features
    bool has0, has1;
  };

  __device__ __forceinline__ Features features_of(int tile) const {
    constexpr bool pairs = kEpilogue == kSwiGLU;
    Features p;
    p.width = pairs ? args.n / 2 : args.n;
    p.n0 = pairs ? 8 * tile + g : kTileRows * tile + g;
    p.n1 = pairs ? p.width + p.n0 : p.n0 + 8;
    p.has0 = p.n0 < p.width && tile < args.tiles, p.has1 = p.n1 < args.n && tile < args.tiles;
    return p;
  }

  // The inputs of the epilogue beside the sums, loaded before these are complete.
  struct EpilogueInputs {
    float scale[2], bias[2], next_norm[2];
    float residual[4];  // with kGated, gates
  };

  __device__ __forceinline__ EpilogueInputs load_epilogue_inputs(int tile, int c) const {
    const Features p = features_of(tile);
    EpilogueInputs b = {};
    if (Weight::kChannelScale) {
      if (p.has0) b.scale[0] = args.scale[p.n0];
      if (p.has1) b.scale[1] = args.scale[p.n1];
    }
    if (args.bias != nullptr) {
      if (p.has0) b.bias[0] = widen(args.bias[p.n0]);
      if (p.has1) b.bias[1] = widen(args.bias[p.n1]);
    }
    if (kEpilogue == kPlain && args.next_norm != nullptr) {
      if (p.has0) b.next_norm[0] = widen(args.next_norm[p.n0]);
      if (p.has1) b.next_norm[1] = widen(args.next_norm[p.n1]);
    }
    if constexpr (kEpilogue == kGated) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int row = 8 * c + 2 * t + i;
        if (row >= args.rows) continue;
        const float* gate = args.gate + static_cast<int64_t>(row) * p.width;
        if (p.has0) b.residual[i] = gate[p.n0];
        if (p.has1) b.residual[2 + i] = gate[p.n1];
      }
      return b;
    }
    if (kEpilogue != kLogits && args.residual != nullptr)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int row = 8 * c + 2 * t + i;
        if (row >= args.rows) continue;
        const bf16* residual = args.residual + static_cast<int64_t>(row) * p.width;
        if (p.has0) b.residual[i] = widen(residual[p.n0]);
        if (p.has1 && kEpilogue == kPlain) b.residual[2 + i] = widen(residual[p.n1]);
      }
    return b;
  }

  // Where this lane's two rows of the first octet store feature n0 in the next operand; n1 is two
  // elements further on.
  struct Next {
    bf16* to[2];
  };

  __device__ __forceinline__ Next next_of(int tile) const {
    if constexpr (!kHasNext) return {};
    const NextOperand& operand = args.next_operand;
    const NextOperand::Place at = operand.place(features_of(tile).n0 - g);
    return {{NextOperand::feature(at, 2 * t, g), NextOperand::feature(at, 2 * t + 1, g)}};
  }

  __device__ __forceinline__ void write_tile(float4 sum, int tile, int c,
                                             const EpilogueInputs& inputs, const float factor[2],
                                             Best best[2], const Next& next = {}) const {
    const Features p = features_of(tile);
    float v[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (Weight::kOutputScale != 1) v[i] *= Weight::kOutputScale;
      if (Weight::kChannelScale) v[i] *= inputs.scale[i / 2];
      if (kNorm) v[i] *= factor[i % 2];
      if (args.bias != nullptr) v[i] += inputs.bias[i / 2];
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (8 * c + i >= args.rows) break;  // no lane has such a row
      const int row = 8 * c + 2 * t + i;
      const bool has0 = p.has0 && row < args.rows, has1 = p.has1 && row < args.rows;
      const int64_t at = kEpilogue == kPart
                             ? static_cast<int64_t>(row) * args.y_width + args.y_first
                             : static_cast<int64_t>(row) * p.width;
      bf16* to = kHasNext ? next.to[i] + 512 * c : nullptr;
      float squares = 0;
      if constexpr (kEpilogue == kGated) {
        if (has0) store(at + p.n0, silu(inputs.residual[i]) * v[i], 0, 0, squares);
        if (has1) store(at + p.n1, silu(inputs.residual[2 + i]) * v[2 + i], 0, 0, squares);
      } else if (kEpilogue == kSwiGLU) {
        if (has0) store(at + p.n0, silu(v[i]) * v[2 + i], inputs.residual[i], 0, squares, to);
      } else {
        if (has0) store(at + p.n0, v[i], inputs.residual[i], inputs.next_norm[0], squares, to);
        if (has1)
          store(at + p.n1, v[2 + i], inputs.residual[2 + i], inputs.next_norm[1], squares, to + 2);
      }
      if (kEpilogue == kPlain && args.next_norm != nullptr) {
        for (int mask = 4; mask < 32; mask *= 2) squares += shuffle_xor(squares, mask);
        if (g == 0 && has0) args.next_squares[row * args.tiles + tile] = squares;
      }
      if (kEpilogue == kLogits) {
        if (has0 && p.n0 < args.n_best) best[i].update(v[i], p.n0);
        if (has1 && p.n1 < args.n_best) best[i].update(v[2 + i], p.n1);
      }
    }
  }

  __device__ __forceinline__ void store(int64_t at, float value, float residual, float next_norm,
                                        float& squares, bf16* next = nullptr) const {
    if (kEpilogue == kLogits) {
      static_cast<float*>(args.y)[at] = value;
      return;
    }
    const bf16 y = narrow(args.residual != nullptr ? value + residual : value);
    if constexpr (kHasNext && kEpilogue == kSwiGLU)
      *next = args.next_operand.scaled(y, g);
    else
      static_cast<bf16*>(args.y)[at] = y;
    if (kEpilogue == kPlain && args.next_norm != nullptr) {
      const bf16 prescaled = narrow(widen(y) * next_norm);
      if constexpr (kHasNext)
        *next = args.next_operand.scaled(prescaled, g);
      else
        args.next_x[at] = prescaled;
      squares = fmaf(widen(y), widen(y), squares);
    }
  }

  // The best of the lanes that have the same rows.
  static __device__ __forceinline__ Best best_of_lanes(Best best) {
    for (int mask = 4; mask < 32; mask *= 2)
      best.update(shuffle_xor(best.value, mask), shuffle_xor(best.index, mask));
    return best;
  }
};
