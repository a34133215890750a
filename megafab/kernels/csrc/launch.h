// What the kernels offer: pointers and sizes in, work on a stream out. Documented in the Python file of each.
#pragma once

#include <cstdint>

namespace megafab {

enum class Type { fp32, bf16, fp16 };
using Stream = void*;

// ---- norm.cu: see norm.py ----------------------------------------------------------------------------------

// Null: `residual` and `sum` without an addition, `bias` and `mean` for RMSNorm.
struct Norm {
  Type type;
  int64_t rows;
  int columns;
  const void* x;
  const void* residual;
  const void* weight;
  const void* bias;
  void* y;
  void* sum;
  float* mean;
  float* rstd;
  float eps;
};
void norm(const Norm& call, Stream stream);

// `partial` is fp32 [`norm_groups`, columns], for the weight and, unless null, for the bias.
struct NormBackward {
  Type type;
  int64_t rows;
  int columns;
  const void* grad;
  const void* grad_sum;
  const void* x;
  const void* weight;
  const float* mean;
  const float* rstd;
  void* grad_x;
  void* grad_weight;
  void* grad_bias;
  float* partial_weight;
  float* partial_bias;
};
int norm_groups(Type type, int64_t rows, int columns, bool centred);
void norm_backward(const NormBackward& call, Stream stream);

// ---- activation.cu: see activation.py ----------------------------------------------------------------------

enum class ActivationKind { gelu, relu, squared_relu, swiglu, geglu };

// `columns` of y forward, and of the gradient; x and the bias of a gated unit have twice as many. Backward where
// `grad` is not null: y is then the gradient of x.
struct Activation {
  Type type;
  ActivationKind kind;
  int64_t rows;
  int columns;
  const void* x;
  const void* bias;
  const void* grad;
  void* y;
};
void activation(const Activation& call, Stream stream);

// ---- dropout.cu: see dropout.py ----------------------------------------------------------------------------

// Null: `bias` and `residual` of a gradient, `seed` where nothing is dropped. What has random bits below
// `threshold` is dropped, the rest multiplied by `scale`.
struct Dropout {
  Type type;
  int64_t count;
  int columns;
  const void* x;
  const void* bias;
  const void* residual;
  void* y;
  const int64_t* seed;
  uint32_t threshold;
  float scale;
};
void dropout(const Dropout& call, Stream stream);

// ---- rope.cu: see rope.py ----------------------------------------------------------------------------------

// Heads [length, batch, heads, 2 half] read at `from` and written at `to`; strides of the first three dimensions.
struct Heads {
  int heads;
  const void* from;
  void* to;
  int64_t from_strides[3];
  int64_t to_strides[3];
};

// The second of `x` may have 0 heads. The table is [2, length, batch, half], `sign` -1 to turn back.
struct Rope {
  Type type;
  int64_t length;
  int64_t batch;
  int half;
  Heads x[2];
  const void* table;
  int64_t table_strides[3];
  float sign;
};
void rope(const Rope& call, Stream stream);

// ---- softmax.cu: see softmax.py ----------------------------------------------------------------------------

// Scores [sequences, heads, queries, columns]; a mask is null or has strides, 0 where it is the same for all, of
// the first three dimensions. Backward where `grad` is not null: `scores` are then the probabilities.
struct Softmax {
  Type type;
  int64_t sequences;
  int64_t heads;
  int64_t queries;
  int columns;
  const void* scores;
  const bool* mask;
  int64_t mask_strides[3];
  bool causal;
  float scale;
  const void* grad;
  void* out;
};
void masked_softmax(const Softmax& call, Stream stream);

}  // namespace megafab
