/* GPU emulation that runs kernels.cu on the CPU, with checks that no GPU makes.
 *
 * A thread of a block is a fiber: it runs until it waits at a barrier, then the next one runs.  Blocks
 * run one after another.  Votes and products of tensor cores wait for the other threads of their warp.
 * Errors are barriers that not all threads of a block or warp reach, accesses outside arrays (each ends
 * at a protected page) and undefined behaviour (which traps).  Shared memory is
 * filled with NaN before every block, and the order of threads is reversed at every barrier, so that
 * missing barriers change results.
 */
#pragma once

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <sys/mman.h>
#include <type_traits>
#include <ucontext.h>
#include <unistd.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static /* in .bss, alone there: the whole section is filled before a block */
#define __align__(n) alignas(n)
#define __syncthreads() lr_shim::barrier(__LINE__, false)
#define __all_sync(mask, is_true) lr_shim::all_of_warp(is_true)
#define LR_SHARED(S) S *const shared = (S *)lr_shim::dynamic

#define LR_KEPT __attribute__((section(".data"))) static
extern "C" __attribute__((visibility("hidden"))) char __bss_start[], _end[]; /* .bss of this library */

struct lr_three { unsigned x, y, z; };
LR_KEPT lr_three threadIdx, blockIdx, blockDim, gridDim;

namespace lr_shim {

struct fiber {
    ucontext_t context;
    std::vector<char> stack;
    lr_three thread;
    int line;        /* line of the barrier where it waits, or 0 */
    bool is_of_warp; /* the barrier waits for its warp only */
    unsigned number() const { return thread.x; } /* blocks have one axis */
};

LR_KEPT std::deque<fiber> fibers;          /* stacks are reused */
LR_KEPT std::vector<fiber *> idle, waiting;
LR_KEPT fiber *current;
LR_KEPT ucontext_t scheduler;
LR_KEPT std::function<void()> body;        /* the kernel with its arguments */
LR_KEPT unsigned next, threads;            /* next thread to start, and number of threads of the block */
constexpr unsigned WARP = 32, MOST_THREADS = 1024;
LR_KEPT unsigned shown[MOST_THREADS][6];   /* what a thread shows to its warp */
LR_KEPT char *dynamic;
LR_KEPT char message[200];
LR_KEPT sigjmp_buf fault;

/* Run threads in one fiber until one waits: without barriers, one fiber runs the whole block. */
static void run_threads()
{
    for (;;) {
        while (next < threads) {
            const unsigned t = next++;
            current->thread = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
            threadIdx = current->thread;
            body();
        }
        current->line = 0;
        swapcontext(&current->context, &scheduler);
    }
}

[[maybe_unused]] static void barrier(int line, bool is_of_warp)
{
    fiber *const me = current;
    me->line = line, me->is_of_warp = is_of_warp;
    swapcontext(&me->context, &scheduler);
    threadIdx = me->thread;
}

static const unsigned (*warp())[6] { return shown + threadIdx.x / WARP * WARP; }

[[maybe_unused]] static int all_of_warp(int is_true)
{
    shown[threadIdx.x][0] = is_true;
    barrier(__LINE__, true);
    bool all = true;
    for (unsigned i = 0; i < WARP && threadIdx.x / WARP * WARP + i < threads; i++) all &= warp()[i][0] != 0;
    barrier(__LINE__, true);
    return all;
}

static void resume(fiber *f)
{
    current = f;
    swapcontext(&scheduler, &f->context);
    (f->line ? waiting : idle).push_back(f);
}

static void make(fiber *f)
{
    f->stack.resize(64 << 10);
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack.data();
    f->context.uc_stack.ss_size = f->stack.size();
    makecontext(&f->context, run_threads, 0);
    idle.push_back(f);
}

static fiber *unused()
{
    if (idle.empty()) make(&fibers.emplace_back());
    fiber *const f = idle.back();
    idle.pop_back();
    return f;
}

/* Resume the warps that wait at one of their own barriers, in reverse order; return whether any did. */
static bool resume_warps()
{
    std::vector<std::vector<fiber *>> warps((threads + WARP - 1) / WARP);
    for (fiber *f : waiting)
        if (f->is_of_warp) warps[f->number() / WARP].push_back(f);
    bool any = false;
    for (unsigned w = (unsigned)warps.size(); w-- > 0;) {
        std::vector<fiber *> &all = warps[w];
        bool same = all.size() == std::min(WARP, threads - w * WARP);
        for (const fiber *f : all) same &= f->line == all[0]->line;
        if (!same || all.empty()) continue;
        any = true;
        waiting.erase(std::remove_if(waiting.begin(), waiting.end(), [&](fiber *f) {
            return std::find(all.begin(), all.end(), f) != all.end();
        }), waiting.end());
        std::reverse(all.begin(), all.end());
        for (fiber *f : all) resume(f);
    }
    return any;
}

static bool run_block()
{
    waiting.clear();
    for (next = 0; next < threads;) resume(unused());
    while (!waiting.empty()) {
        if (resume_warps()) continue;
        const std::vector<fiber *> all(waiting.rbegin(), waiting.rend()); /* in reverse order */
        for (const fiber *f : all)
            if (all.size() != threads || f->line != all[0]->line || f->is_of_warp) {
                snprintf(message, sizeof message, "%zu of %u threads of block %u wait at a barrier, in "
                         "lines %d to %d", all.size(), threads, blockIdx.x, f->line, all[0]->line);
                return false;
            }
        waiting.clear();
        for (fiber *f : all) resume(f);
    }
    return true;
}

static void failed(int signal, siginfo_t *info, void *)
{
    snprintf(message, sizeof message, "%s at %p, thread %u of block %u",
             signal == SIGILL ? "undefined behaviour" : "access outside of memory", info->si_addr,
             threadIdx.x, blockIdx.x);
    siglongjmp(fault, 1);
}

/* Memory aligned to 16 bytes that ends (but for the alignment) at a protected page. */
struct guarded {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), size, room;
    char *all, *begin;
    explicit guarded(size_t n) : size(n), room((n + 16 + 2 * page - 1) / page * page)
    {
        all = (char *)mmap(0, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        mprotect(all + room - page, page, PROT_NONE);
        begin = all + room - page - (n + 15) / 16 * 16;
        memset(all, 0xcd, room - page);
    }
    bool is_intact() const /* nothing was written beside it */
    {
        for (const char *p = all; p < all + room - page; p++)
            if ((p < begin || p >= begin + size) && *p != (char)0xcd) return false;
        return true;
    }
    ~guarded() { munmap(all, room); }
};

static bool run_grid(size_t shared)
{
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) {
                memset(dynamic, 0xff, shared);
                memset(__bss_start, 0xff, (size_t)(_end - __bss_start));
                if (!run_block()) return false;
            }
    return true;
}

static const char *run(const unsigned *grid, const unsigned *block, size_t shared)
{
    const guarded memory(shared);
    struct sigaction action = {}, before[3];
    const int signals[3] = {SIGSEGV, SIGBUS, SIGILL};
    action.sa_sigaction = failed;
    action.sa_flags = SA_SIGINFO;
    gridDim = {grid[0], grid[1], grid[2]}, blockDim = {block[0], block[1], block[2]};
    threads = block[0] * block[1] * block[2], dynamic = memory.begin, message[0] = 0;
    for (int i = 0; i < 3; i++) sigaction(signals[i], &action, &before[i]);
    const bool done = !sigsetjmp(fault, 1) && run_grid(shared);
    for (int i = 0; i < 3; i++) sigaction(signals[i], &before[i], 0);
    if (!done) idle.clear(), fibers.clear(); /* some stopped within a kernel */
    if (done && !memory.is_intact()) snprintf(message, sizeof message, "write beside the shared memory");
    return message[0] ? message : 0;
}

/* Kind of a parameter or of the elements that it points to, for checks of arguments. */
template <class T> constexpr char kind()
{
    typedef std::remove_cv_t<std::remove_pointer_t<T>> to;
    return std::is_same_v<to, int> ? 'i' : std::is_same_v<to, long long> ? 'l' :
           std::is_same_v<to, float> ? 'f' : std::is_same_v<to, double> ? 'd' :
           std::is_same_v<to, unsigned char> ? 'b' : sizeof(to) == 2 ? 'h' : '?';
}

template <class... A, size_t... I>
const char *launch(void (*kernel)(A...), const unsigned *grid, const unsigned *block, size_t shared,
                   void **args, std::index_sequence<I...>)
{
    body = [=] { kernel(*(A *)args[I]...); };
    return run(grid, block, shared);
}

} // namespace lr_shim

/* Launch a kernel with pointers to its arguments; return an error message, or 0. */
template <class... A>
const char *lr_launch(void (*kernel)(A...), const unsigned *grid, const unsigned *block, size_t shared,
                      void **args)
{
    return lr_shim::launch(kernel, grid, block, shared, args, std::index_sequence_for<A...>());
}

/* Write two letters per parameter: p for a pointer or v for a value, then its kind. */
template <class... A> void lr_signature(void (*)(A...), char *to)
{
    ((*to++ = std::is_pointer_v<A> ? 'p' : 'v', *to++ = lr_shim::kind<A>()), ...);
    *to = 0;
}

template <class To, class From> To lr_bits(From v)
{
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &v, sizeof to);
    return to;
}

inline float __uint_as_float(unsigned v) { return lr_bits<float>(v); }
inline unsigned __float_as_uint(float v) { return lr_bits<unsigned>(v); }
inline float lr_half_to_float(unsigned short v) { return (float)lr_bits<_Float16>(v); }
inline unsigned short lr_float_to_half(float v) { return lr_bits<unsigned short>((_Float16)v); }

/* Return number `i` of a register of a tensor core: two halves, two bfloat16, or one TF32. */
inline float lr_element(const char *types, unsigned v, int i)
{
    if (types[0] == 't') return __uint_as_float(v & ~0x1fffu);
    const unsigned short half = (unsigned short)(v >> 16 * i);
    return types[0] == 'b' ? __uint_as_float((unsigned)half << 16) : lr_half_to_float(half);
}

/* mma.sync of 16 x 8 sums per warp, PTX ISA 9.7.15.5: lane 4 g + t holds of A, in registers 0 to 3, the rows
 * g and g + 8, first of the columns of pair or number t, then of those of t + 4; of B the rows of t and t + 4
 * in column g; of C the columns 2 t and 2 t + 1 of row g, then of row g + 8. */
inline void lr_multiply(const char *types, float (&c)[4], const unsigned (&left)[4], unsigned b0, unsigned b1)
{
    const unsigned mine[6] = {left[0], left[1], left[2], left[3], b0, b1};
    const unsigned lane = threadIdx.x % lr_shim::WARP, g = lane / 4, t = lane % 4;
    const int pair = types[0] == 't' ? 1 : 2;
    memcpy(lr_shim::shown[threadIdx.x], mine, sizeof mine);
    lr_shim::barrier(__LINE__, true);
    for (unsigned i = 0; i < 4; i++)
        for (unsigned k = 0; k < 8; k++)
            for (int e = 0; e < pair; e++) {
                const unsigned *const a = lr_shim::warp()[4 * g + k % 4];
                const unsigned *const b = lr_shim::warp()[4 * (2 * t + i % 2) + k % 4];
                c[i] += lr_element(types, a[i / 2 + k / 4 * 2], e) * lr_element(types, b[4 + k / 4], e);
            }
    lr_shim::barrier(__LINE__, true);
}
