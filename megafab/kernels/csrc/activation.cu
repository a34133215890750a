// Activations of the feed-forward layer, gated or not, with the bias that comes before: one pass each way.
//
// A thread takes 16 bytes of a row, of a gated unit the 16 bytes of both halves; blocks walk over rows.
#include "common.cuh"

namespace megafab {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// Each: the value of an activation, and its slope.
struct Silu {
  static __device__ __forceinline__ float value(float x) { return x * sigmoid(x); }
  static __device__ __forceinline__ float slope(float x) {
    const float s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
  }
};

struct Gelu {  // by the error function (Hendrycks and Gimpel 2016)
  static __device__ __forceinline__ float area(float x) { return 0.5f * (1.0f + erff(x * 0.70710678f)); }
  static __device__ __forceinline__ float value(float x) { return x * area(x); }
  static __device__ __forceinline__ float slope(float x) {
    return area(x) + x * 0.39894228f * __expf(-0.5f * x * x);
  }
};

struct Relu {
  static __device__ __forceinline__ float value(float x) { return x > 0.0f ? x : 0.0f; }
  static __device__ __forceinline__ float slope(float x) { return x > 0.0f ? 1.0f : 0.0f; }
};

struct SquaredRelu {  // So et al. 2021
  static __device__ __forceinline__ float value(float x) { return x > 0.0f ? x * x : 0.0f; }
  static __device__ __forceinline__ float slope(float x) { return x > 0.0f ? 2.0f * x : 0.0f; }
};

template <int N, typename T>
__device__ __forceinline__ void add(float (&x)[N], const T* bias, int column) {
  if (bias == nullptr) return;
  const Vec<T, N> more = load<N>(bias + column);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = to_float(from_float<T>(x[i] + to_float(more.values[i])));
}

template <int N, typename T>
__device__ __forceinline__ void read(float (&x)[N], const T* from) {
  const Vec<T, N> values = load<N>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = to_float(values.values[i]);
}

template <int N, typename T>
__device__ __forceinline__ void write(T* to, const float (&x)[N]) {
  Vec<T, N> values;
#pragma unroll
  for (int i = 0; i < N; ++i) values.values[i] = from_float<T>(x[i]);
  store<N>(to, values);
}

template <typename T, int N, typename F, bool kGated>
__global__ void __launch_bounds__(kThreads) forward(Activation call) {
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * N, width = call.columns;
  if (column >= width) return;
  const T* bias = static_cast<const T*>(call.bias);
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < call.rows; row += step) {
    const T* x = static_cast<const T*>(call.x) + row * width * (kGated ? 2 : 1) + column;
    float gate[N], linear[N];
    read<N>(gate, x);
    if constexpr (kGated) read<N>(linear, x + width);
    add<N>(gate, bias, column);
    if constexpr (kGated) add<N>(linear, bias, width + column);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      gate[i] = F::value(gate[i]);
      if constexpr (kGated) gate[i] *= linear[i];
    }
    write<N>(static_cast<T*>(call.y) + row * width + column, gate);
  }
}

template <typename T, int N, typename F, bool kGated>
__global__ void __launch_bounds__(kThreads) backward(Activation call) {
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * N, width = call.columns;
  if (column >= width) return;
  const T* bias = static_cast<const T*>(call.bias);
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < call.rows; row += step) {
    const int64_t start = row * width * (kGated ? 2 : 1) + column;
    const T* x = static_cast<const T*>(call.x) + start;
    float gate[N], linear[N], grad[N];
    read<N>(gate, x);
    if constexpr (kGated) read<N>(linear, x + width);
    read<N>(grad, static_cast<const T*>(call.grad) + row * width + column);
    add<N>(gate, bias, column);
    if constexpr (kGated) add<N>(linear, bias, width + column);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float slope = F::slope(gate[i]);
      if constexpr (kGated) {
        const float value = F::value(gate[i]);
        gate[i] = grad[i] * linear[i] * slope;
        linear[i] = grad[i] * value;
      } else {
        gate[i] = grad[i] * slope;
      }
    }
    T* out = static_cast<T*>(call.y) + start;
    write<N>(out, gate);
    if constexpr (kGated) write<N>(out + width, linear);
  }
}

// Calls `run` with the functions of a kind: an activation, and whether it is gated.
template <typename R>
void by_kind(ActivationKind kind, R run) {
  switch (kind) {
    case ActivationKind::gelu: return run(Gelu(), std::false_type());
    case ActivationKind::relu: return run(Relu(), std::false_type());
    case ActivationKind::squared_relu: return run(SquaredRelu(), std::false_type());
    case ActivationKind::swiglu: return run(Silu(), std::true_type());
    case ActivationKind::geglu: return run(Gelu(), std::true_type());
  }
}

}  // namespace

void activation(const Activation& call, Stream stream) {
  by_type(call.type, [&](auto zero) {
    by_kind(call.kind, [&](auto function, auto gated) {
      using T = decltype(zero);
      using F = decltype(function);
      constexpr bool kGated = decltype(gated)::value;
      const bool wide = in_16_bytes<T>(call.columns, call.x, call.bias, call.grad, call.y);
      const int64_t pieces = wide ? call.columns / kPer16Bytes<T> : call.columns;
      const int threads = power_of_two(pieces, 32, kThreads), rows = kThreads / threads;
      const int64_t down = ceil_div(call.rows, rows);
      const dim3 grid(static_cast<unsigned>(ceil_div(pieces, threads)), static_cast<unsigned>(down < 65535 ? down : 65535));
      constexpr int N = kPer16Bytes<T>;
      auto kernel = call.grad == nullptr ? (wide ? forward<T, N, F, kGated> : forward<T, 1, F, kGated>)
                                         : (wide ? backward<T, N, F, kGated> : backward<T, 1, F, kGated>);
      launch(kernel, grid, dim3(threads, rows), 0, stream, call);
    });
  });
}

}  // namespace megafab
