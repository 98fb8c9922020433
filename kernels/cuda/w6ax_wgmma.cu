// W6Ax for many tokens on Hopper: 6-bit weights become bytes in registers and meet the activations in shared memory (s8 wgmma).
//
// A block computes 128 kBlocks outputs x kTokens tokens. One warp fetches and leaves; two warpgroups multiply, each 64 kBlocks outputs.
// Weights go from shared memory to registers, where a code costs 0.8 instructions to expand, and from there straight into the tensor
// cores: what is expanded is never stored. While the tensor cores multiply one group, the warpgroup reads the next; then it scales and
// adds the sums in float32, three instructions a sum and group.
//
// Where there are fewer tiles than multiprocessors, a cluster of blocks shares the groups of a tile, and each block adds up its share of
// the tokens from its neighbours' shared memory, in their order: the result does not depend on timing.
#include <cooperative_groups.h>

#include "expand.cuh"
#include "kernels.h"
#include "layout.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace flexq {
namespace {

constexpr int kTeamWarps = 8;  // two warpgroups
constexpr int kMostSplit = 8;  // blocks of a cluster

template <int kTokens, int kBlocks, int kStages>
struct Shape {
  // With up to 32 tokens two blocks fit a multiprocessor, and one multiplies while the other waits. With 64 a block has two teams for
  // that, which take the groups in turn. From there on the multiplying warps want more registers than their share: they take those
  // of the fetching warp, for which it has a warpgroup to itself, since registers move between whole ones only.
  static constexpr int kTeams = kTokens == 64 ? 2 : 1, kConsumerWarps = kTeams * kTeamWarps, kConsumers = kConsumerWarps * 32;
  static constexpr int kRegisters = kTokens == 128 ? 240 : kTokens == 64 ? 112 : 0;  // 0: as the compiler allots them
  static constexpr int kThreads = kConsumers + (kRegisters ? 128 : 32), kBlocksAtOnce = kRegisters ? 1 : 2;
  static constexpr int kRows = 128 * kBlocks, kChunks = kRows / kChunkRows;
  static constexpr int kRecordBytes = activation_record_bytes(Order::swizzled, 8, kTokens / kTokenTile);
  // Swizzled operands begin at multiples of 1024 bytes, and so does every stage: the record first, then the chunks.
  static constexpr int kStageBytes = (kRecordBytes + kChunks * kChunkBytes + 1023) / 1024 * 1024;
  static constexpr int kSumStride = kRows + 4;  // floats; 8 q + g are 32 different banks
  static constexpr int kTeamSums = kTokens * kSumStride;
  static constexpr int kSharedBytes = kStages * (kStageBytes + 16) + 1024;
  static_assert(kTeams * kTeamSums * 4 <= kStages * kStageBytes, "the sums fit where the stages were");
};

template <int kTokens, int kBlocks, int kStages>
__global__ void __launch_bounds__(Shape<kTokens, kBlocks, kStages>::kThreads, Shape<kTokens, kBlocks, kStages>::kBlocksAtOnce)
    w6ax_wgmma_kernel(const __grid_constant__ Linear p, int token_tiles, int split) {
#if __CUDA_ARCH__ >= 900  // the host never launches it elsewhere
  using Parts = Shape<kTokens, kBlocks, kStages>;
  extern __shared__ uint8_t unaligned[];
  uint8_t* shared = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  auto* full = reinterpret_cast<uint64_t*>(shared + kStages * Parts::kStageBytes);
  uint64_t* empty = full + kStages;
  allow_next_kernel();

  const int rank = blockIdx.x % split, tile = blockIdx.x / split;
  const int row_tile = tile / token_tiles, token_tile = tile % token_tiles;
  const int first_group = p.groups * rank / split, groups = p.groups * (rank + 1) / split - first_group;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) barrier_init(full + s, 1), barrier_init(empty + s, kTeamWarps);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (warp >= Parts::kConsumerWarps) {
    if constexpr (Parts::kRegisters > 0) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (warp > Parts::kConsumerWarps) return;
    // Lane c fetches chunk c of the tile's outputs; past the last outputs the last chunk is read again, and nothing of it is stored.
    const int last = (p.outputs - 1) / kChunkRows, chunk = row_tile * Parts::kChunks + lane;
    const uint8_t* weights = p.weight + (int64_t(chunk < last ? chunk : last) * p.groups + first_group) * kChunkBytes;
    const uint8_t* records = p.activations + (int64_t(token_tile) * p.groups + first_group) * Parts::kRecordBytes;
    const uint64_t policy = token_tiles == 1 ? evict_first() : evict_last();
    const auto fetch_weights = [&](int step) {
      uint8_t* stage = shared + step % kStages * Parts::kStageBytes;
      if (lane == 0) barrier_expect(full + step % kStages, Parts::kRecordBytes + Parts::kChunks * kChunkBytes);
      __syncwarp();
      if (lane < Parts::kChunks)
        bulk_copy(stage + Parts::kRecordBytes + lane * kChunkBytes, weights + int64_t(step) * kChunkBytes, kChunkBytes, full + step % kStages,
                  policy);
    };
    const auto fetch_record = [&](int step) {
      if (lane == 0)
        bulk_copy(shared + step % kStages * Parts::kStageBytes, records + int64_t(step) * Parts::kRecordBytes, Parts::kRecordBytes,
                  full + step % kStages);
    };
    // Weights do not depend on the kernel before, activations do.
    const int at_once = groups < kStages ? groups : kStages;
    for (int step = 0; step < at_once; ++step) fetch_weights(step);
    wait_for_previous_kernel();
    for (int step = 0; step < at_once; ++step) fetch_record(step);
    for (int step = kStages; step < groups; ++step) {
      barrier_wait(empty + step % kStages, (step / kStages + 1) % 2);
      fetch_weights(step);
      fetch_record(step);
    }
  } else {
    if constexpr (Parts::kRegisters > 0) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Parts::kRegisters));
    float sums[kBlocks][kTokens / 2] = {};
    // This warp's half chunk of block b of its warpgroup: rows 64 (kBlocks * warpgroup + b) + 16 (warp % 4) of the tile.
    const int team = warp / kTeamWarps, warpgroup = warp % kTeamWarps / 4;
    const auto half_chunk = [&](const uint8_t* stage, int b) {
      return stage + Parts::kRecordBytes + ((warpgroup * kBlocks + b) * 2 + warp % 4 / 2) * kChunkBytes;
    };
    const Finish finish(p, row_tile * Parts::kRows + threadIdx.x % Parts::kRows);
    uint32_t words[12];
    const auto load_words = [&](const uint8_t* stage, int b) { load_half(half_chunk(stage, b), warp % 2, lane, words); };
    int32_t inner[kTokens / 2];
#pragma unroll
    for (int e = 0; e < kTokens / 2; ++e) inner[e] = kMagicBits;
    const auto wait_for = [&](int step) {
      barrier_wait(full + step % kStages, step / kStages % 2);
      return shared + step % kStages * Parts::kStageBytes;
    };
    if (team < groups) load_words(wait_for(team), 0);
    for (int step = team; step < groups; step += Parts::kTeams) {
      const uint8_t* here = shared + step % kStages * Parts::kStageBytes;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        uint32_t a[4][4];
#pragma unroll
        for (int s = 0; s < 4; ++s) expand(words, s, a[s]);
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < 4; ++s) wgmma_s8<kTokens>(inner, a[s], swizzled_operand(shared_address(here) + 32 * s));
        wgmma_commit();
        if (b + 1 < kBlocks) {
          load_words(here, b + 1);
        } else if (step + Parts::kTeams < groups) {
          load_words(wait_for(step + Parts::kTeams), 0);
        }
        const float2 sw = __half22float2(*reinterpret_cast<const __half2*>(half_chunk(here, b) + kCodeBytes + g * 8 + warp % 2 * 4));
        const float2 start = make_float2(-kMagic * sw.x, -kMagic * sw.y);
        const auto* sx = reinterpret_cast<const float2*>(here + kTokens * kGroup) + q;
        wgmma_wait(inner);
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
          const float2 s = sx[4 * j];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int e = 4 * j + i;
            sums[b][e] = fmaf(scaled(inner[e], i < 2 ? sw.x : sw.y, i < 2 ? start.x : start.y), i % 2 ? s.y : s.x, sums[b][e]);
            inner[e] = kMagicBits;
          }
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + step % kStages);
    }
    wait_for_previous_kernel();

    // Sums go through shared memory, [token][output], so that neighbouring threads store neighbouring outputs.
    const auto cluster = cooperative_groups::this_cluster();
    threads_meet<Parts::kConsumers>();
    auto* buffer = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int e = 0; e < kTokens / 2; ++e) {
        const int token = e / 4 * 8 + 2 * q + e % 2, row = (warpgroup * kBlocks + b) * 64 + warp % 4 * 16 + g + e % 4 / 2 * 8;
        buffer[team * Parts::kTeamSums + token * Parts::kSumStride + row] = sums[b][e];
      }
    if (split == 1)
      threads_meet<Parts::kConsumers>();
    else
      cluster.sync();  // threads that have left do not count
    const int row = threadIdx.x % Parts::kRows;
    constexpr int kAtOnce = Parts::kConsumers / Parts::kRows;  // tokens
    const auto teams_sum = [&](const float* sums_of_block, int m) {
      const float* at = sums_of_block + m * Parts::kSumStride + row;
      return Parts::kTeams == 1 ? at[0] : at[0] + at[Parts::kTeamSums];
    };
    const auto finish_token = [&](int m, float sum) {
      const int token = token_tile * kTokens + m;
      if (token < p.tokens && row_tile * Parts::kRows + row < p.outputs)
        store_float(p.y, int64_t(token) * p.outputs + row_tile * Parts::kRows + row, p.y_type, finish(sum * kExpandedUnit));
    };
    if (split == 1) {
#pragma unroll 8
      for (int m = threadIdx.x / Parts::kRows; m < kTokens; m += kAtOnce) finish_token(m, teams_sum(buffer, m));
    } else {
      for (int m = rank * kAtOnce + threadIdx.x / Parts::kRows; m < kTokens; m += split * kAtOnce) {
        float parts[kMostSplit];  // all asked for before the first is needed
#pragma unroll
        for (int r = 0; r < kMostSplit; ++r)
          parts[r] = r < split ? teams_sum(cluster.map_shared_rank(buffer, r), m) : 0.0f;
        float sum = 0.0f;
#pragma unroll
        for (int r = 0; r < kMostSplit; ++r) sum += parts[r];
        finish_token(m, sum);
      }
    }
    if (split > 1) cluster.sync();  // nobody leaves while a neighbour reads from it
  }
#endif
}

template <int kTokens, int kBlocks, int kStages>
void run(const Linear& p, cudaStream_t stream) {
  using Parts = Shape<kTokens, kBlocks, kStages>;
  const auto kernel = w6ax_wgmma_kernel<kTokens, kBlocks, kStages>;
  const int most = blocks_at_once("w6ax_wgmma", kernel, Parts::kThreads, Parts::kSharedBytes);
  const int token_tiles = (p.tokens + kTokens - 1) / kTokens;
  const int tiles = (p.outputs + Parts::kRows - 1) / Parts::kRows * token_tiles;
  int split = 1;  // as many blocks as run at once, if each has a few groups to itself
  while (split < kMostSplit && tiles * split * 2 <= most && p.groups >= 8 * split) split *= 2;
  launch("w6ax_wgmma", kernel, dim3(tiles * split), Parts::kThreads, Parts::kSharedBytes, split, stream, p, token_tiles, split);
}

}  // namespace

void w6ax_wgmma(const Linear& p, int token_tiles, cudaStream_t stream) {
  switch (token_tiles) {
    case 2: return run<16, 1, 5>(p, stream);
    case 4: return run<32, 1, 4>(p, stream);
    case 8: return run<64, 1, 8>(p, stream);
    case 16: return p.tokens <= 128 ? run<128, 1, 7>(p, stream) : run<128, 2, 5>(p, stream);
    default: throw std::invalid_argument("token_tiles is " + std::to_string(token_tiles) + "; accepted: 2, 4, 8, 16");
  }
}

}  // namespace flexq
