/* Structs of a program: operations on channels-last buffers, for whole chains and networks.
 *
 * A buffer holds one value of every image of a group as (d, h, w, channels), channels padded to
 * whole vectors, with a halo of padding around; all sizes are in elements of the program's type.
 * Fields are int64_t, double or pointers: program.pxi fills them by name.
 */
#ifndef LR_PROGRAM_H
#define LR_PROGRAM_H

#include "lr.h"

#define LR_SLICES 8   /* of the items of a gradient, at most, with sums of their own */
#define LR_UNITS 4    /* units per thread, at least, so that uneven ones balance */

/* Kinds of operations. */
enum {
    LR_PACK,      /* out = array, (batch, channels, d, h, w) of any strides */
    LR_UNPACK,    /* array = in */
    LR_DENSE,     /* out = convolution of in, by direct sums */
    LR_WINOGRAD,  /* the same by Toom-Cook algorithms along the axes */
    LR_FEW_OUTPUTS, /* the same by direct sums for at most four output channels */
    LR_DEPTHWISE, /* out = convolution of each channel alone, `multiplier` times */
    LR_MAX_POOL,
    LR_MEAN_POOL,
    LR_NORMALIZE, /* instance normalization */
    LR_SOFTMAX,   /* over channels */
    LR_COMBINE, /* out = in, in + other or in * other */
    LR_KINDS
};

enum { LR_COPY, LR_ADD, LR_MULTIPLY, LR_REORDER }; /* modes of LR_COMBINE; the last one copies */

/* Where an operation finds its samples: sample (d, h, w) of image i of a group starts at
 * offset + i * image + d * pitch[0] + h * pitch[1] + w * pitch[2]. */
typedef struct {
    int64_t offset, image, pitch[LR_AXES];
} lr_view;

/* Consecutive output channels that one call of a micro-kernel computes. */
typedef struct {
    int64_t vectors; /* of channels, 1 to LR_VECTORS */
    int64_t to;      /* first channel in the output; the next block may overwrite its padding, so that
                      * blocks of several groups run in order on one thread: splits is 1 then */
    int64_t terms;   /* start of its terms in `offset` */
    int64_t weight;  /* start of its weights */
} lr_block;

typedef struct lr_op {
    int64_t kind, activation, mode;
    lr_view in, out, other; /* other: added before the activation, or the operand of LR_COMBINE */
    int64_t has_other;
    int64_t size[LR_AXES];    /* output samples */
    int64_t in_size[LR_AXES]; /* input samples: pooling */
    int64_t unit[LR_AXES], units[LR_AXES]; /* output samples per unit of work, and their number */
    int64_t in_channels, channels; /* of input and output, padding included */
    int64_t taps[LR_AXES];    /* of the kernel or window */
    int64_t tap[LR_AXES];     /* elements between taps */
    int64_t stride[LR_AXES], dilation[LR_AXES], before[LR_AXES]; /* pooling; LR_DEPTHWISE has a stride, LR_WINOGRAD a dilation */
    int64_t terms;            /* products per output of a dense operation, per position if fast */
    int64_t terms_block;      /* that run at a time, so that their weights stay in L2 */
    int64_t blocks;           /* blocks of output channels of a dense operation */
    int64_t splits;           /* parts of the output channels that can run alone: blocks that do not
                               * overlap, or vectors of an operation on each channel alone */
    int64_t algorithm[LR_AXES]; /* LR_WINOGRAD: 0 or the number of ALGORITHMS in toom_cook.py */
    int64_t tiles;              /* LR_WINOGRAD: that run at a time */
    int64_t multiplier;         /* outputs per channel of LR_DEPTHWISE, outputs of LR_FEW_OUTPUTS */
    int64_t array;              /* LR_PACK, LR_UNPACK: number of the array */
    int64_t count_padding;      /* LR_MEAN_POOL: whether padding counts */
    double epsilon;             /* LR_NORMALIZE: added to the variance */
    double alpha;               /* slope of leaky ReLU, scale of ELU, upper bound of clip */
    const int64_t *offset;      /* distance of each term from the first tap of channel 0 */
    const lr_block *block;
    const void *weight, *bias;
    const void *mask; /* lanes that hold channels have all bits: LR_SOFTMAX, and LR_FEW_OUTPUTS
                         * (per term, or NULL) */
    const int32_t *channel;         /* channel of the array (LR_REORDER: of in) at each channel, or -1 */
    const int32_t *index[LR_AXES];  /* input sample at each output sample, or -1; or NULL */
} lr_op;

/* Run units [begin, end) of an operation on images [first, last) of a group, on splits [from, to) of
 * its output channels.  Steps of one strand run on one thread; strand -1 is shared by all. */
typedef struct {
    int64_t op, begin, end, first, last, from, to, strand;
} lr_step_range;

typedef struct {
    int64_t ops, steps;
    const lr_op *op;
    const lr_step_range *step;
    int64_t group;   /* images per group, at most */
    int64_t arena;   /* elements of the buffers of a group */
    int64_t scratch; /* elements that a thread needs beside */
    double seconds;   /* predicted for one example on one thread */
    double fork_join; /* seconds that several threads must save */
} lr_program;

/* One array of a run. */
typedef struct lr_array {
    void *data;
    int64_t strides[5];
} lr_array;

/* Gradient of the weight of a dense convolution; see cl_gradient.inc. */
typedef struct lr_gradient {
    int64_t batch, in_channels, channels; /* channels: of the output */
    int64_t in_size[LR_AXES], size[LR_AXES], taps[LR_AXES], stride[LR_AXES], dilation[LR_AXES], before[LR_AXES];
    /* Chosen by plan_gradient. */
    int64_t rows, ranges; /* rows of an item, ranges of rows of a plane */
    int64_t items, sums;  /* items in all, elements of the sums */
} lr_gradient;

#endif
