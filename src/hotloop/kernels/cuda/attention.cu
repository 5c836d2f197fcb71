// Attention of a few new tokens of each sequence over the cache, straight from the product that
// made their queries, keys and values: norms of query and key heads, rotation, storing the new keys
// and values, scores, softmax, sum.
//
// A block serves eight or sixteen rows (query heads that share a key/value head, times new tokens)
// of one sequence, over one chunk of its history; blocks beyond the end of a history leave at once,
// and whichever of the others comes last merges what they found, in the order of chunks. Each warp
// takes every so many-th step of 16 positions.
//
// The history was written before the step began, so it is read before waiting for the product: up
// to what a warp's ring holds into shared memory, some more into the L2 cache. The next kernel may
// begin only when the product has ended: what it asks for would come before the new tokens.
//
// The more a token sees the longer its chunks are, so that a long history has as many as there are
// multiprocessors for. Where new tokens are on both sides of a place from which on chunks are longer,
// some blocks serve the first of them, others the rest.
//
// Bits: which chunk, warp and step a position belongs to is decided by the position and the token's
// own, and what a token does not see adds zeros; so a token's result has the same bits however many
// new tokens come with it, and however long the cache is.
//
// Letters: B sequences, T new tokens of each, H query heads, J key/value heads, C cache positions,
// E head dimension, S slots. g = lane / 4 and t = lane % 4 are a lane's place in fragments.

#include "pointwise.cuh"

struct AttentionArgs {
  const bf16* qkv;           // [B * T, (H + 2J) * E]
  const float* cos;          // [C, E], both halves alike
  const float* sin;
  const bf16* q_norm;        // [E], or null
  const bf16* k_norm;
  const int64_t* positions;  // [B]: of each sequence's first new token; the others follow it
  const int64_t* slots;      // [B]: whose place in the cache each sequence has
  bf16* keys;                // [S, J, C, E]
  bf16* values;
  bf16* out;                 // [B * T, H * E]
  float* partial;            // workspace of chunks, see is_last_block
  uint32_t* counters;        // zeros, two per group of blocks that share a history
  int tokens, heads, kv_heads, capacity;
  int window;                // 0 for none
  int chunks;                // that a long history has
  int least_chunk;           // positions of a chunk at least, whole steps
  float scale;               // of scores, times log2(e)
  float eps;                 // of the norms
};

constexpr int kStep = 16;     // positions that a warp takes at once
constexpr int kForeseen = 2;  // steps of a warp that come into the L2 cache ahead of time

// kColumns: groups of eight rows. kStages: steps that a warp's ring holds.
template <int kE, int kWarps, int kColumns, int kStages>
struct Attention {
  static_assert(kE % 32 == 0, "fragments take 32 dimensions at a time");
  static constexpr int kBlocks = kE / 32;        // of the head dimension, in scores
  static constexpr int kQuads = (kE + 63) / 64;  // of 64 dimensions, in sums
  static constexpr int kRows = 8 * kColumns;
  static constexpr int kTurn = kStep * kWarps;  // positions of a step of all warps
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kHalf = kE / 2;
  static constexpr int kChunks = kE / 8;  // of 16 bytes, of a row
  static constexpr int kFours = kE / 4;   // sums of a row, four at a time

  const AttentionArgs& args;
  const int thread, lane, warp, g, t;
  const int j, row_block, b, row_blocks;
  const int group;             // query heads of a key/value head
  const int n_rows, n_here;    // rows in all; of this block
  const int position, begin;   // of the first new token; the first position seen
  int first_token, end_token;  // new tokens that this block serves: their chunks are of one length
  int end;                     // one past the last position that they see
  int length;                  // of chunks
  int first_chunk, n_chunks;   // those that hold something to be seen
  int first_block, chunk;      // of blocks that serve these tokens; this block's among the chunks
  bf16 *keys, *values;         // of this sequence and head

  // Shared memory.
  bf16 *new_q, *new_k, *new_v;  // [kRows, E], [T, E], [T, E]
  float* turns;                 // [T, 2, E / 2]: cosines and sines of the new tokens
  int *row_token, *row_head;    // [kRows]: which new token and query head a row is
  uint64_t* arrived;            // [kStages], of this warp: the copy is there
  uint32_t* flag;
  bf16* ring;                   // [kStages, 2, kStep, E], of this warp: keys and values
  // In the rings' place: [kWarps, kRows, E] (see place_of), [kWarps, kRows]; see also join_shares.
  float *found, *found_max, *found_sum;

  __device__ __forceinline__ Attention(const AttentionArgs& a, int of_thread, int x, int y, int z)
      : args(a), thread(of_thread), lane(thread % 32), warp(thread / 32), g(lane / 4), t(lane % 4),
        j(x % a.kv_heads), row_block(x / a.kv_heads), b(y),
        row_blocks((a.tokens * (a.heads / a.kv_heads) + kRows - 1) / kRows),
        group(a.heads / a.kv_heads), n_rows(a.tokens * group),
        n_here(min(kRows, n_rows - row_block * kRows)),
        position(static_cast<int>(a.positions[b])),
        begin(a.window > 0 ? max(position - a.window + 1, 0) : 0) {
    find_part(z);
    const int64_t head = (a.slots[b] * a.kv_heads + j) * a.capacity * kE;
    keys = a.keys + head;
    values = a.values + head;
    uint8_t* memory = shared_memory();
    new_q = reinterpret_cast<bf16*>(memory);
    new_k = new_q + kRows * kE;
    new_v = new_k + a.tokens * kE;
    turns = reinterpret_cast<float*>(new_v + a.tokens * kE);
    row_token = reinterpret_cast<int*>(turns + a.tokens * kE);
    row_head = row_token + kRows;
    arrived = reinterpret_cast<uint64_t*>(row_head + kRows) + warp * kStages;
    flag = reinterpret_cast<uint32_t*>(arrived + (kWarps - warp) * kStages);
    uint8_t* rings = reinterpret_cast<uint8_t*>(flag) + (kWarps * kStages % 2 ? 8 : 16);
    ring = reinterpret_cast<bf16*>(rings) + warp * kStages * 2 * kStep * kE;
    found = reinterpret_cast<float*>(rings);
    found_max = found + kWarps * kRows * kE;
    found_sum = found_max + kWarps * kRows;
  }

  // Of a token at this position: positions of a chunk.
  __device__ __forceinline__ int length_at(int at) const {
    const int seen = args.window > 0 ? min(at, args.window - 1) : at;
    return max(args.least_chunk, kTurn * (seen / (kTurn * args.chunks) + 1));
  }

  // What the block does that is number ``block`` of those that share a history.
  __device__ __forceinline__ void find_part(int block) {
    first_token = first_block = 0;
    end_token = args.tokens;
    end = min(position + args.tokens, args.capacity);
    length = length_at(position);
    const int last_length = args.tokens > 1 ? length_at(end - 1) : length;
    if (length != last_length) {
      const int longer_from = (last_length / kTurn - 1) * kTurn * args.chunks;
      const int n_blocks = (longer_from - 1) / length + 1 - begin / length;
      if (block < n_blocks)
        end_token = longer_from - position, end = longer_from;
      else
        first_token = longer_from - position, first_block = n_blocks, length = last_length;
    }
    first_chunk = begin / length;
    n_chunks = (end - 1) / length + 1 - first_chunk;
    chunk = block - first_block;
  }
  __device__ __forceinline__ bool serves(int row) const {
    return row_token[row] >= first_token && row_token[row] < end_token;
  }

  // Divides what needs dividing while there is time for it.
  __device__ __forceinline__ void find_rows() {
    if (thread >= kRows) return;
    const int row = min(row_block * kRows + thread, n_rows - 1);
    row_token[thread] = row / group;
    row_head[thread] = j * group + row % group;
  }

  // Positions that this block looks at.
  __device__ __forceinline__ int first_position() const {
    return (first_chunk + chunk) * length;
  }
  __device__ __forceinline__ int end_position() const {
    return min(first_position() + length, end);
  }
  __device__ __forceinline__ bool has_new_tokens() const { return end_position() > position; }

  __device__ __forceinline__ void run() {
    if (chunk >= n_chunks) return;
    const int n_steps = (end_position() + kStep - 1) / kStep;
    int step = max(first_position(), begin) / kStep;
    step += (warp + kWarps - step % kWarps) % kWarps;
    const uint64_t policy = read_once_policy();
    if (lane == 0)
      for (int i = 0; i < kStages; i++) barrier_init(arrived + i, kCopyArrivals);
    barriers_are_ready();
    sync_warp();
    for (int i = 0; i < kStages; i++) ask(step + i * kWarps, n_steps, i, policy);
    for (int i = kStages; i < kStages + kForeseen; i++) foresee(step + i * kWarps, n_steps);
    read_turns();
    find_rows();
    sync_block();
    NewHead first[kAtOnce];
    find_new_heads(warp, first);
    int token_at[kColumns][2];  // positions of rows 8c + 2t and 8c + 2t + 1
    for (int c = 0; c < kColumns; c++)
      for (int i = 0; i < 2; i++)
        token_at[c][i] = min(position + row_token[8 * c + 2 * t + i], end - 1);

    wait_for_predecessor();
    take_new_tokens(first);
    launch_dependents();
    sync_block();
    if (row_block == 0 && end_token == args.tokens) store_new_tokens();
    float sum[kColumns][kQuads][4][4] = {}, max[kColumns][2], weight[kColumns][2] = {};
    for (int c = 0; c < kColumns; c++) max[c][0] = max[c][1] = -infinity();
    attend(step, n_steps, policy, token_at, sum, max, weight);
    sync_block();  // the rings are no longer needed: their memory is
    put_found(sum, max, weight);
    sync_block();
    if (n_chunks == 1)
      write_out();
    else if (put_share())
      join_shares();
  }

  // Before the product has ended.

  __device__ __forceinline__ int history_of(int step) const {  // positions that the cache holds
    return min(kStep, position - kStep * step);
  }

  // Positions that the cache does not hold are zeros until new tokens take their places.
  __device__ __forceinline__ void ask(int step, int n_steps, int stage, uint64_t policy) {
    if (step >= n_steps) return;
    const int n = max(history_of(step), 0);
    bf16* to = ring + stage * 2 * kStep * kE;
    if (n > 0) {
      const int64_t at = static_cast<int64_t>(step) * kStep * kE;
      const int bytes = n * kE * sizeof(bf16);
      copy_begin(arrived + stage, 2 * bytes, lane);
      copy(to, keys + at, bytes, arrived + stage, policy, lane);
      copy(to + kStep * kE, values + at, bytes, arrived + stage, policy, lane);
      copy_end(arrived + stage, lane);
    }
#pragma unroll 1
    for (int i = n * kChunks + lane; i < kStep * kChunks; i += 32)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<uint4*>(to)[kStep * kChunks + i] =
          uint4{0, 0, 0, 0};
  }

  __device__ __forceinline__ void foresee(int step, int n_steps) {
    const int n = history_of(step);
    if (step >= n_steps || n <= 0) return;
    const int64_t at = static_cast<int64_t>(step) * kStep * kE;
    prefetch(keys + at, n * kE * sizeof(bf16), lane);
    prefetch(values + at, n * kE * sizeof(bf16), lane);
  }

  __device__ __forceinline__ void read_turns() {
    for (int i = thread; i < args.tokens * kHalf; i += kThreads) {
      const int token = i / kHalf, e = i % kHalf;
      const int64_t at = static_cast<int64_t>(min(position + token, args.capacity - 1)) * kE + e;
      turns[token * kE + e] = args.cos[at];
      turns[token * kE + kHalf + e] = args.sin[at];
    }
  }

  // New tokens: into shared memory, as the cache will hold them.

  static constexpr int kPairs = (kHalf + 31) / 32;  // of a head's halves, of a lane
  static constexpr int kAtOnce = 4;                 // heads of a warp that are on their way together

  // Where a head of a new token comes from and goes to; a query's and a key's are turned on the way.
  struct NewHead {
    const bf16* from;
    const bf16* norm;
    bf16* to;
    int token;
    bool turned;
  };

  __device__ __forceinline__ int n_new_keys() const { return has_new_tokens() ? args.tokens : 0; }

  // Those of a warp are kWarps apart: queries, then keys, then values.
  __device__ __forceinline__ void find_new_heads(int first, NewHead heads[kAtOnce]) const {
    const int n_keys = n_new_keys(), width = args.heads + 2 * args.kv_heads;
    const bf16* qkv = args.qkv + static_cast<int64_t>(b) * args.tokens * width * kE;
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      const int at = first + i * kWarps, key = at - n_here, value = key - n_keys;
      if (value >= n_keys) break;
      NewHead& h = heads[i];
      h.turned = value < 0;
      int head;
      if (key < 0)
        h.token = row_token[at], head = row_head[at], h.norm = args.q_norm, h.to = new_q + at * kE;
      else if (value < 0)
        h.token = key, head = args.heads + j, h.norm = args.k_norm, h.to = new_k + key * kE;
      else
        h.token = value, head = args.heads + args.kv_heads + j, h.to = new_v + value * kE;
      h.from = qkv + (h.token * width + head) * kE;
    }
  }

  __device__ __forceinline__ void take_new_tokens(NewHead heads[kAtOnce]) {
    const int n = n_here + 2 * n_new_keys();
    for (int first = warp; first < n; first += kAtOnce * kWarps) {
      if (first > warp) find_new_heads(first, heads);
      float x[kAtOnce][kPairs][2];
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        if (first + i * kWarps >= n) break;
        read_head(heads[i].from, x[i]);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        if (first + i * kWarps >= n) break;
        if (heads[i].turned) turn(x[i], heads[i].norm, heads[i].token);
        put_head(x[i], heads[i].to);
      }
    }
  }

  __device__ __forceinline__ void read_head(const bf16* from, float x[kPairs][2]) const {
#pragma unroll
    for (int i = 0; i < kPairs; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int e = 32 * i + lane;
        x[i][half] = e < kHalf ? widen(from[half * kHalf + e]) : 0;
      }
  }

  __device__ __forceinline__ void put_head(const float x[kPairs][2], bf16* to) const {
#pragma unroll
    for (int i = 0; i < kPairs; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int e = 32 * i + lane;
        if (e < kHalf) to[half * kHalf + e] = narrow(x[i][half]);
      }
  }

  // Norm (as the plain one: rounded before and after its weight) and rotation of one head.
  __device__ __forceinline__ void turn(float x[kPairs][2], const bf16* norm, int token) {
    if (norm != nullptr) {
      float squares = 0;
#pragma unroll
      for (int i = 0; i < kPairs; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) squares = fmaf(x[i][half], x[i][half], squares);
      const float factor = rsqrtf(sum_of_warp(squares) / kE + args.eps);
#pragma unroll
      for (int i = 0; i < kPairs; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int e = 32 * i + lane;
          const float w = e < kHalf ? widen(norm[half * kHalf + e]) : 0;
          x[i][half] = widen(narrow(widen(narrow(x[i][half] * factor)) * w));
        }
    }
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      const int e = 32 * i + lane;
      const bool is_there = e < kHalf;
      const float cos = is_there ? turns[token * kE + e] : 0;
      const float sin = is_there ? turns[token * kE + kHalf + e] : 0;
      const float first = x[i][0], second = x[i][1];
      x[i][0] = first * cos - second * sin;
      x[i][1] = second * cos + first * sin;
    }
  }

  // Each is stored by the block whose chunk it is in.
  __device__ __forceinline__ void store_new_tokens() {
    const int first = max(position, first_position());
    const int64_t to = static_cast<int64_t>(first) * kChunks;
    const int from = (first - position) * kChunks;
#pragma unroll 1
    for (int i = thread; i < (end_position() - first) * kChunks; i += kThreads) {
      reinterpret_cast<uint4*>(keys)[to + i] = reinterpret_cast<const uint4*>(new_k)[from + i];
      reinterpret_cast<uint4*>(values)[to + i] = reinterpret_cast<const uint4*>(new_v)[from + i];
    }
  }

  // Scores, softmax and sum.

  __device__ __forceinline__ void attend(int step, int n_steps, uint64_t policy,
                                         const int token_at[kColumns][2],
                                         float sum[kColumns][kQuads][4][4], float max[kColumns][2],
                                         float weight[kColumns][2]) {
    if (step >= n_steps) return;
    uint4 q[kColumns][kBlocks];
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
      const uint4* from = reinterpret_cast<const uint4*>(new_q + (8 * c + g) * kE);
#pragma unroll
      for (int block = 0; block < kBlocks; block++) q[c][block] = from[4 * block + t];
    }
    int stage = 0;
    uint32_t parity = 0;
    for (; step < n_steps; step += kWarps) {
      const int n = history_of(step);
      bf16* k = ring + stage * 2 * kStep * kE;
      bf16* v = k + kStep * kE;
      if (n > 0) barrier_wait(arrived + stage, parity);
      if (n < kStep) add_new_tokens(step, k);

      float even[kColumns][4] = {}, odd[kColumns][4] = {};
      const uint4* k0 = reinterpret_cast<const uint4*>(k + g * kE);
      const uint4* k1 = reinterpret_cast<const uint4*>(k + (g + 8) * kE);
#pragma unroll
      for (int block = 0; block < kBlocks; block++) {
        const uint4 w0 = k0[4 * block + t], w1 = k1[4 * block + t];
        const uint32_t a0[4] = {w0.x, w1.x, w0.y, w1.y}, a1[4] = {w0.z, w1.z, w0.w, w1.w};
#pragma unroll
        for (int c = 0; c < kColumns; c++) {
          mma(even[c], a0, q[c][block].x, q[c][block].y);
          mma(odd[c], a1, q[c][block].z, q[c][block].w);
        }
      }
      uint32_t p[kColumns][2];
#pragma unroll
      for (int c = 0; c < kColumns; c++) {
        for (int i = 0; i < 4; i++) even[c][i] += odd[c][i];
        soften(even[c], kStep * step + g, token_at[c], sum[c], max[c], weight[c], p[c]);
      }
#pragma unroll
      for (int quad = 0; quad < kQuads; quad++) {
        uint4 rows[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const bf16* row = v + (2 * t + (i & 1) + 8 * (i >> 1)) * kE;
          rows[i] = 64 * quad + 8 * g < kE ? reinterpret_cast<const uint4*>(row)[8 * quad + g]
                                           : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int f = 0; f < 4; f++) {
          const uint32_t v0 = word(rows[0], f), v1 = word(rows[1], f);
          const uint32_t v2 = word(rows[2], f), v3 = word(rows[3], f);
          const uint32_t a[4] = {low_halves(v0, v1), high_halves(v0, v1), low_halves(v2, v3),
                                 high_halves(v2, v3)};
#pragma unroll
          for (int c = 0; c < kColumns; c++) mma(sum[c][quad][f], a, p[c][0], p[c][1]);
        }
      }
      sync_warp();  // every lane has read the stage: it can be overwritten
      ask(step + kStages * kWarps, n_steps, stage, policy);
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
#pragma unroll
    for (int c = 0; c < kColumns; c++)
      for (int i = 0; i < 2; i++)
        for (int mask = 4; mask < 32; mask *= 2) weight[c][i] += shuffle_xor(weight[c][i], mask);
  }

  // Into the places of a step that they have; a lane takes two pieces of keys and of values at once.
  __device__ __forceinline__ void add_new_tokens(int step, bf16* k) {
    sync_warp();  // the zeros there are written by other lanes
    const int first = max(position, kStep * step);
    const int n = (min(end, kStep * step + kStep) - first) * kChunks;
    const uint4* keys_from = reinterpret_cast<const uint4*>(new_k) + (first - position) * kChunks;
    const uint4* values_from = reinterpret_cast<const uint4*>(new_v) + (first - position) * kChunks;
    uint4* to = reinterpret_cast<uint4*>(k) + first % kStep * kChunks;
    for (int i = lane; i < n; i += 2 * 32) {
      uint4 piece[2][2];
#pragma unroll
      for (int j = 0; j < 2; j++)
        if (i + 32 * j < n)
          piece[j][0] = keys_from[i + 32 * j], piece[j][1] = values_from[i + 32 * j];
#pragma unroll
      for (int j = 0; j < 2; j++)
        if (i + 32 * j < n)
          to[i + 32 * j] = piece[j][0], to[kStep * kChunks + i + 32 * j] = piece[j][1];
    }
    sync_warp();
  }

  // One step of the running softmax: of scores of positions ``at`` and ``at`` + 8 (rows 8c + 2t
  // and + 1 each) makes the B operand of the sum.
  __device__ __forceinline__ void soften(float score[4], int at, const int token_at[2],
                                         float sum[kQuads][4][4], float max[2], float weight[2],
                                         uint32_t p[2]) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int behind = token_at[i] - (at + 8 * half);
        const bool visible = behind >= 0 && (args.window == 0 || behind < args.window);
        float& s = score[2 * half + i];
        s = visible ? s * args.scale : -infinity();
      }
      float top = fmaxf(max[i], fmaxf(score[i], score[2 + i]));
      for (int mask = 4; mask < 32; mask *= 2) top = fmaxf(top, shuffle_xor(top, mask));
      const float base = finite(top);
      const float shrink = exp2_fast(max[i] - base);
      max[i] = top;
      score[i] = exp2_fast(score[i] - base);
      score[2 + i] = exp2_fast(score[2 + i] - base);
      weight[i] = weight[i] * shrink + (score[i] + score[2 + i]);
#pragma unroll
      for (int quad = 0; quad < kQuads; quad++)
#pragma unroll
        for (int f = 0; f < 4; f++) sum[quad][f][i] *= shrink, sum[quad][f][2 + i] *= shrink;
    }
    p[0] = transpose(narrow(score[0], score[1]));
    p[1] = transpose(narrow(score[2], score[3]));
  }

  // What exponents are taken relative to: where nothing was visible, they are all zero anyway.
  static __device__ __forceinline__ float finite(float top) {
    return top == -infinity() ? 0.0f : top;
  }

  static __device__ __forceinline__ uint32_t word(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
  }

  // Putting it together: each part has its sums, their largest score, and their weight.

  __device__ __forceinline__ void put_found(const float sum[kColumns][kQuads][4][4],
                                            const float max[kColumns][2],
                                            const float weight[kColumns][2]) {
#pragma unroll
    for (int c = 0; c < kColumns; c++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (8 * c + 2 * t + i >= n_here) continue;
        const int row = warp * kRows + 8 * c + 2 * t + i;
        if (g == 0) found_max[row] = max[c][i], found_sum[row] = weight[c][i];
#pragma unroll
        for (int quad = 0; quad < kQuads; quad++)
#pragma unroll
          for (int f = 0; f < 4; f += 2) {
            const int e = 64 * quad + 8 * g + 2 * f;
            if (e < kE)
              reinterpret_cast<float4*>(found)[place_of(row, e / 4)] =
                  float4{sum[c][quad][f][i], sum[c][quad][f][2 + i], sum[c][quad][f + 1][i],
                         sum[c][quad][f + 1][2 + i]};
          }
      }
  }

  // Where four sums of a row are: lanes that write together have four rows, and write to all banks.
  static __device__ __forceinline__ int place_of(int row, int four) {
    return row * kFours + (four ^ (row >> 1 & 1 | row & 4));
  }

  // Of a row, four dimensions side by side.
  struct Merged {
    float4 sum = {0, 0, 0, 0};
    float weight = 0, max = -infinity();

    // Parts are added in order, once their largest score is known.
    __device__ __forceinline__ void add(float4 more, float more_max, float more_weight) {
      const float shrink = exp2_fast(more_max - finite(max));
      sum.x = fmaf(more.x, shrink, sum.x), sum.y = fmaf(more.y, shrink, sum.y);
      sum.z = fmaf(more.z, shrink, sum.z), sum.w = fmaf(more.w, shrink, sum.w);
      weight = fmaf(more_weight, shrink, weight);
    }
  };

  // What this block's warps found.
  __device__ __forceinline__ Merged merged(int row, int four) const {
    Merged m;
#pragma unroll
    for (int w = 0; w < kWarps; w++) m.max = fmaxf(m.max, found_max[w * kRows + row]);
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      const int at = w * kRows + row;
      m.add(reinterpret_cast<const float4*>(found)[place_of(at, four)], found_max[at],
            found_sum[at]);
    }
    return m;
  }

  __device__ __forceinline__ void put_out(int row, int four, const Merged& m) const {
    const int64_t token = static_cast<int64_t>(b) * args.tokens + row_token[row];
    const int64_t at = (token * args.heads + row_head[row]) * kFours + four;
    const float part = 1 / m.weight;
    reinterpret_cast<uint2*>(args.out)[at] = uint2{narrow(m.sum.x * part, m.sum.y * part),
                                                   narrow(m.sum.z * part, m.sum.w * part)};
  }

  __device__ __forceinline__ void write_out() const {
    for (int i = thread; i < n_here * kFours; i += kThreads)
      if (serves(i / kFours)) put_out(i / kFours, i % kFours, merged(i / kFours, i % kFours));
  }

  // [groups][blocks][sums (kRows, E), largest (kRows), weights (kRows)]
  static constexpr int kShare = kRows * kE + 2 * kRows;

  __device__ __forceinline__ int shares() const {
    return (b * args.kv_heads + j) * row_blocks + row_block;
  }
  __device__ __forceinline__ float* share(int of_chunk) const {
    const int64_t block = static_cast<int64_t>(shares()) * gridDim.z + first_block + of_chunk;
    return args.partial + block * kShare;
  }

  __device__ __forceinline__ bool put_share() const {
    float* to = share(chunk);
    for (int i = thread; i < n_here * kFours; i += kThreads) {
      const int row = i / kFours;
      const Merged m = merged(row, i % kFours);
      reinterpret_cast<float4*>(to)[i] = m.sum;
      if (i % kFours == 0) {
        to[kRows * kE + row] = m.max;
        to[kRows * kE + kRows + row] = m.weight;
      }
    }
    uint32_t* counter = args.counters + 2 * shares() + (first_block > 0);
    return is_last_block(counter, n_chunks, flag, thread);
  }

  static constexpr int kTogether = 8;  // shares of a row that are on their way at a time

  __device__ __forceinline__ void join_shares() const {
    float *largest = found, *weights = found + n_chunks * kRows;  // [n_chunks, kRows]
    for (int i = thread; i < n_chunks * kRows; i += kThreads) {
      if (i % kRows >= n_here) continue;
      const float* from = share(i / kRows) + kRows * kE + i % kRows;
      largest[i] = load_from_others(from);
      weights[i] = load_from_others(from + kRows);
    }
    sync_block();
    for (int i = thread; i < n_here * kFours; i += kThreads) {
      const int row = i / kFours;
      if (!serves(row)) continue;
      Merged m;
      for (int s = 0; s < n_chunks; s++) m.max = fmaxf(m.max, largest[s * kRows + row]);
      for (int first = 0; first < n_chunks; first += kTogether) {
        float4 sums[kTogether];
#pragma unroll
        for (int s = 0; s < kTogether; s++)
          if (first + s < n_chunks)
            sums[s] = load_from_others(reinterpret_cast<const float4*>(share(first + s)) + i);
#pragma unroll
        for (int s = 0; s < kTogether; s++) {
          const int at = (first + s) * kRows + row;
          if (first + s < n_chunks) m.add(sums[s], largest[at], weights[at]);
        }
      }
      put_out(row, i % kFours, m);
    }
  }
};

template <int kE, int kWarps, int kColumns, int kStages>
__device__ __forceinline__ void attention(const AttentionArgs& args) {
  Attention<kE, kWarps, kColumns, kStages>(args, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z)
      .run();
}
