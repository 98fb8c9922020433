// Dynamic quantisation of activations per token and group (FlexQ §3): a warp takes one group of one token, four numbers a lane.
#include "kernels.h"
#include "layout.cuh"
#include "ptx.cuh"

namespace flexq {
namespace {

constexpr int kWarps = 4;

template <int kBits>
__global__ void __launch_bounds__(kWarps * 32) quantize_activation_kernel(const void* x, Float x_type, uint8_t* records, int tokens,
                                                                          int features, int groups, int token_tiles, Order order) {
  allow_next_kernel();
  const int lane = threadIdx.x % 32, token = blockIdx.y;
  const int group = blockIdx.x * kWarps + threadIdx.x / 32;
  if (group >= groups) return;
  wait_for_previous_kernel();

  float value[4] = {};
  const int k = group * kGroup + lane * 4;
  if (token < tokens)
    for (int i = 0; i < 4; ++i)
      if (k + i < features) value[i] = load_float(x, int64_t(token) * features + k + i, x_type);

  // Bits of absolute values order as the values do, with infinity and NaN above all: neither is lost.
  uint32_t largest = 0;
  for (int i = 0; i < 4; ++i) largest = max(largest, __float_as_uint(value[i]) & 0x7fffffffu);
  largest = __reduce_max_sync(0xffffffffu, largest);
  constexpr float kMost = float((1 << (kBits - 1)) - 1);
  const bool finite = largest < 0x7f800000u;
  // A token that is not finite keeps no codes, and its scale makes each of its outputs NaN.
  const float scale = finite ? __fdiv_rn(__uint_as_float(largest), kMost) : __uint_as_float(0x7fffffffu);
  int code[4], sum = 0;
  for (int i = 0; i < 4; ++i) {
    const float rounded = finite && scale > 0.0f ? rintf(__fdiv_rn(value[i], scale)) : 0.0f;
    code[i] = int(fminf(fmaxf(rounded, -kMost - 1.0f), kMost));
    sum += code[i];
  }

  const int tile = token / kTokenTile % token_tiles, m = token % kTokenTile;
  const int tile_bytes = activation_tile_bytes(order, kBits);
  uint8_t* record = records + (int64_t(token / (kTokenTile * token_tiles)) * groups + group) * activation_record_bytes(order, kBits, token_tiles);
  uint8_t* out = record + tile * tile_bytes;
  if (order != Order::planes) {
    const uint32_t word = (code[0] & 255) | (code[1] & 255) << 8 | (code[2] & 255) << 16 | uint32_t(code[3] & 255) << 24;
    const int unit = lane / 16 * 4 + lane % 4, q = lane % 16 / 4;  // word `unit` of lane q of the weights
    const int at = order == Order::bytes ? lane / 16 * 512 + m * 64 + lane % 16 * 4 : m * kGroup + (unit ^ m) * 16 + q * 4;
    *reinterpret_cast<uint32_t*>(out + at) = word;
  } else {
    // Eight lanes hold 32 codes: each contributes four bits of a word.
    for (int p = 0; p < kBits; ++p) {
      uint32_t bits = 0;
      for (int i = 0; i < 4; ++i) bits |= uint32_t(code[i] >> p & 1) << (lane % 8 * 4 + i);
      for (int step = 1; step < 8; step *= 2) bits |= __shfl_xor_sync(0xffffffffu, bits, step);
      if (lane % 8 == 0) *reinterpret_cast<uint32_t*>(out + p * 128 + (m * 4 + lane / 8) * 4) = bits;
    }
    sum = __reduce_add_sync(0xffffffffu, sum);
    if (lane == 0) *reinterpret_cast<int32_t*>(out + kBits * 128 + m * 4) = sum;
  }
  if (lane == 0) *reinterpret_cast<float*>(record + token_tiles * tile_bytes + (tile * kTokenTile + m) * 4) = scale;
}

}  // namespace

void quantize_activation(const void* x, int x_type, void* activations, int tokens, int features, int groups, int bits, int token_tiles,
                         int order, cudaStream_t stream) {
  const int block = kTokenTile * token_tiles;
  const dim3 grid((groups + kWarps - 1) / kWarps, (tokens + block - 1) / block * block);
  launch("quantize_activation", bits == 8 ? quantize_activation_kernel<8> : quantize_activation_kernel<6>, grid, kWarps * 32, 0, 1, stream, x,
         Float(x_type), static_cast<uint8_t*>(activations), tokens, features, groups, token_tiles, Order(order));
}

}  // namespace flexq
