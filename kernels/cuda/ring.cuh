// A warp's own ring of stages in shared memory: it fetches what it will use, with no other warp to wait for.
//
// A block takes tiles of 32 outputs x 8 kTokenTiles tokens, one after another; its warps share a tile's groups. A stage holds what a
// warp consumes in a step: the chunk of one group and the record of activations of that group. The ring runs on from tile to tile, so that
// memory is never idle while sums are added. On Hopper lane 0 asks for bulk copies that an mbarrier counts; on cards before, all lanes
// copy 16 bytes at a time.
#pragma once
#include "layout.cuh"
#include "ptx.cuh"

namespace flexq {

// The tiles of a call. Tiles of the same outputs follow one another, so that their weights are still in the L2 cache.
struct Tiles {
  int outputs, tokens;  // in tiles
  __host__ __device__ Tiles(const Linear& p, int tokens_of_tile)
      : outputs((p.outputs + kChunkRows - 1) / kChunkRows), tokens((p.tokens + tokens_of_tile - 1) / tokens_of_tile) {}
  __host__ __device__ int count() const { return outputs * tokens; }
};

template <int kWarps, int kStages, int kRecordBytes>
struct Ring {
  static constexpr int kStageBytes = kChunkBytes + kRecordBytes;
  static constexpr int kSharedBytes = kWarps * kStages * (kStageBytes + 8);

  const Linear& p;
  Tiles tiles;
  uint8_t* stages;
  uint64_t* full;
  int lane, warp;
  int stage = 0, parity = 0;
  int next_tile, next_group;  // that will be fetched next

  __device__ __forceinline__ Ring(const Linear& linear, Tiles all, uint8_t* shared) : p(linear), tiles(all) {
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    stages = shared + warp * kStages * kStageBytes;
    full = reinterpret_cast<uint64_t*>(shared + kWarps * kStages * kStageBytes) + warp * kStages;
    next_tile = blockIdx.x;
    next_group = warp;
    if (warp >= p.groups) next_tile = tiles.count();  // nothing for this warp
  }

  // Fills the ring: weights at once, activations when the kernel that writes them has finished.
  __device__ __forceinline__ void start() {
#if __CUDA_ARCH__ >= 900
    const int tile = next_tile, group = next_group;
    if (lane == 0) {
      for (int s = 0; s < kStages; ++s) barrier_init(full + s, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      for (int s = 0; s < kStages && next_tile < tiles.count(); ++s, advance()) copy_weights(s);
    }
    __syncwarp();
    wait_for_previous_kernel();
    if (lane == 0) {
      next_tile = tile, next_group = group;
      for (int s = 0; s < kStages && next_tile < tiles.count(); ++s, advance()) copy_record(s);
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
  __device__ __forceinline__ void advance() {
    next_group += kWarps;
    if (next_group >= p.groups) next_group = warp, next_tile += gridDim.x;
  }

  __device__ __forceinline__ const uint8_t* weights() const {
    return p.weight + (int64_t(next_tile / tiles.tokens) * p.groups + next_group) * kChunkBytes;
  }

  __device__ __forceinline__ const uint8_t* record() const {
    return p.activations + (int64_t(next_tile % tiles.tokens) * p.groups + next_group) * kRecordBytes;
  }

  __device__ __forceinline__ void fetch(int s) {
#if __CUDA_ARCH__ >= 900
    if (lane == 0 && next_tile < tiles.count()) {
      copy_weights(s);
      copy_record(s);
      advance();
    }
#else
    if (next_tile < tiles.count()) {
      uint8_t* to = stages + s * kStageBytes;
      warp_copy(to, weights(), kChunkBytes, lane);
      warp_copy(to + kChunkBytes, record(), kRecordBytes, lane);
      advance();
    }
    warp_copy_commit();
#endif
  }

#if __CUDA_ARCH__ >= 900
  __device__ __forceinline__ void copy_weights(int s) {
    barrier_expect(full + s, kStageBytes);
    // Weights that several tiles of tokens share should stay in the L2 cache; the others are read once.
    const uint64_t policy = tiles.tokens == 1 ? evict_first() : evict_last();
    bulk_copy(stages + s * kStageBytes, weights(), kChunkBytes, full + s, policy);
  }

  __device__ __forceinline__ void copy_record(int s) {
    bulk_copy(stages + s * kStageBytes + kChunkBytes, record(), kRecordBytes, full + s);
  }
#endif
};

// Adds what the block's warps have summed, in the order of the warps, and stores y: sixteen outputs at a time, through `shared`.
//   sums[half][t][i]: row 16 half + g + 8 (i / 2), token 8 t + 2 q + i % 2, in units of `unit`
template <int kWarps, int kTokenTiles>
struct Reduction {
  static constexpr int kTokens = kTokenTiles * kTokenTile, kRows = 16;
  static constexpr int kStride = kRows + 4;  // 8 q + g are 32 different banks
  static constexpr int kSharedBytes = kWarps * kTokens * kStride * 4;
  static_assert(kWarps * 32 % kRows == 0, "a thread finishes one output");

  static __device__ __forceinline__ void store(const Linear& p, float* shared, const float (&sums)[2][kTokenTiles][4], int output_tile,
                                               int token_tile, float unit) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    const int row = threadIdx.x % kRows, n = output_tile * kChunkRows + row;
    const Finish finish[2] = {{p, n}, {p, n + kRows}};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) shared[(warp * kTokens + t * kTokenTile + 2 * q + i % 2) * kStride + g + i / 2 * 8] = sums[half][t][i];
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

// The parts of a kernel of this kind, and the shared memory that they take: the warps' rings, then room to add up their sums.
template <Order kOrder, int kBits, int kTokenTiles, int kWarps, int kStages>
struct RingKernel {
  static constexpr int kRecordBytes = activation_record_bytes(kOrder, kBits, kTokenTiles);
  using TheRing = Ring<kWarps, kStages, kRecordBytes>;
  using TheReduction = Reduction<kWarps, kTokenTiles>;
  static constexpr int kSharedBytes = TheRing::kSharedBytes + TheReduction::kSharedBytes;
};

}  // namespace flexq
