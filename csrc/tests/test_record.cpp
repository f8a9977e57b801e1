// Packed records: Elias-Fano against plain ids, sizes, round trips per codec, sums to 1, any bytes are safe to unpack,
// trimming loses nothing. Under the sanitizers this is the proof that corrupted bytes reach no illegal address.
#include <numeric>
#include <random>
#include <set>

#include "../math/records/record_trim.h"
#include "check.h"

using namespace distillm;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Row {
  std::vector<int32_t> ids, counts;
  std::vector<float> logprobs, norm, tail;
  float label = -1.5f;
  bool valid = true;

  explicit Row(const RecordShape& shape)
      : ids(shape.entries, -7),
        counts(shape.entries, -7),
        logprobs(shape.entries, 7),
        norm(shape.temperatures, 7),
        tail(shape.temperatures, 7) {}
  RecordInput input(const RecordShape& shape) const {
    return {ids.data(),
            logprobs.data(),
            norm.data(),
            tail.data(),
            shape.has_labels ? &label : nullptr,
            &valid,
            shape.draws ? counts.data() : nullptr};
  }
  RecordOutput output(const RecordShape& shape) {
    return {ids.data(),
            logprobs.data(),
            norm.data(),
            tail.data(),
            shape.has_labels ? &label : nullptr,
            &valid,
            shape.draws ? counts.data() : nullptr};
  }
};

RecordShape shape_of(int vocab, int k, Codec codec, bool sample = false, std::vector<float> temperatures = {1.0f}) {
  RecordShape shape{vocab, k, sample ? k : 0, codec, true, static_cast<int>(temperatures.size()), {}};
  std::copy(temperatures.begin(), temperatures.end(), shape.temperature);
  return shape;
}

// A row of `kept` distinct ids with falling values, then padding; the tail has what they leave.
Row random_row(const RecordShape& shape, int kept, std::mt19937& generator) {
  Row row(shape);
  std::set<int32_t> ids;
  while (static_cast<int>(ids.size()) < kept) ids.insert(generator() % shape.vocab);
  std::vector<int32_t> shuffled(ids.begin(), ids.end());
  std::shuffle(shuffled.begin(), shuffled.end(), generator);
  std::vector<double> z(kept);
  for (double& x : z) x = std::normal_distribution<>(0, 2)(generator);
  std::sort(z.rbegin(), z.rend());
  const double tail_mass = kept < shape.vocab ? 0.2 : 0.0;
  double sum = 0;
  for (double x : z) sum += std::exp(x);
  for (int i = 0; i < shape.entries; ++i) {
    row.ids[i] = i < kept ? shuffled[i] : -1;
    row.logprobs[i] = i < kept ? static_cast<float>(z[i] - std::log(sum) + std::log1p(-tail_mass)) : -kInf;
    row.counts[i] = i < kept ? 1 + static_cast<int>(generator() % shape.entries) : 0;
  }
  for (int t = 0; t < shape.temperatures; ++t) {
    row.tail[t] = static_cast<float>(std::log(tail_mass)) / shape.temperature[t];
    row.norm[t] = 0.25f * t;
  }
  return row;
}

double total(const RecordShape& shape, const Row& row, int t) {
  double sum = std::exp(row.tail[t]);
  for (float x : row.logprobs) sum += std::exp(x / shape.temperature[t] - row.norm[t]);
  return sum;
}

void test_elias_fano(std::mt19937& generator) {
  for (int64_t vocab : {1, 2, 3, 31, 64, 1023, 50257, 151936, 1 << 30}) {
    for (int k : {1, 2, 7, 64, 257}) {
      const EliasFano shape = elias_fano_shape(k, vocab);
      const int low_bits = k * shape.low_bits;
      for (int count : {0, 1, k / 2, k}) {
        std::vector<uint32_t> ids(count), words((low_bits + shape.upper_bits) / 32 + 2);
        for (uint32_t& id : ids) id = generator() % vocab;
        if (count > 1) ids.front() = static_cast<uint32_t>(vocab - 1), ids.back() = 0;
        std::sort(ids.begin(), ids.end());
        for (int i = 0; i < count; ++i) put_elias_fano(words.data(), 0, low_bits, shape, i, ids[i]);
        CHECK_EQUAL(elias_fano_count(words.data(), low_bits, shape), count);
        for (int i = 0; i < count; ++i) CHECK_EQUAL(get_elias_fano(words.data(), 0, low_bits, shape, i), ids[i]);
      }
    }
  }
}

void test_sizes() {
  const RecordLayout layout = record_layout(shape_of(151936, 64, Codec::kQ8));
  CHECK_EQUAL(elias_fano_bits(64, 151936, layout.coding.low_bits), 842);
  CHECK_EQUAL(layout.bytes, 176);
  CHECK(record_layout(shape_of(151936, 1, Codec::kQ8)).plain_bits == 18);
  CHECK(record_layout(shape_of(151936, 64, Codec::kExact)).plain_bits == 18);
  CHECK(record_layout(shape_of(151936, 12, Codec::kQ8, true)).bytes <= 52);
}

void check_round_trip(const RecordShape& shape, int kept, std::mt19937& generator) {
  const RecordLayout layout = record_layout(shape);
  RecordCoder coder(layout);
  const Row row = random_row(shape, kept, generator);
  Row back(shape);
  std::vector<uint8_t> bytes(layout.bytes + 1, 0xa5), trimmed, again(layout.bytes);
  coder.pack(row.input(shape), bytes.data());
  CHECK_EQUAL(bytes.back(), 0xa5);
  coder.unpack(bytes.data(), back.output(shape));
  CHECK(back.valid);
  const bool exact = shape.codec == Codec::kExact;
  std::set<std::pair<int32_t, int32_t>> pairs, pairs_back;
  for (int i = 0; i < shape.entries; ++i) {
    pairs.insert({row.ids[i], shape.draws ? row.counts[i] : 0});
    pairs_back.insert({back.ids[i], shape.draws ? back.counts[i] : 0});
    CHECK((back.ids[i] < 0) == (i >= kept) && (back.ids[i] >= 0 || back.logprobs[i] == -kInf));
    if (exact) CHECK(back.ids[i] == row.ids[i] && back.logprobs[i] == row.logprobs[i]);
    if (i > 0 && i < kept) {
      CHECK(back.logprobs[i] < back.logprobs[i - 1] ||
            (back.logprobs[i] == back.logprobs[i - 1] && back.ids[i] > back.ids[i - 1]));
    }
  }
  CHECK(pairs == pairs_back);
  for (int t = 0; t < shape.temperatures; ++t) {
    CHECK(back.tail[t] == (exact ? row.tail[t] : half_to_float(to_half_bits(row.tail[t]))));
    if (!exact && !shape.draws && kept > 0) CHECK_NEAR(total(shape, back, t), 1, 2e-6);
  }
  trim_record(layout, bytes.data(), trimmed);
  CHECK(restore_record(layout, trimmed.data(), static_cast<int64_t>(trimmed.size()), again.data()));
  bytes.pop_back();
  CHECK(again == bytes);
  CHECK(!restore_record(layout, trimmed.data(), static_cast<int64_t>(trimmed.size()) - 1, again.data()));
}

// Whatever the bytes: legal ids, sorted values, no access outside (the sanitizers watch).
void check_any_bytes(const RecordShape& shape, std::mt19937& generator) {
  const RecordLayout layout = record_layout(shape);
  RecordCoder coder(layout);
  std::vector<uint8_t> bytes(layout.bytes), trimmed;
  for (uint8_t& byte : bytes) byte = generator() % 4 ? static_cast<uint8_t>(generator()) : 0xff;
  Row row(shape);
  coder.unpack(bytes.data(), row.output(shape));
  for (int i = 0; i < shape.entries; ++i) CHECK(row.ids[i] >= -1 && row.ids[i] < shape.vocab);
  trim_record(layout, bytes.data(), trimmed);
  bytes.resize(generator() % (2 * layout.bytes) + 1);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(generator());
  std::vector<uint8_t> restored(layout.bytes);
  restore_record(layout, bytes.data(), static_cast<int64_t>(bytes.size()), restored.data());
}

}  // namespace

int main() {
  std::mt19937 generator(11);
  test_elias_fano(generator);
  test_sizes();
  for (Codec codec : {Codec::kQ4, Codec::kQ6, Codec::kQ8, Codec::kFp16, Codec::kExact}) {
    for (int vocab : {1, 7, 1000, 151936}) {
      for (int k : {1, 2, 5, 64, 300}) {
        for (bool sample : {false, true}) {
          const RecordShape shape = shape_of(vocab, k, codec, sample, {1.0f, 2.0f});
          for (int kept : {0, 1, k / 2, k}) check_round_trip(shape, std::min(kept, vocab), generator);
          for (int i = 0; i < 8; ++i) check_any_bytes(shape, generator);
        }
      }
    }
  }
  return report("record");
}
