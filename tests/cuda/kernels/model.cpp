// Every kernel of a model's passes against formulas in double, on the emulated device: odd sizes, a single row, widths
// that fill no warp, several chunks of rows, packed documents, shared heads, and numbers that are huge, infinite or NaN.
//
//     model [threads of a block]      prints one line a case, then `bits=` (a hash of every result); status 1 on a miss
//
// The argument is for the kernels that take any whole number of warps; the others get the blocks that they are made for.
// What a kernel has to write begins as NaN, and so does what it must not read.
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "harness.h"

namespace {

typedef unsigned long long u64;
using Doubles = std::vector<double>;

constexpr unsigned ROW_THREADS = 128, ROW_WARPS = 4, COLUMN_THREADS = 64, ROWS_A_SUM = 64;
constexpr float INF = std::numeric_limits<float>::infinity();
unsigned block_threads = 64;
bool all_good = true;

u64 blocks_of(u64 count, u64 of_one) { return (count + of_one - 1) / of_one; }

float* normals(size_t count, unsigned seed, float size = 1.0f, float shift = 0.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  float* numbers = buffer<float>(count, 0.0f);
  for (size_t i = 0; i < count; i++) numbers[i] = normal(random) * size + shift;
  return numbers;
}

float* nans(size_t count) { return buffer<float>(count, NAN); }

float* copy(const float* numbers, size_t count) {
  float* copied = buffer<float>(count, 0.0f);
  std::copy(numbers, numbers + count, copied);
  return copied;
}

// One line of the report. Checked results go into the hash.
class Case {
  std::string name;
  double worst = 0.0;

 public:
  explicit Case(std::string name) : name(name) {}

  // |got - expected| <= tolerance * the row's scale, which is its greatest finite expected number or what is given. NaN and
  // infinity must be met by the same.
  template <class T>
  void near(const T* got, const Doubles& expected, size_t width, double tolerance, const Doubles& scales = {}) {
    hash(got, expected.size() * sizeof(T));
    for (size_t begin = 0; begin < expected.size(); begin += width) {
      double scale = scales.empty() ? 0.0 : scales[begin / width];
      if (scales.empty())
        for (size_t i = begin; i < begin + width; i++)
          if (std::isfinite(expected[i])) scale = fmax(scale, fabs(expected[i]));
      for (size_t i = begin; i < begin + width; i++) {
        const double x = (double)got[i], off = fabs(x - expected[i]) / (tolerance * scale);
        const bool same = std::isnan(expected[i]) ? std::isnan(x) : x == expected[i];
        worst = fmax(worst, same ? 0.0 : off <= 1e300 ? off : 1e300);
      }
    }
  }

  void same(const float* got, const std::vector<float>& expected) {
    near(got, Doubles(expected.begin(), expected.end()), 1, 0.0);
  }

  ~Case() {
    const bool good = worst <= 1.0;
    printf("%s %s: %.2g of the tolerance\n", good ? "ok  " : "MISS", name.c_str(), worst);
    all_good &= good;
  }
};

template <class... A>
std::string text(const char* format, A... arguments) {
  char line[200];
  snprintf(line, sizeof line, format, arguments...);
  return line;
}

// ---- norms and sums over rows ----

// Folds chunks' sums, which a kernel has left, and compares exactly: the chunks in their order, in double.
void fold(Case& test, const float* sums, u64 chunks, u64 width) {
  for (unsigned accumulate = 0; accumulate < 2; accumulate++) {
    float* into = accumulate ? normals(width, 9) : nans(width);
    std::vector<float> expected(into, into + width);
    for (u64 i = 0; i < width; i++) {
      double sum = 0.0;
      for (u64 chunk = 0; chunk < chunks; chunk++) sum += (double)sums[chunk * width + i];
      expected[i] = accumulate ? expected[i] + (float)sum : (float)sum;
    }
    start("fold_columns", blocks_of(width, COLUMN_THREADS), COLUMN_THREADS, chunks, width, sums, accumulate, into);
    test.same(into, expected);
  }
}

// `special` stands in the middle of the middle row where it is not 0.
void run_norm(u64 rows, u64 width, bool centred, bool biased, bool added, float size, float shift, float special) {
  Case test(text("norm of %llu rows of %llu%s%s%s, size %g, shift %g, special %g", rows, width, centred ? ", centred" : "",
                 biased ? ", bias" : "", added ? ", residual" : "", size, shift, special));
  const u64 count = rows * width, chunks = blocks_of(rows, ROWS_A_SUM), row_blocks = blocks_of(rows, ROW_WARPS);
  const float epsilon = 1e-5f;
  float *x = normals(count, 1, size, shift), *weight = normals(width, 2, 0.5f, 1.0f), *dy = normals(count, 3);
  if (special != 0.0f) x[rows / 2 * width + width / 2] = special;
  float *bias = biased ? normals(width, 4) : nullptr, *residual = added ? normals(count, 5) : nullptr;
  float *y = nans(count), *dx = nans(count), *means = centred ? nans(rows) : nullptr, *scales = nans(rows);
  float *weight_sums = nans(chunks * width), *bias_sums = centred ? nans(chunks * width) : nullptr;
  start("norm_forward", row_blocks, ROW_THREADS, rows, width, epsilon, x, weight, bias, y, means, scales);
  start("norm_backward", row_blocks, ROW_THREADS, rows, width, dy, x, weight, means, scales, residual, dx);
  start("norm_parameter_sums", blocks_of(width, COLUMN_THREADS) * chunks, COLUMN_THREADS, rows, width, dy, x, means, scales,
        weight_sums, bias_sums);

  Doubles of_y(count), of_dx(count), of_means(rows), of_scales(rows), greatest(rows, 0.0), slopes(rows, 0.0);
  Doubles of_weight(chunks * width, 0.0), of_bias = of_weight, size_weight = of_weight, size_bias = of_weight;
  for (u64 row = 0; row < rows; row++) {
    const float *from = x + row * width, *slope = dy + row * width;
    double mean = 0.0, squares = 0.0, sum = 0.0, product = 0.0;
    for (u64 i = 0; i < width; i++) mean += from[i], greatest[row] = fmax(greatest[row], fabs(from[i]));
    mean = centred ? mean / width : 0.0;
    for (u64 i = 0; i < width; i++) squares += (from[i] - mean) * (from[i] - mean);
    const double scale = 1.0 / sqrt(squares / width + (double)epsilon);
    for (u64 i = 0; i < width; i++) {
      const double g = (double)slope[i] * weight[i], normed = (from[i] - mean) * scale;
      sum += g, product += g * normed;
      slopes[row] = fmax(slopes[row], fabs(g) * scale);
      if (added) slopes[row] = fmax(slopes[row], fabs(residual[row * width + i]));
      of_y[row * width + i] = normed * weight[i] + (biased ? bias[i] : 0.0);
      const u64 at = row / ROWS_A_SUM * width + i;
      of_weight[at] += slope[i] * normed, of_bias[at] += slope[i];
      size_weight[at] += fabs(slope[i] * normed), size_bias[at] += fabs(slope[i]);
    }
    for (u64 i = 0; i < width; i++) {
      const double g = (double)slope[i] * weight[i], normed = (from[i] - mean) * scale;
      const double part = (g - (centred ? sum / width : 0.0) - normed * (product / width)) * scale;
      of_dx[row * width + i] = part + (added ? residual[row * width + i] : 0.0);
    }
    of_means[row] = mean, of_scales[row] = scale;
  }
  test.near(y, of_y, width, 1e-6);
  test.near(scales, of_scales, 1, 1e-6);
  test.near(dx, of_dx, width, 1e-6, slopes);
  test.near(weight_sums, of_weight, 1, 1e-6, size_weight);
  if (centred) {
    test.near(means, of_means, 1, 3e-7, greatest);
    test.near(bias_sums, of_bias, 1, 1e-6, size_bias);
    fold(test, bias_sums, chunks, width);
  }
  fold(test, weight_sums, chunks, width);
}

void run_column_sums(u64 rows, u64 width, float special) {
  Case test(text("column sums of %llu rows of %llu, special %g", rows, width, special));
  const u64 chunks = blocks_of(rows, ROWS_A_SUM);
  float *x = normals(rows * width, 1), *sums = nans(chunks * width);
  if (special != 0.0f) x[rows * width - 1] = special;
  start("column_sums", blocks_of(width, COLUMN_THREADS) * chunks, COLUMN_THREADS, rows, width, x, sums);
  Doubles expected(chunks * width, 0.0), sizes = expected;
  for (u64 i = 0; i < rows * width; i++) {
    const u64 at = i / width / ROWS_A_SUM * width + i % width;
    expected[at] += x[i], sizes[at] += fabs(x[i]);
  }
  test.near(sums, expected, 1, 1e-6, sizes);
  fold(test, sums, chunks, width);
}

// ---- element by element ----

void run_additions(unsigned rows, unsigned width) {
  Case test(text("additions, %u rows of %u", rows, width));
  const unsigned count = rows * width;
  const u64 blocks = blocks_of(count, block_threads);
  float *x = normals(count, 1), *bias = normals(width, 2), *residual = normals(count, 3);
  x[count / 2] = NAN;
  for (int given = 0; given < 4; given++) {
    const float *b = given & 1 ? bias : nullptr, *r = given & 2 ? residual : nullptr;
    float* y = nans(count);
    start("add_bias_residual", blocks, block_threads, count, width, x, b, r, y);
    std::vector<float> expected(x, x + count);
    for (unsigned i = 0; i < count; i++) {
      if (b) expected[i] += b[i % width];
      if (r) expected[i] += r[i];
    }
    test.same(y, expected);
    const unsigned accumulate = given & 1;
    float* into = accumulate ? normals(count, 4) : nans(count);
    for (unsigned i = 0; i < count; i++) expected[i] = (accumulate ? into[i] : 0.0f) + (r ? x[i] : 0.0f);
    start("accumulate_into", blocks, block_threads, count, r ? x : nullptr, accumulate, into);
    test.same(into, expected);
  }
}

// Normal numbers, where the functions bend, and what overflows on the way.
float* bending(unsigned count, unsigned seed) {
  float* x = normals(count, seed, 3.0f);
  for (unsigned i = 0; i < count / 2; i++) x[i] = ((float)i - (float)(count / 4)) * 48.0f / (float)count;
  const float special[] = {0.0f, -0.0f, 1e-30f, 40.0f, -40.0f, 88.0f, -88.0f, 95.0f, -95.0f, 1e4f, -1e4f, 1e13f, -1e13f,
                           1e20f, -1e20f, 1e37f, -1e37f, INF, -INF, NAN};
  const unsigned specials = sizeof special / sizeof *special;
  for (unsigned i = 0; i < specials && i < count / 2; i++) x[count - 1 - i] = special[i];
  return x;
}

void run_activations(unsigned rows, unsigned width) {
  Case test(text("activations, %u rows of %u", rows, width));
  const unsigned count = rows * width;
  const u64 blocks = blocks_of(count, block_threads);
  float *x = bending(count, 1), *bias = normals(width, 2), *dy = normals(count, 3), *up = normals(count, 4);
  float *before = nans(count), *y = nans(count), *dx = nans(count), *product = nans(count), *dgate = nans(count);
  float* dup = nans(count);
  start("gelu_forward", blocks, block_threads, count, width, x, bias, before, y);
  start("gelu_backward", blocks, block_threads, count, x, dy, dx);
  start("swiglu_forward", blocks, block_threads, count, x, up, product);
  start("swiglu_backward", blocks, block_threads, count, x, up, dy, dgate, dup);

  const double root = 0.79788456080286535588, cube = 0.044715;
  std::vector<float> of_before(count);
  Doubles of_y(count), of_dx(count), of_product(count), of_dgate(count), of_dup(count);
  Doubles y_sizes(count), dx_sizes(count), product_sizes(count), dgate_sizes(count), dup_sizes(count);
  for (unsigned i = 0; i < count; i++) {
    const double v = of_before[i] = x[i] + bias[i % width], g = x[i], slope = dy[i];
    const double t = tanh(root * (g + cube * g * g * g)), sigmoid = 1.0 / (1.0 + exp(-g));
    of_y[i] = 0.5 * v * (1.0 + tanh(root * (v + cube * v * v * v)));
    // The slope of an infinite number is its limit.
    const double bend = std::isinf(g) ? 0.0 : 0.5 * g * (1.0 - t * t) * root * (1.0 + 3.0 * cube * g * g);
    of_dx[i] = slope * (0.5 * (1.0 + t) + bend);
    of_product[i] = g * sigmoid * up[i];
    of_dup[i] = slope * (g * sigmoid);
    of_dgate[i] = slope * up[i] * (sigmoid * (1.0 + g * (1.0 - sigmoid)));
    y_sizes[i] = fmax(1.0, fabs(of_y[i])), dx_sizes[i] = fabs(slope);
    const double size = fmax(1.0, fabs(g * sigmoid));
    product_sizes[i] = fabs(up[i]) * size, dup_sizes[i] = fabs(slope) * size, dgate_sizes[i] = fabs(slope * up[i]);
  }
  test.same(before, of_before);
  test.near(y, of_y, 1, 3e-7, y_sizes);
  test.near(dx, of_dx, 1, 1e-6, dx_sizes);
  test.near(product, of_product, 1, 4e-7, product_sizes);
  test.near(dgate, of_dgate, 1, 1e-6, dgate_sizes);
  test.near(dup, of_dup, 1, 4e-7, dup_sizes);
}

// ---- heads and attention ----

// As in model.cu.
struct Heads {
  unsigned batch, time, heads, dim, group, row_stride, first_column;
};

void run_heads(Heads s, bool rotated, bool biased) {
  Case test(text("heads %u x %u, %u of %u, group %u, columns from %u of %u%s%s", s.batch, s.time, s.heads, s.dim, s.group,
                 s.first_column, s.row_stride, rotated ? ", rotated" : "", biased ? ", bias" : ""));
  const unsigned tokens = s.batch * s.time, half = s.dim / 2, count = tokens * s.heads * s.dim;
  const unsigned columns = s.heads / s.group * s.dim;
  float *x = normals(tokens * s.row_stride, 1), *y = nans(count), *bias = biased ? normals(s.row_stride, 2) : nullptr;
  float *cosines = rotated ? nans(tokens * half) : nullptr, *sines = rotated ? nans(tokens * half) : nullptr;
  if (rotated) {
    float* angles = normals(tokens * half, 3, 2.0f);
    for (unsigned i = 0; i < tokens * half; i++) cosines[i] = cosf(angles[i]), sines[i] = sinf(angles[i]);
  }
  // A kernel reads nothing outside the heads' columns.
  for (unsigned i = 0; i < tokens * s.row_stride; i++)
    if (i % s.row_stride - s.first_column >= columns) x[i] = NAN;
  x[s.first_column + s.dim / 2] = NAN;
  float *slopes = normals(count, 4), *together = buffer<float>(tokens * s.row_stride, 7.0f);
  slopes[count - 1] = INF;
  start("heads_apart", tokens, block_threads, s, x, bias, cosines, sines, y);
  start("heads_together", tokens, block_threads, s, slopes, cosines, sines, together);

  Doubles of_y, of_together(tokens * s.row_stride, 7.0);
  // Of a head's numbers `from`, the one with index i, turned by the token's angle times `direction`.
  auto turned = [&](const float* from, unsigned token, unsigned i, double direction) {
    if (!rotated) return (double)from[i];
    const double cosine = cosines[token * half + i % half], sine = direction * sines[token * half + i % half];
    return i < half ? from[i] * cosine - from[i + half] * sine : from[i] * cosine + from[i - half] * sine;
  };
  for (unsigned row = 0; row < s.batch; row++)
    for (unsigned head = 0; head < s.heads; head++)
      for (unsigned token = row * s.time; token < (row + 1) * s.time; token++)
        for (unsigned i = 0; i < s.dim; i++) {
          const unsigned column = s.first_column + head / s.group * s.dim;
          of_y.push_back(turned(x + token * s.row_stride + column, token, i, 1.0) + (biased ? bias[column + i] : 0.0));
          const unsigned line = (row * s.heads + head) * s.time + token % s.time;
          double& sum = of_together[token * s.row_stride + column + i];
          sum = (head % s.group ? sum : 0.0) + turned(slopes + line * s.dim, token, i, -1.0);
        }
  test.near(y, of_y, s.dim, 2e-7);
  test.near(together, of_together, s.row_stride, 3e-7);
}

// Positions in documents of uneven lengths; the first row is one document.
unsigned* packed(unsigned batch, unsigned time) {
  const unsigned lengths[] = {3, 1, 35, 2, 64, 7};
  unsigned *positions = buffer<unsigned>(batch * time, 0), document = 0;
  for (unsigned row = 0; row < batch; row++)
    for (unsigned t = 0, place = 0; t < time; t++) {
      if (row && place == lengths[document % 6]) place = 0, document++;
      positions[row * time + t] = place++;
    }
  return positions;
}

// `special` stands at the last key of the middle row and at the first of the last row, where it is not 0; all keys of the
// first batch row's second half are `level`, where that is not 0.
void run_softmax(u64 batch, u64 heads, u64 time, float scale, float size, float special, float level) {
  Case test(text("softmax %llu x %llu heads x %llu, scale %g, size %g, special %g, level %g", batch, heads, time, scale, size,
                 special, level));
  const u64 rows = batch * heads * time, blocks = blocks_of(rows, ROW_WARPS);
  const unsigned* positions = packed(batch, time);
  float *scores = normals(rows * time, 1, size), *slopes = normals(rows * time, 2), *probabilities = nans(rows * time);
  Doubles p(rows * time, 0.0), of_slopes(rows * time, 0.0), sizes(rows, 0.0);
  auto first_of = [&](u64 row) { return row % time - positions[row / (heads * time) * time + row % time]; };
  if (special != 0.0f) {
    scores[rows / 2 * time + rows / 2 % time] = special;
    scores[(rows - 1) * time + first_of(rows - 1)] = special;
  }
  for (u64 row = 0; row < rows; row++) {
    const u64 last = row % time, first = first_of(row), at = row * time;
    if (level != 0.0f && row < time && row > time / 2) std::fill(scores + at, scores + at + time, level);
    double most = -INFINITY, sum = 0.0, dot = 0.0;
    for (u64 i = first; i <= last; i++) most = fmax(most, scores[at + i]);
    for (u64 i = first; i <= last; i++) sum += p[at + i] = exp((scores[at + i] - most) * scale);
    for (u64 i = first; i <= last; i++) p[at + i] /= sum;
    // The backward pass reads what the forward pass should have given.
    for (u64 i = 0; i < time; i++) {
      probabilities[at + i] = (float)p[at + i];
      // Greater than every key that counts, or nothing that a sum could hide.
      if (i < first || i > last) scores[at + i] = slopes[at + i] = i % 2 ? 3e38f : NAN;
    }
    for (u64 i = first; i <= last; i++) dot += (double)probabilities[at + i] * slopes[at + i];
    for (u64 i = first; i <= last; i++) {
      of_slopes[at + i] = scale * probabilities[at + i] * (slopes[at + i] - dot);
      sizes[row] = fmax(sizes[row], fabs(scale * probabilities[at + i] * slopes[at + i]));
    }
  }
  start("softmax_forward", blocks, ROW_THREADS, rows, heads, time, scale, positions, scores);
  test.near(scores, p, time, 5e-7);
  start("softmax_backward", blocks, ROW_THREADS, rows, heads, time, scale, positions, probabilities, slopes);
  test.near(slopes, of_slopes, time, 1e-6, sizes);
}

// ---- the head and the embeddings ----

// `special` stands at the target of row 1, at the last number of row 2 and in an ignored row; row 3 is all `level`. Where
// `slopes` is 0 the logits stay.
void run_cross_entropy(u64 rows, u64 vocabulary, unsigned ignore, unsigned slopes, float size, float special, float level) {
  Case test(text("cross-entropy of %llu rows of %llu, ignore %u%s, size %g, special %g, level %g", rows, vocabulary, ignore,
                 slopes ? ", slopes" : "", size, special, level));
  // Some rows are filled up, by numbers that must not count.
  const u64 stride = vocabulary % 2 ? vocabulary + 3 : vocabulary;
  float* logits = normals(rows * stride, 1, size);
  for (u64 i = 0; i < rows * stride; i++)
    if (i % stride >= vocabulary) logits[i] = i % 2 ? NAN : 3e38f;
  unsigned* targets = buffer<unsigned>(rows, 0);
  for (u64 row = 0; row < rows; row++) {
    targets[row] = row % 3 == 0 ? vocabulary - 1 : row % 3 == 1 ? 0 : vocabulary / 2;
    if (row % 5 == 4) targets[row] = ignore;
  }
  if (special != 0.0f) {
    if (rows > 1) logits[stride + targets[1]] = special;
    if (rows > 2) logits[2 * stride + vocabulary - 1] = special;
    if (rows > 4) logits[4 * stride] = special;
  }
  if (level != 0.0f && rows > 3) std::fill(logits + 3 * stride, logits + 3 * stride + vocabulary, level);
  double* losses = buffer<double>(rows, NAN);
  Doubles of_losses(rows, 0.0), of_logits(logits, logits + rows * stride);
  for (u64 row = 0; row < rows; row++) {
    const float* x = logits + row * stride;
    double most = -INFINITY, sum = 0.0;
    for (u64 i = 0; i < vocabulary; i++) most = fmax(most, x[i]);
    for (u64 i = 0; i < vocabulary; i++) sum += exp(x[i] - most);
    const bool counts = targets[row] != ignore;
    if (counts) of_losses[row] = most + log(sum) - x[targets[row]];
    for (u64 i = 0; slopes && i < stride; i++)
      of_logits[row * stride + i] =
          counts && i < vocabulary ? exp(x[i] - most) / sum - (i == targets[row] ? 1.0 : 0.0) : 0.0;
  }
  start("cross_entropy", rows, block_threads, vocabulary, stride, targets, ignore, slopes, logits, losses);
  test.near(losses, of_losses, 1, 1e-6, Doubles(rows, 1.0));
  test.near(logits, of_logits, stride, 1e-6, Doubles(rows, slopes ? 1.0 : 0.0));
}

// The ids of `tokens` tokens are of every kind: one that comes again and again, the last, some that no token has.
void run_embeddings(unsigned tokens, unsigned width, unsigned vocabulary) {
  Case test(text("embeddings of %u tokens, %u wide, of %u", tokens, width, vocabulary));
  const unsigned count = tokens * width, places = 1 + tokens / 2;
  const u64 blocks = blocks_of(count, block_threads);
  unsigned *ids = buffer<unsigned>(tokens, 0), *positions = buffer<unsigned>(tokens, 0);
  for (unsigned i = 0; i < tokens; i++) {
    ids[i] = i % 3 == 0 ? vocabulary - 1 : i % 3 == 1 ? i * 7 % vocabulary : vocabulary / 2;
    positions[i] = i % places;
  }
  float *table = normals(vocabulary * width, 1), *place_table = normals(places * width, 2);
  table[(vocabulary - 1) * width] = NAN;
  for (const float* second : {(const float*)nullptr, (const float*)place_table}) {
    float* y = nans(count);
    start("embed", blocks, block_threads, count, width, ids, table, second ? positions : nullptr, second, y);
    std::vector<float> expected;
    for (unsigned token = 0; token < tokens; token++)
      for (unsigned i = 0; i < width; i++)
        expected.push_back(table[ids[token] * width + i] + (second ? second[positions[token] * width + i] : 0.0f));
    test.same(y, expected);
  }
  // As src/model/card/passes.rs sorts them.
  std::vector<unsigned> sorted(tokens), distinct, begins;
  for (unsigned i = 0; i < tokens; i++) sorted[i] = i;
  std::stable_sort(sorted.begin(), sorted.end(), [&](unsigned a, unsigned b) { return ids[a] < ids[b]; });
  for (unsigned place = 0; place < tokens; place++) {
    const unsigned id = ids[sorted[place]];
    if (!place || id != distinct.back()) distinct.push_back(id), begins.push_back(place);
  }
  begins.push_back(tokens);
  unsigned* parts[3] = {buffer(distinct.size(), 0u), buffer(begins.size(), 0u), buffer(tokens, 0u)};
  std::copy(distinct.begin(), distinct.end(), parts[0]);
  std::copy(begins.begin(), begins.end(), parts[1]);
  std::copy(sorted.begin(), sorted.end(), parts[2]);
  float *dy = normals(count, 3), *gradient = normals(vocabulary * width, 4);
  dy[count - 1] = NAN;
  // Exact: a row's sum is taken in the tokens' order, then added.
  std::vector<float> expected(gradient, gradient + vocabulary * width);
  for (unsigned id : distinct)
    for (unsigned i = 0; i < width; i++) {
      float sum = 0.0f;
      for (unsigned token = 0; token < tokens; token++)
        if (ids[token] == id) sum += dy[token * width + i];
      expected[id * width + i] += sum;
    }
  start("embed_backward", distinct.size(), block_threads, (u64)width, parts[0], parts[1], parts[2], dy, gradient);
  test.same(gradient, expected);
}

void run_all() {
  const u64 norms[][2] = {{1, 1}, {1, 33}, {3, 42}, {4, 64}, {5, 257}, {65, 31}, {130, 70}};
  int kind = 0;
  for (auto& [rows, width] : norms)
    for (int i = 0; i < 2; i++, kind++) run_norm(rows, width, i, kind % 3 != 0, kind / 2 % 2, 1.0f, 0.5f, 0.0f);
  for (bool centred : {false, true}) {
    for (float size : {1e-6f, 1e15f}) run_norm(3, 37, centred, false, false, size, 0.0f, 0.0f);
    for (float special : {NAN, INF, -INF, 1e4f}) run_norm(6, 45, centred, true, false, 1.0f, 0.0f, special);
  }
  const u64 sums[][2] = {{1, 1}, {1, 65}, {63, 64}, {64, 5}, {65, 130}, {200, 33}};
  for (auto& [rows, width] : sums) run_column_sums(rows, width, 0.0f);
  for (float special : {NAN, INF}) run_column_sums(70, 66, special);
  const unsigned plain[][2] = {{1, 1}, {1, 31}, {5, 67}, {3, 256}, {64, 17}};
  for (auto& [rows, width] : plain) run_additions(rows, width), run_activations(rows, width);
  const Heads heads[] = {{1, 1, 1, 2, 1, 2, 0},   {2, 5, 6, 10, 1, 180, 60}, {2, 5, 6, 10, 3, 20, 0},
                         {3, 7, 4, 6, 2, 40, 16}, {1, 33, 3, 14, 3, 28, 14}, {2, 3, 2, 34, 1, 68, 0}};
  for (const Heads& shape : heads) run_heads(shape, true, false), run_heads(shape, false, true);
  for (const Heads& shape : {Heads{2, 9, 3, 7, 1, 63, 21}, Heads{1, 4, 4, 5, 2, 11, 1}}) run_heads(shape, false, false);
  const u64 softmaxes[][3] = {{1, 1, 1}, {1, 2, 33}, {2, 3, 40}, {3, 1, 64}, {2, 1, 130}};
  for (auto& [batch, count, time] : softmaxes) run_softmax(batch, count, time, 0.125f, 3.0f, 0.0f, 0.0f);
  for (float size : {1e4f, 1e30f}) run_softmax(2, 2, 19, 0.5f, size, 0.0f, 0.0f);
  for (float special : {NAN, INF, -INF, 1e4f, -1e30f}) run_softmax(2, 2, 37, 0.5f, 1.0f, special, 0.0f);
  for (float level : {-1e30f, -INF, 1e4f}) run_softmax(2, 1, 12, 0.3f, 1.0f, 0.0f, level);
  for (unsigned slopes = 0; slopes < 2; slopes++) {
    const u64 sizes[][2] = {{1, 1}, {1, 31}, {6, 32}, {5, 257}, {11, 1000}};
    for (auto& [rows, vocabulary] : sizes) run_cross_entropy(rows, vocabulary, ~0u, slopes, 3.0f, 0.0f, 0.0f);
    run_cross_entropy(7, 300, 299, slopes, 1.0f, 0.0f, 0.0f);
    for (float special : {NAN, INF, -INF, 1e4f, -1e4f}) run_cross_entropy(6, 301, ~0u, slopes, 1.0f, special, 0.0f);
    for (float level : {1e4f, -1e4f, -1e30f, -INF}) run_cross_entropy(5, 70, ~0u, slopes, 1e4f, 0.0f, level);
  }
  const unsigned tables[][3] = {{1, 1, 1}, {7, 33, 5}, {70, 5, 11}, {9, 300, 50}};
  for (auto& [tokens, width, vocabulary] : tables) run_embeddings(tokens, width, vocabulary);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) block_threads = atoi(argv[1]);
  run_all();
  printf("bits=%016lx\n", (unsigned long)all_bits);
  return !all_good;
}
