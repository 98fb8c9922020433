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

// A row in shared memory: codes and scales.
struct Room : Resident<1> {
  static constexpr int kMostGroups = 224, kMostNormGroups = 64;
  static constexpr int kSharedBytes = kMostGroups * kGroupBytes;

  using Resident::Resident;
};

// How a block's lanes share a row. A warp takes several groups in a step, kLanes lanes each, and computes their scales, and what their
// numbers are multiplied by, together. With fewer lanes that is less work in all; with more there is something to do for every warp, which
// is sooner done where the row is short.
template <class T, int kWarps, int kLanes>
struct RowShare {
  static constexpr int kGroupsAtOnce = 32 / kLanes, kGroupsOfStep = kWarps * kGroupsAtOnce;
  static constexpr int kVectors = kGroup / 4 / kLanes, kPairs = 2 * kVectors;  // of four numbers and of two, that a lane has of a group
  using Numbers = uint32_t[kPairs];

  const Room& room;
  int groups, features, bits;

  __device__ __forceinline__ int group(int step) const {
    return step * kGroupsOfStep + threadIdx.x / 32 * kGroupsAtOnce + threadIdx.x % 32 / kLanes;
  }

  // Where vector i is in the lane's group. Each of the warp's groups begins with another one: codes 128 bytes apart share their banks.
  static __device__ __forceinline__ int vector(int i) {
    return (i ^ threadIdx.x % 32 / kLanes) * (4 * kLanes) + threadIdx.x % kLanes * 4;
  }

  // Where in the row.
  __device__ __forceinline__ int pair(int step, int i) const { return group(step) * kGroup + vector(i / 2) + i % 2 * 2; }

  // Zeros beyond the row's end.
  __device__ __forceinline__ void load(Numbers& x, const void* row, int step) const {
#pragma unroll
    for (int i = 0; i < kPairs; i += 2) {
      const Four<T> four = load_four<T>(row, pair(step, i), features, true);
      x[i] = four.x, x[i + 1] = four.y;
    }
  }

  // Bits of the group's largest absolute value as a float32; not those of a finite one if any number is not.
  static __device__ __forceinline__ uint32_t largest(const Numbers& x) {
    using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    const auto absolute = [&](int i) { return __habs2(reinterpret_cast<const Two&>(x[i])); };
    Two most = absolute(0);
#pragma unroll
    for (int i = 1; i < kPairs; ++i) most = __hmax2_nan(most, absolute(i));
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) most = __hmax2_nan(most, __shfl_xor_sync(0xffffffffu, most, lanes));
    const float2 both = two_floats(reinterpret_cast<const uint32_t&>(most), T());
    return max(__float_as_uint(both.x), __float_as_uint(both.y));
  }

  __device__ __forceinline__ void quantize(const Numbers& x, int step) const {
    const int mine = group(step);
    if (mine / kGroupsAtOnce * kGroupsAtOnce >= groups) return;  // the whole warp
    float value[2 * kPairs];
    uint32_t code[2 * kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float2 two = two_floats(x[i], T());
      value[2 * i] = two.x, value[2 * i + 1] = two.y;
    }
    const float scale = flexq::quantize(value, largest(x), bits, code);
    if (mine >= groups) return;
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      *reinterpret_cast<uint32_t*>(room.codes + mine * kGroup + vector(i)) =
          lowest_bytes(code[4 * i], code[4 * i + 1], code[4 * i + 2], code[4 * i + 3]);
    if (threadIdx.x % kLanes == 0) room.scales[mine] = scale;
  }

  __device__ __forceinline__ void quantize(const void* row) const {
    constexpr int kAtOnce = 2;  // steps whose reads are under way together; with four, all of the longest, it takes a microsecond more
    for (int first = 0; first * kGroupsOfStep < groups; first += kAtOnce) {
      Numbers x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) load(x[i], row, first + i);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) quantize(x[i], first + i);
    }
  }

  // As norm_quantize.cu computes it. The row is read once, and stays in registers.
  template <bool kCentred>
  __device__ __forceinline__ void quantize(const Norm& norm, float (&partial)[2][kWarps]) const {
    constexpr int kSteps = Room::kMostNormGroups / kGroupsOfStep;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Numbers x[kSteps], residual[kSteps], weight[kSteps], bias[kSteps] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      load(x[step], norm.x.data, step);
      if (norm.residual.data) load(residual[step], norm.residual.data, step);
      load(weight[step], norm.weight, step);
      if (kCentred && norm.bias) load(bias[step], norm.bias, step);
    }
    const auto each_pair = [&](auto use) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int i = 0; i < kPairs; ++i) use(step, i, pair(step, i));
    };
    const auto packed = [](float a, float b) { return pack_floats(std::is_same_v<T, __half> ? Float::f16 : Float::bf16, a, b); };
    if (norm.residual.data)
      each_pair([&](int step, int i, int k) {
        const float2 a = two_floats(x[step][i], T()), b = two_floats(residual[step][i], T());
        x[step][i] = packed(a.x + b.x, a.y + b.y);
        T* const sum = static_cast<T*>(const_cast<void*>(norm.sum.data));
        if (blockIdx.x == 0 && k < features) *reinterpret_cast<uint32_t*>(sum + k) = x[step][i];
      });
    float mean = 0.0f, sum = 0.0f;
    if constexpr (kCentred) {
      each_pair([&](int step, int i, int) {
        const float2 value = two_floats(x[step][i], T());
        sum += value.x + value.y;
      });
      mean = sum_of_block(sum, partial[0], warp, lane, kWarps) / float(features);
      sum = 0.0f;
    }
    each_pair([&](int step, int i, int k) {
      const float2 value = two_floats(x[step][i], T()), off = make_float2(value.x - mean, value.y - mean);
      if (!kCentred || k < features) sum = fmaf(off.y, off.y, fmaf(off.x, off.x, sum));
    });
    const float inverse = rsqrtf(sum_of_block(sum, partial[1], warp, lane, kWarps) / float(features) + norm.epsilon);
    each_pair([&](int step, int i, int k) {
      const float2 value = two_floats(x[step][i], T()), by = two_floats(weight[step][i], T()), plus = two_floats(bias[step][i], T());
      float2 y = make_float2((value.x - mean) * inverse, (value.y - mean) * inverse);
      if constexpr (kCentred)
        y = make_float2(by.x * y.x + plus.x, by.y * y.y + plus.y);
      else
        y = two_floats(packed(y.x, y.y), T()), y = make_float2(y.x * by.x, y.y * by.y);
      x[step][i] = k < features ? packed(y.x, y.y) : 0;
    });
#pragma unroll
    for (int step = 0; step < kSteps; ++step) quantize(x[step], step);
  }
};

template <class T, int kWarps>
__device__ __forceinline__ void quantize_row(const Row& row, int groups, const Room& room, float (&partial)[2][kWarps]) {
  constexpr int kMostShortGroups = 80;
  const RowShare<T, kWarps, 16> of_short{room, groups, row.features, row.bits};
  const RowShare<T, kWarps, 8> of_long{room, groups, row.features, row.bits};
  if (row.before == Before::rms_norm)
    of_short.template quantize<false>(row.norm, partial);
  else if (row.before == Before::layer_norm)
    of_short.template quantize<true>(row.norm, partial);
  else if (groups <= kMostShortGroups)
    of_short.quantize(row.norm.x.data);
  else
    of_long.quantize(row.norm.x.data);
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
    quantize_row<__half>(row, p.groups, room, partial);
  else
    quantize_row<__nv_bfloat16>(row, p.groups, room, partial);
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
