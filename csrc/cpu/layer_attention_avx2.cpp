#define ELA_ISA isa_avx2
#define ELA_ISA_NAME "avx2"
#define ELA_TABLE kKernelsAvx2
#define ELA_VECTOR_BYTES 32
#include "cpu/kernels.inc"
