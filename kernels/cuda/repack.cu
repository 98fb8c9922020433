// Canonical rows (flexq_core/quant/packing.py: four codes in three bytes along K) -> chunks (layout.cuh). Once, at load.
#include "kernels.h"
#include "layout.cuh"

namespace flexq {
namespace {

// Four codes from k on, a multiple of 4, as 6-bit fields of two's complement.
__device__ uint32_t four_codes(const uint8_t* row, int k) {
  const uint8_t* at = row + k / 4 * 3;
  return at[0] | uint32_t(at[1]) << 8 | uint32_t(at[2]) << 16;
}

// One thread a lane's share of a half chunk: 12 words.
__global__ void repack_kernel(const uint8_t* weight, const __half* scale, uint8_t* chunks, int outputs, int groups, Order order) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int lane = thread % 32, half = thread / 32 % 2;
  const int64_t chunk = thread / 64;
  const int group = chunk % groups;
  const int64_t first = chunk / groups * kChunkRows;
  if (first >= outputs) return;
  const int64_t row_bytes = int64_t(groups) * (kGroup * 6 / 8);
  const int g = lane / 4, q = lane % 4;
  const auto fields = [&](int row, int k) -> uint32_t {
    const int64_t n = first + half * 16 + row;
    return n < outputs ? four_codes(weight + n * row_bytes + group * (kGroup * 6 / 8), k) : 0;
  };
  uint32_t words[12] = {};
  if (order == Order::bytes) {
    for (int r = 0; r < 16; ++r) {
      const int i = r / 4 * 2 + r % 4 / 2;
      const uint32_t codes = fields(g + 8 * (r & 1), i / 4 * 64 + q * 16 + i % 4 * 4);
      for (int b = 0; b < 4; ++b) {
        const uint32_t code = codes >> (6 * b) & 63;
        words[r / 2] |= code >> 2 << (8 * b + (r % 2 ? 0 : 4));
        words[8 + r / 4] |= (code & 3) << (8 * b + 2 * (r % 4));
      }
    }
  } else {
    for (int h = 0; h < 2; ++h)
      for (int k = 0; k < 32; k += 4) {
        const bool inside = first + half * 16 + g + 8 * h < outputs;
        const uint32_t codes = fields(g + 8 * h, q * 32 + k);
        for (int b = 0; b < 4; ++b) {
          const uint32_t code = inside ? (codes >> (6 * b) & 63) ^ 32 : 32;  // zero in offset binary
          for (int p = 0; p < 6; ++p) words[2 * p + h] |= (code >> p & 1) << (k + b);
        }
      }
  }
  uint8_t* out = chunks + chunk * kChunkBytes;
  for (int v = 0; v < 3; ++v)
    *reinterpret_cast<uint4*>(out + (3 * half + v) * 512 + lane * 16) =
        make_uint4(words[4 * v], words[4 * v + 1], words[4 * v + 2], words[4 * v + 3]);
  if (half == 0) {  // lane = 4 g + h is scale h of the four that lanes of row g read
    const int64_t n = first + g + 8 * q;
    reinterpret_cast<__half*>(out + kCodeBytes)[lane] = n < outputs ? scale[n * groups + group] : __float2half(0.0f);
  }
}

}  // namespace

void repack(const void* weight, const void* scale, void* chunks, int outputs, int groups, int order, cudaStream_t stream) {
  const int64_t threads = int64_t(outputs + kChunkRows - 1) / kChunkRows * groups * 64;
  repack_kernel<<<unsigned((threads + 255) / 256), 256, 0, stream>>>(static_cast<const uint8_t*>(weight), static_cast<const __half*>(scale),
                                                                    static_cast<uint8_t*>(chunks), outputs, groups, Order(order));
  check_launch("repack");
}

}  // namespace flexq
