// AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later), and AMX-INT8 for many tokens (Sapphire Rapids and later).
//
// Expansion: 48 packed bytes -> 64 codes. vpermb puts six bytes (eight codes) into each 64-bit lane, vpmultishiftqb lifts the
// eight fields to bytes, and one vpternlog masks them and flips the sign bit: (c & 63) ^ 32 = q + 32.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "quantize_activation.h"

namespace flexq::avx512 {

#define FLEXQ_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")))
#define FLEXQ_AMX \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c,amx-tile,amx-int8")))

struct Expander {
  __m512i spread, shifts;
};

FLEXQ_AVX512 inline Expander expander() {
  alignas(64) uint8_t spread[64], shifts[64];
  for (int i = 0; i < 64; ++i) {
    spread[i] = uint8_t(i / 8 * 6 + (i % 8 < 6 ? i % 8 : 0));
    shifts[i] = uint8_t(i % 8 * 6);
  }
  return {_mm512_load_si512(spread), _mm512_load_si512(shifts)};
}

// 48 packed bytes -> 64 codes q + 32.
FLEXQ_AVX512 inline __m512i expand(const uint8_t* packed, const Expander& e) {
  const __m512i bytes = _mm512_maskz_loadu_epi8(0x0000ffffffffffffull, packed);
  const __m512i fields = _mm512_multishift_epi64_epi8(e.shifts, _mm512_permutexvar_epi8(e.spread, bytes));
  return _mm512_ternarylogic_epi32(fields, _mm512_set1_epi8(0x3f), _mm512_set1_epi8(0x20), 0x6a);  // (a & b) ^ c
}

FLEXQ_AVX512 inline int64_t quantize(const Problem& p, int64_t token) { return quantize_token(p, token); }

// Few tokens: packed rows straight from memory. Activations are unsigned (q + 128), weights signed; what the offset adds,
// 128 * sum(w), depends on the weights alone and is subtracted from the start of every token's sum.
template <int Tokens>
FLEXQ_AVX512 inline void rows_of(const Problem& p, int64_t begin, int64_t end) {
  const Expander e = expander();
  const __m512i offset = _mm512_set1_epi8(32), flip = _mm512_set1_epi8(char(0x80)), zero = _mm512_setzero_si512();
  static thread_local Scratch scratch;
  float* sw = scratch.get<float>(size_t(p.groups) + 16);
  const int64_t ahead = 4096;  // bytes; far enough to cover memory latency, and past the hardware's page limit
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t g = 0; g < p.groups; g += 16) {
      const __mmask16 valid = p.groups - g >= 16 ? 0xffff : __mmask16((1 << (p.groups - g)) - 1);
      const __m256i half = _mm256_maskz_loadu_epi16(valid, p.scale + n * p.groups + g);
      _mm512_store_ps(sw + g, _mm512_cvtph_ps(half));
    }
    __m512 sums[Tokens];
    for (int m = 0; m < Tokens; ++m) sums[m] = _mm512_setzero_ps();
    for (int64_t g = 0; g < p.groups; ++g) {
      const uint8_t* packed = p.packed(n, g);
      _mm_prefetch(reinterpret_cast<const char*>(packed + ahead), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(packed + ahead + 64), _MM_HINT_T0);
      const __m512i w0 = _mm512_sub_epi8(expand(packed, e), offset);
      const __m512i w1 = _mm512_sub_epi8(expand(packed + 48, e), offset);
      const __m512i start = _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, flip, w0), flip, w1));
#pragma GCC unroll 8
      for (int m = 0; m < Tokens; ++m) {
        const uint8_t* x = p.codes + (m * p.groups + g) * kGroup;
        __m512i inner = _mm512_dpbusd_epi32(start, _mm512_load_si512(x), w0);
        inner = _mm512_dpbusd_epi32(inner, _mm512_load_si512(x + 64), w1);
        const __m512 scale = _mm512_set1_ps(p.scales[m * p.groups + g] * sw[g]);
        sums[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(inner), scale, sums[m]);
      }
    }
    for (int m = 0; m < Tokens; ++m) p.y[m * p.outputs + n] = finish(p, n, _mm512_reduce_add_ps(sums[m]));
  }
}

FLEXQ_AVX512 inline void rows(const Problem& p, int64_t begin, int64_t end) {
  using Rows = void (*)(const Problem&, int64_t, int64_t);
  static constexpr Rows by_tokens[] = {rows_of<1>, rows_of<2>, rows_of<3>, rows_of<4>, rows_of<5>, rows_of<6>, rows_of<7>, rows_of<8>};
  by_tokens[p.tokens - 1](p, begin, end);
}

// Writes a block of sums, [output][token], to y.
template <int Outputs>
inline void store_block(const Problem& p, int64_t n0, int count, int64_t m0, int tokens, const float (*sums)[kTile]) {
  for (int m = 0; m < tokens && m0 + m < p.tokens; ++m) {
    float* y = p.y + (m0 + m) * p.outputs + n0;
    for (int r = 0; r < count; ++r) y[r] = finish(p, n0 + r, sums[r + m / kTile * Outputs][m % kTile]);
  }
}

// Eight outputs against 32 tokens: lanes are tokens, four codes of a weight row are broadcast to all of them.
FLEXQ_AVX512 inline void tiles(const Problem& p, int64_t begin, int64_t end) {
  constexpr int kRows = 8;
  const Expander e = expander();
  static thread_local Scratch scratch;
  uint8_t* w = scratch.get<uint8_t>(size_t(kRows) * p.groups * kGroup);
  for (int64_t n0 = begin; n0 < end; n0 += kRows) {
    const int count = int(end - n0 < kRows ? end - n0 : kRows);
    for (int r = 0; r < kRows; ++r)  // rows past the end repeat the last one and are not stored
      for (int64_t g = 0; g < p.groups; ++g) {
        const uint8_t* packed = p.packed(n0 + (r < count ? r : count - 1), g);
        uint8_t* out = w + (r * p.groups + g) * kGroup;
        _mm512_store_si512(out, expand(packed, e));
        _mm512_store_si512(out + kTileK, expand(packed + 48, e));
      }
    for (int64_t m0 = 0; m0 < p.padded_tokens; m0 += 2 * kTile) {
      const bool both = m0 + kTile < p.padded_tokens;
      const int64_t second = both ? kTile : 0;  // a lone last tile is computed twice rather than written twice
      alignas(64) float sums[2 * kRows][kTile] = {};
      for (int64_t g = 0; g < p.groups; ++g) {
        const int8_t* x0 = p.tile(m0 / kTile, g * 2);
        const int8_t* x1 = p.tile((m0 + second) / kTile, g * 2);
        const int64_t at = g * p.padded_tokens + m0;
        __m512i inner[kRows][2];
        for (int r = 0; r < kRows; ++r) {
          inner[r][0] = _mm512_load_si512(p.corrections + at);
          inner[r][1] = _mm512_load_si512(p.corrections + at + second);
        }
        const uint8_t* four = w + g * kGroup;
        for (int quad = 0; quad < kGroup / 4; ++quad) {
          const __m512i a = _mm512_load_si512(x0 + quad * 64), b = _mm512_load_si512(x1 + quad * 64);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            int32_t codes;
            std::memcpy(&codes, four + r * p.groups * kGroup + quad * 4, 4);
            const __m512i broadcast = _mm512_set1_epi32(codes);
            inner[r][0] = _mm512_dpbusd_epi32(inner[r][0], broadcast, a);
            inner[r][1] = _mm512_dpbusd_epi32(inner[r][1], broadcast, b);
          }
        }
        const __m512 sx0 = _mm512_load_ps(p.scales + at), sx1 = _mm512_load_ps(p.scales + at + second);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const __m512 sw = _mm512_set1_ps(half_to_float(p.scale[(n0 + (r < count ? r : 0)) * p.groups + g]));
          float* s0 = sums[r];
          float* s1 = sums[r + kRows];
          _mm512_store_ps(s0, _mm512_fmadd_ps(_mm512_cvtepi32_ps(inner[r][0]), _mm512_mul_ps(sw, sx0), _mm512_load_ps(s0)));
          _mm512_store_ps(s1, _mm512_fmadd_ps(_mm512_cvtepi32_ps(inner[r][1]), _mm512_mul_ps(sw, sx1), _mm512_load_ps(s1)));
        }
      }
      store_block<kRows>(p, n0, count, m0, both ? 2 * kTile : kTile, sums);
    }
  }
}

inline bool available() {
  for (const bool has : {__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"), __builtin_cpu_supports("avx512vl"),
                         __builtin_cpu_supports("avx512dq"), __builtin_cpu_supports("avx512vnni"), __builtin_cpu_supports("avx512vbmi")})
    if (!has) return false;
  return true;
}

inline const Path path{"avx512", available, quantize, rows, tiles};

// AMX: a tile register holds 16 rows of 64 bytes. Weights are the left operand, 16 outputs x 64 codes as their rows lie, so that
// expanding them needs no transposition; activations are the right one, 16 rows of four codes x 16 tokens. A group is two
// steps along K. Sums go through a small buffer to the vector unit, which scales one group while the tiles compute the next.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

template <int TokenTiles>
FLEXQ_AMX inline void multiply(const int8_t* w0, const int8_t* w1, const int8_t* x0, const int8_t* x1, int32_t* sums) {
  _tile_zero(0);
  _tile_zero(2);
  if (TokenTiles == 2) {
    _tile_zero(1);
    _tile_zero(3);
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const int at = half * kTileBytes;
    _tile_loadd(4, w0 + at, 64);
    _tile_loadd(6, x0 + at, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, w1 + at, 64);
    _tile_dpbssd(2, 5, 6);
    if (TokenTiles == 2) {
      _tile_loadd(7, x1 + at, 64);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(2, sums + 512, 64);
  if (TokenTiles == 2) {
    _tile_stored(1, sums + 256, 64);
    _tile_stored(3, sums + 768, 64);
  }
}

// 32 outputs (two weight tiles) against 16 or 32 tokens, all groups.  w: [2][groups * 2] tiles.  sw: [groups][32].
template <int TokenTiles>
FLEXQ_AMX inline void product(const Problem& p, const int8_t* w, const float* sw, int64_t m0, float (*sums)[kTile]) {
  alignas(64) int32_t buffer[2][4 * 256];
  const int64_t row = p.groups * 2 * kTileBytes;
  const auto start = [&](int64_t g) FLEXQ_AMX {
    const int64_t at = g * 2 * kTileBytes;
    multiply<TokenTiles>(w + at, w + row + at, p.tile(m0 / kTile, g * 2), p.tile(m0 / kTile + TokenTiles - 1, g * 2), buffer[g % 2]);
  };
  start(0);
  for (int64_t g = 0; g < p.groups; ++g) {
    if (g + 1 < p.groups) start(g + 1);
    const float* sx = p.scales + g * p.padded_tokens + m0;
    const __m512 sx0 = _mm512_load_ps(sx), sx1 = _mm512_load_ps(sx + (TokenTiles - 1) * kTile);
    const int32_t* inner = buffer[g % 2];
#pragma GCC unroll 4
    for (int r = 0; r < 32; ++r) {
      const __m512 scale = _mm512_set1_ps(sw[g * 32 + r]);
      const int32_t* from = inner + r / 16 * 512 + r % 16 * 16;
      const __m512 a = _mm512_cvtepi32_ps(_mm512_load_si512(from));
      _mm512_store_ps(sums[r], _mm512_fmadd_ps(a, _mm512_mul_ps(scale, sx0), _mm512_load_ps(sums[r])));
      if (TokenTiles == 2) {
        const __m512 b = _mm512_cvtepi32_ps(_mm512_load_si512(from + 256));
        _mm512_store_ps(sums[32 + r], _mm512_fmadd_ps(b, _mm512_mul_ps(scale, sx1), _mm512_load_ps(sums[32 + r])));
      }
    }
  }
}

FLEXQ_AMX inline void amx_tiles(const Problem& p, int64_t begin, int64_t end) {
  constexpr int kRows = 32;
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
  _tile_loadconfig(&config);
  const Expander e = expander();
  const __m512i offset = _mm512_set1_epi8(32);
  static thread_local Scratch weights, scales;
  auto* w = weights.get<int8_t>(size_t(kRows) * p.groups * kGroup);
  float* sw = scales.get<float>(size_t(kRows) * p.groups);
  for (int64_t n0 = begin; n0 < end; n0 += kRows) {
    const int count = int(end - n0 < kRows ? end - n0 : kRows);
    for (int r = 0; r < kRows; ++r) {
      const int64_t n = n0 + (r < count ? r : count - 1);  // rows past the end repeat the last one and are not stored
      for (int64_t g = 0; g < p.groups; ++g) {
        const uint8_t* packed = p.packed(n, g);
        _mm_prefetch(reinterpret_cast<const char*>(packed + 1024), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(packed + 1088), _MM_HINT_T0);
        int8_t* out = w + ((r / kTile) * p.groups + g) * 2 * kTileBytes + r % kTile * kTileK;
        _mm512_store_si512(out, _mm512_sub_epi8(expand(packed, e), offset));
        _mm512_store_si512(out + kTileBytes, _mm512_sub_epi8(expand(packed + 48, e), offset));
        sw[g * kRows + r] = half_to_float(p.scale[n * p.groups + g]);
      }
    }
    for (int64_t m0 = 0; m0 < p.padded_tokens; m0 += 2 * kTile) {
      alignas(64) float sums[2 * kRows][kTile] = {};
      const bool both = m0 + kTile < p.padded_tokens;
      both ? product<2>(p, w, sw, m0, sums) : product<1>(p, w, sw, m0, sums);
      store_block<kRows>(p, n0, count, m0, both ? 2 * kTile : kTile, sums);
    }
  }
  _tile_release();
}

// Linux grants tile registers to a process that asks; the permission covers all its threads.
inline bool amx_available() {
  static const bool granted = [] {
    if (!available() || !__builtin_cpu_supports("amx-int8")) return false;
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return granted;
}

inline const Path amx_path{"amx", amx_available, quantize, rows, amx_tiles};

}  // namespace flexq::avx512
#endif
