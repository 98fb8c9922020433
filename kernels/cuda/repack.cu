// Canonical rows (flexq_core/quant/packing.py: codes side by side along K, little-endian) -> chunks (layout.cuh). Once, at load.
#include "kernels.h"
#include "layout.cuh"

namespace flexq {
namespace {

// One thread a lane's share of a half chunk: two words a bit.
__global__ void repack_kernel(const uint8_t* weight, const __half* scale, uint8_t* chunks, int outputs, int groups, int bits, Order order) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int lane = thread % 32, half = thread / 32 % 2;
  const int64_t chunk = thread / 64;
  const int group = chunk % groups;
  const int64_t first = chunk / groups * kChunkRows;
  if (first >= outputs) return;
  const int64_t group_bytes = kGroup / 8 * bits;
  const int g = lane / 4, q = lane % 4;
  // Code k of a row of the half, a field of two's complement; zero past the last output.
  const auto code = [&](int row, int k) -> uint32_t {
    const int64_t n = first + half * 16 + row;
    if (n >= outputs) return 0;
    const int place = k * bits;
    const uint8_t* at = weight + (n * groups + group) * group_bytes + place / 8;
    const uint32_t two = at[0] | (place % 8 + bits > 8 ? uint32_t(at[1]) << 8 : 0);
    return two >> place % 8 & ((1u << bits) - 1);
  };
  uint32_t words[16] = {};
  if (order == Order::bytes) {
    for (int s = 0; s < 4; ++s)
      for (int j = 0; j < 4; ++j)
        for (int b = 0; b < 4; ++b) {
          const int i = 2 * s + j / 2;
          const uint32_t field = code(g + 8 * (j & 1), i / 4 * 64 + q * 16 + i % 4 * 4 + b);
          if (j < 3)
            words[3 * s + j] |= field << (8 * b + 2);
          else
            for (int third = 0; third < 3; ++third) words[3 * s + third] |= (field >> (4 - 2 * third) & 3) << 8 * b;
        }
  } else {
    const uint32_t offset = 1u << (bits - 1);
#pragma unroll
    for (int h = 0; h < 2; ++h)
      for (int k = 0; k < 32; ++k) {
        const uint32_t field = code(g + 8 * h, q * 32 + k) ^ offset;
#pragma unroll
        for (int p = 0; p < 8; ++p) words[2 * p + h] |= (field >> p & 1) << k;
      }
  }
  uint8_t* out = chunks + chunk * chunk_bytes(bits);
  const int half_bytes = code_bytes(bits) / 2;
  uint8_t* codes = out + half * (chunk_bytes(bits) - half_bytes);
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    if (v < bits / 2)
      *reinterpret_cast<uint4*>(codes + v * 512 + lane * 16) = make_uint4(words[4 * v], words[4 * v + 1], words[4 * v + 2], words[4 * v + 3]);
    else if (2 * v < bits)
      *reinterpret_cast<uint2*>(codes + v * 512 + lane * 8) = make_uint2(words[4 * v], words[4 * v + 1]);
  }
  if (half == 0) {  // lane = 4 g + h is scale h of the four that lanes of row g read
    const int64_t n = first + g + 8 * q;
    reinterpret_cast<__half*>(out + half_bytes)[lane] = n < outputs ? scale[n * groups + group] : __float2half(0.0f);
  }
}

__global__ void nothing_kernel() {}

}  // namespace

void repack(const void* weight, const void* scale, void* chunks, int outputs, int groups, int bits, int order, cudaStream_t stream) {
  const int64_t threads = int64_t(outputs + kChunkRows - 1) / kChunkRows * groups * 64;
  repack_kernel<<<unsigned((threads + 255) / 256), 256, 0, stream>>>(static_cast<const uint8_t*>(weight), static_cast<const __half*>(scale),
                                                                    static_cast<uint8_t*>(chunks), outputs, groups, bits, Order(order));
  check_launch("repack");
  // A product may begin, and fetch its weights, once the blocks of the kernel before it have left, before what they wrote is seen by all.
  // A kernel that itself begins after that lies between.
  nothing_kernel<<<1, 1, 0, stream>>>();
  check_launch("repack");
}

}  // namespace flexq
