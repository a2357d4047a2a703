/* The structs of a chain, shared by the instruction sets and the driver.
 *
 * Spatial axes are always three, D, H, W; a missing one has length 1.  All sizes are in
 * elements of the plan's type.
 */
#ifndef LR_H
#define LR_H

#include <stdint.h>

#define LR_AXES 3

enum { LR_OK = 0, LR_NO_MEMORY = 1 };
enum { LR_LINEAR, LR_RELU, LR_RELU6 };         /* what a stage ends with, after its bias */
enum { LR_OWN, LR_U8, LR_I8, LR_U16, LR_I16 }; /* elements of x and out: the plan's own type, or these */
enum { LR_BRING, LR_COMPUTE, LR_STEPS };       /* steps of a stage on one band */

/* One stage: out(l, g, o, r) = sum over c, taps of weight[g](o, c, tap) * in(l, g, c, r),
 * shifted by the tap; channel (l, g, c, r) has the number ((l * groups + g) * cin + c) * right + r.
 *
 * Its input lies in a buffer of planes [channel][phase d][phase h][phase w][d'][h'][w'], where
 * sample i of an axis with stride s has phase i % s and place i / s: a strided stage, too, reads
 * consecutive samples.  Tap k of output sample q is then at q + offset[k], whatever the dimension.
 */
typedef struct {
    int64_t left, groups, right, cin, cout, taps; /* taps: cin * product of kernel */
    int64_t kernel[LR_AXES], stride[LR_AXES], dilation[LR_AXES];
    int64_t before[LR_AXES];                  /* zeros ahead of the input; negative crops */
    int64_t in_size[LR_AXES], out_size[LR_AXES]; /* of the whole image */
    int64_t extent[LR_AXES];                  /* samples in the buffer, for a whole tile */
    int64_t plane[LR_AXES];                   /* d', h', w': ceil(extent / stride) */
    int64_t phase[LR_AXES];                   /* distance between phases */
    int64_t channel;                          /* distance between channels */
    int64_t buffer;                           /* elements, slack included */
    const int32_t *fold;   /* of a later stage, or NULL: column of its input that stands at each padded
                            * one, where tiles have whole rows */
    const int32_t *source; /* first stage: channel of x at each input channel, or NULL */
    const int32_t *place;  /* input channel of the next stage for each output one, or NULL */
    const int64_t *offset; /* (taps,) */
    const void *weight;    /* packed: for each group and block of rows (taps, rows) */
    const void *bias;      /* an output channel each, or NULL */
    int activation;
} lr_stage;

typedef struct {
    int64_t stages;
    const lr_stage *stage;
    const int32_t *border[LR_AXES]; /* first stage: sample at each padded position, -1: fill */
    double fill;
    int64_t tile[LR_AXES], tiles[LR_AXES];
    int64_t parts;     /* of the output channels of a single stage, each a job of its own */
    double seconds;    /* a guess of one example on one thread: whether a team pays */
    int64_t workspace; /* elements of each of the two buffers of a thread */
    int64_t outputs;   /* elements of the output of one example */
    int64_t result;    /* and of one tile of it, held where out has another type */
} lr_plan;

/* Where one run reads and writes.  Strides (n, c, d, h, w) in elements. */
typedef struct {
    const void *x;
    void *out;
    int64_t xs[5], os[5];
    int x_type, out_type;
    int stream;          /* out is too large for the caches: store past them where rows are long */
    double (*now)(void); /* a clock, or NULL: no breakdown */
} lr_arrays;

/* What one thread did in a step: seconds, multiply-adds, bytes read and written. */
typedef struct {
    double seconds;
    int64_t macs, bytes;
} lr_step;

/* What one instruction set exports, once per type. */
typedef struct {
    int64_t rows;  /* output channels of a block */
    int64_t width; /* samples of the longest run */
    void (*pack)(const void *weight, void *packed, int64_t groups, int64_t cout, int64_t taps);
    void (*tile)(const lr_plan *plan, const lr_arrays *arrays, int64_t n, int64_t tile, int64_t part,
                 void *work, lr_step *steps);
    double (*peak)(int64_t n, double factor); /* n times rows * 3 vectors of multiply-adds */
} lr_kernels;

typedef struct {
    lr_kernels f32, f64;
} lr_isa;

#endif
