// Softmax cross-entropy over rows of logits, and its gradient in their place.
//
// A block reads a row once, each thread with several 16-byte loads in flight, and keeps a running peak and
// sum; if it is to leave the gradient too, it goes back over the row from its end, of which the cache has most.
// Blocks are as large as rows are long, so that few enough rows are under way for the cache to hold them.
// What needs no sums over a row is cut into tiles, which fill the GPU however few rows there are.
#include "common.cuh"

namespace megafab {
namespace {

constexpr int kUnroll = 4;          // loads in flight
constexpr int kThreads = 256;       // of a tile
constexpr int kPiecesPerThread = 8; // of a row, before a block grows
constexpr float kLowest = -3.4028234663852886e38f;  // finite: -inf less itself is nan

// exp(value - peak) summed up to here.
struct Running {
  float peak = kLowest, total = 0.0f;
};

template <typename T, int N>
__device__ __forceinline__ void take(Running& r, float& sum, const Vec<T, N>* values, int count) {
  float peak = r.peak;
#pragma unroll
  for (int piece = 0; piece < kUnroll; ++piece) {
    if (piece >= count) break;
#pragma unroll
    for (int i = 0; i < N; ++i) peak = fmaxf(peak, to_float(values[piece].values[i]));
  }
  float total = r.total * __expf(r.peak - peak);
#pragma unroll
  for (int piece = 0; piece < kUnroll; ++piece) {
    if (piece >= count) break;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float value = to_float(values[piece].values[i]);
      total += __expf(value - peak);
      sum += value;
    }
  }
  r.peak = peak;
  r.total = total;
}

template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads) rows_of(CrossEntropy call) {
  __shared__ float scratch[3][kWarp];
  const int columns = call.columns, threads = blockDim.x;
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(call.logits) + row * columns;
  const int64_t place = call.labels[row] - call.first;
  const bool here = place >= 0 && place < columns;
  const float target = here ? to_float(x[place]) : 0.0f;

  Running mine;
  float sum = 0.0f;
  const int step = threads * N, round = kUnroll * step;
  const int whole = columns / round;  // rounds in which every thread has all its pieces
  int column = threadIdx.x * N;
  for (int turn = 0; turn < whole; ++turn, column += round) {
    Vec<T, N> values[kUnroll];
#pragma unroll
    for (int piece = 0; piece < kUnroll; ++piece) values[piece] = load<N>(x + column + piece * step);
    take<T, N>(mine, sum, values, kUnroll);
  }
  for (; column < columns; column += step) {
    const Vec<T, N> value = load<N>(x + column);
    take<T, N>(mine, sum, &value, 1);
  }
  const float peak = over_row(mine.peak, threads, scratch[0], Max());
  const float total = over_row(mine.total * __expf(mine.peak - peak), threads, scratch[1], Sum());
  if (!call.expected) {
    sum = over_row(sum, threads, scratch[2], Sum());
    if (threadIdx.x == 0) {
      call.peak[row] = peak;
      call.total[row] = total;
      call.target[row] = target;
      call.sum[row] = sum;
    }
    return;
  }

  const float expected = *call.expected, slope = expected / total;
  if (threadIdx.x == 0) call.nll[row] = logf(total) + (peak - target);
  __syncthreads();  // the label's logit, which others write over, has been read
  T* out = static_cast<T*>(call.gradient) + row * columns;
  const auto differentiate = [&](Vec<T, N>& value, int at) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float p = __expf(to_float(value.values[i]) - peak) * slope;
      value.values[i] = from_float<T>(p - (at + i == place ? expected : 0.0f));
    }
    store<N>(out + at, value);
  };
  for (column = whole * round + threadIdx.x * N; column < columns; column += step) {
    Vec<T, N> value = load<N>(out + column);
    differentiate(value, column);
  }
  for (int turn = whole - 1; turn >= 0; --turn) {
    column = turn * round + threadIdx.x * N;
    Vec<T, N> values[kUnroll];
#pragma unroll
    for (int piece = 0; piece < kUnroll; ++piece) values[piece] = load<N>(out + column + piece * step);
#pragma unroll
    for (int piece = 0; piece < kUnroll; ++piece) differentiate(values[piece], column + piece * step);
  }
}

// Calls `change(values, column)` for the pieces of this block's tile of a row, and writes them back.
template <typename T, int N, typename F>
__device__ __forceinline__ void for_tile(T* row, int columns, F change) {
  const int step = blockDim.x * N;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kUnroll * step + threadIdx.x * N;
  Vec<T, N> values[kUnroll];
#pragma unroll
  for (int piece = 0; piece < kUnroll; ++piece) {
    if (first + piece * step < columns) values[piece] = load<N>(row + first + piece * step);
  }
#pragma unroll
  for (int piece = 0; piece < kUnroll; ++piece) {
    const int64_t column = first + piece * step;
    if (column < columns) {
      change(values[piece], column);
      store<N>(row + column, values[piece]);
    }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) gradient(CrossEntropyGradient call) {
  const int64_t row = blockIdx.x;
  const float nll = call.nll ? call.nll[row] : 0.0f;
  const float log_z = call.log_z ? call.log_z[row] : 0.0f;
  const float mean = call.mean ? call.mean[row] / call.vocabulary : 0.0f;
  const bool idle = nll == 0.0f && log_z == 0.0f && mean == 0.0f;
  const float peak = call.peak[row], slope = (nll + log_z) / call.total[row];
  const int64_t place = call.labels[row] - call.first;
  for_tile<T, N>(static_cast<T*>(call.logits) + row * call.columns, call.columns, [&](Vec<T, N>& value, int64_t column) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float p = __expf(to_float(value.values[i]) - peak) * slope;
      const float grad = p + mean - (column + i == place ? nll : 0.0f);
      value.values[i] = from_float<T>(idle ? 0.0f : grad);
    }
  });
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) scale(ScaleRows call) {
  const int64_t row = blockIdx.x;
  const float expected = *call.expected, found = call.found[row];
  if (found == expected) return;
  const float factor = found / expected;
  for_tile<T, N>(static_cast<T*>(call.x) + row * call.columns, call.columns, [&](Vec<T, N>& value, int64_t) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      value.values[i] = from_float<T>(found == 0.0f ? 0.0f : to_float(value.values[i]) * factor);
    }
  });
}

dim3 tiles(int64_t rows, int columns, int per_piece) {
  const int64_t tile = static_cast<int64_t>(kThreads) * kUnroll * per_piece;
  return dim3(static_cast<unsigned>(rows), static_cast<unsigned>(ceil_div(columns, tile)));
}

}  // namespace

void cross_entropy(const CrossEntropy& call, Stream stream) {
  by_type(call.type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int N = kPer16Bytes<T>;
    const bool wide = in_16_bytes<T>(call.columns, call.logits);
    const int64_t pieces = wide ? call.columns / N : call.columns;
    const int threads = power_of_two(ceil_div(pieces, kPiecesPerThread), kWarp, kMaxThreads);
    launch(wide ? rows_of<T, N> : rows_of<T, 1>, dim3(static_cast<unsigned>(call.rows)), dim3(threads), 0, stream,
           call);
  });
}

void cross_entropy_gradient(const CrossEntropyGradient& call, Stream stream) {
  by_type(call.type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int N = kPer16Bytes<T>;
    const bool wide = in_16_bytes<T>(call.columns, call.logits);
    const dim3 grid = tiles(call.rows, call.columns, wide ? N : 1);
    launch(wide ? gradient<T, N> : gradient<T, 1>, grid, dim3(kThreads), 0, stream, call);
  });
}

void scale_rows(const ScaleRows& call, Stream stream) {
  by_type(call.type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int N = kPer16Bytes<T>;
    const bool wide = in_16_bytes<T>(call.columns, call.x);
    const dim3 grid = tiles(call.rows, call.columns, wide ? N : 1);
    launch(wide ? scale<T, N> : scale<T, 1>, grid, dim3(kThreads), 0, stream, call);
  });
}

}  // namespace megafab
