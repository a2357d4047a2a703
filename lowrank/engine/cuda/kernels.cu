/* GPU kernels: templates, compiled for a device when a plan first uses them.
 *
 * Spatial axes are always three, D, H, W; a missing one has length 1.  Borders need no branch: a table
 * holds the input index of every padded position, or -1 for a constant.  So one loop serves all border
 * modes, strides and dilations.
 *
 * Channel (l, g, c, r) of a stage's input has the number ((l * groups + g) * C + c) * right + r, that
 * of its output ((l * groups + g) * O + o) * right + r, with lowrank.Stage's outer and inner
 * replications as l and r.
 *
 * T is the storage type: float, double, f16 or bf16; sums are double for double, float otherwise.
 *
 * The source needs no header, so that any CUDA C++ compiler accepts it.  Tests compile it for the CPU
 * with the header that LR_SHIM names.
 */
#ifdef LR_SHIM
#include LR_SHIM
#else
#define LR_SHARED(S) extern __shared__ __align__(16) double lr_shared[]; S *const shared = (S *)lr_shared
#endif

typedef long long i64;

/* --- storage types -------------------------------------------------------------------------------- */

struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };

template <class T> struct sum_of { typedef float type; };
template <> struct sum_of<double> { typedef double type; };
#define SUM typename sum_of<T>::type

__device__ inline float wide(float v) { return v; }
__device__ inline double wide(double v) { return v; }
__device__ inline float wide(bf16 v) { return __uint_as_float((unsigned)v.bits << 16); }
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
__device__ inline void narrow(float v, bf16 *to) /* round to nearest, halves to even */
{
    const unsigned u = __float_as_uint(v);
    to->bits = v != v ? 0x7fff : (unsigned short)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
__device__ inline void narrow(float v, f16 *to)
{
#ifdef LR_SHIM
    to->bits = lr_float_to_half(v);
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(v));
#endif
}

/* Add the bias and apply the activation: 0 none, 1 ReLU, 2 ReLU6. */
template <class S> __device__ inline S with_epilogue(S v, const S *bias, i64 channel, int activation)
{
    if (bias) v += bias[channel];
    if (activation && v < 0) v = 0;
    if (activation == 2 && v > 6) v = 6;
    return v;
}

/* Input of a stage: images of `channels` channels with D x H x W samples each. */
template <class T> struct planes {
    const T *x;
    const int *source;      /* channel of x at each channel of the stage, or 0 */
    const SUM *outside;     /* border value of each channel of x, or 0: zeros */
    i64 channels;
    int d, h, w;

    __device__ SUM at(i64 image, i64 channel, int id, int ih, int iw) const
    {
        if (id < 0 || ih < 0 || iw < 0) return outside ? outside[channel] : (SUM)0;
        return wide(x[(((image * channels + channel) * d + id) * h + ih) * (i64)w + iw]);
    }
};

/* --- depthwise ------------------------------------------------------------------------------------- */

/* Depthwise stage with `per` output channels per input channel.  A thread computes a column of ROWS
 * outputs, whose taps overlap; the lanes of a warp are neighbours along W, so that loads coalesce.
 * H x W taps and the stride along H are template arguments (dilation along H is then 1); H = 0 takes
 * any geometry.  pos_d, pos_h and pos_w hold the input index of each padded position of an axis. */
template <class T, int H, int W, int STRIDE, int ROWS>
__global__ void __launch_bounds__(256)
depthwise(const T *x, const T *weight, const SUM *bias, T *y, const int *source,
                          const SUM *outside, const int *pos_d, const int *pos_h, const int *pos_w,
                          i64 images, int copies, int groups, int right, int per, int id, int ih, int iw,
                          int od, int oh, int ow, int kd, int kh, int kw, int sd, int sh, int sw, int dd,
                          int dh, int dw, int activation)
{
    const i64 inputs = (i64)copies * groups * right, outputs = inputs * per;
    const planes<T> in = {x, source, outside, inputs, id, ih, iw};
    const int strips = (oh + ROWS - 1) / ROWS;
    const i64 total = images * outputs * od * strips * ow;
    for (i64 n = blockIdx.x * (i64)blockDim.x + threadIdx.x; n < total; n += (i64)gridDim.x * blockDim.x) {
        i64 rest = n;
        const int pw = (int)(rest % ow);
        rest /= ow;
        const int first = (int)(rest % strips) * ROWS;
        rest /= strips;
        const int pd = (int)(rest % od);
        rest /= od;
        const i64 channel = rest % outputs, image = rest / outputs;
        const int r = (int)(channel % right), o = (int)(channel / right % per);
        const i64 lg = channel / right / per, stage_channel = lg * right + r;
        const i64 from = source ? source[stage_channel] : stage_channel;
        const T *k = weight + ((lg % groups) * per + o) * (i64)kd * kh * kw;
        SUM sum[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) sum[i] = 0;
        for (int td = 0; td < kd; td++) {
            const int at_d = pos_d[pd * sd + td * dd];
            const T *kt = k + td * (i64)kh * kw;
            if (H > 0) {
                int at_w[W > 0 ? W : 1];
#pragma unroll
                for (int tw = 0; tw < W; tw++) at_w[tw] = pos_w[pw * sw + tw * dw];
#pragma unroll
                for (int p = 0; p < (ROWS - 1) * STRIDE + (H > 0 ? H : 1); p++) {
                    /* rows past the last output load the last position; their sums are discarded */
                    const int place = first * STRIDE + p, most = (oh - 1) * STRIDE + H - 1;
                    const int at_h = pos_h[place < most ? place : most];
                    SUM v[W > 0 ? W : 1];
#pragma unroll
                    for (int tw = 0; tw < W; tw++) v[tw] = in.at(image, from, at_d, at_h, at_w[tw]);
#pragma unroll
                    for (int i = 0; i < ROWS; i++) {
                        const int th = p - i * STRIDE;
                        if (th >= 0 && th < H) {
#pragma unroll
                            for (int tw = 0; tw < W; tw++) sum[i] += wide(kt[th * W + tw]) * v[tw];
                        }
                    }
                }
            } else {
#pragma unroll
                for (int i = 0; i < ROWS; i++) {
                    if (first + i >= oh) break;
                    for (int th = 0; th < kh; th++) {
                        const int at_h = pos_h[(first + i) * sh + th * dh];
                        for (int tw = 0; tw < kw; tw++)
                            sum[i] += wide(kt[th * kw + tw]) *
                                      in.at(image, from, at_d, at_h, pos_w[pw * sw + tw * dw]);
                    }
                }
            }
        }
        T *to = y + (((image * outputs + channel) * od + pd) * oh + first) * (i64)ow + pw;
#pragma unroll
        for (int i = 0; i < ROWS; i++)
            if (first + i < oh) narrow(with_epilogue(sum[i], bias, channel, activation), to + (i64)i * ow);
    }
}

/* --- dense and grouped, and depthwise then pointwise ---------------------------------------------- */

/* Compute a tile of a matrix product: O x P sums over k of weight[k] * in[k], where `load(k)` returns
 * input k at the thread's position.  16 x 16 threads, each with (O / 16) x (P / 16) sums in registers. */
#define DEPTH 16

template <class T, int O, int P, class Load>
__device__ inline void product(const Load &load, const T *weight, i64 outs, i64 depth, i64 first,
                               SUM (&sum)[O / 16][P / 16])
{
    static_assert(O % 16 == 0 && P % 16 == 0 && 256 % P == 0, "each thread must have one fixed position of P");
    __shared__ SUM a[DEPTH][O + 2], b[DEPTH][P]; /* + 2: the stores of a warp hit banks 2 k + o, each once */
    const int t = threadIdx.x, row = t / 16, column = t % 16;
#pragma unroll
    for (int i = 0; i < O / 16; i++)
#pragma unroll
        for (int j = 0; j < P / 16; j++) sum[i][j] = 0;
    for (i64 k0 = 0; k0 < depth; k0 += DEPTH) {
#pragma unroll
        for (int e = t; e < DEPTH * O; e += 256) {
            const int k = e % DEPTH, o = e / DEPTH;
            const int is_inside = k0 + k < depth && first + o < outs;
            a[k][o] = is_inside ? wide(weight[(first + o) * depth + k0 + k]) : (SUM)0;
        }
#pragma unroll
        for (int e = t; e < DEPTH * P; e += 256) {
            const int k = e / P; /* the position is always t % P, that of `load` */
            b[k][e % P] = k0 + k < depth ? load(k0 + k) : (SUM)0;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
            SUM w[O / 16], v[P / 16];
#pragma unroll
            for (int i = 0; i < O / 16; i++) w[i] = a[k][row + 16 * i];
#pragma unroll
            for (int j = 0; j < P / 16; j++) v[j] = b[k][column + 16 * j];
#pragma unroll
            for (int i = 0; i < O / 16; i++)
#pragma unroll
                for (int j = 0; j < P / 16; j++) sum[i][j] += w[i] * v[j];
        }
        __syncthreads();
    }
}

/* Image and coordinates of output `p`, numbered over images and samples. */
struct place {
    i64 image;
    int d, h, w, inside;
    __device__ place(i64 p, i64 images, int od, int oh, int ow)
    {
        inside = p < images * od * oh * ow;
        if (!inside) p = 0;
        w = (int)(p % ow), p /= ow;
        h = (int)(p % oh), p /= oh;
        d = (int)(p % od), image = p / od;
    }
};

/* Input k of a dense stage.  `terms` lists (c, d, h, w) per k: a channel, and the beginnings of a tap's
 * rows in the tables at_d, at_h and at_w (taps, outputs) of input indices. */
template <class T> struct gathered {
    planes<T> in;
    const int *terms, *at_d, *at_h, *at_w;
    place p;
    i64 first;  /* first channel of the stage in this group */
    int right;
    __device__ SUM operator()(i64 k) const
    {
        if (!p.inside) return 0;
        const int *term = terms + 4 * k;
        const i64 channel = first + (i64)term[0] * right;
        return in.at(p.image, in.source ? in.source[channel] : channel, at_d[term[1] + p.d],
                     at_h[term[2] + p.h], at_w[term[3] + p.w]);
    }
};

template <class T, int O, int P>
__global__ void __launch_bounds__(256)
    dense(const T *x, const T *weight, const SUM *bias, T *y, const int *source, const int *target,
          const SUM *outside, const int *terms, const int *at_d, const int *at_h, const int *at_w,
          i64 images, int copies, int groups, int right, int ins, int outs, i64 depth, int id, int ih,
          int iw, int od, int oh, int ow, int activation)
{
    const i64 blocks = (outs + O - 1) / O, block = blockIdx.x % (blocks * copies * groups * right);
    const i64 tile = blockIdx.x / (blocks * copies * groups * right);
    const i64 lgr = block / blocks, lg = lgr / right, first = block % blocks * O;
    const int r = (int)(lgr % right), g = (int)(lg % groups);
    const i64 channels = (i64)copies * groups * ins * right, given = (i64)copies * groups * outs * right;
    const planes<T> in = {x, source, outside, channels, id, ih, iw};
    const gathered<T> load = {in, terms, at_d, at_h, at_w,
                              place(tile * P + threadIdx.x % P, images, od, oh, ow),
                              lg * ins * right + r, right};
    SUM sum[O / 16][P / 16];
    product<T, O, P>(load, weight + (i64)g * outs * depth, outs, depth, first, sum);
#pragma unroll
    for (int j = 0; j < P / 16; j++) {
        const place p(tile * P + threadIdx.x % 16 + 16 * j, images, od, oh, ow);
        if (!p.inside) continue;
#pragma unroll
        for (int i = 0; i < O / 16; i++) {
            const i64 o = first + threadIdx.x / 16 + 16 * i;
            if (o >= outs) continue;
            i64 channel = (lg * outs + o) * right + r;
            if (target) channel = target[channel];
            narrow(with_epilogue(sum[i][j], bias, channel, activation),
                   y + (((p.image * given + channel) * od + p.d) * oh + p.h) * (i64)ow + p.w);
        }
    }
}

/* Input k of a pointwise stage after a depthwise one: computed on the fly, never stored. */
template <class T> struct separable_input {
    planes<T> in;
    const T *weight;
    const SUM *bias;
    const int *pos_d, *pos_h, *pos_w;
    place p;
    int per, kd, kh, kw, sd, sh, sw, dd, dh, dw, activation;
    __device__ SUM operator()(i64 k) const
    {
        if (!p.inside) return 0;
        const i64 stage_channel = k / per;
        const i64 channel = in.source ? in.source[stage_channel] : stage_channel;
        const T *taps = weight + k * kd * kh * kw;
        SUM v = 0;
        for (int td = 0; td < kd; td++)
            for (int th = 0; th < kh; th++)
                for (int tw = 0; tw < kw; tw++)
                    v += wide(*taps++) * in.at(p.image, channel, pos_d[p.d * sd + td * dd],
                                               pos_h[p.h * sh + th * dh], pos_w[p.w * sw + tw * dw]);
        return with_epilogue(v, bias, k, activation);
    }
};

template <class T, int O, int P>
__global__ void __launch_bounds__(256)
    separable(const T *x, const T *taps, const SUM *taps_bias, int taps_activation, const T *weight,
              const SUM *bias, T *y, const int *source, const SUM *outside, const int *pos_d,
              const int *pos_h, const int *pos_w, i64 images, int ins, int per, int outs, int id, int ih,
              int iw, int od, int oh, int ow, int kd, int kh, int kw, int sd, int sh, int sw, int dd,
              int dh, int dw, int activation)
{
    const i64 blocks = (outs + O - 1) / O, first = blockIdx.x % blocks * O, tile = blockIdx.x / blocks;
    const planes<T> in = {x, source, outside, ins, id, ih, iw};
    const separable_input<T> load = {in, taps, taps_bias, pos_d, pos_h, pos_w,
                                     place(tile * P + threadIdx.x % P, images, od, oh, ow),
                                     per, kd, kh, kw, sd, sh, sw, dd, dh, dw, taps_activation};
    SUM sum[O / 16][P / 16];
    product<T, O, P>(load, weight, outs, (i64)ins * per, first, sum);
#pragma unroll
    for (int j = 0; j < P / 16; j++) {
        const place p(tile * P + threadIdx.x % 16 + 16 * j, images, od, oh, ow);
        if (!p.inside) continue;
#pragma unroll
        for (int i = 0; i < O / 16; i++) {
            const i64 o = first + threadIdx.x / 16 + 16 * i;
            if (o < outs)
                narrow(with_epilogue(sum[i][j], bias, o, activation),
                       y + (((p.image * outs + o) * od + p.d) * oh + p.h) * (i64)ow + p.w);
        }
    }
}

/* im2col: the inputs of each output as a matrix (images, blocks, terms, right, outputs). */
template <class T>
__global__ void unroll(const T *x, T *to, const int *source, const SUM *outside, const int *terms,
                         const int *at_d, const int *at_h, const int *at_w, i64 images, i64 blocks,
                         int ins, int right, i64 depth, int id, int ih, int iw, int od, int oh, int ow)
{
    const planes<T> in = {x, source, outside, blocks * ins * right, id, ih, iw};
    const i64 outputs = (i64)od * oh * ow, total = images * blocks * depth * right * outputs;
    for (i64 n = blockIdx.x * (i64)blockDim.x + threadIdx.x; n < total; n += (i64)gridDim.x * blockDim.x) {
        i64 rest = n;
        const i64 o = rest % outputs;
        rest /= outputs;
        const int r = (int)(rest % right);
        rest /= right;
        const int *term = terms + 4 * (rest % depth);
        rest /= depth;
        const i64 lg = rest % blocks, image = rest / blocks;
        const i64 channel = (lg * ins + term[0]) * right + r;
        const int pw = (int)(o % ow), ph = (int)(o / ow % oh), pd = (int)(o / ow / oh);
        narrow(in.at(image, source ? source[channel] : channel, at_d[term[1] + pd], at_h[term[2] + ph],
                     at_w[term[3] + pw]), to + n);
    }
}

/* Bias and activation in place, after a library's matrix product: (images, channels, samples). */
template <class T>
__global__ void epilogue(T *y, const SUM *bias, i64 images, i64 channels, i64 samples, int activation)
{
    const i64 total = images * channels * samples;
    for (i64 n = blockIdx.x * (i64)blockDim.x + threadIdx.x; n < total; n += (i64)gridDim.x * blockDim.x)
        narrow(with_epilogue(wide(y[n]), bias, n / samples % channels, activation), y + n);
}

/* --- separable filters ----------------------------------------------------------------------------- */

/* Compute four neighbouring outputs of a 1-D pass of n taps over samples `step` apart, four taps at a
 * time: every sample and every tap is read once.  Samples without a tap may be NaN. */
template <class S>
__device__ inline void four(S (&sum)[4], const S *from, int step, const S *taps, int n)
{
    S v[8];
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = from[i * step];
    for (int t = 0; t < n; t += 4) {
#pragma unroll
        for (int i = 4; i < 8; i++) v[i] = from[(t + i) * step];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (t + k == n) break;
            const S w = taps[t + k];
#pragma unroll
            for (int i = 0; i < 4; i++) sum[i] += w * v[i + k];
        }
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = v[i + 4];
    }
}

/* Sum of R separable terms, each a product of taps along W, H and D: a tile is loaded into shared
 * memory once, and every 1-D pass of every term reads it there.  Stride and dilation are 1.
 *
 * taps: (groups, R, kd + kh + kw), where kd, kh and kw are rounded up to multiples of 4; kd = 0 with
 * td = 1 means no taps along D.  Otherwise the sides of a tile, td x th x tw, are multiples of 4.
 * pos_d, pos_h and pos_w have (rounded taps - 1) more entries than outputs.  Shared memory holds
 * (filter_shared_bytes in steps.py), for the rounded taps,
 *     the input     (td + kd) (th + kh) (tw + kw + 1)   odd pitch: lanes along H hit different banks
 *     after W       (td + kd) (th + kh) (tw + 1)
 *     after H       (td + kd) th tw                     if D has taps
 *     all terms     td th tw
 *     and the taps of one term. */
template <class T>
__global__ void __launch_bounds__(256)
    filter(const T *x, const T *taps, const SUM *bias, T *y, const int *source, const int *pos_d,
           const int *pos_h, const int *pos_w, i64 images, int copies, int groups, int right, int terms,
           int id, int ih, int iw, int od, int oh, int ow, int taps_d, int taps_h, int taps_w, int td,
           int th, int tw, int activation)
{
    typedef SUM S;
    LR_SHARED(S);
    const int kd = (taps_d + 3) / 4 * 4, kh = (taps_h + 3) / 4 * 4, kw = (taps_w + 3) / 4 * 4;
    const int ed = td + kd, eh = th + kh, pitch = tw + kw + 1, after = tw + 1, t = threadIdx.x;
    const int many = td * th * tw, all = kd + kh + kw;
    S *const box = shared, *const rows = box + ed * eh * pitch, *const columns = rows + ed * eh * after;
    S *const total = columns + (kd ? ed * th * tw : 0), *const kernel = total + many;
    const int nw = (ow + tw - 1) / tw, nh = (oh + th - 1) / th, nd = (od + td - 1) / td;
    const i64 channels = (i64)copies * groups * right;
    const i64 tiles = images * channels * nd * nh * nw;
    for (i64 n = blockIdx.x; n < tiles; n += gridDim.x) {
        i64 rest = n;
        const int w0 = (int)(rest % nw) * tw;
        rest /= nw;
        const int h0 = (int)(rest % nh) * th;
        rest /= nh;
        const int d0 = (int)(rest % nd) * td;
        rest /= nd;
        const i64 channel = rest % channels, image = rest / channels;
        const int g = (int)(channel / right % groups);
        const i64 from = source ? source[channel] : channel;
        /* Samples beyond the last output's taps are set to zero and not used. */
        for (int row = t / 32; row < ed * eh; row += 8) { /* one warp per row: coalesced loads */
            const int h = row % eh, d = row / eh;
            const int is_needed = h0 + h < oh + kh - 1 && d0 + d < od + (kd ? kd - 1 : 0);
            const int at_d = is_needed ? pos_d[d0 + d] : -1, at_h = is_needed ? pos_h[h0 + h] : -1;
            const T *line = x + (((image * channels + from) * id + at_d) * (i64)ih + at_h) * iw;
            const int inside = at_d >= 0 && at_h >= 0;
            for (int w = t % 32; w < pitch; w += 32) {
                const int at_w = inside && w0 + w < ow + kw - 1 ? pos_w[w0 + w] : -1;
                box[row * pitch + w] = at_w >= 0 ? (S)wide(line[at_w]) : (S)0;
            }
        }
        for (int e = t; e < many; e += 256) total[e] = 0;
        /* The loop over terms begins with a barrier. */
        for (int term = 0; term < terms; term++) {
            __syncthreads();
            for (int e = t; e < all; e += 256) kernel[e] = wide(taps[((i64)g * terms + term) * all + e]);
            __syncthreads();
            for (int e = t; e < ed * eh * (tw / 4); e += 256) {
                const int row = e % (ed * eh), w = e / (ed * eh) * 4;
                S sum[4] = {0, 0, 0, 0};
                four(sum, box + row * pitch + w, 1, kernel + kd + kh, taps_w);
#pragma unroll
                for (int i = 0; i < 4; i++) rows[row * after + w + i] = sum[i];
            }
            __syncthreads();
            for (int e = t; e < ed * (th / 4) * tw; e += 256) {
                const int w = e % tw, h = e / tw % (th / 4) * 4, d = e / tw / (th / 4);
                S sum[4] = {0, 0, 0, 0};
                four(sum, rows + (d * eh + h) * after + w, after, kernel + kd, taps_h);
                S *const to = (kd ? columns : total) + (d * th + h) * tw + w;
#pragma unroll
                for (int i = 0; i < 4; i++) to[i * tw] = sum[i] + (kd ? (S)0 : to[i * tw]);
            }
            if (!kd) continue;
            __syncthreads();
            for (int e = t; e < (td / 4) * th * tw; e += 256) {
                const int hw = e % (th * tw), d = e / (th * tw) * 4;
                S sum[4] = {0, 0, 0, 0};
                four(sum, columns + d * th * tw + hw, th * tw, kernel, taps_d);
#pragma unroll
                for (int i = 0; i < 4; i++) total[(d + i) * th * tw + hw] += sum[i];
            }
        }
        __syncthreads();
        for (int e = t; e < many; e += 256) {
            const int w = w0 + e % tw, h = h0 + e / tw % th, d = d0 + e / tw / th;
            if (w < ow && h < oh && d < od)
                narrow(with_epilogue(total[e], bias, channel, activation),
                       y + (((image * channels + channel) * od + d) * oh + h) * (i64)ow + w);
        }
    }
}
