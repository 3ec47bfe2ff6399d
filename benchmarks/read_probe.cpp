// Reads every byte of some buffers, and writes every byte of others, and does nothing else with them: the least time in
// which a kernel with the same footprint could run. Built by benchmarks/probe.py for this machine only, so
// -march=native is right here.
#include <cstdint>

namespace {

// Integer sums: a compiler may reorder those, and so reads as wide as the machine can.
uint64_t sum_one(const uint64_t* p, int64_t words) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < words; ++i) sum += p[i];
  return sum;
}

uint64_t sum_four(const uint64_t* a, const uint64_t* b, const uint64_t* c, const uint64_t* d, int64_t words) {
  uint64_t x = 0, y = 0, z = 0, w = 0;
  for (int64_t i = 0; i < words; ++i) {
    x += a[i];
    y += b[i];
    z += c[i];
    w += d[i];
  }
  return x + y + z + w;
}

// Ordinary stores, as kernels store: a processor reads what they write before it writes it back. What is written is no
// constant, and no copy, since a compiler makes calls of those which may store past the caches.
void fill(uint64_t* p, int64_t words, uint64_t first) {
  for (int64_t i = 0; i < words; ++i) p[i] = first + static_cast<uint64_t>(i);
}

uint64_t sum_and_fill(const uint64_t* from, uint64_t* to, int64_t words) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < words; ++i) {
    sum += from[i];
    to[i] = from[i] + 1;
  }
  return sum;
}

}  // namespace

// Each thread reads its share of every buffer; one buffer after the other, or four side by side.
extern "C" uint64_t read_probe(const uint64_t* const* buffers, int64_t count, int64_t words, int four, int threads) {
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int part = 0; part < threads; ++part) {
    const int64_t begin = words * part / threads, size = words * (part + 1) / threads - begin;
    int64_t j = 0;
    if (four) {
      for (; j + 4 <= count; j += 4) {
        total +=
            sum_four(buffers[j] + begin, buffers[j + 1] + begin, buffers[j + 2] + begin, buffers[j + 3] + begin, size);
      }
    }
    for (; j < count; ++j) total += sum_one(buffers[j] + begin, size);
  }
  return total;
}

// The same, and each thread writes its share of other buffers: each beside one that it reads, or after all of them.
// Buffers that are written are none of those read.
extern "C" uint64_t transfer_probe(const uint64_t* const* read, int64_t reads, uint64_t* const* written, int64_t writes,
                                   int64_t words, int beside, int threads) {
  const int64_t both = !beside ? 0 : reads < writes ? reads : writes;
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int part = 0; part < threads; ++part) {
    const int64_t begin = words * part / threads, size = words * (part + 1) / threads - begin;
    int64_t j = 0;
    for (; j < both; ++j) total += sum_and_fill(read[j] + begin, written[j] + begin, size);
    for (; j + 4 <= reads; j += 4) {
      total += sum_four(read[j] + begin, read[j + 1] + begin, read[j + 2] + begin, read[j + 3] + begin, size);
    }
    for (; j < reads; ++j) total += sum_one(read[j] + begin, size);
    for (int64_t k = both; k < writes; ++k) fill(written[k] + begin, size, total);
  }
  return total;
}
