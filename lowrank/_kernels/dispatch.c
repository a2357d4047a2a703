/* The driver: detects instruction sets and caches, distributes tiles over threads, owns the workspace.
 *
 * Only this file uses OpenMP and allocates.
 */
#if defined(__linux__)
#define _GNU_SOURCE
#endif
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <malloc.h>
#include <windows.h>
#else
#include <time.h>
#include <unistd.h>
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#ifndef _WIN32
#include <pthread.h>
#endif
#endif

#include "dispatch.h"

#define LR_BAND_WINDOWS 4 /* windows of a band of a box filter, at least: 1/4 of its sums are repeated */
#define LR_BAND_ROWS 16   /* rows of a band without sums down, at least: a vector of lines */

extern const lr_isa lr_baseline;
#ifdef LR_HAVE_AVX2
extern const lr_isa lr_avx2;
#endif
#ifdef LR_HAVE_AVX512
extern const lr_isa lr_avx512;
#endif

typedef struct {
    const char *name;
    const lr_isa *table;
} entry;

/* List the instruction sets of this CPU, best first; return their number. */
static int supported(entry *found)
{
    int n = 0;
#ifdef LR_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        found[n++] = (entry){"avx512", &lr_avx512};
#endif
#ifdef LR_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        found[n++] = (entry){"avx2", &lr_avx2};
#endif
    found[n++] = (entry){"baseline", &lr_baseline};
    return n;
}

int lr_isa_count(void)
{
    entry found[3];
    return supported(found);
}

const char *lr_isa_name(int i)
{
    entry found[3];
    supported(found);
    return found[i].name;
}

const lr_isa *lr_isa_table(int i)
{
    entry found[3];
    supported(found);
    return found[i].table;
}

/* Bytes of the first core's L3 cache according to Linux, or 0.  In a virtual machine, sysconf sums
 * all L3 caches of the host. */
static int64_t shared_cache(void)
{
    long kib = 0;
#ifdef __linux__
    FILE *file = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r");
    if (file) {
        if (fscanf(file, "%ldK", &kib) != 1) kib = 0;
        fclose(file);
    }
#endif
    return (int64_t)kib << 10;
}

void lr_caches(int64_t sizes[3])
{
    static const int64_t usual[3] = {32 << 10, 1 << 20, 32 << 20};
    static int64_t known[3]; /* a race only queries twice */
    if (!known[0]) {
        for (int i = 0; i < 3; i++) sizes[i] = 0;
        sizes[2] = shared_cache();
#ifdef __APPLE__
        static const char *const names[3] = {"hw.l1dcachesize", "hw.l2cachesize", "hw.l3cachesize"};
        for (int i = 0; i < 3; i++) {
            size_t bytes = sizeof sizes[i]; /* a missing one, such as an L3 cache, leaves 0 */
            sysctlbyname(names[i], &sizes[i], &bytes, NULL, 0);
        }
#endif
#if defined(_SC_LEVEL1_DCACHE_SIZE) && defined(_SC_LEVEL2_CACHE_SIZE) && defined(_SC_LEVEL3_CACHE_SIZE)
        sizes[0] = sysconf(_SC_LEVEL1_DCACHE_SIZE);
        sizes[1] = sysconf(_SC_LEVEL2_CACHE_SIZE);
        if (sizes[2] <= 0) sizes[2] = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
        for (int i = 2; i >= 0; i--) known[i] = sizes[i] > 0 ? sizes[i] : usual[i];
    }
    for (int i = 0; i < 3; i++) sizes[i] = known[i];
}

#if defined(_OPENMP) && !defined(_WIN32) /* Windows does not fork */
/* GNU's OpenMP hangs in a forked child if its parent ran a parallel region, of this library or of
 * any other that shares the runtime, such as PyTorch: forked children run serially. */
static int is_forked_child;
static void in_child(void) { is_forked_child = 1; }

/* Whether this process was forked and has not called exec since, if Linux tells. */
static int was_forked(void)
{
    unsigned flags = 0;
#ifdef __linux__
    char line[1024];
    FILE *file = fopen("/proc/self/stat", "r");
    if (file) {
        line[fread(line, 1, sizeof line - 1, file)] = 0;
        fclose(file);
        const char *end = strrchr(line, ')'); /* of the name, which may contain anything */
        if (end && sscanf(end + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) != 1) flags = 0;
    }
#endif
    return (flags & 0x40) != 0; /* PF_FORKNOEXEC of include/linux/sched.h */
}
#else
enum { is_forked_child = 0 };
#endif

int lr_guard_forks(void)
{
#if defined(_OPENMP) && !defined(_WIN32)
    is_forked_child = was_forked();
    return pthread_atfork(NULL, NULL, in_child);
#else
    return 0;
#endif
}

int lr_limits(const lr_kernels *kernels, int64_t *limits)
{
    limits[0] = kernels->limits.lanes, limits[1] = kernels->vectors;
    for (int i = 1; i <= kernels->vectors; i++) limits[1 + i] = kernels->pixels[i];
    return (int)(2 + kernels->vectors);
}

int64_t lr_scratch(const lr_op *op, const lr_kernels *kernels) { return kernels->scratch(op); }

int lr_max_threads(void)
{
#ifdef _OPENMP
    return is_forked_child ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}

double lr_now(void)
{
#ifdef _WIN32
    LARGE_INTEGER ticks, per_second;
    QueryPerformanceCounter(&ticks);
    QueryPerformanceFrequency(&per_second);
    return (double)ticks.QuadPart / (double)per_second.QuadPart;
#else
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
#endif
}

void *lr_allocate(size_t size)
{
#ifdef _WIN32
    return _aligned_malloc(size, 64);
#else
    return aligned_alloc(64, size);
#endif
}

void lr_free(void *memory)
{
#ifdef _WIN32
    _aligned_free(memory);
#else
    free(memory);
#endif
}

/* Median fork/join latency of a parallel region, in seconds: for calibration, which stores it.  Work
 * before each fork lets the pool's threads fall asleep, as between calls, since spinning threads
 * respond at once: about 50 us where idle threads sleep (OMP_WAIT_POLICY=passive), 1 us where they
 * spin. */
double lr_fork_join(int threads)
{
#ifdef _OPENMP
    enum { WARM_UP = 5, FORKS = 101 };
    const double pause = 1e-4; /* seconds of work before each fork */
    double times[FORKS];
    for (int i = -WARM_UP; i < FORKS; i++) {
        int joined = 0;
        double start = omp_get_wtime();
        for (const double until = start + pause; start < until;) start = omp_get_wtime();
#pragma omp parallel num_threads(threads) reduction(+ : joined)
        joined += 1;
        const double seconds = joined ? omp_get_wtime() - start : 0;
        int at = i; /* sorted; the first rounds create the threads */
        for (; at > 0 && times[at - 1] > seconds; at--) times[at] = times[at - 1];
        if (i >= 0) times[at] = seconds;
    }
    return times[FORKS / 2];
#else
    (void)threads;
    return 0;
#endif
}

/* Whether out is too large to stay in the L3 cache until it is read. */
static int exceeds_cache(const lr_plan *plan, int64_t batch, int64_t itemsize)
{
    int64_t sizes[3];
    lr_caches(sizes);
    return 2 * batch * plan->outputs * itemsize >= sizes[2];
}

int lr_run(const lr_plan *plan, const lr_kernels *kernels, lr_arrays *arrays, int64_t batch,
           int64_t itemsize, int threads, void **cache, lr_step *steps, int *used)
{
    const int64_t tiles = plan->tiles[0] * plan->tiles[1] * plan->tiles[2];
    const int64_t tasks_per_image = tiles * plan->splits, tasks = batch * tasks_per_image;
    if (tasks == 0) return LR_OK;
    if (threads < 1 || threads > lr_max_threads()) threads = lr_max_threads();
    if (threads > tasks) threads = (int)tasks;
#ifdef _OPENMP
    if (threads > 1) {
        /* Fork only if the predicted saving exceeds the fork/join latency. */
        if (plan->seconds * (double)batch * (threads - 1) / threads < plan->fork_join) threads = 1;
    }
#endif
    arrays->now = steps ? lr_now : NULL;
    arrays->stream = exceeds_cache(plan, batch, itemsize);
    /* A plan keeps the workspace of its last call; concurrent calls allocate another.  The first word
     * is its size. */
    const size_t head = 64;
    const int64_t elements = 2 * plan->workspace + (arrays->out_type == LR_PLAN_TYPE ? 0 : plan->result);
    const size_t each = (size_t)(elements * itemsize + 63) / 64 * 64;
    char *work = __atomic_exchange_n(cache, NULL, __ATOMIC_ACQ_REL);
    if (work && *(size_t *)work < each * (size_t)threads) {
        lr_free(work);
        work = NULL;
    }
    if (!work) {
        size_t size = head + each * (size_t)threads;
        if (each > (SIZE_MAX - head) / (size_t)threads) return LR_NO_MEMORY;
        work = lr_allocate((size + 63) / 64 * 64);
        if (!work) return LR_NO_MEMORY;
        memset(work, 0, size); /* no denormals in results that are computed and discarded */
        *(size_t *)work = each * (size_t)threads;
    }
    char *slices = work + head;
    *used = threads;
#ifdef _OPENMP
    if (threads > 1) {
        const int64_t kinds = plan->stages * LR_STEPS + 1;
        /* Neighbouring tiles share input rows, so a thread takes several; 8 chunks per thread balance. */
        const int64_t chunk = tasks / (8 * threads) > 1 ? tasks / (8 * threads) : 1;
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads)
        for (int64_t j = 0; j < tasks; j++)
            kernels->tile(plan, arrays, j / tasks_per_image, j % tasks_per_image / plan->splits,
                          j % plan->splits, slices + each * (size_t)omp_get_thread_num(),
                          steps ? steps + kinds * omp_get_thread_num() : NULL);
    } else
#endif
        for (int64_t j = 0; j < tasks; j++)
            kernels->tile(plan, arrays, j / tasks_per_image, j % tasks_per_image / plan->splits,
                          j % plan->splits, slices, steps);
    lr_free(__atomic_exchange_n(cache, work, __ATOMIC_ACQ_REL));
    return LR_OK;
}

/* Workspace of the calling thread. */
static char *slice(char *work, size_t each, int threads)
{
#ifdef _OPENMP
    return threads > 1 ? work + each * (size_t)omp_get_thread_num() : work;
#else
    (void)each, (void)threads;
    return work;
#endif
}

/* Workspaces of all threads, or NULL. */
static char *workspaces(int64_t bytes, int threads, size_t *each)
{
    *each = (size_t)(bytes + 63) / 64 * 64;
    return *each > SIZE_MAX / (size_t)threads ? NULL : lr_allocate(*each * (size_t)threads);
}

/* Threads for tasks that take `seconds` on one, as many as save more than a fork takes. */
static int worthwhile(int threads, int64_t tasks, double seconds, double fork_join)
{
    if (threads < 1 || threads > lr_max_threads()) threads = lr_max_threads();
    if (threads > tasks) threads = (int)tasks;
    return threads > 1 && seconds * (threads - 1) / threads >= fork_join ? threads : 1;
}

/* Seconds per byte of samples and tap, about: they decide on threads.  Loading and storing takes as
 * long as 8 taps. */
#define LR_SECONDS_PER_TAP 6e-12

static int64_t size_of(int type, int64_t itemsize)
{
    return type == LR_PLAN_TYPE ? itemsize : type == LR_U8 || type == LR_I8 ? 1 : 2;
}

/* Filter a band of rows; the last one ends with the image, and does not write what others do. */
static int band(const lr_image *image, const lr_kernels *kernels, const char *x, char *out, int64_t number,
                void *scratch)
{
    const int64_t lanes = kernels->limits.lanes, start = number * lanes;
    const int64_t first = start + lanes <= image->rows ? start : image->rows - lanes;
    return kernels->image_band(image, x, out, first, start - first, scratch);
}

int lr_run_image(lr_image *image, const lr_kernels *kernels, const void *x, void *out, int64_t outer,
                 int64_t itemsize, int threads, double fork_join, int *finite)
{
    const int64_t lanes = kernels->limits.lanes, bands = (image->rows + lanes - 1) / lanes, tasks = outer * bands;
    const int64_t samples = image->rows * image->columns * image->channels;
    const int64_t x_size = size_of(image->x_type, itemsize), out_size = size_of(image->out_type, itemsize);
    int64_t caches[3];
    lr_caches(caches);
    image->stream = 2 * outer * samples * out_size >= caches[2];
    const int64_t taps = image->vertical.taps + image->horizontal.taps;
    const double seconds = (double)(outer * samples * itemsize) * (double)(8 + taps) * LR_SECONDS_PER_TAP;
    threads = worthwhile(threads, tasks, seconds, fork_join);
    size_t each;
    char *scratch = workspaces(kernels->plan_image(image), threads, &each);
    if (!scratch) return LR_NO_MEMORY;
    int all = 1;
#ifdef _OPENMP
    /* Neighbouring bands share rows, so a thread takes several. */
    const int64_t chunk = tasks / (8 * threads) > 1 ? tasks / (8 * threads) : 1;
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (threads > 1) reduction(& : all)
#endif
    for (int64_t j = 0; j < tasks; j++) {
        char *own = slice(scratch, each, threads);
        all &= band(image, kernels, (const char *)x + j / bands * samples * x_size,
                    (char *)out + j / bands * samples * out_size, j % bands, own);
    }
    lr_free(scratch);
    *finite = all;
    return LR_OK;
}

int lr_run_box(const lr_isa *isa, const lr_kernels *kernels, const lr_box *box, const void *x, void *y,
               int64_t images, int64_t itemsize, int threads, double seconds, double fork_join)
{
    int64_t caches[3];
    lr_caches(caches);
    const int64_t row = box->columns * box->inner * itemsize, size = box->rows * row;
    /* Every band sums a window's rows again.  Without sums down, rows are independent. */
    const int64_t least = box->down.width > 1 ? LR_BAND_WINDOWS * box->down.width : LR_BAND_ROWS;
    threads = worthwhile(threads, images * (1 + (box->rows - 1) / least), seconds, fork_join);
    /* Sums across read those down again: from L2, if a band has no more. */
    int64_t rows = 1 + caches[1] / row;
    const int64_t bands_of_threads = (threads + images - 1) / images;
    const int64_t share = (box->rows + bands_of_threads - 1) / bands_of_threads;
    if (rows < least) rows = least;
    if (rows > share) rows = share;
    /* Sums are cut at multiples of the width from the start of a band: those of the whole image, so that
     * results do not depend on the number of threads. */
    rows = (rows + box->down.width - 1) / box->down.width * box->down.width;
    const int64_t bands = (box->rows + rows - 1) / rows, tasks = images * bands;
    size_t each;
    char *work = workspaces((kernels ? kernels->box_bytes : isa->box_bytes)(box), threads, &each);
    if (!work) return LR_NO_MEMORY;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
#endif
    for (int64_t j = 0; j < tasks; j++) {
        const int64_t first = j % bands * rows, last = first + rows < box->rows ? first + rows : box->rows;
        char *own = slice(work, each, threads);
        (kernels ? kernels->box : isa->box)(box, (const char *)x + j / bands * size,
                                            (char *)y + j / bands * size, first, last, own);
    }
    lr_free(work);
    return LR_OK;
}

int lr_run_resample(const lr_kernels *kernels, const lr_resample *p, const void *x, void *y, int64_t images,
                    int64_t itemsize, int threads, double seconds, double fork_join)
{
    const int64_t lanes = kernels->limits.lanes;
    const int64_t strips = p->lines ? (p->lines + lanes - 1) / lanes : (p->inner + p->strip - 1) / p->strip;
    const int64_t tasks = images * strips;
    threads = worthwhile(threads, tasks, seconds, fork_join);
    size_t each;
    char *work = workspaces(kernels->resample_bytes(p), threads, &each);
    if (!work) return LR_NO_MEMORY;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
#endif
    for (int64_t j = 0; j < tasks; j++) {
        char *own = slice(work, each, threads);
        kernels->resample(p, (const char *)x + j / strips * p->n * p->inner * itemsize,
                          (char *)y + j / strips * p->outputs * p->inner * itemsize, j % strips, own);
    }
    lr_free(work);
    return LR_OK;
}

#define LR_SUMS_BYTES (64 << 20) /* of all slices of a gradient, at most */

int lr_run_gradient(lr_gradient *p, const lr_kernels *kernels, const lr_array *x, const lr_array *g, void *weight,
                    void *bias, int64_t itemsize, int threads, double seconds, double fork_join)
{
    const int64_t bytes = kernels->plan_gradient(p), sums = (p->sums * itemsize + 63) / 64 * 64;
    /* Slices do not depend on the number of threads, and so the order of the sums does not. */
    int64_t slices = LR_SUMS_BYTES / sums;
    if (slices < 2) slices = 2;
    if (slices > LR_SLICES) slices = LR_SLICES;
    if (slices > p->items) slices = p->items > 1 ? p->items : 1;
    threads = worthwhile(threads, slices, seconds, fork_join);
    size_t each;
    p->sums = sums / itemsize;
    char *work = workspaces(bytes, threads, &each), *all = lr_allocate((size_t)(sums * slices));
    if (!work || !all) {
        lr_free(work), lr_free(all);
        return LR_NO_MEMORY;
    }
    memset(work, 0, each * (size_t)threads);
    memset(all, 0, (size_t)(sums * slices));
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
#endif
    for (int64_t s = 0; s < slices; s++) {
        char *own = slice(work, each, threads);
        for (int64_t i = p->items * s / slices; i < p->items * (s + 1) / slices; i++)
            kernels->gradient(p, x, g, i, all + s * sums, own);
    }
    kernels->finish_gradient(p, all, slices, weight, bias);
    lr_free(work), lr_free(all);
    return LR_OK;
}
