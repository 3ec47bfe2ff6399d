#include "runtime.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>

#include "fibers.h"

namespace cuda_on_cpu {

uint3 thread_index, block_index;
dim3 block_size, grid_size;

namespace {

constexpr unsigned kLanes = 32;
constexpr int kDevices = 2;  // so that a device guard has something to do

enum class State { kReady, kAtBlock, kAtWarp, kLeft };

struct Thread {
  Fiber fiber;
  uint3 index;
  State state;
  Site site;  // where it waits
  unsigned mask;
  uint64_t value;
  int source;
  uint64_t result;
};

// One kernel at a time, whichever thread of the operating system launches it.
std::mutex device_mutex;
std::vector<LaunchRecord> launches;
std::map<const void*, size_t> max_shared;
uint64_t order = 0;
unsigned grid_limit = 0;
int current_device = 0;
cudaError_t last_error = cudaSuccess;

std::vector<std::unique_ptr<Thread>> threads;
unsigned thread_count = 0;
unsigned at_block = 0;                        // threads that wait at a barrier
unsigned at_warp[kMaxThreads / kLanes] = {};  // lanes that wait for others of their warp
Thread* current = nullptr;
const Launch* current_launch = nullptr;
unsigned char* shared_memory = nullptr;
std::string problem;

std::string demangled(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "a kernel";
  int status = 0;
  char* name = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  const std::string text = status == 0 ? name : info.dli_sname;
  free(name);
  return text;
}

std::string text_of(const uint3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string text_of(const Site& site) {
  const std::string file = site.file;
  return std::string(site.what) + " at " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

bool same(const Site& x, const Site& y) {
  return x.line == y.line && strcmp(x.what, y.what) == 0 && strcmp(x.file, y.file) == 0;
}

std::string what_it_does(const Thread& t) {
  if (t.state == State::kLeft) return "left the kernel";
  if (t.state == State::kAtBlock) return "in " + text_of(t.site);
  char mask[16];
  snprintf(mask, sizeof(mask), "%08x", t.mask);
  return "in " + text_of(t.site) + " for the lanes " + mask;
}

// What the threads do, those that do the same together, with the first few of their numbers.
std::string roll_call() {
  constexpr int kNamedRuns = 4;
  struct Group {
    std::string runs;
    int run_count;
  };
  std::map<std::string, Group> groups;
  for (unsigned begin = 0, end; begin < thread_count; begin = end) {
    const std::string does = what_it_does(*threads[begin]);
    end = begin + 1;
    while (end < thread_count && what_it_does(*threads[end]) == does) ++end;
    Group& group = groups[does];
    if (++group.run_count > kNamedRuns + 1) continue;
    if (!group.runs.empty()) group.runs += ", ";
    group.runs += group.run_count > kNamedRuns ? "..." : std::to_string(begin);
    if (group.run_count <= kNamedRuns && end - begin > 1) group.runs += "-" + std::to_string(end - 1);
  }
  std::string text;
  for (const auto& [does, group] : groups) {
    text += (text.empty() ? "threads " : "; threads ") + group.runs + " " + does;
  }
  return text;
}

void run_threads(void*) {
  for (;;) {
    current_launch->run_thread(current_launch->bound);
    current->state = State::kLeft;
    Fiber::suspend();
  }
}

void resume(Thread& t) {
  current = &t;
  thread_index = t.index;
  t.fiber.resume();
  if (!problem.empty()) {
    throw std::runtime_error(demangled(current_launch->kernel) + ", block " + text_of(block_index) + ", thread " +
                             text_of(t.index) + ": " + problem);
  }
}

template <class I>
std::vector<I> in_order(I count) {
  std::vector<I> sequence(count);
  std::iota(sequence.begin(), sequence.end(), I{0});
  if (order == 1) std::reverse(sequence.begin(), sequence.end());
  return sequence;
}

// Runs those of the threads [begin, end) in `sequence` that can go on, each up to where it waits; false if none can.
bool run_once(std::vector<unsigned>& sequence, size_t begin, size_t end, std::mt19937_64& random) {
  bool any = false;
  if (order > 1) std::shuffle(sequence.begin() + begin, sequence.begin() + end, random);
  for (size_t i = begin; i < end; ++i) {
    if (threads[sequence[i]]->state != State::kReady) continue;
    any = true;
    resume(*threads[sequence[i]]);
  }
  return any;
}

// A warp gets as far as it can by itself before the next one runs, as far ahead of it as barriers let it.
bool run_warps(std::vector<unsigned>& sequence, std::mt19937_64& random) {
  bool any = false;
  std::vector<size_t> warps = in_order((sequence.size() + kLanes - 1) / kLanes);
  if (order > 1) std::shuffle(warps.begin(), warps.end(), random);
  for (const size_t w : warps) {
    while (run_once(sequence, w * kLanes, std::min((w + 1) * kLanes, sequence.size()), random)) any = true;
  }
  return any;
}

void run_block(std::vector<unsigned>& sequence, std::mt19937_64& random) {
  // Of exactly the bytes asked for, so that the sanitizer sees what goes beyond. All bits set is a NaN.
  const std::unique_ptr<unsigned char[]> shared(new unsigned char[current_launch->shared]);
  std::fill_n(shared.get(), current_launch->shared, static_cast<unsigned char>(0xff));
  shared_memory = shared.get();
  for (unsigned i = 0; i < thread_count; ++i) threads[i]->state = State::kReady;
  at_block = 0;
  std::fill(std::begin(at_warp), std::end(at_warp), 0u);
  const bool whole_warps = order < 2 || order % 2 == 0;
  while (whole_warps ? run_warps(sequence, random) : run_once(sequence, 0, sequence.size(), random)) {
  }
  const auto left = [](const std::unique_ptr<Thread>& t) { return t->state == State::kLeft; };
  if (std::all_of(threads.begin(), threads.begin() + thread_count, left)) return;
  throw std::runtime_error(demangled(current_launch->kernel) + ", block " + text_of(block_index) +
                           ": no thread can go on: " + roll_call());
}

void run_grid() {
  const dim3& b = current_launch->block;
  dim3 g = current_launch->grid;
  if (grid_limit != 0) g.x = std::min(g.x, grid_limit);
  block_size = b;
  grid_size = g;
  thread_count = b.x * b.y * b.z;
  while (threads.size() < thread_count) threads.push_back(std::make_unique<Thread>());
  for (unsigned i = 0; i < thread_count; ++i) {
    threads[i]->index = {i % b.x, i / b.x % b.y, i / (b.x * b.y)};
    threads[i]->fiber.start(&run_threads, nullptr);
  }
  std::mt19937_64 random(order);
  std::vector<unsigned> sequence(thread_count);
  std::iota(sequence.begin(), sequence.end(), 0u);
  if (order == 1) {
    for (unsigned first = 0; first < thread_count; first += kLanes) {
      std::reverse(sequence.begin() + first, sequence.begin() + std::min(first + kLanes, thread_count));
    }
  }
  std::vector<size_t> blocks = in_order(size_t{g.x} * g.y * g.z);
  if (order > 1) std::shuffle(blocks.begin(), blocks.end(), random);
  for (const size_t i : blocks) {
    block_index = {static_cast<unsigned>(i % g.x), static_cast<unsigned>(i / g.x % g.y),
                   static_cast<unsigned>(i / g.x / g.y)};
    run_block(sequence, random);
  }
}

cudaError_t failed(cudaError_t code) {
  if (code != cudaSuccess) last_error = code;
  return code;
}

cudaError_t check(const Launch& launch) {
  const dim3& b = launch.block;
  const dim3& g = launch.grid;
  if (b.x == 0 || b.y == 0 || b.z == 0 || g.x == 0 || g.y == 0 || g.z == 0) return cudaErrorInvalidConfiguration;
  if (b.x > kMaxThreads || b.y > kMaxThreads || b.z > 64 || size_t{b.x} * b.y * b.z > kMaxThreads) {
    return cudaErrorInvalidConfiguration;
  }
  if (g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) return cudaErrorInvalidConfiguration;
  const auto raised = max_shared.find(launch.kernel);
  const size_t limit = raised == max_shared.end() ? kDefaultShared : std::max(kDefaultShared, raised->second);
  return launch.shared > limit ? cudaErrorInvalidValue : cudaSuccess;
}

unsigned position(const Thread& t) { return t.index.x + block_size.x * (t.index.y + block_size.y * t.index.z); }

// The last thread to come to a barrier lets all go on, if all wait at the same one.
void arrive_at_block() {
  if (++at_block < thread_count) return;
  for (unsigned i = 0; i < thread_count; ++i) {
    if (!same(threads[i]->site, current->site)) return;
  }
  for (unsigned i = 0; i < thread_count; ++i) threads[i]->state = State::kReady;
  at_block = 0;
}

// The last lane of a mask lets all of them go on, if all wait at the same place for the same lanes.
template <class Finish>
void arrive_at_warp(const Finish& finish) {
  const unsigned first = position(*current) / kLanes * kLanes;
  unsigned& waiting = at_warp[first / kLanes];
  waiting |= 1u << (position(*current) - first);
  if ((waiting & current->mask) != current->mask) return;
  for (unsigned i = 0; i < kLanes; ++i) {
    if ((current->mask >> i & 1) == 0) continue;
    const Thread& t = *threads[first + i];
    if (t.mask != current->mask || !same(t.site, current->site)) return;
  }
  finish(first);
  for (unsigned i = 0; i < kLanes; ++i) {
    if (current->mask >> i & 1) threads[first + i]->state = State::kReady;
  }
  waiting &= ~current->mask;
}

void come_to_warp(const Site& site, unsigned mask) {
  current->state = State::kAtWarp;
  current->site = site;
  current->mask = mask;
  if ((mask >> lane() & 1) == 0) misuse(site, "the mask does not name the lane itself");
}

}  // namespace

void* dynamic_shared() { return shared_memory; }

void misuse(const Site& site, const char* text) {
  problem = text_of(site) + ": " + text;
  for (;;) Fiber::suspend();
}

void wait_for_block(const Site& site) {
  current->state = State::kAtBlock;
  current->site = site;
  arrive_at_block();
  if (current->state != State::kReady) Fiber::suspend();
}

uint64_t exchange(const Site& site, unsigned mask, uint64_t value, int source) {
  Thread& self = *current;
  come_to_warp(site, mask);
  if (source < 0 || source >= static_cast<int>(kLanes) || (mask >> source & 1) == 0) {
    misuse(site, "a lane takes the value of one that the mask does not name");
  }
  self.value = value;
  self.source = source;
  arrive_at_warp([&](unsigned first) {
    for (unsigned i = 0; i < kLanes; ++i) {
      if (mask >> i & 1) threads[first + i]->result = threads[first + threads[first + i]->source]->value;
    }
  });
  if (self.state != State::kReady) Fiber::suspend();
  return self.result;
}

unsigned vote(const Site& site, unsigned mask, bool flag) {
  Thread& self = *current;
  come_to_warp(site, mask);
  self.value = flag ? 1 : 0;
  arrive_at_warp([&](unsigned first) {
    unsigned set = 0;
    for (unsigned i = 0; i < kLanes; ++i) {
      if ((mask >> i & 1) != 0 && threads[first + i]->value != 0) set |= 1u << i;
    }
    for (unsigned i = 0; i < kLanes; ++i) {
      if (mask >> i & 1) threads[first + i]->result = set;
    }
  });
  if (self.state != State::kReady) Fiber::suspend();
  return static_cast<unsigned>(self.result);
}

cudaError_t set_max_shared(const void* kernel, int bytes) {
  const std::lock_guard<std::mutex> lock(device_mutex);
  if (bytes < 0 || static_cast<size_t>(bytes) > kMaxShared) return failed(cudaErrorInvalidValue);
  max_shared[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

cudaError_t launch(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(device_mutex);
  const cudaError_t code = check(launch);
  if (code != cudaSuccess) return failed(code);
  launches.push_back({demangled(launch.kernel), launch.grid, launch.block, launch.shared});
  current_launch = &launch;
  problem.clear();
  run_grid();
  return cudaSuccess;
}

void set_order(uint64_t wanted) {
  const std::lock_guard<std::mutex> lock(device_mutex);
  order = wanted;
}

void limit_grid(unsigned blocks) {
  const std::lock_guard<std::mutex> lock(device_mutex);
  grid_limit = blocks;
}

int device_now() { return current_device; }

std::vector<LaunchRecord> take_launches() {
  const std::lock_guard<std::mutex> lock(device_mutex);
  return std::exchange(launches, {});
}

}  // namespace cuda_on_cpu

using cuda_on_cpu::current_device;
using cuda_on_cpu::failed;
using cuda_on_cpu::kDevices;
using cuda_on_cpu::last_error;

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return failed(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char* cudaGetErrorName(cudaError_t code) {
  switch (code) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t code) {
  switch (code) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
  }
  return "unrecognized error code";
}
