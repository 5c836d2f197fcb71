// Decode attention of a few new tokens of each sequence over the cache, and the steps before it:
// norms of query and key heads, rope, and storing the new keys and values. Attention uses online
// softmax. The input is the output of the qkv projection.
//
// The keys of a sequence are split into chunks, one per block, as in flash-decoding. A block serves
// one or two octets of rows (query heads that share a key/value head, times new tokens) of one
// sequence. Blocks beyond the end of a sequence return at once. The last block of a sequence to
// finish merges the partial results of all its blocks, in the order of chunks. Within a chunk there
// are several chains of sums, which take tiles of 16 positions in turn. A warp computes one chain, or
// several one after the other: a block then has fewer warps, and more blocks fit on a multiprocessor.
// With many sequences, some blocks would otherwise issue their first loads only when others have
// ended.
//
// The history (the positions before the new tokens) was written before the decode step began, so it
// is loaded before the wait for the qkv projection: as many tiles as a warp's ring holds into shared
// memory, and a few more into L2. The next kernel may start only when the qkv projection has ended:
// its loads would otherwise be served before those of the new tokens.
//
// The length of a chunk grows with the number of positions that a token sees, so that a long
// sequence has just enough chunks to fill the multiprocessors. If chunks become longer at a position
// between two of the new tokens, some blocks serve the tokens before it, and other blocks the rest.
//
// Determinism: the chunk, chain and tile of a position depend only on that position and on the
// position of the token, and positions that a token does not see add zeros. So a token's result has
// the same bits whatever the number of new tokens and the length of the cache.
//
// Letters: B sequences, T new tokens of each, H query heads, J key/value heads, C cache positions,
// E head dimension, S seats. g = lane / 4 and t = lane % 4 locate a lane in the fragments of mma.

#include "operand.cuh"

struct AttentionArgs {
  const bf16* qkv;           // [B * T, (H + 2J) * E]
  const float* cos;          // [C, E], both halves alike
  const float* sin;
  const bf16* q_norm;        // [E], or null
  const bf16* k_norm;
  const int64_t* positions;  // [B]: of each sequence's first new token; the others follow it
  const int64_t* seats;      // [B]: the seat of each sequence in the cache
  bf16* keys;                // [S, J, C, E]
  bf16* values;
  bf16* out;                 // [B * T, H * E]; not with kHasNext
  float* partial;            // workspace: partial results of chunks, see chunk_partial
  uint32_t* counters;        // zeros, two per group of blocks that are merged
  int tokens, heads, kv_heads, capacity;
  int window;                // 0 for none
  int chunks;                // of a long sequence
  int min_chunk;             // the fewest positions of a chunk, whole tiles
  float scale;               // of scores, times log2(e)
  float eps;                 // of the norms
  NextOperand next_operand;  // with kHasNext: receives the result in place of out
};

constexpr int kTile = 16;            // positions of a tile
constexpr int kPrefetchedTiles = 2;  // tiles of a warp that are prefetched into L2

// kChains: chains of sums of a chunk. kTurns: chains of a warp. kOctets: octets of rows. kStages: tiles
// that a warp's ring holds. kHasNext: the result is stored as the operand of the next matrix product.
template <int kE, int kChains, int kTurns, int kOctets, int kStages, bool kHasNext>
struct Attention {
  static_assert(kChains % kTurns == 0, "warps have as many chains each");
  static_assert(kE % 32 == 0, "fragments take 32 dimensions at a time");
  static constexpr int kSlices = kE / 32;        // of 32 dimensions, in q k^T
  static constexpr int kQuads = (kE + 63) / 64;  // of 64 dimensions, in the sum of values
  static constexpr int kRows = 8 * kOctets;
  static constexpr int kWarps = kChains / kTurns;
  static constexpr int kBlockTile = kTile * kChains;  // positions of a tile per chain
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kHalf = kE / 2;
  static constexpr int kVectors = kE / 8;  // 16-byte vectors of a head
  static constexpr int kFloat4s = kE / 4;  // float4s of a row's result

  const AttentionArgs& args;
  const int thread, lane, warp, g, t;
  const int j, row_block, b, row_blocks;
  const int group;             // query heads of a key/value head
  const int n_rows, n_here;    // rows in all; of this block
  const int position, begin;   // of the first new token; the first position that is visible to it
  int first_token, end_token;  // new tokens that this block serves, whose chunks have one length
  int end;                     // one past the last position that is visible to them
  int length;                  // positions of a chunk
  int first_chunk, n_chunks;   // chunks with visible positions
  int first_block, chunk;      // the first block that serves these tokens; this block's chunk
  bf16 *keys, *values;         // of this sequence and head

  // Shared memory.
  bf16 *new_q, *new_k, *new_v;  // [kRows, E], [T, E], [T, E]
  float* rope;                  // [T, 2, E / 2]: cosines and sines of the new tokens
  int *row_token, *row_head;    // [kRows]: the new token and the query head of a row
  uint64_t* full;               // [kStages], of this warp: barrier: the copy has arrived
  uint32_t* flag;
  bf16* ring;                   // [kStages, 2, kTile, E], of this warp: keys and values
  // The chains' partial results: [kChains, rows, E] (see swizzled), and [kChains, rows] each. They lie
  // in the rings' memory, for kRows rows; or with kTurns behind it, for those that a sequence has.
  // merge_chunks uses that memory too.
  float *partial_out, *partial_max, *partial_exp_sum;

  __device__ __forceinline__ Attention(const AttentionArgs& a, int of_thread, int x, int y, int z)
      : args(a), thread(of_thread), lane(thread % 32), warp(thread / 32), g(lane / 4), t(lane % 4),
        j(x % a.kv_heads), row_block(x / a.kv_heads), b(y),
        row_blocks((a.tokens * (a.heads / a.kv_heads) + kRows - 1) / kRows),
        group(a.heads / a.kv_heads), n_rows(a.tokens * group),
        n_here(min(kRows, n_rows - row_block * kRows)),
        position(static_cast<int>(a.positions[b])),
        begin(a.window > 0 ? max(position - a.window + 1, 0) : 0) {
    assign_chunk(z);
    const int64_t head = (a.seats[b] * a.kv_heads + j) * a.capacity * kE;
    keys = a.keys + head;
    values = a.values + head;
    uint8_t* memory = shared_memory();
    new_q = reinterpret_cast<bf16*>(memory);
    new_k = new_q + kRows * kE;
    new_v = new_k + a.tokens * kE;
    rope = reinterpret_cast<float*>(new_v + a.tokens * kE);
    row_token = reinterpret_cast<int*>(rope + a.tokens * kE);
    row_head = row_token + kRows;
    full = reinterpret_cast<uint64_t*>(row_head + kRows) + warp * kStages;
    flag = reinterpret_cast<uint32_t*>(full + (kWarps - warp) * kStages);
    uint8_t* rings = reinterpret_cast<uint8_t*>(flag) + (kWarps * kStages % 2 ? 8 : 16);
    ring = reinterpret_cast<bf16*>(rings) + warp * kStages * 2 * kTile * kE;
    if (kTurns > 1) rings += kWarps * kStages * 2 * kTile * kE * sizeof(bf16);
    partial_out = reinterpret_cast<float*>(rings);
    partial_max = partial_out + kChains * partial_rows() * kE;
    partial_exp_sum = partial_max + kChains * partial_rows();
  }

  __device__ __forceinline__ int partial_rows() const {
    return kTurns == 1 ? kRows : min(kRows, n_rows);
  }

  // The number of positions of a chunk, for a token at this position.
  __device__ __forceinline__ int length_at(int at) const {
    const int seen = args.window > 0 ? min(at, args.window - 1) : at;
    return max(args.min_chunk, kBlockTile * (seen / (kBlockTile * args.chunks) + 1));
  }

  // Assigns tokens and a chunk to this block, the ``block``-th of those that serve the same rows.
  __device__ __forceinline__ void assign_chunk(int block) {
    first_token = first_block = 0;
    end_token = args.tokens;
    end = min(position + args.tokens, args.capacity);
    length = length_at(position);
    const int last_length = args.tokens > 1 ? length_at(end - 1) : length;
    if (length != last_length) {
      const int longer_from = (last_length / kBlockTile - 1) * kBlockTile * args.chunks;
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

  // The token and head of each row: the divisions take place while loads are in flight.
  __device__ __forceinline__ void find_rows() {
    if (thread >= kRows) return;
    const int row = min(row_block * kRows + thread, n_rows - 1);
    row_token[thread] = row / group;
    row_head[thread] = j * group + row % group;
  }

  // The positions of this block's chunk.
  __device__ __forceinline__ int first_position() const {
    return (first_chunk + chunk) * length;
  }
  __device__ __forceinline__ int end_position() const {
    return min(first_position() + length, end);
  }
  __device__ __forceinline__ bool has_new_tokens() const { return end_position() > position; }

  __device__ __forceinline__ void run() {
    if (chunk >= n_chunks) return;
    const int n_tiles = (end_position() + kTile - 1) / kTile;
    const int first_tile = max(first_position(), begin) / kTile;
    const int tile = first_of(warp, first_tile);
    Cursor ahead = {warp, tile};  // what is copied next
    skip_empty(ahead, first_tile, n_tiles);
    const uint64_t policy = evict_first_policy();
    if (lane == 0)
      for (int i = 0; i < kStages; i++) barrier_init(full + i, kCopyArrivals);
    fence_barrier_init();
    sync_warp();
    for (int i = 0; i < kStages; i++, advance(ahead, first_tile, n_tiles))
      issue_copy(ahead.tile, n_tiles, i, policy);
    Cursor later = ahead;
    for (int i = 0; i < kPrefetchedTiles; i++, advance(later, first_tile, n_tiles))
      prefetch_tile(later.tile, n_tiles);
    load_rope();
    find_rows();
    sync_block();
    NewHead first[kHeadsInFlight];
    find_new_heads(warp, first);
    int token_at[kOctets][2];  // positions of rows 8c + 2t and 8c + 2t + 1
    for (int c = 0; c < kOctets; c++)
      for (int i = 0; i < 2; i++)
        token_at[c][i] = min(position + row_token[8 * c + 2 * t + i], end - 1);

    wait_for_predecessor();
    load_new_tokens(first);
    launch_dependents();
    sync_block();
    if (row_block == 0 && end_token == args.tokens) store_new_tokens();
    Stage stage;
#pragma unroll 1
    for (int turn = 0; turn < kTurns; turn++) {
      const int chain = warp + turn * kWarps;
      float sum[kOctets][kQuads][4][4] = {}, max[kOctets][2], exp_sum[kOctets][2] = {};
      for (int c = 0; c < kOctets; c++) max[c][0] = max[c][1] = -infinity();
      attend(turn == 0 ? tile : first_of(chain, first_tile), n_tiles, stage, ahead, first_tile,
             policy, token_at, sum, max, exp_sum);
      if (kTurns == 1) sync_block();  // the rings' memory is reused
      store_chain_partial(chain, sum, max, exp_sum);
    }
    sync_block();
    if (n_chunks == 1)
      write_outputs();
    else if (store_chunk_partial())
      merge_chunks();
  }

  // A warp's tiles: those of its chains, one after the other.
  struct Cursor {
    int chain, tile;
  };

  static __device__ __forceinline__ int first_of(int chain, int first_tile) {
    const uint32_t chains = kChains;
    return first_tile + (chain + chains - first_tile % chains) % chains;
  }
  static __device__ __forceinline__ void advance(Cursor& at, int first_tile, int n_tiles) {
    at.tile += kChains;
    skip_empty(at, first_tile, n_tiles);
  }
  // Advances to the next chain that has tiles, if this one has no more.
  static __device__ __forceinline__ void skip_empty(Cursor& at, int first_tile, int n_tiles) {
    if constexpr (kTurns > 1)
      while (at.tile >= n_tiles && at.chain + kWarps < kChains)
        at.chain += kWarps, at.tile = first_of(at.chain, first_tile);
  }

  // A stage of a warp's ring, and the parity of its current round.
  struct Stage {
    int index = 0;
    uint32_t parity = 0;
  };

  // Loads that are issued before the wait for the qkv projection.

  // The positions of a tile that the cache holds.
  __device__ __forceinline__ int cached_positions(int tile) const {
    return min(kTile, position - kTile * tile);
  }

  // Whether a tile's barrier is used: without positions in the cache, the tile is its chain's last.
  static __device__ __forceinline__ bool has_phase(int n) { return kTurns > 1 || n > 0; }

  // Positions that the cache does not hold are zeros until the new tokens are inserted.
  __device__ __forceinline__ void issue_copy(int tile, int n_tiles, int stage, uint64_t policy) {
    if (tile >= n_tiles) return;
    const int n = max(cached_positions(tile), 0);
    bf16* to = ring + stage * 2 * kTile * kE;
    if (has_phase(n)) {
      const int64_t at = static_cast<int64_t>(tile) * kTile * kE;
      const int bytes = n * kE * sizeof(bf16);
      copy_begin(full + stage, 2 * bytes, lane);
      if (n > 0) {
        copy(to, keys + at, bytes, full + stage, policy, lane);
        copy(to + kTile * kE, values + at, bytes, full + stage, policy, lane);
      }
      copy_end(full + stage, lane);
    }
#pragma unroll 1
    for (int i = n * kVectors + lane; i < kTile * kVectors; i += 32)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<uint4*>(to)[kTile * kVectors + i] =
          uint4{0, 0, 0, 0};
  }

  __device__ __forceinline__ void prefetch_tile(int tile, int n_tiles) {
    const int n = cached_positions(tile);
    if (tile >= n_tiles || n <= 0) return;
    const int64_t at = static_cast<int64_t>(tile) * kTile * kE;
    prefetch(keys + at, n * kE * sizeof(bf16), lane);
    prefetch(values + at, n * kE * sizeof(bf16), lane);
  }

  __device__ __forceinline__ void load_rope() {
    for (int i = thread; i < args.tokens * kHalf; i += kThreads) {
      const int token = i / kHalf, e = i % kHalf;
      const int64_t at = static_cast<int64_t>(min(position + token, args.capacity - 1)) * kE + e;
      rope[token * kE + e] = args.cos[at];
      rope[token * kE + kHalf + e] = args.sin[at];
    }
  }

  // New tokens: into shared memory, as the cache will hold them.

  static constexpr int kPairs = (kHalf + 31) / 32;  // rope pairs of a lane
  static constexpr int kHeadsInFlight = 4;          // heads that a warp loads together

  // The source and destination of a head of a new token. Queries and keys are rotated (rope).
  struct NewHead {
    const bf16* from;
    const bf16* norm;
    bf16* to;
    int token;
    bool rotated;
  };

  __device__ __forceinline__ int n_new_keys() const { return has_new_tokens() ? args.tokens : 0; }

  // The heads of a warp, kWarps apart, in the order queries, keys, values.
  __device__ __forceinline__ void find_new_heads(int first, NewHead heads[kHeadsInFlight]) const {
    const int n_keys = n_new_keys(), width = args.heads + 2 * args.kv_heads;
    const bf16* qkv = args.qkv + static_cast<int64_t>(b) * args.tokens * width * kE;
#pragma unroll
    for (int i = 0; i < kHeadsInFlight; i++) {
      const int at = first + i * kWarps, key = at - n_here, value = key - n_keys;
      if (value >= n_keys) break;
      NewHead& h = heads[i];
      h.rotated = value < 0;
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

  __device__ __forceinline__ void load_new_tokens(NewHead heads[kHeadsInFlight]) {
    const int n = n_here + 2 * n_new_keys();
    for (int first = warp; first < n; first += kHeadsInFlight * kWarps) {
      if (first > warp) find_new_heads(first, heads);
      float x[kHeadsInFlight][kPairs][2];
#pragma unroll
      for (int i = 0; i < kHeadsInFlight; i++) {
        if (first + i * kWarps >= n) break;
        load_head(heads[i].from, x[i]);
      }
#pragma unroll
      for (int i = 0; i < kHeadsInFlight; i++) {
        if (first + i * kWarps >= n) break;
        if (heads[i].rotated) norm_and_rope(x[i], heads[i].norm, heads[i].token);
        store_head(x[i], heads[i].to);
      }
    }
  }

  __device__ __forceinline__ void load_head(const bf16* from, float x[kPairs][2]) const {
#pragma unroll
    for (int i = 0; i < kPairs; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int e = 32 * i + lane;
        x[i][half] = e < kHalf ? widen(from[half * kHalf + e]) : 0;
      }
  }

  __device__ __forceinline__ void store_head(const float x[kPairs][2], bf16* to) const {
#pragma unroll
    for (int i = 0; i < kPairs; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int e = 32 * i + lane;
        if (e < kHalf) to[half * kHalf + e] = narrow(x[i][half]);
      }
  }

  // Norm (rounded before and after its weight, as in reference.rms_norm) and rope of one head.
  __device__ __forceinline__ void norm_and_rope(float x[kPairs][2], const bf16* norm, int token) {
    if (norm != nullptr) {
      float squares = 0;
#pragma unroll
      for (int i = 0; i < kPairs; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) squares = fmaf(x[i][half], x[i][half], squares);
      const float factor = rsqrtf(warp_sum(squares) / kE + args.eps);
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
      const float cos = is_there ? rope[token * kE + e] : 0;
      const float sin = is_there ? rope[token * kE + kHalf + e] : 0;
      const float first = x[i][0], second = x[i][1];
      x[i][0] = first * cos - second * sin;
      x[i][1] = second * cos + first * sin;
    }
  }

  // Stores the new keys and values of this block's chunk to the cache.
  __device__ __forceinline__ void store_new_tokens() {
    const int first = max(position, first_position());
    const int64_t to = static_cast<int64_t>(first) * kVectors;
    const int from = (first - position) * kVectors;
#pragma unroll 1
    for (int i = thread; i < (end_position() - first) * kVectors; i += kThreads) {
      reinterpret_cast<uint4*>(keys)[to + i] = reinterpret_cast<const uint4*>(new_k)[from + i];
      reinterpret_cast<uint4*>(values)[to + i] = reinterpret_cast<const uint4*>(new_v)[from + i];
    }
  }

  // Scores, softmax and sum.

  // One chain, from its first tile on.
  __device__ __forceinline__ void attend(int tile, int n_tiles, Stage& stage, Cursor& ahead,
                                         int first_tile, uint64_t policy,
                                         const int token_at[kOctets][2],
                                         float sum[kOctets][kQuads][4][4], float max[kOctets][2],
                                         float exp_sum[kOctets][2]) {
    if (tile >= n_tiles) return;
    uint4 q[kOctets][kSlices];
#pragma unroll
    for (int c = 0; c < kOctets; c++) {
      const uint4* from = reinterpret_cast<const uint4*>(new_q + (8 * c + g) * kE);
#pragma unroll
      for (int slice = 0; slice < kSlices; slice++) q[c][slice] = from[4 * slice + t];
    }
    for (; tile < n_tiles; tile += kChains) {
      const int n = cached_positions(tile);
      bf16* k = ring + stage.index * 2 * kTile * kE;
      bf16* v = k + kTile * kE;
      if (has_phase(n)) barrier_wait(full + stage.index, stage.parity);
      if (n < kTile) insert_new_tokens(tile, k);

      float even[kOctets][4] = {}, odd[kOctets][4] = {};
      const uint4* k0 = reinterpret_cast<const uint4*>(k + g * kE);
      const uint4* k1 = reinterpret_cast<const uint4*>(k + (g + 8) * kE);
#pragma unroll
      for (int slice = 0; slice < kSlices; slice++) {
        const uint4 w0 = k0[4 * slice + t], w1 = k1[4 * slice + t];
        const uint32_t a0[4] = {w0.x, w1.x, w0.y, w1.y}, a1[4] = {w0.z, w1.z, w0.w, w1.w};
#pragma unroll
        for (int c = 0; c < kOctets; c++) {
          mma(even[c], a0, q[c][slice].x, q[c][slice].y);
          mma(odd[c], a1, q[c][slice].z, q[c][slice].w);
        }
      }
      uint32_t p[kOctets][2];
#pragma unroll
      for (int c = 0; c < kOctets; c++) {
        for (int i = 0; i < 4; i++) even[c][i] += odd[c][i];
        online_softmax(even[c], kTile * tile + g, token_at[c], sum[c], max[c], exp_sum[c], p[c]);
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
          for (int c = 0; c < kOctets; c++) mma(sum[c][quad][f], a, p[c][0], p[c][1]);
        }
      }
      sync_warp();  // every lane has read the stage, so it can be overwritten
      issue_copy(kTurns == 1 ? tile + kStages * kChains : ahead.tile, n_tiles, stage.index, policy);
      advance(ahead, first_tile, n_tiles);
      if (++stage.index == kStages) stage = {0, stage.parity ^ 1};
    }
#pragma unroll
    for (int c = 0; c < kOctets; c++)
      for (int i = 0; i < 2; i++)
        for (int mask = 4; mask < 32; mask *= 2) exp_sum[c][i] += shuffle_xor(exp_sum[c][i], mask);
  }

  // Inserts new keys and values into a tile; a lane has two vectors of each in flight.
  __device__ __forceinline__ void insert_new_tokens(int tile, bf16* k) {
    sync_warp();  // other lanes have written the zeros
    const int first = max(position, kTile * tile);
    const int n = (min(end, kTile * tile + kTile) - first) * kVectors;
    const uint4* keys_from = reinterpret_cast<const uint4*>(new_k) + (first - position) * kVectors;
    const uint4* values_from =
        reinterpret_cast<const uint4*>(new_v) + (first - position) * kVectors;
    uint4* to = reinterpret_cast<uint4*>(k) + first % kTile * kVectors;
    for (int i = lane; i < n; i += 2 * 32) {
      uint4 piece[2][2];
#pragma unroll
      for (int j = 0; j < 2; j++)
        if (i + 32 * j < n)
          piece[j][0] = keys_from[i + 32 * j], piece[j][1] = values_from[i + 32 * j];
#pragma unroll
      for (int j = 0; j < 2; j++)
        if (i + 32 * j < n)
          to[i + 32 * j] = piece[j][0], to[kTile * kVectors + i + 32 * j] = piece[j][1];
    }
    sync_warp();
  }

  // Online softmax over one tile: masks the scores of positions ``at`` and ``at`` + 8 (of rows
  // 8c + 2t and 8c + 2t + 1), rescales the running sums to the new maximum, and returns exp(score)
  // as the B operand of the sum of values.
  __device__ __forceinline__ void online_softmax(float score[4], int at, const int token_at[2],
                                         float sum[kQuads][4][4], float max[2], float exp_sum[2],
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
      const float rescale = exp2_fast(max[i] - base);
      max[i] = top;
      score[i] = exp2_fast(score[i] - base);
      score[2 + i] = exp2_fast(score[2 + i] - base);
      exp_sum[i] = exp_sum[i] * rescale + (score[i] + score[2 + i]);
#pragma unroll
      for (int quad = 0; quad < kQuads; quad++)
#pragma unroll
        for (int f = 0; f < 4; f++) sum[quad][f][i] *= rescale, sum[quad][f][2 + i] *= rescale;
    }
    p[0] = transpose(narrow(score[0], score[1]));
    p[1] = transpose(narrow(score[2], score[3]));
  }

  // The number that is subtracted from scores. If no position is visible, any finite number does.
  static __device__ __forceinline__ float finite(float top) {
    return top == -infinity() ? 0.0f : top;
  }

  static __device__ __forceinline__ uint32_t word(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
  }

  // Merging: a partial result is a sum of values, its largest score, and its sum of exponentials.

  __device__ __forceinline__ void store_chain_partial(int chain,
                                                      const float sum[kOctets][kQuads][4][4],
                                                      const float max[kOctets][2],
                                                      const float exp_sum[kOctets][2]) {
#pragma unroll
    for (int c = 0; c < kOctets; c++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (8 * c + 2 * t + i >= n_here) continue;
        const int row = chain * partial_rows() + 8 * c + 2 * t + i;
        if (g == 0) partial_max[row] = max[c][i], partial_exp_sum[row] = exp_sum[c][i];
#pragma unroll
        for (int quad = 0; quad < kQuads; quad++)
#pragma unroll
          for (int f = 0; f < 4; f += 2) {
            const int e = 64 * quad + 8 * g + 2 * f;
            if (e < kE)
              reinterpret_cast<float4*>(partial_out)[swizzled(row, e / 4)] =
                  float4{sum[c][quad][f][i], sum[c][quad][f][2 + i], sum[c][quad][f + 1][i],
                         sum[c][quad][f + 1][2 + i]};
          }
      }
  }

  // The index of a row's float4: lanes that write at once write four rows, without bank conflicts.
  static __device__ __forceinline__ int swizzled(int row, int f4) {
    return row * kFloat4s + (f4 ^ (row >> 1 & 1 | row & 4));
  }

  // The merged result of four adjacent dimensions of a row.
  struct Merged {
    float4 sum = {0, 0, 0, 0};
    float exp_sum = 0, max = -infinity();

    // Partial results are added in a fixed order, once the largest score of all is known.
    __device__ __forceinline__ void add(float4 more, float more_max, float more_exp_sum) {
      const float rescale = exp2_fast(more_max - finite(max));
      sum.x = fmaf(more.x, rescale, sum.x), sum.y = fmaf(more.y, rescale, sum.y);
      sum.z = fmaf(more.z, rescale, sum.z), sum.w = fmaf(more.w, rescale, sum.w);
      exp_sum = fmaf(more_exp_sum, rescale, exp_sum);
    }
  };

  // Merges the partial results of this block's chains.
  __device__ __forceinline__ Merged merged(int row, int f4) const {
    Merged m;
#pragma unroll
    for (int i = 0; i < kChains; i++)
      m.max = fmaxf(m.max, partial_max[i * partial_rows() + row]);
#pragma unroll
    for (int i = 0; i < kChains; i++) {
      const int at = i * partial_rows() + row;
      m.add(reinterpret_cast<const float4*>(partial_out)[swizzled(at, f4)], partial_max[at],
            partial_exp_sum[at]);
    }
    return m;
  }

  __device__ __forceinline__ void store_output(int row, int f4, const Merged& m) const {
    const int64_t token = static_cast<int64_t>(b) * args.tokens + row_token[row];
    const float part = 1 / m.exp_sum;
    const uint2 result = {narrow(m.sum.x * part, m.sum.y * part),
                          narrow(m.sum.z * part, m.sum.w * part)};
    if constexpr (kHasNext) {
      const NextOperand& next = args.next_operand;
      const NextOperand::Place at = next.place(row_head[row] * kE + f4 / 2 * 8);
      next.store_pair(at, static_cast<int>(token), f4 % 2 * 2, result.x);
      next.store_pair(at, static_cast<int>(token), f4 % 2 * 2 + 1, result.y);
    } else {
      const int64_t at = (token * args.heads + row_head[row]) * kFloat4s + f4;
      reinterpret_cast<uint2*>(args.out)[at] = result;
    }
  }

  __device__ __forceinline__ void write_outputs() const {
    for (int i = thread; i < n_here * kFloat4s; i += kThreads)
      if (serves(i / kFloat4s))
        store_output(i / kFloat4s, i % kFloat4s, merged(i / kFloat4s, i % kFloat4s));
  }

  // args.partial: [groups][blocks][sums (kRows, E), maxima (kRows), sums of exponentials (kRows)]
  static constexpr int kPartialSize = kRows * kE + 2 * kRows;

  __device__ __forceinline__ int partial_group() const {
    return (b * args.kv_heads + j) * row_blocks + row_block;
  }
  __device__ __forceinline__ float* chunk_partial(int of_chunk) const {
    const int64_t block =
        static_cast<int64_t>(partial_group()) * gridDim.z + first_block + of_chunk;
    return args.partial + block * kPartialSize;
  }

  __device__ __forceinline__ bool store_chunk_partial() const {
    float* to = chunk_partial(chunk);
    for (int i = thread; i < n_here * kFloat4s; i += kThreads) {
      const int row = i / kFloat4s;
      const Merged m = merged(row, i % kFloat4s);
      reinterpret_cast<float4*>(to)[i] = m.sum;
      if (i % kFloat4s == 0) {
        to[kRows * kE + row] = m.max;
        to[kRows * kE + kRows + row] = m.exp_sum;
      }
    }
    uint32_t* counter = args.counters + 2 * partial_group() + (first_block > 0);
    return is_last_block(counter, n_chunks, flag, thread);
  }

  static constexpr int kInFlight = 8;  // partial results of a row that are loaded together

  __device__ __forceinline__ void merge_chunks() const {
    float *maxima = partial_out, *exp_sums = partial_out + n_chunks * kRows;  // [n_chunks, kRows]
    for (int i = thread; i < n_chunks * kRows; i += kThreads) {
      if (i % kRows >= n_here) continue;
      const float* from = chunk_partial(i / kRows) + kRows * kE + i % kRows;
      maxima[i] = load_from_l2(from);
      exp_sums[i] = load_from_l2(from + kRows);
    }
    sync_block();
    for (int i = thread; i < n_here * kFloat4s; i += kThreads) {
      const int row = i / kFloat4s;
      if (!serves(row)) continue;
      Merged m;
      for (int s = 0; s < n_chunks; s++) m.max = fmaxf(m.max, maxima[s * kRows + row]);
      for (int first = 0; first < n_chunks; first += kInFlight) {
        float4 sums[kInFlight];
#pragma unroll
        for (int s = 0; s < kInFlight; s++)
          if (first + s < n_chunks)
            sums[s] = load_from_l2(reinterpret_cast<const float4*>(chunk_partial(first + s)) + i);
#pragma unroll
        for (int s = 0; s < kInFlight; s++) {
          const int at = (first + s) * kRows + row;
          if (first + s < n_chunks) m.add(sums[s], maxima[at], exp_sums[at]);
        }
      }
      store_output(row, i % kFloat4s, m);
    }
  }
};

template <int kE, int kChains, int kTurns, int kOctets, int kStages, bool kHasNext>
__device__ __forceinline__ void attention(const AttentionArgs& args) {
  Attention<kE, kChains, kTurns, kOctets, kStages, kHasNext>(args, threadIdx.x, blockIdx.x,
                                                             blockIdx.y, blockIdx.z)
      .run();
}
