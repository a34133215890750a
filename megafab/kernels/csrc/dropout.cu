// Dropout of a layer's output, with its bias before and its residual after, in one pass; no mask is kept.
//
// Philox4x32-7 (Salmon et al. 2011) makes 32 random bits for each element from the seed and its place, in
// groups of four, so that backward makes the same ones again.
#include "common.cuh"

namespace megafab {
namespace {

constexpr int kThreads = 256;
constexpr int kGroup = 4;  // elements that share a counter

struct Bits {
  uint32_t values[kGroup];

  // Not by a run-time index, which would put them into local memory.
  __device__ __forceinline__ uint32_t at(int i) const {
    const uint32_t low = i & 1 ? values[1] : values[0], high = i & 1 ? values[3] : values[2];
    return i & 2 ? high : low;
  }
};

__device__ __forceinline__ Bits philox(uint64_t seed, uint64_t counter) {
  uint32_t c0 = counter, c1 = counter >> 32, c2 = 0, c3 = 0, k0 = seed, k1 = seed >> 32;
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) drop(Dropout call) {
  const uint64_t seed = call.seed ? static_cast<uint64_t>(*call.seed) : 0;
  const T* x = static_cast<const T*>(call.x);
  const T* bias = static_cast<const T*>(call.bias);
  const T* residual = static_cast<const T*>(call.residual);
  T* y = static_cast<T*>(call.y);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * N;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < call.count; i += step) {
    Vec<T, N> value = load<N>(x + i), shift = {}, more = {};
    if (bias) shift = load<N>(bias + i % call.columns);
    if (residual) more = load<N>(residual + i);
    Bits bits = {};
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float v = to_float(value.values[j]);
      if (bias) v = to_float(from_float<T>(v + to_float(shift.values[j])));
      if (call.seed) {
        if (j % kGroup == 0) bits = philox(seed, static_cast<uint64_t>(i + j) / kGroup);
        v = bits.at((N == 1 ? static_cast<int>(i) : j) % kGroup) >= call.threshold ? v * call.scale : 0.0f;
      }
      if (residual) v = to_float(from_float<T>(v)) + to_float(more.values[j]);
      value.values[j] = from_float<T>(v);
    }
    store<N>(y + i, value);
  }
}

}  // namespace

void dropout(const Dropout& call, Stream stream) {
  by_type(call.type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int N = kPer16Bytes<T>;
    const bool wide = in_16_bytes<T>(call.columns, call.x, call.bias, call.residual, call.y);
    const int64_t blocks = ceil_div(call.count, static_cast<int64_t>(kThreads) * (wide ? N : 1));
    const int64_t most = static_cast<int64_t>(multiprocessors()) * 32;
    const dim3 grid(static_cast<unsigned>(blocks < most ? blocks : most));
    launch(wide ? drop<T, N> : drop<T, 1>, grid, dim3(kThreads), 0, stream, call);
  });
}

}  // namespace megafab
