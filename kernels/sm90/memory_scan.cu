// Phase 4 of prefill on Hopper: the portable code, in a launch that may begin early.
#include "common/memory_scan.cuh"
#include "sm90/instantiate.h"

#define INFINI_INSTANCE(dk) INFINI_SM90_PLAIN_KEY(memory_scan, InfiniMemoryScan, ScanTile, dk)
INFINI_SM90_KEY_DIMS(INFINI_INSTANCE)
