// Products with few rows: y = epilogue(x @ weight.T), at the speed at which the weight is read.
//
// The weight is the A operand of mma.m16n8k16 and lies in memory in the order of its fragments
// (kernels/cuda/packing.py), so one read of shared memory by a lane *is* its operand. The rows of x
// are B, so up to eight of them cost little more than one.
//
// A block keeps a ring of shared memory per warp full of weights that are on their way. It asks for
// most of them before it waits for the kernel that computes x, then for x, and only then for the
// rest: what is asked for first comes first. Warps share out K, so every block sees all of x; one
// more warp adds up what they found, in a fixed order, and applies the epilogue.
//
// A norm is taken apart. The product before has its result multiplied by the norm's weight already,
// and adds up squares, a tile at a time; the factor that is common to a row is applied to the sums.
//
// Bits: a row's result depends on neither the number of rows nor on timing. It depends on the
// number of warps, which belongs to the weight and not to the call.
//
// Letters: M rows of x, N output features, K input features. A tile is 16 output features, a unit
// what a tile has of 1024 bytes of weights (and their scales), a block of K 32 input features; an
// item of work is kTiles tiles. g = lane / 4 and t = lane % 4 are a lane's place in fragments.

#include "pointwise.cuh"
#include "weights.cuh"

struct LinearArgs {
  const uint8_t* weight;         // [tiles, units, bytes of a unit]
  const float* scale;            // [N], of eight-bit weights
  const bf16* x;                 // [M, K]; of kNorm, times the norm's weight
  const float* squares;          // [M, tiles of K], of kNorm: what those of its input add up to
  const bf16* bias;              // [N], or null
  const bf16* residual;          // like y, or null; not of kLogits
  void* y;                       // [M, N] bf16; [M, N / 2] of kSwiGLU; float of kLogits
  const bf16* next_norm;         // [N]: weight of the norm that y goes into, or null; of kPlain
  bf16* next_x;                  // [M, N]: y times it
  float* next_squares;           // [M, tiles]: of y
  float* best_value;             // [M, blocks], of kLogits, or null
  int* best_index;               // [M, blocks]
  const uint8_t* ahead;          // a later product's weight, or null
  int rows, n, k;
  int n_best;                    // output features that can be the best
  int tiles, units;
  int stages, units_per_stage;   // a warp's ring: how many copies, and the length of each
  int ahead_n, ahead_stride;     // its tiles, and bytes from one to the next
  int ahead_first, ahead_step;   // the first block's first tile, and from one of a block's to the next
  int ahead_tiles;               // that a block asks for
  int ahead_tile_bytes;          // of each
  int ahead_items_left;          // when: a block has so many items left
  float eps;                     // of kNorm
};

enum Epilogue { kPlain, kSwiGLU, kLogits };

constexpr int kBuffers = 2;  // of sums on their way to the epilogue

// kTiles: tiles that a warp computes together from one reading of x. kColumns: groups of eight
// rows of x. kFew: there are two at most. kStaged: each warp keeps its part of x in shared memory.
template <class Weight, int kWarps, int kTiles, int kColumns, bool kFew, Epilogue kEpilogue,
          bool kNorm, bool kStaged>
struct Linear {
  static constexpr int kUnitBlocks = Weight::kUnitK / 32;
  static constexpr int kMaxRows = 8 * kColumns;
  static constexpr bool kGroups = Weight::kGroupBlocks > 0;
  static constexpr int kGroupBlocks = kGroups ? Weight::kGroupBlocks : kUnitBlocks;
  static constexpr int kUnitGroups = kUnitBlocks / kGroupBlocks;
  static constexpr bool kSums = Weight::kRaised > 0 || Weight::kOffset;  // x adds up
  // Units that a warp multiplies in one go: what one waits for leaves time for the other.
  static constexpr int kUnitsAtOnce = kFew && kGroups && kStaged ? 2 : 1;
  // x that is not staged is read a unit ahead, where registers allow.
  static constexpr bool kReadsAhead = !kStaged && kColumns == 1;

  const LinearArgs& args;
  const int lane, warp, g, t;
  const int first_item, item_step, n_items;        // items are first_item, + item_step, ...
  const int stages, units_per_stage;               // of the ring
  const int tile_bytes, stage_bytes;               // of a stage
  const int row_bytes;                             // between a tile's units and the next one's
  const int staged_row;                            // g, or 0 if there is no such row
  int first_unit, end_unit;                        // of this warp, in every item
  int64_t to_next_item;                            // bytes, from the end of this warp's units
  int chunks, x_stride;                            // of eight features: this warp's; between rows

  // Shared memory.
  uint8_t* ring;
  float4* sums;           // [kBuffers][kWarps][kTiles][kColumns][32]
  float* x_sums;          // of kSums, over each of this warp's groups or in all: [groups][kMaxRows]
  uint4* staged;          // this warp's x: [rows][x_stride]
  uint64_t* arrived;      // [stages], of this warp: the copy is there
  float* factors;         // [kMaxRows], of kNorm where warps share them out
  uint64_t* summed;       // [kBuffers]: every warp's sums are there
  uint64_t* taken;        // [kBuffers]: the epilogue has them

  __device__ __forceinline__ Linear(const LinearArgs& a, int thread, int block, int blocks)
      : args(a), lane(thread % 32), warp(thread / 32), g(lane / 4), t(lane % 4),
        first_item(block), item_step(blocks), n_items((a.tiles + kTiles - 1) / kTiles),
        stages(a.stages), units_per_stage(a.units_per_stage),
        tile_bytes(units_per_stage * Weight::kUnitBytes), stage_bytes(kTiles * tile_bytes),
        row_bytes(a.units * Weight::kUnitBytes),
        staged_row(g < a.rows ? g : 0) {
    first_unit = a.units * warp / kWarps;
    end_unit = a.units * (warp + 1) / kWarps;
    to_next_item = static_cast<int64_t>(item_step) * kTiles * row_bytes -
                   (end_unit - first_unit) * Weight::kUnitBytes;
    uint8_t* memory = shared_memory();
    ring = memory + warp * stages * stage_bytes;
    memory += kWarps * stages * stage_bytes;
    sums = reinterpret_cast<float4*>(memory);
    memory += sizeof(float4) * kBuffers * kWarps * kTiles * kColumns * 32;
    factors = reinterpret_cast<float*>(memory);
    memory += sizeof(float) * kMaxRows;
    summed = reinterpret_cast<uint64_t*>(memory);
    taken = summed + kBuffers;
    arrived = taken + kBuffers + warp * stages;
    memory += (sizeof(uint64_t) * (2 * kBuffers + kWarps * stages) + 15) / 16 * 16;
    const int units_of_warp = (a.units + kWarps - 1) / kWarps;
    const int warp_sums = kMaxRows * (kGroups ? units_of_warp * kUnitGroups : kSums ? 1 : 0);
    x_sums = reinterpret_cast<float*>(memory) + warp * warp_sums;
    memory += sizeof(float) * kWarps * warp_sums;
    chunks = (min(end_unit * Weight::kUnitK, a.k) - first_unit * Weight::kUnitK) / 8;
    // Rows begin an odd number of half lines apart: eight lanes read two of them at once.
    x_stride = 4 * (units_of_warp * kUnitBlocks | 1);
    staged = reinterpret_cast<uint4*>(memory) + warp * a.rows * x_stride;
  }

  __device__ __forceinline__ void run() {
    if (warp < kWarps)
      multiply();
    else
      finish();
  }

  // The warps that multiply.

  // Where the next copy comes from, and how many were asked for.
  struct Cursor {
    const uint8_t* from;
    int item, unit, asked;
    uint64_t policy;
  };

  __device__ __forceinline__ Cursor beginning() const {
    const int64_t at = static_cast<int64_t>(first_item) * kTiles * args.units + first_unit;
    return {args.weight + at * Weight::kUnitBytes, first_unit < end_unit ? first_item : n_items,
            first_unit, 0, read_once_policy()};
  }

  // As many copies as there are stages, or fewer for a start.
  __device__ __forceinline__ void ask_up_to(Cursor& next, int n) {
    while (next.asked < n) ask(next, next.asked++);
  }

  __device__ __forceinline__ void ask(Cursor& next, int stage) {
    if (next.item >= n_items) return;
    const int units = min(units_per_stage, end_unit - next.unit);
    const int bytes = units * Weight::kUnitBytes;
    const int tiles = kTiles == 1 ? 1 : min(kTiles, args.tiles - next.item * kTiles);
    copy_begin(arrived + stage, tiles * bytes, lane);
    for (int r = 0; r < tiles; r++)
      copy(ring + stage * stage_bytes + r * tile_bytes, next.from + r * row_bytes, bytes,
           arrived + stage, next.policy, lane);
    copy_end(arrived + stage, lane);
    next.unit += units;
    next.from += bytes;
    if (next.unit == end_unit)
      next.item += item_step, next.unit = first_unit, next.from += to_next_item;
  }

  __device__ __forceinline__ void multiply() {
    Cursor next = beginning();
    if (lane == 0)
      for (int i = 0; i < stages; i++) barrier_init(arrived + i, kCopyArrivals);
    barriers_are_ready();
    sync_warp();
    ask_up_to(next, stages - 1);
    launch_dependents();
    sync_block();  // the other barriers are ready
    wait_for_predecessor();
    float squares[kSquaresAtOnce];  // on their way together with x
    if (kNorm && kSharesFactors) ask_for_squares(warp, 0, squares);
    if (kStaged) take_x(next);
    if (kNorm && kSharesFactors) share_factors(squares);

    uint4 next_x[kUnitBlocks];
    if (kReadsAhead) read_unit(first_unit, next_x);
    if (!kStaged) ask_up_to(next, stages);  // else they were asked for behind x
    Stage stage = {0, 0};
    for (int item = first_item, number = 0; item < n_items; item += item_step, number++) {
      float sum[kTiles][kColumns][4] = {};
      if (kSums && number == 0)
        multiply_item<kSums>(stage, next, next_x, sum);
      else
        multiply_item<false>(stage, next, next_x, sum);
      put_sums(sum, number);
    }
  }

  // Of the ring: which is next, and of which round.
  struct Stage {
    int index;
    uint32_t parity;
  };

  // kFirst: what x adds up to is found on the way; other items have it then.
  template <bool kFirst>
  __device__ __forceinline__ void multiply_item(Stage& stage, Cursor& next,
                                                uint4 next_x[kUnitBlocks],
                                                float sum[kTiles][kColumns][4]) {
    UnitAt at = {first_unit, nullptr, staged + staged_row * x_stride + t, x_sums + 2 * t};
    float x_total[kColumns][2][4] = {};
    while (at.unit < end_unit) {
      barrier_wait(arrived + stage.index, stage.parity);
      at.weights = ring + stage.index * stage_bytes;
      const int end = min(at.unit + units_per_stage, end_unit);
      if (!kFirst && kUnitsAtOnce > 1)
        while (at.unit + kUnitsAtOnce <= end)
          multiply_units<kFirst, kUnitsAtOnce>(at, next_x, x_total, sum);
#pragma unroll 1
      while (at.unit < end) multiply_units<kFirst, 1>(at, next_x, x_total, sum);
      sync_warp();  // every lane has read the stage: it can be overwritten
      ask(next, stage.index);
      if (++stage.index == stages) stage = {0, stage.parity ^ 1};
    }
    if (!kGroups && kSums)
#pragma unroll
      for (int c = 0; c < kColumns; c++) {
        const float2 sum_of_x = x_sum_of<kFirst>(at.x_sum, 0, c, x_total[c]);
#pragma unroll
        for (int r = 0; r < kTiles; r++) lower(sum[r][c], sum_of_x);
      }
    if (kFirst) sync_warp();
  }

  // Of a unit: where what it needs begins.
  struct UnitAt {
    int unit;
    const uint8_t* weights;  // in the ring
    const uint4* x;          // in row 0 or row g
    float* x_sum;
  };

  template <bool kFirst, int kUnits>
  __device__ __forceinline__ void multiply_units(UnitAt& at, uint4 next_x[kUnitBlocks],
                                                 float x_total[kColumns][2][4],
                                                 float sum[kTiles][kColumns][4]) {
#pragma unroll
    for (int i = 0; i < kUnits; i++) {
      multiply_unit<kFirst>(at.weights, at.x, at.x_sum, at.unit, next_x, x_total, sum);
      at.unit++;
      at.weights += Weight::kUnitBytes;
      at.x += kUnitBlocks * 4;
      if (kGroups) at.x_sum += kUnitGroups * kMaxRows;
    }
  }

  // Sums of groups run in two chains, since each product waits for the one before it.
  template <bool kFirst>
  __device__ __forceinline__ void multiply_unit(const uint8_t* weights, const uint4* x,
                                                float* x_sum, int unit, uint4 next_x[kUnitBlocks],
                                                float x_total[kColumns][2][4],
                                                float sum[kTiles][kColumns][4]) {
    float even[kTiles][kColumns][4], odd[kTiles][kColumns][4];
    uint4 here[kUnitBlocks];
    if (kReadsAhead) {
#pragma unroll
      for (int block = 0; block < kUnitBlocks; block++) here[block] = lifted(next_x[block]);
      read_unit(unit + 1 < end_unit ? unit + 1 : first_unit, next_x);
    }
#pragma unroll
    for (int block = 0; block < kUnitBlocks; block++) {
      uint4 b[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; c++)
        b[c] = kReadsAhead ? here[block] : operand_x(x, unit, block, c);
      if (kGroups && block % kGroupBlocks == 0) clear(even, odd, x_total);
#pragma unroll
      for (int r = 0; r < kTiles; r++) {
        uint32_t a[2][4];
        Weight::operands(weights + r * tile_bytes, block, lane, a);
#pragma unroll
        for (int c = 0; c < kColumns; c++) {
          mma(kGroups ? even[r][c] : sum[r][c], a[0], b[c].x, b[c].y);
          mma(kGroups ? odd[r][c] : sum[r][c], a[1], b[c].z, b[c].w);
        }
      }
      if constexpr (kFirst) {
        const uint32_t ones[4] = {Weight::one(0), Weight::one(0), Weight::one(1), Weight::one(1)};
#pragma unroll
        for (int c = 0; c < kColumns; c++) {
          mma(x_total[c][0], ones, b[c].x, b[c].y);
          mma(x_total[c][1], ones, b[c].z, b[c].w);
        }
      }
      if constexpr (kGroups) {
        if (block % kGroupBlocks == kGroupBlocks - 1)
#pragma unroll
          for (int c = 0; c < kColumns; c++)
            end_group(weights, block, c,
                      x_sum_of<kFirst>(x_sum, block / kGroupBlocks, c, x_total[c]), even, odd, sum);
      }
    }
  }

  static __device__ __forceinline__ void clear(float even[kTiles][kColumns][4],
                                               float odd[kTiles][kColumns][4],
                                               float x_total[kColumns][2][4]) {
#pragma unroll
    for (int c = 0; c < kColumns; c++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int r = 0; r < kTiles; r++) even[r][c][i] = odd[r][c][i] = 0;
        x_total[c][0][i] = x_total[c][1][i] = 0;
      }
  }

  __device__ __forceinline__ void end_group(const uint8_t* weights, int block, int c, float2 x_sum,
                                            float even[kTiles][kColumns][4],
                                            float odd[kTiles][kColumns][4],
                                            float sum[kTiles][kColumns][4]) {
#pragma unroll
    for (int r = 0; r < kTiles; r++) {
      const uint32_t* group = Weight::group(weights + r * tile_bytes, block);
#pragma unroll
      for (int i = 0; i < 4; i++) even[r][c][i] += odd[r][c][i];
      lower(even[r][c], x_sum);
      add_scaled(sum[r][c], group[g], even[r][c]);
      if constexpr (Weight::kOffset) {
        const float sums[4] = {x_sum.x, x_sum.y, x_sum.x, x_sum.y};
        add_scaled(sum[r][c], group[8 + g], sums);
      }
    }
  }

  // What rows 8c + 2t and 8c + 2t + 1 of x add up to over a group of weights, or in all: products
  // with weights of one, of which every lane has those of its rows.
  template <bool kFirst>
  __device__ __forceinline__ float2 x_sum_of(float* x_sum, int group, int c,
                                             const float x_total[2][4]) const {
    float2* kept = reinterpret_cast<float2*>(x_sum + group * kMaxRows + 8 * c);
    if (!kFirst) return *kept;
    const float2 sum = {x_total[0][0] + x_total[1][0], x_total[0][1] + x_total[1][1]};
    if (g == 0) *kept = sum;
    return sum;
  }

  // Takes back by how much the operands were more than the weights.
  static __device__ __forceinline__ void lower(float sum[4], float2 x_sum) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      sum[i] = fmaf(-Weight::kRaised, i % 2 == 0 ? x_sum.x : x_sum.y, sum[i]);
  }

  // Rows g and g + 8 of a tile have a scale each.
  static __device__ __forceinline__ void add_scaled(float sum[4], uint32_t scales,
                                                    const float more[4]) {
    sum[0] = fmaf(low(scales), more[0], sum[0]);
    sum[1] = fmaf(low(scales), more[1], sum[1]);
    sum[2] = fmaf(high(scales), more[2], sum[2]);
    sum[3] = fmaf(high(scales), more[3], sum[3]);
  }

  // x as B operands: of rows 8c + g the features from 8t on of a block of 32, multiplied by the power
  // of two that the weights lack. Lanes whose row does not exist read another one: what they compute
  // is not written anywhere.

  static __device__ __forceinline__ uint4 lifted(uint4 x) {
    if constexpr (Weight::kFall == 1) return x;
    return {times(x.x, Weight::lift(0)), times(x.y, Weight::lift(1)), times(x.z, Weight::lift(0)),
            times(x.w, Weight::lift(1))};
  }

  // From x of a unit on: where the unit's begins in row 0 or row g.
  __device__ __forceinline__ uint4 operand_x(const uint4* x, int unit, int block, int c) const {
    if constexpr (kStaged) return x[block * 4 + staged_rows_to(c) * x_stride];
    return lifted(read_x(unit * kUnitBlocks + block, c));
  }

  // From row g of x in shared memory to row 8c + g.
  __device__ __forceinline__ int staged_rows_to(int c) const {
    return c == 0 || 8 * c + g < args.rows ? 8 * c : 0;
  }

  // This warp's part of x, by ordinary reads: copies in bulk, as weights come, would come after
  // those that were asked for before. As many reads are on their way at once as there are registers.
  __device__ __forceinline__ void take_x(Cursor& next) {
    const int all = (end_unit - first_unit) * kUnitBlocks * 4;
    constexpr int kSteps = kWarps <= 12 ? 2 : 1;
    if (kFew)
      for (int row = 0; row < args.rows; row++)
        for (int begin = 0; begin < all; begin += 8 * 32)
          take_chunks<8, 1>(next, row, begin, all);
    else
      for (int row = 0; row < args.rows; row += 8)
        for (int begin = 0; begin < all; begin += kSteps * 32)
          take_chunks<kSteps, 8>(next, row, begin, all);
    sync_warp();
  }

  // So many chunks, 32 apart, of so many rows. Beyond the last feature x is zeros: weights there may
  // not be, as they are raised.
  template <int kSteps, int kRows>
  __device__ __forceinline__ void take_chunks(Cursor& next, int first_row, int first_chunk,
                                              int all) {
    uint4 x[kSteps][kRows];
#pragma unroll
    for (int i = 0; i < kSteps; i++)
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const int row = first_row + r, chunk = first_chunk + 32 * i + lane;
        x[i][r] = row < args.rows && chunk < chunks ? x_chunks(row)[chunk] : uint4{0, 0, 0, 0};
      }
    ask_up_to(next, stages);
#pragma unroll
    for (int i = 0; i < kSteps; i++)
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const int row = first_row + r, chunk = first_chunk + 32 * i + lane;
        if (row < args.rows && chunk < all) staged[row * x_stride + chunk] = lifted(x[i][r]);
      }
  }

  // What the norm multiplies each row by. The warp that finishes has the time to find it for eight
  // rows; more are shared out among the other warps.

  static constexpr bool kSharesFactors = kColumns > 1;
  static constexpr int kSquaresAtOnce = 16;  // of a lane

  __device__ __forceinline__ void ask_for_squares(int row, int begin, float squares[]) const {
    const int parts = (args.k + kTileRows - 1) / kTileRows;
#pragma unroll
    for (int i = 0; i < kSquaresAtOnce; i++) {
      const int part = begin + 32 * i + lane;
      squares[i] = row < args.rows && part < parts ? args.squares[row * parts + part] : 0;
    }
  }

  __device__ __forceinline__ void share_factors(float squares[]) {
    for (int row = warp; row < args.rows; row += kWarps) {
      if (row != warp) ask_for_squares(row, 0, squares);
      const float factor = factor_of(row, squares);
      if (lane == 0) factors[row] = factor;
    }
  }

  // For rows 2t and 2t + 1.
  __device__ __forceinline__ void find_factors(float factor[2]) const {
    constexpr int kAtOnce = kFew ? 2 : 4;
    for (int first = 0; first < args.rows; first += kAtOnce) {
      float squares[kAtOnce][kSquaresAtOnce];
#pragma unroll
      for (int r = 0; r < kAtOnce; r++) ask_for_squares(first + r, 0, squares[r]);
#pragma unroll
      for (int r = 0; r < kAtOnce; r++) {
        const float found = factor_of(first + r, squares[r]);
        if ((first + r) / 2 == t) factor[r % 2] = found;
      }
    }
  }

  // The first squares were asked for.
  __device__ __forceinline__ float factor_of(int row, float squares[]) const {
    const int parts = (args.k + kTileRows - 1) / kTileRows;
    float sum = 0;
    for (int begin = 0; begin < parts; begin += 32 * kSquaresAtOnce) {
      if (begin > 0) ask_for_squares(row, begin, squares);
#pragma unroll
      for (int i = 0; i < kSquaresAtOnce; i++) sum += squares[i];
    }
    return rsqrtf(sum_of_warp(sum) / args.k + args.eps);
  }

  __device__ __forceinline__ const uint4* x_chunks(int row) const {
    return reinterpret_cast<const uint4*>(args.x + static_cast<int64_t>(row) * args.k +
                                          first_unit * Weight::kUnitK);
  }

  // x where it is not staged; zeros beyond the last feature.
  __device__ __forceinline__ uint4 read_x(int block, int c) const {
    const int row = 8 * c + g < args.rows ? 8 * c + g : 0, k = 32 * block + 8 * t;
    if (k >= args.k) return {0, 0, 0, 0};
    const bf16* from = args.x + static_cast<int64_t>(row) * args.k + k;
    return *reinterpret_cast<const uint4*>(from);
  }

  __device__ __forceinline__ void read_unit(int unit, uint4 x[kUnitBlocks]) const {
#pragma unroll
    for (int block = 0; block < kUnitBlocks; block++) x[block] = read_x(unit * kUnitBlocks + block, 0);
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

  __device__ __forceinline__ void finish() {
    if (lane == 0)
      for (int i = 0; i < kBuffers; i++) {
        barrier_init(summed + i, kWarps);
        barrier_init(taken + i, 1);
      }
    barriers_are_ready();
    sync_block();
    const int looks_ahead_at = item_to_look_ahead_at();
    wait_for_predecessor();  // for what it reads, and since y may still be in use
    float factor[kColumns][2] = {};  // of the norm, for rows 8c + 2t and 8c + 2t + 1
    if (kNorm && !kSharesFactors) find_factors(factor[0]);
    Best best[kColumns][2];
    int number = 0;
    for (int item = first_item; item < n_items; item += item_step, number++) {
      if (number == looks_ahead_at) look_ahead();
      Beside beside[kTiles][kColumns];
#pragma unroll
      for (int r = 0; r < kTiles; r++)
#pragma unroll
        for (int c = 0; c < kColumns; c++) beside[r][c] = read_beside(item * kTiles + r, c);
      barrier_wait(summed + number % kBuffers, number / kBuffers % 2);
      if (kNorm && kSharesFactors && number == 0)
#pragma unroll
        for (int c = 0; c < kColumns; c++)
          for (int i = 0; i < 2; i++) factor[c][i] = factors[8 * c + 2 * t + i];
      float4 sum[kTiles][kColumns];
#pragma unroll
      for (int r = 0; r < kTiles; r++)
#pragma unroll
        for (int c = 0; c < kColumns; c++) sum[r][c] = float4{0, 0, 0, 0};
#pragma unroll 4
      for (int w = 0; w < kWarps; w++) add(sum, sums_of(number, w));
      sync_warp();
      if (lane == 0) barrier_arrive(taken + number % kBuffers);
#pragma unroll
      for (int r = 0; r < kTiles; r++)
#pragma unroll
        for (int c = 0; c < kColumns; c++)
          write(sum[r][c], item * kTiles + r, c, beside[r][c], factor[c], best[c]);
    }
    if (kEpilogue == kLogits && args.best_value != nullptr) write_best(best);
  }

  // Memory is idle between the last copies of one kernel and the first of the next. Tiles of a later
  // product come into the L2 cache meanwhile: not those it asks for first, or memory would be idle
  // then, but some that it comes to later.

  __device__ __forceinline__ int item_to_look_ahead_at() const {
    if (args.ahead == nullptr) return n_items;  // none
    return max(0, (n_items - 1 - first_item) / item_step - args.ahead_items_left);
  }

  __device__ __forceinline__ void look_ahead() const {
    int tile = args.ahead_first + first_item;
#pragma unroll 1
    for (int i = 0; i < args.ahead_tiles && tile < args.ahead_n; i++, tile += args.ahead_step)
      prefetch(args.ahead + static_cast<int64_t>(tile) * args.ahead_stride, args.ahead_tile_bytes,
               lane);
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

  // A lane has rows g and g + 8 of a tile (of SwiGLU gate and up of one feature), at rows 8c + 2t
  // and 8c + 2t + 1 of x.
  struct Place {
    int width;   // of y
    int n0, n1;  // output features
    bool has0, has1;
  };

  __device__ __forceinline__ Place place_of(int tile) const {
    constexpr bool pairs = kEpilogue == kSwiGLU;
    Place p;
    p.width = pairs ? args.n / 2 : args.n;
    p.n0 = pairs ? 8 * tile + g : kTileRows * tile + g;
    p.n1 = pairs ? p.width + p.n0 : p.n0 + 8;
    p.has0 = p.n0 < p.width && tile < args.tiles, p.has1 = p.n1 < args.n && tile < args.tiles;
    return p;
  }

  // What goes into y beside the sums, read while those are still on their way.
  struct Beside {
    float scale[2], bias[2], next_norm[2];
    float residual[4];
  };

  __device__ __forceinline__ Beside read_beside(int tile, int c) const {
    const Place p = place_of(tile);
    Beside b = {};
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

  __device__ __forceinline__ void write(float4 sum, int tile, int c, const Beside& beside,
                                        const float factor[2], Best best[2]) {
    const Place p = place_of(tile);
    float v[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (Weight::kFall != 1) v[i] *= Weight::kFall;
      if (Weight::kChannelScale) v[i] *= beside.scale[i / 2];
      if (kNorm) v[i] *= factor[i % 2];
      if (args.bias != nullptr) v[i] += beside.bias[i / 2];
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = 8 * c + 2 * t + i;
      const bool has0 = p.has0 && row < args.rows, has1 = p.has1 && row < args.rows;
      const int64_t at = static_cast<int64_t>(row) * p.width;
      float squares = 0;
      if (kEpilogue == kSwiGLU) {
        if (has0) put(at + p.n0, silu(v[i]) * v[2 + i], beside.residual[i], 0, squares);
      } else {
        if (has0) put(at + p.n0, v[i], beside.residual[i], beside.next_norm[0], squares);
        if (has1) put(at + p.n1, v[2 + i], beside.residual[2 + i], beside.next_norm[1], squares);
      }
      if (kEpilogue == kPlain && args.next_norm != nullptr) {
        for (int mask = 4; mask < 32; mask *= 2) squares += shuffle_xor(squares, mask);
        if (g == 0 && has0) args.next_squares[row * args.tiles + tile] = squares;
      }
      if (kEpilogue == kLogits) {
        if (has0 && p.n0 < args.n_best) best[i].offer(v[i], p.n0);
        if (has1 && p.n1 < args.n_best) best[i].offer(v[2 + i], p.n1);
      }
    }
  }

  __device__ __forceinline__ void put(int64_t at, float value, float residual, float next_norm,
                                      float& squares) const {
    if (kEpilogue == kLogits) {
      static_cast<float*>(args.y)[at] = value;
      return;
    }
    const bf16 y = narrow(args.residual != nullptr ? value + residual : value);
    static_cast<bf16*>(args.y)[at] = y;
    if (kEpilogue == kPlain && args.next_norm != nullptr) {
      args.next_x[at] = narrow(widen(y) * next_norm);
      squares = fmaf(widen(y), widen(y), squares);
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

template <class Weight, int kWarps, int kTiles, int kColumns, bool kFew, Epilogue kEpilogue,
          bool kNorm, bool kStaged>
__device__ __forceinline__ void linear(const LinearArgs& args) {
  Linear<Weight, kWarps, kTiles, kColumns, kFew, kEpilogue, kNorm, kStaged>(
      args, threadIdx.x, blockIdx.x, gridDim.x)
      .run();
}
