// AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later), and AMX-INT8 for many tokens (Sapphire Rapids and later).
//
// Expansion: 48 packed bytes -> 64 codes. vpermb puts six bytes (eight codes) into each 64-bit lane, vpmultishiftqb lifts the
// eight fields to bytes, and one vpternlog masks them and flips the sign bit: (c & 63) ^ 32 = q + 32.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <initializer_list>

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
// 128 * sum(w), depends on the weights alone and is where every token's sum starts.
template <int Tokens>
FLEXQ_AVX512 inline void rows_of(const Problem& p, int64_t begin, int64_t end) {
  const Expander e = expander();
  const __m512i offset = _mm512_set1_epi8(32), flip = _mm512_set1_epi8(char(0x80)), zero = _mm512_setzero_si512();
  const int64_t ahead = 8192;  // bytes; rows follow one another, so that this is one stream, fetched well before its use
  const uint8_t* packed = p.packed(begin, 0);
  for (int64_t n = begin; n < end; ++n) {
    __m512 sums[Tokens];
    for (int m = 0; m < Tokens; ++m) sums[m] = _mm512_setzero_ps();
    const uint8_t* codes = p.codes;
    for (int64_t g = 0; g < p.groups; ++g, packed += kGroupBytes, codes += kGroup) {
      _mm_prefetch(reinterpret_cast<const char*>(packed + ahead), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(packed + ahead + 64), _MM_HINT_T0);
      const __m512i w0 = _mm512_sub_epi8(expand(packed, e), offset);
      const __m512i w1 = _mm512_sub_epi8(expand(packed + 48, e), offset);
      const __m512i start = _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, flip, w0), flip, w1));
      alignas(32) float scale[kFewTokens];  // of all tokens at once; each is then broadcast by the load that uses it
      const __m256 sw = _mm256_set1_ps(_cvtsh_ss(p.scale[n * p.groups + g]));
      _mm256_store_ps(scale, _mm256_mul_ps(sw, _mm256_load_ps(p.scales + g * kFewTokens)));
#pragma GCC unroll 8
      for (int m = 0; m < Tokens; ++m) {
        const uint8_t* x = codes + m * p.groups * kGroup;
        const __m512i inner = _mm512_dpbusd_epi32(start, _mm512_load_si512(x), w0);
        const __m512i whole = _mm512_dpbusd_epi32(inner, _mm512_load_si512(x + 64), w1);
        sums[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(scale[m]), sums[m]);
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

// Many tokens: a block of outputs is expanded once and used for all tokens; it stays in the second-level cache, and the block is
// large enough that the activations, which do not stay, are not read too often.
constexpr int64_t kBlockBytes = 640 * 1024;

inline int64_t block_rows(const Problem& p) {
  const int64_t rows = kBlockBytes / (p.groups * kGroup) / 32 * 32;
  return rows < 32 ? 32 : rows > 128 ? 128 : rows;
}

// Writes sums, [output][16 tokens], to y: outputs n0.. of tokens m0..
FLEXQ_AVX512 inline void store_block(const Problem& p, int64_t n0, int64_t end, int64_t m0, int rows, const float (*sums)[kTile]) {
  const __m512i down = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(kTile));
  for (int r = 0; r < rows && n0 + r < end; r += 16) {
    const int64_t left = end - n0 - r < rows - r ? end - n0 - r : rows - r;
    const __mmask16 valid = left >= 16 ? 0xffff : __mmask16((1 << left) - 1);
    const __m512i exponent = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(valid, p.exponent + n0 + r));
    const __m512 factor = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(exponent, _mm512_set1_epi32(127)), 23));
    const __m512 bias = p.bias ? _mm512_maskz_loadu_ps(valid, p.bias + n0 + r) : _mm512_setzero_ps();
    for (int m = 0; m < kTile && m0 + m < p.tokens; ++m) {
      const __m512 column = _mm512_i32gather_ps(down, &sums[r][m], 4);
      _mm512_mask_storeu_ps(p.y + (m0 + m) * p.outputs + n0 + r, valid, _mm512_add_ps(_mm512_mul_ps(column, factor), bias));
    }
  }
}

// Sixteen outputs, eight at a time, against 16 tokens: lanes are tokens, four codes of a weight row are broadcast to all.
FLEXQ_AVX512 inline void multiply_rows(const Problem& p, const uint8_t* w, const float* sw, int64_t g, int64_t m0, float (*sums)[kTile]) {
  constexpr int kRows = 8;
  const int64_t stride = p.groups * kGroup, at = g * p.padded_tokens + m0;
  const int8_t* x = p.tile(m0 / kTile, g * 2);
  const __m512i start = _mm512_load_si512(p.corrections + at);
  const __m512 sx = _mm512_load_ps(p.scales + at);
  for (int half = 0; half < kTile; half += kRows) {
    __m512i inner[kRows];
    for (int r = 0; r < kRows; ++r) inner[r] = start;
    const uint8_t* four = w + half * stride + g * kGroup;
#pragma GCC unroll 4
    for (int quad = 0; quad < kGroup / 4; ++quad) {
      const __m512i tokens = _mm512_load_si512(x + quad * 64);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int32_t codes;
        std::memcpy(&codes, four + r * stride + quad * 4, 4);
        inner[r] = _mm512_dpbusd_epi32(inner[r], _mm512_set1_epi32(codes), tokens);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      float* sum = sums[half + r];
      const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(sw[half + r]), sx);
      _mm512_store_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(inner[r]), scale, _mm512_load_ps(sum)));
    }
  }
}

FLEXQ_AVX512 inline void tiles(const Problem& p, int64_t begin, int64_t end) {
  const int64_t block = block_rows(p), stride = p.groups * kGroup;
  const Expander e = expander();
  static thread_local Scratch weights, scales;
  uint8_t* w = weights.get<uint8_t>(size_t(block * stride));
  float* sw = scales.get<float>(size_t(block * p.groups));  // [groups][block]
  for (int64_t n0 = begin; n0 < end; n0 += block) {
    const int64_t rows = end - n0 < block ? (end - n0 + kTile - 1) / kTile * kTile : block;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = n0 + r < end ? n0 + r : end - 1;  // rows past the end repeat the last one and are not stored
      for (int64_t g = 0; g < p.groups; ++g) {
        _mm512_store_si512(w + r * stride + g * kGroup, expand(p.packed(n, g), e));
        _mm512_store_si512(w + r * stride + g * kGroup + kTileK, expand(p.packed(n, g) + 48, e));
        sw[g * block + r] = _cvtsh_ss(p.scale[n * p.groups + g]);
      }
    }
    for (int64_t m0 = 0; m0 < p.padded_tokens; m0 += kTile)
      for (int64_t r = 0; r < rows; r += kTile) {
        alignas(64) float sums[kTile][kTile] = {};
        for (int64_t g = 0; g < p.groups; ++g) multiply_rows(p, w + r * stride, sw + g * block + r, g, m0, sums);
        store_block(p, n0 + r, end, m0, kTile, sums);
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
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

// In memory of its own: the intrinsic tells the compiler of the first bytes only.
inline constexpr TileConfig kTileConfig{
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

template <int TokenTiles>
FLEXQ_AMX inline void multiply(const int8_t* w0, const int8_t* w1, const int8_t* x0, const int8_t* x1, int32_t* sums) {
  asm volatile("" ::: "memory");  // tile loads do not tell the compiler what they read: stores must come before
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

// Weights expanded for the tiles: `rows` outputs x `groups` groups, as [row / 16][group][half] tiles, with their scales.
struct Window {
  int8_t* codes;
  float* scales;  // [groups][rows]
  int64_t rows, groups;
};

FLEXQ_AVX512 inline void expand_window(const Problem& p, const Window& w, int64_t n0, int64_t end, int64_t first, int64_t groups) {
  constexpr int64_t kStep = 4;  // groups of a row at a time: whole cache lines are read, a few KiB are written
  const Expander e = expander();
  const __m512i offset = _mm512_set1_epi8(32);
  for (int64_t tile = 0; tile < w.rows; tile += kTile)
    for (int64_t some = 0; some < groups; some += kStep)
      for (int64_t r = tile; r < tile + kTile; ++r) {
        const int64_t n = n0 + r < end ? n0 + r : end - 1;  // rows past the end repeat the last one and are not stored
        for (int64_t g = some; g < groups && g < some + kStep; ++g) {
          const uint8_t* packed = p.packed(n, first + g);
          _mm_prefetch(reinterpret_cast<const char*>(packed + 2 * kStep * kGroupBytes), _MM_HINT_T0);
          _mm_prefetch(reinterpret_cast<const char*>(packed + 2 * kStep * kGroupBytes + 64), _MM_HINT_T0);
          int8_t* out = w.codes + (tile / kTile * w.groups + g) * 2 * kTileBytes + (r - tile) * kTileK;
          _mm512_store_si512(out, _mm512_sub_epi8(expand(packed, e), offset));
          _mm512_store_si512(out + kTileBytes, _mm512_sub_epi8(expand(packed + 48, e), offset));
          w.scales[g * w.rows + r] = _cvtsh_ss(p.scale[n * p.groups + first + g]);
        }
      }
}

// Adds to the sums of 32 outputs (from row `r` of the window) x 16 or 32 tokens the window's `groups` groups from `first` on.
template <int TokenTiles>
FLEXQ_AMX inline void product(const Problem& p, const Window& w, int64_t r, int64_t first, int64_t groups, int64_t m0, float (*sums)[kTile],
                              float (*sums_next)[kTile]) {
  alignas(64) int32_t buffer[2][4 * 256];
  const int8_t* codes = w.codes + r / kTile * w.groups * 2 * kTileBytes;
  const int64_t next_tile = w.groups * 2 * kTileBytes;
  const auto start = [&](int64_t g) FLEXQ_AMX {
    const int8_t* at = codes + g * 2 * kTileBytes;
    const int64_t k = (first + g) * 2;
    multiply<TokenTiles>(at, at + next_tile, p.tile(m0 / kTile, k), p.tile(m0 / kTile + TokenTiles - 1, k), buffer[g % 2]);
  };
  // The next tokens' activations come from a far cache: each call fetches its share of them.
  const int64_t share = 2 * 2 * kTileBytes * 32 / w.rows;
  const char* later = reinterpret_cast<const char*>(p.tile(m0 / kTile + 2, first * 2)) + r / 32 * groups * share;
  start(0);
  for (int64_t g = 0; g < groups; ++g) {
    if (g + 1 < groups) start(g + 1);
    const float* sx = p.scales + (first + g) * p.padded_tokens + m0;
    const __m512 sx0 = _mm512_load_ps(sx), sx1 = _mm512_load_ps(sx + (TokenTiles - 1) * kTile);
    const int32_t* inner = buffer[g % 2];
    const float* sw = w.scales + g * w.rows + r;
    const char* soon = later + g * share;
    for (int64_t line = 0; line < share; line += 64) _mm_prefetch(soon + line, _MM_HINT_T1);
#pragma GCC unroll 4
    for (int i = 0; i < 32; ++i) {
      const __m512 scale = _mm512_set1_ps(sw[i]);
      const int32_t* from = inner + i / 16 * 512 + i % 16 * 16;
      const __m512 a = _mm512_cvtepi32_ps(_mm512_load_si512(from));
      _mm512_store_ps(sums[i], _mm512_fmadd_ps(a, _mm512_mul_ps(scale, sx0), _mm512_load_ps(sums[i])));
      if (TokenTiles == 2) {
        const __m512 b = _mm512_cvtepi32_ps(_mm512_load_si512(from + 256));
        _mm512_store_ps(sums_next[i], _mm512_fmadd_ps(b, _mm512_mul_ps(scale, sx1), _mm512_load_ps(sums_next[i])));
      }
    }
  }
}

// For a moderate number of tokens the expanded window stays in the first-level cache and is used up at once; for many, the
// window is tall, so that the activations, which do not fit, are read less often.
FLEXQ_AMX inline void amx_tiles(const Problem& p, int64_t begin, int64_t end) {
  static thread_local Scratch weights, scales, all_sums;
  _tile_loadconfig(&kTileConfig);
  const bool tall = p.tokens > 100;
  Window w;
  w.rows = tall ? 128 : 32;  // 512 KiB of codes, or 16 KiB
  w.groups = tall ? 32 : 4;
  w.groups = w.groups < p.groups ? w.groups : p.groups;
  w.codes = weights.get<int8_t>(size_t(w.rows * w.groups * kGroup));
  w.scales = scales.get<float>(size_t(w.rows * w.groups));
  auto* sums = all_sums.get<float[kTile]>(size_t(p.padded_tokens / kTile * w.rows));  // [token tile][row][16 tokens]
  for (int64_t n0 = begin; n0 < end; n0 += w.rows) {
    std::memset(sums, 0, size_t(p.padded_tokens * w.rows) * sizeof(float));
    for (int64_t first = 0; first < p.groups; first += w.groups) {
      const int64_t groups = p.groups - first < w.groups ? p.groups - first : w.groups;
      expand_window(p, w, n0, end, first, groups);
      for (int64_t m0 = 0; m0 < p.padded_tokens; m0 += 2 * kTile)
        for (int64_t r = 0; r < w.rows; r += 32) {
          auto* here = sums + m0 / kTile * w.rows + r;
          if (m0 + kTile < p.padded_tokens)
            product<2>(p, w, r, first, groups, m0, here, here + w.rows);
          else
            product<1>(p, w, r, first, groups, m0, here, nullptr);
        }
    }
    for (int64_t m0 = 0; m0 < p.padded_tokens; m0 += kTile)
      store_block(p, n0, end, m0, int(w.rows), sums + m0 / kTile * w.rows);
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
