// For every processor: 16-byte vectors, which are SSE2 on x86-64 and NEON on arm64.
#define SG_ISA portable
#define VECTOR_BYTES 16
#include "isa.h"
