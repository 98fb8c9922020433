// What the bindings call; each is in the file of its name. Addresses are device memory that flexq_core/runtime/cuda.py has checked.
#pragma once
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace flexq {

enum class Float : int;
struct Linear;
struct Norm;
struct Row;
struct Records;
struct Rows;

void repack(const void* weight, const void* scale, void* chunks, int outputs, int groups, int bits, int order, cudaStream_t stream);

void quantize_activation(const Rows& x, Float type, const Records& records, cudaStream_t stream);
void relu_quantize(const Rows& x, Float type, const Records& records, cudaStream_t stream);
void silu_mul_quantize(const Rows& gate, const Rows& up, Float type, const Records& records, cudaStream_t stream);

// Both in norm_quantize.cu.
void rms_norm_quantize(const Norm& norm, Float type, const Records& records, cudaStream_t stream);
void layer_norm_quantize(const Norm& norm, Float type, const Records& records, cudaStream_t stream);

void w6ax_imma(const Linear& linear, int token_tiles, cudaStream_t stream);
// Of one token. Whether a block's shared memory holds the row; if not nothing is launched.
bool w6ax_imma_row(const Linear& linear, const Row& row, cudaStream_t stream);
void w6ax_wgmma(const Linear& linear, int token_tiles, cudaStream_t stream);

// What w6ax_wgmma does for this many tokens, outputs and groups on the current card, for tests of each of its forms: tiles of so many
// outputs, a block's teams for one, its tokens, how many blocks share the groups of one, how many tiles each block takes whole before, and
// whether those that are shared are taken by halves.
struct Tiling {
  int rows, teams, tokens, split, whole;
  bool halves;
};
Tiling w6ax_wgmma_tiling(const Linear& linear, int token_tiles);
void w6ax_bmma(const Linear& linear, int token_tiles, int activation_bits, cudaStream_t stream);

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline void check_launch(const char* what) { check(cudaGetLastError(), what); }

// Of the current card.
inline int device_attribute(const char* what, cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), what);
  check(cudaDeviceGetAttribute(&value, attribute, device), what);
  return value;
}

inline int multiprocessor_count(const char* what) { return device_attribute(what, cudaDevAttrMultiProcessorCount); }

// How many blocks of a kernel the current card runs at once, or 0 where it has too little shared memory for one. Asked once a
// kernel and card, since every call of a layer wants to know.
template <class Kernel>
int blocks_at_once(const char* what, Kernel kernel, int threads, int shared_bytes) {
  static std::mutex guard;
  static std::map<std::pair<Kernel, int>, int> known;  // kernels of one signature share these
  int device = 0, blocks = 0;
  check(cudaGetDevice(&device), what);
  const std::lock_guard<std::mutex> held(guard);
  const auto found = known.find({kernel, device});
  if (found != known.end()) return found->second;
  if (shared_bytes > device_attribute(what, cudaDevAttrMaxSharedMemoryPerBlockOptin)) return known[{kernel, device}] = 0;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), what);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes), what);
  return known[{kernel, device}] = blocks * multiprocessor_count(what);
}

// A launch that may start while the kernel before it on the stream still runs, where the card can (Hopper and later); `cluster`
// neighbouring blocks share an address space.
struct Launch {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};

  Launch(const char* what, dim3 grid, int threads, int shared_bytes, int cluster, cudaStream_t stream) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {unsigned(cluster), 1, 1};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = device_attribute(what, cudaDevAttrComputeCapabilityMajor) < 9 ? 0 : cluster == 1 ? 1 : 2;
  }
  Launch(const Launch&) = delete;  // config points into it
};

template <class Kernel, class... Arguments>
void launch(const char* what, Kernel kernel, dim3 grid, int threads, int shared_bytes, int cluster, cudaStream_t stream,
            Arguments... arguments) {
  const Launch how(what, grid, threads, shared_bytes, cluster, stream);
  check(cudaLaunchKernelEx(&how.config, kernel, arguments...), what);
}

// How many clusters of so many blocks the current card runs at once: fewer than its blocks would make, since the multiprocessors
// that a cluster may use are not all together. Asked once a kernel, card and size; `blocks_at_once` was asked before.
template <class Kernel>
int clusters_at_once(const char* what, Kernel kernel, int threads, int shared_bytes, int cluster) {
  static std::mutex guard;
  static std::map<std::tuple<Kernel, int, int>, int> known;
  int device = 0, clusters = 0;
  check(cudaGetDevice(&device), what);
  const std::lock_guard<std::mutex> held(guard);
  const auto found = known.find({kernel, device, cluster});
  if (found != known.end()) return found->second;
  const Launch how(what, dim3(cluster), threads, shared_bytes, cluster, nullptr);
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &how.config), what);
  return known[{kernel, device, cluster}] = clusters;
}

}  // namespace flexq
