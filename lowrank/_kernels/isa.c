/* The kernels for one instruction set, in both precisions.
 *
 * This file is compiled once for every instruction set, with LR_ISA its name and LR_BYTES the
 * width of a vector.  It exports one table; everything else is static, so that no function
 * compiled for a newer processor can end up in another's place.
 */
#include <string.h>

#include "lr.h"

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define UNROLL _Pragma("GCC unroll 8")

/* Channels x vectors of a block: as many accumulators as there are registers, less those that
 * the operands need.  A block of few channels gets more vectors; ends of runs get fewer. */
#if LR_BYTES == 64
#define LR_BLOCK 8
#define LR_BLOCKS(B)                                                                              \
    B(1, 8) B(1, 4) B(1, 2) B(1, 1) B(2, 8) B(2, 4) B(2, 2) B(2, 1) B(3, 6) B(3, 3) B(3, 2)       \
    B(3, 1) B(4, 6) B(4, 4) B(4, 3) B(4, 2) B(4, 1) B(5, 4) B(5, 3) B(5, 2) B(5, 1) B(6, 4)       \
    B(6, 3) B(6, 2) B(6, 1) B(7, 3) B(7, 2) B(7, 1) B(8, 3) B(8, 2) B(8, 1)
#elif LR_BYTES == 32
#define LR_BLOCK 4
#define LR_BLOCKS(B)                                                                              \
    B(1, 8) B(1, 4) B(1, 2) B(1, 1) B(2, 6) B(2, 4) B(2, 2) B(2, 1) B(3, 4) B(3, 2) B(3, 1)       \
    B(4, 3) B(4, 2) B(4, 1)
#else
#define LR_BLOCK 4
#define LR_BLOCKS(B)                                                                              \
    B(1, 8) B(1, 4) B(1, 2) B(1, 1) B(2, 4) B(2, 2) B(2, 1) B(3, 3) B(3, 2) B(3, 1) B(4, 3)       \
    B(4, 2) B(4, 1)
#endif

#define T float
#define NAME(x) PASTE(x, f32)
#include "kernels.inc"
#undef T
#undef NAME

#define T double
#define NAME(x) PASTE(x, f64)
#include "kernels.inc"
#undef T
#undef NAME

#define LR_STRING_(x) #x
#define LR_STRING(x) LR_STRING_(x)

extern const lr_isa PASTE(lr_isa, LR_ISA);
const lr_isa PASTE(lr_isa, LR_ISA) = {
    LR_STRING(LR_ISA),
    {LR_BYTES / sizeof(float), LR_BLOCK, in_place_f32, load_f32, frame_f32, stage_f32},
    {LR_BYTES / sizeof(double), LR_BLOCK, in_place_f64, load_f64, frame_f64, stage_f64},
};
