// One optimizer step in double, straight from the formulas of src/optim/NAME.rs and element by element: what the
// kernels are tested against. No chunk, no warp, no identity for the velocity's norm.
#pragma once
#include <cmath>
#include <string>
#include <vector>

struct Settings {
  std::string method;
  double beta1 = 0.9, beta2 = 0.99, eps = 1e-8, weight_decay = 0.1, momentum = 0.9;
  double gradient_scale = 0.5, grad_clip = 1.0, lr = 0.01;
  double beta3 = 0.0, alpha1 = 10.0, power = 2.0;
  bool gate_reads_gradient = false, gate_by_group = false;
  bool decoupled = true;  // decay outside the gradient
};

struct ReferenceStep {
  double norm, clip, gate[2], velocity_sq[2];
};

class Reference {
 public:
  std::vector<double> weight, velocity, second;

  Reference(Settings settings, size_t decayed, std::vector<double> weight, std::vector<double> second)
      : weight(weight), velocity(weight.size(), 0.0), second(second), settings(settings), decayed(decayed) {}

  ReferenceStep step(unsigned number, const std::vector<float>& raw) {
    t = number;
    ReferenceStep done{};
    double sum = 0.0;
    for (float g : raw) sum += (double)g * g;
    done.norm = settings.gradient_scale * sqrt(sum);
    done.clip = done.norm > settings.grad_clip ? settings.grad_clip / (done.norm + 1e-6) : 1.0;
    const size_t count = raw.size();
    std::vector<double> gradient(count), new_velocity(count), new_second(count);
    double q[2] = {0.0, 0.0}, all_velocity_sq = 0.0;
    for (size_t i = 0; i < count; i++) {
      gradient[i] = raw[i] * settings.gradient_scale * done.clip;
      const double plain_gradient = gradient[i];
      if (!settings.decoupled && i < decayed) gradient[i] += settings.weight_decay * weight[i];
      move(gradient[i], velocity[i], second[i], new_velocity[i], new_second[i]);
      const int group = i < decayed ? 0 : 1;
      q[group] += pow(fabs(settings.gate_reads_gradient ? plain_gradient : new_velocity[i]), settings.power);
      done.velocity_sq[group] += new_velocity[i] * new_velocity[i];
      all_velocity_sq += new_velocity[i] * new_velocity[i];
    }
    for (int group = 0; group < 2; group++) {
      const double read = settings.gate_by_group ? q[group] : q[0] + q[1];
      done.gate[group] = 1.0 / (1.0 + fmin(settings.beta3 * read, settings.alpha1));
    }
    for (size_t i = 0; i < count; i++) {
      const double eta = settings.lr * done.gate[i < decayed ? 0 : 1];
      const double keep = settings.decoupled && i < decayed ? 1.0 - eta * settings.weight_decay : 1.0;
      const double change = direction(gradient[i], velocity[i], new_velocity[i], new_second[i], all_velocity_sq);
      weight[i] = weight[i] * keep - eta * change;
    }
    velocity = new_velocity;
    second = new_second;
    return done;
  }

 private:
  Settings settings;
  size_t decayed;
  unsigned t = 0;

  bool is(const char* name) const { return settings.method == name; }
  double corrected(double beta) const { return 1.0 - pow(beta, t); }

  void move(double g, double v, double s, double& new_v, double& new_s) const {
    const double b1 = settings.beta1, b2 = settings.beta2;
    new_s = s;
    if (is("sgd")) new_v = settings.momentum * v + g;
    else if (is("lion")) new_v = b2 * v + (1 - b2) * g;
    else if (is("rgd")) new_v = settings.momentum * v - settings.lr * g;
    else if (is("rmsprop")) {
      new_s = b2 * s + (1 - b2) * g * g;
      new_v = settings.momentum * v + g / (sqrt(new_s) + settings.eps);
    } else {
      new_v = b1 * v + (1 - b1) * g;
      if (is("adabelief")) new_s = b2 * s + (1 - b2) * (g - new_v) * (g - new_v) + settings.eps;
      else if (!is("sophia")) new_s = b2 * s + (1 - b2) * g * g;
    }
  }

  double direction(double g, double old_v, double v, double s, double all_velocity_sq) const {
    const double b1 = settings.beta1, b2 = settings.beta2, eps = settings.eps;
    if (is("sgd")) return g + settings.momentum * v;
    if (is("lion")) {
      const double mixed = b1 * old_v + (1 - b1) * g;
      return (mixed > 0) - (mixed < 0);
    }
    if (is("rmsprop")) return v;
    if (is("rgd")) return -SPEED * v / sqrt(pow(MASS * SPEED, 2) + all_velocity_sq);
    if (is("sophia")) return ((v > 0) - (v < 0)) * fmin(fabs(v) / (CURVATURE_SCALE * s + 1e-15), 1.0);
    if (is("radam")) {
      const double rho_inf = 2 / (1 - b2) - 1, rho = rho_inf - 2 * t * pow(b2, t) / corrected(b2);
      if (!(rho > 5)) return v / corrected(b1);
      const double r = sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho));
      return r * (v / corrected(b1)) * sqrt(corrected(b2)) / (sqrt(s) + eps);
    }
    const double root = sqrt(s / corrected(b2)) + eps;
    if (is("nadam")) {
      double product = 1.0;
      for (unsigned k = 1; k <= t; k++) product *= nadam_momentum(k);
      const double now = nadam_momentum(t), next = nadam_momentum(t + 1);
      return ((1 - now) * g / (1 - product) + next * v / (1 - product * next)) / root;
    }
    return (v / corrected(b1)) / root;  // adam, adabelief
  }

 public:
  static constexpr double SPEED = 10.0, MASS = 0.5, CURVATURE_SCALE = 0.25, PSI = 0.004;
  double nadam_momentum(unsigned step) const { return settings.beta1 * (1 - 0.5 * pow(0.96, step * PSI)); }
};
