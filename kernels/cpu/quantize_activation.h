// Dynamic per-token, per-group quantisation of activations, into the layout that the product reads (problem.h).
//
// One source for every instruction set: it is inlined into a function compiled for each, and the compiler vectorises it.
#pragma once
#include "problem.h"

namespace flexq {

__attribute__((always_inline)) inline int64_t quantize_token(const Problem& p, int64_t token) {
  const float* row = p.x + token * p.features;
  const float top = float((1 << (p.activation_bits - 1)) - 1);
  for (int64_t g = 0; g < p.groups; ++g) {
    alignas(64) float values[kGroup] = {};
    alignas(64) int8_t codes[kGroup] = {};
    const int64_t first = g * kGroup;
    const int64_t count = p.features - first < kGroup ? p.features - first : kGroup;
    std::memcpy(values, row + first, size_t(count) * sizeof(float));
    float largest = 0.0f;
    for (int i = 0; i < kGroup; ++i) {
      const float magnitude = __builtin_fabsf(values[i]);
      largest = magnitude > largest ? magnitude : largest;
    }
    int bad = 0;  // a NaN passes every comparison of the maximum unnoticed
    for (int i = 0; i < kGroup; ++i) bad |= !(__builtin_fabsf(values[i]) <= 3.40282347e38f);
    if (bad) {
      for (int64_t i = 0; i < count; ++i)
        if (!(__builtin_fabsf(values[i]) <= 3.40282347e38f)) return token * p.features + first + i;
    }
    const float scale = largest / top;
    int32_t sum = 0;
    if (scale > 0.0f) {
      for (int i = 0; i < kGroup; ++i) {
        // Adding 1.5 * 2^23 rounds half to even at the last bit of an integer; a true division, as the definition says.
        float code = (values[i] / scale + 12582912.0f) - 12582912.0f;
        code = code > top ? top : code;
        code = code < -top - 1.0f ? -top - 1.0f : code;
        codes[i] = int8_t(code);
        sum += int32_t(code);
      }
    }
    if (p.few()) {
      uint8_t* out = p.codes + (token * p.groups + g) * kGroup;
      for (int i = 0; i < kGroup; ++i) out[i] = uint8_t(codes[i]) ^ 0x80;  // q + 128
      p.scales[g * kFewTokens + token] = scale;
    } else {
      uint8_t* out = p.codes + ((token / kTile) * p.groups + g) * 2 * kTileBytes + (token % kTile) * 4;
      for (int quad = 0; quad < kGroup / 4; ++quad) std::memcpy(out + quad * kTile * 4, codes + quad * 4, 4);
      p.scales[g * p.padded_tokens + token] = scale;
      p.corrections[g * p.padded_tokens + token] = -32 * sum;
    }
  }
  return -1;
}

}  // namespace flexq
