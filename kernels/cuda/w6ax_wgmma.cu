// W6Ax for many tokens on Hopper: 6-bit weights become bytes in registers and meet the activations in shared memory (s8 wgmma).
//
// A block computes tiles of 128 or 192 outputs x kTokens tokens. One lane fetches and leaves; two or three warpgroups multiply, each 64
// outputs. In a block for 64 outputs two or three teams take the groups in turn, a warpgroup and a lane each. Weights go from shared memory
// to registers, where a code costs 0.6 instructions to expand, and from there straight into the tensor cores: what is expanded is never
// stored. Then the sums are scaled and added in float32, three instructions a sum and group. With 256 tokens the tensor cores multiply 64
// of them while the warpgroup adds the 64 before; three warpgroups have no registers for that, and multiply and add in turns. Two small
// blocks share a multiprocessor, so that one multiplies while the other waits; a large one, but for those of teams, takes one tile after
// the other: while sums are stored, the next tile's stages fill.
//
// What bounds it is the ports of the registers. The tensor cores read and write all sums of a k-step through them, and while they do, an
// instruction takes three cycles instead of 1.4. A group of a tile is 1024 cycles of tensor cores and 2 x 514 instructions a scheduler:
// 341 of these fit into those cycles, and the others take as long again. Without the conversions it would be 12% faster, but both ways
// to spare them cost as much: sums that start at kMagicBits are read once more, and sums that start at a product of constants, so large
// that none is negative and the bits are those of a denormal number, take a k-step more, whose constants are large enough for 6-bit
// activations alone. With up to 128 tokens and tiles of up to 128 outputs the tensor cores have the time: there sums start at kMagicBits,
// which gains 1 to 3% (tiles of 192 outputs lose 5%).
//
// Where a cluster of blocks is sooner done it shares the groups of a tile, or of half its tokens (see `Plan`), and each block adds up a
// share of the sums, which the others send it, in the order of the blocks: the result does not depend on timing. Where there are few
// outputs that exchange is felt, and what clusters leave idle: an H200 runs 30 of four blocks at once, or 39 of three, but 66 of two. So
// two teams share up to 4224 outputs in pairs: 4096 x 4096 with 64 tokens takes 7.2 us, of which the weights' bytes are 3.0, and took 8.2
// in clusters of three. Of tiles of 64 for most multiprocessors three teams take one alone, and exchange in their block: 8192 x 8192
// takes 15.6 us, and took 17.8 in pairs. Fewer blocks alone are bound by what one takes in, some 80 GB/s. Of up to two tiles of 64 for a
// multiprocessor two teams take one alone in half of its shared memory: 13824 x 5120 takes 16.9 us, and took 19.2 in pairs of 128. With 16
// tokens three teams share up to 4224 outputs in pairs: 4096 x 4096 takes 6.0 us, and took 6.2, and 7168 x 7168, alone, 11.3 and 12.4.
// Tried for the exchange: sums sent without meeting before (st.async into room of their own), 1% of the time.
#include <cooperative_groups.h>

#include <algorithm>
#include <type_traits>

#include "expand.cuh"
#include "kernels.h"
#include "layout.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace flexq {
namespace {

constexpr int kMostParts = 6;    // teams that share a tile, in as many blocks of a cluster or fewer
constexpr int kLeastGroups = 8;  // of a block of a cluster, and of teams
constexpr int kMostRecordTokens = 128;
constexpr int kFileRegisters = 65536, kFetchRegisters = 24;  // of a multiprocessor; of a fetching thread
constexpr int kMultiprocessorBytes = 228 * 1024, kBlockBytes = 2 * 1024;  // of shared memory; what a block takes besides its stages

constexpr int whole_kib(int bytes) { return (bytes + 1023) / 1024 * 1024; }

// kUnit: tokens that are multiplied at once; with 192 rows there are registers for no more than one unit's sums of a group.
// kTeams: of kRows / 64 warpgroups, that take a block's groups in turn, each with stages of its own.
template <int kRows, int kTokens, int kUnit, int kStages, int kTeams>
struct Shape {
  static constexpr int kRowWarps = kRows / 16, kReaders = kRowWarps * 32;  // of a team
  static constexpr int kWarps = kRowWarps * kTeams, kConsumers = kReaders * kTeams;
  static_assert(kTeams <= kLeastGroups, "every team has a group to take");
  static constexpr int kChunks = kRows / kChunkRows;
  static constexpr int kRecordTokens = kTokens < kMostRecordTokens ? kTokens : kMostRecordTokens, kRecords = kTokens / kRecordTokens;
  static constexpr int kRecordBytes = activation_record_bytes(Order::swizzled, 8, kRecordTokens / kTokenTile);
  // Swizzled operands begin at multiples of 1024 bytes, and so do every stage and every record in it; the chunks follow the last.
  static constexpr int kRecordStride = whole_kib(kRecordBytes), kChunksAt = (kRecords - 1) * kRecordStride + kRecordBytes;
  static constexpr int kStageBytes = whole_kib(kChunksAt + kChunks * kChunkBytes);
  static constexpr int kBlocksAtOnce = 2 * (kStages * (kStageBytes + 16) + kBlockBytes) <= kMultiprocessorBytes ? 2 : 1;
  static constexpr bool kManyTiles = kBlocksAtOnce == 1 && kTeams == 1;  // a block can take more than one
  // From 64 tokens on the multiplying warps want more registers than their share: they take those of the fetching warp, for which it has a
  // warpgroup to itself, since registers move between whole ones only. __launch_bounds__ allots a multiple of 8.
  static constexpr bool kTakesRegisters = kManyTiles || kTokens >= 64;
  static constexpr bool kHalves = kRecords == 2;  // of a tile: a record each
  static constexpr int kThreads = kConsumers + (kTakesRegisters ? 128 : 32 * kTeams);
  static constexpr int kAllotted = kThreads * (kFileRegisters / (kThreads * kBlocksAtOnce) / 8 * 8);  // of a block
  static constexpr int kRegisters = kTakesRegisters ? (kAllotted - 128 * kFetchRegisters) / kConsumers / 8 * 8 : 0;
  static_assert(kRegisters <= 255, "as many as an instruction can name");
  // Of a team's weights, before activations are there: more would keep those waiting.
  static constexpr int kEarlyStages = kTokens == 16 ? 3 : kTeams > 1 && kTokens == 128 ? 1 : 2;
  static constexpr int kTurnedTokens = kTokens == 256 ? 64 : kTokens > 16 ? 32 : 16;  // that are stored at once, as there is room
  static constexpr int kTurnedBytes = kTurnedTokens * 16 * 2;  // of a warp: two bytes for each of its 16 outputs
  static constexpr int kTurnedAtOnce = kManyTiles ? kWarps * kTurnedBytes : 0;  // a block of one tile has its stages' room for them
  static constexpr int kPieceBytes = 16 * 16 * 4;  // of sums that a cluster's blocks send each other, 16 outputs x 16 tokens
  static constexpr int kSharedBytes = kStages * (kStageBytes + 16) + kTurnedAtOnce + 1024;
  static_assert(kRows % 64 == 0, "whole warpgroups");
  static_assert(kStages % kTeams == 0, "a stage is always the same team's");
  // Blocks add up as many pieces each, the last fewer; of two bytes a warp turns half a piece.
  static_assert((kTokens / 16 * kWarps + kMostParts + kWarps / 2) * kPieceBytes <= kStages * kStageBytes, "pieces fit where stages were");
  static_assert(kWarps * kTurnedBytes <= kStages * kStageBytes, "and so does what is turned");
  static_assert(kEarlyStages * kTeams < kStages, "the first stages are filled in their first turn");

  static __device__ __forceinline__ int team_of(int warp) { return kTeams == 1 ? 0 : warp / kRowWarps; }
};

// How the blocks of a grid share the tiles of a call: each takes `whole` ones, one after the other, and then clusters of `split` blocks
// take what is left, a tile each, or with `halves` half a tile each: half its tokens. The host divides once for all: four
// divisions before a block's first copy took half a microsecond.
struct Work {
  int token_tiles, tiles, split, whole;
  bool halves;
  int groups_each, groups_over;  // of a block of a cluster; the first so many have one more
  uint64_t reciprocal;           // of token_tiles, times 2^40, more by less than one: right for fewer than 2^40 / token_tiles tiles

  Work(const Linear& p, const Tiling& tiling, int token_tiles, int tiles)
      : token_tiles(token_tiles),
        tiles(tiles),
        split(tiling.split),
        whole(tiling.whole),
        halves(tiling.halves),
        groups_each(p.groups / tiling.split),
        groups_over(p.groups % tiling.split),
        reciprocal((uint64_t(1) << 40) / token_tiles + 1) {}
};

#if __CUDA_ARCH__ / 100 == 9  // the host launches none of it elsewhere

// What a block does in its turn: a tile alone, or its share of what its cluster has together, if anything is left for it: `tile` may be
// past the last. Of a tile by halves `half` is 0 or 1, of a whole one 0.
struct Turn {
  int tile, half, rank, first_group, groups;
  int output_tile, token_tile;

  __device__ __forceinline__ Turn(const Linear& p, const Work& work, int turn) {
    const bool alone = turn < work.whole, by_halves = work.halves && !alone;
    const int mine = alone ? blockIdx.x : cluster_of_block();
    rank = alone ? 0 : cooperative_groups::this_cluster().block_rank();
    tile = turn * gridDim.x + (by_halves ? mine / 2 : mine);
    half = by_halves ? mine % 2 : 0;
    first_group = rank * work.groups_each + min(rank, work.groups_over);
    groups = alone ? p.groups : work.groups_each + (rank < work.groups_over);
    output_tile = tile * work.reciprocal >> 40, token_tile = tile - output_tile * work.token_tiles;
  }
};

__device__ __forceinline__ float4 operator+(const float4& a, const float4& b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// The last step of a lane's two outputs of a warp's 16: those of rows g and g + 8.
struct FinishTwo {
  Finish of[2];

  __device__ __forceinline__ FinishTwo(const Linear& p, int first_output)
      : of{{p, first_output + int(threadIdx.x) % 32 / 4}, {p, first_output + int(threadIdx.x) % 32 / 4 + 8}} {
    for (Finish& each : of) each.factor *= kExpandedUnit;
  }
};

// Stores a warp's sums of 16 outputs from `first_output` on x kCount tokens. Its registers hold pairs of tokens, memory wants neighbouring
// outputs. Of two-byte numbers 8 x 8 at a time are turned on their way through `turned` (kCount x 16 of them), where the two vectors of a
// token change places every four tokens, so that eight of either are in 32 different banks. Of float32 eight outputs are a sector as they are.
template <Float kType, int kCount>
__device__ __forceinline__ void store_turned(const Linear& p, const float* sums, uint8_t* turned, int first_output, int first_token,
                                             const FinishTwo& finish) {
  const int lane = threadIdx.x % 32;
  if constexpr (kType == Float::f32) {
#pragma unroll
    for (int e = 0; e < kCount / 2; ++e) {
      const int token = first_token + e / 4 * 8 + lane % 4 * 2 + e % 2, output = first_output + lane / 4 + e % 4 / 2 * 8;
      if (token < p.tokens && output < p.outputs)
        static_cast<float*>(p.y)[int64_t(token) * p.outputs + output] = finish.of[e % 4 / 2](sums[e]);
    }
    return;
  }
  const auto vector_at = [&](int token, int half) { return turned + token * 32 + (half ^ (token / 4 & 1)) * 16; };
  __syncwarp();
  uint8_t* const to = vector_at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int j = 0; j < kCount / 8; j += 2) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* two = sums + 4 * (j + i / 2) + 2 * (i % 2);
      pairs[i] = pack_floats(kType, finish.of[i % 2](two[0]), finish.of[i % 2](two[1]));
    }
    store_transposed(to + j * 8 * 32, pairs);
  }
  __syncwarp();
  auto* y = static_cast<uint16_t*>(p.y) + int64_t(first_token) * p.outputs + first_output;
  const int tokens = p.tokens - first_token, outputs = p.outputs - first_output;
  if (p.outputs % 8 == 0) {
    const int token = lane / 2, output = lane % 2 * 8, left = output < outputs ? tokens - token : 0;
    const uint8_t* from = vector_at(token, lane % 2);
    y += int64_t(token) * p.outputs + output;
#pragma unroll
    for (int i = 0; i < kCount; i += 16, y += 16 * p.outputs)
      if (i < left) *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(from + i * 32);
  } else if (const int output = lane % 16; output < outputs) {
#pragma unroll 1
    for (int token = lane / 16; token < min(kCount, tokens); token += 2)
      y[int64_t(token) * p.outputs + output] = reinterpret_cast<const uint16_t*>(vector_at(token, output / 8))[output % 8];
  }
}

// Calls with the type of the outputs as a constant: stores, which are unrolled, do not ask for it again.
template <class Store>
__device__ __forceinline__ void with_output_type(Float type, Store store) {
  if (type == Float::f16)
    store(std::integral_constant<Float, Float::f16>());
  else if (type == Float::bf16)
    store(std::integral_constant<Float, Float::bf16>());
  else
    store(std::integral_constant<Float, Float::f32>());
}

// Stores a block's sums of kTokens tokens, which it has alone.
template <class Parts, int kTokens, int kUnit>
__device__ __forceinline__ void store_all(const Linear& p, const float (*sums)[kUnit / 2], uint8_t* turned, int first_output,
                                          int first_token, const FinishTwo& finish) {
  constexpr int kAtOnce = Parts::kTurnedTokens;
  with_output_type(p.y_type, [&](auto type) {
#pragma unroll
    for (int first = 0; first < kTokens; first += kAtOnce)
      store_turned<decltype(type)::value, kAtOnce>(p, sums[first / kUnit] + first % kUnit / 2, turned, first_output, first_token + first,
                                                   finish);
  });
}

// Adds up the sums of a cluster's blocks, and stores them. A piece is a warp's sums of 16 tokens, eight a lane; each team of each block
// sends each block the pieces that are its to add up, into its shared memory, where the stages were, and they are added in the order of
// the teams.
//
//   [team that sent][piece of mine][vector of four sums, 0 or 1][lane], then for each warp what it turns
//
// To fetch what one adds up instead, and wait for it, took a microsecond more.
//
// Who sends has waited at the cluster's barrier for the fetching lanes, which arrive there when every copy into their stages is done.
template <class Parts, int kTokens, int kUnit>
__device__ __forceinline__ void add_up_and_store(const Linear& p, const float (*sums)[kUnit / 2], uint8_t* shared, int first_output,
                                                 int first_token, int split, int rank) {
  constexpr int kRowWarps = Parts::kRowWarps, kTeams = Parts::kWarps / kRowWarps, kPieces = kTokens / 16 * kRowWarps;
  const auto cluster = cooperative_groups::this_cluster();
  cluster.barrier_arrive();  // this thread has left its stages
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, each = (kPieces + split - 1) / split;
  const int team = Parts::team_of(warp), row_warp = warp - team * kRowWarps, parts_of_piece = split * kTeams;
  const int output = first_output + row_warp * 16;
  const FinishTwo finish(p, output);
  auto* const pieces = reinterpret_cast<float4*>(shared) + lane;
  int owner = 0, of_owner = row_warp;
  cluster.barrier_wait();
#pragma unroll
  for (int block = 0; block < kTokens / 16; ++block) {
    while (of_owner >= each) of_owner -= each, ++owner;
    const float* sum = sums[block * 16 / kUnit] + block * 16 % kUnit / 2;
    float4* to = cluster.map_shared_rank(pieces, owner) + ((rank * kTeams + team) * each + of_owner) * 64;
    to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    to[32] = make_float4(sum[4], sum[5], sum[6], sum[7]);
    of_owner += kRowWarps;
  }
  cluster.barrier_arrive();
  const int first = rank * each, last = min(first + each, kPieces);
  uint8_t* const turned = shared + (parts_of_piece * each + warp / 2) * Parts::kPieceBytes + warp % 2 * (Parts::kPieceBytes / 2);
  cluster.barrier_wait();
  with_output_type(p.y_type, [&](auto type) {
    // Pieces of this warp's outputs.
    const int mine = first + (kRowWarps + row_warp - first % kRowWarps) % kRowWarps + team * kRowWarps;
#pragma unroll 1
    for (int piece = mine; piece < last; piece += Parts::kWarps) {
      float4 parts[kMostParts][2];
#pragma unroll
      for (int r = 0; r < kMostParts; ++r)
        if (r < parts_of_piece) {
          const float4* from = pieces + (r * each + piece - first) * 64;
          parts[r][0] = from[0], parts[r][1] = from[32];
        }
#pragma unroll
      for (int r = 1; r < kMostParts; ++r)
        if (r < parts_of_piece) parts[0][0] = parts[0][0] + parts[r][0], parts[0][1] = parts[0][1] + parts[r][1];
      const float sums_of_piece[8] = {parts[0][0].x, parts[0][0].y, parts[0][0].z, parts[0][0].w,
                                      parts[0][1].x, parts[0][1].y, parts[0][1].z, parts[0][1].w};
      const int token = first_token + piece / kRowWarps * 16;
      store_turned<decltype(type)::value, 16>(p, sums_of_piece, turned, output, token, finish);
    }
  });
}

#endif

template <int kRows, int kTokens, int kUnit, int kStages, int kTeams>
__global__ void __launch_bounds__(Shape<kRows, kTokens, kUnit, kStages, kTeams>::kThreads,
                                  Shape<kRows, kTokens, kUnit, kStages, kTeams>::kBlocksAtOnce)
    w6ax_wgmma_kernel(const __grid_constant__ Linear p, const __grid_constant__ Work work) {
#if __CUDA_ARCH__ / 100 == 9  // the host never launches it elsewhere
  using Parts = Shape<kRows, kTokens, kUnit, kStages, kTeams>;
  constexpr int kUnits = kTokens / kUnit, kUnitsOfRecord = kUnits / Parts::kRecords, kBuffers = kUnits > 1 && kRows == 128 ? 2 : 1;
  constexpr bool kMagicStart = kTokens <= 128 && kRows <= 128;
  // Of a stage's bytes.
  const auto codes_at = [](int unit) { return unit / kUnitsOfRecord * Parts::kRecordStride + unit % kUnitsOfRecord * kUnit * kGroup; };
  const auto scales_at = [](int unit) { return unit / kUnitsOfRecord * Parts::kRecordStride + unit % kUnitsOfRecord * kUnit * 4; };
  // Vectors of scales that are read before the sums are waited for: as many as registers are left for.
  constexpr int kEarlyScales = kTokens == 256 ? 2 : kTokens == 128 ? kUnit / 16 : 0;
  // Stages after the early ones whose weights come as far as the L2 cache: 2 to 3% of the time where product follows product on an H200,
  // none of a decoder's step. Four gain 1% more there and cost up to 1% here.
  constexpr int kAheadStages = kTokens <= 32 ? 2 : 0;
  extern __shared__ uint8_t unaligned[];
  uint8_t* shared = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  uint8_t* turned = shared + (Parts::kManyTiles ? kStages * Parts::kStageBytes : 0);
  auto* full = reinterpret_cast<uint64_t*>(shared + kStages * Parts::kStageBytes + Parts::kTurnedAtOnce);
  uint64_t* empty = full + kStages;
  allow_next_kernel();

  // The same in all lanes, as the compiler sees, and the lane not to be asked for again: in the loop registers are short.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  int lane = threadIdx.x % 32;
  asm volatile("" : "+r"(lane));
  const int g = lane / 4, q = lane % 4;
  if (threadIdx.x == 0) {  // a stage is empty when every thread of its team has said that it has read it: no warp waits for its lanes
    for (int s = 0; s < kStages; ++s) barrier_init(full + s, 1), barrier_init(empty + s, Parts::kReaders);
    barriers_are_ready();
  }
  __syncthreads();

  if (warp >= Parts::kWarps) {
    if constexpr (Parts::kRegisters > 0) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kFetchRegisters));
    if (warp >= Parts::kWarps + kTeams || !elect_lane()) return;
    const int team = kTeams == 1 ? 0 : warp - Parts::kWarps;  // one lane fetches for it: for copies of several there are loops over lanes
    const uint64_t policy = work.token_tiles == 1 ? evict_first() : evict_last();
    const int64_t next_chunk = int64_t(p.groups) * kChunkBytes;
    int stage = team, parity = 0;
    for (int turn = 0; turn <= work.whole; ++turn) {
      const Turn now(p, work, turn);
      const int first_group = now.first_group + team, groups = (now.groups - team + kTeams - 1) / kTeams;
      if (now.tile >= work.tiles) break;
      // Past the last outputs the last chunk is read again, and nothing of it is stored.
      const int first_chunk = now.output_tile * Parts::kChunks, last_chunk = (p.outputs - 1) / kChunkRows - first_chunk;
      const uint8_t* weights = p.weight + first_chunk * next_chunk + first_group * kChunkBytes;
      // Of two records of tokens the second may be past the last: then the first is read again, for a half as well.
      const bool by_halves = Parts::kHalves && work.halves && turn == work.whole;
      const int records_at_once = by_halves ? 1 : Parts::kRecords;
      const int first_record = now.token_tile * Parts::kRecords;
      const bool both = (first_record + 1) * Parts::kRecordTokens < p.tokens;
      const int record = first_record + (both ? now.half : 0);
      const uint8_t* records = p.activations + (int64_t(record) * p.groups + first_group) * Parts::kRecordBytes;
      const uint8_t* second = records + (both ? int64_t(p.groups) * Parts::kRecordBytes : 0);
      const auto chunk = [&](int c) { return weights + min(c, last_chunk) * next_chunk; };  // of the next group
      const auto fetch_weights = [&](int s) {
        barrier_expect(full + s, records_at_once * Parts::kRecordBytes + Parts::kChunks * kChunkBytes);
        uint8_t* const to = shared + s * Parts::kStageBytes + Parts::kChunksAt;
#pragma unroll
        for (int c = 0; c < Parts::kChunks; ++c)
          bulk_copy(to + c * kChunkBytes, chunk(c), kChunkBytes, full + s, policy);
        weights += kTeams * kChunkBytes;
      };
      const auto fetch_records = [&](int s) {
        uint8_t* const to = shared + s * Parts::kStageBytes;
        bulk_copy(to, records, Parts::kRecordBytes, full + s);
        if (Parts::kRecords == 2 && !by_halves) bulk_copy(to + Parts::kRecordStride, second, Parts::kRecordBytes, full + s);
        records += kTeams * Parts::kRecordBytes, second += kTeams * Parts::kRecordBytes;
      };
      int left = groups;
      if (turn == 0) {  // weights do not depend on the kernel before, activations do
        const int at_once = min(groups, Parts::kEarlyStages);
#pragma unroll 1
        for (int s = 0; s < at_once; ++s) fetch_weights(team + s * kTeams);
#pragma unroll 1
        for (int ahead = 0; ahead < min(groups - at_once, kAheadStages); ++ahead)
#pragma unroll
          for (int c = 0; c < Parts::kChunks; ++c) bulk_prefetch(chunk(c) + ahead * kTeams * kChunkBytes, kChunkBytes, policy);
        wait_for_previous_kernel();
#pragma unroll 1
        for (int s = 0; s < at_once; ++s) fetch_records(team + s * kTeams);
        left -= at_once, stage += at_once * kTeams;
      }
#pragma unroll 1
      for (; left > 0; --left) {
        barrier_wait(empty + stage, parity ^ 1);  // of a stage never filled: at once
        fetch_weights(stage);
        fetch_records(stage);
        if ((stage += kTeams) >= kStages) stage = team, parity ^= 1;
      }
      if constexpr (!Parts::kManyTiles) break;
    }
    if (kTeams > 1 || work.split > 1) {  // others' sums come where the stages are (add_up_and_store)
#pragma unroll 1
      for (int s = team; s < kStages; s += kTeams)
        barrier_wait(full + s, parity ^ (s >= stage));  // its last copy; of a stage never filled: at once
      cluster_arrive();
    }
  } else {
    if constexpr (Parts::kRegisters > 0) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Parts::kRegisters));
    const int team = Parts::team_of(warp), row_warp = warp - team * Parts::kRowWarps;
    const int chunk_at = Parts::kChunksAt + row_warp / 2 * kChunkBytes;  // this warp's half chunk: rows 16 * row_warp of the tile
    wait_for_previous_kernel();  // which activations are waited for anyway; exponents and bias may be of it, too
    float sums[kUnits][kUnit / 2];
    int32_t inner[kBuffers][kUnit / 2];  // of units in turn: while the tensor cores fill one, the other is scaled and added
    uint32_t words[12], a[4][4];
    uint8_t* const first_stage = shared + team * Parts::kStageBytes;
    int stage = team, parity = 0;
    const uint8_t* here = first_stage;
    const auto load_words = [&] {
      barrier_wait(full + stage, parity);
      load_half(here + chunk_at, row_warp % 2, lane, words);
    };
    // Sums of the next so many groups, of the first kCount units of a tile.
    const auto add_groups = [&](auto units, int groups) {
      constexpr int kCount = decltype(units)::value;
#pragma unroll
      for (int unit = 0; unit < kCount; ++unit)
#pragma unroll
        for (int e = 0; e < kUnit / 2; ++e) sums[unit][e] = 0.0f;
      load_words();
      for (int step = team; step < groups; step += kTeams) {
        const float2 sw = __half22float2(*reinterpret_cast<const __half2*>(here + chunk_at + kHalfBytes + g * 8 + row_warp % 2 * 4));
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
        for (int s = 0; s < 4; ++s) expand(words, s, a[s]), keep_in_place(a[s]);
        multiply(0);
#pragma unroll
        for (int unit = 0; unit < kCount; ++unit) {
          int32_t(&sum)[kUnit / 2] = inner[unit % kBuffers];
          const auto* scales = reinterpret_cast<const float4*>(sx + scales_at(unit));  // of tokens 16 j + 2 q, + 1, + 8 and + 9 at 4 j
          float4 early[kEarlyScales + 1];                                              // an array of none is no C++
#pragma unroll
          for (int j = 0; j < kEarlyScales; ++j) early[j] = scales[4 * j];
          if (unit + 1 == kCount) {
            here += kTeams * Parts::kStageBytes;
            if ((stage += kTeams) >= kStages) stage = team, parity ^= 1, here = first_stage;
            if (step + kTeams < groups) load_words();
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
      const int first_output = now.output_tile * kRows, first_token = now.token_tile * kTokens;
      if constexpr (Parts::kHalves) {
        if (turn == work.whole && work.halves) {
          add_groups(std::integral_constant<int, kUnits / 2>(), now.groups);
          const int first_of_half = first_token + now.half * (kTokens / 2);
          add_up_and_store<Parts, kTokens / 2, kUnit>(p, sums, shared, first_output, first_of_half, work.split, now.rank);
          break;
        }
      }
      add_groups(std::integral_constant<int, kUnits>(), now.groups);
      if (kTeams > 1 || (work.split > 1 && turn == work.whole)) {  // teams always have their sums to add up
        add_up_and_store<Parts, kTokens, kUnit>(p, sums, shared, first_output, first_token, work.split, now.rank);
        break;
      }
      const int output = first_output + warp * 16;
      const FinishTwo finish(p, output);
      if constexpr (!Parts::kManyTiles) threads_meet<Parts::kConsumers>();  // they have left the stages
      store_all<Parts, kTokens, kUnit>(p, sums, turned + warp * Parts::kTurnedBytes, output, first_token, finish);
      if constexpr (!Parts::kManyTiles) break;
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
template <int kRows, int kTokens, int kUnit, int kStages, int kGroupTime, int kTeams = 1>
struct Variant {
  using Parts = Shape<kRows, kTokens, kUnit, kStages, kTeams>;
  static constexpr auto kKernel = w6ax_wgmma_kernel<kRows, kTokens, kUnit, kStages, kTeams>;
  // As long as so many groups takes all else of a tile that a block takes alone or shares with its cluster. With kGroupTime, times of the
  // paper's layers in every cluster that can run follow within 3%, those of small blocks within 16%, those of teams within 12%, but for pairs of
  // three teams, which take up to 41% longer, and are faster all the same.
  static constexpr float kAloneGroups = Parts::kManyTiles ? 4.2f : 6.5f;  // of one team
  static constexpr bool kSmallTeams = kTeams > 1 && Parts::kBlocksAtOnce == 2;
  static constexpr float kSharedGroups = kTokens == 256      ? 7.7f
                                         : kSmallTeams       ? 7.6f
                                         : kTeams > 1        ? (kTokens == 16 ? 9.0f : 16.0f)
                                         : kRows == 192      ? 8.0f
                                         : Parts::kManyTiles ? 8.6f
                                                             : 7.0f;
  static constexpr float kHalfTime = 0.59f;  // of a shared tile's, by halves
  // Two teams are in clusters, or alone in small blocks; three alone, and with 16 tokens, whose sums are few, in pairs, too.
  static constexpr bool kAlone = kSmallTeams || (kTeams == 3 && kTokens > 16);
  static constexpr int kLeastSplit = kTeams == 2 && !kAlone ? 2 : 1, kMostSplit = kAlone ? 1 : kMostParts / kTeams;
  static constexpr float kAllGroups = kTokens == 16 ? 100 : 320;

  // Whether three teams take tiles alone: where there are blocks for half of the multiprocessors, and the more the longer the rows, of
  // kAllGroups for all, or 95% of them; or of rows so short that a pair's blocks would have kLeastGroups or fewer. With 64 tokens 7168 x 28672 takes 7% longer so, in 112 blocks, 6656 x
  // 17920 in 104 blocks 4% less, 5120 x 13824 in 80 blocks 13% longer, 5120 x 5120 3% less, and 4096 x 1536 in 64 blocks 22% less; with 16
  // tokens 5120 x 5120 takes 6% longer, and in 96 blocks 6144 x 8192 4% longer, but 6144 x 4096 14% less.
  static bool three_alone(int tiles, int groups, int multiprocessors) {
    return groups <= 2 * kLeastGroups || 2 * tiles >= std::min(1 + groups / kAllGroups, 1.9f) * multiprocessors;
  }

  static int token_tiles(const Linear& p) { return (p.tokens + kTokens - 1) / kTokens; }
  static int tiles(const Linear& p) { return (p.outputs + kRows - 1) / kRows * token_tiles(p); }

  static int clusters(int split) {
    return split == 1 ? blocks_at_once("w6ax_wgmma", kKernel, Parts::kThreads, Parts::kSharedBytes)
                      : clusters_at_once("w6ax_wgmma", kKernel, Parts::kThreads, Parts::kSharedBytes, split);
  }

  static Plan plan(const Linear& p) {
    const float alone = kGroupTime * (p.groups + kAloneGroups);
    Plan best{};
    const auto consider = [&](int split, int whole, bool halves, float time) {
      if (best.time == 0.0f || time < best.time) best = {{kRows, kTeams, kTokens, split, whole, halves}, time, run};
    };
    // Alone first: whether a block fits the card is asked there, once for all.
    for (int split = 1; split <= kMostSplit && ((kTeams == 1 && split == 1) || p.groups >= kLeastGroups * split); ++split) {
      const int at_once = clusters(split), count = tiles(p);
      if (at_once == 0) break;
      const int rounds = (count + at_once - 1) / at_once;
      if (split < kLeastSplit || (kTeams == 3 && split == 1 && !three_alone(count, p.groups, at_once))) continue;
      if (kTeams == 1 && split == 1) {
        consider(1, Parts::kManyTiles ? rounds : 0, false, rounds * alone);
        continue;
      }
      // Whole tiles while there is one for every block, and what is left shared, by halves if there are clusters for all; or every tile
      // shared, as many as run at once in a round.
      const float shared = kGroupTime * ((p.groups + split - 1) / split + kSharedGroups);
      const int whole = count / (at_once * split), left = count % (at_once * split);
      if (Parts::kManyTiles && whole > 0 && left <= at_once) consider(split, whole, false, whole * alone + (left > 0 ? shared : 0.0f));
      if (Parts::kHalves && Parts::kManyTiles && whole > 0 && left > 0 && 2 * left <= at_once)
        consider(split, whole, true, whole * alone + kHalfTime * shared);
      if (rounds == 1 || Parts::kManyTiles) consider(split, 0, false, rounds * shared);  // small clusters' second round finds few places
    }
    return best;
  }

  static void run(const Linear& p, const Tiling& tiling, cudaStream_t stream) {
    const int blocks = std::min(tiling.whole > 0 ? clusters(tiling.split) : tiles(p), tiles(p)) * tiling.split;
    const Work work(p, tiling, token_tiles(p), tiles(p));
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
    case 2:
      return fastest_of<Variant<64, 16, 16, 10, 300, 2>, Variant<64, 16, 16, 21, 170, 3>, Variant<128, 16, 16, 5, 570>,
                        Variant<128, 16, 16, 14, 345>>(p);
    case 4:
      return fastest_of<Variant<64, 32, 32, 8, 320, 2>, Variant<64, 32, 32, 18, 190, 2>, Variant<64, 32, 32, 18, 160, 3>,
                        Variant<128, 32, 32, 5, 590>, Variant<128, 32, 32, 12, 380>>(p);
    case 8:
      return fastest_of<Variant<64, 64, 64, 6, 350, 2>, Variant<64, 64, 64, 14, 210, 2>, Variant<64, 64, 64, 12, 185, 3>,
                        Variant<128, 64, 64, 5, 710>, Variant<128, 64, 64, 10, 445>, Variant<192, 64, 64, 7, 580>>(p);
    case 16:  // larger tiles read less, smaller ones are sooner done where there are few
      return fastest_of<Variant<64, 128, 128, 8, 320, 2>, Variant<64, 128, 64, 6, 290, 3>, Variant<128, 128, 128, 7, 650>,
                        Variant<128, 256, 64, 4, 1050>, Variant<192, 128, 64, 6, 850>>(p);
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
