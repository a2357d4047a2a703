"""Gradients of the weights of dense convolutions; included by _core.pyx."""

cdef extern from "program.h":
    ctypedef struct lr_gradient:
        int64_t batch, in_channels, channels
        Three in_size, size, taps, stride, dilation, before

cdef extern from "dispatch.h":
    int lr_run_gradient(lr_gradient *, const lr_kernels *, const lr_array *, const lr_array *,
                        void *, void *, int64_t, int, double, double) nogil


def weight_gradient(
    x, grad, weight, bias, taps, stride, dilation, before, *, int threads=0, double seconds=1.0,
    double fork_join=0.0, isa=None,
):
    """Compute the gradients of the weight and of the bias of a dense convolution.

    Parameters
    ----------
    x, grad : buffer
        Input (batch, channels, d, h, w) and gradient of the output, of one type: float32 or
        float64, any strides.
    weight, bias : buffer
        C-contiguous results (output channels, channels, taps) and (output channels,), of that
        type; `bias` may be None.
    taps, stride, dilation, before : (int, int, int)
        Of the convolution; zeros ahead of the input, and as many after it as `grad` needs.
    threads : int
        Number of threads, at most; 0: all of OpenMP's.
    seconds, fork_join : float
        Predicted time on one thread, and what more threads have to save.
    isa : str, optional
        Instruction set (default: that of default_isa()).
    """
    cdef Py_buffer views[4]
    cdef lr_array arrays[2]
    cdef lr_gradient p
    cdef const lr_kernels *kernels
    cdef int n = 0, k, a, status
    cdef int64_t itemsize
    cdef bint has_bias = bias is not None
    isa = default_isa() if isa is None else _checked_isa("isa", isa)
    names = ("x", "grad", "weight", "bias")
    try:
        for each in (x, grad, weight, bias)[: 3 + has_bias]:
            PyObject_GetBuffer(each, &views[n],
                               PyBUF_STRIDES | PyBUF_FORMAT | (PyBUF_WRITABLE if n > 1 else 0))
            n += 1
        itemsize = 4 if views[0].itemsize == 4 else 8
        dtype = "float32" if itemsize == 4 else "float64"
        kernels = _kernels(dtype, isa)
        for k in range(n):
            if _type(views[k].format, itemsize) != LR_PLAN_TYPE:
                raise TypeError(f"{names[k]} must be a {dtype} array in native byte order")
            if <size_t>views[k].buf % <size_t>itemsize:
                raise ValueError(f"{names[k]} must be aligned to {itemsize} bytes")
        for k in range(2):
            if views[k].ndim != 5 or views[k].shape[0] != views[0].shape[0]:
                raise ValueError("x and grad must have the shape (batch, channels, d, h, w)")
            arrays[k].data = views[k].buf
            for a in range(5):
                if views[k].strides[a] % itemsize:
                    raise ValueError(
                        f"strides of {names[k]} must be multiples of {itemsize} bytes"
                    )
                arrays[k].strides[a] = views[k].strides[a] // itemsize
        p.batch, p.in_channels = views[0].shape[0], views[0].shape[1]
        p.channels = views[1].shape[1]
        for a in range(3):
            p.in_size[a], p.size[a] = views[0].shape[2 + a], views[1].shape[2 + a]
            p.taps[a], p.stride[a], p.dilation[a] = taps[a], stride[a], dilation[a]
            p.before[a] = before[a]
        if min(*taps, *stride, *dilation) < 1 or min(before) < 0:
            raise ValueError("taps, stride and dilation must be positive, before not negative")
        if not (p.in_channels and p.channels and min(p.size[0], p.size[1], p.size[2])):
            raise ValueError("x and grad must have channels and samples")
        wanted = p.channels * p.in_channels * taps[0] * taps[1] * taps[2], p.channels
        for k in range(2, n):
            _check_contiguous(names[k], &views[k], dtype, itemsize, LR_PLAN_TYPE)
            if views[k].len != wanted[k - 2] * itemsize:
                raise ValueError(f"{names[k]} must have {wanted[k - 2]} elements")
            for a in range(k):
                if _overlap(&views[a], &views[k]):
                    raise ValueError(f"{names[k]} must not overlap {names[a]}")
        with nogil:
            status = lr_run_gradient(
                &p, kernels, &arrays[0], &arrays[1], views[2].buf,
                views[3].buf if has_bias else NULL, itemsize, threads, seconds, fork_join,
            )
        if status != LR_OK:
            raise MemoryError("not enough memory for the sums of a gradient")
    finally:
        for k in range(n):
            PyBuffer_Release(&views[k])
