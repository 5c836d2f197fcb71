// Prefill kernels between the GEMMs, which cuBLAS computes on dequantized weights.
//
// The GEMMs apply neither the scale per output feature nor the bias. The kernel that reads the output
// of a GEMM applies both first, and rounds once.
//
// Letters: M rows, K width, F feed-forward width, H query heads, J key/value heads, S seats,
// C cache positions, E head dimension.

#include "pointwise.cuh"

// Applies scales and biases to a pair of features of a GEMM's output, the first being ``at``.
__device__ __forceinline__ void apply_scale_and_bias(uint32_t pair, const float* scale,
                                                     const bf16* bias, int at, float result[2]) {
  result[0] = low(pair), result[1] = high(pair);
  for (int i = 0; i < 2; i++) {
    if (scale != nullptr) result[i] *= scale[at + i];
    if (bias != nullptr) result[i] += widen(bias[at + i]);
  }
}

// Eight bfloat16 values, as four pairs.
struct Bf16x8 {
  uint4 all;
  __device__ __forceinline__ uint32_t& operator[](int pair) { return (&all.x)[pair]; }
  __device__ __forceinline__ uint32_t operator[](int pair) const { return (&all.x)[pair]; }
};

struct AddNormArgs {
  const bf16* x;       // [M, K]: the residual stream
  const bf16* gemm;    // [M, K]: a GEMM's output, added to x, or null
  const float* scale;  // [K], of the GEMM's weight, or null
  const bf16* bias;    // [K], or null
  const bf16* weight;  // [K], of the norm
  bf16* sum;           // [M, K]: x + gemm, or null without gemm; may be x
  bf16* normed;        // [M, K]
  int k;
  float eps;
};

// Adds a GEMM's output to the residual stream, and normalizes the sum (RMS norm). A block per row;
// K is a multiple of 8.
template <int kWarps>
__device__ __forceinline__ void add_norm(const AddNormArgs& args) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * args.k;
  wait_for_predecessor();
  const uint4* x = reinterpret_cast<const uint4*>(args.x + row);
  uint4* sum = reinterpret_cast<uint4*>(args.sum + row);
  const bool adds = args.gemm != nullptr;
  float squares = 0;
  for (int i = thread; i < args.k / 8; i += 32 * kWarps) {
    Bf16x8 here{x[i]};
    if (adds) {
      const Bf16x8 gemm{reinterpret_cast<const uint4*>(args.gemm + row)[i]};
#pragma unroll
      for (int p = 0; p < 4; p++) {
        float added[2];
        apply_scale_and_bias(gemm[p], args.scale, args.bias, 8 * i + 2 * p, added);
        here[p] = narrow(low(here[p]) + added[0], high(here[p]) + added[1]);
      }
      sum[i] = here.all;
    }
#pragma unroll
    for (int p = 0; p < 4; p++) squares = add_squares(here[p], squares);
  }
  float* warp_sums = reinterpret_cast<float*>(shared_memory());
  squares = warp_sum(squares);
  if (lane == 0) warp_sums[warp] = squares;
  sync_block();
  squares = 0;
  for (int w = 0; w < kWarps; w++) squares += warp_sums[w];
  const float factor = rsqrtf(squares / args.k + args.eps);
  for (int i = thread; i < args.k / 8; i += 32 * kWarps) {
    const Bf16x8 here{adds ? sum[i] : x[i]};  // written by this thread itself
    const Bf16x8 weight{reinterpret_cast<const uint4*>(args.weight)[i]};
    Bf16x8 normed;
#pragma unroll
    for (int p = 0; p < 4; p++)
      normed[p] = times(narrow(low(here[p]) * factor, high(here[p]) * factor), weight[p]);
    reinterpret_cast<uint4*>(args.normed + row)[i] = normed.all;
  }
}

struct RopeArgs {
  const bf16* gemm;     // [M, (H + 2J) * E]: queries, keys and values
  const float* scale;   // [(H + 2J) * E], of the GEMM's weight, or null
  const bf16* bias;     // [(H + 2J) * E], or null
  const float* cos;     // [C, E], both halves alike
  const float* sin;
  const bf16* q_norm;   // [E], or null
  const bf16* k_norm;
  const int64_t* seat;  // of the cache
  const int64_t* start; // position of the first row; the others follow it
  bf16* q;              // [M, H * E]
  bf16* new_keys;       // [M, J * E]
  bf16* new_values;
  bf16* keys;           // [S, J, C, E]: the cache
  bf16* values;
  int heads, kv_heads, capacity;
  float eps;            // of the norms
};

// Norms and rope of query and key heads. Keys and values are stored twice: to the cache, and to
// tensors of their own for attention among the rows. A warp per head of a row; a lane has pairs of
// the first half and the pairs of the second half that rotate with them.
template <int kE, int kWarps>
__device__ __forceinline__ void rope(const RopeArgs& args) {
  constexpr int kHalf = kE / 2, kPairs = kE / 4, kRounds = (kPairs + 31) / 32;
  const int lane = threadIdx.x % 32, row = blockIdx.x;
  const int head = blockIdx.y * kWarps + threadIdx.x / 32, n_heads = args.heads + 2 * args.kv_heads;
  if (head >= n_heads) return;
  wait_for_predecessor();
  const bool is_query = head < args.heads, rotates = head < args.heads + args.kv_heads;
  const bf16* from = args.gemm + static_cast<int64_t>(row) * n_heads * kE;
  const int64_t position = *args.start + row;
  float x[kRounds][2][2];  // [half][element of a pair]
  float squares = 0;
  for (int i = 0; i < kRounds; i++)
    for (int h = 0; h < 2; h++) {
      x[i][h][0] = x[i][h][1] = 0;
      if (lane + 32 * i >= kPairs) continue;
      const int at = head * kE + h * kHalf + 2 * (lane + 32 * i);
      apply_scale_and_bias(*reinterpret_cast<const uint32_t*>(from + at), args.scale, args.bias, at,
                           x[i][h]);
      for (int p = 0; p < 2; p++) {
        x[i][h][p] = widen(narrow(x[i][h][p]));
        squares = fmaf(x[i][h][p], x[i][h][p], squares);
      }
    }
  const bf16* norm = is_query ? args.q_norm : rotates ? args.k_norm : nullptr;
  const float factor = norm == nullptr ? 1 : rsqrtf(warp_sum(squares) / kE + args.eps);
  bf16* to = args.q + (static_cast<int64_t>(row) * args.heads + head) * kE;
  bf16* in_cache = nullptr;
  if (!is_query) {
    const int j = (head - args.heads) % args.kv_heads;
    to = (rotates ? args.new_keys : args.new_values) +
         (static_cast<int64_t>(row) * args.kv_heads + j) * kE;
    in_cache = (rotates ? args.keys : args.values) +
               ((*args.seat * args.kv_heads + j) * args.capacity + position) * kE;
  }
  for (int i = 0; i < kRounds; i++) {
    if (lane + 32 * i >= kPairs) continue;
    const int e = 2 * (lane + 32 * i);
    uint32_t result[2] = {narrow(x[i][0][0], x[i][0][1]), narrow(x[i][1][0], x[i][1][1])};
    if (norm != nullptr)
      for (int h = 0; h < 2; h++) {
        const uint32_t normalized = narrow(x[i][h][0] * factor, x[i][h][1] * factor);
        const uint32_t weight = *reinterpret_cast<const uint32_t*>(norm + h * kHalf + e);
        result[h] = times(normalized, weight);
      }
    if (rotates) {
      const int64_t rope_at = position * kE + e;
      const float2 cos = *reinterpret_cast<const float2*>(args.cos + rope_at);
      const float2 sin = *reinterpret_cast<const float2*>(args.sin + rope_at);
      const float a[2] = {low(result[0]), high(result[0])};
      const float b[2] = {low(result[1]), high(result[1])};
      result[0] = narrow(a[0] * cos.x - b[0] * sin.x, a[1] * cos.y - b[1] * sin.y);
      result[1] = narrow(b[0] * cos.x + a[0] * sin.x, b[1] * cos.y + a[1] * sin.y);
    }
    for (int h = 0; h < 2; h++) {
      *reinterpret_cast<uint32_t*>(to + h * kHalf + e) = result[h];
      if (!is_query) *reinterpret_cast<uint32_t*>(in_cache + h * kHalf + e) = result[h];
    }
  }
}

struct SwigluArgs {
  const bf16* gemm;     // [M, 2F]: gate features, then up features
  const float* scale;   // [2F], of the GEMM's weight, or null
  const bf16* bias;     // [2F], or null
  bf16* out;            // [M, F]
  int f;
};

// SwiGLU: SiLU of the gates times the ups. A thread takes eight features of a row; F is a multiple
// of 8.
__device__ __forceinline__ void swiglu(const SwigluArgs& args) {
  const int row = blockIdx.x, first = 8 * (blockIdx.y * blockDim.x + threadIdx.x);
  if (first >= args.f) return;
  wait_for_predecessor();
  const bf16* gemm = args.gemm + static_cast<int64_t>(row) * 2 * args.f;
  const Bf16x8 gates{*reinterpret_cast<const uint4*>(gemm + first)};
  const Bf16x8 ups{*reinterpret_cast<const uint4*>(gemm + args.f + first)};
  Bf16x8 result;
#pragma unroll
  for (int p = 0; p < 4; p++) {
    float gate[2], up[2];
    apply_scale_and_bias(gates[p], args.scale, args.bias, first + 2 * p, gate);
    apply_scale_and_bias(ups[p], args.scale, args.bias, args.f + first + 2 * p, up);
    result[p] = narrow(silu(gate[0]) * up[0], silu(gate[1]) * up[1]);
  }
  *reinterpret_cast<uint4*>(args.out + static_cast<int64_t>(row) * args.f + first) = result.all;
}
