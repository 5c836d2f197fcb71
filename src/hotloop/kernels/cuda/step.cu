// What a decode step needs besides products and attention: its first kernel and its last.

#include "pointwise.cuh"

struct EmbedArgs {
  const int64_t* ids;  // [M]
  const void* table;   // [V, K], bf16 or int8
  const float* scale;  // [V], of an int8 table
  bf16* x;             // [M, K]
  const bf16* norm;    // [K]: weight of the norm that x goes into
  bf16* next_x;        // [M, K]: x times it
  float* next_squares; // [M, parts]: what x's squares add up to, 16 at a time
  int k;
};

// Two int8 values of a word, from a bit on, as they are worth.
__device__ __forceinline__ uint32_t scaled(uint32_t word, int bit, float scale) {
  return narrow(static_cast<int8_t>(word >> bit) * scale,
                static_cast<int8_t>(word >> (bit + 8)) * scale);
}

// Rows of a table, and what a norm needs of them. A block per row of x; K is a multiple of 8.
//
// The first kernel of a step lets the next ones start only when it has itself waited: whatever
// starts after it may rely on everything before the step.
template <bool kInt8>
__device__ __forceinline__ void embed(const EmbedArgs& args) {
  wait_for_predecessor();
  launch_dependents();
  const int64_t id = args.ids[blockIdx.x];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * args.k;
  const int chunks = args.k / 8, parts = (chunks + 1) / 2;
  // Whole warps go round together: two lanes add up a part.
  for (int i = threadIdx.x; i < (chunks + 31) / 32 * 32; i += blockDim.x) {
    float squares = 0;
    if (i < chunks) {
      uint4 x;
      if (kInt8) {
        const uint2 values =
            reinterpret_cast<const uint2*>(static_cast<const int8_t*>(args.table) + id * args.k)[i];
        const float scale = args.scale[id];
        x = uint4{scaled(values.x, 0, scale), scaled(values.x, 16, scale),
                  scaled(values.y, 0, scale), scaled(values.y, 16, scale)};
      } else {
        x = reinterpret_cast<const uint4*>(static_cast<const bf16*>(args.table) + id * args.k)[i];
      }
      const uint4 w = reinterpret_cast<const uint4*>(args.norm)[i];
      reinterpret_cast<uint4*>(args.x + row)[i] = x;
      reinterpret_cast<uint4*>(args.next_x + row)[i] =
          uint4{times(x.x, w.x), times(x.y, w.y), times(x.z, w.z), times(x.w, w.w)};
      squares = add_squares(x.w, add_squares(x.z, add_squares(x.y, add_squares(x.x, 0))));
    }
    squares += shuffle_xor(squares, 1);
    if (i % 2 == 0 && i < chunks) args.next_squares[blockIdx.x * parts + i / 2] = squares;
  }
}

struct ArgmaxArgs {
  const float* best_value;  // [M, n]
  const int* best_index;    // [M, n]
  int64_t* ids;             // [M]
  int64_t* positions;       // [M], each moved on by one, or null
  int n;
  int last_position;        // that a position can have
};

// The winner of winners; of equal ones the first. A block of one warp per row.
__device__ __forceinline__ void argmax(const ArgmaxArgs& args) {
  launch_dependents();
  wait_for_predecessor();
  const int row = blockIdx.x, lane = threadIdx.x;
  float value = -infinity();
  int index = 0x7fffffff;
  for (int i = lane; i < args.n; i += 32) {
    const float v = args.best_value[row * args.n + i];
    const int at = args.best_index[row * args.n + i];
    if (v > value || (v == value && at < index)) value = v, index = at;
  }
  for (int mask = 1; mask < 32; mask *= 2) {
    const float v = shuffle_xor(value, mask);
    const int at = shuffle_xor(index, mask);
    if (v > value || (v == value && at < index)) value = v, index = at;
  }
  if (lane == 0) {
    args.ids[row] = index;
    if (args.positions != nullptr)
      args.positions[row] = min(args.positions[row] + 1, static_cast<int64_t>(args.last_position));
  }
}
