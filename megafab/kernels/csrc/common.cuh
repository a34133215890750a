// What every kernel here is made of: 16-byte accesses, sums over the threads of a row, one way to launch.
//
// The kernels know nothing of torch (bindings.cpp does), so that nvcc compiles them in seconds, for any
// version of it. With MEGAFAB_EMULATE a C++ compiler takes them instead and the threads of a block run one
// after another on the CPU: what the tests check of their arithmetic where there is no GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#ifdef MEGAFAB_EMULATE
#include "emulator.h"
#else
#include <cuda_runtime.h>
#define DYNAMIC_SHARED(type, name)                          \
  extern __shared__ __align__(16) unsigned char bytes_[]; \
  type* name = reinterpret_cast<type*>(bytes_)
#endif

#include "launch.h"

namespace megafab {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;

// ---- numbers -----------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) { return value; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) { return __float2half_rn(value); }

// ---- memory ------------------------------------------------------------------------------------------------

// N values that are read and written at once.
template <typename T, int N>
struct alignas(N * sizeof(T)) Vec {
  T values[N];
};

template <typename T>
constexpr int kPer16Bytes = 16 / sizeof(T);

template <int N, typename T>
__device__ __forceinline__ Vec<T, N> load(const T* from) {
  return *reinterpret_cast<const Vec<T, N>*>(from);
}

template <int N, typename T>
__device__ __forceinline__ void store(T* to, const Vec<T, N>& values) {
  *reinterpret_cast<Vec<T, N>*>(to) = values;
}

// Whether rows of `columns` values that begin at `pointers` can be read 16 bytes at a time. Null fits.
template <typename T, typename... P>
bool in_16_bytes(int64_t columns, const P*... pointers) {
  bool aligned = columns % kPer16Bytes<T> == 0;
  ((aligned = aligned && reinterpret_cast<uintptr_t>(pointers) % 16 == 0), ...);
  return aligned;
}

// Calls `body(piece, column)` for the columns of this thread in its row, N at a time: K pieces of which it can
// keep something, or as many as there are, all numbered 0, where K is 0.
template <int N, int K, typename F>
__device__ __forceinline__ void for_columns(int columns, F body) {
  if constexpr (K > 0) {
#pragma unroll
    for (int piece = 0; piece < K; ++piece) {
      const int column = (piece * blockDim.x + threadIdx.x) * N;
      if (column < columns) body(piece, column);
    }
  } else {
    for (int column = threadIdx.x * N; column < columns; column += blockDim.x * N) body(0, column);
  }
}

// ---- sums over threads -------------------------------------------------------------------------------------

struct Sum {
  static constexpr float kNone = 0.0f;
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

struct Max {
  static constexpr float kNone = -INFINITY;
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// One value from the `threads` threads (a power of two) that share a row, the same on all of them.
//
// Threads of a row lie along x, the rows of a block along y. All threads of the block must come here.
// `scratch` is shared memory, a float for each warp of the block; two calls in a row need two of them, or
// a __syncthreads between.
template <typename Op>
__device__ __forceinline__ float over_row(float value, int threads, float* scratch, Op op = Op()) {
  const int width = threads < kWarp ? threads : kWarp;
  for (int offset = width / 2; offset > 0; offset /= 2) {
    value = op(value, __shfl_xor_sync(0xffffffffu, value, offset, kWarp));
  }
  if (threads <= kWarp) return value;
  const int warps = threads / kWarp;
  float* mine = scratch + threadIdx.y * warps;
  if (threadIdx.x % kWarp == 0) mine[threadIdx.x / kWarp] = value;
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  value = lane < warps ? mine[lane] : Op::kNone;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = op(value, __shfl_xor_sync(0xffffffffu, value, offset, kWarp));
  }
  return value;
}

// ---- launches ----------------------------------------------------------------------------------------------

#ifdef MEGAFAB_EMULATE
inline int multiprocessors() { return emulator::kMultiprocessors; }

template <typename K>
int resident_blocks(K*, int) {
  return emulator::kMultiprocessors;
}
#else
inline void check(cudaError_t error, const char* where) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(where) + ": " + cudaGetErrorString(error));
}

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

// How many blocks of so many threads the device runs at once, by the registers they take.
template <typename K>
int resident_blocks(K* kernel, int threads) {
  static std::mutex lock;
  static std::map<std::pair<const void*, int>, int> known;
  const std::lock_guard<std::mutex> guard(lock);
  int& blocks = known[{reinterpret_cast<const void*>(kernel), threads}];
  if (blocks == 0) {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0), "occupancy");
    blocks *= multiprocessors();
  }
  return blocks;
}
#endif

template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream stream, A... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef MEGAFAB_EMULATE
  emulator::run(grid, block, shared, [&] { kernel(static_cast<P>(arguments)...); });
#else
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(static_cast<P>(arguments)...);
  check(cudaGetLastError(), "kernel launch");
#endif
}

// Calls `run(T())` with the type that `type` says.
template <typename F>
void by_type(Type type, F run) {
  switch (type) {
    case Type::fp32: return run(float());
    case Type::bf16: return run(__nv_bfloat16());
    case Type::fp16: return run(__half());
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest power of two that is not below `count`, between `low` and `high`.
inline int power_of_two(int64_t count, int low, int high) {
  int power = low;
  while (power < count && power < high) power *= 2;
  return power;
}

}  // namespace megafab
