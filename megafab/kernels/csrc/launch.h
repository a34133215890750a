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

// ---- cross_entropy.cu: see cross_entropy.py ----------------------------------------------------------------

// With `expected` it writes `nll` and `gradient`, which is where the logits are; without, the other results.
struct CrossEntropy {
  Type type;
  int64_t rows;
  int columns;
  int64_t first;
  const void* logits;
  const int64_t* labels;
  float* peak;
  float* total;
  float* target;
  float* sum;
  const float* expected;
  float* nll;
  void* gradient;
};
void cross_entropy(const CrossEntropy& call, Stream stream);

// Null: a gradient of 0.
struct CrossEntropyGradient {
  Type type;
  int64_t rows;
  int columns;
  int64_t first;
  float vocabulary;
  void* logits;
  const int64_t* labels;
  const float* peak;
  const float* total;
  const float* nll;
  const float* log_z;
  const float* mean;
};
void cross_entropy_gradient(const CrossEntropyGradient& call, Stream stream);

struct ScaleRows {
  Type type;
  int64_t rows;
  int columns;
  void* x;
  const float* expected;
  const float* found;
};
void scale_rows(const ScaleRows& call, Stream stream);

}  // namespace megafab
