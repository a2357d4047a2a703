"""Programs: operations on channels-last buffers; included by _core.pyx."""

cdef extern from "program.h":
    const int LR_UNITS

    ctypedef struct lr_view:
        int64_t offset, image
        Three pitch

    ctypedef struct lr_block:
        int64_t vectors, to, terms, weight

    ctypedef struct lr_op:
        int64_t kind, activation, mode
        lr_view inside "in"
        lr_view out, other
        int64_t has_other
        Three size, in_size, unit, units
        int64_t in_channels, channels
        Three taps, tap, stride, dilation, before
        int64_t terms, terms_block, blocks, splits
        Three algorithm
        int64_t tiles, multiplier, array, count_padding
        double epsilon, alpha
        const int64_t *offset
        const lr_block *block
        const void *weight
        const void *bias
        const void *mask
        const int32_t *channel
        const int32_t *index[3]

    ctypedef struct lr_step_range:
        int64_t op, begin, end, first, last, begin_split "from", to, strand

    ctypedef struct lr_program:
        int64_t ops, steps
        const lr_op *op
        const lr_step_range *step
        int64_t group, arena, scratch
        double seconds, fork_join

    ctypedef struct lr_array:
        void *data
        Five strides

cdef extern from "dispatch.h":
    int lr_run_program(const lr_program *, const lr_kernels *, const lr_array *, int64_t, int64_t,
                       int, void **, double *, int *) nogil
    int lr_limits(const lr_kernels *, int64_t *) nogil
    int64_t lr_scratch(const lr_op *, const lr_kernels *) nogil


cdef enum:
    LR_ARRAYS = 16

MAX_ARRAYS = LR_ARRAYS  # of a program, inputs and outputs

MIN_UNITS = LR_UNITS  # per thread, of an operation whose units threads share


class BlockLimits(NamedTuple):
    """Block sizes of the channels-last kernels of one instruction set and type.

    Attributes
    ----------
    lanes : int
        Elements of a vector.
    vectors : int
        Vectors of output channels that one micro-kernel call computes, at most.
    pixels : tuple of int
        Pixels that it computes, at most, by its number of vectors, from 1.
    """

    lanes: int
    vectors: int
    pixels: tuple


def block_limits(dtype="float32", isa=None):
    """Return the block sizes of the channels-last kernels."""
    cdef int64_t found[8]
    isa = default_isa() if isa is None else _checked_isa("isa", isa)
    cdef int n = lr_limits(_kernels(dtype, isa), found)
    return BlockLimits(found[0], found[1], tuple(found[i] for i in range(2, n)))


cdef class Program:
    """Operations over an arena of channels-last buffers; see program.h and engine/program.py.

    Arrays of a call are (batch, channels, d, h, w), of any strides, in the order of their numbers
    in `shapes`; those in `outputs` are written and must overlap no other.
    """

    cdef lr_program program
    cdef const lr_kernels *kernels
    cdef void *cache
    cdef list owned
    cdef readonly tuple shapes, names
    cdef readonly frozenset outputs
    cdef readonly str dtype, isa
    cdef int64_t itemsize

    def __cinit__(self):
        self.cache = NULL

    def __dealloc__(self):
        lr_free(self.cache)

    def __init__(
        self, ops, steps, shapes, outputs, *, arena, group=1, seconds=1.0, fork_join=0.0,
        dtype="float32", isa=None, names=(),
    ):
        self.isa = default_isa() if isa is None else _checked_isa("isa", isa)
        self.kernels = _kernels(dtype, self.isa)
        self.itemsize = 4 if dtype == "float32" else 8
        self.dtype, self.owned = dtype, []
        self.shapes = tuple(tuple(s) for s in shapes)
        self.outputs = frozenset(outputs)
        self.names = tuple(names) or tuple(f"array {i}" for i in range(len(self.shapes)))
        structs = bytearray(max(1, len(ops)) * sizeof(lr_op))
        self.owned.append(structs)
        cdef lr_op *op = <lr_op *><void *><char *>structs
        self.program.scratch = 0
        for i, o in enumerate(ops):
            self._fill(&op[i], o)
            self.program.scratch = max(self.program.scratch, lr_scratch(&op[i], self.kernels))
        self.program.ops, self.program.op = len(ops), op
        flat = [n for step in steps for n in step]
        self.program.steps = len(steps)
        self.program.step = <const lr_step_range *>self._ints("q", flat)
        self.program.group, self.program.arena = group, arena
        self.program.seconds, self.program.fork_join = seconds, fork_join

    cdef void *_ints(self, code, values) except? NULL:
        ints = array(code, values)
        self.owned.append(ints)
        return <void *><size_t>ints.buffer_info()[0]

    cdef const void *_floats(self, values) except? NULL:
        """Return the address of a C-contiguous array of the program's type; keep it alive."""
        cdef Py_buffer view
        if values is None:
            return NULL
        buffer = memoryview(values)
        if buffer.format != ("f" if self.itemsize == 4 else "d") or not buffer.c_contiguous:
            raise TypeError(f"weights and bias must be C-contiguous {self.dtype} arrays")
        self.owned.append(values)
        PyObject_GetBuffer(values, &view, PyBUF_STRIDES)
        cdef const void *address = view.buf
        PyBuffer_Release(&view)
        return address

    cdef _view(self, lr_view *v, view):
        cdef int a
        v.offset, v.image, pitch = view
        for a in range(3):
            v.pitch[a] = pitch[a]

    cdef _fill(self, lr_op *op, o):
        cdef int a
        op.kind, op.mode = KINDS.index(o.kind), MODES.index(o.mode)
        op.activation = ACTIVATIONS.index(o.activation)
        self._view(&op.inside, o.input)
        self._view(&op.out, o.output)
        op.has_other = o.other is not None
        self._view(&op.other, o.output if o.other is None else o.other)
        for a in range(3):
            op.size[a], op.in_size[a] = o.size[a], o.in_size[a]
            op.unit[a], op.units[a] = o.unit[a], o.units[a]
            op.taps[a], op.tap[a] = o.taps[a], o.tap[a]
            op.stride[a], op.dilation[a], op.before[a] = o.stride[a], o.dilation[a], o.before[a]
            op.algorithm[a] = o.algorithm[a]
            op.index[a] = NULL
            if o.index[a] is not None:
                op.index[a] = <const int32_t *>self._ints("i", o.index[a])
        op.in_channels, op.channels = o.in_channels, o.channels
        op.multiplier, op.array = o.multiplier, o.array
        op.count_padding, op.tiles = o.count_padding, o.tiles
        op.epsilon, op.alpha = o.epsilon, o.alpha
        op.terms, op.terms_block, op.splits = o.terms, o.terms_block, o.splits
        op.offset = <const int64_t *>self._ints("q", o.offsets)
        op.blocks = len(o.blocks)
        op.block = <const lr_block *>self._ints("q", [n for b in o.blocks for n in b])
        op.channel = <const int32_t *>self._ints("i", o.channel)
        op.weight, op.bias = self._floats(o.weight), self._floats(o.bias)
        op.mask = self._floats(o.mask)

    def __call__(self, arrays, int threads=0):
        """Run the program on a list of arrays, inputs and outputs."""
        self._run(arrays, threads, NULL)

    def profile(self, arrays, int threads=0):
        """Run once with clocks; return the seconds of each operation, a mean over the threads."""
        cdef int most = max(threads, lr_max_threads(), 1), n = self.program.ops
        seconds = array("d", [0.0] * (n * most))
        cdef int used = self._run(arrays, threads, <double *><size_t>seconds.buffer_info()[0])
        return [sum(seconds[i::n]) / used for i in range(n)]

    cdef int _run(self, arrays, int threads, double *seconds) except -1:
        cdef Py_buffer views[LR_ARRAYS]
        cdef lr_array each[LR_ARRAYS]
        cdef int n = 0, i, j, k, status = LR_OK, used = 1
        cdef int64_t batch = -1
        if len(arrays) != len(self.shapes) or len(arrays) > MAX_ARRAYS:
            raise ValueError(
                f"arrays must be {len(self.shapes)}, at most {MAX_ARRAYS}, got {len(arrays)}"
            )
        try:
            for i in range(len(arrays)):
                writes = i in self.outputs
                PyObject_GetBuffer(arrays[i], &views[i],
                                   PyBUF_STRIDES | PyBUF_FORMAT | (PyBUF_WRITABLE if writes else 0))
                n += 1
                batch = self._check(i, &views[i], batch)
                each[i].data = views[i].buf
                for k in range(5):
                    each[i].strides[k] = views[i].strides[k] // self.itemsize
            for i in self.outputs:
                for j in range(n):
                    if i != j and batch and _overlap(&views[i], &views[j]):
                        raise ValueError(f"{self.names[i]} must not overlap {self.names[j]}")
            with nogil:
                status = lr_run_program(&self.program, self.kernels, each, batch, self.itemsize,
                                        threads, &self.cache, seconds, &used)
            if status != LR_OK:
                raise MemoryError(
                    f"not enough memory for {<object>self.program.arena * self.itemsize} bytes of "
                    f"buffers and {self.program.scratch * self.itemsize} bytes of scratch per "
                    "thread"
                )
        finally:
            for i in range(n):
                PyBuffer_Release(&views[i])
        return used

    cdef int64_t _check(self, int i, Py_buffer *v, int64_t batch) except -1:
        """Return the batch size of an array of the right type and shape."""
        cdef int k
        if _type(v.format, self.itemsize) != LR_PLAN_TYPE:
            raise TypeError(f"{self.names[i]} must be a {self.dtype} array in native byte order")
        shape = tuple(v.shape[k] for k in range(v.ndim))
        if shape[1:] != self.shapes[i] or v.ndim != 5 or (batch >= 0 and shape[0] != batch):
            raise ValueError(
                f"{self.names[i]} must have shape (batch, {self.shapes[i]}), got {shape}"
            )
        for k in range(5):
            if v.strides[k] % self.itemsize:
                raise ValueError(
                    f"strides of {self.names[i]} must be multiples of {self.itemsize} bytes"
                )
        if <size_t>v.buf % <size_t>self.itemsize:
            raise ValueError(f"{self.names[i]} must be aligned to {self.itemsize} bytes")
        return shape[0]
