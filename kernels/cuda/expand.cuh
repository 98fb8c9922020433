// 6-bit weights to bytes before the tensor cores, and sums to float32 behind them, in registers.
#pragma once
#include <cstdint>

namespace flexq {

// The bits of `upper` where the mask has ones and those of `lower` elsewhere: one instruction.
template <uint32_t kMask>
__device__ __forceinline__ uint32_t choose_bits(uint32_t upper, uint32_t lower) {
  return (upper & kMask) | (lower & ~kMask);
}

// Four bytes, each four times a code, from three words of a lane's half chunk: six bits of every byte are a code of the first three
// registers as they stand, and the two below them a third of one of the last. What comes out are signed bytes, with neither an offset to
// undo nor a sign to extend: nine instructions for sixteen codes.
__device__ __forceinline__ void expand(const uint32_t (&words)[12], int s, uint32_t (&a)[4]) {
  constexpr uint32_t kCodeBits = 0xfcfcfcfcu;
  const uint32_t* w = words + 3 * s;
#pragma unroll
  for (int j = 0; j < 3; ++j) a[j] = w[j] & kCodeBits;
  a[3] = choose_bits<0xf0f0f0f0u>(choose_bits<0xc0c0c0c0u>(w[0] << 6, w[1] << 4), w[2] << 2) & kCodeBits;
}

constexpr float kExpandedUnit = 0.25f;  // of sums: the bytes are four times the codes

// Sums start at these bits. An integer below 2^22 added to them is the mantissa of 1.5 * 2^23 + itself, a float32 number, for which
// no conversion is needed: those run at an eighth of the rate of a multiplication.
constexpr int32_t kMagicBits = 0x4b400000;
constexpr float kMagic = 12582912.0f;

// Sum times weight scale, rounded once: with `start` = -kMagic * scale, which is exact (13 bits), the multiplication takes the start off.
__device__ __forceinline__ float scaled(int32_t sum, float scale, float start) { return fmaf(__int_as_float(sum), scale, start); }

}  // namespace flexq
