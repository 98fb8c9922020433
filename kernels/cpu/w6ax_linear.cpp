// W6Ax linear layer on the processor: chooses the instruction set, quantises activations, shares the outputs among threads.
//
// Free of torch: operands come as addresses that flexq_core/runtime/cpu.py has checked, so that it compiles in seconds.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <string>
#include <vector>

#include "avx2.h"
#include "avx512.h"
#include "portable.h"

namespace flexq {
namespace {

const std::vector<const Path*>& paths() {  // fastest first
  static const std::vector<const Path*> all{
#if defined(__x86_64__)
      &avx512::amx_path, &avx512::path, &avx2::path,
#endif
      &portable::path};
  return all;
}

const Path& choose(const std::string& name) {
  for (const Path* path : paths())
    if ((name.empty() || name == path->name) && path->available()) return *path;
  throw pybind11::value_error("instruction set '" + name + "' is not available on this processor");
}

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const Path* path : paths())
    if (path->available()) names.emplace_back(path->name);
  return names;
}

// Returns -1, or the flat index of the first activation that is not finite.
int64_t run(Problem p, const Path& path, int threads) {
  static thread_local Scratch codes, scales, corrections;
  p.padded_tokens = (p.tokens + kTile - 1) / kTile * kTile;
  const int64_t stored = p.few() ? p.tokens : p.padded_tokens;
  p.codes = codes.get<uint8_t>(size_t(stored) * p.groups * kGroup);
  p.scales = scales.get<float>(size_t(std::max<int64_t>(stored, kFewTokens)) * p.groups);
  p.corrections = corrections.get<int32_t>(size_t(stored) * p.groups * (p.few() ? 8 : 1));
  if (stored > p.tokens) {  // the last tile's missing tokens are computed with the rest, as zeros
    const size_t tile = size_t(p.groups) * 2 * kTileBytes;
    std::memset(p.codes + (stored / kTile - 1) * tile, 0, tile);
    for (int64_t g = 0; g < p.groups; ++g)
      for (int64_t m = p.tokens; m < stored; ++m) p.scales[g * stored + m] = 0.0f, p.corrections[g * stored + m] = 0;
  }
  std::atomic<int64_t> bad{INT64_MAX};
#pragma omp parallel for num_threads(threads) schedule(static) if (p.tokens * p.features > 16384)
  for (int64_t m = 0; m < p.tokens; ++m) {
    const int64_t index = path.quantize(p, m);
    for (int64_t seen = bad; index >= 0 && index < seen && !bad.compare_exchange_weak(seen, index);) {
    }
  }
  if (bad != INT64_MAX) return bad;

  // Threads claim chunks as they come to them, some slack for cores that are busy elsewhere, and know their next one.
  const int64_t share = std::max<int64_t>(kTile, (p.outputs / (threads * 8) + kTile - 1) / kTile * kTile);
  const int64_t chunk = p.few() ? share : std::min<int64_t>(share, 128);
  std::atomic<int64_t> claimed{0};
  std::atomic<bool> out_of_memory{false};  // an exception may not leave the threads' region
#pragma omp parallel num_threads(threads) if (p.outputs * p.groups > 512)
  try {
    for (int64_t first = claimed.fetch_add(chunk), next; first < p.outputs; first = next) {
      next = claimed.fetch_add(chunk);
      const int64_t end = std::min(first + chunk, p.outputs);
      if (p.few())
        path.rows(p, first, end);
      else
        path.tiles(p, first, end, next);
    }
  } catch (const std::bad_alloc&) {
    out_of_memory = true;
  }
  if (out_of_memory) throw std::bad_alloc();
  return -1;
}

int64_t w6ax_linear(uintptr_t x, uintptr_t weight, uintptr_t scale, uintptr_t exponent, uintptr_t bias, uintptr_t y, int64_t tokens,
                    int64_t features, int64_t outputs, int64_t groups, int activation_bits, int threads, const std::string& isa) {
  Problem p{};
  p.x = reinterpret_cast<const float*>(x);
  p.weight = reinterpret_cast<const uint8_t*>(weight);
  p.scale = reinterpret_cast<const uint16_t*>(scale);
  p.exponent = reinterpret_cast<const int8_t*>(exponent);
  p.bias = reinterpret_cast<const float*>(bias);
  p.y = reinterpret_cast<float*>(y);
  p.tokens = tokens, p.features = features, p.outputs = outputs, p.groups = groups;
  p.activation_bits = activation_bits;
  const Path& path = choose(isa);
  pybind11::gil_scoped_release release;
  return run(p, path, threads);
}

}  // namespace
}  // namespace flexq

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("w6ax_linear", &flexq::w6ax_linear);
  module.def("available_isas", [] {
    pybind11::list names;
    for (const auto& name : flexq::available()) names.append(name);
    return names;
  });
}
