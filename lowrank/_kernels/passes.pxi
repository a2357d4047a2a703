"""Separable filters that run on arrays of any shape without a plan."""

BORDERS = ("constant", "symmetric", "reflect", "replicate", "circular")
DEF MAX_PASSES = 8
DEF MAX_LINES = 1 << 30  # rows or columns of an image, whose positions are 32-bit integers


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


cdef int _check_contiguous(name, Py_buffer *v, dtype, int64_t itemsize, int kind) except -1:
    """Raise unless a buffer is C-contiguous and of a dtype."""
    cdef int64_t i, step = v.itemsize
    if _type(v.format, itemsize) != kind:
        raise TypeError(f"{name} must be a {dtype} array in native byte order")
    for i in range(v.ndim - 1, -1, -1):
        if v.shape[i] > 1 and v.strides[i] != step:
            raise ValueError(f"{name} must be C-contiguous")
        step *= v.shape[i]
    return 0


cdef class Passes:
    """An outer product of filters along single axes.

    Pairs of passes along neighbouring axes of images run together, in parallel.

    Parameters
    ----------
    factors : sequence of array
        C-contiguous float64 arrays of taps, one per pass.
    dtype : str
        float32 or float64: type of the sums.
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
    cdef lr_taps line[MAX_PASSES]
    cdef lr_taps one
    cdef readonly str dtype

    def __init__(self, factors, dtype, isa=None):
        self.kernels = _kernels(dtype, default_isa() if isa is None else _checked_isa("isa", isa))
        self.dtype, self.itemsize = dtype, 4 if dtype == "float32" else 8
        if not 1 <= len(factors) <= MAX_PASSES:
            raise ValueError(f"factors must number 1 to {MAX_PASSES}, got {len(factors)}")
        self.owned, self.count = [], len(factors)
        self.one.taps, self.one.parity, self.one.weight = 1, 1, self._keep([1.0])
        for k, factor in enumerate(factors):
            values = memoryview(factor)
            if values.format != "d" or values.ndim != 1 or not len(values):
                raise TypeError("factors must be float64 arrays with one axis")
            some = [(i, w) for i, w in enumerate(values) if w != 0]
            offsets = array("i", [i for i, _ in some])
            self.owned.append(offsets)
            self.taps[k], self.width[k] = len(some), len(values)
            self.weight[k] = self._keep([w for _, w in some])
            self.sums[k] = sum(self.owned[len(self.owned) - 1])
            self.offset[k] = <const int32_t *><size_t>offsets.buffer_info()[0]
            taps = list(values)
            self.line[k].taps = len(taps)
            self.line[k].parity = _parity(taps)
            half = len(taps) // 2 + 1 if self.line[k].parity else len(taps)
            self.line[k].weight = self._keep(taps[:half])

    cdef const void *_keep(self, weights):
        """Keep an array of weights; return its address."""
        kept = array("f" if self.itemsize == 4 else "d", weights)
        self.owned.append(kept)
        return <const void *><size_t>kept.buffer_info()[0]

    def __call__(self, x, out, axes, before, border, fill=0.0, threads=1, fork_join=0.0):
        """Filter x into out: C-contiguous arrays of one shape.

        Parameters
        ----------
        x, out : buffer
            Arrays of this type, or of 8- or 16-bit integers if :meth:`takes_integers`; they must
            not overlap.
        axes, before : sequence of int
            Axis of each pass, and taps ahead of its output.
        border : str or sequence of str
            One of `BORDERS`, or one for each pass.
        fill : float or sequence of float
            Border value of "constant": of x, from which those of later passes follow as the
            filter's response to it, or one for each pass.
        threads : int
            Number of threads, at most.
        fork_join : float
            Latency of a parallel region in seconds, which threads have to save.

        Returns
        -------
        bool
            False if an array holds integers and a sum is not finite: then taps of zero may have
            spread it, and `out` is not to be used.
        """
        cdef int mode[MAX_PASSES]
        cdef double value = 0.0
        cdef bint follows = isinstance(fill, (int, float))
        cdef Py_buffer a, b
        cdef lr_pass p[MAX_PASSES]
        cdef int x_type, out_type
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
                x_type, out_type = self._check("x", &a), self._check("out", &b)
                if a.ndim != b.ndim or any(a.shape[i] != b.shape[i] for i in range(a.ndim)):
                    raise ValueError("out must have the shape of x")
                if a.len == 0:
                    return True
                if _overlap(&a, &b):
                    raise ValueError("out must not overlap x")
                for k in range(self.count):
                    self._describe(&p[k], k, &a, axes[k], before[k])
                    p[k].fill = value if follows else fill[k]
                    value = value * self.sums[k]
                found = self._filter_images(
                    p, mode, &a, &b, x_type, out_type, threads, fork_join
                )
                if found:
                    return found == 1
                if x_type != LR_PLAN_TYPE or out_type != LR_PLAN_TYPE:
                    raise TypeError(f"arrays of this shape must be {self.dtype} arrays")
                self._filter_lines(p, mode, a.buf, b.buf)
                return True
            finally:
                PyBuffer_Release(&b)
        finally:
            PyBuffer_Release(&a)

    def takes_integers(self, shape, axes):
        """Return whether arrays of a shape may hold integers along these axes of the passes."""
        cdef lr_pass p[MAX_PASSES]
        cdef int64_t first[MAX_PASSES]
        cdef int64_t k, i
        for k in range(self.count):
            p[k].n, p[k].outer, p[k].inner = shape[axes[k]], 1, 1
            for i in range(axes[k]):
                p[k].outer *= shape[i]
            for i in range(axes[k] + 1, len(shape)):
                p[k].inner *= shape[i]
        return self._plan_images(p, first) > 0

    cdef int _describe(
        self, lr_pass *p, int64_t k, Py_buffer *a, int64_t axis, int64_t before
    ) except -1:
        cdef int64_t i
        if not 0 <= axis < a.ndim:
            raise ValueError(f"axes must be between 0 and {a.ndim - 1}, got {axis}")
        p.n, p.outer, p.inner = a.shape[axis], 1, 1
        for i in range(axis):
            p.outer *= a.shape[i]
        for i in range(axis + 1, a.ndim):
            p.inner *= a.shape[i]
        p.taps, p.width, p.before = self.taps[k], self.width[k], before
        if not 0 <= before < p.width:
            raise ValueError(f"before must be below the number of taps, got {before}")
        p.offset, p.weight = self.offset[k], self.weight[k]
        return 0

    cdef int64_t _plan_images(self, const lr_pass *p, int64_t *first) noexcept:
        """Group passes into filters of images; `first` receives the first pass of each.

        Returns their number, or 0 if some pass cannot run so.
        """
        cdef int64_t k = 0, count = 0, lanes = self.kernels.limits.lanes
        cdef int64_t most = self.kernels.limits.colours
        while k < self.count:
            first[count] = k
            count += 1
            if not lanes <= p[k].n < MAX_LINES:
                return 0
            if (
                k + 1 < self.count and p[k + 1].inner <= most
                and lanes <= p[k + 1].n < MAX_LINES
                and p[k].inner == p[k + 1].n * p[k + 1].inner
            ):
                k += 2
            elif lanes <= (p[k].outer if p[k].inner <= most else p[k].inner) < MAX_LINES:
                k += 1
            else:
                return 0
        return count

    cdef int _filter_images(
        self, const lr_pass *p, const int *mode, Py_buffer *a, Py_buffer *b, int x_type,
        int out_type, int threads, double fork_join,
    ) except -1:
        """Filter images; return 1 for finite results, 0 if lines have to be filtered.

        Lines cannot be filtered if arrays hold integers: then 2 stands for results that are not
        finite.
        """
        cdef int64_t first[MAX_PASSES + 1]
        cdef int64_t count = self._plan_images(p, first)
        cdef int64_t i, j, k, n = 0, outer, above, at
        cdef lr_image m
        cdef int32_t *table
        cdef char *other = NULL
        cdef const void *source = a.buf
        cdef void *target
        cdef int status = LR_OK, finite = 1
        cdef int64_t size = a.len // a.itemsize
        if count == 0:
            return 0
        first[count] = self.count
        for i in range(count):
            k = first[i]
            j = first[i + 1] - 1
            # Columns alone need no table: their positions are never those of a border.
            is_flat = j == k and p[k].inner > self.kernels.limits.colours
            outer = p[j].n + p[j].width if j > k else 0 if is_flat else p[k].outer
            n = max(n, p[k].n + p[k].width + outer)
        table = <int32_t *>malloc(n * sizeof(int32_t))
        if count > 1:
            other = <char *>malloc(size * self.itemsize)
        try:
            if table == NULL or (count > 1 and other == NULL):
                raise MemoryError(f"not enough memory to filter {size} samples")
            for i in range(count):
                k, j = first[i], first[i + 1] - 1
                m.column_fill, m.row_fill = p[k].fill, p[j].fill
                m.x_type = x_type if i == 0 else LR_PLAN_TYPE
                m.out_type = out_type if i == count - 1 else LR_PLAN_TYPE
                above, m.before, m.channels, outer = p[k].before, 0, 1, p[k].outer
                m.vertical, m.rows = self.line[k], p[k].n
                m.horizontal, m.columns = self.one, p[k].inner
                if j > k:
                    m.horizontal, m.columns, m.channels = self.line[j], p[j].n, p[j].inner
                    m.before = p[j].before
                elif p[k].inner <= self.kernels.limits.colours:  # along the rows alone
                    above, m.before, m.channels, outer = 0, p[k].before, p[k].inner, 1
                    m.vertical, m.rows = self.one, p[k].outer
                    m.horizontal, m.columns = self.line[k], p[k].n
                n = m.rows + m.vertical.taps - 1
                for at in range(n):
                    table[at] = _sample(at - above, m.rows, mode[k])
                m.row, m.column = table, table + n
                if m.horizontal.taps > 1:
                    for at in range(m.columns + m.horizontal.taps - 1):
                        table[n + at] = _sample(at - m.before, m.columns, mode[j])
                target = b.buf if (count - i) % 2 else <void *>other
                with nogil:
                    status = lr_run_image(&m, self.kernels, source, target, outer, self.itemsize,
                                          threads, fork_join, &finite)
                if status == LR_NO_MEMORY:
                    raise MemoryError(f"not enough memory to filter {size} samples")
                if not finite:
                    return 0 if x_type == LR_PLAN_TYPE == out_type else 2
                source = target
        finally:
            free(table)
            free(other)
        return 1

    cdef int _filter_lines(
        self, lr_pass *p, const int *mode, const void *source, void *out
    ) except -1:
        """Filter one pass after the other."""
        cdef int64_t i, k, longest = 0, most = 0, most_taps = 0
        cdef int64_t size = p[0].outer * p[0].n * p[0].inner
        cdef char *memory
        cdef int32_t *table
        cdef void *line
        cdef char *other
        cdef const void **row
        cdef void *target
        for k in range(self.count):
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
        with nogil:
            for k in range(self.count):
                for i in range(p[k].n + p[k].width - 1):
                    table[i] = _sample(i - p[k].before, p[k].n, mode[k])
                p[k].border = table
                target = out if (self.count - k) % 2 else <void *>other
                self.kernels.pass_(&p[k], source, target, line, row)
                source = target
        free(memory)
        return 0

    cdef int _check(self, name, Py_buffer *v) except -1:
        cdef int kind = _type(v.format, self.itemsize)
        if kind < 0:
            raise TypeError(
                f"{name} must be a {self.dtype} array in native byte order, or of 8- or 16-bit "
                "integers"
            )
        _check_contiguous(name, v, self.dtype, self.itemsize, kind)
        return kind


cdef int _parity(taps):
    """Return 1 for symmetric taps around a middle one, -1 for antisymmetric ones, else 0."""
    if len(taps) % 2 == 0:
        return 0
    if taps == taps[::-1]:
        return 1
    return -1 if taps == [-w for w in taps[::-1]] else 0
