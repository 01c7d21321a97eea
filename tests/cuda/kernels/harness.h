// What the kernel tests share: launches by name, buffers that AddressSanitizer watches to the byte, and the hash of all
// results that must not move with the schedule. One file of each program includes it.
#pragma once
#include <algorithm>
#include <cstdio>
#include <string>

#include "cuda_cpu.h"

// A race must end the test, and the test frees nothing.
extern "C" const char* __asan_default_options() { return "detect_leaks=0 exitcode=67"; }
extern "C" const char* __tsan_default_options() { return "halt_on_error=1 exitcode=66 history_size=2"; }
extern "C" int cuda_cpu_launch(const char*, uint3, uint3, unsigned, void**);

namespace {

uint64_t all_bits = 1469598103934665603u;

void hash(const void* data, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) all_bits = (all_bits ^ ((const unsigned char*)data)[i]) * 1099511628211u;
}

template <class... A>
void start(const std::string& kernel, uint64_t blocks, unsigned threads, A... arguments) {
  if (!blocks) return;
  void* parameters[] = {&arguments...};
  if (cuda_cpu_launch(kernel.c_str(), {(unsigned)blocks, 1, 1}, {threads, 1, 1}, 0, parameters)) {
    fprintf(stderr, "no kernel %s\n", kernel.c_str());
    exit(2);
  }
}

// Memory of exactly this size, so that ASan sees the first element too far. malloc aligns it for float4.
template <class T>
T* buffer(size_t count, T fill) {
  T* numbers = (T*)malloc(count * sizeof(T));
  std::fill(numbers, numbers + count, fill);
  return numbers;
}

}  // namespace
