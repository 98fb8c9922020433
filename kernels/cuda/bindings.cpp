// The CUDA kernels as Python functions. Free of torch: operands come as addresses that flexq_core/runtime/cuda.py has checked.
// A build for weights of another width (FLEXQ_WEIGHT_BITS) holds w6ax_bmma alone, as `linear`.
#include <pybind11/pybind11.h>

#include <tuple>

#include "kernels.h"
#include "layout.cuh"

namespace flexq {
namespace {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Address of the first row, and numbers from one row to the next.
using Matrix = std::tuple<Address, int64_t>;

Rows rows(const Matrix& matrix) { return {pointer(std::get<0>(matrix)), std::get<1>(matrix)}; }

// Address of the records, tokens, features, groups, token_tiles, bits, order.
using Quantized = std::tuple<Address, int, int, int, int, int, int>;

Records records(const Quantized& to) {
  const auto [start, tokens, features, groups, token_tiles, bits, order] = to;
  return {pointer<uint8_t>(start), tokens, features, groups, token_tiles, bits, Order(order)};
}

template <void (&kRun)(const Norm&, Float, const Records&, cudaStream_t)>
void bind_norm(Matrix x, Matrix residual, Matrix sum, Address weight, Address bias, float epsilon, int type, Quantized to, Address stream) {
  kRun({rows(x), rows(residual), rows(sum), pointer(weight), pointer(bias), epsilon}, Float(type), records(to), pointer<CUstream_st>(stream));
}

void bind_linear(Address weight, Address exponent, Address bias, int bias_type, Address activations, Address y, int y_type, int tokens,
                 int outputs, int groups, int token_tiles, int activation_bits, int order, Address stream) {
  const Linear linear{pointer<uint8_t>(weight), pointer<int8_t>(exponent), pointer(bias), pointer<uint8_t>(activations), pointer(y), tokens,
                      outputs,                  groups,                    Float(y_type), Float(bias_type)};
  switch (Order(order)) {
    case Order::planes: return w6ax_bmma(linear, token_tiles, activation_bits, pointer<CUstream_st>(stream));
#ifndef FLEXQ_WEIGHT_BITS
    case Order::bytes: return w6ax_imma(linear, token_tiles, pointer<CUstream_st>(stream));
    case Order::swizzled: return w6ax_wgmma(linear, token_tiles, pointer<CUstream_st>(stream));
#endif
    default: throw std::invalid_argument("order is " + std::to_string(order) + "; not in this build");
  }
}

#ifndef FLEXQ_WEIGHT_BITS
void bind_linear_of_row(Address weight, Address exponent, Address bias, int bias_type, Address y, int outputs, int groups, int before,
                        Matrix x, Matrix residual, Matrix sum, Address norm_weight, Address norm_bias, float epsilon, int type,
                        int features, int activation_bits, Address stream) {
  const Linear linear{pointer<uint8_t>(weight), pointer<int8_t>(exponent), pointer(bias), nullptr, pointer(y), 1,
                      outputs,                  groups,                    Float(type),   Float(bias_type)};
  const Norm norm{rows(x), rows(residual), rows(sum), pointer(norm_weight), pointer(norm_bias), epsilon};
  if (!w6ax_imma_row(linear, Row{norm, Before(before), Float(type), features, activation_bits}, pointer<CUstream_st>(stream)))
    throw std::runtime_error("w6ax_imma_row: " + std::to_string(groups) + " groups; this card has too little shared memory");
}
#endif

}  // namespace
}  // namespace flexq

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace flexq;
  module.def("linear", &bind_linear);
#ifndef FLEXQ_WEIGHT_BITS
  module.def("record_bytes", [](int order, int bits, int token_tiles) { return activation_record_bytes(Order(order), bits, token_tiles); });
  module.def("repack", [](Address weight, Address scale, Address chunks, int outputs, int groups, int bits, int order, Address stream) {
    repack(pointer(weight), pointer(scale), pointer(chunks), outputs, groups, bits, order, pointer<CUstream_st>(stream));
  });
  module.def("quantize_activation", [](Matrix x, int type, Quantized to, Address stream) {
    quantize_activation(rows(x), Float(type), records(to), pointer<CUstream_st>(stream));
  });
  module.def("relu_quantize", [](Matrix x, int type, Quantized to, Address stream) {
    relu_quantize(rows(x), Float(type), records(to), pointer<CUstream_st>(stream));
  });
  module.def("silu_mul_quantize", [](Matrix gate, Matrix up, int type, Quantized to, Address stream) {
    silu_mul_quantize(rows(gate), rows(up), Float(type), records(to), pointer<CUstream_st>(stream));
  });
  module.def("wgmma_tiling", [](int tokens, int outputs, int groups, int token_tiles) {
    Linear linear{};
    linear.tokens = tokens, linear.outputs = outputs, linear.groups = groups;
    const Tiling tiling = w6ax_wgmma_tiling(linear, token_tiles);
    return std::make_tuple(tiling.rows, tiling.teams, tiling.tokens, tiling.split, tiling.whole, tiling.halves);
  });
  module.def("linear_of_row", &bind_linear_of_row);
  module.def("rms_norm_quantize", &bind_norm<rms_norm_quantize>);
  module.def("layer_norm_quantize", &bind_norm<layer_norm_quantize>);
#endif
}
