/* All kernels for one instruction set: compiled once per set, with its name LR_ISA and vector width
 * LR_BYTES.  Threads and allocation are left to dispatch.c.
 */
#include <stdint.h>
#include <string.h>

#include "lr.h"

#define LR_JOIN_(a, b) a##_##b
#define LR_JOIN(a, b) LR_JOIN_(a, b)
#define LR_TAPS 1024 /* per channel, at most, in depthwise.inc; dense.inc runs more */
#define LR_NEAR 16384 /* bytes of channels that a depthwise stage packs at a time, well inside L1 */
#define LR_FEW 4 /* remainder samples of a run, at most, that get no vector */
#define LR_PUTS 32 /* taps that take as long as scattering one output row */
#define LR_SHORT 256 /* samples of a plane, at most, that runs channels-last (lanes.inc) */
#define LR_SHORT_TAPS 64 /* taps, at most, of such a plane */
#define LR_STAGES 16 /* per chain, at most; the caller splits longer ones */

#if LR_BYTES == 64
#define LR_ROWS 8 /* 8 x 3 accumulators of 32 registers */
#define LR_WIDE 4 /* vectors per block of 4 rows in depthwise.inc: 16 accumulators */
#elif LR_BYTES == 32
#define LR_ROWS 4 /* 4 x 3 accumulators of 16 registers */
#define LR_WIDE 3 /* 12 accumulators */
#else
#define LR_ROWS 4
#define LR_WIDE 2 /* 8 accumulators: without FMA, products take registers, too */
#endif

/* Non-temporal stores need intrinsics; other architectures use ordinary stores. */
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

/* L elements from element i on of two concatenated vectors, i constant; only where the instruction
 * set has one instruction for it.  Others use unaligned loads. */
#if defined(__x86_64__) && LR_BYTES == 64
#define LR_SHIFT_F32(A, B, I) ((VECTOR)_mm512_alignr_epi32((__m512i)(B), (__m512i)(A), I))
#define LR_SHIFT_F64(A, B, I) ((VECTOR)_mm512_alignr_epi64((__m512i)(B), (__m512i)(A), I))
#endif

/* Lanes of two vectors, selected by indices from 0 to 2 L - 1. */
#ifdef __clang__ /* its shuffle takes constant indices only */
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
