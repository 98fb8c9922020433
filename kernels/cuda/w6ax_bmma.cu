// W6Ax the paper's way (FlexQ §4): bit planes of weights and activations on binary tensor cores, recombined as integers.
//
//   sum_k u x = sum over planes i of u, j of x: +-2^(i + j) * popcount(u_i & x_j),   u = q + 2^(b - 1) unsigned, x in two's complement
//
// Pairs of equal i + j share an accumulator, and from one such diagonal to the next the accumulator doubles (Horner): one shift a diagonal
// is all that recombination costs. An instruction sums over 256 bits and a group has 128, so that two pairs of a diagonal share one: of
// planes i and i + 1 of the weights, i even, which lie in neighbouring registers. W6A6 takes 24 instructions in place of 36. Only x's sign
// plane is negative: its pairs have a second accumulator. The weights' offset is undone with the sum of the activations' codes:
// sum q x = sum u x - 2^(b - 1) sum x.
//
// One token alone would leave seven of the instruction's eight columns empty: then the columns are its bit planes, and six products
// (one a plane of the weights) are all.
//
// Weights and activations may have 2 to 8 bits each. How many is known when this is compiled, so that loops over planes are unrolled and
// no plane is multiplied that is not there: 6-bit weights with 6- and 8-bit activations are compiled with the other kernels, and for
// others a build defines FLEXQ_WEIGHT_BITS.
#include "expand.cuh"
#include "kernels.h"
#include "ring.cuh"

namespace flexq {
namespace {

#ifdef FLEXQ_WEIGHT_BITS
using ActivationBits = std::integer_sequence<int, 2, 3, 4, 5, 6, 7, 8>;
#else
using ActivationBits = std::integer_sequence<int, 6, 8>;
#endif

constexpr int kPlanes = kWeightBits, kOffset = 1 << (kPlanes - 1);
using Words = uint32_t[2 * kPlanes];

// The words that a lane has of a half of a chunk.
__device__ __forceinline__ void load_planes(const uint8_t* chunk, int half, int lane, Words& words) {
  const uint8_t* codes = chunk + half * kHalfStride;
#pragma unroll
  for (int v = 0; v < kPlanes / 2; ++v) *reinterpret_cast<uint4*>(words + 4 * v) = *reinterpret_cast<const uint4*>(codes + v * 512 + lane * 16);
  if constexpr (kPlanes % 2)
    *reinterpret_cast<uint2*>(words + 2 * kPlanes - 2) = *reinterpret_cast<const uint2*>(codes + kPlanes / 2 * 512 + lane * 8);
}

// sum u x of rows g and g + 8 of a half chunk with one token: two columns of planes a lane, weighted, then added across the four lanes.
template <int kBits>
__device__ __forceinline__ void multiply_one(const Words& words, uint32_t plane, int q, int32_t (&rows)[2]) {
  int32_t c[4] = {};
#pragma unroll
  for (int i = kPlanes - 1; i >= 0; --i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) c[e] <<= 1;
    mma_b1(c, words[2 * i], words[2 * i + 1], plane);
  }
  const auto weighted = [&](int j, int32_t sum) { return j == kBits - 1 ? -(sum << j) : sum << j; };  // columns past the planes are zero
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    rows[h] = weighted(2 * q, c[2 * h]) + weighted(2 * q + 1, c[2 * h + 1]);
    rows[h] += __shfl_xor_sync(0xffffffffu, rows[h], 1);
    rows[h] += __shfl_xor_sync(0xffffffffu, rows[h], 2);
  }
}

// Two blocks a multiprocessor are as many as the shared memory holds; of one token more, and their registers are few.
template <int kBits, int kTokenTiles, int kWarps, int kStages, bool kOne>
__global__ void __launch_bounds__(kWarps * 32, kOne ? 0 : 2)
    w6ax_bmma_kernel(const __grid_constant__ Linear p, const __grid_constant__ Shares shares) {
  using Parts = RingKernel<Order::planes, kBits, kTokenTiles, kWarps, kStages, Reduction>;
  constexpr int kTileBytes = activation_tile_bytes(Order::planes, kBits), kSign = kBits - 1;
  extern __shared__ __align__(128) uint8_t shared[];
  allow_next_kernel();
  typename Parts::TheRing ring(p, shares, shared);
  ring.start();
  const int lane = ring.lane, g = lane / 4, q = lane % 4;

  // Once: there is a block a tile. From one tile to the next the ring would go on with other groups than this loop, see ring.cuh.
  for (int tile = blockIdx.x; tile < shares.whole; tile += gridDim.x) {
    float sums[2][kTokenTiles][4] = {};
    for (int group = ring.warp; group < p.groups; group += kWarps) {
      const uint8_t* chunk = ring.wait();
      const uint8_t* record = chunk + kChunkBytes;
      const float* sx = reinterpret_cast<const float*>(record + kTokenTiles * kTileBytes) + 2 * q;
      const uint2 four_scales = *reinterpret_cast<const uint2*>(chunk + kHalfBytes + g * 8);
      Words words[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) load_planes(chunk, half, lane, words[half]);
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        const uint8_t* codes = record + t * kTileBytes;
        const float2 s = *reinterpret_cast<const float2*>(sx + t * kTokenTile);
        if constexpr (kOne) {
          const uint32_t plane = g < kBits ? *reinterpret_cast<const uint32_t*>(codes + g * 128 + q * 4) : 0;
          const int32_t x_sum = *reinterpret_cast<const int32_t*>(codes + kBits * 128);
          const float sx_of_token = *reinterpret_cast<const float*>(record + kTileBytes);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            int32_t rows[2];
            multiply_one<kBits>(words[half], plane, q, rows);
            const uint32_t two = half == 0 ? four_scales.x : four_scales.y;
            const float2 sw = __half22float2(*reinterpret_cast<const __half2*>(&two));
            sums[half][0][0] = fmaf(float(rows[0] - kOffset * x_sum), sw.x * sx_of_token, sums[half][0][0]);
            sums[half][0][2] = fmaf(float(rows[1] - kOffset * x_sum), sw.y * sx_of_token, sums[half][0][2]);
          }
        } else {
          uint32_t planes[kBits];
#pragma unroll
          for (int j = 0; j < kBits; ++j) planes[j] = *reinterpret_cast<const uint32_t*>(codes + j * 128 + lane * 4);
          const int2 x_sum = *reinterpret_cast<const int2*>(codes + kBits * 128 + q * 8);
          // The sum's bits become those of a float32 number with the last doubling, which takes the weights' offset off as well.
          const int32_t start[2] = {kMagicBits - kOffset * x_sum.x, kMagicBits - kOffset * x_sum.y};
          int32_t plus[2][4] = {}, minus[2][4] = {};  // two halves: two independent chains
#pragma unroll
          for (int diagonal = kPlanes + kBits - 2; diagonal >= 0; --diagonal) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
              for (int i = 0; i < 4; ++i) plus[half][i] = 2 * plus[half][i] + (diagonal == 0 ? start[i % 2] : 0);
              if (diagonal >= kSign)
#pragma unroll
                for (int i = 0; i < 4; ++i) minus[half][i] <<= 1;
            }
#pragma unroll
            for (int i = 0; i < kPlanes; i += 2) {  // u_i meets x_j, u_i + 1 x_j - 1
              const int j = diagonal - i;
              const bool first = j >= 0 && j < kSign, second = i + 1 < kPlanes && j > 0 && j <= kSign;
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const uint32_t* u = words[half] + 2 * i;
                if (first && second)
                  mma_b1_two(plus[half], u[0], u[1], planes[j], u[2], u[3], planes[j - 1]);
                else if (first)
                  mma_b1(plus[half], u[0], u[1], planes[j]);
                else if (second)
                  mma_b1(plus[half], u[2], u[3], planes[j - 1]);
              }
            }
            if (diagonal >= kSign)
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const uint32_t* u = words[half] + 2 * (diagonal - kSign);
                mma_b1(minus[half], u[0], u[1], planes[kSign]);
              }
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t two = half == 0 ? four_scales.x : four_scales.y;
            const float2 sw = __half22float2(*reinterpret_cast<const __half2*>(&two));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float inner = __int_as_float(plus[half][i] - (minus[half][i] << kSign)) - kMagic;
              sums[half][t][i] = fmaf(inner, (i < 2 ? sw.x : sw.y) * (i % 2 ? s.y : s.x), sums[half][t][i]);
            }
          }
        }
      }
      ring.release();
    }
    typename Parts::TheSum sum(shared + Parts::TheRing::kSharedBytes);
    sum.store(p, sums, ring.warp, tile / shares.token_tiles * kChunkRows, tile % shares.token_tiles, 1.0f, 0);
  }
}

// Returns whether the card has the shared memory for this shape.
template <int kBits, int kTokenTiles, int kWarps, int kStages, bool kOne = false>
bool run(const Linear& p, cudaStream_t stream) {
  using Parts = RingKernel<Order::planes, kBits, kTokenTiles, kWarps, kStages, Reduction>;
  const auto kernel = w6ax_bmma_kernel<kBits, kTokenTiles, kWarps, kStages, kOne>;
  if (blocks_at_once("w6ax_bmma", kernel, kWarps * 32, Parts::kSharedBytes) == 0) return false;
  // A block a tile: here the arithmetic counts too, and as many blocks as fit would share the tiles unevenly.
  const int tiles = tile_count(p, kTokenTiles * kTokenTile);
  launch("w6ax_bmma", kernel, dim3(tiles), kWarps * 32, Parts::kSharedBytes, 1, stream, p, Shares(p, kTokenTiles * kTokenTile, tiles));
  return true;
}

template <int kBits>
bool run(const Linear& p, int token_tiles, cudaStream_t stream) {
  if (token_tiles == 2) return run<kBits, 2, 8, 2>(p, stream) || run<kBits, 2, 4, 2>(p, stream);
  if (p.tokens == 1) return run<kBits, 1, 8, 3, true>(p, stream) || run<kBits, 1, 8, 2, true>(p, stream);
  constexpr int kMostWarps = kPlanes < 8 ? 12 : 8;  // twelve with eight planes each would be short of registers
  return run<kBits, 1, kMostWarps, 2>(p, stream) || run<kBits, 1, 8, 2>(p, stream);
}

template <int... kBits>
void run(const Linear& p, int token_tiles, int activation_bits, cudaStream_t stream, std::integer_sequence<int, kBits...>) {
  if (!((activation_bits == kBits) || ...))
    throw std::invalid_argument("w6ax_bmma: " + std::to_string(activation_bits) + "-bit activations are not in this build");
  if (token_tiles != 1 && token_tiles != 2)
    throw std::invalid_argument("token_tiles is " + std::to_string(token_tiles) + "; accepted: 1, 2");
  if (!((activation_bits == kBits && run<kBits>(p, token_tiles, stream)) || ...))
    throw std::runtime_error("w6ax_bmma: this card has too little shared memory");
}

}  // namespace

void w6ax_bmma(const Linear& p, int token_tiles, int activation_bits, cudaStream_t stream) {
  run(p, token_tiles, activation_bits, stream, ActivationBits());
}

}  // namespace flexq
