/* All kernels for one instruction set.  Compiled once for each, with LR_ISA its name and LR_BYTES
 * the width of its vectors.  No threads and no allocation here: those are dispatch.c's.
 */
#include <stdint.h>
#include <string.h>

#include "lr.h"

#define LR_JOIN_(a, b) a##_##b
#define LR_JOIN(a, b) LR_JOIN_(a, b)
#define LR_TAPS 1024 /* of one channel that depthwise.inc takes; dense.inc does the others */
#define LR_STAGES 16 /* of a chain; longer ones are cut by the caller */

#if LR_BYTES == 64
#define LR_ROWS 8 /* 24 sums of 32 registers */
#else
#define LR_ROWS 4 /* 12 sums of 16 registers */
#endif

#define T float
#define L (LR_BYTES / 4)
#define LR_NAME(name) LR_JOIN(name, f32)
typedef float vf32 __attribute__((vector_size(LR_BYTES), aligned(4), may_alias));
typedef float hf32 __attribute__((vector_size(LR_BYTES / 2), aligned(4), may_alias));
typedef int32_t mf32 __attribute__((vector_size(LR_BYTES)));
#define V vf32
#define H hf32
#define M mf32
#include "dense.inc"
#include "depthwise.inc"
#include "band.inc"
#include "chain.inc"
#undef T
#undef L
#undef LR_NAME
#undef V
#undef H
#undef M

#define T double
#define L (LR_BYTES / 8)
#define LR_NAME(name) LR_JOIN(name, f64)
typedef double vf64 __attribute__((vector_size(LR_BYTES), aligned(8), may_alias));
typedef double hf64 __attribute__((vector_size(LR_BYTES / 2), aligned(8), may_alias));
typedef int64_t mf64 __attribute__((vector_size(LR_BYTES)));
#define V vf64
#define H hf64
#define M mf64
#include "dense.inc"
#include "depthwise.inc"
#include "band.inc"
#include "chain.inc"

const lr_isa LR_JOIN(lr, LR_ISA) = {
    {LR_ROWS, 8 * LR_BYTES / 4, pack_f32, tile_f32},
    {LR_ROWS, 8 * LR_BYTES / 8, pack_f64, tile_f64},
};
