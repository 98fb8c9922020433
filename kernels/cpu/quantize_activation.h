// Dynamic per-token, per-group quantisation of activations, into the layout that the product reads (problem.h).
//
// One source for every instruction set: it is inlined into a function compiled for each, and the compiler vectorises it.
#pragma once
#include "problem.h"

namespace flexq {

constexpr int32_t kInfinityBits = 0x7f800000;

// `store_few(g, codes, scale)` keeps a group of few tokens in the path's own layout.
template <class StoreFew>
__attribute__((always_inline)) inline int64_t quantize_token(const Problem& p, int64_t token, StoreFew store_few) {
  const float* row = p.x + token * p.features;
  const float top = float((1 << (p.activation_bits - 1)) - 1), bottom = -top - 1.0f;
  for (int64_t g = 0; g < p.groups; ++g) {
    alignas(64) float values[kGroup];
    alignas(64) int8_t codes[kGroup];
    const int64_t first = g * kGroup;
    const int64_t count = p.features - first < kGroup ? p.features - first : kGroup;
    if (count < kGroup) std::memset(values, 0, sizeof values);
    std::memcpy(values, row + first, size_t(count) * sizeof(float));
    // Without their sign, floats are ordered as their bits are, with infinity and NaN above all numbers: one integer maximum,
    // which unlike a float one vectorises, finds the largest magnitude and whatever is not finite.
    int32_t largest_bits = 0;
    for (int i = 0; i < kGroup; ++i) {
      int32_t bits;
      std::memcpy(&bits, &values[i], 4);
      bits &= 0x7fffffff;
      largest_bits = bits > largest_bits ? bits : largest_bits;
    }
    if (largest_bits >= kInfinityBits) {
      for (int64_t i = 0; i < count; ++i)
        if (!(__builtin_fabsf(values[i]) <= 3.40282347e38f)) return token * p.features + first + i;
    }
    float largest;
    std::memcpy(&largest, &largest_bits, 4);
    const float scale = largest / top;
    const float divisor = scale > 0.0f ? scale : 1.0f;  // an all-zero group has codes of zero
    int32_t sum = 0;
    for (int i = 0; i < kGroup; ++i) {
      // Adding 1.5 * 2^23 rounds half to even at the last bit of an integer; a true division, as the definition says.
      float code = (values[i] / divisor + 12582912.0f) - 12582912.0f;
      code = code < top ? code : top;
      code = code > bottom ? code : bottom;
      const int32_t integer = int32_t(code);
      codes[i] = int8_t(integer);
      sum += integer;
    }
    if (p.few()) {
      store_few(g, codes, scale);
    } else {
      uint8_t* out = p.codes + ((token / kTile) * p.groups + g) * 2 * kTileBytes + (token % kTile) * 4;
      for (int quad = 0; quad < kGroup / 4; ++quad) std::memcpy(out + quad * kTile * 4, codes + quad * 4, 4);
      p.scales[g * p.padded_tokens + token] = scale;
      p.corrections[g * p.padded_tokens + token] = -32 * sum;
    }
  }
  return -1;
}

__attribute__((always_inline)) inline int64_t quantize_token(const Problem& p, int64_t token) {
  return quantize_token(p, token, [&](int64_t g, const int8_t* codes, float scale) {
    uint8_t* out = p.codes + (token * p.groups + g) * kGroup;
    for (int i = 0; i < kGroup; ++i) out[i] = uint8_t(codes[i]) ^ 0x80;  // q + 128
    p.scales[g * kFewTokens + token] = scale;
  });
}

}  // namespace flexq
