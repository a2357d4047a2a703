/* The driver of programs: distributes images or units of work over threads, owns the arena. */
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#define LR_YIELD() SwitchToThread()
#else
#include <sched.h>
#define LR_YIELD() sched_yield()
#endif
#endif

#include "dispatch.h"

#define LR_SPINS 10000 /* looks at a barrier, some 10 us, before a thread yields its core to others */

/* A barrier that spins: a parallel step takes a few microseconds, a fork/join latency about 50.  It
 * does without PAUSE, which costs microseconds where a hypervisor traps it (ResNet-20 on two threads:
 * 600 us with it, 270 us without). */
typedef struct {
    int threads, arrived, round;
} barrier;

static void wait_for_all(barrier *b)
{
#ifdef _OPENMP
    const int round = __atomic_load_n(&b->round, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&b->arrived, 1, __ATOMIC_ACQ_REL) == b->threads) {
        __atomic_store_n(&b->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&b->round, round + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&b->round, __ATOMIC_ACQUIRE) == round;)
        if (++spins > LR_SPINS) LR_YIELD();
#else
    (void)b;
#endif
}

/* Run all steps for `images` images from `image` on; thread `me` of `team`, which share the arena. */
static void run_group(const lr_program *p, const lr_kernels *kernels, const lr_array *arrays, void *arena,
                      void *scratch, int64_t image, int64_t images, int me, int team, barrier *all,
                      double *seconds)
{
    for (int64_t i = 0; i < p->steps; i++) {
        const lr_step_range *step = p->step + i;
        const lr_op *op = p->op + step->op;
        const double start = seconds ? lr_now() : 0;
        int64_t begin = step->begin, end = step->end, from = step->from, to = step->to;
        const int64_t last = step->last < images ? step->last : images;
        if (step->first >= last) continue;
        const int shared = team > 1 && step->strand < 0;
        /* A strand's channels are those of one thread in every image: no barrier between images. */
        if (team > 1 && !shared && step->strand % team != me) continue;
        if (shared) {
            const int64_t units = end - begin;
            /* Splits repeat the input transforms of fast algorithms, and share few units evenly. */
            const int by_units = units >= LR_UNITS * team || units % team == 0 || to - from < team;
            if (by_units) {
                end = begin + units * (me + 1) / team;
                begin += units * me / team;
            } else {
                const int64_t splits = to - from;
                to = from + splits * (me + 1) / team;
                from += splits * me / team;
            }
        }
        if (begin < end)
            kernels->run_op(op, arrays, arena, scratch, image, step->first, last, begin, end, from, to);
        if (shared) wait_for_all(all);
        if (seconds) seconds[step->op] += lr_now() - start;
    }
}

int lr_run_program(const lr_program *p, const lr_kernels *kernels, const lr_array *arrays, int64_t batch,
                   int64_t itemsize, int threads, void **cache, double *seconds, int *used)
{
    if (batch <= 0) return LR_OK;
    if (threads < 1 || threads > lr_max_threads()) threads = lr_max_threads();
    /* Fork only if the predicted saving exceeds the fork/join latency. */
    if (threads > 1 && p->seconds * (double)batch * (threads - 1) / threads < p->fork_join) threads = 1;
    *used = threads;
    const int distributed = batch >= threads;
    const size_t head = 64;
    if (p->arena > INT64_MAX / itemsize - 64) return LR_NO_MEMORY;
    const size_t arena = (size_t)(p->arena * itemsize + 63) / 64 * 64;
    const size_t scratch = (size_t)(p->scratch * itemsize + 63) / 64 * 64;
    /* A program keeps the memory of its last call; concurrent calls allocate another.  The first
     * words are its size and the number of its arenas, whose halos hold zeros; scratch follows. */
    char *memory = __atomic_exchange_n(cache, NULL, __ATOMIC_ACQ_REL);
    const size_t wanted = distributed ? (size_t)threads : 1, held = memory ? ((size_t *)memory)[1] : 0;
    const size_t slots = held > wanted ? held : wanted;
    if (arena > (SIZE_MAX / 2 - scratch * (size_t)threads) / slots) {
        lr_free(memory);
        return LR_NO_MEMORY;
    }
    const size_t size = head + arena * slots + scratch * (size_t)threads;
    if (memory && (((size_t *)memory)[0] < size || held < slots)) {
        lr_free(memory);
        memory = NULL;
    }
    if (!memory) {
        memory = lr_allocate((size + 63) / 64 * 64);
        if (!memory) return LR_NO_MEMORY;
        memset(memory, 0, size);
        ((size_t *)memory)[0] = size, ((size_t *)memory)[1] = slots;
    }
    char *const arenas = memory + head, *const scratches = arenas + arena * slots;
    if (threads == 1) {
        for (int64_t i = 0; i < batch; i += p->group)
            run_group(p, kernels, arrays, arenas, scratches, i, batch - i < p->group ? batch - i : p->group, 0, 1,
                      NULL, seconds);
        lr_free(__atomic_exchange_n(cache, memory, __ATOMIC_ACQ_REL));
        return LR_OK;
    }
#ifdef _OPENMP
    barrier all = {0, 0, 0};
    int64_t next = 0;
    const int64_t alone = batch / threads * threads; /* images that single threads take */
    int64_t group = alone / threads < p->group ? alone / threads : p->group;
    if (group < 1) group = 1;
#pragma omp parallel num_threads(threads)
    {
        const int me = omp_get_thread_num(), team = omp_get_num_threads();
        char *own = scratches + scratch * (size_t)me;
        double *times = seconds ? seconds + me * p->ops : NULL;
#pragma omp single
        all.threads = team; /* perhaps fewer than asked for */
        for (;;) {
            const int64_t i = __atomic_fetch_add(&next, group, __ATOMIC_RELAXED);
            if (i >= alone) break;
            run_group(p, kernels, arrays, arenas + arena * (size_t)me, own, i, alone - i < group ? alone - i : group,
                      0, 1, NULL, times);
        }
#pragma omp barrier
        for (int64_t i = alone; i < batch; i++)
            run_group(p, kernels, arrays, arenas, own, i, 1, me, team, &all, times);
    }
#endif
    lr_free(__atomic_exchange_n(cache, memory, __ATOMIC_ACQ_REL));
    return LR_OK;
}
