// Dynamic quantisation of activations per token and group (FlexQ §3), of a tensor as it is or of what an elementwise operation makes of
// it, rounded to its type as if it had been written and read again.
//
// For few tokens its time is a launch's: between two products on an H200 a kernel that does nothing takes 0.4 to 0.9 us, this one 1.0 to
// 2.7, most of it from the end of the product before, which it waits for, to its own, which the next one waits for. Nothing shortens
// that: several groups a warp, to have fewer blocks, take 0.5 to 2 us more; blocks of eight warps as long; blocks for the tokens alone,
// without those that fill a tile, up to 0.3 less with one token of 28,672 numbers, else as long; letting the next kernel begin later, up
// to 2 more; asking for the products' split of shared memory and cache, or for the numbers before they may be read, as long. What does
// is no launch at all: see w6ax_imma_row.cu.
#include "kernels.h"
#include "quantize.cuh"

namespace flexq {
namespace {

constexpr int kWarps = 4;

template <class T>
struct Plain {
  Rows x;
  __device__ void operator()(float (&value)[4], int token, int k, int features, bool vectors) const {
    to_floats<T>(load_four<T>(x, token, k, features, vectors), value);
  }
};

template <class T>
struct Relu {
  Rows x;
  __device__ void operator()(float (&value)[4], int token, int k, int features, bool vectors) const {
    to_floats<T>(load_four<T>(x, token, k, features, vectors), value);
    for (float& v : value) v = v < 0.0f ? 0.0f : v;  // fmaxf would lose a NaN
  }
};

template <class T>
struct SiluMul {
  Rows gate, up;
  __device__ void operator()(float (&value)[4], int token, int k, int features, bool vectors) const {
    const Four<T> gates = load_four<T>(gate, token, k, features, vectors), ups = load_four<T>(up, token, k, features, vectors);
    float factor[4];
    to_floats<T>(gates, value);
    to_floats<T>(ups, factor);
    // As torch writes it, and compiled as torch is: a fast exponential would give other bits.
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = rounded_to<T>(rounded_to<T>(value[i] / (1.0f + expf(-value[i]))) * factor[i]);
  }
};

// A warp takes a group of a token, four neighbouring numbers a lane.
template <class Operation>
__global__ void __launch_bounds__(kWarps * 32) quantize_activation_kernel(const __grid_constant__ Operation operation,
                                                                          const __grid_constant__ Records p, bool vectors) {
  allow_next_kernel();
  const int lane = threadIdx.x % 32, token = blockIdx.x;  // tokens first: of the other dimension there are at most 65535
  const int group = blockIdx.y * kWarps + threadIdx.x / 32;
  if (group >= p.groups) return;
  wait_for_previous_kernel();
  float value[4] = {};
  if (token < p.tokens) operation(value, token, group * kGroup + lane * 4, p.features, vectors);
  quantize_group(value, p, token, group, lane);
}

// In swizzled order, that of wgmma, a lane's 16 numbers are one vector of codes, those that four lanes q of the weights have of one i. A
// warp takes four groups of a token, a block those of a tile, so that it reads rows and writes records a kilobyte at a time. As long as a
// warp for each group is not more than run at once, that is sooner done, by up to a microsecond.
constexpr int kSwizzledGroups = 4, kWarpsAtOnce = 56;  // of a multiprocessor, beside a product's

template <class Operation>
__global__ void __launch_bounds__(kTokenTile * 32) quantize_swizzled_kernel(const __grid_constant__ Operation operation,
                                                                            const __grid_constant__ Records p, bool vectors) {
  allow_next_kernel();
  const int lane = threadIdx.x % 32, unit = lane % 8, token = blockIdx.x * kTokenTile + threadIdx.x / 32;
  const int group = blockIdx.y * kSwizzledGroups + lane / 8;
  wait_for_previous_kernel();
  float value[16] = {};
  if (token < p.tokens) {
    float four[4][4];
#pragma unroll
    for (int q = 0; q < 4; ++q) operation(four[q], token, group * kGroup + unit / 4 * 64 + q * 16 + unit % 4 * 4, p.features, vectors);
#pragma unroll
    for (int i = 0; i < 16; ++i) value[i] = four[i / 4][i % 4];
  }
  uint32_t largest = largest_bits(value);
#pragma unroll
  for (int step = 4; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  if (group >= p.groups) return;
  uint32_t code[16];
  const float scale = quantize(value, largest, p.bits, code);
  const Place place(p, token, group);
  uint32_t words[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) words[q] = lowest_bytes(code[4 * q], code[4 * q + 1], code[4 * q + 2], code[4 * q + 3]);
  *reinterpret_cast<uint4*>(place.tile + place.m * kGroup + (unit ^ place.m) * 16) = make_uint4(words[0], words[1], words[2], words[3]);
  if (unit == 0) *place.scale = scale;
}

template <class Operation>
void run(const char* what, const Operation& operation, const Records& records, bool vectors, cudaStream_t stream) {
  const int tokens = padded_tokens(records);
  if (records.order == Order::swizzled && int64_t(tokens) * records.groups > kWarpsAtOnce * multiprocessor_count(what)) {
    const dim3 grid(tokens / kTokenTile, (records.groups + kSwizzledGroups - 1) / kSwizzledGroups);
    launch(what, quantize_swizzled_kernel<Operation>, grid, kTokenTile * 32, 0, 1, stream, operation, records, vectors);
  } else {
    const dim3 grid(tokens, (records.groups + kWarps - 1) / kWarps);
    launch(what, quantize_activation_kernel<Operation>, grid, kWarps * 32, 0, 1, stream, operation, records, vectors);
  }
}

}  // namespace

void quantize_activation(const Rows& x, Float type, const Records& records, cudaStream_t stream) {
  with_type(type, [&](auto number) {
    using T = decltype(number);
    run("quantize_activation", Plain<T>{x}, records, in_vectors<T>(records.features, {x}), stream);
  });
}

void relu_quantize(const Rows& x, Float type, const Records& records, cudaStream_t stream) {
  with_type(type, [&](auto number) {
    using T = decltype(number);
    run("relu_quantize", Relu<T>{x}, records, in_vectors<T>(records.features, {x}), stream);
  });
}

void silu_mul_quantize(const Rows& gate, const Rows& up, Float type, const Records& records, cudaStream_t stream) {
  with_type(type, [&](auto number) {
    using T = decltype(number);
    run("silu_mul_quantize", SiluMul<T>{gate, up}, records, in_vectors<T>(records.features, {gate, up}), stream);
  });
}

}  // namespace flexq
