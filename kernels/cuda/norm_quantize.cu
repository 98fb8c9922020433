// RMSNorm or LayerNorm, with the residual addition before it, and quantisation of the result in one launch: a block takes a token and
// keeps its row in registers, read once.
#include "kernels.h"
#include "quantize.cuh"

namespace flexq {
namespace {

constexpr int kMostWarps = 32;

// Registers a thread. Of half precision with two groups a warp, so that a block has room beside one of w6ax_imma, of which 16 warps take
// 36,864 of a multiprocessor's 65,536, for rows of up to 5632 features, and its loads need not wait for that one's end.
template <class T, int kGroups>
constexpr int kMostRegisters = kGroups == 2 && sizeof(T) == 2 ? 40 : 64;

// kCentred: LayerNorm, round(weight * ((x - mean) / deviation) + bias); otherwise LLaMA's RMSNorm, round(weight * round(x / deviation)).
// kGroups: that a warp takes, at most. kUsual: of rows in vectors to codes in bytes, in two thirds of the instructions: they are fetched
// anew at each launch, which is felt where a token is all there is.
template <class T, bool kCentred, int kGroups, bool kUsual>
__global__ void __maxnreg__((kMostRegisters<T, kGroups>))
    norm_quantize_kernel(const __grid_constant__ Norm norm, const __grid_constant__ Records p, bool rows_in_vectors) {
  allow_next_kernel();
  const bool vectors = kUsual || rows_in_vectors;
  __shared__ float partial[2][kMostWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, token = blockIdx.x, features = p.features;
  const auto first = [&](int i) { return (warp + i * warps) * kGroup + lane * 4; };  // this lane's numbers of its warp's group i

  // Weights are on their way from memory while the kernel before still runs. Only to the cache: it may have written them.
#pragma unroll
  for (int i = 0; i < kGroups; ++i)
    if (first(i) < features) {
      prefetch(static_cast<const T*>(norm.weight) + first(i));
      if (norm.bias) prefetch(static_cast<const T*>(norm.bias) + first(i));
    }
  wait_for_previous_kernel();
  if (token >= p.tokens) {
    float zeros[4] = {};
    for (int group = warp; group < p.groups; group += warps) quantize_group<kUsual>(zeros, p, token, group, lane);
    return;
  }

  // All reads at once, where there are registers for that: 64 a thread.
  constexpr bool kEarly = kGroups * sizeof(T) <= 8;
  Four<T> x[kGroups], residual[kGroups], weight[kGroups], bias[kGroups] = {};
  const auto load_parameters = [&](int i) {
    weight[i] = load_four<T>(norm.weight, first(i), features, vectors);
    if (norm.bias) bias[i] = load_four<T>(norm.bias, first(i), features, vectors);
  };
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    x[i] = load_four<T>(norm.x, token, first(i), features, vectors);
    if (norm.residual.data) residual[i] = load_four<T>(norm.residual, token, first(i), features, vectors);
  }
  if constexpr (kEarly)
#pragma unroll
    for (int i = 0; i < kGroups; ++i) load_parameters(i);

  float value[kGroups][4];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) to_floats<T>(x[i], value[i]);
  if (norm.residual.data) {
    T* sums = static_cast<T*>(const_cast<void*>(norm.sum.data)) + token * norm.sum.stride;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      float more[4];
      to_floats<T>(residual[i], more);
#pragma unroll
      for (int j = 0; j < 4; ++j) value[i][j] = rounded_to<T>(value[i][j] + more[j]);
      store_four<T>(sums, first(i), features, vectors, value[i]);
    }
  }

  float mean = 0.0f, sum = 0.0f;
  if constexpr (kCentred) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) sum += (value[i][0] + value[i][1]) + (value[i][2] + value[i][3]);
    mean = sum_of_block(sum, partial[0], warp, lane, warps) / float(features);
    sum = 0.0f;
  }
  // From the mean and not from the sum of squares less its square, which would cancel.
#pragma unroll
  for (int i = 0; i < kGroups; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float off = first(i) + j < features ? value[i][j] - mean : 0.0f;
      sum = fmaf(off, off, sum);
    }
  const float inverse = rsqrtf(sum_of_block(sum, partial[1], warp, lane, warps) / float(features) + norm.epsilon);

#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int group = warp + i * warps;
    if (group >= p.groups) break;
    if constexpr (!kEarly) load_parameters(i);
    float by[4], plus[4];
    to_floats<T>(weight[i], by);
    to_floats<T>(bias[i], plus);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float normal = (value[i][j] - mean) * inverse;
      const float y = kCentred ? by[j] * normal + plus[j] : rounded_to<T>(normal) * by[j];
      value[i][j] = first(i) + j < features ? rounded_to<T>(y) : 0.0f;
    }
    quantize_group<kUsual>(value[i], p, token, group, lane);
  }
}

template <class T, bool kCentred, int kGroups>
void run(const char* what, const Norm& norm, const Records& records, cudaStream_t stream) {
  const bool vectors = in_vectors<T>(records.features, {norm.x, norm.residual, norm.sum, {norm.weight, 0}, {norm.bias, 0}});
  const int warps = (records.groups + kGroups - 1) / kGroups;
  const bool usual = vectors && records.order != Order::planes;
  const auto kernel = usual ? norm_quantize_kernel<T, kCentred, kGroups, true> : norm_quantize_kernel<T, kCentred, kGroups, false>;
  launch(what, kernel, dim3(padded_tokens(records)), warps * 32, 0, 1, stream, norm, records, vectors);
}

template <bool kCentred>
void run(const char* what, const Norm& norm, Float type, const Records& records, cudaStream_t stream) {
  if (records.features > kMostNormFeatures)
    throw std::invalid_argument(std::string(what) + ": " + std::to_string(records.features) + " features; accepted: at most " +
                                std::to_string(kMostNormFeatures));
  with_type(type, [&](auto number) {
    using T = decltype(number);
    if (records.groups <= 2 * kMostWarps)
      run<T, kCentred, 2>(what, norm, records, stream);
    else
      run<T, kCentred, 4>(what, norm, records, stream);
  });
}

}  // namespace

void rms_norm_quantize(const Norm& norm, Float type, const Records& records, cudaStream_t stream) {
  run<false>("rms_norm_quantize", norm, type, records, stream);
}

void layer_norm_quantize(const Norm& norm, Float type, const Records& records, cudaStream_t stream) {
  run<true>("layer_norm_quantize", norm, type, records, stream);
}

}  // namespace flexq
