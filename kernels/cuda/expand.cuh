// 6-bit weights to bytes before the tensor cores, and sums to float32 behind them, in registers.
#pragma once
#include <cstdint>

namespace flexq {

// Four bytes, each four times a code, from the words of a lane's half chunk: the upper four bits from a nibble, the next two from a
// field of two bits, and zeros. That is a signed byte as it stands, with neither an offset to undo nor a sign to extend.
__device__ __forceinline__ void expand(const uint32_t (&words)[12], int s, uint32_t (&a)[4]) {
  constexpr uint32_t kUpper = 0xf0f0f0f0u, kLower = 0x0c0c0c0cu;
  const uint32_t n0 = words[2 * s], n1 = words[2 * s + 1], t = words[8 + s];
  a[0] = (n0 & kUpper) | ((t << 2) & kLower);
  a[1] = ((n0 << 4) & kUpper) | (t & kLower);
  a[2] = (n1 & kUpper) | ((t >> 2) & kLower);
  a[3] = ((n1 << 4) & kUpper) | ((t >> 4) & kLower);
}

constexpr float kExpandedUnit = 0.25f;  // of sums: the bytes are four times the codes

// Sums start at these bits. An integer below 2^22 added to them is the mantissa of 1.5 * 2^23 + itself, a float32 number, for which
// no conversion is needed: those run at an eighth of the rate of a multiplication.
constexpr int32_t kMagicBits = 0x4b400000;
constexpr float kMagic = 12582912.0f;

// Sum times weight scale, rounded once: with `start` = -kMagic * scale, which is exact (13 bits), the multiplication takes the start off.
__device__ __forceinline__ float scaled(int32_t sum, float scale, float start) { return fmaf(__int_as_float(sum), scale, start); }

}  // namespace flexq
