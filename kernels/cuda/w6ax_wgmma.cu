// W6Ax for many tokens on Hopper: 6-bit weights become bytes in registers and meet the activations in shared memory (s8 wgmma).
//
// A block computes tiles of 128 outputs x kTokens tokens. One warp fetches and leaves; a team of two warpgroups multiplies, each 64
// outputs, or two teams that take the groups in turn. Weights go from shared memory to registers, where a code costs 0.8 instructions to
// expand, and from there straight into the tensor cores: what is expanded is never stored. Then the sums are scaled and added in float32,
// three instructions a sum and group. With 256 tokens the tensor cores multiply 64 of them while the warpgroup adds the 64 before, and a
// block takes one tile after the other: while sums are stored, the next tile's stages fill.
//
// What bounds it is the ports of the registers. The tensor cores read and write all sums of a k-step through them, and while they do, an
// instruction takes three cycles instead of 1.4. A group of a tile is 1024 cycles of tensor cores and 2 x 530 instructions a scheduler:
// 341 of these fit into those cycles, and the others take as long again. Without the conversions it would be 12% faster, but both ways
// to spare them cost as much: sums that start at kMagicBits are read once more, and sums that start at a product of constants, so large
// that none is negative and the bits are those of a denormal number, take a k-step more (in every second unit it gains 3%). With up to
// 128 tokens the tensor cores have the time: there sums start at kMagicBits, which gains 1 to 3%.
//
// Where a cluster of blocks is sooner done it shares the groups of a tile (see `Plan`), and each block adds up its share of the tokens from
// its neighbours' shared memory, in their order: the result does not depend on timing.
#include <cooperative_groups.h>

#include "expand.cuh"
#include "kernels.h"
#include "layout.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace flexq {
namespace {

constexpr int kRows = 128;       // of a tile
constexpr int kTeamWarps = 8;    // two warpgroups
constexpr int kMostSplit = 8;    // blocks of a cluster
constexpr int kLeastGroups = 8;  // of a team, in a cluster
constexpr int kMostRecordTokens = 128;
constexpr int kFileRegisters = 65536, kFetchRegisters = 24;  // of a multiprocessor; of a fetching thread

constexpr int whole_kib(int bytes) { return (bytes + 1023) / 1024 * 1024; }

// kUnit: tokens that are multiplied at once.  kTeams: of two warpgroups each, which take the groups in turn.
template <int kTokens, int kUnit, int kTeams, int kStages>
struct Shape {
  static constexpr int kConsumerWarps = kTeams * kTeamWarps, kConsumers = kConsumerWarps * 32;
  // With up to 64 tokens two blocks fit a multiprocessor, or one of two teams, and one multiplies while the other waits. From 64 on the
  // multiplying warps want more registers than their share: they take those of the fetching warp, for which it has a warpgroup to itself,
  // since registers move between whole ones only.
  static constexpr int kRegisters = kTokens >= 128 ? 240 : kTokens < 64 ? 0 : kTeams == 2 ? 112 : 104;  // 0: as the compiler allots them
  static constexpr int kThreads = kConsumers + (kRegisters ? 128 : 32), kBlocksAtOnce = kTokens >= 128 || kTeams == 2 ? 1 : 2;
  // As __launch_bounds__ allots them, a multiple of 8; the fetching warpgroup keeps kFetchRegisters.
  static constexpr int kAllotted = kFileRegisters / (kThreads * kBlocksAtOnce) / 8 * 8;
  static_assert(kConsumers * kRegisters + 128 * kFetchRegisters <= kThreads * kAllotted, "no warp waits for registers for ever");
  static constexpr bool kManyTiles = kTokens == 256;  // a block takes more than one where there are more than blocks at once
  // Time of a group, and of all else that a tile takes, in that of a group of one team and up to 128 tokens: as an H200's times of the
  // paper's layers, in clusters of 1 to 8 blocks, have it.
  static constexpr float kGroupTime = kTokens == 256 ? 1.63f : kTeams == 2 ? 0.65f : 1.0f, kTileTime = kTokens == 256 ? 27.0f : 17.0f;
  static constexpr int kChunks = kRows / kChunkRows;
  static constexpr int kRecordTokens = kTokens < kMostRecordTokens ? kTokens : kMostRecordTokens, kRecords = kTokens / kRecordTokens;
  static constexpr int kRecordBytes = activation_record_bytes(Order::swizzled, 8, kRecordTokens / kTokenTile);
  // Swizzled operands begin at multiples of 1024 bytes, and so do every stage and every record in it; the chunks follow the last.
  static constexpr int kRecordStride = whole_kib(kRecordBytes), kChunksAt = (kRecords - 1) * kRecordStride + kRecordBytes;
  static constexpr int kStageBytes = whole_kib(kChunksAt + kChunks * kChunkBytes);
  static constexpr int kSumStride = kRows + 4;  // floats; 8 q + g are 32 different banks
  static constexpr int kTeamSums = kTokens * kSumStride;
  static constexpr int kTurnedBytes = kManyTiles ? kUnit * 16 * 2 : 0;  // of a warp: a unit of its 16 outputs, two bytes each
  static constexpr int kSharedBytes = kStages * (kStageBytes + 16) + kTeamWarps * kTurnedBytes + 1024;
  static_assert(kTeams * kTeamSums * 4 <= kStages * kStageBytes, "the sums fit where the stages were");
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Stores a warp's sums of 16 outputs from `first_output` on x kUnit tokens in two bytes each. Its registers hold pairs of tokens, memory
// wants neighbouring outputs: 8 x 8 sums at a time are turned on their way through `turned` (kUnit x 16 numbers), where the two vectors
// of a token change places every four tokens, so that eight of either are in 32 different banks.
template <int kUnit>
__device__ __forceinline__ void store_turned(const Linear& p, const float (&sums)[kUnit / 2], uint8_t* turned, int first_output,
                                             int first_token, const Finish (&finish)[2]) {
  const int lane = threadIdx.x % 32;
  const auto vector_at = [&](int token, int half) { return turned + token * 32 + (half ^ (token / 4 & 1)) * 16; };
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kUnit / 8; j += 2) {
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
    for (int i = 0; i < kUnit / 16; ++i) {
      const int token = 16 * i + lane / 2, output = lane % 2 * 8;
      if (first_token + token < p.tokens && first_output + output < p.outputs)
        *reinterpret_cast<uint4*>(y + int64_t(token) * p.outputs + output) = *reinterpret_cast<const uint4*>(vector_at(token, lane % 2));
    }
  } else {
    const int output = lane % 16;
    for (int token = lane / 16; token < kUnit; token += 2)
      if (first_token + token < p.tokens && first_output + output < p.outputs)
        y[int64_t(token) * p.outputs + output] = reinterpret_cast<const uint16_t*>(vector_at(token, output / 8))[output % 8];
  }
}

__device__ __forceinline__ float4 operator+(const float4& a, const float4& b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

__device__ __forceinline__ float4 operator*(const float4& a, float b) { return make_float4(a.x * b, a.y * b, a.z * b, a.w * b); }

// The last step of four neighbouring outputs, the first at a multiple of four.
struct FinishFour {
  Finish of[4];

  __device__ __forceinline__ FinishFour(const Linear& p, int n) : of{{p, n}, {p, n + 1}, {p, n + 2}, {p, n + 3}} {}

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

constexpr int kRowFours = kRows / 4;

// Adds up a tile's sums of a block's teams and of a cluster's blocks, and stores them. They go through `shared`, [token][output], so that
// neighbouring threads store neighbouring outputs, four each. `finish` is that of outputs 4 (threadIdx.x % kRowFours) and on of the tile.
template <int kTokens, int kUnit, int kTeams, int kStages>
__device__ __forceinline__ void add_up_and_store(const Linear& p, const float (&sums)[kTokens / kUnit][kUnit / 2], uint8_t* shared,
                                                 int first_output, int first_token, int split, int rank, const FinishFour& finish) {
  using Parts = Shape<kTokens, kUnit, kTeams, kStages>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = warp / kTeamWarps;
  const auto cluster = cooperative_groups::this_cluster();
  threads_meet<Parts::kConsumers>();
  auto* buffer = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int unit = 0; unit < kTokens / kUnit; ++unit)
#pragma unroll
    for (int e = 0; e < kUnit / 2; ++e) {
      const int token = unit * kUnit + e / 4 * 8 + lane % 4 * 2 + e % 2, row = warp % kTeamWarps * 16 + lane / 4 + e % 4 / 2 * 8;
      buffer[team * Parts::kTeamSums + token * Parts::kSumStride + row] = sums[unit][e];
    }
  if (split == 1)
    threads_meet<Parts::kConsumers>();
  else
    cluster.sync();  // threads that have left do not count
  const int row = threadIdx.x % kRowFours * 4;
  constexpr int kAtOnce = Parts::kConsumers / kRowFours;  // tokens
  const auto teams_sum = [&](const float* sums_of_block, int m) {
    const auto* at = reinterpret_cast<const float4*>(sums_of_block + m * Parts::kSumStride + row);
    return kTeams == 1 ? at[0] : at[0] + at[Parts::kTeamSums / 4];
  };
  const auto finish_token = [&](int m, const float4& sum) { finish.store(p, first_token + m, first_output + row, sum); };
  if (split == 1) {
#pragma unroll 4
    for (int m = threadIdx.x / kRowFours; m < kTokens; m += kAtOnce) finish_token(m, teams_sum(buffer, m));
  } else {
    // All parts of several tokens are asked for before the first is needed: a neighbour's memory is far.
    constexpr int kBatch = kTokens >= 128 ? 4 : 1;
    const int stride = split * kAtOnce;
    for (int first = rank * kAtOnce + threadIdx.x / kRowFours; first < kTokens; first += kBatch * stride) {
      float4 parts[kBatch][kMostSplit];
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
#pragma unroll
        for (int r = 0; r < kMostSplit; ++r) {
          const int m = first + i * stride;
          parts[i][r] = r < split && m < kTokens ? teams_sum(cluster.map_shared_rank(buffer, r), m) : float4{};
        }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        float4 sum = {};
#pragma unroll
        for (int r = 0; r < kMostSplit; ++r) sum = sum + parts[i][r];
        if (first + i * stride < kTokens) finish_token(first + i * stride, sum);
      }
    }
    cluster.sync();  // nobody leaves while a neighbour reads from it
  }
}

#endif

template <int kTokens, int kUnit, int kTeams, int kStages>
__global__ void __launch_bounds__(Shape<kTokens, kUnit, kTeams, kStages>::kThreads, Shape<kTokens, kUnit, kTeams, kStages>::kBlocksAtOnce)
    w6ax_wgmma_kernel(const __grid_constant__ Linear p, int token_tiles, int tiles, int split) {
#if __CUDA_ARCH__ >= 900  // the host never launches it elsewhere
  using Parts = Shape<kTokens, kUnit, kTeams, kStages>;
  constexpr int kUnits = kTokens / kUnit, kUnitsOfRecord = kUnits / Parts::kRecords, kBuffers = kUnits > 1 ? 2 : 1;
  constexpr bool kMagicStart = kTokens <= 128;
  constexpr bool kLateFinish = kTokens >= 64;  // with many tokens registers are short, and time is not
  // Of a stage's bytes.
  const auto codes_at = [](int unit) { return unit / kUnitsOfRecord * Parts::kRecordStride + unit % kUnitsOfRecord * kUnit * kGroup; };
  const auto scales_at = [](int unit) { return unit / kUnitsOfRecord * Parts::kRecordStride + unit % kUnitsOfRecord * kUnit * 4; };
  // Vectors of scales that are read before the sums are waited for: as many as registers are left for.
  constexpr int kEarlyScales = kTokens == 256 ? 2 : kTokens == 128 ? kUnit / 16 : 0;
  extern __shared__ uint8_t unaligned[];
  uint8_t* shared = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  uint8_t* turned = shared + kStages * Parts::kStageBytes;
  auto* full = reinterpret_cast<uint64_t*>(turned + kTeamWarps * Parts::kTurnedBytes);
  uint64_t* empty = full + kStages;
  allow_next_kernel();

  const int rank = blockIdx.x % split, first_tile = blockIdx.x / split, next_tile = gridDim.x / split;
  const int first_group = p.groups * rank / split, groups = p.groups * (rank + 1) / split - first_group;
  // The same in all lanes, as the compiler sees, and the lane not to be asked for again: in the loop registers are short.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  int lane = threadIdx.x % 32;
  asm volatile("" : "+r"(lane));
  const int g = lane / 4, q = lane % 4;
  if (threadIdx.x == 0) {  // a stage is empty when every thread of a team has said that it has read it: no warp waits for its lanes
    for (int s = 0; s < kStages; ++s) barrier_init(full + s, 1), barrier_init(empty + s, kTeamWarps * 32);
    barriers_are_ready();
  }
  __syncthreads();

  if (warp >= Parts::kConsumerWarps) {
    if constexpr (Parts::kRegisters > 0) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kFetchRegisters));
    if (warp > Parts::kConsumerWarps) return;
    const uint64_t policy = token_tiles == 1 ? evict_first() : evict_last();
    int stage = 0, parity = 0;
    for (int tile = first_tile; tile < tiles; tile += next_tile) {
      // Lane c fetches chunk c of the tile's outputs; past the last outputs the last chunk is read again, and nothing of it is stored.
      const int chunk = min(tile / token_tiles * Parts::kChunks + lane, (p.outputs - 1) / kChunkRows);
      const uint8_t* weights = p.weight + (int64_t(chunk) * p.groups + first_group) * kChunkBytes;
      // Of two records of tokens the second may be past the last: then the first is read again.
      const int record = tile % token_tiles * Parts::kRecords;
      const bool both = (record + 1) * Parts::kRecordTokens < p.tokens;
      const uint8_t* records = p.activations + (int64_t(record) * p.groups + first_group) * Parts::kRecordBytes;
      const uint8_t* second = records + (both ? int64_t(p.groups) * Parts::kRecordBytes : 0);
      const auto fetch_weights = [&](int s) {
        if (lane == 0) barrier_expect(full + s, Parts::kRecords * Parts::kRecordBytes + Parts::kChunks * kChunkBytes);
        __syncwarp();
        uint8_t* const to = shared + s * Parts::kStageBytes + Parts::kChunksAt + lane * kChunkBytes;
        if (lane < Parts::kChunks) bulk_copy(to, weights, kChunkBytes, full + s, policy);
        weights += kChunkBytes;
      };
      const auto fetch_records = [&](int s) {
        uint8_t* const to = shared + s * Parts::kStageBytes;
        if (lane == 0) {  // all by one lane: copies of several are 2% slower
          bulk_copy(to, records, Parts::kRecordBytes, full + s);
          if constexpr (Parts::kRecords == 2) bulk_copy(to + Parts::kRecordStride, second, Parts::kRecordBytes, full + s);
        }
        records += Parts::kRecordBytes, second += Parts::kRecordBytes;
      };
      int left = groups;
      if (tile == first_tile) {  // weights do not depend on the kernel before, activations do
        const int at_once = min(groups, kStages);
        for (int s = 0; s < at_once; ++s) fetch_weights(s);
        wait_for_previous_kernel();
        for (int s = 0; s < at_once; ++s) fetch_records(s);
        left -= at_once, stage = at_once;
        if (stage == kStages) stage = 0, parity ^= 1;
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
    // This warp's half chunk: rows 64 * warpgroup + 16 (warp % 4) of the tile.
    const int team = kTeams == 1 ? 0 : warp / kTeamWarps, warpgroup = warp % kTeamWarps / 4;
    const int warp_row = warpgroup * 64 + warp % 4 * 16;
    const int chunk_at = Parts::kChunksAt + (warpgroup * 2 + warp % 4 / 2) * kChunkBytes;
    float sums[kUnits][kUnit / 2];
    int32_t inner[kBuffers][kUnit / 2];  // of units in turn: while the tensor cores fill one, the other is scaled and added
    uint32_t words[12], a[4][4];
    int stage = team, parity = 0;
    const uint8_t* here = shared + stage * Parts::kStageBytes;
    const auto load_words = [&] {
      barrier_wait(full + stage, parity);
      load_half(here + chunk_at, warp % 2, lane, words);
    };
    for (int tile = first_tile; tile < tiles; tile += next_tile) {
      const auto finish_of_thread = [&] { return FinishFour(p, tile / token_tiles * kRows + threadIdx.x % kRowFours * 4); };
      const FinishFour early_finish = kLateFinish ? FinishFour(p, p.outputs) : finish_of_thread();
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit)
#pragma unroll
        for (int e = 0; e < kUnit / 2; ++e) sums[unit][e] = 0.0f;
      if (team < groups) load_words();
      for (int step = team; step < groups; step += kTeams) {
        const float2 sw = __half22float2(*reinterpret_cast<const __half2*>(here + chunk_at + kCodeBytes + g * 8 + warp % 2 * 4));
        const float2 start = make_float2(-kMagic * sw.x, -kMagic * sw.y);
        const uint8_t* sx = here + Parts::kRecordTokens * kGroup + q * 16;
        const uint64_t tokens = swizzled_operand(shared_address(here));
        const auto multiply = [&](int unit) {
          int32_t(&sum)[kUnit / 2] = inner[unit % kBuffers];
          if constexpr (kMagicStart)
#pragma unroll
            for (int e = 0; e < kUnit / 2; ++e) sum[e] = kMagicBits;
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
        for (int unit = 0; unit < kUnits; ++unit) {
          int32_t(&sum)[kUnit / 2] = inner[unit % kBuffers];
          const auto* scales = reinterpret_cast<const float4*>(sx + scales_at(unit));  // of tokens 16 j + 2 q, + 1, + 8 and + 9 at 4 j
          float4 early[kEarlyScales + 1];                                              // an array of none is no C++
#pragma unroll
          for (int j = 0; j < kEarlyScales; ++j) early[j] = scales[4 * j];
          if (unit + 1 < kUnits) {
            multiply(unit + 1);
            wgmma_wait<1>(sum);
          } else {
            stage += kTeams, here += kTeams * Parts::kStageBytes;
            if (stage >= kStages) stage -= kStages, parity ^= 1, here -= kStages * Parts::kStageBytes;
            if (step + kTeams < groups) load_words();
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
        }
        barrier_arrive(done);
      }
      wait_for_previous_kernel();

      const int first_output = tile / token_tiles * kRows, first_token = tile % token_tiles * kTokens;
      if constexpr (Parts::kManyTiles) {
        if (split == 1 && p.y_type != Float::f32) {
          const int output = first_output + warp_row;
          const Finish finish[2] = {{p, output + g}, {p, output + g + 8}};
#pragma unroll
          for (int unit = 0; unit < kUnits; ++unit)
            store_turned<kUnit>(p, sums[unit], turned + warp * Parts::kTurnedBytes, output, first_token + unit * kUnit, finish);
          continue;
        }
      }
      add_up_and_store<kTokens, kUnit, kTeams, kStages>(p, sums, shared, first_output, first_token, split, rank,
                                                        kLateFinish ? finish_of_thread() : early_finish);
      break;
    }
  }
#endif
}

// How many blocks share the groups of a tile, and how long all tiles then take: those that run at once, round by round.
struct Plan {
  int split;
  float time;
};

template <int kTokens, int kUnit, int kTeams, int kStages>
struct Variant {
  using Parts = Shape<kTokens, kUnit, kTeams, kStages>;
  static constexpr auto kKernel = w6ax_wgmma_kernel<kTokens, kUnit, kTeams, kStages>;

  static int at_once() { return blocks_at_once("w6ax_wgmma", kKernel, Parts::kThreads, Parts::kSharedBytes); }

  static int tiles(const Linear& p) { return (p.outputs + kRows - 1) / kRows * ((p.tokens + kTokens - 1) / kTokens); }

  static Plan plan(const Linear& p) {
    const int blocks = at_once();
    Plan best{};
    for (int split = 1; split <= kMostSplit && (split == 1 || p.groups >= kLeastGroups * kTeams * split); ++split) {
      const int clusters = split == 1 ? blocks : clusters_at_once("w6ax_wgmma", kKernel, Parts::kThreads, Parts::kSharedBytes, split);
      if (clusters == 0) break;
      const int rounds = (tiles(p) + clusters - 1) / clusters, groups = (p.groups + split - 1) / split;
      const float time = rounds * (groups * Parts::kGroupTime + Parts::kTileTime);
      if (split == 1 || time < best.time) best = {split, time};
    }
    return best;
  }

  static void run(const Linear& p, int split, cudaStream_t stream) {
    // Float32 outputs are stored through the stages, so that a block has no more than one tile of them.
    const bool many_tiles = Parts::kManyTiles && split == 1 && p.y_type != Float::f32;
    const int count = tiles(p), most = at_once(), blocks = many_tiles && count > most ? most : count * split;
    const int token_tiles = (p.tokens + kTokens - 1) / kTokens;
    launch("w6ax_wgmma", kKernel, dim3(blocks), Parts::kThreads, Parts::kSharedBytes, split, stream, p, token_tiles, count, split);
  }
};

// The fastest of the variants.
template <class First, class... Others>
void run_fastest(const Linear& p, cudaStream_t stream) {
  Plan best = First::plan(p);
  auto run = First::run;
  const auto consider = [&](Plan plan, decltype(run) other) {
    if (plan.time < best.time) best = plan, run = other;
  };
  (consider(Others::plan(p), Others::run), ...);
  run(p, best.split, stream);
}

}  // namespace

void w6ax_wgmma(const Linear& p, int token_tiles, cudaStream_t stream) {
  switch (token_tiles) {
    case 2: return run_fastest<Variant<16, 16, 1, 5>>(p, stream);
    case 4: return run_fastest<Variant<32, 32, 1, 4>>(p, stream);
    case 8:  // two blocks at once take more tiles at once, one of two teams adds up with fewer neighbours
      return run_fastest<Variant<64, 64, 1, 5>, Variant<64, 64, 2, 8>>(p, stream);
    case 16:  // the larger tile reads less, the smaller is sooner done where tiles are few
      return run_fastest<Variant<128, 128, 1, 7>, Variant<256, 64, 1, 4>>(p, stream);
    default: throw std::invalid_argument("token_tiles is " + std::to_string(token_tiles) + "; accepted: 2, 4, 8, 16");
  }
}

}  // namespace flexq
