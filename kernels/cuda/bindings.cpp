// The CUDA kernels as Python functions. Free of torch: operands come as addresses that flexq_core/runtime/cuda.py has checked.
#include <pybind11/pybind11.h>

#include "kernels.h"
#include "layout.cuh"

namespace flexq {
namespace {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void bind_linear(Address weight, Address exponent, Address bias, int bias_type, Address activations, Address y, int y_type, int tokens,
                 int outputs, int groups, int token_tiles, int activation_bits, int order, Address stream) {
  const Linear linear{pointer<uint8_t>(weight), pointer<int8_t>(exponent), pointer(bias), pointer<uint8_t>(activations), pointer(y), tokens,
                      outputs,                  groups,                    Float(y_type), Float(bias_type)};
  switch (Order(order)) {
    case Order::bytes: return w6ax_imma(linear, token_tiles, pointer<CUstream_st>(stream));
    case Order::planes: return w6ax_bmma(linear, token_tiles, activation_bits, pointer<CUstream_st>(stream));
    case Order::swizzled: return w6ax_wgmma(linear, token_tiles, pointer<CUstream_st>(stream));
  }
}

}  // namespace
}  // namespace flexq

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace flexq;
  module.def("record_bytes", [](int order, int bits, int token_tiles) { return activation_record_bytes(Order(order), bits, token_tiles); });
  module.def("repack", [](Address weight, Address scale, Address chunks, int outputs, int groups, int order, Address stream) {
    repack(pointer(weight), pointer(scale), pointer(chunks), outputs, groups, order, pointer<CUstream_st>(stream));
  });
  module.def("quantize_activation", [](Address x, int x_type, Address activations, int tokens, int features, int groups, int bits,
                                       int token_tiles, int order, Address stream) {
    quantize_activation(pointer(x), x_type, pointer(activations), tokens, features, groups, bits, token_tiles, order,
                        pointer<CUstream_st>(stream));
  });
  module.def("linear", &bind_linear);
}
