// Element-wise arithmetic that several kernels use.

#pragma once

#include "device.cuh"

// Multiplies pairs of bfloat16, rounding each product once.
__device__ __forceinline__ uint32_t times(uint32_t x, uint32_t w) {
  return fma_pair(x, w, kMinusZeros);
}

// Adds the squares of a pair to a sum.
__device__ __forceinline__ float add_squares(uint32_t pair, float sum) {
  return fmaf(high(pair), high(pair), fmaf(low(pair), low(pair), sum));
}

__device__ __forceinline__ float warp_sum(float value) {
  for (int mask = 1; mask < 32; mask *= 2) value += shuffle_xor(value, mask);
  return value;
}

__device__ __forceinline__ float silu(float v) {
  return v / (1.0f + exp2_fast(v * -1.4426950408889634f));
}

// A running argmax.
struct Best {
  float value = -infinity();
  int index = 0;

  // Of equal values the smallest index wins, in whatever order they come. NaN wins over all
  // numbers, so that the host notices it.
  __device__ __forceinline__ void update(float v, int i) {
    if (v > value || v != v || (v == value && i < index)) value = v, index = i;
  }
  // The index, or -1 where the largest value is not finite.
  __device__ __forceinline__ int choice() const { return fabsf(value) < infinity() ? index : -1; }
};

__device__ __forceinline__ Best warp_best(Best best) {
  for (int mask = 1; mask < 32; mask *= 2)
    best.update(shuffle_xor(best.value, mask), shuffle_xor(best.index, mask));
  return best;
}
