// What the optimizer's kernels share: chunks of the flat storages, sums in a fixed order, the update pass around one
// method's rule. The build puts this file before each .cu; nothing here or there includes a header, so that nvcc and,
// for the emulated device, any C++17 compiler takes them.
//
// Weights, gradients and states are one f32 buffer each, laid out alike: elements [0, decayed) take weight decay,
// [decayed, total) do not. A chunk lies in one of the two groups and is one block's work; its sums go to the chunk's
// own place, in double. So every sum has one order, whatever the card and its schedule, and there are no atomics.
//
// Products and sums are rounded apart (-fmad=false), in the order of src/optim's rules: the CPU gives the same bits.
#pragma once

typedef unsigned long long u64;
typedef unsigned short u16;

#define FULL_WARP 0xffffffffu
#define MOST_WARPS 16
// Most threads of a block that passes over a chunk, and of the one that decides.
#define PASSING_BLOCK __launch_bounds__(512)
#define DECIDING_BLOCK __launch_bounds__(512)

// Elements. `decayed` and `chunk` are multiples of 4, so that a chunk begins at a float4 of every storage.
struct Extent {
  u64 decayed, total, chunk;
};

// What the step decides on the device, read back when it is over. Pairs are {decayed, plain}.
struct Scalars {
  // Of the gradients as they stand, unscaled.
  double gradient_sq[2];
  // Norm of the scaled gradient before the clip, and what the clip multiplies it by.
  double gradient_norm, clip_factor;
  // ||velocity||^2 after the last finished step, exact: part of the optimizer's state.
  double velocity_sq[2];
  // ||velocity||^2 of the step in hand, known before the velocity moves (0 where nothing asks for it).
  double velocity_sq_ahead[2];
  // The sum that the gate reads.
  double gate_sum[2];
  double gate[2], eta[2];
  // Multiplies the summed gradients: scale and clip.
  float factor;
  // 0: a gradient is not finite and the step changes nothing.
  unsigned finite;
};

// The part of a rule that moves with eta: a rate is eta * numerator / divisor, decay is eta * weight_decay.
struct Rates {
  double numerator[2], divisor[2];
  // Decoupled decay, lambda of theta (1 - eta lambda); 0 where decay is part of the gradient.
  double weight_decay;
  // lambda of g + lambda theta; 0 where decay is decoupled.
  float l2;
};

// The part of a rule that does not; a method reads the fields that it names.
struct Constants {
  float beta1, beta2, take1, take2;
  // 1 / sqrt(bias correction of the second moment)
  float root_scale;
  float eps;
  float momentum;
  // SophiaG: rho * tokens of the step.
  float curvature_scale;
  // RGD: (mass * speed of light)^2.
  double rest_energy;
  // RAdam: whether the variance is known yet.
  unsigned adaptive;
};

// Where the gate's sum comes from, and over what the gate reaches (GateSettings of src/optim/gate.rs).
#define GATE_OFF 0
#define GATE_VELOCITY 1
#define GATE_GRADIENT 2
#define GATE_PREDICTED 3

struct Decision {
  double gradient_scale;
  // Largest norm of the scaled gradient; infinity where there is no clip.
  double grad_clip;
  double scheduled_lr;
  // velocity' = keep * velocity + take * gradient; valid where `blends`.
  double keep, take;
  double beta3, alpha1;
  unsigned blends;
  unsigned gate;
  unsigned by_group;
};

// What a fold of one number a chunk is for.
#define INTO_VELOCITY_SQ 0
#define INTO_VELOCITY_SQ_AHEAD 1
#define INTO_GATE_SUM 2

struct Chunk {
  u64 begin, end;
  unsigned group;  // 0 decayed, 1 plain
};

__device__ __forceinline__ u64 chunks_of(u64 elements, u64 chunk) { return (elements + chunk - 1) / chunk; }

// The chunk of this block: first those of the decayed group, then those of the plain one.
__device__ __forceinline__ Chunk chunk_of_block(Extent extent) {
  const u64 decayed_chunks = chunks_of(extent.decayed, extent.chunk);
  const unsigned group = blockIdx.x >= decayed_chunks ? 1 : 0;
  const u64 begin = group ? extent.decayed + (blockIdx.x - decayed_chunks) * extent.chunk : blockIdx.x * extent.chunk;
  const u64 last = group ? extent.total : extent.decayed;
  return Chunk{begin, begin + extent.chunk < last ? begin + extent.chunk : last, group};
}

// Four numbers of `numbers` from element i on (a multiple of 4); zeros from `end` on.
__device__ __forceinline__ float4 load4(const float* numbers, u64 i, u64 end) {
  if (i + 4 <= end) return *reinterpret_cast<const float4*>(numbers + i);
  float4 four = {0.0f, 0.0f, 0.0f, 0.0f};
  four.x = numbers[i];
  if (i + 1 < end) four.y = numbers[i + 1];
  if (i + 2 < end) four.z = numbers[i + 2];
  return four;
}

__device__ __forceinline__ void store4(float* numbers, u64 i, u64 end, float4 four) {
  if (i + 4 <= end) {
    *reinterpret_cast<float4*>(numbers + i) = four;
    return;
  }
  numbers[i] = four.x;
  if (i + 1 < end) numbers[i + 1] = four.y;
  if (i + 2 < end) numbers[i + 2] = four.z;
}

// The nearest bf16, ties to even; NaN stays NaN.
__device__ __forceinline__ u16 to_bf16(float x) {
  const unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)(bits >> 16 | 0x40u);
  return (u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

__device__ __forceinline__ void store4_bf16(u16* numbers, u64 i, u64 end, float4 four) {
  const float parts[4] = {four.x, four.y, four.z, four.w};
  for (int k = 0; k < 4; k++)
    if (i + k < end) numbers[i + k] = to_bf16(parts[k]);
}

// The sum over the block, for thread 0. Every thread of the block must call it.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double of_warp[MOST_WARPS];
  const unsigned lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(FULL_WARP, x, offset);
  if (lane == 0) of_warp[warp] = x;
  __syncthreads();
  x = lane < warps ? of_warp[lane] : 0.0;
  if (warp == 0)
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(FULL_WARP, x, offset);
  __syncthreads();  // of_warp is free for the next call
  return x;
}

// The sum of partials[first], partials[first + stride], ... (`count` of them), for thread 0.
__device__ __forceinline__ double fold(const double* partials, u64 first, u64 count, u64 stride) {
  double sum = 0.0;
  for (u64 i = threadIdx.x; i < count; i += blockDim.x) sum += partials[(first + i) * stride];
  return block_sum(sum);
}

// ---- one method's rule, and the passes around it ----

// The scale and decay that every rule begins and ends with.
struct Prepared {
  float factor, l2, decay;

  __device__ __forceinline__ float gradient(float gradient, float weight) const {
    return factor * gradient + l2 * weight;
  }
  // Decay and change are added first: eta lambda is often below f32's resolution next to 1.
  __device__ __forceinline__ float weight(float weight, float change) const {
    return weight - (decay * weight + change);
  }
};

__device__ __forceinline__ float sign(float x) { return (x > 0.0f ? 1.0f : 0.0f) - (x < 0.0f ? 1.0f : 0.0f); }

__device__ __forceinline__ Prepared prepare(const Scalars* scalars, Rates rates, unsigned group) {
  Prepared prepared;
  prepared.factor = scalars->factor;
  prepared.l2 = group == 0 ? rates.l2 : 0.0f;
  prepared.decay = group == 0 ? (float)(scalars->eta[group] * rates.weight_decay) : 0.0f;
  return prepared;
}

__device__ __forceinline__ float rate_of(const Scalars* scalars, Rates rates, unsigned group, int k) {
  return (float)(scalars->eta[group] * rates.numerator[k] / rates.divisor[k]);
}

// The storages of one step, all `extent.total` long. The second state of a method with one is never touched.
struct Storages {
  const float* gradient;
  float* weight;
  float* velocity;
  float* second;
  // The weights rounded to bf16, written in the same pass; null where nobody wants them.
  u16* rounded;
};

// Updates every element of this block's chunk and leaves its sum of the new velocity's squares.
template <class Method>
__device__ __forceinline__ void update(Method method, Extent extent, Storages at, Rates rates, const Scalars* scalars,
                                       double* partials) {
  if (!scalars->finite) return;
  const Chunk chunk = chunk_of_block(extent);
  const Prepared prepared = prepare(scalars, rates, chunk.group);
  method.start(scalars, rates, chunk.group);
  double squares = 0.0;
  for (u64 i = chunk.begin + 4 * threadIdx.x; i < chunk.end; i += 4 * blockDim.x) {
    const float4 gradient = load4(at.gradient, i, chunk.end);
    float4 weight = load4(at.weight, i, chunk.end);
    float4 velocity = load4(at.velocity, i, chunk.end);
    float4 second = {0.0f, 0.0f, 0.0f, 0.0f};
    if (Method::STATES == 2) second = load4(at.second, i, chunk.end);
    method.apply(prepared, gradient.x, weight.x, velocity.x, second.x);
    method.apply(prepared, gradient.y, weight.y, velocity.y, second.y);
    method.apply(prepared, gradient.z, weight.z, velocity.z, second.z);
    method.apply(prepared, gradient.w, weight.w, velocity.w, second.w);
    store4(at.weight, i, chunk.end, weight);
    store4(at.velocity, i, chunk.end, velocity);
    if (Method::STATES == 2 && Method::MOVES_SECOND) store4(at.second, i, chunk.end, second);
    if (at.rounded) store4_bf16(at.rounded, i, chunk.end, weight);
    squares += (double)velocity.x * velocity.x;
    squares += (double)velocity.y * velocity.y;
    squares += (double)velocity.z * velocity.z;
    squares += (double)velocity.w * velocity.w;
  }
  squares = block_sum(squares);
  if (threadIdx.x == 0) partials[blockIdx.x] = squares;
}

// Leaves this block's sum of |what the velocity will be|^power; changes nothing.
template <class Method>
__device__ __forceinline__ void predict(Method method, Extent extent, Storages at, Rates rates, const Scalars* scalars,
                                        double power, double* partials) {
  const Chunk chunk = chunk_of_block(extent);
  const Prepared prepared = prepare(scalars, rates, chunk.group);
  method.start(scalars, rates, chunk.group);
  double sum = 0.0;
  for (u64 i = chunk.begin + threadIdx.x; i < chunk.end; i += blockDim.x) {
    float weight = at.weight[i], velocity = at.velocity[i], second = Method::STATES == 2 ? at.second[i] : 0.0f;
    method.apply(prepared, at.gradient[i], weight, velocity, second);
    const double size = fabs((double)velocity);
    sum += power == 2.0 ? size * size : pow(size, power);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// The two kernels of one method: update_NAME and predict_NAME.
#define METHOD_KERNELS(NAME, METHOD)                                                                                \
  extern "C" __global__ void PASSING_BLOCK update_##NAME(                                                 \
      Extent extent, Storages at, Rates rates, Constants constants, const Scalars* scalars, double* partials) {     \
    update(METHOD{constants}, extent, at, rates, scalars, partials);                                                \
  }                                                                                                                 \
  extern "C" __global__ void PASSING_BLOCK predict_##NAME(Extent extent, Storages at, Rates rates,        \
                                                                    Constants constants, const Scalars* scalars,    \
                                                                    double power, double* partials) {               \
    predict(METHOD{constants}, extent, at, rates, scalars, power, partials);                                        \
  }
