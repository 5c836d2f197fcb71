// Draws a token: temperature, top-k, top-p and min-p, as hotloop/engine/sampling.py defines them.
//
// A token's order is how far its score is below the largest, in units of temperature, and after
// that its id: the bits of a float that is not negative sort as it does. What top-k and top-p keep
// is what stands, in that order, before a cut. It is found without sorting. A histogram says which
// of a thousand bins holds the cut, another divides that bin, and so on until one token is left in
// it, which ties can delay to the last bits of ids. As soon as few enough tokens stand before the
// end of that bin, they alone are looked at, in shared memory.
//
// Sums are integers, so their order does not matter: the same scores give the same bits.

#include "device.cuh"

struct SampleArgs {
  const float* scores;       // [B * T, n], rows ``stride`` apart
  const int64_t* best;       // [B * T]: where a row's score is largest; -1 for no token
  const int64_t* positions;  // [B * T]: that the tokens will have
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
static_assert(kBins == kThreads, "a thread has a bin");

// The first histogram is linear, since that spreads common scores most evenly. It ends at a
// distance of 32, where no weight is left (2^-46).
constexpr float kBinsPerUnit = 32;
constexpr uint32_t kInfinite = 0x7f800000u;
constexpr uint64_t kNone = ~0ull;

// What a token weighs that is so far below the most likely one, which weighs 2^40: sums of 2^23 of
// them fit.
__device__ __forceinline__ uint64_t weight(float distance) {
  return static_cast<uint64_t>(expf(-distance) * 0x1p40f);
}

struct Sum {
  uint64_t mass;  // what the limit is about: weight, or again the number
  uint32_t n;
};

// What lanes have up to each, itself included.
__device__ __forceinline__ Sum running_sum(Sum sum, int lane) {
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint64_t mass = shuffle_up(sum.mass, distance);
    const uint32_t n = shuffle_up(sum.n, distance);
    if (lane >= distance) sum.mass += mass, sum.n += n;
  }
  return sum;
}

struct Found {  // the bin that holds the cut
  uint64_t mass_before;
  uint32_t n_before, n, bin;
};

template <int kListed>
struct Shared {
  uint64_t listed[kListed < kThreads ? kThreads : kListed];  // orders, in any order
  Sum warps[kWarps];
  uint64_t winners[kWarps];
  Found found;
  uint32_t n[kBins], low[kBins], high[kBins];
  uint32_t n_listed;

  __device__ __forceinline__ void clear(int bin) { n[bin] = low[bin] = high[bin] = 0; }

  // Counts a token of each lane that is inside. All lanes of a warp call this together.
  __device__ __forceinline__ void add(bool inside, uint32_t bin, uint64_t weight, bool weighted,
                                      int lane) {
    // Equal scores would queue for one bin.
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

// The tokens that may still matter: a row of scores, or those of it that are listed.
struct Tokens {
  const float* row;
  const uint64_t* listed;  // null for the row
  int n;
  float largest, temperature;
  int id_bits;

  __device__ __forceinline__ uint64_t order(float score, int id) const {
    const float distance = fabsf((score - largest) / temperature);  // 0 is not negative
    return static_cast<uint64_t>(float_bits(distance)) << id_bits | static_cast<uint32_t>(id);
  }
  __device__ __forceinline__ float distance(uint64_t order) const {
    return float_of(static_cast<uint32_t>(order >> id_bits));
  }
  __device__ __forceinline__ uint32_t id(uint64_t order) const {
    return static_cast<uint32_t>(order) & ((1u << id_bits) - 1);
  }
  // Where a linear bin begins.
  __device__ __forceinline__ uint64_t edge(uint32_t bin) const {
    const uint32_t distance = bin < kBins ? float_bits(bin / kBinsPerUnit) : kInfinite;
    return static_cast<uint64_t>(distance) << id_bits;
  }

  // Calls ``f`` with the order of each token; whole warps together, with one that is beyond all
  // others where there is none.
  template <class F>
  __device__ __forceinline__ void each(int thread, F f) const {
    const int lane = thread % 32;
    const float* at = row + thread;
    float next = listed == nullptr && thread < n ? *at : 0;
#pragma unroll 1
    for (int first = thread - lane; first < n; first += kThreads) {
      const int i = first + lane;
      uint64_t found = kNone;
      if (listed != nullptr) {
        if (i < n) found = listed[i];
      } else {
        const float score = next;
        at += kThreads;
        if (i + kThreads < n) next = *at;  // on its way while this one is looked at
        if (i < n) found = order(score, i);
      }
      f(found);
    }
  }
};

// Lists the tokens of a row up to ``bound``, unless they are too many. ``n_listed`` is zero.
template <int kListed>
__device__ __forceinline__ void list(Tokens& tokens, uint64_t bound, Shared<kListed>& shared,
                                     int thread) {
  const int lane = thread % 32;
  tokens.each(thread, [&](uint64_t order) {
    const bool inside = order <= bound;
    const uint32_t lanes = ballot(inside);
    if (lanes == 0) return;
    uint32_t place = 0;
    if (lane == 0) place = atomic_add(&shared.n_listed, count_bits(lanes));
    place = shuffle(place, 0) + count_bits(lanes & ((1u << lane) - 1));
    if (inside && place < kListed) shared.listed[place] = order;
  });
  sync_block();
  const uint32_t n = shared.n_listed;
  if (n <= kListed) tokens.listed = shared.listed, tokens.n = n;
}

// The best token of each thread's share of a row, with the thread in its id's place.
template <int kListed>
__device__ __forceinline__ Tokens best_of_threads(const Tokens& tokens, Shared<kListed>& shared,
                                                  int thread) {
  float score = -infinity();
  for (int i = thread; i < tokens.n; i += kThreads) score = fmaxf(score, tokens.row[i]);
  shared.listed[thread] = thread < tokens.n ? tokens.order(score, thread) : kNone;
  sync_block();
  Tokens best = tokens;
  best.listed = shared.listed;
  best.n = kThreads;
  return best;
}

// The last order that is kept: of the tokens up to ``bound``, in order, one is kept while what
// stands before it is less than a limit. That is ``most`` tokens, or so large a share of the weight
// of all of them.
template <int kListed>
__device__ __forceinline__ uint64_t cut(Tokens& tokens, uint64_t bound, bool weighted, double most,
                                        Shared<kListed>& shared, int thread) {
  const int lane = thread % 32, warp = thread / 32;
  uint64_t first = 0;  // the cut is from here on
  uint64_t limit = static_cast<uint64_t>(most);
  uint32_t n_before = 0;
  int shift = -1;  // linear at first
  while (true) {
    tokens.each(thread, [&](uint64_t order) {
      const bool inside = order >= first && order <= bound;
      const float distance = tokens.distance(order);
      const uint32_t bin = shift < 0
                               ? static_cast<uint32_t>(fminf(distance * kBinsPerUnit, kBins - 1))
                               : static_cast<uint32_t>((order - first) >> shift);
      shared.add(inside, bin, weighted && inside ? weight(distance) : 0, weighted, lane);
    });
    sync_block();
    if (thread == 0) shared.found.n = shared.n_listed = 0;
    // Each thread has a bin, and what stands up to its end.
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
    const Found found = shared.found;
    if (found.n == 0) return bound;  // there are not as many
    limit -= found.mass_before;
    n_before += found.n_before;
    const uint64_t bin = found.bin;
    const uint64_t end = shift < 0 ? tokens.edge(found.bin + 1) : first + ((bin + 1) << shift);
    first = shift < 0 ? tokens.edge(found.bin) : first + (bin << shift);
    bound = min(bound, end - 1);
    if (tokens.listed == nullptr && n_before + found.n <= kListed)
      list(tokens, bound, shared, thread);
    if (found.n == 1 || shift == 0) return bound;
    shift = max(bit_width(bound - first) - kBinBits, 0);
  }
}

constexpr float kLog2E = 1.44269504f;
constexpr float kSlack = 0x1p-10f;  // far more than the error of what is only estimated

// A bijection of words in which every bit affects every other (Wellons' lowbias32).
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

// Sorts as the value does, and of equal ones by descending ids.
__device__ __forceinline__ uint64_t candidate(float value, uint32_t id) {
  const uint32_t bits = float_bits(value);
  const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | ~id;
}

// The value in the upper half of a candidate; not a number where there was none.
__device__ __forceinline__ float value_of(uint32_t ordered) {
  return float_of(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

__device__ __forceinline__ uint64_t largest_of_lanes(uint64_t value) {
  for (int mask = 1; mask < 32; mask *= 2) value = max(value, shuffle_xor(value, mask));
  return value;
}

// A block per row. Tokens without a finite score below the largest are never chosen; where there
// are no others, the best one is.
template <int kListed, int kSharedBytes>
__device__ __forceinline__ void sample(const SampleArgs& args) {
  static_assert(sizeof(Shared<kListed>) == kSharedBytes, "sample.py knows the size");
  auto& shared = *reinterpret_cast<Shared<kListed>*>(shared_memory());
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int row = blockIdx.x, sequence = row / args.tokens;
  shared.clear(thread);
  if (thread == 0) shared.n_listed = 0;
  wait_for_predecessor();
  const int64_t best = args.best[row];
  const float temperature = args.temperature[sequence];
  if (temperature == 0 || best < 0) {  // or there is none, since scores are not finite
    if (thread == 0) args.ids[row] = best;
    return;
  }
  sync_block();
  const float* scores = args.scores + static_cast<int64_t>(row) * args.stride;
  Tokens tokens = {scores, nullptr, args.n, scores[best], temperature, bit_width(args.n - 1)};
  uint64_t bound = (static_cast<uint64_t>(kInfinite) << tokens.id_bits) - 1;
  const int64_t top_k = args.top_k[sequence];
  const float top_p = args.top_p[sequence], min_p = args.min_p[sequence];
  enum { kNarrow, kTopK, kTopP, kStages };
#pragma unroll 1
  for (int stage = kNarrow; stage < kStages; stage++) {
    const bool cuts = stage == kTopP ? top_p < 1 : top_k < args.n;
    if (!cuts || (stage == kNarrow && top_k > kThreads)) continue;
    Tokens among = stage == kNarrow ? best_of_threads(tokens, shared, thread) : tokens;
    bound = cut(among, bound, stage == kTopP, stage == kTopP ? top_p : top_k, shared, thread);
    if (stage == kNarrow) {
      bound |= (1ull << tokens.id_bits) - 1;  // equal ones have other ids than threads
      list(tokens, bound, shared, thread);
    } else {
      tokens = among;
    }
  }
  const uint64_t seed = args.seed[sequence];
  uint32_t key = mix(static_cast<uint32_t>(seed) ^ 0x9e3779b9u);
  key = mix(key ^ static_cast<uint32_t>(seed >> 32));
  key = mix(key ^ static_cast<uint32_t>(args.positions[row]));
  uint64_t winner = 0;  // less than any candidate
  float beaten = -infinity();  // what the best one of the warp is worth
  tokens.each(thread, [&](uint64_t order) {
    const float distance = tokens.distance(order);
    const uint32_t id = tokens.id(order);
    const float uniform = uniform_of(key, id);
    // A Gumbel number is at most -log(uniform): which costs little, and rules out almost all.
    const float most = distance * kLog2E + log2_fast(uniform) + beaten;
    const bool can_win = order <= bound && !(most > kSlack);
    if (ballot(can_win) == 0) return;
    if (can_win && expf(-distance) >= min_p)
      winner = max(winner, candidate(gumbel(uniform) - distance, id));
    beaten = kLog2E * value_of(max_of_lanes(static_cast<uint32_t>(winner >> 32)));
  });
  winner = largest_of_lanes(winner);
  if (lane == 0) shared.winners[warp] = winner;
  sync_block();
  if (warp > 0) return;
  winner = largest_of_lanes(shared.winners[lane]);
  if (lane == 0) args.ids[row] = winner == 0 ? best : static_cast<int64_t>(~winner & 0xffffffffu);
}
