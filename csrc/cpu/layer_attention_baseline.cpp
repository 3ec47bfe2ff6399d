#define ELA_ISA isa_baseline
#define ELA_ISA_NAME "baseline"
#define ELA_TABLE kKernelsBaseline
#define ELA_VECTOR_BYTES 16
#include "cpu/kernels.inc"
