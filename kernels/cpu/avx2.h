// AVX2: vpmaddubsw multiplies unsigned weights (q + 32 <= 63) by signed activations; its 16-bit sums of two products stay
// below 2 * 63 * 128 = 16128, so that they never saturate. The weights' offset is undone per group: -32 * sum(x).
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>

#include "quantize_activation.h"

namespace flexq::avx2 {

#define FLEXQ_AVX2 __attribute__((target("avx2,fma,f16c")))

// 24 packed bytes -> 32 codes q + 32. Reads 28 bytes, so the last 32 codes of a group are read from 4 bytes earlier.
FLEXQ_AVX2 inline __m256i expand(const uint8_t* packed, bool last) {
  const int back = last ? 4 : 0;
  const auto load = [&](int at) FLEXQ_AVX2 { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + at)); };
  const __m256i bytes = _mm256_set_m128i(load(12 - back), load(0));
  // Three bytes to each 32-bit word; the shifted load of the last piece shifts its bytes too.
  const __m128i spread = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
  const __m128i high = last ? _mm_setr_epi8(4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1) : spread;
  const __m256i word = _mm256_shuffle_epi8(bytes, _mm256_set_m128i(high, spread));
  __m256i codes = _mm256_and_si256(word, _mm256_set1_epi32(0x3f));
  codes = _mm256_or_si256(codes, _mm256_and_si256(_mm256_slli_epi32(word, 2), _mm256_set1_epi32(0x3f00)));
  codes = _mm256_or_si256(codes, _mm256_and_si256(_mm256_slli_epi32(word, 4), _mm256_set1_epi32(0x3f0000)));
  codes = _mm256_or_si256(codes, _mm256_and_si256(_mm256_slli_epi32(word, 6), _mm256_set1_epi32(0x3f000000)));
  return _mm256_xor_si256(codes, _mm256_set1_epi8(0x20));
}

FLEXQ_AVX2 inline void expand_group(const uint8_t* packed, __m256i* codes) {
  for (int i = 0; i < 4; ++i) codes[i] = expand(packed + 24 * i, i == 3);
}

FLEXQ_AVX2 inline __m256i dot(__m256i sum, __m256i unsigned_w, __m256i signed_x) {
  const __m256i pairs = _mm256_maddubs_epi16(unsigned_w, signed_x);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

FLEXQ_AVX2 inline float horizontal(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

FLEXQ_AVX2 inline int64_t quantize(const Problem& p, int64_t token) { return quantize_token(p, token); }

FLEXQ_AVX2 inline void rows(const Problem& p, int64_t begin, int64_t end) {
  const __m256i flip = _mm256_set1_epi8(char(0x80));
  const __m256i offset = _mm256_set1_epi8(32);
  for (int64_t n = begin; n < end; ++n) {
    __m256 sums[kFewTokens] = {};
    for (int64_t g = 0; g < p.groups; ++g) {
      __m256i w[4];
      expand_group(p.packed(n, g), w);
      const float sw = half_to_float(p.scale[n * p.groups + g]);
      for (int64_t m = 0; m < p.tokens; ++m) {
        const auto* row = reinterpret_cast<const __m256i*>(p.codes + (m * p.groups + g) * kGroup);
        __m256i with_offset = _mm256_setzero_si256(), offsets = _mm256_setzero_si256();
        for (int i = 0; i < 4; ++i) {
          const __m256i x = _mm256_xor_si256(_mm256_load_si256(row + i), flip);  // back to signed
          with_offset = dot(with_offset, w[i], x);
          offsets = dot(offsets, offset, x);
        }
        const __m256 inner = _mm256_cvtepi32_ps(_mm256_sub_epi32(with_offset, offsets));
        sums[m] = _mm256_fmadd_ps(inner, _mm256_set1_ps(p.scales[g * kFewTokens + m] * sw), sums[m]);
      }
    }
    for (int64_t m = 0; m < p.tokens; ++m) p.y[m * p.outputs + n] = finish(p, n, horizontal(sums[m]));
  }
}

// Four outputs at a time against 16 tokens: lanes are tokens, four codes of a weight row are broadcast to all of them.
FLEXQ_AVX2 inline void tiles(const Problem& p, int64_t begin, int64_t end, int64_t) {
  constexpr int kRows = 4;
  static thread_local Scratch scratch;
  auto* w = scratch.get<uint8_t>(size_t(kRows) * p.groups * kGroup);
  for (int64_t n0 = begin; n0 < end; n0 += kRows) {
    const int count = int(end - n0 < kRows ? end - n0 : kRows);
    for (int r = 0; r < kRows; ++r)  // rows past the end repeat the last one and are not stored
      for (int64_t g = 0; g < p.groups; ++g)
        expand_group(p.packed(n0 + (r < count ? r : count - 1), g), reinterpret_cast<__m256i*>(w + (r * p.groups + g) * kGroup));
    for (int64_t m0 = 0; m0 < p.tokens; m0 += kTile) {
      __m256 sums[kRows][2] = {};
      for (int64_t g = 0; g < p.groups; ++g) {
        const auto* x = reinterpret_cast<const __m256i*>(p.tile(m0 / kTile, g * 2));
        const auto* start = reinterpret_cast<const __m256i*>(p.corrections + g * p.padded_tokens + m0);
        __m256i inner[kRows][2];
        for (int r = 0; r < kRows; ++r)
          for (int h = 0; h < 2; ++h) inner[r][h] = _mm256_load_si256(start + h);
        for (int quad = 0; quad < kGroup / 4; ++quad)
          for (int r = 0; r < kRows; ++r) {
            int32_t four;
            std::memcpy(&four, w + (r * p.groups + g) * kGroup + quad * 4, 4);
            for (int h = 0; h < 2; ++h)
              inner[r][h] = dot(inner[r][h], _mm256_set1_epi32(four), _mm256_load_si256(x + quad * 2 + h));
          }
        const float* sx = p.scales + g * p.padded_tokens + m0;
        for (int r = 0; r < count; ++r) {
          const __m256 sw = _mm256_set1_ps(half_to_float(p.scale[(n0 + r) * p.groups + g]));
          for (int h = 0; h < 2; ++h)
            sums[r][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(inner[r][h]), _mm256_mul_ps(sw, _mm256_load_ps(sx + 8 * h)), sums[r][h]);
        }
      }
      alignas(32) float out[kTile];
      for (int r = 0; r < count; ++r) {
        _mm256_store_ps(out, sums[r][0]);
        _mm256_store_ps(out + 8, sums[r][1]);
        for (int64_t m = m0; m < p.tokens && m < m0 + kTile; ++m) p.y[m * p.outputs + n0 + r] = finish(p, n0 + r, out[m - m0]);
      }
    }
  }
}

inline bool available() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

inline const Path path{"avx2", available, quantize, rows, tiles};

}  // namespace flexq::avx2
#endif
