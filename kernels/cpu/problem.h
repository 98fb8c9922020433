// What one call computes, and how its operands lie in memory.
//
//   y[m,n] = 2^e[n] * sum_g sx[m,g] * sw[n,g] * (sum_{k in g} qx[m,k] * qw[n,k]) + bias[n]
//
// The inner sum is exact in int32 (|sum| <= 32 * 128 * 128 < 2^24), the outer one is float32.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace flexq {

constexpr int kGroup = 128;                     // codes that share a scale
constexpr int kGroupBytes = kGroup * 6 / 8;     // 96 bytes of packed weights
constexpr int kTile = 16;                       // outputs and tokens in a tile
constexpr int kTileK = 64;                      // codes along K in a tile: a tile is 1 KiB
constexpr int kTileBytes = kTile * kTileK;
constexpr int kFewTokens = 8;                   // up to here weights are used straight from their packed rows

struct Problem {
  const float* x;           // [tokens, features]
  const uint8_t* weight;    // [outputs, groups * 96], canonical packing
  const uint16_t* scale;    // [outputs, groups], float16 bits
  const int8_t* exponent;   // [outputs]
  const float* bias;        // [outputs] or null
  float* y;                 // [tokens, outputs]
  int64_t tokens, features, outputs, groups;
  int activation_bits;

  // Quantised activations. Few tokens: rows, offset binary (q + 128), to meet signed weights in vpdpbusd (AVX2 has an order of its own):
  //   codes[m * groups * 128 + k]                                    scales[g * 8 + m]
  // Many tokens: tiles of 16 tokens x 64 codes, signed, four codes along K side by side as dot-product instructions eat them:
  //   codes[((m / 16) * groups * 2 + k / 64) * 1024 + (k % 64) / 4 * 64 + (m % 16) * 4 + k % 4]    scales[g * padded_tokens + m]
  uint8_t* codes;
  float* scales;
  int32_t* corrections;     // many tokens: -32 * sum of a group's codes, [g * padded_tokens + m]; undoes the weights' offset
                            // few tokens: 8 to a token and group, which AVX2 uses
  int64_t padded_tokens;    // tokens rounded up to a multiple of 16

  bool few() const { return tokens <= kFewTokens; }
  const uint8_t* packed(int64_t n, int64_t g) const { return weight + (n * groups + g) * kGroupBytes; }
  const int8_t* tile(int64_t m16, int64_t k64) const {
    return reinterpret_cast<const int8_t*>(codes) + (m16 * groups * 2 + k64) * kTileBytes;
  }
};

// A path of one instruction set. `rows` computes outputs [begin, end) for few tokens, `tiles` for many; `next` is where the same
// thread goes on, so that it can fetch weights ahead, or not less than `outputs`.
struct Path {
  const char* name;
  bool (*available)();
  int64_t (*quantize)(const Problem&, int64_t token);   // returns the first non-finite index, or -1
  void (*rows)(const Problem&, int64_t begin, int64_t end);
  void (*tiles)(const Problem&, int64_t begin, int64_t end, int64_t next);
};

inline float power_of_two(int8_t exponent) {
  const uint32_t wide = exponent >= -126 ? uint32_t(exponent + 127) << 23 : 1u << (exponent + 149);  // the last two are subnormal
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline float finish(const Problem& p, int64_t n, float sum) {
  return sum * power_of_two(p.exponent[n]) + (p.bias ? p.bias[n] : 0.0f);
}

// A thread's scratch memory, kept between calls: fresh pages cost more than the work of a small call.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  template <class T>
  T* get(size_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > bytes_) {
      std::free(memory_);
      memory_ = std::aligned_alloc(64, bytes);
      bytes_ = memory_ ? bytes : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace flexq
