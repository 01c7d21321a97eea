// cuBLAS and cuRAND of the emulated device, as far as candle calls them: plain loops, products summed in double.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {

enum { SUCCESS = 0, NOT_SUPPORTED = 15 };
enum Type { F32 = 0, BF16 = 14 };  // cudaDataType

double load(const void* numbers, int type, size_t i) {
  if (type == F32) return ((const float*)numbers)[i];
  const uint32_t bits = (uint32_t)((const uint16_t*)numbers)[i] << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

void store(void* numbers, int type, size_t i, float x) {
  if (type == F32) {
    ((float*)numbers)[i] = x;
    return;
  }
  uint32_t bits;
  memcpy(&bits, &x, 4);
  ((uint16_t*)numbers)[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint64_t generator = 1;

double uniform() {
  generator = generator * 6364136223846793005u + 1442695040888963407u;
  return ((generator >> 11) + 0.5) / 9007199254740992.0;
}

}  // namespace

extern "C" {

int cublasCreate_v2(void** handle) {
  *handle = (void*)48;
  return SUCCESS;
}
int cublasDestroy_v2(void*) { return SUCCESS; }
int cublasSetStream_v2(void*, void*) { return SUCCESS; }

// Column-major: C [m, n] = alpha op(A) [m, k] op(B) [k, n] + beta C, for each of `batch` matrices.
int cublasGemmStridedBatchedEx(void*, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha,
                               const void* a, int a_type, int lda, long long a_stride, const void* b, int b_type,
                               int ldb, long long b_stride, const void* beta, void* c, int c_type, int ldc,
                               long long c_stride, int batch, int, int) {
  if ((a_type != F32 && a_type != BF16) || a_type != b_type || a_type != c_type) {
    fprintf(stderr, "emulated cuBLAS: products of type %d, %d -> %d are missing\n", a_type, b_type, c_type);
    return NOT_SUPPORTED;
  }
  const float scale = *(const float*)alpha, keep = *(const float*)beta;
  for (long long z = 0; z < batch; z++)
    for (long long j = 0; j < n; j++)
      for (long long i = 0; i < m; i++) {
        double sum = 0.0;
        for (long long p = 0; p < k; p++) {
          const long long at_a = z * a_stride + (transpose_a ? p + i * lda : i + p * lda);
          const long long at_b = z * b_stride + (transpose_b ? j + p * ldb : p + j * ldb);
          sum += load(a, a_type, (size_t)at_a) * load(b, b_type, (size_t)at_b);
        }
        const size_t at_c = (size_t)(z * c_stride + i + j * ldc);
        const double old = keep != 0.0f ? keep * load(c, c_type, at_c) : 0.0;
        store(c, c_type, at_c, (float)(scale * sum + old));
      }
  return SUCCESS;
}
int cublasDgemmStridedBatched() { return NOT_SUPPORTED; }

int curandCreateGenerator(void** handle, int) {
  *handle = (void*)64;
  return SUCCESS;
}
int curandDestroyGenerator(void*) { return SUCCESS; }
int curandSetStream(void*, void*) { return SUCCESS; }
int curandSetPseudoRandomGeneratorSeed(void*, unsigned long long seed) {
  generator = seed * 2 + 1;
  return SUCCESS;
}
int curandGenerateUniform(void*, float* numbers, size_t count) {
  for (size_t i = 0; i < count; i++) numbers[i] = (float)uniform();
  return SUCCESS;
}
int curandGenerateNormal(void*, float* numbers, size_t count, float mean, float deviation) {
  for (size_t i = 0; i < count; i++) {
    const double radius = sqrt(-2.0 * log(uniform())), angle = 6.283185307179586 * uniform();
    numbers[i] = mean + deviation * (float)(radius * cos(angle));
  }
  return SUCCESS;
}
int curandGenerateUniformDouble() { return NOT_SUPPORTED; }
int curandGenerateNormalDouble() { return NOT_SUPPORTED; }

}  // extern "C"
