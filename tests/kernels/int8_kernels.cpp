// The kernels of INT8 without padding against the same in plain C++, without PyTorch: ./int8_kernels [broken].
//
// Prints a line for each check, and ends with 1 if one failed. `broken`: each kernel gets one input that the plain code
// does not get, so that each check must fail. The last lines tell what was built, and a number made of all that must be
// equal to the last bit wherever the inputs have as many steps.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "int8_layer.h"

#ifndef MLIS_VECTORS
int main() { std::puts("built without INT8"); }
#else

namespace {

using namespace mlis;

bool broken = false;
int failures = 0;
uint64_t bits_seen = 14695981039346656037u;

void check(const std::string& what, bool good) {
  std::printf("%s: %s\n", what.c_str(), good ? "ok" : "FAILED");
  failures += !good;
}

void remember(const void* from, size_t size) {
  for (size_t i = 0; i < size; ++i) bits_seen = (bits_seen ^ static_cast<const uint8_t*>(from)[i]) * 1099511628211u;
}

std::mt19937 random_bits(7);

int any_of(int low, int high) { return low + static_cast<int>(random_bits() % static_cast<uint32_t>(high - low + 1)); }

std::vector<float> floats(int64_t count, float size = 1.0f) {
  std::vector<float> all(count);
  for (float& x : all)
    x = size * (static_cast<float>(any_of(-10000, 10000)) + static_cast<float>(any_of(0, 5000))) / 5e3f;
  return all;
}

void serial(int64_t count, const auto& f) { f(int64_t{0}, count); }
const auto loop = [](int64_t count, const auto& f) { serial(count, f); };

// A row as steps of its range: x = scale * (steps - zero), steps in 0 .. kMost.
struct Row {
  std::vector<int> steps;
  float scale;
  int zero;
};

Row quantised(const float* x, int64_t width) {
  float low = 0, high = 0;
  for (int64_t j = 0; j < width; ++j) low = std::fmin(low, x[j]), high = std::fmax(high, x[j]);
  Row row;
  row.scale = std::fmax((high - low) / static_cast<float>(kMost), 1e-30f);
  row.zero = static_cast<int>(std::nearbyint(std::fmin(std::fmax(-low / row.scale, 0.0f), static_cast<float>(kMost))));
  const float inverse = 1.0f / row.scale;
  for (int64_t j = 0; j < width; ++j) {
    const int steps = static_cast<int>(std::nearbyint(x[j] * inverse)) + row.zero;
    row.steps.push_back(std::min(std::max(steps, 0), static_cast<int>(kMost)));
  }
  return row;
}

// Weights as they are, (out, in), and as the kernels read them.
struct Weights {
  std::vector<int8_t> values, panels;
  std::vector<float> scales, bias;
  std::vector<int32_t> sums;
  int64_t in, out;

  Weights(int64_t in, int64_t out, bool extreme = false) : values(in * out), panels(in * out), in(in), out(out) {
    for (int8_t& w : values) w = static_cast<int8_t>(extreme ? (random_bits() % 2 ? 127 : -127) : any_of(-127, 127));
    for (int64_t n = 0; n < out; ++n) {
      int32_t sum = 0;
      for (int64_t k = 0; k < in; ++k) sum += values[n * in + k];
      sums.push_back(sum);
      scales.push_back(static_cast<float>(any_of(500, 1500)) / (1e5f * std::sqrt(static_cast<float>(in))));
    }
    bias = floats(out, 0.1f);
    for (int64_t n = 0; n < out; ++n)
      for (int64_t k = 0; k < in; ++k)
        panels[n / kPanel * kPanel * in + k / kInputs * kInputs * kPanel + n % kPanel * kInputs + k % kInputs] =
            values[n * in + k];
    for (int64_t i = 0; broken && i < in * out / 2; ++i) panels[i] = static_cast<int8_t>(any_of(-127, 127));
  }

  Int8Matrix matrix() const { return {panels.data(), scales.data(), sums.data(), bias.data(), in, out}; }
};

// Of how many rows there must be room.
size_t room(size_t rows) { return (rows + 15) / 16 * 16; }

// The bytes of the kernels.
struct Quantised {
  std::vector<Byte> bytes;
  std::vector<float> scales;
  std::vector<int32_t> zeros;
  int64_t width;

  Quantised(const std::vector<float>& x, int64_t width)
      : bytes(room(x.size() / width) * width), scales(x.size() / width), zeros(x.size() / width), width(width) {
    for (size_t m = 0; m < scales.size(); ++m) quantise_row(x.data() + m * width, rows(), static_cast<int64_t>(m));
  }

  Int8Rows rows() { return {bytes.data(), scales.data(), zeros.data(), width}; }
};

bool close(double got, double expected, double most) { return std::fabs(got - expected) <= most; }  // false for NaN

void check_rows() {
  for (const int64_t width : {64, 192, 320, 1536})
    for (const int kind : {0, 1, 2, 3, 4}) {  // of both signs, above 0, below 0, all 0, halves of a step
      std::vector<float> x = floats(3 * width);
      for (float& each : x)
        if (kind)
          each = kind == 3   ? 0.0f
                 : kind == 4 ? static_cast<float>(any_of(-2 * kMost, 2 * kMost)) / 2
                             : std::fabs(each) * (kind == 1 ? 1.0f : -1.0f);
      std::vector<float> given = x;
      if (broken) given[width + 1] += 0.5f + std::fabs(given[width + 1]);
      Quantised got(given, width);
      bool good = true;
      for (int64_t m = 0; m < 3; ++m) {
        const Row row = quantised(x.data() + m * width, width);
        good = good && got.scales[m] == row.scale && got.zeros[m] - kLeast == row.zero;
        for (int64_t j = 0; j < width; ++j) good = good && got.bytes[m * width + j] - kLeast == row.steps[j];
        remember(row.steps.data(), row.steps.size() * sizeof(int));
      }
      check("rows of " + std::to_string(width) + ", kind " + std::to_string(kind), good);
    }
}

template <int kRows>
void check_sums(int64_t in, bool extreme, const char* how, const auto& sum) {
  const Weights weights(in, kPanel, extreme);
  std::vector<Byte> bytes(kRows * in);
  for (Byte& each : bytes) each = static_cast<Byte>(kLeast + (extreme ? kMost * any_of(0, 1) : any_of(0, kMost)));
  std::vector<int32_t> got(kRows * kPanel);
  sum(bytes.data(), weights.panels.data(), in, got.data());
  bool good = true;
  for (int64_t m = 0; m < kRows; ++m)
    for (int64_t n = 0; n < kPanel; ++n) {
      int64_t exact = 0;
      for (int64_t k = 0; k < in; ++k) exact += int64_t{bytes[m * in + k]} * weights.values[n * in + k];
      good = good && got[m * kPanel + n] == exact;
    }
  check("sums of " + std::to_string(kRows) + " rows, " + std::to_string(in) + " inputs" + how, good);
}

template <int kRows>
void check_sums(int64_t in, bool extreme) {
  check_sums<kRows>(in, extreme, "", [](auto... given) { sum_panel<kRows>(given...); });
}

// (rows, out), each rounded as the kernel rounds; GELU, where it is asked for, in double.
template <bool kGelu>
std::vector<double> linear(const std::vector<float>& x, const Weights& w) {
  std::vector<double> all;
  for (size_t m = 0; m * w.in < x.size(); ++m) {
    const Row row = quantised(x.data() + m * w.in, w.in);
    for (int64_t n = 0; n < w.out; ++n) {
      int64_t exact = 0;
      for (int64_t k = 0; k < w.in; ++k) exact += int64_t{row.steps[k] - row.zero} * w.values[n * w.in + k];
      const float y = std::fmaf(static_cast<float>(exact) * w.scales[n], row.scale, w.bias[n]);
      all.push_back(kGelu ? 0.5 * y * std::erfc(-y / std::sqrt(2.0)) : y);
    }
  }
  return all;
}

template <bool kGelu>
void check_linear(int64_t rows, int64_t in, int64_t out) {
  const Weights weights(in, out);
  const std::vector<float> x = floats(rows * in, kGelu ? 1.0f : 10.0f);
  const std::vector<double> expected = linear<kGelu>(x, weights);
  std::vector<float> got(rows * out, NAN);
  Quantised bytes(x, in);
  multiply_int8<kGelu>(bytes.rows(), rows, weights.matrix(), got.data());
  bool good = true;
  for (size_t i = 0; i < got.size(); ++i) good = good && close(got[i], expected[i], kGelu ? 2e-4 : 0);
  remember(got.data(), got.size() * sizeof(float));
  check(std::to_string(rows) + " rows, " + std::to_string(in) + " -> " + std::to_string(out) + (kGelu ? ", GELU" : ""),
        good);
}

void check_gelu() {
  bool good = true;
  for (int i = -20000; i <= 20000; ++i) {
    const float x = static_cast<float>(i) / 1000;
    float got[kLanes];
    store(got, gelu(spread(broken ? x + 1 : x)));
    good =
        good && close(got[kLanes - 1], 0.5 * x * std::erfc(-x / std::sqrt(2.0)), 1e-4 * std::fmax(1, std::fabs(x) / 4));
  }
  check("GELU", good);
}

// One head; q, k, v: `length` rows, `stride` apart.
std::vector<double> attention(const double* q, const double* k, const double* v, int64_t stride, int64_t length,
                              int64_t dim) {
  std::vector<double> out(length * dim), powers(length);
  for (int64_t i = 0; i < length; ++i) {
    double top = -INFINITY, total = 0;
    for (int64_t j = 0; j < length; ++j) {
      powers[j] = 0;
      for (int64_t d = 0; d < dim; ++d) powers[j] += q[i * stride + d] * k[j * stride + d];
      powers[j] /= std::sqrt(static_cast<double>(dim));
      top = std::fmax(top, powers[j]);
    }
    for (double& power : powers) total += power = std::exp(power - top);
    for (int64_t j = 0; j < length; ++j)
      for (int64_t d = 0; d < dim; ++d) out[i * dim + d] += powers[j] / total * v[j * stride + d];
  }
  return out;
}

void check_attention(int64_t length, int64_t dim) {
  const int64_t heads = 2, stride = 3 * heads * dim;
  std::vector<float> joined = floats(length * stride), got(length * heads * dim, NAN);
  const std::vector<double> exact(joined.begin(), joined.end());
  if (broken) joined[2 * heads * dim + length / 2 * stride] += 9.0f;
  FloatScratch scratch;
  bool good = true;
  for (int64_t head = 0; head < heads; ++head) {
    const float* q = joined.data() + head * dim;
    attend_in_floats(q, q + heads * dim, q + 2 * heads * dim, stride, got.data() + head * dim, heads * dim, length, dim,
                     static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(dim))), scratch);
    const double* e = exact.data() + head * dim;
    const std::vector<double> expected = attention(e, e + heads * dim, e + 2 * heads * dim, stride, length, dim);
    for (int64_t i = 0; i < length; ++i)
      for (int64_t d = 0; d < dim; ++d)
        good = good && close(got[(i * heads + head) * dim + d], expected[i * dim + d], 5e-4);
  }
  check("attention, " + std::to_string(length) + " tokens, heads of " + std::to_string(dim), good);
}

void norm(double* row, const double* more, const float* weight, const float* bias, double eps, int64_t width) {
  double mean = 0, variance = 0;
  for (int64_t j = 0; j < width; ++j) mean += (row[j] += more[j]) / static_cast<double>(width);
  for (int64_t j = 0; j < width; ++j) variance += (row[j] - mean) * (row[j] - mean) / static_cast<double>(width);
  for (int64_t j = 0; j < width; ++j) row[j] = (row[j] - mean) / std::sqrt(variance + eps) * weight[j] + bias[j];
}

void check_norm(int64_t width) {
  std::vector<float> row = floats(width, 3.0f), more = floats(width), weight = floats(width), bias = floats(width);
  std::vector<double> expected(row.begin(), row.end());
  const std::vector<double> exact(more.begin(), more.end());
  norm(expected.data(), exact.data(), weight.data(), bias.data(), 1e-12, width);
  if (broken) more[width - 1] += 0.1f;
  add_and_norm(row.data(), more.data(), weight.data(), bias.data(), 1e-12f, width);
  bool good = true;
  for (int64_t j = 0; j < width; ++j) good = good && close(row[j], expected[j], 1e-5);
  check("norm of " + std::to_string(width), good);
}

struct WholeLayer {
  int64_t width, inner, heads;
  Weights joined{width, 3 * width}, output{width, width}, first{width, inner}, second{inner, width};
  std::vector<float> norms[4] = {floats(width), floats(width), floats(width), floats(width)};

  Layer layer() const {
    return {{joined.matrix(), output.matrix(), first.matrix(), second.matrix()},
            {norms[0].data(), norms[1].data(), norms[2].data(), norms[3].data()},
            width,
            inner,
            heads,
            1e-12f};
  }

  std::vector<float> run(const std::vector<float>& x, const std::vector<int64_t>& starts, int64_t threads = 1) const {
    std::vector<float> out(x.size(), NAN);
    run_layer(loop, threads, layer(), x.data(), starts.data(), static_cast<int64_t>(starts.size()) - 1, out.data());
    return out;
  }

  // In double but for the rows that become bytes.
  std::vector<double> plain(const std::vector<float>& x, const std::vector<int64_t>& starts) const {
    auto narrow = [](const std::vector<double>& wide) { return std::vector<float>(wide.begin(), wide.end()); };
    const int64_t dim = width / heads;
    const std::vector<double> qkv = linear<false>(x, joined), wide_x(x.begin(), x.end());
    std::vector<double> attended(x.size());
    for (size_t t = 0; t + 1 < starts.size(); ++t)
      for (int64_t head = 0; head < heads; ++head) {
        const double* q = qkv.data() + starts[t] * 3 * width + head * dim;
        const int64_t length = starts[t + 1] - starts[t];
        const std::vector<double> o = attention(q, q + width, q + 2 * width, 3 * width, length, dim);
        for (int64_t i = 0; i < length * dim; ++i)
          attended[(starts[t] + i / dim) * width + head * dim + i % dim] = o[i];
      }
    std::vector<double> y = linear<false>(narrow(attended), output);
    for (size_t i = 0; i < y.size(); i += width)
      norm(y.data() + i, wide_x.data() + i, norms[0].data(), norms[1].data(), 1e-12, width);
    std::vector<double> z = linear<false>(narrow(linear<true>(narrow(y), first)), second);
    for (size_t i = 0; i < z.size(); i += width)
      norm(z.data() + i, y.data() + i, norms[2].data(), norms[3].data(), 1e-12, width);
    return z;
  }
};

void check_layer(int64_t width, int64_t heads, int64_t inner, const std::vector<int64_t>& lengths) {
  const WholeLayer whole{width, inner, heads};
  std::vector<int64_t> starts{0};
  for (const int64_t length : lengths) starts.push_back(starts.back() + length);
  const std::vector<float> x = floats(starts.back() * width);
  const std::vector<double> expected = whole.plain(x, starts);
  const std::vector<float> got = whole.run(x, starts);
  // A value between two steps may be rounded to the other one, and all that follows from it differs.
  double most = 0, total = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double difference = std::fabs(got[i] - expected[i]);
    most = difference <= most ? most : difference;
    total += difference;
  }
  const std::string name = "layer of " + std::to_string(width) + ", " + std::to_string(heads) + " heads, " +
                           std::to_string(lengths.size()) + " texts";
  std::printf("%s: differs by %.1e at most, %.1e on average\n", name.c_str(), most,
              total / static_cast<double>(got.size()));
  check(name, most < 0.1 && total / static_cast<double>(got.size()) < 3e-3);
}

void check_company() {
  const WholeLayer whole{128, 256, 4};
  const std::vector<int64_t> lengths{7, 33, 1, 190, 64};
  std::vector<int64_t> starts{0};
  for (const int64_t length : lengths) starts.push_back(starts.back() + length);
  const std::vector<float> x = floats(starts.back() * 128);
  const std::vector<float> together = whole.run(x, starts);
  bool good = together == whole.run(x, starts, 100);
  for (size_t t = 0; t < lengths.size(); ++t) {
    std::vector<float> text(x.begin() + starts[t] * 128, x.begin() + starts[t + 1] * 128);
    if (broken) text[5] += 1.0f;
    good = good && std::equal(text.begin(), text.end(), x.begin() + starts[t] * 128) == !broken;
    const std::vector<float> alone = whole.run(text, {0, lengths[t]});
    good = good && std::memcmp(alone.data(), &together[starts[t] * 128], alone.size() * sizeof(float)) == 0;
  }
  check("a text alone and in company, to the last bit", good);

  for (const float wrong : {NAN, INFINITY, -INFINITY}) {
    std::vector<float> given = x;
    given[20 * 128 + 5] = broken ? 1.0f : wrong;  // of the second text
    const std::vector<float> got = whole.run(given, starts);
    good = true;
    for (int64_t i = 0; i < starts.back(); ++i) {
      const bool of_it = i >= starts[1] && i < starts[2];
      bool lost = false;
      for (int64_t j = 0; j < 128; ++j) lost = lost || std::isnan(got[i * 128 + j]);
      good = good && lost == of_it;
      if (!of_it) good = good && std::memcmp(&got[i * 128], &together[i * 128], 128 * sizeof(float)) == 0;
    }
    check("a text with " + std::to_string(wrong) + " is NaN, and no other", good);
  }
}

}  // namespace

int main(int count, char** arguments) {
  broken = count > 1 && std::string(arguments[1]) == "broken";
  check_rows();
  for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 13, 16, 17, 48}) {
    check_linear<false>(rows, 64, 192);
    check_linear<true>(rows, 192, 64);
  }
  check_linear<false>(3, 384, 1536);
  check_linear<true>(3, 1536, 384);
  check_gelu();
  for (const int64_t dim : {32, 64, 96, 128})
    for (const int64_t length : {1, 2, 5, 6, 7, 15, 16, 17, 33, 65}) check_attention(length, dim);
  for (const int64_t width : {64, 320, 768}) check_norm(width);
  check_layer(64, 2, 128, {1});
  check_layer(64, 1, 192, {2, 1, 3, 15, 16, 17});
  check_layer(128, 1, 256, {193, 4, 50});
  check_layer(192, 3, 320, {5, 5, 5, 5, 5});
  check_company();
  // Last: how many numbers they draw differs from processor to processor, and all that is remembered must not.
  for (const bool extreme : {false, true})
    for (const int64_t in : {64, 192, 1536}) {
      check_sums<1>(in, extreme);
      check_sums<2>(in, extreme);
      check_sums<3>(in, extreme);
      check_sums<4>(in, extreme);
      check_sums<5>(in, extreme);
      check_sums<6>(in, extreme);
#ifdef MLIS_AMX_INT8
      if (uses_int8_tiles())
        check_sums<16>(in, extreme, ", in tiles", [](auto... given) {
          configure_tiles();
          sum_panel_in_tiles(given...);
          _tile_release();
        });
#endif
    }
  std::printf("built for %s, %d steps\nbits %016llx\n", int8_instructions(), kMost,
              static_cast<unsigned long long>(bits_seen));
  return failures ? 1 : 0;
}

#endif
