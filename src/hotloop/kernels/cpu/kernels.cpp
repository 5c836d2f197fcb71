// Decode kernels for CPUs: matrix products with few rows, and attention over the cache.
//
// At batch 1 a CPU decodes at the speed at which it reads and unpacks weights. These kernels read
// each weight once, as stored, and spend as few instructions on it as they can:
//   bfloat16  two weights lie in one 32-bit lane; a shift and a mask make two floats of them, and
//             the activations are split into even and odd ones to match.
//   int8/int4 activations are rounded to 16-bit fixed point, one scale per row, so that one
//             instruction multiplies and adds sixteen pairs, exactly. The error, 2^-16 of the row's
//             largest activation, is a hundredth of bfloat16's own.
// Written in GNU vector extensions, so that GCC and Clang compile it for any processor; the one
// intrinsic has a portable twin. Sums run in a fixed order: the same input gives the same bits
// whatever the number of threads.
//
// The specification of every function is its twin in hotloop/kernels/reference.py.
// Letters: M rows of activations, N output features, K input features, G groups along K;
// S slots, H query heads, J key/value heads, C cache positions, D head dimension.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <optional>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

typedef float f32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef int32_t s32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int16_t s16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef int8_t s8x16 __attribute__((vector_size(16)));

template <class V> inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline float sum(f32x8 v) {
  return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

inline float widen(uint16_t bf16) {
  const uint32_t bits = uint32_t(bf16) << 16;
  return load<float>(&bits);
}

inline uint16_t narrow(float value) {  // to the nearest bfloat16, ties to even
  const uint32_t bits = load<uint32_t>(&value);
  if (std::isnan(value)) return 0x7fc0;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float get(const float* p) { return *p; }
inline float get(const uint16_t* p) { return widen(*p); }
inline void put(float* p, float value) { *p = value; }
inline void put(uint16_t* p, float value) { *p = narrow(value); }
inline f32x8 get8(const float* p) { return load<f32x8>(p); }
inline f32x8 get8(const uint16_t* p) {
  return (f32x8)(__builtin_convertvector(load<u16x8>(p), u32x8) << 16);
}

// Wide weights are used up faster than the hardware fetches them unasked (int4 is not: unpacking
// takes longer). Asking for an address beyond the end is harmless.
constexpr int64_t kAhead = 4096;  // bytes

inline void prefetch(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + kAhead); }

// Output features that one thread should at least take: about 32 thousand weights, below which
// waking another thread costs more than it saves.
inline int64_t grain(int64_t M, int64_t K) {
  return std::max<int64_t>(1, (int64_t(1) << 15) / (M * K));
}

// Straight from the C interface: at this size, going through the dispatcher would show.
Tensor new_output(const Tensor& like, std::initializer_list<int64_t> sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes.begin()[i];
  }
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides.data(),
                                                  dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

const uint16_t* bf16(const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); }

// ---------------------------------------------------------------------------- bfloat16 weights

float dot_bf16(const uint32_t* w, const float* even, const float* odd, int64_t K) {
  f32x8 a{}, b{}, c{}, d{};
  const u32x8 high = u32x8{} + 0xffff0000u;
  int64_t k = 0;  // counts pairs
  for (; k + 16 <= K / 2; k += 16) {
    prefetch(w + k);
    const u32x8 p = load<u32x8>(w + k), q = load<u32x8>(w + k + 8);
    a += (f32x8)(p << 16) * load<f32x8>(even + k);
    b += (f32x8)(p & high) * load<f32x8>(odd + k);
    c += (f32x8)(q << 16) * load<f32x8>(even + k + 8);
    d += (f32x8)(q & high) * load<f32x8>(odd + k + 8);
  }
  float tail = 0;
  for (; k < K / 2; k++) {
    tail += widen(uint16_t(w[k])) * even[k] + widen(uint16_t(w[k] >> 16)) * odd[k];
  }
  return sum((a + b) + (c + d)) + tail;
}

Tensor linear_bf16(const Tensor& x, const Tensor& weight) {
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
  STD_TORCH_CHECK(K % 2 == 0 && weight.size(1) == K, "weight is [N, K] with even K");
  std::vector<float> even(M * K / 2), odd(M * K / 2);
  for (int64_t i = 0; i < M * K / 2; i++) {
    even[i] = widen(bf16(x)[2 * i]);
    odd[i] = widen(bf16(x)[2 * i + 1]);
  }
  Tensor y = new_output(x, {M, N});
  auto* out = static_cast<uint16_t*>(y.mutable_data_ptr());
  const auto* w = static_cast<const uint32_t*>(weight.const_data_ptr());
  torch::stable::parallel_for(0, N, grain(M, K), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      for (int64_t m = 0; m < M; m++) {
        out[m * N + n] =
            narrow(dot_bf16(w + n * K / 2, &even[m * K / 2], &odd[m * K / 2], K));
      }
    }
  });
  return y;
}

// ------------------------------------------------------------------------------ integer weights

// Activations in 16-bit fixed point: x[m, k] ≈ values[m * K + k] * scale[m].
struct FixedPoint {
  std::vector<int16_t> values;
  std::vector<float> scale;

  FixedPoint(const Tensor& x) : values(x.numel()), scale(x.size(0)) {
    const int64_t M = x.size(0), K = x.size(1);
    for (int64_t m = 0; m < M; m++) {
      const uint16_t* row = bf16(x) + m * K;
      uint16_t bits = 0;  // without their sign, bfloat16 sort as integers; NaN and Inf come last
      for (int64_t k = 0; k < K; k++) bits = std::max<uint16_t>(bits, row[k] & 0x7fff);
      const float largest = widen(bits);
      scale[m] = largest / 32767;  // not finite if any activation is not, and so is the output
      const float inverse = std::isfinite(largest) && largest > 0 ? 32767 / largest : 0;
      for (int64_t k = 0; k < K; k++) {
        values[m * K + k] = int16_t(__builtin_nearbyintf(widen(row[k]) * inverse));
      }
    }
  }
};

// Products of sixteen pairs, neighbours added: eight exact 32-bit sums.
inline s32x8 multiply_add(s16x16 a, s16x16 b) {
#ifdef __AVX2__
  return (s32x8)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  const s32x8 x = (s32x8)a, y = (s32x8)b;  // two 16-bit values in a lane: the low one, the high one
  return ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}

// A lane of such sums holds 258 products of 127 * 32767 and two of them arrive at a time: up to
// 2048 weights go into eight lanes without overflow.
constexpr int64_t kExact = 2048;

float dot_int8(const int8_t* w, const int16_t* x, int64_t K) {
  f32x8 total{};
  float tail = 0;
  for (int64_t start = 0; start < K; start += kExact) {
    const int64_t stop = std::min(start + kExact, K);
    s32x8 a{}, b{};
    int64_t k = start;
    for (; k + 32 <= stop; k += 32) {
      prefetch(w + k);
      const s16x16 p = __builtin_convertvector(load<s8x16>(w + k), s16x16);
      const s16x16 q = __builtin_convertvector(load<s8x16>(w + k + 16), s16x16);
      a += multiply_add(p, load<s16x16>(x + k));
      b += multiply_add(q, load<s16x16>(x + k + 16));
    }
    total += __builtin_convertvector(a, f32x8) + __builtin_convertvector(b, f32x8);
    for (; k < stop; k++) tail += float(w[k] * x[k]);
  }
  return sum(total) + tail;
}

Tensor linear_int8(const Tensor& x, const Tensor& values, const Tensor& scale) {
  const int64_t M = x.size(0), K = x.size(1), N = values.size(0);
  STD_TORCH_CHECK(values.size(1) == K && scale.numel() == N, "values [N, K], scale [N]");
  const FixedPoint fixed(x);
  Tensor y = new_output(x, {M, N});
  auto* out = static_cast<uint16_t*>(y.mutable_data_ptr());
  const auto* w = static_cast<const int8_t*>(values.const_data_ptr());
  const auto* s = static_cast<const float*>(scale.const_data_ptr());
  torch::stable::parallel_for(0, N, grain(M, K), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      for (int64_t m = 0; m < M; m++) {
        const float total = dot_int8(w + n * K, &fixed.values[m * K], K);
        out[m * N + n] = narrow(total * (s[n] * fixed.scale[m]));
      }
    }
  });
  return y;
}

// Packed int4: a group of `size` weights is size / 4 words of 16 bits; word j holds the weights
// j, j + size / 4, j + size / 2 and j + 3 * size / 4, each plus 8, from its lowest nibble up.
// Calls f(nibbles, k) for every sixteen weights in order, k being the first one's place.
template <int size, class F> inline void for_nibbles(const uint16_t* words, F f) {
  constexpr int quarter = size / 4;
  if constexpr (quarter == 8) {  // two quarters side by side make a vector
    const u16x8 v = load<u16x8>(words), u = v >> 4;
    u16x16 both;
    std::memcpy(&both, &v, sizeof v);
    std::memcpy(reinterpret_cast<char*>(&both) + sizeof v, &u, sizeof u);
    f((s16x16)(both & 15), 0);
    f((s16x16)((both >> 8) & 15), 16);
  } else {
    for (int j = 0; j < quarter; j += 16) {
      const u16x16 v = load<u16x16>(words + j);
      f((s16x16)(v & 15), j);
      f((s16x16)((v >> 4) & 15), quarter + j);
      f((s16x16)((v >> 8) & 15), 2 * quarter + j);
      f((s16x16)(v >> 12), 3 * quarter + j);
    }
  }
}

template <int size>
void linear_int4_rows(int64_t begin, int64_t end, int64_t M, int64_t N, int64_t K,
                      const FixedPoint& fixed, const std::vector<s32x8>& minus_eight,
                      const std::vector<float>& group_sums, const uint16_t* packed,
                      const uint16_t* scale, const uint16_t* offset, uint16_t* out) {
  const int64_t G = K / size;
  for (int64_t n = begin; n < end; n++) {
    for (int64_t m = 0; m < M; m++) {
      const int16_t* x = &fixed.values[m * K];
      f32x8 total{};
      for (int64_t g = 0; g < G; g++) {
        s32x8 sums = minus_eight[m * G + g];
        for_nibbles<size>(packed + (n * K + g * size) / 4, [&](s16x16 nibbles, int k) {
          sums += multiply_add(nibbles, load<s16x16>(x + g * size + k));
        });
        total += __builtin_convertvector(sums, f32x8) * widen(scale[n * G + g]);
      }
      float shift = 0;
      if (offset) {
        for (int64_t g = 0; g < G; g++) shift += group_sums[m * G + g] * widen(offset[n * G + g]);
      }
      out[m * N + n] = narrow((sum(total) + shift) * fixed.scale[m]);
    }
  }
}

Tensor linear_int4(const Tensor& x, const Tensor& packed, const Tensor& scale,
                   std::optional<Tensor> offset) {
  const int64_t M = x.size(0), K = x.size(1), N = packed.size(0), G = scale.size(1);
  const int64_t size = K / G;
  STD_TORCH_CHECK(packed.size(1) * 4 == K && size * G == K, "packed [N, K / 4], scale [N, G]");
  STD_TORCH_CHECK(size == 32 || size == 64 || size == 128, "groups of 32, 64 or 128");
  const FixedPoint fixed(x);
  // Nibbles are 8 more than the weights: what that adds is known from the activations alone.
  std::vector<s32x8> minus_eight(M * G);
  std::vector<float> group_sums(M * G);
  for (int64_t i = 0; i < M * G; i++) {
    s32x8 lanes{};
    for (int64_t k = 0; k < size; k += 16) {
      lanes += multiply_add(s16x16{} + 1, load<s16x16>(&fixed.values[i * size + k]));
    }
    minus_eight[i] = lanes * -8;
    group_sums[i] = sum(__builtin_convertvector(lanes, f32x8));
  }
  Tensor y = new_output(x, {M, N});
  auto* out = static_cast<uint16_t*>(y.mutable_data_ptr());
  const auto rows = size == 32   ? linear_int4_rows<32>
                    : size == 64 ? linear_int4_rows<64>
                                 : linear_int4_rows<128>;
  torch::stable::parallel_for(0, N, grain(M, K), [&](int64_t begin, int64_t end) {
    rows(begin, end, M, N, K, fixed, minus_eight, group_sums, bf16(packed), bf16(scale),
         offset ? bf16(*offset) : nullptr, out);
  });
  return y;
}

// ------------------------------------------------------------------------------------ attention

template <class T> inline float dot(const T* a, const float* b, int64_t D) {
  f32x8 acc{};
  int64_t d = 0;
  for (; d + 8 <= D; d += 8) acc += get8(a + d) * load<f32x8>(b + d);
  float tail = 0;
  for (; d < D; d++) tail += get(a + d) * b[d];
  return sum(acc) + tail;
}

template <class T> inline void add_scaled(float* out, const T* v, float p, int64_t D) {
  int64_t d = 0;
  for (; d + 8 <= D; d += 8) {
    const f32x8 r = load<f32x8>(out + d) + get8(v + d) * p;
    std::memcpy(out + d, &r, sizeof r);
  }
  for (; d < D; d++) out[d] += get(v + d) * p;
}

// One block of cache positions against the query heads of one key/value head. Leaves the maximum
// score, the sum of exponentials and the weighted sum of values, relative to that maximum.
constexpr int64_t kBlock = 128;

struct Partial {
  float maximum, total;
};

template <class T>
void attend_block(const T* keys, const T* values, int64_t length, int64_t D, const float* q,
                  int64_t heads, Partial* partial, float* out) {
  float score[kBlock];
  for (int64_t h = 0; h < heads; h++) {
    float maximum = -std::numeric_limits<float>::infinity(), total = 0;
    for (int64_t j = 0; j < length; j++) {
      score[j] = dot(keys + j * D, q + h * D, D);
      maximum = std::max(maximum, score[j]);
    }
    float* o = out + h * D;
    std::fill(o, o + D, 0.0f);
    for (int64_t j = 0; j < length; j++) {
      const float p = std::exp(score[j] - maximum);
      total += p;
      add_scaled(o, values + j * D, p, D);
    }
    partial[h] = {maximum, total};
  }
}

template <class T>
void attention_typed(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                     const Tensor& positions, int64_t window, double scale, Tensor& y) {
  const int64_t B = q.size(0), H = q.size(1), D = q.size(2);
  const int64_t J = k_cache.size(1), C = k_cache.size(2), heads = H / J;
  const auto* query = static_cast<const T*>(q.const_data_ptr());
  const auto* keys = static_cast<const T*>(k_cache.const_data_ptr());
  const auto* values = static_cast<const T*>(v_cache.const_data_ptr());
  const auto* position = static_cast<const int64_t*>(positions.const_data_ptr());
  auto* out = static_cast<T*>(y.mutable_data_ptr());

  std::vector<float> scaled(B * H * D);
  for (int64_t i = 0; i < B * H * D; i++) scaled[i] = get(query + i) * float(scale);

  int64_t longest = 0;
  for (int64_t b = 0; b < B; b++) longest = std::max(longest, position[b] + 1);
  STD_TORCH_CHECK(longest <= C, "position beyond the cache");
  const int64_t blocks = (longest + kBlock - 1) / kBlock;
  std::vector<Partial> partial(B * J * blocks * heads);
  std::vector<float> sums(partial.size() * D);

  torch::stable::parallel_for(0, B * J * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t block = i % blocks, bj = i / blocks, b = bj / J;
      const int64_t stop = std::min((block + 1) * kBlock, position[b] + 1);
      const int64_t first = window ? std::max<int64_t>(0, position[b] + 1 - window) : 0;
      const int64_t start = std::max(block * kBlock, first);
      if (start >= stop) {
        for (int64_t h = 0; h < heads; h++) partial[i * heads + h] = {0, 0};
        continue;
      }
      attend_block(keys + (bj * C + start) * D, values + (bj * C + start) * D, stop - start, D,
                   &scaled[bj * heads * D], heads, &partial[i * heads], &sums[i * heads * D]);
    }
  });

  std::vector<float> row(D);
  for (int64_t bh = 0; bh < B * H; bh++) {
    const int64_t bj = bh / heads, h = bh % heads;
    float maximum = -std::numeric_limits<float>::infinity(), total = 0;
    for (int64_t block = 0; block < blocks; block++) {
      const Partial& p = partial[(bj * blocks + block) * heads + h];
      if (p.total > 0) maximum = std::max(maximum, p.maximum);
    }
    std::fill(row.begin(), row.end(), 0.0f);
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t i = (bj * blocks + block) * heads + h;
      if (partial[i].total == 0) continue;
      const float weight = std::exp(partial[i].maximum - maximum);
      total += partial[i].total * weight;
      add_scaled(row.data(), &sums[i * D], weight, D);
    }
    for (int64_t d = 0; d < D; d++) put(out + bh * D + d, row[d] / total);
  }
}

// q [B, H, D]; caches [B, J, C, D]; positions int64 [B], each of the newest token already in the
// cache; window 0 for none. Returns [B, H, D].
Tensor decode_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& positions, int64_t window, double scale) {
  STD_TORCH_CHECK(q.is_contiguous() && k_cache.is_contiguous() && v_cache.is_contiguous(),
                  "contiguous q and caches");
  Tensor y = new_output(q, {q.size(0), q.size(1), q.size(2)});
  if (q.scalar_type() == ScalarType::BFloat16) {
    attention_typed<uint16_t>(q, k_cache, v_cache, positions, window, scale, y);
  } else {
    STD_TORCH_CHECK(q.scalar_type() == ScalarType::Float, "float32 or bfloat16");
    attention_typed<float>(q, k_cache, v_cache, positions, window, scale, y);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY(hotloop_cpu, m) {
  m.def("linear_bf16(Tensor x, Tensor weight) -> Tensor");
  m.def("linear_int8(Tensor x, Tensor values, Tensor scale) -> Tensor");
  m.def("linear_int4(Tensor x, Tensor packed, Tensor scale, Tensor? offset) -> Tensor");
  m.def("decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor positions, "
        "int window, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(hotloop_cpu, CPU, m) {
  m.impl("linear_bf16", TORCH_BOX(&linear_bf16));
  m.impl("linear_int8", TORCH_BOX(&linear_int8));
  m.impl("linear_int4", TORCH_BOX(&linear_int4));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}
