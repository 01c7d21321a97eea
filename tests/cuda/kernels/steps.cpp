// Every kernel of the optimizers against the reference in double, on the emulated device: all methods, gates, sizes
// and values that matter, the bf16 copy, and gradients that are not finite.
//
//     steps [threads of a block]      prints one line a case, then `bits=` (a hash of every result); status 1 on a miss
#include <limits>
#include <random>

#include "harness.h"
#include "reference.h"
namespace {
#include "flat.cuh"

constexpr u64 CHUNK = 256;
unsigned block_threads = 64;

struct Case {
  Settings settings;
  u64 decayed, total;
  float size;  // of the gradients
  float poison = 0.0f;  // put at one element of the third step's gradient
};

Constants constants_of(const Settings& s, unsigned t) {
  Constants c{};
  c.beta1 = (float)s.beta1, c.beta2 = (float)s.beta2;
  c.take1 = (float)(1 - s.beta1), c.take2 = (float)(1 - s.beta2);
  if (s.method == "rgd") c.take1 = (float)s.lr;
  c.root_scale = (float)(1 / sqrt(1 - pow(s.beta2, t)));
  c.eps = (float)s.eps, c.momentum = (float)s.momentum;
  c.curvature_scale = (float)Reference::CURVATURE_SCALE;
  c.rest_energy = pow(Reference::MASS * Reference::SPEED, 2);
  const double rho_inf = 2 / (1 - s.beta2) - 1, b2t = pow(s.beta2, t);
  c.adaptive = rho_inf - 2 * t * b2t / (1 - b2t) > 5;
  return c;
}

Rates rates_of(const Settings& s, unsigned t, const Reference& reference) {
  Rates r{{1, 0}, {1, 1}, s.decoupled ? s.weight_decay : 0.0, s.decoupled ? 0.0f : (float)s.weight_decay};
  const double correction1 = 1 - pow(s.beta1, t), correction2 = 1 - pow(s.beta2, t);
  if (s.method == "adam" || s.method == "adabelief") r.divisor[0] = correction1;
  if (s.method == "sgd") r.numerator[1] = s.momentum;
  if (s.method == "rgd") r.numerator[0] = -Reference::SPEED;
  if (s.method == "radam") {
    const double rho_inf = 2 / (1 - s.beta2) - 1, rho = rho_inf - 2 * t * (1 - correction2) / correction2;
    const double r_sq = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho);
    if (rho > 5) r.numerator[0] = sqrt(r_sq * correction2);
    r.divisor[0] = correction1;
  }
  if (s.method == "nadam") {
    double product = 1;
    for (unsigned k = 1; k <= t; k++) product *= reference.nadam_momentum(k);
    const double now = reference.nadam_momentum(t), next = reference.nadam_momentum(t + 1);
    r.numerator[0] = 1 - now, r.divisor[0] = 1 - product;
    r.numerator[1] = next, r.divisor[1] = 1 - product * next;
  }
  return r;
}

// The buffers of one optimizer on the device, and its step as src/optim/cuda.rs launches it.
struct Device {
  Extent extent;
  u64 chunks;
  float *gradient, *weight, *velocity, *second;
  u16* rounded;
  double* partials;
  Scalars* scalars;

  Device(u64 decayed, u64 total) : extent{decayed, total, CHUNK} {
    chunks = (decayed + CHUNK - 1) / CHUNK + (total - decayed + CHUNK - 1) / CHUNK;
    gradient = buffer<float>(total, 0), weight = buffer<float>(total, 0), velocity = buffer<float>(total, 0);
    second = buffer<float>(total, 0), rounded = buffer<u16>(total, 0xffff), scalars = buffer<Scalars>(1, {});
    partials = buffer<double>(2 * chunks, std::numeric_limits<double>::quiet_NaN());
  }

  void step(const Settings& s, unsigned t, const Reference& reference) {
    const bool linear = s.method != "rmsprop" && (s.decoupled || s.weight_decay == 0);
    const bool wants_ahead = s.method == "rgd" || (s.beta3 > 0 && !s.gate_reads_gradient && s.power == 2);
    const bool predicts = s.beta3 > 0 && (s.power != 2 || (!s.gate_reads_gradient && !linear));
    Decision d{s.gradient_scale, s.grad_clip, s.lr, s.beta1, 1 - s.beta1, s.beta3, s.alpha1, 0, GATE_OFF, 0};
    if (s.method == "lion") d.keep = s.beta2, d.take = 1 - s.beta2;
    if (s.method == "sgd") d.keep = s.momentum, d.take = 1;
    if (s.method == "rgd") d.keep = s.momentum, d.take = -s.lr;
    d.blends = wants_ahead && linear;
    d.by_group = s.gate_by_group;
    if (s.beta3 > 0) d.gate = predicts ? GATE_PREDICTED : s.gate_reads_gradient ? GATE_GRADIENT : GATE_VELOCITY;
    const Constants c = constants_of(s, t);
    const Rates r = rates_of(s, t, reference);
    const Storages at{gradient, weight, velocity, second, rounded};
    const unsigned n = block_threads;
    const float* reads_velocity = d.blends ? velocity : nullptr;
    start("reduce", chunks, n, extent, (const float*)gradient, reads_velocity, partials);
    start("decide", 1, n, extent, (const double*)partials, d, scalars);
    if (wants_ahead && !linear) {
      start("predict_" + s.method, chunks, n, extent, at, r, c, (const Scalars*)scalars, 2.0, partials);
      start("finish", 1, n, extent, (const double*)partials, d, (unsigned)INTO_VELOCITY_SQ_AHEAD, scalars);
    }
    if (predicts && s.gate_reads_gradient)
      start("predict_gradient", chunks, n, extent, (const float*)gradient, (const Scalars*)scalars, s.power, partials);
    if (predicts && !s.gate_reads_gradient)
      start("predict_" + s.method, chunks, n, extent, at, r, c, (const Scalars*)scalars, s.power, partials);
    if (predicts) start("finish", 1, n, extent, (const double*)partials, d, (unsigned)INTO_GATE_SUM, scalars);
    start("update_" + s.method, chunks, n, extent, at, r, c, (const Scalars*)scalars, partials);
    start("finish", 1, n, extent, (const double*)partials, d, (unsigned)INTO_VELOCITY_SQ, scalars);
  }
};

// |x - expected| in units of `tolerance`, relative to `expected` and at least to `floor`; NaN counts as far off.
double miss(double x, double expected, double floor, double tolerance) {
  const double off = fabs(x - expected) / (tolerance * fmax(fabs(expected), floor));
  return off <= 1e300 ? off : 1e300;
}

u16 nearest_bf16(float x) {
  const double below = __uint_as_float(__float_as_uint(x) & 0xffff0000u);
  const double above = __uint_as_float((__float_as_uint(x) & 0xffff0000u) + 0x10000u);
  const bool even_below = !(__float_as_uint(x) >> 16 & 1);
  const bool down = fabs(x - below) < fabs(above - x) || (fabs(x - below) == fabs(above - x) && even_below);
  return (u16)((__float_as_uint(x) >> 16) + (down ? 0 : 1));
}

bool run(const Case& test) {
  const Settings& s = test.settings;
  const size_t total = test.total;
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  Device device(test.decayed, test.total);
  std::vector<double> weight(total), second(total, 0.0);
  for (size_t i = 0; i < total; i++) weight[i] = device.weight[i] = normal(random);
  if (s.method == "sophia")
    for (size_t i = 0; i < total; i++) second[i] = device.second[i] = fabsf(normal(random)) * test.size;
  Reference reference(s, test.decayed, weight, second);
  double worst = 0.0;
  const unsigned steps = 3;
  for (unsigned t = 1; t <= steps; t++) {
    std::vector<float> gradient(total);
    for (size_t i = 0; i < total; i++) gradient[i] = device.gradient[i] = normal(random) * test.size;
    if (t == steps && test.poison != 0.0f) {
      const std::vector<float> before[3] = {{device.weight, device.weight + total},
                                            {device.velocity, device.velocity + total},
                                            {device.second, device.second + total}};
      const double velocity_sq = device.scalars->velocity_sq[0] + device.scalars->velocity_sq[1];
      device.gradient[total / 2] = test.poison;
      device.step(s, t, reference);
      const bool same = !device.scalars->finite && std::equal(before[0].begin(), before[0].end(), device.weight) &&
                        std::equal(before[1].begin(), before[1].end(), device.velocity) &&
                        std::equal(before[2].begin(), before[2].end(), device.second) &&
                        velocity_sq == device.scalars->velocity_sq[0] + device.scalars->velocity_sq[1];
      if (!same) worst = 1e300;
      break;
    }
    const ReferenceStep expected = reference.step(t, gradient);
    device.step(s, t, reference);
    const Scalars& got = *device.scalars;
    if (!got.finite) worst = 1e300;
    worst = fmax(worst, miss(got.gradient_norm, expected.norm, 1e-300, 1e-9));
    worst = fmax(worst, miss(got.clip_factor, expected.clip, 0, 1e-9));
    for (int group = 0; group < 2; group++) {
      worst = fmax(worst, miss(got.gate[group], expected.gate[group], 0, 1e-6));
      worst = fmax(worst, miss(got.velocity_sq[group], expected.velocity_sq[group], 1e-60, 2e-6));
    }
    for (size_t i = 0; i < total; i++) {
      // RMSProp's velocity is a sum of normalised gradients; f32 ends at 1e-45.
      const double size = std::isinf(s.grad_clip) || test.size < 1 ? test.size : 1.0;
      const double scale = s.method == "rmsprop" ? 10.0 : size;
      worst = fmax(worst, miss(device.weight[i], reference.weight[i], 1.0, 1e-6));
      worst = fmax(worst, miss(device.velocity[i], reference.velocity[i], scale, 2e-6));
      worst = fmax(worst, miss(device.second[i], reference.second[i], fmax(scale * scale, 1e-37), 2e-6));
      if (device.rounded[i] != nearest_bf16(device.weight[i])) worst = 1e300;
    }
  }
  hash(device.weight, 4 * total), hash(device.velocity, 4 * total), hash(device.second, 4 * total);
  hash(device.scalars->gate, sizeof device.scalars->gate);
  hash(device.scalars->velocity_sq, sizeof device.scalars->velocity_sq);
  const bool good = worst <= 1.0;
  printf("%s %-9s decayed %llu of %llu, size %g, beta3 %g%s%s, power %g%s%s: %.2g of the tolerance\n",
         good ? "ok  " : "MISS", s.method.c_str(), test.decayed, test.total, test.size, s.beta3,
         s.gate_by_group ? " by group" : "", s.gate_reads_gradient ? " on gradients" : "", s.power,
         s.decoupled ? "" : ", decay in the gradient",
         test.poison == 0.0f ? "" : ", then a gradient that is not finite", worst);
  return good;
}

// SAM's climb, SophiaG's Hessian and the gaps: element by element, so exact.
bool run_single_passes() {
  const u64 count = 1000;
  float *source = buffer<float>(count, 0), *climbed = buffer<float>(count, 0), *hessian = buffer<float>(count, 0);
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  for (u64 i = 0; i < count; i++) source[i] = normal(random), climbed[i] = hessian[i] = normal(random);
  const std::vector<float> before(climbed, climbed + count);
  const u64 blocks = (count + block_threads - 1) / block_threads;
  start("add_scaled", blocks, block_threads, count, 0.3f, (const float*)source, climbed);
  start("blend_square", blocks, block_threads, count, 0.5f, 0.9f, 0.1f, (const float*)source, hessian);
  bool good = true;
  for (u64 i = 0; i < count; i++) {
    const float scaled = 0.5f * source[i];
    good &= climbed[i] == before[i] + 0.3f * source[i];
    good &= hessian[i] == 0.9f * before[i] + 0.1f * (scaled * scaled);
  }
  u64* gaps = buffer<u64>(6, 0);
  const u64 ends[6] = {3, 64, 100, 100, 999, 1000};
  std::copy(ends, ends + 6, gaps);
  start("zero_gaps", 3, block_threads, (const u64*)gaps, climbed);
  for (u64 i = 0; i < count; i++) {
    const bool in_gap = (i >= 3 && i < 64) || i == 999;
    good &= climbed[i] == (in_gap ? 0.0f : before[i] + 0.3f * source[i]);
  }
  printf("%s add_scaled, blend_square, zero_gaps\n", good ? "ok  " : "MISS");
  return good;
}

// The bf16 copy of weights that an update with a rate of 0 leaves as they are: ties, the largest, the smallest, NaN.
bool run_rounding() {
  const unsigned weights[] = {0x3f808000, 0x3f818000, 0xbf808000, 0x3f808001, 0x3f807fff, 0x7f7fffff, 0x00000001,
                              0x80000000, 0x00018000, 0x7fc00000, 0x7f800001};
  const u16 expected[] = {0x3f80, 0x3f82, 0xbf80, 0x3f81, 0x3f80, 0x7f80, 0x0000, 0x8000, 0x0002, 0x7fc0, 0x7fc0};
  const u64 count = sizeof weights / sizeof *weights;
  Settings settings;
  settings.method = "adam";
  settings.lr = 0.0;
  Device device(0, count);
  for (u64 i = 0; i < count; i++) device.weight[i] = __uint_as_float(weights[i]);
  device.step(settings, 1, Reference(settings, 0, {}, {}));
  const bool good = std::equal(expected, expected + count, device.rounded);
  printf("%s bf16 copy\n", good ? "ok  " : "MISS");
  return good;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  const char* methods[] = {"adam", "nadam", "radam", "adabelief", "rmsprop", "sgd", "lion", "rgd", "sophia"};
  for (const char* method : methods)
    for (int gate = 0; gate < 5; gate++) {
      Settings s;
      s.method = method;
      s.decoupled = s.method != "rmsprop" && s.method != "sgd" && s.method != "rgd" && !(s.method == "nadam" && gate);
      if (gate) s.beta3 = 5.0;
      if (s.method == "rgd" && gate) s.beta3 = 5e4;
      if (s.method == "rmsprop" && gate) s.beta3 = 1e-4;
      s.gate_by_group = gate == 2;
      s.gate_reads_gradient = gate == 3;
      if (gate == 4) s.power = 1.5, s.gate_reads_gradient = s.method == "lion";
      all.push_back({s, 516, 1041, 0.1f});
    }
  Settings vradam;
  vradam.method = "adam";
  vradam.beta3 = 1.0;
  // (decayed, total): one number, whole and broken chunks, one group empty, nothing at all
  const u64 sizes[][2] = {{0, 1}, {4, 5}, {256, 512}, {260, 263}, {0, 777}, {1028, 1028}, {0, 0}, {516, 2831}};
  for (auto& [decayed, total] : sizes)
    for (float size : {1.0f, 1e15f, 1e-30f}) all.push_back({vradam, decayed, total, size});
  Settings unclipped = vradam;
  unclipped.grad_clip = std::numeric_limits<double>::infinity();
  for (float size : {1.0f, 1e18f}) all.push_back({unclipped, 260, 1000, size});
  for (float poison : {NAN, INFINITY, -INFINITY}) all.push_back({vradam, 260, 1000, 1.0f, poison});
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) block_threads = atoi(argv[1]);
  bool good = true;
  for (const Case& test : cases()) good &= run(test);
  good &= run_single_passes();
  good &= run_rounding();
  printf("bits=%016lx\n", (unsigned long)all_bits);
  return !good;
}
