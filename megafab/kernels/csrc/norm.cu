// RMSNorm and LayerNorm over rows, forward and backward.
//
// A row belongs to 8 to 1024 threads, each with up to four 16-byte pieces of it in registers, so that it
// crosses device memory once; short rows share a block. Rows too long for that, or not in 16-byte pieces, are
// read again for each pass (from the cache, where they fit).
#include "common.cuh"

namespace megafab {
namespace {

constexpr int kForwardPieces = 4;   // of 16 bytes a thread keeps
constexpr int kBackwardPieces = 2;  // beside fp32 sums for as many columns; 4 in rows longer than those fill
constexpr int kBackwardThreads = 512;
constexpr int kBlock = 128;         // threads, unless a row takes more

struct Geometry {
  int threads;  // of a row
  int rows;     // of a block
  int pieces;   // a thread keeps; 0: it keeps none
};

Geometry geometry(int64_t vectors, bool wide, int pieces) {
  if (!wide) return {power_of_two(vectors, kWarp, kMaxThreads), 1, 0};
  const int threads = power_of_two(ceil_div(vectors, pieces), 8, kMaxThreads);
  const int rows = threads < kBlock ? kBlock / threads : 1;
  const int64_t each = ceil_div(vectors, threads);
  return {threads, rows, each > pieces ? 0 : each > 2 ? 4 : each > 1 ? 2 : 1};
}

template <typename T, int N, int K>
__global__ void __launch_bounds__(kMaxThreads) forward(Norm call) {
  __shared__ float scratch[2][kWarp];
  const int columns = call.columns, threads = blockDim.x;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool active = row < call.rows;
  const bool centred = call.bias != nullptr;
  const int64_t start = active ? row * columns : 0;
  const T* x = static_cast<const T*>(call.x) + start;
  const T* residual = call.residual ? static_cast<const T*>(call.residual) + start : nullptr;
  T* sum = call.residual ? static_cast<T*>(call.sum) + start : nullptr;
  Vec<T, N> kept[K > 0 ? K : 1];

  float total = 0.0f;
  if (active) {
    for_columns<N, K>(columns, [&](int piece, int column) {
      Vec<T, N> value = load<N>(x + column);
      if (residual) {
        const Vec<T, N> other = load<N>(residual + column);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          value.values[i] = from_float<T>(to_float(value.values[i]) + to_float(other.values[i]));
        }
        store<N>(sum + column, value);
      }
      if constexpr (K > 0) kept[piece] = value;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float v = to_float(value.values[i]);
        total += centred ? v : v * v;
      }
    });
  }
  total = over_row(total, threads, scratch[0], Sum()) / columns;
  const T* again = residual ? sum : x;  // where nothing is kept
  float mean = 0.0f, square = total;
  if (centred) {
    mean = total;
    square = 0.0f;
    if (active) {
      for_columns<N, K>(columns, [&](int piece, int column) {
        Vec<T, N> value;
        if constexpr (K > 0) value = kept[piece];
        else value = load<N>(again + column);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float v = to_float(value.values[i]) - mean;
          square += v * v;
        }
      });
    }
    square = over_row(square, threads, scratch[1], Sum()) / columns;
  }
  if (!active) return;
  const float rstd = rsqrtf(square + call.eps);
  if (threadIdx.x == 0) {
    call.rstd[row] = rstd;
    if (centred) call.mean[row] = mean;
  }
  const T* weight = static_cast<const T*>(call.weight);
  const T* bias = static_cast<const T*>(call.bias);
  T* y = static_cast<T*>(call.y) + start;
  for_columns<N, K>(columns, [&](int piece, int column) {
    Vec<T, N> value;
    if constexpr (K > 0) value = kept[piece];
    else value = load<N>(again + column);
    const Vec<T, N> scale = load<N>(weight + column);
    Vec<T, N> shift = {};
    if (centred) shift = load<N>(bias + column);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float v = (to_float(value.values[i]) - mean) * rstd * to_float(scale.values[i]);
      value.values[i] = from_float<T>(v + to_float(shift.values[i]));
    }
    store<N>(y + column, value);
  });
}

// With h = (x - mean) rstd and g = grad weight: grad_x = rstd (g - mean(g) - h mean(g h)), without mean(g) for
// RMSNorm; to the weight goes grad h, to the bias grad, summed over rows.
template <typename T, int N, int K, bool kCentred>
__global__ void __launch_bounds__(K > 0 ? kBackwardThreads : kMaxThreads) backward(NormBackward call) {
  __shared__ float scratch[4][kWarp];
  constexpr int kKept = K > 0 ? K : 1;
  const int columns = call.columns, threads = blockDim.x;
  const T* weight = static_cast<const T*>(call.weight);
  const int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  float* partial_weight = call.partial_weight + group * columns;
  float* partial_bias = kCentred ? call.partial_bias + group * columns : nullptr;
  float sum_weight[kKept][N] = {}, sum_bias[kCentred ? kKept : 1][N] = {};
  if constexpr (K == 0) {
    for_columns<N, K>(columns, [&](int, int column) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        partial_weight[column + i] = 0.0f;
        if constexpr (kCentred) partial_bias[column + i] = 0.0f;
      }
    });
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  const T* grads = static_cast<const T*>(call.grad);
  const T* xs = static_cast<const T*>(call.x);
  // The next row is on its way while this one is summed, where registers last.
  constexpr bool kAhead = K == 1 || K == 2;
  Vec<T, N> next_grad[kKept], next_x[kKept];
  const auto fetch = [&](int64_t row) {
    if (row >= call.rows) return;
    for_columns<N, K>(columns, [&](int piece, int column) {
      next_grad[piece] = load<N>(grads + row * columns + column);
      next_x[piece] = load<N>(xs + row * columns + column);
    });
  };
  if constexpr (kAhead) fetch(static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y);
  int turn = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < call.rows; first += stride) {
    const int64_t row = first + threadIdx.y;
    const bool active = row < call.rows;
    const int64_t start = active ? row * columns : 0;
    const T* grad = grads + start;
    const T* x = xs + start;
    const float rstd = active ? call.rstd[row] : 0.0f;
    const float mean = kCentred && active ? call.mean[row] : 0.0f;
    Vec<T, N> kept_grad[kKept], kept_x[kKept];
    float along = 0.0f, offset = 0.0f;
    if (active) {
      for_columns<N, K>(columns, [&](int piece, int column) {
        const Vec<T, N> g = kAhead ? next_grad[piece] : load<N>(grad + column);
        const Vec<T, N> value = kAhead ? next_x[piece] : load<N>(x + column);
        const Vec<T, N> scale = load<N>(weight + column);
        if constexpr (K > 0) {
          kept_grad[piece] = g;
          kept_x[piece] = value;
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float h = (to_float(value.values[i]) - mean) * rstd;
          const float down = to_float(g.values[i]), scaled = down * to_float(scale.values[i]);
          along += scaled * h;
          if constexpr (kCentred) offset += scaled;
          if constexpr (K > 0) {
            sum_weight[piece][i] += down * h;
            if constexpr (kCentred) sum_bias[piece][i] += down;
          } else {
            partial_weight[column + i] += down * h;
            if constexpr (kCentred) partial_bias[column + i] += down;
          }
        }
      });
    }
    if constexpr (kAhead) fetch(row + stride);
    // Two rows in turn, so that no thread writes over what another still reads.
    along = over_row(along, threads, scratch[turn], Sum()) / columns;
    if constexpr (kCentred) offset = over_row(offset, threads, scratch[2 + turn], Sum()) / columns;
    turn ^= 1;
    if (!active) continue;
    T* out = static_cast<T*>(call.grad_x) + start;
    const T* added = call.grad_sum ? static_cast<const T*>(call.grad_sum) + start : nullptr;
    for_columns<N, K>(columns, [&](int piece, int column) {
      Vec<T, N> g, value;
      if constexpr (K > 0) {
        g = kept_grad[piece];
        value = kept_x[piece];
      } else {
        g = load<N>(grad + column);
        value = load<N>(x + column);
      }
      const Vec<T, N> scale = load<N>(weight + column);
      Vec<T, N> more = {};
      if (added) more = load<N>(added + column);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float h = (to_float(value.values[i]) - mean) * rstd;
        const float scaled = to_float(g.values[i]) * to_float(scale.values[i]);
        g.values[i] = from_float<T>(rstd * (scaled - offset - h * along) + to_float(more.values[i]));
      }
      store<N>(out + column, g);
    });
  }
  if constexpr (K > 0) {
    for_columns<N, K>(columns, [&](int piece, int column) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        partial_weight[column + i] = sum_weight[piece][i];
        if constexpr (kCentred) partial_bias[column + i] = sum_bias[piece][i];
      }
    });
  }
}

// Sums of the columns of fp32 [groups, columns]: a warp takes 32 columns, the warps of a block share the groups.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) sum_groups(const float* partial, T* out, int groups, int columns) {
  __shared__ float sums[kWarp][kWarp + 1];
  const int column = blockIdx.x * kWarp + threadIdx.x;
  float total = 0.0f;
  if (column < columns) {
    for (int group = threadIdx.y; group < groups; group += blockDim.y) {
      total += partial[static_cast<int64_t>(group) * columns + column];
    }
  }
  sums[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y == 0 && column < columns) {
    total = 0.0f;
    for (int warp = 0; warp < blockDim.y; ++warp) total += sums[warp][threadIdx.x];
    out[column] = from_float<T>(total);
  }
}

template <typename T>
Geometry backward_geometry(int columns, bool wide, bool centred) {
  const int64_t vectors = wide ? columns / kPer16Bytes<T> : columns;
  const Geometry g = geometry(vectors, wide, kBackwardPieces);
  // A block of more threads has no registers for pieces.
  if (!g.pieces || g.threads <= kBackwardThreads) return g;
  return {kBackwardThreads, 1, !centred && vectors <= 4 * kBackwardThreads ? 4 : 0};
}

template <typename T>
auto backward_kernel(const Geometry& g, bool wide, bool centred) {
  constexpr int N = kPer16Bytes<T>;
  return !wide            ? (centred ? backward<T, 1, 0, true> : backward<T, 1, 0, false>)
         : g.pieces == 1 ? (centred ? backward<T, N, 1, true> : backward<T, N, 1, false>)
         : g.pieces == 2 ? (centred ? backward<T, N, 2, true> : backward<T, N, 2, false>)
         : g.pieces == 4 ? backward<T, N, 4, false>
                         : (centred ? backward<T, N, 0, true> : backward<T, N, 0, false>);
}

// As many as run at once, so that each has rows enough to pay for its sums.
template <typename K>
int blocks(K* kernel, const Geometry& g, int64_t rows) {
  const int64_t resident = resident_blocks(kernel, g.threads * g.rows), needed = ceil_div(rows, g.rows);
  return static_cast<int>(needed < resident ? needed : resident);
}

}  // namespace

void norm(const Norm& call, Stream stream) {
  by_type(call.type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int N = kPer16Bytes<T>;
    const bool wide =
        in_16_bytes<T>(call.columns, call.x, call.residual, call.weight, call.bias, call.y, call.sum);
    const Geometry g = geometry(wide ? call.columns / N : call.columns, wide, kForwardPieces);
    const dim3 grid(static_cast<unsigned>(ceil_div(call.rows, g.rows))), block(g.threads, g.rows);
    auto kernel = !wide            ? forward<T, 1, 0>
                  : g.pieces == 1 ? forward<T, N, 1>
                  : g.pieces == 2 ? forward<T, N, 2>
                  : g.pieces == 4 ? forward<T, N, 4>
                                  : forward<T, N, 0>;
    launch(kernel, grid, block, 0, stream, call);
  });
}

int norm_groups(Type type, int64_t rows, int columns, bool centred) {
  int groups = 0;
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    for (const bool wide : {true, false}) {  // the larger: which it is depends on the pointers
      if (wide && columns % kPer16Bytes<T>) continue;
      const Geometry g = backward_geometry<T>(columns, wide, centred);
      const int found = blocks(backward_kernel<T>(g, wide, centred), g, rows) * g.rows;
      groups = found > groups ? found : groups;
    }
  });
  return groups;
}

void norm_backward(const NormBackward& call, Stream stream) {
  by_type(call.type, [&](auto zero) {
    using T = decltype(zero);
    const bool wide =
        in_16_bytes<T>(call.columns, call.grad, call.grad_sum, call.x, call.weight, call.grad_x);
    const bool centred = call.grad_bias != nullptr;
    const Geometry g = backward_geometry<T>(call.columns, wide, centred);
    const auto kernel = backward_kernel<T>(g, wide, centred);
    const int count = blocks(kernel, g, call.rows);
    launch(kernel, dim3(count), dim3(g.threads, g.rows), 0, stream, call);
    const dim3 grid(static_cast<unsigned>(ceil_div(call.columns, kWarp))), block(kWarp, kWarp);
    const int groups = count * g.rows;
    launch(sum_groups<T>, grid, block, 0, stream, call.partial_weight, static_cast<T*>(call.grad_weight), groups,
           call.columns);
    if (centred) {
      launch(sum_groups<T>, grid, block, 0, stream, call.partial_bias, static_cast<T*>(call.grad_bias), groups,
             call.columns);
    }
  });
}

}  // namespace megafab
