// Arithmetic that several kernels have in common.

#pragma once

#include "device.cuh"

// Both halves of a pair of bfloat16, each product rounded once.
__device__ __forceinline__ uint32_t times(uint32_t x, uint32_t w) {
  return fma_pair(x, w, kMinusZeros);
}

// Onto a sum, the squares of a pair.
__device__ __forceinline__ float add_squares(uint32_t pair, float sum) {
  return fmaf(high(pair), high(pair), fmaf(low(pair), low(pair), sum));
}

__device__ __forceinline__ float sum_of_warp(float value) {
  for (int mask = 1; mask < 32; mask *= 2) value += shuffle_xor(value, mask);
  return value;
}

__device__ __forceinline__ float silu(float v) {
  return v / (1.0f + exp2_fast(v * -1.4426950408889634f));
}

// The largest value, and where it is.
struct Best {
  float value = -infinity();
  int index = 0;

  // Of equal values the first wins, in whatever order they come. What is not a number wins over all
  // that is, so that nobody takes what is left for a choice.
  __device__ __forceinline__ void offer(float v, int i) {
    if (v > value || v != v || (v == value && i < index)) value = v, index = i;
  }
  // The choice that it stands for: none, -1, where the largest is not a finite number.
  __device__ __forceinline__ int choice() const { return fabsf(value) < infinity() ? index : -1; }
};

__device__ __forceinline__ Best best_of_warp(Best best) {
  for (int mask = 1; mask < 32; mask *= 2)
    best.offer(shuffle_xor(best.value, mask), shuffle_xor(best.index, mask));
  return best;
}
