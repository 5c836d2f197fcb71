// GEMV, and GEMM with few rows: y = epilogue(x @ weight.T), bound by reading the weight.
//
// The weight is the A operand of mma.m16n8k16 and lies in memory in the order of its fragments
// (kernels/cuda/packing.py), so one read of shared memory by a lane *is* its operand. The rows of x
// are the B operand, so up to eight rows cost little more than one.
//
// Weights in bfloat16 can also stay plain rows: one copy then gathers a box of them.
//
// Each warp has a ring of stages in shared memory, which it keeps full of weight copies in flight
// (cp.async.bulk with an mbarrier each). A block issues some of them before it waits for the kernel
// that computes x, then loads x, and issues the rest last, because memory serves loads in the order
// in which they are issued. The warps split K, so every block reads all of x; one more warp, the
// epilogue warp, reduces their partial sums in a fixed order and applies the epilogue.
//
// An RMS norm before the GEMV is split in two. The kernel that writes the norm's input also
// writes that input times the norm's weight (the prescaled input) and partial sums of its squares
// (the norm epilogue); this kernel multiplies its sums by the row's factor, 1 / rms.
//
// Determinism: the bits of a row's result depend on neither the number of rows nor timing. They
// depend on the number of warps, which belongs to the weight and not to the call.
//
// Letters: M rows of x, N output features, K input features. A tile is 16 output features; a unit
// is 1024 bytes of a tile's weights with their scales; a slice is 32 input features; an octet is
// eight rows of x, the width of one mma; an item of work is kTiles tiles. Groups at the same place of
// every unit are a strand, which has a sum of its own until the item ends. g = lane / 4 and
// t = lane % 4 locate a lane in the fragments of mma.

#include "linear.cuh"

constexpr int kBuffers = 2;  // of partial sums, between the warps and the epilogue warp

// Where a warp reads its part of x: from L2, or from shared memory, to which it copies the part as a
// whole or piece by piece.
enum Input { kDirect, kStagedAtOnce, kStagedInParts };

// kTiles: tiles that a warp computes while it reads x once. kOctets: octets of x. kFew: x has at
// most two rows.
template <class Weight, int kWarps, int kTiles, int kOctets, bool kFew, Epilogue kEpilogue,
          bool kNorm, Input kInput>
struct Linear {
  static constexpr bool kStaged = kInput != kDirect;
  static constexpr int kUnitSlices = Weight::kUnitK / 32;
  static constexpr int kMaxRows = 8 * kOctets;
  static constexpr bool kGroups = Weight::kGroupSlices > 0;
  static constexpr int kGroupSlices = kGroups ? Weight::kGroupSlices : kUnitSlices;
  static constexpr int kSliceGroups = Weight::kSliceGroups;
  static constexpr int kUnitGroups = kUnitSlices / kGroupSlices * kSliceGroups;
  static constexpr int kStrands = Weight::kStrands;
  // Strands have columns of B of their own, which few rows leave free: the two rows of strand j are
  // columns 2j and 2j + 1, so lanes with t = j have its sums.
  static constexpr bool kSpreads = kFew && kStrands > 1;
  static constexpr int kStrandsOfLane = kSpreads ? 1 : kStrands;
  static constexpr bool kSums = Weight::kNeedsSums;  // of x
  // Units that a warp interleaves, so that one hides the latency of the other.
  static constexpr int kUnitsAtOnce = kOctets == 1 && kGroups && kStaged ? 2 : 1;
  // x that is not staged is loaded in advance (software pipelining), where registers allow: for the
  // next unit; or for the next four units with plain rows, whose units have a single slice and take
  // less time than a load. With three tiles a unit takes as long as a load, so one is enough.
  static constexpr bool kPipelinesX = !kStaged && kOctets == 1;
  static constexpr int kUnitsAhead = kPipelinesX && Weight::kPlainRows && kTiles <= 2 ? 4 : 1;
  static constexpr bool kGathers = Weight::kPermuted && kStaged;
  // Several rows take as long as an item, so they can arrive in parts, while the first item is
  // computed. A part has at least four slices; the last one has the rest.
  static constexpr bool kArrivesInParts = kInput == kStagedInParts;
  static_assert(!kArrivesInParts || (!kFew && !kGathers));
  static constexpr int kParts = 4, kPartUnits = kUnitSlices < 4 ? 4 / kUnitSlices : 1;
  static constexpr bool kPairTable = kTableBytes<Weight> > 0;

  using Output = ::Output<Weight, kEpilogue, kNorm>;

  const LinearArgs& args;
  const TensorMap* const map;                      // of plain rows
  const int lane, warp, g, t;
  const int first_item, item_step, n_items;        // this block's items: a grid-stride loop
  const int stages, units_per_stage;               // of the ring
  const int tile_bytes, stage_bytes;               // of a stage
  const int staged_row;                            // of B's column g; 0 where x has no such row
  const int column_strand, strand;                 // with kSpreads: of B's column g; of this lane
  int first_unit, end_unit;                        // of this warp, in every item
  int64_t to_next_item;                            // bytes from the end of this warp's units
  int vectors, x_stride;                           // 16-byte vectors of x: this warp's; per row

  // Shared memory.
  uint8_t* ring;
  float4* partial_sums;   // [kBuffers][kWarps][kTiles][kOctets][32]
  float* x_sums;          // with kSums: sums of x over this warp's groups: [groups][kMaxRows]
  uint4* staged;          // this warp's part of x: [rows][x_stride]
  uint64_t* full;         // [stages], of this warp: barrier: the copy has arrived
  float* norm_factors;    // [kMaxRows], with kNorm where the warps compute them
  uint64_t* sums_full;    // [kBuffers]: barrier, every warp has stored its partial sums
  uint64_t* sums_empty;   // [kBuffers]: barrier, the epilogue warp has read them
  uint8_t* pairs;         // with kPairTable
  uint4* source_x;         // with kGathers: some rows of x, in the order of its features
  uint64_t* source_ready;  // with kGathers: barrier, every warp has stored its part, or read it

  __device__ __forceinline__ Linear(const LinearArgs& a, const TensorMap* m, int thread, int block,
                                    int blocks)
      : args(a), map(m), lane(thread % 32), warp(thread / 32), g(lane / 4), t(lane % 4),
        first_item(block), item_step(blocks), n_items((a.tiles + kTiles - 1) / kTiles),
        stages(a.stages), units_per_stage(a.units_per_stage),
        tile_bytes(units_per_stage * (Weight::kUnitBytes + kLowBytes<Weight>)),
        stage_bytes(kTiles * tile_bytes),
        staged_row(kSpreads ? (g % 2 < a.rows ? g % 2 : 0) : (g < a.rows ? g : 0)),
        column_strand(g / 2 % kStrands), strand(kSpreads ? t % kStrands : 0) {
    first_unit = a.units * warp / kWarps;
    end_unit = a.units * (warp + 1) / kWarps;
    to_next_item = static_cast<int64_t>(item_step) * kTiles * a.tile_stride -
                   (end_unit - first_unit) * Weight::kUnitBytes;
    uint8_t* memory = shared_memory();
    pairs = memory;
    memory += kTableBytes<Weight>;
    ring = memory + warp * stages * stage_bytes;
    memory += kWarps * stages * stage_bytes;
    partial_sums = reinterpret_cast<float4*>(memory);
    memory += sizeof(float4) * kBuffers * kWarps * kTiles * kOctets * 32;
    norm_factors = reinterpret_cast<float*>(memory);
    memory += sizeof(float) * kMaxRows;
    sums_full = reinterpret_cast<uint64_t*>(memory);
    sums_empty = sums_full + kBuffers;
    source_ready = sums_empty + kBuffers;
    full = source_ready + kGathers + warp * stages;
    memory += (sizeof(uint64_t) * (2 * kBuffers + kGathers + kWarps * stages) + 15) / 16 * 16;
    const int units_of_warp = (a.units + kWarps - 1) / kWarps;
    const int warp_sums = kMaxRows * (kGroups ? units_of_warp * kUnitGroups : kSums ? 1 : 0);
    x_sums = reinterpret_cast<float*>(memory) + warp * warp_sums;
    memory += sizeof(float) * kWarps * warp_sums;
    vectors = (min(end_unit * Weight::kUnitK, a.k) - first_unit * Weight::kUnitK) / 8;
    // An odd stride in 64-byte half lines: eight lanes read two rows without a bank conflict.
    x_stride = 4 * (units_of_warp * kUnitSlices | 1);
    staged = reinterpret_cast<uint4*>(memory) + warp * a.rows * x_stride;
    source_x = reinterpret_cast<uint4*>(memory) + kWarps * a.rows * x_stride;
  }

  __device__ __forceinline__ void run() {
    if (warp < kWarps)
      multiply();
    else
      run_epilogue();
  }

  // The multiplying warps.

  using Sums = float[kTiles][kOctets][4];

  // The source of the next copy, and the number of copies issued.
  struct Cursor {
    const uint8_t* from;
    int item, unit, issued;
    uint64_t policy;
  };

  __device__ __forceinline__ Cursor first_copy() const {
    const int64_t tile = static_cast<int64_t>(first_item) * kTiles;
    return {args.weight + tile * args.tile_stride + first_unit * Weight::kUnitBytes,
            first_unit < end_unit ? first_item : n_items, first_unit, 0, evict_first_policy()};
  }

  // Issues copies until n have been issued.
  __device__ __forceinline__ void issue_up_to(Cursor& next, int n) {
#pragma unroll 1
    while (next.issued < n) issue_copy(next, next.issued++);
  }

  __device__ __forceinline__ void issue_copy(Cursor& next, int stage) {
    if (next.item >= n_items) return;
    const int units = min(units_per_stage, end_unit - next.unit);
    const int bytes = units * Weight::kUnitBytes;
    uint8_t* to = ring + stage * stage_bytes;
    if constexpr (Weight::kPlainRows) {  // always a whole box; surplus units are not read
      copy_begin(full + stage, stage_bytes, lane);
      copy_box(to, map, 32 * next.unit, next.item * kTiles, full + stage, next.policy, lane);
    } else {
      const int tiles = kTiles == 1 ? 1 : min(kTiles, args.tiles - next.item * kTiles);
      const int low_bytes = units * kLowBytes<Weight>;
      copy_begin(full + stage, tiles * (bytes + low_bytes), lane);
      for (int r = 0; r < tiles; r++) {
        const uint8_t* from = next.from + static_cast<int64_t>(r) * args.tile_stride;
        copy(to + r * tile_bytes, from, bytes, full + stage, next.policy, lane);
        if constexpr (kLowBytes<Weight> > 0)
          copy(to + r * tile_bytes + units_per_stage * Weight::kUnitBytes,
               from + low_plane<Weight>(args.units, next.unit), low_bytes, full + stage,
               next.policy, lane);
      }
    }
    copy_end(full + stage, lane);
    next.unit += units;
    next.from += bytes;
    if (next.unit == end_unit)
      next.item += item_step, next.unit = first_unit, next.from += to_next_item;
  }

  __device__ __forceinline__ void multiply() {
    Cursor next = first_copy();
    if (lane == 0)
#pragma unroll 1
      for (int i = 0; i < stages; i++) barrier_init(full + i, kCopyArrivals);
    fence_barrier_init();
    sync_warp();
    issue_up_to(next, args.early_stages);
    launch_dependents();
    if constexpr (kGathers) stage_features();
    if constexpr (kPairTable) Weight::store_pairs(pairs, warp, kWarps, lane);
    sync_block();  // the epilogue warp has initialized the other barriers
    wait_for_predecessor();
    float squares[NormFactors<LinearArgs>::kAtOnce];  // loaded together with x
    if (kNorm && kSharesFactors) NormFactors<LinearArgs>{args, lane}.load(warp, 0, squares);
    if constexpr (kGathers)
      gather_x(next);
    else if constexpr (kArrivesInParts)
      copy_x_in_parts(next);
    else if (kStaged)
      stage_x(next);
    if (kNorm && kSharesFactors) compute_shared_factors(squares);

    uint4 next_x[kUnitsAhead][kUnitSlices];
    if (kPipelinesX) load_units(first_unit, next_x);
    if (!kStaged) issue_up_to(next, stages);  // else they are issued after the loads of x
    Stage stage = {0, 0};
    for (int item = first_item, number = 0; item < n_items; item += item_step, number++) {
      Sums sums[kStrandsOfLane] = {};
      const bool is_last = item + item_step >= n_items;
      if ((kSums || kArrivesInParts) && number == 0)
        multiply_item<kSums || kArrivesInParts>(stage, next, is_last, next_x, sums);
      else
        multiply_item<false>(stage, next, is_last, next_x, sums);
      add_strands(sums);
      store_partial_sums(sums[0], number);
    }
  }

  // A stage of the ring, and the parity of its current round.
  struct Stage {
    int index;
    uint32_t parity;
  };

  // Where the inputs of a unit begin.
  struct UnitPointers {
    int unit;
    const uint8_t* weights;  // in the ring
    int to_low;              // bytes from there
    uint4* x;                // staged, in row g (or 0)
    float* x_sum;
  };

  // Waits for a stage; returns the end of its units.
  __device__ __forceinline__ int begin_stage(const Stage& stage, UnitPointers& at) {
    barrier_wait(full + stage.index, stage.parity);
    at.weights = ring + stage.index * stage_bytes;
    at.to_low = low_plane<Weight>(units_per_stage, 0);
    return min(at.unit + units_per_stage, end_unit);
  }

  __device__ __forceinline__ void end_stage(Stage& stage, Cursor& next) {
    sync_warp();  // every lane has read the stage, so it can be overwritten
    issue_copy(next, stage.index);
    if (++stage.index == stages) stage = {0, stage.parity ^ 1};
  }

  // kFirst: also waits for the parts of x, and computes its sums, which later items reuse.
  template <bool kFirst>
  __device__ __forceinline__ void multiply_item(Stage& stage, Cursor& next, bool is_last,
                                                uint4 next_x[kUnitsAhead][kUnitSlices],
                                                Sums sums[kStrandsOfLane]) {
    UnitPointers at = {first_unit, nullptr, 0, staged + staged_row * x_stride + t,
                       x_sums + (kSpreads ? strand * kSliceGroups * kMaxRows : 2 * t)};
    float x_total[kOctets][2][4] = {};
    uint4 own_x[kUnitsAtOnce][kUnitSlices] = {};
    int end = first_unit;  // of the stage
#pragma unroll 1
    while (kUnitsAhead > 1 && at.unit < end_unit) {
      uint4 here[kUnitsAhead][kUnitSlices];
      take_next_x(at.unit, is_last, next_x, here);
#pragma unroll
      for (int i = 0; i < kUnitsAhead; i++)
        if (i == 0 || at.unit < end_unit) {
          if (at.unit == end) end = begin_stage(stage, at);
          multiply_units<kFirst, 1>(at, here[i], own_x, x_total, sums);
          if (at.unit == end) end_stage(stage, next);
        }
    }
    while (kUnitsAhead == 1 && at.unit < end_unit) {
      end = begin_stage(stage, at);
      if (!kFirst && kUnitsAtOnce > 1)
        while (at.unit + kUnitsAtOnce <= end)
          multiply_units<kFirst, kUnitsAtOnce>(at, nullptr, own_x, x_total, sums);
#pragma unroll 1
      while (at.unit < end) {
        uint4 here[1][kUnitSlices];
        if (kPipelinesX) take_next_x(at.unit, is_last, next_x, here);
        if (kFirst && kArrivesInParts && (at.unit - first_unit) % kPartUnits == 0) wait_for_part();
        multiply_units<kFirst, 1>(at, here[0], own_x, x_total, sums);
      }
      end_stage(stage, next);
    }
    if (!kGroups && kSums)
#pragma unroll
      for (int c = 0; c < kOctets; c++) {
        const float2 x_sum = x_sum_of_group<kFirst>(at.x_sum, 0, 0, c, x_total[c]);
#pragma unroll
        for (int r = 0; r < kTiles; r++) subtract_zero_point<Weight>(sums[0][r][c], x_sum);
      }
    if (kFirst) sync_warp();
  }

  // here: x, with kPipelinesX.
  template <bool kFirst, int kUnits>
  __device__ __forceinline__ void multiply_units(UnitPointers& at, const uint4 here[kUnitSlices],
                                                 uint4 own_x[kUnitsAtOnce][kUnitSlices],
                                                 float x_total[kOctets][2][4],
                                                 Sums sums[kStrandsOfLane]) {
#pragma unroll
    for (int i = 0; i < kUnits; i++) {
      if constexpr (kSpreads)
        multiply_strands<kFirst>(at.weights, at.to_low, at.x, at.x_sum, here, own_x[i], x_total,
                                 sums);
      else
        multiply_unit<kFirst>(at.weights, at.to_low, at.x, at.x_sum, at.unit, here, x_total, sums);
      at.unit++;
      at.weights += unit_step();
      at.to_low -= Weight::kUnitBytes - kLowBytes<Weight>;
      at.x += kUnitSlices * 4;
      if (kGroups) at.x_sum += kUnitGroups * kMaxRows;
    }
  }

  // Bytes from a unit in the ring to the next.
  static __device__ __forceinline__ constexpr int unit_step() {
    if constexpr (Weight::kPlainRows) return Weight::kRowBytes;
    return Weight::kUnitBytes;
  }

  // A group that is a whole unit has two accumulators, even and odd: each mma waits for the one before
  // it on the same accumulator. If a unit has several groups, each group has one accumulator.
  template <bool kFirst>
  __device__ __forceinline__ void multiply_unit(const uint8_t* weights, int to_low, uint4* x,
                                                float* x_sum, int unit,
                                                const uint4 here[kUnitSlices],
                                                float x_total[kOctets][2][4],
                                                Sums sums[kStrands]) {
    Sums even, odd;
#pragma unroll
    for (int slice = 0; slice < kUnitSlices; slice++) {
      const int slice_strand = slice / kGroupSlices;
      uint4 b[kOctets];
#pragma unroll
      for (int c = 0; c < kOctets; c++)
        b[c] = kPipelinesX ? here[slice] : x_operand<kFirst>(x, unit, slice, c);
      if (kGroups && slice % kGroupSlices == 0) clear(even, odd, x_total);
#pragma unroll
      for (int r = 0; r < kTiles; r++) {
        uint32_t a[Weight::kTerms][2][4];
        load_operands(weights + r * tile_bytes, to_low, slice, a);
#pragma unroll
        for (int c = 0; c < kOctets; c++)
          if constexpr (kGroups)
            multiply_slice(even[r][c], Weight::kOneChain ? even[r][c] : odd[r][c], a, b[c]);
          else
            multiply_slice(sums[0][r][c], sums[0][r][c], a, b[c]);
      }
      if constexpr (kFirst && kSums)
#pragma unroll
        for (int c = 0; c < kOctets; c++) add_x<Weight>(x_total[c], b[c]);
      if constexpr (kGroups) {
        if (slice % kGroupSlices == kGroupSlices - 1)
#pragma unroll
          for (int c = 0; c < kOctets; c++)
            finish_groups<kFirst>(weights, slice_strand * kSliceGroups, c, x_sum, x_total[c], even,
                                  odd, sums[slice_strand]);
      }
    }
  }

  // The same with kSpreads. A column of B has x in the slices of its strand alone, and zeros in the
  // others. So one pair of accumulators, of even and odd strands, has each strand's sums in columns of
  // its own, with the bits of one accumulator per strand. Every lane finishes the groups of a strand.
  template <bool kFirst>
  __device__ __forceinline__ void multiply_strands(const uint8_t* weights, int to_low,
                                                   const uint4* x, float* x_sum,
                                                   const uint4 here[kUnitSlices],
                                                   uint4 own_x[kUnitSlices],
                                                   float x_total[kOctets][2][4],
                                                   Sums sums[1]) {
    Sums even, odd;
    clear(even, odd, x_total);
#pragma unroll
    for (int slice = 0; slice < kUnitSlices; slice++) {
      const bool is_own = column_strand == slice / kGroupSlices;
      if (kPipelinesX)
        own_x[slice] = is_own ? here[slice] : uint4{0, 0, 0, 0};
      else
        load_if(is_own, x + slice * 4, own_x[slice]);  // or it stays zeros
#pragma unroll
      for (int r = 0; r < kTiles; r++) {
        uint32_t a[Weight::kTerms][2][4];
        load_operands(weights + r * tile_bytes, to_low, slice, a);
        float* chain = slice / kGroupSlices % 2 ? odd[r][0] : even[r][0];
        if constexpr (Weight::kOneChain)
          multiply_slice(chain, chain, a, own_x[slice]);
        else
          multiply_slice(even[r][0], odd[r][0], a, own_x[slice]);
      }
      if constexpr (kFirst) add_x<Weight>(x_total[0], own_x[slice]);
    }
    if constexpr (Weight::kOneChain)
#pragma unroll
      for (int r = 0; r < kTiles; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) even[r][0][i] += odd[r][0][i];
    finish_groups<kFirst>(weights, strand * kSliceGroups, 0, x_sum, x_total[0], even, odd, sums[0]);
  }

  __device__ __forceinline__ void load_operands(const uint8_t* unit, int to_low, int slice,
                                                uint32_t a[Weight::kTerms][2][4]) const {
    if constexpr (Weight::kPlainRows)
      Weight::operands(unit, units_per_stage * Weight::kRowBytes, lane, a);
    else if constexpr (kPairTable)
      Weight::paired_operands(shared_address(pairs + 4 * lane), unit, slice, lane, a);
    else
      operands_of<Weight>(unit, to_low, slice, lane, a);
  }

  // The two mma of a slice, for each term of its weights.
  static __device__ __forceinline__ void multiply_slice(float first[4], float second[4],
                                                        const uint32_t a[Weight::kTerms][2][4],
                                                        uint4 b) {
#pragma unroll
    for (int i = 0; i < Weight::kTerms; i++) {
      mma(first, a[i][0], b.x, b.y);
      mma(second, a[i][1], b.z, b.w);
    }
  }

  // Takes x of the units from `unit` on, which has been loaded, and loads x of the units after them,
  // all at once: waiting for one load of a warp often means waiting for all of them.
  __device__ __forceinline__ void take_next_x(int unit, bool is_last,
                                              uint4 next_x[kUnitsAhead][kUnitSlices],
                                              uint4 here[kUnitsAhead][kUnitSlices]) const {
#pragma unroll
    for (int i = 0; i < kUnitsAhead; i++)
#pragma unroll
      for (int slice = 0; slice < kUnitSlices; slice++)
        here[i][slice] = scale_input<Weight>(next_x[i][slice]);
    const bool is_end = unit + kUnitsAhead >= end_unit;
    if (kUnitsAhead == 1 || !is_end || !is_last) load_units(is_end ? first_unit : unit + kUnitsAhead, next_x);
  }

  static __device__ __forceinline__ void clear(Sums even, Sums odd, float x_total[kOctets][2][4]) {
#pragma unroll
    for (int c = 0; c < kOctets; c++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int r = 0; r < kTiles; r++) even[r][c][i] = odd[r][c][i] = 0;
        x_total[c][0][i] = x_total[c][1][i] = 0;
      }
  }

  // group: the first group of the unit that ends with this slice. With kSpreads it is the group of this
  // lane's strand, whose sums of x are at x_sum.
  template <bool kFirst>
  __device__ __forceinline__ void finish_groups(const uint8_t* weights, int group, int c,
                                                float* x_sum, const float x_total[2][4], Sums even,
                                                Sums odd, Sums sum) {
    float2 x_sums[kSliceGroups];
#pragma unroll
    for (int half = 0; half < kSliceGroups; half++)
      x_sums[half] =
          x_sum_of_group<kFirst>(x_sum, kSpreads ? half : group + half, half, c, x_total);
#pragma unroll
    for (int r = 0; r < kTiles; r++)
      add_groups<Weight>(sum[r][c], even[r][c], odd[r][c], x_sums, weights + r * tile_bytes, group,
                         g);
  }

  // Adds the strands' sums in pairs.
  static __device__ __forceinline__ void add_strands(Sums sums[kStrandsOfLane]) {
#pragma unroll
    for (int step = 1; step < kStrands; step *= 2)
#pragma unroll
      for (int r = 0; r < kTiles; r++)
#pragma unroll
        for (int c = 0; c < kOctets; c++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            if constexpr (kSpreads)
              sums[0][r][c][i] += shuffle_xor(sums[0][r][c][i], step);
            else
#pragma unroll
              for (int j = 0; j < kStrands; j += 2 * step)
                sums[j][r][c][i] += sums[j + step][r][c][i];
          }
  }

  // The sums of rows 8c + 2t and 8c + 2t + 1 of x (with kSpreads, of its two rows) over a group, or
  // over this warp's K.
  template <bool kFirst>
  __device__ __forceinline__ float2 x_sum_of_group(float* x_sum, int group, int half, int c,
                                                   const float x_total[2][4]) const {
    float2* kept = reinterpret_cast<float2*>(x_sum + group * kMaxRows + 8 * c);
    if (!kFirst || !kSums) return *kept;
    const float2 sum = x_sum_of<Weight>(x_total, half);
    if (g == 0) *kept = sum;
    return sum;
  }

  // x as B operands, of row 8c + g. Lanes whose row does not exist read another row; their results
  // are never stored.

  // x: where the unit's part of staged x begins. The first item finds it as it was copied, and leaves
  // it scaled.
  template <bool kFirst>
  __device__ __forceinline__ uint4 x_operand(uint4* x, int unit, int slice, int c) const {
    if constexpr (kStaged) {
      uint4& at = x[slice * 4 + staged_rows_to(c) * x_stride];
      if constexpr (!kFirst || !kArrivesInParts || Weight::kOutputScale == 1) return at;
      const uint4 scaled = scale_input<Weight>(at);
      if (8 * c + g < args.rows) at = scaled;
      return scaled;
    }
    return scale_input<Weight>(load_x(unit * kUnitSlices + slice, c));
  }

  // The number of rows from row g of staged x to row 8c + g.
  __device__ __forceinline__ int staged_rows_to(int c) const {
    return kSpreads || c == 0 || 8 * c + g < args.rows ? 8 * c : 0;
  }

  // Copies this warp's part of x to shared memory by ordinary loads: bulk copies would queue behind
  // the weights' copies. As many loads are in flight as there are registers for.
  __device__ __forceinline__ void stage_x(Cursor& next) {
    const int all = (end_unit - first_unit) * kUnitSlices * 4;
    constexpr int kVectors = kWarps <= 12 ? 2 : 1;
    if (kFew && all <= 2 * 32)  // short code for the usual share of K, as it runs once
#pragma unroll 1
      for (int row = 0; row < args.rows; row++) stage_vectors<2, 1>(next, row, 0, all);
    else if (kFew)
      for (int row = 0; row < args.rows; row++)
        for (int begin = 0; begin < all; begin += 8 * 32)
          stage_vectors<8, 1>(next, row, begin, all);
    else
      for (int row = 0; row < args.rows; row += 8)
        for (int begin = 0; begin < all; begin += kVectors * 32)
          stage_vectors<kVectors, 8>(next, row, begin, all);
    sync_warp();
  }

  // Stages kVectors vectors, 32 apart, of kRows rows. Beyond the last feature x is zeros, because
  // padding of the weights need not be.
  template <int kVectors, int kRows>
  __device__ __forceinline__ void stage_vectors(Cursor& next, int first_row, int first_vector,
                                              int all) {
    uint4 x[kVectors][kRows];
#pragma unroll
    for (int i = 0; i < kVectors; i++)
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const int row = first_row + r, vector = first_vector + 32 * i + lane;
        x[i][r] = row < args.rows && vector < vectors ? x_vectors(row)[vector] : uint4{0, 0, 0, 0};
      }
    issue_up_to(next, stages);
#pragma unroll
    for (int i = 0; i < kVectors; i++)
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const int row = first_row + r, vector = first_vector + 32 * i + lane;
        if (row < args.rows && vector < all)
          store_staged(staged + row * x_stride, vector, scale_input<Weight>(x[i][r]));
      }
  }

  // The same by asynchronous copies, as x is in memory, in parts. Sixteen lanes copy 256 bytes of a row.
  __device__ __forceinline__ void copy_x_in_parts(Cursor& next) {
    const int all = (end_unit - first_unit) * kUnitSlices * 4;
    int vector = lane % 16;
#pragma unroll 1
    for (int part = 0; part < kParts; part++) {
      const int end = part == kParts - 1 ? all : min((part + 1) * kPartUnits * kUnitSlices * 4, all);
#pragma unroll 1
      for (; vector < end; vector += 16)
#pragma unroll 4
        for (int row = lane / 16; row < args.rows; row += 2) copy_vector_of_x(row, vector);
      own_copies_end_group();
    }
    issue_up_to(next, stages);
  }

  __device__ __forceinline__ void copy_vector_of_x(int row, int vector) const {
    const uint4* from = x_vectors(row) + vector;
    uint4* to = staged + row * x_stride;
    if constexpr (kSliceGroups == 1) {
      copy_own<16>(to + vector, from, vector < vectors);
    } else {
      uint2* fours = place_of_fours(to, vector);
      copy_own<8>(fours, from, vector < vectors);
      copy_own<8>(fours + 2, reinterpret_cast<const uint2*>(from) + 1, vector < vectors);
    }
  }

  // Waits for the next part: with a group for each part that was waited for, which is empty, there
  // are always as many newer ones.
  __device__ __forceinline__ void wait_for_part() const {
    own_copies_wait<kParts - 1>();
    own_copies_end_group();
    sync_warp();
  }

  static __device__ __forceinline__ void store_staged(uint4* row, int vector, uint4 x) {
    if constexpr (kSliceGroups == 1)
      row[vector] = x;
    else
      stage_fours(row, vector, x);
  }

  // Stores eight features of a row for the lanes that multiply them where the halves of a slice are
  // groups: four for one lane, four for the next.
  static __device__ __forceinline__ void stage_fours(uint4* row, int vector, uint4 x) {
    uint2* fours = place_of_fours(row, vector);
    fours[0] = {x.x, x.y};
    fours[2] = {x.z, x.w};
  }

  static __device__ __forceinline__ uint2* place_of_fours(uint4* row, int vector) {
    const int t = vector % 2 * 2, half = vector % 4 / 2;
    return reinterpret_cast<uint2*>(row + vector / 4 * 4 + t) + half;
  }

  // x of a permuted weight is gathered from shared memory, because its elements lie in many lines of
  // L2. The indices of this warp's columns are staged before the wait, in the place of row 0, where
  // each is replaced by its element.

  static constexpr int kNoFeature = 0xffff;

  __device__ __forceinline__ void stage_features() {
    const int all = (end_unit - first_unit) * kUnitSlices * 4;
    const int4* from = reinterpret_cast<const int4*>(args.features + first_unit * Weight::kUnitK);
#pragma unroll 2
    for (int vector = lane; vector < all; vector += 32) {
      int4 first = {kNoFeature, kNoFeature, kNoFeature, kNoFeature}, second = first;
      if (vector < vectors) first = from[2 * vector], second = from[2 * vector + 1];
      store_staged(staged, vector,
                   {pair(first.x, first.y), pair(first.z, first.w), pair(second.x, second.y),
                    pair(second.z, second.w)});
    }
  }

  static __device__ __forceinline__ uint32_t pair(int first, int second) {
    return first | static_cast<uint32_t>(second) << 16;
  }

  // Copies as many rows as have room to shared memory, together with the other warps, and gathers
  // this warp's part of them. Row 0 comes last, as it replaces the indices.
  __device__ __forceinline__ void gather_x(Cursor& next) {
    const int all = (end_unit - first_unit) * kUnitSlices * 4, row_vectors = args.k / 8;
    for (int end = args.rows; end > 0; end -= args.source_rows) {
      const int begin = max(0, end - args.source_rows);
      copy_source_rows(next, begin * row_vectors, (end - begin) * row_vectors);
      meet_warps(0);
      for (int row = end - 1; row >= begin; row--) {
        const bf16* from = reinterpret_cast<const bf16*>(source_x + (row - begin) * row_vectors);
#pragma unroll 2
        for (int vector = lane; vector < all; vector += 32) {
          const uint4 at = staged[vector];
          const uint4 x = {gathered(from, at.x), gathered(from, at.y), gathered(from, at.z),
                           gathered(from, at.w)};
          staged[row * x_stride + vector] = scale_input<Weight>(x);
        }
      }
      if (begin > 0) meet_warps(1);
    }
    sync_warp();
  }

  __device__ __forceinline__ void copy_source_rows(Cursor& next, int first, int n) {
    constexpr int kAtOnce = kFew ? 8 : 4, kThreads = 32 * kWarps;
    const uint4* from = reinterpret_cast<const uint4*>(args.x) + first;
    for (int begin = 32 * warp + lane; begin - lane < n; begin += kAtOnce * kThreads) {
      uint4 x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; i++)
        if (begin + i * kThreads < n) x[i] = from[begin + i * kThreads];
      issue_up_to(next, stages);
#pragma unroll
      for (int i = 0; i < kAtOnce; i++)
        if (begin + i * kThreads < n) source_x[begin + i * kThreads] = x[i];
    }
    issue_up_to(next, stages);
  }

  // Waits for the other multiplying warps.
  __device__ __forceinline__ void meet_warps(uint32_t parity) {
    sync_warp();
    if (lane == 0) barrier_arrive(source_ready);
    barrier_wait(source_ready, parity);
  }

  static __device__ __forceinline__ uint32_t gathered(const bf16* row, uint32_t features) {
    const uint32_t first = features & 0xffff, second = features >> 16;
    return pair(first == kNoFeature ? 0 : row[first], second == kNoFeature ? 0 : row[second]);
  }

  // The norm's factor of each row, 1 / rms. The epilogue warp has the time to compute it for one
  // octet; for more rows the other warps share the work.

  static constexpr bool kSharesFactors = kOctets > 1;
  __device__ __forceinline__ void compute_shared_factors(float squares[]) {
    const NormFactors<LinearArgs> norm = {args, lane};
    for (int row = warp; row < args.rows; row += kWarps) {
      if (row != warp) norm.load(row, 0, squares);
      const float factor = norm.of(row, squares);
      if (lane == 0) norm_factors[row] = factor;
    }
  }

  // For rows 2t and 2t + 1.
  __device__ __forceinline__ void compute_factors(float factor[2]) const {
    const NormFactors<LinearArgs> norm = {args, lane};
    constexpr int kAtOnce = kFew ? 2 : 4;
    for (int first = 0; first < args.rows; first += kAtOnce) {
      float squares[kAtOnce][NormFactors<LinearArgs>::kAtOnce];
#pragma unroll
      for (int r = 0; r < kAtOnce; r++) norm.load(first + r, 0, squares[r]);
#pragma unroll
      for (int r = 0; r < kAtOnce; r++) {
        const float found = norm.of(first + r, squares[r]);
        if ((first + r) / 2 == t) factor[r % 2] = found;
      }
    }
  }

  __device__ __forceinline__ const uint4* x_vectors(int row) const {
    return reinterpret_cast<const uint4*>(args.x + static_cast<int64_t>(row) * args.k +
                                          first_unit * Weight::kUnitK);
  }

  __device__ __forceinline__ const bf16* x_row(int row) const {
    return args.x + static_cast<int64_t>(row) * args.k;
  }

  // Loads x where it is not staged; zeros beyond the last feature.
  __device__ __forceinline__ uint4 load_x(int slice, int c) const {
    const int row = kSpreads ? staged_row : 8 * c + g < args.rows ? 8 * c + g : 0;
    const int k = 32 * slice + 8 * t;
    if constexpr (kSliceGroups == 2)
      return load_halves<Weight>(x_row(row), args.features, 32 * slice, t, args.k);
    if (k >= args.k) return {0, 0, 0, 0};
    if constexpr (Weight::kPermuted) return load_eight<Weight>(x_row(row), args.features, k);
    const bf16* from = args.x + static_cast<int64_t>(row) * args.k + k;
    return *reinterpret_cast<const uint4*>(from);
  }

  __device__ __forceinline__ void load_units(int first,
                                             uint4 x[kUnitsAhead][kUnitSlices]) const {
#pragma unroll
    for (int i = 0; i < kUnitsAhead; i++)
      if (i == 0 || first + i < end_unit)
#pragma unroll
        for (int slice = 0; slice < kUnitSlices; slice++)
          x[i][slice] = load_x((first + i) * kUnitSlices + slice, 0);
  }

  __device__ __forceinline__ float4* partial_sums_of(int number, int from_warp) const {
    return partial_sums + ((number % kBuffers * kWarps + from_warp) * kTiles * kOctets) * 32 + lane;
  }

  __device__ __forceinline__ void store_partial_sums(const Sums sum, int number) {
    barrier_wait(sums_empty + number % kBuffers, number / kBuffers % 2 ^ 1);
    float4* to = partial_sums_of(number, warp);
#pragma unroll
    for (int r = 0; r < kTiles; r++)
#pragma unroll
      for (int c = 0; c < kOctets; c++)
        to[(r * kOctets + c) * 32] =
            float4{sum[r][c][0], sum[r][c][1], sum[r][c][2], sum[r][c][3]};
    sync_warp();
    if (lane == 0) barrier_arrive(sums_full + number % kBuffers);
  }

  // The epilogue warp.

  __device__ __forceinline__ void run_epilogue() {
    if (lane == 0)
      for (int i = 0; i < kBuffers; i++) {
        barrier_init(sums_full + i, kWarps);
        barrier_init(sums_empty + i, 1);
      }
    if (kGathers && lane == 0) barrier_init(source_ready, kWarps);
    fence_barrier_init();
    sync_block();
    const int prefetch_at = prefetch_item();
    wait_for_predecessor();  // which writes the inputs, and may still read y
    float factor[kOctets][2] = {};  // 1 / rms of rows 8c + 2t and 8c + 2t + 1
    if (kNorm && !kSharesFactors) compute_factors(factor[0]);
    const Output output = {args, g, t};
    Best best[kOctets][2];
    int number = 0;
    for (int item = first_item; item < n_items; item += item_step, number++) {
      if (number == prefetch_at) issue_prefetch();
      typename Output::EpilogueInputs inputs[kTiles][kOctets];
#pragma unroll
      for (int r = 0; r < kTiles; r++)
#pragma unroll
        for (int c = 0; c < kOctets; c++)
          inputs[r][c] = output.load_epilogue_inputs(item * kTiles + r, c);
      barrier_wait(sums_full + number % kBuffers, number / kBuffers % 2);
      if (kNorm && kSharesFactors && number == 0)
#pragma unroll
        for (int c = 0; c < kOctets; c++)
          for (int i = 0; i < 2; i++) factor[c][i] = norm_factors[8 * c + 2 * t + i];
      float4 sum[kTiles][kOctets];
#pragma unroll
      for (int r = 0; r < kTiles; r++)
#pragma unroll
        for (int c = 0; c < kOctets; c++) sum[r][c] = float4{0, 0, 0, 0};
#pragma unroll 4
      for (int w = 0; w < kWarps; w++) add(sum, partial_sums_of(number, w));
      sync_warp();
      if (lane == 0) barrier_arrive(sums_empty + number % kBuffers);
#pragma unroll
      for (int r = 0; r < kTiles; r++)
#pragma unroll
        for (int c = 0; c < kOctets; c++)
          output.write_tile(sum[r][c], item * kTiles + r, c, inputs[r][c], factor[c], best[c]);
    }
    if (kEpilogue == kLogits && args.best_value != nullptr) write_best(best);
  }

  // Memory is idle between the last loads of one kernel and the first of the next: tiles of a later
  // matrix product's weight are prefetched into L2 then. They are not the tiles that it issues
  // first, or memory would be idle at that time, but some that it reads later.

  __device__ __forceinline__ int prefetch_item() const {
    if (args.prefetch_weight == nullptr) return n_items;  // none
    return max(0, (n_items - 1 - first_item) / item_step - args.prefetch_items_left);
  }

  __device__ __forceinline__ void issue_prefetch() const {
    int tile = args.prefetch_first + first_item;
#pragma unroll 1
    for (int i = 0; i < args.prefetch_tiles && tile < args.prefetch_n_tiles;
         i++, tile += args.prefetch_step)
      prefetch(args.prefetch_weight + static_cast<int64_t>(tile) * args.prefetch_stride,
               args.prefetch_tile_bytes, lane);
  }

  __device__ __forceinline__ void add(float4 sum[kTiles][kOctets], const float4* part_sums) {
#pragma unroll
    for (int r = 0; r < kTiles; r++)
#pragma unroll
      for (int c = 0; c < kOctets; c++) {
        const float4 more = part_sums[(r * kOctets + c) * 32];
        sum[r][c].x += more.x, sum[r][c].y += more.y;
        sum[r][c].z += more.z, sum[r][c].w += more.w;
      }
  }

  __device__ __forceinline__ void write_best(Best best[kOctets][2]) {
#pragma unroll
    for (int c = 0; c < kOctets; c++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const Best b = Output::best_of_lanes(best[c][i]);
        const int row = 8 * c + 2 * t + i;
        if (g == 0 && row < args.rows) {
          args.best_value[row * gridDim.x + blockIdx.x] = b.value;
          args.best_index[row * gridDim.x + blockIdx.x] = b.index;
        }
      }
  }
};

template <class Weight, int kWarps, int kTiles, int kOctets, bool kFew, Epilogue kEpilogue,
          bool kNorm, Input kInput>
__device__ __forceinline__ void linear(const LinearArgs& args, const TensorMap* map = nullptr) {
  Linear<Weight, kWarps, kTiles, kOctets, kFew, kEpilogue, kNorm, kInput>(
      args, map, threadIdx.x, blockIdx.x, gridDim.x)
      .run();
}

template <class Weight, int kWarps, int kTiles, int kOctets, bool kFew, Epilogue kEpilogue,
          bool kNorm, Input kInput>
__device__ __forceinline__ void linear(const PlainRowsArgs& args) {
  if (threadIdx.x == 0) prefetch_map(&args.map);
  linear<Weight, kWarps, kTiles, kOctets, kFew, kEpilogue, kNorm, kInput>(args.linear, &args.map);
}
