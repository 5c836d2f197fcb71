// What a decode step needs besides products and attention: its first kernels and its last, and what
// ranks do with each other.

#include "pointwise.cuh"

struct EmbedArgs {
  const int64_t* ids;  // [M]
  const void* table;   // [V, K], bf16 or int8
  const float* scale;  // [V], of an int8 table
  bf16* x;             // [M, K]
  const bf16* norm;    // [K]: weight of the norm that x goes into
  bf16* next_x;        // [M, K]: x times it
  float* next_squares; // [M, parts]: what x's squares add up to, 16 at a time
  int k, vocab;        // vocab: V
};

// Two int8 values of a word, from a bit on, as they are worth.
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

// Rows of a table, and what a norm needs of them. A block per row of x; K is a multiple of 8. Ids
// that are none read the first or the last row: never memory beyond the table.
//
// The first kernel of a step lets the next ones start only when it has itself waited: whatever
// starts after it may rely on everything before the step.
template <bool kInt8>
__device__ __forceinline__ void embed(const EmbedArgs& args) {
  wait_for_predecessor();
  launch_dependents();
  const int64_t id = min(max(args.ids[blockIdx.x], int64_t{0}), int64_t{args.vocab - 1});
  const int64_t row = static_cast<int64_t>(blockIdx.x) * args.k;
  const int chunks = args.k / 8, parts = (chunks + 1) / 2;
  // Whole warps go round together: two lanes add up a part.
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
      const uint4 w = reinterpret_cast<const uint4*>(args.norm)[i];
      reinterpret_cast<uint4*>(args.x + row)[i] = x;
      reinterpret_cast<uint4*>(args.next_x + row)[i] = times(x, w);
      squares = add_squares(x);
    }
    squares += shuffle_xor(squares, 1);
    if (i % 2 == 0 && i < chunks) args.next_squares[blockIdx.x * parts + i / 2] = squares;
  }
}

struct AddArgs {
  const bf16* added;     // [M, K]
  const bf16* residual;  // [M, K]
  bf16* x;               // [M, K]: their sum; can be residual
  const bf16* norm;      // [K]: weight of the norm that x goes into
  bf16* next_x;          // [M, K]: x times it
  float* next_squares;   // [M, parts]: what x's squares add up to, 16 at a time
  int k;
};

__device__ __forceinline__ uint32_t plus(uint32_t a, uint32_t b) {
  return narrow(low(a) + low(b), high(a) + high(b));
}

// A residual stream and what ranks have added up for it, and what a norm needs of them. A block for
// every blockDim.x * 8 values of a row; K is a multiple of 8.
//
// It follows a kernel that is not ours, so it is as the first one of a step: what starts after it
// may rely on everything before it. The norm's weight is never written, so it can be read at once.
__device__ __forceinline__ void add(const AddArgs& args) {
  const int chunks = args.k / 8, parts = (chunks + 1) / 2;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const bool here = i < chunks;
  const int64_t row = static_cast<int64_t>(blockIdx.y) * args.k;
  uint4 w{};
  if (here) w = reinterpret_cast<const uint4*>(args.norm)[i];
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
  squares += shuffle_xor(squares, 1);  // two lanes add up a part
  if (here && i % 2 == 0) args.next_squares[blockIdx.y * parts + i / 2] = squares;
}

struct SumArgs {
  const bf16* mine;        // [M, K]: this rank's part
  const bf16* residual;    // [M, K]
  bf16* x;                 // [M, K]: residual and all parts; can be residual
  const bf16* norm;        // [K]: weight of the norm that x goes into
  bf16* next_x;            // [M, K]: x times it
  float* next_squares;     // [M, parts]: what x's squares add up to, 16 at a time
  uint4* const* inboxes;   // of each rank, [2, ranks, capacity, K / 4]: four values and their marks
  uint32_t* turns;         // [capacity, blocks of a row]: how many there have been
  int k, rank, capacity;
};

// The residual stream and the parts that ranks have for it, in the order of ranks, and what a norm
// needs of it. A block for every blockDim.x * 8 values of a row; K is a multiple of 8.
//
// A thread puts its values into the others' inboxes and waits for theirs. Those that come of one sum
// and of the next are in two places: who writes a third time has seen what others sent the second
// time, and so they had taken the first.
template <int kRanks>
__device__ __forceinline__ void sum(const SumArgs& args) {
  const int chunks = args.k / 8, parts = (chunks + 1) / 2;
  const int i = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
  const bool here = i < chunks;
  const int64_t first = static_cast<int64_t>(row) * chunks;  // of the row, eight values each
  uint4* inboxes[kRanks];
#pragma unroll
  for (int r = 0; r < kRanks; r++) inboxes[r] = args.inboxes[r];
  uint4 w{}, mine{}, x{};
  if (here) w = reinterpret_cast<const uint4*>(args.norm)[i];
  launch_dependents();
  wait_for_predecessor();
  uint32_t* turns = args.turns + row * gridDim.x + blockIdx.x;
  const uint32_t mark = *turns + 1;
  if (here) {
    mine = reinterpret_cast<const uint4*>(args.mine)[first + i];
    x = reinterpret_cast<const uint4*>(args.residual)[first + i];
  }
  sync_block();  // all have read what the first thread is going to write
  float squares = 0;
  if (here) {
    const auto place = [&](int to, int from) {
      const int box = (mark % 2 * kRanks + from) * args.capacity + row;
      return inboxes[to] + 2 * (static_cast<int64_t>(box) * chunks + i);
    };
#pragma unroll
    for (int r = 0; r < kRanks; r++) {
      if (r == args.rank) continue;
      store_marked(place(r, args.rank), uint2{mine.x, mine.y}, mark);
      store_marked(place(r, args.rank) + 1, uint2{mine.z, mine.w}, mark);
    }
    uint2 part[kRanks][2];
    bool complete;
    do {
      complete = true;
#pragma unroll
      for (int r = 0; r < kRanks; r++) {
        part[r][0] = uint2{mine.x, mine.y}, part[r][1] = uint2{mine.z, mine.w};
        if (r == args.rank) continue;
        complete &= load_marked(place(args.rank, r), mark, part[r][0]);
        complete &= load_marked(place(args.rank, r) + 1, mark, part[r][1]);
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
  squares += shuffle_xor(squares, 1);  // two lanes add up a part
  if (here && i % 2 == 0) args.next_squares[row * parts + i / 2] = squares;
  if (threadIdx.x == 0) *turns = mark;
}

struct ArgmaxArgs {
  const float* best_value;  // [M, n]
  const int* best_index;    // [M, n]
  int64_t* ids;             // [M]
  int n;
};

// The winner of a row's winners, on every lane.
__device__ __forceinline__ Best best_of(const float* values, const int* indices, int n, int lane) {
  Best best{-infinity(), 0x7fffffff};
  for (int i = lane; i < n; i += 32) best.offer(values[i], indices[i]);
  return best_of_warp(best);
}

// A block of one warp per row.
__device__ __forceinline__ void argmax(const ArgmaxArgs& args) {
  launch_dependents();
  wait_for_predecessor();
  const int row = blockIdx.x, lane = threadIdx.x, n = args.n;
  const Best best = best_of(args.best_value + row * n, args.best_index + row * n, n, lane);
  if (lane == 0) args.ids[row] = best.choice();
}

struct ArgmaxOfRanksArgs {
  const float* best_value;  // [M, n]
  const int* best_index;    // [M, n]: of this rank's part of the vocabulary
  int64_t* ids;             // [M]
  uint4* const* inboxes;    // of each rank, [2, ranks, capacity]: a value and an id, and their marks
  uint32_t* turns;          // [capacity]: how many there have been
  int n, first;             // first: id of the first of this rank's part
  int rank, ranks, capacity;
};

// The same over ranks, of which there are at most 32: a lane for each of them.
__device__ __forceinline__ void argmax_of_ranks(const ArgmaxOfRanksArgs& args) {
  launch_dependents();
  wait_for_predecessor();
  const int row = blockIdx.x, lane = threadIdx.x, n = args.n;
  const uint32_t mark = args.turns[row] + 1;
  Best best = best_of(args.best_value + row * n, args.best_index + row * n, n, lane);
  best.index += args.first;
  if (lane < args.ranks && lane != args.rank) {
    const auto place = [&](int to, int from) {
      return args.inboxes[to] + (mark % 2 * args.ranks + from) * args.capacity + row;
    };
    store_marked(place(lane, args.rank), uint2{float_bits(best.value), uint32_t(best.index)}, mark);
    uint2 theirs;
    while (!load_marked(place(args.rank, lane), mark, theirs)) continue;
    best = Best{float_of(theirs.x), static_cast<int>(theirs.y)};
  }
  best = best_of_warp(best);
  if (lane == 0) args.ids[row] = best.choice(), args.turns[row] = mark;
}

// Slots: a row of the history of each has the tokens at all positions up to its newest one's, and
// room for T more.

struct NextTokensArgs {
  const int64_t* history;    // [S, width]
  const int64_t* positions;  // [S]: of the newest token
  const int64_t* drafts;     // [B, T - 1], rows ``drafts_stride`` apart; negative for none
  int64_t* ids;              // [B, T]: the newest token and drafts, 0 for none
  int64_t* at;               // [B, T]: their positions, none beyond the last one
  int width, drafts_stride, tokens, last_position;
};

struct LookUpArgs {
  const int64_t* history;    // [S, width]
  const int64_t* positions;  // [S]: of the newest token
  int64_t* drafts;           // [B, D]: what followed the newest tokens before, -1 if they are new
  int width, n_drafts;
};

constexpr int kSeekers = 256;  // threads, each of which reads so many tokens at a time:
constexpr int kSought = 8;

// Where the newest three tokens stood before, or else two of them, the last of several places. A
// block per slot; no slot has more than 2^30 positions.
__device__ __forceinline__ void look_up(const LookUpArgs& args) {
  launch_dependents();
  wait_for_predecessor();
  const int thread = threadIdx.x, lane = thread % 32;
  const int64_t* history = args.history + static_cast<int64_t>(blockIdx.x) * args.width;
  const int position = static_cast<int>(args.positions[blockIdx.x]);
  int64_t newest[3];
#pragma unroll
  for (int back = 0; back < 3; back++) newest[back] = history[max(position - back, 0)];
  int best = -1;  // a place of two tokens, or ``position`` beyond a place of three
  for (int first = thread; first < position; first += kSought * kSeekers) {
    int64_t token[kSought];
#pragma unroll
    for (int i = 0; i < kSought; i++) {
      const int at = first + i * kSeekers;
      token[i] = history[min(at, position)];
    }
#pragma unroll
    for (int i = 0; i < kSought; i++) {
      const int at = first + i * kSeekers;
      if (at < 1 || at >= position || token[i] != newest[0]) continue;
      if (history[at - 1] != newest[1]) continue;
      const bool three = at >= 2 && history[at - 2] == newest[2];
      best = max(best, three ? position + at : at);
    }
  }
  for (int mask = 1; mask < 32; mask *= 2) best = max(best, shuffle_xor(best, mask));
  int* of_warps = reinterpret_cast<int*>(shared_memory());  // [kSeekers / 32]
  if (lane == 0) of_warps[thread / 32] = best;
  sync_block();
  if (thread >= args.n_drafts) return;
  for (int warp = 0; warp < kSeekers / 32; warp++) best = max(best, of_warps[warp]);
  const int place = best >= position ? best - position : best;
  int64_t* draft = args.drafts + static_cast<int64_t>(blockIdx.x) * args.n_drafts + thread;
  *draft = best < 0 ? -1 : history[place + 1 + thread % (position - place)];
}

// A block of one warp per slot.
__device__ __forceinline__ void next_tokens(const NextTokensArgs& args) {
  launch_dependents();
  wait_for_predecessor();
  const int64_t slot = blockIdx.x;
  const int lane = threadIdx.x;
  if (lane >= args.tokens) return;
  const int64_t position = args.positions[slot];
  const int64_t id = lane == 0 ? args.history[slot * args.width + position]
                               : args.drafts[slot * args.drafts_stride + lane - 1];
  args.ids[slot * args.tokens + lane] = id < 0 ? 0 : id;
  args.at[slot * args.tokens + lane] =
      min(position + lane, static_cast<int64_t>(args.last_position));
}

struct AcceptArgs {
  const int64_t* ids;     // [B, T]: what the model chose after the newest token and after each draft
  const int64_t* drafts;  // as above
  int64_t* history;       // [S, width]
  int64_t* positions;     // [S]
  int64_t* n_kept;        // [B]: choices up to the first that is not its draft; null if T is 1
  int64_t* n_drafts;      // [B]: how many drafts there were; null if T is 1
  int width, drafts_stride, tokens, last_position;
};

// A block of one warp per slot.
__device__ __forceinline__ void accept(const AcceptArgs& args) {
  launch_dependents();
  wait_for_predecessor();
  const int64_t slot = blockIdx.x;
  const int lane = threadIdx.x;
  const bool chooses = lane < args.tokens, is_drafted = lane < args.tokens - 1;
  const int64_t id = chooses ? args.ids[slot * args.tokens + lane] : 0;
  const int64_t draft = is_drafted ? args.drafts[slot * args.drafts_stride + lane] : -1;
  const uint32_t right = ballot(is_drafted && id == draft);
  const int n_drafts = count_bits(ballot(is_drafted && draft >= 0));
  const int n_kept = 1 + count_bits(right & ~(right + 1));  // those before the first that is wrong
  const int64_t position = args.positions[slot];
  if (chooses) args.history[slot * args.width + position + 1 + lane] = id;
  sync_warp();  // every lane has read the position
  if (lane > 0) return;
  args.positions[slot] = min(position + n_kept, static_cast<int64_t>(args.last_position));
  if (args.n_kept == nullptr) return;
  args.n_kept[slot] = n_kept;
  args.n_drafts[slot] = n_drafts;
}
