// Products with few rows: y = epilogue(x @ weight.T), at the speed at which the weight is read.
//
// The weight is the A operand of mma.m16n8k16 and lies in memory in the order of its fragments
// (kernels/cuda/packing.py), so one read of shared memory by a lane *is* its operand. The rows of x
// are B, so up to eight of them cost little more than one.
//
// A block keeps a ring of shared memory per warp full of weights that are on their way. It asks for
// the first of them before it waits for the kernel that computes x: since the next kernel's block
// finds room beside this one's, memory is never idle between kernels. Warps share out K, so every
// block sees all of x (or of its part, where K is split among blocks); one more warp adds up what
// they found, in a fixed order, and applies the epilogue.
//
// Bits: a row's result depends on neither the number of rows nor on timing. It depends on the
// number of warps and on the split, which belong to the weight and not to the call.
//
// Letters: M rows of x, N output features, K input features. A tile is 16 output features, a unit
// what a tile has of 1024 bytes of weights (and their scales), a block of K 32 input features; an
// item of work is kTiles tiles. g = lane / 4 and t = lane % 4 are a lane's place in fragments.

#include "weights.cuh"

struct LinearArgs {
  const uint8_t* weight;         // [tiles, units, bytes of a unit]
  const float* scale;            // [N], of eight-bit weights
  const bf16* x;                 // [M, K]
  const bf16* norm_weight;       // [K], of kNorm
  const bf16* bias;              // [N], or null
  const bf16* residual;          // like y, or null; not of kLogits
  void* y;                       // [M, N] bf16; [M, N / 2] of kSwiGLU; float of kLogits
  float* best_value;             // [M, blocks], of kLogits, or null
  int* best_index;               // [M, blocks]
  float4* partial;               // workspace of a split, see is_last_warp
  uint32_t* counters;            // zeros, one per item
  int rows, n, k;
  int n_best;                    // output features that can be the best
  int tiles, units;
  int split;                     // blocks that share K; divides the number of blocks
  int stages, units_per_stage;   // a warp's ring: how many copies, and the length of each
  float eps;                     // of kNorm
};

enum Epilogue { kPlain, kSwiGLU, kLogits };

constexpr int kBuffers = 2;  // of sums on their way to the epilogue

// kTiles: tiles that a warp computes together from one reading of x. kColumns: groups of eight
// rows of x. kStaged: each warp keeps its part of x in shared memory.
template <class Weight, int kWarps, int kTiles, int kColumns, Epilogue kEpilogue, bool kNorm,
          bool kStaged>
struct Linear {
  static constexpr int kUnitBlocks = Weight::kUnitK / 32;
  static constexpr int kMaxRows = 8 * kColumns;

  const LinearArgs& args;
  const int lane, warp, g, t;
  const int part, first_item, item_step, n_items;  // items are first_item, + item_step, ...
  const int tile_bytes, stage_bytes;               // of a stage of the ring
  const int staged_row;                            // g, or 0 if there is no such row
  int first_unit, end_unit;                        // of this warp, in every item

  // Shared memory.
  uint8_t* ring;
  float4* sums;           // [kBuffers][kWarps][kTiles][kColumns][32]
  float* squares;         // [kWarps][kMaxRows]
  uint4* staged;          // this warp's x: [blocks of K][rows][4]
  uint64_t* arrived;      // [stages], of this warp: the copy is there
  uint64_t* summed;       // [kBuffers]: every warp's sums are there
  uint64_t* taken;        // [kBuffers]: the epilogue has them

  __device__ __forceinline__ Linear(const LinearArgs& a, int thread, int block, int blocks)
      : args(a), lane(thread % 32), warp(thread / 32), g(lane / 4), t(lane % 4),
        part(block % a.split), first_item(block / a.split), item_step(blocks / a.split),
        n_items((a.tiles + kTiles - 1) / kTiles),
        tile_bytes(a.units_per_stage * Weight::kUnitBytes), stage_bytes(kTiles * tile_bytes),
        staged_row(g < a.rows ? g : 0) {
    const int workers = a.split * kWarps, worker = part * kWarps + warp;
    first_unit = a.units * worker / workers;
    end_unit = a.units * (worker + 1) / workers;
    uint8_t* memory = shared_memory();
    ring = memory + warp * a.stages * stage_bytes;
    memory += kWarps * a.stages * stage_bytes;
    sums = reinterpret_cast<float4*>(memory);
    memory += sizeof(float4) * kBuffers * kWarps * kTiles * kColumns * 32;
    squares = reinterpret_cast<float*>(memory);
    memory += sizeof(float) * kWarps * kMaxRows;
    summed = reinterpret_cast<uint64_t*>(memory);
    taken = summed + kBuffers;
    arrived = taken + kBuffers + warp * a.stages;
    memory += (sizeof(uint64_t) * (2 * kBuffers + kWarps * a.stages) + 15) / 16 * 16;
    const int blocks_of_warp = (a.units + workers - 1) / workers * kUnitBlocks;
    staged = reinterpret_cast<uint4*>(memory) + warp * blocks_of_warp * a.rows * 4;
  }

  __device__ __forceinline__ void run() {
    const bool copies = warp < kWarps;
    if (copies && lane == 0)
      for (int i = 0; i < args.stages; i++) barrier_init(arrived + i, kCopyArrivals);
    if (!copies && lane == 0)
      for (int i = 0; i < kBuffers; i++) {
        barrier_init(summed + i, kWarps);
        barrier_init(taken + i, 1);
      }
    barriers_are_ready();
    sync_block();
    if (copies)
      multiply();
    else
      finish();
  }

  // The warps that multiply.

  // Where the next copy comes from. Kept by all lanes alike.
  struct Cursor {
    int item, unit;
  };

  __device__ __forceinline__ void ask(Cursor& next, int stage, uint64_t policy) {
    if (next.item >= n_items) return;
    const int units = min(args.units_per_stage, end_unit - next.unit);
    const int bytes = units * Weight::kUnitBytes;
    const int tile = next.item * kTiles, tiles = min(kTiles, args.tiles - tile);
    copy_begin(arrived + stage, tiles * bytes, lane);
    for (int r = 0; r < tiles; r++)
      copy(ring + stage * stage_bytes + r * tile_bytes,
           args.weight +
               (static_cast<int64_t>(tile + r) * args.units + next.unit) * Weight::kUnitBytes,
           bytes, arrived + stage, policy, lane);
    copy_end(arrived + stage, lane);
    next.unit += units;
    if (next.unit == end_unit) next = {next.item + item_step, first_unit};
    if (next.item >= n_items) launch_dependents();
  }

  __device__ __forceinline__ void multiply() {
    const uint64_t policy = read_once_policy();
    Cursor next = {first_unit < end_unit ? first_item : n_items, first_unit};
    if (next.item >= n_items) launch_dependents();
    for (int i = 0; i < args.stages; i++) ask(next, i, policy);
    wait_for_predecessor();

    float square[kColumns] = {};  // sums over this lane's share of x, of rows 8c + g
    if (kStaged) stage_x(square);

    int stage = 0, number = 0;
    uint32_t parity = 0;
    for (int item = first_item; item < n_items; item += item_step, number++) {
      float sum[kTiles][kColumns][4] = {};
      const bool adds_squares = kNorm && !kStaged && number == 0;
      const uint4* x = staged + staged_row * 4 + t;  // of the next unit, in row 0 or row g
      for (int unit = first_unit; unit < end_unit;) {
        barrier_wait(arrived + stage, parity);
        const uint8_t* weights = ring + stage * stage_bytes;
        const int end = min(unit + args.units_per_stage, end_unit);
        for (; unit < end; unit++) {
          multiply_unit(weights, x, unit, sum, square, adds_squares);
          weights += Weight::kUnitBytes;
          x += kUnitBlocks * args.rows * 4;
        }
        sync_warp();  // every lane has read the stage: it can be overwritten
        ask(next, stage, policy);
        if (++stage == args.stages) stage = 0, parity ^= 1;
      }
      if (kNorm && number == 0) put_squares(square);
      put_sums(sum, number);
    }
  }

  // Sums of groups run in two chains, since each product waits for the one before it.
  __device__ __forceinline__ void multiply_unit(const uint8_t* weights, const uint4* x, int unit,
                                                float sum[kTiles][kColumns][4],
                                                float square[kColumns], bool adds_squares) {
    constexpr int kGroupBlocks = Weight::kGroupBlocks;
    float even[kTiles][kColumns][4], odd[kTiles][kColumns][4], x_sum[kColumns][4];
#pragma unroll
    for (int block = 0; block < kUnitBlocks; block++) {
      uint4 b[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; c++)
        b[c] = kStaged ? x[(block * args.rows + staged_rows_to(c)) * 4]
                       : read_x(unit * kUnitBlocks + block, c, square, adds_squares);
      if constexpr (kGroupBlocks > 0) {
        if (block % kGroupBlocks == 0) {
          zero(x_sum);
#pragma unroll
          for (int r = 0; r < kTiles; r++) zero(even[r]), zero(odd[r]);
        }
        if constexpr (Weight::kOffset) {  // a product with ones adds up x, where sums need it
          const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
#pragma unroll
          for (int c = 0; c < kColumns; c++) {
            mma(x_sum[c], ones, b[c].x, b[c].y);
            mma(x_sum[c], ones, b[c].z, b[c].w);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kTiles; r++) {
        const uint8_t* tile = weights + r * tile_bytes;
        uint32_t a[2][4];
        Weight::unpack(tile, block, lane, a);
#pragma unroll
        for (int c = 0; c < kColumns; c++) {
          mma(kGroupBlocks > 0 ? even[r][c] : sum[r][c], a[0], b[c].x, b[c].y);
          mma(kGroupBlocks > 0 ? odd[r][c] : sum[r][c], a[1], b[c].z, b[c].w);
        }
        if constexpr (kGroupBlocks > 0) {
          if (block % kGroupBlocks == kGroupBlocks - 1) {
            const uint32_t* group = Weight::group(tile, block);
            const uint32_t scale = group[g];
#pragma unroll
            for (int c = 0; c < kColumns; c++) {
#pragma unroll
              for (int i = 0; i < 4; i++) even[r][c][i] += odd[r][c][i];
              add_scaled(sum[r][c], scale, even[r][c]);
              if constexpr (Weight::kOffset) add_scaled(sum[r][c], group[8 + g], x_sum[c]);
            }
          }
        }
      }
    }
  }

  // Rows g and g + 8 of a tile have a scale each.
  static __device__ __forceinline__ void add_scaled(float sum[4], uint32_t scales,
                                                    const float more[4]) {
    sum[0] = fmaf(low(scales), more[0], sum[0]);
    sum[1] = fmaf(low(scales), more[1], sum[1]);
    sum[2] = fmaf(high(scales), more[2], sum[2]);
    sum[3] = fmaf(high(scales), more[3], sum[3]);
  }

  static __device__ __forceinline__ void zero(float values[kColumns][4]) {
#pragma unroll
    for (int c = 0; c < kColumns; c++)
#pragma unroll
      for (int i = 0; i < 4; i++) values[c][i] = 0;
  }

  // x as B operands: of rows 8c + g the features from 8t on of a block of 32. Lanes whose row does
  // not exist read another one: what they compute is not written anywhere.

  // From row g of x in shared memory to row 8c + g.
  __device__ __forceinline__ int staged_rows_to(int c) const {
    return c == 0 || 8 * c + g < args.rows ? 8 * c : 0;
  }

  // Each lane reads back what it wrote itself, or what a lane of its warp did.
  __device__ __forceinline__ void stage_x(float square[kColumns]) {
#pragma unroll 4
    for (int block = first_unit * kUnitBlocks; block < end_unit * kUnitBlocks; block++)
#pragma unroll
      for (int c = 0; c < kColumns; c++) {
        const uint4 x = read_x(block, c, square, kNorm);
        const int at = (block - first_unit * kUnitBlocks) * args.rows + 8 * c + g;
        if (8 * c + g < args.rows) staged[at * 4 + t] = x;
      }
    sync_warp();
  }

  // With a norm: x times the norm's weight. Its other factor, the same for a whole row, is applied
  // to the sums; what it is made of is gathered here. Features beyond the last, whose weights are
  // zeros, are again the last.
  __device__ __forceinline__ uint4 read_x(int block, int c, float square[kColumns],
                                          bool adds_squares) const {
    const int row = 8 * c + g < args.rows ? 8 * c + g : 0;
    const int k = min(32 * block + 8 * t, args.k - 8);
    uint4 x = *reinterpret_cast<const uint4*>(args.x + static_cast<int64_t>(row) * args.k + k);
    if constexpr (kNorm) {
      const uint4 w = *reinterpret_cast<const uint4*>(args.norm_weight + k);
      if (adds_squares && k == 32 * block + 8 * t) {
        square[c] = add_squares(square[c], x.x);
        square[c] = add_squares(square[c], x.y);
        square[c] = add_squares(square[c], x.z);
        square[c] = add_squares(square[c], x.w);
      }
      x.x = fma_pair(x.x, w.x, kMinusZeros);
      x.y = fma_pair(x.y, w.y, kMinusZeros);
      x.z = fma_pair(x.z, w.z, kMinusZeros);
      x.w = fma_pair(x.w, w.w, kMinusZeros);
    }
    return x;
  }

  static __device__ __forceinline__ float add_squares(float sum, uint32_t pair) {
    return fmaf(high(pair), high(pair), fmaf(low(pair), low(pair), sum));
  }

  __device__ __forceinline__ void put_squares(const float square[kColumns]) {
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
      float sum = square[c];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if (t == 0) squares[warp * kMaxRows + 8 * c + g] = sum;
    }
  }

  __device__ __forceinline__ float4* sums_of(int number, int of_warp) const {
    return sums + ((number % kBuffers * kWarps + of_warp) * kTiles * kColumns) * 32 + lane;
  }

  __device__ __forceinline__ void put_sums(const float sum[kTiles][kColumns][4], int number) {
    barrier_wait(taken + number % kBuffers, number / kBuffers % 2 ^ 1);
    float4* to = sums_of(number, warp);
#pragma unroll
    for (int r = 0; r < kTiles; r++)
#pragma unroll
      for (int c = 0; c < kColumns; c++)
        to[(r * kColumns + c) * 32] =
            float4{sum[r][c][0], sum[r][c][1], sum[r][c][2], sum[r][c][3]};
    sync_warp();
    if (lane == 0) barrier_arrive(summed + number % kBuffers);
  }

  // The warp that finishes.

  struct Best {
    float value = -infinity();
    int index = 0;

    // Of equal values the first wins, in whatever order they come.
    __device__ __forceinline__ void offer(float v, int i) {
      if (v > value || (v == value && i < index)) value = v, index = i;
    }
  };

  __device__ __forceinline__ void finish() {
    launch_dependents();
    wait_for_predecessor();  // for the residual, and since y may still be in use
    float factor[kColumns][2];  // of the norm, for rows 8c + 2t and 8c + 2t + 1
    Best best[kColumns][2];
    int number = 0;
    for (int item = first_item; item < n_items; item += item_step, number++) {
      barrier_wait(summed + number % kBuffers, number / kBuffers % 2);
      if (kNorm && number == 0) norm_factors(factor);
      float4 sum[kTiles][kColumns];
#pragma unroll
      for (int r = 0; r < kTiles; r++)
#pragma unroll
        for (int c = 0; c < kColumns; c++) sum[r][c] = float4{0, 0, 0, 0};
      for (int w = 0; w < kWarps; w++) add(sum, sums_of(number, w));
      sync_warp();
      if (lane == 0) barrier_arrive(taken + number % kBuffers);
      if (args.split > 1 && !join_parts(sum, item)) continue;
#pragma unroll
      for (int r = 0; r < kTiles; r++)
#pragma unroll
        for (int c = 0; c < kColumns; c++)
          write(sum[r][c], item * kTiles + r, c, factor[c], best[c]);
    }
    if (kEpilogue == kLogits && args.best_value != nullptr) write_best(best);
  }

  __device__ __forceinline__ void add(float4 sum[kTiles][kColumns], const float4* part_sums) {
#pragma unroll
    for (int r = 0; r < kTiles; r++)
#pragma unroll
      for (int c = 0; c < kColumns; c++) {
        const float4 more = part_sums[(r * kColumns + c) * 32];
        sum[r][c].x += more.x, sum[r][c].y += more.y;
        sum[r][c].z += more.z, sum[r][c].w += more.w;
      }
  }

  __device__ __forceinline__ void norm_factors(float factor[kColumns][2]) const {
#pragma unroll
    for (int c = 0; c < kColumns; c++)
      for (int i = 0; i < 2; i++) {
        float sum = 0;
        for (int w = 0; w < kWarps; w++) sum += squares[w * kMaxRows + 8 * c + 2 * t + i];
        factor[c][i] = rsqrtf(sum / args.k + args.eps);
      }
  }

  // Whichever block comes last adds up what all found, in their order.
  __device__ __forceinline__ bool join_parts(float4 sum[kTiles][kColumns], int item) {
    constexpr int kSize = kTiles * kColumns * 32;
    float4* parts = args.partial + static_cast<int64_t>(item) * args.split * kSize + lane;
#pragma unroll
    for (int r = 0; r < kTiles; r++)
#pragma unroll
      for (int c = 0; c < kColumns; c++) {
        parts[part * kSize + (r * kColumns + c) * 32] = sum[r][c];
        sum[r][c] = float4{0, 0, 0, 0};
      }
    if (!is_last_warp(args.counters + item, args.split, lane)) return false;
    for (int p = 0; p < args.split; p++)
#pragma unroll
      for (int r = 0; r < kTiles; r++)
#pragma unroll
        for (int c = 0; c < kColumns; c++) {
          const float4 more = load_from_others(parts + p * kSize + (r * kColumns + c) * 32);
          sum[r][c].x += more.x, sum[r][c].y += more.y;
          sum[r][c].z += more.z, sum[r][c].w += more.w;
        }
    return true;
  }

  // Rows g and g + 8 of a tile, of SwiGLU gate and up of one feature, at rows 8c + 2t (+ 1) of x.
  __device__ __forceinline__ void write(float4 sum, int tile, int c, const float factor[2],
                                        Best best[2]) {
    if (tile >= args.tiles) return;
    const bool pairs = kEpilogue == kSwiGLU;
    const int width = pairs ? args.n / 2 : args.n;  // of y
    const int n0 = pairs ? 8 * tile + g : kTileRows * tile + g;
    const int n1 = pairs ? width + n0 : n0 + 8;
    const bool has0 = n0 < width, has1 = n1 < args.n;
    float v[4] = {sum.x, sum.y, sum.z, sum.w};
    if (Weight::kChannelScale) {
      const float s0 = has0 ? args.scale[n0] : 0, s1 = has1 ? args.scale[n1] : 0;
      v[0] *= s0, v[1] *= s0, v[2] *= s1, v[3] *= s1;
    }
    if (kNorm) v[0] *= factor[0], v[1] *= factor[1], v[2] *= factor[0], v[3] *= factor[1];
    if (args.bias != nullptr) {
      const float b0 = has0 ? widen(args.bias[n0]) : 0, b1 = has1 ? widen(args.bias[n1]) : 0;
      v[0] += b0, v[1] += b0, v[2] += b1, v[3] += b1;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = 8 * c + 2 * t + i;
      if (row >= args.rows) continue;
      const int64_t at = static_cast<int64_t>(row) * width;
      if (kEpilogue == kSwiGLU) {
        if (has0) put(at + n0, silu(v[i]) * v[2 + i]);
      } else {
        if (has0) put(at + n0, v[i]);
        if (has1) put(at + n1, v[2 + i]);
      }
      if (kEpilogue == kLogits) {
        if (n0 < args.n_best) best[i].offer(v[i], n0);
        if (n1 < args.n_best) best[i].offer(v[2 + i], n1);
      }
    }
  }

  static __device__ __forceinline__ float silu(float v) {
    return v / (1.0f + exp2_fast(v * -1.4426950408889634f));
  }

  __device__ __forceinline__ void put(int64_t at, float value) const {
    if (kEpilogue == kLogits) {
      static_cast<float*>(args.y)[at] = value;
    } else {
      if (args.residual != nullptr) value += widen(args.residual[at]);
      static_cast<bf16*>(args.y)[at] = narrow(value);
    }
  }

  __device__ __forceinline__ void write_best(Best best[kColumns][2]) {
#pragma unroll
    for (int c = 0; c < kColumns; c++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        Best b = best[c][i];
        for (int mask = 4; mask < 32; mask *= 2)
          b.offer(shuffle_xor(b.value, mask), shuffle_xor(b.index, mask));
        const int row = 8 * c + 2 * t + i;
        if (g == 0 && row < args.rows) {
          args.best_value[row * gridDim.x + blockIdx.x] = b.value;
          args.best_index[row * gridDim.x + blockIdx.x] = b.index;
        }
      }
  }
};

template <class Weight, int kWarps, int kTiles, int kColumns, Epilogue kEpilogue, bool kNorm,
          bool kStaged>
__device__ __forceinline__ void linear(const LinearArgs& args) {
  Linear<Weight, kWarps, kTiles, kColumns, kEpilogue, kNorm, kStaged>(args, threadIdx.x,
                                                                      blockIdx.x, gridDim.x)
      .run();
}
