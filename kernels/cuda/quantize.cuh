// What every kernel that quantises activations shares: one function decides codes and scale, so that a fused kernel cannot differ from
// the plain one.
#pragma once
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "layout.cuh"
#include "ptx.cuh"

namespace flexq {

// Four neighbouring numbers as they lie in memory. They are read before they are converted, so that several reads are under way at once.
template <class T>
using Four = std::conditional_t<sizeof(T) == 2, uint2, uint4>;

template <class T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;

template <class T>
__device__ __forceinline__ Four<T> four_of(const uint32_t (&bits)[4]) {
  if constexpr (sizeof(T) == 2)
    return make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
  else
    return make_uint4(bits[0], bits[1], bits[2], bits[3]);
}

// Numbers k to k + 3 of a row, zeros beyond its end. `vectors`: of every row, each four lie in one aligned vector (see in_vectors).
template <class T>
__device__ __forceinline__ Four<T> load_four(const void* row, int k, int features, bool vectors) {
  Four<T> four{};
  if (vectors) {
    if (k < features) four = *reinterpret_cast<const Four<T>*>(static_cast<const Bits<T>*>(row) + k);
  } else {
    uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = k + i < features ? static_cast<const Bits<T>*>(row)[k + i] : 0;
    four = four_of<T>(bits);
  }
  return four;
}

template <class T>
__device__ __forceinline__ Four<T> load_four(const Rows& rows, int token, int k, int features, bool vectors) {
  return load_four<T>(static_cast<const T*>(rows.data) + token * rows.stride, k, features, vectors);
}

__device__ __forceinline__ float2 two_floats(uint32_t bits, __half) {
  return make_float2(__half2float(__ushort_as_half(uint16_t(bits))), __half2float(__ushort_as_half(uint16_t(bits >> 16))));
}

__device__ __forceinline__ float2 two_floats(uint32_t bits, __nv_bfloat16) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

template <class T>
__device__ __forceinline__ void to_floats(const Four<T>& four, float (&value)[4]) {
  if constexpr (sizeof(T) == 2) {
    const float2 low = two_floats(four.x, T()), high = two_floats(four.y, T());
    value[0] = low.x, value[1] = low.y, value[2] = high.x, value[3] = high.y;
  } else {
    value[0] = __uint_as_float(four.x), value[1] = __uint_as_float(four.y);
    value[2] = __uint_as_float(four.z), value[3] = __uint_as_float(four.w);
  }
}

// The bits of a number in the tensor's type, and the number that they are.
template <class T>
__device__ __forceinline__ uint32_t bits_of(float value) {
  if constexpr (std::is_same_v<T, __half>) return __half_as_ushort(__float2half_rn(value));
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  return __float_as_uint(value);
}

template <class T>
__device__ __forceinline__ float rounded_to(float value) {
  if constexpr (std::is_same_v<T, __half>) return __half2float(__float2half_rn(value));
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(__float2bfloat16_rn(value));
  return value;
}

template <class T>
__device__ __forceinline__ void store_four(void* row, int k, int features, bool vectors, const float (&value)[4]) {
  uint32_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = bits_of<T>(value[i]);
  if (vectors) {
    if (k < features) *reinterpret_cast<Four<T>*>(static_cast<Bits<T>*>(row) + k) = four_of<T>(bits);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (k + i < features) static_cast<Bits<T>*>(row)[k + i] = Bits<T>(bits[i]);
  }
}

// Of eight lanes with a byte each in the same place, bit p of lane j becomes bit j of lane p; in all four bytes at once.
__device__ __forceinline__ uint32_t transpose_bytes_of_eight_lanes(uint32_t word, int lane) {
#pragma unroll
  for (int step = 4; step > 0; step /= 2) {
    const uint32_t low = step == 4 ? 0x0f0f0f0fu : step == 2 ? 0x33333333u : 0x55555555u;
    const bool upper = lane & step;
    const uint32_t keep = upper ? ~low : low, other = __shfl_xor_sync(0xffffffffu, word, step);
    word = (word & keep) | ((upper ? other >> step : other << step) & ~keep);
  }
  return word;
}

// Exchanges two digits of the binary number of each bit's place: `lower` are the places whose digit kHigh is 0 and kLow is 1.
template <int kHigh, int kLow>
__device__ __forceinline__ uint32_t exchange_digits(uint32_t word, uint32_t lower) {
  constexpr int kApart = (1 << kHigh) - (1 << kLow);
  const uint32_t different = ((word >> kApart) ^ word) & lower;
  return word ^ different ^ (different << kApart);
}

// Bits of absolute values order as the values do, with infinity and NaN above all: neither is lost.
template <int kCount>
__device__ __forceinline__ uint32_t largest_bits(const float (&value)[kCount]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest = max(largest, __float_as_uint(value[i]) & 0x7fffffffu);
  return largest;
}

// The same number in every thread of a block. `partial` is written before the barrier and read after it: each sum needs its own.
template <int kMost>
__device__ __forceinline__ float sum_of_block(float value, float (&partial)[kMost], int warp, int lane, int warps) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  value = lane < warps ? partial[lane] : 0.0f;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

constexpr uint32_t kCodeMagicBits = 0x4b400000u;  // of 1.5 * 2^23: added to it a number is rounded half to even

// Numbers to codes, in the lowest byte of their bits (two's complement), and the scale of their group, whose largest absolute value
// has the bits `largest`.
template <int kCount>
__device__ __forceinline__ float quantize(float (&value)[kCount], uint32_t largest, int bits, uint32_t (&code)[kCount]) {
  const float most = float((1 << (bits - 1)) - 1);
  // A group that is not finite keeps no codes, and its scale makes each of its token's outputs NaN.
  const float scale = largest < 0x7f800000u ? __fdiv_rn(__uint_as_float(largest), most) : __uint_as_float(0x7fffffffu);

  float divisor = scale;
  if (!(scale >= 0x1p-100f && scale <= 0x1p120f)) {
    // Nothing to divide; or so small that remainders would be subnormal, then 2^120 times both; or so large (which takes two or three
    // bits) that the reciprocal would be, then 2^-20 times. A subnormal scale is coarse, and quotients by it may exceed what codes can
    // hold; by others none exceeds `most` by half.
    const float lift = scale < 1.0f ? 0x1p120f : 0x1p-20f;
    divisor = scale > 0.0f ? scale * lift : 1.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      value[i] = scale > 0.0f ? fminf(fmaxf(value[i] * lift, (-most - 1.0f) * divisor), most * divisor) : 0.0f;
  }
  // The reciprocal is shared, and one step of Markstein's makes each quotient the correctly rounded one.
  const float inverse = __frcp_rn(divisor);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float close = __fmul_rn(value[i], inverse);
    const float quotient = __fmaf_rn(__fmaf_rn(-close, divisor, value[i]), inverse, close);
    code[i] = __float_as_uint(__fadd_rn(quotient, __uint_as_float(kCodeMagicBits)));
  }
  return scale;
}

__device__ __forceinline__ uint32_t lowest_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// Where a token's group goes: its tile's codes and its scale.
struct Place {
  uint8_t* tile;
  float* scale;
  int m;  // the token's number in the tile

  __device__ __forceinline__ Place(const Records& p, int token, int group) {
    m = token % kTokenTile;
    const int t = token / kTokenTile & (p.token_tiles - 1), tile_bytes = activation_tile_bytes(p.order, p.bits);
    const int64_t block = token / kTokenTile >> (31 - __clz(p.token_tiles));
    uint8_t* record = p.start + (block * p.groups + group) * activation_record_bytes(p.order, p.bits, p.token_tiles);
    tile = record + t * tile_bytes;
    scale = reinterpret_cast<float*>(record + p.token_tiles * tile_bytes) + scale_at(p.order, t, m);
  }
};

// Writes codes and scale of group `group` of a token, of which this lane holds numbers 4 lane to 4 lane + 3. By a whole warp.
// kNoPlanes: that the order is none of bit planes, for code that need not have both.
template <bool kNoPlanes = false>
__device__ __forceinline__ void quantize_group(float (&value)[4], const Records& p, int token, int group, int lane) {
  uint32_t code[4];
  const float scale = quantize(value, __reduce_max_sync(0xffffffffu, largest_bits(value)), p.bits, code);
  const Place place(p, token, group);
  const int m = place.m;
  if (kNoPlanes || p.order != Order::planes) {
    const int unit = lane / 16 * 4 + lane % 4, q = lane % 16 / 4;  // `i` of layout.cuh and q: where the weights have these codes
    const int at = p.order == Order::bytes ? lane / 16 * 512 + m * 64 + lane % 16 * 4 : m * kGroup + (unit ^ m) * 16 + q * 4;
    *reinterpret_cast<uint32_t*>(place.tile + at) = lowest_bytes(code[0], code[1], code[2], code[3]);
  } else {
    // Lane 8 w + j holds k = 32 w + 4 j + i, i = 0 .. 3; lane 8 w + p is to write plane p of k = 32 w .. 32 w + 31. With the two digits of
    // i in reverse, three exchanges take a bit's place from (i, j) to (j, i).
    uint32_t word = transpose_bytes_of_eight_lanes(lowest_bytes(code[0], code[2], code[1], code[3]), lane);
    word = exchange_digits<4, 2>(word, 0x0000f0f0u);
    word = exchange_digits<3, 1>(word, 0x00cc00ccu);
    word = exchange_digits<2, 0>(word, 0x0a0a0a0au);
    const int plane = lane % 8;
    if (plane < p.bits) *reinterpret_cast<uint32_t*>(place.tile + plane * 128 + m * 16 + lane / 8 * 4) = word;
    const int sum = __reduce_add_sync(0xffffffffu, int(code[0] + code[1] + code[2] + code[3] - 4 * kCodeMagicBits));
    if (lane == 0) *reinterpret_cast<int32_t*>(place.tile + p.bits * 128 + m * 4) = sum;
  }
  if (lane == 0) *place.scale = scale;
}

// Tokens with those that fill the last block of tiles.
inline int padded_tokens(const Records& p) {
  const int block = kTokenTile * p.token_tiles;
  return (p.tokens + block - 1) / block * block;
}

// Whether each four numbers of each row can be read at once.
template <class T>
bool in_vectors(int features, std::initializer_list<Rows> operands) {
  bool aligned = features % 4 == 0;
  for (const Rows& rows : operands) aligned = aligned && reinterpret_cast<uintptr_t>(rows.data) % sizeof(Four<T>) == 0 && rows.stride % 4 == 0;
  return aligned;
}

// Calls with a number of the type that the tensors have.
template <class Call>
void with_type(Float type, Call call) {
  switch (type) {
    case Float::f32: return call(float());
    case Float::f16: return call(__half());
    case Float::bf16: return call(__nv_bfloat16());
  }
  throw std::invalid_argument("a type is " + std::to_string(int(type)) + "; accepted: 0, 1, 2");
}

}  // namespace flexq
