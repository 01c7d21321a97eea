// The project's kernels, compiled for the CPU and started by name: cuda_cpu_launch has cuLaunchKernel's arguments, so
// that the kernel tests and the emulated libcuda share it. Compile with -I the folder of the kernels.
#include "cuda_cpu.h"

namespace {  // internal linkage, or the __shared__ variables of inline functions would leave their section
#include "flat.cuh"
#include "vradam.cu"
#include "methods.cu"
#include "model.cu"
}  // namespace

// 0, or 1 where no kernel has this name.
extern "C" int cuda_cpu_launch(const char* name, uint3 grid, uint3 block, unsigned dynamic_shared, void** parameters) {
#define START(kernel)                                                \
  if (!strcmp(name, #kernel)) {                                      \
    cuda_cpu::launch(kernel, grid, block, dynamic_shared, parameters); \
    return 0;                                                        \
  }
#define START_METHOD(method) START(update_##method) START(predict_##method)
  START(reduce) START(decide) START(finish) START(predict_gradient)
  START(add_scaled) START(blend_square) START(zero_gaps)
  START_METHOD(adam) START_METHOD(nadam) START_METHOD(radam) START_METHOD(adabelief) START_METHOD(rmsprop)
  START_METHOD(sgd) START_METHOD(lion) START_METHOD(rgd) START_METHOD(sophia)
  START(norm_forward) START(norm_backward) START(norm_parameter_sums) START(column_sums) START(fold_columns)
  START(accumulate_into) START(add_bias_residual) START(gelu_forward) START(gelu_backward) START(swiglu_forward)
  START(swiglu_backward) START(heads_apart) START(heads_together) START(softmax_forward) START(softmax_backward)
  START(cross_entropy) START(embed) START(embed_backward)
  return 1;
}
