# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
# cython: freethreading_compatible=True
"""Cython bindings: validate shapes and dtypes, then call the C engine."""

import os
from array import array
from math import prod
from typing import NamedTuple

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_STRIDES, PyBUF_WRITABLE
from cpython.buffer cimport PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport free, malloc


ctypedef int64_t Three[3]
ctypedef int64_t Four[4]
ctypedef int64_t Five[5]

cdef extern from "dispatch.h":
    const int LR_OK, LR_NO_MEMORY, LR_PLAN_TYPE, LR_U8, LR_I8, LR_U16, LR_I16, LR_STEPS

    ctypedef struct lr_stage:
        int64_t outer, groups, inner, cin, cout, taps
        Three kernel, stride, dilation, before, in_size, out_size, extent, plane, phase
        int64_t channel, buffer
        const int32_t *padded_columns
        const int32_t *source
        const int32_t *destination
        const int64_t *offset
        const void *weight
        const void *bias
        int activation

    ctypedef struct lr_plan:
        int64_t stages
        const lr_stage *stage
        const int32_t *border[3]
        double fill
        Three tile, tiles
        int64_t splits
        double seconds, fork_join
        int64_t workspace, outputs, result

    ctypedef struct lr_arrays:
        const void *x
        void *out
        Five xs, os
        int x_type, out_type

    ctypedef struct lr_step:
        double seconds
        int64_t macs, bytes

    const int LR_FROM_BUFFER, LR_IN_PLACE, LR_PACKED, LR_PACKED_BY_CHANNELS, LR_TRANSPOSED
    const int LR_DEPTHWISE_ROWS, LR_DEPTHWISE_PLANES, LR_DENSE_FLAT, LR_DENSE_ROWS, LR_DENSE_SCATTER

    ctypedef struct lr_path:
        int input, compute, keeps_rows

    ctypedef struct lr_plane_limits:
        int64_t lanes, rows, overread, remainder, packed, stages, colours

    ctypedef struct lr_pass:
        int64_t outer, n, inner, taps, width, before
        const int32_t *offset
        const int32_t *border
        const void *weight
        double fill

    ctypedef struct lr_taps:
        int64_t taps
        int parity
        const void *weight

    ctypedef struct lr_image:
        int64_t rows, columns, channels
        lr_taps vertical, horizontal
        const int32_t *row
        const int32_t *column
        int64_t before
        double column_fill, row_fill
        int x_type, out_type

    ctypedef struct lr_window:
        int64_t width, before
        const int32_t *border
        double fill

    ctypedef struct lr_box:
        int64_t rows, columns, inner
        lr_window down, across
        double before, after, divisor
        const int32_t *ends
        int64_t strip
        int type, is_single
        int64_t multiplier, shift

    ctypedef struct lr_resample:
        int64_t lines, n, outputs, inner, taps, strip
        const int32_t *border
        const int64_t *start
        const int64_t *list "list"
        const void *weight
        double fill

    ctypedef struct lr_kernels:
        lr_plane_limits limits
        void (*pass_ "pass")(const lr_pass *, const void *, void *, void *,
                             const void **) noexcept nogil
        void (*paths)(const lr_plan *, const lr_arrays *, int64_t, lr_path *) noexcept nogil
        void (*pack)(const void *, void *, int64_t, int64_t, int64_t) noexcept nogil
        double (*peak)(int64_t, double) noexcept nogil

    ctypedef struct lr_isa:
        lr_kernels f32, f64

    int lr_isa_count() nogil
    const char *lr_isa_name(int) nogil
    const lr_isa *lr_isa_table(int) nogil
    int lr_guard_forks() nogil
    int lr_max_threads() nogil
    double lr_fork_join(int) nogil
    void lr_caches(int64_t *) nogil
    double lr_now() nogil
    void lr_free(void *) nogil
    int lr_run_image(lr_image *, const lr_kernels *, const void *, void *, int64_t, int64_t, int,
                     double, int *) noexcept nogil
    int lr_run_box(const lr_isa *, const lr_kernels *, const lr_box *, const void *, void *,
                   int64_t, int64_t, int, double, double) nogil
    int lr_run_resample(const lr_kernels *, const lr_resample *, const void *, void *, int64_t,
                        int64_t, int, double, double) nogil
    int lr_run(const lr_plan *, const lr_kernels *, lr_arrays *, int64_t, int64_t, int, void **,
               lr_step *, int *) nogil

from lowrank._kernels.layout import TileLayout, check_border, check_padded_columns, inverse
from lowrank._kernels.spec import ACTIVATIONS, KINDS, MODES, PlaneLimits, StagePath

ISAS = tuple(lr_isa_name(i).decode() for i in range(lr_isa_count()))


def default_isa():
    """Return the best instruction set, or the environment variable LOWRANK_ISA if set."""
    return _checked_isa("LOWRANK_ISA", os.environ.get("LOWRANK_ISA", ISAS[0]))


def caches():
    """Return the bytes of a core's L1 data and L2 cache, and of the shared L3 cache."""
    cdef int64_t sizes[3]
    lr_caches(sizes)
    return sizes[0], sizes[1], sizes[2]


def peak(int64_t n, dtype="float32", isa=None):
    """Run n rounds of MACs in registers; return the number of operations.

    A MAC counts as two operations.  The time of a call gives the peak of one thread.
    """
    cdef const lr_kernels *kernels = _kernels(dtype, default_isa() if isa is None else isa)
    with nogil:
        kernels.peak(n, 0.5)
    return 2 * n * 3 * kernels.limits.rows * kernels.limits.lanes


def plane_limits(dtype="float32", isa=None):
    """Return the limits and block sizes of the kernels on planes, by default of default_isa()."""
    isa = default_isa() if isa is None else _checked_isa("isa", isa)
    cdef lr_plane_limits n = _kernels(dtype, isa).limits
    return PlaneLimits(n.lanes, n.rows, n.overread, n.remainder, n.packed, n.stages)


INPUTS = {
    LR_FROM_BUFFER: "buffer", LR_IN_PLACE: "in place", LR_PACKED: "packed",
    LR_PACKED_BY_CHANNELS: "packed by channels", LR_TRANSPOSED: "transposed",
}
KERNELS = {
    LR_DEPTHWISE_ROWS: "depthwise rows", LR_DEPTHWISE_PLANES: "depthwise planes",
    LR_DENSE_FLAT: "dense flat", LR_DENSE_ROWS: "dense rows", LR_DENSE_SCATTER: "dense scatter",
}


def stage_paths(stages, shape, tile=None, *, dtype="float32", border=None, isa=None):
    """Return the path of each stage on the middle tile; weights are not read.

    Parameters
    ----------
    stages : sequence of StageSpec
        Stages; only the shapes of their weights matter.
    shape : (int, int, int, int)
        (channels, d, h, w) of x.
    tile : (int, int, int), optional
        Tile of the output (default: all of it).
    dtype : str
        Type of the plan.
    border : sequence, optional
        Tables of the input's border, as for KernelPlan.
    isa : str, optional
        Instruction set (default: that of default_isa()).

    Returns
    -------
    tuple of StagePath
        Path of each stage if x and out are contiguous, for whole blocks of output channels.
    """
    isa = default_isa() if isa is None else _checked_isa("isa", isa)
    cdef const lr_kernels *kernels = _kernels(dtype, isa)
    limits = plane_limits(dtype, isa)
    _check_stages(stages, limits)
    border = (None, None, None) if border is None else border
    check_border(border, stages, shape)
    layout = TileLayout(stages, shape, tile, limits, border[2] is not None)
    structs = bytearray(len(stages) * sizeof(lr_stage))
    found = bytearray(len(stages) * sizeof(lr_path))
    cdef lr_stage *s = <lr_stage *><void *><char *>structs
    cdef lr_path *paths = <lr_path *><void *><char *>found
    cdef lr_plan plan
    cdef lr_arrays arrays
    cdef int32_t present = 0
    cdef int64_t middle = 0
    for k, (spec, sizes) in enumerate(zip(stages, layout.stages)):
        _fill_sizes(&s[k], spec, sizes)
        # Whether there is a permutation decides, not its values.
        if spec.permutation is not None and k:
            s[k - 1].destination = &present
        elif spec.permutation is not None:
            s[k].source = &present
    for a in range(3):
        plan.tile[a] = layout.tile[a]
        plan.tiles[a] = -(-layout.out_shape[1 + a] // layout.tile[a])
        plan.border[a] = NULL if border[a] is None else &present
        middle = middle * plan.tiles[a] + plan.tiles[a] // 2
    plan.stages, plan.stage = len(stages), s
    arrays.x_type = arrays.out_type = LR_PLAN_TYPE
    arrays.xs[4] = arrays.os[4] = 1
    for a in range(3, -1, -1):
        arrays.xs[a] = arrays.xs[a + 1] * shape[a]
        arrays.os[a] = arrays.os[a + 1] * layout.out_shape[a]
    kernels.paths(&plan, &arrays, middle, paths)
    return tuple(
        StagePath(INPUTS[paths[k].input], KERNELS[paths[k].compute], paths[k].keeps_rows != 0)
        for k in range(len(stages))
    )


cdef _check_stages(stages, limits):
    if not 1 <= len(stages) <= limits.max_stages:
        raise ValueError(f"stages must number 1 to {limits.max_stages}, got {len(stages)}")


cdef _fill_sizes(lr_stage *s, spec, sizes):
    """Fill the fields of a struct that are no pointers; see lr.h."""
    s.outer, s.groups, s.inner = spec.outer, spec.groups, spec.inner
    rows, s.cin = spec.weight.shape[:2]
    s.cout = rows // spec.groups
    s.taps = prod(spec.weight.shape[1:])
    for a in range(3):
        s.kernel[a], s.stride[a] = spec.kernel[a], spec.stride[a]
        s.dilation[a], s.before[a] = spec.dilation[a], spec.before[a]
        s.in_size[a], s.out_size[a] = sizes.size_in[a], sizes.size_out[a]
        s.extent[a], s.plane[a], s.phase[a] = sizes.extent[a], sizes.plane[a], sizes.phase[a]
    s.channel, s.buffer = sizes.channel, sizes.buffer
    s.activation = ACTIVATIONS.index(spec.activation)
    s.source = s.destination = s.padded_columns = NULL


if lr_guard_forks():
    raise MemoryError("no memory to register what forked children do")


def max_threads():
    """Return the number of threads that OpenMP offers; 1 without it and in a forked child."""
    return lr_max_threads()


def measure_fork_join():
    """Measure the fork/join latency of an OpenMP parallel region on all threads, in seconds."""
    return lr_fork_join(lr_max_threads())


cdef class KernelPlan:
    """A chain of stages, packed for one input shape; see spec.StageSpec for a stage.

    x and out of a call are (batch, channels, d, h, w), of any strides; they must not overlap.
    Either may hold 8- or 16-bit integers in place of the plan's type: results are rounded to
    nearest, halves to even, and saturated.
    """

    cdef lr_plan plan
    cdef const lr_kernels *kernels
    cdef void *cache
    cdef list owned  # memory that the structs point into
    cdef readonly tuple shape, out_shape, tile
    cdef readonly str dtype, isa
    cdef readonly object tiles, tasks, workspace  # per example, per example, bytes per thread
    cdef int64_t itemsize
    cdef Four dims, out_dims

    def __cinit__(self):
        self.cache = NULL

    def __dealloc__(self):
        lr_free(self.cache)

    def __init__(self, stages, shape, *, dtype, border=None, fill=0.0, tile=None, splits=1,
                 seconds=1.0, fork_join=0.0, isa=None):
        self.isa = default_isa() if isa is None else _checked_isa("isa", isa)
        self.kernels = _kernels(dtype, self.isa)
        limits = plane_limits(dtype, self.isa)
        _check_stages(stages, limits)
        if splits < 1 or (splits > 1 and len(stages) > 1):
            raise ValueError(f"splits must be 1 for {len(stages)} stages, got {splits}")
        self.itemsize = 4 if dtype == "float32" else 8
        self.dtype, self.shape, self.owned = dtype, tuple(shape), []
        border = (None, None, None) if border is None else border
        check_border(border, stages, shape)
        layout = TileLayout(stages, shape, tile, limits, border[2] is not None)
        self.tile, self.out_shape = layout.tile, layout.out_shape
        for a in range(4):
            self.dims[a], self.out_dims[a] = self.shape[a], self.out_shape[a]
        structs = bytearray(len(stages) * sizeof(lr_stage))
        cdef lr_stage *s = <lr_stage *><void *><char *>structs
        self.owned.append(structs)
        for k, (spec, sizes) in enumerate(zip(stages, layout.stages)):
            self._fill(&s[k], spec, sizes)
            if k and spec.permutation is not None:
                s[k - 1].destination = <const int32_t *>self._ints("i", inverse(spec.permutation))
            elif spec.permutation is not None:
                s[k].source = <const int32_t *>self._ints("i", spec.permutation)
            if spec.padded_columns is not None:
                check_padded_columns(k, spec, layout)
                s[k].padded_columns = <const int32_t *>self._ints("i", spec.padded_columns)
        for a in range(3):
            self.plan.tile[a] = self.tile[a]
            self.plan.tiles[a] = -(-self.out_shape[1 + a] // self.tile[a])
            if border[a] is not None:
                self.plan.border[a] = <const int32_t *>self._ints("i", border[a])
        self.plan.stages, self.plan.stage, self.plan.fill = len(stages), s, fill
        self.plan.splits, self.plan.seconds = splits, seconds
        self.plan.fork_join = fork_join
        self.plan.workspace = layout.workspace
        self.plan.outputs = prod(self.out_shape)
        self.plan.result = self.out_shape[0] * prod(self.tile)
        self.tiles = prod(self.plan.tiles[a] for a in range(3))
        self.tasks = self.tiles * splits
        self.workspace = 2 * layout.workspace * self.itemsize

    cdef void *_ints(self, code, values):
        """Copy integers to a C array that lives as long as the plan."""
        try:
            ints = array(code, memoryview(values).tobytes())  # int32 arrays: no conversion
        except TypeError:
            ints = array(code, values)
        self.owned.append(ints)
        return <void *><size_t>ints.buffer_info()[0]

    cdef const void *_floats(self, values) except NULL:
        """Return the address of a C-contiguous array of the plan's type; keep it alive."""
        cdef Py_buffer view
        buffer = memoryview(values)
        if buffer.format != ("f" if self.itemsize == 4 else "d") or not buffer.c_contiguous:
            raise TypeError(f"weights and bias must be C-contiguous {self.dtype} arrays")
        self.owned.append(values)
        PyObject_GetBuffer(values, &view, PyBUF_STRIDES)
        cdef const void *address = view.buf
        PyBuffer_Release(&view)
        return address

    cdef _fill(self, lr_stage *s, spec, sizes):
        """Fill a struct but for its permutations; see lr.h for its fields."""
        _fill_sizes(s, spec, sizes)
        rows = s.groups * s.cout
        s.offset = <const int64_t *>self._ints("q", sizes.offsets(spec))
        packed = bytearray(max(1, rows * s.taps * self.itemsize) + 64)
        cdef char *to = packed
        self.owned.append(packed)
        self.kernels.pack(self._floats(spec.weight), to, s.groups, s.cout, s.taps)
        s.weight = to
        s.bias = NULL
        if spec.bias is not None:
            channels = spec.outer * rows * spec.inner
            if spec.bias.shape != (channels,):
                raise ValueError(f"bias must have shape ({channels},), got {spec.bias.shape}")
            s.bias = self._floats(spec.bias)

    def __call__(self, x, out, int threads=0):
        """Run the chain on x, (batch, channels, d, h, w), into out."""
        self._run(x, out, threads, NULL)

    def profile(self, x, out, int threads=0):
        """Run once with clocks; see profiling.step_totals for its records.

        Returns
        -------
        (float, int, bytearray)
            Seconds of the run, number of threads that took part, and records.
        """
        cdef int most = max(threads, lr_max_threads(), 1)
        records = bytearray(most * (self.plan.stages * LR_STEPS + 1) * sizeof(lr_step))
        cdef double start = lr_now()
        cdef int used = self._run(x, out, threads, <lr_step *><void *><char *>records)
        return lr_now() - start, used, records

    cdef int _run(self, x, out, int threads, lr_step *steps) except -1:
        cdef Py_buffer a, b
        cdef lr_arrays arrays
        cdef int64_t batch
        cdef int status, used = 1
        PyObject_GetBuffer(x, &a, PyBUF_STRIDES | PyBUF_FORMAT)
        try:
            PyObject_GetBuffer(out, &b, PyBUF_STRIDES | PyBUF_FORMAT | PyBUF_WRITABLE)
            try:
                batch = self._check("x", &a, self.dims, -1)
                self._check("out", &b, self.out_dims, batch)
                arrays.x_type = self._strides("x", &a, arrays.xs)
                arrays.out_type = self._strides("out", &b, arrays.os)
                if batch and self.plan.outputs and _overlap(&a, &b):
                    raise ValueError("out must not overlap x")
                arrays.x, arrays.out = a.buf, b.buf
                with nogil:
                    status = lr_run(&self.plan, self.kernels, &arrays, batch, self.itemsize,
                                    threads, &self.cache, steps, &used)
                if status != LR_OK:
                    raise MemoryError(
                        f"not enough memory for a workspace of {self.workspace} bytes per thread "
                        "(and for a tile of the result if out holds integers)"
                    )
            finally:
                PyBuffer_Release(&b)
        finally:
            PyBuffer_Release(&a)
        return used

    cdef int64_t _check(self, name, Py_buffer *v, const int64_t *dims, int64_t batch) except -1:
        """Return the batch size of an array of the right type and shape."""
        cdef bint fits = v.ndim == 5
        cdef int i
        if _type(v.format, self.itemsize) < 0:
            raise TypeError(
                f"{name} must be a {self.dtype} array in native byte order, or of 8- or 16-bit "
                "integers"
            )
        for i in range(4):
            fits = fits and v.shape[1 + i] == dims[i]
        if not fits or (batch >= 0 and v.shape[0] != batch):
            expected = ", ".join(str(dims[i]) for i in range(4))
            got = tuple(v.shape[i] for i in range(v.ndim))
            raise ValueError(f"{name} must have shape (batch, {expected}), got {got}")
        return v.shape[0]

    cdef int _strides(self, name, Py_buffer *v, int64_t *strides) except -1:
        """Fill in the strides in elements; return the type of the elements."""
        cdef int i
        for i in range(5):
            if v.strides[i] % v.itemsize:
                raise ValueError(f"strides of {name} must be multiples of {v.itemsize} bytes")
            strides[i] = v.strides[i] // v.itemsize
        if <size_t>v.buf % <size_t>v.itemsize:
            raise ValueError(f"{name} must be aligned to {v.itemsize} bytes")
        return _type(v.format, self.itemsize)


cdef str _checked_isa(name, isa):
    if isa not in ISAS:
        raise ValueError(f"{name} must be one of {', '.join(ISAS)}, got {isa!r}")
    return isa


cdef const lr_kernels *_kernels(dtype, isa) except NULL:
    if dtype not in ("float32", "float64"):
        raise TypeError(f"dtype must be float32 or float64, got {dtype}")
    cdef const lr_isa *table = lr_isa_table(ISAS.index(isa))
    return &table.f32 if dtype == "float32" else &table.f64


cdef int _type(const char *format, int64_t itemsize) noexcept:
    """Return the element type of a buffer's format, or -1."""
    if format != NULL and format[0] == c"=":  # native as well, but perhaps not aligned
        format += 1
    if format == NULL or format[0] == 0 or format[1] != 0:
        return -1
    if format[0] == (c"f" if itemsize == 4 else c"d"):
        return LR_PLAN_TYPE
    if format[0] == c"B":
        return LR_U8
    if format[0] == c"b":
        return LR_I8
    if format[0] == c"H":
        return LR_U16
    return LR_I16 if format[0] == c"h" else -1


cdef bint _overlap(Py_buffer *a, Py_buffer *b) noexcept:
    """Return whether the address ranges of two arrays overlap."""
    cdef int64_t a0, a1, b0, b1
    if a.len == 0 or b.len == 0:
        return False
    _range(a, &a0, &a1)
    _range(b, &b0, &b1)
    return a0 < b1 and b0 < a1


cdef void _range(Py_buffer *v, int64_t *low, int64_t *high) noexcept:
    cdef int i
    cdef int64_t step
    low[0] = high[0] = <int64_t><size_t>v.buf
    for i in range(v.ndim):
        step = (v.shape[i] - 1) * v.strides[i]
        if step < 0:
            low[0] += step
        else:
            high[0] += step
    high[0] += v.itemsize


include "program.pxi"
include "passes.pxi"
include "boxes.pxi"
include "gradient.pxi"
