/* Interface for Cython: instruction sets by name, machine properties, and running a plan. */
#ifndef LR_DISPATCH_H
#define LR_DISPATCH_H

#include <stddef.h>

#include "lr.h"
#include "program.h"

int lr_isa_count(void);              /* compiled in and supported by this CPU, best first */
const char *lr_isa_name(int i);
const lr_isa *lr_isa_table(int i);
int lr_max_threads(void);
double lr_fork_join(int threads); /* measure the fork/join latency, in seconds */
void lr_caches(int64_t sizes[3]); /* bytes of L1 data, L2 and L3 */
double lr_now(void);                      /* seconds */
void *lr_allocate(size_t size);           /* a multiple of 64 bytes, aligned to 64; or NULL */
void lr_free(void *memory);               /* of lr_allocate, or NULL */
/* `steps` is NULL or has shape (threads, stages * LR_STEPS + 1); `used` receives the threads used. */
int lr_run(const lr_plan *plan, const lr_kernels *kernels, lr_arrays *arrays, int64_t batch,
           int64_t itemsize, int threads, void **cache, lr_step *steps, int *used);
/* Filter `outer` images; `finite` receives whether all results are. */
int lr_run_image(lr_image *image, const lr_kernels *kernels, const void *x, void *out, int64_t outer,
                 int64_t itemsize, int threads, double fork_join, int *finite);
/* Call it once, before all others: forked children then run serially.  Returns 0 or an errno. */
int lr_guard_forks(void);
int lr_limits(const lr_kernels *kernels, int64_t *limits); /* lanes, vectors, most pixels by vectors */
int64_t lr_scratch(const lr_op *op, const lr_kernels *kernels);
/* `seconds` is NULL or has shape (threads, operations). */
int lr_run_program(const lr_program *program, const lr_kernels *kernels, const lr_array *arrays, int64_t batch,
                   int64_t itemsize, int threads, void **cache, double *seconds, int *used);

/* Filter `images` by a box in bands of rows, on as many threads as save more than a fork takes.
 * `kernels` is NULL for integers. */
int lr_run_box(const lr_isa *isa, const lr_kernels *kernels, const lr_box *box, const void *x, void *y,
               int64_t images, int64_t itemsize, int threads, double seconds, double fork_join);
int lr_run_resample(const lr_kernels *kernels, const lr_resample *p, const void *x, void *y, int64_t images,
                    int64_t itemsize, int threads, double seconds, double fork_join);

/* `bias` may be NULL. */
int lr_run_gradient(lr_gradient *p, const lr_kernels *kernels, const lr_array *x, const lr_array *g, void *weight,
                    void *bias, int64_t itemsize, int threads, double seconds, double fork_join);

#endif
