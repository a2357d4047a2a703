/* GPU kernels: templates, compiled for a device when a plan first uses them.
 *
 * Taps, strides and tiles are template arguments: loops over them are unrolled and no register array has
 * a run-time index.  Borders are tables: `pos` holds the input index of every padded position of an
 * axis, or -1 for zero.  Threads whose samples are all inside do not read the tables.
 *
 * T is the storage type: u8, f16, bf16, float or double; sums are double for double, float otherwise.
 * Weights of depthwise stages and filters have the type of the sums.
 *
 * The source needs no header, so that any CUDA C++ compiler accepts it.  Tests compile it for the CPU
 * with the header that LR_SHIM names.
 */
#ifdef LR_SHIM
#include LR_SHIM
#else
#define LR_SHARED(S)                                                                                       \
    extern __shared__ __align__(16) double lr_shared[];                                                    \
    S *const shared = (S *)lr_shared
#endif

typedef long long i64;
typedef unsigned u32;
typedef unsigned char u8;

/* --- storage types -------------------------------------------------------------------------------- */

struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };

template <class T> struct sum_of { typedef float type; };
template <> struct sum_of<double> { typedef double type; };
#define SUM typename sum_of<T>::type

__device__ inline float wide(float v) { return v; }
__device__ inline double wide(double v) { return v; }
__device__ inline float wide(u8 v) { return v; }
__device__ inline float wide(bf16 v) { return __uint_as_float((u32)v.bits << 16); }
__device__ inline float wide(f16 v)
{
#ifdef LR_SHIM
    return lr_half_to_float(v.bits);
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
#endif
}

__device__ inline void narrow(float v, float *to) { *to = v; }
__device__ inline void narrow(double v, double *to) { *to = v; }
__device__ inline void narrow(float v, u8 *to) /* round to nearest, halves to even, and saturate */
{
    v = v > 0 ? v : 0;
    v = v < 255 ? v : 255;
    *to = (u8)__float_as_uint(v + 8388608.0f); /* 2^23: the last bit of the sum is 1 */
}
__device__ inline void narrow(float v, bf16 *to) /* round to nearest, halves to even */
{
#if defined(LR_SHIM) || __CUDA_ARCH__ < 800
    const u32 u = __float_as_uint(v);
    to->bits = v != v ? 0x7fff : (unsigned short)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(v));
#endif
}
__device__ inline void narrow(float v, f16 *to)
{
#ifdef LR_SHIM
    to->bits = lr_float_to_half(v);
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(v));
#endif
}

/* Values that are loaded and stored together, in up to 16 bytes. */
template <class T, int N> struct alignas(sizeof(T) * N) pack { T v[N]; };
template <class T, int N> __device__ inline pack<T, N> load(const T *from)
{
    return *(const pack<T, N> *)from;
}
template <class T, int N> __device__ inline void store(const pack<T, N> &p, T *to)
{
    *(pack<T, N> *)to = p;
}

__device__ constexpr int most(int a, int b) { return a > b ? a : b; }
__device__ constexpr int least(int a, int b) { return a < b ? a : b; }

__device__ inline double larger(double a, double b) { return a < b ? b : a; } /* NaN in a stays */
__device__ inline double smaller(double a, double b) { return a > b ? b : a; }
#if defined(LR_SHIM) || __CUDA_ARCH__ < 800
__device__ inline float larger(float a, float b) { return a < b ? b : a; }
__device__ inline float smaller(float a, float b) { return a > b ? b : a; }
#else
__device__ inline float larger(float a, float b)
{
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
    return a;
}
__device__ inline float smaller(float a, float b)
{
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
    return a;
}
#endif

/* Limits of an activation, without branches in the loops: 0 none, 1 ReLU, 2 ReLU6. */
struct limits {
    float low, high;
    __device__ limits(int activation)
        : low(activation ? 0 : __uint_as_float(0xff800000u)),
          high(activation == 2 ? 6 : __uint_as_float(0x7f800000u))
    {
    }
    template <class S> __device__ S operator()(S v) const { return smaller(larger(v, (S)low), (S)high); }
};

/* --- planes: separable filters and depthwise stages ------------------------------------------------- */

/* Shape of a filter of KH x KW taps whose threads compute V neighbouring outputs of a row, and the rows
 * below.  Taps of a row are STEP samples apart: STEP interleaved channels, such as colours, are filtered
 * alike.  FORM: 0, KH x KW taps; 1, one column of KH and one row of KW taps; 2, a sum of such products. */
template <class TI, class TO, int KH, int KW, int STRIDE, int STEP, int V, int OFFSET, int FORM>
struct planar {
    typedef typename sum_of<TI>::type S;
    static constexpr int RING =
        (KH + STRIDE - 1) / STRIDE; /* rows of outputs that one row of inputs adds to */
    static constexpr int PERIOD = RING * STRIDE;
    /* Rows of inputs per iteration; planes may have a single row. */
    static constexpr int ROWS = PERIOD < 4 && KH > 1 ? PERIOD * (4 / PERIOD) : PERIOD;
    static constexpr int SPAN = (V - 1) * STRIDE + (KW - 1) * STEP + 1;   /* samples of a row of inputs */
    /* Samples of a vector: a power of 2 that divides the distance of two threads. */
    static constexpr int WIDTH = least(V * STRIDE & -(V * STRIDE), 16 / (int)sizeof(TI));
    static constexpr int VECTORS = (most(OFFSET, 0) + SPAN + WIDTH - 1) / WIDTH;
    static constexpr int BORDER = KH > 7 ? 1 : V; /* columns at a time at the borders */
    static constexpr int TAPS = FORM ? KH + KW : KH * KW;
    static constexpr bool HELD = FORM < 2 && TAPS * sizeof(S) <= 256; /* taps stay in registers */
};

/* Make the compiler load from `p` again: taps kept from row to row would spill registers. */
template <class S> __device__ inline void hide(const S *&p)
{
#ifdef LR_SHIM
    (void)p;
#else
    asm volatile("" : "+l"(p));
#endif
}

/* Add one row of inputs, number `p` of a period, to the outputs that read it. */
template <class P, int KH, int KW, int STRIDE, int STEP, int V, int FORM, class S>
__device__ inline void add_row(S (&sum)[P::RING][V], const S (&v)[P::SPAN], const S *taps, int terms, int p)
{
    for (int term = 0; term < (FORM == 2 ? terms : 1); term++, taps += P::TAPS) {
        S row[V];
        if (FORM) {
#pragma unroll
            for (int i = 0; i < V; i++) row[i] = taps[KH] * v[i * STRIDE];
#pragma unroll
            for (int tw = 1; tw < KW; tw++)
#pragma unroll
                for (int i = 0; i < V; i++) row[i] += taps[KH + tw] * v[i * STRIDE + tw * STEP];
        }
#pragma unroll
        for (int th = 0; th < KH; th++) {
            if ((p - th + P::ROWS * KH) % STRIDE) continue;
            const int slot = (p - th + P::ROWS * KH) / STRIDE % P::RING;
            if (FORM) {
#pragma unroll
                for (int i = 0; i < V; i++) sum[slot][i] += taps[th] * row[i];
            } else {
#pragma unroll
                for (int tw = 0; tw < KW; tw++)
#pragma unroll
                    for (int i = 0; i < V; i++)
                        sum[slot][i] += taps[th * KW + tw] * v[i * STRIDE + tw * STEP];
            }
        }
    }
}

/* Compute a strip of V columns: `periods` times ROWS rows of inputs, each read once.  INSIDE: all
 * samples are in the image and all outputs exist; x is the first sample, less OFFSET. */
template <class TI, class TO, int KH, int KW, int STRIDE, int STEP, int V, int OFFSET, int FORM,
          bool INSIDE>
__device__ inline void
strip(const TI *__restrict__ x, TO *__restrict__ y, const typename sum_of<TI>::type *__restrict__ weight,
      typename sum_of<TI>::type bias, const int *__restrict__ pos_h, const int *__restrict__ pos_w, int iw,
      int ow, int rows, int columns, int periods, int terms, limits within)
{
    typedef planar<TI, TO, KH, KW, STRIDE, STEP, V, OFFSET, FORM> P;
    typedef typename P::S S;
    S sum[P::RING][V], held[P::HELD ? P::TAPS : 1];
#pragma unroll
    for (int i = 0; P::HELD && i < P::TAPS; i++) held[i] = weight[i];
    const S *taps = P::HELD ? held : weight;
#pragma unroll
    for (int k = 0; k < P::RING; k++)
#pragma unroll
        for (int i = 0; i < V; i++) sum[k][i] = bias;
    int at_w[P::SPAN];
    const int last_w = (columns - 1) * STRIDE + (KW - 1) * STEP, last_h = (rows - 1) * STRIDE + KH - 1;
    if (!INSIDE) {
#pragma unroll
        for (int i = 0; i < P::SPAN; i++) at_w[i] = i <= last_w ? pos_w[i] : -1;
    }
    for (int period = 0; period < periods; period++) {
#pragma unroll
        for (int p = 0; p < P::ROWS; p++) {
            S v[P::SPAN];
            if (FORM < 2 && !P::HELD) hide(taps);
            if constexpr (INSIDE && OFFSET >= 0) {
#pragma unroll
                for (int k = 0; k < P::VECTORS; k++) {
                    const pack<TI, P::WIDTH> part = load<TI, P::WIDTH>(x + k * P::WIDTH);
#pragma unroll
                    for (int i = 0; i < P::WIDTH; i++) {
                        const int at = k * P::WIDTH + i - OFFSET;
                        if (at >= 0 && at < P::SPAN) v[at] = wide(part.v[i]);
                    }
                }
                x += iw;
            } else if constexpr (INSIDE) {
#pragma unroll
                for (int i = 0; i < P::SPAN; i++) v[i] = wide(x[i]);
                x += iw;
            } else {
                const int row = period * P::ROWS + p, at_h = row <= last_h ? pos_h[row] : -1;
                const TI *const line = x + (i64)at_h * iw;
#pragma unroll
                for (int i = 0; i < P::SPAN; i++)
                    v[i] = at_h >= 0 && at_w[i] >= 0 ? (S)wide(line[at_w[i]]) : (S)0;
            }
            add_row<P, KH, KW, STRIDE, STEP, V, FORM>(sum, v, taps, terms, p);
            if ((p - (KH - 1) + P::ROWS * KH) % STRIDE) continue;
            const int slot = (p - (KH - 1) + P::ROWS * KH) / STRIDE % P::RING;
            /* The first KH - 1 rows complete no output. */
            const int h = period * (P::ROWS / STRIDE) + (p - (KH - 1) + P::ROWS * KH) / STRIDE -
                          P::ROWS * KH / STRIDE;
            if (p >= KH - 1 || h >= 0) {
                pack<TO, V> result;
#pragma unroll
                for (int i = 0; i < V; i++) narrow(within(sum[slot][i]), &result.v[i]);
                if constexpr (INSIDE && OFFSET >= 0) {
                    store<TO, V>(result, y);
                } else {
#pragma unroll
                    for (int i = 0; i < V; i++)
                        if (INSIDE || (h < rows && i < columns)) y[i] = result.v[i];
                }
                y += ow;
            }
#pragma unroll
            for (int i = 0; i < V; i++) sum[slot][i] = bias;
        }
    }
}

/* Filter planes; plane n of the outputs reads plane n / per of the inputs.  Each channel has `depth`
 * planes; channel c has the taps c % sets.  weight: (sets, terms, taps), those of a column before those
 * of a row.  A thread has one strip of an output plane. */
template <class TI, class TO, int KH, int KW, int STRIDE, int STEP, int V, int OFFSET, int FORM>
__global__ void __launch_bounds__(128)
    planes(const TI *__restrict__ x, TO *__restrict__ y, i64 outputs, i64 periods_per_strip,
           const typename sum_of<TI>::type *__restrict__ weight,
           const typename sum_of<TI>::type *__restrict__ bias, const int *__restrict__ pos_h,
           const int *__restrict__ pos_w, int per, int sets, int channels, int depth, int ih, int iw,
           int oh, int ow, int top, int left, int terms, int activation)
{
    typedef planar<TI, TO, KH, KW, STRIDE, STEP, V, OFFSET, FORM> P;
    const int periods = (int)periods_per_strip, rows = (periods * P::ROWS - KH) / STRIDE + 1; /* per strip */
    const u32 across = (u32)(ow + V - 1) / V, down = (u32)(oh + rows - 1) / rows;
    const u32 n = blockIdx.x * blockDim.x + threadIdx.x, over = n / across;
    const int w0 = (int)(n % across) * V, h0 = (int)(over % down) * rows;
    const u32 plane = over / down, channel = plane / depth;
    const int exists = plane < (u32)outputs, h = h0 * STRIDE - top,
              w = w0 * STRIDE - left - most(OFFSET, 0);
    const int inside = h >= 0 && w >= 0 && h + periods * P::ROWS <= ih &&
                       w + (OFFSET < 0 ? P::SPAN : P::VECTORS * P::WIDTH) <= iw && h0 + rows <= oh &&
                       w0 + V <= ow;
    /* All threads of a warp take the same branch. */
    const int is_fast = __all_sync(0xffffffffu, inside || !exists);
    if (!exists) return;
    const limits within(activation);
    const typename sum_of<TI>::type b = bias[channel % channels];
    x += (i64)(plane / per) * ih * iw;
    y += ((i64)plane * oh + h0) * ow + w0;
    weight += (i64)(channel % sets) * terms * P::TAPS;
    if (is_fast)
        strip<TI, TO, KH, KW, STRIDE, STEP, V, OFFSET, FORM, true>(
            x + (i64)h * iw + w, y, weight, b, pos_h, pos_w, iw, ow, rows, V, periods, terms, within);
    else
        /* Many taps: single columns, since four times the code takes seconds to compile. */
        for (int i = 0; i < V && w0 + i < ow; i += P::BORDER)
            strip<TI, TO, KH, KW, STRIDE, STEP, P::BORDER, OFFSET, FORM, false>(
                x, y + i, weight, b, pos_h + h0 * STRIDE, pos_w + (w0 + i) * STRIDE, iw, ow,
                least(oh - h0, rows), least(ow - w0 - i, P::BORDER), periods, terms, within);
}

/* Depthwise stage of any geometry; a block computes outputs of one plane.  weight: (sets, taps). */
template <class T> __global__ void __launch_bounds__(256)
    depthwise_any(const T *__restrict__ x, T *__restrict__ y, const SUM *__restrict__ weight,
                  const SUM *__restrict__ bias, const int *__restrict__ pos_d,
                  const int *__restrict__ pos_h, const int *__restrict__ pos_w, int per, int sets,
                  int channels, int id, int ih, int iw, int od, int oh, int ow, int kd, int kh, int kw,
                  int sd, int sh, int sw, int dd, int dh, int dw, int activation)
{
    const u32 samples = (u32)od * oh * ow, blocks = (samples + blockDim.x - 1) / blockDim.x;
    const u32 plane = blockIdx.x / blocks, n = blockIdx.x % blocks * blockDim.x + threadIdx.x;
    if (n >= samples) return;
    const int w = (int)(n % ow), h = (int)(n / ow % oh), d = (int)(n / ow / oh);
    const limits within(activation);
    SUM sum = bias[plane % channels];
    weight += (i64)(plane % sets) * kd * kh * kw;
    for (int t = 0; t < kd * kh; t++) {
        const int at_d = pos_d[d * sd + t / kh * dd], at_h = pos_h[h * sh + t % kh * dh];
        if (at_d < 0 || at_h < 0) continue;
        const T *const line = x + (((i64)(plane / per) * id + at_d) * ih + at_h) * iw;
        for (int tw = 0; tw < kw; tw++) {
            const int at_w = pos_w[w * sw + tw * dw];
            if (at_w >= 0) sum += weight[t * kw + tw] * wide(line[at_w]);
        }
    }
    narrow(within(sum), y + (i64)plane * samples + n);
}

/* --- channels last: depthwise stages and matrix products --------------------------------------------- */

/* Load V values, or zeros.  Halves are loaded as pairs: zeros of one half each would cost moves. */
template <class T, int V> __device__ inline void load_or_zero(bool is_inside, const T *from, SUM (&v)[V])
{
    if constexpr (sizeof(T) == 2 && V > 1) {
        pack<u32, V / 2> pairs = {};
        if (is_inside) pairs = *(const pack<u32, V / 2> *)from;
#pragma unroll
        for (int c = 0; c < V; c++) v[c] = wide(T{(unsigned short)(pairs.v[c / 2] >> c % 2 * 16)});
    } else {
        pack<T, V> part = {};
        if (is_inside) part = load<T, V>(from);
#pragma unroll
        for (int c = 0; c < V; c++) v[c] = wide(part.v[c]);
    }
}

/* Compute ROWS outputs of one column and V neighbouring channels.  `input(row, tap)` points at samples of
 * `input.row(p)`, and `output(row, sums)` stores; taps: (KH * KW, channels). */
template <class T, int KH, int KW, int STRIDE, int ROWS, int V, class Input, class Output>
__device__ inline void column(const Input &input, const SUM *__restrict__ taps, int channels,
                              const SUM *bias, const Output &output)
{
    constexpr bool HELD = KH * KW * V * (int)sizeof(SUM) <= 160; /* taps stay in registers */
    constexpr int N = least(V, 16 / (int)sizeof(SUM));
    SUM held[HELD ? KH * KW : 1][V], sum[ROWS][V];
#pragma unroll
    for (int k = 0; HELD && k < KH * KW; k++)
#pragma unroll
        for (int c = 0; c < V; c += N) {
            const pack<SUM, N> part = load<SUM, N>(taps + k * channels + c);
#pragma unroll
            for (int i = 0; i < N; i++) held[k][c + i] = part.v[i];
        }
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int c = 0; c < V; c++) sum[i][c] = bias[c];
#pragma unroll
    for (int p = 0; p < (ROWS - 1) * STRIDE + KH; p++) {
        const int row = input.row(p);
#pragma unroll
        for (int tw = 0; tw < KW; tw++) {
            SUM v[V];
            load_or_zero<T, V>(input.is_inside(row, tw), input(row, tw), v);
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const int th = p - i * STRIDE, k = th * KW + tw;
                if (th < 0 || th >= KH) continue;
#pragma unroll
                for (int c = 0; c < V; c += N) {
                    pack<SUM, N> part;
                    if (!HELD) part = load<SUM, N>(taps + k * channels + c);
#pragma unroll
                    for (int j = 0; j < N; j++)
                        sum[i][c + j] += (HELD ? held[HELD ? k : 0][c + j] : part.v[j]) * v[c + j];
                }
            }
        }
        if (p >= KH - 1 && (p - KH + 1) % STRIDE == 0)
            output((p - KH + 1) / STRIDE, sum[(p - KH + 1) / STRIDE]);
    }
}

/* Samples of an image from a row and a column of its padded positions on, or zeros. */
template <class T, int KW> struct last_input {
    const T *x;
    const int *pos_h;
    int rows, pitch, at[KW]; /* padded rows that exist; elements between rows; offset of each tap, or -1 */
    __device__ last_input(const T *first, const int *rows_of, const int *columns_of, int row, int column,
                          int high, int wide, int iw, int channels)
        : x(first), pos_h(rows_of + row), rows(high - row), pitch(iw * channels)
    {
#pragma unroll
        for (int tw = 0; tw < KW; tw++) {
            const int at_w = column + tw < wide ? columns_of[column + tw] : -1;
            at[tw] = at_w < 0 ? -1 : at_w * channels;
        }
    }
    __device__ int row(int p) const { return p < rows ? pos_h[p] : -1; }
    __device__ bool is_inside(int at_h, int tw) const { return (at_h | at[tw]) >= 0; }
    __device__ const T *operator()(int at_h, int tw) const { return x + ((i64)at_h * pitch + at[tw]); }
};

template <class T, int V> struct last_output {
    T *y;
    int rows, pitch; /* outputs that exist, and the elements between two of them */
    limits within;
    __device__ void operator()(int i, const SUM (&sum)[V]) const
    {
        pack<T, V> part;
#pragma unroll
        for (int c = 0; c < V; c++) narrow(within(sum[c]), &part.v[c]);
        if (i < rows) store<T, V>(part, y + (i64)i * pitch);
    }
};

/* Depthwise stage with `per` output channels per input channel; V is 1 if `per` is not. */
template <class T, int KH, int KW, int STRIDE, int ROWS, int V> __global__ void __launch_bounds__(128)
    depthwise_last(const T *__restrict__ x, T *__restrict__ y, i64 images, const SUM *__restrict__ taps,
                   const SUM *__restrict__ bias, const int *__restrict__ pos_h,
                   const int *__restrict__ pos_w, int per, int channels, int ih, int iw, int oh, int ow,
                   int activation)
{
    u32 n = blockIdx.x * blockDim.x + threadIdx.x;
    const u32 vectors = (u32)channels / V, down = (u32)(oh + ROWS - 1) / ROWS;
    const int c = (int)(n % vectors) * V;
    n /= vectors;
    const int w = (int)(n % (u32)ow);
    n /= (u32)ow;
    const int h = (int)(n % down) * ROWS;
    const i64 image = n / down;
    if (image >= images) return;
    const last_input<T, KW> input(x + image * ih * iw * (channels / per) + c / per, pos_h, pos_w,
                                  h * STRIDE, w * STRIDE, (oh - 1) * STRIDE + KH, (ow - 1) * STRIDE + KW,
                                  iw, channels / per);
    const last_output<T, V> output = {y + ((image * oh + h) * ow + w) * channels + c, oh - h, ow * channels,
                                      limits(activation)};
    column<T, KH, KW, STRIDE, ROWS, V>(input, taps + c, channels, bias + c, output);
}

/* Round a float32, halves away from zero, as the tensor cores drop 13 bits; NaN stays. */
__device__ inline u32 round_to_tf32(u32 v)
{
#ifdef LR_SHIM
    return (v & 0x7f800000) == 0x7f800000 ? v : v + 0x1000;
#else
    asm("cvt.rna.tf32.f32 %0, %0;" : "+r"(v));
    return v;
#endif
}

/* One product of 16 x 8 sums by tensor cores, c += a b; float is rounded to TF32. */
#ifdef LR_SHIM
#define MULTIPLY(T, SHAPE, TYPES)                                                                          \
    __device__ inline void multiply(T, float (&c)[4], const u32(&a)[4], u32 b0, u32 b1)                    \
    {                                                                                                      \
        lr_multiply(#TYPES, c, a, b0, b1);                                                                 \
    }
#else
#define MULTIPLY(T, SHAPE, TYPES)                                                                          \
    __device__ inline void multiply(T, float (&c)[4], const u32(&a)[4], u32 b0, u32 b1)                    \
    {                                                                                                      \
        asm volatile("mma.sync.aligned." #SHAPE ".row.col.f32." #TYPES                                     \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "                                 \
                     "{%0, %1, %2, %3};"                                                                   \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                      \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                      \
    }
#endif
MULTIPLY(float, m16n8k8, tf32.tf32)
#if defined(LR_SHIM) || __CUDA_ARCH__ >= 800
MULTIPLY(bf16, m16n8k16, bf16.bf16)
#endif
MULTIPLY(f16, m16n8k16, f16.f16)

/* Multiply 32 samples by the weights of 32 outputs, per warp and item, with the sums in registers.
 *
 * The order of the inputs is free, so a thread takes 16 neighbouring bytes of a sample, which are those of
 * two products of 16 x 8; and the order of the outputs is free, so they are 4 neighbours per thread.
 * `row(i)` is a pointer to `filled` channels of sample i, or 0 for zeros; `store(i, o, sums)` gets the
 * outputs from o on.  weight: as `_packed` in channels_last.py orders it, with zeros up to multiples of 32
 * outputs and 64 bytes of inputs, `steps` of them. */
template <class T, class Row, class Store>
__device__ inline void product(const Row &row, int rows, const T *__restrict__ weight,
                               const float *__restrict__ bias, int filled, int steps, int outs,
                               const Store &store)
{
    constexpr int N = 16 / (int)sizeof(T);
    const int lane = threadIdx.x % 32, group = lane / 4, k0 = lane % 4 * N, tiles = (rows + 31) / 32;
    for (int item = threadIdx.x / 32; item < tiles * ((outs + 31) / 32); item += blockDim.x / 32) {
        const int i0 = item % tiles * 32, block = item / tiles, o = block * 32 + group * 4;
        const pack<u32, 4> *left = (const pack<u32, 4> *)weight + block * steps * 128 + lane;
        const T *from[4];
        float sum[2][4][4];
#pragma unroll
        for (int j = 0; j < 4; j++) from[j] = row(i0 + 8 * j + group);
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const float b = o + c < outs ? bias[o + c] : 0;
#pragma unroll
            for (int j = 0; j < 4; j++) sum[c / 2][j][c % 2 * 2] = sum[c / 2][j][c % 2 * 2 + 1] = b;
        }
#pragma unroll 1
        for (int k = k0; k < steps * 4 * N; k += 4 * N, left += 128) {
            pack<u32, 4> a[4], b[4];
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = left[32 * i];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (Row::IS_FULL || (from[j] && k < filled))
                    b[j] = *(const pack<u32, 4> *)(from[j] + k);
                else
                    b[j] = {{0, 0, 0, 0}};
                if (sizeof(T) == 4)
#pragma unroll
                    for (int e = 0; e < 4; e++) b[j].v[e] = round_to_tf32(b[j].v[e]);
            }
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int j = 0; j < 4; j++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        multiply(T(), sum[i][j], a[2 * i + half].v, b[j].v[2 * half], b[j].v[2 * half + 1]);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float out[4];
#pragma unroll
            for (int c = 0; c < 4; c++) out[c] = sum[c / 2][j / 2][c % 2 * 2 + j % 2];
            store(i0 + j / 2 * 8 + lane % 4 * 2 + j % 2, o, out);
        }
    }
}

/* Elements between rows in shared memory: rows of 64 bytes, an odd number of them, so that the 16-byte
 * loads of two rows hit different banks. */
template <class T> __device__ inline int pitch_of(int channels)
{
    return ((channels * (int)sizeof(T) + 63) / 64 | 1) * (64 / (int)sizeof(T));
}

/* Pointers to the samples of a tile of an image, with its halo. */
template <class T, int TW> struct halo_rows {
    const T *x;
    const int *pos_h, *pos_w;
    int row, column, rows, columns, iw, channels, count;
    static constexpr bool IS_FULL = false;
    __device__ const T *operator()(int i) const
    {
        const int h = row + i / TW, w = column + i % TW;
        const int at_h = i < count && h < rows ? pos_h[h] : -1, at_w = w < columns ? pos_w[w] : -1;
        return at_h >= 0 && at_w >= 0 ? x + (i64)(at_h * iw + at_w) * channels : 0;
    }
};

template <class T> __device__ inline void store_four(float (&sum)[4], limits within, T *to)
{
    pack<T, 4> part;
#pragma unroll
    for (int c = 0; c < 4; c++) narrow(within(sum[c]), &part.v[c]);
    store<T, 4>(part, to);
}

template <class T, class Rows> struct halo_store {
    T *to;
    Rows from;
    int pitch, outs;
    limits within;
    __device__ void operator()(int i, int o, float (&sum)[4]) const
    {
        if (i >= from.count || o >= outs) return;
        if (!from(i)) sum[0] = sum[1] = sum[2] = sum[3] = 0; /* beyond the border of the depthwise stage */
        store_four(sum, within, to + i * pitch + o);
    }
};

template <class T> struct shared_input {
    const T *x; /* first sample of the thread */
    int width, pitch;
    __device__ int row(int p) const { return p * width; }
    __device__ bool is_inside(int, int) const { return true; }
    __device__ const T *operator()(int row, int tw) const { return x + (row + tw) * pitch; }
};

template <class T> struct shared_rows {
    const T *x;
    int pitch;
    static constexpr bool IS_FULL = true;
    __device__ const T *operator()(int i) const { return x + i * pitch; }
};

template <class T, int TW> struct tile_store {
    T *y;                        /* first output of the tile */
    int rows, columns, ow, outs; /* rows and columns of the tile that exist */
    limits within;
    __device__ void operator()(int i, int o, float (&sum)[4]) const
    {
        const int h = i / TW, w = i % TW;
        if (h < rows && w < columns && o < outs) store_four(sum, within, y + (h * ow + w) * outs + o);
    }
};

/* Depthwise and pointwise stage, after a pointwise one if FIRST, by tensor cores: one tile of TH x TW
 * outputs per block.  The inputs of the depthwise stage, with their halo, and its outputs are in shared
 * memory, each computed once; the pointwise weights are read through the caches.  `outs`, and `middle` if
 * FIRST, are multiples of 4. */
template <class T, int KH, int KW, int STRIDE, int TH, int TW, int V, int FIRST>
__global__ void __launch_bounds__(256, KH > 3 || KW > 3 ? 1 : 2)
    fused(const T *__restrict__ x, T *__restrict__ y, const T *__restrict__ weight0,
          const float *__restrict__ bias0, const float *__restrict__ taps, const float *__restrict__ bias1,
          const T *__restrict__ weight2, const float *__restrict__ bias2, const int *__restrict__ pos_h,
          const int *__restrict__ pos_w, int ins, int middle, int per, int outs, int ih, int iw, int oh,
          int ow, int activation0, int activation1, int activation2)
{
    constexpr int HALO_H = (TH - 1) * STRIDE + KH, HALO_W = (TW - 1) * STRIDE + KW, ROWS = KH > 3 ? 2 : 4,
                  UNIT = 64 / (int)sizeof(T);
    static_assert(TH % ROWS == 0 && TH * TW % 32 == 0, "whole columns, and whole tiles of the product");
    LR_SHARED(T);
    const int channels = middle * per, pitch = pitch_of<T>(channels),
              depth = (channels + UNIT - 1) / UNIT * UNIT;
    const int halo_pitch = pitch_of<T>(middle);
    T *const halo = shared + TH * TW * pitch;
    const u32 across = (u32)(ow + TW - 1) / TW, down = (u32)(oh + TH - 1) / TH, over = blockIdx.x / across;
    const int w0 = (int)(blockIdx.x % across) * TW, h0 = (int)(over % down) * TH;
    const i64 image = over / down;
    x += image * ih * iw * ins;
    y += ((image * oh + h0) * ow + w0) * outs;
    const int rows = (oh - 1) * STRIDE + KH, columns = (ow - 1) * STRIDE + KW;
    if constexpr (FIRST) {
        const halo_rows<T, HALO_W> from = {x,    pos_h,   pos_w, h0 * STRIDE, w0 * STRIDE,
                                           rows, columns, iw,    ins,         HALO_H * HALO_W};
        const halo_store<T, halo_rows<T, HALO_W>> to = {halo, from, halo_pitch, middle,
                                                        limits(activation0)};
        product<T>(from, HALO_H * HALO_W, weight0, bias0, ins, (ins + UNIT - 1) / UNIT, middle, to);
        __syncthreads();
    }
    /* The neighbours of a warp are neighbouring channels; those beyond the last are zero. */
    for (int item = threadIdx.x; item < depth / V * TW * (TH / ROWS); item += blockDim.x) {
        const int c = item % (depth / V) * V, column0 = item / (depth / V) % TW,
                  row0 = item / (depth / V) / TW * ROWS;
        const last_output<T, V> output = {shared + (row0 * TW + column0) * pitch + c, ROWS, TW * pitch,
                                          limits(activation1)};
        if (c >= channels) {
            const float zeros[V] = {};
#pragma unroll
            for (int i = 0; i < ROWS; i++) output(i, zeros);
            continue;
        }
        if constexpr (FIRST) {
            const shared_input<T> input = {halo + (row0 * HALO_W + column0) * STRIDE * halo_pitch + c / per,
                                           HALO_W, halo_pitch};
            column<T, KH, KW, STRIDE, ROWS, V>(input, taps + c, channels, bias1 + c, output);
        } else {
            const last_input<T, KW> input(x + c / per, pos_h, pos_w, (h0 + row0) * STRIDE,
                                          (w0 + column0) * STRIDE, rows, columns, iw, ins);
            column<T, KH, KW, STRIDE, ROWS, V>(input, taps + c, channels, bias1 + c, output);
        }
    }
    __syncthreads();
    const shared_rows<T> from = {shared, pitch};
    const tile_store<T, TW> to = {y, oh - h0, ow - w0, ow, outs, limits(activation2)};
    product<T>(from, TH * TW, weight2, bias2, depth, depth / UNIT, outs, to);
}

/* --- around products of cuBLAS ----------------------------------------------------------------------- */

/* Swap the axes of `count` matrices (rows, columns): channels first to channels last, and back. */
template <class T> __global__ void __launch_bounds__(256)
    transpose(const T *__restrict__ x, T *__restrict__ y, int rows, int columns)
{
    __shared__ T tile[32][33]; /* 33: lanes of a column hit different banks */
    const u32 across = (u32)(columns + 31) / 32, down = (u32)(rows + 31) / 32, over = blockIdx.x / across;
    const int c0 = (int)(blockIdx.x % across) * 32, r0 = (int)(over % down) * 32;
    const i64 first = (i64)(over / down) * rows * columns;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < 32; i += 8)
        if (r0 + warp + i < rows && c0 + lane < columns)
            tile[warp + i][lane] = x[first + (i64)(r0 + warp + i) * columns + c0 + lane];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 32; i += 8)
        if (c0 + warp + i < columns && r0 + lane < rows)
            y[first + (i64)(c0 + warp + i) * rows + r0 + lane] = tile[lane][warp + i];
}

/* im2col of `count` rows of outputs, from number `first` on, which are (images, od, oh):
 * (count, ow, groups, kd, kh, kw, channels per group); a thread copies V channels of one row of taps. */
template <class T, int V> __global__ void __launch_bounds__(256)
    unroll(const T *__restrict__ x, T *__restrict__ to, i64 first, i64 count,
           const int *__restrict__ pos_d, const int *__restrict__ pos_h, const int *__restrict__ pos_w,
           int groups, int ins, int id, int ih, int iw, int od, int oh, int ow, int kd, int kh, int kw,
           int sd, int sh, int sw, int dd, int dh, int dw)
{
    u32 n = blockIdx.x * blockDim.x + threadIdx.x;
    const u32 vectors = (u32)ins / V, tap_rows = (u32)(kd * kh);
    const int c = (int)(n % vectors) * V;
    n /= vectors;
    const i64 row = n; /* of taps, among all */
    const int tap = (int)(n % tap_rows);
    n /= tap_rows;
    const int group = (int)(n % (u32)groups);
    n /= (u32)groups;
    const int w = (int)(n % (u32)ow);
    n /= (u32)ow;
    if (n >= (u32)count) return;
    n += (u32)first; /* fewer than 2^31 rows */
    const int h = (int)(n % (u32)oh);
    n /= (u32)oh;
    const int d = (int)(n % (u32)od);
    const i64 image = n / (u32)od;
    const int at_d = pos_d[d * sd + tap / kh * dd], at_h = pos_h[h * sh + tap % kh * dh];
    const i64 line = ((image * id + at_d) * ih + at_h) * iw;
    for (int tw = 0; tw < kw; tw++) {
        const int at_w = pos_w[w * sw + tw * dw];
        pack<T, V> part;
        if (at_d >= 0 && at_h >= 0 && at_w >= 0)
            part = load<T, V>(x + (line + at_w) * groups * ins + group * ins + c);
        else
#pragma unroll
            for (int i = 0; i < V; i++) narrow((SUM)0, &part.v[i]);
        store<T, V>(part, to + (row * kw + tw) * ins + c);
    }
}

/* Add bias and activation in place, V channels per thread: (samples, channels). */
template <class T, int V> __global__ void __launch_bounds__(256)
    epilogue(T *y, i64 samples, const SUM *__restrict__ bias, int channels, int activation)
{
    const i64 n = (blockIdx.x * (i64)blockDim.x + threadIdx.x) * V;
    if (n >= samples * channels) return;
    const int channel = (int)((u32)(n / V) % ((u32)channels / V)) * V; /* fewer than 2^32 vectors */
    const limits within(activation);
    pack<T, V> part = load<T, V>(y + n);
#pragma unroll
    for (int i = 0; i < V; i++) {
        SUM v = wide(part.v[i]);
        if (bias) v += bias[channel + i];
        narrow(within(v), &part.v[i]);
    }
    store<T, V>(part, y + n);
}
