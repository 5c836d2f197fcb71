// What the many rows of a prompt go through between products: those are the vendor's, on weights
// given back as plain rows, and whatever can be done to their results on the way is done here.
//
// Results of products come as they are: a scale per feature, where the weight has one, and a bias
// are applied before anything else, and the sum is rounded once.
//
// Letters: M rows, K width, F feed-forward width, H query heads, J key/value heads, S slots, C cache
// positions, E head dimension.

#include "pointwise.cuh"

// A product's pair of features from ``at`` on: with their scales and biases.
__device__ __forceinline__ void finish(uint32_t pair, const float* scale, const bf16* bias, int at,
                                       float result[2]) {
  result[0] = low(pair), result[1] = high(pair);
  for (int i = 0; i < 2; i++) {
    if (scale != nullptr) result[i] *= scale[at + i];
    if (bias != nullptr) result[i] += widen(bias[at + i]);
  }
}

// Eight features, as four pairs.
struct Eight {
  uint4 all;
  __device__ __forceinline__ uint32_t& operator[](int pair) { return (&all.x)[pair]; }
  __device__ __forceinline__ uint32_t operator[](int pair) const { return (&all.x)[pair]; }
};

struct AddNormArgs {
  const bf16* x;       // [M, K]: the residual stream
  const bf16* product; // [M, K]: added to it, or null
  const float* scale;  // [K], of the product, or null
  const bf16* bias;    // [K], or null
  const bf16* weight;  // [K], of the norm
  bf16* sum;           // [M, K]: of x and the product, if there is one; may be x
  bf16* normed;        // [M, K]
  int k;
  float eps;
};

// Adds a product to the residual stream, and normalizes that. A block per row; K is a multiple of 8.
template <int kWarps>
__device__ __forceinline__ void add_norm(const AddNormArgs& args) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * args.k;
  wait_for_predecessor();
  const uint4* x = reinterpret_cast<const uint4*>(args.x + row);
  uint4* sum = reinterpret_cast<uint4*>(args.sum + row);
  const bool adds = args.product != nullptr;
  float squares = 0;
  for (int i = thread; i < args.k / 8; i += 32 * kWarps) {
    Eight here{x[i]};
    if (adds) {
      const Eight product{reinterpret_cast<const uint4*>(args.product + row)[i]};
#pragma unroll
      for (int p = 0; p < 4; p++) {
        float added[2];
        finish(product[p], args.scale, args.bias, 8 * i + 2 * p, added);
        here[p] = narrow(low(here[p]) + added[0], high(here[p]) + added[1]);
      }
      sum[i] = here.all;
    }
#pragma unroll
    for (int p = 0; p < 4; p++) squares = add_squares(here[p], squares);
  }
  float* of_warps = reinterpret_cast<float*>(shared_memory());
  squares = sum_of_warp(squares);
  if (lane == 0) of_warps[warp] = squares;
  sync_block();
  squares = 0;
  for (int w = 0; w < kWarps; w++) squares += of_warps[w];
  const float factor = rsqrtf(squares / args.k + args.eps);
  for (int i = thread; i < args.k / 8; i += 32 * kWarps) {
    const Eight here{adds ? sum[i] : x[i]};  // what this thread itself has written
    const Eight weight{reinterpret_cast<const uint4*>(args.weight)[i]};
    Eight normed;
#pragma unroll
    for (int p = 0; p < 4; p++)
      normed[p] = times(narrow(low(here[p]) * factor, high(here[p]) * factor), weight[p]);
    reinterpret_cast<uint4*>(args.normed + row)[i] = normed.all;
  }
}

struct RotateArgs {
  const bf16* product;  // [M, (H + 2J) * E]: queries, keys and values
  const float* scale;   // [(H + 2J) * E], of the product, or null
  const bf16* bias;     // [(H + 2J) * E], or null
  const float* cos;     // [C, E], both halves alike
  const float* sin;
  const bf16* q_norm;   // [E], or null
  const bf16* k_norm;
  const int64_t* slot;  // of the cache
  const int64_t* start; // position of the first row; the others follow it
  bf16* q;              // [M, H * E]
  bf16* new_keys;       // [M, J * E]
  bf16* new_values;
  bf16* keys;           // [S, J, C, E]: the cache
  bf16* values;
  int heads, kv_heads, capacity;
  float eps;            // of the norms
};

// Norms and rotation of query and key heads; keys and values go into the cache, and by themselves
// to where the rows' own attention reads them. A warp per head of a row, in which a lane has pairs
// of the first half and those that turn with them.
template <int kE, int kWarps>
__device__ __forceinline__ void rotate(const RotateArgs& args) {
  constexpr int kHalf = kE / 2, kPairs = kE / 4, kTurns = (kPairs + 31) / 32;
  const int lane = threadIdx.x % 32, row = blockIdx.x;
  const int head = blockIdx.y * kWarps + threadIdx.x / 32, n_heads = args.heads + 2 * args.kv_heads;
  if (head >= n_heads) return;
  wait_for_predecessor();
  const bool is_query = head < args.heads, turns = head < args.heads + args.kv_heads;
  const bf16* from = args.product + static_cast<int64_t>(row) * n_heads * kE;
  const int64_t position = *args.start + row;
  float x[kTurns][2][2];  // of which half, which of a pair
  float squares = 0;
  for (int i = 0; i < kTurns; i++)
    for (int h = 0; h < 2; h++) {
      x[i][h][0] = x[i][h][1] = 0;
      if (lane + 32 * i >= kPairs) continue;
      const int at = head * kE + h * kHalf + 2 * (lane + 32 * i);
      finish(*reinterpret_cast<const uint32_t*>(from + at), args.scale, args.bias, at, x[i][h]);
      for (int p = 0; p < 2; p++) {
        x[i][h][p] = widen(narrow(x[i][h][p]));
        squares = fmaf(x[i][h][p], x[i][h][p], squares);
      }
    }
  const bf16* norm = is_query ? args.q_norm : turns ? args.k_norm : nullptr;
  const float factor = norm == nullptr ? 1 : rsqrtf(sum_of_warp(squares) / kE + args.eps);
  bf16* to = args.q + (static_cast<int64_t>(row) * args.heads + head) * kE;
  bf16* in_cache = nullptr;
  if (!is_query) {
    const int j = (head - args.heads) % args.kv_heads;
    to = (turns ? args.new_keys : args.new_values) +
         (static_cast<int64_t>(row) * args.kv_heads + j) * kE;
    in_cache = (turns ? args.keys : args.values) +
               ((*args.slot * args.kv_heads + j) * args.capacity + position) * kE;
  }
  for (int i = 0; i < kTurns; i++) {
    if (lane + 32 * i >= kPairs) continue;
    const int e = 2 * (lane + 32 * i);
    uint32_t result[2] = {narrow(x[i][0][0], x[i][0][1]), narrow(x[i][1][0], x[i][1][1])};
    if (norm != nullptr)
      for (int h = 0; h < 2; h++) {
        const uint32_t unit = narrow(x[i][h][0] * factor, x[i][h][1] * factor);
        const uint32_t weight = *reinterpret_cast<const uint32_t*>(norm + h * kHalf + e);
        result[h] = times(unit, weight);
      }
    if (turns) {
      const int64_t turn = position * kE + e;
      const float2 cos = *reinterpret_cast<const float2*>(args.cos + turn);
      const float2 sin = *reinterpret_cast<const float2*>(args.sin + turn);
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
  const bf16* product;  // [M, 2F]: gates, then what they let through
  const float* scale;   // [2F], of the product, or null
  const bf16* bias;     // [2F], or null
  bf16* out;            // [M, F]
  int f;
};

// SiLU of the first half times the second. A thread takes eight features of a row; F is a multiple
// of 8.
__device__ __forceinline__ void swiglu(const SwigluArgs& args) {
  const int row = blockIdx.x, first = 8 * (blockIdx.y * blockDim.x + threadIdx.x);
  if (first >= args.f) return;
  wait_for_predecessor();
  const bf16* product = args.product + static_cast<int64_t>(row) * 2 * args.f;
  const Eight gates{*reinterpret_cast<const uint4*>(product + first)};
  const Eight ups{*reinterpret_cast<const uint4*>(product + args.f + first)};
  Eight result;
#pragma unroll
  for (int p = 0; p < 4; p++) {
    float gate[2], up[2];
    finish(gates[p], args.scale, args.bias, first + 2 * p, gate);
    finish(ups[p], args.scale, args.bias, args.f + first + 2 * p, up);
    result[p] = narrow(silu(gate[0]) * up[0], silu(gate[1]) * up[1]);
  }
  *reinterpret_cast<uint4*>(args.out + static_cast<int64_t>(row) * args.f + first) = result.all;
}
