// Samples a token with temperature, top-k, top-p and min-p, as hotloop/engine/sampling.py defines
// them.
//
// A token's distance is (largest score - its score) / temperature. Its sort key has the bits of the
// distance above those of the id; the bits of non-negative floats sort like their values. In the
// order of keys, top-k and top-p keep the tokens before a cutoff. Radix select finds the cutoff
// without sorting: a histogram tells which of 1024 bins holds it, another histogram divides that
// bin, and so on until the bin holds a single token (with ties, down to the last bits of ids). As
// soon as few enough tokens precede the end of the bin, they are compacted into shared memory, and
// only these are read from then on.
//
// Sums are of integers, so that their order does not matter: the same scores give the same bits.

#include "device.cuh"

struct SampleArgs {
  const float* scores;       // [B * T, n], with a stride of ``stride``
  const int64_t* best;       // [B * T]: argmax of a row; -1 if it is not finite
  const int64_t* positions;  // [B * T]: of the tokens to sample
  const float* temperature;  // [B], as are the other options
  const int64_t* top_k;      // n for all
  const float* top_p;
  const float* min_p;
  const int64_t* seed;
  int64_t* ids;              // [B * T]
  int stride, n, tokens;     // tokens: T
};

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kBinBits = 10, kBins = 1 << kBinBits;
static_assert(kBins == kThreads, "one bin per thread");

// The first histogram is linear in the distance, which spreads common scores most evenly. It ends
// at a distance of 32, where weights are negligible (2^-46).
constexpr float kBinsPerUnit = 32;
constexpr uint32_t kInfinite = 0x7f800000u;
constexpr uint64_t kNone = ~0ull;

// The weight (unnormalized probability) of a token at this distance below the most likely one,
// whose weight is 2^40: sums of 2^23 weights fit in 64 bits.
__device__ __forceinline__ uint64_t weight(float distance) {
  return static_cast<uint64_t>(expf(-distance) * 0x1p40f);
}

struct Sum {
  uint64_t mass;  // the quantity that is limited: weight for top-p, n for top-k
  uint32_t n;     // tokens
};

// Inclusive prefix sum over the lanes of a warp.
__device__ __forceinline__ Sum running_sum(Sum sum, int lane) {
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint64_t mass = shuffle_up(sum.mass, distance);
    const uint32_t n = shuffle_up(sum.n, distance);
    if (lane >= distance) sum.mass += mass, sum.n += n;
  }
  return sum;
}

struct CutoffBin {  // the bin that holds the cutoff
  uint64_t mass_before;
  uint32_t n_before, n, bin;
};

template <int kMaxCandidates>
struct Shared {
  uint64_t candidates[kMaxCandidates < kThreads ? kThreads : kMaxCandidates];  // sort keys
  Sum warps[kWarps];
  uint64_t winners[kWarps];
  CutoffBin found;
  uint32_t n[kBins], low[kBins], high[kBins];
  uint32_t n_candidates;

  __device__ __forceinline__ void clear(int bin) { n[bin] = low[bin] = high[bin] = 0; }

  // Adds each lane's token to the histogram, if it is inside. All lanes of a warp call it together.
  __device__ __forceinline__ void add(bool inside, uint32_t bin, uint64_t weight, bool weighted,
                                      int lane) {
    // Equal scores would serialize on the atomics of one bin, so the warp sums them first.
    const uint32_t first = shuffle(bin, 0);
    const bool together = all_lanes(inside && bin == first);
    if (together && weighted)
      weight = sum_lanes(static_cast<uint32_t>(weight) & 0xfffffu) +
               (static_cast<uint64_t>(sum_lanes(static_cast<uint32_t>(weight >> 20))) << 20);
    if (!inside || (together && lane != 0)) return;
    atomic_add(&n[bin], together ? 32u : 1u);
    if (!weighted) return;
    const uint32_t part = static_cast<uint32_t>(weight);
    const bool carry = atomic_add(&low[bin], part) > ~part;
    const uint32_t rest = static_cast<uint32_t>(weight >> 32) + carry;
    if (rest != 0) atomic_add(&high[bin], rest);
  }
};

// The tokens that remain: a whole row of scores, or its candidates.
struct Tokens {
  const float* row;
  const uint64_t* candidates;  // null for the whole row
  int n;
  float largest, temperature;
  int id_bits;

  __device__ __forceinline__ uint64_t sort_key(float score, int id) const {
    const float distance = fabsf((score - largest) / temperature);  // 0 is not negative
    return static_cast<uint64_t>(float_bits(distance)) << id_bits | static_cast<uint32_t>(id);
  }
  __device__ __forceinline__ float distance(uint64_t sort_key) const {
    return float_from_bits(static_cast<uint32_t>(sort_key >> id_bits));
  }
  __device__ __forceinline__ uint32_t id(uint64_t sort_key) const {
    return static_cast<uint32_t>(sort_key) & ((1u << id_bits) - 1);
  }
  // The first sort key of a linear bin.
  __device__ __forceinline__ uint64_t edge(uint32_t bin) const {
    const uint32_t distance = bin < kBins ? float_bits(bin / kBinsPerUnit) : kInfinite;
    return static_cast<uint64_t>(distance) << id_bits;
  }

  // Calls ``f`` with the sort key of each token. Whole warps call it together; lanes without a
  // token pass kNone, which is beyond all keys.
  template <class F>
  __device__ __forceinline__ void for_each(int thread, F f) const {
    const int lane = thread % 32;
    const float* at = row + thread;
    float next = candidates == nullptr && thread < n ? *at : 0;
#pragma unroll 1
    for (int first = thread - lane; first < n; first += kThreads) {
      const int i = first + lane;
      uint64_t found = kNone;
      if (candidates != nullptr) {
        if (i < n) found = candidates[i];
      } else {
        const float score = next;
        at += kThreads;
        if (i + kThreads < n) next = *at;  // loaded while this score is processed
        if (i < n) found = sort_key(score, i);
      }
      f(found);
    }
  }
};

// Compacts the tokens of a row up to ``bound`` into the candidates, unless they are too many.
// Expects n_candidates to be zero.
template <int kMaxCandidates>
__device__ __forceinline__ void compact(Tokens& tokens, uint64_t bound,
                                        Shared<kMaxCandidates>& shared, int thread) {
  const int lane = thread % 32;
  tokens.for_each(thread, [&](uint64_t sort_key) {
    const bool inside = sort_key <= bound;
    const uint32_t lanes = ballot(inside);
    if (lanes == 0) return;
    uint32_t place = 0;
    if (lane == 0) place = atomic_add(&shared.n_candidates, count_bits(lanes));
    place = shuffle(place, 0) + count_bits(lanes & ((1u << lane) - 1));
    if (inside && place < kMaxCandidates) shared.candidates[place] = sort_key;
  });
  sync_block();
  const uint32_t n = shared.n_candidates;
  if (n <= kMaxCandidates) tokens.candidates = shared.candidates, tokens.n = n;
}

// The best token of each thread's part of a row, with the thread in place of the id. The k-th best of
// them is no better than the k-th best token of the row: k threads have a token at least as good.
template <int kMaxCandidates>
__device__ __forceinline__ Tokens thread_maxima(const Tokens& tokens,
                                                Shared<kMaxCandidates>& shared, int thread) {
  float score = -infinity();
  for (int i = thread; i < tokens.n; i += kThreads) score = fmaxf(score, tokens.row[i]);
  shared.candidates[thread] = thread < tokens.n ? tokens.sort_key(score, thread) : kNone;
  sync_block();
  Tokens best = tokens;
  best.candidates = shared.candidates;
  best.n = kThreads;
  return best;
}

// Returns the last sort key that is kept. Of the tokens up to ``bound``, in the order of keys, one
// is kept while the mass before it is below a limit: ``most`` tokens, or, if weighted, the share
// ``most`` of the weight of all tokens.
template <int kMaxCandidates>
__device__ __forceinline__ uint64_t select_cutoff(Tokens& tokens, uint64_t bound, bool weighted,
                                                  double most, Shared<kMaxCandidates>& shared,
                                                  int thread) {
  const int lane = thread % 32, warp = thread / 32;
  uint64_t first = 0;  // the cutoff is at least this key
  uint64_t limit = static_cast<uint64_t>(most);
  uint32_t n_before = 0;
  int shift = -1;  // the first histogram is linear
  while (true) {
    tokens.for_each(thread, [&](uint64_t sort_key) {
      const bool inside = sort_key >= first && sort_key <= bound;
      const float distance = tokens.distance(sort_key);
      const uint32_t bin = shift < 0
                               ? static_cast<uint32_t>(fminf(distance * kBinsPerUnit, kBins - 1))
                               : static_cast<uint32_t>((sort_key - first) >> shift);
      shared.add(inside, bin, weighted && inside ? weight(distance) : 0, weighted, lane);
    });
    sync_block();
    if (thread == 0) shared.found.n = shared.n_candidates = 0;
    // Each thread has a bin, and the sum of all bins up to its own.
    const uint32_t n = shared.n[thread];
    const uint64_t mass =
        weighted ? static_cast<uint64_t>(shared.high[thread]) << 32 | shared.low[thread] : n;
    shared.clear(thread);
    Sum up_to = running_sum({mass, n}, lane);
    if (lane == 31) shared.warps[warp] = up_to;
    sync_block();
    const Sum warps = running_sum(shared.warps[lane], lane);
    const uint64_t total = shuffle(warps.mass, 31);
    const Sum before = {shuffle(warps.mass, max(warp - 1, 0)), shuffle(warps.n, max(warp - 1, 0))};
    if (warp > 0) up_to.mass += before.mass, up_to.n += before.n;
    if (weighted && shift < 0)  // the most likely token is kept in any case
      limit = max(static_cast<uint64_t>(ceil(total * most)), static_cast<uint64_t>(1));
    if (up_to.mass - mass < limit && limit <= up_to.mass)
      shared.found = {up_to.mass - mass, up_to.n - n, n, static_cast<uint32_t>(thread)};
    sync_block();
    const CutoffBin found = shared.found;
    if (found.n == 0) return bound;  // the limit exceeds the mass of all tokens
    limit -= found.mass_before;
    n_before += found.n_before;
    const uint64_t bin = found.bin;
    const uint64_t end = shift < 0 ? tokens.edge(found.bin + 1) : first + ((bin + 1) << shift);
    first = shift < 0 ? tokens.edge(found.bin) : first + (bin << shift);
    bound = min(bound, end - 1);
    if (tokens.candidates == nullptr && n_before + found.n <= kMaxCandidates)
      compact(tokens, bound, shared, thread);
    if (found.n == 1 || shift == 0) return bound;
    shift = max(bit_width(bound - first) - kBinBits, 0);
  }
}

constexpr float kLog2E = 1.44269504f;
constexpr float kSlack = 0x1p-10f;  // far more than the error of the fast logarithm

// A bijective hash of 32 bits (Wellons' lowbias32).
__device__ __forceinline__ uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

__device__ __forceinline__ float uniform_of(uint32_t key, uint32_t id) {
  return (static_cast<float>(mix(key ^ mix(id + 1))) + 0.5f) * 0x1p-32f;
}

__device__ __forceinline__ float gumbel(float uniform) {
  return -logf(-log1pf(-fminf(uniform, 1 - 0x1p-24f)));
}

// A key that sorts by value, and equal values by descending id.
__device__ __forceinline__ uint64_t draw_key(float value, uint32_t id) {
  const uint32_t bits = float_bits(value);
  const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | ~id;
}

// The value of the upper half of a draw key; NaN for the key 0.
__device__ __forceinline__ float draw_value(uint32_t ordered) {
  return float_from_bits(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

__device__ __forceinline__ uint64_t warp_max(uint64_t value) {
  for (int mask = 1; mask < 32; mask *= 2) value = max(value, shuffle_xor(value, mask));
  return value;
}

// A block per row. Tokens whose distance is not finite are never sampled; if no other token remains,
// the most likely token is.
template <int kMaxCandidates, int kSharedBytes>
__device__ __forceinline__ void sample(const SampleArgs& args) {
  static_assert(sizeof(Shared<kMaxCandidates>) == kSharedBytes, "sample.py knows the size");
  auto& shared = *reinterpret_cast<Shared<kMaxCandidates>*>(shared_memory());
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int row = blockIdx.x, sequence = row / args.tokens;
  shared.clear(thread);
  if (thread == 0) shared.n_candidates = 0;
  wait_for_predecessor();
  const int64_t best = args.best[row];
  const float temperature = args.temperature[sequence];
  if (temperature == 0 || best < 0) {  // greedy, or scores that are not finite
    if (thread == 0) args.ids[row] = best;
    return;
  }
  sync_block();
  const float* scores = args.scores + static_cast<int64_t>(row) * args.stride;
  Tokens tokens = {scores, nullptr, args.n, scores[best], temperature, bit_width(args.n - 1)};
  uint64_t bound = (static_cast<uint64_t>(kInfinite) << tokens.id_bits) - 1;
  const int64_t top_k = args.top_k[sequence];
  const float top_p = args.top_p[sequence], min_p = args.min_p[sequence];
  // kNarrow: where k is small, the k-th best of the threads' best tokens bounds the candidates, so that
  // the histograms of top-k and top-p need not read the whole row again.
  enum { kNarrow, kTopK, kTopP, kStages };
#pragma unroll 1
  for (int stage = kNarrow; stage < kStages; stage++) {
    const bool cuts = stage == kTopP ? top_p < 1 : top_k < args.n;
    if (!cuts || (stage == kNarrow && top_k > kThreads)) continue;
    Tokens among = stage == kNarrow ? thread_maxima(tokens, shared, thread) : tokens;
    const double most = stage == kTopP ? top_p : top_k;
    bound = select_cutoff(among, bound, stage == kTopP, most, shared, thread);
    if (stage == kNarrow) {
      bound |= (1ull << tokens.id_bits) - 1;  // ids of equal scores are not thread numbers
      compact(tokens, bound, shared, thread);
    } else {
      tokens = among;
    }
  }
  const uint64_t seed = args.seed[sequence];
  uint32_t key = mix(static_cast<uint32_t>(seed) ^ 0x9e3779b9u);
  key = mix(key ^ static_cast<uint32_t>(seed >> 32));
  key = mix(key ^ static_cast<uint32_t>(args.positions[row]));
  uint64_t winner = 0;  // below any draw key
  float best_so_far = -infinity();  // the warp's largest value, in units of log2
  tokens.for_each(thread, [&](uint64_t sort_key) {
    const float distance = tokens.distance(sort_key);
    const uint32_t id = tokens.id(sort_key);
    const float uniform = uniform_of(key, id);
    // -log(uniform) bounds the Gumbel noise from above: it is cheap, and rules out most tokens.
    const float most = distance * kLog2E + log2_fast(uniform) + best_so_far;
    const bool can_win = sort_key <= bound && !(most > kSlack);
    if (ballot(can_win) == 0) return;
    if (can_win && expf(-distance) >= min_p)
      winner = max(winner, draw_key(gumbel(uniform) - distance, id));
    best_so_far = kLog2E * draw_value(max_lanes(static_cast<uint32_t>(winner >> 32)));
  });
  winner = warp_max(winner);
  if (lane == 0) shared.winners[warp] = winner;
  sync_block();
  if (warp > 0) return;
  winner = warp_max(shared.winners[lane]);
  if (lane == 0) args.ids[row] = winner == 0 ? best : static_cast<int64_t>(~winner & 0xffffffffu);
}
