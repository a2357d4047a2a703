/* All kernels for one instruction set.  Compiled once for each, with LR_ISA its name and LR_BYTES
 * the width of its vectors.  No threads and no allocation here: those are dispatch.c's.
 */
#include <stdint.h>
#include <string.h>

#include "lr.h"

#define LR_JOIN_(a, b) a##_##b
#define LR_JOIN(a, b) LR_JOIN_(a, b)
#define LR_TAPS 1024 /* of one channel that depthwise.inc takes; dense.inc does the others */
#define LR_NEAR 16384 /* bytes of channels that a depthwise stage takes at a time, well inside L1 */
#define LR_FEW 4 /* samples at the end of a run, at the most, that do not get a vector */
#define LR_PUTS 32 /* taps that take as long as putting what a row gave to its places */
#define LR_SHORT 256 /* samples of a plane that go by lanes of channels */
#define LR_SHORT_TAPS 64
#define LR_STAGES 16 /* of a chain; longer ones are cut by the caller */

#if LR_BYTES == 64
#define LR_ROWS 8 /* 24 sums of 32 registers */
#define LR_WIDE 4 /* vectors that depthwise.inc does at a time of four rows: 16 sums */
#elif LR_BYTES == 32
#define LR_ROWS 4 /* 12 sums of 16 registers */
#define LR_WIDE 3 /* 12 sums */
#else
#define LR_ROWS 4
#define LR_WIDE 2 /* 8 sums: products that are not fused take registers, too */
#endif

/* Stores that go past the caches have no name in C; without them, ordinary ones. */
#if defined(__x86_64__)
#include <immintrin.h>
#define LR_FENCE() _mm_sfence()
#if LR_BYTES == 64
#define LR_STREAM(TO, VALUE) _mm512_stream_si512((void *)(TO), (__m512i)(VALUE))
#elif LR_BYTES == 32
#define LR_STREAM(TO, VALUE) _mm256_stream_si256((__m256i *)(TO), (__m256i)(VALUE))
#else
#define LR_STREAM(TO, VALUE) _mm_stream_si128((__m128i *)(TO), (__m128i)(VALUE))
#endif
#else
#define LR_FENCE() (void)0
#define LR_STREAM(TO, VALUE) (*(VECTOR *)(TO) = (VALUE))
#endif

/* Samples i .. i + L of the 2 L that two vectors hold, i a constant: one instruction, where there is
 * one.  Without it loads at any offset do. */
#if defined(__x86_64__) && LR_BYTES == 64
#define LR_SHIFT_F32(A, B, I) ((VECTOR)_mm512_alignr_epi32((__m512i)(B), (__m512i)(A), I))
#define LR_SHIFT_F64(A, B, I) ((VECTOR)_mm512_alignr_epi64((__m512i)(B), (__m512i)(A), I))
#endif

/* Lanes of two vectors, by numbers from 0 to 2 L - 1. */
#ifdef __clang__ /* which takes no vector of numbers, unless they are constants */
#define LR_PICK(A, B, LANE) LR_NAME(pick)(A, B, LANE)
#else
#define LR_PICK(A, B, LANE) __builtin_shuffle(A, B, LANE)
#endif

#define LR_WHOLE(name) LR_NAME(LR_JOIN(name, whole))
#define LR_HALF(name) LR_NAME(LR_JOIN(name, half))
#define LR_QUARTER(name) LR_NAME(LR_JOIN(name, quarter))

#define T float
#define I int32_t
#define L (LR_BYTES / 4)
#define LR_NAME(name) LR_JOIN(name, f32)
#ifdef LR_SHIFT_F32
#define LR_SHIFT LR_SHIFT_F32
#endif
#include "type.inc"
#undef T
#undef I
#undef L
#undef LR_NAME
#undef LR_SHIFT

#define T double
#define I int64_t
#define L (LR_BYTES / 8)
#define LR_NAME(name) LR_JOIN(name, f64)
#ifdef LR_SHIFT_F64
#define LR_SHIFT LR_SHIFT_F64
#endif
#include "type.inc"

const lr_isa LR_JOIN(lr, LR_ISA) = {
    {LR_ROWS, 8 * LR_BYTES / 4, pack_f32, tile_f32, peak_f32},
    {LR_ROWS, 8 * LR_BYTES / 8, pack_f64, tile_f64, peak_f64},
};
