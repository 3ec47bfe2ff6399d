#define ELA_ISA isa_avx512_bf16
#define ELA_ISA_NAME "avx512_bf16"
#define ELA_TABLE kKernelsAvx512Bf16
#define ELA_VECTOR_BYTES 64
#include "cpu/kernels.inc"
