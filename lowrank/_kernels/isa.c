/* All kernels for one instruction set: compiled once per set, with its name LR_ISA and vector width
 * LR_BYTES.  Threads and allocation are left to dispatch.c.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "lr.h"
#include "program.h"

#define LR_JOIN_(a, b) a##_##b
#define LR_JOIN(a, b) LR_JOIN_(a, b)
#define LR_MAX_DEPTHWISE_TAPS 1024 /* per channel, at most, in depthwise.inc; dense.inc runs more */
#define LR_PACKED_BYTES 16384 /* bytes of channels that a depthwise stage packs at a time, well inside L1 */
#define LR_MAX_REMAINDER 4 /* remainder samples of a run, at most, that get no vector */
#define LR_SCATTER_TAPS 32 /* taps that take as long as scattering one output row */
#define LR_SMALL_PLANE 256 /* samples of a plane, at most, that runs channels-last (lanes.inc) */
#define LR_SMALL_PLANE_TAPS 64 /* taps, at most, of such a plane */
#define LR_PACKED_CHANNELS 16 /* that a depthwise stage packs at a time, at most: L or more */
#define LR_MAX_STAGES 16 /* per chain, at most; the caller splits longer ones */

#if LR_BYTES == 64
#define LR_ROWS 8 /* 8 x 3 accumulators of 32 registers */
#define LR_SUMS 24 /* accumulators of a channels-last block, at most */
#define LR_VECTORS 4 /* of output channels per channels-last block */
#define LR_PIXELS 16 /* of such a block, at most */
#define LR_SLIDE 8   /* pixels of a channels-last depthwise block */
#define LR_DEPTHWISE_VECTORS 4 /* vectors per block of 4 rows in depthwise.inc: 16 accumulators */
#define LR_COLUMN_VECTORS 4 /* the same for kernels of one column */
#elif LR_BYTES == 32
#define LR_ROWS 4 /* 4 x 3 accumulators of 16 registers */
#define LR_SUMS 12
#define LR_VECTORS 2
#define LR_PIXELS 12
#define LR_SLIDE 4
#define LR_DEPTHWISE_VECTORS 3 /* 12 accumulators */
#define LR_COLUMN_VECTORS 2
#elif defined(__aarch64__) /* NEON: 32 registers, FMA with one lane as a factor */
#define LR_ROWS 4 /* 4 x 5 accumulators: one load has the factors of all rows */
#define LR_SUMS 21
#define LR_VECTORS 4
#define LR_PIXELS 12
#define LR_SLIDE 8
#define LR_DEPTHWISE_VECTORS 4
#define LR_COLUMN_VECTORS 4
#else
#define LR_ROWS 4
#define LR_SUMS 8 /* without FMA, products take registers, too */
#define LR_VECTORS 2
#define LR_PIXELS 8
#define LR_SLIDE 4
#define LR_DEPTHWISE_VECTORS 2 /* 8 accumulators */
#define LR_COLUMN_VECTORS 2
#endif

/* Unroll the next loop, of N rounds at most: sums stay in registers only where all of it is unrolled.
 * Clang does that before it assigns registers for this word alone. */
#define LR_PRAGMA(WORDS) _Pragma(#WORDS)
#ifdef __clang__
#pragma clang diagnostic ignored "-Wpass-failed" /* of loops that no constant bounds */
#define LR_UNROLL(N) LR_PRAGMA(clang loop unroll(full))
#else
#define LR_UNROLL(N) LR_PRAGMA(GCC unroll N)
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

/* The larger and the smaller of a and b; b where one is NaN. */
#if defined(__x86_64__)
#if LR_BYTES == 64
#define LR_X86(NAME) _mm512_##NAME
#elif LR_BYTES == 32
#define LR_X86(NAME) _mm256_##NAME
#else
#define LR_X86(NAME) _mm_##NAME
#endif
#define LR_MAX_F32(A, B) ((V)LR_X86(max_ps)((VF)(A), (VF)(B)))
#define LR_MIN_F32(A, B) ((V)LR_X86(min_ps)((VF)(A), (VF)(B)))
#define LR_MAX_F64(A, B) ((V)LR_X86(max_pd)((VF)(A), (VF)(B)))
#define LR_MIN_F64(A, B) ((V)LR_X86(min_pd)((VF)(A), (VF)(B)))
#endif

/* Samples of the integers that a type loads without a copy, and results as such integers. */
#if defined(__x86_64__)
#if LR_BYTES == 64
#define LR_LOAD_F32(P) _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(P))))
#define LR_LOAD_F64(P) _mm512_cvtepi32_pd(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(P))))
/* Minima return the second value if one is NaN, which converts to the smallest integer. */
#define LR_STORE_F32(TO, VALUE) \
    _mm_storeu_si128((__m128i *)(TO), _mm512_cvtusepi32_epi8(_mm512_max_epi32(_mm512_setzero_si512(), \
        _mm512_cvtps_epi32(_mm512_min_ps(_mm512_set1_ps(255), (__m512)(VALUE))))))
#define LR_STORE_F64(TO, VALUE) \
    _mm_storeu_si128((__m128i *)(TO), _mm256_cvtusepi32_epi16(_mm256_max_epi32(_mm256_setzero_si256(), \
        _mm512_cvtpd_epi32(_mm512_min_pd(_mm512_set1_pd(65535), (__m512d)(VALUE))))))
#elif LR_BYTES == 32
#define LR_LOAD_F32(P) _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(P))))
#define LR_LOAD_F64(P) _mm256_cvtepi32_pd(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)(P))))
#endif
#endif

/* Keep a loaded vector in its register: GCC would load it again for each of its uses. */
#if defined(__x86_64__)
#define LR_KEEP(VECTOR) __asm__("" : "+v"(VECTOR))
#elif defined(__aarch64__)
#define LR_KEEP(VECTOR) __asm__("" : "+w"(VECTOR))
#else
#define LR_KEEP(VECTOR) (void)0
#endif
#define LR_KEEP_INTEGER(VALUE) __asm__("" : "+r"(VALUE)) /* or derive it from another */

/* Lanes of two vectors, selected by indices from 0 to 2 L - 1. */
#ifdef __clang__ /* its shuffle takes constant indices only */
#define LR_PICK(A, B, LANE) LR_NAME(pick)(A, B, LANE)
#else
#define LR_PICK(A, B, LANE) __builtin_shuffle(A, B, LANE)
#endif

#define LR_WHOLE(name) LR_NAME(LR_JOIN(name, whole))
#define LR_HALF(name) LR_NAME(LR_JOIN(name, half))
#define LR_QUARTER(name) LR_NAME(LR_JOIN(name, quarter))

#define LR_BOX 512     /* samples of a Toom-Cook tile, at most: 8 along each axis */
#define LR_OUT_BOX 216 /* and of its outputs */

#define LR_COLOURS 4 /* channels of an image whose rows are filtered, at most */
#define LR_SHORT_TILE 2048 /* samples of a row in image.inc, if the buffer holds rows */
#define LR_TRANSPOSED_TILE 4096 /* samples of the buffer, if it is transposed: 16 KiB of L1 */
#define LR_COPIED_TAPS 8 /* along columns, from which on rows are copied: more would evict each other */
#define LR_RUN 4      /* vectors of a line that are copied at once ahead of a transpose */
#define LR_PITCH 16   /* samples between rows of a ring: a cache line of float32 */
#define LR_LINE_RUN 1024 /* samples whose sums across stay in L1 */
#define LR_SHORT_BOX 16  /* samples of a window, at most, that is summed by sums of 2, 4, 8, ... of them */

#define LR_TILES 64   /* tiles at a time, at most */
#define LR_GRADIENT_BYTES 393216 /* of packed rows that an item of a gradient reads: well inside L2 */
#define LR_STRIP 64   /* pixels of a strip of a channels-last depthwise stage: 3 rows take 12 KiB of L1 */

#define LR_SINGLE
#define T float
#ifdef LR_MAX_F32
#define LR_MAX LR_MAX_F32
#define LR_MIN LR_MIN_F32
#if LR_BYTES == 64
#define VF __m512
#elif LR_BYTES == 32
#define VF __m256
#else
#define VF __m128
#endif
#endif
#define I int32_t
#define L (LR_BYTES / 4)
#define LR_NAME(name) LR_JOIN(name, f32)
#ifdef LR_SHIFT_F32
#define LR_SHIFT LR_SHIFT_F32
#endif
#ifdef LR_LOAD_F32
#define LR_LOAD LR_LOAD_F32
#endif
#ifdef LR_STORE_F32
#define LR_STORE LR_STORE_F32
#endif
#include "type.inc"
#undef LR_SINGLE
#undef T
#undef I
#undef L
#undef LR_NAME
#undef LR_SHIFT
#undef LR_LOAD
#undef LR_STORE

#define T double
#ifdef LR_MAX_F64
#undef LR_MAX
#undef LR_MIN
#undef VF
#define LR_MAX LR_MAX_F64
#define LR_MIN LR_MIN_F64
#if LR_BYTES == 64
#define VF __m512d
#elif LR_BYTES == 32
#define VF __m256d
#else
#define VF __m128d
#endif
#endif
#define I int64_t
#define L (LR_BYTES / 8)
#define LR_NAME(name) LR_JOIN(name, f64)
#ifdef LR_SHIFT_F64
#define LR_SHIFT LR_SHIFT_F64
#endif
#ifdef LR_LOAD_F64
#define LR_LOAD LR_LOAD_F64
#endif
#ifdef LR_STORE_F64
#define LR_STORE LR_STORE_F64
#endif
#include "type.inc"
#include "box_integers.inc"

const lr_isa LR_JOIN(lr, LR_ISA) = {
    {{LR_BYTES / 4, LR_ROWS, 8 * LR_BYTES / 4, LR_MAX_REMAINDER, LR_PACKED_CHANNELS, LR_MAX_STAGES,
      LR_COLOURS},
     pack_weights_f32, tile_f32, paths_f32, peak_f32, filter_pass_f32, plan_image_f32, image_band_f32,
     resample_f32, resample_bytes_f32, filter_box_f32, filter_box_bytes_f32,
     LR_VECTORS, most_pixels_f32, scratch_f32, run_op_f32, plan_gradient_f32, gradient_f32, finish_gradient_f32},
    {{LR_BYTES / 8, LR_ROWS, 8 * LR_BYTES / 8, LR_MAX_REMAINDER, LR_PACKED_CHANNELS, LR_MAX_STAGES,
      LR_COLOURS},
     pack_weights_f64, tile_f64, paths_f64, peak_f64, filter_pass_f64, plan_image_f64, image_band_f64,
     resample_f64, resample_bytes_f64, filter_box_f64, filter_box_bytes_f64,
     LR_VECTORS, most_pixels_f64, scratch_f64, run_op_f64, plan_gradient_f64, gradient_f64, finish_gradient_f64},
    filter_integers, filter_integers_bytes,
};
