# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
# cython: freethreading_compatible=True
"""The engine's door: shapes are checked here, so that C need not; nothing is computed."""

import os
from array import array
from math import prod

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_STRIDES, PyBUF_WRITABLE
from cpython.buffer cimport PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport free


cdef extern from "dispatch.h":
    const int LR_OK, LR_OWN, LR_U8, LR_I8, LR_U16, LR_I16, LR_STEPS

    ctypedef struct lr_stage:
        int64_t left, groups, right, cin, cout, taps
        int64_t kernel[3]
        int64_t stride[3]
        int64_t dilation[3]
        int64_t before[3]
        int64_t in_size[3]
        int64_t out_size[3]
        int64_t extent[3]
        int64_t plane[3]
        int64_t phase[3]
        int64_t channel, buffer
        const int32_t *fold
        const int32_t *source
        const int32_t *place
        const int64_t *offset
        const void *weight
        const void *bias
        int activation

    ctypedef struct lr_plan:
        int64_t stages
        const lr_stage *stage
        const int32_t *border[3]
        double fill
        int64_t tile[3]
        int64_t tiles[3]
        int64_t parts
        double seconds
        int64_t workspace, outputs, result

    ctypedef struct lr_arrays:
        const void *x
        void *out
        int64_t xs[5]
        int64_t os[5]
        int x_type, out_type

    ctypedef struct lr_step:
        double seconds
        int64_t macs, bytes

    ctypedef struct lr_kernels:
        int64_t rows, width
        void (*pack)(const void *, void *, int64_t, int64_t, int64_t) noexcept nogil
        double (*peak)(int64_t, double) noexcept nogil

    ctypedef struct lr_isa:
        lr_kernels f32, f64

    int lr_isa_count() nogil
    const char *lr_isa_name(int) nogil
    const lr_isa *lr_isa_table(int) nogil
    int lr_max_threads() nogil
    double lr_wake(int, int) nogil
    void lr_caches(int64_t *) nogil
    double lr_now() nogil
    int lr_run(const lr_plan *, const lr_kernels *, lr_arrays *, int64_t, int64_t, int, void **,
               lr_step *, int *) nogil

ISAS = tuple(lr_isa_name(i).decode() for i in range(lr_isa_count()))
MAX_STAGES = 16


def default_isa():
    """The best instruction set, or the one that the environment variable LOWRANK_ISA names."""
    name = os.environ.get("LOWRANK_ISA", ISAS[0])
    if name not in ISAS:
        raise ValueError(f"LOWRANK_ISA must be one of {', '.join(ISAS)}, got {name!r}")
    return name


def caches():
    """Bytes of the L1 data and the L2 cache of a core, and of the L3 cache that cores share."""
    cdef int64_t sizes[3]
    lr_caches(sizes)
    return sizes[0], sizes[1], sizes[2]


def peak(int64_t n, dtype="float32", isa=None):
    """Do n rounds of multiply-adds in registers; returns how many operations (two each) it did.

    Time it to know what the machine could do at the most, on one thread.
    """
    cdef const lr_isa *table = lr_isa_table(ISAS.index(default_isa() if isa is None else isa))
    cdef const lr_kernels *kernels = &table.f32 if dtype == "float32" else &table.f64
    with nogil:
        kernels.peak(n, 0.5)
    return 2 * n * 3 * kernels.rows * (kernels.width // 8)


def max_threads():
    """Threads that OpenMP offers; 1 without it and in a forked child."""
    return lr_max_threads()


def wake(int threads):
    """Seconds that it takes to start a team and to hear that it is done, measured."""
    return lr_wake(min(threads, lr_max_threads()), 1)


cdef class Plan:
    """A chain of stages, packed for one input shape; see spec.StageSpec for a stage.

    x and out of a call are (batch, channels, d, h, w), of any strides; they must not overlap.
    Either may hold 8- or 16-bit integers in place of the plan's type: those of x are taken as
    they are, those of out rounded to nearest, halves to even, and saturated.
    """

    cdef lr_plan plan
    cdef const lr_kernels *kernels
    cdef void *cache
    cdef list kept  # what the structs point into
    cdef readonly tuple shape, out_shape, tile
    cdef readonly str dtype, isa
    cdef int64_t itemsize
    cdef int64_t dims[4]
    cdef int64_t out_dims[4]

    def __cinit__(self):
        self.cache = NULL

    def __dealloc__(self):
        free(self.cache)

    def __init__(self, stages, shape, *, dtype, border=None, fill=0.0, tile=None, parts=1,
                 seconds=1.0, isa=None):
        if dtype not in ("float32", "float64"):
            raise TypeError(f"dtype must be float32 or float64, got {dtype}")
        isa = default_isa() if isa is None else isa
        if isa not in ISAS:
            raise ValueError(f"isa must be one of {', '.join(ISAS)}, got {isa!r}")
        if not 1 <= len(stages) <= MAX_STAGES:
            raise ValueError(f"a plan takes 1 to {MAX_STAGES} stages, got {len(stages)}")
        cdef const lr_isa *table = lr_isa_table(ISAS.index(isa))
        self.kernels = &table.f32 if dtype == "float32" else &table.f64
        self.itemsize = 4 if dtype == "float32" else 8
        self.dtype, self.isa, self.shape, self.kept = dtype, isa, tuple(shape), []
        bordered = border is not None and border[2] is not None
        layout = _Layout(stages, shape, tile, bordered)
        self.tile, self.out_shape = layout.tile, layout.out_shape
        for a in range(4):
            self.dims[a], self.out_dims[a] = self.shape[a], self.out_shape[a]
        structs = bytearray(len(stages) * sizeof(lr_stage))
        cdef lr_stage *s = <lr_stage *><void *><char *>structs
        self.kept.append(structs)
        for k, (spec, sizes) in enumerate(zip(stages, layout.stages)):
            self._describe(&s[k], spec, sizes)
            if k and spec.source is not None:
                s[k - 1].place = <const int32_t *>self._ints("i", _inverse(spec.source))
            elif spec.source is not None:
                s[k].source = <const int32_t *>self._ints("i", spec.source)
            if spec.fold is not None:
                padded = sizes.size_in[2] + spec.before[2] + spec.after[2]
                whole = self.tile[2] == self.out_shape[3]
                if not (k and whole and spec.stride[2] == 1 and len(spec.fold) == padded
                        and 0 <= min(spec.fold) and max(spec.fold) < sizes.size_in[2]):
                    raise ValueError(f"fold of stage {k} does not fit its input, or cut rows")
                s[k].fold = <const int32_t *>self._ints("i", spec.fold)
        self.plan.stages, self.plan.stage = len(stages), s
        self.plan.fill = fill
        if parts < 1 or (parts > 1 and len(stages) > 1):
            raise ValueError(f"a plan of {len(stages)} stages cannot have {parts} parts")
        self.plan.parts, self.plan.seconds = parts, seconds
        for a in range(3):
            self.plan.tile[a] = self.tile[a]
            self.plan.tiles[a] = -(-self.out_shape[1 + a] // self.tile[a])
            if border is not None and border[a] is not None:
                padded = shape[1 + a] + stages[0].before[a] + stages[0].after[a]
                low, high = min(border[a]), max(border[a])
                if len(border[a]) != padded or not -1 <= low <= high < shape[1 + a]:
                    raise ValueError(
                        f"border of axis {a} must hold {padded} indices from -1 to "
                        f"{shape[1 + a] - 1}"
                    )
                self.plan.border[a] = <const int32_t *>self._ints("i", border[a])
        self.plan.workspace = layout.workspace
        self.plan.outputs = prod(self.out_shape)
        self.plan.result = self.out_shape[0] * prod(self.tile)

    @property
    def jobs(self):
        """Pieces of one example that threads can share: tiles times parts."""
        return self.tiles * self.plan.parts

    @property
    def tiles(self):
        """Tiles of one example."""
        return prod(self.plan.tiles[a] for a in range(3))

    @property
    def workspace(self):
        """Bytes that each thread works in."""
        return 2 * self.plan.workspace * self.itemsize

    cdef void *_ints(self, code, values):
        """The integers as a C array that lives as long as the plan."""
        kept = array(code)
        try:
            kept.frombytes(memoryview(values).cast("B"))  # int32 arrays as they are
        except TypeError:
            kept.extend(values)
        if not kept:
            kept.append(0)
        self.kept.append(kept)
        return <void *><size_t>kept.buffer_info()[0]

    cdef const void *_floats(self, values) except NULL:
        """The address of a C-contiguous array of the plan's type, which is kept alive."""
        cdef Py_buffer view
        held = memoryview(values)
        if held.format != ("f" if self.itemsize == 4 else "d") or not held.c_contiguous:
            raise TypeError(f"weights and bias must be C-contiguous {self.dtype} arrays")
        self.kept.append(values)
        PyObject_GetBuffer(values, &view, PyBUF_STRIDES)
        cdef const void *at = view.buf
        PyBuffer_Release(&view)
        return at

    cdef _describe(self, lr_stage *s, spec, sizes):
        s.left, s.groups, s.right = spec.left, spec.groups, spec.right
        rows, s.cin = spec.weight.shape[:2]
        s.cout = rows // spec.groups
        s.taps = prod(spec.weight.shape[1:])
        for a in range(3):
            s.kernel[a], s.stride[a] = spec.weight.shape[2 + a], spec.stride[a]
            s.dilation[a], s.before[a] = spec.dilation[a], spec.before[a]
            s.in_size[a], s.out_size[a] = sizes.size_in[a], sizes.size_out[a]
            s.extent[a], s.plane[a], s.phase[a] = sizes.extent[a], sizes.plane[a], sizes.phase[a]
        s.channel, s.buffer = sizes.channel, sizes.buffer
        s.source = s.place = s.fold = NULL
        s.offset = <const int64_t *>self._ints("q", sizes.offsets(spec))
        packed = bytearray(max(1, rows * s.taps * self.itemsize) + 64)
        cdef char *to = packed
        self.kept.append(packed)
        self.kernels.pack(self._floats(spec.weight), to, s.groups, s.cout, s.taps)
        s.weight = to
        s.activation = _ACTIVATIONS.index(spec.activation)
        s.bias = NULL
        if spec.bias is not None:
            channels = spec.left * rows * spec.right
            if spec.bias.shape != (channels,):
                raise ValueError(f"bias must have shape ({channels},), got {spec.bias.shape}")
            s.bias = self._floats(spec.bias)

    def __call__(self, x, out, int threads=0):
        """Run the chain on x, (batch, channels, d, h, w), into out."""
        self._run(x, out, threads, NULL)

    def breakdown(self, x, out, int threads=0):
        """Run it once, with a clock.

        Returns the seconds of the whole run, the threads that it took, and, for each step,
        (stage, name, seconds, macs, bytes), added up over threads; `stage` counts from 0, and the
        last step is that of the chain as a whole.
        """
        cdef int most = max(threads, lr_max_threads(), 1)
        cdef int64_t kinds = self.plan.stages * LR_STEPS + 1
        space = bytearray(most * kinds * sizeof(lr_step))
        cdef lr_step *steps = <lr_step *><void *><char *>space
        cdef double start = lr_now()
        cdef int team = self._run(x, out, threads, steps)
        cdef double took = lr_now() - start
        found = []
        for k in range(kinds):
            sums = [0.0, 0, 0]
            for t in range(most):
                sums[0] += steps[t * kinds + k].seconds
                sums[1] += steps[t * kinds + k].macs
                sums[2] += steps[t * kinds + k].bytes
            name = "deliver" if k == kinds - 1 else ("bring", "compute")[k % LR_STEPS]
            found.append((k // LR_STEPS, name, *sums))
        return took, team, found

    cdef int _run(self, x, out, int threads, lr_step *steps) except -1:
        cdef Py_buffer a, b
        cdef lr_arrays arrays
        cdef int64_t batch
        cdef int status, team = 1
        PyObject_GetBuffer(x, &a, PyBUF_STRIDES | PyBUF_FORMAT)
        try:
            PyObject_GetBuffer(out, &b, PyBUF_STRIDES | PyBUF_FORMAT | PyBUF_WRITABLE)
            try:
                batch = self._check("x", &a, self.dims, -1)
                self._check("out", &b, self.out_dims, batch)
                arrays.x_type = self._place("x", &a, arrays.xs)
                arrays.out_type = self._place("out", &b, arrays.os)
                if batch and self.plan.outputs and _overlap(&a, &b):
                    raise ValueError("out must not overlap x")
                arrays.x, arrays.out = a.buf, b.buf
                with nogil:
                    status = lr_run(&self.plan, self.kernels, &arrays, batch, self.itemsize,
                                    threads, &self.cache, steps, &team)
                if status != LR_OK:
                    raise MemoryError(
                        f"no memory for a workspace of {self.workspace} bytes a thread, and for "
                        "a tile of the result where out holds integers"
                    )
            finally:
                PyBuffer_Release(&b)
        finally:
            PyBuffer_Release(&a)
        return team

    cdef int64_t _check(self, name, Py_buffer *v, const int64_t *dims, int64_t batch) except -1:
        """The batch of an array, once its type and shape are what the plan takes."""
        cdef bint fits = v.ndim == 5
        cdef int i
        if _kind(v.format, self.itemsize) < 0:
            raise TypeError(
                f"{name} must be a {self.dtype} array in native byte order, or of 8- or 16-bit "
                "integers"
            )
        for i in range(4):
            fits = fits and v.shape[1 + i] == dims[i]
        if not fits or (batch >= 0 and v.shape[0] != batch):
            wanted = ", ".join(str(dims[i]) for i in range(4))
            got = tuple(v.shape[i] for i in range(v.ndim))
            raise ValueError(f"{name} must have shape (batch, {wanted}), got {got}")
        return v.shape[0]

    cdef int _place(self, name, Py_buffer *v, int64_t *strides) except -1:
        """The strides in elements; returns the type of the elements."""
        cdef int i
        for i in range(5):
            if v.strides[i] % v.itemsize:
                raise ValueError(f"the strides of {name} must be multiples of {v.itemsize} bytes")
            strides[i] = v.strides[i] // v.itemsize
        if <size_t>v.buf % <size_t>v.itemsize:
            raise ValueError(f"{name} must be aligned to {v.itemsize} bytes")
        return _kind(v.format, self.itemsize)


cdef int _kind(const char *format, int64_t itemsize) noexcept:
    """The type that a buffer's format names, or -1."""
    if format != NULL and format[0] == c"=":  # native as well, but perhaps not aligned
        format += 1
    if format == NULL or format[0] == 0 or format[1] != 0:
        return -1
    if format[0] == (c"f" if itemsize == 4 else c"d"):
        return LR_OWN
    if format[0] == c"B":
        return LR_U8
    if format[0] == c"b":
        return LR_I8
    if format[0] == c"H":
        return LR_U16
    return LR_I16 if format[0] == c"h" else -1


cdef bint _overlap(Py_buffer *a, Py_buffer *b) noexcept:
    """Whether the address ranges of two arrays meet."""
    cdef int64_t a0, a1, b0, b1
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


def _inverse(source):
    """place[source[j]] = j."""
    place = [0] * len(source)
    for j, c in enumerate(source):
        place[c] = j
    return place


from lowrank._kernels.layout import Layout as _Layout  # noqa: E402  (sizes: plain Python)
from lowrank._kernels.spec import ACTIVATIONS as _ACTIVATIONS  # noqa: E402
