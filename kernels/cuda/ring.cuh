// A warp's own ring of stages in shared memory: it fetches what it will use, with no other warp to wait for.
//
// A block takes tiles of 32 outputs x 8 kTokenTiles tokens, one after another; its warps take the groups in turn, on from tile to tile, so
// that all have as much to do whatever the number of groups. Of 4 warps, with 6 groups:
//
//   tile   |   first     |   second
//   group  | 0 1 2 3 4 5 | 0 1 2 3 4 5
//   warp   | 0 1 2 3 0 1 | 2 3 0 1 2 3
//
// A stage holds what a warp consumes in a step: the chunk of one group, or a half of one with the scales, and from kChunkBytes on the record
// of activations of that group. The ring runs on from tile to tile, too, so that memory is never idle while sums are added. On Hopper one
// lane asks for bulk copies that an mbarrier counts; on cards before, all lanes copy 16 bytes at a time.
#pragma once
#include "layout.cuh"
#include "ptx.cuh"

namespace flexq {

// How many tiles of 32 outputs x so many tokens a call has.
inline int tile_count(const Linear& p, int tokens_of_tile) {
  return (p.outputs + kChunkRows - 1) / kChunkRows * ((p.tokens + tokens_of_tile - 1) / tokens_of_tile);
}

// How blocks share the tiles of a call: each takes one a turn. Tiles of the same outputs follow one another, so that their weights are
// still in the L2 cache. What is left for the last turn goes by halves, 16 outputs each, if no block has more than one. 4 blocks, 6 tiles:
//
//   block  | 0  | 1  | 2  | 3
//   turn 0 | 0  | 1  | 2  | 3
//   turn 1 | 4a | 4b | 5a | 5b
//
// A share is a number: that of a tile, or from `whole` on one for each half.
struct Shares {
  int token_tiles, whole, count, blocks;

  Shares(const Linear& p, int tokens_of_tile, int most_blocks) : token_tiles((p.tokens + tokens_of_tile - 1) / tokens_of_tile) {
    const int tiles = tile_count(p, tokens_of_tile), left = tiles % most_blocks;
    whole = 2 * left <= most_blocks ? tiles - left : tiles;
    count = 2 * tiles - whole;
    blocks = count < most_blocks ? count : most_blocks;
  }

  __device__ __forceinline__ int tile(int share) const { return share < whole ? share : (whole + share) / 2; }
  __device__ __forceinline__ int half(int share) const { return (share - whole) % 2; }  // of one from `whole` on
};

template <int kWarps, int kStages, int kRecordBytes>
struct Ring {
  static constexpr int kStageBytes = kChunkBytes + kRecordBytes;
  static constexpr int kSharedBytes = kWarps * kStages * (kStageBytes + 8);

  const Linear& p;
  const Shares& shares;
  uint8_t* stages;
  uint64_t* full;
  int lane, warp;
  int stage = 0, parity = 0;
  int next_share, next_group;  // that will be fetched next, and where it lies
  const uint8_t *next_weights, *next_record;
  int next_bytes;  // a chunk's, or a half's with the scales

  __device__ __forceinline__ Ring(const Linear& linear, const Shares& all, uint8_t* shared) : p(linear), shares(all) {
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    stages = shared + warp * kStages * kStageBytes;
    full = reinterpret_cast<uint64_t*>(shared + kWarps * kStages * kStageBytes) + warp * kStages;
    next_share = blockIdx.x;
    next_group = warp;
    seek();
  }

  // Fills the ring: weights at once, activations when the kernel that writes them has finished. Memory may be done with a full ring before
  // that, but to bring more into the L2 cache meanwhile, a stage of each warp, gains 1 to 2% where product follows product on an H200 and
  // costs 1% of a decoder's step, 2% if that may stay in the cache; two stages cost 3 to 4%.
  __device__ __forceinline__ void start() {
#if __CUDA_ARCH__ >= 900
    const int share = next_share, group = next_group;
    const bool elected = elect_lane();
    if (elected) {
      for (int s = 0; s < kStages; ++s) barrier_init(full + s, 1);
      barriers_are_ready();
      for (int s = 0; s < kStages && next_share < shares.count; ++s, advance()) copy_weights(s);
    }
    __syncwarp();
    wait_for_previous_kernel();
    if (kRecordBytes > 0 && elected) {
      next_share = share, next_group = group;
      seek();
      for (int s = 0; s < kStages && next_share < shares.count; ++s, advance()) copy_record(s);
    }
#else
    for (int s = 0; s < kStages; ++s) fetch(s);
#endif
  }

  // The stage of the next step, filled.
  __device__ __forceinline__ const uint8_t* wait() {
#if __CUDA_ARCH__ >= 900
    barrier_wait(full + stage, parity);
#else
    warp_copy_wait<kStages - 1>();
    __syncwarp();
#endif
    return stages + stage * kStageBytes;
  }

  // All lanes have read the stage: it is filled for the step that will use it next.
  __device__ __forceinline__ void release() {
    __syncwarp();
    fetch(stage);
    if (++stage == kStages) stage = 0, parity ^= 1;
  }

 private:
  // Within a tile by addition alone: one lane does this for every stage, and the others wait for it.
  __device__ __forceinline__ void advance() {
    next_group += kWarps;
    next_weights += kWarps * kChunkBytes;
    next_record += kWarps * kRecordBytes;
    if (next_group >= p.groups) seek();
  }

  __device__ __forceinline__ void seek() {
    while (next_group >= p.groups) next_group -= p.groups, next_share += gridDim.x;  // fewer groups than warps: past several tiles
    int output_tile = shares.tile(next_share), token_tile = 0;
    if (shares.token_tiles > 1) token_tile = output_tile % shares.token_tiles, output_tile /= shares.token_tiles;
    next_weights = p.weight + (int64_t(output_tile) * p.groups + next_group) * kChunkBytes;
    next_record = p.activations + (int64_t(token_tile) * p.groups + next_group) * kRecordBytes;
    next_bytes = kChunkBytes;
    if (next_share >= shares.whole) next_weights += shares.half(next_share) * kHalfBytes, next_bytes = kHalfStride;
  }

  __device__ __forceinline__ void fetch(int s) {
#if __CUDA_ARCH__ >= 900
    if (elect_lane() && next_share < shares.count) {
      copy_weights(s);
      copy_record(s);
      advance();
    }
#else
    if (next_share < shares.count) {
      uint8_t* to = stages + s * kStageBytes;
      warp_copy(to, next_weights, next_bytes, lane);
      warp_copy(to + kChunkBytes, next_record, kRecordBytes, lane);
      advance();
    }
    warp_copy_commit();
#endif
  }

#if __CUDA_ARCH__ >= 900
  __device__ __forceinline__ void copy_weights(int s) {
    uint8_t* const to = stages + s * kStageBytes;
    // Weights that several tiles of tokens share should stay in the L2 cache; the others are read once.
    const uint64_t policy = shares.token_tiles == 1 ? evict_first() : evict_last();
    barrier_expect(full + s, kRecordBytes + next_bytes);
    bulk_copy(to, next_weights, next_bytes, full + s, policy);
  }

  __device__ __forceinline__ void copy_record(int s) {
    if constexpr (kRecordBytes > 0) bulk_copy(stages + s * kStageBytes + kChunkBytes, next_record, kRecordBytes, full + s);
  }
#endif
};

// Adds what a block's warps have summed of a tile and stores y: all threads together, sixteen outputs at a time, through `shared`.
//   sums[half][t][i]: output 16 half + g + 8 (i / 2) of a tile's or half's, token 8 t + 2 q + i % 2, in units of `unit`
//   part: the first group of this warp's, or that it would have. Parts are added in this order, whichever warp had them: the sum's bits
//     are the same wherever in a block's turn its tile comes.
template <int kWarps, int kTokenTiles>
struct Reduction {
  static constexpr int kTokens = kTokenTiles * kTokenTile, kRows = 16;
  static constexpr int kStride = kRows + 4;  // 8 q + g are 32 different banks
  static constexpr int kSharedBytes = kWarps * kTokens * kStride * 4;
  static_assert(kWarps * 32 % kRows == 0, "a thread finishes one output");

  float* shared;

  __device__ __forceinline__ explicit Reduction(uint8_t* room) : shared(reinterpret_cast<float*>(room)) {}
  __device__ __forceinline__ void start() {}

  template <int kHalves>
  __device__ __forceinline__ void store(const Linear& p, const float (&sums)[kHalves][kTokenTiles][4], int part, int first_output,
                                        int token_tile, float unit, int) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    const int row = threadIdx.x % kRows, n = first_output + row;
    Finish finish[kHalves];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) finish[half] = Finish(p, n + half * kRows);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) shared[(part * kTokens + t * kTokenTile + 2 * q + i % 2) * kStride + g + i / 2 * 8] = sums[half][t][i];
      __syncthreads();
#pragma unroll
      for (int m = threadIdx.x / kRows; m < kTokens; m += kWarps * 32 / kRows) {
        const int token = token_tile * kTokens + m;
        if (token >= p.tokens || n + half * kRows >= p.outputs) continue;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += shared[(w * kTokens + m) * kStride + row];
        store_float(p.y, int64_t(token) * p.outputs + n + half * kRows, p.y_type, finish[half](sum * unit));
      }
      __syncthreads();
    }
  }
};

// The same, while the other warps go on to the next tile: each leaves its part, and as many as there are tokens add them up when all lie
// there, a token each or more. The next parts wait until that is done, which is long before.
//   turn: how many tiles the block has had before.  kTokens: how many of the tiles' there are at most.
template <int kWarps, int kTokenTiles, int kTokens = kTokenTiles * kTokenTile>
struct Handover {
  static constexpr int kStride = kChunkRows + 4;  // 8 q + g are 32 different banks
  static constexpr int kPartBytes = kWarps * kTokens * kStride * 4;
  static constexpr int kSharedBytes = kPartBytes + 2 * 8;

  float* parts;
  uint64_t *left, *added;  // barriers of all threads

  __device__ __forceinline__ explicit Handover(uint8_t* shared)
      : parts(reinterpret_cast<float*>(shared)), left(reinterpret_cast<uint64_t*>(shared + kPartBytes)), added(left + 1) {}

  // By all threads, which meet after it before they store.
  __device__ __forceinline__ void start() {
    if (threadIdx.x > 0) return;
    barrier_init(left, kWarps * 32);
    barrier_init(added, kWarps * 32);
    barriers_are_ready();
  }

  template <int kHalves>
  __device__ __forceinline__ void store(const Linear& p, const float (&sums)[kHalves][kTokenTiles][4], int part, int first_output,
                                        int token_tile, float unit, int turn) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    if (turn > 0) barrier_wait(added, (turn - 1) % 2);
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (const int m = t * kTokenTile + 2 * q + i % 2; m < kTokens)
            parts[(part * kTokens + m) * kStride + half * 16 + g + i / 2 * 8] = sums[half][t][i];
    barrier_arrive(left);

    const int n = first_output + lane, first = token_tile * kTokens, tokens = min(kTokens, p.tokens - first);
    const int mine = (warp + turn) % kWarps;  // another one each time
    if (mine < tokens) {
      const Finish finish(p, n);
      barrier_wait(left, turn % 2);
      for (int m = mine; m < tokens; m += kWarps) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += parts[(w * kTokens + m) * kStride + lane];
        if (lane < kHalves * 16 && n < p.outputs) store_float(p.y, int64_t(first + m) * p.outputs + n, p.y_type, finish(sum * unit));
      }
    }
    barrier_arrive(added);
  }
};

// The parts of a kernel of this kind, and the shared memory that they take: the warps' rings, then room to add up their sums.
template <Order kOrder, int kBits, int kTokenTiles, int kWarps, int kStages, template <int, int> class Sum>
struct RingKernel {
  static constexpr int kRecordBytes = activation_record_bytes(kOrder, kBits, kTokenTiles);
  using TheRing = Ring<kWarps, kStages, kRecordBytes>;
  using TheSum = Sum<kWarps, kTokenTiles>;
  static constexpr int kSharedBytes = TheRing::kSharedBytes + TheSum::kSharedBytes;
};

}  // namespace flexq
