// Device instructions, one small function each.
//
// This is the only file with PTX. The kernels need no CUDA header, so NVRTC alone compiles them. Tests
// replace this file by one with the same functions for a CPU, so that the source of the kernels runs
// without a GPU.
//
// bfloat16 values are held as bits: one in a bf16 (uint16_t), two in a uint32_t, the first in the
// low half.

#pragma once

#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#else  // nvcc
#include <stdint.h>
#endif
typedef uint16_t bf16;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

// Bits.

__device__ __forceinline__ uint32_t float_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ int count_bits(uint32_t word) { return __popc(word); }
__device__ __forceinline__ int bit_width(uint64_t value) { return 64 - __clzll(value); }

// Conversions.

__device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float widen(bf16 value) { return low(value); }

// a * b, which is not fused with an addition.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }

// Half precision, two values in a word.
__device__ __forceinline__ float widen_half(uint16_t value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
  return result;
}
__device__ __forceinline__ float low_half(uint32_t pair) {
  return widen_half(static_cast<uint16_t>(pair));
}
__device__ __forceinline__ float high_half(uint32_t pair) {
  return widen_half(static_cast<uint16_t>(pair >> 16));
}

__device__ __forceinline__ bf16 narrow(float value) {
  bf16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
}

__device__ __forceinline__ uint32_t narrow(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

constexpr uint32_t kMinusZeros = 0x80008000u;  // x + -0 is x, even where x is -0

// a * b + c of both halves, each rounded once.
__device__ __forceinline__ uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

// (value & mask) | bits, in one instruction.
__device__ __forceinline__ uint32_t mask_or(uint32_t value, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(value), "r"(mask), "r"(bits));
  return result;
}

// Four of the eight bytes of two words: nibble i of `which` is the number of byte i, 0 to 7.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t first, uint32_t second,
                                                  uint32_t which) {
  return __byte_perm(first, second, which);
}

// A signed byte of a word.
template <int kByte>
__device__ __forceinline__ float signed_byte(uint32_t word) {
  return static_cast<float>(static_cast<int8_t>(word >> 8 * kByte));
}

// A byte of a word.
__device__ __forceinline__ uint32_t byte_of(uint32_t word, int i) {
  return __byte_perm(word, 0, 0x4440 | i);
}

// Bytes 1 and 3 of a word, moved to bytes 0 and 2; the other bytes are zeros.
__device__ __forceinline__ uint32_t spread_odd_bytes(uint32_t word) {
  return __byte_perm(word, 0, 0x4341);
}

// The low halves of two words, or the high ones, as one word.
__device__ __forceinline__ uint32_t low_halves(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x5410);
}
__device__ __forceinline__ uint32_t high_halves(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x7632);
}

__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float log2_fast(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Tensor cores: c[16 x 8] += a[16 x 16] * b[16 x 8], spread over a warp. With g = lane / 4 and
// t = lane % 4, a lane holds of a: rows g and g + 8 at columns 2t, 2t + 1 (a[0], a[1]) and
// 2t + 8, 2t + 9 (a[2], a[3]); of b: rows 2t, 2t + 1 (b0) and 2t + 8, 2t + 9 (b1) of column g;
// of c: columns 2t, 2t + 1 of row g (c[0], c[1]) and of row g + 8 (c[2], c[3]).
__device__ __forceinline__ void mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Tensor cores of a warpgroup, four consecutive warps that read the B operand from shared memory.

// The B operand: rows of 64 bfloat16 each, whose eight 16-byte chunks are permuted (chunk ^ row % 8).
// They begin at a multiple of 1024 bytes. Adding n moves the operand by 8 n columns.
__device__ __forceinline__ uint64_t rows_operand(const void* rows) {
  constexpr uint64_t kSwizzle = 1ull << 62, kEightRows = 1024ull / 16 << 32, kUnused = 1ull << 16;
  // The same in all lanes, which the compiler can know so.
  const uint32_t address =
      __shfl_sync(0xffffffffu, static_cast<uint32_t>(__cvta_generic_to_shared(rows)), 0);
  return kSwizzle | kEightRows | kUnused | (address & 0x3ffff) / 16;
}

// Begins products whose registers were written by ordinary instructions.
__device__ __forceinline__ void warpgroup_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// c = a * b, or c += a * b: 16 rows of a for each warp, 8 * kOctets rows of b, which are the columns
// of c. Fragments of a and c are those of mma. Registers must not be touched before warpgroup_wait.
template <int kOctets, bool kAccumulate>
__device__ __forceinline__ void warpgroup_mma(float c[kOctets][4], const uint32_t a[4],
                                              uint64_t b) {
  static_assert(kOctets == 2 || kOctets == 4 || kOctets == 8);
#define A "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define C(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
  if constexpr (kOctets == 2)
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %13, 0;"
        " wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16"
        " {%0, %1, %2, %3, %4, %5, %6, %7},"
        " {%8, %9, %10, %11}, %12, p, 1, 1, 0; }"
        : C(0), C(1)
        : A, "l"(b), "n"(int(kAccumulate)));
  else if constexpr (kOctets == 4)
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %21, 0;"
        " wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16"
        " {%0, %1, %2, %3, %4, %5, %6, %7,"
        " %8, %9, %10, %11, %12, %13, %14, %15},"
        " {%16, %17, %18, %19}, %20, p, 1, 1, 0; }"
        : C(0), C(1), C(2), C(3)
        : A, "l"(b), "n"(int(kAccumulate)));
  else
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %37, 0;"
        " wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16"
        " {%0, %1, %2, %3, %4, %5, %6, %7,"
        " %8, %9, %10, %11, %12, %13, %14, %15,"
        " %16, %17, %18, %19, %20, %21, %22, %23,"
        " %24, %25, %26, %27, %28, %29, %30, %31},"
        " {%32, %33, %34, %35}, %36, p, 1, 1, 0; }"
        : C(0), C(1), C(2), C(3), C(4), C(5), C(6), C(7)
        : A, "l"(b), "n"(int(kAccumulate)));
#undef A
#undef C
}

// Ends a group of products of this warpgroup, and waits until all groups are complete.
__device__ __forceinline__ void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// Prevents the compiler from moving uses of c across this point.
template <int kOctets>
__device__ __forceinline__ void warpgroup_result(float c[kOctets][4]) {
#pragma unroll
  for (int i = 0; i < kOctets; i++)
    asm volatile("" : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])::"memory");
}

// Changes how many registers each thread of this warpgroup has.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void return_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif

// Transposes an 8 x 8 matrix. Each lane holds columns 2t and 2t + 1 of row g.
__device__ __forceinline__ uint32_t transpose(uint32_t pair) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// Warps.

__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ __forceinline__ int shuffle_xor(int value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ __forceinline__ uint64_t shuffle_xor(uint64_t value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
// The value of the lane whose number is `distance` less; the first lanes get their own value.
template <class T>
__device__ __forceinline__ T shuffle_up(T value, int distance) {
  return __shfl_up_sync(0xffffffffu, value, distance);
}
__device__ __forceinline__ bool all_lanes(bool value) { return __all_sync(0xffffffffu, value); }
__device__ __forceinline__ uint32_t ballot(bool value) {
  return __ballot_sync(0xffffffffu, value);
}
__device__ __forceinline__ uint32_t sum_lanes(uint32_t value) {
  return __reduce_add_sync(0xffffffffu, value);
}
__device__ __forceinline__ uint32_t max_lanes(uint32_t value) {
  return __reduce_max_sync(0xffffffffu, value);
}
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ void sync_block() { __syncthreads(); }

// Shared memory.

__device__ __forceinline__ uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint4 memory[];
  return reinterpret_cast<uint8_t*>(memory);
}

typedef uint32_t SharedAddress;
__device__ __forceinline__ SharedAddress shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The address of an element of kBytes, by a multiply-add: units for shifts and additions are busier.
template <int kBytes>
__device__ __forceinline__ SharedAddress element(SharedAddress first, uint32_t i) {
  uint32_t result;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(i), "n"(kBytes), "r"(first));
  return result;
}

// Loads a word that does not change.
__device__ __forceinline__ uint32_t load_constant(SharedAddress at) {
  uint32_t word;
  asm("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(at));
  return word;
}

// Loads from shared memory if the condition holds; otherwise the value stays. In plain C++ the compiler
// would keep an array of such values in local memory.
__device__ __forceinline__ void load_if(bool condition, const uint4* from, uint4& value) {
  asm("{ .reg .pred p; setp.ne.b32 p, %5, 0; @p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w)
      : "r"(shared_address(from)), "r"(static_cast<uint32_t>(condition))
      : "memory");
}

// Returns the value before the addition.
__device__ __forceinline__ uint32_t atomic_add(uint32_t* p, uint32_t value) {
  return atomicAdd(p, value);
}

// Asynchronous copies to shared memory (cp.async). Each lane copies 8 or 16 bytes, or stores zeros. The
// copies since the end of the last group form a group. A lane waits until all of its groups are
// complete, except the newest kNewer.
template <int kBytes>
__device__ __forceinline__ void copy_own(void* to, const void* from, bool exists) {
  const int bytes = exists ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void own_copies_end_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kNewer>
__device__ __forceinline__ void own_copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewer) : "memory");
}

// Barriers in shared memory (mbarrier), and asynchronous copies that arrive at one on completion.
//
// From Hopper on (TMA), one lane issues a bulk copy, whose bytes the barrier counts. On older devices
// each lane copies its share 16 bytes at a time, and arrives when its copies are complete; they have no
// copy_box.

// Describes a tensor and its boxes, as the driver encodes it (kernels/cuda/tensor_map.py).
struct alignas(128) TensorMap {
  uint64_t words[16];
};

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(
                   shared_address(barrier))
               : "memory");
}

// Waits until the phase of the given parity is complete; of a new barrier, the phase of parity 1 is.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  const uint32_t address = shared_address(barrier);
  uint32_t done;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2;"
        " selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2;"
        " selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
#endif
  } while (!done);
}

#if __CUDA_ARCH__ >= 900

constexpr int kCopyArrivals = 1;  // arrivals at a barrier per call of copy_begin

__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ uint64_t keep_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Announces copies of ``bytes`` in total.
__device__ __forceinline__ void copy_begin(uint64_t* barrier, int bytes, int lane) {
  if (lane == 0)
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(
                     shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

// Copies ``bytes``, a multiple of 16, to aligned shared memory.
__device__ __forceinline__ void copy(void* to, const void* from, int bytes, uint64_t* barrier,
                                     uint64_t policy, int lane) {
  if (lane == 0)
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
        : "memory");
}

__device__ __forceinline__ void copy_end(uint64_t*, int) {}

// Prefetches a map into the descriptor cache, from which copies read it.
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies a box of a weight's plain rows: input features from k on, of tiles from ``tile`` on. Elements
// beyond the tensor are zeros, and the barrier counts their bytes too.
__device__ __forceinline__ void copy_box(void* to, const TensorMap* map, int k, int tile,
                                         uint64_t* barrier, uint64_t policy, int lane) {
  if (lane == 0)
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%3, %2, %2, %4}], [%5], %6;" ::"r"(shared_address(to)),
        "l"(map), "r"(0), "r"(k), "r"(tile), "r"(shared_address(barrier)), "l"(policy)
        : "memory");
}

// Prefetches ``bytes``, a multiple of 16, into L2. One lane issues all of it: decode steps took
// longer where each lane issued a part.
__device__ __forceinline__ void prefetch(const void* from, int bytes, int lane) {
  if (lane == 0)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

#else

constexpr int kCopyArrivals = 32;

__device__ __forceinline__ uint64_t evict_first_policy() { return 0; }
__device__ __forceinline__ uint64_t keep_policy() { return 0; }
__device__ __forceinline__ void fence_barrier_init() {}
__device__ __forceinline__ void copy_begin(uint64_t*, int, int) {}

__device__ __forceinline__ void copy(void* to, const void* from, int bytes, uint64_t*, uint64_t,
                                     int lane) {
  for (int i = 16 * lane; i < bytes; i += 512)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to) + i),
                 "l"(static_cast<const uint8_t*>(from) + i)
                 : "memory");
}

__device__ __forceinline__ void copy_end(uint64_t* barrier, int) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void prefetch(const void* from, int bytes, int lane) {
  for (int i = 128 * lane; i < bytes; i += 4096)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const uint8_t*>(from) + i));
}

#endif

// Programmatic dependent launch: a kernel may start before its predecessor has ended. Before it has
// waited for the predecessor, it must not touch memory that any kernel of the step writes.

__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Sets the condition of an IF node of the graph that this kernel is part of. NVRTC knows the function,
// which CUDA's headers declare.

extern "C" __device__ void cudaGraphSetConditional(unsigned long long handle, unsigned int value);

__device__ __forceinline__ void set_condition(uint64_t handle, bool value) {
  cudaGraphSetConditional(handle, value);
}

// Returns true in the last of ``n`` blocks that call this with one counter; that block sees the
// writes of the others. Leaves the counter zero for the next use. ``flag`` is in shared memory.
__device__ __forceinline__ bool is_last_block(uint32_t* counter, uint32_t n, uint32_t* flag,
                                              int thread) {
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    *flag = atomicAdd(counter, 1u);
    if (*flag == n - 1) *counter = 0;
  }
  __syncthreads();
  __threadfence();
  return *flag == n - 1;
}

// The same for warps: each lane of the last warp sees what the same lanes of the others wrote.
__device__ __forceinline__ bool is_last_warp(uint32_t* counter, uint32_t n, int lane) {
  __threadfence();
  __syncwarp();
  uint32_t before = 0;
  if (lane == 0) {
    before = atomicAdd(counter, 1u);
    if (before == n - 1) *counter = 0;
  }
  before = __shfl_sync(0xffffffffu, before, 0);
  __threadfence();
  return before == n - 1;
}

// A share of work that is divided among several warps: every `step`th unit from `first` on.
struct Share {
  int first, step;
};

// Waits until n warps have arrived, of blocks that are all running, and divides the work that is left
// among them. What a lane then loads from L2 includes what the same lanes of the others wrote before.
// `mine` is this warp's number among the n warps. The low half of the counter counts arrivals.
__device__ __forceinline__ Share share_among(uint32_t* counter, uint32_t n, uint32_t mine,
                                             int lane) {
  __threadfence();
  __syncwarp();
  if (lane == 0) {
    atomicAdd(counter, 1u);
    uint32_t arrived;
    do
      asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(arrived) : "l"(counter) : "memory");
    while ((arrived & 0xffffu) < n);
  }
  __syncwarp();
  return {static_cast<int>(mine), static_cast<int>(n)};
}

// To be called by each of the n warps, when nothing waits for it any more: the last one sets the
// counter to zero. The high half of the counter counts these calls.
__device__ __forceinline__ void leave_share(uint32_t* counter, uint32_t n, int lane) {
  if (lane == 0 && atomicAdd(counter, 0x10000u) >> 16 == n - 1) *counter = 0;
}

// Loads from L2, past L1, what other blocks wrote during this kernel.
template <class T>
__device__ __forceinline__ T load_from_l2(const T* p) {
  return __ldcg(p);
}

// Communication between GPUs, in the manner of NCCL's LL protocol: each word that one GPU writes
// into another's memory has a flag beside it. A store of eight bytes is atomic, so a word whose
// flag has arrived has arrived too, and no fence is needed.

__device__ __forceinline__ uint64_t flagged(uint32_t word, uint32_t flag) {
  return static_cast<uint64_t>(flag) << 32 | word;
}

__device__ __forceinline__ void store_flagged(uint4* to, uint2 words, uint32_t flag) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(to),
               "l"(flagged(words.x, flag)), "l"(flagged(words.y, flag))
               : "memory");
}

// Loads two words; returns whether both have the flag.
__device__ __forceinline__ bool load_flagged(const uint4* from, uint32_t flag, uint2& words) {
  uint64_t first, second;
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(first), "=l"(second)
               : "l"(from)
               : "memory");
  words = uint2{static_cast<uint32_t>(first), static_cast<uint32_t>(second)};
  return first >> 32 == flag && second >> 32 == flag;
}
