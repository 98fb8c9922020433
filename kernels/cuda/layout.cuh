// How operands lie in memory for the tensor-core kernels, and what a call is told.
//
// Weights: chunks of 32 outputs x 1 group (128 codes), [output / 32][group], padded with zero rows. A chunk is what one warp, or
// two of wgmma, consumes in a step, contiguous, in the order of its registers: no shuffle, no bank conflict, one bulk copy.
//
//   byte 0            512          1024          1536     1600          2112          2624         3136
//        | half 0: three vectors of 16 bytes a lane | scales | half 1: outputs 16 to 31 ...        |
//
//   In a half, vector v of lane l lies at 512 v + 16 l: twelve words a lane, 64 codes of rows g and g + 8.
//   Scales are float16: outputs g, g + 8, g + 16, g + 24 side by side, so that a lane reads its four at once. They lie between the halves,
//   so that either half with them is contiguous, too.
//
// Activations: records of T tiles of 8 tokens x 1 group, [token / 8T][group], padded with zero tokens:
//   T tiles of codes, then T * 8 float32 scales (scale_at).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flexq {

constexpr int kGroup = 128;
constexpr int kChunkRows = 32;

// Bits of a weight: 6, but for w6ax_bmma, which flexq_core/runtime/build.py compiles for others on demand.
#ifdef FLEXQ_WEIGHT_BITS
constexpr int kWeightBits = FLEXQ_WEIGHT_BITS;
#else
constexpr int kWeightBits = 6;
#endif

__host__ __device__ constexpr int code_bytes(int weight_bits) { return kChunkRows * kGroup * weight_bits / 8; }
__host__ __device__ constexpr int chunk_bytes(int weight_bits) { return code_bytes(weight_bits) + kChunkRows * 2; }
constexpr int kCodeBytes = code_bytes(kWeightBits), kChunkBytes = chunk_bytes(kWeightBits);
constexpr int kHalfBytes = kCodeBytes / 2, kScaleBytes = kChunkBytes - kCodeBytes;  // of a half's codes, and of a chunk's scales
constexpr int kHalfStride = kHalfBytes + kScaleBytes;  // from half 0 to half 1; as many bytes has either half with the scales
constexpr int kTokenTile = 8;

// Kinds of number that x, y and bias may have; the values are part of the binding.
enum class Float : int { f32 = 0, f16 = 1, bf16 = 2 };

// Which order of bits the kernel wants.
//   bytes (w6ax_imma): two's complement. Register j of the instruction at k-step s of a half holds four codes of row g + 8 (j & 1),
//     k = 64 (i / 4) + 16 q + 4 (i % 4) .. for i = 2 s + j / 2. They come from words 3 s to 3 s + 2, byte by byte:
//
//         bits    7 6 5 4 3 2   1 0
//         word 0  register 0  | register 3's upper two bits
//         word 1  register 1  | its middle two
//         word 2  register 2  | its lower two
//
//   planes (w6ax_bmma): b bits in offset binary (q + 2^(b - 1)). Word 2 p + h holds bit p of row g + 8 h, k = 32 q .. 32 q + 31. With other
//     than 6 bits a half has 2 b words a lane in b / 2 vectors of 16 bytes and, where b is odd, one of 8.
//   swizzled (w6ax_wgmma): weights as for bytes; activations as the tensor cores read them from shared memory.
enum class Order : int { bytes = 0, planes = 1, swizzled = 2 };

// Bytes of a tile of 8 tokens x 1 group of activations.
//   bytes: code k of token m lies at (k / 64) * 512 + m * 64 + k % 64, so that a lane's two vectors are its operands.
//   swizzled: at k-step s = i / 2 the instruction multiplies byte 16 (i % 2) + 4 q + b of a token by what lane q has of the weights for
//     code k = 64 (i / 4) + 16 q + 4 (i % 4) + b: this code lies at 16 * (i ^ m) + 4 q + b of the token's 128 bytes.
//   planes: `bits` planes, two's complement; word p * 32 + l of lane l is plane p of token l / 4, k = 32 (l % 4) ..; then 8
//     sums of codes (int32), one a token, for the weights' offset.
__host__ __device__ constexpr int activation_tile_bytes(Order order, int bits) {
  return order == Order::planes ? bits * 128 + 32 : kTokenTile * kGroup;
}

__host__ __device__ constexpr int activation_record_bytes(Order order, int bits, int token_tiles) {
  return token_tiles * (activation_tile_bytes(order, bits) + kTokenTile * 4);
}

// Which of a record's scales is that of token m of a tile. For wgmma those of tokens 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 of each 16
// lie side by side: lane q wants these four, and reads them at once.
__host__ __device__ constexpr int scale_at(Order order, int tile, int m) {
  return order == Order::swizzled ? tile / 2 * 16 + m / 2 * 4 + tile % 2 * 2 + m % 2 : tile * kTokenTile + m;
}

// The twelve words that a lane has of a half of a chunk.
__device__ __forceinline__ void load_half(const uint8_t* chunk, int half, int lane, uint32_t (&words)[12]) {
#pragma unroll
  for (int v = 0; v < 3; ++v)
    *reinterpret_cast<uint4*>(words + 4 * v) = *reinterpret_cast<const uint4*>(chunk + half * kHalfStride + v * 512 + lane * 16);
}

struct Linear {
  const uint8_t* weight;       // chunks
  const int8_t* exponent;      // [outputs]
  const void* bias;            // [outputs] of type bias_type, or null
  const uint8_t* activations;  // records
  void* y;                     // [tokens, outputs] of type y_type
  int tokens, outputs, groups;
  Float y_type, bias_type;
};

// The last step of output n: y = 2^exponent * sum + bias. A thread fetches what it needs of memory before its sums are
// ready, for one output, and finishes many tokens with it.
struct Finish {
  float factor = 0.0f, bias = 0.0f;

  Finish() = default;
  __device__ __forceinline__ Finish(const Linear& p, int n);
  __device__ __forceinline__ float operator()(float sum) const { return sum * factor + bias; }
};

// Rows of numbers, `stride` numbers apart.
struct Rows {
  const void* data;
  int64_t stride;
};

// Where quantised activations [tokens, features] go, and how.
struct Records {
  uint8_t* start;
  int tokens, features, groups;
  int token_tiles;  // a power of two
  int bits;
  Order order;
};

constexpr int kMostNormFeatures = 16384;

struct Norm {
  Rows x;
  Rows residual;  // added to x first, or null
  Rows sum;       // x + residual is written here, where there is a residual
  const void* weight;
  const void* bias;  // or null
  float epsilon;
};

// What one token's row is before a product; the values are part of the binding.
enum class Before : int { codes = 0, numbers = 1, rms_norm = 2, layer_norm = 3 };

// A token that the blocks of a product quantise for themselves, in vectors all. Of codes, which the product's records have, nothing else.
struct Row {
  Norm norm;  // of numbers x alone
  Before before;
  Float type;
  int features, bits;
};

__device__ __forceinline__ float load_float(const void* from, int64_t at, Float type) {
  if (type == Float::f32) return static_cast<const float*>(from)[at];
  if (type == Float::f16) return __half2float(static_cast<const __half*>(from)[at]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[at]);
}

__device__ __forceinline__ void store_float(void* to, int64_t at, Float type, float value) {
  if (type == Float::f32)
    static_cast<float*>(to)[at] = value;
  else if (type == Float::f16)
    static_cast<__half*>(to)[at] = __float2half_rn(value);
  else
    static_cast<__nv_bfloat16*>(to)[at] = __float2bfloat16_rn(value);
}

// Two numbers of a type of two bytes, rounded, the first one below.
__device__ __forceinline__ uint32_t pack_floats(Float type, float first, float second) {
  const __half2 half = __floats2half2_rn(first, second);
  const __nv_bfloat162 bf16 = __floats2bfloat162_rn(first, second);
  return type == Float::f16 ? reinterpret_cast<const uint32_t&>(half) : reinterpret_cast<const uint32_t&>(bf16);
}

__device__ __forceinline__ Finish::Finish(const Linear& p, int n) {
  if (n >= p.outputs) return;
  factor = ldexpf(1.0f, p.exponent[n]);
  if (p.bias) bias = load_float(p.bias, n, p.bias_type);
}

}  // namespace flexq
