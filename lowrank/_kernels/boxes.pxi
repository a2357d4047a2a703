"""Box filters by sums of windows, and rows resampled by weighted sums."""

DEF STRIP_BYTES = 1 << 18  # of the rows that a strip of columns reads again: a part of L2

#: Types of the samples of box filters: bytes, and the type of the C engine.
BOX_TYPES = {
    "float32": (4, LR_PLAN_TYPE), "float64": (8, LR_PLAN_TYPE), "uint8": (1, LR_U8),
    "uint16": (2, LR_U16),
}


cdef int64_t _strip(int64_t rows, int64_t columns, int64_t itemsize, int64_t lanes) noexcept:
    """Return the columns of a strip whose rows stay in the cache: whole vectors."""
    cdef int64_t strip = STRIP_BYTES // (rows * itemsize) // lanes * lanes
    return min(max(strip, 4 * lanes), columns)


cdef class _Arrays:
    """Two C-contiguous buffers of one type, checked and held: to read and to write."""

    cdef Py_buffer x, out
    cdef int held

    def __init__(self, x, out, dtype, int64_t size, int64_t out_size):
        itemsize, kind = BOX_TYPES[dtype]
        PyObject_GetBuffer(x, &self.x, PyBUF_STRIDES | PyBUF_FORMAT)
        self.held = 1
        PyObject_GetBuffer(out, &self.out, PyBUF_STRIDES | PyBUF_FORMAT | PyBUF_WRITABLE)
        self.held = 2
        _check_contiguous("x", &self.x, dtype, itemsize, kind)
        _check_contiguous("out", &self.out, dtype, itemsize, kind)
        if self.x.len != size * itemsize or self.out.len != out_size * itemsize:
            raise ValueError(
                f"x and out must have {size} and {out_size} samples, "
                f"got {self.x.len // itemsize} and {self.out.len // itemsize}"
            )
        if size and out_size and _overlap(&self.x, &self.out):
            raise ValueError("out must not overlap x")

    def __dealloc__(self):
        if self.held > 0:
            PyBuffer_Release(&self.x)
        if self.held > 1:
            PyBuffer_Release(&self.out)


cdef object _border(name, int64_t n, int64_t before, int64_t after, border):
    """Return the table of the sample at each padded position."""
    if border not in BORDERS:
        known = ", ".join(BORDERS)
        raise ValueError(f"{name} must have one of the borders {known}, got {border!r}")
    cdef int mode = BORDERS.index(border)
    cdef int64_t i
    table = bytearray(4 * (n + before + after))
    cdef int32_t *to = <int32_t *><void *><char *>table
    with nogil:
        for i in range(n + before + after):
            to[i] = _sample(i - before, n, mode)
    return table


cdef object _window(lr_window *w, name, given, int64_t n):
    """Fill in a window from (width, before, border, fill); return what owns its memory."""
    w.width, w.before, border, w.fill = given
    if w.width < 1 or not 0 <= w.before < w.width:
        raise ValueError(f"{name} must have at least 1 sample and fewer ahead, got {given}")
    table = _border(name, n, w.before, w.width - 1 - w.before, border)
    w.border = <const int32_t *><void *><char *>table
    return table


cdef object _line_ends(lr_box *p):
    """Fill in the samples beyond the ends of a line; return what owns their memory."""
    cdef int64_t i, j, k, ends = p.across.width - 1
    table = bytearray(4 * ends * p.inner)
    cdef int32_t *to = <int32_t *><void *><char *>table
    for i in range(ends):
        k = p.across.border[i if i < p.across.before else i + p.columns]
        for j in range(p.inner):
            to[i * p.inner + j] = <int32_t>(k * p.inner + j if k >= 0 else -1)
    p.ends = to
    return table


def box(
    x, out, dtype, shape, down, across, *, before=1.0, after=1.0, divisor=1.0,
    int64_t multiplier=0, int64_t shift=0, bint is_single=False, int threads=0,
    double seconds=1.0, double fork_join=0.0, isa=None,
):
    """Filter images by a box: (sum of samples * before) * after, or / divisor.

    Parameters
    ----------
    x, out : buffer
        C-contiguous arrays; they must not overlap.
    dtype : str
        Their type, of `BOX_TYPES`.
    shape : (int, int, int, int)
        Images, rows, columns, channels per sample.
    down, across : (int, int, str, float)
        Width of the window along rows and columns, samples ahead of its output, border of
        `BORDERS`, and border value: of x for the first of the two that is wider than 1, of its
        sums for the second.
    before, after, divisor : float
        Factors of the samples and of the sums, and divisor of these.  Integers: no `before`, and
        one of the others.
    multiplier, shift : int
        Of the division of 16-bit sums, or 0; see box_integers.inc.
    is_single : bool
        Whether the quotients of integers may be rounded in float32.
    threads : int
        Number of threads, at most; 0: all of OpenMP's.
    seconds, fork_join : float
        Predicted time on one thread, and what more threads have to save.
    isa : str, optional
        Instruction set (default: that of default_isa()).
    """
    isa = default_isa() if isa is None else _checked_isa("isa", isa)
    if dtype not in BOX_TYPES:
        raise TypeError(f"dtype must be one of {', '.join(BOX_TYPES)}, got {dtype}")
    cdef int64_t itemsize, images
    cdef int status
    cdef lr_box p
    itemsize, p.type = BOX_TYPES[dtype]
    cdef const lr_isa *table = lr_isa_table(ISAS.index(isa))
    cdef const lr_kernels *kernels = NULL
    if p.type == LR_PLAN_TYPE:
        kernels = &table.f32 if itemsize == 4 else &table.f64
    images, p.rows, p.columns, p.inner = shape
    cdef _Arrays arrays = _Arrays(x, out, dtype, prod(shape), prod(shape))
    if not prod(shape):
        return
    owned = [
        _window(&p.down, "down", down, p.rows), _window(&p.across, "across", across, p.columns)
    ]
    owned.append(_line_ends(&p))
    if p.down.width == 1 == p.across.width:
        raise ValueError("down or across must be wider than 1")
    if kernels != NULL and p.across.width > 1 and p.inner >= kernels.limits.lanes:
        raise ValueError(f"channels must be below {kernels.limits.lanes} to go across, got {shape}")
    p.before, p.after, p.divisor = before, after, divisor
    p.multiplier, p.shift, p.is_single = multiplier, shift, is_single
    p.strip = 0
    if kernels != NULL:
        p.strip = _strip(
            p.down.width + 2, p.columns * p.inner, itemsize, kernels.limits.lanes
        )
    with nogil:
        status = lr_run_box(
            table, kernels, &p, arrays.x.buf, arrays.out.buf, images, itemsize, threads, seconds,
            fork_join,
        )
    if status != LR_OK:
        raise MemoryError(f"not enough memory to filter {shape} samples by a box")


def resample(
    x, out, dtype, shape, starts, lists, weights, before, border, fill=0.0, *, int threads=0,
    double seconds=1.0, double fork_join=0.0, isa=None,
):
    """Compute weighted sums of rows: out[i] = sum over t of weights[lists[i]][t] * row(start + t).

    Parameters
    ----------
    x, out : buffer
        C-contiguous arrays (images, n, inner) and (images, outputs, inner) that do not overlap.
    dtype : str
        Their type and that of the weights: float32 or float64.
    shape : (int, int, int)
        Images, rows of x, samples per row.
    starts, lists : sequence of int
        Position of the first tap of each output row, where 0 is `before` samples ahead of x, and
        its row of `weights`.
    weights : buffer, shape (lists, taps)
        C-contiguous.
    before : int
        Samples ahead of x that the outputs reach, at most.
    border : str
        One of `BORDERS`.
    fill : float
        Border value of "constant".
    threads : int
        Number of threads, at most; 0: all of OpenMP's.
    seconds, fork_join : float
        Predicted time on one thread, and what more threads have to save.
    isa : str, optional
        Instruction set (default: that of default_isa()).
    """
    isa = default_isa() if isa is None else _checked_isa("isa", isa)
    cdef const lr_kernels *kernels = _kernels(dtype, isa)
    cdef int64_t itemsize = BOX_TYPES[dtype][0], images, last
    cdef int status
    cdef lr_resample p
    cdef Py_buffer taps
    images, p.n, p.inner = shape
    p.outputs, p.fill = len(starts), fill
    cdef _Arrays arrays = _Arrays(x, out, dtype, prod(shape), images * p.outputs * p.inner)
    if not (prod(shape) and p.outputs):
        return
    PyObject_GetBuffer(weights, &taps, PyBUF_STRIDES | PyBUF_FORMAT)
    try:
        _check_contiguous("weights", &taps, dtype, itemsize, LR_PLAN_TYPE)
        if taps.ndim != 2 or not taps.shape[1]:
            raise ValueError("weights must have the shape (lists, taps)")
        if len(lists) != p.outputs or not 0 <= min(lists) <= max(lists) < taps.shape[0]:
            raise ValueError(f"lists must be {p.outputs} indices below {taps.shape[0]}")
        if starts[0] < 0 or any(b < a for a, b in zip(starts, starts[1:])):
            raise ValueError("starts must be at least 0 and in ascending order")
        p.taps, p.weight = taps.shape[1], taps.buf
        last = starts[len(starts) - 1] + p.taps
        table = _border("border", p.n, before, max(last - before - p.n, 0), border)
        positions, indices = array("q", starts), array("q", lists)
        p.border = <const int32_t *><void *><char *>table
        p.start = <const int64_t *><size_t>positions.buffer_info()[0]
        p.list = <const int64_t *><size_t>indices.buffer_info()[0]
        # Few samples behind the axis are lines whose columns are vectors.
        p.lines = images if p.inner < kernels.limits.lanes else 0
        images = 1 if p.lines else images
        p.strip = _strip(p.taps + 1, p.inner, itemsize, kernels.limits.lanes)
        with nogil:
            status = lr_run_resample(
                kernels, &p, arrays.x.buf, arrays.out.buf, images, itemsize, threads, seconds,
                fork_join,
            )
        if status != LR_OK:
            raise MemoryError(f"not enough memory to resample {shape} samples")
    finally:
        PyBuffer_Release(&taps)
