// Decides whether a chain of drafts continues, as hotloop/engine/chains.py defines it.
//
// The kernels of each draft are in the body of an IF node; this kernel runs between two such bodies.
// It starts after all kernels of one draft have ended, and the next draft starts after this kernel.

#include "device.cuh"

struct ChainArgs {
  const float* logits;           // [B, n], with a stride of ``stride``: of the newest draft
  const int64_t* ids;            // [B]: the newest draft; negative for none
  const float* own;              // [B]: its probability if the logits do not give it; or null
  const uint8_t* undrafted;      // [B]: rows whose drafts do not count
  const float* min_probability;  // [1]
  float* accepted;               // [B]: the probability that all drafts so far are accepted
  uint32_t* state;               // [2]: the blocks that have arrived; whether the chain has ended
  uint64_t handle;               // of the IF node with the next draft, if it is in one
  int stride, n, rows;
  int is_first, has_node;        // is_first: it is the first draft of a chain
};

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kLoads = 8;  // in flight of each thread

// The sum of a warp's values, on every lane.
__device__ __forceinline__ float warp_sum(float value) {
  for (int mask = 1; mask < 32; mask *= 2) value += shuffle_xor(value, mask);
  return value;
}

// The probability of a token, on the first thread: 1 / sum of exp(logit - logit of the token). If
// the sum overflows, the probability is 0.
__device__ __forceinline__ float probability(const float* logits, int n, int64_t id,
                                             float* warp_sums, int thread) {
  const float chosen = logits[id];
  float sum = 0;
  for (int first = thread; first < n; first += kLoads * kThreads) {
    float logit[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int at = first + i * kThreads;
      logit[i] = at < n ? logits[at] : -infinity();
    }
#pragma unroll
    for (int i = 0; i < kLoads; i++) sum += expf(logit[i] - chosen);
  }
  sum = warp_sum(sum);
  if (thread % 32 == 0) warp_sums[thread / 32] = sum;
  sync_block();
  return thread < 32 ? 1 / warp_sum(warp_sums[thread]) : 0;
}

// A block per row.
__device__ __forceinline__ void extend_chain(const ChainArgs& args) {
  static_assert(kWarps == 32, "a lane for the sum of each warp");
  wait_for_predecessor();
  const int thread = threadIdx.x, row = blockIdx.x;
  // The chain has ended, so no draft was made: the logits are left from an earlier step.
  if (args.is_first == 0 && args.state[1] != 0) {
    if (row == 0 && thread == 0 && args.has_node != 0) set_condition(args.handle, false);
    return;
  }
  float* warp_sums = reinterpret_cast<float*>(shared_memory());  // [kWarps]
  uint32_t* flag = reinterpret_cast<uint32_t*>(warp_sums + kWarps);
  const int64_t id = args.ids[row];
  float own = 0;
  if (id >= 0 && args.own != nullptr)
    own = args.own[row];
  else if (id >= 0)
    own = probability(args.logits + static_cast<int64_t>(row) * args.stride, args.n, id, warp_sums,
                      thread);
  if (thread == 0) args.accepted[row] = args.is_first != 0 ? own : args.accepted[row] * own;
  if (!is_last_block(args.state, args.rows, flag, thread) || thread > 0) return;
  float sum = 0;
  for (int i = 0; i < args.rows; i++)
    if (args.undrafted[i] == 0) sum += load_from_l2(args.accepted + i);
  const bool ends = sum / args.rows < *args.min_probability;
  args.state[1] = ends;
  if (args.has_node != 0) set_condition(args.handle, !ends);
}
