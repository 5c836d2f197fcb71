// Decode kernels for CPUs: matrix products with few rows, and attention over the cache.
//
// At batch 1 decoding on a CPU is bound by reading and unpacking weights. These kernels read each
// weight once, as stored, unpack it once for all rows of activations, and use few instructions:
//   bfloat16  is multiplied directly, two adjacent values per lane, and summed in float32.
//   integers  of 8 or 4 bits: activations are rounded to 16-bit fixed point, one scale per row, so
//             that one instruction multiplies and adds pairs exactly. The error, 2^-16 of the row's
//             largest activation, is a hundredth of bfloat16's own.
//   indices   of a lookup table of 16 numbers are replaced by these, which are multiplied as
//             integers if they are integers times a power of two, otherwise in float32.
//   fp8       (e4m3) is widened to float32, as are the activations.
// The code uses GNU vector extensions, so that GCC and Clang compile it for any processor; every
// intrinsic has a portable fallback. Sums run in a fixed order: on one machine a row has the same
// bits whatever the number of threads, and whatever the other rows.
//
// Every function is specified by its twin in hotloop/kernels/reference.py.
// Letters: M rows of activations, N output features, K input features, G groups along K;
// S super-blocks of groups; B sequences, T tokens of each, H query heads, J key/value heads, C cache
// positions, E head dimension.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__AVX2__) || defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <numeric>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "exchange.h"
#include "pool.h"

extern "C" __attribute__((weak)) void omp_set_num_threads(int);  // where torch is built with OpenMP

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef __AVX512VNNI__
constexpr int kBytes = 64;  // of a vector
constexpr int kSums = 18;   // vectors of sums; the other registers are for operands
#else
constexpr int kBytes = 32;
constexpr int kSums = 9;
#endif
constexpr int kLanes = kBytes / 4;  // 32-bit lanes of a vector
constexpr int kPairs = 2 * kLanes;  // 16-bit values of a vector, two to a lane

typedef float f32v __attribute__((vector_size(kBytes)));
typedef uint32_t u32v __attribute__((vector_size(kBytes)));
typedef int32_t s32v __attribute__((vector_size(kBytes)));
typedef int16_t s16v __attribute__((vector_size(kBytes)));
typedef uint16_t u16h __attribute__((vector_size(kBytes / 2)));
typedef int16_t s16h __attribute__((vector_size(kBytes / 2)));
typedef int8_t s8v __attribute__((vector_size(kBytes)));
typedef int8_t s8h __attribute__((vector_size(kBytes / 2)));
typedef int8_t s8q __attribute__((vector_size(kBytes / 4)));

// A std::vector aligned to a vector register: loads that straddle cache lines take twice as long.
template <class T> struct Aligned {
  using value_type = T;
  T* allocate(size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(kBytes)));
  }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(kBytes)); }
  bool operator==(const Aligned&) const { return true; }
};
template <class T> using Buffer = std::vector<T, Aligned<T>>;

template <class V> inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V> inline V load_part(const void* p, size_t bytes) {  // zeros beyond
  V v{};
  std::memcpy(&v, p, bytes);
  return v;
}

// v with lanes l and l ^ bit exchanged.
template <int bit, int... l> f32v exchange(f32v v, std::integer_sequence<int, l...>) {
  return f32v{v[l ^ bit]...};
}

// True (all bits) in lanes whose number has the bit.
template <int bit, int... l> s32v lanes_with(std::integer_sequence<int, l...>) {
  return s32v{(l & bit ? -1 : 0)...};
}

constexpr auto kLaneNumbers = std::make_integer_sequence<int, kLanes>();

template <int span = kLanes> inline float sum(f32v v) {
  if constexpr (span == 1) {
    return v[0];
  } else {
    return sum<span / 2>(v + exchange<span / 2>(v, kLaneNumbers));
  }
}

// Lane l of the result is the sum over all lanes of v[l].
template <int span = kLanes, int first = 0> inline f32v sum_each(const f32v (&v)[kLanes]) {
  if constexpr (span == 1) {
    return v[first];
  } else {
    constexpr int half = span / 2;
    const f32v a = sum_each<half, first>(v), b = sum_each<half, first + half>(v);
    const s32v in_b = lanes_with<half>(kLaneNumbers);
    return (in_b ? b : a) + exchange<half>(in_b ? a : b, kLaneNumbers);
  }
}

// Widens half a vector of integers to a whole one; what GCC generates itself takes four instructions.
#ifdef __AVX512VNNI__
inline s16v widen(s8h v) { return (s16v)_mm512_cvtepi8_epi16((__m256i)v); }
inline u32v widen(u16h v) { return (u32v)_mm512_cvtepu16_epi32((__m256i)v); }
inline s32v widen(s8q v) { return (s32v)_mm512_cvtepi8_epi32((__m128i)v); }
inline s16h widen_half(s8q v) { return (s16h)_mm256_cvtepi8_epi16((__m128i)v); }
#else
inline s16v widen(s8h v) { return __builtin_convertvector(v, s16v); }
inline u32v widen(u16h v) { return __builtin_convertvector(v, u32v); }
#ifdef __AVX2__
inline __m128i low_half(s8q v) { return _mm_cvtsi64_si128(load<int64_t>(&v)); }
inline s32v widen(s8q v) { return (s32v)_mm256_cvtepi8_epi32(low_half(v)); }
inline s16h widen_half(s8q v) { return (s16h)_mm_cvtepi8_epi16(low_half(v)); }
#else
inline s32v widen(s8q v) { return __builtin_convertvector(v, s32v); }
inline s16h widen_half(s8q v) { return __builtin_convertvector(v, s16h); }
#endif
#endif

inline float widen(uint16_t bf16) {
  const uint32_t bits = uint32_t(bf16) << 16;
  return load<float>(&bits);
}

// Rounds to the nearest bfloat16, ties to even.
inline u16h narrow(f32v values) {
  const u32v bits = (u32v)values, nan = u32v{} + 0x7fc0;
  const u32v rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(values == values ? rounded : nan, u16h);
}

// Loads values as floats, a whole vector or the first n, and stores them.
inline f32v from_bf16(u16h bits) { return (f32v)(widen(bits) << 16); }
inline f32v from_f16(u16h bits) {  // finite
#if defined(__AVX512VNNI__)
  return (f32v)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__AVX2__) && defined(__F16C__)
  return (f32v)_mm256_cvtph_ps((__m128i)bits);
#else
  const u32v wide = widen(bits);
  const f32v magnitude = (f32v)((wide & 0x7fff) << 13) * 0x1p112f;  // exact, as is each subnormal
  return (f32v)((u32v)magnitude | (wide & 0x8000) << 16);
#endif
}
inline f32v from_e4m3(s8q bits) {  // 2^-8 times the finite numbers, which are half precision
  return from_f16((u16h)((widen_half(bits) << 7) & int16_t(0xbfff)));
}
inline f32v get(const float* p) { return load<f32v>(p); }
inline f32v get(const uint16_t* p) { return from_bf16(load<u16h>(p)); }
inline f32v get(const float* p, int64_t n) { return load_part<f32v>(p, 4 * n); }
inline f32v get(const uint16_t* p, int64_t n) { return from_bf16(load_part<u16h>(p, 2 * n)); }
inline void put(float* p, f32v values, int64_t n = kLanes) { std::memcpy(p, &values, 4 * n); }
inline void put(uint16_t* p, f32v values, int64_t n = kLanes) {
  const u16h rounded = narrow(values);
  std::memcpy(p, &rounded, 2 * n);
}

// Calls f(i) for each whole vector of n values, where i is its first value, and f(i, rest) for the
// remaining ones.
template <class F> void for_vectors(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i);
  if (i < n) f(i, n - i);
}

// c + a * b, rounded once where the processor can. Compilers may fuse `a * b + c` or not: equal sums
// in two instances of a template would then differ.
inline f32v multiply_add(f32v c, f32v a, f32v b) {
#if defined(__AVX512VNNI__)
  return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// sums + a * b, where adjacent products are added: a lane sums the products of two pairs.
inline s32v multiply_add(s32v sums, s16v a, s16v b) {
#if defined(__AVX512VNNI__)
  return (s32v)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sums + (s32v)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  const s32v x = (s32v)a, y = (s32v)b;  // two 16-bit values in a lane: the low one, the high one
  return sums + ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}

// The same for bfloat16 pairs, whose products are exact in float32. (The instruction flushes
// numbers below 2^-126 to zero.)
inline f32v multiply_add(f32v sums, s16v a, s16v b) {
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
  return (f32v)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
  const u32v x = (u32v)a, y = (u32v)b, high = u32v{} + 0xffff0000u;
  sums += (f32v)(x << 16) * (f32v)(y << 16);
  return sums + (f32v)(x & high) * (f32v)(y & high);
#endif
}

// Prefetch distance: the hardware prefetcher alone is too slow for weights. Prefetching beyond the
// end is harmless.
constexpr int64_t kAhead = 8192;  // bytes

inline void prefetch(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + kAhead); }

// The fewest multiplications that are worth another thread: with fewer, waking the thread and
// committing its results costs more than it saves (measured).
constexpr int64_t kLinearProducts = 1 << 15, kAttentionProducts = 1 << 17;

// The grain size of a task whose units have this many multiplications each.
inline int64_t grain(int64_t least, int64_t products) {
  return std::max<int64_t>(1, least / std::max<int64_t>(1, products));
}

// The number of threads of our operators, if keep_threads has fixed it; otherwise 0.
thread_local int own_threads = 0;

int n_threads() { return own_threads ? own_threads : int(torch::stable::get_num_threads()); }

void run(std::unique_ptr<hotloop::Task> task) {
  hotloop::Pool::shared().run(std::move(task), n_threads());
}

// Restricts torch's operators to the calling thread, while ours use several threads; false restores
// them. OpenMP's threads spin while they wait for each other, and for milliseconds afterwards.
void keep_threads(bool on) {
  if (on == (own_threads != 0)) return;
  const int threads = n_threads();
  own_threads = on ? threads : 0;
  if (omp_set_num_threads) omp_set_num_threads(on ? 1 : threads);
}

// Uses the C interface, since the dispatcher would take a noticeable part of such short operators.
Tensor new_tensor(int32_t dtype, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                                                  dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor new_output(const Tensor& like, const std::vector<int64_t>& sizes) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return new_tensor(dtype, sizes);
}

std::vector<int64_t> sizes_of(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim(); i++) sizes.push_back(x.size(i));
  return sizes;
}

const uint16_t* bf16(const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); }
uint16_t* mutable_bf16(const Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); }

// ---------------------------------------------------------------------------- rows of activations

// Rows that are processed together, which share a weight while it is in a register. Nine, since
// eight drafts are verified together with the newest token.
constexpr int kRows = 9;

// Calls f(n) with n, at most `most`, as a constant.
template <int most, class F> void with_constant(int64_t n, F f) {
  if (n == most) {
    f(std::integral_constant<int, most>{});
  } else if constexpr (most > 1) {
    with_constant<most - 1>(n, f);
  }
}

// Calls f(R, first) for every R rows from `first` on, R being a constant and at most `most`.
template <int most = kRows, class F> void for_rows(int64_t M, F f) {
  const int64_t parts = (M + most - 1) / most;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t first = M * part / parts;
    with_constant<most>(M * (part + 1) / parts - first, [&](auto R) { f(R, first); });
  }
}

// Arranges activations in the order of the loops: `run` values of each of the rows that are
// processed together, then the next `run` values of each, padded with zeros from K on.
template <class X, int run, int most = kRows> struct Activations {
  int64_t width;
  Buffer<X> values;

  Activations(const X* x, int64_t M, int64_t K)
      : width((K + run - 1) / run * run), values(M * width) {
    for_rows<most>(M, [&](auto R, int64_t first) {
      for (int r = 0; r < R; r++, x += K) {
        X* to = &values[first * width + r * run];
        int64_t k = 0;
        for (; k + run <= K; k += run) std::copy_n(x + k, run, to + k * R);
        std::copy_n(x + k, K - k, to + k * R);
      }
    });
  }

  const X* from(int64_t first) const { return &values[first * width]; }
};

// Activations in 16-bit fixed point: x[m, k] ≈ values[m * K + k] * scale[m].
struct FixedPoint {
  std::vector<int16_t> values;
  std::vector<float> scale;

  FixedPoint(const uint16_t* x, int64_t M, int64_t K) : values(M * K), scale(M) {
    for (int64_t m = 0; m < M; m++) {
      const uint16_t* row = x + m * K;
      uint16_t bits = 0;  // without the sign, bfloat16 sort like integers, NaN and Inf last
      for (int64_t k = 0; k < K; k++) bits = std::max<uint16_t>(bits, row[k] & 0x7fff);
      const float largest = widen(bits);
      scale[m] = largest / 32767;  // not finite if an activation is not; then nor is the output
      // Not finite if no activation is 1e-34 or larger: then all of them are 0 here.
      const float inverse = std::isfinite(32767 / largest) ? 32767 / largest : 0;
      for (int64_t k = 0; k < K; k++) {
        values[m * K + k] = int16_t(__builtin_nearbyintf(widen(row[k]) * inverse));
      }
    }
  }
};

// Where the result of a matrix product goes: [M, N], some columns of a matrix.
struct Output {
  uint16_t* data;
  int64_t N, stride;
};

// A matrix product, divided into vectors of output features: f(n, m, y) computes features
// n … n + kLanes - 1 of rows m … m + R - 1 into y.
template <int most, class F> struct LinearTask final : hotloop::Task {
  F f;
  int64_t M;
  Output out;

  LinearTask(F f, int64_t M, int64_t K, Output out) : f(std::move(f)), M(M), out(out) {
    const int64_t N = out.N;
    units = (N + kLanes - 1) / kLanes;
    grain_size = grain(kLinearProducts, M * K * kLanes);
    unit_bytes = M * kLanes * sizeof *out.data;
  }

  void compute(int64_t begin, int64_t end, std::byte* result) const override {
    const int64_t first = begin * kLanes, width = (end - begin) * kLanes;
    auto* to = reinterpret_cast<uint16_t*>(result);  // [M, width]
    for (int64_t n = first; n < first + width; n += kLanes) {
      for_rows<most>(M, [&](auto R, int64_t m) {
        f32v y[R];
        f(n, m, y);
        for (int r = 0; r < R; r++) put(to + (m + r) * width + n - first, y[r]);
      });
    }
  }

  void commit(int64_t begin, int64_t end, const std::byte* result) const override {
    const int64_t first = begin * kLanes, width = (end - begin) * kLanes;
    const auto* from = reinterpret_cast<const uint16_t*>(result);
    for (int64_t m = 0; m < M; m++) {
      std::copy_n(from + m * width, std::min(width, out.N - first),
                  out.data + m * out.stride + first);
    }
  }
};

template <int most = kRows, class F> void run_linear(const Tensor& x, Output out, F f) {
  const int64_t K = x.size(-1), M = x.numel() / K;
  run(std::make_unique<LinearTask<most, F>>(std::move(f), M, K, out));
}

// ------------------------------------------------------------------- bfloat16 and int8, row-major

inline s16v load_weights(const uint16_t* w) { return load<s16v>(w); }
inline s16v load_weights(const uint16_t* w, int64_t n) { return load_part<s16v>(w, 2 * n); }
inline s16v load_weights(const int8_t* w) { return widen(load<s8h>(w)); }
inline s16v load_weights(const int8_t* w, int64_t n) { return widen(load_part<s8h>(w, n)); }

inline f32v to_float(f32v v) { return v; }
inline f32v to_float(s32v v) { return __builtin_convertvector(v, f32v); }

// A 32-bit sum holds up to 258 products of 127 * 32767, and two are added at a time.
constexpr int64_t kExact = 128 * kPairs;

// The sum over the lanes of total[r][i + f] is the sum over k of w[f][k] * x[r][k].
template <int F, int R, class W>
void add_products(const W* const (&w)[F], const int16_t* x, int64_t K, f32v (&total)[R][kLanes],
                  int i) {
  using Sums = std::conditional_t<std::is_same_v<W, int8_t>, s32v, f32v>;
  for (int r = 0; r < R; r++) {
    for (int f = 0; f < F; f++) total[r][i + f] = f32v{};
  }
  for (int64_t k = 0; k < K;) {
    Sums sums[R][F]{};
    const auto add = [&](auto... part) {
      s16v weights[F];
      for (int f = 0; f < F; f++) weights[f] = load_weights(w[f] + k, part...);
      for (int r = 0; r < R; r++) {
        const s16v activations = load<s16v>(x + k * R + r * kPairs);
        for (int f = 0; f < F; f++) {
          sums[r][f] = multiply_add(sums[r][f], weights[f], activations);
        }
      }
    };
    const int64_t stop = std::min(k + kExact, K);
    for (; k + kPairs <= stop; k += kPairs) {
      // The rows of a tile are contiguous: prefetched in the order of memory.
      for (int f = 0; f < F; f++) prefetch(w[0] + F * k + f * kPairs);
      add();
    }
    if (k < stop) {
      add(stop - k);
      k = stop;
    }
    for (int r = 0; r < R; r++) {
      for (int f = 0; f < F; f++) total[r][i + f] += to_float(sums[r][f]);
    }
  }
}

// y[m, n] = scale(m, n) * the sum over k of weight[n, k] * x[m, k]
template <class W, class Scale>
void multiply_rows(const Tensor& like, Activations<int16_t, kPairs> x, const Tensor& weight,
                   Output out, Scale scale) {
  const int64_t K = like.size(-1), N = weight.size(0);
  const auto* rows = static_cast<const W*>(weight.const_data_ptr());
  run_linear(like, out, [=, weight = weight, x = std::move(x),
                         scale = std::move(scale)]<int R>(int64_t n, int64_t m, f32v(&y)[R]) {
    constexpr int F = 2 * R <= kSums ? 2 : 1;
    f32v total[R][kLanes];
    for (int i = 0; i < kLanes; i += F) {
      const W* w[F];
      for (int f = 0; f < F; f++) w[f] = rows + std::min(n + i + f, N - 1) * K;
      add_products<F, R>(w, x.from(m), K, total, i);
    }
    for (int r = 0; r < R; r++) y[r] = sum_each(total[r]) * scale(m + r, n);
  });
}

void multiply_bf16(const Tensor& x, const Tensor& weight, Output out) {
  const int64_t K = x.size(-1), M = x.numel() / K;
  STD_TORCH_CHECK(weight.size(1) == K, "weight is [N, K]");
  Activations<int16_t, kPairs> activations(static_cast<const int16_t*>(x.const_data_ptr()), M, K);
  multiply_rows<uint16_t>(x, std::move(activations), weight, out,
                          [](int64_t, int64_t) { return 1.0f; });
}

void multiply_int8(const Tensor& x, const Tensor& values, const Tensor& scale, Output out) {
  const int64_t K = x.size(-1), M = x.numel() / K;
  const int64_t N = values.size(0);
  STD_TORCH_CHECK(values.size(1) == K && scale.numel() == N, "values [N, K], scale [N]");
  FixedPoint fixed(bf16(x), M, K);
  Activations<int16_t, kPairs> activations(fixed.values.data(), M, K);
  const auto* s = static_cast<const float*>(scale.const_data_ptr());
  const auto scale_of = [N, s, scale = scale, of_row = std::move(fixed.scale)](int64_t m,
                                                                             int64_t n) {
    return get(s + n, std::min<int64_t>(kLanes, N - n)) * of_row[m];
  };
  multiply_rows<int8_t>(x, std::move(activations), values, out, scale_of);
}

// ------------------------------------------------- groups of K, with output features interleaved

// A packed weight is a description and blocks of bytes, as `kernels.cpu.packing` makes them. A block
// is sixteen output features, whose data are interleaved: a lane of a vector has the values, the scale
// and the sum of one feature.
constexpr int kBlockFeatures = 16;

enum class Encoding : int32_t { kNibbles, kBytes, kIntegerTable, kTable, kFloat8, kPlanes };
enum class Number : int32_t { kNone, kInt8, kBFloat16, kHalf, kFloat };

struct Header {
  int32_t n, k, groups, super_blocks;
  Encoding values;
  Number scale, offset, super_scale, super_offset;
  int32_t zero;  // subtracted from every value, in addition to the zero point of its group
  int32_t permuted;
  float factor;  // by which decoded values are multiplied, a power of two
  int32_t unused[4];
};
constexpr int64_t kAlignment = 64;
static_assert(sizeof(Header) == kAlignment);

// The most products of integers whose 32-bit sum is exact: 256 * 255 * 32767 < 2^31. A group with
// more features is summed in runs of at most this many.
constexpr int64_t kExactGroup = 256;

// Scales, offsets or their factors: [columns, 16] from byte `at` of each block; or none.
struct Numbers {
  Number type = Number::kNone;
  int64_t at = 0;

  explicit operator bool() const { return type != Number::kNone; }

  // Calls f(get), where get(i) returns the vector of a block's numbers that begins with number i.
  template <class F> void with_getter(const std::byte* block, F f) const {
    const void* data = block + at;
    if (type == Number::kInt8) {
      f([=](int64_t i) { return to_float(widen(load<s8q>(static_cast<const int8_t*>(data) + i))); });
    } else if (type == Number::kBFloat16) {
      f([=](int64_t i) { return get(static_cast<const uint16_t*>(data) + i); });
    } else if (type == Number::kHalf) {
      f([=](int64_t i) { return from_f16(load<u16h>(static_cast<const uint16_t*>(data) + i)); });
    } else {
      f([=](int64_t i) { return get(static_cast<const float*>(data) + i); });
    }
  }
};

inline int64_t size_of(Number type) {
  return type == Number::kNone ? 0 : type == Number::kInt8 ? 1 : type == Number::kFloat ? 4 : 2;
}

struct GroupedWeight {
  Tensor description, blocks;  // held as long as the weight is read
  Header header;
  int64_t N, K, G, S, block_bytes, values_at;
  const std::byte *first, *table;
  const int32_t* permutation = nullptr;
  Numbers scale, offset, super_scale, super_offset;
  bool zero_points;  // offsets are integers that are subtracted from values

  GroupedWeight(const Tensor& described, const Tensor& packed, int64_t features)
      : description(described), blocks(packed), block_bytes(packed.stride(0)),
        first(static_cast<const std::byte*>(packed.const_data_ptr())) {
    const auto* data = static_cast<const std::byte*>(description.const_data_ptr());
    const int64_t length = description.numel();
    STD_TORCH_CHECK(length >= kAlignment, "a packed weight");
    header = load<Header>(data);
    N = header.n, K = header.k, G = header.groups, S = header.super_blocks;
    STD_TORCH_CHECK(K == features && G > 0 && K % (8 * G) == 0 && S > 0 && G % S == 0,
                    "a packed weight of K input features, groups of a multiple of 8");
    const Encoding values = header.values;
    const bool is_table = values == Encoding::kIntegerTable || values == Encoding::kTable;
    table = data + kAlignment;
    const int64_t table_bytes = is_table ? 16 * sizeof(float) : 0;
    if (header.permuted) permutation = reinterpret_cast<const int32_t*>(table + table_bytes);
    const int descriptions = values == Encoding::kPlanes ? 2 : 1;  // of the high plane, too
    int64_t at = 0;
    const auto section = [&](int64_t bytes) {
      const int64_t start = at;
      at += (bytes + kAlignment - 1) / kAlignment * kAlignment;
      return start;
    };
    const auto numbers = [&](Number type, int64_t columns) {
      return Numbers{type, section(size_of(type) * kBlockFeatures * columns)};
    };
    scale = numbers(header.scale, G);
    offset = numbers(header.offset, G);
    super_scale = numbers(header.super_scale, S);
    super_offset = numbers(header.super_offset, S);
    values_at = section(kBlockFeatures * K / (is_table || values == Encoding::kNibbles ? 2 : 1));
    // A block can be a part of a longer one: the high plane of a nested weight's.
    STD_TORCH_CHECK(packed.stride(1) == 1 && at == packed.size(1) &&
                        packed.size(0) == (N + kBlockFeatures - 1) / kBlockFeatures &&
                        length == descriptions * kAlignment + table_bytes +
                                      (header.permuted ? 4 * K : 0),
                    "as many bytes as the weight's description says");
    zero_points = offset.type == Number::kInt8 && !super_offset;
  }

  const std::byte* block_of(int64_t n) const { return first + n / kBlockFeatures * block_bytes; }
  const std::byte* values_of(int64_t n) const { return block_of(n) + values_at; }

  int64_t size() const { return K / G; }
  int64_t runs() const { return (size() + kExactGroup - 1) / kExactGroup; }  // of a group
  bool has_offset() const { return offset && !zero_points; }
};

// The scales, zero points and offsets of up to kGroups groups, for a vector of features.
struct GroupParameters {
  static constexpr int64_t kGroups = 32;
  f32v scale[kGroups], offset[kGroups];
  s32v zero[kGroups];

  [[gnu::always_inline]] void load(const GroupedWeight& weight, int64_t n, int64_t first,
                                   int64_t count) {
    const std::byte* block = weight.block_of(n);
    const int64_t lane = n % kBlockFeatures, at = first * kBlockFeatures + lane;
    const int64_t span = weight.G / weight.S;  // groups of a super-block
    const auto widen_numbers = [&](const Numbers& numbers, const Numbers& factors, f32v* to) __attribute__((always_inline)) {
      numbers.with_getter(block, [&](auto number) {
        for (int64_t i = 0; i < count; i++) to[i] = number(at + i * kBlockFeatures);
      });
      if (!factors) return;
      factors.with_getter(block, [&](auto factor) {
        for (int64_t i = 0, stop; i < count; i = stop) {
          const int64_t super_block = (first + i) / span;
          const f32v shared = factor(super_block * kBlockFeatures + lane);
          stop = std::min((super_block + 1) * span - first, count);
          for (int64_t j = i; j < stop; j++) to[j] *= shared;
        }
      });
    };
    widen_numbers(weight.scale, weight.super_scale, scale);
    if (weight.has_offset()) widen_numbers(weight.offset, weight.super_offset, offset);
    if (weight.zero_points) {
      const auto* points = reinterpret_cast<const int8_t*>(block + weight.offset.at) + at;
      for (int64_t i = 0; i < count; i++) {
        zero[i] = widen(::load<s8q>(points + i * kBlockFeatures)) + weight.header.zero;
      }
    }
  }
};

// Returns the address of the first values of a vector of features. Each T has values of one feature,
// and those of the features of a block alternate.
template <class T> const T* values_of(const GroupedWeight& weight, int64_t n) {
  return reinterpret_cast<const T*>(weight.values_of(n)) + n % kBlockFeatures;
}

// Four-bit values: 32-bit words [N / 16, K / 8, 16] of eight values along K. Nibble i of a word's
// low half is value 2 i, of its high half value 2 i + 1.
struct Nibbles {
  using X = int16_t;  // activations in fixed point, in pairs
  static constexpr int kRun = 2;
  const uint32_t* words;  // of a vector of features

  Nibbles(const GroupedWeight& weight, int64_t n)
      : words(values_of<uint32_t>(weight, n)) {}

  // Calls add(i, v) for the eight values from k on, where v are values 2 i and 2 i + 1.
  template <class F> void for_eight(int64_t k, F add) const {
    prefetch(words + 2 * k);
    u32v word = load<u32v>(words + 2 * k);
    for (int i = 0; i < 4; i++) {
      const s16v nibbles = (s16v)(word & 0x000f000f);
      word >>= 4;
      add(i, nibbles);
    }
  }
};

// Integers 16 h + l of two planes, each packed as `Nibbles`: h, and behind it l.
struct Planes {
  using X = int16_t;
  static constexpr int kRun = 2;
  const uint32_t *high, *low;

  Planes(const GroupedWeight& weight, int64_t n)
      : high(values_of<uint32_t>(weight, n)), low(high + weight.K / 8 * kBlockFeatures) {}

  template <class F> void for_eight(int64_t k, F add) const {
    prefetch(high + 2 * k);
    prefetch(low + 2 * k);
    const u32v h = load<u32v>(high + 2 * k), l = load<u32v>(low + 2 * k);
    add(0, (s16v)((h << 4 & 0x00f000f0) | (l & 0x000f000f)));
    add(1, (s16v)((h & 0x00f000f0) | (l >> 4 & 0x000f000f)));
    add(2, (s16v)((h >> 4 & 0x00f000f0) | (l >> 8 & 0x000f000f)));
    add(3, (s16v)((h >> 8 & 0x00f000f0) | (l >> 12 & 0x000f000f)));
  }
};

// Indices of a lookup table of integers, packed as `Nibbles`.
struct IntegerTable {
  using X = int16_t;
  static constexpr int kRun = 2;
  const uint32_t* words;
  s8v table;  // sixteen integers, repeated

  IntegerTable(const GroupedWeight& weight, int64_t n)
      : words(values_of<uint32_t>(weight, n)) {
    for (int i = 0; i < kBytes; i++) table[i] = reinterpret_cast<const int8_t*>(weight.table)[i % 16];
  }

  s8v lookup(u32v indices) const {  // four in each lane, of at most 15
#if defined(__AVX512VNNI__)
    return (s8v)_mm512_shuffle_epi8((__m512i)table, (__m512i)indices);
#elif defined(__AVX2__)
    return (s8v)_mm256_shuffle_epi8((__m256i)table, (__m256i)indices);
#else
    return __builtin_shuffle(table, (s8v)indices);
#endif
  }

  template <class F> void for_eight(int64_t k, F add) const {
    prefetch(words + 2 * k);
    const u32v word = load<u32v>(words + 2 * k);
    for (int i = 0; i < 2; i++) {
      const s16v integers = (s16v)lookup(word >> 4 * i & 0x0f0f0f0f);
      add(i, (integers << 8) >> 8);
      add(i + 2, integers >> 8);
    }
  }
};

// Eight-bit integers: [N / 16, K / 2, 16, 2].
struct Bytes {
  using X = int16_t;
  static constexpr int kRun = 2;
  const int16_t* pairs;

  Bytes(const GroupedWeight& weight, int64_t n)
      : pairs(values_of<int16_t>(weight, n)) {}

  template <class F> void for_eight(int64_t k, F add) const {
    for (int i = 0; i < 4; i++) {
      const int16_t* p = pairs + 8 * k + i * kBlockFeatures;
      prefetch(p);
      add(i, widen(load<s8h>(p)));
    }
  }
};

// Indices of a lookup table of floating-point numbers, packed as `Nibbles`.
struct Table {
  using X = float;  // activations
  static constexpr int kRun = 1;
  const uint32_t* words;
#if defined(__AVX512VNNI__)
  f32v table;
#elif defined(__AVX2__)
  f32v low, high;
#else
  const float* table;
#endif

  Table(const GroupedWeight& weight, int64_t n)
      : words(values_of<uint32_t>(weight, n)) {
    const auto* from = reinterpret_cast<const float*>(weight.table);
#if !defined(__AVX512VNNI__) && defined(__AVX2__)
    low = get(from), high = get(from + 8);
#elif defined(__AVX512VNNI__)
    table = get(from);
#else
    table = from;
#endif
  }

  // The numbers of the indices in the lowest four bits of each lane.
  f32v lookup(u32v index) const {
#if defined(__AVX512VNNI__)
    return (f32v)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#elif defined(__AVX2__)
    const auto of = [&](f32v half) {
      return (f32v)_mm256_permutevar8x32_ps((__m256)half, (__m256i)index);
    };
    return (f32v)_mm256_blendv_ps((__m256)of(low), (__m256)of(high), (__m256)(index << 28));
#else
    f32v numbers;
    for (int l = 0; l < kLanes; l++) numbers[l] = table[index[l] & 15];
    return numbers;
#endif
  }

  // Calls add(i, v) for the eight numbers from k on, where v is number i.
  template <class F> void for_eight(int64_t k, F add) const {
    prefetch(words + 2 * k);
    u32v word = load<u32v>(words + 2 * k);
    for (int i = 0; i < 4; i++) {
      add(2 * i, lookup(word));
      add(2 * i + 1, lookup(word >> 16));
      word >>= 4;
    }
  }
};

// Eight-bit floating-point numbers (e4m3): [N / 16, K, 16].
struct Float8 {
  using X = float;
  static constexpr int kRun = 1;
  const int8_t* bytes;

  Float8(const GroupedWeight& weight, int64_t n)
      : bytes(values_of<int8_t>(weight, n)) {}

  template <class F> void for_eight(int64_t k, F add) const {
    for (int i = 0; i < 8; i++) {
      const int8_t* p = bytes + (k + i) * kBlockFeatures;
      if (i % 4 == 0) prefetch(p);
      add(i, from_e4m3(load<s8q>(p)));
    }
  }
};

// Computes features n … n + kLanes - 1 of R rows. `x` and `x_sums` begin at the first of these rows:
// activations as `Activations` arranges them and, if values are integers, their sums over runs.
template <class Values, int R>
void multiply_groups(const GroupedWeight& weight, int64_t n, const typename Values::X* x,
                     const int32_t* x_sums, f32v (&total)[R]) {
  constexpr bool kIntegers = std::is_same_v<typename Values::X, int16_t>;
  using Sums = std::conditional_t<kIntegers, s32v, f32v>;
  // Accumulators of a row, which hide the latency of additions. For floating point their number must
  // not depend on R, since it determines the order of a sum.
  constexpr int kChains = !kIntegers || R == 1 ? 4 : R < kSums / 3 ? 2 : 1;
  const int64_t size = weight.size();
  const bool has_offset = weight.has_offset();
  const Values values(weight, n);
  // The loop over values prefetches as many bytes as it reads, kAhead bytes ahead. The bytes of the
  // sections before the values are prefetched here, at the same distance.
  if (n % kBlockFeatures == 0) {
    for (int64_t at = 0; at < weight.values_at; at += 64) prefetch(weight.block_of(n) + at);
  }
  GroupParameters parameters;
  f32v scaled[R]{};  // a local array, which the compiler keeps in registers, unlike `total`
  int64_t k = 0;
  for (int64_t first = 0; first < weight.G; first += parameters.kGroups) {
    const int64_t count = std::min(parameters.kGroups, weight.G - first);
    parameters.load(weight, n, first, count);
    for (int64_t g = 0; g < count; g++) {
      for (const int64_t last = k + size; k < last;) {
        const int64_t stop = std::min(k + kExactGroup, last);
        Sums sums[R][kChains]{};
        if constexpr (kIntegers) {
          for (int r = 0; r < R; r++) {
            if (weight.zero_points) {
              sums[r][0] -= parameters.zero[g] * x_sums[r];
            } else {
              sums[r][0] -= weight.header.zero * x_sums[r];
            }
          }
        }
        for (; k < stop; k += 8) {
          values.for_eight(k, [&](int i, auto v) {
            for (int r = 0; r < R; r++) {
              Sums& chain = sums[r][i % kChains];
              if constexpr (kIntegers) {
                const s32v pair = s32v{} + load<int32_t>(x + (k + 2 * i) * R + 2 * r);
                chain = multiply_add(chain, v, (s16v)pair);
              } else {
                chain = multiply_add(chain, v, f32v{} + x[(k + i) * R + r]);
              }
            }
          });
        }
        for (int r = 0; r < R; r++) {
          const Sums sum = std::accumulate(sums[r], sums[r] + kChains, Sums{});
          scaled[r] = multiply_add(scaled[r], to_float(sum), parameters.scale[g]);
        }
        if (kIntegers && has_offset) {
          for (int r = 0; r < R; r++) {
            const f32v x_sum = to_float(s32v{} + x_sums[r]);
            scaled[r] = multiply_add(scaled[r], x_sum, parameters.offset[g]);
          }
        }
        if (kIntegers) x_sums += R;
      }
    }
  }
  std::copy_n(scaled, R, total);
}

// Sums fixed-point activations over each run of each group, in the order of `multiply_groups`.
std::vector<int32_t> sum_runs(const FixedPoint& x, int64_t M, const GroupedWeight& weight) {
  const int64_t K = weight.K, size = weight.size(), runs = weight.runs(), all = weight.G * runs;
  std::vector<int32_t> sums(M * all);
  for_rows(M, [&](auto R, int64_t first) {
    for (int64_t r = 0; r < R; r++) {
      for (int64_t i = 0; i < all; i++) {
        const int64_t begin = i / runs * size + i % runs * kExactGroup;
        const int64_t length = std::min(kExactGroup, size - i % runs * kExactGroup);
        const int16_t* run = &x.values[(first + r) * K + begin];
        sums[first * all + i * R + r] = std::accumulate(run, run + length, int32_t(0));
      }
    }
  });
  return sums;
}

template <class Values>
void multiply_integers(const Tensor& x, const uint16_t* rows, int64_t M, GroupedWeight weight,
                       Output out) {
  FixedPoint fixed(rows, M, weight.K);
  Activations<int16_t, Values::kRun> pairs(fixed.values.data(), M, weight.K);
  const std::vector<int32_t> x_sums = sum_runs(fixed, M, weight);
  for (float& scale : fixed.scale) scale *= weight.header.factor;
  const int64_t runs = weight.G * weight.runs();
  run_linear(x, out, [=, weight = std::move(weight), pairs = std::move(pairs),
                      x_sums = std::move(x_sums), of_row = std::move(fixed.scale)]<int R>(
                         int64_t n, int64_t m, f32v(&y)[R]) {
    multiply_groups<Values>(weight, n, pairs.from(m), x_sums.data() + m * runs, y);
    for (int r = 0; r < R; r++) y[r] *= of_row[m + r];
  });
}

template <class Values>
void multiply_floats(const Tensor& x, const uint16_t* rows, int64_t M, GroupedWeight weight,
                     Output out) {
  Buffer<float> wide(M * weight.K);
  for_vectors(M * weight.K, [&](int64_t i, auto... rest) {
    put(&wide[i], get(rows + i, rest...), rest...);
  });
  // Each row has four accumulators: those of more rows would not fit into registers.
  constexpr int kMost = kSums / 3;
  Activations<float, Values::kRun, kMost> activations(wide.data(), M, weight.K);
  run_linear<kMost>(
      x, out,
      [weight = std::move(weight), activations = std::move(activations)]<int R>(
          int64_t n, int64_t m, f32v(&y)[R]) {
        multiply_groups<Values>(weight, n, activations.from(m), nullptr, y);
        for (int r = 0; r < R; r++) y[r] *= weight.header.factor;
      });
}

void multiply_grouped(const Tensor& x, GroupedWeight weight, Output out) {
  const int64_t K = x.size(-1), M = x.numel() / K;
  const uint16_t* rows = bf16(x);
  std::vector<uint16_t> permuted;
  if (weight.permutation) {
    permuted.resize(M * K);
    for (int64_t m = 0; m < M; m++) {
      for (int64_t k = 0; k < K; k++) permuted[m * K + k] = rows[m * K + weight.permutation[k]];
    }
    rows = permuted.data();
  }
  const Encoding values = weight.header.values;
  if (values == Encoding::kNibbles) {
    multiply_integers<Nibbles>(x, rows, M, std::move(weight), out);
  } else if (values == Encoding::kBytes) {
    multiply_integers<Bytes>(x, rows, M, std::move(weight), out);
  } else if (values == Encoding::kPlanes) {
    multiply_integers<Planes>(x, rows, M, std::move(weight), out);
  } else if (values == Encoding::kIntegerTable) {
    multiply_integers<IntegerTable>(x, rows, M, std::move(weight), out);
  } else if (values == Encoding::kTable) {
    multiply_floats<Table>(x, rows, M, std::move(weight), out);
  } else {
    STD_TORCH_CHECK(values == Encoding::kFloat8, "values of a known encoding");
    multiply_floats<Float8>(x, rows, M, std::move(weight), out);
  }
}

// Dequantizes feature n into y [K], as `reference.dequantize` does.
void dequantize_row(const GroupedWeight& weight, int64_t n, float* y) {
  const int64_t feature = n % kBlockFeatures, lane = n % kLanes;
  const Encoding encoding = weight.header.values;
  const auto* bytes = reinterpret_cast<const int8_t*>(weight.values_of(n));
  const auto* words = reinterpret_cast<const uint32_t*>(bytes) + feature;
  const auto value = [&](int64_t k, int32_t zero) {
    if (encoding == Encoding::kBytes) {
      return float(bytes[k / 2 * 2 * kBlockFeatures + 2 * feature + k % 2] - zero);
    }
    if (encoding == Encoding::kFloat8) {
      const auto* p = bytes + k * kBlockFeatures + feature - lane;
      return from_e4m3(load<s8q>(p))[lane] * weight.header.factor;
    }
    const int at = k / 8 * kBlockFeatures, bit = k % 8 / 2 * 4 + k % 2 * 16;
    const int index = words[at] >> bit & 15;
    if (encoding == Encoding::kNibbles) return float(index - zero);
    if (encoding == Encoding::kPlanes) {
      const int low = words[at + weight.K / 8 * kBlockFeatures] >> bit & 15;
      return (16 * index + low - zero) * weight.header.factor;
    }
    if (encoding == Encoding::kTable) return reinterpret_cast<const float*>(weight.table)[index];
    return reinterpret_cast<const int8_t*>(weight.table)[index] * weight.header.factor;
  };
  GroupParameters parameters;
  int64_t k = 0;
  for (int64_t first = 0; first < weight.G; first += parameters.kGroups) {
    const int64_t count = std::min(parameters.kGroups, weight.G - first);
    parameters.load(weight, n - lane, first, count);
    for (int64_t g = 0; g < count; g++) {
      const double scale = parameters.scale[g][lane];
      const int32_t zero = weight.zero_points ? parameters.zero[g][lane] : weight.header.zero;
      const float offset = weight.has_offset() ? parameters.offset[g][lane] : 0;
      for (const int64_t last = k + weight.size(); k < last; k++) {
        const float scaled = float(value(k, zero) * scale);  // rounded: not a fused multiply-add
        y[weight.permutation ? weight.permutation[k] : k] = scaled + offset;
      }
    }
  }
}

// Looks up rows of a packed weight of K input features by ids int64 [...], which are clamped to it:
// bfloat16 [..., K].
Tensor embed_groups(const Tensor& ids, const Tensor& description, const Tensor& blocks, int64_t K) {
  const GroupedWeight weight(description, blocks, K);
  STD_TORCH_CHECK(ids.is_contiguous() && ids.scalar_type() == ScalarType::Long, "contiguous ids");
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < ids.dim(); i++) sizes.push_back(ids.size(i));
  sizes.push_back(K);
  Tensor y = new_tensor(aoti_torch_dtype_bfloat16(), sizes);
  const auto* id = static_cast<const int64_t*>(ids.const_data_ptr());
  Buffer<float> row(K);
  for (int64_t i = 0; i < ids.numel(); i++) {
    dequantize_row(weight, std::clamp<int64_t>(id[i], 0, weight.N - 1), row.data());
    for_vectors(K, [&](int64_t k, auto... rest) {
      put(mutable_bf16(y) + i * K + k, get(&row[k], rest...), rest...);
    });
  }
  return y;
}

// Dequantizes a packed weight of K input features: float32 [N, K].
Tensor dequantize_groups(const Tensor& description, const Tensor& blocks, int64_t K) {
  const GroupedWeight weight(description, blocks, K);
  Tensor y = new_tensor(aoti_torch_dtype_float32(), {weight.N, K});
  auto* rows = static_cast<float*>(y.mutable_data_ptr());
  for (int64_t n = 0; n < weight.N; n++) dequantize_row(weight, n, rows + n * K);
  return y;
}

// ------------------------------------------------------------------------------- any packed weight

// A weight is one tensor, bfloat16 [N, K]; or two tensors: int8 [N, K] and float32 [N], or the
// description and the blocks of a `GroupedWeight`.

Tensor linear_rows(const Tensor& x, const Tensor& values, std::optional<Tensor> scale) {
  const int64_t N = values.size(0);
  Tensor y = new_output(x, {x.size(0), N});
  const Output out{mutable_bf16(y), N, N};
  if (scale) {
    multiply_int8(x, values, *scale, out);
  } else {
    multiply_bf16(x, values, out);
  }
  return y;
}

Tensor linear_groups(const Tensor& x, const Tensor& description, const Tensor& blocks, int64_t n) {
  GroupedWeight weight(description, blocks, x.size(-1));
  STD_TORCH_CHECK(weight.N == n, "a packed weight of n output features");
  Tensor y = new_output(x, {x.size(0), n});
  multiply_grouped(x, std::move(weight), {mutable_bf16(y), n, n});
  return y;
}

// Several weights, concatenated along the output features.
Tensor linear(const Tensor& x, const std::vector<Tensor>& weight,
              const std::optional<Tensor>& bias) {
  // Calls f(i, type, features) for each weight, which begins at tensor i, by its first tensor's type.
  const auto for_weights = [&](auto f) {
    for (size_t i = 0; i < weight.size();) {
      const ScalarType type = weight[i].scalar_type();
      f(i, type, type == ScalarType::Byte ? load<Header>(weight[i].const_data_ptr()).n
                                          : weight[i].size(0));
      i += type == ScalarType::BFloat16 ? 1 : 2;
    }
  };
  int64_t N = 0;
  for_weights([&](size_t, ScalarType, int64_t features) { N += features; });
  const int64_t M = x.numel() / x.size(-1);
  Tensor y = new_output(x, {M, N});
  uint16_t* data = mutable_bf16(y);
  int64_t at = 0;
  for_weights([&](size_t i, ScalarType type, int64_t features) {
    const Output out{data + at, features, N};
    if (type == ScalarType::Byte) {
      multiply_grouped(x, GroupedWeight(weight.at(i), weight.at(i + 1), x.size(-1)), out);
    } else if (type == ScalarType::Char) {
      multiply_int8(x, weight.at(i), weight.at(i + 1), out);
    } else {
      multiply_bf16(x, weight.at(i), out);
    }
    at += features;
  });
  if (bias) {
    for (int64_t m = 0; m < M; m++) {
      uint16_t* row = data + m * N;
      for_vectors(N, [&](int64_t n, auto... rest) {
        put(row + n, get(row + n, rest...) + get(bf16(*bias) + n, rest...), rest...);
      });
    }
  }
  return y;
}

// ------------------------------------------------------------------------------------ attention

// e^x for x <= 0, to the precision of float32, and at least 1e-38. NaN stays NaN.
inline f32v exp(f32v x) {
  x = x < -87 ? f32v{} - 87 : x;
  const float integers = 3 << 22;  // adding it rounds to an integer
  const f32v rounded = x * float(M_LOG2E) + integers, n = rounded - integers;
  const f32v r = (x - n * 0.693359375f) - n * float(M_LN2 - 0.693359375);
  f32v power = f32v{} + 1.0f / 5040;  // e^r by its series: |r| is at most half of ln 2
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    power = power * r + c;
  }
  return power * (f32v)(((u32v)rounded << 23) + (127u << 23));
}

constexpr int64_t kBlock = 128;

// The partial result of a query head over a block of cache positions, besides its sum of values:
// the largest score, and the sum of exponentials relative to it (online softmax).
struct Partial {
  float largest, total;
};

// Attention of R query heads of one key/value head over a block of positions; q and out are [R, E].
template <int R, class Value>
void attend(const Value* keys, const Value* values, int64_t length, int64_t E, const float* q,
            Partial* partial, float* out) {
  alignas(kBytes) float p[R][kBlock];  // scores, then their exponentials
  for (int64_t j = 0; j < length; j += kLanes) {
    f32v products[R][kLanes];
    for (int i = 0; i < kLanes; i++) {
      const Value* key = keys + std::min(j + i, length - 1) * E;  // the last one is repeated
      f32v sums[R]{};
      for_vectors(E, [&](int64_t e, auto... rest) {
        const f32v k = get(key + e, rest...);
        for (int r = 0; r < R; r++) sums[r] += k * get(q + r * E + e, rest...);
      });
      for (int r = 0; r < R; r++) products[r][i] = sums[r];
    }
    for (int r = 0; r < R; r++) put(p[r] + j, sum_each(products[r]));
  }
  for (int r = 0; r < R; r++) {
    const float largest = *std::max_element(p[r], p[r] + length);
    f32v total{};
    for_vectors(length, [&](int64_t j, auto... rest) {
      put(p[r] + j, exp(get(p[r] + j) - largest));
      total += get(p[r] + j, rest...);
    });
    partial[r] = {largest, sum(total)};
  }
  for_vectors(E, [&](int64_t e, auto... rest) {
    f32v sums[R]{};
    for (int64_t j = 0; j < length; j++) {
      const f32v v = get(values + j * E + e, rest...);
      for (int r = 0; r < R; r++) sums[r] += v * p[r][j];
    }
    for (int r = 0; r < R; r++) put(out + r * E + e, sums[r], rest...);
  });
}

// Attention, divided into blocks of kBlock cache positions of a sequence and key/value head. A block
// is read once, for all tokens and query heads that share it. The blocks do not depend on the token,
// so a token's sums do not depend on the other tokens. A block without visible positions contributes
// nothing.
template <class Value> struct AttentionTask final : hotloop::Task {
  Tensor k_cache, v_cache;
  std::vector<int64_t> seat;      // [B]: where in the caches
  std::vector<int64_t> position;  // [B, T]
  Buffer<float> query;            // [B, T, H, E], scaled
  int64_t T, H, J, C, E, heads, window, blocks, BTH;
  Partial* partial = nullptr;  // [blocks, B, T, H]
  float* sums = nullptr;       // [blocks, B, T, H, E]

  AttentionTask(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                std::vector<int64_t> seats, const Tensor& positions, int64_t window, double scale)
      : k_cache(k_cache), v_cache(v_cache), seat(std::move(seats)), query(q.numel()),
        window(window) {
    T = q.size(1), H = q.size(2), E = q.size(3), BTH = q.size(0) * T * H;
    J = k_cache.size(1), C = k_cache.size(2), heads = H / J;
    const auto* last = static_cast<const int64_t*>(positions.const_data_ptr());
    position.assign(last, last + q.size(0) * T);
    const auto* from = static_cast<const Value*>(q.const_data_ptr());
    for_vectors(BTH * E, [&](int64_t i, auto... rest) {
      put(&query[i], get(from + i, rest...) * float(scale), rest...);
    });
    const int64_t longest = *std::max_element(position.begin(), position.end()) + 1;
    STD_TORCH_CHECK(longest <= C, "position beyond the cache");
    blocks = (longest + kBlock - 1) / kBlock;
    units = q.size(0) * J * blocks;
    grain_size = grain(kAttentionProducts, T * heads * std::min(longest, kBlock) * E);
    unit_bytes = T * heads * (sizeof(Partial) + E * sizeof(float));
  }

  void compute(int64_t begin, int64_t end, std::byte* result) const override {
    const auto* keys = static_cast<const Value*>(k_cache.const_data_ptr());
    const auto* values = static_cast<const Value*>(v_cache.const_data_ptr());
    for (int64_t i = begin; i < end; i++) {
      const int64_t block = i % blocks, bj = i / blocks, b = bj / J, j = bj % J;
      for (int64_t t = 0; t < T; t++) {
        const auto [part, sum] = results(result, i - begin, t);
        const int64_t seen = position[b * T + t] + 1;
        const int64_t first = std::max(block * kBlock, window ? seen - window : 0);
        const int64_t length = std::min((block + 1) * kBlock, seen) - first;
        if (length <= 0) {
          std::fill_n(part, heads, Partial{-std::numeric_limits<float>::infinity(), 0});
          std::fill_n(sum, heads * E, 0.0f);
          continue;
        }
        const int64_t at = ((seat[b] * J + j) * C + first) * E;
        const Value *k = keys + at, *v = values + at;
        const float* q = &query[((b * T + t) * H + j * heads) * E];
        for_rows(heads, [&](auto R, int64_t h) {
          attend<R>(k, v, length, E, q + h * E, part + h, sum + h * E);
        });
      }
    }
  }

  void commit(int64_t begin, int64_t end, const std::byte* result) const override {
    for (int64_t i = begin; i < end; i++) {
      const int64_t block = i % blocks, bj = i / blocks, b = bj / J, j = bj % J;
      for (int64_t t = 0; t < T; t++) {
        const auto [part, sum] = results(const_cast<std::byte*>(result), i - begin, t);
        const int64_t at = block * BTH + (b * T + t) * H + j * heads;
        std::copy_n(part, heads, partial + at);
        std::copy_n(sum, heads * E, sums + at * E);
      }
    }
  }

  // The results of a unit for token t, for `heads` query heads.
  std::pair<Partial*, float*> results(std::byte* result, int64_t unit, int64_t t) const {
    auto* floats = reinterpret_cast<float*>(result + unit * unit_bytes) + t * heads * E;
    return {reinterpret_cast<Partial*>(result + unit * unit_bytes + T * heads * E * sizeof(float)) +
                t * heads,
            floats};
  }
};

template <class Value>
void attention_typed(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                     std::vector<int64_t> seats, const Tensor& positions, int64_t window,
                     double scale, Tensor& y) {
  auto task = std::make_unique<AttentionTask<Value>>(q, k_cache, v_cache, std::move(seats),
                                                     positions, window, scale);
  const int64_t blocks = task->blocks, BTH = task->BTH, E = task->E;
  std::vector<Partial> partial(blocks * BTH);
  Buffer<float> sums(blocks * BTH * E);
  task->partial = partial.data(), task->sums = sums.data();
  run(std::move(task));

  auto* out = static_cast<Value*>(y.mutable_data_ptr());
  std::vector<float> weight(blocks);
  for (int64_t bth = 0; bth < BTH; bth++) {
    float largest = -std::numeric_limits<float>::infinity(), total = 0;
    for (int64_t i = 0; i < blocks; i++) {
      largest = std::max(largest, partial[i * BTH + bth].largest);
    }
    for (int64_t i = 0; i < blocks; i++) {
      weight[i] = std::exp(partial[i * BTH + bth].largest - largest);
      total += partial[i * BTH + bth].total * weight[i];
    }
    for_vectors(E, [&](int64_t e, auto... rest) {
      f32v sum{};
      for (int64_t i = 0; i < blocks; i++) {
        sum += get(&sums[(i * BTH + bth) * E + e], rest...) * weight[i];
      }
      put(out + bth * E + e, sum / total, rest...);
    });
  }
}

// Decode attention of q [B, T, H, E] over seats int64 [B] of the caches [S, J, C, E], which already
// hold the keys and values of these tokens. A token sees positions up to its own, of positions
// int64 [B, T], and at most `window` of them; 0 for no window. y has B * T * H * E values.
void attend_into(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                 const Tensor& seats_B, const Tensor& positions, int64_t window, double scale,
                 Tensor& y) {
  STD_TORCH_CHECK(q.is_contiguous() && k_cache.is_contiguous() && v_cache.is_contiguous() &&
                      seats_B.is_contiguous() && positions.is_contiguous(),
                  "contiguous q, caches, seats and positions");
  const auto* seat = static_cast<const int64_t*>(seats_B.const_data_ptr());
  std::vector<int64_t> seats(seat, seat + q.size(0));
  for (const int64_t s : seats) {
    STD_TORCH_CHECK(0 <= s && s < k_cache.size(0), "a seat of the cache");
  }
  if (q.scalar_type() == ScalarType::BFloat16) {
    attention_typed<uint16_t>(q, k_cache, v_cache, std::move(seats), positions, window, scale, y);
  } else {
    STD_TORCH_CHECK(q.scalar_type() == ScalarType::Float, "float32 or bfloat16");
    attention_typed<float>(q, k_cache, v_cache, std::move(seats), positions, window, scale, y);
  }
}

Tensor decode_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& seats, const Tensor& positions, int64_t window,
                        double scale) {
  Tensor y = new_output(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  attend_into(q, k_cache, v_cache, seats, positions, window, scale, y);
  return y;
}

// ------------------------------------------------------------------- norms, rope, SwiGLU, biases

// They take about a microsecond per row. PyTorch would take some forty operators per layer for them,
// whose calls alone take longer. They run on the calling thread.

void rms_norm_row(const uint16_t* x, const uint16_t* weight, int64_t D, double eps, uint16_t* y) {
  f32v squares{};
  for_vectors(D, [&](int64_t i, auto... rest) {
    const f32v v = get(x + i, rest...);
    squares += v * v;
  });
  const float factor = 1 / std::sqrt(sum(squares) / float(D) + float(eps));
  for_vectors(D, [&](int64_t i, auto... rest) {
    const f32v normed = from_bf16(narrow(get(x + i, rest...) * factor));
    put(y + i, normed * get(weight + i, rest...), rest...);
  });
}

// Rope of one head by a position's cos and sin, float32 [E].
void rope_row(const uint16_t* x, const float* cos, const float* sin, int64_t E, uint16_t* y) {
  const int64_t half = E / 2;
  for_vectors(half, [&](int64_t i, auto... rest) {
    const f32v a = get(x + i, rest...), b = get(x + half + i, rest...);
    put(y + i, a * get(cos + i, rest...) - b * get(sin + i, rest...), rest...);
    put(y + half + i, b * get(cos + half + i, rest...) + a * get(sin + half + i, rest...), rest...);
  });
}

// Calls f(token, head, row) for each head of x [B, T, H, E]; heads may have any stride.
template <class F> void for_heads(const Tensor& x, F f) {
  STD_TORCH_CHECK(x.dim() == 4 && x.stride(3) == 1 && x.stride(0) == x.size(1) * x.stride(1),
                  "contiguous heads, tokens at one distance");
  for (int64_t bt = 0; bt < x.size(0) * x.size(1); bt++) {
    for (int64_t h = 0; h < x.size(2); h++) {
      f(bt, h, bf16(x) + bt * x.stride(1) + h * x.stride(2));
    }
  }
}

// RMS norm of contiguous rows [..., D], or of heads [B, T, H, D] with any stride.
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const int64_t D = weight.numel();
  STD_TORCH_CHECK(x.size(-1) == D, "x [..., D], weight [D]");
  Tensor y = new_output(x, sizes_of(x));
  uint16_t* out = mutable_bf16(y);
  const auto row = [&](const uint16_t* from) {
    rms_norm_row(from, bf16(weight), D, eps, out);
    out += D;
  };
  if (x.is_contiguous()) {
    for (int64_t r = 0; r < x.numel() / D; r++) row(bf16(x) + r * D);
  } else {
    for_heads(x, [&](int64_t, int64_t, const uint16_t* head) { row(head); });
  }
  return y;
}

// Rope of heads x [B, T, H, E] by cos and sin, float32 [B, T, E].
Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const int64_t H = x.size(2), E = x.size(3);
  STD_TORCH_CHECK(cos.is_contiguous() && sin.is_contiguous(), "contiguous cos and sin");
  Tensor y = new_output(x, {x.size(0), x.size(1), H, E});
  uint16_t* out = mutable_bf16(y);
  const auto* c = static_cast<const float*>(cos.const_data_ptr());
  const auto* s = static_cast<const float*>(sin.const_data_ptr());
  for_heads(x, [&](int64_t bt, int64_t h, const uint16_t* head) {
    rope_row(head, c + bt * E, s + bt * E, E, out + (bt * H + h) * E);
  });
  return y;
}

// SwiGLU, SiLU of the first half of each row times the second: [..., 2 F] to [..., F].
Tensor swiglu(const Tensor& gate_up) {
  const int64_t F = gate_up.size(-1) / 2, rows = gate_up.numel() / (2 * F);
  STD_TORCH_CHECK(gate_up.is_contiguous(), "contiguous [..., 2 F]");
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < gate_up.dim(); i++) sizes.push_back(gate_up.size(i));
  sizes.push_back(F);
  Tensor y = new_output(gate_up, sizes);
  uint16_t* out = mutable_bf16(y);
  for (int64_t r = 0; r < rows; r++) {
    const uint16_t *gate = bf16(gate_up) + r * 2 * F, *up = gate + F;
    for_vectors(F, [&](int64_t i, auto... rest) {
      const f32v g = get(gate + i, rest...);
      const f32v small = exp(g < 0 ? g : -g);  // e^-|g|
      const f32v silu = g * (g < 0 ? small : f32v{} + 1) / (1 + small);
      put(out + r * F + i, from_bf16(narrow(silu)) * get(up + i, rest...), rest...);
    });
  }
  return y;
}

// ---------------------------------------------------------------------------- sublayers of a block

// A decode step of a small model is hundreds of operators of microseconds, whose calls take as long
// as their work. These two operators are the sublayers of `models.decoder.Block`, without their
// all-reduces.

// The attention of a block: norm of x [B, T, D], qkv projection, head norms, rope, storing
// keys and values in the caches [S, J, C, E] at seats int64 [B] and positions int64 [B, T],
// attention, and the output projection. Returns [B * T, D].
Tensor attention_sublayer(const Tensor& x, const Tensor& norm, double eps, std::vector<Tensor> qkv,
                          std::optional<Tensor> qkv_bias, std::optional<Tensor> q_norm,
                          std::optional<Tensor> k_norm, const Tensor& cos, const Tensor& sin,
                          const Tensor& k_cache, const Tensor& v_cache, const Tensor& seats,
                          const Tensor& positions, int64_t window, double scale,
                          std::vector<Tensor> o, std::optional<Tensor> o_bias) {
  const int64_t B = positions.size(0), T = positions.size(1);
  const int64_t S = k_cache.size(0), J = k_cache.size(1), C = k_cache.size(2), E = k_cache.size(3);
  STD_TORCH_CHECK(k_cache.is_contiguous() && v_cache.is_contiguous() && seats.is_contiguous() &&
                      positions.is_contiguous() && cos.is_contiguous() && sin.is_contiguous(),
                  "contiguous caches, seats, positions, cos and sin");
  const Tensor projected = linear(rms_norm(x, norm, eps), qkv, qkv_bias);
  const int64_t heads = projected.size(1) / E, H = heads - 2 * J;
  const Tensor q = new_output(x, {B, T, H, E});
  const auto* seat = static_cast<const int64_t*>(seats.const_data_ptr());
  const auto* position = static_cast<const int64_t*>(positions.const_data_ptr());
  const auto* c = static_cast<const float*>(cos.const_data_ptr());
  const auto* s = static_cast<const float*>(sin.const_data_ptr());
  std::vector<uint16_t> normed(E);
  const auto rotate = [&](const uint16_t* head, const std::optional<Tensor>& weight, int64_t bt,
                          uint16_t* to) {
    if (weight) {
      rms_norm_row(head, bf16(*weight), E, eps, normed.data());
      head = normed.data();
    }
    rope_row(head, c + bt * E, s + bt * E, E, to);
  };
  for (int64_t bt = 0; bt < B * T; bt++) {
    STD_TORCH_CHECK(0 <= seat[bt / T] && seat[bt / T] < S, "a seat of the cache");
    STD_TORCH_CHECK(0 <= position[bt] && position[bt] < C, "a position of the cache");
    const uint16_t* row = bf16(projected) + bt * heads * E;
    for (int64_t h = 0; h < H; h++) {
      rotate(row + h * E, q_norm, bt, mutable_bf16(q) + (bt * H + h) * E);
    }
    for (int64_t j = 0; j < J; j++) {
      const int64_t at = ((seat[bt / T] * J + j) * C + position[bt]) * E;
      rotate(row + (H + j) * E, k_norm, bt, mutable_bf16(k_cache) + at);
      std::copy_n(row + (H + J + j) * E, E, mutable_bf16(v_cache) + at);
    }
  }
  Tensor attended = new_output(x, {B * T, H * E});
  attend_into(q, k_cache, v_cache, seats, positions, window, scale, attended);
  return linear(attended, o, o_bias);
}

// The feed-forward of a block: norm of x [B, T, D], and SwiGLU. Returns [B * T, D].
Tensor feed_forward_sublayer(const Tensor& x, const Tensor& norm, double eps,
                             std::vector<Tensor> gate_up, std::optional<Tensor> gate_up_bias,
                             std::vector<Tensor> down, std::optional<Tensor> down_bias) {
  return linear(swiglu(linear(rms_norm(x, norm, eps), gate_up, gate_up_bias)), down, down_bias);
}

// ---------------------------------------------------------------------------- sums over ranks

int64_t exchange_bytes(int64_t ranks) { return hotloop::Exchange::memory_bytes(int(ranks)); }

// Exchanges x with all ranks, piece by piece. Calls f(exchange, begin, length) for each piece, as
// long as its messages are valid; begin and length are in bytes of x.
template <class F>
void for_pieces(const Tensor& x, const Tensor& memory, int64_t rank, int64_t ranks, F f) {
  STD_TORCH_CHECK(x.is_contiguous() && memory.is_contiguous(), "contiguous tensors");
  STD_TORCH_CHECK(memory.numel() >= exchange_bytes(ranks) && 0 <= rank && rank < ranks,
                  "memory of exchange_bytes(ranks), and one of the ranks");
  using hotloop::Exchange;
  Exchange exchange(static_cast<std::byte*>(memory.mutable_data_ptr()), int(rank), int(ranks));
  const auto* data = static_cast<const std::byte*>(x.const_data_ptr());
  const size_t bytes = x.numel() * x.element_size();
  for (size_t begin = 0; begin < bytes; begin += Exchange::kMaxBytes) {
    const size_t length = std::min(bytes - begin, Exchange::kMaxBytes);
    STD_TORCH_CHECK(exchange.post(data + begin, length), "ranks exchange tensors of one size");
    f(exchange, begin, length);
  }
}

// Adds n elements of every rank in float32, in the order of ranks, and rounds once.
template <class T> void add_parts(const hotloop::Exchange& exchange, int ranks, int64_t n, T* sum) {
  constexpr int64_t kBlock = 256;
  float sums[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t length = std::min(kBlock, n - begin);
    for (int rank = 0; rank < ranks; rank++) {
      const T* part = reinterpret_cast<const T*>(exchange.message_of(rank)) + begin;
      for (int64_t i = 0; i < length; i++) sums[i] = (rank ? sums[i] : 0.0f) + float(part[i]);
    }
    for (int64_t i = 0; i < length; i++) sum[begin + i] = T(sums[i]);
  }
}

// Sums x over ranks, which all call it, with the memory that they share.
Tensor sum_over_ranks(const Tensor& x, const Tensor& memory, int64_t rank, int64_t ranks) {
  Tensor sum = new_output(x, sizes_of(x));
  auto* out = static_cast<std::byte*>(sum.mutable_data_ptr());
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half, "float32, bfloat16 or float16");
  for_pieces(x, memory, rank, ranks, [&](const auto& exchange, size_t begin, size_t length) {
    const auto add = [&]<class T>(T*) {
      add_parts(exchange, int(ranks), length / sizeof(T), reinterpret_cast<T*>(out + begin));
    };
    if (type == ScalarType::Float) {
      add(static_cast<float*>(nullptr));
    } else if (type == ScalarType::BFloat16) {
      add(static_cast<torch::headeronly::BFloat16*>(nullptr));
    } else {
      add(static_cast<torch::headeronly::Half*>(nullptr));
    }
  });
  return sum;
}

// Gathers x of every rank, [ranks, ...].
Tensor gather_over_ranks(const Tensor& x, const Tensor& memory, int64_t rank, int64_t ranks) {
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.insert(sizes.begin(), ranks);
  Tensor gathered = new_output(x, sizes);
  auto* out = static_cast<std::byte*>(gathered.mutable_data_ptr());
  const size_t stride = x.numel() * x.element_size();
  for_pieces(x, memory, rank, ranks, [&](const auto& exchange, size_t begin, size_t length) {
    for (int64_t r = 0; r < ranks; r++) {
      std::memcpy(out + r * stride + begin, exchange.message_of(int(r)), length);
    }
  });
  return gathered;
}

}  // namespace

STABLE_TORCH_LIBRARY(hotloop_cpu, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rope(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("linear_rows(Tensor x, Tensor values, Tensor? scale) -> Tensor");
  m.def("linear_groups(Tensor x, Tensor description, Tensor blocks, int n) -> Tensor");
  m.def("embed_groups(Tensor ids, Tensor description, Tensor blocks, int k) -> Tensor");
  m.def("dequantize_groups(Tensor description, Tensor blocks, int k) -> Tensor");
  m.def("decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seats, "
        "Tensor positions, int window, float scale) -> Tensor");
  m.def("attention_sublayer(Tensor x, Tensor norm, float eps, Tensor[] qkv, Tensor? qkv_bias, "
        "Tensor? q_norm, Tensor? k_norm, Tensor cos, Tensor sin, Tensor(a!) k_cache, "
        "Tensor(b!) v_cache, Tensor seats, Tensor positions, int window, float scale, Tensor[] o, "
        "Tensor? o_bias) -> Tensor");
  m.def("feed_forward_sublayer(Tensor x, Tensor norm, float eps, Tensor[] gate_up, "
        "Tensor? gate_up_bias, Tensor[] down, Tensor? down_bias) -> Tensor");
  m.def("keep_threads(bool on) -> ()");
  m.def("exchange_bytes(int ranks) -> int");
  m.def("sum_over_ranks(Tensor x, Tensor memory, int rank, int ranks) -> Tensor");
  m.def("gather_over_ranks(Tensor x, Tensor memory, int rank, int ranks) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(hotloop_cpu, CPU, m) {
  m.impl("linear_rows", TORCH_BOX(&linear_rows));
  m.impl("linear_groups", TORCH_BOX(&linear_groups));
  m.impl("embed_groups", TORCH_BOX(&embed_groups));
  m.impl("dequantize_groups", TORCH_BOX(&dequantize_groups));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("attention_sublayer", TORCH_BOX(&attention_sublayer));
  m.impl("feed_forward_sublayer", TORCH_BOX(&feed_forward_sublayer));
  m.impl("sum_over_ranks", TORCH_BOX(&sum_over_ranks));
  m.impl("gather_over_ranks", TORCH_BOX(&gather_over_ranks));
}

STABLE_TORCH_LIBRARY_IMPL(hotloop_cpu, CompositeExplicitAutograd, m) {
  m.impl("keep_threads", TORCH_BOX(&keep_threads));
  m.impl("exchange_bytes", TORCH_BOX(&exchange_bytes));
}
