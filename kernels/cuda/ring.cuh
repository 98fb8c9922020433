// A warp's own ring of stages in shared memory: it fetches what it will use, with no other warp to wait for.
//
// A stage is a chunk of weights and the record of activations of the same group. On Hopper lane 0 asks for both by bulk copies
// that an mbarrier counts; on cards before, all lanes copy 16 bytes at a time.
#pragma once
#include "layout.cuh"
#include "ptx.cuh"

namespace flexq {

template <int kWarps, int kStages, int kRecordBytes>
struct Ring {
  static constexpr int kStageBytes = kChunkBytes + kRecordBytes;
  static constexpr int kSharedBytes = kWarps * kStages * (kStageBytes + 8);

  uint8_t* stages;
  uint64_t* full;
  const uint8_t *weights, *records;
  int lane, steps;
  int stage = 0, parity = 0;

  // Steps of warp w are groups w, w + kWarps, ...
  __device__ __forceinline__ Ring(uint8_t* shared, const uint8_t* weights_of_block, const uint8_t* records_of_block, int groups) {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    stages = shared + warp * kStages * kStageBytes;
    full = reinterpret_cast<uint64_t*>(shared + kWarps * kStages * kStageBytes) + warp * kStages;
    weights = weights_of_block + int64_t(warp) * kChunkBytes;
    records = records_of_block + int64_t(warp) * kRecordBytes;
    steps = (groups - warp + kWarps - 1) / kWarps;
  }

  // Fills the ring: weights at once, activations when the kernel that writes them has finished.
  __device__ __forceinline__ void start() {
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
      for (int s = 0; s < kStages; ++s) barrier_init(full + s, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      for (int s = 0; s < kStages && s < steps; ++s) {
        barrier_expect(full + s, kStageBytes);
        copy_weights(s, s);
      }
    }
    __syncwarp();
    wait_for_previous_kernel();
    if (lane == 0)
      for (int s = 0; s < kStages && s < steps; ++s) copy_record(s, s);
#else
    for (int s = 0; s < kStages; ++s) fetch(s, s);
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

  // All lanes have read the stage of `step`: it is filled for the step that will use it next.
  __device__ __forceinline__ void release(int step) {
    __syncwarp();
    fetch(stage, step + kStages);
    if (++stage == kStages) stage = 0, parity ^= 1;
  }

 private:
  __device__ __forceinline__ void fetch(int s, int step) {
#if __CUDA_ARCH__ >= 900
    if (lane == 0 && step < steps) {
      barrier_expect(full + s, kStageBytes);
      copy_weights(s, step);
      copy_record(s, step);
    }
#else
    if (step < steps) {
      warp_copy(stages + s * kStageBytes, weights + int64_t(step) * kWarps * kChunkBytes, kChunkBytes, lane);
      warp_copy(stages + s * kStageBytes + kChunkBytes, records + int64_t(step) * kWarps * kRecordBytes, kRecordBytes, lane);
    }
    warp_copy_commit();
#endif
  }

#if __CUDA_ARCH__ >= 900
  __device__ __forceinline__ void copy_weights(int s, int step) {
    bulk_copy(stages + s * kStageBytes, weights + int64_t(step) * kWarps * kChunkBytes, kChunkBytes, full + s, evict_first());
  }

  __device__ __forceinline__ void copy_record(int s, int step) {
    bulk_copy(stages + s * kStageBytes + kChunkBytes, records + int64_t(step) * kWarps * kRecordBytes, kRecordBytes, full + s);
  }
#endif
};

// Adds what the block's warps have summed, in the order of the warps, and stores y = 2^(exponent + shift) * sum + bias.
//   sums[half][tile][i]: row 16 half + g + 8 (i / 2), token 8 tile + 2 q + i % 2.  `shared` is the rings' memory, all read.
template <int kWarps, int kTokenTiles>
__device__ __forceinline__ void add_and_store(const Linear& p, float* shared, const float (&sums)[2][kTokenTiles][4], int shift) {
  constexpr int kTokens = kTokenTiles * kTokenTile, kStride = kChunkRows + 4;  // 8 q + g are 32 different banks
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        shared[(warp * kTokens + t * kTokenTile + 2 * q + i % 2) * kStride + half * 16 + g + i / 2 * 8] = sums[half][t][i];
  __syncthreads();
  for (int e = threadIdx.x; e < kTokens * kChunkRows; e += kWarps * 32) {
    const int token = blockIdx.y * kTokens + e / kChunkRows, n = blockIdx.x * kChunkRows + e % kChunkRows;
    if (token >= p.tokens) break;
    if (n >= p.outputs) continue;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared[(w * kTokens + e / kChunkRows) * kStride + e % kChunkRows];
    float y = ldexpf(sum, p.exponent[n] + shift);
    if (p.bias) y += load_float(p.bias, n, p.bias_type);
    store_float(p.y, int64_t(token) * p.outputs + n, p.y_type, y);
  }
}

}  // namespace flexq
