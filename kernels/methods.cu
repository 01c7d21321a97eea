// The other elementwise optimizers' steps (src/optim/NAME.rs has each formula), and the passes that single methods
// need besides. The sums and decisions around them are in vradam.cu.

struct NAdam {
  static constexpr int STATES = 2;
  static constexpr bool MOVES_SECOND = true;
  Constants constants;
  float gradient_rate = 0.0f, velocity_rate = 0.0f;

  __device__ __forceinline__ void start(const Scalars* scalars, Rates rates, unsigned group) {
    gradient_rate = rate_of(scalars, rates, group, 0);
    velocity_rate = rate_of(scalars, rates, group, 1);
  }
  __device__ __forceinline__ void apply(Prepared prepared, float gradient, float& weight, float& velocity,
                                        float& second_moment) const {
    gradient = prepared.gradient(gradient, weight);
    velocity = constants.beta1 * velocity + constants.take1 * gradient;
    second_moment = constants.beta2 * second_moment + constants.take2 * (gradient * gradient);
    const float direction = gradient_rate * gradient + velocity_rate * velocity;
    weight = prepared.weight(weight, direction / (sqrtf(second_moment) * constants.root_scale + constants.eps));
  }
};
METHOD_KERNELS(nadam, NAdam)

struct RAdam {
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
    const float divisor = constants.adaptive ? sqrtf(second_moment) + constants.eps : 1.0f;
    weight = prepared.weight(weight, rate * velocity / divisor);
  }
};
METHOD_KERNELS(radam, RAdam)

struct AdaBelief {
  static constexpr int STATES = 2;
  static constexpr bool MOVES_SECOND = true;
  Constants constants;
  float rate = 0.0f;

  __device__ __forceinline__ void start(const Scalars* scalars, Rates rates, unsigned group) {
    rate = rate_of(scalars, rates, group, 0);
  }
  __device__ __forceinline__ void apply(Prepared prepared, float gradient, float& weight, float& velocity,
                                        float& surprise) const {
    gradient = prepared.gradient(gradient, weight);
    velocity = constants.beta1 * velocity + constants.take1 * gradient;
    const float residual = gradient - velocity;
    surprise = constants.beta2 * surprise + constants.take2 * (residual * residual) + constants.eps;
    const float change = rate * velocity / (sqrtf(surprise) * constants.root_scale + constants.eps);
    weight = prepared.weight(weight, change);
  }
};
METHOD_KERNELS(adabelief, AdaBelief)

struct RmsProp {
  static constexpr int STATES = 2;
  static constexpr bool MOVES_SECOND = true;
  Constants constants;  // beta2 is alpha
  float rate = 0.0f;

  __device__ __forceinline__ void start(const Scalars* scalars, Rates rates, unsigned group) {
    rate = rate_of(scalars, rates, group, 0);
  }
  __device__ __forceinline__ void apply(Prepared prepared, float gradient, float& weight, float& velocity,
                                        float& mean_square) const {
    gradient = prepared.gradient(gradient, weight);
    mean_square = constants.beta2 * mean_square + constants.take2 * (gradient * gradient);
    velocity = constants.momentum * velocity + gradient / (sqrtf(mean_square) + constants.eps);
    weight = prepared.weight(weight, rate * velocity);
  }
};
METHOD_KERNELS(rmsprop, RmsProp)

struct Sgd {
  static constexpr int STATES = 1;
  static constexpr bool MOVES_SECOND = false;
  Constants constants;
  float gradient_rate = 0.0f, velocity_rate = 0.0f;

  __device__ __forceinline__ void start(const Scalars* scalars, Rates rates, unsigned group) {
    gradient_rate = rate_of(scalars, rates, group, 0);
    velocity_rate = rate_of(scalars, rates, group, 1);
  }
  __device__ __forceinline__ void apply(Prepared prepared, float gradient, float& weight, float& velocity,
                                        float&) const {
    gradient = prepared.gradient(gradient, weight);
    velocity = constants.momentum * velocity + gradient;
    weight = prepared.weight(weight, gradient_rate * gradient + velocity_rate * velocity);
  }
};
METHOD_KERNELS(sgd, Sgd)

struct Lion {
  static constexpr int STATES = 1;
  static constexpr bool MOVES_SECOND = false;
  Constants constants;
  float rate = 0.0f;

  __device__ __forceinline__ void start(const Scalars* scalars, Rates rates, unsigned group) {
    rate = rate_of(scalars, rates, group, 0);
  }
  __device__ __forceinline__ void apply(Prepared prepared, float gradient, float& weight, float& velocity,
                                        float&) const {
    gradient = prepared.gradient(gradient, weight);
    const float direction = sign(constants.beta1 * velocity + constants.take1 * gradient);
    velocity = constants.beta2 * velocity + constants.take2 * gradient;
    weight = prepared.weight(weight, rate * direction);
  }
};
METHOD_KERNELS(lion, Lion)

struct Rgd {
  static constexpr int STATES = 1;
  static constexpr bool MOVES_SECOND = false;
  Constants constants;  // take1 is the rate before the gate
  float rate = 0.0f;

  // The rate falls with the speed of all parameters together, which only the device knows.
  __device__ __forceinline__ void start(const Scalars* scalars, Rates rates, unsigned group) {
    const double velocity_sq = scalars->velocity_sq_ahead[0] + scalars->velocity_sq_ahead[1];
    rate = (float)(scalars->eta[group] * rates.numerator[0] / sqrt(constants.rest_energy + velocity_sq));
  }
  __device__ __forceinline__ void apply(Prepared prepared, float gradient, float& weight, float& velocity,
                                        float&) const {
    velocity = constants.momentum * velocity - constants.take1 * prepared.gradient(gradient, weight);
    weight = prepared.weight(weight, rate * velocity);
  }
};
METHOD_KERNELS(rgd, Rgd)

struct Sophia {
  static constexpr int STATES = 2;
  static constexpr bool MOVES_SECOND = false;
  Constants constants;
  float rate = 0.0f;

  __device__ __forceinline__ void start(const Scalars* scalars, Rates rates, unsigned group) {
    rate = rate_of(scalars, rates, group, 0);
  }
  __device__ __forceinline__ void apply(Prepared prepared, float gradient, float& weight, float& velocity,
                                        float& hessian) const {
    gradient = prepared.gradient(gradient, weight);
    velocity = constants.beta1 * velocity + constants.take1 * gradient;
    const float ratio = fminf(fabsf(velocity) / (constants.curvature_scale * hessian + 1e-15f), 1.0f);
    weight = prepared.weight(weight, rate * sign(velocity) * ratio);
  }
};
METHOD_KERNELS(sophia, Sophia)

// target += scale * source: SAM's climb.
extern "C" __global__ void PASSING_BLOCK add_scaled(u64 count, float scale, const float* source,
                                                              float* target) {
  const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) target[i] = target[i] + scale * source[i];
}

// target = keep * target + take * (scale * source)^2: SophiaG's Hessian from a sampled gradient.
extern "C" __global__ void PASSING_BLOCK blend_square(u64 count, float scale, float keep, float take,
                                                                const float* source, float* target) {
  const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float scaled = scale * source[i];
  target[i] = keep * target[i] + take * (scaled * scaled);
}

// Puts zeros between the parameters again, after a method whose state grows where every gradient is zero. One block a
// gap; gaps[2 k] and gaps[2 k + 1] are the k-th gap's first element and the one after its last.
extern "C" __global__ void PASSING_BLOCK zero_gaps(const u64* gaps, float* numbers) {
  const u64 end = gaps[2 * blockIdx.x + 1];
  for (u64 i = gaps[2 * blockIdx.x] + threadIdx.x; i < end; i += blockDim.x) numbers[i] = 0.0f;
}
