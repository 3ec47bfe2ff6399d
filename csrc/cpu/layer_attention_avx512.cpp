#define ELA_ISA isa_avx512
#define ELA_ISA_NAME "avx512"
#define ELA_TABLE kKernelsAvx512
#define ELA_VECTOR_BYTES 64
#include "cpu/kernels.inc"
