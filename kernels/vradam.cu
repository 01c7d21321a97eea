// The step of VRAdam, AdamW and Adam (src/optim/adam.rs), and the sums and decisions of every optimizer's step:
//
//     reduce -> decide -> update_adam -> finish
//
// reduce reads g and v (8 bytes an element), the update reads g, theta, v, m and writes theta, v, m (28). The clip
// factor, the gate and eta stay on the device between them.

// Sums over each chunk: ||g||^2 into partials[2 chunk] and, where the velocity is given, <v, g> into the next place.
extern "C" __global__ void PASSING_BLOCK reduce(Extent extent, const float* gradient, const float* velocity,
                                                          double* partials) {
  const Chunk chunk = chunk_of_block(extent);
  double squares = 0.0, products = 0.0;
  for (u64 i = chunk.begin + 4 * threadIdx.x; i < chunk.end; i += 4 * blockDim.x) {
    const float4 g = load4(gradient, i, chunk.end);
    squares += (double)g.x * g.x;
    squares += (double)g.y * g.y;
    squares += (double)g.z * g.z;
    squares += (double)g.w * g.w;
    if (velocity) {
      const float4 v = load4(velocity, i, chunk.end);
      products += (double)v.x * g.x;
      products += (double)v.y * g.y;
      products += (double)v.z * g.z;
      products += (double)v.w * g.w;
    }
  }
  squares = block_sum(squares);
  products = block_sum(products);
  if (threadIdx.x == 0) {
    partials[2 * blockIdx.x] = squares;
    partials[2 * blockIdx.x + 1] = products;
  }
}

// Sums |scale * g|^power over each chunk, for a gate that reads the gradient with another power than 2.
extern "C" __global__ void PASSING_BLOCK predict_gradient(Extent extent, const float* gradient,
                                                                    const Scalars* scalars, double power,
                                                                    double* partials) {
  const Chunk chunk = chunk_of_block(extent);
  const double scale = (double)scalars->factor;
  double sum = 0.0;
  for (u64 i = chunk.begin + threadIdx.x; i < chunk.end; i += blockDim.x)
    sum += pow(fabs((double)gradient[i] * scale), power);
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// ||keep v + take factor g||^2 = keep^2 ||v||^2 + 2 keep take factor <v, g> + (take factor)^2 ||g||^2
__device__ __forceinline__ double ahead(Decision decision, float factor, double velocity_sq, double velocity_gradient,
                                        double gradient_sq) {
  const double take = decision.take * (double)factor;
  const double old = decision.keep * decision.keep * velocity_sq;
  const double cross = 2.0 * decision.keep * take * velocity_gradient;
  const double sum = old + cross + take * take * gradient_sq;
  return sum > 0.0 ? sum : 0.0;
}

__device__ __forceinline__ void decide_gate(Decision decision, Scalars* scalars) {
  for (int group = 0; group < 2; group++) {
    const double q = decision.by_group ? scalars->gate_sum[group] : scalars->gate_sum[0] + scalars->gate_sum[1];
    const double gate = decision.gate == GATE_OFF ? 1.0 : 1.0 / (1.0 + fmin(decision.beta3 * q, decision.alpha1));
    scalars->gate[group] = gate;
    scalars->eta[group] = decision.scheduled_lr * gate;
  }
}

// One block: the norm, the clip and, where no prediction has to come first, the gate.
extern "C" __global__ void DECIDING_BLOCK decide(Extent extent, const double* partials, Decision decision,
                                                          Scalars* scalars) {
  const u64 first[2] = {0, chunks_of(extent.decayed, extent.chunk)};
  const u64 chunks[2] = {first[1], chunks_of(extent.total - extent.decayed, extent.chunk)};
  double gradient_sq[2], velocity_gradient[2];
  for (int group = 0; group < 2; group++) {
    gradient_sq[group] = fold(partials, first[group], chunks[group], 2);
    velocity_gradient[group] = fold(partials + 1, first[group], chunks[group], 2);
  }
  if (threadIdx.x != 0) return;
  const double norm = decision.gradient_scale * sqrt(gradient_sq[0] + gradient_sq[1]);
  const double clip = norm > decision.grad_clip ? decision.grad_clip / (norm + 1e-6) : 1.0;
  const float factor = (float)(decision.gradient_scale * clip);
  scalars->gradient_norm = norm;
  scalars->clip_factor = clip;
  scalars->factor = factor;
  scalars->finite = norm - norm == 0.0;  // neither infinite nor NaN
  for (int group = 0; group < 2; group++) {
    scalars->gradient_sq[group] = gradient_sq[group];
    const double known = decision.blends ? ahead(decision, factor, scalars->velocity_sq[group],
                                                 velocity_gradient[group], gradient_sq[group])
                                         : 0.0;
    scalars->velocity_sq_ahead[group] = known;
    if (decision.gate == GATE_VELOCITY) scalars->gate_sum[group] = known;
    if (decision.gate == GATE_GRADIENT)
      scalars->gate_sum[group] = (double)factor * (double)factor * gradient_sq[group];
  }
  if (decision.gate != GATE_PREDICTED) decide_gate(decision, scalars);
}

// One block: folds what an update or a prediction left. After a prediction, decides the gate with it.
extern "C" __global__ void DECIDING_BLOCK finish(Extent extent, const double* partials, Decision decision,
                                                          unsigned into, Scalars* scalars) {
  if (!scalars->finite) return;
  const u64 decayed_chunks = chunks_of(extent.decayed, extent.chunk);
  const double decayed = fold(partials, 0, decayed_chunks, 1);
  const double plain = fold(partials, decayed_chunks, chunks_of(extent.total - extent.decayed, extent.chunk), 1);
  if (threadIdx.x != 0) return;
  double* target = into == INTO_VELOCITY_SQ         ? scalars->velocity_sq
                   : into == INTO_VELOCITY_SQ_AHEAD ? scalars->velocity_sq_ahead
                                                    : scalars->gate_sum;
  target[0] = decayed;
  target[1] = plain;
  if (into == INTO_GATE_SUM) decide_gate(decision, scalars);
}

struct Adam {
  static constexpr int STATES = 2;
  static constexpr bool MOVES_SECOND = true;
  Constants constants;
  float rate = 0.0f;

  __device__ __forceinline__ void start(const Scalars* scalars, Rates rates, unsigned group) {
    rate = rate_of(scalars, rates, group, 0);
  }
  __device__ __forceinline__ void apply(Prepared prepared, float gradient, float& weight, float& velocity,
                                        float& second_moment) const {
    gradient = prepared.gradient(gradient, weight);
    velocity = constants.beta1 * velocity + constants.take1 * gradient;
    second_moment = constants.beta2 * second_moment + constants.take2 * (gradient * gradient);
    const float change = rate * velocity / (sqrtf(second_moment) * constants.root_scale + constants.eps);
    weight = prepared.weight(weight, change);
  }
};
METHOD_KERNELS(adam, Adam)
