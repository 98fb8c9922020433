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

// Writes sums, [row][token], to y: outputs n0.. of tokens m0.. . Sixteen rows x four tokens at a time are transposed: quarters of four
// rows are put side by side, and then each quarter is transposed.
FLEXQ_AVX512 inline void store_sums(const Problem& p, int64_t n0, int64_t end, int64_t m0, int64_t tokens, const float* sums) {
  for (int64_t m = 0; m < tokens && m0 + m < p.tokens; m += 4)
    for (int64_t n = n0; n < end; n += kTile) {
      const __mmask16 valid = end - n >= kTile ? 0xffff : __mmask16((1 << (end - n)) - 1);
      const __m512 exponent = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(valid, p.exponent + n)));
      const __m512 bias = p.bias ? _mm512_maskz_loadu_ps(valid, p.bias + n) : _mm512_setzero_ps();
      __m512 quarters[4];
      for (int i = 0; i < 4; ++i) {
        const float* row = sums + (n - n0 + i) * tokens + m;
        const __m512 two = _mm512_mask_broadcast_f32x4(_mm512_castps128_ps512(_mm_load_ps(row)), 0x00f0, _mm_load_ps(row + 4 * tokens));
        const __m512 three = _mm512_mask_broadcast_f32x4(two, 0x0f00, _mm_load_ps(row + 8 * tokens));
        quarters[i] = _mm512_mask_broadcast_f32x4(three, 0xf000, _mm_load_ps(row + 12 * tokens));
      }
      const __m512 low = _mm512_unpacklo_ps(quarters[0], quarters[1]), low2 = _mm512_unpacklo_ps(quarters[2], quarters[3]);
      const __m512 high = _mm512_unpackhi_ps(quarters[0], quarters[1]), high2 = _mm512_unpackhi_ps(quarters[2], quarters[3]);
      const __m512 columns[4] = {_mm512_shuffle_ps(low, low2, 0x44), _mm512_shuffle_ps(low, low2, 0xee),
                                 _mm512_shuffle_ps(high, high2, 0x44), _mm512_shuffle_ps(high, high2, 0xee)};
      for (int i = 0; i < 4 && m0 + m + i < p.tokens; ++i)
        _mm512_mask_storeu_ps(p.y + (m0 + m + i) * p.outputs + n, valid, _mm512_add_ps(_mm512_scalef_ps(columns[i], exponent), bias));
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

FLEXQ_AVX512 inline void tiles(const Problem& p, int64_t begin, int64_t end, int64_t) {
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
        store_sums(p, n0 + r, n0 + r + kTile < end ? n0 + r + kTile : end, m0, kTile, sums[0]);
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

// AMX: a tile register holds 16 rows of 64 bytes. Weights are the left operand, 16 outputs x 64 unsigned codes as their rows lie,
// so that expanding them needs no transposition; activations are the right one, 16 rows of four codes x 16 tokens. A group is two
// steps along K. Sums go through a small buffer to the vector unit, which scales one tile while the tile unit computes the next.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

// In memory of its own: the intrinsic tells the compiler of the first bytes only.
inline constexpr TileConfig kTileConfig{
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Weights expanded for the tiles: `rows` outputs, as [group][row / 16][half] tiles, with their scales.
struct Window {
  uint8_t* codes;
  float* scales;  // [group][row]
  int64_t rows;
};

FLEXQ_AVX512 inline void fetch(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T1); }

FLEXQ_AVX512 inline void expand_window(const Problem& p, const Window& w, int64_t n0, int64_t end) {
  constexpr int64_t kStep = 4;  // groups of a row at a time: whole cache lines are read, and what is written fits the first-level cache
  const Expander e = expander();
  for (int64_t tile = 0; tile < w.rows; tile += kTile)
    for (int64_t some = 0; some < p.groups; some += kStep)
      for (int64_t r = tile; r < tile + kTile; ++r) {
        const int64_t n = n0 + r < end ? n0 + r : end - 1;  // rows past the end repeat the last one and are not stored
        for (int64_t g = some; g < p.groups && g < some + kStep; ++g) {
          const uint8_t* packed = p.packed(n, g);
          _mm_prefetch(reinterpret_cast<const char*>(packed + 2 * kStep * kGroupBytes), _MM_HINT_T0);
          _mm_prefetch(reinterpret_cast<const char*>(packed + 2 * kStep * kGroupBytes + 64), _MM_HINT_T0);
          uint8_t* out = w.codes + (g * w.rows + tile) * kGroup + (r - tile) * kTileK;
          _mm512_store_si512(out, expand(packed, e));
          _mm512_store_si512(out + kTileBytes, expand(packed + 48, e));
          w.scales[g * w.rows + r] = _cvtsh_ss(p.scale[n * p.groups + g]);
        }
      }
}

// One group of 16 outputs x 16 or 32 tokens, whose activations are in tiles 4 to 7. The products start at the tokens' corrections,
// a row of stride zero, which undoes the weights' offset and costs less than _tile_zero: that waits for the tile's last use.
// What the vector unit has to do meanwhile comes in quarters between the tile instructions: in one piece it would wait for them.
template <int TokenTiles, class Meanwhile>
FLEXQ_AMX inline void multiply(const uint8_t* w, const int32_t* corrections, int32_t (*inner)[256], const Meanwhile& meanwhile) {
  const auto quarter = [&](int i) FLEXQ_AMX {
    asm volatile("" ::: "memory");  // tile instructions do not tell the compiler what they read and write
    meanwhile(i);
    asm volatile("" ::: "memory");
  };
  asm volatile("" ::: "memory");
  _tile_loadd(0, corrections, 0);
  _tile_loadd(2, w, 64);
  _tile_dpbusd(0, 2, 4);
  quarter(0);
  if (TokenTiles == 2) {
    _tile_loadd(1, corrections + kTile, 0);
    _tile_dpbusd(1, 2, 6);
  }
  quarter(1);
  _tile_loadd(3, w + kTileBytes, 64);
  _tile_dpbusd(0, 3, 5);
  quarter(2);
  if (TokenTiles == 2) _tile_dpbusd(1, 3, 7);
  _tile_stored(0, inner[0], 64);
  quarter(3);
  if (TokenTiles == 2) _tile_stored(1, inner[1], 64);
  asm volatile("" ::: "memory");
}

// Computes sums, [row][token], of the window's rows x 16 or 32 tokens. Meanwhile it fetches `lines` cache lines of the next window's
// weights a step, from `soon` on, the next tokens' activations, and the lines of y that these sums go to.
template <int TokenTiles>
FLEXQ_AMX inline void product(const Problem& p, const Window& w, int64_t n0, int64_t m0, float* sums, const uint8_t*& soon, int64_t lines) {
  constexpr int kTokens = TokenTiles * kTile;
  alignas(64) int32_t inner[2][TokenTiles][256] = {};  // the first step adds nothing, scaled by nothing
  __m512 sx0 = _mm512_setzero_ps(), sx1 = sx0;
  const auto add = [&](const float* sw, const int32_t (*from)[256], float* sum, int quarter) FLEXQ_AMX {
#pragma GCC unroll 4
    for (int i = quarter * 4; i < quarter * 4 + 4; ++i) {
      float* to = sum + i * kTokens;
      const __m512 scale = _mm512_set1_ps(sw[i]);
      const __m512 a = _mm512_cvtepi32_ps(_mm512_load_si512(from[0] + i * kTile));
      _mm512_store_ps(to, _mm512_fmadd_ps(a, _mm512_mul_ps(scale, sx0), _mm512_load_ps(to)));
      if (TokenTiles == 2) {
        const __m512 b = _mm512_cvtepi32_ps(_mm512_load_si512(from[TokenTiles - 1] + i * kTile));
        _mm512_store_ps(to + kTile, _mm512_fmadd_ps(b, _mm512_mul_ps(scale, sx1), _mm512_load_ps(to + kTile)));
      }
    }
  };
  std::memset(sums, 0, size_t(w.rows * kTokens) * sizeof(float));
  const int64_t tiles = w.rows / kTile, share = 2 * TokenTiles * kTileBytes / tiles;
  const uint8_t* codes = w.codes;
  const float* sw = w.scales;
  int64_t step = 0;
  float* last = sums + (tiles - 1) * kTile * kTokens;
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t at = g * p.padded_tokens + m0;
    const int8_t* x0 = p.tile(m0 / kTile, g * 2);
    const int8_t* x1 = p.tile(m0 / kTile + TokenTiles - 1, g * 2);
    _tile_loadd(4, x0, 64);
    _tile_loadd(5, x0 + kTileBytes, 64);
    if (TokenTiles == 2) {
      _tile_loadd(6, x1, 64);
      _tile_loadd(7, x1 + kTileBytes, 64);
    }
    float* sum = sums;
    for (int64_t t = 0; t < tiles; ++t, ++step, codes += kTile * kGroup) {
      for (int64_t line = 0; line < lines; ++line, soon += 64) fetch(soon);
      if (m0 + kTokens < p.padded_tokens) {
        const int8_t* next = p.tile(m0 / kTile + TokenTiles + t % TokenTiles, g * 2) + t / TokenTiles * share;
        for (int64_t line = 0; line < share; line += 64) fetch(next + line);
      }
      if (g < kTokens) fetch(p.y + (m0 + g) * p.outputs + n0 + t * kTile);
      const int32_t(*done)[256] = inner[(step + 1) % 2];
      float* to = t ? sum - kTile * kTokens : last;
      const float* scale = step ? sw - kTile : sw;
      multiply<TokenTiles>(codes, p.corrections + at, inner[step % 2], [&](int quarter) FLEXQ_AMX { add(scale, done, to, quarter); });
      if (t == 0) sx0 = _mm512_load_ps(p.scales + at), sx1 = _mm512_load_ps(p.scales + at + (TokenTiles - 1) * kTile);
      sum += kTile * kTokens, sw += kTile;
    }
  }
  for (int quarter = 0; quarter < 4; ++quarter) add(sw - kTile, inner[(step + 1) % 2], last, quarter);
}

// A window of weights is expanded once and used for all tokens. It stays in the second-level cache, and is the taller the more
// tokens there are, because activations, which do not stay, are read once a window. While it is used, the next one's packed
// weights are fetched, so that memory does not idle; with many tokens by the last of them, lest they be evicted again.
FLEXQ_AMX inline void amx_tiles(const Problem& p, int64_t begin, int64_t end, int64_t next) {
  static thread_local Scratch weights, scales, all_sums;
  _tile_loadconfig(&kTileConfig);
  const int64_t fit = 1024 * 1024 / (p.groups * kGroup);
  const int64_t height = fit >= 128 && p.tokens > 100 ? 128 : fit >= 64 ? 64 : 32;
  const int64_t pairs = (p.padded_tokens + 2 * kTile - 1) / (2 * kTile), fetching = pairs < 4 ? pairs : 4;
  const int64_t lines = (kTile * kGroupBytes / 64 + fetching - 1) / fetching;
  float* sums = all_sums.get<float>(size_t(height * 2 * kTile));
  Window w{weights.get<uint8_t>(size_t(height * p.groups * kGroup)), scales.get<float>(size_t(height * p.groups)), 0};
  for (int64_t n0 = begin; n0 < end; n0 += height) {
    const int64_t stop = end - n0 < height ? end : n0 + height, after = stop < end ? stop : next;
    w.rows = (stop - n0 + kTile - 1) / kTile * kTile;
    expand_window(p, w, n0, stop);
    const bool more = after < p.outputs;
    const uint8_t* soon = more ? p.packed(after, 0) : nullptr;
    for (int64_t at = 0; more && at < w.rows * p.groups; at += 32) fetch(p.scale + after * p.groups + at);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t m0 = pair * 2 * kTile;
      const bool two = m0 + kTile < p.padded_tokens;
      (two ? product<2> : product<1>)(p, w, n0, m0, sums, soon, more && pair >= pairs - fetching ? lines : 0);
      store_sums(p, n0, stop, m0, two ? 2 * kTile : kTile, sums);
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
