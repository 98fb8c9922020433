// W6Ax for few tokens: 6-bit weights become bytes in registers, s8 tensor cores multiply them, each group is scaled in float32.
//
// A block computes tiles of 32 outputs, in the last round perhaps half a one, for up to 64 tokens; its warps share the groups, and each
// streams its own chunks (ring.cuh). Bytes of weights set the time: at 4.26 TB/s an SM of an H200 gets 24 codes a clock. A code costs 0.6
// integer instructions (of 64 a clock and SM), so that the tensor cores and the ALUs wait for memory and not the reverse; those before
// the first product and after the last chunk count all the same: with 0.8 one token takes 2.5% longer over the paper's layers.
#include "imma.cuh"
#include "kernels.h"

#include <type_traits>

namespace flexq {
namespace {

// Of many tokens for few warps the parts of sums are added by all warps together: one would hold the others up, and take more room.
template <int kTokenTiles, int kWarps, int kStages>
using Parts = std::conditional_t<2 * kTokenTiles <= kWarps, RingKernel<Order::bytes, 8, kTokenTiles, kWarps, kStages, Handover>,
                                 RingKernel<Order::bytes, 8, kTokenTiles, kWarps, kStages, Reduction>>;

// Records of activations come with the chunks.
template <int kTokenTiles>
struct FromRecord {
  __device__ __forceinline__ Activations operator()(const uint8_t* record, int, int t, int lane) const {
    const float* scales = reinterpret_cast<const float*>(record + kTokenTiles * 1024) + t * kTokenTile;
    const uint8_t* codes = record + t * 1024 + lane * 16;
    return {*reinterpret_cast<const uint4*>(codes), *reinterpret_cast<const uint4*>(codes + 512),
            *reinterpret_cast<const float2*>(scales + lane % 4 * 2)};
  }
};

template <int kTokenTiles, int kWarps, int kStages, int kBlocks>
__global__ void __launch_bounds__(kWarps * 32, kBlocks)
    w6ax_imma_kernel(const __grid_constant__ Linear p, const __grid_constant__ Shares shares) {
  using Kernel = Parts<kTokenTiles, kWarps, kStages>;
  extern __shared__ __align__(128) uint8_t shared[];
  allow_next_kernel();
  typename Kernel::TheRing ring(p, shares, shared);
  typename Kernel::TheSum sum(shared + Kernel::TheRing::kSharedBytes);
  sum.start();
  // What the last step of every tile needs and would wait for. Only to the cache: the kernel before may have written it.
  if (const int row = (blockIdx.x + threadIdx.x * gridDim.x) * kChunkRows; row < p.outputs) prefetch(p.exponent + row);
  ring.start();
  __syncthreads();
  multiply<kTokenTiles, kWarps>(p, ring, sum, FromRecord<kTokenTiles>());
}

// kBlocks: that share a multiprocessor. Returns whether the card has the shared memory for that.
template <int kTokenTiles, int kWarps, int kStages, int kBlocks = 1>
bool run(const Linear& p, cudaStream_t stream) {
  constexpr int kSharedBytes = Parts<kTokenTiles, kWarps, kStages>::kSharedBytes;
  const auto kernel = w6ax_imma_kernel<kTokenTiles, kWarps, kStages, kBlocks>;
  const int most = blocks_at_once("w6ax_imma", kernel, kWarps * 32, kSharedBytes);
  if (most < kBlocks * multiprocessor_count("w6ax_imma")) return false;
  const Shares shares(p, kTokenTiles * kTokenTile, most);
  launch("w6ax_imma", kernel, dim3(shares.blocks), kWarps * 32, kSharedBytes, 1, stream, p, shares);
  return true;
}

// Of a few tokens and many tiles a block keeps the codes of all groups, which is less to read than a record with every chunk.
template <int kTokens, int kWarps, int kStages>
struct ResidentSizes {
  using TheRing = Ring<kWarps, kStages, 0>;
  using TheSum = Handover<kWarps, 1, kTokens>;
  static_assert((TheRing::kSharedBytes + TheSum::kSharedBytes) % 16 == 0, "codes are read 16 bytes at a time");
  static constexpr int kMostGroups = 64;
  static constexpr int kSharedBytes = TheRing::kSharedBytes + TheSum::kSharedBytes + kMostGroups * Resident<kTokens>::kGroupBytes;
};

template <int kTokens, int kWarps, int kStages>
__global__ void __launch_bounds__(kWarps * 32, 1)
    w6ax_imma_resident_kernel(const __grid_constant__ Linear p, const __grid_constant__ Shares shares) {
  using All = ResidentSizes<kTokens, kWarps, kStages>;
  extern __shared__ __align__(128) uint8_t shared[];
  allow_next_kernel();
  typename All::TheRing ring(p, shares, shared);
  typename All::TheSum sum(shared + All::TheRing::kSharedBytes);
  const Resident<kTokens> tokens(shared + All::TheRing::kSharedBytes + All::TheSum::kSharedBytes, p.groups);
  sum.start();
  if (const int row = (blockIdx.x + threadIdx.x * gridDim.x) * kChunkRows; row < p.outputs) prefetch(p.exponent + row);
  ring.start();
  tokens.fill(p.activations, p.groups);
  __syncthreads();
  multiply<1, kWarps>(p, ring, sum, tokens);
}

template <int kTokens, int kWarps, int kStages>
bool run_resident(const Linear& p, cudaStream_t stream) {
  using All = ResidentSizes<kTokens, kWarps, kStages>;
  if (p.tokens > kTokens || p.groups > All::kMostGroups) return false;
  const auto kernel = w6ax_imma_resident_kernel<kTokens, kWarps, kStages>;
  const int most = blocks_at_once("w6ax_imma", kernel, kWarps * 32, All::kSharedBytes);
  if (most == 0) return false;
  const Shares shares(p, kTokenTile, most);
  launch("w6ax_imma", kernel, dim3(shares.blocks), kWarps * 32, All::kSharedBytes, 1, stream, p, shares);
  return true;
}

}  // namespace

void w6ax_imma(const Linear& p, int token_tiles, cudaStream_t stream) {
  // As an H200 has them the fastest, each layer's weights from memory, after another product and after a norm. One block of many warps
  // reads faster than two, unless all but a few multiprocessors would be idle while those have a second tile, or halves of one. A ring of a
  // row's length is enough; of more groups more warps help more than more stages, and still more that codes of few tokens are read once a
  // block.
  const int tiles = tile_count(p, token_tiles * kTokenTile), multiprocessors = multiprocessor_count("w6ax_imma");
  const bool few_twice = multiprocessors < tiles && 3 * (tiles - multiprocessors) < multiprocessors;
  bool done = false;
  switch (token_tiles) {
    case 1:
      done = (few_twice && p.groups <= 64 && run<1, 8, 3, 2>(p, stream)) ||
             (p.tokens == 1 && p.groups > 32 && w6ax_imma_row(p, Row{{}, Before::codes}, stream)) ||
             (4 * multiprocessors < tiles && p.groups > 48 && run_resident<4, 16, 3>(p, stream)) ||
             (p.groups >= 56 && run<1, 20, 2>(p, stream)) ||
             (p.groups > 32 && run<1, 16, 3>(p, stream)) || run<1, 16, 2>(p, stream) || run<1, 8, 2>(p, stream);
      break;
    case 2: done = (few_twice && run<2, 8, 2, 2>(p, stream)) || run<2, 8, 4>(p, stream) || run<2, 6, 2>(p, stream); break;
    case 4: done = (few_twice && run<4, 4, 3, 2>(p, stream)) || run<4, 8, 3>(p, stream) || run<4, 4, 2>(p, stream); break;
    case 8: done = run<8, 8, 2>(p, stream) || run<8, 2, 2>(p, stream); break;
    default: throw std::invalid_argument("token_tiles is " + std::to_string(token_tiles) + "; accepted: 1, 2, 4, 8");
  }
  if (!done) throw std::runtime_error("w6ax_imma: this card has too little shared memory");
}

}  // namespace flexq
