/* The words of the compiled engine: what a chain is, where its data lie, what an instruction
 * set exports.
 *
 * A chain is a list of stages.  Stage s turns its input a into its output b by
 *
 *   b[((l*groups + g)*cout + o)*right + r, p] =
 *       sum over c, t of  weight[g*cout + o, c, t]
 *                         * a[((l*groups + g)*cin + c)*right + r, p*stride + t*dilation - before]
 *
 * with zeros outside a, p and t being triples (d, h, w).  Whole tiles of the last output are
 * computed one after the other, through all stages, so that what lies between two stages
 * stays in the cache of one core.
 *
 * The input of a stage lies in planes  [channel][phase d][phase h][phase w][d'][h'][w'] :
 * position P of the padded region is sample P / stride of phase P % stride, so that a strided
 * stage, too, reads neighbours from neighbours.  Phases that no tap looks at have no plane.
 */
#ifndef LR_H
#define LR_H

#include <stddef.h>
#include <stdint.h>

enum { LR_AXES = 3, LR_LINE = 64, LR_MAX_VECTORS = 8, LR_MAX_ACCUMULATORS = 24 };
enum { LR_OK = 0, LR_NO_MEMORY = 1 };
enum { LR_FILL = -1, LR_ZERO = -2 }; /* in a table of indices: no sample, but a constant */

typedef ptrdiff_t lr_int;

typedef struct {
    lr_int lo[LR_AXES], hi[LR_AXES];
} lr_box;

typedef struct {
    /* Given, in the order of the equation. */
    lr_int left, groups, right, cin, cout;
    lr_int kernel[LR_AXES], stride[LR_AXES], dilation[LR_AXES];
    lr_int before[LR_AXES], after[LR_AXES]; /* zeros around the input; negative crops */
    lr_int in_size[LR_AXES], out_size[LR_AXES];
    const int32_t *source; /* input channel c is channel source[c] of what comes before; or NULL */
    const void *weight;    /* (groups*cout, cin, kernel...); packed: [group][block][taps][channel] */

    /* Derived by lr_plan_new. */
    lr_int in_channels, out_channels;
    lr_int taps;                  /* cin * kernel: terms of one sum */
    lr_int blocks;                /* of output channels, in a group */
    lr_int phases[LR_AXES];       /* that have a plane */
    const int32_t *slot[LR_AXES]; /* [stride]: the place of a phase, or -1 */
    lr_int phase_pitch[LR_AXES], pitch[LR_AXES], channel_pitch; /* elements */
    lr_int size[LR_AXES];         /* of one plane */
    const lr_int *offset;         /* [taps]: elements from an output's position to its terms */
    const int32_t *first, *place; /* the inverse of source: channel j before goes to channels
                                     place[first[j]] .. place[first[j+1] - 1]; or NULL */
    size_t buffer;                /* bytes from the start of a workspace to the planes */
} lr_stage;

typedef struct lr_isa lr_isa;

typedef struct {
    const lr_isa *isa;
    int is_double;
    lr_int stages;
    lr_stage *stage;
    const void *bias; /* [channels of the last stage], zeros if there is none */
    int relu;
    double fill;
    const int32_t *index[LR_AXES]; /* padded position of x -> sample, LR_FILL or LR_ZERO */
    lr_int inside[LR_AXES][2];     /* positions [0, 1) of it where index is position - before */
    lr_int tile[LR_AXES], tiles[LR_AXES];
    size_t boxes, runs, segments, workspace; /* bytes from the start of a workspace, and all */
    lr_int max_runs, max_segments;
    void *owned[64]; /* what lr_plan_free has to free beside the stages */
    void *spare;     /* a workspace between two calls */
    size_t spare_size;
} lr_plan;

typedef struct {
    const void *x;
    void *out;
    lr_int batch, x_stride[2 + LR_AXES], out_stride[2 + LR_AXES]; /* elements */
    const lr_int *offset; /* as in lr_stage, for reading x where it lies; or NULL */
} lr_call;

/* A run: consecutive positions of the input's planes, computed at once; and the pieces of rows
 * in it that are wanted. */
typedef struct {
    lr_int from, count; /* in the run */
    lr_int to, column;  /* elements to the row (and column if contiguous); padded column */
} lr_segment;

typedef struct {
    lr_int at; /* elements from the tile's first position */
    int32_t vectors, segments;
    const lr_segment *segment;
    int whole; /* one contiguous segment, so it can be stored without a detour */
} lr_run;

/* What one instruction set does, for one precision.  `n` is the example of the batch, `box`
 * the regions of a tile: box[s] is the part of stage s's input, box[stages] the part of out. */
typedef struct {
    lr_int lanes, block; /* elements a vector, output channels a block at most */
    int (*in_place)(const lr_plan *, const lr_call *, const lr_box *box);
    void (*load)(const lr_plan *, const lr_call *, lr_int n, const lr_box *box, char *workspace,
                 lr_int first_channel, lr_int last_channel);
    void (*frame)(const lr_plan *, const lr_box *box, char *workspace, lr_int s,
                  lr_int first_channel, lr_int last_channel);
    void (*stage)(const lr_plan *, const lr_call *, lr_int n, const lr_box *box,
                  const char *workspace, char *own, lr_int s, lr_int first_item,
                  lr_int last_item);
} lr_kernels;

struct lr_isa {
    const char *name;
    lr_kernels f32, f64;
};

static inline const lr_kernels *lr_kernels_of(const lr_plan *plan)
{
    return plan->is_double ? &plan->isa->f64 : &plan->isa->f32;
}

static inline lr_int lr_min(lr_int a, lr_int b) { return a < b ? a : b; }
static inline lr_int lr_max(lr_int a, lr_int b) { return a > b ? a : b; }

/* Items of work in a stage: blocks of output channels. */
static inline lr_int lr_items(const lr_stage *s)
{
    return s->left * s->groups * s->right * s->blocks;
}

/* Position, in padded coordinates, of the first sample that stage `s` keeps for a tile. */
static inline lr_int lr_origin(const lr_plan *plan, const lr_box *box, lr_int s, int axis)
{
    return box[s + 1].lo[axis] * plan->stage[s].stride[axis];
}

/* How many padded positions it keeps. */
static inline lr_int lr_extent(const lr_plan *plan, const lr_box *box, lr_int s, int axis)
{
    const lr_stage *t = &plan->stage[s];
    lr_int n = box[s + 1].hi[axis] - box[s + 1].lo[axis];
    return n <= 0 ? 0 : (n - 1) * t->stride[axis] + t->dilation[axis] * (t->kernel[axis] - 1) + 1;
}

static inline int lr_empty(const lr_box *box)
{
    return box->hi[0] <= box->lo[0] || box->hi[1] <= box->lo[1] || box->hi[2] <= box->lo[2];
}

/* plan.c */
int lr_plan_new(lr_plan *plan, const lr_stage *stages, lr_int count, const lr_isa *isa,
                int is_double, const void *bias, int relu, const int32_t *const *border,
                double fill, const lr_int *tile);
void lr_plan_free(lr_plan *plan);
void lr_regions(const lr_plan *plan, lr_int tile, lr_box *box);

/* dispatch.c */
int lr_run_plan(lr_plan *plan, const lr_call *call, int threads);
int lr_max_threads(void);
void lr_caches(lr_int *l1, lr_int *l2);
void lr_start(void);
const lr_isa *lr_isa_at(int i); /* supported ones, best first; NULL after the last */

#endif
