// What a model's forward and backward passes need between their matrix products: norms, activations, heads, softmax,
// cross-entropy, embeddings, and the sums of a batch's rows. src/model/card calls them; src/ops has the formulas.
//
// Everything is f32, row-major. A row is one warp's work (the head's rows, as wide as the vocabulary, one block's), its
// sums go through a tree of fixed shape; sums over rows are taken in chunks, then in the chunks' order. No atomics: the
// same numbers give the same bits on any card and schedule.

#define ROW_WARPS 4
#define ROW_BLOCK __launch_bounds__(128)
#define PLAIN_BLOCK __launch_bounds__(256)
#define COLUMN_BLOCK __launch_bounds__(64)
// Rows whose column sums one thread adds up.
#define ROWS_A_SUM 64

__device__ __forceinline__ float warp_sum(float value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(FULL_WARP, value, distance);
  return value;
}

__device__ __forceinline__ float warp_most(float value) {
  for (int distance = 16; distance > 0; distance /= 2)
    value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, distance));
  return value;
}

// The row that this warp works on; one past the last or beyond where there is none.
__device__ __forceinline__ u64 row_of_warp() { return (u64)blockIdx.x * ROW_WARPS + threadIdx.x / 32; }

// The element that this thread works on. There are fewer than 2^32 of them, which are quicker to divide than u64.
__device__ __forceinline__ unsigned element_of_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }

// y = (x - mean) * scale * weight + bias over rows, scale = 1 / sqrt(variance + epsilon); means and scales are kept.
// Without `means` the root mean square takes the variance's place and nothing is subtracted.
extern "C" __global__ void ROW_BLOCK norm_forward(u64 rows, u64 width, float epsilon, const float* x,
                                                  const float* weight, const float* bias, float* y, float* means,
                                                  float* scales) {
  const u64 row = row_of_warp();
  if (row >= rows) return;
  const unsigned lane = threadIdx.x % 32;
  x += row * width;
  y += row * width;
  float mean = 0.0f;
  if (means) {
    for (u64 i = lane; i < width; i += 32) mean += x[i];
    mean = warp_sum(mean) / (float)width;
  }
  float squares = 0.0f;
  for (u64 i = lane; i < width; i += 32) squares += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / sqrtf(warp_sum(squares) / (float)width + epsilon);
  for (u64 i = lane; i < width; i += 32)
    y[i] = (x[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0.0f);
  if (lane == 0) {
    if (means) means[row] = mean;
    scales[row] = scale;
  }
}

// dx = (g - mean(g) - n mean(g n)) * scale [+ residual] with g = dy * weight and n the normed x; without `means` nothing
// but n's part is subtracted.
extern "C" __global__ void ROW_BLOCK norm_backward(u64 rows, u64 width, const float* dy, const float* x,
                                                   const float* weight, const float* means, const float* scales,
                                                   const float* residual, float* dx) {
  const u64 row = row_of_warp();
  if (row >= rows) return;
  const unsigned lane = threadIdx.x % 32;
  const u64 first = row * width;
  const float mean = means ? means[row] : 0.0f, scale = scales[row];
  float sum = 0.0f, product = 0.0f;
  for (u64 i = lane; i < width; i += 32) {
    const float slope = dy[first + i] * weight[i];
    sum += slope;
    product += slope * ((x[first + i] - mean) * scale);
  }
  sum = means ? warp_sum(sum) / (float)width : 0.0f;
  product = warp_sum(product) / (float)width;
  for (u64 i = lane; i < width; i += 32) {
    const float slope = dy[first + i] * weight[i];
    const float normed = (x[first + i] - mean) * scale;
    dx[first + i] = (slope - sum - normed * product) * scale + (residual ? residual[first + i] : 0.0f);
  }
}

// The sums over each chunk of rows that a norm's weight (dy * normed x) and, where `bias_sums` is given, its bias (dy) get:
// [chunks, width] each. Threads of a block are neighbouring columns.
extern "C" __global__ void COLUMN_BLOCK norm_parameter_sums(u64 rows, u64 width, const float* dy, const float* x,
                                                            const float* means, const float* scales,
                                                            float* weight_sums, float* bias_sums) {
  const u64 blocks_a_chunk = (width + blockDim.x - 1) / blockDim.x;
  const u64 chunk = blockIdx.x / blocks_a_chunk, column = blockIdx.x % blocks_a_chunk * blockDim.x + threadIdx.x;
  if (column >= width) return;
  const u64 end = (chunk + 1) * ROWS_A_SUM < rows ? (chunk + 1) * ROWS_A_SUM : rows;
  float weight_sum = 0.0f, bias_sum = 0.0f;
  for (u64 row = chunk * ROWS_A_SUM; row < end; row++) {
    const float slope = dy[row * width + column];
    weight_sum += slope * ((x[row * width + column] - (means ? means[row] : 0.0f)) * scales[row]);
    bias_sum += slope;
  }
  weight_sums[chunk * width + column] = weight_sum;
  if (bias_sums) bias_sums[chunk * width + column] = bias_sum;
}

// The sums of x's columns over each chunk of rows: [chunks, width].
extern "C" __global__ void COLUMN_BLOCK column_sums(u64 rows, u64 width, const float* x, float* sums) {
  const u64 blocks_a_chunk = (width + blockDim.x - 1) / blockDim.x;
  const u64 chunk = blockIdx.x / blocks_a_chunk, column = blockIdx.x % blocks_a_chunk * blockDim.x + threadIdx.x;
  if (column >= width) return;
  const u64 end = (chunk + 1) * ROWS_A_SUM < rows ? (chunk + 1) * ROWS_A_SUM : rows;
  float sum = 0.0f;
  for (u64 row = chunk * ROWS_A_SUM; row < end; row++) sum += x[row * width + column];
  sums[chunk * width + column] = sum;
}

// into [width] (+)= the chunks' sums, in their order.
extern "C" __global__ void COLUMN_BLOCK fold_columns(u64 chunks, u64 width, const float* sums, unsigned accumulate,
                                                     float* into) {
  const unsigned column = element_of_thread();
  if (column >= width) return;
  double sum = 0.0;
  for (u64 chunk = 0; chunk < chunks; chunk++) sum += (double)sums[chunk * width + column];
  into[column] = accumulate ? into[column] + (float)sum : (float)sum;
}

// into (+)= from; zeros where `from` is not given.
extern "C" __global__ void PLAIN_BLOCK accumulate_into(unsigned count, const float* from, unsigned accumulate, float* into) {
  const unsigned i = element_of_thread();
  if (i >= count) return;
  const float value = from ? from[i] : 0.0f;
  into[i] = accumulate ? into[i] + value : value;
}

// y = x + bias (one for each column) + residual, each where it is given.
extern "C" __global__ void PLAIN_BLOCK add_bias_residual(unsigned count, unsigned width, const float* x, const float* bias,
                                                         const float* residual, float* y) {
  const unsigned i = element_of_thread();
  if (i >= count) return;
  float sum = x[i];
  if (bias) sum += bias[i % width];
  if (residual) sum += residual[i];
  y[i] = sum;
}

#define GELU_ROOT 0.79788456080286535588f
#define GELU_CUBE 0.044715f
// Where GELU has long been a straight line.
#define GELU_FLAT 1e3f
// e^80, which keeps 1 - sigmoid precise and is never inf * 0.
#define GELU_MOST 5.5406224e34f

// e^(-2 u) of gelu(x) = x (1 + tanh u) / 2 = x / (1 + e^(-2 u)), which is precise in the negative tail too.
__device__ __forceinline__ float gelu_exponential(float x) {
  return expf(-2.0f * (GELU_ROOT * (x + GELU_CUBE * x * x * x)));
}

// before = x + bias; y = gelu(before), by its tanh form.
extern "C" __global__ void PLAIN_BLOCK gelu_forward(unsigned count, unsigned width, const float* x, const float* bias,
                                                    float* before, float* y) {
  const unsigned i = element_of_thread();
  if (i >= count) return;
  const float v = x[i] + bias[i % width];
  before[i] = v;
  y[i] = v / (1.0f + gelu_exponential(v));
}

extern "C" __global__ void PLAIN_BLOCK gelu_backward(unsigned count, const float* before, const float* dy, float* dx) {
  const unsigned i = element_of_thread();
  if (i >= count) return;
  float v = before[i], e = gelu_exponential(v);
  // Comparisons that a NaN passes unchanged.
  e = e > GELU_MOST ? GELU_MOST : e;
  v = v > GELU_FLAT ? GELU_FLAT : v < -GELU_FLAT ? -GELU_FLAT : v;
  const float sigmoid = 1.0f / (1.0f + e), slope = 2.0f * (GELU_ROOT * (1.0f + 3.0f * GELU_CUBE * v * v));
  dx[i] = dy[i] * (sigmoid + v * (e * sigmoid) * (sigmoid * slope));
}

// y = gate / (1 + e^-gate) * up
extern "C" __global__ void PLAIN_BLOCK swiglu_forward(unsigned count, const float* gate, const float* up, float* y) {
  const unsigned i = element_of_thread();
  if (i >= count) return;
  y[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

extern "C" __global__ void PLAIN_BLOCK swiglu_backward(unsigned count, const float* gate, const float* up, const float* dy,
                                                       float* dgate, float* dup) {
  const unsigned i = element_of_thread();
  if (i >= count) return;
  const float g = gate[i], sigmoid = 1.0f / (1.0f + expf(-g));
  dup[i] = dy[i] * (g * sigmoid);
  dgate[i] = dy[i] * up[i] * (sigmoid * (1.0f + g * (1.0f - sigmoid)));
}

// Where a head's numbers lie in a row of x [batch time, row_stride]: head h reads columns
// first_column + (h / group) * dim on, so that `group` heads share them.
struct Heads {
  unsigned batch, time, heads, dim, group, row_stride, first_column;
};

// The angle's part of a rotated number: x[i] cos - x[i + dim / 2] sin for the first half of a head, the other way round
// for the second; `back` turns by the negative angle. cos and sin: [batch time, dim / 2].
__device__ __forceinline__ float turned(const float* x, unsigned i, unsigned dim, const float* cosines,
                                        const float* sines, bool back) {
  const unsigned half = dim / 2, pair = i % half;
  const float sine = back ? -sines[pair] : sines[pair];
  return i < half ? x[i] * cosines[pair] - x[i + half] * sine : x[i] * cosines[pair] + x[i - half] * sine;
}

// y [batch, heads, time, dim] = x's columns + bias, rotated where angles are given (then without a bias). A block is a
// token's.
extern "C" __global__ void PLAIN_BLOCK heads_apart(Heads shape, const float* x, const float* bias, const float* cosines,
                                                   const float* sines, float* y) {
  const unsigned token = blockIdx.x, row = token / shape.time, time = token % shape.time;
  const u64 angle = (u64)token * (shape.dim / 2);
  x += (u64)token * shape.row_stride;
  for (unsigned at = threadIdx.x; at < shape.heads * shape.dim; at += blockDim.x) {
    const unsigned head = at / shape.dim, i = at % shape.dim;
    const unsigned column = shape.first_column + head / shape.group * shape.dim;
    float value;
    if (cosines)
      value = turned(x + column, i, shape.dim, cosines + angle, sines + angle, false);
    else
      value = bias ? x[column + i] + bias[column + i] : x[column + i];
    y[(((u64)row * shape.heads + head) * shape.time + time) * shape.dim + i] = value;
  }
}

// x's columns = the sum of the heads that share them, each turned back where angles are given. A block is a token's.
extern "C" __global__ void PLAIN_BLOCK heads_together(Heads shape, const float* y, const float* cosines,
                                                      const float* sines, float* x) {
  const unsigned token = blockIdx.x, row = token / shape.time, time = token % shape.time;
  const u64 angle = (u64)token * (shape.dim / 2);
  x += (u64)token * shape.row_stride + shape.first_column;
  for (unsigned at = threadIdx.x; at < shape.heads / shape.group * shape.dim; at += blockDim.x) {
    const unsigned shared = at / shape.dim, i = at % shape.dim;
    float sum = 0.0f;
    for (unsigned g = 0; g < shape.group; g++) {
      const u64 head = (u64)row * shape.heads + shared * shape.group + g;
      const float* from = y + (head * shape.time + time) * shape.dim;
      sum += cosines ? turned(from, i, shape.dim, cosines + angle, sines + angle, true) : from[i];
    }
    x[at] = sum;
  }
}

// Scores [batch, heads, time, time] become the softmax of scale * score over the keys from the first of the query's
// document (time - position) to the query itself; all others 0.
extern "C" __global__ void ROW_BLOCK softmax_forward(u64 rows, u64 heads, u64 time, float scale,
                                                     const unsigned* positions, float* scores) {
  const u64 row = row_of_warp();
  if (row >= rows) return;
  const unsigned lane = threadIdx.x % 32;
  const u64 last = row % time, first = last - positions[row / (heads * time) * time + last];
  // Each lane reads and writes the same keys in all loops.
  const u64 begin = first / 32 * 32;
  scores += row * time;
  float most = -INFINITY;
  for (u64 i = begin + lane; i <= last; i += 32)
    if (i >= first) most = fmaxf(most, scores[i]);
  most = warp_most(most);
  float sum = 0.0f;
  for (u64 i = begin + lane; i <= last; i += 32) {
    if (i < first) continue;
    scores[i] = expf((scores[i] - most) * scale);
    sum += scores[i];
  }
  const float factor = 1.0f / warp_sum(sum);
  for (u64 i = lane; i < time; i += 32) scores[i] = i < first || i > last ? 0.0f : scores[i] * factor;
}

// slopes, the gradients of the softmax's results, become those of the scores: scale * p * (slope - sum(p * slope)).
extern "C" __global__ void ROW_BLOCK softmax_backward(u64 rows, u64 heads, u64 time, float scale,
                                                      const unsigned* positions, const float* probabilities,
                                                      float* slopes) {
  const u64 row = row_of_warp();
  if (row >= rows) return;
  const unsigned lane = threadIdx.x % 32;
  const u64 last = row % time, first = last - positions[row / (heads * time) * time + last];
  probabilities += row * time;
  slopes += row * time;
  float dot = 0.0f;
  for (u64 i = first / 32 * 32 + lane; i <= last; i += 32)
    if (i >= first) dot += probabilities[i] * slopes[i];
  dot = warp_sum(dot);
  for (u64 i = lane; i < time; i += 32)
    slopes[i] = i < first || i > last ? 0.0f : scale * probabilities[i] * (slopes[i] - dot);
}

#define HEAD_WARPS 8
#define HEAD_BLOCK __launch_bounds__(256)

// Over a block: the sum or, where `most` is set, the greatest of each thread's number, for every thread.
__device__ __forceinline__ float over_block(float value, bool most) {
  __shared__ float of_warps[HEAD_WARPS];
  value = most ? warp_most(value) : warp_sum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  const unsigned warps = blockDim.x / 32;
  float result = of_warps[0];
  for (unsigned warp = 1; warp < warps; warp++) result = most ? fmaxf(result, of_warps[warp]) : result + of_warps[warp];
  return result;
}

// A row's negative log-likelihood of its target (0 where that is `ignore`); logits become softmax - onehot(target), zeros
// for an ignored row, where `slopes` is set, and so do the columns that fill a row up to `stride`.
extern "C" __global__ void HEAD_BLOCK cross_entropy(u64 vocabulary, u64 stride, const unsigned* targets, unsigned ignore,
                                                    unsigned slopes, float* logits, double* losses) {
  const u64 row = blockIdx.x;
  const unsigned target = targets[row];
  logits += row * stride;
  if (target == ignore) {
    if (slopes)
      for (u64 i = threadIdx.x; i < stride; i += blockDim.x) logits[i] = 0.0f;
    if (threadIdx.x == 0) losses[row] = 0.0;
    return;
  }
  float most = -INFINITY;
  for (u64 i = threadIdx.x; i < vocabulary; i += blockDim.x) most = fmaxf(most, logits[i]);
  most = over_block(most, true);
  float sum = 0.0f;
  for (u64 i = threadIdx.x; i < vocabulary; i += blockDim.x) sum += expf(logits[i] - most);
  sum = over_block(sum, false);
  if (threadIdx.x == 0) losses[row] = (double)most + log((double)sum) - (double)logits[target];
  if (!slopes) return;
  __syncthreads();
  const float factor = 1.0f / sum;
  for (u64 i = threadIdx.x; i < stride; i += blockDim.x)
    logits[i] = i < vocabulary ? expf(logits[i] - most) * factor - (i == target ? 1.0f : 0.0f) : 0.0f;
}

// y [tokens, width] = the tokens' rows of a table + the positions' rows of another, where there is one.
extern "C" __global__ void PLAIN_BLOCK embed(unsigned count, unsigned width, const unsigned* ids, const float* table,
                                             const unsigned* positions, const float* position_table, float* y) {
  const unsigned at = element_of_thread();
  if (at >= count) return;
  const unsigned token = at / width, i = at % width;
  const float value = table[(u64)ids[token] * width + i];
  y[at] = position_table ? value + position_table[(u64)positions[token] * width + i] : value;
}

// table gradient += dy's rows by their id: block b adds, in their order, the rows `order[begins[b]..begins[b + 1]]` of dy,
// all of which have the id `ids[b]`.
extern "C" __global__ void PLAIN_BLOCK embed_backward(u64 width, const unsigned* ids, const unsigned* begins,
                                                      const unsigned* order, const float* dy, float* gradient) {
  const u64 id = ids[blockIdx.x];
  for (u64 i = threadIdx.x; i < width; i += blockDim.x) {
    float sum = 0.0f;
    for (unsigned place = begins[blockIdx.x]; place < begins[blockIdx.x + 1]; place++)
      sum += dy[(u64)order[place] * width + i];
    gradient[id * width + i] += sum;
  }
}
