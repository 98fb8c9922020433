// Plain C++, for any processor.
#pragma once
#include "quantize_activation.h"

namespace flexq::portable {

// 96 packed bytes -> 128 codes. `Offset` is 32 for q + 32, 0 for q.
template <int Offset, class Code>
inline void expand(const uint8_t* packed, Code* codes) {
  for (int i = 0; i < kGroup / 4; ++i, packed += 3) {
    const uint32_t word = packed[0] | packed[1] << 8 | packed[2] << 16;
    for (int j = 0; j < 4; ++j) codes[i * 4 + j] = Code(int((word >> (6 * j) & 63) ^ 32) - 32 + Offset);
  }
}

// Any float16: a subnormal one counts units of 2^-24, and of infinity and NaN the exponent stays the largest.
inline float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits >> 15) << 31, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  if (exponent == 0) return (sign ? -0x1p-24f : 0x1p-24f) * float(fraction);
  const uint32_t wide = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline int64_t quantize(const Problem& p, int64_t token) { return quantize_token(p, token); }

inline void rows(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    float sums[kFewTokens] = {};
    for (int64_t g = 0; g < p.groups; ++g) {
      int8_t w[kGroup];
      expand<0>(p.packed(n, g), w);
      const float sw = half_to_float(p.scale[n * p.groups + g]);
      for (int64_t m = 0; m < p.tokens; ++m) {
        const uint8_t* x = p.codes + (m * p.groups + g) * kGroup;
        int32_t inner = 0;
        for (int k = 0; k < kGroup; ++k) inner += (int32_t(x[k]) - 128) * w[k];
        sums[m] += float(inner) * (p.scales[g * kFewTokens + m] * sw);
      }
    }
    for (int64_t m = 0; m < p.tokens; ++m) p.y[m * p.outputs + n] = finish(p, n, sums[m]);
  }
}

inline void tiles(const Problem& p, int64_t begin, int64_t end, int64_t) {
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t m16 = 0; m16 < p.padded_tokens / kTile; ++m16) {
      float sums[kTile] = {};
      for (int64_t g = 0; g < p.groups; ++g) {
        int8_t w[kGroup];
        expand<0>(p.packed(n, g), w);
        const int8_t* x = p.tile(m16, g * 2);
        int32_t inner[kTile] = {};
        for (int quad = 0; quad < kGroup / 4; ++quad)
          for (int m = 0; m < kTile; ++m)
            for (int j = 0; j < 4; ++j) inner[m] += int32_t(x[quad * 64 + m * 4 + j]) * w[quad * 4 + j];
        const float sw = half_to_float(p.scale[n * p.groups + g]);
        const float* sx = p.scales + g * p.padded_tokens + m16 * kTile;
        for (int m = 0; m < kTile; ++m) sums[m] += float(inner[m]) * (sx[m] * sw);
      }
      for (int64_t m = m16 * kTile; m < p.tokens && m < (m16 + 1) * kTile; ++m)
        p.y[m * p.outputs + n] = finish(p, n, sums[m % kTile]);
    }
  }
}

inline const Path path{"portable", [] { return true; }, quantize, rows, tiles};

}  // namespace flexq::portable
