// The instruction set that the kernels are compiled for: ELA_ISA names its namespace, ELA_VECTOR_BYTES is the width of
// its vectors. A unit of kernels defines both before it includes kernels.inc, which refuses a unit that does not. What
// stands here is for a header that is read alone, by an editor or a check: it gets the set that every compiler has.
#pragma once

#ifndef ELA_ISA
#define ELA_ISA isa_baseline
#define ELA_VECTOR_BYTES 16
#endif
