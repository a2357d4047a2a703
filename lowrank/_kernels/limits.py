"""Constants of the C kernels that planning and the performance model read.

Tests compare each with the C source.
"""

MAX_STAGES = 16  # of a chain: LR_STAGES in isa.c
VECTOR_BYTES = 64  # of the widest instruction set, AVX-512: LR_BYTES
BLOCK_ROWS = 8  # output channels of a micro-kernel with such vectors: LR_ROWS
MAX_REMAINDER = 4  # samples at the end of a run that get no vector: LR_FEW
SCATTER_TAPS = 32  # taps that take as long as scattering one row of results: LR_PUTS
MAX_DEPTHWISE_TAPS = 1024  # per channel; dense kernels run larger ones: LR_TAPS
DEPTHWISE_L1_BYTES = 16384  # of channels that a depthwise stage packs at a time: LR_NEAR
MIN_UNITS = 4  # per thread, of an operation whose units threads share: LR_UNITS in program.c
