// The kernels of a decode step other than matrix products and attention: n-gram drafts, the tokens
// to verify, embedding, argmax, acceptance, and all-reduces over ranks.

#include "pointwise.cuh"

struct EmbedArgs {
  const int64_t* ids;  // [M]
  const void* table;   // [V, K], bf16 or int8
  const float* scale;  // [V], of an int8 table
  bf16* x;             // [M, K]
  const bf16* next_norm;  // [K]: weight of the norm that follows
  bf16* next_x;        // [M, K]: its prescaled input, x * next_norm
  float* next_squares; // [M, parts]: partial sums of x's squares, 16 values each
  int k, vocab;        // K, V
};

// Dequantizes two adjacent int8 values of a word, from a bit on.
__device__ __forceinline__ uint32_t scaled(uint32_t word, int bit, float scale) {
  return narrow(static_cast<int8_t>(word >> bit) * scale,
                static_cast<int8_t>(word >> (bit + 8)) * scale);
}

__device__ __forceinline__ float add_squares(uint4 x) {
  return add_squares(x.w, add_squares(x.z, add_squares(x.y, add_squares(x.x, 0))));
}

__device__ __forceinline__ uint4 times(uint4 x, uint4 w) {
  return uint4{times(x.x, w.x), times(x.y, w.y), times(x.z, w.z), times(x.w, w.w)};
}

// Looks up rows of the embedding, and applies the norm epilogue. A block per row of x; K is a
// multiple of 8. Ids outside the vocabulary are clamped, so no memory beyond the table is read.
//
// The first kernel of a decode step launches its dependents only after it has itself waited, so
// that they may rely on everything before the step.
template <bool kInt8>
__device__ __forceinline__ void embed(const EmbedArgs& args) {
  wait_for_predecessor();
  launch_dependents();
  const int64_t id = min(max(args.ids[blockIdx.x], int64_t{0}), int64_t{args.vocab - 1});
  const int64_t row = static_cast<int64_t>(blockIdx.x) * args.k;
  const int chunks = args.k / 8, parts = (chunks + 1) / 2;
  // Whole warps iterate together, because two lanes sum a part.
  for (int i = threadIdx.x; i < (chunks + 31) / 32 * 32; i += blockDim.x) {
    float squares = 0;
    if (i < chunks) {
      uint4 x;
      if (kInt8) {
        const uint2 values =
            reinterpret_cast<const uint2*>(static_cast<const int8_t*>(args.table) + id * args.k)[i];
        const float scale = args.scale[id];
        x = uint4{scaled(values.x, 0, scale), scaled(values.x, 16, scale),
                  scaled(values.y, 0, scale), scaled(values.y, 16, scale)};
      } else {
        x = reinterpret_cast<const uint4*>(static_cast<const bf16*>(args.table) + id * args.k)[i];
      }
      const uint4 w = reinterpret_cast<const uint4*>(args.next_norm)[i];
      reinterpret_cast<uint4*>(args.x + row)[i] = x;
      reinterpret_cast<uint4*>(args.next_x + row)[i] = times(x, w);
      squares = add_squares(x);
    }
    squares += shuffle_xor(squares, 1);
    if (i % 2 == 0 && i < chunks) args.next_squares[blockIdx.x * parts + i / 2] = squares;
  }
}

struct AddArgs {
  const bf16* added;     // [M, K]: summed over ranks
  const bf16* residual;  // [M, K]
  bf16* x;               // [M, K]: residual + added; may be residual
  const bf16* next_norm;  // [K]: weight of the norm that follows
  bf16* next_x;          // [M, K]: its prescaled input, x * next_norm
  float* next_squares;   // [M, parts]: partial sums of x's squares, 16 values each
  int k;
};

__device__ __forceinline__ uint32_t plus(uint32_t a, uint32_t b) {
  return narrow(low(a) + low(b), high(a) + high(b));
}

// Adds the result of an all-reduce by NCCL to the residual stream, and applies the norm epilogue. A
// block per blockDim.x * 8 values of a row; K is a multiple of 8.
//
// Its predecessor is NCCL's kernel. So, like the first kernel of a step, it launches its dependents
// only after its own wait. The norm's weight is constant, so it is loaded before the wait.
__device__ __forceinline__ void add(const AddArgs& args) {
  const int chunks = args.k / 8, parts = (chunks + 1) / 2;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const bool here = i < chunks;
  const int64_t row = static_cast<int64_t>(blockIdx.y) * args.k;
  uint4 w{};
  if (here) w = reinterpret_cast<const uint4*>(args.next_norm)[i];
  wait_for_predecessor();
  launch_dependents();
  float squares = 0;
  if (here) {
    const uint4 a = reinterpret_cast<const uint4*>(args.added + row)[i];
    const uint4 r = reinterpret_cast<const uint4*>(args.residual + row)[i];
    const uint4 x{plus(r.x, a.x), plus(r.y, a.y), plus(r.z, a.z), plus(r.w, a.w)};
    reinterpret_cast<uint4*>(args.x + row)[i] = x;
    reinterpret_cast<uint4*>(args.next_x + row)[i] = times(x, w);
    squares = add_squares(x);
  }
  squares += shuffle_xor(squares, 1);  // two lanes sum a part
  if (here && i % 2 == 0) args.next_squares[blockIdx.y * parts + i / 2] = squares;
}

struct AllReduceArgs {
  const bf16* local;       // [M, K]: this rank's addend
  const bf16* residual;    // [M, K]
  bf16* x;                 // [M, K]: residual + the sum over ranks; may be residual
  const bf16* next_norm;   // [K]: weight of the norm that follows
  bf16* next_x;            // [M, K]: its prescaled input, x * next_norm
  float* next_squares;     // [M, parts]: partial sums of x's squares, 16 values each
  uint4* const* inboxes;   // of each rank, [2, ranks, capacity, K / 4]: four values with two flags
  uint32_t* rounds;        // [capacity, blocks of a row]: the number of completed all-reduces
  int k, rank, capacity;
};

// One-shot all-reduce: adds every rank's addend, in the order of ranks, to the residual stream, and
// applies the norm epilogue. A block per blockDim.x * 8 values of a row; K is a multiple of 8.
//
// A thread stores its values to the other ranks' inboxes, and waits for theirs. Inboxes are double
// buffered, which is enough: a rank that stores for round n + 2 has received every rank's values of
// round n + 1, and a rank stores those only after it has read its inbox of round n.
template <int kRanks>
__device__ __forceinline__ void all_reduce(const AllReduceArgs& args) {
  const int chunks = args.k / 8, parts = (chunks + 1) / 2;
  const int i = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
  const bool here = i < chunks;
  const int64_t first = static_cast<int64_t>(row) * chunks;  // chunk of eight values
  uint4* inboxes[kRanks];
#pragma unroll
  for (int r = 0; r < kRanks; r++) inboxes[r] = args.inboxes[r];
  uint4 w{}, local{}, x{};
  if (here) w = reinterpret_cast<const uint4*>(args.next_norm)[i];
  launch_dependents();
  wait_for_predecessor();
  uint32_t* rounds = args.rounds + row * gridDim.x + blockIdx.x;
  const uint32_t flag = *rounds + 1;
  if (here) {
    local = reinterpret_cast<const uint4*>(args.local)[first + i];
    x = reinterpret_cast<const uint4*>(args.residual)[first + i];
  }
  sync_block();  // every thread has read the round, before the first thread writes it
  float squares = 0;
  if (here) {
    const auto entry = [&](int to, int from) {
      const int box = (flag % 2 * kRanks + from) * args.capacity + row;
      return inboxes[to] + 2 * (static_cast<int64_t>(box) * chunks + i);
    };
#pragma unroll
    for (int r = 0; r < kRanks; r++) {
      if (r == args.rank) continue;
      store_flagged(entry(r, args.rank), uint2{local.x, local.y}, flag);
      store_flagged(entry(r, args.rank) + 1, uint2{local.z, local.w}, flag);
    }
    uint2 part[kRanks][2];
    bool complete;
    do {
      complete = true;
#pragma unroll
      for (int r = 0; r < kRanks; r++) {
        part[r][0] = uint2{local.x, local.y}, part[r][1] = uint2{local.z, local.w};
        if (r == args.rank) continue;
        complete &= load_flagged(entry(args.rank, r), flag, part[r][0]);
        complete &= load_flagged(entry(args.rank, r) + 1, flag, part[r][1]);
      }
    } while (!complete);
    float added[8] = {};
#pragma unroll
    for (int r = 0; r < kRanks; r++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const uint2 pairs = part[r][h];
        added[4 * h] += low(pairs.x), added[4 * h + 1] += high(pairs.x);
        added[4 * h + 2] += low(pairs.y), added[4 * h + 3] += high(pairs.y);
      }
    x = uint4{narrow(low(x.x) + added[0], high(x.x) + added[1]),
              narrow(low(x.y) + added[2], high(x.y) + added[3]),
              narrow(low(x.z) + added[4], high(x.z) + added[5]),
              narrow(low(x.w) + added[6], high(x.w) + added[7])};
    reinterpret_cast<uint4*>(args.x)[first + i] = x;
    reinterpret_cast<uint4*>(args.next_x)[first + i] = times(x, w);
    squares = add_squares(x);
  }
  squares += shuffle_xor(squares, 1);  // two lanes sum a part
  if (here && i % 2 == 0) args.next_squares[row * parts + i / 2] = squares;
  if (threadIdx.x == 0) *rounds = flag;
}

struct ArgmaxArgs {
  const float* best_value;  // [M, n]
  const int* best_index;    // [M, n]
  int64_t* ids;             // [M]
  int n;
};

// Reduces a row's candidates to the best one, on every lane.
__device__ __forceinline__ Best row_best(const float* values, const int* indices, int n, int lane) {
  Best best{-infinity(), 0x7fffffff};
  for (int i = lane; i < n; i += 32) best.update(values[i], indices[i]);
  return warp_best(best);
}

// The argmax of each row, from the best logit of each block of the head's GEMM. One warp per row.
__device__ __forceinline__ void argmax(const ArgmaxArgs& args) {
  launch_dependents();
  wait_for_predecessor();
  const int row = blockIdx.x, lane = threadIdx.x, n = args.n;
  const Best best = row_best(args.best_value + row * n, args.best_index + row * n, n, lane);
  if (lane == 0) args.ids[row] = best.choice();
}

struct ArgmaxOverRanksArgs {
  const float* best_value;  // [M, n]
  const int* best_index;    // [M, n]: within this rank's part of the vocabulary
  int64_t* ids;             // [M]
  uint4* const* inboxes;    // of each rank, [2, ranks, capacity]: a value and an id, with flags
  uint32_t* rounds;         // [capacity]: the number of completed rounds
  int n, first;             // first: the first token id of this rank's part
  int rank, ranks, capacity;
};

// The argmax over all ranks' parts of the vocabulary, on every rank. Each lane exchanges with one
// rank; there are at most 32 ranks.
__device__ __forceinline__ void argmax_over_ranks(const ArgmaxOverRanksArgs& args) {
  launch_dependents();
  wait_for_predecessor();
  const int row = blockIdx.x, lane = threadIdx.x, n = args.n;
  const uint32_t flag = args.rounds[row] + 1;
  Best best = row_best(args.best_value + row * n, args.best_index + row * n, n, lane);
  best.index += args.first;
  if (lane < args.ranks && lane != args.rank) {
    const auto entry = [&](int to, int from) {
      return args.inboxes[to] + (flag % 2 * args.ranks + from) * args.capacity + row;
    };
    store_flagged(entry(lane, args.rank), uint2{float_bits(best.value), uint32_t(best.index)},
                  flag);
    uint2 theirs;
    while (!load_flagged(entry(args.rank, lane), flag, theirs)) continue;
    best = Best{float_from_bits(theirs.x), static_cast<int>(theirs.y)};
  }
  best = warp_best(best);
  if (lane == 0) args.ids[row] = best.choice(), args.rounds[row] = flag;
}

// The history of a row: the tokens at all positions up to the newest one's, and room for T more.

struct NextTokensArgs {
  const int64_t* history;    // [R, width]
  const int64_t* positions;  // [R]: of the newest token
  const int64_t* drafts;     // [B, T - 1], with a stride of ``drafts_stride``; negative for none
  int64_t* ids;              // [B, T]: the newest token and the drafts, 0 for none
  int64_t* token_positions;  // [B, T]: their positions, clamped to last_position
  int width, drafts_stride, tokens, last_position;
};

struct NgramDraftArgs {
  const int64_t* history;    // [R, width]
  const int64_t* positions;  // [R]: of the newest token
  int64_t* drafts;           // [B, D]: -1 where the newest tokens did not occur before
  int width, n_drafts;
};

constexpr int kDraftThreads = 256;
constexpr int kTokensPerThread = 8;  // loads in flight

// N-gram drafts: finds the last earlier occurrence of the newest three tokens, or else of the
// newest two, and drafts the tokens that followed it. A block per row; a row has at most 2^30
// positions.
__device__ __forceinline__ void ngram_draft(const NgramDraftArgs& args) {
  launch_dependents();
  wait_for_predecessor();
  const int thread = threadIdx.x, lane = thread % 32;
  const int64_t* history = args.history + static_cast<int64_t>(blockIdx.x) * args.width;
  const int position = static_cast<int>(args.positions[blockIdx.x]);
  int64_t newest[3];
#pragma unroll
  for (int back = 0; back < 3; back++) newest[back] = history[max(position - back, 0)];
  int best = -1;  // a position where two tokens match; plus ``position`` if three match
  for (int first = thread; first < position; first += kTokensPerThread * kDraftThreads) {
    int64_t token[kTokensPerThread];
#pragma unroll
    for (int i = 0; i < kTokensPerThread; i++) {
      const int at = first + i * kDraftThreads;
      token[i] = history[min(at, position)];
    }
#pragma unroll
    for (int i = 0; i < kTokensPerThread; i++) {
      const int at = first + i * kDraftThreads;
      if (at < 1 || at >= position || token[i] != newest[0]) continue;
      if (history[at - 1] != newest[1]) continue;
      const bool three = at >= 2 && history[at - 2] == newest[2];
      best = max(best, three ? position + at : at);
    }
  }
  for (int mask = 1; mask < 32; mask *= 2) best = max(best, shuffle_xor(best, mask));
  int* warp_results = reinterpret_cast<int*>(shared_memory());  // [kDraftThreads / 32]
  if (lane == 0) warp_results[thread / 32] = best;
  sync_block();
  if (thread >= args.n_drafts) return;
  for (int warp = 0; warp < kDraftThreads / 32; warp++) best = max(best, warp_results[warp]);
  const int match = best >= position ? best - position : best;
  int64_t* draft = args.drafts + static_cast<int64_t>(blockIdx.x) * args.n_drafts + thread;
  *draft = best < 0 ? -1 : history[match + 1 + thread % (position - match)];
}

// One warp per row.
__device__ __forceinline__ void next_tokens(const NextTokensArgs& args) {
  launch_dependents();
  wait_for_predecessor();
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x;
  if (lane >= args.tokens) return;
  const int64_t position = args.positions[row];
  const int64_t id = lane == 0 ? args.history[row * args.width + position]
                               : args.drafts[row * args.drafts_stride + lane - 1];
  args.ids[row * args.tokens + lane] = id < 0 ? 0 : id;
  args.token_positions[row * args.tokens + lane] =
      min(position + lane, static_cast<int64_t>(args.last_position));
}

struct AcceptArgs {
  const int64_t* ids;     // [B, T]: the tokens sampled after the newest token and after each draft
  const int64_t* drafts;  // as in NextTokensArgs
  int64_t* history;       // [R, width]
  int64_t* positions;     // [R]
  int64_t* n_kept;        // [B]: ids up to the first that differs from its draft; null if T is 1
  int64_t* n_drafts;      // [B]: the number of drafts; null if T is 1
  int width, drafts_stride, tokens, last_position;
};

// One warp per row.
__device__ __forceinline__ void accept(const AcceptArgs& args) {
  launch_dependents();
  wait_for_predecessor();
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x;
  const bool chooses = lane < args.tokens, is_drafted = lane < args.tokens - 1;
  const int64_t id = chooses ? args.ids[row * args.tokens + lane] : 0;
  const int64_t draft = is_drafted ? args.drafts[row * args.drafts_stride + lane] : -1;
  const uint32_t matches = ballot(is_drafted && id == draft);
  const int n_drafts = count_bits(ballot(is_drafted && draft >= 0));
  const int n_kept = 1 + count_bits(matches & ~(matches + 1));  // the leading matches, and one more
  const int64_t position = args.positions[row];
  if (chooses) args.history[row * args.width + position + 1 + lane] = id;
  sync_warp();  // every lane has read the position
  if (lane > 0) return;
  args.positions[row] = min(position + n_kept, static_cast<int64_t>(args.last_position));
  if (args.n_kept == nullptr) return;
  args.n_kept[row] = n_kept;
  args.n_drafts[row] = n_drafts;
}
