// Fibres: functions with a stack of their own that run until they hand over to another.
// A switch is a dozen instructions on x86-64, and ucontext elsewhere.

#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "language.h"

#if !defined(__x86_64__)
#define CUDA_EMULATOR_UCONTEXT
#endif
#ifdef CUDA_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

#ifdef CUDA_EMULATOR_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef CUDA_EMULATOR_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
// The emulator's own data are shared by fibres that nothing orders in TSan's eyes, and
// are not what it is to look at. Not inlined: the caller's setting would win.
#define CUDA_EMULATOR_UNWATCHED __attribute__((no_sanitize("thread"), noinline))
#else
#define CUDA_EMULATOR_UNWATCHED
#endif

namespace cuda_emulator {

// Tell TSan that whatever precedes Release(x) happens before what follows Acquire(x).
inline void Acquire([[maybe_unused]] void* x) {
#ifdef CUDA_EMULATOR_TSAN
  __tsan_acquire(x);
#endif
}
inline void Release([[maybe_unused]] void* x) {
#ifdef CUDA_EMULATOR_TSAN
  __tsan_release(x);
#endif
}

// While there is one, TSan looks at nothing that the fibre does, library code included.
class Unwatched {
 public:
#ifdef CUDA_EMULATOR_TSAN
  Unwatched() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unwatched() {}
  ~Unwatched() {}
#endif
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

#ifdef CUDA_EMULATOR_UCONTEXT

using Context = ucontext_t;

inline void SwitchContext(Context* from, Context* to) { swapcontext(from, to); }

inline void PrepareContext(Context* context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}

#else

using Context = void*;  // the stack pointer, with the registers to restore on the stack

// The registers that a function must preserve are all that the caller relies on. The
// optimizer must not look inside, nor conclude that memory stays as it is.
#ifdef __clang__
__attribute__((naked, noinline))
#else
__attribute__((naked, noinline, noipa))
#endif
CUDA_EMULATOR_UNWATCHED inline void SwitchContext(Context*, Context*) {
  asm volatile(
      "pushq %%rbp\n pushq %%rbx\n pushq %%r12\n pushq %%r13\n pushq %%r14\n pushq "
      "%%r15\n"
      "movq %%rsp, (%%rdi)\n"
      "movq (%%rsi), %%rsp\n"
      "popq %%r15\n popq %%r14\n popq %%r13\n popq %%r12\n popq %%rbx\n popq %%rbp\n"
      "ret\n" ::
          : "memory");
}

inline void PrepareContext(Context* context, char* stack, size_t bytes, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  // As after a call: the stack pointer is 8 bytes below a multiple of 16. Above it, zeros
  // for whoever walks the stack.
  void** top = reinterpret_cast<void**>(stack + bytes) - 3;
  *--top = reinterpret_cast<void*>(entry);
  *context = top - kSavedRegisters;
}

#endif

// A fibre, or the thread's own stack while fibres run on top of it.
struct Fiber {
  Context context{};
  char* stack = nullptr;
  size_t stack_bytes = 0;
  void* asan_stack = nullptr;  // its frames that ASan keeps elsewhere
  void* tsan_fiber = nullptr;
};

// Leaves `from` for `to`, and returns when something switches back. A fibre that ends
// says so, for ASan to free what it keeps.
CUDA_EMULATOR_UNWATCHED inline void SwitchFiber(Fiber* from, Fiber* to,
                                                [[maybe_unused]] bool ends = false) {
#ifdef CUDA_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(ends ? nullptr : &from->asan_stack, to->stack,
                                 to->stack_bytes);
#endif
#ifdef CUDA_EMULATOR_TSAN
  constexpr unsigned kNoSynchronization = 1;
  __tsan_switch_to_fiber(to->tsan_fiber, kNoSynchronization);
#endif
  SwitchContext(&from->context, &to->context);
#ifdef CUDA_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(from->asan_stack, nullptr, nullptr);
#endif
}

// The first thing that a fibre does. ASan learns where the stack below it lies.
inline void EnterFiber([[maybe_unused]] Fiber* below) {
#ifdef CUDA_EMULATOR_ASAN
  const void* stack = nullptr;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &below->stack_bytes);
  below->stack = static_cast<char*>(const_cast<void*>(stack));
#endif
}

// Stacks for so many fibres, each with a page below it that faults.
class Stacks {
 public:
  static constexpr size_t kBytes = size_t{256} << 10;

  explicit Stacks(unsigned count) : bytes_(count * kBytes) {
    memory_ =
        static_cast<char*>(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    for (unsigned i = 0; i < count; ++i) mprotect(Get(i) - kGuard, kGuard, PROT_NONE);
  }
  ~Stacks() { munmap(memory_, bytes_); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  static size_t Usable() { return kBytes - kGuard; }
  char* Get(unsigned i) { return memory_ + i * kBytes + kGuard; }

 private:
  static inline const size_t kGuard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  char* memory_;
  size_t bytes_;
};

}  // namespace cuda_emulator
