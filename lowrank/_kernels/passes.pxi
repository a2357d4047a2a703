"""Separable filters that run on arrays of any shape without a plan."""

BORDERS = ("constant", "symmetric", "reflect", "replicate", "circular")
DEF MAX_PASSES = 8


cdef int32_t _sample(int64_t i, int64_t n, int mode) noexcept nogil:
    """Return the sample at position i of an axis, in a border mode; -1 is the constant."""
    cdef int64_t period
    if 0 <= i < n:
        return <int32_t>i
    if mode == 0:
        return -1
    if mode == 3:
        return <int32_t>(0 if i < 0 else n - 1)
    if mode == 2 and n == 1:
        return 0
    period = 2 * n if mode == 1 else 2 * n - 2 if mode == 2 else n
    i = i % period
    if i < 0:  # C's remainder has the sign of the dividend
        i += period
    if i >= n:
        i = (2 * n - 1 if mode == 1 else period) - i
    return <int32_t>i


cdef class Passes:
    """An outer product of filters along single axes.

    Parameters
    ----------
    factors : sequence of array
        C-contiguous float64 arrays of taps, one per pass.
    dtype : str
        float32 or float64: type of the arrays and of the sums.
    isa : str, optional
        Instruction set (default: that of default_isa()).
    """

    cdef const lr_kernels *kernels
    cdef int64_t itemsize
    cdef list owned
    cdef int64_t count
    cdef int64_t taps[MAX_PASSES]
    cdef int64_t width[MAX_PASSES]
    cdef double sums[MAX_PASSES]
    cdef const int32_t *offset[MAX_PASSES]
    cdef const void *weight[MAX_PASSES]
    cdef readonly str dtype

    def __init__(self, factors, dtype, isa=None):
        self.kernels = _kernels(dtype, default_isa() if isa is None else _checked_isa("isa", isa))
        self.dtype, self.itemsize = dtype, 4 if dtype == "float32" else 8
        if not 1 <= len(factors) <= MAX_PASSES:
            raise ValueError(f"factors must number 1 to {MAX_PASSES}, got {len(factors)}")
        self.owned, self.count = [], len(factors)
        for k, factor in enumerate(factors):
            values = memoryview(factor)
            if values.format != "d" or values.ndim != 1 or not len(values):
                raise TypeError("factors must be float64 arrays with one axis")
            some = [(i, w) for i, w in enumerate(values) if w != 0]
            weights = array("f" if self.itemsize == 4 else "d", [w for _, w in some])
            offsets = array("i", [i for i, _ in some])
            self.owned += [weights, offsets]
            self.taps[k], self.width[k] = len(some), len(values)
            self.sums[k] = sum(weights)
            self.weight[k] = <const void *><size_t>weights.buffer_info()[0]
            self.offset[k] = <const int32_t *><size_t>offsets.buffer_info()[0]

    def __call__(self, x, out, axes, before, border, fill=0.0):
        """Filter x into out: C-contiguous arrays of one shape and of this type.

        Parameters
        ----------
        x, out : buffer
            Arrays; they must not overlap.
        axes, before : sequence of int
            Axis of each pass, and taps ahead of its output.
        border : str or sequence of str
            One of `BORDERS`, or one for each pass.
        fill : float or sequence of float
            Border value of "constant": of x, from which those of later passes follow as the
            filter's response to it, or one for each pass.
        """
        cdef int mode[MAX_PASSES]
        cdef double value = 0.0
        cdef bint follows = isinstance(fill, (int, float))
        cdef Py_buffer a, b
        cdef lr_pass p[MAX_PASSES]
        cdef int64_t i, k, size, longest = 0, most = 0, most_taps = 0
        cdef int axis
        cdef char *memory
        cdef int32_t *table
        cdef void *line
        cdef char *other
        cdef const void **row
        cdef const void *source
        cdef void *target
        if len(axes) != self.count or len(before) != self.count:
            raise ValueError(f"axes and before must have {self.count} entries")
        borders = [border] * self.count if isinstance(border, str) else border
        if len(borders) != self.count or not (follows or len(fill) == self.count):
            raise ValueError(f"border and fill must have {self.count} entries")
        for k in range(self.count):
            mode[k] = BORDERS.index(borders[k])
        if follows:
            value = fill
        PyObject_GetBuffer(x, &a, PyBUF_STRIDES | PyBUF_FORMAT)
        try:
            PyObject_GetBuffer(out, &b, PyBUF_STRIDES | PyBUF_FORMAT | PyBUF_WRITABLE)
            try:
                self._check("x", &a)
                self._check("out", &b)
                size = 1
                for i in range(a.ndim):
                    if a.ndim != b.ndim or a.shape[i] != b.shape[i]:
                        raise ValueError("out must have the shape of x")
                    size *= a.shape[i]
                if not size:
                    return
                if _overlap(&a, &b):
                    raise ValueError("out must not overlap x")
                for k in range(self.count):
                    axis = axes[k]
                    if not 0 <= axis < a.ndim:
                        raise ValueError(f"axes must be between 0 and {a.ndim - 1}, got {axis}")
                    p[k].n, p[k].outer, p[k].inner = a.shape[axis], 1, 1
                    for i in range(axis):
                        p[k].outer *= a.shape[i]
                    for i in range(axis + 1, a.ndim):
                        p[k].inner *= a.shape[i]
                    p[k].taps, p[k].width, p[k].before = self.taps[k], self.width[k], before[k]
                    if not 0 <= p[k].before < p[k].width:
                        raise ValueError(f"before must be below the number of taps, got {before}")
                    p[k].offset, p[k].weight = self.offset[k], self.weight[k]
                    p[k].fill = value if follows else fill[k]
                    value = value * self.sums[k]
                    i = p[k].n + p[k].width - 1
                    longest = max(longest, i)
                    most = max(most, p[k].inner * (i if p[k].inner < 64 else 1))
                    most_taps = max(most_taps, p[k].taps)
                # One block: rows of taps, the border's table, a padded line, the other array.
                k = 8 * most_taps + 8 * ((longest + 1) // 2) + (most + 64) * self.itemsize
                memory = <char *>malloc(k + (size * self.itemsize if self.count > 1 else 0))
                if memory == NULL:
                    raise MemoryError(f"not enough memory to filter {size} samples")
                row = <const void **>memory
                table = <int32_t *>(memory + 8 * most_taps)
                line = <void *>(memory + 8 * most_taps + 8 * ((longest + 1) // 2))
                other = memory + k
                source = a.buf
                with nogil:
                    for k in range(self.count):
                        for i in range(p[k].n + p[k].width - 1):
                            table[i] = _sample(i - p[k].before, p[k].n, mode[k])
                        p[k].border = table
                        target = b.buf if (self.count - k) % 2 else <void *>other
                        self.kernels.pass_(&p[k], source, target, line, row)
                        source = target
                free(memory)
            finally:
                PyBuffer_Release(&b)
        finally:
            PyBuffer_Release(&a)

    cdef int _check(self, name, Py_buffer *v) except -1:
        cdef int64_t i, step = v.itemsize
        if _type(v.format, self.itemsize) != LR_PLAN_TYPE:
            raise TypeError(f"{name} must be a {self.dtype} array in native byte order")
        for i in range(v.ndim - 1, -1, -1):
            if v.shape[i] > 1 and v.strides[i] != step:
                raise ValueError(f"{name} must be C-contiguous")
            step *= v.shape[i]
        return 0
