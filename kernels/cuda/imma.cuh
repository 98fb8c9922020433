// The loop of the products on INT8 tensor cores: 6-bit weights become bytes in registers, s8 tensor cores multiply them, each group is
// scaled in float32.
#pragma once
#include "expand.cuh"
#include "ring.cuh"

namespace flexq {

// A lane's codes of a group of 8 tokens, those of token g, and the scales of tokens 2 q and 2 q + 1.
struct Activations {
  uint4 b0, b1;
  float2 scale;
};

// Of up to kTokens tokens, codes and scales that lie in shared memory from a block's first step to its last: [group][k / 64][token][k % 64]
// and [group][token]. The other columns of the tensor cores' operand are zeros.
template <int kTokens>
struct Resident {
  static constexpr int kGroupBytes = kTokens * (kGroup + 4);

  uint8_t* codes;
  float* scales;

  __device__ __forceinline__ Resident(uint8_t* shared, int groups)
      : codes(shared), scales(reinterpret_cast<float*>(shared + groups * kTokens * kGroup)) {}

  // From records, by all threads of the block, which meet after it.
  __device__ __forceinline__ void fill(const uint8_t* records, int groups) const {
    constexpr int kRecordBytes = activation_record_bytes(Order::bytes, 8, 1), kHalf = kTokens * 4, kVectors = 2 * kHalf, kAtOnce = 4;
    for (int first = threadIdx.x; first < groups * kVectors; first += kAtOnce * blockDim.x) {
      uint4 vector[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (const int v = first + i * blockDim.x; v < groups * kVectors)
          vector[i] = *reinterpret_cast<const uint4*>(records + v / kVectors * kRecordBytes + v % kVectors / kHalf * 512 + v % kHalf * 16);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (const int v = first + i * blockDim.x; v < groups * kVectors) reinterpret_cast<uint4*>(codes)[v] = vector[i];
    }
    for (int i = threadIdx.x; i < groups * kTokens; i += blockDim.x)
      scales[i] = reinterpret_cast<const float*>(records + i / kTokens * kRecordBytes + kTokenTile * kGroup)[i % kTokens];
  }

  __device__ __forceinline__ Activations operator()(const uint8_t*, int group, int, int lane) const {
    uint4 b0{}, b1{};
    if (lane < 4 * kTokens) {
      const uint8_t* at = codes + group * kTokens * kGroup + lane * 16;
      b0 = *reinterpret_cast<const uint4*>(at), b1 = *reinterpret_cast<const uint4*>(at + kTokens * 64);
    }
    const float* scale = scales + group * kTokens;
    if constexpr (kTokens == 1) return {b0, b1, make_float2(scale[0], scale[0])};
    return {b0, b1, *reinterpret_cast<const float2*>(scale + lane * 2 % kTokens)};
  }
};

// Of a block's tiles, with activations from where `feed` has them: feed(record of the stage, group, t, lane), of 8 tokens t.
template <int kTokenTiles, int kWarps, class TheRing, class TheSum, class Feed>
struct Multiply {
  const Linear& p;
  TheRing& ring;
  TheSum& sum;
  const Feed& feed;
  int group, turn = 0;

  // Of a tile both halves, from the `first`, 0, or that one alone: 16 outputs each.
  template <int kHalves>
  __device__ __forceinline__ void tile(int tile, int first) {
    const int lane = ring.lane, g = lane / 4;
    float sums[kHalves][kTokenTiles][4] = {};
    for (; group < p.groups; group += kWarps) {
      const uint8_t* stage = ring.wait();
      const uint8_t* chunk = stage - first * kHalfBytes;  // where the whole chunk would begin
      uint32_t a[kHalves][4][4];
      __half2 sw[kHalves];  // of rows g and g + 8
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        uint32_t words[12];
        load_half(chunk, first + half, lane, words);
#pragma unroll
        for (int s = 0; s < 4; ++s) expand(words, s, a[half][s]);
        sw[half] = *reinterpret_cast<const __half2*>(chunk + kHalfBytes + g * 8 + (first + half) * 4);
      }
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        const auto [b0, b1, s] = feed(stage + kChunkBytes, group, t, lane);
        int32_t inner[kHalves][4];
#pragma unroll
        for (int step = 0; step < 4; ++step)  // halves are independent: none waits for the one before
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            const uint4 four = step < 2 ? b0 : b1;
            const uint32_t(&w)[4] = a[half][step];
            const uint32_t b0_of_step = step % 2 ? four.z : four.x, b1_of_step = step % 2 ? four.w : four.y;
            if (step == 0)
              mma_s8_start(inner[half], w, b0_of_step, b1_of_step, kMagicBits);
            else
              mma_s8(inner[half], w, b0_of_step, b1_of_step);
          }
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const float2 w = __half22float2(sw[half]);
          const float2 start = make_float2(-kMagic * w.x, -kMagic * w.y);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            sums[half][t][i] =
                fmaf(scaled(inner[half][i], i < 2 ? w.x : w.y, i < 2 ? start.x : start.y), i % 2 ? s.y : s.x, sums[half][t][i]);
        }
      }
      ring.release();
    }
    const int token_tiles = ring.shares.token_tiles, first_output = tile / token_tiles * kChunkRows + first * 16;
    sum.store(p, sums, group % kWarps, first_output, tile % token_tiles, kExpandedUnit, turn);
    group -= p.groups;
    ++turn;
  }
};

template <int kTokenTiles, int kWarps, class TheRing, class TheSum, class Feed>
__device__ __forceinline__ void multiply(const Linear& p, TheRing& ring, TheSum& sum, const Feed& feed) {
  Multiply<kTokenTiles, kWarps, TheRing, TheSum, Feed> block{p, ring, sum, feed, ring.warp};
  const Shares& shares = ring.shares;
  int share = blockIdx.x;
  for (; share < shares.whole; share += gridDim.x) block.template tile<2>(share, 0);
  if (share < shares.count) block.template tile<1>(shares.tile(share), shares.half(share));
}

}  // namespace flexq
