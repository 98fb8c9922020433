// Dynamic quantisation of activations per token and group (FlexQ §3), of a tensor as it is or of what an elementwise operation makes of
// it, rounded to its type as if it had been written and read again.
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

template <class Operation>
void run(const char* what, const Operation& operation, const Records& records, bool vectors, cudaStream_t stream) {
  const dim3 grid(padded_tokens(records), (records.groups + kWarps - 1) / kWarps);
  launch(what, quantize_activation_kernel<Operation>, grid, kWarps * 32, 0, 1, stream, operation, records, vectors);
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
