// Lets a C++17 host compiler build .cu kernels for the CPU: the language extensions as macros over machine.cpp, which
// runs one block at a time with a fibre for each CUDA thread. Include this before the kernels.
//
// With CUDA_CPU_TOOLKIT_HEADERS the vector and half types come from the toolkit (candle's kernels need them),
// otherwise from here (our own kernels include nothing).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>

#ifdef CUDA_CPU_TOOLKIT_HEADERS
#include <vector_types.h>
#include <vector_functions.h>
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#else
struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __constant__ static const
// All shared memory in one section, so that the machine can fill it with NaN before each block. A kernel file must be
// included inside an anonymous namespace: variables of inline functions would get sections of their own.
#define __shared__ static __attribute__((section("cuda_cpu_shared")))

extern "C" {
extern char __start_cuda_cpu_shared[] __attribute__((weak)), __stop_cuda_cpu_shared[] __attribute__((weak));
uint3 cuda_cpu_thread_index();
uint3 cuda_cpu_block_index();
uint3 cuda_cpu_block_size();
uint3 cuda_cpu_grid_size();
unsigned cuda_cpu_lane();
void* cuda_cpu_dynamic_shared();
void cuda_cpu_block_barrier(const char* file, int line);
void cuda_cpu_warp_barrier(unsigned mask, const char* file, int line);
uint64_t cuda_cpu_shuffle(unsigned kind, unsigned mask, uint64_t bits, unsigned source, const char* file, int line);
void cuda_cpu_run(uint3 grid, uint3 block, unsigned dynamic_shared, char* shared_begin, char* shared_end,
                  void (*kernel)(void*), void* arguments);
}

#define threadIdx cuda_cpu_thread_index()
#define blockIdx cuda_cpu_block_index()
#define blockDim cuda_cpu_block_size()
#define gridDim cuda_cpu_grid_size()
#define warpSize 32
#define __syncthreads() cuda_cpu_block_barrier(__FILE__, __LINE__)
#define __syncwarp(...) cuda_cpu_warp_barrier(0xffffffffu, __FILE__, __LINE__)

namespace cuda_cpu {

template <class T>
T shuffle(unsigned kind, unsigned mask, T value, unsigned source, const char* file, int line) {
  static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = cuda_cpu_shuffle(kind, mask, bits, source, file, line);
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class... A, size_t... I>
void launch_with(void (*kernel)(A...), uint3 grid, uint3 block, unsigned dynamic_shared, void** parameters,
                 std::index_sequence<I...>) {
  struct Call {
    void (*kernel)(A...);
    std::tuple<std::remove_const_t<A>...> arguments;
  } call{kernel, {*(std::remove_const_t<A>*)parameters[I]...}};  // copied at the launch, as cuLaunchKernel does it
  auto run = [](void* opaque) {
    auto* call = (Call*)opaque;
    std::apply(call->kernel, call->arguments);
  };
  cuda_cpu_run(grid, block, dynamic_shared, __start_cuda_cpu_shared, __stop_cuda_cpu_shared, run, &call);
}

// Runs `kernel` with arguments as cuLaunchKernel takes them: pointers to their values.
template <class... A>
void launch(void (*kernel)(A...), uint3 grid, uint3 block, unsigned dynamic_shared, void** parameters) {
  launch_with(kernel, grid, block, dynamic_shared, parameters, std::index_sequence_for<A...>{});
}

}  // namespace cuda_cpu

#define CUDA_CPU_FIRST(first, ...) (first)
#define __shfl_xor_sync(mask, value, ...) \
  cuda_cpu::shuffle(1, mask, value, cuda_cpu_lane() ^ (unsigned)CUDA_CPU_FIRST(__VA_ARGS__), __FILE__, __LINE__)
#define __shfl_down_sync(mask, value, offset) \
  cuda_cpu::shuffle(2, mask, value, cuda_cpu_lane() + (unsigned)(offset), __FILE__, __LINE__)
#define __shfl_sync(mask, value, source) \
  cuda_cpu::shuffle(3, mask, value, (unsigned)(source) & 31u, __FILE__, __LINE__)

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
template <class T>
T atomicAdd(T* place, T value) {
  T old, sum;
  __atomic_load(place, &old, __ATOMIC_RELAXED);
  do {
    sum = old + value;
  } while (!__atomic_compare_exchange(place, &old, &sum, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
