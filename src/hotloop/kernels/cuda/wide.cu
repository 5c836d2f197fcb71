// GEMMs with up to 64 rows: y = epilogue(x @ weight.T), with the bits that linear.cu gives each row.
//
// A block computes a group of tiles for all rows. It walks along K through a ring of stages in
// shared memory. A stage holds the weights of the group's tiles for a unit of K (two units with
// bfloat16) and the same input features of x, so x is read once for the whole group. Two warpgroups
// dequantize the weights into registers, each once, and multiply them by all rows with wgmma, which
// reads x from shared memory. The warps of a third warpgroup issue the copies into the ring.
//
// x comes to it in one of two ways. With kDirect the kernel that computes x stores it in that layout
// (operand.cuh), once for all blocks: scaled as the weight type needs it, with the features in the
// order of the weights' fragments, and permuted against bank conflicts. So one bulk copy loads a
// stage's part of x. The warps that multiply compute the factors of an RMS norm while they wait for x,
// and the sums of x for the zero points by wgmma with weights of one. Without kDirect a kernel between
// the two (Staging) stores x so, and computes sums and factors once for all blocks; that takes longer
// unless a block needs many sums (tuning.py). If the kernel that computes x cannot store it (x is a
// sum over ranks or over products, columns are gathered, K has padding, or zero points need a sum of x
// over a whole part of K), Staging stores it too, with kDirect without sums and factors. A block of
// Staging is small enough to be resident on a multiprocessor together with a block of Wide.
//
// Bits: linear.cu divides K into as many parts as it has warps, sums each in one chain (with groups in
// one or two chains per group, and with a sum for each strand) and adds the parts in order. Here a
// warp walks through the parts one after the other and adds each as it ends, and tensor cores of a
// warpgroup round as those of a warp do. So a row's bits depend on neither the number of rows nor
// which kernel computed it.
//
// Split K: where there are fewer groups of tiles than multiprocessors, several blocks share a
// group, each with some whole parts of K. They store the parts' sums in a workspace, and of the
// warps with the same tiles the last to arrive adds them in order and applies the epilogue. With eight
// octets that warp would read as many bytes as a third of the group's weights: so with four octets or
// more these warps wait for each other, and each adds the sums of some of the octets.
//
// Letters and fragments: see linear.cuh. An item of work is a group of tiles and a share of K; a
// line is 64 input features of a row of x.

#include "linear.cuh"

struct StagingArgs {
  const bf16* x;         // [M, K]
  const float* squares;  // [M, tiles of K]: partial sums of the norm's input's squares, or null
  uint8_t* operand;      // [parts, stages of a part, StageOf::kBytes], then with a norm float [M]
  int rows, k, units;
  int parts, part_stages;
  float eps;             // of the norm
  const int* features;   // see LinearArgs
};

// x in a stage of the ring: lines of x, then without kDirect sums of x. kPairs: a stage has two units
// of a weight with groups, whose copies are long then; a copy of 1 KB occupies a warp nearly as long as
// one of 2 KB.
template <class Weight, int kOctets, bool kPairs, bool kDirect>
struct StageOf {
  static constexpr int kRows = 8 * kOctets;
  static constexpr int kUnitSlices = Weight::kUnitK / 32;
  static constexpr bool kGroups = Weight::kGroupSlices > 0;
  static constexpr int kGroupSlices = kGroups ? Weight::kGroupSlices : kUnitSlices;
  static constexpr int kSliceGroups = Weight::kSliceGroups;
  static constexpr int kUnitGroups = kUnitSlices / kGroupSlices * kSliceGroups;
  static constexpr int kStrands = Weight::kStrands;
  static constexpr bool kSums = Weight::kNeedsSums && !kDirect;  // of x
  static_assert(!kDirect || kGroups || !Weight::kNeedsSums, "a sum over a whole part");

  static constexpr int kLineK = 64, kLineBytes = 128, kLineSlices = 2;
  static constexpr int kUnits =  // of a tile
      kPairs ? 2 : Weight::kUnitK < kLineK ? kLineK / Weight::kUnitK : 1;
  static constexpr int kLines = kUnits * Weight::kUnitK / kLineK;  // of a row
  static_assert(!kPairs || (kGroups && kLowBytes<Weight> == 0), "units that lie one behind the other");
  static_assert(kUnits == 1 || kPairs || (kUnits == 2 && kUnitSlices == 1 && !kSums));
  static constexpr int kSumGroups = !kSums ? 0 : kGroups ? kUnits * kUnitGroups : 1;
  static constexpr int kLinesBytes = kLines * kRows * kLineBytes;
  static constexpr int kBytes =
      kLinesBytes + static_cast<int>(sizeof(float)) * kRows * kSumGroups;
};

// Stores x as the operand of Wide. A warp has an octet of rows, and a stage (with kPairs one of its
// units), or a whole part of K where its sum is one. With a norm the last blocks along x compute the
// factors of its rows.
template <class Weight, int kOctets, bool kPairs, bool kDirect>
struct Staging : StageOf<Weight, kOctets, kPairs, kDirect> {
  using S = StageOf<Weight, kOctets, kPairs, kDirect>;
  static constexpr int kPieces = kPairs ? 2 : 1;  // of a stage
  static constexpr int kPieceSlices = S::kLines * S::kLineSlices / kPieces;

  const StagingArgs& args;
  const int lane, octet, g, t;

  __device__ __forceinline__ Staging(const StagingArgs& a, int thread, int block)
      : args(a), lane(thread % 32), octet(block * (blockDim.x / 32) + thread / 32), g(lane / 4),
        t(lane % 4) {}

  __device__ __forceinline__ void run() const {
    launch_dependents();
    if (!kDirect && args.squares != nullptr && blockIdx.x == gridDim.x - 1) {
      wait_for_predecessor();
      store_factors();
      return;
    }
    const int part = blockIdx.y, first_unit = args.units * part / args.parts;
    const int end_unit = args.units * (part + 1) / args.parts;
    constexpr bool whole_parts = S::kSums && !S::kGroups;
    const int first = whole_parts ? 0 : blockIdx.x;
    const int end = whole_parts ? args.part_stages : first + 1;
    wait_for_predecessor();
    float x_total[2][4] = {};
    for (int i = first; i < end; i++) {
      const int unit = first_unit + i * S::kUnits / kPieces, stage = i / kPieces;
      if (unit >= end_unit) return;
      uint8_t* to = args.operand + static_cast<int64_t>(part * args.part_stages + stage) * S::kBytes;
      store_piece(unit, i % kPieces, end_unit, to, x_total);
    }
  }

  __device__ __forceinline__ void store_factors() const {
    const NormFactors<StagingArgs> norm = {args, lane};
    float* factors = reinterpret_cast<float*>(
        args.operand + static_cast<int64_t>(args.parts) * args.part_stages * S::kBytes);
    for (int row = blockIdx.y * kOctets + octet; row < args.rows; row += gridDim.y * kOctets) {
      float squares[NormFactors<StagingArgs>::kAtOnce];
      norm.load(row, 0, squares);
      const float factor = norm.of(row, squares);
      if (lane == 0) factors[row] = factor;
    }
  }

  // Beyond the last row and feature, and the last unit of the part, x is zeros, because padding of
  // the weights need not be.
  __device__ __forceinline__ void store_piece(int unit, int piece, int end_unit, uint8_t* to,
                                              float x_total[2][4]) const {
    const int row = 8 * octet + g, k = unit * Weight::kUnitK + 8 * t;
    const int end_k = min(end_unit * Weight::kUnitK, args.k);
    const bf16* from = args.x + static_cast<int64_t>(row) * args.k + k;
    uint4 x[kPieceSlices];
#pragma unroll
    for (int i = 0; i < kPieceSlices; i++)
      if constexpr (S::kSliceGroups == 2) {
        x[i] = {0, 0, 0, 0};
        if (row < args.rows)
          x[i] = load_halves<Weight>(from - k, args.features, k - 8 * t + 32 * i, t, end_k);
      } else if constexpr (Weight::kPermuted) {
        x[i] = row < args.rows && k + 32 * i < end_k
                   ? load_eight<Weight>(from - k, args.features, k + 32 * i)
                   : uint4{0, 0, 0, 0};
      } else {
        x[i] = row < args.rows && k + 32 * i < end_k
                   ? *reinterpret_cast<const uint4*>(from + 32 * i)
                   : uint4{0, 0, 0, 0};
      }
#pragma unroll
    for (int i = 0; i < kPieceSlices; i++) {
      const uint4 operand = scale_input<Weight>(x[i]);
      const int slice = piece * kPieceSlices + i;
      uint8_t* line = to + (slice / S::kLineSlices * S::kRows + row) * S::kLineBytes;
      store_slice(line, slice % S::kLineSlices, operand);
      if constexpr (S::kSums) {
        const bool begins = S::kGroups && i % S::kGroupSlices == 0;
        const bool ends = S::kGroups ? i % S::kGroupSlices == S::kGroupSlices - 1
                                     : i == S::kUnitSlices - 1 && unit + 1 == end_unit;
        if (begins) clear(x_total);
        add_x<Weight>(x_total, operand);
        if (ends && g == 0) {
          const int group = S::kGroups ? slice / S::kGroupSlices * S::kSliceGroups : 0;
          float* sums = reinterpret_cast<float*>(to + S::kLinesBytes) + group * S::kRows;
#pragma unroll
          for (int half = 0; half < S::kSliceGroups; half++)
            *reinterpret_cast<float2*>(sums + half * S::kRows + 8 * octet + 2 * t) =
                x_sum_of<Weight>(x_total, half);
        }
      }
    }
  }

  // A lane has features 8t to 8t + 7 of a slice; see operand.cuh.
  __device__ __forceinline__ void store_slice(uint8_t* line, int slice, uint4 x) const {
    uint32_t* words = reinterpret_cast<uint32_t*>(line) + t;
    words[4 * ((4 * slice) ^ g)] = x.x;
    words[4 * ((4 * slice + 1) ^ g)] = x.y;
    words[4 * ((4 * slice + 2) ^ g)] = x.z;
    words[4 * ((4 * slice + 3) ^ g)] = x.w;
  }

  static __device__ __forceinline__ void clear(float total[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) total[0][i] = total[1][i] = 0;
  }
};

template <class Weight, int kOctets, bool kPairs, bool kDirect>
__device__ __forceinline__ void stage_x(const StagingArgs& args) {
  Staging<Weight, kOctets, kPairs, kDirect>(args, threadIdx.x, blockIdx.z).run();
}

// kTiles: tiles of each warp that multiplies. kOctets: octets of x. kHasNext: the result, or with a
// norm epilogue its prescaled input, is stored as the operand of the next matrix product. kShares:
// blocks share K.
template <class Weight, int kTiles, int kOctets, Epilogue kEpilogue, bool kNorm, bool kHasNext,
          bool kShares, bool kPairs, bool kDirect>
struct Wide : StageOf<Weight, kOctets, kPairs, kDirect> {
  using S = StageOf<Weight, kOctets, kPairs, kDirect>;
  using S::kGroups, S::kGroupSlices, S::kLineBytes, S::kLineSlices, S::kRows, S::kSums, S::kUnits;
  using S::kSliceGroups, S::kStrands, S::kUnitGroups, S::kUnitSlices;

  static constexpr int kWarps = 8;    // that multiply: two warpgroups
  static constexpr int kBoxTiles = 2;  // of a copy of plain rows
  static constexpr int kLoaders = 4;  // issuing a bulk copy takes a warp 70 clock cycles or more
  static constexpr int kGroupTiles = kWarps * kTiles;
  static constexpr int kTileBytes = kUnits * (Weight::kUnitBytes + kLowBytes<Weight>);
  static_assert(kUnits == 1 || kLowBytes<Weight> == 0);
  static constexpr int kStageBytes = (S::kBytes + kGroupTiles * kTileBytes + 1023) / 1024 * 1024;

  // Registers of a thread, in multiples of eight, of 504 for the three warpgroups.
  static constexpr int kMultiplyRegisters = 232, kLoadRegisters = 40;

  static constexpr bool kSharesSums = kShares && kOctets >= 4;

  static constexpr bool kSumsX = Weight::kNeedsSums && kDirect;
  static constexpr bool kComputesFactors = kNorm && kDirect;  // of the norm

  using Output = ::Output<Weight, kEpilogue, kNorm, kHasNext>;

  struct Item {
    int group, split;
  };

  const LinearArgs& args;
  const TensorMap* const map;  // of plain rows
  const int lane, warp, g, t;
  const int groups;  // of tiles
  Item step;         // from one item of a block to its next
  const Output output;

  // Shared memory.
  uint8_t* ring;          // [stages][kStageBytes]
  float4* totals;         // of this lane: [kTiles][kOctets][32]; not with split K
  float* best_value;      // of this warp, with kLogits: [kRows]
  int* best_index;
  float* factors;         // with kComputesFactors: [kRows], 1 / rms of each row
  uint64_t* filled;       // [stages]: barrier, weights and x have arrived
  uint64_t* emptied;      // [stages]: barrier, every warp has read the stage
  uint64_t* factors_ready;  // barrier, with kComputesFactors
  int* first_unit;        // [parts + 1]: of each part, and one past the last one
  int* first_part;        // [splits + 1]: of each split, and one past the last one

  __device__ __forceinline__ Wide(const LinearArgs& a, const TensorMap* m, int thread)
      : args(a), map(m), lane(thread % 32), warp(thread / 32), g(lane / 4), t(lane % 4),
        groups((a.tiles + kGroupTiles - 1) / kGroupTiles), output{a, g, t} {
    const int blocks = gridDim.x;
    step = {blocks / a.splits, blocks % a.splits};
    uint8_t* memory = shared_memory();
    ring = memory;
    memory += a.stages * kStageBytes;
    totals = reinterpret_cast<float4*>(memory) + warp * kTiles * kOctets * 32 + lane;
    if (!kShares) memory += sizeof(float4) * kWarps * kTiles * kOctets * 32;
    best_value = reinterpret_cast<float*>(memory) + warp * kRows;
    best_index = reinterpret_cast<int*>(memory) + (kWarps + warp) * kRows;
    if (kEpilogue == kLogits) memory += 2 * sizeof(float) * kWarps * kRows;
    factors = reinterpret_cast<float*>(memory);
    if (kComputesFactors) memory += sizeof(float) * kRows;
    filled = reinterpret_cast<uint64_t*>(memory);
    emptied = filled + a.stages;
    factors_ready = emptied + a.stages;
    first_unit = reinterpret_cast<int*>(factors_ready + (kComputesFactors ? 1 : 0));
    first_part = first_unit + a.parts + 1;
  }

  // Each role has its own variables. Shared ones would not fit the few registers of the warps that
  // load, so the compiler would spill them to memory in all warps.
  static __device__ __forceinline__ void run(const LinearArgs& args, const TensorMap* map) {
    if (threadIdx.x < 32 * kWarps) {
      take_registers<kMultiplyRegisters>();
      Wide(args, map, threadIdx.x).multiply();
    } else {
      return_registers<kLoadRegisters>();
      Wide(args, map, threadIdx.x).load(threadIdx.x / 32 - kWarps);
    }
  }

  // The division of work.

  // Divides K, once for all warps.
  __device__ __forceinline__ void divide_work() const {
    for (int i = lane; i <= args.parts; i += 32) first_unit[i] = args.units * i / args.parts;
    for (int i = lane; i <= args.splits; i += 32) first_part[i] = args.parts * i / args.splits;
  }

  __device__ __forceinline__ Item first_item() const {
    return {static_cast<int>(blockIdx.x) / args.splits, static_cast<int>(blockIdx.x) % args.splits};
  }
  __device__ __forceinline__ bool exists(const Item& item) const { return item.group < groups; }
  __device__ __forceinline__ void advance(Item& item) const {
    item.group += step.group, item.split += step.split;
    if (item.split >= args.splits) item.split -= args.splits, item.group++;
  }

  // A stage of a block's work.
  struct Cursor {
    Item item;
    int part, end_part, unit, end_unit;
    int x;  // stage of the operand
  };

  __device__ __forceinline__ Cursor first_stage() const {
    const Item item = first_item();
    Cursor at = {item, first_part[item.split] - 1, first_part[item.split + 1], 0, 0, 0};
    if (exists(item)) begin_part(at);
    return at;
  }

  __device__ __forceinline__ bool exists(const Cursor& at) const { return exists(at.item); }

  __device__ __forceinline__ void advance(Cursor& at) const {
    at.unit += kUnits, at.x++;
    if (at.unit >= at.end_unit) begin_part(at);
  }

  // Advances to the next part that has units.
  __device__ __forceinline__ void begin_part(Cursor& at) const {
    do {
      if (++at.part == at.end_part) {
        advance(at.item);
        if (!exists(at)) return;
        at.part = first_part[at.item.split], at.end_part = first_part[at.item.split + 1];
      }
      at.end_unit = first_unit[at.part + 1];
      at.unit = first_unit[at.part];
      at.x = at.part * args.part_stages;
    } while (at.unit == at.end_unit);
  }

  // A stage of the ring, and the parity of its current round.
  struct Stage {
    int index = 0;
    uint32_t parity = 0;
  };

  __device__ __forceinline__ void advance(Stage& stage) const {
    if (++stage.index == args.stages) stage = {0, stage.parity ^ 1};
  }

  __device__ __forceinline__ uint8_t* x_of(int stage) const { return ring + stage * kStageBytes; }
  __device__ __forceinline__ const float* x_sums_of(int stage) const {
    return reinterpret_cast<const float*>(x_of(stage) + S::kLinesBytes);
  }
  __device__ __forceinline__ uint8_t* weights_of(int stage) const {
    return x_of(stage) + S::kBytes;
  }

  // The warps that load share the tiles of a stage; the last one also has x. The ring's first weights
  // are issued before the kernel that stores x has ended: all of them if the step is bound by memory,
  // and otherwise few, since memory serves copies in about the order in which they are issued.

  __device__ __forceinline__ void load(int loader) const {
    if (loader == 0 && lane == 0) {
      for (int i = 0; i < args.stages; i++) {
        barrier_init(filled + i, (kLoaders + 1) * kCopyArrivals);
        barrier_init(emptied + i, kWarps);
      }
      if (kComputesFactors) barrier_init(factors_ready, kWarps);
    }
    fence_barrier_init();
    if (loader == 1) divide_work();
    sync_block();  // barriers and tables are ready
    const bool has_x = loader == kLoaders - 1;
    const uint64_t policy = evict_first_policy();
    Cursor at = first_stage();
    int filling = 0;  // stages whose weights are issued; in the ring's first round
    for (; filling < args.early_stages && exists(at); filling++, advance(at))
      copy_weights(at, filling, loader, policy);
    launch_dependents();
    wait_for_predecessor();
    if (has_x) {
      Cursor early = first_stage();
      for (int i = 0; i < filling; i++, advance(early)) copy_x(early, i);
    }
    Stage stage;
    for (; exists(at); advance(at)) {
      const bool first_round = filling < args.stages;
      const int to = first_round ? filling++ : stage.index;
      if (!first_round) {
        barrier_wait(emptied + stage.index, stage.parity);
        advance(stage);
      }
      copy_weights(at, to, loader, policy);
      if (has_x) copy_x(at, to);
    }
  }

  __device__ __forceinline__ void copy_weights(const Cursor& at, int stage, int loader,
                                               uint64_t policy) const {
    const int tile = at.item.group * kGroupTiles, last = min(kGroupTiles, args.tiles - tile);
    if constexpr (Weight::kPlainRows)
      copy_boxes(at.unit, tile, last, stage, loader, policy);
    else
      copy_tiles(at, tile, last, stage, loader, policy);
  }

  // Copies every kLoaders-th pair of a group's tiles.
  __device__ __forceinline__ void copy_boxes(int unit, int tile, int last, int stage, int loader,
                                             uint64_t policy) const {
    constexpr int kStep = kLoaders * kBoxTiles, kBytes = kBoxTiles * kTileBytes;
    const int first = loader * kBoxTiles;
    copy_begin(filled + stage, max(0, (last - first + kStep - 1) / kStep) * kBytes, lane);
#pragma unroll 1
    for (int i = first; i < last; i += kStep)
      copy_box(weights_of(stage) + i * kTileBytes, map, 32 * unit, tile + i, filled + stage, policy,
               lane);
    copy_end(filled + stage, lane);
  }

  // Copies every kLoaders-th tile.
  __device__ __forceinline__ void copy_tiles(const Cursor& at, int tile, int last, int stage,
                                             int loader, uint64_t policy) const {
    const int tiles = max(0, (last - loader + kLoaders - 1) / kLoaders);
    const int bytes = min(kUnits, at.end_unit - at.unit) * Weight::kUnitBytes;
    const int64_t stride = args.tile_stride;
    const uint8_t* from = args.weight + (tile + loader) * stride + at.unit * Weight::kUnitBytes;
    uint8_t* to = weights_of(stage) + loader * kTileBytes;
    copy_begin(filled + stage, tiles * (bytes + kLowBytes<Weight>), lane);
#pragma unroll 1
    for (int i = 0; i < tiles; i++) {
      copy(to, from, bytes, filled + stage, policy, lane);
      if constexpr (kLowBytes<Weight> > 0)
        copy(to + Weight::kUnitBytes, from + low_plane<Weight>(args.units, at.unit),
             kLowBytes<Weight>, filled + stage, policy, lane);
      to += kLoaders * kTileBytes, from += kLoaders * stride;
    }
    copy_end(filled + stage, lane);
  }

  __device__ __forceinline__ void copy_x(const Cursor& at, int stage) const {
    copy_begin(filled + stage, S::kBytes, lane);
    copy(x_of(stage), args.operand + static_cast<int64_t>(at.x) * S::kBytes, S::kBytes,
         filled + stage, keep_policy(), lane);
    copy_end(filled + stage, lane);
  }

  // The warps that multiply.

  using Sums = float[kTiles][kOctets][4];

  __device__ __forceinline__ void multiply() const {
    sync_block();
    wait_for_predecessor();  // for the epilogue's inputs, and since y may still be read
    if (kComputesFactors) compute_factors();
    if (kEpilogue == kLogits) begin_best();
    Stage stage;
    for (Item item = first_item(); exists(item); advance(item)) {
      const int tile = item.group * kGroupTiles + warp * kTiles;
      const int begin = first_part[item.split], end = first_part[item.split + 1];
      for (int part = begin; part < end; part++) {
        Sums sums[kStrands] = {};
        multiply_part(stage, first_unit[part], first_unit[part + 1], sums);
        add_strands(sums);
        if constexpr (kShares)
          store_part(tile, part, sums[0]);
        else
          add_part(sums[0], part == 0);
      }
      Share share = {0, 1};
      uint32_t* counter = args.counters + item.group * kWarps + warp;
      // The blocks of a group are all running: there are no more blocks than multiprocessors.
      if constexpr (kSharesSums)
        share = share_among(counter, args.splits, item.split, lane);
      else if constexpr (kShares)
        if (!is_last_warp(counter, args.splits, lane)) continue;
      run_epilogue(tile, share);
      if constexpr (kSharesSums) leave_share(counter, args.splits, lane);
    }
    if (kEpilogue == kLogits && args.best_value != nullptr) end_best();
  }

  // The norm's factors of every kWarps-th row, with loads of all of them in flight. A lane's sums are
  // those of NormFactors.
  __device__ __forceinline__ void compute_factors() const {
    static_assert(kRows / kWarps == kOctets);
    constexpr int kLoads = 8;  // of a row
    const int parts = (args.k + kTileRows - 1) / kTileRows;
    const float* from = args.squares + warp * parts + lane;
    float sums[kOctets] = {};
#pragma unroll 1
    for (int part = lane; part - lane < parts; part += 32 * kLoads, from += 32 * kLoads) {
      float squares[kOctets][kLoads] = {};
#pragma unroll
      for (int i = 0; i < kOctets; i++)
        if (warp + i * kWarps < args.rows)
#pragma unroll
          for (int j = 0; j < kLoads; j++)
            if (part + 32 * j < parts) squares[i][j] = (from + i * kWarps * parts)[32 * j];
#pragma unroll
      for (int i = 0; i < kOctets; i++)
#pragma unroll
        for (int j = 0; j < kLoads; j++) sums[i] += squares[i][j];
    }
    float sum = 0;  // of the row that this lane finishes
#pragma unroll
    for (int i = 0; i < kOctets; i++) {
      const float of_row = warp_sum(sums[i]);
      if (lane == i) sum = of_row;
    }
    const int row = warp + lane * kWarps;
    if (row < args.rows) factors[row] = rsqrtf(sum / args.k + args.eps);
    sync_warp();
    if (lane == 0) barrier_arrive(factors_ready);
  }

  __device__ __forceinline__ void multiply_part(Stage& stage, int unit, int end_unit,
                                                Sums sums[kStrands]) const {
    if (unit >= end_unit) return;
    const float* x_sums;
#pragma unroll 1
    while (true) {
      barrier_wait(filled + stage.index, stage.parity);
      const uint8_t* weights = weights_of(stage.index) + warp * kTiles * kTileBytes;
      const uint64_t x = rows_operand(x_of(stage.index));
      x_sums = x_sums_of(stage.index) + 2 * t;
      if constexpr (kGroups) {
#pragma unroll 1
        for (int i = 0; i < min(kUnits, end_unit - unit); i++)
#pragma unroll
          for (int group = 0; group < kUnitGroups; group += kSliceGroups)
            multiply_groups(weights + i * Weight::kUnitBytes, slice_of(x, i * kUnitSlices),
                            x_sums + (i * kUnitGroups + group) * kRows, group,
                            sums[group / kSliceGroups]);
      } else {
#pragma unroll
        for (int r = 0; r < kTiles; r++)
          multiply_units(weights + r * kTileBytes, x, end_unit - unit, sums[0][r]);
      }
      unit += kUnits;
      if (unit >= end_unit) break;
      release(stage);
    }
    if constexpr (kSums && !kGroups)
#pragma unroll
      for (int c = 0; c < kOctets; c++) {
        const float2 x_sum = *reinterpret_cast<const float2*>(x_sums + 8 * c);
#pragma unroll
        for (int r = 0; r < kTiles; r++) subtract_zero_point<Weight>(sums[0][r][c], x_sum);
      }
    release(stage);
  }

  // Adds the sums of strands as linear.cu does.
  static __device__ __forceinline__ void add_strands(Sums sums[kStrands]) {
#pragma unroll
    for (int step = 1; step < kStrands; step *= 2)
#pragma unroll
      for (int j = 0; j < kStrands; j += 2 * step)
#pragma unroll
        for (int r = 0; r < kTiles; r++)
#pragma unroll
          for (int c = 0; c < kOctets; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[j][r][c][i] += sums[j + step][r][c][i];
  }

  __device__ __forceinline__ void release(Stage& stage) const {
    sync_warp();  // every lane has read the stage
    if (lane == 0) barrier_arrive(emptied + stage.index);
    advance(stage);
  }

  // A slice of x: its operand for the first mma; that for the second lies 16 columns further on.
  static __device__ __forceinline__ uint64_t slice_of(uint64_t x, int slice) {
    return x + slice / kLineSlices * (kRows * kLineBytes / 16) + slice % kLineSlices * 4;
  }

  // A group of a unit, or the two groups of a slice, from an even group on; summed in the accumulators
  // of linear.cu. Several tiles' products in flight, or those of two halves of the rows, would gain
  // nothing: while one warpgroup waits, the other one works.
  __device__ __forceinline__ void multiply_groups(const uint8_t* weights, uint64_t x,
                                                  const float* staged_sums, int group,
                                                  Sums sums) const {
    const int first = group / kSliceGroups * kGroupSlices;  // slice
    uint32_t ones[4];  // wgmma may read them until it is waited for
    float x_total[2][kOctets][4];
    if constexpr (kSumsX) begin_x_sums(x, first, ones, x_total);
    float2 x_sums[kOctets][kSliceGroups] = {};
#pragma unroll
    for (int r = 0; r < kTiles; r++) {
      const uint8_t* unit = weights + r * kTileBytes;
      uint32_t a[kGroupSlices][Weight::kTerms][2][4];
#pragma unroll
      for (int i = 0; i < kGroupSlices; i++)
        operands_of<Weight>(unit, Weight::kUnitBytes, first + i, lane, a[i]);
      if constexpr (kSumsX)
        if (r == 0) end_x_sums(x_total, x_sums);
      float even[kOctets][4], odd[kOctets][4];
      warpgroup_begin();
#pragma unroll
      for (int i = 0; i < kGroupSlices; i++) {
        const uint64_t b = slice_of(x, first + i);
#pragma unroll
        for (int term = 0; term < Weight::kTerms; term++)
          if constexpr (Weight::kOneChain) {
            if (i == 0 && term == 0)
              warpgroup_mma<kOctets, false>(even, a[i][term][0], b);
            else
              warpgroup_mma<kOctets, true>(even, a[i][term][0], b);
            warpgroup_mma<kOctets, true>(even, a[i][term][1], b + 2);
          } else if (i == 0 && term == 0) {
            warpgroup_mma<kOctets, false>(even, a[i][term][0], b);
            warpgroup_mma<kOctets, false>(odd, a[i][term][1], b + 2);
          } else {
            warpgroup_mma<kOctets, true>(even, a[i][term][0], b);
            warpgroup_mma<kOctets, true>(odd, a[i][term][1], b + 2);
          }
      }
      warpgroup_commit();
      warpgroup_wait();
      warpgroup_result<kOctets>(even);
      if constexpr (!Weight::kOneChain) warpgroup_result<kOctets>(odd);
#pragma unroll
      for (int c = 0; c < kOctets; c++) {
        if constexpr (kSums)
#pragma unroll
          for (int half = 0; half < kSliceGroups; half++)
            x_sums[c][half] = *reinterpret_cast<const float2*>(staged_sums + half * kRows + 8 * c);
        add_groups<Weight>(sums[r][c], even[c], odd[c], x_sums[c], unit, group, g);
      }
    }
  }

  // Sums x over the slices of a group, as add_x does: every row of the result is the sum. The first
  // tile's weights are dequantized meanwhile.
  static __device__ __forceinline__ void begin_x_sums(uint64_t x, int first, uint32_t ones[4],
                                                      float x_total[2][kOctets][4]) {
    ones[0] = ones[1] = Weight::one(0), ones[2] = ones[3] = Weight::one(1);
    warpgroup_begin();
#pragma unroll
    for (int i = 0; i < kGroupSlices; i++) {
      const uint64_t b = slice_of(x, first + i);
      if (i == 0) {
        warpgroup_mma<kOctets, false>(x_total[0], ones, b);
        warpgroup_mma<kOctets, false>(x_total[1], ones, b + 2);
      } else {
        warpgroup_mma<kOctets, true>(x_total[0], ones, b);
        warpgroup_mma<kOctets, true>(x_total[1], ones, b + 2);
      }
    }
    warpgroup_commit();
  }

  static __device__ __forceinline__ void end_x_sums(float x_total[2][kOctets][4],
                                                    float2 x_sums[kOctets][kSliceGroups]) {
    warpgroup_wait();
    warpgroup_result<kOctets>(x_total[0]);
    warpgroup_result<kOctets>(x_total[1]);
#pragma unroll
    for (int c = 0; c < kOctets; c++) {
      const float of_rows[2][4] = {{x_total[0][c][0], x_total[0][c][1]},
                                   {x_total[1][c][0], x_total[1][c][1]}};
#pragma unroll
      for (int half = 0; half < kSliceGroups; half++)
        x_sums[c][half] = x_sum_of<Weight>(of_rows, half);
    }
  }

  // The units of a stage, for a weight without groups. Units beyond the end of the part are zeros,
  // here and in x.
  __device__ __forceinline__ void multiply_units(const uint8_t* weights, uint64_t x, int units,
                                                 float sum[kOctets][4]) const {
    constexpr int kSlices = kUnits * kUnitSlices;
    static_assert(Weight::kTerms == 1);
    uint32_t a[kSlices][1][2][4];
#pragma unroll
    for (int i = 0; i < kSlices; i++) {
      const int unit = i / kUnitSlices;
      if constexpr (Weight::kPlainRows)
        Weight::operands(weights + unit * Weight::kRowBytes, kUnits * Weight::kRowBytes, lane, a[i]);
      else
        Weight::operands(weights + unit * Weight::kUnitBytes, i % kUnitSlices, lane, a[i]);
#pragma unroll
      for (int j = 0; j < 8; j++)
        if (unit > 0 && unit >= units) a[i][0][j / 4][j % 4] = 0;
    }
    warpgroup_begin();
#pragma unroll
    for (int i = 0; i < kSlices; i++) {
      warpgroup_mma<kOctets, true>(sum, a[i][0][0], slice_of(x, i));
      warpgroup_mma<kOctets, true>(sum, a[i][0][1], slice_of(x, i) + 2);
    }
    warpgroup_commit();
    warpgroup_wait();
    warpgroup_result<kOctets>(sum);
  }

  // Adds the parts' sums in order; a lane alone reads and writes its own.
  __device__ __forceinline__ void add_part(const Sums sum, bool is_first) const {
#pragma unroll
    for (int r = 0; r < kTiles; r++)
#pragma unroll
      for (int c = 0; c < kOctets; c++) {
        float4* total = totals + (r * kOctets + c) * 32;
        float4 before = {0, 0, 0, 0};
        if (!is_first) before = *total;
        *total = plus(before, float4{sum[r][c][0], sum[r][c][1], sum[r][c][2], sum[r][c][3]});
      }
  }

  static __device__ __forceinline__ float4 plus(float4 a, float4 b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
  }

  // Split K.

  __device__ __forceinline__ float4* part_of(int tile, int part) const {
    return args.partial + ((static_cast<int64_t>(tile) * args.parts + part) * kOctets * 32 + lane);
  }

  __device__ __forceinline__ void store_part(int tile, int part, const Sums sum) const {
#pragma unroll
    for (int r = 0; r < kTiles; r++)
      if (tile + r < args.tiles)
#pragma unroll
        for (int c = 0; c < kOctets; c++)
          part_of(tile + r, part)[32 * c] =
              float4{sum[r][c][0], sum[r][c][1], sum[r][c][2], sum[r][c][3]};
  }

  // Adds the parts of all splits in order, for kCount octets from one on.
  template <int kCount>
  __device__ __forceinline__ void add_parts(int tile, int octet, float4 total[kCount]) const {
    constexpr int kInFlight = 16 / kCount;
    for (int first = 0; first < args.parts; first += kInFlight) {
      float4 more[kInFlight][kCount];
#pragma unroll
      for (int i = 0; i < kInFlight; i++)
        if (first + i < args.parts)
#pragma unroll
          for (int c = 0; c < kCount; c++)
            more[i][c] = load_from_l2(part_of(tile, first + i) + 32 * (octet + c));
#pragma unroll
      for (int i = 0; i < kInFlight; i++)
        if (first + i < args.parts)
#pragma unroll
          for (int c = 0; c < kCount; c++) total[c] = plus(total[c], more[i][c]);
    }
  }

  // The epilogue.

  // Octets whose epilogue is computed together: one hides the latency of the others. Of those that are
  // shared a warp has about two.
  static constexpr int kAtOnce = kSharesSums ? 2 : kOctets < 4 ? kOctets : 4;

  // share: of kAtOnce octets of a tile each.
  __device__ __forceinline__ void run_epilogue(int tile, Share share) const {
    const float* norm_factors = factors;
    if constexpr (kComputesFactors)
      barrier_wait(factors_ready, 0);
    else
      norm_factors = reinterpret_cast<const float*>(
          args.operand + static_cast<int64_t>(args.parts) * args.part_stages * S::kBytes);
#pragma unroll 1
    for (int i = share.first; i < kTiles * kOctets / kAtOnce; i += share.step) {
      const int r = i / (kOctets / kAtOnce), octet = i % (kOctets / kAtOnce) * kAtOnce;
      if (tile + r >= args.tiles) return;
      const typename Output::Next next = output.next_of(tile + r);
      typename Output::EpilogueInputs inputs[kAtOnce];
      float2 factor[kAtOnce] = {};
#pragma unroll
      for (int c = 0; c < kAtOnce; c++) {
        inputs[c] = output.load_epilogue_inputs(tile + r, octet + c);
        const float* at = norm_factors + 8 * (octet + c) + 2 * t;
        if (kNorm) factor[c] = *reinterpret_cast<const float2*>(at);
      }
      float4 total[kAtOnce] = {};
      if constexpr (kShares)
        add_parts<kAtOnce>(tile + r, octet, total);
      else
#pragma unroll
        for (int c = 0; c < kAtOnce; c++) total[c] = totals[(r * kOctets + octet + c) * 32];
#pragma unroll
      for (int c = 0; c < kAtOnce; c++) {
        const float of_rows[2] = {factor[c].x, factor[c].y};
        Best best[2];
        output.write_tile(total[c], tile + r, octet + c, inputs[c], of_rows, best, next);
        if (kEpilogue == kLogits) keep_best(best, octet + c);
      }
    }
  }

  // The best of this warp's tiles so far.

  __device__ __forceinline__ void begin_best() const {
    for (int row = lane; row < kRows; row += 32)
      best_value[row] = Best().value, best_index[row] = Best().index;
    sync_warp();
  }

  __device__ __forceinline__ void keep_best(const Best best[2], int c) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      Best b = Output::best_of_lanes(best[i]);
      const int row = 8 * c + 2 * t + i;
      if (g == 0) {
        b.update(best_value[row], best_index[row]);
        best_value[row] = b.value, best_index[row] = b.index;
      }
    }
  }

  __device__ __forceinline__ void end_best() const {
    sync_warp();
    const int candidate = blockIdx.x * kWarps + warp, candidates = gridDim.x * kWarps;
    for (int row = lane; row < args.rows; row += 32) {
      args.best_value[row * candidates + candidate] = best_value[row];
      args.best_index[row * candidates + candidate] = best_index[row];
    }
  }
};

template <class Weight, int kTiles, int kOctets, Epilogue kEpilogue, bool kNorm, bool kHasNext,
          bool kShares, bool kPairs, bool kDirect>
__device__ __forceinline__ void wide(const LinearArgs& args) {
  Wide<Weight, kTiles, kOctets, kEpilogue, kNorm, kHasNext, kShares, kPairs, kDirect>::run(args,
                                                                                       nullptr);
}

template <class Weight, int kTiles, int kOctets, Epilogue kEpilogue, bool kNorm, bool kHasNext,
          bool kShares, bool kPairs, bool kDirect>
__device__ __forceinline__ void wide(const PlainRowsArgs& args) {
  if (threadIdx.x == 0) prefetch_map(&args.map);
  Wide<Weight, kTiles, kOctets, kEpilogue, kNorm, kHasNext, kShares, kPairs, kDirect>::run(
      args.linear, &args.map);
}
