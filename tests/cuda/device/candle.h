// What candle's kernels need beyond cuda_cpu.h to compile for the CPU: functions of CUDA's headers that the host side of
// those headers leaves out.
#pragma once
#define CUDA_CPU_TOOLKIT_HEADERS
#include "cuda_cpu.h"

#include <algorithm>
#include <cmath>
#include <cuda/std/limits>
#include <limits>

#define __CUDA_ARCH__ 800
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 4
using std::isnan;
using std::max;
using std::min;
using std::signbit;

inline float normcdff(float x) { return 0.5f * erfcf(-x * 0.70710678f); }
inline double normcdf(double x) { return 0.5 * erfc(-x * 0.7071067811865476); }

template <class T>
T atomicCAS(T* place, T expected, T value) {
  __atomic_compare_exchange_n(place, &expected, value, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
template <class T, class U>
T atomicMax(T* place, U value) {
  T old = *place;
  if (value > old) *place = value;
  return old;
}
template <class T, class U>
T atomicMin(T* place, U value) {
  T old = *place;
  if (value < old) *place = value;
  return old;
}

// Half functions through f32.
#define HALF_FUNCTION(name, expression)         \
  inline __half name(__half half) {             \
    float x = __half2float(half);               \
    return __float2half(expression);            \
  }                                             \
  inline __nv_bfloat16 name(__nv_bfloat16 half) { \
    float x = __bfloat162float(half);           \
    return __float2bfloat16(expression);        \
  }
HALF_FUNCTION(hsqrt, sqrtf(x))
HALF_FUNCTION(hcos, cosf(x))
HALF_FUNCTION(hsin, sinf(x))
HALF_FUNCTION(hlog, logf(x))
HALF_FUNCTION(hexp, expf(x))
HALF_FUNCTION(hceil, ceilf(x))
HALF_FUNCTION(hfloor, floorf(x))
HALF_FUNCTION(hrint, rintf(x))
HALF_FUNCTION(htrunc, truncf(x))
HALF_FUNCTION(hrcp, 1.0f / x)

inline int __float_as_int(float x) {
  int bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __int_as_float(int bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline long long __double_as_longlong(double x) {
  long long bits;
  memcpy(&bits, &x, 8);
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double x;
  memcpy(&x, &bits, 8);
  return x;
}
