#include "fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_ON_CPU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_ON_CPU_ASAN 1
#endif
#endif

#ifdef CUDA_ON_CPU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// ucontext serves every machine with POSIX, but every switch is a system call, and a block switches a thousand times.
#if !defined(__x86_64__) || defined(CUDA_ON_CPU_UCONTEXT)
#define CUDA_ON_CPU_PORTABLE 1
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

namespace {

#ifdef CUDA_ON_CPU_ASAN
constexpr size_t kStackBytes = 512 * 1024;
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif

Fiber* running = nullptr;

}  // namespace

#ifdef CUDA_ON_CPU_PORTABLE

struct Fiber::Context {
  ucontext_t own;
};

namespace {

ucontext_t outside;

}  // namespace

#else

// Pushes what the calling convention has a function keep, leaves the stack in *from, and goes on with `to`.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
  .text
  .globl cuda_on_cpu_switch
  .hidden cuda_on_cpu_switch
  .type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");

struct Fiber::Context {
  void* own;
};

namespace {

void* outside = nullptr;

}  // namespace

#endif

#ifdef CUDA_ON_CPU_ASAN

namespace {

const void* outside_stack = nullptr;
size_t outside_bytes = 0;

}  // namespace

#endif

Fiber::~Fiber() {
  delete context_;
  if (memory_ != nullptr) munmap(memory_, static_cast<size_t>(stack_ - memory_) + kStackBytes);
}

void Fiber::make_stack() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory =
      mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, page, PROT_NONE);
  memory_ = static_cast<char*>(memory);
  stack_ = memory_ + page;
  context_ = new Context;
}

void Fiber::enter() {
#ifdef CUDA_ON_CPU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &outside_stack, &outside_bytes);
#endif
  running->body_(running->argument_);
}

void Fiber::start(void (*body)(void*), void* argument) {
  if (memory_ == nullptr) make_stack();
  body_ = body;
  argument_ = argument;
  fake_stack_ = nullptr;
#ifdef CUDA_ON_CPU_ASAN
  __asan_unpoison_memory_region(stack_, kStackBytes);
#endif
#ifdef CUDA_ON_CPU_PORTABLE
  getcontext(&context_->own);
  context_->own.uc_stack.ss_sp = stack_;
  context_->own.uc_stack.ss_size = kStackBytes;
  context_->own.uc_link = nullptr;
  makecontext(&context_->own, &Fiber::enter, 0);
#else
  // Stacks that begin at like addresses would share a few sets of the cache.
  const uintptr_t colour = reinterpret_cast<uintptr_t>(stack_) / kStackBytes % 32 * 128;
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack_) + kStackBytes - colour) & ~uintptr_t{15};
  void** slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;  // where enter() would return to
  *--slot = reinterpret_cast<void*>(&Fiber::enter);
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
  context_->own = slot;
#endif
}

void Fiber::resume() {
  running = this;
#ifdef CUDA_ON_CPU_ASAN
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, stack_, kStackBytes);
#endif
#ifdef CUDA_ON_CPU_PORTABLE
  swapcontext(&outside, &context_->own);
#else
  cuda_on_cpu_switch(&outside, context_->own);
#endif
#ifdef CUDA_ON_CPU_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
  Fiber* self = running;
#ifdef CUDA_ON_CPU_ASAN
  __sanitizer_start_switch_fiber(&self->fake_stack_, outside_stack, outside_bytes);
#endif
#ifdef CUDA_ON_CPU_PORTABLE
  swapcontext(&self->context_->own, &outside);
#else
  cuda_on_cpu_switch(&self->context_->own, outside);
#endif
#ifdef CUDA_ON_CPU_ASAN
  __sanitizer_finish_switch_fiber(self->fake_stack_, &outside_stack, &outside_bytes);
#endif
}

}  // namespace cuda_on_cpu
