// Stacks of their own that one thread of the operating system switches between.
#pragma once

#include <cstddef>

namespace cuda_on_cpu {

class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Has the next resume() call body(argument), which never returns: it calls suspend(). Whatever the fiber was in the
  // middle of is forgotten.
  void start(void (*body)(void*), void* argument);

  // From outside of all fibers: runs this one until it suspends.
  void resume();

  // From inside of the running fiber: goes back to resume()'s caller.
  static void suspend();

 private:
  struct Context;
  static void enter();
  void make_stack();

  Context* context_ = nullptr;
  char* memory_ = nullptr;  // a guard page, then the stack
  char* stack_ = nullptr;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

}  // namespace cuda_on_cpu
