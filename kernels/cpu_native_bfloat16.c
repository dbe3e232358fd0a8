// cpu_native.c in bfloat16, where the processor multiplies that.

#ifdef __AVX512BF16__
#define BFLOAT16
#include "cpu_native.c"
#endif
