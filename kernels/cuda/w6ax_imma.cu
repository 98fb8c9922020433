// W6Ax for few tokens: 6-bit weights become bytes in registers, s8 tensor cores multiply them, each group is scaled in float32.
//
// A block computes 32 outputs for up to 64 tokens; its warps share the groups, and each streams its own chunks (ring.cuh). Bytes of
// weights set the time: at 4.26 TB/s an SM of an H200 gets 24 codes a clock. A code costs 0.8 integer instructions (of 64 a clock and
// SM), so that the tensor cores and the ALUs wait for memory and not the reverse.
#include "expand.cuh"
#include "kernels.h"
#include "ring.cuh"

#include <type_traits>

namespace flexq {
namespace {

// Of many tokens for few warps the parts of sums are added by all warps together: one would hold the others up, and take more room.
template <int kTokenTiles, int kWarps, int kStages>
using Parts = std::conditional_t<2 * kTokenTiles <= kWarps, RingKernel<Order::bytes, 8, kTokenTiles, kWarps, kStages, Handover>,
                                 RingKernel<Order::bytes, 8, kTokenTiles, kWarps, kStages, Reduction>>;

template <int kTokenTiles, int kWarps, int kStages, int kBlocks>
__global__ void __launch_bounds__(kWarps * 32, kBlocks) w6ax_imma_kernel(const __grid_constant__ Linear p) {
  using Kernel = Parts<kTokenTiles, kWarps, kStages>;
  extern __shared__ __align__(128) uint8_t shared[];
  allow_next_kernel();
  const Tiles tiles(p, kTokenTiles * kTokenTile);
  typename Kernel::TheRing ring(p, tiles, shared);
  typename Kernel::TheSum sum(shared + Kernel::TheRing::kSharedBytes);
  sum.start();
  // What the last step of every tile needs and would wait for. Only to the cache: the kernel before may have written it.
  if (const int row = (blockIdx.x + threadIdx.x * gridDim.x) * kChunkRows; row < p.outputs) prefetch(p.exponent + row);
  ring.start();
  __syncthreads();
  const int lane = ring.lane, g = lane / 4, q = lane % 4;

  int group = ring.warp, turn = 0;
  for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x, ++turn) {
    float sums[2][kTokenTiles][4] = {};
    for (; group < p.groups; group += kWarps) {
      const uint8_t* chunk = ring.wait();
      const uint8_t* record = chunk + kChunkBytes;
      const float* sx = reinterpret_cast<const float*>(record + kTokenTiles * 1024) + 2 * q;
      uint32_t a[2][4][4];
      __half2 sw[2];  // of rows g and g + 8
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[12];
        load_half(chunk, half, lane, words);
#pragma unroll
        for (int s = 0; s < 4; ++s) expand(words, s, a[half][s]);
        sw[half] = *reinterpret_cast<const __half2*>(chunk + kCodeBytes + g * 8 + half * 4);
      }
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        const uint4 b0 = *reinterpret_cast<const uint4*>(record + t * 1024 + lane * 16);
        const uint4 b1 = *reinterpret_cast<const uint4*>(record + t * 1024 + 512 + lane * 16);
        const float2 s = *reinterpret_cast<const float2*>(sx + t * kTokenTile);
        int32_t inner[2][4];
#pragma unroll
        for (int step = 0; step < 4; ++step)  // halves are independent: none waits for the one before
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint4 four = step < 2 ? b0 : b1;
            const uint32_t(&w)[4] = a[half][step];
            const uint32_t b0_of_step = step % 2 ? four.z : four.x, b1_of_step = step % 2 ? four.w : four.y;
            if (step == 0)
              mma_s8_start(inner[half], w, b0_of_step, b1_of_step, kMagicBits);
            else
              mma_s8(inner[half], w, b0_of_step, b1_of_step);
          }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
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
    sum.store(p, sums, group % kWarps, tile / tiles.tokens, tile % tiles.tokens, kExpandedUnit, turn);
    group -= p.groups;
  }
}

// kBlocks: that share a multiprocessor. Returns whether the card has the shared memory for that.
template <int kTokenTiles, int kWarps, int kStages, int kBlocks = 1>
bool run(const Linear& p, cudaStream_t stream) {
  constexpr int kSharedBytes = Parts<kTokenTiles, kWarps, kStages>::kSharedBytes;
  const auto kernel = w6ax_imma_kernel<kTokenTiles, kWarps, kStages, kBlocks>;
  const int most = blocks_at_once("w6ax_imma", kernel, kWarps * 32, kSharedBytes);
  if (most < kBlocks * multiprocessor_count("w6ax_imma")) return false;
  const int tiles = Tiles(p, kTokenTiles * kTokenTile).count();
  launch("w6ax_imma", kernel, dim3(tiles < most ? tiles : most), kWarps * 32, kSharedBytes, 1, stream, p);
  return true;
}

}  // namespace

void w6ax_imma(const Linear& p, int token_tiles, cudaStream_t stream) {
  // As an H200 has them the fastest, each layer's weights from memory, after another product and after a norm. One block of many warps
  // reads faster than two, unless all but a few multiprocessors would be idle while those have a second tile. A ring of a row's length is
  // enough; of more groups more warps help more than more stages.
  const int tiles = Tiles(p, token_tiles * kTokenTile).count(), multiprocessors = multiprocessor_count("w6ax_imma");
  const bool few_twice = multiprocessors < tiles && 3 * (tiles - multiprocessors) < multiprocessors;
  bool done = false;
  switch (token_tiles) {
    case 1:
      done = (few_twice && p.groups <= 64 && run<1, 8, 3, 2>(p, stream)) || (p.groups >= 56 && run<1, 20, 2>(p, stream)) ||
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
