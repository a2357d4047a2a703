/* Structs of a chain, shared by the kernels of all instruction sets and the driver.
 *
 * Spatial axes are always three, D, H, W; a missing one has length 1.  All sizes are in
 * elements of the plan's type.
 */
#ifndef LR_H
#define LR_H

#include <stdint.h>

#define LR_AXES 3

enum { LR_OK = 0, LR_NO_MEMORY = 1 };
/* Activation after the bias; those beyond LR_RELU6 in programs only. */
enum {
    LR_LINEAR, LR_RELU, LR_RELU6, LR_LEAKY_RELU, LR_HARD_SWISH, LR_HARD_SIGMOID, LR_SIGMOID, LR_SILU,
    LR_TANH, LR_GELU, LR_ELU, LR_CLIP
};
enum { LR_PLAN_TYPE, LR_U8, LR_I8, LR_U16, LR_I16 }; /* element types of x and out */
enum { LR_STEP_PACK, LR_STEP_COMPUTE, LR_STEPS }; /* steps of a stage on one tile */

/* One stage: out(l, g, o, r) = sum over c, taps of weight[g](o, c, tap) * in(l, g, c, r),
 * shifted by the tap; channel (l, g, c, r) has the number ((l * groups + g) * cin + c) * inner + r.
 *
 * Its input is a buffer of planes [channel][phase d][phase h][phase w][d'][h'][w'], where sample i
 * of an axis with stride s has phase i % s and index i / s: strided stages, too, read consecutive
 * samples.  Tap k of output sample q is at q + offset[k], in any dimension.
 */
typedef struct {
    int64_t outer, groups, inner, cin, cout, taps; /* taps: cin * product of kernel */
    int64_t kernel[LR_AXES], stride[LR_AXES], dilation[LR_AXES];
    int64_t before[LR_AXES];                  /* zeros ahead of the input; negative values crop it */
    int64_t in_size[LR_AXES], out_size[LR_AXES]; /* of the whole image */
    int64_t extent[LR_AXES];                  /* input samples of a whole tile, padding included */
    int64_t plane[LR_AXES];                   /* d', h', w': ceil(extent / stride) */
    int64_t phase[LR_AXES];                   /* distance between phases */
    int64_t channel;                          /* distance between channels */
    int64_t buffer;                           /* elements of the buffer, overread included */
    /* Later stages: input column at each padded column, or NULL (zeros); needs tiles of whole rows. */
    const int32_t *padded_columns;
    const int32_t *source;      /* first stage: channel of x at each input channel, or NULL */
    const int32_t *destination; /* input channel of the next stage for each output channel, or NULL */
    const int64_t *offset; /* (taps,) */
    const void *weight;    /* packed: (taps, rows) for each group and block of rows */
    const void *bias;      /* one per output channel, or NULL */
    int activation;
} lr_stage;

typedef struct {
    int64_t stages;
    const lr_stage *stage;
    const int32_t *border[LR_AXES]; /* first stage: sample at each padded position, -1: fill */
    double fill;
    int64_t tile[LR_AXES], tiles[LR_AXES];
    int64_t splits;    /* output-channel splits of a single stage, one task each */
    double seconds;    /* predicted for one example on one thread: decides on threads */
    double fork_join;  /* latency of a parallel region, in seconds: what threads have to save */
    int64_t workspace; /* elements of either buffer of a thread */
    int64_t outputs;   /* elements of one example's output */
    int64_t result;    /* elements of one output tile, buffered if out holds integers */
} lr_plan;

/* Arrays of one run.  Strides (n, c, d, h, w) in elements. */
typedef struct {
    const void *x;
    void *out;
    int64_t xs[5], os[5];
    int x_type, out_type;
    int stream;          /* out exceeds the caches: long rows use non-temporal stores */
    double (*now)(void); /* clock of a profiled run, or NULL */
} lr_arrays;

/* Totals of one thread and step: seconds, MACs, bytes read and written. */
typedef struct {
    double seconds;
    int64_t macs, bytes;
} lr_step;

/* A pass of a separable filter; see pass.inc. */
typedef struct {
    int64_t outer, n, inner; /* the array: the pass runs along n */
    int64_t taps, width, before; /* taps other than zero; all taps; those ahead of the output */
    const int32_t *offset;   /* of each tap other than zero */
    const int32_t *border;   /* sample at each of n + width - 1 positions, -1: fill */
    const void *weight;      /* one per tap other than zero */
    double fill;
} lr_pass;

/* Taps of a filter along one axis of an image; an odd number of them may have a parity: 1 if they are
 * symmetric, -1 if antisymmetric, else 0. */
typedef struct {
    int64_t taps;
    int parity;
    const void *weight; /* the first half and the middle one, if there is a parity */
} lr_taps;

/* A filter along the columns and along the rows of images; see image.inc. */
typedef struct {
    int64_t rows, columns, channels;
    lr_taps vertical, horizontal;
    const int32_t *row, *column; /* sample at each of n + taps - 1 positions, -1: fill */
    int64_t before;              /* taps ahead of the output along the rows */
    double column_fill, row_fill; /* border values of x, and of what is filtered along the rows */
    int x_type, out_type;
    int stream;   /* out exceeds the caches: whole rows use non-temporal stores */
    int64_t tile; /* columns at a time */
} lr_image;

/* Sums of windows of neighbours along one axis; a width of 1 is none. */
typedef struct {
    int64_t width, before;   /* samples, and those of them ahead of the output */
    const int32_t *border;   /* sample at each of n + width - 1 positions, -1: fill */
    double fill;             /* border value of the pass's input */
} lr_window;

/* A box filter of images (rows, columns, inner); see box.inc and box_integers.inc. */
typedef struct {
    int64_t rows, columns, inner;
    lr_window down, across;  /* along the rows' axis, and then along that of the columns */
    double before, after;    /* factors of samples ahead of the sums, and of the sums */
    double divisor;          /* of the sums, or 1 */
    const int32_t *ends;     /* sample of a line at each of (width - 1) * inner places beyond its ends */
    int64_t strip;           /* columns that are summed down at a time */
    /* Integers only. */
    int type;                /* LR_U8 or LR_U16, of x and out */
    int is_single;           /* results are rounded correctly in float32 */
    int64_t multiplier, shift; /* of sums of 16 bits: see box_integers.inc; multiplier 0: 32 bits */
} lr_box;

/* Weighted sums along the axis in the middle of (lines, n, inner), or of rows (n, inner) if lines is 0,
 * `strip` columns at a time; see resample.inc. */
typedef struct {
    int64_t lines, n, outputs, inner, taps, strip;
    const int32_t *border;   /* sample at each padded position, -1: fill */
    const int64_t *start;    /* padded position of the first tap of each output */
    const int64_t *list;     /* list of taps of each output */
    const void *weight;      /* (lists, taps) */
    double fill;
} lr_resample;

struct lr_op;
struct lr_array;
struct lr_gradient;

/* Where a stage reads its input; see path.inc for the decision. */
enum {
    LR_FROM_BUFFER,        /* planes that the previous stage wrote */
    LR_IN_PLACE,           /* x itself */
    LR_PACKED,             /* all channels of x, packed into planes */
    LR_PACKED_BY_CHANNELS, /* a few at a time */
    LR_TRANSPOSED          /* L channels at a time, computed channels-last: lanes.inc */
};
/* How a stage computes a block of output channels from planes. */
enum {
    LR_DEPTHWISE_ROWS,   /* rows of one channel (depthwise.inc) */
    LR_DEPTHWISE_PLANES, /* the same where taps lie along the first axis only */
    LR_DENSE_FLAT,       /* runs over whole planes, stored directly (dense.inc) */
    LR_DENSE_ROWS,       /* runs over single rows, stored directly */
    LR_DENSE_SCATTER     /* runs over whole planes, scattered to the destination */
};
typedef struct {
    int input, compute, keeps_rows; /* keeps_rows: tiles inside the image may read x in place */
} lr_path;

/* Limits and block sizes that planning has to know. */
typedef struct {
    int64_t lanes;     /* elements of a vector */
    int64_t rows;      /* output channels per block */
    int64_t overread;  /* samples of the longest run: it may read as many past the end of a buffer */
    int64_t remainder; /* samples at the end of a run, at most, that get no vector */
    int64_t packed;    /* channels that a depthwise stage packs at a time, at most */
    int64_t stages;    /* of a chain, at most */
    int64_t colours;   /* channels of an image whose rows are filtered, at most */
} lr_plane_limits;

/* Kernels of one instruction set for one type. */
typedef struct {
    lr_plane_limits limits;
    void (*pack)(const void *weight, void *packed, int64_t groups, int64_t cout, int64_t taps);
    void (*tile)(const lr_plan *plan, const lr_arrays *arrays, int64_t n, int64_t tile, int64_t split,
                 void *work, lr_step *steps);
    void (*paths)(const lr_plan *plan, const lr_arrays *arrays, int64_t tile, lr_path *paths);
    double (*peak)(int64_t n, double factor); /* n times rows * 3 vectors of MACs */
    void (*pass)(const lr_pass *pass, const void *x, void *y, void *line, const void **row);
    int64_t (*plan_image)(lr_image *image); /* chooses the tile; returns bytes of scratch */
    int (*image_band)(const lr_image *image, const void *x, void *out, int64_t first, int64_t skip, void *scratch);
    /* One task of those of resample.inc, and the bytes of its workspace. */
    void (*resample)(const lr_resample *p, const void *x, void *y, int64_t task, void *work);
    int64_t (*resample_bytes)(const lr_resample *p);
    /* Rows first to last of one image, and the bytes of its workspace. */
    void (*box)(const lr_box *p, const void *x, void *y, int64_t first, int64_t last, void *work);
    int64_t (*box_bytes)(const lr_box *p);
    /* Channels-last kernels: see program.h. */
    int64_t vectors;
    const int *pixels; /* most pixels of a block, by its vectors, from 1 */
    int64_t (*scratch)(const struct lr_op *op);
    void (*run_op)(const struct lr_op *op, const struct lr_array *arrays, void *arena, void *scratch,
                   int64_t image, int64_t first, int64_t last, int64_t begin, int64_t end, int64_t from,
                   int64_t to);
    int64_t (*plan_gradient)(struct lr_gradient *p); /* chooses the items; returns bytes of workspace */
    void (*gradient)(const struct lr_gradient *p, const struct lr_array *x, const struct lr_array *g, int64_t item,
                     void *sums, void *work);
    void (*finish_gradient)(const struct lr_gradient *p, const void *sums, int64_t slices, void *weight, void *bias);
} lr_kernels;

typedef struct {
    lr_kernels f32, f64;
    /* Box filters of 8- and 16-bit integers, as those of lr_kernels. */
    void (*box)(const lr_box *p, const void *x, void *y, int64_t first, int64_t last, void *work);
    int64_t (*box_bytes)(const lr_box *p);
} lr_isa;

#endif
