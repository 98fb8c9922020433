// The product of one token, whose norm and quantisation are part of it: every block does them for itself, in the shadow of its first
// weights, so that a step of decoding waits for one launch where it would wait for two. Norms of longer rows and activation functions are
// left to a kernel before, whose blocks share the work: all of it in every block would take longer than a launch. Their codes are
// multiplied by this kernel all the same where w6ax_imma.cu says so, since after another one than itself it begins a microsecond later
// (an H200 in a decoder's steps).
#include "imma.cuh"
#include "kernels.h"
#include "quantize.cuh"

namespace flexq {
namespace {

// A row in shared memory: codes and scales, and of a norm the numbers between its two passes.
struct Room : Resident<1> {
  static constexpr int kMostGroups = 224, kMostNormGroups = 64;
  static constexpr int kNumberBytes = kGroup * 2;
  static constexpr int kSharedBytes = kMostGroups * kGroupBytes;
  static_assert(kMostNormGroups * (kGroupBytes + kNumberBytes) <= kSharedBytes);

  uint8_t* numbers;  // [groups, 128] of the tensor's type

  __device__ __forceinline__ Room(uint8_t* shared, int groups)
      : Resident(shared, groups), numbers(shared + (groups + 1) / 2 * 2 * kGroupBytes) {}  // aligned to eight bytes
};

__device__ __forceinline__ void quantize_group(float (&value)[4], int bits, const Room& room, int group, int lane) {
  uint32_t code[4];
  const float scale = quantize(value, __reduce_max_sync(0xffffffffu, largest_bits(value)), bits, code);
  *reinterpret_cast<uint32_t*>(room.codes + group * kGroup + lane * 4) = lowest_bytes(code[0], code[1], code[2], code[3]);
  if (lane == 0) room.scales[group] = scale;
}

// Groups of a warp whose reads are under way together: as many as one of sixteen has of half the longest row, or of the longest with norm.
constexpr int kNumbersAtOnce = 7, kNormsAtOnce = 4;

// Calls with each of this warp's groups, kAtOnce of them at a time: read(i, group) of all before use(i, group) of the first.
template <int kWarps, int kAtOnce, class Read, class Use>
__device__ __forceinline__ void each_group(int groups, Read read, Use use) {
  for (int first = threadIdx.x / 32; first < groups; first += kAtOnce * kWarps) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kWarps < groups) read(i, first + i * kWarps);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kWarps < groups) use(i, first + i * kWarps);
  }
}

template <class T, int kWarps>
__device__ __forceinline__ void quantize_numbers(const Row& row, int groups, const Room& room) {
  const int lane = threadIdx.x % 32;
  Four<T> x[kNumbersAtOnce];
  each_group<kWarps, kNumbersAtOnce>(
      groups, [&](int i, int group) { x[i] = load_four<T>(row.norm.x.data, group * kGroup + lane * 4, row.features, true); },
      [&](int i, int group) {
        float value[4];
        to_floats<T>(x[i], value);
        quantize_group(value, row.bits, room, group, lane);
      });
}

// As norm_quantize.cu computes it; a group's numbers wait in shared memory, in the tensor's type, to which they are rounded anyway.
template <class T, bool kCentred, int kWarps>
__device__ __forceinline__ void quantize_norm(const Row& row, int groups, const Room& room, float (&partial)[2][kWarps]) {
  const Norm& norm = row.norm;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, features = row.features;
  const auto number = [&](int group) { return reinterpret_cast<Four<T>*>(room.numbers + (group * kGroup + lane * 4) * sizeof(T)); };
  Four<T> x[kNormsAtOnce], more[kNormsAtOnce];
  float sum = 0.0f;
  each_group<kWarps, kNormsAtOnce>(
      groups,
      [&](int i, int group) {
        const int k = group * kGroup + lane * 4;
        x[i] = load_four<T>(norm.x.data, k, features, true);
        if (norm.residual.data) more[i] = load_four<T>(norm.residual.data, k, features, true);
      },
      [&](int i, int group) {
        const int k = group * kGroup + lane * 4;
        float value[4], other[4];
        to_floats<T>(x[i], value);
        if (norm.residual.data) {
          to_floats<T>(more[i], other);
          uint32_t bits[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) value[j] = rounded_to<T>(value[j] + other[j]), bits[j] = bits_of<T>(value[j]);
          x[i] = four_of<T>(bits);
          if (blockIdx.x == 0) store_four<T>(const_cast<void*>(norm.sum.data), k, features, true, value);
        }
        *number(group) = x[i];
#pragma unroll
        for (int j = 0; j < 4; ++j) sum = kCentred ? sum + value[j] : fmaf(value[j], value[j], sum);
      });
  float mean = 0.0f;
  if constexpr (kCentred) {
    mean = sum_of_block(sum, partial[0], warp, lane, kWarps) / float(features);
    sum = 0.0f;
    for (int group = warp; group < groups; group += kWarps) {
      float value[4];
      to_floats<T>(*number(group), value);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float off = group * kGroup + lane * 4 < features ? value[j] - mean : 0.0f;
        sum = fmaf(off, off, sum);
      }
    }
  }
  const float inverse = rsqrtf(sum_of_block(sum, partial[1], warp, lane, kWarps) / float(features) + norm.epsilon);
  Four<T> weight[kNormsAtOnce], bias[kNormsAtOnce] = {};
  each_group<kWarps, kNormsAtOnce>(
      groups,
      [&](int i, int group) {
        const int k = group * kGroup + lane * 4;
        weight[i] = load_four<T>(norm.weight, k, features, true);
        if (kCentred && norm.bias) bias[i] = load_four<T>(norm.bias, k, features, true);
      },
      [&](int i, int group) {
        float value[4], by[4], plus[4];
        to_floats<T>(*number(group), value);
        to_floats<T>(weight[i], by);
        to_floats<T>(bias[i], plus);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float normal = (value[j] - mean) * inverse, y = kCentred ? by[j] * normal + plus[j] : rounded_to<T>(normal) * by[j];
          value[j] = group * kGroup + lane * 4 < features ? rounded_to<T>(y) : 0.0f;
        }
        quantize_group(value, row.bits, room, group, lane);
      });
}

template <class T, int kWarps>
__device__ __forceinline__ void quantize_row(const Row& row, int groups, const Room& room, float (&partial)[2][kWarps]) {
  if (row.before == Before::numbers)
    quantize_numbers<T, kWarps>(row, groups, room);
  else if (row.before == Before::rms_norm)
    quantize_norm<T, false, kWarps>(row, groups, room, partial);
  else
    quantize_norm<T, true, kWarps>(row, groups, room, partial);
}

template <int kWarps, int kStages>
struct Sizes {
  using TheRing = Ring<kWarps, kStages, 0>;
  using TheSum = Handover<kWarps, 1, 1>;
  static_assert((TheRing::kSharedBytes + TheSum::kSharedBytes) % 16 == 0, "codes are read 16 bytes at a time");
  static constexpr int kSharedBytes = TheRing::kSharedBytes + TheSum::kSharedBytes + Room::kSharedBytes;
};

template <int kWarps, int kStages>
__global__ void __launch_bounds__(kWarps * 32, 1)
    w6ax_imma_row_kernel(const __grid_constant__ Linear p, const __grid_constant__ Shares shares, const __grid_constant__ Row row) {
  using All = Sizes<kWarps, kStages>;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ float partial[2][kWarps];
  allow_next_kernel();
  typename All::TheRing ring(p, shares, shared);
  typename All::TheSum sum(shared + All::TheRing::kSharedBytes);
  const Room room(shared + All::TheRing::kSharedBytes + All::TheSum::kSharedBytes, p.groups);
  sum.start();
  // Only to the cache: the kernel before may have written them.
  if (const int at = (blockIdx.x + threadIdx.x * gridDim.x) * kChunkRows; at < p.outputs) prefetch(p.exponent + at);
  if (row.norm.weight)
    for (int k = threadIdx.x * 64; k < row.features; k += kWarps * 32 * 64) prefetch(static_cast<const uint16_t*>(row.norm.weight) + k);
  ring.start();
  if (row.before == Before::codes)
    room.fill(p.activations, p.groups);
  else if (row.type == Float::f16)
    quantize_row<__half, kWarps>(row, p.groups, room, partial);
  else
    quantize_row<__nv_bfloat16, kWarps>(row, p.groups, room, partial);
  __syncthreads();
  multiply<1, kWarps>(p, ring, sum, room);
}

template <int kWarps, int kStages>
bool run(const Linear& p, const Row& row, cudaStream_t stream) {
  constexpr int kSharedBytes = Sizes<kWarps, kStages>::kSharedBytes;
  const auto kernel = w6ax_imma_row_kernel<kWarps, kStages>;
  const int most = blocks_at_once("w6ax_imma_row", kernel, kWarps * 32, kSharedBytes);
  if (most == 0) return false;
  const Shares shares(p, kTokenTile, most);
  launch("w6ax_imma_row", kernel, dim3(shares.blocks), kWarps * 32, kSharedBytes, 1, stream, p, shares, row);
  return true;
}

}  // namespace

bool w6ax_imma_row(const Linear& p, const Row& row, cudaStream_t stream) {
  const bool norm = row.before == Before::rms_norm || row.before == Before::layer_norm;
  if (p.groups > (norm ? Room::kMostNormGroups : Room::kMostGroups)) return false;
  return run<16, 3>(p, row, stream) || run<16, 2>(p, row, stream) || run<8, 2>(p, row, stream);
}

}  // namespace flexq
