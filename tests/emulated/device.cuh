// Replaces hotloop/kernels/cuda/device.cuh, so that the kernels' own source runs on a CPU.
//
// The threads of a block are fibers, which yield to each other wherever they wait, in an order that
// is drawn anew each round. Missing waits show: shared memory starts out as NaNs, copies into it
// arrive some rounds late, and outputs of the kernel before this one are NaNs until a block has
// waited for it. Waits that never end show too: a block without progress ends the process with a
// message. Blocks run one after the other.

#pragma once

#include <sched.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __grid_constant__

using std::max;
using std::min;

typedef uint16_t bf16;

struct dim3 { int x, y, z; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

inline float infinity() { return std::numeric_limits<float>::infinity(); }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline void __threadfence() {}

// The machine: each copy of a library has its own.

static dim3 threadIdx, blockIdx, blockDim, gridDim;

struct Late { void* to; const void* from; int64_t bytes; };  // an output of the kernel before

struct alignas(128) TensorMap {  // as cuda_emulation.py encodes it
  const uint8_t* tensor;
  int64_t strides[3];
  int32_t sizes[4], box[4];
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  uint64_t* barrier;
  const TensorMap* map = nullptr;  // of a box, from these coordinates on
  int at[4] = {};
};

struct Prefetch { const void* from; int64_t bytes; };

struct Meeting {  // of the lanes of a warp
  int arrived = 0;
  uint64_t generation = 0;
  uint32_t words[2][32][8];
};

// Of wgmma: c = a * b, or c += a * b, computed when it is waited for.
struct Product {
  float (*c)[4];
  const uint32_t* a;
  uint64_t b;
  int octets;
  bool accumulates;
};

struct Products {  // of a thread
  std::vector<Product> begun, in_flight;  // in_flight: in groups that ended
};

struct OwnCopy {
  void* to;
  const void* from;
  int bytes;
  bool exists;
};

struct OwnCopies {  // of a thread, in groups, which complete as late as they may
  std::vector<OwnCopy> begun;
  std::vector<std::vector<OwnCopy>> groups;
};

struct alignas(1024) SharedLines { uint4 words[64]; };

struct Fiber {
  ucontext_t context;  // where it begins
  jmp_buf place;       // where it resumes
  std::unique_ptr<char[]> stack;
  bool began = false, ended = false;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Meeting> meetings;
  std::vector<Products> products;
  std::vector<OwnCopies> own_copies;
  std::vector<Copy> copies;
  std::vector<Prefetch> prefetches;
  std::vector<Late> late;
  bool predecessor_ended = false;
  std::vector<SharedLines> shared;
  jmp_buf scheduler;
  int current = 0, at_block_barrier = 0;
  uint64_t block_generation = 0, events = 0;
  std::mt19937 random{1};
  void (*kernel)(const void*) = nullptr;
  const void* args = nullptr;
  std::chrono::steady_clock::time_point started;
};
static Machine machine;

// Jumps instead of swapcontext, which makes a system call for the signal mask each time.
inline void yield() {
  if (_setjmp(machine.fibers[machine.current].place) == 0) _longjmp(machine.scheduler, 1);
}

[[gnu::noinline]] inline void resume(Fiber& fiber) {
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.began) _longjmp(fiber.place, 1);
  fiber.began = true;
  setcontext(&fiber.context);
}

inline void run_fiber() {
  machine.kernel(machine.args);
  const Products& products = machine.products[machine.current];
  if (!products.begun.empty() || !products.in_flight.empty()) {
    fprintf(stderr, "products in flight at the end of a thread\n");
    abort();
  }
  machine.fibers[machine.current].ended = true;
  machine.events++;
  yield();
}

inline void complete_copies();

inline void end_predecessor() {
  if (machine.predecessor_ended) return;
  machine.predecessor_ended = true;
  for (const Late& l : machine.late) memcpy(l.to, l.from, l.bytes);
}

inline void run_block(int threads) {
  Machine& m = machine;
  m.fibers.resize(threads);
  m.meetings.assign(threads / 32, {});
  m.products.assign(threads, {});
  m.own_copies.assign(threads, {});
  m.at_block_barrier = 0;
  memset(m.shared.data(), 0xff, m.shared.size() * sizeof(SharedLines));
  m.predecessor_ended = false;
  for (const Late& l : m.late) memset(l.to, 0xff, l.bytes);
  constexpr size_t kStack = 1 << 18;
  for (Fiber& fiber : m.fibers) {
    fiber.began = fiber.ended = false;
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  std::vector<int> order(threads);
  for (int i = 0; i < threads; i++) order[i] = i;
  int living = threads, idle_rounds = 0;
  while (living > 0) {
    const uint64_t events = m.events;
    // Any order of warps, and of the lanes of a warp; some begin late.
    std::shuffle(order.begin(), order.end(), m.random);
    for (int i : order) {
      if (m.fibers[i].ended || (!m.fibers[i].began && m.random() % 4)) continue;
      m.current = i;
      threadIdx = {i, 0, 0};
      resume(m.fibers[i]);
      if (m.fibers[i].ended) living--;
    }
    complete_copies();
    idle_rounds = m.events == events ? idle_rounds + 1 : 0;
    if (idle_rounds > 1000) {
      fprintf(stderr, "block (%d, %d, %d): %d threads wait forever\n", blockIdx.x, blockIdx.y,
              blockIdx.z, living);
      abort();
    }
  }
}

inline void run_grid(void (*kernel)(const void*), const void* args, dim3 grid, int threads,
                     int shared_bytes, const Late* late, int n_late) {
  machine.kernel = kernel;
  machine.late.assign(late, late + n_late);
  machine.args = args;
  machine.shared.resize((shared_bytes + 1023) / 1024);
  machine.prefetches.clear();
  machine.started = std::chrono::steady_clock::now();
  gridDim = grid;
  blockDim = {threads, 1, 1};
  for (int z = 0; z < grid.z; z++)
    for (int y = 0; y < grid.y; y++)
      for (int x = 0; x < grid.x; x++) {
        blockIdx = {x, y, z};
        run_block(threads);
      }
  end_predecessor();
  machine.fibers.clear();  // their stacks, which each of hundreds of libraries would keep
}

// Exchanges words among all lanes of a warp.
inline uint32_t (*meet(const uint32_t* words, int n))[8] {
  Meeting& meeting = machine.meetings[machine.current / 32];
  const uint64_t generation = meeting.generation;
  memcpy(meeting.words[generation % 2][machine.current % 32], words, 4 * n);
  machine.events++;
  if (++meeting.arrived == 32) {
    meeting.arrived = 0;
    meeting.generation++;
  } else {
    while (meeting.generation == generation) yield();
  }
  return meeting.words[generation % 2];
}

template <class To, class From> inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline uint32_t float_bits(float value) { return bits<uint32_t>(value); }
inline float float_from_bits(uint32_t word) { return bits<float>(word); }
inline int count_bits(uint32_t word) { return std::popcount(word); }
inline int bit_width(uint64_t value) { return std::bit_width(value); }

// Conversions.

inline float low(uint32_t pair) { return bits<float>(pair << 16); }
inline float high(uint32_t pair) { return bits<float>(pair & 0xffff0000u); }
inline float widen(bf16 value) { return low(value); }
inline float rounded_product(float a, float b) { return a * b; }
inline float widen_half(uint16_t value) {  // finite
  return std::copysign(bits<float>((value & 0x7fffu) << 13) * 0x1p112f, value >> 15 ? -1.0f : 1.0f);
}
inline float low_half(uint32_t pair) { return widen_half(uint16_t(pair)); }
inline float high_half(uint32_t pair) { return widen_half(uint16_t(pair >> 16)); }
inline bf16 narrow(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint32_t b = bits<uint32_t>(value);
  return bf16((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
inline uint32_t narrow(float first, float second) {
  return narrow(first) | uint32_t(narrow(second)) << 16;
}
constexpr uint32_t kMinusZeros = 0x80008000u;
inline uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  // Exact in double for the kernels' operands; the rounding through float does not matter for sums
  // and products of two bfloat16.
  const auto one = [](float x, float y, float z) { return float(double(x) * y + z); };
  return narrow(one(low(a), low(b), low(c)), one(high(a), high(b), high(c)));
}
inline uint32_t mask_or(uint32_t value, uint32_t mask, uint32_t b) { return (value & mask) | b; }
inline uint32_t permute_bytes(uint32_t first, uint32_t second, uint32_t which) {
  const uint64_t both = uint64_t(second) << 32 | first;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= uint32_t(both >> (which >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
template <int kByte>
inline float signed_byte(uint32_t word) { return int8_t(word >> 8 * kByte); }
inline uint32_t byte_of(uint32_t word, int i) { return word >> 8 * i & 0xff; }
inline uint32_t spread_odd_bytes(uint32_t word) { return word >> 8 & 0x00ff00ffu; }
inline uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
inline uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }

// Warps.

inline void mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
  const int lane = machine.current % 32, g = lane / 4, t = lane % 4;
  const uint32_t operands[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto all = meet(operands, 6);
  for (int i = 0; i < 4; i++) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    float sum = c[i];
    for (int k = 0; k < 16; k++) {
      const uint32_t* of_a = all[4 * (row % 8) + k % 8 / 2];
      const uint32_t* of_b = all[4 * column + k % 8 / 2];
      const uint32_t x = of_a[row / 8 + 2 * (k / 8)], y = of_b[4 + k / 8];
      sum += k % 2 ? high(x) * high(y) : low(x) * low(y);
    }
    c[i] = sum;
  }
}

// Warpgroups. Each warp computes its own rows, as late as the kernel allows: operands that change too
// early, and results that are read too early, show. Until then results are NaNs.

inline uint64_t rows_operand(const void* rows) {
  if (uintptr_t(rows) % 1024) {
    fprintf(stderr, "rows of an operand are not aligned\n");
    abort();
  }
  return uintptr_t(rows) / 16;
}
inline void warpgroup_begin() { meet(nullptr, 0); }
template <int kOctets, bool kAccumulate>
inline void warpgroup_mma(float c[kOctets][4], const uint32_t a[4], uint64_t b) {
  machine.products[machine.current].begun.push_back({c, a, b, kOctets, kAccumulate});
  if (!kAccumulate) std::fill_n(&c[0][0], 4 * kOctets, NAN);
}
inline void warpgroup_commit() {
  auto& [begun, in_flight] = machine.products[machine.current];
  in_flight.insert(in_flight.end(), begun.begin(), begun.end());
  begun.clear();
}
inline void compute(const Product& product) {
  const int lane = machine.current % 32, g = lane / 4, t = lane % 4;
  const auto all = meet(product.a, 4);
  for (int i = 0; i < 4 * product.octets; i++) {
    const int row = g + 8 * (i % 4 / 2), column = i / 4 * 8 + 2 * t + i % 2;
    float sum = product.accumulates ? product.c[i / 4][i % 4] : 0;
    for (int k = 0; k < 16; k++) {
      const uint32_t x = all[4 * (row % 8) + k % 8 / 2][row / 8 + 2 * (k / 8)];
      const uintptr_t at = 16 * product.b + 128 * column + 2 * k;
      const float y = widen(*reinterpret_cast<const bf16*>(at ^ (at >> 7 & 7) << 4));
      sum += (k % 2 ? high(x) : low(x)) * y;
    }
    product.c[i / 4][i % 4] = sum;
  }
}
inline void warpgroup_wait() {
  meet(nullptr, 0);
  std::vector<Product>& in_flight = machine.products[machine.current].in_flight;
  for (const Product& product : in_flight) compute(product);
  in_flight.clear();
}
template <int kOctets> inline void warpgroup_result(float c[kOctets][4]) {}
template <int kRegisters> inline void take_registers() {}
template <int kRegisters> inline void return_registers() {}


inline uint32_t transpose(uint32_t pair) {
  const int lane = machine.current % 32, g = lane / 4, t = lane % 4;
  const auto all = meet(&pair, 1);  // returns row g, columns 2t and 2t + 1
  const auto at = [&](int row, int column) {
    const uint32_t word = all[4 * row + column / 2][0];
    return column % 2 ? word >> 16 : word & 0xffff;
  };
  return at(2 * t, g) | at(2 * t + 1, g) << 16;
}

template <class T> inline T shuffle(T value, int lane) {
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof value);
  memcpy(&value, meet(words, sizeof(T) / 4)[lane], sizeof value);
  return value;
}
template <class T> inline T shuffle_xor(T value, int mask) {
  return shuffle(value, (machine.current % 32) ^ mask);
}
template <class T> inline T shuffle_up(T value, int distance) {
  const int lane = machine.current % 32;
  return shuffle(value, lane < distance ? lane : lane - distance);
}
template <class F> inline uint32_t over_lanes(uint32_t value, F f) {
  const auto all = meet(&value, 1);
  uint32_t result = all[0][0];
  for (int lane = 1; lane < 32; lane++) result = f(result, all[lane][0]);
  return result;
}
inline bool all_lanes(bool value) { return over_lanes(value, std::bit_and<uint32_t>()); }
inline uint32_t sum_lanes(uint32_t value) { return over_lanes(value, std::plus<uint32_t>()); }
inline uint32_t max_lanes(uint32_t value) {
  return over_lanes(value, [](uint32_t a, uint32_t b) { return max(a, b); });
}
inline uint32_t ballot(bool value) {
  return over_lanes(uint32_t(value) << machine.current % 32, std::bit_or<uint32_t>());
}
typedef uintptr_t SharedAddress;
inline SharedAddress shared_address(const void* p) { return uintptr_t(p); }
template <int kBytes>
inline SharedAddress element(SharedAddress first, uint32_t i) { return first + kBytes * i; }
inline uint32_t load_constant(SharedAddress at) { return *reinterpret_cast<const uint32_t*>(at); }
inline void load_if(bool condition, const uint4* from, uint4& value) {
  if (condition) value = *from;
}
inline void sync_warp() { meet(nullptr, 0); }
inline void sync_block() {
  const uint64_t generation = machine.block_generation;
  machine.events++;
  if (++machine.at_block_barrier == int(machine.fibers.size())) {
    machine.at_block_barrier = 0;
    machine.block_generation++;
  } else {
    while (machine.block_generation == generation) yield();
  }
}

// Shared memory, barriers and copies.

inline uint8_t* shared_memory() { return reinterpret_cast<uint8_t*>(machine.shared.data()); }

inline uint32_t atomic_add(uint32_t* p, uint32_t value) {
  const uint32_t before = *p;
  *p += value;
  return before;
}

struct Barrier {  // of eight bytes, like an mbarrier
  int32_t bytes;
  int16_t pending;
  uint16_t expected_and_phase;
};

inline void change(uint64_t* barrier, int arrivals, int bytes) {
  Barrier b = bits<Barrier>(*barrier);
  b.pending -= arrivals;
  b.bytes += bytes;
  if (b.pending < 0) {
    fprintf(stderr, "more arrivals at a barrier than it expects\n");
    abort();
  }
  if (b.pending == 0 && b.bytes == 0) {
    b.pending = b.expected_and_phase >> 1;
    b.expected_and_phase ^= 1;
  }
  *barrier = bits<uint64_t>(b);
  machine.events++;
}
inline void barrier_init(uint64_t* barrier, int arrivals) {
  *barrier = bits<uint64_t>(Barrier{0, int16_t(arrivals), uint16_t(arrivals << 1)});
}
inline void barrier_arrive(uint64_t* barrier) { change(barrier, 1, 0); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while ((bits<Barrier>(*barrier).expected_and_phase & 1u) == parity) yield();
}

constexpr int kCopyArrivals = 1;
inline uint64_t evict_first_policy() { return 0; }
inline uint64_t keep_policy() { return 0; }
inline void fence_barrier_init() {}
inline void copy_begin(uint64_t* barrier, int bytes, int lane) {
  if (lane == 0) change(barrier, 1, bytes);
}
inline void check_alignment(uintptr_t addresses, int bytes) {
  if (addresses % 16 || bytes % 16 || bytes <= 0) {
    fprintf(stderr, "a copy of %d bytes, or its address, is not aligned\n", bytes);
    abort();
  }
}
inline void copy(void* to, const void* from, int bytes, uint64_t* barrier, uint64_t, int lane) {
  if (lane != 0) return;
  check_alignment(uintptr_t(to) | uintptr_t(from), bytes);
  memset(to, 0xff, bytes);
  machine.copies.push_back({to, from, bytes, barrier});
}
inline void copy_end(uint64_t*, int) {}
inline void prefetch_map(const TensorMap*) {}
inline void copy_box(void* to, const TensorMap* map, int k, int tile, uint64_t* barrier, uint64_t,
                     int lane) {
  if (lane != 0) return;
  int bytes = 2;
  for (int n : map->box) bytes *= n;
  check_alignment(uintptr_t(to) % 128 | uintptr_t(map) % 64 | uintptr_t(map->tensor), bytes);
  memset(to, 0xff, bytes);
  machine.copies.push_back({to, nullptr, bytes, barrier, map, {k, 0, 0, tile}});
}
// Fills dimension d of a box with what lies at ``offset`` in the tensor, or zeros.
inline uint8_t* fill_box(const Copy& c, int d, int64_t offset, bool exists, uint8_t* to) {
  const TensorMap& map = *c.map;
  for (int i = 0; i < map.box[d]; i++) {
    const int at = c.at[d] + i;
    const bool here = exists && at >= 0 && at < map.sizes[d];
    const int64_t from = offset + at * (d == 0 ? 2 : map.strides[d - 1]);
    if (d > 0) {
      to = fill_box(c, d - 1, from, here, to);
    } else {
      here ? memcpy(to, map.tensor + from, 2) : memset(to, 0, 2);
      to += 2;
    }
  }
  return to;
}
inline void prefetch(const void* from, int bytes, int lane) {
  if (lane != 0) return;
  check_alignment(uintptr_t(from), bytes);
  machine.prefetches.push_back({from, bytes});
}
template <int kBytes>
inline void copy_own(void* to, const void* from, bool exists) {
  if ((uintptr_t(to) | uintptr_t(from)) % kBytes) {
    fprintf(stderr, "a copy of %d bytes is not aligned\n", kBytes);
    abort();
  }
  memset(to, 0xff, kBytes);
  machine.own_copies[machine.current].begun.push_back({to, from, kBytes, exists});
}
inline void own_copies_end_group() {
  auto& [begun, groups] = machine.own_copies[machine.current];
  groups.push_back(std::move(begun));
  begun.clear();
}
template <int kNewer>
inline void own_copies_wait() {
  auto& groups = machine.own_copies[machine.current].groups;
  while (groups.size() > kNewer) {
    for (const OwnCopy& c : groups.front())
      c.exists ? memcpy(c.to, c.from, c.bytes) : memset(c.to, 0, c.bytes);
    groups.erase(groups.begin());
  }
}
inline void complete_copies() {
  std::vector<Copy> later;
  for (const Copy& c : machine.copies) {
    if (machine.random() % 4) {
      later.push_back(c);
      machine.events++;
    } else {
      if (c.map != nullptr)
        fill_box(c, 3, 0, true, static_cast<uint8_t*>(c.to));
      else
        memcpy(c.to, c.from, c.bytes);
      change(c.barrier, 0, -c.bytes);
    }
  }
  machine.copies.swap(later);
}

inline void launch_dependents() {}
inline void wait_for_predecessor() { end_predecessor(); }

// A handle is the address of the condition.
inline void set_condition(uint64_t handle, bool value) {
  *reinterpret_cast<uint32_t*>(handle) = value;
}

inline bool is_last_block(uint32_t* counter, uint32_t n, uint32_t* flag, int thread) {
  sync_block();
  if (thread == 0) {
    *flag = (*counter)++;
    if (*flag == n - 1) *counter = 0;
  }
  sync_block();
  return *flag == n - 1;
}
inline bool is_last_warp(uint32_t* counter, uint32_t n, int lane) {
  uint32_t before = 0;
  if (lane == 0) {
    before = (*counter)++;
    if (before == n - 1) *counter = 0;
  }
  return shuffle(before, 0) == n - 1;
}
struct Share {
  int first, step;
};
// Blocks run one after the other: the last warp gets all of the work, and the others none.
inline Share share_among(uint32_t* counter, uint32_t n, uint32_t, int lane) {
  return {is_last_warp(counter, n, lane) ? 0 : 1 << 20, 1};
}
inline void leave_share(uint32_t*, uint32_t, int) {}
template <class T> inline T load_from_l2(const T* p) { return *p; }

// Other ranks' kernels run at the same time, on threads and machines of their own.

inline void store_flagged(uint4* to, uint2 words, uint32_t flag) {
  const auto store = [&](int i, uint32_t word) {
    for (int rounds = machine.random() % 4; rounds > 0; rounds--) {  // others see the old value
      machine.events++;
      sched_yield();
      yield();
    }
    __atomic_store_n(reinterpret_cast<uint64_t*>(to) + i, uint64_t(flag) << 32 | word,
                     __ATOMIC_RELAXED);
  };
  store(0, words.x), store(1, words.y);
}
inline bool load_flagged(const uint4* from, uint32_t flag, uint2& words) {
  const auto load = [&](int i) {
    return __atomic_load_n(reinterpret_cast<const uint64_t*>(from) + i, __ATOMIC_RELAXED);
  };
  const uint64_t first = load(0), second = load(1);
  words = uint2{uint32_t(first), uint32_t(second)};
  if (first >> 32 == flag && second >> 32 == flag) return true;
  if (std::chrono::steady_clock::now() - machine.started > std::chrono::seconds(900)) {
    fprintf(stderr, "block (%d, %d): other ranks' words do not arrive\n", blockIdx.x, blockIdx.y);
    abort();
  }
  machine.events++;
  sched_yield();
  yield();
  return false;
}
