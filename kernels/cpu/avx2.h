// AVX2: vpmaddubsw multiplies unsigned weights (at most 63) by signed activations; its 16-bit sums of two products are at most
// 2 * 63 * 128 = 16128, so that they never saturate. Weights are q + 32 for many tokens and 31 - q for few; what the offset adds to
// a group depends on the activations alone and is where its sum starts.
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

// Few tokens. A packed group is 32 triples of bytes, each with four codes c0 to c3 from the lowest bit up:
//
//   byte 0: 11000000    byte 1: 22221111    byte 2: 33333322    (each bit's code, the highest bit first)
//
// Three loads A, B, C hold a group. As 32 = 2 (mod 3), at each place i one of them has a byte 0, one a byte 1 and one a byte 2:
//
//   place i           0  1  2  3  ..
//   A has byte        0  1  2  0  ..    so all bytes 0 are, by blending,     A0 B1 C2 A3 ..
//   B                 2  0  1  2  ..    all bytes 1, of the same triples:    A1 B2 C3 A4 .., which is C0 A1 B2 C3 .. turned by one
//   C                 1  2  0  1  ..    all bytes 2:                         A2 B3 C4 A5 .., which is B0 C1 A2 B3 .. turned by two
//
// Shifts and masks then make 32 codes at a time, cj of the triple at place i; activations are stored in that order:
//   codes[(g * tokens + m) * 128 + j * 32 + i] meets cj of triple_at(i)                    scales[g * tokens + m]
constexpr int triple_at(int i) { return (i + i % 3 * 32) / 3; }

struct Mask {
  alignas(32) int8_t at[32];
};

constexpr Mask every_third_from(int first) {
  Mask mask{};
  for (int i = first; i < 32; i += 3) mask.at[i] = -1;
  return mask;
}

inline constexpr Mask kOne = every_third_from(1), kTwo = every_third_from(2);

template <int Places>
FLEXQ_AVX2 inline __m256i turn(__m256i v) {
  return _mm256_alignr_epi8(_mm256_permute2x128_si256(v, v, 1), v, Places);
}

// 96 packed bytes -> 128 codes 31 - q, which are the packed codes with their lower five bits flipped.
FLEXQ_AVX2 inline void expand_in_planes(const uint8_t* packed, __m256i* w) {
  const auto* at = reinterpret_cast<const __m256i*>(packed);
  const __m256i a = _mm256_loadu_si256(at), b = _mm256_loadu_si256(at + 1), c = _mm256_loadu_si256(at + 2);
  const __m256i one = _mm256_load_si256(reinterpret_cast<const __m256i*>(kOne.at));
  const __m256i two = _mm256_load_si256(reinterpret_cast<const __m256i*>(kTwo.at));
  const auto blend = [&](__m256i first, __m256i second, __m256i third) FLEXQ_AVX2 {
    return _mm256_blendv_epi8(_mm256_blendv_epi8(first, second, one), third, two);
  };
  const auto masked = [&](__m256i v, int mask) FLEXQ_AVX2 { return _mm256_and_si256(v, _mm256_set1_epi8(char(mask))); };
  const __m256i byte0 = _mm256_xor_si256(blend(a, b, c), _mm256_set1_epi8(char(0xdf)));
  const __m256i byte1 = _mm256_xor_si256(turn<1>(blend(c, a, b)), _mm256_set1_epi8(char(0xf7)));
  const __m256i byte2 = _mm256_xor_si256(turn<2>(blend(b, c, a)), _mm256_set1_epi8(0x7d));
  w[0] = masked(byte0, 0x3f);
  w[1] = _mm256_or_si256(masked(_mm256_srli_epi16(byte0, 6), 0x03), masked(_mm256_slli_epi16(byte1, 2), 0x3c));
  w[2] = _mm256_or_si256(masked(_mm256_srli_epi16(byte1, 4), 0x0f), masked(_mm256_slli_epi16(byte2, 4), 0x30));
  w[3] = masked(_mm256_srli_epi16(byte2, 2), 0x3f);
}

// Sums of eight products stay in 16 bits: start = -31 * sum(x) and start + sum((31 - q) * x) = -sum(q * x), which is at least
// -8 * 32 * 128 and at most 8 * 32 * 127. (Of +sum(q * x) the largest would be one too large.) Additions on the way may wrap.
//   start, 16 to a group and token: corrections[(g * tokens + m) * 8], as int16
FLEXQ_AVX2 inline __m256i add_products(__m256i sum, const __m256i* w, const __m256i* x) {
  for (int j = 0; j < 4; ++j) sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w[j], _mm256_load_si256(x + j)));
  return sum;
}

FLEXQ_AVX2 inline int64_t quantize(const Problem& p, int64_t token) {
  return quantize_token(p, token, [&](int64_t g, const int8_t* codes, float scale) FLEXQ_AVX2 {
    const int64_t at = g * p.tokens + token;
    auto* x = reinterpret_cast<__m256i*>(p.codes + at * kGroup);
    uint32_t four[32];
#pragma GCC unroll 32
    for (int i = 0; i < 32; ++i) std::memcpy(&four[i], codes + triple_at(i) * 4, 4);
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < 32; ++i) p.codes[at * kGroup + j * 32 + i] = uint8_t(four[i] >> (8 * j));
    const __m256i all = _mm256_set1_epi8(31), w[4] = {all, all, all, all};
    const __m256i zero = _mm256_setzero_si256();
    _mm256_store_si256(reinterpret_cast<__m256i*>(p.corrections + at * 8), _mm256_sub_epi16(zero, add_products(zero, w, x)));
    p.scales[at] = scale;
  });
}

template <int Tokens>
FLEXQ_AVX2 inline void rows_of(const Problem& p, int64_t begin, int64_t end) {
  const int64_t ahead = 4096;  // bytes; rows follow one another, so that this is one stream, fetched well before its use
  static thread_local Scratch scratch;
  float* scales = scratch.get<float>(size_t(p.groups) * Tokens);  // a row's scales times the tokens'
  const uint8_t* packed = p.packed(begin, 0);
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t g = 0; g < p.groups; ++g) {
      const float sw = _cvtsh_ss(p.scale[n * p.groups + g]);
      for (int m = 0; m < Tokens; ++m) scales[g * Tokens + m] = p.scales[g * Tokens + m] * sw;
    }
    __m256 sums[Tokens];
    for (int m = 0; m < Tokens; ++m) sums[m] = _mm256_setzero_ps();
    for (int64_t g = 0; g < p.groups; ++g, packed += kGroupBytes) {
      _mm_prefetch(reinterpret_cast<const char*>(packed + ahead), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(packed + ahead + 64), _MM_HINT_T0);
      __m256i w[4];
      expand_in_planes(packed, w);
#pragma GCC unroll 8
      for (int m = 0; m < Tokens; ++m) {
        const int64_t at = g * Tokens + m;
        const __m256i start = _mm256_load_si256(reinterpret_cast<const __m256i*>(p.corrections + at * 8));
        const __m256i negative = add_products(start, w, reinterpret_cast<const __m256i*>(p.codes + at * kGroup));
        const __m256i inner = _mm256_madd_epi16(negative, _mm256_set1_epi16(-1));
        sums[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(inner), _mm256_set1_ps(scales[at]), sums[m]);
      }
    }
    for (int m = 0; m < Tokens; ++m) p.y[m * p.outputs + n] = finish(p, n, horizontal(sums[m]));
  }
}

FLEXQ_AVX2 inline void rows(const Problem& p, int64_t begin, int64_t end) {
  using Rows = void (*)(const Problem&, int64_t, int64_t);
  static constexpr Rows by_tokens[] = {rows_of<1>, rows_of<2>, rows_of<3>, rows_of<4>, rows_of<5>, rows_of<6>, rows_of<7>, rows_of<8>};
  by_tokens[p.tokens - 1](p, begin, end);
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
          const __m256 sw = _mm256_set1_ps(_cvtsh_ss(p.scale[(n0 + r) * p.groups + g]));
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
