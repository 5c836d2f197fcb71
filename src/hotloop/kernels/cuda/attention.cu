// Attention of a few new tokens of each sequence over the cache, straight from the product that
// made their queries, keys and values: norms of query and key heads, rotation, storing the new keys
// and values, scores, softmax, sum.
//
// A block serves eight or sixteen rows (query heads that share a key/value head, times new tokens)
// of one sequence, and one of ``splits`` shares of its history; whichever block comes last merges
// the shares, in their order. Within a share each warp takes every so many-th step of 16 positions,
// and reads keys and values straight into the operands of its products. Which positions a warp
// takes depends on where they are and not on where the sequence ends: so a token's result has the
// same bits however many new tokens come with it.
//
// Letters: B sequences, T new tokens of each, H query heads, J key/value heads, C cache positions,
// E head dimension. g = lane / 4 and t = lane % 4 are a lane's place in fragments.

#include "device.cuh"

struct AttentionArgs {
  const bf16* qkv;           // [B * T, (H + 2J) * E]
  const float* cos;          // [C, E]
  const float* sin;
  const bf16* q_norm;        // [E], or null
  const bf16* k_norm;
  const int64_t* positions;  // [B]: of each sequence's first new token; the others follow it
  bf16* keys;                // [B, J, C, E]
  bf16* values;
  bf16* out;                 // [B * T, H * E]
  float* partial;            // workspace of splits, see is_last_block
  uint32_t* counters;        // zeros, one per group of splits
  int tokens, heads, kv_heads, capacity;
  int window;                // 0 for none
  int splits;
  float scale;               // of scores, times log2(e)
  float eps;                 // of the norms
};

constexpr int kMaxTokens = 16;
constexpr int kStep = 16;  // positions that a warp takes at once

// kColumns: groups of eight rows.
template <int kE, int kWarps, int kColumns>
struct Attention {
  static_assert(kE % 32 == 0, "fragments take 32 dimensions at a time");
  static constexpr int kBlocks = kE / 32;            // of the head dimension, in scores
  static constexpr int kQuads = (kE + 63) / 64;      // of 64 dimensions, in sums
  static constexpr int kRows = 8 * kColumns;
  static constexpr int kThreads = 32 * kWarps;

  const AttentionArgs& args;
  const int thread, lane, warp, g, t;
  const int split, j, row_block, b, row_blocks;
  const int group, n_rows;  // query heads of a key/value head; rows in all
  int position, end;        // of the first new token; one past the last position seen
  bf16 *keys, *values;      // of this sequence and head

  // Shared memory: first the new tokens, then what the warps found.
  bf16 *new_q, *new_k, *new_v;  // [kRows, E], [T, E], [T, E]
  float *found, *found_max, *found_sum;  // [kWarps, kRows, E], [kWarps, kRows] twice
  uint32_t* flag;

  __device__ __forceinline__ Attention(const AttentionArgs& a, int of_thread, int x, int y, int z)
      : args(a), thread(of_thread), lane(thread % 32), warp(thread / 32), g(lane / 4), t(lane % 4),
        split(x), j(y % a.kv_heads), row_block(y / a.kv_heads), b(z),
        row_blocks((a.tokens * (a.heads / a.kv_heads) + kRows - 1) / kRows),
        group(a.heads / a.kv_heads), n_rows(a.tokens * group) {
    const int64_t head = (static_cast<int64_t>(b) * a.kv_heads + j) * a.capacity * kE;
    keys = a.keys + head;
    values = a.values + head;
    uint8_t* memory = shared_memory();
    new_q = reinterpret_cast<bf16*>(memory);
    new_k = new_q + kRows * kE;
    new_v = new_k + a.tokens * kE;
    found = reinterpret_cast<float*>(memory);
    found_max = found + kWarps * kRows * kE;
    found_sum = found_max + kWarps * kRows;
    flag = reinterpret_cast<uint32_t*>(found_sum + kWarps * kRows);
  }

  // A row is a new token and a query head; rows beyond the last repeat it, and are not written.
  __device__ __forceinline__ int row_at(int row) const {
    return min(row_block * kRows + row, n_rows - 1);
  }
  __device__ __forceinline__ int token_of(int row) const { return row_at(row) / group; }
  __device__ __forceinline__ int head_of(int row) const { return j * group + row_at(row) % group; }

  __device__ __forceinline__ void run() {
    launch_dependents();
    wait_for_predecessor();
    position = static_cast<int>(args.positions[b]);
    end = min(position + args.tokens, args.capacity);
    take_new_tokens();
    sync_block();
    if (split == 0 && row_block == 0) store_new_tokens();
    float sum[kColumns][kQuads][4][4] = {}, max[kColumns][2], weight[kColumns][2] = {};
    for (int c = 0; c < kColumns; c++) max[c][0] = max[c][1] = -infinity();
    attend(sum, max, weight);
    sync_block();  // the new tokens are no longer needed: their memory is
    put_found(sum, max, weight);
    sync_block();
    if (args.splits == 1)
      write_out();
    else if (put_share())
      join_shares();
  }

  // New tokens: into shared memory, as the cache will hold them.

  __device__ __forceinline__ void take_new_tokens() {
    const int width = (args.heads + 2 * args.kv_heads) * kE;
    const bf16* qkv = args.qkv + static_cast<int64_t>(b) * args.tokens * width;
    for (int i = warp; i < kRows + 2 * args.tokens; i += kWarps) {
      if (i < kRows) {
        const int token = token_of(i);
        turn(qkv + token * width + head_of(i) * kE, args.q_norm, token, new_q + i * kE);
      } else if (i < kRows + args.tokens) {
        const int token = i - kRows;
        turn(qkv + token * width + (args.heads + j) * kE, args.k_norm, token, new_k + token * kE);
      } else {
        const int token = i - kRows - args.tokens;
        const bf16* v = qkv + token * width + (args.heads + args.kv_heads + j) * kE;
        for (int e = lane; e < kE / 8; e += 32)
          reinterpret_cast<uint4*>(new_v + token * kE)[e] = reinterpret_cast<const uint4*>(v)[e];
      }
    }
  }

  // Norm (as the plain one: rounded before and after its weight) and rotation of one head.
  __device__ __forceinline__ void turn(const bf16* from, const bf16* norm, int token, bf16* to) {
    constexpr int kHalf = kE / 2, kPairs = (kHalf + 31) / 32;
    float x[kPairs][2], squares = 0;
#pragma unroll
    for (int i = 0; i < kPairs; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int e = 32 * i + lane;
        x[i][half] = e < kHalf ? widen(from[half * kHalf + e]) : 0;
        squares = fmaf(x[i][half], x[i][half], squares);
      }
    if (norm != nullptr) {
      for (int mask = 1; mask < 32; mask *= 2) squares += shuffle_xor(squares, mask);
      const float factor = rsqrtf(squares / kE + args.eps);
#pragma unroll
      for (int i = 0; i < kPairs; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int e = 32 * i + lane;
          const float w = e < kHalf ? widen(norm[half * kHalf + e]) : 0;
          x[i][half] = widen(narrow(widen(narrow(x[i][half] * factor)) * w));
        }
    }
    const int64_t at = static_cast<int64_t>(min(position + token, args.capacity - 1)) * kE;
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      const int e = 32 * i + lane;
      if (e >= kHalf) continue;
      const float* cos = args.cos + at + e;
      const float* sin = args.sin + at + e;
      to[e] = narrow(x[i][0] * cos[0] - x[i][1] * sin[0]);
      to[kHalf + e] = narrow(x[i][1] * cos[kHalf] + x[i][0] * sin[kHalf]);
    }
  }

  __device__ __forceinline__ void store_new_tokens() {
    const int n = (end - position) * (kE / 8);
    const int64_t at = static_cast<int64_t>(position) * (kE / 8);
    for (int i = thread; i < n; i += kThreads) {
      reinterpret_cast<uint4*>(keys)[at + i] = reinterpret_cast<const uint4*>(new_k)[i];
      reinterpret_cast<uint4*>(values)[at + i] = reinterpret_cast<const uint4*>(new_v)[i];
    }
  }

  // The history.

  struct Keys {  // of positions g and g + 8 of a step
    uint4 at[2][kBlocks];
  };

  __device__ __forceinline__ const uint4* place(int at, const bf16* cache, const bf16* fresh) const {
    at = min(at, end - 1);
    return reinterpret_cast<const uint4*>(at < position ? cache + static_cast<int64_t>(at) * kE
                                                        : fresh + (at - position) * kE);
  }

  __device__ __forceinline__ void read_keys(int step, Keys& k) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint4* from = place(kStep * step + g + 8 * i, keys, new_k);
#pragma unroll
      for (int block = 0; block < kBlocks; block++) k.at[i][block] = from[4 * block + t];
    }
  }

  __device__ __forceinline__ void attend(float sum[kColumns][kQuads][4][4], float max[kColumns][2],
                                         float weight[kColumns][2]) {
    const int stride = args.splits * kWarps, worker = split * kWarps + warp;
    const int first = args.window > 0 ? max_of(position - args.window + 1, 0) / kStep : 0;
    const int n_steps = (end + kStep - 1) / kStep;
    int step = first + (worker + stride - first % stride) % stride;
    if (step >= n_steps) return;

    uint4 q[kColumns][kBlocks];
    int token_at[kColumns][2];  // positions of rows 8c + 2t and 8c + 2t + 1
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
      const uint4* from = reinterpret_cast<const uint4*>(new_q + (8 * c + g) * kE);
#pragma unroll
      for (int block = 0; block < kBlocks; block++) q[c][block] = from[4 * block + t];
      for (int i = 0; i < 2; i++)
        token_at[c][i] = min(position + token_of(8 * c + 2 * t + i), end - 1);
    }

    Keys k;
    read_keys(step, k);
    for (; step < n_steps; step += stride) {
      uint4 v[kQuads][4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int at = kStep * step + 2 * t + (i & 1) + 8 * (i >> 1);
        const uint4* from = place(at, values, new_v);
#pragma unroll
        for (int quad = 0; quad < kQuads; quad++)
          v[quad][i] = 64 * quad + 8 * g < kE ? from[8 * quad + g] : uint4{0, 0, 0, 0};
      }
      float score[kColumns][4] = {};
#pragma unroll
      for (int block = 0; block < kBlocks; block++) {
        const uint4 k0 = k.at[0][block], k1 = k.at[1][block];
        const uint32_t a0[4] = {k0.x, k1.x, k0.y, k1.y}, a1[4] = {k0.z, k1.z, k0.w, k1.w};
#pragma unroll
        for (int c = 0; c < kColumns; c++) {
          mma(score[c], a0, q[c][block].x, q[c][block].y);
          mma(score[c], a1, q[c][block].z, q[c][block].w);
        }
      }
      if (step + stride < n_steps) read_keys(step + stride, k);
      uint32_t p[kColumns][2];
#pragma unroll
      for (int c = 0; c < kColumns; c++)
        soften(score[c], kStep * step + g, token_at[c], sum[c], max[c], weight[c], p[c]);
#pragma unroll
      for (int quad = 0; quad < kQuads; quad++)
#pragma unroll
        for (int f = 0; f < 4; f++) {
          const uint32_t v0 = word(v[quad][0], f), v1 = word(v[quad][1], f);
          const uint32_t v2 = word(v[quad][2], f), v3 = word(v[quad][3], f);
          const uint32_t a[4] = {low_halves(v0, v1), high_halves(v0, v1), low_halves(v2, v3),
                                 high_halves(v2, v3)};
#pragma unroll
          for (int c = 0; c < kColumns; c++) mma(sum[c][quad][f], a, p[c][0], p[c][1]);
        }
    }
#pragma unroll
    for (int c = 0; c < kColumns; c++)
      for (int i = 0; i < 2; i++)
        for (int mask = 4; mask < 32; mask *= 2) weight[c][i] += shuffle_xor(weight[c][i], mask);
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
      const float base = top == -infinity() ? 0 : top;  // nothing was visible yet
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

  static __device__ __forceinline__ uint32_t word(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
  }
  static __device__ __forceinline__ int max_of(int a, int b) { return a > b ? a : b; }

  // Putting it together: each part has its sums, their largest score, and their weight.

  __device__ __forceinline__ void put_found(const float sum[kColumns][kQuads][4][4],
                                            const float max[kColumns][2],
                                            const float weight[kColumns][2]) {
#pragma unroll
    for (int c = 0; c < kColumns; c++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int row = warp * kRows + 8 * c + 2 * t + i;
        if (g == 0) found_max[row] = max[c][i], found_sum[row] = weight[c][i];
#pragma unroll
        for (int quad = 0; quad < kQuads; quad++)
#pragma unroll
          for (int f = 0; f < 4; f++) {
            const int e = 64 * quad + 8 * g + 2 * f;
            if (e < kE)
              *reinterpret_cast<float2*>(found + row * kE + e) =
                  float2{sum[c][quad][f][i], sum[c][quad][f][2 + i]};
          }
      }
  }

  struct Merged {
    float sum = 0, max = -infinity(), weight = 0;

    __device__ __forceinline__ void add(float more, float more_max, float more_weight) {
      const float top = fmaxf(max, more_max), base = top == -infinity() ? 0 : top;
      const float shrink = exp2_fast(max - base), more_shrink = exp2_fast(more_max - base);
      sum = sum * shrink + more * more_shrink;
      weight = weight * shrink + more_weight * more_shrink;
      max = top;
    }
  };

  // What this block's warps found, of one row and dimension.
  __device__ __forceinline__ Merged merged(int i) const {
    const int row = i / kE;
    Merged m;
    for (int w = 0; w < kWarps; w++)
      m.add(found[w * kRows * kE + i], found_max[w * kRows + row], found_sum[w * kRows + row]);
    return m;
  }

  __device__ __forceinline__ void put_out(int i, const Merged& m) const {
    const int row = i / kE, e = i % kE;
    if (row_block * kRows + row >= n_rows) return;
    const int64_t token = static_cast<int64_t>(b) * args.tokens + token_of(row);
    args.out[(token * args.heads + head_of(row)) * kE + e] = narrow(m.sum / m.weight);
  }

  __device__ __forceinline__ void write_out() const {
    for (int i = thread; i < kRows * kE; i += kThreads) put_out(i, merged(i));
  }

  // [shares of all blocks][splits][sums (kRows, E), largest (kRows), weights (kRows)]
  static constexpr int kShare = kRows * kE + 2 * kRows;

  __device__ __forceinline__ int shares() const {
    return (b * args.kv_heads + j) * row_blocks + row_block;
  }

  __device__ __forceinline__ bool put_share() const {
    float* to = args.partial + (static_cast<int64_t>(shares()) * args.splits + split) * kShare;
    for (int i = thread; i < kRows * kE; i += kThreads) {
      const Merged m = merged(i);
      to[i] = m.sum;
      if (i % kE == 0) {
        to[kRows * kE + i / kE] = m.max;
        to[kRows * kE + kRows + i / kE] = m.weight;
      }
    }
    return is_last_block(args.counters + shares(), args.splits, flag, thread);
  }

  __device__ __forceinline__ void join_shares() const {
    const float* from = args.partial + static_cast<int64_t>(shares()) * args.splits * kShare;
    for (int i = thread; i < kRows * kE; i += kThreads) {
      Merged m;
      for (int s = 0; s < args.splits; s++) {
        const float* share = from + s * kShare;
        m.add(load_from_others(share + i), load_from_others(share + kRows * kE + i / kE),
              load_from_others(share + kRows * kE + kRows + i / kE));
      }
      put_out(i, m);
    }
  }
};

template <int kE, int kWarps, int kColumns>
__device__ __forceinline__ void attention(const AttentionArgs& args) {
  Attention<kE, kWarps, kColumns>(args, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z).run();
}
