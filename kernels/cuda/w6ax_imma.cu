// W6Ax for few tokens: 6-bit weights become bytes in registers, s8 tensor cores multiply them, each group is scaled in float32.
//
// A block computes 32 outputs for up to 64 tokens; its warps share the groups, and each streams its own chunks (ring.cuh). Bytes of
// weights set the time: at 4.26 TB/s an SM of an H200 gets 24 codes a clock. A code costs 0.8 integer instructions (of 64 a clock and
// SM), so that the tensor cores and the ALUs wait for memory and not the reverse.
#include "kernels.h"
#include "ring.cuh"

namespace flexq {
namespace {

// Four bytes 4 q from the words of a lane's half chunk: the upper four bits from a nibble, the next two from a field of two bits, and
// zeros. Four times the code is a signed byte as it stands, with neither an offset to undo nor a sign to extend.
__device__ __forceinline__ void expand(const uint32_t (&words)[12], int s, uint32_t (&a)[4]) {
  constexpr uint32_t kUpper = 0xf0f0f0f0u, kLower = 0x0c0c0c0cu;
  const uint32_t n0 = words[2 * s], n1 = words[2 * s + 1], t = words[8 + s];
  a[0] = (n0 & kUpper) | ((t << 2) & kLower);
  a[1] = ((n0 << 4) & kUpper) | (t & kLower);
  a[2] = (n1 & kUpper) | ((t >> 2) & kLower);
  a[3] = ((n1 << 4) & kUpper) | ((t >> 4) & kLower);
}

// An integer below 2^22 added to these bits is the mantissa of 1.5 * 2^23 + itself: a subtraction converts it, exactly and at the full
// rate, which a conversion does not have.
constexpr int32_t kMagicBits = 0x4b400000;
constexpr float kMagic = 12582912.0f;

template <int kTokenTiles, int kWarps, int kStages>
__global__ void __launch_bounds__(kWarps * 32) w6ax_imma_kernel(const __grid_constant__ Linear p) {
  constexpr int kRecordBytes = activation_record_bytes(Order::bytes, 8, kTokenTiles);
  extern __shared__ __align__(128) uint8_t shared[];
  allow_next_kernel();
  Ring<kWarps, kStages, kRecordBytes> ring(shared, p.weight + int64_t(blockIdx.x) * p.groups * kChunkBytes,
                                           p.activations + int64_t(blockIdx.y) * p.groups * kRecordBytes, p.groups);
  ring.start();
  const int lane = ring.lane, g = lane / 4, q = lane % 4;
  float sums[2][kTokenTiles][4] = {};

  for (int step = 0; step < ring.steps; ++step) {
    const uint8_t* chunk = ring.wait();
    const uint8_t* record = chunk + kChunkBytes;
    const float* sx = reinterpret_cast<const float*>(record + kTokenTiles * 1024) + 2 * q;
    const uint2 four_scales = *reinterpret_cast<const uint2*>(chunk + kCodeBytes + g * 8);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[12];
#pragma unroll
      for (int v = 0; v < 3; ++v)
        *reinterpret_cast<uint4*>(words + 4 * v) = *reinterpret_cast<const uint4*>(chunk + (3 * half + v) * 512 + lane * 16);
      int32_t inner[kTokenTiles][4];
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) inner[t][i] = kMagicBits;
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {  // two k-steps share a vector of activations
        uint32_t a[2][4];
        expand(words, 2 * pair, a[0]);
        expand(words, 2 * pair + 1, a[1]);
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          const uint4 b = *reinterpret_cast<const uint4*>(record + t * 1024 + pair * 512 + lane * 16);
          mma_s8(inner[t], a[0][0], a[0][1], a[0][2], a[0][3], b.x, b.y);
          mma_s8(inner[t], a[1][0], a[1][1], a[1][2], a[1][3], b.z, b.w);
        }
      }
      const uint32_t two = half == 0 ? four_scales.x : four_scales.y;
      const float2 sw = __half22float2(*reinterpret_cast<const __half2*>(&two));  // of rows g and g + 8
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        const float2 s = *reinterpret_cast<const float2*>(sx + t * kTokenTile);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float scale = (i < 2 ? sw.x : sw.y) * (i % 2 ? s.y : s.x);
          sums[half][t][i] = fmaf(__int_as_float(inner[t][i]) - kMagic, scale, sums[half][t][i]);
        }
      }
    }
    ring.release(step);
  }
  constexpr int kFour = 2;  // codes were multiplied by 2^2
  add_and_store<kWarps, kTokenTiles>(p, reinterpret_cast<float*>(shared), sums, -kFour);
}

template <int kTokenTiles, int kWarps, int kStages>
void run(const Linear& p, cudaStream_t stream) {
  using TheRing = Ring<kWarps, kStages, activation_record_bytes(Order::bytes, 8, kTokenTiles)>;
  static_assert(TheRing::kSharedBytes >= kWarps * kTokenTiles * kTokenTile * (kChunkRows + 4) * 4, "the warps' sums fit the rings");
  const dim3 grid((p.outputs + kChunkRows - 1) / kChunkRows, (p.tokens + kTokenTiles * kTokenTile - 1) / (kTokenTiles * kTokenTile));
  launch("w6ax_imma", w6ax_imma_kernel<kTokenTiles, kWarps, kStages>, grid, kWarps * 32, TheRing::kSharedBytes, stream, p);
}

}  // namespace

void w6ax_imma(const Linear& p, int token_tiles, cudaStream_t stream) {
#ifdef FLEXQ_SWEEP
  const char* text = getenv("FLEXQ_CONFIG");
  const std::string config = text ? text : "";
#define FLEXQ_TRY(T, W, S) \
  if (token_tiles == T && config == #W "," #S) return run<T, W, S>(p, stream);
  FLEXQ_TRY(1, 4, 3) FLEXQ_TRY(1, 4, 4) FLEXQ_TRY(1, 4, 6) FLEXQ_TRY(1, 4, 8) FLEXQ_TRY(1, 8, 2) FLEXQ_TRY(1, 8, 3) FLEXQ_TRY(1, 8, 4) FLEXQ_TRY(1, 8, 6)
  FLEXQ_TRY(2, 4, 3) FLEXQ_TRY(2, 4, 4) FLEXQ_TRY(2, 4, 6) FLEXQ_TRY(2, 8, 2) FLEXQ_TRY(2, 8, 3) FLEXQ_TRY(2, 8, 4)
  FLEXQ_TRY(4, 4, 2) FLEXQ_TRY(4, 4, 3) FLEXQ_TRY(4, 4, 4) FLEXQ_TRY(4, 8, 2) FLEXQ_TRY(4, 8, 3)
  FLEXQ_TRY(8, 4, 2) FLEXQ_TRY(8, 4, 3) FLEXQ_TRY(8, 4, 4) FLEXQ_TRY(8, 8, 2)
#endif
  switch (token_tiles) {
    case 1: return run<1, 4, 4>(p, stream);
    case 2: return run<2, 4, 4>(p, stream);
    case 4: return run<4, 4, 3>(p, stream);
    case 8: return run<8, 4, 2>(p, stream);
    default: throw std::invalid_argument("token_tiles is " + std::to_string(token_tiles) + "; accepted: 1, 2, 4, 8");
  }
}

}  // namespace flexq
