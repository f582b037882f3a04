// Phase 4 of prefill: common/memory_scan.cuh.
#include "common/instantiate.h"
#include "common/memory_scan.cuh"

#define INFINI_INSTANCE(dk) INFINI_KEY(memory_scan, InfiniMemoryScan, ScanTile, dk)
INFINI_KEY_DIMS(INFINI_INSTANCE)
