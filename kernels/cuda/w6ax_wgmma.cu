// W6Ax for many tokens on Hopper: 6-bit weights become bytes in registers and meet the activations in shared memory (s8 wgmma).
//
// A block computes tiles of 128 or 192 outputs x kTokens tokens. One warp fetches and leaves; two or three warpgroups multiply, each 64
// outputs. Weights go from shared memory to registers, where a code costs 0.8 instructions to expand, and from there straight into the
// tensor cores: what is expanded is never stored. Then the sums are scaled and added in float32, three instructions a sum and group. With
// 256 tokens the tensor cores multiply 64 of them while the warpgroup adds the 64 before; three warpgroups have no registers for that, and
// multiply and add in turns. Two small blocks share a multiprocessor, so that one multiplies while the other waits; a large one takes one
// tile after the other: while sums are stored, the next tile's stages fill.
//
// What bounds it is the ports of the registers. The tensor cores read and write all sums of a k-step through them, and while they do, an
// instruction takes three cycles instead of 1.4. A group of a tile is 1024 cycles of tensor cores and 2 x 530 instructions a scheduler:
// 341 of these fit into those cycles, and the others take as long again. Without the conversions it would be 12% faster, but both ways
// to spare them cost as much: sums that start at kMagicBits are read once more, and sums that start at a product of constants, so large
// that none is negative and the bits are those of a denormal number, take a k-step more (in every second unit it gains 3%). With up to
// 128 tokens and two warpgroups the tensor cores have the time: there sums start at kMagicBits, which gains 1 to 3% (three lose 5%).
//
// Where a cluster of blocks is sooner done it shares the groups of a tile, or of half its tokens (see `Plan`), and each block adds up its
// share of the tokens from its neighbours' shared memory, in their order: the result does not depend on timing.
#include <cooperative_groups.h>

#include <algorithm>

#include "expand.cuh"
#include "kernels.h"
#include "layout.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace flexq {
namespace {

constexpr int kMostSplit = 6;    // blocks of a cluster
constexpr int kLeastGroups = 8;  // of a block of a cluster
constexpr int kMostRecordTokens = 128;
constexpr int kFileRegisters = 65536, kFetchRegisters = 24;  // of a multiprocessor; of a fetching thread
constexpr int kMultiprocessorBytes = 228 * 1024, kBlockBytes = 2 * 1024;  // of shared memory; what a block takes besides its stages

constexpr int whole_kib(int bytes) { return (bytes + 1023) / 1024 * 1024; }

// kUnit: tokens that are multiplied at once; with 192 rows there are registers for no more than one unit's sums of a group.
template <int kRows, int kTokens, int kUnit, int kStages>
struct Shape {
  static constexpr int kWarps = kRows / 16, kConsumers = kWarps * 32;
  static constexpr int kChunks = kRows / kChunkRows;
  static constexpr int kRecordTokens = kTokens < kMostRecordTokens ? kTokens : kMostRecordTokens, kRecords = kTokens / kRecordTokens;
  static constexpr int kRecordBytes = activation_record_bytes(Order::swizzled, 8, kRecordTokens / kTokenTile);
  // Swizzled operands begin at multiples of 1024 bytes, and so do every stage and every record in it; the chunks follow the last.
  static constexpr int kRecordStride = whole_kib(kRecordBytes), kChunksAt = (kRecords - 1) * kRecordStride + kRecordBytes;
  static constexpr int kStageBytes = whole_kib(kChunksAt + kChunks * kChunkBytes);
  static constexpr int kBlocksAtOnce = 2 * (kStages * (kStageBytes + 16) + kBlockBytes) <= kMultiprocessorBytes ? 2 : 1;
  static constexpr bool kManyTiles = kBlocksAtOnce == 1;  // a block can take more than one
  // From 64 tokens on the multiplying warps want more registers than their share: they take those of the fetching warp, for which it has a
  // warpgroup to itself, since registers move between whole ones only. __launch_bounds__ allots a multiple of 8.
  static constexpr bool kTakesRegisters = kManyTiles || kTokens >= 64;
  static constexpr bool kHalves = kRecords == 2;  // of a tile: a record each
  static constexpr int kThreads = kConsumers + (kTakesRegisters ? 128 : 32);
  static constexpr int kAllotted = kThreads * (kFileRegisters / (kThreads * kBlocksAtOnce) / 8 * 8);  // of a block
  static constexpr int kRegisters = kTakesRegisters ? (kAllotted - 128 * kFetchRegisters) / kConsumers / 8 * 8 : 0;
  static_assert(kRegisters <= 255, "as many as an instruction can name");
  static constexpr int kEarlyStages = kTokens == 16 ? 3 : 2;  // of weights, before activations are there: more would keep those waiting
  static constexpr int kTurnedTokens = kTokens == 256 ? 64 : kTokens > 16 ? 32 : 16;  // that are stored at once, as there is room
  static constexpr int kRowFours = kRows / 4, kSumStride = kRows + 4;  // floats; 8 q + g are 32 different banks
  static constexpr int kTurnedBytes = kManyTiles ? kTurnedTokens * 16 * 2 : 0;  // of a warp: two bytes for each of its 16 outputs
  static constexpr int kSharedBytes = kStages * (kStageBytes + 16) + kWarps * kTurnedBytes + 1024;
  static_assert(kRows % 64 == 0 && kConsumers % kRowFours == 0, "whole warpgroups, of which a thread adds up the same four outputs");
  static_assert(kTokens * kSumStride * 4 <= kStages * kStageBytes, "the sums fit where the stages were");
  static_assert(kEarlyStages < kStages, "the first stages are filled in their first turn");
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ / 100 == 9

// Stores a warp's sums of 16 outputs from `first_output` on x kCount tokens in two bytes each. Its registers hold pairs of tokens, memory
// wants neighbouring outputs: 8 x 8 sums at a time are turned on their way through `turned` (kCount x 16 numbers), where the two vectors
// of a token change places every four tokens, so that eight of either are in 32 different banks.
template <int kCount>
__device__ __forceinline__ void store_turned(const Linear& p, const float* sums, uint8_t* turned, int first_output, int first_token,
                                             const Finish (&finish)[2]) {
  const int lane = threadIdx.x % 32;
  const auto vector_at = [&](int token, int half) { return turned + token * 32 + (half ^ (token / 4 & 1)) * 16; };
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kCount / 8; j += 2) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* two = sums + 4 * (j + i / 2) + 2 * (i % 2);
      pairs[i] = pack_floats(p.y_type, finish[i % 2](two[0] * kExpandedUnit), finish[i % 2](two[1] * kExpandedUnit));
    }
    store_transposed(vector_at(8 * (j + lane / 16) + lane % 8, lane / 8 % 2), pairs);
  }
  __syncwarp();
  auto* y = static_cast<uint16_t*>(p.y) + int64_t(first_token) * p.outputs + first_output;
  if (p.outputs % 8 == 0) {
#pragma unroll
    for (int i = 0; i < kCount / 16; ++i) {
      const int token = 16 * i + lane / 2, output = lane % 2 * 8;
      if (first_token + token < p.tokens && first_output + output < p.outputs)
        *reinterpret_cast<uint4*>(y + int64_t(token) * p.outputs + output) = *reinterpret_cast<const uint4*>(vector_at(token, lane % 2));
    }
  } else {
    const int output = lane % 16;
    for (int token = lane / 16; token < kCount; token += 2)
      if (first_token + token < p.tokens && first_output + output < p.outputs)
        y[int64_t(token) * p.outputs + output] = reinterpret_cast<const uint16_t*>(vector_at(token, output / 8))[output % 8];
  }
}

__device__ __forceinline__ float4 operator+(const float4& a, const float4& b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

__device__ __forceinline__ float4 operator*(const float4& a, float b) { return make_float4(a.x * b, a.y * b, a.z * b, a.w * b); }

// The exponents of four neighbouring outputs, the first at a multiple of four, a byte each: to be looked at later.
__device__ __forceinline__ uint32_t load_four_exponents(const Linear& p, int n) {
  if (p.outputs % 4 == 0 && reinterpret_cast<uintptr_t>(p.exponent) % 4 == 0)
    return n < p.outputs ? *reinterpret_cast<const uint32_t*>(p.exponent + n) : 0;
  uint32_t four = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (n + i < p.outputs) four |= uint32_t(uint8_t(p.exponent[n + i])) << 8 * i;
  return four;
}

// The last step of four neighbouring outputs.
struct FinishFour {
  Finish of[4];

  __device__ __forceinline__ FinishFour(const Linear& p, int n, uint32_t exponents) {
#pragma unroll
    for (int i = 0; i < 4; ++i) of[i] = Finish(p, n + i, int8_t(exponents >> 8 * i));
  }

  __device__ __forceinline__ void store(const Linear& p, int token, int n, const float4& sum) const {
    if (token >= p.tokens || n >= p.outputs) return;
    const float4 x = sum * kExpandedUnit;
    const float y[4] = {of[0](x.x), of[1](x.y), of[2](x.z), of[3](x.w)};
    const int64_t at = int64_t(token) * p.outputs + n;
    if (p.outputs % 4 == 0) return store_four_floats(p.y, at, p.y_type, y);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (n + i < p.outputs) store_float(p.y, at + i, p.y_type, y[i]);
  }
};

// Adds up, in their order, a tile's sums of a cluster's kSplit blocks, and stores them: of a few tokens in every kSplit times as many.
// `sums` is [token][output] in each block's shared memory; neighbouring threads store neighbouring outputs, four each.
template <class Parts, int kTokens, int kSplit>
__device__ __forceinline__ void add_up_and_store(const Linear& p, float* sums, int first_output, int first_token, int rank,
                                                 const FinishFour& finish) {
  constexpr int kTogether = Parts::kConsumers / Parts::kRowFours, kStride = kTogether * kSplit;  // tokens
  constexpr int kMine = (kTokens + kStride - 1) / kStride;
  // A neighbour's memory is far: many parts are asked for before the first is needed. What is unrolled is run once, so that each line of
  // it is fetched from far as well: not too many.
  constexpr int kMostParts = 20, kMostAtOnce = 8;
  constexpr int kParts = (kMine * kSplit + kMostParts - 1) / kMostParts, kStores = (kMine + kMostAtOnce - 1) / kMostAtOnce;
  constexpr int kBatches = kParts > kStores ? kParts : kStores, kAtOnce = (kMine + kBatches - 1) / kBatches;
  const auto cluster = cooperative_groups::this_cluster();
  const int row = threadIdx.x % Parts::kRowFours * 4, first = threadIdx.x / Parts::kRowFours + rank * kTogether;
#pragma unroll 1
  for (int batch = 0; batch < kBatches; ++batch) {
    const int start = first + batch * kAtOnce * kStride;
    float4 parts[kAtOnce][kSplit];
#pragma unroll
    for (int r = 0; r < kSplit; ++r) {
      const float* from = (r == rank ? sums : cluster.map_shared_rank(sums, r)) + row;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int token = start + i * kStride;
        parts[i][r] = token < kTokens ? *reinterpret_cast<const float4*>(from + token * Parts::kSumStride) : float4{};
      }
    }
    if (kSplit > 1 && batch == kBatches - 1) cluster.barrier_arrive();  // it has read all
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int token = start + i * kStride;
      float4 sum = parts[i][0];
#pragma unroll
      for (int r = 1; r < kSplit; ++r) sum = sum + parts[i][r];
      if (token < kTokens) finish.store(p, first_token + token, first_output + row, sum);
    }
  }
  if (kSplit > 1) cluster.barrier_wait();  // nobody leaves while a neighbour reads from it
}

// Stores what all threads hold of a tile or of half its tokens, a block's own or its part in a cluster's: it goes through `shared`, where
// the stages were.
template <class Parts, int kTokens, int kUnit>
__device__ __forceinline__ void store_through_stages(const Linear& p, const float (*sums)[kUnit / 2],
                                                     uint8_t* shared, int first_output, int first_token, int split, int rank) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_of_four = first_output + threadIdx.x % Parts::kRowFours * 4;
  const uint32_t exponents = load_four_exponents(p, first_of_four);  // before the others are waited for
  threads_meet<Parts::kConsumers>();
  auto* buffer = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int unit = 0; unit < kTokens / kUnit; ++unit)
#pragma unroll
    for (int e = 0; e < kUnit / 2; ++e) {
      const int token = unit * kUnit + e / 4 * 8 + lane % 4 * 2 + e % 2, row = warp * 16 + lane / 4 + e % 4 / 2 * 8;
      buffer[token * Parts::kSumStride + row] = sums[unit][e];
    }
  if (split == 1)
    threads_meet<Parts::kConsumers>();
  else
    cooperative_groups::this_cluster().sync();  // threads that have left do not count
  const FinishFour finish(p, first_of_four, exponents);
  switch (split) {
    case 1: return add_up_and_store<Parts, kTokens, 1>(p, buffer, first_output, first_token, rank, finish);
    case 2: return add_up_and_store<Parts, kTokens, 2>(p, buffer, first_output, first_token, rank, finish);
    case 3: return add_up_and_store<Parts, kTokens, 3>(p, buffer, first_output, first_token, rank, finish);
    case 4: return add_up_and_store<Parts, kTokens, 4>(p, buffer, first_output, first_token, rank, finish);
    case 5: return add_up_and_store<Parts, kTokens, 5>(p, buffer, first_output, first_token, rank, finish);
    default: return add_up_and_store<Parts, kTokens, kMostSplit>(p, buffer, first_output, first_token, rank, finish);
  }
}

#endif

// How the blocks of a grid share the tiles of a call: each takes `whole` ones, one after the other, and then clusters of `split` blocks
// take what is left, a tile each, or with `halves` half a tile each: half its tokens.
struct Work {
  int token_tiles, tiles, split, whole;
  bool halves;
};

// What a block does in its turn: a tile alone, or its share of what its cluster has together, if anything is left for it: `tile` may be
// past the last. Of a tile by halves `half` is 0 or 1, of a whole one 0.
struct Turn {
  int tile, half, rank, first_group, groups;

  __device__ __forceinline__ Turn(const Linear& p, const Work& work, int turn) {
    const bool alone = turn < work.whole;
    const int parts = alone ? 1 : work.split, mine = blockIdx.x / parts;
    const bool by_halves = work.halves && !alone;
    rank = alone ? 0 : blockIdx.x % parts;
    tile = turn * gridDim.x + (by_halves ? mine / 2 : mine);
    half = by_halves ? mine % 2 : 0;
    first_group = p.groups * rank / parts, groups = p.groups * (rank + 1) / parts - first_group;
  }
};

template <int kRows, int kTokens, int kUnit, int kStages>
__global__ void __launch_bounds__(Shape<kRows, kTokens, kUnit, kStages>::kThreads, Shape<kRows, kTokens, kUnit, kStages>::kBlocksAtOnce)
    w6ax_wgmma_kernel(const __grid_constant__ Linear p, const __grid_constant__ Work work) {
#if __CUDA_ARCH__ / 100 == 9  // the host never launches it elsewhere
  using Parts = Shape<kRows, kTokens, kUnit, kStages>;
  constexpr int kUnits = kTokens / kUnit, kUnitsOfRecord = kUnits / Parts::kRecords, kBuffers = kUnits > 1 && kRows == 128 ? 2 : 1;
  constexpr bool kMagicStart = kTokens <= 128 && kRows == 128;
  // Of a stage's bytes.
  const auto codes_at = [](int unit) { return unit / kUnitsOfRecord * Parts::kRecordStride + unit % kUnitsOfRecord * kUnit * kGroup; };
  const auto scales_at = [](int unit) { return unit / kUnitsOfRecord * Parts::kRecordStride + unit % kUnitsOfRecord * kUnit * 4; };
  // Vectors of scales that are read before the sums are waited for: as many as registers are left for.
  constexpr int kEarlyScales = kTokens == 256 ? 2 : kTokens == 128 ? kUnit / 16 : 0;
  extern __shared__ uint8_t unaligned[];
  uint8_t* shared = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  uint8_t* turned = shared + kStages * Parts::kStageBytes;
  auto* full = reinterpret_cast<uint64_t*>(turned + Parts::kWarps * Parts::kTurnedBytes);
  uint64_t* empty = full + kStages;
  allow_next_kernel();

  // The same in all lanes, as the compiler sees, and the lane not to be asked for again: in the loop registers are short.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  int lane = threadIdx.x % 32;
  asm volatile("" : "+r"(lane));
  const int g = lane / 4, q = lane % 4;
  if (threadIdx.x == 0) {  // a stage is empty when every multiplying thread has said that it has read it: no warp waits for its lanes
    for (int s = 0; s < kStages; ++s) barrier_init(full + s, 1), barrier_init(empty + s, Parts::kConsumers);
    barriers_are_ready();
  }
  __syncthreads();

  if (warp >= Parts::kWarps) {
    if constexpr (Parts::kRegisters > 0) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kFetchRegisters));
    if (warp > Parts::kWarps) return;
    const uint64_t policy = work.token_tiles == 1 ? evict_first() : evict_last();
    int stage = 0, parity = 0;
    for (int turn = 0; turn <= work.whole; ++turn) {
      const Turn now(p, work, turn);
      const int tile = now.tile, first_group = now.first_group, groups = now.groups;
      if (tile >= work.tiles) break;
      // Lane c fetches chunk c of the tile's outputs; past the last outputs the last chunk is read again, and nothing of it is stored.
      const int chunk = min(tile / work.token_tiles * Parts::kChunks + lane, (p.outputs - 1) / kChunkRows);
      const uint8_t* weights = p.weight + (int64_t(chunk) * p.groups + first_group) * kChunkBytes;
      // Of two records of tokens the second may be past the last: then the first is read again, for a half as well.
      const bool by_halves = Parts::kHalves && work.halves && turn == work.whole;
      const int records_at_once = by_halves ? 1 : Parts::kRecords;
      const int first_record = tile % work.token_tiles * Parts::kRecords;
      const bool both = (first_record + 1) * Parts::kRecordTokens < p.tokens;
      const int record = first_record + (both ? now.half : 0);
      const uint8_t* records = p.activations + (int64_t(record) * p.groups + first_group) * Parts::kRecordBytes;
      const uint8_t* second = records + (both ? int64_t(p.groups) * Parts::kRecordBytes : 0);
      const auto fetch_weights = [&](int s) {
        if (lane == 0) barrier_expect(full + s, records_at_once * Parts::kRecordBytes + Parts::kChunks * kChunkBytes);
        __syncwarp();
        uint8_t* const to = shared + s * Parts::kStageBytes + Parts::kChunksAt + lane * kChunkBytes;
        if (lane < Parts::kChunks) bulk_copy(to, weights, kChunkBytes, full + s, policy);
        weights += kChunkBytes;
      };
      const auto fetch_records = [&](int s) {
        uint8_t* const to = shared + s * Parts::kStageBytes;
        if (lane == 0) {  // all by one lane: copies of several are 2% slower
          bulk_copy(to, records, Parts::kRecordBytes, full + s);
          if (Parts::kRecords == 2 && !by_halves) bulk_copy(to + Parts::kRecordStride, second, Parts::kRecordBytes, full + s);
        }
        records += Parts::kRecordBytes, second += Parts::kRecordBytes;
      };
      int left = groups;
      if (turn == 0) {  // weights do not depend on the kernel before, activations do
        const int at_once = min(groups, Parts::kEarlyStages);
        for (int s = 0; s < at_once; ++s) fetch_weights(s);
        wait_for_previous_kernel();
        for (int s = 0; s < at_once; ++s) fetch_records(s);
        left -= at_once, stage = at_once;
      }
      for (; left > 0; --left) {
        barrier_wait(empty + stage, parity ^ 1);  // of a stage never filled: at once
        fetch_weights(stage);
        fetch_records(stage);
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
      if constexpr (!Parts::kManyTiles) break;
    }
  } else {
    if constexpr (Parts::kRegisters > 0) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Parts::kRegisters));
    const int chunk_at = Parts::kChunksAt + warp / 2 * kChunkBytes;  // this warp's half chunk: rows 16 * warp of the tile
    wait_for_previous_kernel();  // which activations are waited for anyway; exponents and bias may be of it, too
    float sums[kUnits][kUnit / 2];
    int32_t inner[kBuffers][kUnit / 2];  // of units in turn: while the tensor cores fill one, the other is scaled and added
    uint32_t words[12], a[4][4];
    int stage = 0, parity = 0;
    const uint8_t* here = shared;
    const auto load_words = [&] {
      barrier_wait(full + stage, parity);
      load_half(here + chunk_at, warp % 2, lane, words);
    };
    // Sums of the next so many groups, of the first kCount units of a tile.
    const auto add_groups = [&](auto units, int groups) {
      constexpr int kCount = decltype(units)::value;
#pragma unroll
      for (int unit = 0; unit < kCount; ++unit)
#pragma unroll
        for (int e = 0; e < kUnit / 2; ++e) sums[unit][e] = 0.0f;
      load_words();
      for (int step = 0; step < groups; ++step) {
        const float2 sw = __half22float2(*reinterpret_cast<const __half2*>(here + chunk_at + kHalfBytes + g * 8 + warp % 2 * 4));
        const float2 start = make_float2(-kMagic * sw.x, -kMagic * sw.y);
        const uint8_t* sx = here + Parts::kRecordTokens * kGroup + q * 16;
        const uint64_t tokens = swizzled_operand(shared_address(here));
        const auto multiply = [&](int unit) {
          int32_t(&sum)[kUnit / 2] = inner[unit % kBuffers];
          if constexpr (kMagicStart) {
#pragma unroll
            for (int e = 0; e < kUnit / 2; ++e) sum[e] = kMagicBits;
            keep_in_place(sum);
          }
          wgmma_fence();
#pragma unroll
          for (int s = 0; s < 4; ++s) wgmma_s8<kUnit>(sum, a[s], tokens + (codes_at(unit) + 32 * s) / 16, kMagicStart || s > 0);
          wgmma_commit();
        };
        uint64_t* const done = empty + stage;
#pragma unroll
        for (int s = 0; s < 4; ++s) expand(words, s, a[s]);
        multiply(0);
#pragma unroll
        for (int unit = 0; unit < kCount; ++unit) {
          int32_t(&sum)[kUnit / 2] = inner[unit % kBuffers];
          const auto* scales = reinterpret_cast<const float4*>(sx + scales_at(unit));  // of tokens 16 j + 2 q, + 1, + 8 and + 9 at 4 j
          float4 early[kEarlyScales + 1];                                              // an array of none is no C++
#pragma unroll
          for (int j = 0; j < kEarlyScales; ++j) early[j] = scales[4 * j];
          if (unit + 1 == kCount) {
            here += Parts::kStageBytes;
            if (++stage == kStages) stage = 0, parity ^= 1, here = shared;
            if (step + 1 < groups) load_words();
          }
          if (kBuffers > 1 && unit + 1 < kCount) {
            multiply(unit + 1);
            wgmma_wait<1>(sum);
          } else {
            wgmma_wait<0>(sum);
          }
          float scaled_sum[kUnit / 2];
#pragma unroll
          for (int e = 0; e < kUnit / 2; ++e)
            scaled_sum[e] = kMagicStart ? scaled(sum[e], e % 4 < 2 ? sw.x : sw.y, e % 4 < 2 ? start.x : start.y)
                                        : __int2float_rn(sum[e]) * (e % 4 < 2 ? sw.x : sw.y);
#pragma unroll
          for (int j = 0; j < kUnit / 16; ++j) {
            const float4 of_four = j < kEarlyScales ? early[j] : scales[4 * j];
            const float s[4] = {of_four.x, of_four.y, of_four.z, of_four.w};
#pragma unroll
            for (int i = 0; i < 8; ++i) sums[unit][8 * j + i] = fmaf(scaled_sum[8 * j + i], s[i / 4 * 2 + i % 2], sums[unit][8 * j + i]);
          }
          if (kBuffers == 1 && unit + 1 < kCount) multiply(unit + 1);
        }
        barrier_arrive(done);
      }
    };
    for (int turn = 0; turn <= work.whole; ++turn) {
      const Turn now(p, work, turn);
      if (now.tile >= work.tiles) break;
      const int first_output = now.tile / work.token_tiles * kRows, first_token = now.tile % work.token_tiles * kTokens;
      if constexpr (Parts::kHalves) {
        if (turn == work.whole && work.halves) {
          add_groups(std::integral_constant<int, kUnits / 2>(), now.groups);
          const int first_of_half = first_token + now.half * (kTokens / 2);
          store_through_stages<Parts, kTokens / 2, kUnit>(p, sums, shared, first_output, first_of_half, work.split, now.rank);
          break;
        }
      }
      add_groups(std::integral_constant<int, kUnits>(), now.groups);
      if constexpr (Parts::kManyTiles) {
        if (turn < work.whole) {
          const int output = first_output + warp * 16;
          const Finish finish[2] = {{p, output + g}, {p, output + g + 8}};
          constexpr int kAtOnce = Parts::kTurnedTokens;
#pragma unroll
          for (int unit = 0; unit < kUnits; ++unit)
#pragma unroll
            for (int first = 0; first < kUnit; first += kAtOnce)
              store_turned<kAtOnce>(p, sums[unit] + first / 2, turned + warp * Parts::kTurnedBytes, output,
                                    first_token + unit * kUnit + first, finish);
          continue;
        }
      }
      store_through_stages<Parts, kTokens, kUnit>(p, sums, shared, first_output, first_token, work.split, now.rank);
      break;
    }
  }
#endif
}

// How the tiles of a call are shared, and how long all take, 0 where no block can run.
struct Plan {
  Tiling tiling;
  float time;
  void (*run)(const Linear&, const Tiling&, cudaStream_t);
};

// kGroupTime: how long a group of a tile takes on an H200, in ns.
template <int kRows, int kTokens, int kUnit, int kStages, int kGroupTime>
struct Variant {
  using Parts = Shape<kRows, kTokens, kUnit, kStages>;
  static constexpr auto kKernel = w6ax_wgmma_kernel<kRows, kTokens, kUnit, kStages>;
  // As long as so many groups takes all else of a tile that a block takes alone or shares with its cluster. With kGroupTime, times of the
  // paper's layers in every cluster that can run follow within 3%, those of small blocks within 4 to 10%.
  static constexpr float kAloneGroups = Parts::kManyTiles ? 4.4f : 6.5f;
  static constexpr float kSharedGroups = kTokens == 256 ? 7.7f : Parts::kManyTiles ? 9.0f : 7.0f;
  static constexpr float kHalfTime = 0.62f;  // of a shared tile's, by halves

  static int token_tiles(const Linear& p) { return (p.tokens + kTokens - 1) / kTokens; }
  static int tiles(const Linear& p) { return (p.outputs + kRows - 1) / kRows * token_tiles(p); }

  static int clusters(int split) {
    return split == 1 ? blocks_at_once("w6ax_wgmma", kKernel, Parts::kThreads, Parts::kSharedBytes)
                      : clusters_at_once("w6ax_wgmma", kKernel, Parts::kThreads, Parts::kSharedBytes, split);
  }

  static Plan plan(const Linear& p) {
    // Float32 outputs are stored through the stages, so that a block has no more than one tile of them.
    const bool many_tiles = Parts::kManyTiles && p.y_type != Float::f32;
    const float alone = kGroupTime * (p.groups + kAloneGroups);
    Plan best{};
    const auto consider = [&](int split, int whole, bool halves, float time) {
      if (best.time == 0.0f || time < best.time) best = {{kRows, kTokens, split, whole, halves}, time, run};
    };
    // Alone first: whether a block fits the card is asked there, once for all.
    for (int split = 1; split <= kMostSplit && (split == 1 || p.groups >= kLeastGroups * split); ++split) {
      const int at_once = clusters(split), count = tiles(p);
      if (at_once == 0) break;
      const int rounds = (count + at_once - 1) / at_once;
      if (split == 1) {
        consider(1, many_tiles ? rounds : 0, false, rounds * alone);
        continue;
      }
      // Whole tiles while there is one for every block, and what is left shared, by halves if there are clusters for all; or every tile
      // shared, as many as run at once in a round.
      const float shared = kGroupTime * ((p.groups + split - 1) / split + kSharedGroups);
      const int whole = count / (at_once * split), left = count % (at_once * split);
      if (many_tiles && whole > 0 && left <= at_once) consider(split, whole, false, whole * alone + (left > 0 ? shared : 0.0f));
      if (Parts::kHalves && many_tiles && whole > 0 && left > 0 && 2 * left <= at_once)
        consider(split, whole, true, whole * alone + kHalfTime * shared);
      if (rounds == 1 || Parts::kManyTiles) consider(split, 0, false, rounds * shared);  // small clusters' second round finds few places
    }
    return best;
  }

  static void run(const Linear& p, const Tiling& tiling, cudaStream_t stream) {
    const int blocks = std::min(tiling.whole > 0 ? clusters(tiling.split) : tiles(p), tiles(p)) * tiling.split;
    const Work work{token_tiles(p), tiles(p), tiling.split, tiling.whole, tiling.halves};
    launch("w6ax_wgmma", kKernel, dim3(blocks), Parts::kThreads, Parts::kSharedBytes, tiling.split, stream, p, work);
  }
};

template <class... Variants>
Plan fastest_of(const Linear& p) {
  Plan best{};
  const auto consider = [&](const Plan& plan) {
    if (plan.time > 0.0f && (best.time == 0.0f || plan.time < best.time)) best = plan;
  };
  (consider(Variants::plan(p)), ...);
  if (best.time == 0.0f) throw std::runtime_error("w6ax_wgmma: this card has too little shared memory");
  return best;
}

Plan fastest(const Linear& p, int token_tiles) {
  if (device_attribute("w6ax_wgmma", cudaDevAttrComputeCapabilityMajor) != 9)
    throw std::invalid_argument("w6ax_wgmma needs a card of compute capability 9; this one has imma and bmma");
  switch (token_tiles) {  // with few tokens small blocks, two at once, or a large one, which takes many tiles
    case 2: return fastest_of<Variant<128, 16, 16, 5, 570>, Variant<128, 16, 16, 14, 360>>(p);
    case 4: return fastest_of<Variant<128, 32, 32, 5, 590>, Variant<128, 32, 32, 12, 380>>(p);
    case 8: return fastest_of<Variant<128, 64, 64, 5, 690>, Variant<128, 64, 64, 10, 440>, Variant<192, 64, 64, 7, 610>>(p);
    case 16:  // larger tiles read less, smaller ones are sooner done where there are few
      return fastest_of<Variant<128, 128, 128, 7, 660>, Variant<128, 256, 64, 4, 1090>, Variant<192, 128, 64, 6, 890>>(p);
    default: throw std::invalid_argument("token_tiles is " + std::to_string(token_tiles) + "; accepted: 2, 4, 8, 16");
  }
}

}  // namespace

Tiling w6ax_wgmma_tiling(const Linear& p, int token_tiles) { return fastest(p, token_tiles).tiling; }

void w6ax_wgmma(const Linear& p, int token_tiles, cudaStream_t stream) {
  const Plan plan = fastest(p, token_tiles);
  plan.run(p, plan.tiling, stream);
}

}  // namespace flexq
